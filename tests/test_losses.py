"""Tests losses of pairs: values by hand, equality with TRL, settings. No Ray, no engine."""

from collections.abc import Iterator
from math import exp, log
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from zephyr_ray.errors import Permanent
from zephyr_ray.settings import typed
from zephyr_ray.train.dpo import Dpo
from zephyr_ray.train.loss_settings import PAIR_LOSSES

PAIRS = [
    {
        "prompt_ids": [5, 6, 7],
        "chosen_ids": [8, 9, 10, 2],
        "rejected_ids": [11, 2],
        "ref_chosen_logps": -30.0,
        "ref_rejected_logps": -16.0,
    },
    {
        "prompt_ids": [5, 6],
        "chosen_ids": [8, 2],
        "rejected_ids": [12, 13, 14],
        "ref_chosen_logps": -16.5,
        "ref_rejected_logps": -23.5,
    },
    {
        "prompt_ids": [5],
        "chosen_ids": [9, 12, 4, 7, 2],
        "rejected_ids": [2],
        "ref_chosen_logps": -39.5,
        "ref_rejected_logps": -8.0,
    },
]


def stage(**settings: Any) -> Dpo:
    return typed(Dpo, {"model": "base", "data": "data"} | settings, "here")


def sigma(x: float) -> float:
    return 1 / (1 + exp(-x))


def nls(x: float) -> float:
    """Returns the negative logarithm of the sigmoid."""
    return log(1 + exp(-x))


# Two pairs. Log-ratios: 1 and -1 (chosen), -1 and 0.5 (rejected). Margins: 2 and -1.5; times β:
# 1 and -0.75; of log-ratios per token: 1/3 + 1/2 and -1/2 - 1/2.
CHOSEN = {"log_probs": [-6.0, -4.0], "reference": [-7.0, -3.0], "tokens": [3, 2]}
REJECTED = {"log_probs": [-9.0, -2.0], "reference": [-8.0, -2.5], "tokens": [2, 1]}
BETA = 0.5
BY_HAND: list[tuple[dict[str, Any], list[float]]] = [
    ({"loss": "sigmoid"}, [nls(1), nls(-0.75)]),
    ({"loss": "sigmoid_norm"}, [nls(5 / 12), nls(-0.5)]),
    ({"loss": "hinge", "beta": 1}, [0, 2.5]),
    ({"loss": "ipo"}, [1 / 36, 4]),
    ({"loss": "robust"}, [nls(1), nls(-0.75)]),
    (
        {"loss": "robust", "label_smoothing": 0.2},
        [(0.8 * nls(1) - 0.2 * nls(-1)) / 0.6, (0.8 * nls(-0.75) - 0.2 * nls(0.75)) / 0.6],
    ),
    (
        {"loss": "exo_pair", "label_smoothing": 0.2},
        [p * log(p / 0.8) + (1 - p) * log((1 - p) / 0.2) for p in (sigma(1), sigma(-0.75))],
    ),
    (
        {"loss": "nca_pair"},
        [nls(0.5) + nls(-0.5) / 2 + nls(0.5) / 2, nls(-0.5) + nls(0.5) / 2 + nls(-0.25) / 2],
    ),
    ({"loss": "bco_pair"}, [2 * nls(0.5), nls(-0.5) + nls(-0.25)]),
    ({"loss": "sppo_hard"}, [0, 4 + 2.25]),
    ({"loss": "apo_zero"}, [2 * sigma(-0.5), sigma(0.5) + sigma(0.25)]),
    ({"loss": "apo_down"}, [sigma(0.5) + sigma(-1), sigma(-0.5) + sigma(0.75)]),
    (
        {"loss": "discopop"},
        [
            nls(1) * sigma(-20) + exp(-1) * sigma(20),
            nls(-0.75) * sigma(15) + exp(0.75) * sigma(-15),
        ],
    ),
    # Log-probabilities per token: -2 and -2 (chosen), -4.5 and -2 (rejected).
    ({"loss": "simpo", "simpo_gamma": 0.25}, [nls(1), nls(-0.25)]),
    (
        {"loss": "simpo", "simpo_gamma": 0.25, "label_smoothing": 0.2},
        [0.8 * nls(1) + 0.2 * nls(-1), 0.8 * nls(-0.25) + 0.2 * nls(0.25)],
    ),
]


def answers(values: dict[str, list[float]]) -> Any:
    import torch

    from zephyr_ray.train.losses import Answers

    return Answers(**{name: torch.tensor(value) for name, value in values.items()})


