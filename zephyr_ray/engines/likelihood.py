"""Judges answers by their likelihood: a weak judge that needs nothing but a language model.

The score is the sum of the log-probabilities of the answer's tokens, given the prompt in the
model's chat format, divided by the number of the answer's characters. It is at most 0."""

from pathlib import Path
from typing import Literal

from zephyr_ray.engines.scoring import (
    CPU_TOKENS,
    Encoded,
    ScoringJudge,
    ScoringSettings,
    load,
    padded,
)
from zephyr_ray.formatting import number
from zephyr_ray.messages import Message
from zephyr_ray.models.checks import check_reads, load_chat_format
from zephyr_ray.models.shapes import Shape

LOGITS_PER_PASS = 2**29
"""Maximum logits per pass, which fill 1 GiB in bf16."""


class LikelihoodSettings(ScoringSettings):
    """Settings of a language model that judges by likelihood."""

    limits = "Likelihood under a model is a weak judge: a fluent answer scores well, true or not."

    engine: Literal["likelihood"] = "likelihood"

    def start(self, seed: int) -> "LikelihoodJudge":
        return LikelihoodJudge(self)

    def check_weights(self, folder: Path) -> None:
        check_reads(folder)

    def memory(self, shape: Shape | None) -> float:
        logits = 0.0 if self.gpus or not shape else 4.0 * CPU_TOKENS * shape.vocabulary
        return super().memory(shape) + logits


class LikelihoodJudge(ScoringJudge):
    """A running language model that scores answers."""

    def __init__(self, settings: LikelihoodSettings):
        from transformers import AutoModelForCausalLM

        super().__init__(settings)
        self._format = load_chat_format(self.folder)
        self._model = load(AutoModelForCausalLM, self.folder, self.device)
        vocabulary = self._model.get_output_embeddings().weight.shape[0]
        self.pass_tokens = min(self.pass_tokens, LOGITS_PER_PASS // vocabulary)

    def encode(self, messages: list[Message]) -> Encoded:
        ids, trained = self._format.render(messages)
        answer = self._format.answers(ids, trained)[-1]
        return Encoded(ids[: answer.stop - 1], range(answer.start, answer.stop - 1))

    def forward(self, conversations: list[Encoded]) -> list[float]:
        import torch

        arguments = padded(conversations, 0, self.device)
        totals = []
        with torch.inference_mode():
            logits = self._model(**arguments).logits
            for row, conversation in enumerate(conversations):
                start, stop = conversation.answer.start, conversation.answer.stop
                tokens = arguments["input_ids"][row, start:stop, None]
                # The logits at a position predict the next token.
                log_probabilities = logits[row, start - 1 : stop - 1].float().log_softmax(-1)
                totals.append(log_probabilities.gather(-1, tokens).sum())
            sums: list[float] = torch.stack(totals).tolist()
        return sums

    def score(self, total: float, text: str) -> tuple[float | None, str]:
        if not text:
            return None, "an empty answer has no likelihood"
        mean = total / len(text)
        return mean, f"log-probability {number(mean, 3)} per character"
