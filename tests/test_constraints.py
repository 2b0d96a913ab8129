"""Tests checkable constraints with hand-made texts that keep and break every kind."""

import random
import time

import pytest

from zephyr_ray.errors import Permanent
from zephyr_ray.models.constraints import (
    DEFAULT_KINDS,
    KINDS,
    draw,
    holds,
    phrase,
    validate,
)
from zephyr_ray.models.repetition import loops

TASK = "Name a fruit."

# kind: (constraint arguments, texts that keep it, texts that break it)
CASES: dict[str, tuple[dict, list[str], list[str]]] = {
    "uppercase": ({}, ["AN APPLE.", " \n3 RED APPLES! "], ["An APPLE.", "12 34", "苹果"]),
    "lowercase": ({}, ["an apple.", "i like figs; é too."], ["An apple.", "12 34"]),
    "one_sentence": (
        {},
        [
            "An apple is a fruit.",
            "Eat fruit, e.g. Apples, at 3.5 degrees with Dr. Smith.",
            '"Is it ripe?" she asked.',
            "Which one is ripe?!",
            'He said "Eat it."',
        ],
        [
            "An apple. A pear.",
            "an apple. a pear.",
            "an apple without an end",
            "* An apple.\n* A pear.",
            '"Eat it." They did.',
        ],
    ),
    "bullets": (
        {"n": 3},
        ["* fig\n* pear\n* plum", "Three fruits:\n\n- fig\n - pear\n* plum\n"],
        ["* fig\n* pear", "* a\n* b\n* c\n* d", "*fig\n*pear\n*plum", "* fig\n*\n* plum"],
    ),
    "numbered": (
        {"n": 2},
        ["1. fig\n2. pear", "Two fruits:\n1) fig\n2) pear"],
        ["1. fig", "1. fig\n3. pear", "2. fig\n1. pear", "1. fig 2. pear", "1. a\n2. b\n3. c"],
    ),
    "max_words": (
        {"n": 3},
        ["A ripe apple.", "- fig", "It's a fig"],
        ["A very ripe apple.", "one two three four"],
    ),
    "min_words": (
        {"n": 3},
        ["A ripe apple.", "one two three four"],
        ["An apple.", "- - an - apple -", "well-known fruit"],
    ),
    "include_word": (
        {"word": "simple"},
        ["A simple fig.", "SIMPLE!", '"simple"'],
        ["A simpler fig.", "An apple.", "oversimple"],
    ),
    "avoid_word": (
        {"word": "the"},
        ["An apple.", "Then they bathe."],
        ["The apple.", "Pick THE fig.", "an apple of the\ntree"],
    ),
    "start_with": (
        {"phrase": "In short"},
        ["In short, an apple.", "in  short: figs"],
        ["In shorts, an apple.", "An apple, in short.", "In short", '"In short, a fig"'],
    ),
    "end_with": (
        {"phrase": "Good luck!"},
        ["An apple. Good luck!", "An apple. good luck", "An apple.\nGood\nluck."],
        ["Good luck! An apple.", "Good luck!", "An apple. Very ungood luck is bad luck"],
    ),
    "quoted": (
        {},
        ['"An apple."', ' "An\napple" ', "“An apple.”"],
        ["An apple.", '"An apple', '"A" or "B"', "'An apple'", 'The "apple"'],
    ),
    "json": (
        {},
        ['{"answer": "fig"}', '```json\n{"answer": ["fig"]}\n```', '{"answer": 3, "why": "x"}'],
        [
            "{'answer': 'fig'}",
            '{"answer": ""}',
            '{"reply": "fig"}',
            '["answer"]',
            'Sure: {"answer": "fig"}',
            "[" * 100_000 + "1",
            '{"answer": null}',
        ],
    ),
    "no_commas": ({}, ["An apple.", "a; b"], ["Well, an apple.", "苹果，梨", "1,000 figs"]),
    "repeat_question": (
        {},
        ["Name a fruit. An apple.", '"name a  fruit": fig'],
        ["An apple. Name a fruit.", "Name a fruit.", "Name one fruit. An apple.", "An apple."],
    ),
    "language": (
        {"language": "Spanish"},
        [
            "La manzana es una fruta muy dulce que crece en los árboles del jardín.",
            "Me gusta mucho comer naranjas por la mañana con mi familia.",
        ],
        ["The apple is a very sweet fruit that grows on garden trees.", "12 34"],
    ),
}
KEEP = [(kind, text) for kind, (_, good, _) in CASES.items() for text in good]
BREAK = [(kind, text) for kind, (_, _, bad) in CASES.items() for text in bad]
ODD = [
    "",
    "  \n\t",
    "...",
    "\x00\ud800",
    "\u200b",
    '"',
    "\\",
    "{",
    "```json\n```",
    "\u202e(",
    "1" * 6000,
    "1" * 6000 + ". a",
]


def constraint(kind: str) -> dict:
    return {"kind": kind, **CASES[kind][0]}


