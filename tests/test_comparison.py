"""Tests `zephyr compare` with runs made of artifacts on disk."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from zephyr_ray.cli import main
from zephyr_ray.comparison.differences import find_differences
from zephyr_ray.comparison.figures import compare_figures
from zephyr_ray.comparison.runs import Run, read_runs, stages_of
from zephyr_ray.errors import Permanent
from zephyr_ray.manifest import Manifest
from zephyr_ray.pipeline import KINDS
from zephyr_ray.run_folder import link_artifact, write_stages
from zephyr_ray.section import Bars, Chapter, Column, Interval, Pair, Place, Section, Table
from zephyr_ray.store import Artifact, Store, content_key

JUDGE = {"engine": "rules", "relevance": "model2vec", "relevance_min": 0.4}


def stage(run: Path, kind: str, name: str, identity: dict[str, Any], **facts: Any) -> Artifact:
    """Adds a stage to a run; its settings are those of its identity unless given."""
    store = Store(run.parent)
    key = content_key({"kind": kind, "settings": identity})
    folder = store.folder(kind, key)
    folder.mkdir(parents=True, exist_ok=True)
    for file, text in facts.pop("files", {}).items():
        (folder / file).write_text(text)
    makes_model = KINDS[kind].trains_model if kind in KINDS else False
    (folder / "model").mkdir(exist_ok=True) if makes_model else None
    facts.setdefault("settings", identity)
    identified = {"kind": kind, "version": 1, "settings": identity}
    artifact = store.commit(kind, key, identity=identified, name=name, **facts)
    view = ("models/{name}", "model") if makes_model else ("data/{name}", "")
    link_artifact(run, name, view, folder)
    return artifact


def quickstart(run: Path, epochs: float = 1.0, judge: float = 0.4, win_rate: float = 0.745) -> Path:
    """Makes a run of four stages: prompts, a model, its answers and their comparison."""
    seeds = {"seeds": "seeds.jsonl", "count": 200}
    digests = {"seeds": "ab12cd34" * 8, "count": 200}
    made = {"seconds": 1.0, "created": "2026-11-26T10:00:00"}
    heldout = stage(run, "prompts", "heldout", digests, settings=seeds, **made)
    losses = [{"step": s, "loss": 2 - s * epochs / 10} for s in range(5)]
    sft = stage(
        run,
        "sft",
        "sft",
        {"model": "base-hash", "epochs": epochs, "lora": {"r": 8}},
        settings={"model": "base", "epochs": epochs, "lora": {"r": 8}, "workers": int(epochs)},
        models={"base": {"engine": "vllm", "weights": "SmolLM2-135M-Instruct"}},
        files={"metrics.jsonl": "".join(json.dumps(row) + "\n" for row in losses)},
        seconds=100.0,
        created="2026-11-26T11:00:00",
    )
    weights = str(sft.model_folder)
    answers = stage(
        run,
        "completions",
        "answers",
        {"models": [["sft", {"engine": "vllm", "weights": sft.key}]], "prompts": heldout.key},
        settings={"models": ["sft"], "prompts": "heldout"},
        models={"sft": {"engine": "vllm", "weights": weights}},
        reads={"sft": sft.key, "heldout": heldout.key},
        created="2026-11-26T12:00:00",
        files={"rows.jsonl": ""},
    )
    compare_answers(run, "winrate", {"sft": win_rate}, answers.key, judge)
    return run


def compare_answers(
    run: Path,
    name: str,
    win_rates: dict[str, float],
    answers: str = "",
    judge: float = 0.4,
    created: str = "2026-11-26T13:00:00",
    differences: Sequence[dict[str, Any]] = (),
) -> None:
    """Adds a pairwise stage in which models have these win rates against base."""
    hashed = {**JUDGE, "relevance_min": judge}
    of_base = {"win_rate": None, "low": None, "high": None, "words": 30.0, "prompts": 200}
    of_model = {"low": 0.7, "high": 0.8, "words": 11.5, "prompts": 200}
    models = {model: {"win_rate": rate, **of_model} for model, rate in win_rates.items()}
    result = {
        **{"baseline": "base", "judge": "judge", "control": None, "notes": []},
        "models": {"base": of_base, **models},
        "differences": differences,
    }
    stage(
        run,
        "pairwise",
        name,
        {"judge": hashed, "answers": [["answers", answers]]},
        settings={"judge": "judge", "answers": ["answers"], "baseline": "answers"},
        models={"judge": hashed},
        counts={"paid/judge/dollars": 0.25},
        files={"result.json": json.dumps(result), "rows.jsonl": ""},
        seconds=9.0,
        created=created,
    )


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """Returns two runs in one storage folder that differ in epochs and in the judge."""
    one = quickstart(tmp_path / "one")
    return one, quickstart(tmp_path / "two", epochs=3.0, judge=0.5, win_rate=0.78)


def read(*folders: Path) -> list[Run]:
    return read_runs(folders, KINDS)


def test_only_hashed_settings_that_differ_are_listed(pair: tuple[Path, Path]) -> None:
    """Omits `workers`, which is not hashed, and weights, which one stage makes in both runs."""
    differences = find_differences(read(*pair))
    assert [(d.where, d.setting, d.values) for d in differences] == [
        ("sft", "epochs", ("1", "3")),
        ("model judge", "relevance_min", ("0.4", "0.5")),
    ]


def test_one_line_for_a_setting_that_differs_in_the_same_way_in_several_stages(
    tmp_path: Path,
) -> None:
    runs = [tmp_path / "one", tmp_path / "two"]
    for seed, run in enumerate(runs):
        for name in ("a", "b", "c", "d"):
            stage(run, "prompts", name, {"seed": seed, "stage": name})
    [difference] = find_differences(read(*runs))
    assert (difference.where, difference.values) == ("4 stages", ("0", "1"))


def test_a_file_with_other_content_differs(tmp_path: Path) -> None:
    runs = [tmp_path / "one", tmp_path / "two"]
    for letter, run in zip("ab", runs, strict=True):
        settings = {"seeds": "/somewhere/seeds.jsonl"}
        stage(run, "prompts", "prompts", {"seeds": letter * 64}, settings=settings)
    [difference] = find_differences(read(*runs))
    assert difference.values == ("seeds.jsonl (aaaaaaaa)", "seeds.jsonl (bbbbbbbb)")


def test_nested_and_missing_settings(tmp_path: Path) -> None:
    runs = [tmp_path / "one", tmp_path / "two"]
    stage(runs[0], "reference", "reference", {"lora": {"r": 8, "alpha": 16}})
    stage(runs[1], "reference", "reference", {"lora": {"r": 4, "alpha": 16}, "packing": True})
    stage(runs[1], "prompts", "prompts", {"count": 5})
    differences = find_differences(read(*runs))
    assert [(d.setting, d.values) for d in differences] == [
        ("lora.r", ("8", "4")),
        ("packing", (None, "true")),
    ]


def test_lists_and_null_are_shown_as_a_recipe_writes_them(tmp_path: Path) -> None:
    runs = [tmp_path / "one", tmp_path / "two"]
    stage(runs[0], "clean", "clean", {"languages": ["de", "en"], "judge": None})
    stage(runs[1], "clean", "clean", {"languages": ["de"], "judge": "judge"})
    differences = find_differences(read(*runs))
    assert [d.values for d in differences] == [("[de, en]", "[de]"), ("null", "judge")]


def test_the_bars_of_a_run_have_one_color(pair: tuple[Path, Path]) -> None:
    [bars] = [block for block in compare_figures(read(*pair)) if isinstance(block, Bars)]
    assert [name for name, _ in bars.bars] == ["sft · one", "sft · two"]
    assert bars.series == ("one", "two")


def test_the_findings_are_in_the_order_of_the_runs(pair: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    assert main(["compare", *map(str, pair), "--out", str(out)]) == 0
    [findings] = re.findall(r'<ul class="findings">(.*?)</ul>', out.read_text(encoding="utf-8"))
    assert re.findall(r"<b>(\w+)</b>", findings) == ["one", "two"]


def test_only_the_kind_is_listed_if_the_kind_of_a_stage_differs(tmp_path: Path) -> None:
    runs = [tmp_path / "one", tmp_path / "two"]
    stage(runs[0], "prompts", "prompts", {"count": 5})
    stage(runs[1], "clean", "prompts", {"min_score": 7})
    [difference] = find_differences(read(*runs))
    assert (difference.setting, difference.values) == ("kind", ("prompts", "clean"))


def test_runs_of_earlier_versions_are_compared_by_all_settings(tmp_path: Path) -> None:
    """Their manifests do not record what the key hashed, and their kinds may no longer exist."""
    runs = [tmp_path / "one", tmp_path / "two"]
    for count, run in enumerate(runs):
        artifact = stage(run, "gone", "prompts", {"count": count})
        old = {"kind": "gone", "key": artifact.key, "files": {}, "settings": {"count": count}}
        (artifact.folder / "manifest.json").write_text(json.dumps(old))
    [difference] = find_differences(read(*runs))
    assert (difference.setting, difference.values) == ("count", ("0", "1"))


def test_stages_of_all_runs_are_in_order(tmp_path: Path) -> None:
    runs = [tmp_path / "one", tmp_path / "two"]
    for run, names in zip(runs, (("a", "c"), ("a", "b", "c", "d")), strict=True):
        for hour, name in enumerate(names):
            stage(run, "prompts", name, {"stage": name}, created=f"2026-11-26T1{hour}:00:00")
    assert stages_of(read(*runs)) == ["a", "b", "c", "d"]


def test_a_run_opens_with_the_finding_of_the_last_stage_of_its_recipe(tmp_path: Path) -> None:
    """Here, the first of two comparisons was made again after the last."""
    run = tmp_path / "run"
    compare_answers(run, "first", {"sft": 0.71}, "one", created="2026-11-27T10:00:00")
    compare_answers(run, "last", {"dpo": 0.79}, "two", created="2026-11-26T10:00:00")
    [made_last] = read(run)
    assert made_last.headline.startswith("Ship sft")
    write_stages(run, {"first": "first", "last": "last"})
    [in_order] = read(run)
    assert list(in_order.artifacts) == ["first", "last"]
    assert in_order.headline.startswith("Ship dpo")


def test_figures_are_in_the_order_of_a_report(tmp_path: Path) -> None:
    """The last stage's figures come first, but the variants of a sweep keep the sweep's order."""
    run = tmp_path / "run"
    stages = {"sft": "sft", "dpo-beta-0.1": "dpo", "dpo-beta-0.5": "dpo", "last": "last"}
    for name in stages:
        compare_answers(run, name, {"sft": 0.7}, answers=name)
    write_stages(run, stages)
    titles = [b.title for b in compare_figures(read(run)) if isinstance(b, Bars)]
    assert [title.partition(":")[0] for title in titles] == [
        *("last", "dpo-beta-0.1", "dpo-beta-0.5", "sft")
    ]


def test_page_and_terminal_show_the_runs_side_by_side(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "page.html"
    assert main(["compare", *map(str, pair), "--out", str(out)]) == 0
    page = out.read_text()
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))
    shown = capsys.readouterr().out
    assert "one and two share 1 of 4 stages; they differ in epochs of sft (1, 3)" in text
    assert "epochs of sft (1, 3)" in shown and "relevance_min" in shown
    for row in ("sft one 0.75 [0.70, 0.80]", "sft two 0.78 [0.70, 0.80]"):
        assert row in re.sub(r" +", " ", shown)
    assert "sft one 0 0.75 [0.70, 0.80] 11.5" in text and "11.5" not in shown
    assert "sft two 0 0.78 [0.70, 0.80] 11.5" in text
    assert "one from 2 to 1.6; two from 2 to 0.8" in page  # the losses of both, in one plot
    assert "heldout prompts same 1.0 s 1.0 s" in text
    assert "answers completions other inputs 0.0 s 0.0 s" in text
    assert "winrate pairwise other inputs 9.0 s $0.2500 9.0 s $0.2500" in text
    assert "Sum 1 min 50 s $0.2500 1 min 50 s $0.2500" in text
    assert f"wrote {out}" in shown
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_figures_as_markdown_of_one_run_and_of_several(
    pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", "--markdown", str(pair[0])]) == 0
    assert capsys.readouterr().out == (
        "**winrate**\n\n| Model | Win rate |\n| --- | --- |\n| base | baseline |\n"
        "| sft | 0.75 [0.70, 0.80] |\n"
    )
    assert main(["compare", "--markdown", *map(str, pair)]) == 0
    shown = capsys.readouterr().out
    assert "| Model | Run | Win rate |" in shown and "| sft | two | 0.78 [0.70, 0.80] |" in shown


def test_markdown_of_a_run_without_intervals_is_one_clear_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage(tmp_path / "one", "prompts", "prompts", {"count": 1})
    assert main(["compare", "--markdown", str(tmp_path / "one")]) == 2
    assert "one: no figure has an interval; name a run that" in capsys.readouterr().err


def test_markdown_is_printed_and_not_written(
    pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["compare", "--markdown", "--out", "page.html", *map(str, pair)])
    assert "not allowed with argument" in capsys.readouterr().err


def test_stage_that_all_runs_share_is_shown_once(tmp_path: Path) -> None:
    runs = [quickstart(tmp_path / name) for name in ("one", "two")]
    out = tmp_path / "page.html"
    assert main(["compare", *map(str, runs), "--out", str(out)]) == 0
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", out.read_text()))
    assert "one and two share 4 of 4 stages; no setting differs" in text
    assert "sft all 0 0.75" in text and "sft one" not in text


def test_stage_made_twice_from_the_same_inputs_is_not_shared(tmp_path: Path) -> None:
    runs = [quickstart(tmp_path / name / "run", win_rate=0.7 + n) for n, name in enumerate("ab")]
    out = tmp_path / "page.html"
    assert main(["compare", *map(str, runs), "--out", str(out)]) == 0
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", out.read_text()))
    assert "share 3 of 4 stages; made separately from the same inputs: 1; no setting" in text
    assert "winrate pairwise made again" in text
    assert "sft a 0 0.70" in text and "sft b 0 1.70" in text


def test_runs_of_one_name_are_labeled_by_their_folders(tmp_path: Path) -> None:
    folders = [tmp_path / store / "runs" / "run" for store in ("a", "b")]
    for run in folders:
        stage(run, "prompts", "prompts", {"count": 1})
    assert [run.label for run in read(*folders)] == ["a", "b"]
    stage(other := tmp_path / "a" / "runs" / "other", "prompts", "prompts", {"count": 1})
    assert [run.label for run in read(*folders, other)] == [*map(str, folders), str(other)]


def test_unusable_runs_are_one_clear_line(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, _ = map(str, pair)
    (tmp_path / "empty").mkdir()

    def error(*arguments: str) -> str:
        assert main(["compare", *arguments]) == 2
        return capsys.readouterr().err

    assert "a comparison needs at least two runs; name another one" in error(one)
    assert "are the same run; name different ones" in error(one, f"{one}/../one")
    assert "there is no folder nowhere; run its recipe" in error(one, "nowhere")
    assert "has no models and no data; name the folder" in error(one, str(tmp_path / "empty"))
    assert "name a file that ends with .html" in error(*map(str, pair), "--out", "README.md")
    nowhere = str(tmp_path / "no" / "page.html")
    assert "(No such file or directory); name another --out" in error(
        *map(str, pair), "--out", nowhere
    )


def test_deleted_artifact_is_one_clear_line(pair: tuple[Path, Path]) -> None:
    one, _ = pair
    [gone] = (one.parent / "store").glob("prompts-*")
    gone.rename(gone.with_name("moved"))
    with pytest.raises(Permanent, match="cannot read .*prompts-.*; run the recipe again"):
        read(*pair)


def with_table(label: str, table: Table) -> Run:
    """Returns a run of one stage, whose result is a table."""
    section = Section((Chapter("Multiple choice", Place.RESULT, (table,)),))
    artifact = Artifact(Path(), Manifest(kind="likelihood", key=label, files={}))
    return Run(
        label=label, artifacts={"known": artifact}, sections={"known": section}, originals={}
    )


def test_the_difference_of_two_models_has_one_direction_in_all_runs() -> None:
    columns = (
        *(Column("Models"), Column("Interval"), Column("Changed", 0)),
        *(Column("Difference", 2, signed=True), Column("Points", 0, signed=True)),
    )
    both = Interval(0.1, -0.1, 0.2)
    rows = {
        "one": (Pair("dpo", "sft"), "includes 0", 7, both, 3),
        "two": (Pair("sft", "dpo"), "includes 0", 7, both, 3),
        "three": (Pair("sft", "dpo"), "includes 0", 7, None, 3.5),
    }
    runs = [with_table(label, Table(columns, (row,))) for label, row in rows.items()]
    [table] = compare_figures(runs)
    assert isinstance(table, Table)
    assert table.rows == (
        ("dpo − sft", "one", "includes 0", 7, both, 3),
        ("dpo − sft", "two", "includes 0", 7, Interval(-0.1, -0.2, 0.1), -3),
        ("dpo − sft", "three", "includes 0", 7, None, -3.5),
    )


def test_runs_that_list_models_in_another_order_have_one_direction(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ends = {"pass_difference": 0.2, "low": 0.1, "high": 0.4}
    runs = [tmp_path / "one", tmp_path / "two"]
    for run, (a, b) in zip(runs, (("dpo", "sft"), ("sft", "dpo")), strict=True):
        difference = {"a": a, "b": b, **ends}
        compare_answers(run, "winrate", {b: 0.7, a: 0.8}, run.name, differences=[difference])
    assert main(["compare", "--markdown", *map(str, runs)]) == 0
    assert capsys.readouterr().out.endswith(
        "| dpo − sft | one | excludes 0 | +0.200 [+0.100, +0.400] |\n"
        "| dpo − sft | two | excludes 0 | −0.200 [−0.400, −0.100] |\n"
    )


def test_rows_and_columns_of_one_name_are_all_shown() -> None:
    def run(label: str, *rows: tuple[Any, ...]) -> Run:
        columns = (Column("Models"), Column("Task"), Column("error", 1), Column("error", 1))
        return with_table(label, Table(columns, rows))

    both = ("b − a", "x", 1.0, 2.0), ("b − a", "y", 3.0, 4.0)
    [table] = compare_figures([run("one", *both), run("two", *both[:1])])
    assert isinstance(table, Table)
    assert [column.heading for column in table.columns] == [
        *("Models", "Run", "Task", "error", "error")
    ]
    assert table.rows == (
        ("b − a", "one", "x", 1.0, 2.0),
        ("b − a", "two", "x", 1.0, 2.0),
        ("b − a", "one", "y", 3.0, 4.0),
    )
