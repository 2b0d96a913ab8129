"""Detects answers that continue with another turn of the conversation."""

import re

_MARKERS = re.compile(
    r"<\|(?:system|user|assistant|im_start|im_end|start_header_id|end_header_id)\|>"
    r"|<(?:start|end)_of_turn>|\[/?INST\]|<<SYS>>"
    r"|^[ \t]*#{2,}[ \t]*(?:System|Human|User|Assistant|Instruction|Response)[ \t]*:"
    r"|^[ \t]*(?:Human|User|Assistant):",
    re.MULTILINE,
)
"""Markers of the chat formats Zephyr, ChatML, Llama, Gemma, Mistral, Alpaca and Vicuna, and speaker
names at the start of a line."""


def leaks_role(text: str) -> bool:
    """Returns whether an answer contains a role marker. Known false positive: a dialogue that the
    prompt asked for, if its speakers are called Human, User or Assistant."""
    return _MARKERS.search(text) is not None
