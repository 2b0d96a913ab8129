"""Tests which stages must run again and why, and what preflight checks before a run."""

import json
import os
import shutil
import socket
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from chat_families import byte_level
from fake_endpoint import GOOD, endpoint
from transformers import PreTrainedTokenizerFast

from zephyr_ray.errors import Permanent, Temporary
from zephyr_ray.models.headers import count_parameters
from zephyr_ray.pipeline import KINDS, print_plan, run
from zephyr_ray.plan import Step, make_plan
from zephyr_ray.preflight import check_files, preflight
from zephyr_ray.recipe import Recipe, load
from zephyr_ray.run_folder import artifacts_of, link_artifact, read_stages, unlink_stale
from zephyr_ray.store import Store, write_rows

RECIPE = """\
name: small
models:
  base: {weights: tiny}
  student: {weights: sft, temperature: 0.9}
  judge: {engine: rules}
stages:
  prompts: {kind: prompts, seeds: seeds.jsonl}
  heldout: {kind: prompts, seeds: seeds.jsonl, count: 1}
  dialogues: {kind: self_refine, model: base, prompts: prompts}
  sft: {kind: sft, model: base, data: dialogues}
  completions: {kind: completions, models: [base, student], prompts: prompts}
  feedback: {kind: feedback, judge: judge, completions: completions}
  pairs: {kind: preferences, feedback: feedback}
  dpo: {kind: dpo, model: sft, data: pairs}
"""
STAGES = ["prompts", "heldout", "dialogues", "sft", "completions", "feedback", "pairs", "dpo"]
TEXT_OF_BASE = {"dialogues", "sft", "completions", "feedback", "pairs", "dpo"}


def safetensors(path: Path, **shapes: list[int]) -> None:
    """Writes a safetensors file without values: the length of the header, and the header."""
    tensors = {n: {"dtype": "F32", "shape": s, "data_offsets": [0, 0]} for n, s in shapes.items()}
    header = json.dumps({"__metadata__": {"format": "pt"}, **tensors}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "seeds.jsonl").write_text('{"instruction": "Name a colour."}\n')
    (tmp_path / "tiny").mkdir()
    write_model(tmp_path / "tiny")
    return tmp_path


