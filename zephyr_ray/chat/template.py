"""Writes a conversation as text with a Jinja template, and finds the answers in the text."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from re import Match

from zephyr_ray.errors import Permanent, RowError
from zephyr_ray.messages import Message

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
ZEPHYR = (
    "{{ bos_token if add_bos }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
MAX_SECONDS = 20.0
"""Maximum seconds for a template to write its first text."""
SHOWN = 80
"""Maximum characters of a text in an error line."""


@dataclass(frozen=True)
class Turn:
    """The text of one answer and of everything since the previous answer's end token."""

    lead: str
    """Text up to where generation of the answer starts."""
    answer: str
    """The answer as the template writes it."""
    end: str
    """The control token that ends the answer."""


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template. It comes with a model, so it is untrusted: transformers runs it in a
    sandbox in which it cannot import, open files or change the messages."""

    source: str
    special_tokens: dict[str, str]
    """Tokens that the template may write by name, such as `eos_token`."""
    name: str
    """Name in error lines."""

    def write(self, messages: list[Message], ask: bool = False) -> str:
        """Returns the text of a conversation, with the start of the next answer if `ask`.

        Raises RowError if the template refuses the conversation.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            [text], _ = render_jinja_template(
                [messages],
                chat_template=self.source,
                add_generation_prompt=ask,
                **self.special_tokens,
            )
        except Exception as error:  # a template can raise anything
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise RowError(f"{self.name} refuses the conversation: {reason}") from None
        return str(text)

    def turns(
        self,
        messages: list[Message],
        ask: bool,
        find_control: Callable[[str, int], Match[str] | None],
    ) -> tuple[list[Turn], str]:
        """Returns the turns of a conversation, and the text after the last answer.

        Raises RowError if the template refuses the conversation, omits a message, or does not show
        where answers begin and end. `find_control` returns the first control token at or after
        a position.
        """
        text, start = self.write(messages, ask), 0
        turns: list[Turn] = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            asked = self.write(messages[:index], ask=True)
            answered = self.write(messages[: index + 1])
            end = find_control(answered, len(asked))
            # A template may write closing text after the last end token, so that is not compared.
            prefixes = (asked, answered[: end.end() if end else None])
            if not all(map(text.startswith, prefixes)) or len(asked) < start:
                raise RowError(f"{self.name} changes earlier turns when later ones follow")
            answer = answered[len(asked) : end.start() if end else None]
            if end is None or answer.strip() != message["content"].strip():
                added, content = answered[len(asked) :], message["content"]
                raise RowError(
                    f"{self.name} writes {added[:SHOWN]!r} instead of the answer "
                    f"{content[:SHOWN]!r} and its end token where generation starts"
                )
            turns.append(Turn(text[start : len(asked)], answer, end.group()))
            start = end.end()
        for message in messages:
            if message["role"] != "assistant" and message["content"].strip() not in text:
                raise RowError(f"{self.name} omits a message of role {message['role']}")
        return turns, text[start:]

    def pinned(self, special_tokens: dict[str, str]) -> str:
        """Returns a template that writes the same text with these special tokens."""
        changed = {
            name: self.special_tokens.get(name, "")
            for name, token in special_tokens.items()
            if name in self.source and self.special_tokens.get(name) != token
        }
        # The empty text at the end keeps a line break that Jinja would remove after a block.
        pins = "".join(f"{{% set {name} = {token!r} %}}" for name, token in changed.items())
        return pins + "{{ '' }}" * bool(pins) + self.source


def in_time(write: Callable[[], str], name: str) -> str:
    """Returns what `write` returns. Raises Permanent if it takes longer than MAX_SECONDS: the
    thread of a template with an endless loop cannot be stopped, only left behind."""
    results: list[str | RowError] = []

    def run() -> None:
        try:
            results.append(write())
        except RowError as error:
            results.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(MAX_SECONDS)
    if not results:
        raise Permanent(
            f"{name} wrote nothing in {MAX_SECONDS:g} seconds; "
            "give the model folder another chat template"
        )
    [result] = results
    if isinstance(result, RowError):
        raise result
    return result
