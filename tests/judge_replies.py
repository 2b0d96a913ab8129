"""Reads replies of judges as the forms `score` and `pairwise` do."""

from zephyr_ray.judges.pairwise import read_winner
from zephyr_ray.judges.score import Score, score_reader
from zephyr_ray.judges.verdict import last_word


def read_score(text: str, judged: str = "", cut: bool = False) -> float | None:
    return last_word(text, score_reader(*Score.keys), judged, cut).says


def read_ranking(text: str, judged: str = "", cut: bool = False) -> int | None:
    return last_word(text, read_winner, judged, cut).says
