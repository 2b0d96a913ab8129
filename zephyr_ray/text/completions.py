"""Collects answers from a pool of models to the same prompts, for a judge to score or compare."""

from functools import partial
from typing import Annotated, Any

from pydantic import Field

from zephyr_ray.demand import Calls
from zephyr_ray.errors import RowError
from zephyr_ray.messages import empty_answer, user, visible
from zephyr_ray.model_pool import ModelPool, share_calls
from zephyr_ray.models.contract import Ask
from zephyr_ray.principles import draw, principle_table, texts_hash
from zephyr_ray.section import Chapter, Place, Section
from zephyr_ray.settings import Reads
from zephyr_ray.stage import PROMPT_TOKENS, RowStage, Stage, Work
from zephyr_ray.store import Artifact


class Completions(RowStage):
    """Samples `per_prompt` answers to every prompt from a pool of models.

    The models are ranked for each prompt by rendezvous hashing, and the first ones answer; once all
    have answered, they answer again in the same order. With `principles`, each answer is sampled
    with a principle as its system prompt, which training never sees.
    """

    kind = "completions"
    makes = "completions"
    limits = "Models wrote the answers; no person checked whether they are true."

    models: Annotated[list[str], Reads("model")] = Field(min_length=1)
    prompts: Annotated[str, Reads("prompts")]
    per_prompt: int | None = Field(None, ge=1)
    """Answers per prompt; by default one per model."""
    principles: bool = False
    """Whether to sample each answer under one of UltraFeedback's principles, in its proportions for
    the prompt's `source`."""
    max_tokens: int = Field(512, ge=1)
    """Maximum tokens per answer."""
    seed: int = 0

    def run(self, work: Work) -> None:
        prompts = work.inputs[self.prompts].rows()
        pool = ModelPool.of(work, self.models, self.seed)
        program = partial(
            complete, max_tokens=self.max_tokens, principles=self.principles, seed=self.seed
        )
        flaw = partial(_flaw, max_tokens=self.max_tokens)
        per_prompt = self.per_prompt or len(self.models)
        by_prompt = pool.run(work, prompts, program, flaw, per_prompt)
        answers = [answer for own in by_prompt for answer in own]
        for answer in answers:
            del answer["id"]
            if answer["finish_reason"] == "length":
                work.counts["truncated"] = work.counts.get("truncated", 0) + 1
            if not visible(answer["text"]):
                work.counts["empty"] = work.counts.get("empty", 0) + 1
        work.counts["answers"] = len(answers)
        pool.count_made(work, (answer["model"] for answer in answers))
        work.write_rows(
            {**row, "completions": own} for row, own in zip(prompts, by_prompt, strict=True) if own
        )

    def identity(self) -> dict[str, Any]:
        settings = super().identity()
        if self.principles:
            settings["principles"] = texts_hash()
        return settings

    def expected(self, rows: dict[str, int]) -> int | None:
        return rows.get(self.prompts)

    def answer_bounds(self) -> tuple[float, int]:
        return self.per_prompt or len(self.models), self.max_tokens

    def answer_tokens(self) -> int:
        return self.max_tokens

    def calls(self, rows: dict[str, int], reads: dict[str, Stage]) -> dict[str, Calls]:
        if (prompts := rows.get(self.prompts)) is None:
            return {}
        count = prompts * self.answer_bounds()[0]
        total = Calls(count, count * PROMPT_TOKENS, count * self.max_tokens)
        return share_calls(total, self.models)

    def section(self, artifact: Artifact) -> Section | None:
        """Returns a table of the answers by principle, if they have principles."""
        completions = (c for row in artifact.rows() for c in row["completions"])
        if not self.principles or not (blocks := principle_table(completions)):
            return None
        return Section((Chapter("Principles of the answers", Place.PROCESS, tuple(blocks)),))


def _flaw(answer: dict[str, Any], *, max_tokens: int) -> RowError | None:
    return empty_answer(answer["text"], answer["finish_reason"], max_tokens)


async def complete(
    row: dict[str, Any], ask: Ask, *, max_tokens: int, principles: bool = False, seed: int = 0
) -> dict[str, Any]:
    """Answers one prompt; with `principles`, under a system prompt that asks for one of them."""
    principle = draw(seed, row) if principles else None
    system = [{"role": "system", "content": principle.system}] if principle else []
    reply = await ask([*system, user(row["prompt"])], max_tokens=max_tokens)
    return {
        "id": row["id"],
        "model": row["member"],
        "principle": principle.name if principle else None,
        "system": principle.system if principle else None,
        "text": reply.text,
        "finish_reason": reply.finish_reason,
        "tokens": reply.completion_tokens,
    }
