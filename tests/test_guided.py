"""Tests the grammars that make answers follow a JSON schema, as xgrammar reads them."""

import asyncio
import json
from typing import Any

import pytest
from xgrammar import Grammar
from xgrammar.testing import _is_grammar_accept_string

from zephyr_ray.engines.guided import grammar
from zephyr_ray.judges import FORMS, judge, unreadable
from zephyr_ray.messages import Message
from zephyr_ray.models.contract import Reply

TEXT = {"type": "string"}
SCORE = {"type": "integer", "minimum": 1, "maximum": 10}


def object_schema(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": [*properties]}


VERDICT = object_schema(rationale=TEXT, score=SCORE)
RANKS = [[{"model": "a", "rank": rank}, {"model": "b", "rank": 3 - rank}] for rank in (1, 2)]


def accepts(schema: dict[str, Any], answer: str, max_tokens: int | None = None) -> bool:
    guide = Grammar.from_ebnf(grammar(schema, max_tokens))
    return bool(_is_grammar_accept_string(guide, answer))


@pytest.mark.parametrize("letter", ["x", "é", "😀"])
def test_a_limited_text_fits_in_any_language(letter: str) -> None:
    # Without the text, 33 of 256 tokens: {} 2, the keys 15 and 11, "" 2, the number 2, the end 1.
    # A character takes up to 4, so 55 fit.
    for length in (0, 55, 56):
        answer = json.dumps({"rationale": letter * length, "score": 10}, ensure_ascii=False)
        assert accepts(VERDICT, answer, 256) is (length <= 55)
        assert accepts(VERDICT, answer)


@pytest.mark.parametrize("tokens", [256, 1000])
def test_several_texts_share_the_limit(tokens: int) -> None:
    parts = object_schema(quality={"enum": ["good", "bad"]}, why=TEXT, sure={"type": "boolean"})
    schema = {"type": "array", "items": {"anyOf": [parts, {"const": None}]}, "maxItems": 3}

    def answer(length: int) -> str:
        row = {"quality": "good", "why": "😀" * length, "sure": False}
        return json.dumps([row] * 3, ensure_ascii=False)

    length = max(n for n in range(100) if accepts(schema, answer(n), tokens))
    tokens_of_bytes = len(answer(length).encode()) + 1
    assert tokens - 20 < tokens_of_bytes <= tokens


def test_enum_values_count_by_their_bytes() -> None:
    schema = object_schema(mood={"enum": ["😀" * 20]}, why=TEXT)
    for length in (0, 10, 20, 30, 40):
        answer = json.dumps({"mood": "😀" * 20, "why": "😀" * length}, ensure_ascii=False)
        if accepts(schema, answer, 200):
            assert len(answer.encode()) + 1 <= 200


@pytest.mark.parametrize("text", ["", 'say "no"', "a\nb\tc\\", "é 😀", '"' * 20, "/ [x] {y}"])
def test_texts_are_json_with_quotes_and_line_breaks(text: str) -> None:
    assert accepts(VERDICT, json.dumps({"rationale": text, "score": 1}, ensure_ascii=False))


@pytest.mark.parametrize(
    "answer",
    [
        '{"rationale": "a"b", "score": 1}',
        '{"rationale": "a\nb", "score": 1}',
        '{"rationale": "a\\", "score": 1}',
        '{"rationale": "a", "score": 0}',
        '{"rationale": "a", "score": 11}',
        '{"rationale": "a", "score": 1} ',
        '{"rationale": "a",  "score": 1}',
        '{"score": 1, "rationale": "a"}',
        '{"rationale": "a"}',
    ],
)
def test_an_answer_that_violates_the_schema_is_rejected(answer: str) -> None:
    assert not accepts(VERDICT, answer)


def test_lists_respect_min_items_and_max_items() -> None:
    for least, most in ((0, 2), (1, 1), (2, 3)):
        schema = {"type": "array", "items": SCORE, "minItems": least, "maxItems": most}
        counts = [n for n in range(5) if accepts(schema, json.dumps([7] * n))]
        assert counts == list(range(least, most + 1))


def test_a_ranking_is_one_of_the_enum_values() -> None:
    assert all(accepts({"enum": RANKS}, json.dumps(ranks)) for ranks in RANKS)
    assert not accepts({"enum": RANKS}, json.dumps([RANKS[0][0], RANKS[1][1]]))


@pytest.mark.parametrize("form", sorted(FORMS.keys() - {"token", "brackets"}))
def test_every_json_form_has_a_grammar_and_reads_answers_that_follow_it(form: str) -> None:
    schemas: list[dict[str, Any]] = []

    async def ask(messages: list[Message], *, max_tokens: int, schema: Any, **_: Any) -> Reply:
        for limit in (None, max_tokens):
            Grammar.from_ebnf(grammar(schema, limit))
        schemas.append(schema)
        answer = json.dumps(example(schema))
        assert accepts(schema, answer) and accepts(schema, answer, max_tokens)
        return Reply(answer, "stop")

    answers = [{"text": text, "finish_reason": "stop"} for text in ("cat", "dog")]
    row = {"prompt": "Name a pet.", "constraint": None, "order_seed": "p1"}
    fields = FORMS[form].fields
    judged = answers if fields is None else answers[: len(fields)]
    judgement = asyncio.run(judge(form, row, judged, ask, {}))
    assert schemas and unreadable(judgement) is None


def example(schema: dict[str, Any]) -> Any:
    """Returns a value that follows the schema."""
    if "enum" in schema:
        return schema["enum"][0]
    if "anyOf" in schema:
        return example(schema["anyOf"][0])
    if schema["type"] == "object":
        return {name: example(part) for name, part in schema["properties"].items()}
    return {"string": "a text", "integer": schema.get("minimum")}[schema["type"]]
