"""Reads conversations in the forms that published data sets have.

- messages: [{"role": "user", "content": "Hi."}, …]
- ShareGPT: [{"from": "human", "value": "Hi."}, …]
- either as a Parquet struct of lists: {"role": ["user", …], "content": ["Hi.", …]}
- one message alone: {"role": "assistant", "content": "Hello."}
- content as text parts: [{"type": "text", "text": "Hi."}]
- either in an object: {"messages": […]} or {"conversations": […]}
- any of these as a JSON or Python literal, or as a JSON string that contains one
- Anthropic HH: "\\n\\nHuman: Hi.\\n\\nAssistant: Hello."; guanaco: "### Human: Hi.### Assistant: …"
"""

import ast
import json
import re
from typing import Any

from zephyr_ray.formatting import shorten
from zephyr_ray.messages import Message, visible

ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model", "bot"), "assistant"),
}
TOOL_ROLES = (
    *("tool", "tool_call", "tool_calls", "tool_response", "tool_result"),
    *("function", "function_call", "function_response", "observation", "ipython"),
)
CALLS = ("tool_calls", "function_call")
"""Keys of an assistant's message that calls tools."""
UNTRAINED = ("weight", "train")
"""Keys with which a message can be excluded from the loss: `weight` 0 in OpenAI's format, `train`
false in others."""
KEYS = (("role", "content"), ("from", "value"))
TRANSCRIPTS = {
    "Human:": re.compile(r"(?:\A|\n\n)(Human|Assistant):"),
    "### Human:": re.compile(r"### (Human|Assistant):"),
}
"""Separators of turns, by how a transcript starts."""
WRAPPERS = ("messages", "conversations")
"""Keys under which an object holds a conversation."""
_OTHER_TEXT = re.compile(
    r"(?:<[|\uff5c]?(?:s|bos|bos_token|begin_of_text|begin\u2581of\u2581sentence|endoftext)"
    r"[|\uff5c]?>|\[gMASK\]|\s)*"
    r"(?:\[INST\]|\[SYSTEM_PROMPT\]|<start_of_turn>|<\|im_start\|>|<\|start_of_turn_token\|>"
    r"|<\|start_header_id\|>|<[|\uff5c](?:system|user|prompter|assistant)[|\uff5c]>"
    r"|(?:### ?)?(?:Human|User):.*\s(?:### ?)?Assistant:|A chat between .*\sASSISTANT:"
    r"|(?:### ?Instruction:|Below is an instruction that describes a task).*\s### ?Response:)",
    re.DOTALL | re.IGNORECASE,
)
"""Matches the start of a conversation that a chat template wrote, or of a format whose turns cannot
be split reliably."""
_START = r"(?:<\|im_start\|>|<start_of_turn>|<\|start_header_id\|>|<\|start_of_turn_token\|><\|)"
_ROLE = r"(?:system|developer|user|assistant|model|chatbot)"
_IN_PROSE = r"(?<![ \t\"'`(])"
"""Excludes control tokens that a sentence mentions: a template writes no space, quote or
parenthesis before a token."""
_TURN = re.compile(_IN_PROSE + _START + _ROLE + r"(?:[\s<]|_token\|>|\Z)", re.IGNORECASE)
"""Matches the start of a turn that a chat template wrote."""
_PARTS = [
    [re.compile(mark, re.MULTILINE | re.IGNORECASE) for mark in marks]
    for marks in (
        (r"(?:^\n|### ?)(?:Human|User):", r"(?:^\n|### ?)Assistant:"),
        (
            _IN_PROSE + r"<[|\uff5c](?:user|prompter)[|\uff5c]>",
            _IN_PROSE + r"<[|\uff5c]assistant[|\uff5c]>",
        ),
        (r"(?:^|[>\]])[ \t]*\[INST\]", r"\[/INST\]"),
        (
            _START + _ROLE + r"(?:\n|<\|end_header_id\|>)",
            r"<\|im_end\|>|<end_of_turn>|<\|eot_id\|>",
        ),
    )
]
"""Labels of questions and of answers, or the start and the end of a turn; a text with both is a
conversation. A label without ### also occurs in a prompt that quotes a dialogue, so it counts only
after an empty line. The two are searched separately, because one pattern with both would take
quadratic time."""
_KEYS_TEXT = [
    [re.compile(rf"['\"]{key}\\*['\"]\s*:") for key in pair]
    for pair in (*KEYS, ("speaker", "text"))
]

