"""The CPU sampler draws from softmax."""

import torch

from zephyr_ray.engines.vllm import draw


def test_draws_have_the_probabilities_of_softmax() -> None:
    """50,000 draws: the standard error of a share is at most 0.0023; four of them are allowed."""
    torch.manual_seed(0)
    shares = torch.tensor([0.5, 0.0, 0.2, 0.3, 0.0])
    drawn = draw(shares.log().expand(50_000, -1))
    found = torch.bincount(drawn, minlength=5) / 50_000
    assert (found - shares).abs().max() < 0.009
    assert found[1] == found[4] == 0


def test_every_row_has_a_draw_of_its_own() -> None:
    logits = torch.full((4, 6), -1e9)
    for row, word in enumerate([5, 0, 3, 3]):
        logits[row, word] = 2.0
    assert draw(logits).tolist() == [5, 0, 3, 3]