def write_model(folder: Path, **config: Any) -> None:
    """Writes a model with 17 parameters, Zephyr's chat format and these entries in config.json."""
    folder.mkdir(exist_ok=True)
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]} | config
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = byte_level(["<unk>", "</s>"])
    special = {"unk_token": "<unk>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    safetensors(folder / "model.safetensors", a=[3, 4], b=[5])


def read(folder: Path, *overrides: str) -> Recipe:
    return load(folder / "recipe.yaml", KINDS, [f"storage={folder / 'runs'}", *overrides])


def plan(folder: Path, *overrides: str, until: str | None = None) -> dict[str, Step]:
    store = Store(folder / "runs")
    store.prepare()
    return {step.name: step for step in make_plan(read(folder, *overrides), store, until)}


def test_the_title_of_a_plan_counts_its_stages(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for until in ("prompts", "heldout"):
        print_plan(read(folder), list(plan(folder, until=until).values()))
    titles = [line.strip() for line in capsys.readouterr().out.splitlines() if "small" in line]
    assert titles == ["small: 1 stage", "small: 2 stages"]


def link(recipe: Recipe, store: Store, step: Step) -> None:
    assert step.artifact
    run = store.storage / recipe.name
    link_artifact(run, step.name, step.stage.view, step.artifact.folder)


def make_all(folder: Path, *overrides: str, created: str = "") -> None:
    """Makes an artifact of two rows for every stage without one, as the pipeline would."""
    store, recipe = Store(folder / "runs"), read(folder, *overrides)
    for step in plan(folder, *overrides).values():
        if step.artifact is None:
            place = store.folder(step.stage.kind, step.key)
            place.mkdir()
            write_rows(place, [{"id": "a"}, {"id": "b"}])
            facts = {"counts": {"rows": 2}, "identity": step.identity, "created": created}
            store.commit(step.stage.kind, step.key, **facts)
            step.artifact = store.find(step.stage.kind, step.key)
        link(recipe, store, step)


def to_do(folder: Path, *overrides: str) -> set[str]:
    return {name for name, step in plan(folder, *overrides).items() if step.artifact is None}


def reason(folder: Path, stage: str, *overrides: str) -> str:
    return plan(folder, *overrides)[stage].reason


def test_every_stage_runs_once(folder: Path) -> None:
    steps = plan(folder)
    assert list(steps) == STAGES
    assert to_do(folder) == set(STAGES)
    assert steps["prompts"].reason == "not made yet"
    assert steps["sft"].reason == "reads dialogues, which must run first"
    make_all(folder)
    assert to_do(folder) == set()
    assert {step.reason for step in plan(folder).values()} == {""}
    assert {step.rows for step in plan(folder).values()} == {2}


@pytest.mark.parametrize(
    ("override", "again"),
    [
        ("dpo.beta=0.5", {"dpo"}),
        ("pairs.rejected=lowest", {"pairs", "dpo"}),
        ("pairs.seed=3", {"pairs", "dpo"}),
        ("heldout.count=2", {"heldout"}),
        ("sft.epochs=2", {"sft", "completions", "feedback", "pairs", "dpo"}),
        ("dialogues.turns=3", {"dialogues", "sft", "completions", "feedback", "pairs", "dpo"}),
        ("models.judge.relevance_min=0.5", {"feedback", "pairs", "dpo"}),
        ("models.student.temperature=0.1", {"completions", "feedback", "pairs", "dpo"}),
        # Sampling settings do not affect training, unless the sampled answers are trained on.
        ("models.base.temperature=0.1", TEXT_OF_BASE),
    ],
)
def test_a_setting_replans_its_stage_and_what_depends_on_it(
    override: str, again: set[str], folder: Path
) -> None:
    make_all(folder)
    assert to_do(folder, override) == again
    assert to_do(folder) == set()


def test_temperature_is_not_in_the_key_of_training(folder: Path) -> None:
    teacher = ["models.teacher={weights: tiny}", "dialogues.model=teacher"]
    before, after = plan(folder, *teacher), plan(folder, *teacher, "models.base.temperature=0.1")
    changed = {name for name in STAGES if before[name].key != after[name].key}
    assert changed == {"completions", "feedback", "pairs", "dpo"}


@pytest.mark.parametrize(
    "override",
    [
        "sft.workers=2",
        "sft.zero=2",
        "sft.micro_batch=4096",
        "dpo.checkpoint_every=7",
        "models.base.actors=4",
        "models.base.concurrency=3",
        "models.student.gpus=1",
    ],
)
def test_operational_settings_are_in_no_key(override: str, folder: Path) -> None:
    make_all(folder)
    assert to_do(folder, override) == set()


def test_paths_of_recipe_and_storage_are_in_no_key(folder: Path, tmp_path: Path) -> None:
    before = {name: step.key for name, step in plan(folder).items()}
    moved = tmp_path / "elsewhere"
    shutil.copytree(folder, moved, ignore=shutil.ignore_patterns("elsewhere"))
    assert {name: step.key for name, step in plan(moved).items()} == before


def test_the_content_of_the_seeds_file_is_in_the_keys(folder: Path) -> None:
    make_all(folder)
    with (folder / "seeds.jsonl").open("a") as file:
        file.write('{"instruction": "Name a fruit."}\n')
    assert to_do(folder) == set(STAGES)
    assert reason(folder, "prompts") == "seeds changed"


def test_the_content_of_the_weights_is_in_the_keys(folder: Path) -> None:
    make_all(folder)
    safetensors(folder / "tiny" / "model.safetensors", a=[3, 4], b=[6])
    assert to_do(folder) == TEXT_OF_BASE


def test_the_content_of_a_demonstrations_file_is_in_the_keys(folder: Path) -> None:
    (folder / "shown.jsonl").write_text("")
    shown = "models.student.demonstrations=shown.jsonl"
    make_all(folder, shown)
    assert to_do(folder, shown) == set()
    (folder / "shown.jsonl").write_text("\n")
    assert to_do(folder, shown) == {"completions", "feedback", "pairs", "dpo"}


def test_the_content_of_each_file_of_a_folder_is_in_the_keys(folder: Path) -> None:
    published = "stages: {own: {kind: published, makes: prompts, files: own}}"
    (folder / "recipe.yaml").write_text(f"name: small\n{published}\n")
    (folder / "own" / "more").mkdir(parents=True)
    (folder / "own" / "more" / "one.jsonl").write_text('{"prompt": "a"}\n')
    before = plan(folder)["own"].key
    (folder / "own" / "more" / "one.jsonl").write_text('{"prompt": "b"}\n')
    assert plan(folder)["own"].key != before


def test_the_reason_names_changed_settings(folder: Path) -> None:
    make_all(folder)
    assert reason(folder, "dpo", "dpo.beta=0.5") == "beta was 0.1, is 0.5"
    both = reason(folder, "pairs", "pairs.rejected=all", "pairs.min_margin=1")
    assert both == "min_margin was 0.0, is 1.0; rejected was random, is all"
    assert reason(folder, "dpo", "pairs.rejected=all") == "reads pairs, which must run first"
    assert reason(folder, "feedback", "models.judge.relevance_min=0.5") == "judge changed"


def test_the_reason_is_a_new_kind_an_interruption_or_a_deletion(folder: Path) -> None:
    make_all(folder)
    kind = "heldout={kind: self_instruct, model: base, seeds: seeds.jsonl, count: 1}"
    assert reason(folder, "heldout", kind) == "kind was prompts"
    store, step = Store(folder / "runs"), plan(folder)["heldout"]
    place = store.folder("prompts", step.key)
    shutil.rmtree(place)
    assert reason(folder, "heldout") == "its artifact was deleted"
    (place / "scratch").mkdir(parents=True)
    assert reason(folder, "heldout") == "was interrupted; will resume"


def test_the_reason_is_a_manifest_of_an_earlier_version(folder: Path) -> None:
    make_all(folder)
    step = plan(folder)["heldout"]
    path = Store(folder / "runs").folder("prompts", step.key) / "manifest.json"
    old = json.loads(path.read_text())
    path.write_text(json.dumps({**old, "identity": None, "metrics": {}, "version": 1}))
    assert plan(folder)["heldout"].artifact
    count = "heldout.count=2"
    assert reason(folder, "heldout", count) == "was made by an earlier version of zephyr_ray"


def test_until_ends_the_plan(folder: Path) -> None:
    assert list(plan(folder, until="dialogues")) == STAGES[:3]
    with pytest.raises(
        Permanent, match="--until nothing: the recipe has no such stage; use one of prompts, "
    ):
        plan(folder, until="nothing")


def test_expected_rows_come_from_the_prompts_and_not_from_the_training_of_the_model(
    folder: Path,
) -> None:
    make_all(folder)
    text = (folder / "recipe.yaml").read_text()
    (folder / "recipe.yaml").write_text(
        text + "  more: {kind: self_refine, model: student, prompts: prompts}\n"
    )
    store = Store(folder / "runs")
    step = plan(folder)["sft"]
    store.commit("sft", step.key, counts={"rows": 77})
    assert plan(folder)["more"].rows == 2


def test_rows_of_a_file_of_tasks_are_counted_without_a_count(folder: Path) -> None:
    tasks = [{"instruction": f"Name fish number {n}."} for n in range(7)]
    lines = "".join(json.dumps(task) + "\n" for task in tasks)
    (folder / "tasks.jsonl").write_text(lines)
    text = (folder / "recipe.yaml").read_text()
    (folder / "recipe.yaml").write_text(text + "  mine: {kind: prompts, seeds: tasks.jsonl}\n")
    assert plan(folder)["mine"].rows == 7
    assert plan(folder, "mine.count=3")["mine"].rows == 3


def test_lineage_is_every_stage_that_leads_to_a_stage(folder: Path) -> None:
    recipe = read(folder)
    assert recipe.lineage(recipe.stages["sft"]) == ["prompts", "dialogues"]
    assert recipe.lineage(recipe.stages["dpo"]) == [
        name for name in STAGES if name not in ("heldout", "dpo")
    ]
    assert recipe.lineage(recipe.stages["prompts"]) == []


def test_a_trained_model_has_the_settings_of_its_start_model(folder: Path) -> None:
    recipe = read(folder, "models.base.temperature=0.3", "models.base.context=64")
    trained = recipe.models["dpo"]
    settings = trained.settings.model_dump()
    assert (settings["temperature"], settings["context"]) == (0.3, 64)
    assert (trained.main.stage, trained.main.origin) == ("dpo", str(folder / "tiny"))
    student = recipe.models["student"]
    assert student.settings.model_dump()["temperature"] == 0.9
    assert (student.main.stage, student.main.origin) == ("sft", str(folder / "tiny"))


def test_a_model_is_started_from_its_folder_beside_the_recipe(folder: Path) -> None:
    (folder / "shown.jsonl").write_text(
        '{"instruction": "Name pets.", "constraint": {"kind": "bullets", "n": 2}, "answer": "* a"}'
    )
    recipe = read(folder, "models.base.demonstrations=shown.jsonl", "models.judge.relevance=tiny")
    model = recipe.models["base"].to_model({})
    assert Path(model.weights) == folder / "tiny"
    assert model.demonstrations[0]["prompt"].startswith("Name pets. Answer with exactly 2 bullet")
    assert model.settings.model_dump()["demonstrations"] == str(folder / "shown.jsonl")
    # The path of the judge's encoder is absolute, because actors have another working folder.
    assert recipe.models["judge"].to_model({}).settings.model_dump()["relevance"] == str(
        folder / "tiny"
    )


def test_parameters_are_counted_from_the_headers(folder: Path) -> None:
    safetensors(folder / "tiny" / "more.safetensors", c=[2, 3, 4], scale=[])
    assert count_parameters(folder / "tiny") == 12 + 5 + 24 + 1


@pytest.mark.parametrize("content", [b"", b"abc", b"\xff" * 20, (9).to_bytes(8, "little") + b'{"a'])
def test_a_broken_weights_file_is_one_line(content: bytes, folder: Path) -> None:
    (folder / "tiny" / "model.safetensors").write_bytes(content)
    with pytest.raises(Permanent, match="model.safetensors: not a safetensors file"):
        count_parameters(folder / "tiny")


def check(folder: Path, *overrides: str) -> None:
    steps = list(plan(folder, *overrides).values())
    preflight(read(folder, *overrides), Store(folder / "runs"), steps)


@dataclass
class Machine:
    """The resources of this machine as preflight measures them."""

    cpus: int = 2
    memory: float = 10e9
    disk: float = 10e9


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine()
    monkeypatch.setattr(os, "cpu_count", lambda: machine.cpus)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=machine.memory))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=machine.disk))
    return machine


