"""Tests that rated and ranked answers of published data sets become feedback that `preferences`
binarizes as the published pairs were. The files in tests/published have the published schemas."""

import copy
import json
import math
import random
import tracemalloc
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import yaml

from zephyr_ray.errors import Permanent
from zephyr_ray.manifest import Manifest
from zephyr_ray.pipeline import KINDS
from zephyr_ray.plan import make_plan
from zephyr_ray.published_feedback import ASPECTS, FEEDBACK
from zephyr_ray.recipe import load
from zephyr_ray.stage import Work
from zephyr_ray.store import ROWS, Artifact, Store, read_jsonl
from zephyr_ray.text.preferences import Preferences, as_published
from zephyr_ray.text.published import Published

Row = dict[str, Any]

ROOT = Path(__file__).resolve().parents[1]
FILES = ROOT / "tests" / "published"
RAW = list(read_jsonl(FILES / "ultrafeedback.jsonl"))
NO_TRUTHFUL_QA = {"source": ["truthful_qa"]}


def write_jsonl(path: Path, rows: list[Row]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_work(
    name: str,
    folder: Path,
    inputs: dict[str, Artifact] | None = None,
    files: dict[str, Path] | None = None,
) -> Work:
    work = Work(name, folder, 0, inputs or {}, {}, files or {})
    work.scratch.mkdir(parents=True)
    return work


def preferences_work(folder: Path) -> Work:
    feedback = Artifact(folder / "published", Manifest(kind="published", key="k", files={}))
    return make_work("pairs", folder / "pairs", inputs={"feedback": feedback})


def read(file: Path, folder: Path, makes: str = "feedback", **settings: Any) -> tuple[Any, Work]:
    stage = Published(makes=makes, files=file.name, max_failed=0.5, **settings)  # type: ignore[arg-type]
    stage.check({"files": file}, {})
    work = make_work("published", folder / "published", files={"files": file})
    stage.run(work)
    return list(read_jsonl(work.folder / ROWS)), work


def binarize(folder: Path, **settings: Any) -> list[Row]:
    work = preferences_work(folder)
    Preferences(feedback="feedback", **settings).run(work)
    return list(read_jsonl(work.folder / ROWS))


def first_revision() -> list[Row]:
    """Returns the rows as they were first published: without `fine-grained_score`, and with scores
    of 1 multiplied by 10."""
    rows = copy.deepcopy(RAW)
    for row in rows:
        for completion in row["completions"]:
            del completion["fine-grained_score"]
            if completion["overall_score"] == 1:
                completion["overall_score"] = 10
    rows[4]["completions"][1]["overall_score"] = 10  # with a mean rating of 2.5, it may be a 1
    return rows


def test_an_answer_of_ultrafeedback_keeps_its_ratings_and_critique(tmp_path: Path) -> None:
    [row, *_], work = read(FILES / "ultrafeedback.jsonl", tmp_path, limit=1)
    assert {name: row[name] for name in ("id", "prompt", "instruction", "source")} == {
        "id": "r0000000",
        "prompt": "Name three planets.",
        "instruction": "Name three planets.",
        "source": "evol_instruct",
    }
    assert row["completions"][2] == {
        "text": "Mars.",
        "model": "starchat",
        "system": "Answer so that the reader learns something.",
        "principle": "helpfulness",
        "critique": "The answer of starchat is discussed.",
        "aspects": {
            "instruction_following": {"rating": 2, "rationale": "Follows it 2 of 5."},
            "honesty": {"rating": None, "rationale": "Honest N/A of 5."},
            "truthfulness": {"rating": 5, "rationale": "True 5 of 5."},
            "helpfulness": {"rating": 2, "rationale": "Helps 2 of 5."},
        },
        "overall": 3.5,
        "score": 3.5,
        "reason": "The answer of starchat is discussed.",
    }
    assert (work.counts["unrated/N/A"], work.examples["unrated/N/A"]) == (1, ["r0000000"])


def test_a_10_that_was_a_1_is_repaired_by_the_authors_rule_and_counted(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "raw.jsonl", first_revision())
    rows, work = read(file, tmp_path)
    scores = [[c["overall"] for c in row["completions"]] for row in rows]
    assert scores[2] == [1, 9, 2, 8]  # mean rating 1.25
    assert scores[3] == [10, 3, 8, 6]  # mean rating 5
    assert scores[4] == [9, None, 2, 8]  # mean rating 2.5
    assert rows[2]["completions"][0]["stated"] == {"overall": 10}
    counts = {name: work.counts[name] for name in work.counts if name.startswith(("rep", "uns"))}
    # The second repair is the empty answer to the last prompt.
    assert counts == {"repaired/overall 10 that was 1": 2, "unscored/overall 10 that may be 1": 1}
    assert work.examples["unscored/overall 10 that may be 1"] == ["r0000004"]


@pytest.mark.parametrize(
    ("ratings", "score"), [("2222", 1), ("2223", None), ("4444", None), ("4445", 10)]
)
def test_the_bounds_of_the_repair_are_the_authors(ratings: str, score: int | None) -> None:
    annotations = {
        aspect: {"Rating": rating} for aspect, rating in zip(ASPECTS, ratings, strict=True)
    }
    answer = {"response": "Yes.", "overall_score": 10, "annotations": annotations}
    row = FEEDBACK.convert({"instruction": "So?", "completions": [answer]})
    assert row["completions"][0]["score"] == score


def test_in_the_repaired_revision_a_doubtful_10_is_kept(tmp_path: Path) -> None:
    rows = copy.deepcopy(RAW)
    rows[4]["completions"][1]["overall_score"] = 10
    converted, work = read(write_jsonl(tmp_path / "raw.jsonl", rows), tmp_path)
    assert converted[4]["completions"][1]["overall"] == 10
    assert not [name for name in work.counts if name.startswith(("rep", "uns"))]


def published_rule(rows: list[Row]) -> Iterator[tuple[str, str, str, float, float]]:
    """Yields prompt, chosen, rejected and their scores by the rule of the published pairs, after
    the rule that repairs scores; without pairs of equal texts, which cannot be trained on."""
    for row in rows:
        answers = []
        for c in row["completions"]:
            score = float(c["overall_score"])
            ratings = [a["Rating"] for a in c["annotations"].values() if a["Rating"] != "N/A"]
            mean = sum(map(int, ratings)) / len(ratings)
            if score == 10 and mean <= 2:
                score = 1
            elif score == 10 and mean <= 4 and "fine-grained_score" not in c:
                continue
            answers.append((score, c["response"], c["model"]))
        if row["source"] == "truthful_qa" or len(answers) < 2:
            continue
        random.seed(42)
        best = max(answers, key=lambda answer: answer[0])
        other = random.choice(answers)
        while other == best:
            other = random.choice(answers)
        if best[1] != other[1]:
            yield row["instruction"], best[1], other[1], best[0], other[0]


@pytest.mark.parametrize("rows", [RAW, first_revision()], ids=["repaired", "first"])
def test_pairs_are_those_of_the_published_rule_row_by_row(rows: list[Row], tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "raw.jsonl", rows)
    _, work = read(file, tmp_path, exclude=NO_TRUTHFUL_QA)
    assert work.counts["dropped/source is truthful_qa"] == 1
    pairs = binarize(tmp_path, score="overall", rejected="published", ties="keep", seed=42)
    ours = [
        (
            *(pair["prompt"], pair["chosen"][-1]["content"], pair["rejected"][-1]["content"]),
            *(pair["score_chosen"], pair["score_rejected"]),
        )
        for pair in pairs
    ]
    assert ours == list(published_rule(rows))
    # In two pairs, both answers tie for the best score.
    assert len(ours) == 6 and [c == r for *_, c, r in ours].count(True) == 2


def test_the_published_draw_skips_copies_of_the_best_answer() -> None:
    best = {"score": 8, "text": "Yes.", "model": "gpt-4"}
    other = {"score": 8, "text": "Yes!", "model": "gpt-4"}
    for seed in range(20):
        assert as_published([best, dict(best), other], seed) == (best, [other])
    assert as_published([best, dict(best)], 42) == (best, [])


def test_the_mean_of_the_aspects_omits_ratings_that_do_not_apply(tmp_path: Path) -> None:
    """The rule of argilla/ultrafeedback-binarized-preferences: the answer with the
    best mean is chosen, one with a lower mean is rejected."""
    read(FILES / "ultrafeedback.jsonl", tmp_path)
    pairs = [
        (pair["chosen"][-1]["content"], pair["rejected"][-1]["content"], pair["score_rejected"])
        for pair in binarize(tmp_path, score="aspects", rejected="all")
        if pair["prompt"] in ("Name three planets.", "Translate to French: cat")
    ]
    assert sorted(pairs) == [
        ("Mars, Venus and Saturn.", "Mars, Venus and the Moon.", 11 / 4),
        ("Mars, Venus and Saturn.", "Mars.", 9 / 3),  # honesty does not apply
        ("Mars, Venus and Saturn.", "Venus, Earth, Neptune.", 18 / 4),
        ("chat", "gato", 5 / 4),
        ("chat", "le chien", 5 / 4),
        ("chat", "un chat", 18 / 4),
    ]


def test_feedback_without_the_named_score_says_what_to_do(tmp_path: Path) -> None:
    read(FILES / "nectar.jsonl", tmp_path)
    with pytest.raises(Permanent, match="to a stage whose answers have ratings of the aspects"):
        binarize(tmp_path, score="aspects")


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_ranks_become_descending_scores(suffix: str, tmp_path: Path) -> None:
    rows = list(read_jsonl(FILES / "nectar.jsonl"))
    file = write_jsonl(tmp_path / "data.jsonl", rows)
    if suffix == ".parquet":
        import pyarrow as pa
        from pyarrow import parquet

        file = tmp_path / "data.parquet"
        parquet.write_table(pa.Table.from_pylist(rows), file)
    [bird, name], _ = read(file, tmp_path)
    ranks = [(c["text"], c["rank"], c["score"]) for c in bird["completions"]]
    assert ranks[0] == ("A wren is a small brown bird.", 1, 7)
    assert ranks[3] == ("Birds are animals.", 4, 4)
    assert ranks[6] == ("No.", 7, 1)
    assert [c["score"] for c in name["completions"]] == [3, 3, 1]
    pairs = binarize(tmp_path, rejected="lowest")
    assert [pair["rejected"][-1]["content"] for pair in pairs] == ["No.", "I do not know."]
    assert [m["content"] for m in pairs[1]["chosen"][:-1]] == [
        *("Hi, I am Ada.", "Hello, Ada.", "What is my name?")
    ]


def test_answers_may_be_a_struct_of_lists(tmp_path: Path) -> None:
    answers = {"answer": ["Yes.", "No."], "rank": [2, 1]}
    [row], _ = read(
        write_jsonl(tmp_path / "a.jsonl", [{"prompt": "So?", "answers": answers}]), tmp_path
    )
    assert [(c["text"], c["score"]) for c in row["completions"]] == [("Yes.", 1), ("No.", 2)]


def test_values_that_are_not_scores_are_counted_by_cause(tmp_path: Path) -> None:
    rows = copy.deepcopy(RAW[:2])
    rows[0]["completions"][0]["overall_score"] = "about 4"
    rows[1]["completions"][3]["overall_score"] = 11
    rows[1]["completions"][2]["annotations"]["honesty"]["Rating"] = "0"
    ranked = {"prompt": "So?", "answers": [{"answer": "a", "rank": -1}, {"answer": "b", "rank": 1}]}
    file = write_jsonl(tmp_path / "raw.jsonl", rows)
    converted, work = read(file, tmp_path)
    assert [c["score"] for c in converted[0]["completions"]] == [None, 9, 3.5, 8]
    assert converted[1]["completions"][2]["aspects"]["honesty"]["rating"] is None
    assert work.counts["unscored/unreadable overall"] == 2
    assert work.examples["unscored/unreadable overall"] == ["r0000000", "r0000001"]
    assert work.counts["unrated/unreadable rating"] == 1
    (tmp_path / "more").mkdir()
    _, work = read(write_jsonl(file, [ranked]), tmp_path / "more")
    assert work.counts["unscored/unreadable rank"] == 1


def test_a_rank_is_not_used_as_a_score_if_an_answer_has_one(tmp_path: Path) -> None:
    answers = [{"text": "a", "score": "?", "rank": 1}, {"text": "b", "score": 0.5, "rank": 2}]
    [row], work = read(
        write_jsonl(tmp_path / "a.jsonl", [{"prompt": "So?", "answers": answers}]), tmp_path
    )
    assert [c["score"] for c in row["completions"]] == [None, 0.5]
    assert work.counts["unscored/unreadable score"] == 1


def test_ranks_that_are_not_used_may_start_at_0() -> None:
    answers = [{"text": "a", "score": 2, "rank": 0}, {"text": "b", "score": 1, "rank": 1}]
    row = FEEDBACK.convert({"prompt": "So?", "completions": answers})
    assert [c["score"] for c in row["completions"]] == [2, 1]


@pytest.mark.parametrize(
    ("score", "stored", "stated"),
    [
        (10**19, 1e19, None),
        ("1e19", 1e19, None),
        (math.nan, None, "nan"),
        (math.inf, None, "inf"),
        (-1e308, None, "-1e+308"),
        pytest.param(10**400, None, str(10**400), id="400 digits"),
        (Decimal("7.5"), None, "7.5"),
        ([10**40], None, str([10**40])),
        (True, None, True),
    ],
)
def test_feedback_stores_only_values_that_every_json_reader_accepts(
    score: Any, stored: float | None, stated: Any
) -> None:
    answers = [{"text": "a", "score": score}, {"text": "b", "score": 2}]
    row = FEEDBACK.convert({"prompt": "So?", "completions": answers})
    [read, other] = row["completions"]
    assert (read["score"], read.get("stated", {}).get("score")) == (stored, stated)
    assert json.dumps(row, allow_nan=False) and not isinstance(read["score"], int)
    assert other["score"] == 2


def test_integers_too_large_for_some_json_readers_are_stored_as_floats() -> None:
    answers = [{"text": "a", "score": 1, "overall": 10**40}, {"text": "b", "rank": 10**19}]
    row = FEEDBACK.convert({"prompt": "So?", "completions": answers})
    assert json.dumps(row["completions"][0]["stated"]) == '{"overall": 1e+40}'
    assert json.dumps(row["completions"][1]["rank"]) == "1e+19"


@pytest.mark.parametrize("value", [3, ["a"], {"a": 1}])
def test_text_fields_with_other_values_are_omitted(value: Any, tmp_path: Path) -> None:
    names = ("principle", "critique", "finish_reason", "system", "reason")
    odd = {"text": "a", "score": 1, **dict.fromkeys(names, value)}
    answers = [odd, {"text": "b", "score": 2}]
    [row], _ = read(
        write_jsonl(tmp_path / "a.jsonl", [{"prompt": "So?", "answers": answers}]), tmp_path
    )
    kept = row["completions"][0]
    assert kept == {"text": "a", "model": "unknown", "system": None, "score": 1, "reason": ""}


ANSWER = {"answer": "Yes.", "rank": 1}
RANKS_FROM_0 = "a rank of 0 2.*number ranks from 1"


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "So?", "answers": []}, "no answers 2.*set columns: {completions: …} to"),
        ({"prompt": "So?", "answers": {"answer": ["Yes."], "rank": []}}, "no answers 2"),
        ({"prompt": "So?", "answers": ["Yes.", "No."]}, "not text 2.*as an object with text"),
        ({"prompt": "So?", "answers": [{"answer": "Yes."}]}, "without scores.*add a score or rank"),
        ({"prompt": "So?", "answers": [{"answer": "No.", "rank": 0}, ANSWER]}, RANKS_FROM_0),
        ({"prompt": "So?", "answers": [ANSWER, {"answer": "No.", "rank": "0"}]}, RANKS_FROM_0),
        ({"prompt": " ", "answers": [ANSWER]}, "empty prompt 2"),
        ({"prompt": "\n\nHuman: a\n\nAssistant: b", "answers": [ANSWER]}, "do not alternate 2"),
        ({"answers": [ANSWER]}, "no column 'prompt', which feedback need"),
        ({"chosen": "a", "rejected": "b"}, "no column 'completions'.*set makes: pairs, or name"),
    ],
)
def test_unusable_feedback_is_refused_in_one_line(row: Row, says: str, tmp_path: Path) -> None:
    with pytest.raises(Permanent, match=says):
        read(write_jsonl(tmp_path / "a.jsonl", [row] * 2), tmp_path)


