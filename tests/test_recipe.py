"""Tests that every mistake in a recipe gives one clear error line, before any work."""

from pathlib import Path

import pytest

from zephyr_ray import recipe_file
from zephyr_ray.errors import Permanent
from zephyr_ray.pipeline import KINDS, main
from zephyr_ray.recipe import Recipe, load
from zephyr_ray.store import Store
from zephyr_ray.text.dialogues import SelfRefine
from zephyr_ray.text.preferences import Preferences
from zephyr_ray.text.prompts import Prompts

GOOD = """\
seed: 7
models:
  base: {weights: smollm2-135m-instruct}
  judge: {engine: rules}
stages:
  prompts: {kind: prompts, seeds: seeds.jsonl}
  dialogues: {kind: self_refine, model: base, prompts: prompts}
  sft: {kind: sft, model: base, data: dialogues}
  answers: {kind: completions, models: [sft], prompts: prompts}
  feedback: {kind: feedback, judge: judge, completions: answers}
  pairs: {kind: preferences, feedback: feedback}
"""

# The text to replace, its replacement, and a pattern of the error line.
MISTAKES = {
    "unknown kind": ("kind: self_refine", "kind: self_refin", "'dialogues'.*did you mean 'self_r"),
    "no kind": ("{kind: prompts, seeds", "{seeds", "'prompts'.*'kind' is missing"),
    "a list as kind": ("kind: prompts", "kind: [prompts]", "'prompts'.*unknown kind"),
    "misspelled setting": (
        "base, prompts: prompts}",
        "base, prompts: prompts, turn: 2}",
        "'dialogues': unknown setting 'turn'; did you mean 'turns'",
    ),
    "misspelled and so missing": (
        "seeds: seeds.jsonl",
        "seedz: seeds.jsonl",
        "'prompts': unknown setting 'seedz'; did you mean 'seed",
    ),
    "address without a scheme": (
        "base: {weights: smollm2-135m-instruct}",
        "base: {engine: openai, model: m, base_url: api.example.com}",
        "'base_url': must start with http",
    ),
    "missing setting": (", seeds: seeds.jsonl", "", "'prompts': setting 'seeds' is missing"),
    "wrong type": ("seeds.jsonl}", "seeds.jsonl, count: many}", "'count'.*got 'many'"),
    "out of range": ("seeds.jsonl}", "seeds.jsonl, count: 0}", "'count'.*got 0"),
    "number as a name": ("seeds.jsonl}", "seeds.jsonl, 3: 4}", "'prompts'.*'3'"),
    "missing artifact": (
        "data: dialogues",
        "data: dialogue",
        "'sft' reads 'dialogue', which is nei",
    ),
    "undefined model": (
        "model: base, data",
        "model: bass, data",
        "'sft' reads 'bass'.*did you mean 'base'",
    ),
    "undefined judge": ("judge: judge", "judge: jude", "'feedback' reads 'jude'.*mean 'judge'"),
    "model where text is read": (
        "data: dialogues",
        "data: base",
        "'base', which is a model; name a stage that makes dialogues",
    ),
    "wrong artifact": (
        "data: dialogues",
        "data: prompts",
        "'prompts', which makes prompts; name a stage that makes dialogues",
    ),
    "form that a judge lacks": (
        "judge: judge, completions",
        "judge: judge, forms: [score, aspects], completions",
        "engine rules has no form 'aspects'; name another judge",
    ),
    "stage as judge": (
        "judge: judge",
        "judge: sft",
        "'sft', which is a stage; name a judge that is defined under 'models'",
    ),
    "judge as model": ("models: [sft]", "models: [judge]", "'judge' is a rules judge"),
    "judge as weights": (
        "model: base, data",
        "model: judge, data",
        "'judge' has no weights .engine rules.; name one that has weights",
    ),
    "one name for a list": (
        "models: [sft]",
        "models: sft",
        "should be a valid list .got 'sft'.; write .sft.",
    ),
    "model without weights": (
        "base: {weights: smollm2-135m-instruct}",
        "base: {}",
        "model .base.: setting .weights. is missing",
    ),
    "endpoint without url": (
        "base: {weights: smollm2-135m-instruct}",
        "base: {engine: openai, model: m}",
        "model .base.: setting .base_url. is missing",
    ),
    "model of no training": ("smollm2-135m-instruct", "prompts", "stage 'prompts' trains no model"),
    "name of both": ("judge: {engine: rules}", "sft: {engine: rules}", "'sft' is both a model and"),
    "model setting": ("{engine: rules}", "{engine: rule}", "model 'judge': setting 'engine'"),
    "unknown top setting": ("seed: 7", "sed: 7", "unknown setting 'sed'"),
    "bad seed": ("seed: 7", "seed: yes", "seed must be a whole number"),
    "negative seed": ("seed: 7", "seed: -1", "seed must be a whole number from 0"),
    "huge seed": ("seed: 7", "seed: 4294967296", "seed must be a whole number from 0"),
    "negative seed of a stage": (
        "{kind: preferences, feedback: feedback}",
        "{kind: preferences, feedback: feedback, seed: -1}",
        "'pairs': setting 'seed' must be a whole number from 0",
    ),
    "infinity": (
        "base: {weights: smollm2-135m-instruct}",
        "base: {weights: smollm2-135m-instruct, temperature: .inf}",
        "'base': setting 'temperature': Input should be a finite number .got inf",
    ),
    "bad name": ("seed: 7", "name: A B", "invalid name 'A B'; use lowercase"),
    "storage url": ("seed: 7", "storage: s3://bucket/x", "'s3://bucket/x'; it must be"),
    "empty storage": ("seed: 7", "storage:", "storage is None; it must be a folder"),
    "bad yaml": ("[sft]", "[sft", "line 9"),
    "a tab": ("  judge:", "\tjudge:", "line 4"),
    "no such date": ("seed: 7", "seed: 2024-13-45", "month"),
    "key twice in stages": ("  pairs:", "  sft:", "line 11: 'sft' appears twice"),
    "key twice in a stage": (
        "kind: preferences",
        "kind: preferences, kind: sft",
        "line 11: 'kind' appears",
    ),
    "models no mapping": ("  base: {weights: smollm2-135m-instruct}\n", "  - base\n", "line 4"),
    "stage no mapping": (
        "{kind: preferences, feedback: feedback}",
        "3",
        "'pairs': not a mapping but int",
    ),
    "stage name": ("  pairs:", "  my pairs:", "'my pairs': invalid stage name; use letters"),
}


