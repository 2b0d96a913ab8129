"""Collects AI feedback: a judge rates every completion, in one or more forms, and gives reasons."""

import hashlib
import heapq
import json
import math
from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import Field, field_validator

from zephyr_ray.demand import Calls
from zephyr_ray.errors import suggest
from zephyr_ray.formatting import number
from zephyr_ray.judges import RATING_FORMS, form_identity, reply_tokens, unreadable
from zephyr_ray.judges.self_check import (
    Rated,
    SelfCheck,
    check_table,
    means_table,
    self_check,
    to_json,
)
from zephyr_ray.models.contract import Ask
from zephyr_ray.principles import principle_table
from zephyr_ray.rows import run_rows
from zephyr_ray.section import Answer, Block, Chapter, Histogram, Place, Sample, Section, Text
from zephyr_ray.settings import ADDED, Reads
from zephyr_ray.stage import PROMPT_TOKENS, RowStage, Stage, Work
from zephyr_ray.store import Artifact, write_atomically

Row = dict[str, Any]

FIRST_FORM = "score"
"""The form whose request ids are completion ids alone, as in journals of earlier versions."""
NOT_JUDGED: Row = {"score": None, "reason": "not judged", "checks": {}}
"""Columns of an answer that the first form did not judge."""
SELF_CHECK = "self_check.json"
SAMPLES = 2
"""Prompts whose judgements the report shows."""


