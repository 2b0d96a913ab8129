"""Collects AI feedback: a judge scores every completion from 1 to 10 and gives a reason."""

from typing import Annotated, Any

from zephyr_ray.demand import Calls
from zephyr_ray.formatting import number
from zephyr_ray.judges import FORMS, reply_tokens, unreadable
from zephyr_ray.models.contract import Ask
from zephyr_ray.rows import run_rows
from zephyr_ray.section import Block, Chapter, Histogram, Place, Section, Text
from zephyr_ray.settings import Reads
from zephyr_ray.stage import PROMPT_TOKENS, RowStage, Stage, Work
from zephyr_ray.store import Artifact


class Feedback(RowStage):
    """A stage that scores completions with a judge."""

    kind = "feedback"
    makes = "feedback"

    judge: Annotated[str, Reads("judge", form="score")]
    completions: Annotated[str, Reads("completions")]
    seed: int = 0

    def run(self, work: Work) -> None:
        prompts = work.inputs[self.completions].rows()
        requests = [
            {**row, "id": f"{row['id']}/{number}", "completions": [completion]}
            for row in prompts
            for number, completion in enumerate(row["completions"])
        ]
        ratings = run_rows(work, requests, rate, [work.models[self.judge]], unreadable)
        kept = ("score", "reason", "checks")
        by_id = {row["id"]: {name: row[name] for name in kept} for row in ratings}
        work.counts["unparsable"] = sum(row["score"] is None for row in ratings)
        work.counts["answers"] = len(ratings)
        if scores := [row["score"] for row in ratings if row["score"] is not None]:
            work.counts["score_mean"] = round(sum(scores) / len(scores), 3)
        work.write_rows(
            {
                **row,
                "completions": [
                    completion | by_id[f"{row['id']}/{number}"]
                    for number, completion in enumerate(row["completions"])
                    if f"{row['id']}/{number}" in by_id
                ],
            }
            for row in prompts
        )

    def expected(self, rows: dict[str, int]) -> int | None:
        return rows.get(self.completions)

    def answer_tokens(self) -> int:
        return reply_tokens("score")

    def calls(self, rows: dict[str, int], reads: dict[str, Stage]) -> dict[str, Calls]:
        if (prompts := rows.get(self.completions)) is None:
            return {}
        answers, tokens = reads[self.completions].answer_bounds()
        return {self.judge: FORMS["score"].calls(prompts * answers, PROMPT_TOKENS, tokens)}

    def section(self, artifact: Artifact) -> Section | None:
        """Returns one histogram of scores per model; answers without a score are only counted."""
        completions = [c for row in artifact.rows() for c in row["completions"]]
        scores: dict[str, list[float]] = {}
        for completion in completions:
            if completion["score"] is not None:
                scores.setdefault(completion["model"], []).append(completion["score"])
        if not completions:
            return None
        blocks: list[Block] = [Histogram(model, tuple(s)) for model, s in scores.items()]
        if not scores:
            blocks = [Text(f"No answer of {number(len(completions))} has a readable score.")]
        elif unscored := sum(completion["score"] is None for completion in completions):
            note = f"{number(unscored)} answers have no readable score."
            blocks.insert(0, Text(note, soft=True))
        return Section((Chapter("Scores the judge gave", Place.PROCESS, tuple(blocks)),))


async def rate(row: dict[str, Any], ask: Ask) -> dict[str, Any]:
    """Scores one completion."""
    return {"id": row["id"], **await ask.judge("score", row, row["completions"])}
