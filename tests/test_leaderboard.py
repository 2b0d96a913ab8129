"""Tests the leaderboard of several comparisons, on verdicts few enough to count."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from zephyr_ray.errors import Permanent
from zephyr_ray.judge.leaderboard import Leaderboard
from zephyr_ray.judge.leaderboard_section import leaderboard_section
from zephyr_ray.manifest import Manifest
from zephyr_ray.section import Column, Interval, Pair, Table, Text
from zephyr_ray.stage import Work
from zephyr_ray.store import Artifact, write_rows

THREE_TO_ONE = 400 * math.log10(3)

Verdicts = dict[str, list[float | None]]


def comparison(
    folder: Path, baseline: str, verdicts: Verdicts, texts: dict[str, list[str]] | None = None
) -> Artifact:
    """Writes the artifact of a pairwise stage with a verdict per prompt and model."""
    folder.mkdir()
    prompts = max(map(len, verdicts.values()))
    rows = [
        {
            "id": f"p{number}",
            "prompt": f"Name fish number {number}.",
            "constraint": None,
            "answers": {
                model: {"text": texts[model][number] if texts else "Cod."}
                for model in (baseline, *verdicts)
            },
            "verdicts": {baseline: {"verdict": 0.5, "reason": ""}}
            | {model: {"verdict": own[number], "reason": ""} for model, own in verdicts.items()},
        }
        for number in range(prompts)
    ]
    write_rows(folder, rows)
    models = {model: {"left_out": own.count(None)} for model, own in verdicts.items()}
    result = {"baseline": baseline, "judge": "critic", "models": {baseline: {}, **models}}
    (folder / "result.json").write_text(json.dumps(result))
    return Artifact(folder, Manifest(kind="pairwise", key=folder.name, files={}))


def board(folder: Path, of: dict[str, Artifact], **settings: Any) -> Artifact:
    work = Work("leaderboard", folder / "leaderboard", 0, of, {}, {})
    work.folder.mkdir()
    Leaderboard(of=list(of), **settings).run(work)
    return Artifact(
        work.folder, Manifest(kind="leaderboard", key="k", files={}, counts=work.counts)
    )


def result(artifact: Artifact) -> dict[str, Any]:
    return json.loads((artifact.folder / "result.json").read_text(encoding="utf-8"))


def blocks(artifact: Artifact, kind: type) -> list[Any]:
    [chapter] = leaderboard_section(artifact).chapters
    return [block for block in chapter.blocks if isinstance(block, kind)]


@pytest.fixture
def fish(tmp_path: Path) -> Artifact:
    """Compares sft and dpo with base, then dpo with sft, on the same four prompts."""
    return board(
        tmp_path,
        {
            "winrate": comparison(
                tmp_path / "winrate", "base", {"sft": [1, 1, 1, 0], "dpo": [1, 1, None, 0]}
            ),
            "winrate_sft": comparison(tmp_path / "winrate_sft", "sft", {"dpo": [1, 0.5, 0.5, 1]}),
        },
    )


def test_models_of_several_comparisons_are_on_one_scale(fish: Artifact) -> None:
    models = result(fish)["models"]
    assert list(models) == ["dpo", "sft", "base"]
    assert models["base"]["rating"] == 1000 and result(fish)["anchor"] == "base"
    assert 1000 < models["sft"]["rating"] < models["dpo"]["rating"]
    assert [row["rank"] for row in models.values()] == [1, 2, 3]
    assert {(row["best_rank"], row["worst_rank"]) for row in models.values()} == {(1, 3)}
    assert result(fish)["judges"] == {"winrate": "critic", "winrate_sft": "critic"}
    ratings = {f"rating/{model}": row["rating"] for model, row in models.items()}
    assert fish.manifest.counts == {"judgements": 11, "left_out": 1, "prompts": 4, **ratings}


def test_a_lone_comparison_gives_the_log_odds_of_its_win_rate(tmp_path: Path) -> None:
    made = board(tmp_path, {"a": comparison(tmp_path / "a", "base", {"sft": [1, 1, 0.5, 0.5]})})
    assert result(made)["models"]["sft"]["rating"] == pytest.approx(1000 + THREE_TO_ONE)
    # The anchor's comparison with itself does not count as a judgement.
    assert result(made)["models"]["base"]["judgements"] == 4


def test_prompts_left_out_are_counted_for_both_models(fish: Artifact) -> None:
    models = result(fish)["models"]
    assert {m: (r["judgements"], r["left_out"]) for m, r in models.items()} == {
        "base": (7, 1),
        "sft": (8, 0),
        "dpo": (7, 1),
    }


def test_a_pair_judged_twice_on_a_prompt_is_one_cluster(tmp_path: Path) -> None:
    verdicts: list[float | None] = [1, 1, 0, 1, 0.5, 0, 1]
    swapped: list[float | None] = [1 - v for v in verdicts if v is not None]
    once = comparison(tmp_path / "once", "base", {"sft": verdicts})
    again = comparison(tmp_path / "again", "sft", {"base": swapped})
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    single = result(board(tmp_path / "one", {"once": once}))["models"]["sft"]
    double = result(board(tmp_path / "two", {"once": once, "again": again}))["models"]["sft"]
    for end in ("rating", "low", "high"):
        assert double[end] == pytest.approx(single[end])
    assert double["judgements"] == 2 * single["judgements"]


def test_pairs_have_shares_and_differences(fish: Artifact) -> None:
    pairs = {(p["a"], p["b"]): p for p in result(fish)["pairs"]}
    assert {names: (p["judgements"], p["win_rate"]) for names, p in pairs.items()} == {
        ("dpo", "sft"): (4, 0.75),
        ("dpo", "base"): (3, pytest.approx(2 / 3)),
        ("sft", "base"): (4, 0.75),
    }
    models = result(fish)["models"]
    expected = models["dpo"]["rating"] - models["sft"]["rating"]
    assert pairs["dpo", "sft"]["difference"] == pytest.approx(expected)


def test_a_pair_has_the_share_of_the_model_that_ranks_higher(tmp_path: Path) -> None:
    made = board(tmp_path, {"a": comparison(tmp_path / "a", "base", {"sft": [0, 0, 1, 0]})})
    [pair] = result(made)["pairs"]
    assert (pair["a"], pair["b"], pair["win_rate"]) == ("base", "sft", 0.75)
    assert pair["difference"] == pytest.approx(THREE_TO_ONE)
    [matrix] = [table for table in blocks(made, Table) if table.title == "Win rates"]
    assert matrix.rows == (("base", None, 0.75), ("sft", 0.25, None))


def test_the_matrix_shows_the_share_that_the_row_won(fish: Artifact) -> None:
    [matrix] = [table for table in blocks(fish, Table) if table.title == "Win rates"]
    assert [column.heading for column in matrix.columns] == ["Model", "dpo", "sft", "base"]
    assert all(column.shaded for column in matrix.columns[1:])
    third = pytest.approx(1 / 3)
    assert matrix.rows == (
        ("dpo", None, 0.75, pytest.approx(2 / 3)),
        ("sft", 0.25, None, 0.75),
        ("base", third, 0.25, None),
    )


def test_the_table_has_ratings_and_the_ranks_they_allow(fish: Artifact) -> None:
    table, neighbors, _ = blocks(fish, Table)
    assert [row[:2] for row in table.rows] == [
        ("dpo", "1 (1–3)"),
        ("sft", "2 (1–3)"),
        ("base", "3 (1–3)"),
    ]
    assert isinstance(table.rows[0][2], Interval) and table.rows[2][2] == 1000
    assert [row[0] for row in neighbors.rows] == [Pair("dpo", "sft"), Pair("sft", "base")]
    models = result(fish)["models"]
    assert table.rows[1][2].low == models["sft"]["low"]


def test_the_headline_says_whether_the_lead_may_be_chance(tmp_path: Path, fish: Artifact) -> None:
    headline = leaderboard_section(fish).headline
    assert headline.startswith("dpo leads with a rating of ")
    assert headline.endswith(", which may be chance.")
    (tmp_path / "clear").mkdir()
    clear = comparison(tmp_path / "sure", "base", {"sft": [1, 1, 1, 0] * 20})
    headline = leaderboard_section(board(tmp_path / "clear", {"sure": clear})).headline
    assert "191 points ahead of base [" in headline and "chance" not in headline


def test_a_model_that_always_wins_is_listed_first_with_the_reason(tmp_path: Path) -> None:
    made = board(
        tmp_path,
        {"a": comparison(tmp_path / "a", "base", {"sft": [1, 0, 1], "best": [1, 1, 1]})},
    )
    best = result(made)["models"]["best"]
    assert (best["rating"], best["low"], best["rank"]) == (None, None, None)
    assert list(result(made)["models"]) == ["best", "sft", "base"]
    table = blocks(made, Table)[0]
    assert table.rows[0][:3] == ("best", None, best["reason"])
    assert leaderboard_section(made).headline.startswith(
        f"best {best['reason']}, so it has no rating; sft leads the others with "
    )
    assert "rating/best" not in made.manifest.counts


def test_no_verdict_at_all(tmp_path: Path) -> None:
    made = board(tmp_path, {"a": comparison(tmp_path / "a", "base", {"sft": [None, None]})})
    assert result(made)["models"]["sft"]["reason"] == "has no readable verdict"
    assert leaderboard_section(made).headline == "sft has no readable verdict, so it has no rating."
    assert result(made)["pairs"][0]["win_rate"] is None


TEXTS = {
    "base": ["A cod is a fish."] * 40,
    # Longer answers win 15 of 20 times, shorter ones 6 of 20.
    "sft": ["A cod is a fish that lives in the sea."] * 20 + ["A cod."] * 20,
}
LIKES_LENGTH: Verdicts = {"sft": [1, 1, 1, 0] * 5 + [0, 0, 0, 1] * 4 + [0, 0, 1, 1]}


def test_style_control_rates_answers_of_equal_style(tmp_path: Path) -> None:
    made = board(
        tmp_path,
        {"a": comparison(tmp_path / "a", "base", LIKES_LENGTH, TEXTS)},
        style_control=True,
    )
    sft, style = result(made)["models"]["sft"], result(made)["style"]
    assert result(made)["style_controlled"] is True
    assert sft["uncontrolled"]["rating"] == pytest.approx(1000 + 400 * math.log10(21 / 19))
    assert style["length"]["low"] > 0
    assert style["bold"] == {"points": 0.0, "low": None, "high": None}
    table, *_, effects = blocks(made, Table)
    assert table.columns[3] == Column("Without style control", digits=0)
    assert [row[0] for row in effects.rows] == ["length", "headers", "lists", "bold"]


def test_the_report_says_why_style_is_not_controlled_for(tmp_path: Path) -> None:
    texts = {"base": ["A cod."] * 4, "sft": ["A cod and an eel."] * 4}
    made = board(
        tmp_path,
        {"a": comparison(tmp_path / "a", "base", {"sft": [1, 1, 1, 0]}, texts)},
        style_control=True,
    )
    assert result(made)["style_controlled"] is False
    note = (
        "Style is not controlled for, because the differences in style depend on each other or on "
        "the models."
    )
    assert blocks(made, Text)[1] == Text(note)
    assert leaderboard_section(made).headline.endswith(note)
    assert result(made)["models"]["sft"]["rating"] == pytest.approx(1000 + THREE_TO_ONE)


def test_a_stage_listed_twice_is_refused() -> None:
    with pytest.raises(Permanent, match="of: 'winrate' is listed more than once; list it once"):
        Leaderboard(of=["winrate", "winrate"]).check({}, {})
