"""Computes losses of single tokens or pairs, as pure functions of log-probabilities.

Logarithms are natural, so losses are in nats; the trainer takes the mean over the global batch.
Imports PyTorch: import this module only in a worker.

Each loss in `loss_settings.PAIR_LOSSES` is a function of the same name, which returns the loss of
every pair, of shape (pairs,). In their docstrings, w and l are the log-ratios of the chosen and the
rejected answers, Δ = w - l, |y| is the number of an answer's tokens, β is `settings.beta` and ε is
`settings.label_smoothing`.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from zephyr_ray.train.loss_settings import LossSettings

DISCOPOP_TAU = 0.05
"""Temperature of `discopop`: the paper's, and TRL's default."""


class Answers(NamedTuple):
    """The chosen or the rejected answers of pairs; every tensor has shape (pairs,)."""

    log_probs: Tensor
    """log π(y|x), summed over the answer's tokens."""
    reference: Tensor | None
    """log π_ref(y|x), summed over the answer's tokens; None if no loss uses it."""
    tokens: Tensor
    """Tokens per answer."""

    @property
    def log_ratios(self) -> Tensor:
        return self.log_probs - self.reference


def token_nll(log_probs: Tensor, trained: Tensor) -> Tensor:
    """Returns the negative log-likelihood of every trained token (arXiv 2310.16944, section 3):
    -log π(y_t|y_<t).

    `log_probs`, the boolean `trained` and the result have the same shape; the result is 0 for other
    tokens.
    """
    return -log_probs.masked_fill(~trained, 0)


def answer_nll(answers: Answers) -> Tensor:
    """Returns the negative log-likelihood per token of every answer (arXiv 2404.19733, the NLL term
    of eq. 1): -log π(y|x) / |y|.

    The result's mean weighs every answer alike, whatever its length and however pairs are split
    over workers; TRL's "sft" loss is a mean over the tokens of one forward pass.
    """
    return -answers.log_probs / answers.tokens


def sigmoid(chosen: Answers, rejected: Answers, settings: LossSettings) -> Tensor:
    """DPO (arXiv 2305.18290, eq. 7): -log σ(β Δ)."""
    return -logsigmoid(_scaled_margin(chosen, rejected, settings))


def sigmoid_norm(chosen: Answers, rejected: Answers, settings: LossSettings) -> Tensor:
    """DPO of log-ratios per token: -log σ(β (w/|y_w| - l/|y_l|))."""
    return -logsigmoid(settings.beta * _margin_per_token(chosen, rejected))


def hinge(chosen: Answers, rejected: Answers, settings: LossSettings) -> Tensor:
    """Hinge loss of log-ratios (RSO, arXiv 2309.06657): max(0, 1 - β Δ)."""
    return torch.relu(1 - _scaled_margin(chosen, rejected, settings))


def ipo(chosen: Answers, rejected: Answers, settings: LossSettings) -> Tensor:
    """IPO (arXiv 2310.12036, eq. 17) of log-ratios per token: (w/|y_w| - l/|y_l| - 1/(2β))²."""
    return (_margin_per_token(chosen, rejected) - 1 / (2 * settings.beta)) ** 2


def robust(chosen: Answers, rejected: Answers, settings: LossSettings) -> Tensor:
    """Robust DPO (arXiv 2403.00409), unbiased if a share ε of the pairs is swapped:
    (-(1 - ε) log σ(β Δ) + ε log σ(-β Δ)) / (1 - 2ε)."""
    scaled, smoothing = _scaled_margin(chosen, rejected, settings), settings.label_smoothing
    as_labeled, swapped = -logsigmoid(scaled), -logsigmoid(-scaled)
    return ((1 - smoothing) * as_labeled - smoothing * swapped) / (1 - 2 * smoothing)


