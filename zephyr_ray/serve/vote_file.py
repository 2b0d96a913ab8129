"""Stores human votes between two answers as feedback rows."""

import json
import os
import threading
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from zephyr_ray.serve.requests import VoteRequest, end_of

WON, LOST, TIED = 10.0, 1.0, 5.5
"""Scores on the judges' scale from 1 to 10; equal scores make no preference pair."""


class VoteFile:
    """Appends votes to a new JSONL file in `folder`, each in a single write, so that a kill loses
    no earlier vote. Each gateway has its own file, because appends of two hosts overwrite each
    other on NFS."""

    def __init__(self, folder: Path):
        self.path = folder / f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{uuid.uuid4().hex[:12]}.jsonl"
        self._lock = threading.Lock()

    def add(self, vote: VoteRequest) -> str:
        """Stores a vote and returns the id of its row."""
        row = feedback_row(vote)
        # The leading line break ends a line that a kill may have left half written.
        line = b"\n" + json.dumps(row, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        with self._lock:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab", buffering=0) as file:
                if file.write(line) != len(line):
                    raise OSError("the disk is full")
                os.fsync(file.fileno())
        return str(row["id"])


def feedback_row(vote: VoteRequest) -> dict[str, Any]:
    """Returns a feedback row: its prompt is the last user message, its context the ones before."""
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
