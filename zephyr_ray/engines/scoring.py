"""Defines the base of judges that score answers with forward passes of a local model.

The conversations of all rows in flight are batched into forward passes of a bounded number of
tokens. The model runs in transformers, which starts in seconds on a CPU or GPU; vLLM speeds up
sampling, but not a single forward pass."""

import asyncio
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import Field

from zephyr_ray.demand import GIB, GPU_RESERVE, PROCESS_BYTES, Calls
from zephyr_ray.engines.settings import JudgeEngine, ModelSettings
from zephyr_ray.errors import Permanent, RowError, Temporary
from zephyr_ray.formatting import gib
from zephyr_ray.judges.form import Judgement
from zephyr_ray.messages import Message, assistant, is_same_text, user
from zephyr_ray.models.checks import read_config
from zephyr_ray.models.shapes import Shape, context_of
from zephyr_ray.models.weights import resolve
from zephyr_ray.settings import OPERATIONAL, WEIGHTS

log = logging.getLogger("zephyr_ray")

T = TypeVar("T")

OWN_FORMS = ("score", "pairwise", "brackets")
"""Forms that these judges support."""
CPU_TOKENS, GPU_TOKENS = 2048, 16384
"""Maximum tokens per forward pass, with padding; a longer conversation gets its own pass."""


class ScoringSettings(ModelSettings):
    """Settings of a judge that scores answers with a local model."""

    uses: ClassVar[frozenset[str]] = frozenset({"judge"})

    weights: Annotated[str, WEIGHTS]
    """A packaged name, a hub id, a folder, or the name of a stage that trains a model."""
    context: int = Field(4096, ge=16)
    """Maximum tokens per conversation, not above the model's own; a row with more tokens fails."""
    gpus: Annotated[float, OPERATIONAL] = Field(0, ge=0, le=1)
    """GPUs per actor; a fraction shares one. The model runs in bf16 on a GPU, in fp32 on a CPU."""
    concurrency: Annotated[int, OPERATIONAL] = Field(256, ge=1)
    """Maximum rows in flight per actor. With more rows, passes hold conversations of more similar
    lengths and need less padding."""

    @property
    def gpus_per_actor(self) -> float:
        return self.gpus

    def judges(self, form: str) -> bool:
        return form in OWN_FORMS

    def own_calls(self, calls: Calls) -> Calls:
        return replace(calls, tokens_out=0)

    def memory(self, shape: Shape | None) -> float:
        return 0.0 if self.gpus else self._weight_bytes(shape) + PROCESS_BYTES

    def describe_memory(self, shape: Shape, gpu_gib: float | None) -> str:
        size = self._weight_bytes(shape)
        weights = f"weights {gib(size)} per actor"
        if self.gpus and gpu_gib and size + GPU_RESERVE > gpu_gib * GIB:
            return f"does not fit {gpu_gib:g} GiB: {weights}; use a smaller model"
        return weights

    def _weight_bytes(self, shape: Shape | None) -> float:
        return (2.0 if self.gpus else 4.0) * shape.parameters if shape else 0.0


@dataclass(frozen=True)
class Encoded:
    """The tokens of a conversation that ends with the judged answer."""

    ids: list[int]
    answer: range = range(0)
    """Positions of the answer's text, if the judge needs them."""


