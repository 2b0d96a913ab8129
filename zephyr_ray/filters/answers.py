"""Finds bad answers: empty ones, denials of feelings, refusals, and those scored too low."""

from zephyr_ray.filters.passage import Fault, Passage
from zephyr_ray.messages import visible
from zephyr_ray.models.refusal import is_refusal
from zephyr_ray.models.unhelpful import is_unhelpful

REFUSAL = "refusal"


def find_empty(passage: Passage) -> Fault | None:
    if passage.answer is None or visible(passage.answer):
        return None
    return Fault("empty answer")


def find_unhelpful(passage: Passage) -> Fault | None:
    if passage.answer is None or not is_unhelpful(passage.answer):
        return None
    return Fault("unhelpful assistant")


def find_refusal(passage: Passage) -> Fault | None:
    if passage.answer is None or not is_refusal(passage.answer):
        return None
    return Fault(REFUSAL, "set refusals: keep")


def find_low_score(passage: Passage, *, min_score: float) -> Fault | None:
    """Finds an answer whose score is low or missing. An answer directly after another answer has no
    question, and needs no score."""
    fix = "lower min_score or increase the number of prompts"
    if passage.tasks and passage.score is None:
        return Fault("answer not scored", fix)
    if passage.score is not None and passage.score < min_score:
        return Fault("answer below min_score", fix)
    return None
