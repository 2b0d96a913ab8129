"""Tests which models are refused before a run loads them, and the lengths that they allow."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from fake_endpoint import GOOD, endpoint

from zephyr_ray.errors import Permanent
from zephyr_ray.models.checks import check_answers, check_trains
from zephyr_ray.models.shapes import context_of
from zephyr_ray.pipeline import main

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        ({}, 0),
        ({"max_position_embeddings": 512}, 512),
        ({"n_positions": 1024}, 1024),
        ({"text_config": {"max_position_embeddings": 100}}, 100),
        ({"max_position_embeddings": 32768, "sliding_window": 4096}, 32768),
        ({"max_position_embeddings": 32768, "rope_scaling": YARN}, 131072),
        # The config of DeepSeek-V3 states the extended length.
        ({"max_position_embeddings": 163840, "rope_scaling": YARN}, 163840),
        ({"max_position_embeddings": 8, "rope_scaling": {"type": "linear", "factor": 2.5}}, 20),
        ({"max_position_embeddings": 9, "rope_scaling": {"type": "llama3", "factor": 8.0}}, 9),
        ({"max_position_embeddings": 9, "rope_parameters": {"rope_type": "default"}}, 9),
        ({"max_position_embeddings": 9, "rope_parameters": {"full": {"rope_type": "dynamic",
          "factor": 2}}}, 18),
        ({"model_type": "gemma3_text", "max_position_embeddings": 9,
          "rope_scaling": {"rope_type": "linear", "factor": 8}}, 9),
    ],
)  # fmt: skip
def test_the_context_that_a_config_states(config: dict[str, Any], tokens: int) -> None:
    assert context_of(config) == tokens


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """Returns a copy of the tiny model that a test may damage: context 512, vocabulary 1000."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def change(path: Path, **entries: Any) -> None:
    """Changes entries of a JSON file; None removes one."""
    content = json.loads(path.read_text()) | entries
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def test_a_usable_model_passes(model: Path) -> None:
    check_trains(model, max_length=512)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"architectures": None}, r'no architecture; add "architectures": \["LlamaForCausalLM"\]'),
        ({"architectures": ["BertForMaskedLM"]}, "a BertForMaskedLM is not a decoder-only"),
        ({"architectures": ["BertModel"]}, "not a decoder-only"),
        ({"architectures": ["T5ForConditionalGeneration"]}, "not a decoder-only"),
        ({"architectures": ["BartForConditionalGeneration"]}, "not a decoder-only"),
        ({"vocab_size": 999}, "ids up to 999, its embeddings only 999 rows"),
    ],
)
def test_a_model_that_cannot_answer_is_a_one_line_error(
    config: dict[str, Any], says: str, model: Path
) -> None:
    change(model / "config.json", **config)
    with pytest.raises(Permanent, match=says):
        check_answers(model)


def test_an_added_token_without_an_embedding_is_a_one_line_error(model: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(model)
    with pytest.raises(Permanent, match="ids up to 1000, its embeddings only 1000 rows"):
        check_answers(model)


def test_the_embedding_rows_in_the_weights_are_checked_too(model: Path) -> None:
    change(model / "config.json", vocab_size=2000)
    check_answers(model)
    import torch
    from safetensors.torch import save_file

    weights = {"model.embed_tokens.weight": torch.zeros(900, 4)}
    save_file(weights, model / "model.safetensors")
    with pytest.raises(Permanent, match="its embeddings only 900 rows"):
        check_answers(model)


def test_a_tokenizer_that_cannot_be_loaded_is_a_one_line_error(model: Path) -> None:
    (model / "tokenizer.json").write_text("{}")
    with pytest.raises(Permanent, match="model: cannot load the tokenizer .*; copy it again"):
        check_answers(model)


@pytest.mark.parametrize(
    ("config", "max_length", "says"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, 512, r"quantized weights \(gptq\)"),
        (
            {"architectures": ["Mistral3ForConditionalGeneration"]},
            512,
            "cannot train a Mistral3For",
        ),
        ({}, 14, r"max_length 14 is below the \d+ tokens of the shortest conversation"),
    ],
)
def test_a_model_that_cannot_be_trained_is_a_one_line_error(
    config: dict[str, Any], max_length: int, says: str, model: Path
) -> None:
    change(model / "config.json", **config)
    check_answers(model)
    with pytest.raises(Permanent, match=says):
        check_trains(model, max_length)


RECIPE = """\
models:
  base: {weights: model}
  judge: {weights: model}
  far: {engine: openai, model: m, base_url: "{url}"}
stages:
  prompts: {kind: prompts, seeds: seeds.jsonl}
  dialogues: {kind: self_refine, model: base, prompts: prompts, max_tokens: 100}
  clean: {kind: clean, dialogues: dialogues, judge: judge}
  others: {kind: self_refine, model: far, prompts: prompts, max_tokens: 4000}
  sft: {kind: sft, model: base, data: dialogues, max_length: 512, global_batch: 4}
  pairs: {kind: published, makes: pairs, files: pairs.jsonl}
  dpo: {kind: dpo, model: sft, data: pairs, max_length: 512}
"""


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("sft.max_length=513", "'sft': max_length 513 is above the 512 tokens of the model's"),
        ("dpo.max_length=513", "'dpo': max_length 513 is above the 512 tokens of the model's"),
        ("models.base.context=513", "'base': context 513 is above the 512 tokens of the model"),
        ("dialogues.max_tokens=512", "answers of up to 512 tokens .* 'base', 512 tokens; lower"),
        ("models.judge.context=256", "answers of up to 256 tokens .* 'judge', 256 tokens; lower"),
        ("models.far.context=4000", "answers of up to 4000 tokens .* 'far', 4000 tokens; lower"),
    ],
)
@pytest.mark.parametrize("plan", [[], ["--plan"]], ids=["run", "plan"])
def test_a_length_above_the_context_is_a_one_line_error_before_any_stage(
    plan: list[str],
    override: str,
    says: str,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "seeds.jsonl").write_text('{"instruction": "Name a blue thing."}\n')
    (tmp_path / "pairs.jsonl").write_text(
        json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n"
    )
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    sets = ["--set", f"storage={tmp_path / 'runs'}", "--set", override]
    with endpoint(lambda number, body: GOOD) as far:
        (tmp_path / "recipe.yaml").write_text(RECIPE.replace("{url}", far.url))
        assert main([str(tmp_path / "recipe.yaml"), *sets, *plan]) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1
    assert re.search(says, line), line
    assert not list(tmp_path.glob("runs/store/*-*"))
