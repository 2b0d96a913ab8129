"""Finds questions that are near duplicates of held-out prompts."""

from zephyr_ray.filters.passage import Fault, Passage
from zephyr_ray.models.similarity import SimilarityIndex

NEAR = 0.7
"""ROUGE-L F above which a question is a near duplicate of a held-out prompt (Self-Instruct)."""


class HeldOut:
    """Finds passages with a question that is a near duplicate of one of the prompts."""

    def __init__(self, instructions: list[str]):
        self._index = SimilarityIndex(instructions)

    def __call__(self, passage: Passage) -> Fault | None:
        if all(self._index.nearest(task, NEAR) <= NEAR for task in passage.tasks):
            return None
        return Fault("near a held-out prompt", "choose other prompts for apart_from")
