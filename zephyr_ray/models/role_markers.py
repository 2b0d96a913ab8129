"""Detects answers that go on with another turn of the conversation."""

import re

_MARKERS = re.compile(
    r"<\|(?:system|user|assistant|im_start|im_end|start_header_id|end_header_id)\|>"
    r"|<(?:start|end)_of_turn>|\[/?INST\]|<<SYS>>"
    r"|^[ \t]*#{2,}[ \t]*(?:System|Human|User|Assistant|Instruction|Response)[ \t]*:"
    r"|^[ \t]*(?:Human|User|Assistant):",
    re.MULTILINE,
)
"""Markers of the chat formats of Zephyr, ChatML, Llama, Gemma and Mistral, of Alpaca and Vicuna,
and the names of speakers at the start of a line."""


def leaks_role(text: str) -> bool:
    """Returns whether an answer contains a marker of a role. A dialogue that the prompt asked for
    counts too, if its speakers have these names."""
    return _MARKERS.search(text) is not None
