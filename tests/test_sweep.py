"""Tests that a sweep expands into the stages and keys that one would write by hand."""

import json
from pathlib import Path
from typing import Any

import pytest

from zephyr_ray import recipe_file
from zephyr_ray.cluster.bundle import bundle
from zephyr_ray.errors import Permanent
from zephyr_ray.pipeline import KINDS, main, print_plan
from zephyr_ray.plan import make_plan
from zephyr_ray.preflight import check_files
from zephyr_ray.recipe import Recipe, load
from zephyr_ray.report import page
from zephyr_ray.settings import Reads, marked
from zephyr_ray.store import Store
from zephyr_ray.sweep import label

ROOT = Path(__file__).resolve().parents[1]
RECIPE = """\
name: small
models:
  base: {weights: smollm2-135m-instruct}
  student: {weights: sft, temperature: 0.9}
  judge: {engine: rules}
stages:
  heldout: {kind: prompts, seeds: seeds.jsonl}
  prompts: {kind: prompts, seeds: seeds.jsonl}
  dialogues: {kind: self_refine, model: base, prompts: prompts}
  sft: {kind: sft, model: base, data: dialogues}
  completions: {kind: completions, models: [base, student], prompts: prompts}
  feedback: {kind: feedback, judge: judge, completions: completions}
  pairs: {kind: preferences, feedback: feedback}
  dpo: {kind: dpo, model: sft, data: pairs}
  answers_base: {kind: completions, models: [base], prompts: heldout}
  answers_sft: {kind: completions, models: [sft], prompts: heldout}
  answers_dpo: {kind: completions, models: [dpo], prompts: heldout}
  winrate:
    {kind: pairwise, judge: judge, baseline: answers_base, answers: [answers_sft, answers_dpo]}
  report: {kind: report, of: [sft, dpo, winrate]}
"""
STAGES = [
    *("heldout", "prompts", "dialogues", "sft", "completions", "feedback", "pairs", "dpo"),
    *("answers_base", "answers_sft", "answers_dpo", "winrate", "report"),
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "seeds.jsonl").write_text('{"instruction": "Name a colour."}\n')
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path / "recipe.yaml"


def swept(path: Path, sweep: str, *overrides: str) -> Recipe:
    return load(path, KINDS, [f"sweep={sweep}", *overrides])


def reads(recipe: Recipe, stage: str) -> dict[str, list[str]]:
    return {field: names for field, _, names in marked(recipe.stages[stage], Reads) if names}


def values(recipe: Recipe, setting: str) -> dict[str, Any]:
    """Returns the values of a setting, by stage, for stages that have it."""
    settings = {name: stage.model_dump() for name, stage in recipe.stages.items()}
    return {name: dump[setting] for name, dump in settings.items() if setting in dump}


def keys(recipe: Recipe, storage: Path) -> dict[str, str]:
    return {step.name: step.key for step in make_plan(recipe, Store(storage))}


def test_the_swept_stage_and_its_readers_are_copied_and_others_shared(path: Path) -> None:
    recipe = swept(path, "{dpo.beta: [0.01, 0.1]}")
    assert list(recipe.stages) == [
        *STAGES[: STAGES.index("dpo")],
        *("dpo-beta-0.01", "dpo-beta-0.1", "answers_base", "answers_sft"),
        *("answers_dpo-beta-0.01", "answers_dpo-beta-0.1", "winrate", "report"),
    ]
    assert values(recipe, "beta") == {"dpo-beta-0.01": 0.01, "dpo-beta-0.1": 0.1}
    assert reads(recipe, "dpo-beta-0.01") == {"model": ["sft"], "data": ["pairs"]}
    assert reads(recipe, "answers_dpo-beta-0.1")["models"] == ["dpo-beta-0.1"]


def test_lists_of_stages_collect_all_variants(path: Path) -> None:
    recipe = swept(path, "{dpo.beta: [0.01, 0.1]}")
    assert reads(recipe, "winrate") == {
        "judge": ["judge"],
        "answers": ["answers_sft", "answers_dpo-beta-0.01", "answers_dpo-beta-0.1"],
        "baseline": ["answers_base"],
    }
    assert reads(recipe, "report")["of"] == ["sft", "dpo-beta-0.01", "dpo-beta-0.1", "winrate"]


def test_variants_know_their_settings(path: Path) -> None:
    variants = swept(path, "{dpo.beta: [0.01]}").variants
    assert {name: (v.of, v.settings) for name, v in variants.items()} == {
        "dpo-beta-0.01": ("dpo", {"dpo.beta": 0.01}),
        "answers_dpo-beta-0.01": ("answers_dpo", {"dpo.beta": 0.01}),
    }


