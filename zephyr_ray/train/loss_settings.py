"""Lists the losses of preference pairs and defines their settings.

Imports no PyTorch, so that recipes are checked without it; `losses` has the functions.
"""

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from zephyr_ray.errors import Permanent, suggest
from zephyr_ray.settings import ADDED, Strict


@dataclass(frozen=True)
class PairLoss:
    """Inputs of a loss of pairs besides `beta` and the answers' log-probabilities."""

    smoothing: bool = False
    """Whether it uses `label_smoothing`."""
    reference: bool = True
    """Whether it uses reference log-probabilities."""


PAIR_LOSSES = {
    "sigmoid": PairLoss(),
    "sigmoid_norm": PairLoss(),
    "hinge": PairLoss(),
    "ipo": PairLoss(),
    "robust": PairLoss(smoothing=True),
    "exo_pair": PairLoss(smoothing=True),
    "nca_pair": PairLoss(),
    "bco_pair": PairLoss(),
    "sppo_hard": PairLoss(),
    "apo_zero": PairLoss(),
    "apo_down": PairLoss(),
    "discopop": PairLoss(),
    "simpo": PairLoss(smoothing=True, reference=False),
}
"""Losses by their names in TRL's DPOTrainer, and CPOTrainer's `simpo`; `losses` has a function of
each name. Left out are `aot` and `aot_unpaired`, which sort the pairs of a forward pass, so the
loss would depend on `micro_batch`, and `sft`, a mean over its tokens, which `nll` replaces."""
NLL = "nll"
"""Name in `loss` that sets `nll_weight`."""


def _by_name(loss: Any) -> Any:
    if not isinstance(loss, str | dict):
        raise ValueError("must be a name, or a mapping of names to weights")
    return {loss: 1.0} if isinstance(loss, str) else loss


def _checked(loss: dict[str, float]) -> dict[str, float]:
    if not loss:
        raise ValueError("is empty; name a loss, such as sigmoid")
    for name in loss:
        if name not in (*PAIR_LOSSES, NLL):
            raise ValueError(f"unknown loss '{name}'{suggest(name, [*PAIR_LOSSES, NLL])}")
    if NLL in loss:
        raise ValueError(
            "nll needs a loss of pairs beside it; add one, such as sigmoid"
            if len(loss) == 1
            else "nll is the same as nll_weight; remove one of them"
        )
    return loss


class LossSettings(Strict):
    """The loss that training on pairs minimizes: the weighted sum of `loss`, and the weighted
    negative log-likelihood of the chosen answers."""

    beta: float = Field(0.1, gt=0)
    """Weight of the KL penalty against the start model; τ in `ipo`."""
    loss: Annotated[
        dict[str, Annotated[float, Field(gt=0)]],
        BeforeValidator(_by_name),
        AfterValidator(_checked),
        ADDED,
    ] = {"sigmoid": 1.0}
    """Weights by name (PAIR_LOSSES); a plain name has the weight 1."""
    label_smoothing: Annotated[float, ADDED] = Field(0.0, ge=0, lt=0.5)
    """Assumed share of pairs whose answers are swapped."""
    simpo_gamma: Annotated[float, ADDED] = Field(0.5, ge=0)
    """Target reward margin of `simpo`; a reward is beta × log-probability per token, in nats."""
    nll_weight: float = Field(0.0, ge=0)
    """Weight of the chosen answer's negative log-likelihood per token, added to the loss; `nll` in
    `loss` is the same setting."""

    @model_validator(mode="before")
    @classmethod
    def _move_nll(cls, settings: Any) -> Any:
        """Moves a weight of `nll` to `nll_weight`, so that equal losses have equal content keys; a
        weight that is not positive stays, and the validation of `loss` rejects it."""
        loss = settings.get("loss") if isinstance(settings, dict) else None
        if not isinstance(loss, dict) or len(loss) < 2 or "nll_weight" in settings:
            return settings
        weight = loss.get(NLL, 0)
        if isinstance(weight, int | float) and not weight > 0:
            return settings
        others = {name: other for name, other in loss.items() if name != NLL}
        return settings | {"loss": others, "nll_weight": weight}

    def check_loss(self) -> None:
        """Raises Permanent if a loss lacks a setting that it needs, or a setting has no effect."""
        if self.label_smoothing and not any(PAIR_LOSSES[name].smoothing for name in self.loss):
            users = ", ".join(name for name, loss in PAIR_LOSSES.items() if loss.smoothing)
            raise Permanent(
                f"label_smoothing has no effect on loss {', '.join(self.loss)}; remove it, or use "
                f"one of {users}"
            )
        if "exo_pair" in self.loss and not self.label_smoothing:
            raise Permanent("loss exo_pair needs label_smoothing above 0; set 0.001")
        default = type(self).model_fields["simpo_gamma"].default
        if self.simpo_gamma != default and "simpo" not in self.loss:
            raise Permanent("simpo_gamma has no effect without loss simpo; remove it")

    @property
    def needs_reference(self) -> bool:
        """Whether rows need reference log-probabilities."""
        return any(PAIR_LOSSES[name].reference for name in self.loss)
