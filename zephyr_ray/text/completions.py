"""Collects answers from a pool of models to the same prompts, for a judge to score or compare."""

import random
from functools import partial
from typing import Annotated, Any

from pydantic import Field

from zephyr_ray.demand import Calls
from zephyr_ray.errors import RowError
from zephyr_ray.messages import empty_answer, user, visible
from zephyr_ray.models.contract import Ask
from zephyr_ray.rows import run_rows
from zephyr_ray.settings import Reads
from zephyr_ray.stage import PROMPT_TOKENS, RowStage, Stage, Work

PRINCIPLES = {
    "helpfulness": "Give the most useful answer you can, and follow the request to the letter.",
    "harmlessness": "Answer kindly, and leave out whatever could hurt somebody.",
    "honesty": "Say what you think is so, and say plainly what you do not know.",
    "truthfulness": "State only facts that are true, and never invent one.",
    "verbalised calibration": "Answer, and say in words how sure you are of it.",
}
"""System prompts by principle. The principles are UltraFeedback's (arXiv 2310.01377); the sentences
are ours."""


class Completions(RowStage):
    """A stage that samples `per_prompt` answers to every prompt from a pool of models.

    Models are drawn without replacement; once all have answered, they repeat in the same order.
    With `principles`, each answer is sampled under a random principle as its system prompt, which
    training never sees.
    """

    kind = "completions"
    makes = "completions"

    models: Annotated[list[str], Reads("model")] = Field(min_length=1)
    prompts: Annotated[str, Reads("prompts")]
    per_prompt: int | None = Field(None, ge=1)
    """Answers per prompt; by default one per model."""
    principles: bool = False
    max_tokens: int = Field(512, ge=1)
    """Maximum tokens per answer."""
    seed: int = 0

    def run(self, work: Work) -> None:
        rng = random.Random(self.seed)
        prompts = work.inputs[self.prompts].rows()
        requests = []
        for row in prompts:
            pool = rng.sample(self.models, len(self.models))
            for number in range(self.per_prompt or len(pool)):
                system = rng.choice(list(PRINCIPLES.values())) if self.principles else None
                requests.append(
                    {
                        **row,
                        "id": f"{row['id']}/{number}",
                        "member": pool[number % len(pool)],
                        "system": system,
                    }
                )
        program = partial(complete, max_tokens=self.max_tokens)
        flaw = partial(_flaw, max_tokens=self.max_tokens)
        answers = run_rows(work, requests, program, [work.models[m] for m in self.models], flaw)
        by_prompt: dict[str, list[dict[str, Any]]] = {}
        for answer in answers:
            by_prompt.setdefault(answer.pop("id").rpartition("/")[0], []).append(answer)
            if answer["finish_reason"] == "length":
                work.counts["truncated"] = work.counts.get("truncated", 0) + 1
            if not visible(answer["text"]):
                work.counts["empty"] = work.counts.get("empty", 0) + 1
        work.counts["answers"] = len(answers)
        work.write_rows(
            {**row, "completions": by_prompt[row["id"]]}
            for row in prompts
            if row["id"] in by_prompt
        )

    def expected(self, rows: dict[str, int]) -> int | None:
        return rows.get(self.prompts)

    def answer_bounds(self) -> tuple[float, int]:
        return self.per_prompt or len(self.models), self.max_tokens

    def answer_tokens(self) -> int:
        return self.max_tokens

    def calls(self, rows: dict[str, int], reads: dict[str, Stage]) -> dict[str, Calls]:
        if (prompts := rows.get(self.prompts)) is None:
            return {}
        count = prompts * self.answer_bounds()[0] / len(self.models)
        each = Calls(count, count * PROMPT_TOKENS, count * self.max_tokens)
        return dict.fromkeys(self.models, each)


def _flaw(answer: dict[str, Any], *, max_tokens: int) -> RowError | None:
    return empty_answer(answer["text"], answer["finish_reason"], max_tokens)


async def complete(row: dict[str, Any], ask: Ask, *, max_tokens: int) -> dict[str, Any]:
    """Answers one prompt, under the row's system prompt if it has one."""
    system = [{"role": "system", "content": row["system"]}] if row["system"] else []
    reply = await ask([*system, user(row["prompt"])], max_tokens=max_tokens)
    return {
        "id": row["id"],
        "model": row["member"],
        "system": row["system"],
        "text": reply.text,
        "finish_reason": reply.finish_reason,
        "tokens": reply.completion_tokens,
    }