def write(folder: Path, text: str = GOOD) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    (folder / "seeds.jsonl").write_text('{"instruction": "Name a colour of the sky."}\n')
    return path


def loaded(folder: Path, *overrides: str, text: str = GOOD) -> Recipe:
    return load(write(folder, text), KINDS, list(overrides))


def load_error(folder: Path, text: str = GOOD, *overrides: str) -> str:
    with pytest.raises(Permanent) as caught:
        loaded(folder, *overrides, text=text)
    return str(caught.value)


def main_error(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Returns the only line on stderr of a run that ends with exit code 2."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_error_line_that_names_it(
    mistake: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new, says = MISTAKES[mistake]
    assert GOOD.count(old) == 1, "the replaced text must be unique"
    text = GOOD.replace(old, new)
    with pytest.raises(Permanent, match=says) as caught:
        loaded(tmp_path, text=text)
    line = main_error(capsys, write(tmp_path, text))
    assert line == f"error: {caught.value}"


def test_the_recipe_without_a_mistake_is_loaded(tmp_path: Path) -> None:
    recipe = loaded(tmp_path)
    assert list(recipe.stages) == ["prompts", "dialogues", "sft", "answers", "feedback", "pairs"]
    assert recipe.name == "recipe"
    assert recipe.file("seeds.jsonl") == tmp_path / "seeds.jsonl"


def test_reading_a_later_artifact(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = GOOD.splitlines(keepends=True)
    later = "".join([*lines[:6], *lines[7:], lines[6]])  # dialogues come last
    assert "'sft' reads 'dialogues', which comes later; move 'dialogues' above 'sft'" in load_error(
        tmp_path, later
    )
    assert "comes later" in main_error(capsys, write(tmp_path, later))


def test_a_cycle_is_shown_with_its_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = GOOD.replace("model: base, prompts", "model: sft, prompts")
    assert "a cycle: dialogues → sft → dialogues" in load_error(tmp_path, text)
    assert "a cycle" in main_error(capsys, write(tmp_path, text))


def test_a_cycle_through_a_model(tmp_path: Path) -> None:
    text = GOOD.replace("smollm2-135m-instruct", "sft")
    assert "a cycle: dialogues → sft → dialogues" in load_error(tmp_path, text)


def test_a_stage_that_reads_itself(tmp_path: Path) -> None:
    assert "a cycle: sft → sft" in load_error(tmp_path, GOOD.replace("base, data", "sft, data"))


@pytest.mark.parametrize("text", ["", "stages:\n", "stages: {}\n", "models: {}\n"])
def test_no_stages(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "recipe.yaml" in load_error(tmp_path, text)
    main_error(capsys, write(tmp_path, text))


def test_unreadable_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = main_error(capsys, tmp_path / "none.yaml")
    assert "none.yaml: No such file" in line
    assert "Is a directory" in main_error(capsys, tmp_path)
    (tmp_path / "latin.yaml").write_bytes("name: größe\n".encode("latin-1"))
    assert "not UTF-8" in main_error(capsys, tmp_path / "latin.yaml")
    (tmp_path / "zero.yaml").write_bytes(b"name: a\0b\n")
    assert "zero.yaml: unacceptable character" in main_error(capsys, tmp_path / "zero.yaml")


def test_an_unhashable_key_is_bad_yaml(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main_error(capsys, write(tmp_path, "? [a, b]\n: 1\n"))


def test_merge_keys_are_not_duplicate_keys(tmp_path: Path) -> None:
    text = GOOD.replace("base: {", "base: &b {").replace(
        "  judge:", "  hot: {<<: *b, temperature: 1.5}\n  judge:"
    )
    hot = loaded(tmp_path, text=text).models["hot"].settings.model_dump()
    assert (hot["weights"], hot["temperature"]) == ("smollm2-135m-instruct", 1.5)


def test_a_recipe_extends_another(tmp_path: Path) -> None:
    write(tmp_path)
    more = tmp_path / "more.yaml"
    more.write_text(
        "extends: recipe.yaml\nstages:\n  sft: {kind: sft, model: base, data: dialogues, epochs: 3}"
        "\n  low: {kind: preferences, feedback: feedback, rejected: lowest}\n"
    )
    recipe = load(more, KINDS)
    base = list(load(write(tmp_path), KINDS).stages)
    assert list(recipe.stages) == [*base, "low"]  # a repeated stage keeps its place
    assert recipe.stages["sft"].model_dump()["epochs"] == 3
    more.write_text(
        "extends: recipe.yaml\nstages:\n"
        "  low: {kind: preferences, feedback: feedback, rejected: lowest}\n"
        "  pairs: {kind: preferences, feedback: feedback}\n"
    )
    at = base.index("pairs")
    assert list(load(more, KINDS).stages) == [*base[:at], "low", *base[at:]]
    more.write_text("extends: none.yaml\n")
    with pytest.raises(Permanent, match="cannot read the recipe .*none.yaml"):
        load(more, KINDS)
    more.write_text("extends: recipe.yaml\nmodels: [base]\n")
    with pytest.raises(
        Permanent, match="models: not a mapping but list; write 'name: value' lines"
    ):
        load(more, KINDS)


def test_the_extending_recipe_takes_precedence(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "more.yaml").write_text(
        "extends: recipe.yaml\nname: mine\nseed: 8\n"
        "models:\n  base: {weights: owner/mine, top_p: 1}\n  extra: {engine: rules}\n"
        "stages:\n  prompts: {kind: prompts, seeds: seeds.jsonl, count: 1}\n"
    )
    recipe = load(tmp_path / "more.yaml", KINDS)
    assert (recipe.name, recipe.seed) == ("mine", 8)
    base = recipe.models["base"]
    assert (base.main.origin, base.settings.model_dump()["top_p"]) == ("owner/mine", 1)
    assert [name for name in recipe.models if name not in recipe.stages] == [
        "base", "judge", "extra"
    ]  # fmt: skip
    settings = recipe.stages["prompts"].model_dump()
    assert (settings["count"], settings["seed"]) == (1, 8)


def test_files_of_an_extended_recipe_are_beside_it(tmp_path: Path) -> None:
    write(tmp_path)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "my.yaml").write_text("extends: ../recipe.yaml\n")
    recipe = load(mine / "my.yaml", KINDS)
    assert recipe.file("seeds.jsonl").samefile(tmp_path / "seeds.jsonl")
    (mine / "seeds.jsonl").write_text("")  # its own folder comes first
    assert recipe.file("seeds.jsonl") == mine / "seeds.jsonl"


def test_the_title_of_a_report_is_the_recipes_name(tmp_path: Path) -> None:
    text = f"name: mine\n{GOOD}  report: {{kind: report, of: [sft]}}\n"
    assert loaded(tmp_path, text=text).stages["report"].model_dump()["title"] == "mine"


def test_a_recipe_cannot_extend_one_that_extends_another(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "more.yaml").write_text("extends: recipe.yaml\n")
    (tmp_path / "most.yaml").write_text("extends: more.yaml\n")
    with pytest.raises(Permanent, match="more.yaml, which extends another recipe"):
        load(tmp_path / "most.yaml", KINDS)


def test_a_recipe_cannot_extend_itself(tmp_path: Path) -> None:
    (tmp_path / "same.yaml").write_text(f"extends: ../{tmp_path.name}/same.yaml\n")
    with pytest.raises(Permanent, match="same.yaml: extends itself; name another recipe$"):
        load(tmp_path / "same.yaml", KINDS)


def test_a_forgotten_engine_is_named(tmp_path: Path) -> None:
    write(tmp_path)
    far = "models.far={model: m, base_url: 'http://127.0.0.1:9/v1'}"
    says = "the default, has no setting 'base_url'; set engine: openai$"
    with pytest.raises(Permanent, match=says):
        load(tmp_path / "recipe.yaml", KINDS, [far])


@pytest.mark.parametrize("value", ["{top_k:5}", "{a: {b:1}}"])
def test_a_mapping_without_a_space_is_refused(value: str, tmp_path: Path) -> None:
    """YAML reads {top_k:5} as a key without a value."""
    path = write(tmp_path)
    says = "a mapping needs a space after the colon; write {name: value}"
    with pytest.raises(Permanent, match=f"--set models.base.parameters=…: {says}"):
        load(path, KINDS, [f"models.base.parameters={value}"])
    path.write_text(f"{path.read_text()}\nhardware: {value}\n")
    with pytest.raises(Permanent, match=f"recipe.yaml line .*: {says}"):
        load(path, KINDS)


SETS = {
    "no value": ("pairs.rejected", "write stage.setting=value"),
    "empty part": ("pairs..rejected=all", "write stage.setting=value"),
    "unknown stage": ("pair.rejected=all", "has no 'pair'; did you mean 'pairs'"),
    "model without models": (
        "base.temperature=1",
        "has no .base.; write models.base.temperature=…",
    ),
    "unknown model": ("models.bass.temperature=1", "has no 'bass'; did you mean 'base'"),
    "below a list": ("answers.models.0=base", "'models' is not a mapping; write answers.models="),
    "missing mapping": ("sft.lora.rank=4", "'lora' as a mapping; write --set 'sft.lora={rank: …}'"),
    "no hardware": ("hardware.gpu_memory_gib=24", "write --set 'hardware={gpu_memory_gib: …}'"),
    "misspelled setting": (
        "pairs.rejecte=all",
        "unknown setting 'rejecte'; did you mean 'rejected'",
    ),
    "wrong value": ("pairs.rejected=some", "'rejected'.*got 'some'"),
    "bad yaml": ("pairs.rejected=[", "--set pairs.rejected=…: the value is not valid YAML"),
    "below a value": ("seed.x=1", "'seed' is not a mapping; write seed=value"),
    "unknown top setting": ("sead=1", "unknown setting 'sead'; did you mean 'seed'"),
}


@pytest.mark.parametrize("mistake", SETS)
def test_a_wrong_override_is_one_error_line(
    mistake: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, says = SETS[mistake]
    with pytest.raises(Permanent, match=says):
        loaded(tmp_path, text)
    main_error(capsys, write(tmp_path), "--set", text)


@pytest.mark.parametrize("section", ["stages", "models"])
def test_an_override_of_a_recipe_whose_sections_are_not_mappings(
    section: str, tmp_path: Path
) -> None:
    (tmp_path / "r.yaml").write_text(f"{section}: 5\n")
    with pytest.raises(Permanent, match="a.b=…: the recipe has no 'a'"):
        load(tmp_path / "r.yaml", KINDS, ["a.b=1"])


def test_an_override_beside_a_stage_whose_name_is_a_number(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("stages: {1: {}, a: {}}\n")
    with pytest.raises(Permanent, match="has no 'b'; known: 1, a, hardware, models"):
        load(tmp_path / "r.yaml", KINDS, ["b.x=1"])


def test_overrides(tmp_path: Path) -> None:
    recipe = loaded(
        tmp_path, "pairs.rejected=all", "models.base.temperature=0.25", "dialogues.turns=5"
    )
    pairs, dialogues = recipe.stages["pairs"], recipe.stages["dialogues"]
    assert isinstance(pairs, Preferences) and pairs.rejected == "all"
    assert isinstance(dialogues, SelfRefine) and dialogues.turns == 5
    assert recipe.models["base"].settings.model_dump()["temperature"] == 0.25
    assert loaded(tmp_path, "storage=elsewhere").storage == Path("elsewhere")


def test_an_override_is_read_as_typed(tmp_path: Path) -> None:
    texts = ["w/a #b", "#x", "a: b", "- a", "yes", "007", "1:30", "2024-01-01", "0x10", "1_000"]
    texts += ["&a", "*a", "!x", "%x", "a\tb", "|", "NULL", "1.", "[a", "{a"]
    quoted = {"'#x'": "#x", '"7"': "7", "' a '": " a ", '"a #b"': "a #b", " w/a ": "w/a"}
    typed = {"7": 7, "-1": -1, "1e5": 1e5, "0.50": 0.5, "true": True, "null": None, "": None}
    nested = {
        "[no, 007, 1]": ["no", "007", 1],
        "{r: 08, b: {c: off}}": {"r": "08", "b": {"c": "off"}},
    }
    (tmp_path / "r.yaml").write_text("stages: {a: {}}\n")
    for text, value in ({t: t for t in texts[:-2]} | quoted | typed | nested).items():
        assert recipe_file.read(tmp_path / "r.yaml", [f"a.x={text}"])[0]["stages"]["a"] == {
            "x": value
        }
    for text in (*texts[-2:], "[a] #b", "{a: 1, a: 2}", "'a' b"):
        with pytest.raises(Permanent, match="the value is not valid YAML; quote it"):
            recipe_file.read(tmp_path / "r.yaml", [f"a.x={text}"])


def test_a_setting_converts_the_value_of_an_override(tmp_path: Path) -> None:
    recipe = loaded(tmp_path, "sft.packing=no", "sft.epochs=3", "sft.learning_rate=1e-5", "seed=7")
    assert recipe.stages["sft"].model_dump()["packing"] is False
    assert recipe.stages["sft"].model_dump()["learning_rate"] == 1e-5
    with pytest.raises(Permanent, match=r"'weights': .*\(got 7\); quote it"):
        loaded(tmp_path, "models.base.weights=7")


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("~nobody_here/x", "names a user who does not exist"),
        ("$HOME/x", "contains a shell variable"),
        ("a\nb", "cannot be printed"),
        ("a\x1bb", "cannot be printed"),
        ("a\udcffb", "cannot be printed"),
        ("a/::b", "contains '::'"),
        ("s3://a", "must be a folder"),
        ("", "must be a folder"),
        ("7", "must be a folder"),
    ],
)
def test_an_invalid_storage_is_one_error_line(value: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(Permanent, match=says):
        loaded(tmp_path, f"storage={value}")


def test_the_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert loaded(tmp_path, "storage=~/x y").storage == tmp_path / "x y"
    recipe = loaded(tmp_path, "prompts.seeds=~/seeds.jsonl")
    assert recipe.files(recipe.stages["prompts"]) == {"seeds": tmp_path / "seeds.jsonl"}


@pytest.mark.parametrize("name", ["007", "on", "null"])
def test_a_name_that_is_not_text_is_one_error_line(name: str, tmp_path: Path) -> None:
    with pytest.raises(Permanent, match="name is .*quote it"):
        loaded(tmp_path, text=f"name: {name}\n{GOOD}")


def test_the_seed_is_the_default_of_stages(tmp_path: Path) -> None:
    def seeds(*overrides: str) -> tuple[int, int]:
        recipe = loaded(tmp_path, *overrides)
        prompts, pairs = recipe.stages["prompts"], recipe.stages["pairs"]
        assert isinstance(prompts, Prompts) and isinstance(pairs, Preferences)
        return prompts.seed, pairs.seed

    assert seeds() == (7, 7)
    assert seeds("seed=9") == (9, 9)
    assert seeds("prompts.seed=3") == (3, 7)


def test_defaults_are_the_papers(tmp_path: Path) -> None:
    pairs = loaded(tmp_path).stages["pairs"]
    assert isinstance(pairs, Preferences)
    assert (pairs.rejected, pairs.ties, pairs.min_margin) == ("random", "drop", 0.0)
    base = loaded(tmp_path).models["base"].settings.model_dump()
    assert (base["temperature"], base["top_p"]) == (0.7, 0.95)


# The content of the seeds file, and a part of the error line.
SEEDS = {
    "empty": ("", "seeds.jsonl is empty"),
    "blank lines only": ("\n \n", "seeds.jsonl is empty"),
    "no json": ('{"instruction": "a"}\n\nnot json\n', "seeds.jsonl line 3: not JSON"),
    "no object": ('["a"]\n', "seeds.jsonl line 1: not a JSON object"),
    "no instruction": ('{"instruction": "a"}\n\n{"task": "b"}\n', 'line 3: needs an "instruction"'),
    "misspelled field": (
        '{"instruction": "a"}\n{"instruction": "a", "constraints": {"kind": "json"}}\n',
        "seeds.jsonl line 2: unknown field 'constraints'; did you mean 'constraint'?",
    ),
    "empty instruction": ('{"instruction": " "}\n', 'line 1: needs an "instruction"'),
    "unknown constraint": (
        '{"instruction": "a", "constraint": {"kind": "rhyme"}}\n',
        "line 1: unknown constraint kind 'rhyme'",
    ),
    "constraint lacks n": (
        '{"instruction": "a"}\n{"instruction": "a", "constraint": {"kind": "bullets"}}\n',
        "line 2: constraint 'bullets' lacks n",
    ),
}


@pytest.mark.parametrize("plan", [[], ["--plan"]], ids=["run", "plan"])
@pytest.mark.parametrize("mistake", SEEDS)
def test_an_error_in_a_seeds_file_names_the_line(
    mistake: str, plan: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, says = SEEDS[mistake]
    recipe = write(tmp_path)
    (tmp_path / "seeds.jsonl").write_text(text)
    # The weights do not exist, so nothing can start if the error is missed.
    sets = ["--set", f"storage={tmp_path / 'runs'}", "--set", "models.base.weights=nowhere"]
    line = main_error(capsys, recipe, *sets, *plan)
    assert says in line
    assert "stage 'prompts'" in line


def test_a_missing_seeds_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write(tmp_path)
    (tmp_path / "seeds.jsonl").unlink()
    line = main_error(capsys, recipe, "--set", f"storage={tmp_path / 'runs'}")
    assert "cannot read" in line and "seeds.jsonl: No such file" in line


def test_unwritable_storage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("a file")
    for path in ("file", "file/below"):
        line = main_error(capsys, write(tmp_path), "--set", f"storage={tmp_path / path}")
        assert "is not writable" in line and "--set storage=FOLDER" in line


def test_unknown_until(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--set", f"storage={tmp_path / 'runs'}", "--until", "stf"]
    assert "--until stf" in main_error(capsys, write(tmp_path), *arguments)


def test_a_corrupted_artifact_stops_the_run_and_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from zephyr_ray.plan import make_plan

    text = "stages:\n  prompts: {kind: prompts, seeds: seeds.jsonl}\n"
    recipe = load(write(tmp_path, text), KINDS, [f"storage={tmp_path / 'runs'}"])
    store = Store(recipe.storage)
    store.prepare()
    [step] = make_plan(recipe, store)
    rows = store.folder("prompts", step.key) / "rows.jsonl"
    rows.parent.mkdir()
    rows.write_text('{"id": "p00000"}\n')
    store.commit("prompts", step.key, counts={"rows": 1})
    assert make_plan(recipe, store)[0].artifact is not None
    damaged = rows.read_bytes().replace(b"p00000", b"p00001")
    rows.write_bytes(damaged)
    for plan in ([], ["--plan"]):
        arguments = [tmp_path / "recipe.yaml", "--set", f"storage={tmp_path / 'runs'}", *plan]
        line = main_error(capsys, *arguments)
        assert f"prompts-{step.key} is corrupted: rows.jsonl does not match the hash" in line
    assert rows.read_bytes() == damaged