ENGINE = 2**30 + 1.5e9 + 2 * 17 + 1.5e9
"""Bytes of memory: 1 GiB of KV cache, 1.5 GB of libraries, 17 parameters in bf16, 1.5 GB of Ray."""
DISK = 3 * 100e6 + 2 * 4 * 17 + 2 * 16 * 17
"""Bytes of disk while dpo runs: text and logs of the run and of both trained models, both in fp32,
and two checkpoints of one."""


@pytest.mark.parametrize(
    ("what", "enough", "line"),
    [
        ("cpus", 2, "stage 'sft' needs 2 CPUs, this machine has 1;"),
        ("memory", ENGINE, "stage 'dialogues' needs about 4.1 GB of memory"),
        ("disk", DISK, "dpo needs about 0.3 GB of disk"),
    ],
)
def test_just_enough_of_everything_is_no_error(
    what: str, enough: float, line: str, folder: Path, machine: Machine
) -> None:
    setattr(machine, what, enough)
    check(folder, "sft.cpus_per_worker=2")
    setattr(machine, what, enough - 1)
    with pytest.raises(Permanent, match=line):
        check(folder, "sft.cpus_per_worker=2")


def test_the_checkpoints_of_an_interrupted_training_are_room_for_it(
    folder: Path, machine: Machine
) -> None:
    machine.disk = DISK - 1
    [sft] = (step for step in plan(folder).values() if step.name == "sft")
    scratch = folder / "runs" / "store" / f"sft-{sft.key}" / "scratch" / "checkpoints"
    scratch.mkdir(parents=True)
    with pytest.raises(Permanent, match="dpo needs about 0.3 GB of disk"):
        check(folder)
    (scratch / "state.pt").write_bytes(b"1")
    check(folder)


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ("sft.workers=1000", "stage 'sft' needs 1000 CPUs, this machine has"),
        ("sft.cpus_per_worker=1000", "lower its workers or cpus_per_worker, or add CPUs"),
        (
            "sft.gpus_per_worker=1",
            "stage 'sft' needs 1 GPUs, this machine has 0; lower its workers or add GPUs",
        ),
        (
            "models.base.gpus=0.5",
            "needs 0.5 GPUs, this machine has 0; lower the gpus of its models",
        ),
    ],
)
def test_more_processors_than_the_machine_has(
    setting: str, line: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(Permanent, match=line):
        check(folder, setting, "sft.global_batch=1000")
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    check(folder, setting, "sft.global_batch=1000")  # the cluster may have enough


def test_missing_gpus_are_reported_before_missing_cpus(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(Permanent, match="stage 'sft' needs 1000 GPUs, this machine has 0"):
        check(folder, "sft.workers=1000", "sft.gpus_per_worker=1", "sft.global_batch=1000")


@pytest.mark.usefixtures("machine")
def test_a_template_that_cannot_be_masked_is_found_before_the_work(folder: Path) -> None:
    template = "{% for m in messages %}<|turn|>{{ m['role'] + m['content'] }}<|end|>{% endfor %}"
    tokenizer = byte_level(["<|turn|>", "<|end|>"])
    saved = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template)
    saved.save_pretrained(folder / "tiny")
    with pytest.raises(Permanent, match="^stage 'sft': .*: the loss mask would be wrong: "):
        check(folder)


def test_too_little_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Memory = namedtuple("Memory", "available")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory(int(2e9)))
    with pytest.raises(Permanent, match="about 4.1 GB of memory, 2.0 GB .*lower the actors"):
        check(folder)  # 1 GiB of KV cache, 1.5 GB of libraries, 1.5 GB of Ray
    make_all(folder)
    check(folder)  # cached stages need no memory
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    check(folder, "dialogues.turns=3")  # the cluster has its own memory


