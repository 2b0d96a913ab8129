"""Tests length-controlled win rates: by hand, against AlpacaEval's code, on simulated judges."""

import math
import sys
import warnings
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from zephyr_ray.judge import measures
from zephyr_ray.judge.length_control import design, length_controlled, moves_far, obstacle
from zephyr_ray.judge.statistics import bootstrap


def halves(wins_longer: float, wins_shorter: float) -> tuple[list[float], list[int], list[str]]:
    """Returns 20 prompts on which the model's answer is 10 characters longer, and 20 on which it is
    10 shorter, with the share of wins in each half."""
    shares = (wins_longer, wins_shorter)
    verdicts = [float(i < 20 * share) for share in shares for i in range(20)]
    return verdicts, [10] * 20 + [-10] * 20, [f"p{i}" for i in range(40)]


def test_two_lengths_can_be_worked_out_by_hand() -> None:
    rate, low, high = length_controlled(*halves(0.8, 0.5))
    # β₀ is the mean of the logits of 0.8 and 0.5, log(4) / 2, so the odds are 2 to 1.
    assert rate == pytest.approx(2 / 3)
    # Var(β₀) = (1 / (20 × 0.8 × 0.2) + 1 / (20 × 0.5 × 0.5)) / 4, times the correction for few
    # prompts, 40/39 × 39/38.
    error = np.sqrt((1 / 3.2 + 1 / 5) / 4 * 40 / 38)
    ends = [1 / (1 + np.exp(-(np.log(2) + z * error))) for z in (-1.959964, 1.959964)]
    assert (low, high) == pytest.approx(ends, abs=1e-5)


def test_verdicts_that_do_not_depend_on_length_keep_their_rate() -> None:
    assert length_controlled(*halves(0.7, 0.7))[0] == pytest.approx(0.7)


def test_repeated_judgements_of_a_prompt_add_no_evidence() -> None:
    verdicts, differences, prompts = halves(0.8, 0.5)
    once = length_controlled(verdicts, differences, prompts)
    thrice = length_controlled(verdicts * 3, differences * 3, prompts * 3)
    assert thrice == pytest.approx(once, abs=0.01)


def test_a_tie_is_half_a_win_and_half_a_loss() -> None:
    """Fractional verdicts give AlpacaEval's fit: each row twice, weighted by y and 1 - y."""
    from statsmodels.genmod.families import Binomial
    from statsmodels.genmod.generalized_linear_model import GLM
    from statsmodels.tools.sm_exceptions import SpecificationWarning

    rng = np.random.default_rng(0)
    y, differences = rng.choice([0.1, 0.5, 0.8, 0.99], 60), rng.normal(20, 100, 60)
    prompts = np.arange(60)
    doubled = GLM(
        np.repeat([1.0, 0.0], 60),
        np.tile(design(differences), (2, 1)),
        family=Binomial(),
        freq_weights=np.concatenate([y, 1 - y]),
    )
    with pytest.warns(SpecificationWarning):
        fit = doubled.fit(
            cov_type="cluster", cov_kwds={"groups": np.tile(prompts, 2), "use_correction": False}
        )
    rate, low, high = length_controlled(y, differences, prompts)
    assert np.log(rate / (1 - rate)) == pytest.approx(fit.params[0])
    width = np.log(high / (1 - high)) - np.log(low / (1 - low))
    correction = 60 / 59 * 59 / 58
    assert width == pytest.approx(2 * 1.959964 * fit.bse[0] * correction**0.5, rel=1e-4)


@pytest.mark.parametrize(
    ("verdicts", "differences", "says"),
    [
        ([1.0, 0.0] * 14, range(-14, 14), "fewer than 30 prompts"),
        ([1.0, 0.0] * 20, [7] * 40, "the same for all prompts"),
        ([1.0, 0.0] * 20, range(1, 41), "always the longer one"),
        ([1.0, 0.0] * 20, range(-40, 0), "always the shorter one"),
        ([1.0] * 40, range(-20, 20), "every verdict is a win"),
        ([0.0] * 40, range(-20, 20), "every verdict is a loss"),
        ([0.0] * 20 + [1.0] * 20, range(-20, 20), "length alone predicts"),
        ([1.0] * 20 + [0.0] * 20, range(-20, 20), "length alone predicts"),
        # A tie at the length where losses become wins does not help.
        ([0.0] * 20 + [0.5] + [1.0] * 19, range(-20, 20), "length alone predicts"),
        ([0.0] * 20 + [1.0] * 10 + [0.5] + [1.0] * 9, range(-20, 20), ""),
        ([1.0, 0.0] * 20, range(-20, 20), ""),
    ],
)
def test_a_missing_rate_has_a_reason(verdicts: list, differences: range, says: str) -> None:
    prompts = list(range(len(verdicts)))
    reason = obstacle(verdicts, list(differences), prompts)
    assert says in reason if says else reason == ""
    if not reason:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            rate, low, high = length_controlled(verdicts, list(differences), prompts)
        assert 0 < low < rate < high < 1


