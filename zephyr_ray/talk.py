"""Runs `zephyr chat`: a conversation in the terminal with a model of a run or of a service."""

import asyncio
import os
import re
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from zephyr_ray.errors import Permanent

if TYPE_CHECKING:
    from zephyr_ray.messages import Message

MAX_TOKENS = 256
"""Maximum tokens per answer of a local model; a service has its own maximum."""
CONTEXT = 2048
"""Maximum tokens of a conversation with a local model."""
TEMPERATURE, TOP_P = 0.7, 0.95
KEY_VARIABLE = "ZEPHYR_API_KEY"


class Local:
    """A model in a vLLM engine in this process."""

    def __init__(self, weights: str):
        # Keeps everything but answers off the terminal.
        os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
        os.environ["TQDM_DISABLE"] = "1"
        import torch

        from zephyr_ray.engines.vllm import VllmEngine

        self._engine = VllmEngine(weights, CONTEXT, gpus=float(torch.cuda.is_available()), seed=0)
        self._runner = asyncio.Runner()

    def answer(self, messages: "list[Message]", on_text: Callable[[str], None]) -> str:
        """Returns the complete answer; passes each new piece of it to `on_text`."""
        from zephyr_ray.models.contract import Sampling

        length = 0

        def pass_new_text(text: str) -> None:
            nonlocal length
            on_text(text[length:])
            length = len(text)

        sampling = Sampling(TEMPERATURE, TOP_P, MAX_TOKENS)
        return self._runner.run(self._engine.answer(messages, sampling, pass_new_text)).text


class Remote:
    """A model of a service that implements OpenAI's API, such as `zephyr serve`."""

    def __init__(self, address: str, name: str | None):
        import httpx2
        import openai

        from zephyr_ray.engines.connection import sync_client

        key = os.environ.get(KEY_VARIABLE, "").strip()
        if key and not re.fullmatch("[!-~]+", key):
            raise Permanent(f"{KEY_VARIABLE} holds a character that no key has; set only the key")
        self._errors, self._address = openai, address
        base = address.rstrip("/").removesuffix("/v1")
        try:
            self._client = sync_client(f"{base}/v1", key or "none")
            names = [model.id for model in self._client.models.list()]
        except (httpx2.InvalidURL, UnicodeError):
            raise Permanent(f"{address} is not a URL; correct the address") from None
        except AttributeError:  # a reply that is not JSON
            raise Permanent(f"{address} is not a chat service; correct the address") from None
        except openai.AuthenticationError:
            if key:
                raise Permanent(
                    f"{address} does not accept the key in {KEY_VARIABLE}; set a valid one"
                ) from None
            raise Permanent(f"{address} requires a key; set {KEY_VARIABLE}") from None
        except openai.APIConnectionError:
            raise Permanent(
                f"cannot reach {address}; start zephyr serve or correct the address"
            ) from None
        except openai.OpenAIError as error:
            raise Permanent(
                f"{address} is not a chat service: {error}; correct the address"
            ) from None
        if not names:
            raise Permanent(f"{address} has no models; correct the address")
        if name and name not in names:
            raise Permanent(f"{address} has no model '{name}'; use one of {', '.join(names)}")
        self.model = name or names[-1]

    def answer(self, messages: "list[Message]", on_text: Callable[[str], None]) -> str:
        """Answers like `Local.answer`. Raises Permanent if the service cannot answer."""
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
                on_text(piece)
                text += piece
        except self._errors.OpenAIError as error:
            raise Permanent(f"{self._address}: {error}") from None
        return text


def talk(speaker: Local | Remote) -> int:
    """Reads messages from standard input until its end, and streams answers to standard output."""
    import readline  # noqa: F401  # gives the prompt line editing and a history

    from zephyr_ray.messages import assistant, user

    print(
        "type a message; an empty line starts a new conversation, Ctrl-C stops an answer, "
        "Ctrl-D quits",
        file=sys.stderr,
    )
    messages: list[Message] = []
    while True:
        try:
            message = input("\n> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return 0
        if not message:
            messages = []
            continue
        asked = [*messages, user(message)]
        try:
            text = speaker.answer(asked, lambda piece: print(piece, end="", flush=True))
        except (Permanent, KeyboardInterrupt) as error:
            print(
                f"\n{str(error) or 'stopped'}; the conversation continues without this message",
                file=sys.stderr,
            )
            continue
        print(flush=True)
        messages = [*asked, assistant(text)]