def test_a_cluster_that_does_not_answer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        check(folder)
    with pytest.raises(Temporary, match=f"cannot join Ray at {address}: .*check RAY_ADDRESS"):
        check(folder)


def test_memory_of_training_grows_with_model_and_workers(folder: Path, machine: Machine) -> None:
    machine.memory, machine.disk = 21.6e9, 1e12
    safetensors(folder / "tiny" / "model.safetensors", a=[1_000_000_000])
    make_all(folder)
    # A billion parameters in fp32: weights, gradients and two moments 16 GB, libraries 1.5 GB.
    check(folder, "sft.epochs=2", "sft.zero=0", "dpo.zero=0")
    with pytest.raises(
        Permanent, match="'sft' needs about 29.3 GB .*lower micro_batch, workers or max_length"
    ):
        # GB per worker: weights 4, half of the gradients 2, half of the optimizer's master weights
        # and moments 6, two buckets of 5e7 elements 0.4, libraries 1.5; Ray 1.5 once.
        check(folder, "sft.epochs=2", "sft.zero=2", "sft.workers=2", "dpo.zero=0")


def test_the_largest_micro_batch_is_named(folder: Path, machine: Machine) -> None:
    """1.5 GB for the worker, 1.5 GB for Ray; about 2 GB of weights and state, and activations."""
    machine.memory, machine.disk = 8e9, 1e12
    size = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12}
    heads = {"num_attention_heads": 12, "num_key_value_heads": 12, "vocab_size": 32000}
    write_model(folder / "tiny", **size, **heads)
    make_all(folder)
    changed = ["sft.epochs=2", "sft.zero=0", "dpo.zero=0"]
    with pytest.raises(Permanent) as raised:
        check(folder, *changed)
    words = str(raised.value).split("lower micro_batch to ")[1].split()
    assert words[1:4] == ["or", "max_length,", "set"]
    # dpo is checked after sft, so its message shows that sft fits.
    with pytest.raises(Permanent, match="'dpo' needs"):
        check(folder, *changed, f"sft.micro_batch={words[0]}")
    with pytest.raises(Permanent, match="'sft' needs"):
        check(folder, *changed, f"sft.micro_batch={int(words[0]) + 256}")