ONE_TEXT = "a conversation as one text"
NOT_JSON = "messages as text that is not JSON"
NO_ROLES = "a text without roles"
TOOLS = "a tool turn"
FIXES = {
    ONE_TEXT: "convert the texts to lists of messages with role and content",
    NOT_JSON: "write the messages as JSON",
    NO_ROLES: "set columns: to a column of conversations",
    TOOLS: "remove the conversations that use tools; only text can be trained",
    "no messages": "set columns: to the column of the conversations",
    "no answer at the end": "end each conversation with an assistant message",
    "roles do not alternate": "merge successive messages of the same role",
    "starts with an assistant message": "remove the messages before the first user message",
    "a message that is not text": "remove the rows with images or other parts that are not text",
    "a message excluded from training": "end the conversations before messages with weight 0, or "
    "set their weight to 1",
    "messages without role and content": "rename their keys to role and content",
    "unknown role": "rename the roles to system, user and assistant",
    "as many roles as texts are needed": "write one role per text",
    "two system prompts": "remove the system column or the system messages",
    "a system prompt that is not text": "write the system column as text",
    **{
        f"empty {role} message": "write the missing texts, or set columns: to their column"
        for role in ("system", "user", "assistant")
    },
}
"""Fix in the error line if no row of a data set is readable, by the most frequent reason."""


class Unreadable(Exception):
    """The reason why a row cannot be used."""

    def __init__(self, reason: str, column: str | None = None, detail: str = ""):
        super().__init__(reason)
        self.column = column
        """The missing column without which the row has no meaning."""
        self.detail = detail
        """Columns or keys of the unreadable row, for an error line."""


def parse(value: Any) -> str | list[Message]:
    """Returns the messages of a conversation in one of the forms above, or a plain text unchanged.

    Raises Unreadable if the value is neither, so that a conversation never becomes one message.
    """
    if isinstance(value, str):
        return _parse_text(value)
    if isinstance(value, dict):
        if name := _wrapper(value):
            messages = parse(value[name])
            if isinstance(messages, str):
                raise Unreadable(NO_ROLES)
            return with_system(messages, value.get("system"))
        value = _list_of(value)
    if not isinstance(value, list) or not value:
        raise Unreadable("no messages")
    messages = [_message(entry) for entry in value]
    # Some published data sets write an empty system message instead of omitting it.
    if messages[0]["role"] == "system" and not visible(messages[0]["content"]):
        del messages[0]
    if not messages:
        raise Unreadable("no answer at the end")
    return messages


