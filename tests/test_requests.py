"""Request bodies as rows of the judge, with their defaults."""

import json

from zephyr_ray.judges import FORMS
from zephyr_ray.serve.requests import judge_request, parse


def test_a_judged_prompt_may_omit_instruction_and_constraint() -> None:
    body = {"requests": [{"prompt": "Name a pet.", "completion": {"text": "a cat"}}]}
    [rating] = parse(judge_request(FORMS["score"].fields), json.dumps(body).encode()).requests
    assert rating.row() == {
        "prompt": "Name a pet.", "instruction": "Name a pet.", "constraint": None,
    }  # fmt: skip
    assert rating.completion.model_dump() == {"text": "a cat", "finish_reason": "stop"}


def test_a_judged_prompt_keeps_its_instruction_and_constraint() -> None:
    given = {"prompt": "Name a pet in CAPITALS.", "instruction": "", "constraint": {"kind": "x"}}
    body = {"requests": [{**given, "first": {"text": "A"}, "second": {"text": "B"}}]}
    [comparison] = parse(
        judge_request(FORMS["pairwise"].fields), json.dumps(body).encode()
    ).requests
    assert comparison.row() == given
    assert (comparison.first.text, comparison.second.text) == ("A", "B")
