"""Tests a comparison corrected by votes: real stages and a real file of votes, with a judge that
prefers the longer answer."""

import json
from pathlib import Path
from typing import Any

import pytest
from in_process import run_here, work_on

from zephyr_ray.engines.model import Model
from zephyr_ray.engines.rules import RulesSettings
from zephyr_ray.errors import Permanent
from zephyr_ray.judge import corrected, pairwise
from zephyr_ray.judge.corrected import Corrected
from zephyr_ray.judge.correction import prediction_powered, share, two_parameter
from zephyr_ray.judge.pairwise import Pairwise
from zephyr_ray.judge.voted import Voted, pair_of
from zephyr_ray.manifest import Manifest
from zephyr_ray.messages import assistant, user
from zephyr_ray.section import Interval, Table, Text
from zephyr_ray.serve.requests import VoteRequest, parse
from zephyr_ray.serve.vote_file import VoteFile, feedback_row
from zephyr_ray.stage import Work
from zephyr_ray.store import Artifact
from zephyr_ray.text.feedback import Feedback
from zephyr_ray.text.votes import Votes

LONG, SHORT = "A long answer.", "Short."
EVALUATED = {
    "base": [SHORT, SHORT, SHORT, LONG],
    "sft": [LONG, SHORT, SHORT, SHORT],
    "dpo": [LONG, LONG, LONG, SHORT],
}
"""Answers to four held-out prompts by model."""
STAGE = Corrected(winrate="winrate", votes="votes", judge="judge")
COMPARISON = Pairwise(judge="judge", baseline="base", answers=["sft", "dpo"])


class LengthJudge:
    """Prefers the longer answer; gives no verdict if one has a question mark. `forms` lists the
    form of each request."""

    def __init__(self) -> None:
        self.forms: list[str] = []

    def ask_for(self, model: Model, row: dict[str, Any]) -> "LengthJudge":
        return self

    async def judge(
        self, form: str, row: dict[str, Any], answers: list[dict[str, Any]]
    ) -> dict[str, Any]:
        self.forms.append(form)
        first, second = (answer["text"] for answer in answers)
        verdict: float | None = (len(first) > len(second)) + 0.5 * (len(first) == len(second))
        if "?" in first + second:
            verdict = None
        return {"verdict": verdict, "reason": "length", "scores": None}


def ballot(
    left: tuple[str, str], right: tuple[str, str], choice: str, **fields: Any
) -> VoteRequest:
    """Returns a vote on the answers of two models, each given as (model, text)."""
    sides = {
        side: {"model": model, "text": text}
        for side, (model, text) in {"left": left, "right": right}.items()
    }
    body = {"messages": [user("Name a pet.")], **sides, "vote": choice, "blind": True, **fields}
    return parse(VoteRequest, json.dumps(body).encode())


VOTES = [
    ballot(("dpo", LONG), ("base", SHORT), "left"),
    ballot(("base", LONG), ("dpo", SHORT), "right"),
    ballot(("dpo", LONG), ("base", SHORT), "right"),
    ballot(("base", SHORT), ("dpo", LONG), "tie", blind=None),
    ballot(("sft", LONG), ("dpo", SHORT), "left"),
]


def correct(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    votes: list[VoteRequest],
    comparison: Pairwise = COMPARISON,
    judge: LengthJudge | None = None,
) -> Artifact:
    """Returns the artifact of a comparison of sft and dpo with base, corrected by these votes."""
    run_here(monkeypatch, pairwise, judge or LengthJudge())
    run_here(monkeypatch, corrected, judge or LengthJudge())
    file = VoteFile(folder / "page")
    for vote in votes:
        file.add(vote)
    work = work_on(folder, **{model: completions(model) for model in EVALUATED})
    work.models["judge"] = Model("judge", RulesSettings())
    read = {"winrate": made(work, "winrate", comparison)}
    work.files["file"] = file.path.parent
    read["votes"] = made(work, "votes", Votes(file="page"))
    work.inputs, work.stages = read, {"winrate": comparison, "votes": Votes(file="page")}
    return made(work, "corrected", STAGE)