def test_too_little_disk(folder: Path, machine: Machine) -> None:
    machine.disk = 50_000_000
    with pytest.raises(Permanent, match=r"GB of disk below .*runs, 0.1 GB are free.*--set storage"):
        check(folder)


@pytest.mark.usefixtures("machine")
def test_a_missing_key_is_named_before_anything_runs(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with endpoint(lambda number, body: GOOD) as server:
        model = (
            f"models.base={{engine: openai, model: m, base_url: '{server.url}', "
            "api_key_env: ZEPHYR_TEST_KEY}"
        )
        overrides = ["sft.model=student2", "models.student2={weights: tiny}", model]
        monkeypatch.delenv("ZEPHYR_TEST_KEY", raising=False)
        with pytest.raises(Permanent, match="variable ZEPHYR_TEST_KEY .* is not set"):
            check(folder, *overrides)
        monkeypatch.setenv("ZEPHYR_TEST_KEY", "secret")
        check(folder, *overrides)
        identities = json.dumps([step.identity for step in plan(folder, *overrides).values()])
        assert "secret" not in identities and "ZEPHYR_TEST_KEY" not in identities


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"answer": "a", "constraint": {"kind": "json"}}', 'line 2: needs an "instruction"'),
        ('{"instruction": "i", "constraint": {"kind": "json"}}', 'line 2: needs an "answer"'),
        ('{"instruction": "i", "answer": "a"}', "line 2: constraint {} has no kind"),
        ("nothing", "line 2: not JSON"),
    ],
)
def test_an_error_in_demonstrations_names_the_line(line: str, says: str, folder: Path) -> None:
    (folder / "shown.jsonl").write_text(f"\n{line}\n")
    with pytest.raises(Permanent, match=says):
        check(folder, "models.base.demonstrations=shown.jsonl")