def test_a_model_with_swept_weights_and_a_pool_of_it_are_copied(path: Path) -> None:
    recipe = swept(path, "{sft.epochs: [1, 2]}")
    pool = reads(recipe, "completions-epochs-2")["models"]
    assert pool == ["base", "student-epochs-2"]
    student = recipe.models["student-epochs-2"]
    assert (student.main.stage, student.settings.model_dump()["temperature"]) == (
        "sft-epochs-2",
        0.9,
    )
    assert reads(recipe, "dpo-epochs-1") == {"model": ["sft-epochs-1"], "data": ["pairs-epochs-1"]}
    assert "student" not in recipe.models and "prompts" in recipe.stages


def test_several_settings_give_all_combinations(path: Path) -> None:
    recipe = swept(path, "{pairs.rejected: [random, lowest], dpo.epochs: [1, 3]}")
    assert [name for name in recipe.stages if name.startswith(("pairs", "dpo"))] == [
        *("pairs-rejected-random", "pairs-rejected-lowest"),
        *("dpo-rejected-random-epochs-1", "dpo-rejected-random-epochs-3"),
        *("dpo-rejected-lowest-epochs-1", "dpo-rejected-lowest-epochs-3"),
    ]
    assert reads(recipe, "dpo-rejected-lowest-epochs-3")["data"] == ["pairs-rejected-lowest"]
    assert len(reads(recipe, "winrate")["answers"]) == 1 + 4


def test_a_setting_swept_in_two_stages_is_named_with_its_stage(path: Path) -> None:
    recipe = swept(path, "{sft.epochs: [1], dpo.epochs: [2]}")
    assert "dpo-sft.epochs-1-dpo.epochs-2" in recipe.stages and "sft-sft.epochs-1" in recipe.stages


def test_a_copied_collector_takes_the_variants_with_its_own_values(path: Path) -> None:
    """The baseline depends on sft.epochs, so there is one comparison per number of epochs."""
    recipe = swept(
        path,
        "{sft.epochs: [1, 2], dpo.beta: [0.1, 0.5]}",
        "answers_base.models=[student]",
        "winrate.answers=[answers_dpo]",
    )
    assert reads(recipe, "winrate-epochs-2") == {
        "judge": ["judge"],
        "answers": ["answers_dpo-epochs-2-beta-0.1", "answers_dpo-epochs-2-beta-0.5"],
        "baseline": ["answers_base-epochs-2"],
    }
    assert reads(recipe, "report")["of"][-2:] == ["winrate-epochs-1", "winrate-epochs-2"]


def test_a_swept_reference_depends_on_what_each_value_names(path: Path) -> None:
    other = "  other: {kind: preferences, feedback: feedback}\n"
    path.write_text(RECIPE.replace("  dpo:", f"{other}  dpo:"))
    recipe = swept(path, "{dpo.data: [pairs, other], pairs.rejected: [random, all]}")
    assert [name for name in recipe.stages if name.startswith("dpo")] == [
        *("dpo-data-pairs-rejected-random", "dpo-data-pairs-rejected-all", "dpo-data-other"),
    ]
    assert reads(recipe, "dpo-data-pairs-rejected-all")["data"] == ["pairs-rejected-all"]


def test_no_sweep_changes_nothing(path: Path) -> None:
    for recipe in (load(path, KINDS), swept(path, "{}")):
        assert (list(recipe.stages), recipe.variants) == (STAGES, {})


def test_the_key_of_a_variant_is_that_of_the_setting(path: Path, tmp_path: Path) -> None:
    plain = keys(load(path, KINDS, ["dpo.beta=0.5"]), tmp_path)
    variants = keys(swept(path, "{dpo.beta: [0.1, 0.5]}"), tmp_path)
    assert variants["dpo-beta-0.5"] == plain["dpo"] != variants["dpo-beta-0.1"]
    assert {name: variants[name] for name in STAGES[: STAGES.index("dpo")]} == {
        name: plain[name] for name in STAGES[: STAGES.index("dpo")]
    }