def completions(model: str) -> list[dict[str, Any]]:
    return [
        {
            "id": f"p{number}",
            **dict.fromkeys(("prompt", "instruction"), f"Question {number}?"),
            "constraint": None,
            "completions": [{"model": model, "text": text, "finish_reason": "stop"}],
        }
        for number, text in enumerate(EVALUATED[model])
    ]


def made(work: Work, name: str, stage: Any) -> Artifact:
    """Runs a stage in a folder named after it and returns its artifact."""
    work.name, work.counts = name, {}
    work.folder = work.folder.with_name(name)
    work.folder.mkdir()
    stage.run(work)
    return Artifact(work.folder, Manifest(kind="k", key=name, files={}, counts=work.counts))


def result(artifact: Artifact) -> dict[str, Any]:
    return json.loads((artifact.folder / "result.json").read_text(encoding="utf-8"))


def texts(artifact: Artifact) -> str:
    section = STAGE.section(artifact)
    blocks = section.chapters[0].blocks
    return "\n".join([section.headline, *(b.text for b in blocks if isinstance(b, Text))])


def test_each_correction_uses_its_votes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = result(correct(tmp_path, monkeypatch, VOTES))["models"]
    assert list(models) == ["sft", "dpo"]
    dpo = models["dpo"]
    assert (dpo["judge"]["win_rate"], dpo["verdicts"]) == (0.75, 4)
    # Seen from dpo: the four votes against base, in their order.
    powered = prediction_powered([1, 1, 1, 0], [1, 0, 1, 1], [1, 1, 0, 0.5])
    assert powered is not None and dpo["votes"] == 4
    assert dpo["prediction_powered"] == vars(powered)
    # The last vote, in which people and the judge prefer sft to dpo, counts; the tie does not.
    assert dpo["decided_votes"] == 4
    correction = two_parameter([1, 1, 1, 0], [1, 0], [1, 0])
    assert (dpo["two_parameter"]["q0"], dpo["two_parameter"]["q1"]) == (0.5, 0.5)
    assert dpo["two_parameter"]["corrected"] is None is correction.corrected
    sft = models["sft"]
    assert (sft["votes"], sft["prediction_powered"]) == (0, None)


