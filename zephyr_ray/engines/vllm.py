"""Runs vLLM in this process and steps it for all conversations in flight.

Requests join and leave between steps, so batching is continuous across rows and turns. The engine
is `LLMEngine`, because `AsyncLLM` takes 40 s to start a second process.
"""

import asyncio
import itertools
import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from zephyr_ray.chat import ChatFormat
from zephyr_ray.demand import GIB, GPU_RESERVE, PROCESS_BYTES
from zephyr_ray.engines.guided import grammar
from zephyr_ray.engines.language import LanguageEngine, LanguageSettings
from zephyr_ray.errors import Permanent, RowError
from zephyr_ray.formatting import gib
from zephyr_ray.messages import Message
from zephyr_ray.models.checks import check_answers, load_chat_format
from zephyr_ray.models.contract import (
    REQUESTS,
    EngineDead,
    Reply,
    Sampling,
    TopLogprobs,
    begin_waiting_requests,
    check_stopping,
)
from zephyr_ray.models.shapes import Shape, context_of
from zephyr_ray.models.weights import resolve
from zephyr_ray.settings import OPERATIONAL, WEIGHTS

KV_CACHE_BYTES = 1 << 30
"""Bytes of the KV cache of a CPU engine; a GPU engine uses its free memory."""
GPU_SHARE = 0.92
"""Share of a GPU's memory that vLLM uses (its gpu_memory_utilization)."""
CPU_ENVIRONMENT = {
    # With more threads per engine, throughput varies from process to process.
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "TORCHDYNAMO_DISABLE": "1",
}
"""Environment variables of a CPU engine's process, set before it imports torch."""


class VllmSettings(LanguageSettings):
    """Settings of a model that runs on this cluster, and that a stage may train."""

    uses: ClassVar[frozenset[str]] = frozenset({"weights", "model", "judge"})
    gives_logprobs = True
    has_slots = True

    engine: Literal["vllm"] = "vllm"
    weights: Annotated[str, WEIGHTS]
    """A packaged name, a hub id, a folder, or the name of a stage that trains a model."""
    gpus: Annotated[float, OPERATIONAL] = Field(0, ge=0)
    """GPUs per actor; with more than one, the model is sharded (tensor parallelism)."""

    @field_validator("gpus")
    @classmethod
    def _whole_above_one(cls, value: float) -> float:
        if value > 1 and not value.is_integer():
            raise ValueError("must be a fraction of one GPU or a whole number")
        return value

    @property
    def gpus_per_actor(self) -> float:
        return self.gpus

    def start(self, seed: int) -> "VllmEngine":
        return VllmEngine(self.weights, self.context, self.gpus, seed)

    def check_weights(self, folder: Path) -> None:
        check_answers(folder)

    def memory(self, shape: Shape | None) -> float:
        if self.gpus:
            return 0.0
        weights = 2 * shape.parameters if shape else 0
        return weights + KV_CACHE_BYTES + PROCESS_BYTES

    def limit(self, shape: Shape | None) -> int | None:
        longest = (shape and shape.context) or self.context
        if self.context > longest and "context" in self.model_fields_set:
            raise Permanent(
                f"context {self.context} is above the {longest} tokens of the model; lower context"
            )
        return min(self.context, longest)

    def describe_memory(self, shape: Shape, gpu_gib: float | None) -> str:
        weights = 2.0 * shape.parameters
        kv_bytes = shape.kv_bytes(min(self.context, shape.context or self.context))
        kv_cache = f"KV cache {gib(kv_bytes)} per conversation of {self.context} tokens"
        if not self.gpus or gpu_gib is None:
            total = "" if self.gpus else f", {gib(KV_CACHE_BYTES)} in total"
            return f"weights {gib(weights)} per actor; {kv_cache}{total}"
        split = max(1, int(self.gpus))
        free = split * (GPU_SHARE * gpu_gib * GIB - GPU_RESERVE) - weights
        size = f"{gpu_gib:g} GiB" if split == 1 else f"{split} × {gpu_gib:g} GiB"
        if free < kv_bytes:
            return (
                f"does not fit {size}: weights {gib(weights)}, {kv_cache}; raise gpus:, lower "
                "context:, or use an endpoint (engine: openai)"
            )
        return (
            f"fits {size}: weights {gib(weights)}, {kv_cache}, at most {int(free / kv_bytes)} "
            "in parallel"
        )


def engine_arguments(folder: Path, context: int, gpus: float, seed: int) -> dict[str, Any]:
    """Returns the arguments of vLLM's engine; of a CPU engine if `gpus` is 0."""
    arguments: dict[str, Any] = {
        "model": str(folder),
        "dtype": "bfloat16",
        "max_model_len": context,
        "seed": seed,
        "disable_log_stats": True,
    }
    if not gpus:
        return arguments | {
            "enforce_eager": True,
            "kv_cache_memory_bytes": KV_CACHE_BYTES,
            "distributed_executor_backend": "uni",
        }
    if gpus > 1:
        # Ray gives all the GPUs to this actor, so vLLM's workers must be processes, not Ray actors.
        parallel = {"tensor_parallel_size": int(gpus), "distributed_executor_backend": "mp"}
        return arguments | parallel
    return arguments


