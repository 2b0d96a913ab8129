"""Judges answers with a reward model: a sequence classifier with one output.

The score is the model's raw output for the conversation in the model's own chat format. Rewards
are comparable with each other, not with the scores of other judges."""

from itertools import count
from pathlib import Path
from typing import Any, Literal

from zephyr_ray.engines.scoring import Encoded, ScoringJudge, ScoringSettings, load, padded
from zephyr_ray.formatting import number
from zephyr_ray.messages import Message
from zephyr_ray.models.checks import check_rewards, load_own_format


class RewardSettings(ScoringSettings):
    """Settings of a reward model."""

    limits = "The scores of a reward model reflect the preferences that it was trained on."

    engine: Literal["reward"] = "reward"

    def start(self, seed: int) -> "RewardJudge":
        return RewardJudge(self)

    def check_weights(self, folder: Path) -> None:
        check_rewards(folder)


class RewardJudge(ScoringJudge):
    """A running reward model."""

    def __init__(self, settings: RewardSettings):
        from transformers import AutoModelForSequenceClassification

        super().__init__(settings)
        self._format = load_own_format(self.folder)
        self._model = load(AutoModelForSequenceClassification, self.folder, self.device)
        use_exact_head(self._model)
        self._pad = self._model.config.get_text_config().pad_token_id

    def encode(self, messages: list[Message]) -> Encoded:
        return Encoded(self._format.encode(messages))

    def forward(self, conversations: list[Encoded]) -> list[float]:
        import torch

        pad = self._pad
        if pad is None:
            # transformers takes the output at the last token that is not padding, so the padding of
            # a model without a padding token must not occur in a conversation.
            used = {token for c in conversations for token in c.ids}
            pad = next(token for token in count() if token not in used)
            self._model.config.get_text_config().pad_token_id = pad
        with torch.inference_mode():
            logits = self._model(**padded(conversations, pad, self.device)).logits
        rewards: list[float] = logits[:, 0].float().tolist()
        return rewards

    def score(self, total: float, text: str) -> tuple[float | None, str]:
        return total, f"reward {number(total, 3)}"


def use_exact_head(model: Any) -> None:
    """Runs the last linear layer in fp32. In bf16, rewards between 4 and 8 would be multiples of
    1/32, and would often tie."""
    head = getattr(model, "score", None)
    if head is not None:
        head.float().register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
