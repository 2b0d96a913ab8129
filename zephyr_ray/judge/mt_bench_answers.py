"""Collects answers to two-turn questions, at MT-Bench's temperature for each category."""

from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from zephyr_ray.demand import Calls
from zephyr_ray.digests import known_digest
from zephyr_ray.errors import RowError
from zephyr_ray.judge.mt_bench_questions import (
    COUNTS,
    PACKAGES,
    REFERENCED,
    SHIPPED,
    TEMPERATURES,
    TURNS,
    QuestionSet,
    Row,
    fetch_questions,
    read_questions,
)
from zephyr_ray.messages import Message, assistant, empty_answer, user, visible
from zephyr_ray.model_pool import Distinct
from zephyr_ray.models.contract import Ask
from zephyr_ray.rows import run_rows
from zephyr_ray.settings import FILE, Reads
from zephyr_ray.stage import PROMPT_TOKENS, RowStage, Stage, Work


class MtBenchAnswers(RowStage):
    """Asks each model every two-turn question.

    If a model cannot answer the second turn, for example because its first answer leaves no room
    in the context, that answer is null.
    """

    kind = "mt_bench_answers"
    makes = "two_turn_answers"
    limits = "Models wrote the answers; no person checked whether they are true."

    models: Annotated[list[str], Distinct, Reads("model")] = Field(min_length=1)
    questions: Annotated[QuestionSet | str | None, FILE, Field(union_mode="left_to_right")] = None
    """A JSONL file in MT-Bench's format, or `mt_bench`, which downloads MT-Bench's 80 questions; by
    default, the 16 questions of this package."""
    max_tokens: int = Field(1024, ge=1)
    """Maximum tokens per answer."""
    seed: int = 0

    def identity(self) -> dict[str, Any]:
        settings = super().identity()
        if isinstance(self.questions, str):
            return settings
        del settings["questions"]
        if self.questions is None:
            return settings | {"shipped_questions": known_digest(SHIPPED)}
        return settings | {"packaged_questions": PACKAGES[self.questions].identity}

    def check(self, files: dict[str, Path], reads: dict[str, Stage]) -> None:
        if files:
            read_questions(files["questions"])

    def preflight(self) -> None:
        if isinstance(self.questions, QuestionSet):
            fetch_questions(self.questions)

    def run(self, work: Work) -> None:
        questions = read_questions(self._path(work.files))
        requests = [
            # The sample omits the model's name, so that a renamed model reuses its logged answers.
            {**row, "id": f"{row['id']}/{name}", "sample": row["id"], "member": name}
            for row in questions
            for name in self.models
        ]
        program = partial(answer_turns, max_tokens=self.max_tokens)
        flaw = partial(_flaw, max_tokens=self.max_tokens)
        models = [work.models[name] for name in self.models]
        made = {row["id"]: row for row in run_rows(work, requests, program, models, flaw)}
        rows = [
            {
                **row,
                "completions": [
                    {"model": name, "turns": made[request_id]["turns"]}
                    for name in self.models
                    if (request_id := f"{row['id']}/{name}") in made
                ],
            }
            for row in questions
        ]
        turns = [turn for row in rows for own in row["completions"] for turn in own["turns"]]
        answers = [turn for turn in turns if turn is not None]
        work.counts["answers"] = len(answers)
        work.counts["truncated"] = sum(a["finish_reason"] == "length" for a in answers)
        work.counts["empty"] = sum(not visible(a["text"]) for a in answers)
        work.counts["missing_answers"] = TURNS * len(requests) - len(answers)
        work.counts["without_reference"] = sum(
            row["category"] in REFERENCED and not row["reference"] for row in rows
        )
        work.write_rows(rows)

    def expected(self, rows: dict[str, int]) -> int | None:
        if self.questions is None:
            return len(read_questions(SHIPPED))
        return COUNTS.get(self.questions) if isinstance(self.questions, QuestionSet) else None

    def rows_of_files(self, files: dict[str, Path]) -> int | None:
        return len(read_questions(files["questions"]))

    def answer_bounds(self) -> tuple[float, int]:
        return TURNS * len(self.models), self.max_tokens

    def answer_tokens(self) -> int:
        # In the second turn, the context holds both answers.
        return TURNS * self.max_tokens

    def calls(self, rows: dict[str, int], reads: dict[str, Stage]) -> dict[str, Calls]:
        if (questions := self.expected(rows)) is None:
            return {}
        tokens_in = PROMPT_TOKENS + 2 * PROMPT_TOKENS + self.max_tokens
        calls = Calls(TURNS * questions, questions * tokens_in, TURNS * questions * self.max_tokens)
        return dict.fromkeys(self.models, calls)

    def _path(self, files: dict[str, Path]) -> Path:
        if isinstance(self.questions, QuestionSet):
            return fetch_questions(self.questions)
        return files.get("questions", SHIPPED)


async def answer_turns(row: Row, ask: Ask, *, max_tokens: int) -> Row:
    """Answers the turns of a question; the second request contains the first answer. If a later
    turn fails, its answer is None and "fault" has the error."""
    temperature = TEMPERATURES.get(row["category"])
    messages: list[Message] = []
    turns: list[Row | None] = []
    for question in row["turns"]:
        messages.append(user(question))
        try:
            reply = await ask(messages, max_tokens=max_tokens, temperature=temperature)
        except RowError as error:
            if not turns:
                raise
            missing = [None] * (TURNS - len(turns))
            fault = {"text": str(error), "cause": error.cause}
            return {"id": row["id"], "turns": [*turns, *missing], "fault": fault}
        messages.append(assistant(reply.text))
        turns.append(
            {
                "text": reply.text,
                "finish_reason": reply.finish_reason,
                "tokens": reply.completion_tokens,
            }
        )
    return {"id": row["id"], "turns": turns}


def _flaw(row: Row, *, max_tokens: int) -> RowError | None:
    """Returns the fault of a missing or empty answer, which counts against `max_failed`."""
    if fault := row.get("fault"):
        return RowError(fault["text"], fault["cause"])
    faults = (empty_answer(t["text"], t["finish_reason"], max_tokens) for t in row["turns"])
    return next(filter(None, faults), None)
