"""Tests that the CPU sampler draws from the softmax of the logits."""

import torch

from zephyr_ray.engines.vllm import draw


def test_draws_have_the_probabilities_of_softmax() -> None:
    """50,000 draws: the standard error of a share is at most 0.0023; four are allowed."""
    torch.manual_seed(0)
    shares = torch.tensor([0.5, 0.0, 0.2, 0.3, 0.0])
    drawn = draw(shares.log().expand(50_000, -1))
    frequencies = torch.bincount(drawn, minlength=5) / 50_000
    assert (frequencies - shares).abs().max() < 0.009
    assert frequencies[1] == frequencies[4] == 0


def test_each_row_is_drawn_from_its_own_logits() -> None:
    logits = torch.full((4, 6), -1e9)
    for row, word in enumerate([5, 0, 3, 3]):
        logits[row, word] = 2.0
    assert draw(logits).tolist() == [5, 0, 3, 3]
