"""Compares rows that hold each pair's prompt once with TRL's padded batches."""

from pathlib import Path
from typing import Any

import pytest

from zephyr_ray.train.dpo import Dpo
from zephyr_ray.train.job import Job
from zephyr_ray.train.model import use_segments

SIZE = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.1,
}
LORA = {"r": 4, "dropout": 0.0}


def pair(prompt: int, chosen: int, rejected: int) -> dict[str, Any]:
    """Returns a pair with these numbers of tokens."""
    tokens = iter(range(3, 100))
    take = lambda count: [next(tokens) for _ in range(count)]  # noqa: E731
    return {
        "prompt_ids": take(prompt),
        "chosen_ids": take(chosen),
        "rejected_ids": take(rejected),
        "ref_chosen_logps": -4.5 * chosen,
        "ref_rejected_logps": -4.4 * rejected,
    }


# Some prompts and answers have one token.
PAIRS = [pair(7, 5, 9), pair(5, 1, 4), pair(1, 3, 2), pair(4, 6, 1), pair(1, 1, 1)]


@pytest.fixture(params=["Llama", "Mistral", "Qwen2", "Mistral with a window"])
def start(request: pytest.FixtureRequest) -> Any:
    """Returns a function that makes the initial model, with transformers' or our attention."""
    import torch
    import transformers

    from zephyr_ray.train.attention import uses_segments

    family, *window = request.param.split(maxsplit=1)

    def make(ours: bool) -> Any:
        torch.manual_seed(0)
        settings = SIZE | ({"sliding_window": 4} if window else {})
        config = getattr(transformers, f"{family}Config")(**settings)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
        if ours:
            use_segments(model)
            assert uses_segments(model)
        return model

    return make


