"""Binarizes feedback as Zephyr does: scored completions become (chosen, rejected) pairs."""

import math
import random
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from zephyr_ray.errors import Permanent
from zephyr_ray.judges.aspects import mean_rating
from zephyr_ray.messages import Message, assistant, is_same_text, plain, user, visible, with_facts
from zephyr_ray.settings import ADDED, Reads
from zephyr_ray.stage import Stage, Work
from zephyr_ray.store import ROWS, read_jsonl

Completion = dict[str, Any]

ROUNDING = 1e-12
"""Difference, absolute and relative, up to which two numbers differ only by rounding: as floats,
the means 13/3 and 10/3 differ by a little less than 1."""
UNSCORED = "fewer than two scored answers"
ALL_EMPTY = "all answers are empty"
FIXES = {
    UNSCORED: "use a judge whose replies can be read, or more answers",
    ALL_EMPTY: "increase max_tokens of the completions, or use another model",
    "no answer good enough to choose": "lower min_chosen",
    "all answers are the same": "raise the models' temperature, or use more models",
    "an empty answer scored best": "use a judge that rates empty answers low, or other models",
    "tie or margin too small": "set ties: keep or lower min_margin",
}
"""Fix in the error line if a stage drops every prompt, by the most frequent reason."""
SCORED_BY = {"overall": "a critique with an overall score", "aspects": "ratings of the aspects"}
"""Judgements that answers need, by the setting `score`."""


class Preferences(Stage):
    """Pairs the highest-scored answer (chosen) with a random other one (rejected). The Zephyr paper
    finds random ones more diverse and harder than the lowest-scored one. The two texts always
    differ visibly, and an empty text is never chosen."""

    kind = "preferences"
    makes = "pairs"
    limits = "A chosen answer is the best of those sampled, and may still be wrong."
    version = 2

    feedback: Annotated[str, Reads("feedback")]
    score: Annotated[Literal["score", "overall", "aspects"], ADDED] = "score"
    """Score to compare answers by: the judge's, the overall score of its critique, or the mean of
    its ratings of the aspects."""
    rejected: Literal["random", "lowest", "all", "delta", "published"] = "random"
    """Which other answers are rejected: a random one, the lowest-scored, each in its own pair, or
    the one that `as_published` draws. With "delta", a prompt's pair is the two answers whose
    predicted scores differ most (`widest_pair`)."""
    ties: Literal["drop", "keep"] = "drop"
    """Treatment of answers that tie with the chosen one: drop them, or allow them as
    rejected."""
    min_margin: float = Field(0.0, ge=0)
    """Minimum difference between the scores of a pair."""
    min_chosen: float = 1.0
    """Minimum score of the chosen answer, on the judge's scale. The default 1, the lowest score on
    a scale from 1 to 10, disables the minimum on every scale."""
    seed: int = 0

    def run(self, work: Work) -> None:
        work.write_rows(self._all_pairs(work))

    def _all_pairs(self, work: Work) -> Iterator[dict[str, Any]]:
        """Yields the pairs of all rows, which are read one by one. Raises Permanent if there are
        none."""
        rng = random.Random(self.seed)
        margins: list[float] = []
        predicted = self._mean_scores(work) if self.rejected == "delta" else {}
        for row in read_jsonl(work.inputs[self.feedback].file(ROWS)):
            for pair in self._pairs(row, rng, work, predicted):
                margins.append(pair["score_chosen"] - pair["score_rejected"])
                yield pair
        if not margins:
            if not work.counts:
                raise Permanent(
                    f"stage '{work.name}': '{self.feedback}' has no rows to pair; add prompts"
                )
            counts = {rule.removeprefix("dropped/"): n for rule, n in work.counts.items()}
            reasons = ", ".join(f"{rule}: {count}" for rule, count in counts.items())
            fix = self._fix(max(counts, key=counts.__getitem__))
            raise Permanent(f"stage '{work.name}': every prompt was dropped ({reasons}); {fix}")
        work.counts["margin_mean"] = sum(margins) / len(margins)

    def _fix(self, reason: str) -> str:
        if reason == UNSCORED and self.score != "score":
            return (
                f"set feedback to a stage whose answers have {SCORED_BY[self.score]}, or remove "
                "the setting score"
            )
        return FIXES[reason]

    def _scored(self, row: dict[str, Any]) -> list[Completion]:
        return [
            completion | {"score": score}
            for completion in row["completions"]
            if (score := SCORES[self.score](completion)) is not None
        ]

    def _mean_scores(self, work: Work) -> dict[str, float]:
        """Returns the mean score of each model's answers."""
        scores: dict[str, list[float]] = {}
        for row in read_jsonl(work.inputs[self.feedback].file(ROWS)):
            for completion in self._scored(row):
                scores.setdefault(completion["model"], []).append(completion["score"])
        return {model: sum(values) / len(values) for model, values in scores.items()}

    def _pairs(
        self, row: dict[str, Any], rng: random.Random, work: Work, predicted: dict[str, float]
    ) -> Iterator[dict[str, Any]]:
        scored = self._scored(row)
        if len(scored) < 2:
            work.drop(UNSCORED, row["id"])
            return
        if not any(visible(c["text"]) for c in scored):
            work.drop(ALL_EMPTY, row["id"])
            return
        if self.rejected == "published":
            chosen, others = as_published(scored, self.seed)
        else:
            # Shuffle, because max takes the first of equal scores, which would favor a model by
            # position.
            rng.shuffle(scored)
            if predicted:
                scored = widest_pair(scored, predicted)
                if not any(visible(c["text"]) for c in scored):
                    work.drop(ALL_EMPTY, row["id"])
                    return
            chosen = max((c for c in scored if visible(c["text"])), key=lambda c: c["score"])
            others = scored
        if self.min_chosen != 1 and _is_less(chosen["score"], self.min_chosen):
            work.drop("no answer good enough to choose", row["id"])
            return
        others = [c for c in others if not is_same_text(c["text"], chosen["text"])]
        if not others:
            work.drop("all answers are the same", row["id"])
            return
        if not visible(chosen["text"]) or all(
            _is_less(chosen["score"], c["score"]) for c in others
        ):
            work.drop("an empty answer scored best", row["id"])
            return
        others = [c for c in others if self._far_enough(chosen["score"], c["score"])]
        if not others:
            work.drop("tie or margin too small", row["id"])
            return
        if self.rejected == "random":
            others = [rng.choice(others)]
        elif self.rejected == "lowest":
            others = [min(others, key=lambda c: c["score"])]
        for number, rejected in enumerate(others):
            yield _pair(row, number, chosen, rejected)

    def _far_enough(self, chosen: float, other: float) -> bool:
        reaches = not _is_less(chosen, other + self.min_margin)
        return reaches and (self.ties == "keep" or _is_less(other, chosen))


