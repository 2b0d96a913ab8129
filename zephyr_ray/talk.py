"""`zephyr chat`: a talk in the terminal with a model of a run, or with a service at an address."""

import asyncio
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from zephyr_ray.errors import Permanent

if TYPE_CHECKING:
    from zephyr_ray.messages import Message

TOKENS = 256
CONTEXT = 2048
TEMPERATURE, TOP_P = 0.7, 0.95
KEY = "ZEPHYR_API_KEY"


class Speaker(Protocol):
    def answer(self, messages: "list[Message]", told: Callable[[str], None]) -> str:
        """The whole answer; `told` is given each new piece of it. Permanent where there is none."""


class Local:
    """Weights, in a vLLM engine of this process."""

    def __init__(self, weights: str):
        # Only answers belong on the terminal.
        os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
        os.environ["TQDM_DISABLE"] = "1"
        import torch

        from zephyr_ray.engines.vllm import VllmEngine

        self._engine = VllmEngine(weights, CONTEXT, gpus=float(torch.cuda.is_available()), seed=0)
        self._runner = asyncio.Runner()

    def answer(self, messages: "list[Message]", told: Callable[[str], None]) -> str:
        from zephyr_ray.models.contract import Sampling

        shown = 0

        def piece(text: str) -> None:
            nonlocal shown
            told(text[shown:])
            shown = len(text)

        sampling = Sampling(TEMPERATURE, TOP_P, TOKENS)
        return self._runner.run(self._engine.answer(messages, sampling, piece)).text


class Remote:
    """A model of a service that speaks OpenAI's protocol, such as `zephyr serve`."""

    def __init__(self, address: str, name: str | None):
        import openai

        key = os.environ.get(KEY) or "none"
        self._errors, self._address = openai, address
        base = address.rstrip("/").removesuffix("/v1")
        self._client = openai.OpenAI(base_url=f"{base}/v1", api_key=key)
        try:
            names = [model.id for model in self._client.models.list()]
        except openai.AuthenticationError:
            if key != "none":
                raise Permanent(f"{address} does not accept the key in {KEY}") from None
            raise Permanent(f"{address} wants a key: set {KEY}") from None
        except openai.OpenAIError as error:
            raise Permanent(f"{address} does not answer as a chat service: {error}") from None
        if name and name not in names:
            raise Permanent(f"{address} has no model '{name}'; it has {', '.join(names)}")
        self.model = name or names[-1]

    def answer(self, messages: "list[Message]", told: Callable[[str], None]) -> str:
        text = ""
        try:
            stream = self._client.chat.completions.create(
                model=self.model,
                messages=messages,
                temperature=TEMPERATURE,
                top_p=TOP_P,
                stream=True,
            )
            for chunk in stream:
                piece = (chunk.choices[0].delta.content or "") if chunk.choices else ""
                told(piece)
                text += piece
        except self._errors.OpenAIError as error:
            raise Permanent(f"{self._address}: {error}") from None
        return text


def talk(speaker: Speaker) -> int:
    """Questions from standard input, answers to standard output as they come, until its end."""
    import readline  # noqa: F401  # arrow keys: earlier questions, and editing

    from zephyr_ray.messages import assistant, user

    print(
        "ask something; an empty line starts anew, ctrl-C stops an answer, ctrl-D ends",
        file=sys.stderr,
    )
    messages: list[Message] = []
    while True:
        try:
            question = input("\n> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return 0
        if not question:
            messages = []
            continue
        messages.append(user(question))
        try:
            text = speaker.answer(messages, lambda piece: print(piece, end="", flush=True))
        except (Permanent, KeyboardInterrupt) as error:
            print(f"\n{str(error) or 'stopped'}; that question is left out", file=sys.stderr)
            messages.pop()
            continue
        print(flush=True)
        messages.append(assistant(text))
