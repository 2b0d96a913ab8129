"""Binarizes feedback as Zephyr does: scored completions become (chosen, rejected) pairs."""

import random
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from zephyr_ray.errors import Permanent
from zephyr_ray.messages import Message, assistant, is_same_text, plain, user, visible, with_facts
from zephyr_ray.settings import Reads
from zephyr_ray.stage import Stage, Work

FIXES = {
    "fewer than two scored answers": "use a judge whose replies can be read, or more answers",
    "all answers are empty": "increase max_tokens of the completions, or use another model",
    "no answer good enough to choose": "lower min_chosen",
    "all answers are the same": "raise the models' temperature, or use more models",
    "an empty answer scored best": "use a judge that rates empty answers low, or other models",
    "tie or margin too small": "set ties: keep or lower min_margin",
}
"""Fix in the error line if a stage drops every prompt, by the most frequent reason."""


class Preferences(Stage):
    """A stage that pairs the highest-scored answer (chosen) with a random other one (rejected),
    which the paper finds more diverse and harder than the lowest-scored one. The two texts always
    differ visibly, and an empty text is never chosen."""

    kind = "preferences"
    makes = "pairs"
    version = 2

    feedback: Annotated[str, Reads("feedback")]
    rejected: Literal["random", "lowest", "all"] = "random"
    """Which other answers are rejected: a random one, the lowest-scored, or each in its own
    pair."""
    ties: Literal["drop", "keep"] = "drop"
    """Treatment of answers that tie with the chosen one: drop them, or allow them as
    rejected."""
    min_margin: float = Field(0.0, ge=0)
    """Minimum difference between the scores of a pair."""
    min_chosen: float = Field(1.0, ge=1, le=10)
    """Minimum score of the chosen answer."""
    seed: int = 0

    def run(self, work: Work) -> None:
        rng = random.Random(self.seed)
        pairs: list[dict[str, Any]] = []
        for row in work.inputs[self.feedback].rows():
            pairs += self._pairs(row, rng, work)
        if not pairs:
            counts = {rule.removeprefix("dropped/"): n for rule, n in work.counts.items()}
            reasons = ", ".join(f"{rule}: {count}" for rule, count in counts.items())
            fix = FIXES[max(counts, key=counts.__getitem__)] if counts else "add prompts"
            raise Permanent(f"stage '{work.name}': every prompt was dropped ({reasons}); {fix}")
        margins = [pair["score_chosen"] - pair["score_rejected"] for pair in pairs]
        work.counts["margin_mean"] = round(sum(margins) / len(margins), 3)
        work.write_rows(pairs)

    def _pairs(
        self, row: dict[str, Any], rng: random.Random, work: Work
    ) -> Iterator[dict[str, Any]]:
        scored = [c for c in row["completions"] if c["score"] is not None]
        if len(scored) < 2:
            work.drop("fewer than two scored answers", row["id"])
            return
        if not any(visible(c["text"]) for c in scored):
            work.drop("all answers are empty", row["id"])
            return
        # Shuffle, because max takes the first of equal scores, which would favor a model by
        # position.
        rng.shuffle(scored)
        chosen = max((c for c in scored if visible(c["text"])), key=lambda c: c["score"])
        if chosen["score"] < self.min_chosen:
            work.drop("no answer good enough to choose", row["id"])
            return
        others = [c for c in scored if not is_same_text(c["text"], chosen["text"])]
        if not others:
            work.drop("all answers are the same", row["id"])
            return
        if all(c["score"] > chosen["score"] for c in others):
            work.drop("an empty answer scored best", row["id"])
            return
        others = [c for c in others if self._far_enough(chosen["score"] - c["score"])]
        if not others:
            work.drop("tie or margin too small", row["id"])
            return
        if self.rejected == "random":
            others = [rng.choice(others)]
        elif self.rejected == "lowest":
            others = [min(others, key=lambda c: c["score"])]
        for number, rejected in enumerate(others):
            yield _pair(row, number, chosen, rejected)

    def _far_enough(self, margin: float) -> bool:
        return margin >= self.min_margin and (margin > 0 or self.ties == "keep")


def _pair(
    row: dict[str, Any], number: int, chosen: dict[str, Any], rejected: dict[str, Any]
) -> dict[str, Any]:
    context = [*row.get("context", []), user(row["prompt"], instruction=row["instruction"])]
    return {
        "id": f"{row['id']}/{number}",
        "prompt": row["prompt"],
        "instruction": row["instruction"],
        "constraint": row["constraint"],
        "chosen": [*context, _answer(chosen)],
        "rejected": [*context, _answer(rejected)],
        "score_chosen": chosen["score"],
        "score_rejected": rejected["score"],
        "model_chosen": chosen["model"],
        "model_rejected": rejected["model"],
    }


def _answer(completion: dict[str, Any]) -> Message:
    return assistant(completion["text"], finish_reason=completion["finish_reason"])


class Chosen(Stage):
    """A stage that turns the chosen answers of pairs into dialogues. Plain SFT on them is the
    control that shows how much of a gain comes from DPO."""

    kind = "chosen"
    makes = "dialogues"
    version = 3

    pairs: Annotated[str, Reads("pairs")]

    def run(self, work: Work) -> None:
        seen: set[str] = set()
        rows = []
        for pair in map(with_facts, work.inputs[self.pairs].rows()):
            text = str(plain(pair["chosen"]))
            if text in seen:
                work.drop("duplicate", pair["id"])
                continue
            seen.add(text)
            row = {"messages": pair["chosen"], "constraint": pair.get("constraint")}
            rows.append({"id": pair["id"], **row})
        work.write_rows(rows)
