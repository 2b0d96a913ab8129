"""Distilled dialogues: respond, refine the instruction, respond again (as UltraChat was made)."""

from functools import partial
from typing import Annotated, Any

from pydantic import Field

from zephyr_ray.models.contract import Ask, Message, assistant, user
from zephyr_ray.rows import run_rows
from zephyr_ray.settings import Reads
from zephyr_ray.stage import Stage, Work

REFINED_TOKENS = 48


class SelfRefine(Stage):
    """Makes dialogues of `turns` questions and answers from prompts, with one teacher."""

    kind = "self_refine"
    makes = "dialogues"

    model: Annotated[str, Reads("model")]
    prompts: Annotated[str, Reads("prompts")]
    turns: int = Field(2, ge=1)
    max_tokens: int = Field(512, ge=1)
    seed: int = 0

    def run(self, work: Work) -> None:
        program = partial(self_refine, turns=self.turns, max_tokens=self.max_tokens)
        prompts = work.inputs[self.prompts].rows()
        rows = run_rows(work, prompts, program, [work.models[self.model]])
        work.counts["answers"] = sum(len(row["finish"]) for row in rows)
        work.counts["truncated"] = sum(f == "length" for row in rows for f in row["finish"])
        work.write_rows(rows)

    def expected(self, rows: dict[str, int]) -> int | None:
        return rows.get(self.prompts)


async def self_refine(
    row: dict[str, Any], ask: Ask, *, turns: int, max_tokens: int
) -> dict[str, Any]:
    """x⁰ → y⁰ → x¹ (the teacher's follow-up to x⁰ and y⁰) → y¹ …; arXiv 2310.16944, section 3."""
    instruction = row["instruction"]
    asked_for = row["prompt"][len(instruction) :]  # the sentence that states the constraint
    messages: list[Message] = []
    instructions, finish = [], []
    for turn in range(turns):
        if turn:
            instruction = await _refine(instruction, messages[-1]["content"], ask)
        messages.append(user(instruction + asked_for))
        reply = await ask(messages, max_tokens=max_tokens)
        messages.append(assistant(reply.text))
        instructions.append(instruction)
        finish.append(reply.finish_reason)
    return {**row, "messages": messages, "instructions": instructions, "finish": finish}


async def _refine(instruction: str, answer: str, ask: Ask) -> str:
    reply = await ask(
        [
            user(
                f"A person asked: {instruction}\nThe answer was: {answer}\n\n"
                "Write the next question the person could ask, in one short sentence. "
                "Reply with the question only."
            )
        ],
        max_tokens=REFINED_TOKENS,
        shown=False,
    )
    lines = [line.strip(" \"'") for line in reply.text.splitlines() if line.strip()]
    return lines[0] if lines else instruction
