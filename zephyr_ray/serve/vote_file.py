"""Stores human votes between two answers as feedback rows, and records which were taken back."""

import os
import threading
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from zephyr_ray.serve.requests import VoteRequest, end_of
from zephyr_ray.store import Journal, append_line

WON, LOST, TIED = 10.0, 1.0, 5.5
"""Scores on the judges' scale from 1 to 10; equal scores make no preference pair."""


class UnknownVote(Exception):
    """Raised if no gateway of the run stored the vote."""


class VoteFile:
    """Appends votes to a new JSONL file in `folder`, each in a single write, so that no earlier
    vote is lost if the process is killed. Each gateway has its own file, because appends from two
    hosts overwrite each other on NFS. A vote is never deleted: taking it back appends a line, in
    any of the files.
    """

    def __init__(self, folder: Path):
        self.path = folder / f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{uuid.uuid4().hex[:12]}.jsonl"
        self._lock = threading.Lock()
        self._journal: Journal | None = None
        self._is_withdrawn: dict[str, bool] = {}

    def add(self, vote: VoteRequest) -> str:
        """Stores a vote and returns the id of its row."""
        row = feedback_row(vote)
        with self._lock:
            self._append(row)
        return str(row["id"])

    def withdraw(self, vote_id: str) -> None:
        """Takes a vote back; has no effect if it was taken back before. Raises UnknownVote if no
        gateway stored it."""
        with self._lock:
            self._read_new()
            if vote_id not in self._is_withdrawn:
                raise UnknownVote(vote_id)
            if not self._is_withdrawn[vote_id]:
                self._append({"id": vote_id, "withdrawn": True})

    def _append(self, row: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab", buffering=0) as file:
            append_line(file, row)
            os.fsync(file.fileno())

    def _read_new(self) -> None:
        """Reads what all gateways stored since the last call, so that each line is read once."""
        self._journal = self._journal or Journal(self.path.parent)
        for row in self._journal.read_new():
            if isinstance(row, dict) and isinstance(row.get("id"), str):
                withdrawn = self._is_withdrawn.get(row["id"], False)
                self._is_withdrawn[row["id"]] = withdrawn or row.get("withdrawn") is True


def feedback_row(vote: VoteRequest) -> dict[str, Any]:
    """Returns a feedback row: its prompt is the last user message, its context the ones before,
    and its first completion the left answer."""
    messages = [message.plain() for message in vote.messages]
    prompt = messages[-1]["content"]
    scores = {"left": (WON, LOST), "right": (LOST, WON), "tie": (TIED, TIED)}[vote.vote]
    return {
        "id": f"v{uuid.uuid4().hex[:12]}",
        "prompt": prompt,
        "instruction": prompt,
        "constraint": None,
        "context": messages[:-1],
        "source": "vote",
        "blind": bool(vote.blind),
        "completions": [
            {
                "model": answer.model,
                "system": None,
                "text": answer.text,
                "finish_reason": end_of(answer.finish_reason),
                "score": score,
                "reason": "a person's vote",
                "checks": {},
            }
            for answer, score in zip((vote.left, vote.right), scores, strict=True)
        ],
    }
