"""Computes log-probabilities of given continuations with vLLM, for multiple-choice questions.

The requests for the continuations of one context are sent together and share the context's blocks
through vLLM's prefix cache. vLLM computes the logits of every prompt token that is not cached."""

import asyncio
import math
from pathlib import Path
from typing import Any, Literal

from zephyr_ray.engines.model import Model
from zephyr_ray.engines.vllm import VllmEngine, VllmSettings
from zephyr_ray.errors import Permanent
from zephyr_ray.models.checks import read_config
from zephyr_ray.models.shapes import Shape, context_of

BLOCK_TOKENS = 32
"""Tokens per block of a CPU engine's KV cache, the fewest that vLLM supports there; its default of
128 would not share short contexts."""
LONG_CONTEXT = 4 * BLOCK_TOKENS
"""Minimum tokens of a context that is computed first, without logits."""

Scored = tuple[float, bool]
"""Sum of the log-probabilities of a continuation's tokens, and whether each is the most likely."""


class ContinuationSettings(VllmSettings):
    """Settings of a model that scores continuations. It runs in bf16 on a GPU, and in fp32
    on a CPU, because bf16 moves log-probabilities by more than the gap between some choices."""

    continuations: Literal[True] = True
    """Distinguishes these settings from those of an engine that answers prompts with the same
    weights, so that the two do not share one engine."""

    @staticmethod
    def of(model: VllmSettings, context: int) -> "ContinuationSettings":
        """Returns the settings that score with the weights of a model; `context` is in tokens."""
        shared = model.model_dump(include={"weights", "gpus", "actors", "concurrency"})
        return ContinuationSettings.model_validate(shared | {"context": context})

    def start(self, seed: int) -> "ContinuationEngine":
        return ContinuationEngine(self, seed)

    def memory(self, shape: Shape | None) -> float:
        fp32 = 2.0 * shape.parameters if shape and not self.gpus else 0.0
        return super().memory(shape) + fp32

    def longest(self, folder: Path) -> int:
        """Returns the maximum tokens of a context and a continuation together."""
        context = min(self.context, context_of(read_config(folder)) or self.context)
        return context - 1  # vLLM generates one token


class ContinuationEngine(VllmEngine):
    """A running model that scores continuations of token ids."""

    def __init__(self, settings: ContinuationSettings, seed: int):
        on_cpu: dict[str, Any] = {"block_size": BLOCK_TOKENS, "dtype": "float32"}
        super().__init__(
            weights=settings.weights,
            context=settings.context,
            gpus=settings.gpus,
            seed=seed,
            arguments=None if settings.gpus else on_cpu,
        )

    def ask_for(self, model: Model, row: dict[str, Any]) -> Any:
        return self

    async def scores(self, context: list[int], continuations: list[list[int]]) -> list[Scored]:
        """Returns the score of each continuation of a context. Raises Permanent if the model
        returns infinity or NaN."""
        if all(len(continuation) == 1 for continuation in continuations):
            scored = await self._score_tokens(context, [c[0] for c in continuations])
        else:
            if len(context) >= LONG_CONTEXT:
                await self._compute(context)
            requests = (self._score(context, continuation) for continuation in continuations)
            scored = await asyncio.gather(*requests)
        if not all(math.isfinite(total) for total, _ in scored):
            raise Permanent(
                "the model returns log-probabilities that are infinite or NaN; use other weights"
            )
        return scored

    async def _score_tokens(self, context: list[int], tokens: list[int]) -> list[Scored]:
        """Scores continuations of one token, all with one request."""
        from vllm import SamplingParams

        output = await self.request(
            context,
            SamplingParams(
                temperature=0, max_tokens=1, detokenize=False, logprob_token_ids=sorted(set(tokens))
            ),
        )
        [likely], [by_token] = output.outputs[0].token_ids, output.outputs[0].logprobs
        return [(by_token[token].logprob, token == likely) for token in tokens]

    async def _score(self, context: list[int], continuation: list[int]) -> Scored:
        from vllm import SamplingParams

        for skip_cache in (False, True):
            output = await self.request(
                context + continuation,
                SamplingParams(
                    temperature=0,
                    max_tokens=1,
                    detokenize=False,
                    prompt_logprobs=0,
                    skip_reading_prefix_cache=skip_cache,
                ),
            )
            # Cached tokens have no logits, and the cache may hold the start of this continuation if
            # another one starts with the same tokens.
            if output.num_cached_tokens < len(context):
                break
        values = [
            by_token[token]
            for token, by_token in zip(
                continuation, output.prompt_logprobs[len(context) :], strict=True
            )
        ]
        return math.fsum(v.logprob for v in values), all(v.rank == 1 for v in values)

    async def _compute(self, context: list[int]) -> None:
        """Puts the full blocks of a context into the prefix cache."""
        from vllm import SamplingParams

        await self.request(context, SamplingParams(temperature=0, max_tokens=1, detokenize=False))
