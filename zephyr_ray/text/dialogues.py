"""Distills dialogues from a teacher: respond, refine the instruction, respond again (UltraChat)."""

from functools import partial
from typing import Annotated, Any

from pydantic import Field

from zephyr_ray.demand import Calls
from zephyr_ray.errors import RowError
from zephyr_ray.messages import (
    Message,
    answers,
    assistant,
    empty_answer,
    user,
    visible,
    with_facts,
)
from zephyr_ray.model_pool import ModelPool, Names, names_of, share_calls
from zephyr_ray.models.contract import Ask
from zephyr_ray.settings import Reads
from zephyr_ray.stage import PROMPT_TOKENS, RowStage, Stage, Work

REFINED_TOKENS = 48
"""Maximum tokens per follow-up question."""


class SelfRefine(RowStage):
    """Makes dialogues of `turns` questions and answers from prompts. With several teachers, one of
    them writes each dialogue, chosen by rendezvous hashing of its prompt."""

    kind = "self_refine"
    makes = "dialogues"
    limits = "A model wrote the dialogues; no person checked whether the answers are true."

    model: Annotated[Names, Reads("model")]
    """The teacher, or a list of teachers."""
    prompts: Annotated[str, Reads("prompts")]
    turns: int = Field(2, ge=1)
    max_tokens: int = Field(512, ge=1)
    """Maximum tokens per answer."""
    seed: int = 0

    def run(self, work: Work) -> None:
        program = partial(self_refine, turns=self.turns, max_tokens=self.max_tokens)
        flaw = partial(_flaw, max_tokens=self.max_tokens)
        prompts = work.inputs[self.prompts].rows()
        teachers = ModelPool.of(work, self.model, self.seed)
        # The journal may hold rows of an earlier version.
        made = teachers.run(work, prompts, program, flaw)
        rows = [with_facts(row) for own in made for row in own]
        replies = [answer for row in rows for answer in answers(row["messages"])]
        work.counts["answers"] = len(replies)
        work.counts["truncated"] = sum(answer["finish_reason"] == "length" for answer in replies)
        if empty := sum(not visible(answer["content"]) for answer in replies):
            work.counts["empty"] = empty
        teachers.count_made(work, (row["model"] for row in rows))
        work.write_rows(rows)

    def expected(self, rows: dict[str, int]) -> int | None:
        return rows.get(self.prompts)

    def answer_bounds(self) -> tuple[float, int]:
        return self.turns, self.max_tokens

    def answer_tokens(self) -> int:
        return self.max_tokens

    def calls(self, rows: dict[str, int], reads: dict[str, Stage]) -> dict[str, Calls]:
        if (prompts := rows.get(self.prompts)) is None:
            return {}
        # Each turn takes a call for its answer; each but the first also takes one for its question.
        count = prompts * (2 * self.turns - 1)
        tokens_in = PROMPT_TOKENS + (self.turns - 1) * (PROMPT_TOKENS + self.max_tokens) / 2
        total = Calls(count, count * tokens_in, prompts * self.turns * self.max_tokens)
        return share_calls(total, names_of(self.model))


def _flaw(row: dict[str, Any], *, max_tokens: int) -> RowError | None:
    """Returns the fault of a dialogue whose first answer is empty. A later one is no fault: the
    `clean` stage cuts the dialogue before it."""
    first = answers(with_facts(row)["messages"])[0]
    return empty_answer(first["content"], first.get("finish_reason"), max_tokens)


async def self_refine(
    row: dict[str, Any], ask: Ask, *, turns: int, max_tokens: int
) -> dict[str, Any]:
    """Asks x⁰ → y⁰ → x¹ (a follow-up to x⁰ and y⁰) → y¹ …; see arXiv 2310.16944, section 3."""
    instruction = row["instruction"]
    constraint_sentence = row["prompt"][len(instruction) :]
    messages: list[Message] = []
    for turn in range(turns):
        if turn:
            instruction = await _refine(instruction, answers(messages)[-1]["content"], ask)
        messages.append(user(instruction + constraint_sentence, instruction=instruction))
        reply = await ask(messages, max_tokens=max_tokens)
        messages.append(assistant(reply.text, finish_reason=reply.finish_reason))
    return {**row, "messages": messages}


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
        with_demonstrations=False,
    )
    lines = [line.strip(" \"'") for line in reply.text.splitlines() if line.strip()]
    return lines[0] if lines else instruction
