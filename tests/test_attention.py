"""Attention per segment of a row, against attention computed by hand and plain transformers. No
Ray, no engine."""

from typing import Any

import pytest

SIZE = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
# Queries and keys per segment, and the positions in the row that each query sees.
ROWS = {
    "dialogues": ([2, 3], [2, 3], None, [[0], [0, 1], [2], [2, 3], [2, 3, 4]]),
    "single tokens": ([1, 1], [1, 1], None, [[0], [1]]),
    # Prompt at 0 and 1; chosen branch at 2 and 3; rejected branch at 4 to 6.
    "pair": (
        [4, 3],
        [4, 5],
        [0, 1, 2, 3, 0, 1, 4, 5, 6],
        [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 4], [0, 1, 4, 5], [0, 1, 4, 5, 6]],
    ),
}


def segments(queries: list[int], keys: list[int], key_rows: list[int] | None) -> Any:
    import torch

    from zephyr_ray.train.attention import Segments

    ends = [torch.tensor([0, *sizes]).cumsum(0).int() for sizes in (queries, keys)]
    rows = None if key_rows is None else torch.tensor(key_rows)
    return Segments(*ends, most_queries=max(queries), most_keys=max(keys), key_rows=rows)


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("row", ROWS)
def test_a_query_attends_to_its_segment_up_to_itself(row: str, window: int | None) -> None:
    import torch

    from zephyr_ray.train.attention import attend

    *sizes, visible = ROWS[row]
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, len(visible), 8) for heads in (4, 2, 2))
    output = attend(query, key, value, segments(*sizes), scale=0.5, window=window)
    assert output.shape == query.shape
    for at, seen in enumerate(visible):
        seen = seen[-window:] if window else seen
        for head in range(4):
            weights = (0.5 * key[0, head // 2, seen] @ query[0, head, at]).softmax(0)
            expected = weights @ value[0, head // 2, seen]
            assert (output[0, head, at] - expected).abs().max() < 1e-6


def packed(lengths: list[int]) -> dict[str, Any]:
    """Packed sequences of one dialogue each, as the model's arguments."""
    from zephyr_ray.train.sft import Sft

    objective = Sft(model="base", data="data").objective()
    ids = [[5 + n % 90 for n in range(length)] for length in lengths]
    rows = [{"input_ids": row, "labels": row, "seq_lengths": [len(row)]} for row in ids]
    return objective.inputs(objective.collator(pad_token_id=0, model=None)(rows))


def test_two_packed_sequences_cost_twice_one() -> None:
    """The cost is the number of query and key pairs that attention computes."""
    import torch
    from torch.overrides import TorchFunctionMode
    from transformers import LlamaConfig, LlamaForCausalLM

    from zephyr_ray.train.attention import use_segments

    class Cost(TorchFunctionMode):
        total = 0

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            if func is torch.nn.functional.scaled_dot_product_attention:
                query, key = args[:2]
                assert kwargs.get("attn_mask") is None
                self.total += query.shape[-2] * key.shape[-2]
            return func(*args, **(kwargs or {}))

    model = LlamaForCausalLM(LlamaConfig(**SIZE))
    use_segments(model)

    def cost(lengths: list[int]) -> int:
        with Cost() as counted, torch.no_grad():
            model(**packed(lengths), use_cache=False)
        return counted.total

    assert cost([40, 40]) == 2 * cost([40]) == 2 * 2 * 40**2


SEGMENTED = ["Llama", "Mistral", "Qwen2", "Qwen3", "Phi3", "GPTNeoX", "Gemma3Text", "Mixtral"]
OTHERS = ["Bloom", "Falcon", "Mamba", "Jamba", "Lfm2", "GptOss"]


@pytest.mark.parametrize("family", SEGMENTED + OTHERS)
def test_models_attend_per_segment_if_only_attention_connects_tokens(family: str) -> None:
    import torch
    import transformers

    from zephyr_ray.train.attention import use_segments, uses_segments

    layers = {"layer_types": ["conv", "full_attention"]} if family == "Lfm2" else {}
    config = getattr(transformers, f"{family}Config")(**SIZE, **layers, pad_token_id=0)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    use_segments(model)
    assert uses_segments(model) == (family in SEGMENTED)
