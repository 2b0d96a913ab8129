"""Tests how the service stores votes and how a recipe reads them."""

import json
from pathlib import Path
from typing import Any

import pytest

from zephyr_ray.errors import Permanent
from zephyr_ray.serve.requests import VoteRequest, parse
from zephyr_ray.serve.vote_file import UnknownVote, VoteFile
from zephyr_ray.text.votes import read_votes

BODY = {
    "messages": [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Name a bird."}]},
    ],
    "left": {"model": "dpo", "text": "An owl.", "finish_reason": "stop"},
    "right": {"model": "sft", "text": "A bi", "finish_reason": None},
}


def vote(choice: str, **fields: Any) -> VoteRequest:
    return parse(VoteRequest, json.dumps({**BODY, "vote": choice, **fields}).encode())


@pytest.mark.parametrize(
    ("choice", "left", "right"), [("left", 10, 1), ("right", 1, 10), ("tie", 5.5, 5.5)]
)
def test_a_vote_comes_back_as_feedback_on_both_answers(
    choice: str, left: float, right: float, tmp_path: Path
) -> None:
    path = tmp_path / "votes"
    row_id = VoteFile(path).add(vote(choice))
    common = {"system": None, "reason": "a person's vote", "checks": {}}
    assert read_votes(path) == [
        {
            "id": row_id,
            "prompt": "Name a bird.",
            "instruction": "Name a bird.",
            "constraint": None,
            "context": [{"role": "system", "content": "Be brief."}],
            "source": "vote",
            "blind": False,
            "completions": [
                {**common, "model": "dpo", "text": "An owl.", "finish_reason": "stop",
                 "score": left},
                {**common, "model": "sft", "text": "A bi", "finish_reason": "length",
                 "score": right},
            ],
        }
    ]  # fmt: skip


def test_a_cut_off_answer_before_the_voted_ones_stays_cut_off(tmp_path: Path) -> None:
    past = [
        {"role": "user", "content": "Tell a tale.", "finish_reason": "stop"},
        {"role": "assistant", "content": "Once upon a", "finish_reason": "length"},
        {"role": "assistant", "content": "Stopped by the reader", "finish_reason": None},
        {"role": "assistant", "content": "The end.", "finish_reason": "stop"},
        {"role": "assistant", "content": "From a client that does not say."},
    ]
    messages = [*past, {"role": "user", "content": "Go on."}]
    request = parse(
        VoteRequest, json.dumps({**BODY, "messages": messages, "vote": "left"}).encode()
    )
    VoteFile(tmp_path).add(request)
    [row] = read_votes(tmp_path)
    ends = [message.get("finish_reason") for message in row["context"]]
    assert ends == [None, "length", "length", "stop", None]


def test_a_voted_answer_without_a_finish_reason_ended_on_its_own(tmp_path: Path) -> None:
    """Only null, which the page sends, means that the reader stopped the answer."""
    sides = {side: {"model": "dpo", "text": "An owl."} for side in ("left", "right")}
    VoteFile(tmp_path).add(
        parse(VoteRequest, json.dumps({**BODY, **sides, "vote": "left"}).encode())
    )
    [row] = read_votes(tmp_path)
    assert [answer["finish_reason"] for answer in row["completions"]] == ["stop", "stop"]


def test_a_vote_after_a_half_written_line_keeps_its_own_line(tmp_path: Path) -> None:
    votes = VoteFile(tmp_path)
    votes.add(vote("left"))
    with votes.path.open("ab") as file:
        file.write(b'{"id": "v1", "prom')
    votes.add(vote("right"))
    lines = [line for line in votes.path.read_text().split("\n") if line]
    assert len(lines) == 3 and lines[1] == '{"id": "v1", "prom'
    assert json.loads(lines[2])["completions"][1]["score"] == 10


def test_gateways_of_one_run_share_no_file(tmp_path: Path) -> None:
    """On NFS, appends from two hosts to one file overwrite each other."""
    old, new = VoteFile(tmp_path / "votes"), VoteFile(tmp_path / "votes")
    ids = [gateway.add(vote(choice)) for choice in ("left", "tie") for gateway in (old, new)]
    assert len(list((tmp_path / "votes").iterdir())) == 2
    assert sorted(row["id"] for row in read_votes(tmp_path / "votes")) == sorted(ids)


def test_a_vote_says_whether_the_voter_knew_the_models(tmp_path: Path) -> None:
    votes = VoteFile(tmp_path)
    for fields in ({"blind": True}, {"blind": False}, {}):
        votes.add(vote("left", **fields))
    assert [row["blind"] for row in read_votes(tmp_path)] == [True, False, False]


def test_a_vote_taken_back_at_any_gateway_is_gone(tmp_path: Path) -> None:
    one, other = VoteFile(tmp_path), VoteFile(tmp_path)
    kept, first, second = (one.add(vote("left")) for _ in range(3))
    one.withdraw(first)
    other.withdraw(second)
    dropped: list[tuple[str, str]] = []
    rows = read_votes(tmp_path, lambda rule, example: dropped.append((rule, example)))
    assert [row["id"] for row in rows] == [kept]
    assert sorted(dropped) == sorted([("withdrawn", first), ("withdrawn", second)])


def test_only_a_stored_vote_can_be_taken_back_and_only_once(tmp_path: Path) -> None:
    votes = VoteFile(tmp_path / "votes")
    with pytest.raises(UnknownVote):
        votes.withdraw("v000000000000")
    row_id = votes.add(vote("tie"))
    votes.withdraw(row_id)
    size = votes.path.stat().st_size
    votes.withdraw(row_id)
    assert votes.path.stat().st_size == size
    assert list(votes.path.parent.iterdir()) == [votes.path]


def test_a_withdrawal_whose_vote_is_in_no_file_is_counted(tmp_path: Path) -> None:
    votes = VoteFile(tmp_path)
    votes.add(vote("left"))
    (tmp_path / "other.jsonl").write_text('{"id": "v1", "withdrawn": true}\n')
    dropped: list[tuple[str, str]] = []
    assert len(read_votes(tmp_path, lambda *rule: dropped.append(rule))) == 1
    assert dropped == [("withdrawal without its vote", "v1")]


def test_a_folder_whose_votes_were_all_taken_back_has_none(tmp_path: Path) -> None:
    votes = VoteFile(tmp_path)
    votes.withdraw(votes.add(vote("left")))
    with pytest.raises(Permanent, match="has no votes"):
        read_votes(tmp_path)
