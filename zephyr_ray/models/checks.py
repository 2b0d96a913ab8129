"""Checks the files of a language model before a run loads it: architecture, tokenizer, sizes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from zephyr_ray.chat import ChatFormat, OwnFormat
from zephyr_ray.errors import Permanent
from zephyr_ray.messages import assistant, user
from zephyr_ray.models.headers import tensor_shapes

EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
"""Suffixes of the names of input embeddings in safetensors files."""
SHORTEST = [user("a"), assistant("b")]
"""A conversation that must fit into max_length."""

F = TypeVar("F")


def check_answers(folder: Path) -> None:
    """Raises Permanent if the model in this folder cannot answer conversations."""
    config = read_config(folder)
    from transformers.models.auto import modeling_auto as auto

    causal = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    architectures = config.get("architectures")
    if not architectures:
        example = causal.get(config.get("model_type"), "LlamaForCausalLM")
        raise Permanent(
            f"weights folder {folder}: config.json names no architecture; add "
            f'"architectures": ["{example}"] if that is its class'
        )
    _check_generative(
        folder,
        architectures,
        {*causal.values(), *auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()},
    )
    chat = load_chat_format(folder, ChatFormat.to_ask)
    highest, rows = max(chat.tokenizer.get_vocab().values()), _embedding_rows(folder, config)
    if rows is not None and highest >= rows:
        raise Permanent(
            f"weights folder {folder}: its tokenizer has ids up to {highest}, its embeddings only "
            f"{rows} rows; use the model's own tokenizer, or resize its embeddings"
        )


def check_trains(folder: Path, max_length: int) -> None:
    """Raises Permanent if the model in this folder cannot be trained on sequences of `max_length`
    tokens, or cannot answer conversations."""
    check_answers(folder)
    config = read_config(folder)
    _check_causal(folder, config, "train")
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method", "a quantization_config in config.json")
        raise Permanent(
            f"weights folder {folder}: quantized weights ({method}) cannot be trained; name the "
            "model that they were quantized from"
        )
    chat = load_chat_format(folder)
    chat.prepare()  # raises Permanent if the tokenizer has no padding token
    if (shortest := len(chat.render(SHORTEST)[0])) > max_length:
        raise Permanent(
            f"max_length {max_length} is below the {shortest} tokens of the shortest conversation "
            "in the model's chat format; raise max_length"
        )


def check_reads(folder: Path) -> None:
    """Raises Permanent if the model in this folder cannot compute the likelihood of an answer."""
    check_answers(folder)
    _check_causal(folder, read_config(folder), "run")
    load_chat_format(folder)


def check_rewards(folder: Path) -> None:
    """Raises Permanent if the model in this folder is not a reward model for conversations."""
    config = read_config(folder)
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as CLASSIFIERS,
    )

    architectures = config.get("architectures") or ["model of no stated architecture"]
    if not {*architectures} & {*CLASSIFIERS.values()}:
        raise Permanent(
            f"weights folder {folder}: a {architectures[0]} is not a sequence classifier; name a "
            "reward model, such as a …ForSequenceClassification with one label"
        )
    # transformers omits the labels of a model with two, its default, from config.json.
    labels = len(config.get("id2label") or ("LABEL_0", "LABEL_1"))
    if labels != 1:
        raise Permanent(
            f"weights folder {folder}: the classifier has {labels} labels, a reward model has one; "
            "name a reward model"
        )
    load_own_format(folder)


def load_chat_format(
    folder: Path, select: Callable[[Any], ChatFormat] = ChatFormat.of
) -> ChatFormat:
    """Returns the chat format of a model; `select` is `ChatFormat.of` or `ChatFormat.to_ask`.

    Raises Permanent if the tokenizer cannot be loaded or has no usable format."""
    return _load_format(folder, select)


def load_own_format(folder: Path) -> OwnFormat:
    """Returns the tokenizer's own format, for a model that reads conversations. Raises Permanent if
    the tokenizer cannot be loaded or has none."""
    return _load_format(folder, OwnFormat)


def _load_format(folder: Path, select: Callable[[Any], F]) -> F:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # each tokenizer class raises its own exceptions
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise Permanent(
            f"weights folder {folder}: cannot load the tokenizer ({reason}); copy it again"
        ) from None
    try:
        return select(tokenizer)
    except Permanent as error:
        raise Permanent(f"weights folder {folder}: {error}") from None


def read_config(folder: Path) -> dict[str, Any]:
    """Returns the config.json of a folder that `weights.resolve` returned."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config


def _check_causal(folder: Path, config: dict[str, Any], use: str) -> None:
    """Raises Permanent if transformers does not know the model as a causal language model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if not {*config["architectures"]} & {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()}:
        raise Permanent(
            f"weights folder {folder}: transformers cannot {use} a {config['architectures'][0]} as "
            "a causal language model; name another model"
        )


def _check_generative(folder: Path, architectures: list[str], generative: set[str]) -> None:
    """Raises Permanent if transformers knows the architecture and it is not a decoder. vLLM has
    architectures of its own, so an unknown one may be a decoder."""
    import transformers

    if not {*architectures} & generative and hasattr(transformers, architectures[0]):
        raise Permanent(
            f"weights folder {folder}: a {architectures[0]} is not a decoder-only language model; "
            "name one, such as a …ForCausalLM"
        )


def _embedding_rows(folder: Path, config: dict[str, Any]) -> int | None:
    """Returns the number of tokens with an embedding; None if neither the config nor the weights
    state it."""
    stated = (config.get("text_config") or config).get("vocab_size")
    shapes = tensor_shapes(folder).items()
    rows = [shape[0] for name, shape in shapes if name.endswith(EMBEDDINGS)]
    return min([*rows, *([stated] if stated else [])], default=None)