def checked(messages: list[Message]) -> list[Message]:
    """Returns the messages. Raises Unreadable unless they alternate between user and
    assistant."""
    for message in messages:
        if not visible(message["content"]):
            raise Unreadable(f"empty {message['role']} message")
    roles = [m["role"] for m in messages[messages[0]["role"] == "system" :]]
    if roles[:1] == ["assistant"]:
        raise Unreadable("starts with an assistant message")
    if roles[1::2] != ["assistant"] * (len(roles) // 2) or roles[::2] != ["user"] * len(roles[::2]):
        raise Unreadable("roles do not alternate")
    if not roles or len(roles) % 2:
        raise Unreadable("no answer at the end")
    return messages


def with_system(messages: list[Message], system: Any) -> list[Message]:
    """Returns the messages, preceded by the system prompt of the row if it has one."""
    if system is None or (isinstance(system, str) and not visible(system)):
        return messages
    if not isinstance(system, str):
        raise Unreadable("a system prompt that is not text")
    first: Message = {"role": "system", "content": system}
    if messages[0]["role"] == "system" and messages[0] != first:
        raise Unreadable("two system prompts")
    return messages if messages[0] == first else [first, *messages]


def _parse_text(text: str) -> str | list[Message]:
    bare = text.strip()
    if bare.startswith(("[", "{", "(", '"', "array(")) and _holds(bare, _KEYS_TEXT):
        return _parse_literal(bare)
    for start, separator in TRANSCRIPTS.items():
        is_answer = text.startswith("\n\n") and bare.startswith("Assistant:")
        if bare.startswith(start) or is_answer:
            _, *parts = separator.split(bare)
            if "Assistant" in parts[::2] or text.startswith("\n\nHuman:"):
                return _turns(parts)
    if _OTHER_TEXT.match(bare) or _TURN.search(bare) or _holds(bare, _PARTS):
        raise Unreadable(ONE_TEXT)
    return text


def _holds(text: str, alternatives: list[list[re.Pattern[str]]]) -> bool:
    return any(all(mark.search(text) for mark in marks) for marks in alternatives)


def _parse_literal(text: str) -> list[Message]:
    """Returns the messages in a JSON or Python literal."""
    value = _literal(text)
    if isinstance(value, tuple):
        value = list(value)
    entries = value if isinstance(value, list) else [value]
    is_messages = all(isinstance(entry, dict) and _keys(entry) for entry in entries)
    if is_messages or isinstance(value, str) or (isinstance(value, dict) and _wrapper(value)):
        messages = parse(value)
        if not isinstance(messages, str):
            return messages
    raise Unreadable(NOT_JSON if value is None else ONE_TEXT)


def _wrapper(value: dict[str, Any]) -> str | None:
    """Returns the key of the conversation in an object that is neither a message nor a struct of
    lists."""
    names = (name for name in WRAPPERS if isinstance(value.get(name), list | str))
    return None if _keys(value) else next(names, None)


def _turns(parts: list[str]) -> list[Message]:
    """Returns the messages of a transcript; `parts` alternates labels and texts."""
    if len(parts) > 2 and parts[-2] == "Assistant" and not parts[-1].strip():
        parts = parts[:-2]  # a prompt ends with the label of the answer to write
    return [
        {"role": ROLES[label.lower()], "content": text.strip()}
        for label, text in zip(parts[::2], parts[1::2], strict=True)
    ]


def _list_of(value: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the messages of a struct of lists, or of one message."""
    if not (keys := _keys(value)):
        raise Unreadable("messages without role and content")
    columns = [value[key] for key in keys]
    if not all(isinstance(column, list) for column in columns):
        return [value]
    count = len(columns[0])
    if count != len(columns[1]):
        raise Unreadable("as many roles as texts are needed")
    lists = {key: v for key, v in value.items() if isinstance(v, list) and len(v) == count}
    return [{key: v[index] for key, v in lists.items()} for index in range(count)]


def _message(entry: Any) -> Message:
    if isinstance(entry, str):
        raise Unreadable(NO_ROLES)
    if not isinstance(entry, dict):
        raise Unreadable("no messages")
    if not (keys := _keys(entry)):
        raise Unreadable("messages without role and content")
    role, text = (entry[key] for key in keys)
    name = role.lower() if isinstance(role, str) else ""
    if name in TOOL_ROLES or any(entry.get(key) for key in CALLS):
        raise Unreadable(TOOLS)
    if name not in ROLES:
        raise Unreadable("unknown role", detail=f"role {shorten(str(role), 40)!r}")
    if ROLES[name] == "assistant" and any(entry.get(key) not in (None, 1) for key in UNTRAINED):
        raise Unreadable("a message excluded from training")
    if isinstance(text, list):
        text = "".join(map(_part, text))
    if not isinstance(text, str | None):
        raise Unreadable("a message that is not text")
    return {"role": ROLES[name], "content": text or ""}


def _part(part: Any) -> str:
    """Returns the text of one part of a message's content."""
    text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
    if not isinstance(text, str):
        raise Unreadable("a message that is not text")
    return text


def _keys(entry: dict[str, Any]) -> tuple[str, str] | None:
    """Returns the keys of role and text; skips null roles, which Arrow adds to messages."""
    return next((k for k in KEYS if entry.get(k[0]) is not None and k[1] in entry), None)


def _literal(text: str) -> Any:
    """Returns the value of a JSON or Python literal, or None if the text is neither."""
    for read in (json.JSONDecoder(strict=False).decode, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
            continue
    return None