def test_a_new_value_reuses_the_artifacts_of_the_others(path: Path, tmp_path: Path) -> None:
    before = keys(swept(path, "{dpo.beta: [0.1, 0.5]}"), tmp_path)
    after = keys(swept(path, "{dpo.beta: [0.05, 0.1, 0.5]}"), tmp_path)
    changed = {name for name in after if before.get(name) != after[name]}
    assert changed == {"dpo-beta-0.05", "answers_dpo-beta-0.05", "winrate", "report"}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.1, "0.1"),
        (5e-07, "5e-07"),
        (2.0, "2"),
        (1e16, "1e16"),
        (-3, "-3"),
        (True, "true"),
        (None, "null"),
        ("data/my pairs.jsonl", "data-my-pairs.jsonl"),
        (["q_proj", "v_proj"], "q_proj-v_proj"),
        ({"r": 16, "quantized": True}, "r-16-quantized-true"),
    ],
)
def test_a_value_is_named_by_safe_characters(value: Any, text: str) -> None:
    assert label(value) == text


def test_a_value_may_be_a_mapping_or_nothing(path: Path) -> None:
    recipe = swept(path, "{sft.lora: [null, {r: 8}]}")
    adapters = values(recipe, "lora")
    assert adapters["sft-lora-null"] is None and adapters["sft-lora-r-8"]["r"] == 8
    assert recipe.variants["sft-lora-r-8"].settings == {"sft.lora": {"r": 8}}


def test_a_swept_loss_keeps_all_its_parts(path: Path, tmp_path: Path) -> None:
    losses = "{dpo.loss: [sigmoid, {sigmoid: 1, nll: 0.5}, {ipo: 1, nll: 2}]}"
    recipe = swept(path, losses)
    assert values(recipe, "nll_weight") == {
        **{"dpo-loss-sigmoid": 0, "dpo-loss-sigmoid-1-nll-0.5": 0.5, "dpo-loss-ipo-1-nll-2": 2},
    }
    plain = keys(load(path, KINDS, ["dpo.loss={ipo: 1, nll: 2}"]), tmp_path)
    assert keys(recipe, tmp_path)["dpo-loss-ipo-1-nll-2"] == plain["dpo"]


def test_a_rate_of_a_swept_stage_is_that_of_each_variant(path: Path) -> None:
    rates = "hardware={gpu_memory_gib: 80, rows_per_second: {dpo: 8, sft: 20}}"
    hardware = swept(path, "{dpo.beta: [0.1, 0.5]}", rates).hardware
    assert hardware
    assert hardware.rows_per_second == {"sft": 20, "dpo-beta-0.1": 8, "dpo-beta-0.5": 8}


def test_an_extending_recipe_replaces_the_sweep(path: Path) -> None:
    path.write_text(RECIPE + "sweep: {dpo.beta: [0.1, 0.5]}\n")
    more = path.with_name("more.yaml")
    more.write_text("extends: recipe.yaml\nsweep: {dpo.epochs: [1, 2]}\n")
    names = [name for name in load(more, KINDS).stages if name.startswith("dpo")]
    assert names == ["dpo-epochs-1", "dpo-epochs-2"]


def test_an_override_may_name_one_swept_setting(path: Path) -> None:
    recipe = load(path, KINDS, ["sweep.dpo.beta=[0.1, 0.5]", "sweep.dpo.epochs=[2]"])
    names = [name for name in recipe.stages if name.startswith("dpo")]
    assert names == ["dpo-beta-0.1-epochs-2", "dpo-beta-0.5-epochs-2"]