@pytest.mark.usefixtures("machine")
def test_a_misspelled_adapter_target_lists_the_modules_of_the_model(folder: Path) -> None:
    shapes = {"layers.0.attn.q_proj.weight": [2, 2], "layers.0.mlp.up_proj.weight": [2, 2]}
    safetensors(folder / "tiny" / "model.safetensors", **shapes)
    check(folder, "sft.lora={targets: [q_proj, mlp.up_proj]}")
    with pytest.raises(Permanent, match="no module 'qproj'; choose from q_proj, up_proj"):
        check(folder, "sft.lora={targets: [q_proj, qproj]}")
    with pytest.raises(Permanent, match="'lora.targets': List should have at least 1 item"):
        check(folder, "sft.lora={targets: []}")


@pytest.mark.parametrize(
    ("baseline", "answers", "says"),
    [
        ("[base]", "[base, student]", "stage 'winrate': 'b' has answers of base, student; it need"),
        ("[base]", "[base]", "stage 'winrate': 'b' and 'a' both have answers of 'base'"),
    ],
)
def test_a_comparison_needs_one_model_per_side(
    baseline: str, answers: str, says: str, folder: Path
) -> None:
    stages = {
        "a": f"{{kind: completions, models: {baseline}, prompts: heldout}}",
        "b": f"{{kind: completions, models: {answers}, prompts: heldout}}",
        "winrate": "{kind: pairwise, judge: judge, baseline: a, answers: [b]}",
    }
    overrides = [f"stages.{name}={text}" for name, text in stages.items()]
    with pytest.raises(Permanent, match=says):
        check_files(read(folder, *overrides))
    overrides[1] = "stages.b={kind: completions, models: [student], prompts: heldout}"
    check_files(read(folder, *overrides))


