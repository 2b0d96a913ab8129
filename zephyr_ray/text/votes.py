"""Reads people's votes from `zephyr serve` as feedback that can train the next round."""

from pathlib import Path
from typing import Annotated, Any

from zephyr_ray.errors import Permanent
from zephyr_ray.settings import FILE
from zephyr_ray.stage import Stage, Work
from zephyr_ray.store import numbered_jsonl


class Votes(Stage):
    """A stage that checks and takes the rows of a votes file, such as
    runs/quickstart/votes.jsonl."""

    kind = "votes"
    makes = "feedback"

    file: Annotated[str, FILE]

    def check(self, files: dict[str, Path], reads: dict[str, Stage]) -> None:
        read_votes(files["file"])

    def run(self, work: Work) -> None:
        rows = read_votes(work.files["file"])
        scores = [[c["score"] for c in row["completions"]] for row in rows]
        work.counts["ties"] = sum(left == right for left, right in scores)
        work.write_rows(rows)


def read_votes(path: Path) -> list[dict[str, Any]]:
    """Returns rows of feedback with two answers each. Raises Permanent with the line number if one
    is not a vote."""
    rows = []
    for number, row in numbered_jsonl(path):
        if not _is_vote(row):
            raise Permanent(f"{path} line {number}: not a vote that zephyr serve wrote; remove it")
        rows.append(row)
    if not rows:
        raise Permanent(f"{path} has no votes; compare two models on the page of zephyr serve")
    return rows


def _is_vote(row: dict[str, Any]) -> bool:
    answers = row.get("completions")
    return (
        isinstance(row.get("id"), str)
        and isinstance(row.get("prompt"), str)
        and isinstance(row.get("instruction"), str)
        and isinstance(row.get("constraint"), dict | None)
        and isinstance(row.get("context", []), list)
        and isinstance(answers, list)
        and len(answers) == 2
        and all(isinstance(a, dict) and isinstance(a.get("text"), str) for a in answers)
        and all(isinstance(a.get("score"), int | float) for a in answers)
        and all(isinstance(a.get("model"), str) for a in answers)
        and all(isinstance(a.get("finish_reason"), str) for a in answers)
    )