class VllmEngine(LanguageEngine):
    """A model on this process's devices. `weights` is anything that `weights.resolve` accepts.

    `seed` seeds the engine. A seed per request would make vLLM sample over the complete vocabulary
    for each request separately, and on a CPU it breaks requests with chunked prefill.
    """

    def __init__(
        self,
        weights: str,
        context: int,
        gpus: float,
        seed: int,
        arguments: dict[str, Any] | None = None,
    ):
        """`arguments` override those of `engine_arguments`."""
        folder = resolve(weights)
        if not gpus:
            os.environ.update(CPU_ENVIRONMENT)
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ["VLLM_NO_USAGE_STATS"] = "1"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        from transformers import AutoConfig
        from vllm import EngineArgs, LLMEngine

        if not gpus:
            _sample_by_search()
        longest = context_of(AutoConfig.from_pretrained(folder).to_dict())
        self.context = min(context, longest or context)
        self.format = load_chat_format(folder, ChatFormat.to_ask)
        arguments = engine_arguments(folder, self.context, gpus, seed) | (arguments or {})
        self._engine = LLMEngine.from_engine_args(EngineArgs(**arguments))
        self._waiting: dict[str, asyncio.Future[Any]] = {}
        self._listeners: dict[str, Callable[[str], None]] = {}
        self._numbers = itertools.count()
        self._pump: asyncio.Task[None] | None = None

    async def answer(
        self,
        messages: list[Message],
        sampling: Sampling,
        listener: Callable[[str], None] | None = None,
    ) -> Reply:
        """Answers one request; `listener` gets the text so far after every step. If `sampling` has
        a schema, the answer follows it."""
        prompt = self.format.prompt(messages)
        if len(prompt) + sampling.max_tokens > self.context:
            raise RowError(
                f"prompt of {len(prompt)} tokens and answer of up to {sampling.max_tokens} do not "
                f"fit the context of {self.context}; shorten the messages or lower max_tokens",
                "too long",
            )
        from vllm import SamplingParams

        parameters: dict[str, Any] = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_tokens,
            "stop_token_ids": [self.format.stop_token_id],
            "logprobs": sampling.top_logprobs,
        }
        if sampling.schema is None:
            return await self._sample(prompt, SamplingParams(**parameters), listener)
        from vllm.sampling_params import StructuredOutputsParams

        for max_tokens in (None, sampling.max_tokens):
            guide = StructuredOutputsParams(grammar=grammar(sampling.schema, max_tokens))
            guided = SamplingParams(**parameters, structured_outputs=guide)
            reply = await self._sample(prompt, guided, listener)
            if reply.finish_reason != "length":
                break
        return reply

    async def _sample(
        self, prompt: list[int], parameters: Any, listener: Callable[[str], None] | None
    ) -> Reply:
        output = (await self.request(prompt, parameters, listener)).outputs[0]
        return Reply(
            output.text,
            output.finish_reason or "length",
            len(prompt),
            len(output.token_ids),
            _first_tokens(output.logprobs),
        )

    async def request(
        self,
        prompt: list[int],
        parameters: Any,
        listener: Callable[[str], None] | None = None,
    ) -> Any:
        """Returns vLLM's output of one request."""
        async with REQUESTS.get() or nullcontext():
            check_stopping()
            return await self._request(prompt, parameters, listener)

    async def _request(
        self, prompt: list[int], parameters: Any, listener: Callable[[str], None] | None
    ) -> Any:
        number = str(next(self._numbers))
        future = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        if listener:
            self._listeners[number] = listener
        self._engine.add_request(number, {"prompt_token_ids": prompt}, parameters)
        if self._pump is None or self._pump.done():
            self._pump = asyncio.create_task(self._step_until_idle())
        try:
            return await future
        except asyncio.CancelledError:
            self._waiting.pop(number, None)
            self._engine.abort_request([number])
            raise
        finally:
            self._listeners.pop(number, None)

    async def _step_until_idle(self) -> None:
        try:
            while self._engine.has_unfinished_requests():
                for output in self._engine.step():
                    if listener := self._listeners.get(output.request_id):
                        listener(output.outputs[0].text)
                    row = self._waiting.pop(output.request_id, None) if output.finished else None
                    if row and not row.done():  # else it was cancelled just now
                        row.set_result(output)
                await begin_waiting_requests()  # so that the next step includes them
        except Exception as error:
            for row in self._waiting.values():
                if not row.done():
                    row.set_exception(EngineDead(str(error)))
            self._waiting.clear()
            raise


def _first_tokens(logprobs: Any) -> TopLogprobs:
    """Returns the candidates for the first token with their log-probabilities, which vLLM computes
    before it applies the temperature and the grammar of a schema."""
    tokens = logprobs[0].values() if logprobs else ()
    return tuple((token.decoded_token or "", token.logprob) for token in tokens)


def _sample_by_search() -> None:
    """Replaces vLLM's CPU sampler, which draws one random number per token of the vocabulary and
    takes a third of the run time of a 135M model. One uniform number per row, searched in the
    cumulative probabilities, samples from the same distribution."""
    from vllm.v1.sample.ops import topk_topp_sampler

    topk_topp_sampler.compiled_random_sample = draw


def draw(logits: Any) -> Any:
    """Samples one index per row of logits, (n, vocabulary) → (n,), from the softmax."""
    import torch

    cumulative = logits.softmax(dim=-1, dtype=torch.float32).cumsum(dim=-1)
    uniform = torch.rand(len(logits), 1) * cumulative[:, -1:]
    indices = torch.searchsorted(cumulative, uniform, right=True).squeeze(-1)
    return indices.clamp_max(logits.shape[-1] - 1)
