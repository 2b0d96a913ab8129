"""Reads the text of an answer from the message of a chat completion."""

from typing import Any

from zephyr_ray.messages import encodable

REASONING = ("reasoning", "reasoning_content")
"""Fields of a message that hold the reasoning, as servers name them."""


def read_text(message: dict[str, Any], was_cut: bool) -> str | None:
    """Returns the text, "" if the tokens were spent on reasoning, None if there is no text.

    vLLM states null if the reasoning of an answer has no end, Mistral's reasoning models a list of
    parts, some of type "thinking".
    """
    content = message.get("content")
    if content is None:
        reasoned = any(message.get(name) and isinstance(message[name], str) for name in REASONING)
        return "" if was_cut or reasoned else None
    if isinstance(content, str):
        return encodable(content)
    parts = content if isinstance(content, list) else []
    texts = [text for part in parts if (text := _text_of(part)) is not None]
    return encodable("".join(texts)) if texts and len(texts) == len(parts) else None


def _text_of(part: Any) -> str | None:
    """Returns the text of a part, "" if it is reasoning, None if it is anything else."""
    if not isinstance(part, dict):
        return None
    if part.get("type") == "thinking":
        return ""
    text = part.get("text") if part.get("type") == "text" else None
    return text if isinstance(text, str) else None