# By mistake: the overrides, and a pattern that the error line matches.
REFUSED = {
    "no mapping": (["sweep=[dpo.beta]"], "recipe.yaml: sweep: not a mapping but list"),
    "no setting": (["sweep={dpo: [1]}"], "sweep: dpo: not a setting of a stage; write stage.set"),
    "unknown stage": (
        ["sweep={dp.beta: [1]}"],
        "sweep: dp.beta: no stage 'dp'; did you mean 'dpo'",
    ),
    "a model": (["sweep={student.top_p: [1]}"], "sweep: student.top_p: no stage 'student'"),
    "unknown setting": (
        ["sweep={dpo.bta: [1]}"],
        "stage 'dpo': unknown setting 'bta'; did you mean 'beta'",
    ),
    "kind": (["sweep={dpo.kind: [dpo]}"], "sweep: dpo.kind: unknown setting; known: bad_rows"),
    "one value": (
        ["sweep={dpo.beta: 0.1}"],
        "sweep: dpo.beta: needs a list of values; write dpo.b",
    ),
    "no value": (["sweep={dpo.beta: []}"], "sweep: dpo.beta: needs a list of values"),
    "wrong type": (["sweep={dpo.beta: [0.1, x]}"], "stage 'dpo': setting 'beta': .*got 'x'"),
    "out of range": (["sweep={dpo.beta: [0.1, 0]}"], "stage 'dpo': setting 'beta': .*got 0"),
    "equal values": (["sweep={dpo.beta: [0.1, '1e-1']}"], "dpo.beta: the value 0.1 appears twice"),
    "equal mappings": (
        ["sweep={dpo.loss: [sigmoid, {sigmoid: 1}]}"],
        "dpo.loss: the value sigmoid-1 appears twice; remove one",
    ),
    "equal names": (
        ["sweep={prompts.seeds: [a b.jsonl, a-b.jsonl]}"],
        "prompts.seeds: two values would both be named a-b.jsonl",
    ),
    "no name": (["sweep={prompts.seeds: ['→']}"], "a value has no letter or digit"),
    "long name": (
        [f"sweep={{prompts.seeds: [{'a' * 99}]}}"],
        "'prompts' becomes 'prompts-seeds-aaa.*…', a name of 113 characters, more than 100",
    ),
    "operational": (["sweep={dpo.workers: [1, 2]}"], "dpo.workers: does not change the result"),
    "a name that exists": (
        ["sweep={dpo.epochs: [1]}", "stages.dpo-epochs-1={kind: chosen, pairs: pairs}"],
        "sweep: 'dpo' and 'dpo-epochs-1' both become 'dpo-epochs-1'; rename one",
    ),
    "a name of a model": (
        ["sweep={dpo.epochs: [1]}", "models.dpo-epochs-1={engine: rules}"],
        "sweep: 'dpo' and 'dpo-epochs-1' both become 'dpo-epochs-1'; rename one",
    ),
    "too many": (
        ["sweep={dpo.seed: [1, 2, 3, 4, 5], sft.seed: [1, 2, 3, 4, 5], pairs.seed: [1, 2, 3]}"],
        "sweep: 75 combinations of values, more than 64; remove some values",
    ),
    "an override of a swept setting": (
        ["sweep={dpo.beta: [0.1]}", "dpo.beta=0.2"],
        "--set dpo.beta=…: the recipe sweeps dpo.beta; write sweep.dpo.beta=",
    ),
    "an override in another order": (
        ["stages.sft.lora={r: 4}", "sweep={sft.lora: [null]}"],
        "--set stages.sft.lora=…: the recipe sweeps sft.lora; write sweep.sft.lora=",
    ),
    "unknown reference": (
        ["sweep={dpo.data: [pairs, pair]}"],
        "stage 'dpo-data-pair' reads 'pair', which is neither a stage nor",
    ),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_a_mistake_is_one_line(
    mistake: str, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides, says = REFUSED[mistake]
    with pytest.raises(Permanent, match=says):
        load(path, KINDS, overrides)
    assert main([str(path), "--plan", *(a for o in overrides for a in ("--set", o))]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_answers_of_one_model_cannot_be_compared_with_themselves(path: Path) -> None:
    recipe = swept(path, "{answers_dpo.max_tokens: [32, 64]}")
    with pytest.raises(Permanent, match="'winrate': .* both have answers of 'dpo'; remove one"):
        check_files(recipe)


def test_the_plan_of_a_swept_quickstart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = load(ROOT / "configs" / "quickstart.yaml", KINDS, ["sweep.dpo.beta=[0.01, 0.1, 0.5]"])
    print_plan(recipe, make_plan(recipe, Store(tmp_path)))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].strip() == "quickstart: 19 stages"
    rows = [line.split() for line in lines if " to do " in line]
    assert [row[0] for row in rows if row[1] in ("sft", "reference", "dpo", "report")] == [
        *("sft", "reference", "dpo-beta-0.01", "dpo-beta-0.1", "dpo-beta-0.5", "report"),
    ]


def test_a_long_name_is_complete_in_the_plan(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = swept(path, "{pairs.rejected: [random, lowest], dpo.learning_rate: [5e-7]}")
    print_plan(recipe, make_plan(recipe, Store(tmp_path)))
    column = "".join(
        line.split()[0] for line in capsys.readouterr().out.splitlines() if line[1:2].strip()
    )
    assert "answers_dpo-rejected-lowest-learning_rate-5e-07" in column and "…" not in column


def test_a_bundle_for_a_cluster_sweeps_the_same(path: Path, tmp_path: Path) -> None:
    (tmp_path / "more.jsonl").write_text('{"instruction": "Name a fruit."}\n')
    path.write_text(RECIPE + "sweep: {prompts.seeds: [seeds.jsonl, more.jsonl]}\n")
    raw, recipe = recipe_file.read(path, [])[0], load(path, KINDS)
    pods = tmp_path / "pods"
    pods.mkdir()
    for name, content in bundle(raw, recipe, "/mnt/zephyr", path).items():
        (pods / name).write_bytes(content)
    packed = load(pods / "recipe.yaml", KINDS)
    assert len(packed.stages) == len(recipe.stages)
    files = [stage for name, stage in packed.stages.items() if name.startswith("prompts")]
    texts = [packed.files(stage)["seeds"].read_text() for stage in files]
    assert ["fruit" in text for text in texts] == [False, True]
    assert packed.files(packed.stages["heldout"])["seeds"].parent == pods


def test_a_swept_recipe_runs_and_a_new_value_reuses_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three votes have a winner, one is a tie."""
    reported: list[list[str]] = []
    monkeypatch.setattr(page, "sweep_section", lambda variants, _: reported.append([*variants]))
    votes = [
        {
            **{"id": f"v{n}", "prompt": "Name a fish.", "instruction": "Name a fish."},
            "constraint": None,
            "completions": [
                {"model": m, "text": f"{m} {n}", "finish_reason": "stop", "score": score}
                for m, score in (("a", 9), ("b", 9 if n == 3 else 1))
            ],
        }
        for n in range(4)
    ]
    (tmp_path / "votes.jsonl").write_text("".join(json.dumps(vote) + "\n" for vote in votes))
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "name: small\nsweep: {pairs.ties: [keep]}\nstages:\n"
        "  votes: {kind: votes, file: votes.jsonl}\n"
        "  pairs: {kind: preferences, feedback: votes}\n"
        "  report: {kind: report, of: [pairs]}\n"
    )
    run = [str(path), "--set", f"storage={tmp_path / 'runs'}"]
    assert main(run) == 0
    pairs = tmp_path / "runs" / "small" / "data"
    kept = (pairs / "pairs-ties-keep").resolve()
    made = (kept / "manifest.json").stat().st_mtime_ns
    assert main([*run, "--set", "sweep.pairs.ties=[drop, keep]"]) == 0
    rows = {p.name: len((p / "rows.jsonl").read_text().splitlines()) for p in pairs.iterdir()}
    assert rows == {"votes": 4, "pairs-ties-drop": 3, "pairs-ties-keep": 4}
    assert (kept / "manifest.json").stat().st_mtime_ns == made
    assert reported == [["pairs-ties-keep"], ["pairs-ties-drop", "pairs-ties-keep"]]
    html = (tmp_path / "runs" / "small" / "report.html").read_text()
    assert "pairs-ties-drop" in html and "pairs-ties-keep" in html


def test_a_stage_of_the_same_content_as_another_is_made_once(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The report reads the files of both names, and refuses any that changed."""
    made: list[str] = []
    plain = KINDS["preferences"].run

    def run(stage: Any, work: Any) -> None:
        made.append(work.name)
        plain(stage, work)
        # No two runs of it give the same files.
        (work.folder / "made").write_text(str(len(made)))

    monkeypatch.setattr(KINDS["preferences"], "run", run)
    votes = (
        '{"id": "v", "prompt": "Name a fish.", "instruction": "Name a fish.", "constraint": null, '
        '"completions": [{"model": "a", "text": "Eel.", "finish_reason": "stop", "score": 9}, '
        '{"model": "b", "text": "Cat.", "finish_reason": "stop", "score": 1}]}'
    )
    (path.parent / "votes.jsonl").write_text(f"{votes}\n")
    path.write_text(
        "name: small\nsweep: {pairs.ties: [keep, drop]}\nstages:\n"
        "  votes: {kind: votes, file: votes.jsonl}\n"
        "  same: {kind: preferences, feedback: votes, ties: keep}\n"
        "  pairs: {kind: preferences, feedback: votes}\n"
        "  report: {kind: report, of: [same, pairs]}\n"
    )
    run_it = [str(path), "--set", f"storage={path.parent / 'runs'}"]
    assert main([*run_it, "--plan"]) == 0
    assert "is the same as same" in " ".join(capsys.readouterr().out.split())
    assert main(run_it) == 0
    assert made == ["same", "pairs-ties-drop"]
    data = path.parent / "runs" / "small" / "data"
    assert (data / "pairs-ties-keep").resolve() == (data / "same").resolve()
