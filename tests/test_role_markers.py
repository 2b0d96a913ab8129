"""Tests the detection of role markers in answers."""

import pytest

from zephyr_ray.models.role_markers import leaks_role


@pytest.mark.parametrize(
    "text",
    [
        "Paris.</s>\n<|user|>\nAnd of Spain?",
        "<|assistant|>Paris.",
        "Paris.<|im_end|>\n<|im_start|>user",
        "Paris.<end_of_turn>",
        "Paris. [INST] And of Spain? [/INST]",
        "Paris.\n### Human: And of Spain?",
        "Paris.\n\n### Instruction:\nName another.",
        "Paris.\nUser: And of Spain?",
        "  Assistant: Paris.",
    ],
)
def test_a_role_marker_is_a_leak(text: str) -> None:
    assert leaks_role(text)


@pytest.mark.parametrize(
    "text",
    [
        "Paris.",
        "The User: a study of people",
        "User guides help.",
        "Ask the assistant: it knows.",
        "user: admin\npassword: none",
        "### Summary: Paris",
        "# User guide",
        "a < b | c > d",
        "",
    ],
)
def test_other_text_is_not_a_leak(text: str) -> None:
    assert not leaks_role(text)