@pytest.fixture
def step(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Returns a function that computes loss, metrics and gradients of one pass over PAIRS."""
    import torch
    import trl.trainer.utils
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer
    from trl.trainer.sft_config import SFTConfig

    from zephyr_ray.train.trainer import Trainer
    from zephyr_ray.train.worker import adapter_config

    class Theirs(DPOTrainer):
        """Takes rows that are tokenized and have reference log-probabilities."""

        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

        _precompute_ref_logps = _prepare_dataset

    monkeypatch.setattr(trl.trainer.utils, "_use_triton", lambda device: True)
    data, tokenizer = Dataset.from_list(PAIRS), AutoTokenizer.from_pretrained(tiny_model)
    common = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False}

    def run(start: Any, ours: bool, stage: Dpo) -> tuple[float, dict[str, float], dict[str, Any]]:
        adapters = adapter_config(stage.lora)
        if ours:
            skip = {"dataset_kwargs": {"skip_prepare_dataset": True}, "max_length": None}
            arguments = SFTConfig(str(tmp_path), remove_unused_columns=False, **skip, **common)
            trainer = Trainer(
                stage.objective(),
                ["trl"],
                tokenizer,
                data=PAIRS,
                steps=[],
                global_batch=len(PAIRS),
                model=start(True),
                args=arguments,
                peft_config=adapters,
            )
        else:
            arguments = DPOConfig(
                str(tmp_path), beta=stage.beta, precompute_ref_log_probs=True, **common
            )
            trainer = Theirs(
                start(False),
                args=arguments,
                processing_class=tokenizer,
                train_dataset=data,
                peft_config=adapters,
            )
        model = trainer.model
        torch.manual_seed(1)
        for name, weights in model.named_parameters():
            if "lora_B" in name:  # zero at first, which would hide the gradient of A
                torch.nn.init.normal_(weights, std=0.1)
        if stage.gradient_checkpointing and ours:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        trainer.current_gradient_accumulation_steps = 1
        batch = trainer.data_collator(PAIRS) | ({"weight": 1.0} if ours else {})
        loss = trainer.compute_loss(model, batch, num_items_in_batch=len(PAIRS) if ours else None)
        loss.backward()
        gradients = {name: w.grad for name, w in model.named_parameters() if w.grad is not None}
        metrics: dict[str, float] = {}
        trainer.log(metrics)
        return loss.item(), metrics, gradients

    return run


@pytest.mark.parametrize(
    "settings",
    [{}, {"gradient_checkpointing": True}, {"lora": LORA, "gradient_checkpointing": True}],
    ids=["full", "checkpointing", "lora"],
)
def test_loss_gradients_and_metrics_are_those_of_trl(
    settings: dict[str, Any], start: Any, step: Any
) -> None:
    stage = Dpo(model="base", data="data", beta=0.3, **settings)
    loss, metrics, gradients = step(start, True, stage)
    expected_loss, expected_metrics, expected_gradients = step(start, False, stage)
    assert loss == pytest.approx(expected_loss, abs=1e-5)
    assert metrics == pytest.approx(expected_metrics, abs=1e-5)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        assert (gradient - expected_gradients[name]).abs().max() < 1e-5, name


def test_a_row_holds_the_prompt_once_and_its_last_token_before_each_answer() -> None:
    from zephyr_ray.train.pairs import shared_prompts

    first = {"prompt_ids": [5, 6, 7], "chosen_ids": [8, 9], "rejected_ids": [10]}
    second = {"prompt_ids": [3], "chosen_ids": [4], "rejected_ids": [8, 2]}
    batch = shared_prompts([first, second])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 7, 3, 3, 8]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 2, 0, 0, 1]]
    assert batch["shift_labels"].tolist() == [[-100, -100, 8, 9, 10, 4, 8, 2]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 4, 5, 6, 8]
    assert batch["cu_seq_lens_k"].tolist() == [0, 4, 7, 8, 10]
    assert batch["key_rows"].tolist() == [0, 1, 2, 3, 0, 1, 4, 5, 6, 7]
    assert batch["answers"].tolist() == [[[1, 1], [1, 0]], [[1, 0], [1, 1]]]
    assert batch["answer_at"].tolist() == [[[2, 3], [4, 0]], [[5, 0], [6, 7]]]
    assert batch["answers"].tolist() == [[[1, 1], [1, 0]], [[1, 0], [1, 1]]]


def test_a_row_has_no_padding() -> None:
    from zephyr_ray.train.pairs import shared_prompts

    # Tokens per pair: prompt + chosen + rejected - 1.
    assert shared_prompts(PAIRS)["input_ids"].shape == (1, 20 + 9 + 5 + 10 + 2)


def test_reference_log_probabilities_are_those_of_plain_transformers(
    tmp_path: Path, tiny_model: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from zephyr_ray.train.reference import _log_probs

    stage = Dpo(model="base", data="data", zero=2, precision="fp32")
    job = Job(settings=stage, weights=str(tiny_model), folder=tmp_path, order=[])
    batches = [[1, 3], [0, 2, 4]]
    rows = list(_log_probs(job, PAIRS, batches))
    assert [row for row, *_ in rows] == [1, 3, 0, 2, 4]
    model = AutoModelForCausalLM.from_pretrained(tiny_model)

    def by_hand(prompt: list[int], answer: list[int]) -> float:
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        return logits.log_softmax(-1)[range(len(answer)), answer].sum().item()

    for row, chosen, rejected in rows:
        prompt = PAIRS[row]["prompt_ids"]
        expected = [by_hand(prompt, PAIRS[row][f"{side}_ids"]) for side in ("chosen", "rejected")]
        assert [chosen, rejected] == pytest.approx(expected, rel=1e-6, abs=1e-5)


@pytest.mark.parametrize(
    ("family", "line"),
    [
        ("Bloom", "prompts are computed twice per pair: bloom does not attend per segment"),
        ("Mixtral", "prompts are computed twice per pair: mixtral balances its experts over"),
    ],
)
def test_a_model_that_cannot_share_prompts_gets_padded_pairs(
    family: str, line: str, caplog: pytest.LogCaptureFixture
) -> None:
    import torch
    import transformers

    config = getattr(transformers, f"{family}Config")(**SIZE)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    use_segments(model)
    with caplog.at_level("INFO", logger="zephyr_ray"):
        batch = Dpo(model="base", data="data").objective().collator(0, model)(PAIRS)
    assert batch["input_ids"].shape[0] == 2 * len(PAIRS)
    assert line in caplog.text
