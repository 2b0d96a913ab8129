"""Encodes conversations with the tokenizer's own template, for models that only read them."""

from typing import Any

from zephyr_ray.chat.encoder import Encoder, control_tokens
from zephyr_ray.chat.format import FIX, OWN, PROBE
from zephyr_ray.chat.template import ChatTemplate, in_time
from zephyr_ray.errors import Permanent, RowError
from zephyr_ray.messages import Message, plain


class OwnFormat:
    """The tokenizer's own chat template, as the model was trained with it.

    Unlike `ChatFormat`, it needs no end token, and it keeps a system message that the template
    adds. Control tokens that a message contains as text stay text."""

    def __init__(self, tokenizer: Any):
        """Raises Permanent if there is no template, or if it cannot write a conversation."""
        if not tokenizer.chat_template:
            raise Permanent(
                "the tokenizer has no chat template, so the format that the model was trained with "
                "is unknown; give the model folder its chat_template.jinja"
            )
        try:
            source = tokenizer.get_chat_template()
        except ValueError as error:  # several templates, none of them the default
            raise Permanent(f"{' '.join(str(error).split())[:200]}; {FIX}") from None
        self._template = ChatTemplate(source, dict(tokenizer.special_tokens_map), OWN)
        try:
            written = in_time(lambda: self._template.write(PROBE[:2]), OWN)
        except RowError as error:
            raise Permanent(f"{error}; {FIX}") from None
        self._encoder = Encoder(tokenizer, control_tokens(tokenizer, written))

    def encode(self, messages: list[Message]) -> list[int]:
        """Returns the token ids of a complete conversation. Raises RowError if the template refuses
        it."""
        marked = [
            {**message, "content": self._encoder.mark(message["content"])}
            for message in plain(messages)
        ]
        return self._encoder.encode(self._template.write(marked))
