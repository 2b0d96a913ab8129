"""Turns a conversation into tokens and a loss mask.

The mask selects every assistant text and the token that ends its turn. There are three formats:
ChatML and Zephyr are assembled here message by message, so the mask follows from the construction.
Any other chat template is foreign; its mask follows from comparing its prefixes.
"""

import html
from typing import Any

from zephyr_ray.errors import Permanent
from zephyr_ray.messages import plain

Messages = list[dict[str, str]]

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
PADS = ("<pad>", "<|pad|>", "[PAD]", "<|finetune_right_pad_id|>", "<|endoftext|>", "<unk>")
"""Tokens to pad with, by preference, if the tokenizer has no usable padding token."""


class ChatFormat:
    """The conversation format of one tokenizer; `ChatFormat.of(tokenizer)` selects it."""

    stop_token_id: int
    """Token that ends an assistant turn; it is trained and stops generation."""
    template: str
    """Jinja template of this format, for plain transformers and vLLM."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.template = tokenizer.chat_template

    @staticmethod
    def of(tokenizer: Any) -> "ChatFormat":
        added = {token.content for token in tokenizer.added_tokens_decoder.values()}
        if {"<|im_start|>", "<|im_end|>"} <= added:
            return _ChatML(tokenizer)
        if not tokenizer.chat_template and tokenizer.eos_token == "</s>":
            return _Zephyr(tokenizer)
        if not tokenizer.chat_template:
            raise Permanent(
                "this tokenizer has no chat template, no <|im_start|> and no </s>; "
                "give the model folder a chat_template.jinja"
            )
        return _Foreign(tokenizer)

    @property
    def control_tokens(self) -> list[str]:
        """Returns what to `defuse` in messages whose template is tokenized as one text."""
        added = self.tokenizer.added_tokens_decoder.values()
        return [token.content for token in added if token.special]

    def render(self, messages: Messages) -> tuple[list[int], list[bool]]:
        """Returns the token ids of a conversation, and for each whether it is trained.

        Raises Permanent if no token would be trained.
        """
        ids, trained = self._render(messages)
        if not any(trained):
            raise Permanent(
                "a conversation has no assistant message to train on: "
                f"{[message['role'] for message in messages]}"
            )
        return ids, trained

    def ends(self, ids: list[int], trained: list[bool]) -> list[int]:
        """Returns the position of each answer's end token in a rendered conversation."""
        return [at for at, on in enumerate(trained) if on and ids[at] == self.stop_token_id]

    def prompt(self, messages: Messages) -> list[int]:
        """Returns the token ids up to the start of the assistant's next answer."""
        raise NotImplementedError

    def prepare(self) -> Any:
        """Sets padding, end token and template, and returns the tokenizer, ready to be saved."""
        tokenizer = self.tokenizer
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad_token_id(tokenizer))
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(self.stop_token_id)
        tokenizer.chat_template = self.template
        return tokenizer

    def proof(self, messages: Messages) -> tuple[str, str]:
        """Colors trained tokens green and others gray, for a terminal and as HTML."""
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

    def _render(self, messages: Messages) -> tuple[list[int], list[bool]]:
        raise NotImplementedError

    def _text(self, text: str) -> list[int]:
        """Tokenises plain text: a typed <|im_end|> does not become the end token."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)[
            "input_ids"
        ]
        return ids

    def _turn(self, lead: str, text: str) -> tuple[list[int], list[int]]:
        """Tokenises a turn's lead and its text.

        They are tokenized together, as in the template, unless a token would span both (text that
        starts with white space): generation starts after the lead.
        """
        head, both = self._text(lead), self._text(lead + text)
        if both[: len(head)] == head:
            return head, both[len(head) :]
        return head, self._text(text)


class _ChatML(ChatFormat):
    """<|im_start|>role\\ntext<|im_end|>\\n, without BOS."""

    def __init__(self, tokenizer: Any):
        super().__init__(tokenizer)
        # Many tokenizers' own templates add a system message that is not trained here.
        self.template = CHATML
        self._start = tokenizer.convert_tokens_to_ids("<|im_start|>")
        self.stop_token_id = tokenizer.convert_tokens_to_ids("<|im_end|>")

    def _render(self, messages: Messages) -> tuple[list[int], list[bool]]:
        ids: list[int] = []
        trained: list[bool] = []
        for message in messages:
            answer = message["role"] == "assistant"
            if answer:
                head, text = self._turn("assistant\n", message["content"])
            else:
                head, text = self._text(f"{message['role']}\n{message['content']}"), []
            after = self._text("\n")
            ids += [self._start, *head, *text, self.stop_token_id, *after]
            trained += [False] * (1 + len(head))
            trained += [answer] * (len(text) + 1)
            trained += [False] * len(after)
        return ids, trained

    def prompt(self, messages: Messages) -> list[int]:
        return [*self._render(messages)[0], self._start, *self._text("assistant\n")]


class _Zephyr(ChatFormat):
    """<|role|>\\ntext</s>\\n; role markers are plain text; one BOS if the model has one."""

    def __init__(self, tokenizer: Any):
        super().__init__(tokenizer)
        self.stop_token_id = tokenizer.eos_token_id
        bos = tokenizer.bos_token_id
        self._bos = [bos] if bos is not None and tokenizer("")["input_ids"][:1] == [bos] else []
        self.template = ZEPHYR.replace("add_bos", "true" if self._bos else "false", 1)
        # Some tokenizers prepend a space to text, except after a special token, where turns start.
        # A leading character that merges with nothing suppresses the space.
        after = tokenizer(f"{tokenizer.eos_token}a", add_special_tokens=False)["input_ids"][1:]
        self._before = "" if after == super()._text("a") else "\x01"

    def _text(self, text: str) -> list[int]:
        return super()._text(self._before + text)[len(super()._text(self._before)) :]

    def _turns(self, messages: Messages) -> tuple[list[int], list[bool]]:
        ids, trained = list(self._bos), [False] * len(self._bos)
        for number, message in enumerate(messages):
            # As in the template, the line break after </s> is tokenized with the next turn.
            lead = ("\n" if number else "") + f"<|{message['role']}|>\n"
            head, text = self._turn(lead, message["content"])
            ids += [*head, *text, self.stop_token_id]
            trained += [False] * len(head)
            trained += [message["role"] == "assistant"] * (len(text) + 1)
        return ids, trained

    def _render(self, messages: Messages) -> tuple[list[int], list[bool]]:
        ids, trained = self._turns(messages)
        last = self._text("\n")
        return ids + last, trained + [False] * len(last)

    def prompt(self, messages: Messages) -> list[int]:
        lead = "\n<|assistant|>\n" if messages else "<|assistant|>\n"
        return self._turns(messages)[0] + self._text(lead)


class _Foreign(ChatFormat):
    """The tokenizer's own template; the tokens that an assistant message adds are trained."""

    def __init__(self, tokenizer: Any):
        super().__init__(tokenizer)
        ask = [{"role": "user", "content": "a"}]
        before = self.prompt(ask)
        answered = self._apply([*ask, {"role": "assistant", "content": "b"}], False)
        special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
        ends = [token for token in self._encode(answered)[0][len(before) :] if token in special]
        if not ends:
            raise Permanent(
                "the chat template ends assistant messages without a special token; a model "
                "trained with it would never stop; give the model folder another template"
            )
        self.stop_token_id = ends[0]

    def _apply(self, messages: Messages, ask: bool) -> str:
        # This template takes text only as a whole: a special token typed by a user is broken up.
        safe = [
            {**message, "content": defuse(message["content"], self.control_tokens)}
            for message in plain(messages)
        ]
        text: str = self.tokenizer.apply_chat_template(
            safe, tokenize=False, add_generation_prompt=ask
        )
        return text

    @property
    def control_tokens(self) -> list[str]:
        # The token that ends a turn need not be marked as special.
        return [token.content for token in self.tokenizer.added_tokens_decoder.values()]

    def _encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Returns ids and character offsets; the template already contains the BOS."""
        coded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return coded["input_ids"], coded["offset_mapping"]

    def _render(self, messages: Messages) -> tuple[list[int], list[bool]]:
        whole = self._apply(messages, False)
        ids, offsets = self._encode(whole)
        trained = [False] * len(ids)
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, after = (
                self._apply(messages[:index], True),
                self._apply(messages[: index + 1], False),
            )
            if not (whole.startswith(before) and whole.startswith(after)):
                raise Permanent(
                    "the chat template changes earlier turns when later ones follow; its loss mask "
                    "is unknown; give the model folder another template"
                )
            for at, (start, end) in enumerate(offsets):
                if start >= len(before) and end <= len(after) and end > start:
                    trained[at] = True
                    if ids[at] == self.stop_token_id:
                        break
        return ids, trained

    def prompt(self, messages: Messages) -> list[int]:
        return self._encode(self._apply(messages, True))[0]


def defuse(text: str, tokens: list[str]) -> str:
    """Breaks up typed control tokens, which would open or end a turn, with a zero-width space."""
    for token in tokens:
        text = text.replace(token, token[0] + "\u200b" + token[1:])
    return text


def pad_token_id(tokenizer: Any) -> int:
    """Returns a padding token that is not an end token, so that the end token is trained."""
    vocabulary = tokenizer.get_vocab()
    ends = {tokenizer.eos_token_id, vocabulary.get("<|im_end|>")}
    for token in (tokenizer.pad_token, *PADS, tokenizer.unk_token):
        if token in vocabulary and vocabulary[token] not in ends:
            return int(vocabulary[token])
    raise Permanent(
        f"the tokenizer has no padding token other than its end token {tokenizer.eos_token!r}; "
        "add a pad_token to its tokenizer_config.json"
    )
