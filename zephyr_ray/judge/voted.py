"""Turns people's votes into pairs to judge, and judged pairs into labels with verdicts."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from zephyr_ray.messages import visible
from zephyr_ray.models.contract import Ask

Row = dict[str, Any]


@dataclass(frozen=True)
class Voted:
    """A pair of answers that people and the judge compared."""

    models: tuple[str, str]
    """Models of the left and of the right answer."""
    label: float
    """People's share of the win for the left answer: 1, 0, or ½ for a tie."""
    verdict: float
    """The judge's share of the win for the left answer."""
    blind: bool
    """Whether the voter did not know the models."""

    @property
    def decided(self) -> bool:
        return self.label != 0.5

    @property
    def agreement(self) -> float:
        """The judge's share of the win for the answer that people preferred."""
        return self.verdict if self.label > 0.5 else 1 - self.verdict

    def compares(self, model: str, other: str) -> bool:
        return self.models in ((model, other), (other, model))

    def seen_from(self, model: str, baseline: str) -> tuple[float, float]:
        """Returns (label, verdict) as shares of the win for `model`'s answer, or else for the
        answer compared with the baseline's. If neither model gave an answer, or one gave both, they
        are for the left answer, whose side was drawn at random."""
        left, right = self.models
        if left != right and (right == model or left == baseline):
            return 1 - self.label, 1 - self.verdict
        return self.label, self.verdict


def pair_of(vote: Row, form: str) -> Row:
    """Returns a vote of a `votes` artifact as a row to judge in a form."""
    left, right = vote["completions"]
    label = 0.5 if left["score"] == right["score"] else float(left["score"] > right["score"])
    return {
        **{name: vote[name] for name in ("id", "prompt", "instruction", "constraint")},
        "form": form,
        "answers": [left, right],
        "label": label,
        # Pages of earlier versions showed the models' names, and did not write "blind".
        "blind": vote.get("blind", False),
    }


def why_not_judged(vote: Row) -> str | None:
    """Returns why the judge, which sees a prompt and two answers, cannot judge a vote; None if it
    can."""
    if vote.get("context"):
        return "later turn or system prompt"
    return None if any(visible(a["text"]) for a in vote["completions"]) else "both answers empty"


async def judge_pair(row: Row, ask: Ask) -> Row:
    """Judges one voted pair; a verdict of 1 is a win of the left answer."""
    judgement = await ask.judge(row["form"], row, row["answers"])
    return {
        **{name: row[name] for name in ("id", "prompt", "label", "blind")},
        "answers": [{"model": a["model"], "text": a["text"]} for a in row["answers"]],
        "verdict": judgement["verdict"],
        "reason": judgement["reason"],
    }


def voted(judged: list[Row]) -> Iterator[Voted]:
    """Yields the judged pairs with a verdict."""
    for row in judged:
        if row["verdict"] is not None:
            left, right = (answer["model"] for answer in row["answers"])
            yield Voted((left, right), row["label"], row["verdict"], row["blind"])
