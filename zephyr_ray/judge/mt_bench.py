"""Judges two-turn answers as MT-Bench does: scores from 1 to 10, or comparisons with a baseline."""

import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from zephyr_ray.demand import Calls
from zephyr_ray.errors import Permanent, suggest
from zephyr_ray.judge.mt_bench_figures import Row, difference, summary, value
from zephyr_ray.judge.mt_bench_questions import TURNS
from zephyr_ray.judge.mt_bench_section import mt_bench_section
from zephyr_ray.judge.mt_bench_turns import COMPARISON, SCORE, TwoTurns, gather, models_of
from zephyr_ray.judges import FORMS, form_identity, reply_tokens, unreadable
from zephyr_ray.models.contract import Ask
from zephyr_ray.rows import run_rows
from zephyr_ray.section import Section
from zephyr_ray.settings import Reads
from zephyr_ray.stage import PROMPT_TOKENS, RowStage, Stage, Work
from zephyr_ray.store import Artifact, write_atomically


class MtBench(RowStage):
    """Judges each turn of two-turn answers.

    Writes the figures of each model (judge/mt_bench_figures.py) to result.json, and one row per
    question with the answers and judgements of all models.
    """

    kind = "mt_bench"
    makes = "mt_bench"
    limits = "Scores are those of an automatic judge, not of people."

    judge: Annotated[str, Reads("judge", forms_in="form")]
    answers: Annotated[list[str], Reads("two_turn_answers")] = Field(min_length=1)
    baseline: str | None = None
    """Model whose answers the other models' answers are compared with, in both orders; by default,
    each answer is scored on its own."""
    seed: int = 0

    @property
    def form(self) -> str:
        """The form that the judge must support."""
        return COMPARISON if self.baseline else SCORE

    def check(self, files: dict[str, Path], reads: dict[str, Stage]) -> None:
        models = [model for stage in self.answers for model in models_of(reads[stage])]
        if repeated := [m for m in models if models.count(m) > 1]:
            raise Permanent(f"two stages have answers of '{repeated[0]}'; remove one of them")
        if self.baseline is None:
            return
        if self.baseline not in models:
            raise Permanent(
                f"baseline: no stage has answers of '{self.baseline}'"
                f"{suggest(self.baseline, models)}"
            )
        if len(models) == 1:
            raise Permanent(
                f"baseline: '{self.baseline}' is the only model; add answers of another one"
            )

    def identity(self) -> dict[str, Any]:
        return super().identity() | {"form": form_identity(self.form)}

    def run(self, work: Work) -> None:
        gathered = gather(work, self.answers)
        requests = list(gathered.requests(self.baseline))
        if not requests:
            raise Permanent(f"stage '{work.name}': no turn has an answer to judge")
        models = [work.models[self.judge]]
        judged = run_rows(work, requests, judge_turn, models, unreadable)
        result = self._result(gathered, judged)
        write_atomically(work.folder / "result.json", json.dumps(result, indent=1))
        figures = result["models"]
        work.counts["unparsable"] = sum(f["unparsable"] for f in figures.values())
        work.counts["missing"] = sum(f["missing"] for f in figures.values())
        if asked_again := sum(row.get("asked_again", 0) for row in judged):
            work.counts["unparsable_at_first"] = asked_again
        name = "win_rate" if self.baseline else "mt_bench"
        work.counts |= {
            f"{name}/{model}": f["overall"]["mean"] for model, f in figures.items() if f["overall"]
        }
        work.write_rows(_side_by_side(gathered, judged))

    def expected(self, rows: dict[str, int]) -> int | None:
        return rows.get(self.answers[0])

    def answer_tokens(self) -> int:
        return reply_tokens(self.form)

    def calls(self, rows: dict[str, int], reads: dict[str, Stage]) -> dict[str, Calls]:
        judgements, tokens = 0.0, 0
        for stage in self.answers:
            if stage not in rows:
                return {}
            answers, tokens = reads[stage].answer_bounds()
            judgements += rows[stage] * answers
        if self.baseline:
            judgements -= TURNS * rows[self.answers[0]]
        # In the second turn, the judge is shown both questions and both answers.
        return {self.judge: FORMS[self.form].calls(judgements, 2 * PROMPT_TOKENS, 2 * tokens)}

    def section(self, artifact: Artifact) -> Section:
        return mt_bench_section(artifact)

    def _result(self, gathered: TwoTurns, judged: list[Row]) -> dict[str, Any]:
        """Computes the content of result.json."""
        by_model: dict[str, list[Row]] = {m: [] for m in gathered.answers if m != self.baseline}
        for row in judged:
            by_model[row["model"]].append(row)
        *others, last = by_model
        differences = [
            {"a": last, "b": other, **estimate}
            for other in others
            if (estimate := difference(by_model[last], by_model[other], self.seed))
        ]
        return {
            "judge": self.judge,
            "baseline": self.baseline,
            "questions": len(gathered.questions),
            "models": {
                model: summary(rows, gathered.questions, self.seed)
                for model, rows in by_model.items()
            },
            "differences": differences,
        }


async def judge_turn(row: Row, ask: Ask) -> Row:
    """Judges one answer, or compares it with that of the baseline."""
    judgement = await ask.judge(row["form"], row, row["answers"])
    facts = {name: row[name] for name in ("id", "question", "category", "turn", "model")}
    return {**facts, **judgement}


def _side_by_side(gathered: TwoTurns, judged: list[Row]) -> list[Row]:
    """Returns one row per question, with the answers and judgements of all models."""
    judgements: dict[str, dict[str, list[Row | None]]] = {}
    for row in judged:
        turns = judgements.setdefault(row["question"], {}).setdefault(row["model"], [None] * TURNS)
        turns[row["turn"] - 1] = {"value": value(row), "reason": row["reason"]}
    return [
        {
            "id": question_id,
            **question,
            "answers": {
                model: by_question[question_id]
                for model, by_question in gathered.answers.items()
                if question_id in by_question
            },
            "judgements": judgements.get(question_id, {}),
        }
        for question_id, question in gathered.questions.items()
    ]