class ScoringJudge(JudgeEngine):
    """A running judge. Subclasses load the model, encode conversations and run passes."""

    def __init__(self, settings: ScoringSettings):
        self.folder = resolve(settings.weights)
        settings.check_weights(self.folder)
        self.device = "cuda" if settings.gpus else "cpu"
        self.pass_tokens = GPU_TOKENS if settings.gpus else CPU_TOKENS
        """Maximum tokens per pass, with padding."""
        longest = context_of(read_config(self.folder)) or settings.context
        self._context = min(settings.context, longest)
        self._waiting: list[tuple[Encoded, asyncio.Future[float]]] = []
        self._in_flight: dict[tuple[Any, ...], asyncio.Future[float]] = {}
        self._runner: asyncio.Task[None] | None = None

    def encode(self, messages: list[Message]) -> Encoded:
        """Returns the tokens of a conversation. Raises RowError if it cannot be encoded."""
        raise NotImplementedError

    def forward(self, conversations: list[Encoded]) -> list[float]:
        """Returns a number per conversation from one forward pass. Runs in a thread."""
        raise NotImplementedError

    def score(self, total: float, text: str) -> tuple[float | None, str]:
        """Returns the score of an answer and the reason; `total` is what `forward` returned."""
        raise NotImplementedError

    async def judge(
        self, form: str, row: dict[str, Any], answers: list[dict[str, Any]]
    ) -> Judgement:
        if form not in OWN_FORMS:
            raise Permanent(f"this judge has no form '{form}'; use a language model as judge")
        if form == "score":
            return await self._rate(row, answers[0]["text"])
        first, second = (answer["text"] for answer in answers)
        if is_same_text(first, second):
            # Scores from two passes would differ in the last digits, which would be a win.
            rating = await self._rate(row, first)
            return {"verdict": 0.5, "reason": "identical answers", "scores": [rating, rating]}
        ratings = await asyncio.gather(self._rate(row, first), self._rate(row, second))
        ours, theirs = (-math.inf if r["score"] is None else r["score"] for r in ratings)
        verdict = 0.5 if ours == theirs else float(ours > theirs)
        reason = "; the other answer: ".join(r["reason"] for r in ratings)
        return {"verdict": verdict, "reason": reason, "scores": list(ratings)}

    async def _rate(self, row: dict[str, Any], text: str) -> Judgement:
        encoded = self.encode([*row.get("context", []), user(row["prompt"]), assistant(text)])
        if len(encoded.ids) > self._context:
            raise RowError(
                f"conversation of {len(encoded.ids)} tokens does not fit the judge's context of "
                f"{self._context}; shorten the messages or raise the judge's context",
                "too long",
            )
        total = await self._run(encoded)
        if not math.isfinite(total):
            raise RowError(
                f"the judge's forward pass returned {total}; check the weights for infinite "
                "numbers and NaN, or use another model",
                "not a number",
            )
        score, reason = self.score(total, text)
        return {"score": score, "reason": reason, "checks": {}}

    async def _run(self, encoded: Encoded) -> float:
        """Returns the result of a forward pass. Identical conversations in flight share one pass,
        such as the answer of a baseline that several models are compared with."""
        key = (*encoded.ids, encoded.answer)
        future = self._in_flight.get(key)
        if future is None:
            future = self._in_flight[key] = asyncio.get_running_loop().create_future()
            future.add_done_callback(lambda _: self._in_flight.pop(key))
            self._waiting.append((encoded, future))
        if self._runner is None or self._runner.done():
            self._runner = asyncio.create_task(self._run_waiting())
        return await asyncio.shield(future)  # cancelling one row must not affect others

    async def _run_waiting(self) -> None:
        while self._waiting:
            await asyncio.sleep(0)  # rows that just got a score send their next answer first
            waiting, self._waiting = self._waiting, []
            for part in passes(waiting, self.pass_tokens):
                try:
                    totals = await asyncio.to_thread(self.forward, [e for e, _ in part])
                except Exception as error:
                    log.warning("a forward pass failed", exc_info=True)
                    reason = f"a forward pass failed: {type(error).__name__}: {error}"
                    for _, future in part:
                        if not future.done():
                            future.set_exception(Temporary(reason))
                    continue
                for (_, future), total in zip(part, totals, strict=True):
                    if not future.done():
                        future.set_result(total)


def passes(waiting: list[tuple[Encoded, T]], tokens: int) -> Iterator[list[tuple[Encoded, T]]]:
    """Yields the conversations of each forward pass: at most `tokens` tokens with padding, or one
    longer conversation. They are sorted by length to reduce padding."""
    part: list[tuple[Encoded, T]] = []
    for entry in sorted(waiting, key=lambda entry: -len(entry[0].ids)):
        if part and (len(part) + 1) * len(part[0][0].ids) > tokens:
            yield part
            part = []
        part.append(entry)
    if part:
        yield part


def load(auto: Any, folder: Path, device: str) -> Any:
    """Returns the model in this folder, ready for passes; `auto` is an Auto class of transformers.
    Raises Permanent if weights are missing; transformers would initialize them randomly."""
    import torch

    if device == "cpu":
        torch.set_num_threads(1)  # to use more cores, raise `actors`
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model, info = auto.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    if missing := sorted(info["missing_keys"]):
        raise Permanent(
            f"weights folder {folder}: the tensor {missing[0]} is missing; copy the folder again, "
            "or name another model"
        )
    model.config.use_cache = False
    return model.to(device).eval()


def padded(conversations: list[Encoded], pad: int, device: str) -> dict[str, Any]:
    """Returns the arguments of a pass: token ids, padded on the right, and the attention mask."""
    import torch

    width = max(len(c.ids) for c in conversations)
    ids = torch.full((len(conversations), width), pad)
    mask = torch.zeros_like(ids)
    for row, conversation in enumerate(conversations):
        ids[row, : len(conversation.ids)] = torch.tensor(conversation.ids)
        mask[row, : len(conversation.ids)] = 1
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
