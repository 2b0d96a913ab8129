"""Turns a conversation into tokens and a loss mask.

Training, evaluation and serving all take their tokens from here, so the same text yields the same
tokens everywhere. A format is a tokenizer with a template: ChatML, Zephyr's, or the model's own.
"""

import html
from contextlib import suppress
from typing import Any

from zephyr_ray.chat.encoder import Encoder, control_tokens
from zephyr_ray.chat.template import CHATML, SHOWN, ZEPHYR, ChatTemplate, Turn, in_time
from zephyr_ray.errors import Permanent, RowError
from zephyr_ray.messages import Message, assistant, plain, user

Messages = list[Message]

PADS = ("<pad>", "<|pad|>", "[PAD]", "<|finetune_right_pad_id|>", "<|endoftext|>", "<unk>")
"""Tokens to pad with, in order of preference, if the tokenizer has no usable padding token."""
PROBE = [user("One?"), assistant("Two."), user("Three?"), assistant("Four.")]
"""The conversation with which a template is tested before it is used."""
SYSTEM = {"role": "system", "content": "Zero."}
OWN = "the chat template"
"""Name of the tokenizer's own template."""
FIX = "give the model folder another chat template"


class ChatFormat:
    """The conversation format of one tokenizer.

    `ChatFormat.of(tokenizer)` is for training. `ChatFormat.to_ask(tokenizer)` is for a model that
    only answers, whose template need not show where answers begin and end.
    """

    stop_token_id: int
    """Id of the token that ends an assistant turn; it is trained and stops generation."""
    template: str
    """Jinja template of this format, for plain transformers."""

    @staticmethod
    def of(tokenizer: Any) -> "ChatFormat":
        """Raises Permanent if no format fits, or if the format's loss mask would be wrong."""
        chat = ChatFormat.to_ask(tokenizer)
        try:
            chat.render(PROBE)
        except RowError as error:
            raise Permanent(f"the loss mask would be wrong: {error}; {FIX}") from None
        return chat

    @staticmethod
    def to_ask(tokenizer: Any) -> "ChatFormat":
        """Raises Permanent if no format fits."""
        added = {token.content for token in tokenizer.added_tokens_decoder.values()}
        if {"<|im_start|>", "<|im_end|>"} <= added:
            # Many tokenizers' own templates add a system message that is not trained here.
            return ChatFormat(tokenizer, CHATML, "ChatML")
        if tokenizer.chat_template:
            try:
                source = tokenizer.get_chat_template()
            except ValueError as error:  # several templates, none of them the default
                raise Permanent(f"{' '.join(str(error).split())[:200]}; {FIX}") from None
            return ChatFormat(tokenizer, source, OWN)
        if tokenizer.eos_token == "</s>":
            bos = tokenizer.bos_token_id
            adds_bos = bos is not None and tokenizer("")["input_ids"][:1] == [bos]
            source = ZEPHYR.replace("add_bos", "true" if adds_bos else "false", 1)
            return ChatFormat(tokenizer, source, "Zephyr's template")
        raise Permanent(
            "this tokenizer has no chat template, no <|im_start|> and no </s>; "
            "give the model folder a chat_template.jinja"
        )

    def __init__(self, tokenizer: Any, source: str, name: str):
        self.tokenizer, self.template = tokenizer, source
        self._template = ChatTemplate(source, dict(tokenizer.special_tokens_map), name)
        try:
            answered = in_time(lambda: self._template.write(PROBE[:2]), name)
            asked = self._template.write(PROBE[:1], ask=True)
        except RowError as error:
            raise Permanent(f"{error}; {FIX}") from None
        written = answered + asked
        for messages in ([SYSTEM, *PROBE[:1]], PROBE):
            with suppress(RowError):  # some templates refuse system messages or several turns
                written += self._template.write(messages, ask=True)
        self._encoder = Encoder(tokenizer, control_tokens(tokenizer, written))
        answer = answered.rfind(PROBE[1]["content"])
        end = self._encoder.find_control(answered, len(asked) if answer < 0 else answer)
        if end is None:
            raise Permanent(
                f"{name} ends answers without a control token; a model trained with it would "
                f"never stop; {FIX}"
            )
        self.stop_token_id = tokenizer.convert_tokens_to_ids(end.group())

    @property
    def name(self) -> str:
        """Returns the template's name, with a note if it replaces the tokenizer's own."""
        name = self._template.name
        if name == OWN or not self.tokenizer.chat_template or self._writes_the_same():
            return name
        return f"{name}, not the model's own chat template, which writes other text"

    def _writes_the_same(self) -> bool:
        """Returns whether the tokenizer's own template writes the same text."""
        try:
            source = self.tokenizer.get_chat_template()
            own = ChatTemplate(source, self._template.special_tokens, OWN)
            return in_time(lambda: own.write(PROBE), OWN) == self._template.write(PROBE)
        except (Permanent, ValueError):
            return False

    @property
    def vocabulary_size(self) -> int:
        """Returns the tokenizer's largest token id plus 1."""
        return max(self.tokenizer.get_vocab().values()) + 1

    def render(self, messages: Messages) -> tuple[list[int], list[bool]]:
        """Returns the token ids of a conversation, and for each whether it is trained.

        Raises RowError unless the trained tokens are the assistant's answers, each followed by its
        end token, and nothing else.
        """
        turns, rest = self._turns(messages)
        ids, trained = self._join(turns)
        tail = self._encoder.encode(rest, after=turns[-1].end if turns else "")
        ids, trained = ids + tail, trained + [False] * len(tail)
        self._prove(ids, trained, [turn.answer for turn in turns])
        return ids, trained

    def prompt(self, messages: Messages) -> list[int]:
        """Returns the token ids up to the start of the assistant's next answer; `render` of the
        answered conversation begins with them."""
        try:
            turns, rest = self._turns(messages, ask=True)
        except RowError:
            # The template does not show where answers begin, or it refuses and this raises too.
            return self._encoder.encode(self._write(messages, ask=True))
        ids, _ = self._join(turns)
        return ids + self._encoder.encode(rest, after=turns[-1].end if turns else "")

    def answers(self, ids: list[int], trained: list[bool]) -> list[range]:
        """Returns the positions of each answer of a rendered conversation, with its end token."""
        on, spans = bytes(trained), list[range]()
        start = on.find(True)
        while start >= 0:
            stop = on.find(False, start)
            stop = len(ids) if stop < 0 else stop
            with suppress(ValueError):
                stop = ids.index(self.stop_token_id, start, stop) + 1
            spans.append(range(start, stop))
            start = on.find(True, stop)
        return spans

    def prepare(self) -> Any:
        """Sets padding, end token and template, and returns the tokenizer, ready to be saved."""
        tokenizer = self.tokenizer
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad_token_id(tokenizer))
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(self.stop_token_id)
        tokenizer.chat_template = self._template.pinned(tokenizer.special_tokens_map)
        return tokenizer

    def proof(self, messages: Messages) -> tuple[str, str]:
        """Returns a conversation with trained tokens in green and others in gray, for a terminal
        and as HTML."""
        ids, trained = self.render(messages)
        ansi, page, start = "", "", 0
        for end in range(1, len(ids) + 1):
            if end < len(ids) and trained[end] == trained[start]:
                continue
            text = self.tokenizer.decode(ids[start:end], skip_special_tokens=False)
            ansi += f"\033[{32 if trained[start] else 90}m{text}\033[0m"
            color = "#0a7d32" if trained[start] else "#888"
            page += f'<span style="color:{color}">{html.escape(text)}</span>'
            start = end
        return ansi, f'<pre style="white-space:pre-wrap">{page}</pre>'

    def _write(self, messages: Messages, ask: bool = False) -> str:
        return self._template.write(self._mark(messages), ask)

    def _mark(self, messages: Messages) -> Messages:
        return [
            {name: self._encoder.mark(text) for name, text in message.items()}
            for message in plain(messages)
        ]

    def _turns(self, messages: Messages, ask: bool = False) -> tuple[list[Turn], str]:
        return self._template.turns(self._mark(messages), ask, self._encoder.find_control)

    def _join(self, turns: list[Turn]) -> tuple[list[int], list[bool]]:
        """Returns ids and mask. Each turn is tokenized after the end token of the one before, so
        its tokens do not depend on what follows, or on whether it is generated or trained."""
        ids: list[int] = []
        trained: list[bool] = []
        after = ""
        for turn in turns:
            head, answer = self._encoder.encode_turn(turn.lead, turn.answer + turn.end, after)
            ids += head + answer
            trained += [False] * len(head) + [True] * len(answer)
            after = turn.end
        return ids, trained

    def _prove(self, ids: list[int], trained: list[bool], texts: list[str]) -> None:
        """Raises RowError unless the trained tokens decode to the texts, each followed by the end
        token.

        A tokenizer that changes text (Unicode normalization, lower case) does not decode to what it
        encoded; its round trip of the answer alone is accepted too. The unknown token is never
        accepted, nor a control token for typed text.
        """
        name = self._template.name
        if not texts:
            raise RowError("a conversation has no assistant message to train on")
        spans = [ids[span.start : span.stop] for span in self.answers(ids, trained)]
        if len(spans) != len(texts):
            raise RowError(f"{name}: {len(spans)} spans are trained for {len(texts)} answers")
        for (*body, end), text in zip(spans, texts, strict=True):
            text, decoded = self._encoder.unmark(text), self._encoder.decode(body)
            same = decoded == text or decoded in self._encoder.round_trips(text)
            if not same or end != self.stop_token_id or self._encoder.has_control(body, text):
                decoded = self._encoder.decode([*body, end])
                raise RowError(
                    f"{name}: {decoded[:SHOWN]!r} would be trained instead of {text[:SHOWN]!r}"
                )


def pad_token_id(tokenizer: Any) -> int:
    """Returns the id of a padding token; it is never an end token, so that the end token is
    trained."""
    vocabulary = tokenizer.get_vocab()
    ends = {tokenizer.eos_token_id, vocabulary.get("<|im_end|>")}
    for token in (tokenizer.pad_token, *PADS, tokenizer.unk_token):
        if token in vocabulary and vocabulary[token] not in ends:
            return int(vocabulary[token])
    raise Permanent(
        f"the tokenizer has no padding token other than its end token {tokenizer.eos_token!r}; "
        "add a pad_token to its tokenizer_config.json"
    )
