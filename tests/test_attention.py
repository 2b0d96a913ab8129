"""Tests segmented attention against a direct computation and against plain transformers, without
Ray or an engine."""

from typing import Any

import pytest

from zephyr_ray.train.model import FAMILIES, use_segments

SIZE = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
# Queries and keys per segment, positions of the keys in the row (None: in order), and the positions
# that each query attends to.
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

    offsets = [torch.tensor([0, *sizes]).cumsum(0).int() for sizes in (queries, keys)]
    rows = None if key_rows is None else torch.tensor(key_rows)
    return Segments(*offsets, max_queries=max(queries), max_keys=max(keys), key_rows=rows)


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


def kernel(
    query: Any,
    key: Any,
    value: Any,
    query_offsets: Any,
    key_offsets: Any,
    max_queries: int,
    max_keys: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> Any:
    """Reimplements `torch.nn.attention.varlen.varlen_attn` on the CPU, from its documentation."""
    import torch

    assert max_queries == query_offsets.diff().max() and max_keys == key_offsets.diff().max()
    assert (
        enable_gqa
        and window_size[1] == 0
        and query_offsets.dtype == key_offsets.dtype == torch.int32
    )
    output = torch.empty_like(query)
    for number in range(len(query_offsets) - 1):
        first, last = query_offsets[number : number + 2].tolist()
        start, end = key_offsets[number : number + 2].tolist()
        for at in range(first, last):
            visible_end = end - (last - 1 - at)
            left = start if window_size[0] < 0 else max(start, visible_end - 1 - window_size[0])
            for head in range(query.shape[1]):
                group = head * key.shape[1] // query.shape[1]
                weights = (scale * key[left:visible_end, group] @ query[at, head]).softmax(0)
                output[at, head] = weights @ value[left:visible_end, group]
    return output


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("row", ROWS)
def test_the_kernel_for_gpus_gets_the_same_segments(
    row: str, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from zephyr_ray.train import attention

    *sizes, visible = ROWS[row]
    torch.manual_seed(0)
    states = [torch.randn(1, heads, len(visible), 8) for heads in (4, 2, 2)]
    monkeypatch.setattr(attention, "varlen_attn", kernel)
    output = attention.attend_varlen(*states, segments(*sizes), scale=0.5, window=window)
    expected = attention.attend_sdpa(*states, segments(*sizes), scale=0.5, window=window)
    assert output.shape == expected.shape and (output - expected).abs().max() < 1e-6


def pack(model: Any, lengths: list[int]) -> dict[str, Any]:
    """Returns packed sequences of these lengths, one dialogue each, as the model's arguments."""
    from zephyr_ray.train.sft import Sft

    objective = Sft(model="base", data="data").objective()
    ids = [[5 + n % 90 for n in range(length)] for length in lengths]
    rows = [{"input_ids": row, "labels": row, "seq_lengths": [len(row)]} for row in ids]
    return objective.inputs(objective.collator(0, model)(rows))


def test_two_packed_sequences_cost_twice_one() -> None:
    """The cost is the number of query-key pairs that attention computes."""
    import torch
    from torch.overrides import TorchFunctionMode
    from transformers import LlamaConfig, LlamaForCausalLM

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
        with Cost() as cost_mode, torch.no_grad():
            model(**pack(model, lengths), use_cache=False)
        return cost_mode.total

    assert cost([40, 40]) == 2 * cost([40]) == 2 * 2 * 40**2


def config(family: str) -> Any:
    """Returns a tiny configuration, with a window of four tokens if the family has windows."""
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[family]
    defaults = kind()
    settings = SIZE | {"pad_token_id": 0, "initializer_range": 0.2}
    if hasattr(defaults, "head_dim"):
        settings["head_dim"] = 16
    if hasattr(defaults, "sliding_window"):
        settings |= {"sliding_window": 4, "use_sliding_window": True}
        if hasattr(defaults, "layer_types"):
            settings["layer_types"] = ["sliding_attention", "full_attention"]
    return kind(**settings)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pair_in_one_row_gives_the_logits_of_two_sequences(family: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from zephyr_ray.train.attention import uses_segments
    from zephyr_ray.train.pairs import MODEL_INPUTS, shared_prompts

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(family), attn_implementation="sdpa").eval()
    prompt, *answers = [5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15], [16, 17, 18, 19]
    batch = shared_prompts(
        [{"prompt_ids": prompt, "chosen_ids": answers[0], "rejected_ids": answers[1]}]
    )
    with torch.no_grad():
        expected = [model(torch.tensor([prompt + answer])).logits[0, 5:-1] for answer in answers]
        use_segments(model)
        assert uses_segments(model)
        inputs = {name: batch[name] for name in MODEL_INPUTS if name != "shift_labels"}
        logits = model(**inputs, use_cache=False).logits[0, 5:]
    assert (logits - torch.cat(expected)).abs().max() < 1e-4


def test_transformers_does_not_detect_packed_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    """Detecting them from the positions would synchronize with the GPU in every forward pass."""
    import transformers.masking_utils
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**SIZE))
    use_segments(model)
    monkeypatch.delattr(transformers.masking_utils, "find_packed_sequence_indices")
    model(**pack(model, [3, 2]), use_cache=False)


def test_a_padded_batch_keeps_the_window() -> None:
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config("mistral"), attn_implementation="sdpa").eval()
    inputs = {"input_ids": torch.arange(5, 25).view(2, 10), "attention_mask": torch.ones(2, 10)}
    inputs["attention_mask"][1, 7:] = 0
    kept = inputs["attention_mask"].bool()
    with torch.no_grad():
        expected = model(**inputs).logits[kept]
        use_segments(model)
        assert (model(**inputs).logits[kept] - expected).abs().max() < 1e-5


@pytest.mark.parametrize("family", ["qwen2_moe", "doge", "lfm2", "bloom"])
def test_other_families_keep_the_attention_of_transformers(family: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from zephyr_ray.train.attention import uses_segments

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config(family))
    use_segments(model)
    assert not uses_segments(model)
