"""Reads people's votes from `zephyr serve` as feedback that can train the next round."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

from zephyr_ray.errors import Permanent
from zephyr_ray.settings import FILE
from zephyr_ray.stage import Stage, Work


class Votes(Stage):
    """A stage that checks and copies votes from a file, or from all files of a folder such as
    runs/quickstart/votes, to which each gateway of `zephyr serve` adds its own file."""

    kind = "votes"
    makes = "feedback"

    file: Annotated[str, FILE]

    def check(self, files: dict[str, Path], reads: dict[str, Stage]) -> None:
        _check_one_place(files["file"])
        read_votes(files["file"])

    def run(self, work: Work) -> None:
        rows = read_votes(work.files["file"], work.drop)
        scores = [[c["score"] for c in row["completions"]] for row in rows]
        work.counts["ties"] = sum(left == right for left, right in scores)
        work.write_rows(rows)


def read_votes(
    path: Path, drop: Callable[[str, str], None] = lambda rule, example: None
) -> list[dict[str, Any]]:
    """Returns rows of feedback with two answers each. Drops lines that are not JSON, such as one
    cut short when the server was killed, and rows whose id was read before. Raises Permanent with
    the line number if a row is not a vote."""
    rows: dict[str, dict[str, Any]] = {}
    for file, number, line in _lines(path):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            drop("unreadable", f"{file.name} line {number}")
            continue
        if not _is_vote(row):
            raise Permanent(f"{file} line {number}: not a vote that zephyr serve wrote; remove it")
        if row["id"] in rows:
            drop("duplicate", row["id"])
            continue
        rows[row["id"]] = row
    if not rows:
        raise Permanent(f"{path} has no votes; compare two models on the page of zephyr serve")
    return list(rows.values())


def _lines(path: Path) -> Iterator[tuple[Path, int, bytes]]:
    """Yields file, number and text of each line that is not blank."""
    for file in sorted(path.glob("*.jsonl")) if path.is_dir() else [path]:
        try:
            lines = file.open("rb")
        except OSError as error:
            raise Permanent(f"cannot read {file}: {error.strerror}; correct the path") from None
        with lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield file, number, line


def _check_one_place(path: Path) -> None:
    """Raises Permanent if a run also has votes in the place where earlier versions wrote them."""
    file, folder = path.with_name("votes.jsonl"), path.with_name("votes")
    if path in (file, folder) and file.is_file() and folder.is_dir():
        raise Permanent(
            f"{file} has votes of an earlier version of zephyr_ray, and later ones are in "
            f"{folder}; move the file into the folder, and name the folder in the setting 'file'"
        )


def _is_vote(row: Any) -> bool:
    if not isinstance(row, dict):
        return False
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