def _is_less(a: float, b: float) -> bool:
    """Returns whether a number is less than another one by more than rounding."""
    return a < b and not math.isclose(a, b, rel_tol=ROUNDING, abs_tol=ROUNDING)


def widest_pair(answers: list[Completion], predicted: dict[str, float]) -> list[Completion]:
    """Returns the two answers whose predicted scores, the mean scores of their models, differ most.
    With this rule, a judge needs to score only these two, as in ActiveUltraFeedback (arXiv
    2603.09692), whose predictions come from a trained reward model instead."""

    def score(answer: Completion) -> float:
        return predicted[answer["model"]]

    best = max(answers, key=score)
    return [best, min((answer for answer in answers if answer is not best), key=score)]


def as_published(scored: list[Completion], seed: int) -> tuple[Completion, list[Completion]]:
    """Returns the chosen answer and the rejected one, if there is one, as UltraFeedback-binarized
    drew them for Zephyr-7B: chosen is the first answer with the highest score; rejected is drawn at
    random from all answers until it differs from chosen. The random generator is seeded for each
    row; the published seed was 42.

    Source: create_dataset.py of HuggingFaceH4/ultrafeedback_binarized at commit 04348d9. The
    current revision of that data set seeds it once for all rows instead.
    """

    def identity(completion: Completion) -> tuple[float, str, str]:
        return completion["score"], completion["text"], completion["model"]

    chosen = max(scored, key=lambda c: c["score"])
    if all(identity(c) == identity(chosen) for c in scored):
        return chosen, []
    rng = random.Random(seed)
    rejected = rng.choice(scored)
    while identity(rejected) == identity(chosen):
        rejected = rng.choice(scored)
    return chosen, [rejected]


SCORES: dict[str, Callable[[Completion], float | None]] = {
    "score": lambda completion: completion.get("score"),
    "overall": lambda completion: completion.get("overall"),
    "aspects": lambda completion: mean_rating(completion.get("aspects")),
}
"""Score of an answer, by the setting `score`."""


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
    reason = completion.get("finish_reason")  # published answers have none
    return assistant(completion["text"], **({"finish_reason": reason} if reason else {}))


class Chosen(Stage):
    """Turns the chosen answers of pairs into dialogues. Plain SFT on them is the control that
    shows how much of a gain comes from DPO."""

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
