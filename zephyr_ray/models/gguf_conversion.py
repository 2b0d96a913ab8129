"""Converts a GGUF file of SmolLM2, a ChatML Llama, to a Hugging Face folder."""

from pathlib import Path
from typing import Any

from zephyr_ray.chat import CHATML
from zephyr_ray.errors import Permanent


def unpack_gguf(content: Path, model: Path) -> None:
    """Writes a plain Hugging Face Llama: bf16 weights, tokenizer and chat template."""
    import gguf

    reader = gguf.GGUFReader(next(content.glob("*/*.gguf")))
    meta = {key: field.contents() for key, field in reader.fields.items()}
    if meta["general.architecture"] != "llama" or meta["tokenizer.ggml.pre"] != "smollm":
        raise Permanent(
            f"weights: cannot convert a GGUF of architecture {meta['general.architecture']} with "
            f"tokenizer {meta['tokenizer.ggml.pre']}; name a folder with *.safetensors"
        )
    _write_tokenizer(meta, model)
    _write_config(meta, model)
    _write_tensors(reader, meta, model)


def _write_tokenizer(meta: dict[str, Any], model: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    control = 3  # llama.cpp's type of special tokens
    tokens, types = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=[tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]],
        )
    )
    # llama.cpp's "smollm": single digits, then GPT-2's split and byte alphabet.
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
    # No BOS: ChatML opens with <|im_start|>. Padding differs from the end token, so that a mask
    # derived from padding never hides the end of an answer.
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
            # llama.cpp interleaves the two halves of each head's rows for its rotary embedding.
            rows, columns = values.shape
            halves = values.reshape(heads[part], rows // heads[part] // 2, 2, columns)
            values = halves.transpose(1, 2).reshape(rows, columns)
        where = f"model.layers.{block[1]}." if block else ""
        state[f"{where}{names[part]}.weight"] = values.to(torch.bfloat16).contiguous()
    save_file(state, model / "model.safetensors", metadata={"format": "pt"})