@pytest.mark.parametrize(("settings", "expected"), BY_HAND)
def test_losses_equal_values_by_hand(settings: dict[str, Any], expected: list[float]) -> None:
    from zephyr_ray.train import losses

    loss = getattr(losses, settings["loss"])
    values = loss(answers(CHOSEN), answers(REJECTED), stage(**{"beta": BETA} | settings))
    assert values.tolist() == pytest.approx(expected, abs=1e-6)


def test_every_loss_is_computed_by_hand() -> None:
    assert {settings["loss"] for settings, _ in BY_HAND} == {*PAIR_LOSSES}


@pytest.fixture(scope="module")
def tools(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Yields TRL's trainers, which each test configures, and our model, which processes the prompt
    of a pair once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
        yield trainers(tiny_model, str(tmp_path_factory.mktemp("trl")), patch)


def trainers(tiny_model: Path, folder: str, patch: pytest.MonkeyPatch) -> SimpleNamespace:
    import trl.trainer.utils
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    from zephyr_ray.train.model import load_model

    class Theirs(DPOTrainer):
        """For tokenized rows that have reference log-probabilities."""

        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

        _precompute_ref_logps = _prepare_dataset

    def plain() -> Any:
        model = load_model(str(tiny_model))
        model.set_attn_implementation("sdpa")
        return model

    args = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False}
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    texts = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    patch.setattr(trl.trainer.utils, "_use_triton", lambda device: True)
    return SimpleNamespace(
        dpo=Theirs(
            plain(),
            args=DPOConfig(folder, precompute_ref_log_probs=True, **args),
            train_dataset=Dataset.from_list(PAIRS),
            processing_class=tokenizer,
        ),
        cpo=CPOTrainer(
            plain(),
            args=CPOConfig(folder, loss_type="simpo", cpo_alpha=0, max_length=64, **args),
            train_dataset=Dataset.from_list(texts),
            processing_class=tokenizer,
        ),
        ours=load_model(str(tiny_model)),
    )


def gradients(model: Any, loss: Any) -> dict[str, Any]:
    model.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters()}


def forward(settings: Dpo, model: Any, rows: list[dict[str, Any]]) -> Any:
    """Returns our loss of each pair, and our metrics."""
    from trl.trainer.utils import add_fused_lm_head

    objective = settings.objective()
    add_fused_lm_head(model, outputs=("log_probs", *objective.fields))
    batch = objective.collator(0, model)(rows)
    output = model(**objective.inputs(batch), use_cache=False, fused_lm_head=True)
    return objective.losses(output, batch)


def compare(settings: Dpo, tools: Any, rows: list[dict[str, Any]], model: Any, loss: Any) -> Any:
    """Asserts that our loss and gradients are those of TRL's trainer; returns our metrics."""
    import torch

    losses, metrics = forward(settings, tools.ours, rows)
    assert losses.shape == (len(rows),)
    assert losses.mean().item() == pytest.approx(loss.item(), abs=1e-5)
    ours, theirs = gradients(tools.ours, losses.mean()), gradients(model, loss)
    assert max(grad.abs().max() for grad in theirs.values()) > 1e-3
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    return metrics


SMOOTHING = {"robust": 0.2, "exo_pair": 0.1}


@pytest.mark.parametrize(
    ("settings", "rows"),
    [
        *(
            ({"loss": name, "label_smoothing": SMOOTHING.get(name, 0)}, PAIRS)
            for name, loss in PAIR_LOSSES.items()
            if loss.reference
        ),
        ({"loss": {"sigmoid": 1, "ipo": 0.2, "robust": 2}, "label_smoothing": 0.1}, PAIRS),
        # On one pair, because TRL's mean is over all tokens.
        ({"loss": {"hinge": 0.5, "nll": 0.2}}, PAIRS[:1]),
    ],
)
def test_losses_and_gradients_equal_trls(settings: dict[str, Any], rows: Any, tools: Any) -> None:
    loss, trainer = settings["loss"], tools.dpo
    weights = loss if isinstance(loss, dict) else {loss: 1}
    trainer.loss_types = [{"nll": "sft"}.get(name, name) for name in weights]
    trainer.loss_weights = [*weights.values()]
    trainer.beta, trainer.label_smoothing = 0.8, settings.get("label_smoothing", 0)
    theirs = trainer._compute_loss(trainer.model, trainer.data_collator(rows), False)
    compare(stage(beta=0.8, **settings), tools, rows, trainer.model, theirs)


