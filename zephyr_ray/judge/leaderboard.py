"""Rates all models of several comparisons on one scale: Bradley-Terry ratings and a win matrix."""

import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from zephyr_ray.errors import Permanent
from zephyr_ray.judge.bradley_terry import WON, Comparison, Estimate, Ratings, rate
from zephyr_ray.judge.figures import left_out
from zephyr_ray.judge.leaderboard_section import leaderboard_section
from zephyr_ray.judge.style import FEATURES, style_difference
from zephyr_ray.section import Section
from zephyr_ray.settings import Reads
from zephyr_ray.stage import Stage, Work
from zephyr_ray.store import ROWS, Artifact, read_jsonl, write_atomically

Result = dict[str, Any]
"""The content of result.json, or a part of it."""


class Leaderboard(Stage):
    """Rates the models of `pairwise` stages, whose baselines may differ, and writes result.json.

    The baseline of the first stage is the anchor, with a rating of 1000. With `style_control`,
    ratings are those of answers of equal length and Markdown; those without control are kept too.
    """

    kind = "leaderboard"
    makes = "leaderboard"

    of: Annotated[list[str], Reads("winrate")] = Field(min_length=1)
    style_control: bool = False

    def check(self, files: dict[str, Path], reads: dict[str, Stage]) -> None:
        if repeated := [name for name, count in Counter(self.of).items() if count > 1]:
            raise Permanent(f"of: '{repeated[0]}' is listed more than once; list it once")

    def run(self, work: Work) -> None:
        comparisons: list[Comparison] = []
        omitted: Counter[str] = Counter()
        models: dict[str, None] = {}
        judges: dict[str, str] = {}
        for stage in self.of:
            artifact = work.inputs[stage]
            result = json.loads(artifact.file("result.json").read_text(encoding="utf-8"))
            baseline, judges[stage] = result["baseline"], result["judge"]
            models |= dict.fromkeys([baseline, *result["models"]])
            for model, figures in result["models"].items():
                if model != baseline:
                    omitted.update({model: left_out(figures), baseline: left_out(figures)})
                    work.counts["left_out"] = work.counts.get("left_out", 0) + left_out(figures)
            comparisons += _comparisons(artifact, baseline, self.style_control)
        board = _board(comparisons, list(models), omitted, self.style_control)
        write_atomically(
            work.folder / "result.json", json.dumps({"judges": judges, **board}, indent=1)
        )
        work.counts["judgements"] = len(comparisons)
        work.counts["prompts"] = board["prompts"]
        work.counts |= {
            f"rating/{model}": row["rating"]
            for model, row in board["models"].items()
            if row["rating"] is not None
        }

    def expected(self, rows: dict[str, int]) -> int | None:
        return None

    def section(self, artifact: Artifact) -> Section:
        return leaderboard_section(artifact)


def _comparisons(artifact: Artifact, baseline: str, with_style: bool) -> Iterator[Comparison]:
    """Yields the readable verdicts of a comparison with its baseline."""
    for row in read_jsonl(artifact.file(ROWS)):
        answers = row["answers"]
        for model, judged in row["verdicts"].items():
            if model != baseline and judged["verdict"] is not None:
                texts = answers[model]["text"], answers[baseline]["text"]
                yield Comparison(
                    first=model,
                    second=baseline,
                    share=judged["verdict"],
                    prompt=row["prompt"],
                    style=style_difference(*texts) if with_style else (),
                )


def _board(
    comparisons: list[Comparison], models: list[str], omitted: Counter[str], with_style: bool
) -> Result:
    """Computes the ratings, ranks and shares of wins."""
    plain = [Comparison(c.first, c.second, c.share, c.prompt) for c in comparisons]
    ratings, notes, uncontrolled = rate(plain, models), [], None
    if with_style:
        uncontrolled = ratings
        try:
            ratings = rate(comparisons, models)
        except ValueError as fault:
            notes.append(f"Style is not controlled for, because {fault}.")
            ratings, uncontrolled = uncontrolled, None
    judgements = Counter(side for c in comparisons for side in (c.first, c.second))
    counts = {m: {"judgements": judgements[m], "left_out": omitted[m]} for m in models}
    order = sorted(models, key=lambda model: _place(ratings, model))
    effects = ratings.style_effects()
    return {
        "anchor": ratings.anchor,
        "style_controlled": bool(effects),
        "prompts": len({c.prompt for c in comparisons}),
        "models": {m: _figures(ratings, uncontrolled, m) | counts[m] for m in order},
        "pairs": list(_pairs(ratings, comparisons, order)),
        "style": {f: _ends(e) for f, e in zip(FEATURES, effects, strict=bool(effects))},
        "notes": notes,
    }


def _place(ratings: Ratings, model: str) -> tuple[int, float]:
    """Returns a key that sorts models: those that won everything, the rated ones, the others."""
    if model in ratings.rated:
        return 1, -ratings.rating(model)[0]
    return (0 if ratings.unrated[model] == WON else 2), 0


def _figures(ratings: Ratings, uncontrolled: Ratings | None, model: str) -> Result:
    if model not in ratings.rated:
        none = dict.fromkeys(["rating", "low", "high", "rank", "best_rank", "worst_rank"])
        return none | {"reason": ratings.unrated[model]}
    ranks = dict(zip(("rank", "best_rank", "worst_rank"), ratings.rank(model), strict=True))
    figures = _ends(ratings.rating(model), "rating") | ranks
    if uncontrolled:
        figures["uncontrolled"] = _ends(uncontrolled.rating(model), "rating")
    return figures


def _pairs(ratings: Ratings, comparisons: list[Comparison], order: list[str]) -> Iterator[Result]:
    """Yields the figures of each pair of models: verdicts, a's share of the wins (None without
    verdicts), and the difference of their ratings, a minus b (None if one has none)."""
    shares: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    for c in comparisons:
        shares[c.first, c.second].append(c.share)
        shares[c.second, c.first].append(1 - c.share)
    for place, a in enumerate(order):
        for b in order[place + 1 :]:
            own, are_rated = shares[a, b], {a, b} <= set(ratings.rated)
            yield {
                **{"a": a, "b": b, "judgements": len(own)},
                "win_rate": sum(own) / len(own) if own else None,
                **_ends(ratings.difference(a, b) if are_rated else (None,) * 3, "difference"),
            }


def _ends(estimate: Estimate | tuple[None, ...], name: str = "points") -> Result:
    return dict(zip((name, "low", "high"), estimate, strict=True))
