"""Checks PyTorch's varlen kernel against attention in fp64, and times it beside SDPA in bf16."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zephyr_ray.train.attention import Segments, attend, attend_sdpa

HEADS, KEY_HEADS, HEAD = 16, 4, 128


def documents(lengths: list[int], device: str) -> Segments:
    """Returns the segments of packed dialogues."""
    offsets = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    return Segments(offsets, offsets, max(lengths), max(lengths))


def shared(pairs: list[tuple[int, int, int]], device: str) -> Segments:
    """Returns the segments of pairs (prompt, chosen, rejected) that share their prompt: the second
    segment of each has fewer queries than keys."""
    from zephyr_ray.train.pairs import shared_prompts

    tokens = lambda count: [1] * count  # noqa: E731
    batch = shared_prompts(
        [
            {"prompt_ids": tokens(p), "chosen_ids": tokens(c), "rejected_ids": tokens(r)}
            for p, c, r in pairs
        ]
    )
    return Segments(
        batch["cu_seq_lens_q"].to(device),
        batch["cu_seq_lens_k"].to(device),
        batch["max_length_q"],
        batch["max_length_k"],
        batch["key_rows"].to(device),
    )


def errors(segments: Segments, device: str) -> tuple[dict[str, float], dict[str, float]]:
    """Returns ‖x − reference‖ / ‖reference‖ of the output and the gradients, of `attend` in bf16
    and of SDPA per segment in bf16; the reference is SDPA per segment in fp64."""
    tokens = int(segments.query_offsets[-1])
    inputs = [
        torch.randn(1, heads, tokens, HEAD, device=device, dtype=torch.bfloat16)
        for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    ]
    upstream = torch.randn(1, HEADS, tokens, HEAD, device=device, dtype=torch.bfloat16)

    def run(function: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        leaves = [tensor.to(dtype).requires_grad_() for tensor in inputs]
        output = function(*leaves, segments)
        return [output.detach(), *torch.autograd.grad(output, leaves, upstream.to(dtype))]

    reference = run(attend_sdpa, torch.float64)

    def differences(results: list[Tensor]) -> dict[str, float]:
        names = ("output", "query", "key", "value")
        return {
            name: float((ours.double() - exact).norm() / exact.norm())
            for name, ours, exact in zip(names, results, reference, strict=True)
        }

    return differences(run(attend, torch.bfloat16)), differences(run(attend_sdpa, torch.bfloat16))


def milliseconds(work: Callable[[], Any], repeats: int = 20) -> float:
    """Returns the median time of `work` on the GPU, in milliseconds."""
    for _ in range(3):
        work()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[repeats // 2]


def forward_and_backward(attention: Callable[..., Tensor], segments: Segments) -> float:
    """Returns the milliseconds of a forward and a backward pass in bf16."""
    tokens = int(segments.query_offsets[-1])
    inputs = [
        torch.randn(1, heads, tokens, HEAD, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    ]
    upstream = torch.randn(1, HEADS, tokens, HEAD, device="cuda", dtype=torch.bfloat16)
    return milliseconds(lambda: torch.autograd.grad(attention(*inputs, segments), inputs, upstream))


def dense(query: Tensor, key: Tensor, value: Tensor, segments: Segments) -> Tensor:
    """Attends with one mask over all documents of the row, as transformers' "sdpa" does."""
    at = torch.arange(query.shape[2], device=query.device, dtype=torch.int32)
    document = torch.bucketize(at, segments.query_offsets, right=True)
    mask = (document[:, None] == document) & (at[:, None] >= at)
    key, value = (states.repeat_interleave(HEADS // KEY_HEADS, dim=1) for states in (key, value))
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def check() -> list[tuple[str, dict[str, Any]]]:
    """Returns errors and times of packed documents and of pairs, as named values."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(torch.seed() % 2**31)
    lengths = [700, 1, 348, 999, 1500, 548]
    rows = {
        "packed documents": documents(lengths, device),
        "pairs, aligned at the end": shared([(177, 272, 301), (2, 40, 9), (512, 1, 1)], device),
    }
    results: list[tuple[str, dict[str, Any]]] = []
    for name, segments in rows.items():
        ours, sdpa = errors(segments, device)
        passed = all(ours[part] < 2 * sdpa[part] + 1e-3 for part in ours)
        verdict = {"passed": passed, "varlen": ours, "sdpa": sdpa}
        results.append((f"attention, {name}, error in bf16 against fp64", verdict))
    if device == "cuda":
        times = {}
        packed, pair = documents(lengths * 2, device), shared([(177, 272, 300)] * 8, device)
        for name, function, segments in (
            ("varlen", attend, packed),
            ("sdpa_per_document", attend_sdpa, packed),
            ("sdpa_one_mask", dense, packed),
            ("varlen_pairs", attend, pair),
            ("sdpa_pairs", attend_sdpa, pair),
        ):
            times[name] = forward_and_backward(function, segments)
        results.append(("attention, 8,192 tokens, 8 pairs, both passes in ms", times))
    return results