@pytest.mark.parametrize("smoothing", [0, 0.1])
def test_simpo_equals_trls(smoothing: float, tools: Any) -> None:
    import torch
    from torch.nn.utils.rnn import pad_sequence

    trainer = tools.cpo
    trainer.beta, trainer.simpo_gamma, trainer.label_smoothing = 2.0, 0.7, smoothing

    def padded(columns: list[list[int]], value: int) -> Any:
        return pad_sequence([torch.tensor(c) for c in columns], True, padding_value=value)

    batch = {}
    for side in ("chosen", "rejected"):
        both = [(row["prompt_ids"], row[f"{side}_ids"]) for row in PAIRS]
        batch[f"{side}_input_ids"] = padded([[*p, *a] for p, a in both], 0)
        batch[f"{side}_labels"] = padded([[-100] * len(p) + a for p, a in both], -100)
        batch[f"{side}_attention_mask"] = padded([[1] * len(p + a) for p, a in both], 0)
    theirs, logged = trainer.get_batch_loss_metrics(trainer.model, batch)
    settings = stage(loss="simpo", beta=2, simpo_gamma=0.7, label_smoothing=smoothing)
    rows = [{name: row[name] for name in row if not name.startswith("ref")} for row in PAIRS]
    metrics = compare(settings, tools, rows, trainer.model, theirs)
    for name in ("chosen", "rejected", "accuracies", "margins"):
        reward = metrics[f"rewards/{name}"].values.float().mean().item()
        assert reward == pytest.approx(logged[f"rewards/{name}"], abs=1e-5)


def test_each_part_of_a_sum_is_a_metric(tools: Any) -> None:
    settings = stage(loss={"sigmoid": 1, "ipo": 0.5}, nll_weight=2)
    losses, metrics = forward(settings, tools.ours, PAIRS)
    parts = [metrics[name].values.mean().item() for name in ("loss/sigmoid", "loss/ipo", "nll")]
    assert losses.mean().item() == pytest.approx(parts[0] + 0.5 * parts[1] + 2 * parts[2])


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"loss": "sigmod"}, "setting 'loss': unknown loss 'sigmod'; did you mean 'sigmoid'?"),
        ({"loss": "aot"}, "unknown loss 'aot'"),
        ({"loss": {"ipo": 1, "hing": 1}}, "unknown loss 'hing'; did you mean 'hinge'?"),
        ({"loss": ["ipo"]}, "setting 'loss': must be a name, or a mapping of names to weights"),
        ({"loss": {}}, "setting 'loss': is empty; name a loss, such as sigmoid"),
        ({"loss": {"ipo": 0}}, "setting 'loss.ipo': Input should be greater than 0"),
        ({"loss": {"ipo": 1, "nll": -1}}, "setting 'loss.nll': Input should be greater than 0"),
        ({"loss": {"ipo": 1, "nll": 0}}, "setting 'loss.nll': Input should be greater than 0"),
        ({"loss": "nll"}, "nll needs a loss of pairs beside it"),
        ({"loss": {"ipo": 1, "nll": 1}, "nll_weight": 1}, "nll is the same as nll_weight"),
        ({"label_smoothing": 0.5, "loss": "robust"}, "setting 'label_smoothing': Input should be"),
        ({"label_smoothing": -0.1, "loss": "robust"}, "setting 'label_smoothing': Input should be"),
        ({"label_smoothing": 0.1}, "label_smoothing has no effect on loss sigmoid; remove it"),
        ({"label_smoothing": 0.1, "loss": "ipo"}, "label_smoothing has no effect on loss ipo"),
        ({"loss": "exo_pair"}, "loss exo_pair needs label_smoothing above 0; set 0.001"),
        ({"simpo_gamma": 1.0}, "simpo_gamma has no effect without loss simpo"),
    ],
)
def test_invalid_loss_settings_are_refused(settings: dict[str, Any], error: str) -> None:
    with pytest.raises(Permanent, match=error.replace("?", r"\?")) as raised:
        stage(**settings).check({}, {})
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"loss": {"sigmoid": 1, "robust": 1}, "label_smoothing": 0.1},
        {"loss": "simpo", "simpo_gamma": 1.0, "label_smoothing": 0.1},
        {"loss": "robust"},
    ],
)
def test_a_setting_that_one_of_the_losses_uses_is_accepted(settings: dict[str, Any]) -> None:
    stage(**settings).check({}, {})


def test_only_simpo_needs_no_reference() -> None:
    assert not stage(loss={"simpo": 1, "nll": 1}).objective().needs_reference
    assert stage(loss={"simpo": 1, "ipo": 1}).objective().needs_reference