def test_both_orders_of_few_prompts_are_few_prompts() -> None:
    verdicts, differences = [1.0, 0.0] * 20, list(range(-20, 20))
    assert "fewer than 30" in obstacle(verdicts, differences, [i // 2 for i in range(40)])


@pytest.fixture(scope="module")
def alpacaeval() -> Iterator[ModuleType]:
    """Returns AlpacaEval's own code. Its package imports clients of APIs and reads .env when it is
    imported, so an empty package takes its place."""
    [folder] = find_spec("alpaca_eval").submodule_search_locations  # type: ignore[union-attr]
    package = ModuleType("alpaca_eval")
    package.__path__ = [folder]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "alpaca_eval", package)
        yield import_module("alpaca_eval.metrics.glm_winrate")
        for name in [name for name in sys.modules if name.startswith("alpaca_eval.")]:
            patch.delitem(sys.modules, name)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:Inconsistent values:UserWarning")
@pytest.mark.parametrize(
    ("count", "shift", "liking", "raw"),
    [(200, 60, 40, 0.61), (300, 105, -30, 0.45), (250, 20, 45, 0.77), (200, 150, 20, 0.38)],
)
def test_same_as_alpacaeval(
    alpacaeval: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    count: int,
    shift: int,
    liking: float,
    raw: float,
) -> None:
    import pandas as pd

    differences = [37 * i % 211 - shift for i in range(count)]
    chances = [50 + liking * math.tanh(d / 60) - 53 * i % 100 for i, d in enumerate(differences)]
    verdicts = [1.0 if c > 10 else 0.5 if c > 0 else 0.0 for c in chances]
    # AlpacaEval reads a table about its own prompts from a hub; the minimal formula ignores it.
    table = pd.DataFrame({"index": range(count), "instruction_difficulty": 0.0, "model": "m"})
    table.to_csv(tmp_path / "df_gamed.csv", index=False)
    monkeypatch.setattr(
        alpacaeval, "hf_hub_download", lambda filename, **_: str(tmp_path / filename)
    )
    annotations = pd.DataFrame(
        {
            **{"index": range(count), "preference": [1 + verdict for verdict in verdicts]},
            **{"output_1": "x" * 500, "output_2": ["x" * (500 + d) for d in differences]},
            **{"generator_1": "base", "generator_2": "model", "annotator": "judge"},
        }
    )
    minimal = alpacaeval.GLM_INFO["length_controlled_minimal"]
    unpenalized = minimal | {"kwargs": {"n_splits": 0, "C": 1e9, "tol": 1e-8, "max_iter": 10_000}}
    rate, _, _ = length_controlled(verdicts, differences, range(count))
    for info, tolerance in ((minimal, 0.003), (unpenalized, 1e-5)):
        theirs = alpacaeval.get_length_controlled_winrate(
            annotations.copy(), glm_info=info, save_weights_dir=None
        )
        assert theirs["length_controlled_winrate"] / 100 == pytest.approx(rate, abs=tolerance)
        assert theirs["win_rate"] / 100 == pytest.approx(raw, abs=0.01)


def test_a_far_move_is_one_that_alpacaeval_warns_about(alpacaeval: ModuleType) -> None:
    for raw in range(0, 101, 5):
        for controlled in np.arange(0.3, 100, 0.7):  # never exactly at a limit
            theirs = alpacaeval.get_is_extreme_changes(raw, controlled)
            assert moves_far(raw / 100, controlled / 100) == theirs, (raw, controlled)


def test_a_judge_that_only_likes_length_has_no_preference_at_equal_length() -> None:
    """The model's answers are 100 characters longer on average, and longer answers win."""
    held, raw = 0, []
    for seed in range(300):
        rng = np.random.default_rng(seed)
        differences = rng.normal(100, 150, 400)
        chance = 1 / (1 + np.exp(-2.5 * np.tanh(differences / 150)))
        verdicts = (rng.random(400) < chance).astype(float)
        _, low, high = length_controlled(verdicts, differences, range(400))
        held += low <= 0.5 <= high
        raw.append(verdicts.mean())
    assert held / 300 >= 0.93
    assert min(raw) > 0.6


def test_a_judge_with_a_position_bias_comes_out_unbiased() -> None:
    """The model's true win rate is 0.6. Being first adds 15 points to an answer's chance, and being
    second subtracts 15, so the first position is worth 30 points. The mean over both orders
    cancels that."""
    held, one_order = 0, 0
    for seed in range(100):
        orders = biased(seed)
        _, low, high = bootstrap(orders.mean(axis=1), seed, n=1000)
        held += low <= 0.6 <= high
        _, low, high = bootstrap(orders[:, 0], seed, n=1000)
        one_order += low <= 0.6 <= high
    assert held >= 93
    assert one_order < 10


def test_a_position_bias_shows_in_the_first_position_rate() -> None:
    rows = [{"prompt_id": i, "orders": pair.tolist()} for i, pair in enumerate(biased(seed=0))]
    rate, low, high, questions = measures.first_position(rows, seed=0)
    assert low < 0.65 < high and low > 0.5
    assert questions == 300


def biased(seed: int) -> np.ndarray:
    """Returns whether the model wins (1 or 0) in each order, for 150 prompts that differ in how
    much the judge likes its answer."""
    rng = np.random.default_rng(seed)
    chances = rng.uniform(0.45, 0.75, (150, 1)) + np.array([0.15, -0.15])
    return (rng.random((150, 2)) < chances).astype(float)


def test_ties_give_a_rate_of_a_half_without_a_warning() -> None:
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        rate = length_controlled(40 * [0.5], range(40), range(40))
    assert not warned
    assert rate == pytest.approx((0.5, 0.5, 0.5))
