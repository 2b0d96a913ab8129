"""Computes losses of single tokens or pairs, as pure functions of log-probabilities.

Logarithms are natural, so losses are in nats; the trainer takes the mean over the global batch.
Imports PyTorch: import this module only in a worker.
"""

from torch import Tensor
from torch.nn.functional import logsigmoid


def token_nll(log_probs: Tensor, trained: Tensor) -> Tensor:
    """Returns the negative log-likelihood of every trained token (arXiv 2310.16944, section 3):
    -log π(y_t|y_<t).

    `log_probs`, the boolean `trained` and the result have the same shape; the result is 0 for other
    tokens.
    """
    return -log_probs.masked_fill(~trained, 0)


def dpo_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """Returns the DPO loss of every pair (arXiv 2305.18290, eq. 7): -log σ(β (chosen - rejected)).

    `chosen` and `rejected` are log-ratios, log π(y|x) - log π_ref(y|x), summed over the answer's
    tokens; they and the result have shape (pairs,).
    """
    return -logsigmoid(beta * (chosen - rejected))


def answer_nll(log_probs: Tensor, tokens: Tensor) -> Tensor:
    """Returns the negative log-likelihood per token of every answer (arXiv 2404.19733, the NLL term
    of eq. 1): -log π(y|x) / |y|.

    `log_probs` is summed over the answer's tokens, `tokens` counts them; both and the result have
    shape (answers,). The result's mean weighs every answer alike, whatever its length and however
    pairs are split over workers; TRL's "sft" loss is a mean over the tokens of one forward pass.
    """
    return -log_probs / tokens