def test_every_kind_has_two_texts_that_keep_it_and_two_that_break_it() -> None:
    assert set(CASES) == set(KINDS)
    assert all(len(good) >= 2 and len(bad) >= 2 for _, good, bad in CASES.values())


@pytest.mark.parametrize(("kind", "text"), KEEP)
def test_kept(kind: str, text: str) -> None:
    assert holds(constraint(kind), text, TASK)[0]


@pytest.mark.parametrize(("kind", "text"), BREAK)
def test_broken(kind: str, text: str) -> None:
    assert not holds(constraint(kind), text, TASK)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_empty_text_breaks_every_kind_and_odd_text_raises_nothing(kind: str) -> None:
    verdicts = [holds(constraint(kind), text, TASK) for text in ODD]
    assert [ok for ok, _ in verdicts[:3]] == [False] * 3
    assert all(reason for _, reason in verdicts)


@pytest.mark.parametrize(
    "text",
    [
        "." * 400_000 + "a",
        "```" + " " * 400_000 + "a",
        "a" + "\n" * 400_000 + "a",
        "ab " * 400_000,
        "* \n" * 400_000,
    ],
    ids=["stops", "fence", "lines", "words", "bullets"],
)
def test_hostile_text_takes_linear_time(text: str) -> None:
    """Takes about two seconds; in quadratic time it would take many minutes on any machine."""
    start = time.process_time()
    for kind in set(KINDS) - {"language"}:
        holds(constraint(kind), text, TASK)
    loops(text)
    assert time.process_time() - start < 60


def test_reason_says_what_was_asked_and_found() -> None:
    assert holds({"kind": "bullets", "n": 3}, "* fig\n* plum", TASK) == (
        False,
        "3 bullets asked for, 2 found",
    )


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ({"kind": "rhyme"}, "rhyme"),
        ({"kind": ["json"]}, "json"),
        ({"n": 3}, "no kind"),
        ({"kind": "bullets"}, "lacks n"),
        ({"kind": "bullets", "n": 0}, "whole number"),
        ({"kind": "bullets", "n": True}, "whole number"),
        ({"kind": "bullets", "n": "3"}, "whole number"),
        ({"kind": "numbered", "n": 30_000_000}, "n must be a whole number from 1 to 9999"),
        ({"kind": "min_words", "n": 10**400}, "n must be a whole number from 1 to 9999"),
        ({"kind": "end_with", "phrase": "a" * 201}, "at most 200 characters"),
        ({"kind": "uppercase", "n": 3}, "takes no n"),
        ({"kind": "include_word", "word": " "}, "text with at least one word"),
        ({"kind": "language", "language": "Klingon"}, "English, Spanish, French"),
    ],
)
def test_malformed_constraint_is_named(bad: dict, named: str) -> None:
    with pytest.raises(Permanent, match=named):
        validate(bad)
    with pytest.raises(Permanent, match=named):
        holds(bad, "An apple.", TASK)


def test_draw_is_seeded_and_gives_every_default_kind() -> None:
    drawn = [draw(random.Random(seed), TASK) for seed in range(400)]
    assert drawn == [draw(random.Random(seed), TASK) for seed in range(400)]
    assert {item["kind"] for item, _ in drawn} == set(DEFAULT_KINDS) == set(KINDS) - {"language"}
    for item, _ in drawn:
        validate(item)


def test_draw_keeps_to_the_kinds_asked_for() -> None:
    item, sentence = draw(random.Random(0), TASK, ["language"])
    assert item["kind"] == "language"
    assert item["language"] in sentence
    with pytest.raises(Permanent, match="rhyme"):
        draw(random.Random(0), TASK, ["rhyme"])


def test_draw_takes_no_word_the_instruction_has() -> None:
    task = "Why do people enjoy simple games together?"
    words = {draw(random.Random(s), task, ["include_word"])[0]["word"] for s in range(200)}
    assert words == {"because", "often", "small", "today"}


@pytest.mark.parametrize("kind", KINDS)
def test_every_phrasing_names_its_arguments(kind: str) -> None:
    sentences = {phrase(random.Random(seed), constraint(kind)) for seed in range(60)}
    assert len(sentences) == len(KINDS[kind].phrasings) >= 2
    for sentence in sentences:
        assert all(str(value) in sentence for value in CASES[kind][0].values())


@pytest.mark.parametrize(
    "text",
    [
        "Eat well.\nEat well.\nEat well.",
        "1. Sleep\n2. Sleep\n3. sleep",
        "I like to eat figs every day and " * 3,
        "ha " * 8,
        "no" * 12,
    ],
)
def test_loops(text: str) -> None:
    assert loops(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n\n\n\n",
        "Eat well.\nEat well.",
        "Name a fruit that grows on trees. A fruit that grows on trees is an apple.",
        "* Eat fruit.\n* Eat nuts.\n* Eat greens.",
        "ha " * 7,
        "no" * 11,
        "1000000000000000000",
        "It was a very, very, very long day.",
    ],
)
def test_no_loop(text: str) -> None:
    assert not loops(text)