class Feedback(RowStage):
    """Rates completions with a judge. The score of a completion is that of the first of `forms`:
    the judge's score, its overall score, or the mean of its ratings of the aspects."""

    kind = "feedback"
    makes = "feedback"
    limits = "Scores are those of an automatic judge, not of people."

    judge: Annotated[str, Reads("judge", forms_in="forms")]
    completions: Annotated[str, Reads("completions")]
    forms: Annotated[list[str], ADDED] = Field([FIRST_FORM], min_length=1)
    """Forms of judgement: `score`, `aspects`, `critique`."""
    rated_again: Annotated[float, ADDED] = Field(0.05, ge=0, le=1)
    """Share of the prompts whose answers are rated again in another order, to check the judge; only
    in forms that rate the answers to a prompt together."""
    seed: int = 0

    @field_validator("forms")
    @classmethod
    def _known_and_distinct(cls, forms: list[str]) -> list[str]:
        for form in forms:
            if form not in RATING_FORMS:
                raise ValueError(f"no form '{form}' rates answers{suggest(form, RATING_FORMS)}")
        if len(set(forms)) < len(forms):
            raise ValueError("names a form twice; remove one")
        return forms

    def run(self, work: Work) -> None:
        prompts = work.inputs[self.completions].rows()
        requests = list(self._requests(prompts))
        results = run_rows(work, requests, rate, [work.models[self.judge]], unreadable)
        judgements = {row["id"]: row for row in results}
        judged = [(r, judgements[r["id"]]) for r in requests if r["id"] in judgements]
        columns = self._columns(judged)
        self._count(work, judged, columns)
        checks = self._checks(judged)
        for check in checks:
            work.counts |= check.counts()
        write_atomically(work.folder / SELF_CHECK, json.dumps(to_json(checks), indent=1))
        work.write_rows(
            {
                **row,
                "completions": [
                    completion | columns[answer]
                    for answer, completion in _answers(row)
                    if answer in columns
                ],
            }
            for row in prompts
        )

    def _requests(self, prompts: list[Row]) -> Iterator[Row]:
        """Yields one row per judgement: of a prompt's answers together, or of one answer."""
        count = self._count_again(len(prompts))
        sample = set(heapq.nsmallest(count, (row["id"] for row in prompts), key=_hash))
        for form in self.forms:
            together = RATING_FORMS[form].fields is None
            for row in prompts:
                answers = _answers(row)
                if together:
                    yield _request(row, form, f"{row['id']}/{form}", answers)
                    if len(answers) > 1 and row["id"] in sample:
                        # The form shuffles both lists alike, so every answer changes position.
                        moved = [*answers[1:], answers[0]]
                        again = _request(row, form, f"{row['id']}/{form}/again", moved)
                        yield again | {"again": True, "sample": 1}
                else:
                    suffix = "" if form == FIRST_FORM else f"/{form}"
                    for answer in answers:
                        yield _request(row, form, f"{answer[0]}{suffix}", [answer])

    def _count_again(self, prompts: int) -> int:
        """Returns how many of the prompts are rated again."""
        # Rounded first, because 0.07 * 100 is a little more than 7.
        return math.ceil(round(self.rated_again * prompts, 6))

    def _columns(self, judged: list[tuple[Row, Row]]) -> dict[str, Row]:
        """Returns the columns that the judge adds, by answer. Only the first form gives the score,
        because forms have different scales."""
        columns: dict[str, Row] = {}
        for request, judgement in judged:
            if request["again"]:
                continue
            rated = RATING_FORMS[request["form"]].columns(judgement)
            for answer, new in zip(request["answers"], rated, strict=True):
                known = columns.setdefault(answer, dict(NOT_JUDGED))
                if request["form"] != self.forms[0]:
                    new = {name: value for name, value in new.items() if name not in NOT_JUDGED}
                columns[answer] = known | new
        return columns

    def _count(self, work: Work, judged: list[tuple[Row, Row]], columns: dict[str, Row]) -> None:
        work.counts["unparsable"] = sum(unreadable(j) is not None for _, j in judged)
        if asked_again := sum(j.get("asked_again", 0) for _, j in judged):
            work.counts["unparsable_at_first"] = asked_again
        work.counts["answers"] = len(columns)
        scores = [c["score"] for c in columns.values() if c["score"] is not None]
        if scores:
            work.counts["score_mean"] = sum(scores) / len(scores)

    def _checks(self, judged: list[tuple[Row, Row]]) -> list[SelfCheck]:
        checks = []
        for form in self.forms:
            rated: dict[bool, list[Rated]] = {False: [], True: []}
            for request, judgement in judged:
                if request["form"] == form:
                    rated[request["again"]] += _rated(request, judgement)
            checks += [self_check(n, rated[False], rated[True]) for n in RATING_FORMS[form].rates]
        return checks

    def identity(self) -> dict[str, Any]:
        settings = super().identity()
        if self.forms != [FIRST_FORM]:
            # The stage's version stands for the wording of the first form, as in earlier versions.
            settings["forms"] = [f if f == FIRST_FORM else form_identity(f) for f in self.forms]
        return settings

    def expected(self, rows: dict[str, int]) -> int | None:
        return rows.get(self.completions)

    def answer_tokens(self) -> int:
        return max(map(reply_tokens, self.forms))

    def calls(self, rows: dict[str, int], reads: dict[str, Stage]) -> dict[str, Calls]:
        if (prompts := rows.get(self.completions)) is None:
            return {}
        each, tokens = reads[self.completions].answer_bounds()
        calls = []
        for name in self.forms:
            form = RATING_FORMS[name]
            together = form.fields is None
            judgements = prompts + self._count_again(prompts) if together else prompts * each
            answers = each if together else 1
            calls.append(form.calls(judgements, PROMPT_TOKENS, tokens, answers))
        return {
            self.judge: Calls(
                sum(c.calls for c in calls),
                sum(c.tokens_in for c in calls),
                sum(c.tokens_out for c in calls),
            )
        }

    def section(self, artifact: Artifact) -> Section | None:
        """Returns one histogram of scores per model, the check of the judge, and samples of what it
        wrote; answers without a score are only counted."""
        rows = artifact.rows()
        completions = [c for row in rows for c in row["completions"]]
        scores: dict[str, list[float]] = {}
        for completion in completions:
            if completion["score"] is not None:
                scores.setdefault(completion["model"], []).append(completion["score"])
        if not completions:
            return None
        highest = RATING_FORMS[self.forms[0]].highest
        blocks: list[Block] = [Histogram(model, tuple(s), highest) for model, s in scores.items()]
        if not scores:
            blocks = [Text(f"None of {number(len(completions))} answers has a readable score.")]
        elif unscored := sum(completion["score"] is None for completion in completions):
            note = f"{number(unscored)} answers have no readable score."
            blocks.insert(0, Text(note, soft=True))
        if SELF_CHECK in artifact.manifest.files:
            checks = json.loads(artifact.file(SELF_CHECK).read_text(encoding="utf-8"))
            blocks += [means_table(checks)] if len(checks) > 1 else []
            blocks.append(check_table(checks))
        blocks += principle_table(completions)
        chapters = [Chapter("Scores the judge gave", Place.PROCESS, tuple(blocks))]
        if self.forms != [FIRST_FORM]:
            samples = tuple(self._sample(row) for row in rows[:SAMPLES])
            chapters.append(Chapter("What the judge wrote", Place.SAMPLES, samples))
        return Section(tuple(chapters))

    def _sample(self, row: Row) -> Sample:
        answers = []
        for completion in row["completions"]:
            words = [w for form in self.forms for w in RATING_FORMS[form].words(completion)]
            score = f"score {number(completion['score'], 1)}"
            answers.append(
                Answer(
                    completion["model"], completion["text"], facts=(score,), reasons=tuple(words)
                )
            )
        return Sample(row["prompt"], tuple(answers))


def _answers(row: Row) -> list[tuple[str, Row]]:
    """Returns the completions of a prompt with their ids."""
    return [(f"{row['id']}/{number}", c) for number, c in enumerate(row["completions"])]


def _request(row: Row, form: str, id: str, answers: list[tuple[str, Row]]) -> Row:
    ids, completions = zip(*answers, strict=True)
    judged = {"answers": list(ids), "completions": list(completions)}
    # All first requests have the same sample, so that an answer keeps its judgement if a larger
    # pool moves it in the row, which changes the ids.
    request = {"id": id, "sample": 0, "order_seed": row["id"], "form": form, "again": False}
    return {**row, **request, **judged}


def _rated(request: Row, judgement: Row) -> list[Rated]:
    ratings = RATING_FORMS[request["form"]].ratings(judgement)
    judged = zip(request["answers"], request["completions"], ratings, strict=True)
    return [Rated(answer, c["model"], len(c["text"]), given) for answer, c, given in judged]


def _hash(text: str) -> str:
    """Returns a sort key for drawing a sample; it does not depend on the other texts."""
    return hashlib.sha256(text.encode()).hexdigest()


async def rate(row: dict[str, Any], ask: Ask) -> dict[str, Any]:
    """Rates the completions of one request."""
    return {"id": row["id"], **await ask.judge(row["form"], row, row["completions"])}