def test_reading_raw_feedback_as_pairs_is_refused_with_the_right_type(tmp_path: Path) -> None:
    with pytest.raises(Permanent, match="has no column 'chosen'.*; set makes: feedback, or name"):
        read(FILES / "ultrafeedback.jsonl", tmp_path, makes="pairs")


def test_an_unknown_column_to_exclude_by_is_refused_before_the_run(tmp_path: Path) -> None:
    with pytest.raises(Permanent, match="exclude: .* has no column 'sorce'; it has .*source"):
        read(FILES / "ultrafeedback.jsonl", tmp_path, exclude={"sorce": ["truthful_qa"]})


def test_rows_are_excluded_by_a_number(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    answers = [{"text": "a", "score": 1}, {"text": "b", "score": 2}]
    lines = [{"prompt": f"{n}?", "round": n, "completions": answers} for n in (1, 2)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows, work = read(file, tmp_path, exclude={"round": ["1"]})
    assert [row["prompt"] for row in rows] == ["2?"] and work.counts["dropped/round is 1"] == 1


def test_excluded_rows_have_no_limit_and_a_source_may_be_a_list(tmp_path: Path) -> None:
    rows, work = read(
        FILES / "ultrafeedback_binarized_cleaned.jsonl",
        tmp_path,
        makes="pairs",
        exclude={"source": ["evol_instruct", "sharegpt", "flan"]},
    )
    assert [row["prompt"] for row in rows] == ["Write one line about rain."]
    assert (work.counts["dropped/source is flan"], work.counts["scores tie"]) == (0, 1)
    folder = tmp_path / "nectar"
    folder.mkdir()
    rows, _ = read(FILES / "nectar.jsonl", folder, exclude={"source": ["sharegpt"]})
    assert [row["prompt"] for row in rows] == ["Name a bird."]


def test_turns_of_raw_ultrachat_alternate(tmp_path: Path) -> None:
    """Its files are numbered: train_0.jsonl, train_1.jsonl, …"""
    folder = tmp_path / "set"
    folder.mkdir()
    lines = (FILES / "ultrachat.jsonl").read_text().splitlines(keepends=True)
    for number, text in enumerate([lines[:2], lines[2:]]):
        (folder / f"train_{number}.jsonl").write_text("".join(text))
    rows, work = read(folder, tmp_path, makes="dialogues")
    assert [(m["role"], m["content"]) for m in rows[0]["messages"]] == [
        ("user", "How do I boil an egg?"),
        ("assistant", "Put it into boiling water for eight minutes."),
        ("user", "And a soft one?"),
        ("assistant", "Five minutes are enough."),
    ]
    assert (len(rows), work.counts["dropped/no answer at the end"]) == (2, 1)


def test_preferences_holds_one_row_of_feedback_in_memory(tmp_path: Path) -> None:
    answers = [{"answer": letter * 100_000, "rank": n} for n, letter in enumerate("abcde", 1)]
    file = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "So?", "answers": answers}] * 30)
    read(file, tmp_path)
    tracemalloc.start()
    stage = Preferences(feedback="feedback")
    stage.run(preferences_work(tmp_path))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5e6  # all rows are 15 MB


def test_the_recipe_in_docs_06_starts_from_raw_ultrafeedback(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "06-a-7b-model.md").read_text(encoding="utf-8")
    [block] = [b for b in text.split("```yaml\n") if b.startswith("extends: zephyr-7b-paper.yaml")]
    recipe = yaml.safe_load(block.partition("```")[0])
    recipe["extends"] = str(ROOT / "configs" / recipe["extends"])
    (tmp_path / "raw.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    loaded = load(tmp_path / "raw.yaml", KINDS, [f"storage={tmp_path}", "dpo.validation=0.03"])
    steps = make_plan(loaded, Store(tmp_path))
    rows = {step.name: step.rows for step in steps}
    assert (rows["raw"], rows["ultrafeedback"]) == (63_967, 63_967)
    assert loaded.stages["ultrafeedback"].model_dump() == {
        "feedback": "raw",
        "score": "overall",
        "rejected": "published",
        "ties": "keep",
        "min_margin": 0.0,
        "min_chosen": 1.0,
        "seed": 42,
    }