def test_links_to_stale_artifacts_are_removed(folder: Path) -> None:
    store, recipe = Store(folder / "runs"), read(folder)
    make_all(folder)
    for step in plan(folder).values():
        link(recipe, store, step)
    view = folder / "runs" / recipe.name
    (view / "data" / "mine").mkdir()
    changed = plan(folder, "pairs.rejected=lowest").values()
    unlink_stale(view, {s.link: s.artifact.folder for s in changed if s.artifact})
    remaining = {str(path.relative_to(view)) for path in view.glob("*/*")}
    texts = {"prompts", "heldout", "dialogues", "completions", "feedback", "mine"}
    assert remaining == {f"data/{name}" for name in texts} | {"models/sft"}


def test_a_link_with_the_former_name_of_a_stage_is_removed(folder: Path) -> None:
    """The artifact is still current, under its new name."""
    make_all(folder)
    text = (folder / "recipe.yaml").read_text()
    (folder / "recipe.yaml").write_text(text.replace("  heldout:", "  evaluation:"))
    steps, view = plan(folder), folder / "runs" / "small"
    assert steps["evaluation"].artifact
    unlink_stale(view, {s.link: s.artifact.folder for s in steps.values() if s.artifact})
    assert not (view / "data" / "heldout").is_symlink() and (view / "data" / "prompts").is_symlink()


def test_a_run_keeps_the_order_of_its_recipe_even_if_stages_are_made_again(folder: Path) -> None:
    (folder / "seeds.jsonl").write_text('{"instruction": "Hi?"}\n{"instruction": "Why?"}\n')
    make_all(folder, created="2026-11-26")
    make_all(folder, "heldout.count=2", created="2026-11-27")
    view = folder / "runs" / "small"
    assert list(artifacts_of(view))[-1] == "heldout"
    run(read(folder, "heldout.count=2"), Store(folder / "runs"))
    assert list(artifacts_of(view)) == STAGES


def test_a_run_names_the_stages_that_its_sweep_copied(folder: Path) -> None:
    sweep = "sweep={dpo.beta: [0.1, 0.5]}"
    make_all(folder, sweep)
    run(read(folder, sweep), Store(folder / "runs"))
    stages = read_stages(folder / "runs" / "small")
    assert list(stages.items())[-2:] == [("dpo-beta-0.1", "dpo"), ("dpo-beta-0.5", "dpo")]
    assert stages["sft"] == "sft"


def test_files_of_cached_stages_are_checked_too(folder: Path) -> None:
    recipe = read(folder)
    check_files(recipe)
    (folder / "seeds.jsonl").write_text("{}\n")
    with pytest.raises(Permanent, match="stage 'prompts': .*line 1: needs"):
        check_files(recipe)