def test_votes_are_judged_in_the_form_of_the_comparison(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = LengthJudge()
    comparison = COMPARISON.model_copy(update={"form": "brackets"})
    correct(tmp_path, monkeypatch, VOTES, comparison, judge)
    assert judge.forms[-len(VOTES) :] == ["brackets"] * len(VOTES)


def test_agreement_is_counted_by_the_side_that_people_chose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = result(correct(tmp_path, monkeypatch, VOTES))
    agreement = figures["agreement"]
    assert {side: (a["votes"], a["rate"]) for side, a in agreement.items()} == {
        "all": (4, 0.5),
        "left": (2, 1.0),
        "right": (2, 0.0),
    }
    interval = share([1, 0, 0, 1])
    assert interval is not None
    assert agreement["all"] == {"votes": 4, **vars(interval)}
    assert (figures["left_share"]["votes"], figures["left_share"]["rate"]) == (4, 0.5)
    assert (figures["votes"], figures["ties"], figures["not_blind"]) == (5, 1, 1)


def test_votes_of_earlier_versions_are_not_blind() -> None:
    row = feedback_row(VOTES[0])
    assert pair_of(row, "pairwise")["blind"] is True
    del row["blind"]
    assert pair_of(row, "pairwise")["blind"] is False


@pytest.mark.parametrize(
    ("left", "right", "label", "verdict"),
    [
        ("dpo", "base", 1, 0.25),
        ("base", "dpo", 0, 0.75),
        ("dpo", "sft", 1, 0.25),
        ("sft", "dpo", 0, 0.75),
        ("sft", "base", 1, 0.25),
        ("base", "sft", 0, 0.75),
        ("sft", "control", 1, 0.25),  # neither is dpo or base: seen from the left answer
        ("dpo", "dpo", 1, 0.25),
    ],
)
def test_a_vote_is_a_win_of_the_model_or_a_loss_of_the_baseline(
    left: str, right: str, label: float, verdict: float
) -> None:
    vote = Voted((left, right), label=1, verdict=0.25, blind=True)
    assert vote.seen_from("dpo", "base") == (label, verdict)


def test_the_report_says_what_limits_a_correction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    says = texts(correct(tmp_path, monkeypatch, VOTES))
    assert "Corrected with 4 votes of people (PPI++), dpo has a win rate of 0.6" in says
    assert "Too few human labels: 4 votes compare dpo with base; below 50" in says
    assert "No PPI++ for sft: it needs two votes between it and base, and there are 0" in says
    assert "No two-parameter correction for dpo: q₀ + q₁ is 1.00, not above 1 beyond chance" in says
    assert "Not blind: 1 of 5 votes" in says
    assert "Ties: 1 of 5 votes. Only PPI++ uses them" in says
    assert "assumes that their prompts are like the held-out ones" in says


def test_fifty_votes_are_not_too_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The judge agrees with 40 of the 50 votes: 20 that dpo won and 20 that it lost."""
    votes = [
        ballot((a, LONG), (b, SHORT), "left" if right else "right")
        for a, b in (("dpo", "base"), ("base", "dpo"))
        for right in [True] * 20 + [False] * 5
    ]
    artifact = correct(tmp_path, monkeypatch, votes)
    [table] = [
        block
        for block in STAGE.section(artifact).chapters[0].blocks
        if isinstance(block, Table) and block.title == "Win rate against base"
    ]
    dpo = dict(zip((column.heading for column in table.columns), table.rows[1], strict=True))
    assert (dpo["Votes"], dpo["q₁"], dpo["q₀"]) == (50, 0.8, 0.8)
    assert isinstance(dpo["PPI++"], Interval) and isinstance(dpo["Two-parameter"], Interval)
    # (0.75 + 0.8 - 1) / (0.8 + 0.8 - 1)
    assert dpo["Two-parameter"].value == pytest.approx(0.55 / 0.6)
    assert "Too few" not in texts(artifact)
    counts = artifact.manifest.counts
    assert counts["two_parameter/dpo"] == pytest.approx(0.55 / 0.6)
    assert counts["agreement"] == 0.8


def test_votes_that_cannot_be_judged_are_left_out_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    later = [user("Hi."), assistant("Hello."), user("Name a pet.")]
    votes = [
        *VOTES,
        ballot(("dpo", LONG), ("base", SHORT), "left", messages=later),
        ballot(("dpo", " "), ("base", ""), "left"),
        ballot(("dpo", "A cat?"), ("base", "A dog."), "left"),
    ]
    artifact = correct(tmp_path, monkeypatch, votes)
    counts = artifact.manifest.counts
    left_out = {name: count for name, count in counts.items() if name.startswith("left_out/")}
    assert left_out == {"left_out/later turn or system prompt": 1, "left_out/both answers empty": 1}
    assert (counts["unparsable"], counts["rows"], result(artifact)["votes"]) == (1, 6, 5)
    says = texts(artifact)
    causes = "later turn or system prompt 1, both answers empty 1, unparsable 1"
    assert f"left out because they have no verdict from the judge: {causes}" in says


@pytest.mark.parametrize(
    ("reads", "says"),
    [
        (
            {"judge": "other"},
            "the judge of 'winrate' is 'other', and 'judge' may make other errors",
        ),
        ({"votes": Feedback(judge="judge", completions="c")}, "'votes' has no human votes"),
    ],
)
def test_another_judge_and_votes_that_are_not_human_are_refused(
    reads: dict[str, Any], says: str
) -> None:
    comparison = COMPARISON.model_copy(update={"judge": reads.get("judge", "judge")})
    stages = {"winrate": comparison, "votes": reads.get("votes", Votes(file="page"))}
    with pytest.raises(Permanent, match=says):
        STAGE.check({}, stages)


def test_a_plan_counts_two_questions_per_vote() -> None:
    stages = {"winrate": COMPARISON, "votes": Votes(file="page")}
    assert STAGE.expected({"winrate": 4, "votes": 7}) == 7
    [(judge, calls)] = STAGE.calls({"winrate": 4, "votes": 7}, stages).items()
    assert (judge, calls.calls) == ("judge", 14)
    assert STAGE.calls({"winrate": 4}, stages) == {}
