"""Cleans dialogues as Zephyr cleaned UltraChat, and prompts and pairs by the same rules. Counts
what each rule drops, and keeps examples."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from zephyr_ray.demand import Calls
from zephyr_ray.errors import Permanent
from zephyr_ray.filters.answers import (
    REFUSAL,
    find_empty,
    find_low_score,
    find_refusal,
    find_unhelpful,
)
from zephyr_ray.filters.cleaning_pass import CleaningPass
from zephyr_ray.filters.contamination import Contamination
from zephyr_ray.filters.evaluation_sets import read_sets
from zephyr_ray.filters.held_out import HeldOut
from zephyr_ray.filters.language import OTHER, check_languages, find_language
from zephyr_ray.filters.lengths import TOO_LONG, TOO_SHORT, find_length
from zephyr_ray.filters.passage import DROPPED, Filter, Tally
from zephyr_ray.filters.row_types import ROW_TYPES, Row, prompt_of, score_id, tasks_of
from zephyr_ray.filters.section import cleaning_section
from zephyr_ray.filters.toxicity import TOXIC, ToxicWords, read_phrases
from zephyr_ray.judges import FORMS, reply_tokens, unreadable
from zephyr_ray.messages import exchanges, with_facts
from zephyr_ray.models.contract import Ask
from zephyr_ray.rows import run_rows
from zephyr_ray.section import Section
from zephyr_ray.settings import ADDED, FILE, Reads
from zephyr_ray.stage import PROMPT_TOKENS, RowStage, Stage, Work
from zephyr_ray.store import ROWS, Artifact


class Clean(RowStage):
    """Cuts each dialogue before its first bad exchange, and drops it if no answer remains; or drops
    bad prompts, or bad pairs."""

    kind = "clean"
    version = 3

    dialogues: Annotated[str | None, Reads("dialogues")] = None
    prompts: Annotated[str | None, Reads("prompts"), ADDED] = None
    pairs: Annotated[str | None, Reads("pairs"), ADDED] = None
    """What to clean: exactly one of `dialogues`, `prompts` and `pairs`. A pair is judged by its
    prompt and its chosen answer."""
    judge: Annotated[str | None, Reads("judge", form="score")] = None
    """Judge of answers in dialogues; answers that it scores below `min_score` are bad."""
    min_score: float = 10.0
    """Minimum score of an answer, on the judge's scale; unused without a judge."""
    apart_from: Annotated[str | None, Reads("prompts")] = None
    """Held-out prompts. A question that is a near duplicate of one of them is bad; even the
    teacher's follow-up questions may repeat them."""
    evaluation_sets: Annotated[str | None, FILE, ADDED] = None
    """A JSONL or JSON file with the questions of an evaluation set, or a folder with one such file
    per set. A text that shares a sequence of 8 to 13 words with one of them is bad."""
    near_duplicates: Annotated[float | None, ADDED] = Field(None, ge=0.5, le=1)
    """Minimum estimated Jaccard similarity, over shingles of three words, at which a row is a near
    duplicate of an earlier one; None keeps near duplicates."""
    languages: Annotated[list[str], ADDED] = []
    """Allowed languages, such as en; none allows all. Texts too short to identify are kept."""
    min_words: Annotated[int | None, ADDED] = Field(None, ge=1)
    max_words: Annotated[int | None, ADDED] = Field(None, ge=1)
    """Minimum and maximum words per answer, or per prompt in a stage that cleans prompts."""
    refusals: Annotated[Literal["keep", "drop"], ADDED] = "keep"
    """Treatment of answers that refuse the request."""
    toxic_words: Annotated[str | None, FILE, ADDED] = None
    """A file with one word or phrase per line; a text that contains one of them is bad."""
    seed: int = 0

    @property
    def makes(self) -> str:  # type: ignore[override]
        return next((name for name in ROW_TYPES if getattr(self, name)), "dialogues")

    def check(self, files: dict[str, Path], reads: dict[str, Stage]) -> None:
        inputs = [name for name in ROW_TYPES if getattr(self, name)]
        if len(inputs) != 1:
            given = " and ".join(inputs) or "nothing"
            raise Permanent(f"reads {given}; set exactly one of {', '.join(ROW_TYPES)}")
        if self.judge and not self.dialogues:
            raise Permanent("judge: only answers in dialogues are scored; remove judge")
        if self.refusals == "drop" and self.prompts:
            raise Permanent("refusals: prompts have no answers; remove it")
        if self.min_words and self.max_words and self.min_words > self.max_words:
            raise Permanent(
                f"min_words is {self.min_words}, max_words {self.max_words}; lower min_words"
            )
        check_languages(self.languages)
        if self.evaluation_sets:
            read_sets(files["evaluation_sets"])
        if self.toxic_words:
            read_phrases(files["toxic_words"])

    def run(self, work: Work) -> None:
        source, row_type, tally = self._source, ROW_TYPES[self.makes], Tally()
        rows = CleaningPass(
            path=work.inputs[source].file(ROWS),
            source=source,
            folder=work.scratch / "cleaned",
            rows=row_type,
            filters=list(self._filters(work)),
            scores=self._scores(work) if self.judge else {},
            similarity=self.near_duplicates,
        ).run(tally, partial(_advance, work))
        work.progress.restart("rows", int(work.inputs[source].manifest.counts.get("rows", 0)))
        work.write_rows(rows)
        work.counts |= tally.counts
        work.examples |= tally.examples
        if not work.counts["rows"]:
            dropped = {n: c for n, c in tally.counts.items() if c and n.startswith(DROPPED)}
            reasons = [f"{int(count)} {n.removeprefix(DROPPED)}" for n, count in dropped.items()]
            most = max(dropped, key=dropped.__getitem__, default="")
            raise Permanent(
                f"stage '{work.name}': every {row_type.noun} was dropped ({', '.join(reasons)}); "
                f"{tally.fixes.get(most, 'increase the number of rows')}"
            )

    def expected(self, rows: dict[str, int]) -> int | None:
        return rows.get(self._source)

    def row_tokens(self, reads: dict[str, float]) -> float | None:
        return reads.get(self._source)

    def answer_tokens(self) -> int:
        return reply_tokens("score") if self.judge else 0

    def calls(self, rows: dict[str, int], reads: dict[str, Stage]) -> dict[str, Calls]:
        if self.judge is None or (dialogues := rows.get(self._source)) is None:
            return {}
        answers_each, tokens = reads[self._source].answer_bounds()
        return {self.judge: FORMS["score"].calls(dialogues * answers_each, PROMPT_TOKENS, tokens)}

    def section(self, artifact: Artifact) -> Section | None:
        return cleaning_section(artifact.manifest)

    @property
    def _source(self) -> str:
        """Name of the stage whose rows are cleaned."""
        return str(getattr(self, self.makes))

    def _filters(self, work: Work) -> Iterator[Filter]:
        """Yields the filters in the order in which they apply: an exchange counts under the first
        whose rule it breaks. A new filter is one file and one line here."""
        if self.evaluation_sets:
            contamination = Contamination(read_sets(work.files["evaluation_sets"]))
            yield Filter(contamination, contamination.rules)
        if self.apart_from:
            prompts = work.inputs[self.apart_from].rows()
            yield Filter(HeldOut([row["instruction"] for row in prompts]))
        yield Filter(find_empty)
        yield Filter(find_unhelpful)
        if self.judge:
            yield Filter(partial(find_low_score, min_score=self.min_score))
        if self.min_words or self.max_words:
            find = partial(find_length, min_words=self.min_words, max_words=self.max_words)
            rules = [TOO_SHORT] * bool(self.min_words) + [TOO_LONG] * bool(self.max_words)
            yield Filter(find, tuple(rules))
        if self.refusals == "drop":
            yield Filter(find_refusal, (REFUSAL,))
        if self.toxic_words:
            yield Filter(ToxicWords(read_phrases(work.files["toxic_words"])), (TOXIC,))
        if self.languages:
            yield Filter(partial(find_language, languages=self.languages), (OTHER,))

    def _scores(self, work: Work) -> dict[str, float | None]:
        """Returns scores by `score_id`."""
        requests = [
            {
                "id": score_id(row, exchange),
                "instruction": "\n".join(tasks_of(row["messages"], exchange)),
                "prompt": prompt_of(row["messages"], exchange),
                "constraint": row["constraint"],
                "completion": {
                    "text": row["messages"][exchange.answer]["content"],
                    "finish_reason": row["messages"][exchange.answer].get("finish_reason", "stop"),
                },
            }
            for row in map(with_facts, work.inputs[self._source].rows())
            for exchange in exchanges(row["messages"])
            if exchange.questions
        ]
        rated = run_rows(work, requests, rate, [work.models[str(self.judge)]], unreadable)
        return {row["id"]: row["score"] for row in rated}


def _advance(work: Work, rows: int) -> None:
    work.progress.done += rows


async def rate(row: Row, ask: Ask) -> dict[str, Any]:
    """Scores one answer."""
    return {"id": row["id"], **await ask.judge("score", row, [row["completion"]])}
