"""Reads people's votes from `zephyr serve` as feedback that can train the next round."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

from zephyr_ray.errors import Permanent
from zephyr_ray.settings import FILE
from zephyr_ray.stage import Stage, Work


class Votes(Stage):
    """Checks and copies votes from a file, or from all files of a folder such as
    runs/quickstart/votes, to which each gateway of `zephyr serve` adds its own file."""

    kind = "votes"
    makes = "feedback"
    by_people = True
    limits = "Votes come from users of a chat page, who are not a defined group of raters."

    file: Annotated[str, FILE]

    def check(self, files: dict[str, Path], reads: dict[str, Stage]) -> None:
        _check_one_place(files["file"])
        read_votes(files["file"])

    def rows_of_files(self, files: dict[str, Path]) -> int | None:
        return len(read_votes(files["file"]))

    def run(self, work: Work) -> None:
        rows = read_votes(work.files["file"], work.drop)
        scores = [[c["score"] for c in row["completions"]] for row in rows]
        work.counts["ties"] = sum(left == right for left, right in scores)
        work.write_rows(rows)


def read_votes(
    path: Path, drop: Callable[[str, str], None] = lambda rule, example: None
) -> list[dict[str, Any]]:
    """Returns rows of feedback with two answers each, without the votes that were taken back.
    Drops lines that are not JSON, such as one cut short when the server was killed, and rows whose
    id was read before. Raises Permanent with the line number if a row is not a vote."""
    rows: dict[str, dict[str, Any]] = {}
    withdrawn: set[str] = set()
    for file, number, line in _lines(path):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            drop("unreadable", f"{file.name} line {number}")
            continue
        if _is_withdrawal(row):
            withdrawn.add(row["id"])
            continue
        if fault := _fault(row):
            raise Permanent(f"{file} line {number}: not a vote: it {fault}; correct or remove it")
        if row["id"] in rows:
            drop("duplicate", row["id"])
            continue
        rows[row["id"]] = row
    for vote_id in sorted(withdrawn):
        # Another gateway's file, which may not be among those read, can hold the vote.
        drop("withdrawn" if rows.pop(vote_id, None) else "withdrawal without its vote", vote_id)
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


def _is_withdrawal(row: Any) -> bool:
    return isinstance(row, dict) and row.get("withdrawn") is True and isinstance(row.get("id"), str)


def _fault(row: Any) -> str | None:
    """Returns what keeps a row from being a vote, or None."""
    if not isinstance(row, dict):
        return "is not a JSON object"
    for name in ("id", "prompt", "instruction"):
        if not isinstance(row.get(name), str):
            return f"needs text in '{name}'"
    if not isinstance(row.get("constraint"), dict | None):
        return "has a 'constraint' that is neither an object nor null"
    if not isinstance(row.get("context", []), list):
        return "has a 'context' that is not a list of messages"
    if not isinstance(row.get("blind", False), bool):
        return "has a 'blind' that is neither true nor false"
    answers = row.get("completions")
    if not isinstance(answers, list) or len(answers) != 2:
        return "needs two answers in 'completions'"
    for answer in answers:
        for name in ("model", "text", "finish_reason"):
            if not isinstance(answer, dict) or not isinstance(answer.get(name), str):
                return f"needs text in '{name}' of both 'completions'"
        if not isinstance(answer.get("score"), int | float):
            return "needs a number in 'score' of both 'completions'"
    return None