def exo_pair(chosen: Answers, rejected: Answers, settings: LossSettings) -> Tensor:
    """EXO (arXiv 2402.00856, eq. 16), the KL divergence of p = σ(β Δ) from 1 - ε:
    p log(p / (1 - ε)) + (1 - p) log((1 - p) / ε)."""
    scaled, smoothing = _scaled_margin(chosen, rejected, settings), settings.label_smoothing
    first = torch.sigmoid(scaled) * (logsigmoid(scaled) - math.log1p(-smoothing))
    return first + torch.sigmoid(-scaled) * (logsigmoid(-scaled) - math.log(smoothing))


def nca_pair(chosen: Answers, rejected: Answers, settings: LossSettings) -> Tensor:
    """NCA (arXiv 2402.05369): -log σ(β w) - (log σ(-β w) + log σ(-β l)) / 2."""
    good, bad = settings.beta * chosen.log_ratios, settings.beta * rejected.log_ratios
    return -logsigmoid(good) - 0.5 * logsigmoid(-good) - 0.5 * logsigmoid(-bad)


def bco_pair(chosen: Answers, rejected: Answers, settings: LossSettings) -> Tensor:
    """BCO (arXiv 2404.04656) without its running reward shift, as in TRL's DPOTrainer:
    -log σ(β w) - log σ(-β l)."""
    good, bad = settings.beta * chosen.log_ratios, settings.beta * rejected.log_ratios
    return -logsigmoid(good) - logsigmoid(-bad)


def sppo_hard(chosen: Answers, rejected: Answers, settings: LossSettings) -> Tensor:
    """SPPO (arXiv 2405.00675, eq. 4.7) with a preference of 1: (w - 1/(2β))² + (l + 1/(2β))²."""
    target = 1 / (2 * settings.beta)
    return (chosen.log_ratios - target) ** 2 + (rejected.log_ratios + target) ** 2


def apo_zero(chosen: Answers, rejected: Answers, settings: LossSettings) -> Tensor:
    """APO-zero (arXiv 2408.06266, eq. 7), for chosen answers better than the model's:
    1 - σ(β w) + σ(β l)."""
    good, bad = settings.beta * chosen.log_ratios, settings.beta * rejected.log_ratios
    return 1 - torch.sigmoid(good) + torch.sigmoid(bad)


def apo_down(chosen: Answers, rejected: Answers, settings: LossSettings) -> Tensor:
    """APO-down (arXiv 2408.06266, eq. 8), for chosen answers worse than the model's:
    σ(β w) + 1 - σ(β Δ)."""
    good = torch.sigmoid(settings.beta * chosen.log_ratios)
    return good + 1 - torch.sigmoid(_scaled_margin(chosen, rejected, settings))


def discopop(chosen: Answers, rejected: Answers, settings: LossSettings) -> Tensor:
    """DiscoPOP (arXiv 2406.08414, eq. 5): (1 - m) (-log σ(β Δ)) + m exp(-β Δ), m = σ(β Δ / τ)."""
    scaled = _scaled_margin(chosen, rejected, settings)
    share = torch.sigmoid(scaled / DISCOPOP_TAU)
    return -logsigmoid(scaled) * (1 - share) + torch.exp(-scaled) * share


def simpo(chosen: Answers, rejected: Answers, settings: LossSettings) -> Tensor:
    """SimPO (arXiv 2405.14734), smoothed as in TRL's CPOTrainer: -(1 - ε) log σ(z) - ε log σ(-z)
    with z = β (log π(y_w|x)/|y_w| - log π(y_l|x)/|y_l|) - γ."""
    per_token = answer_nll(rejected) - answer_nll(chosen)
    z, smoothing = settings.beta * per_token - settings.simpo_gamma, settings.label_smoothing
    return -(1 - smoothing) * logsigmoid(z) - smoothing * logsigmoid(-z)


def _scaled_margin(chosen: Answers, rejected: Answers, settings: LossSettings) -> Tensor:
    """Returns β Δ."""
    return settings.beta * (chosen.log_ratios - rejected.log_ratios)


def _margin_per_token(chosen: Answers, rejected: Answers) -> Tensor:
    """Returns w/|y_w| - l/|y_l|."""
    return chosen.log_ratios / chosen.tokens - rejected.log_ratios / rejected.tokens
