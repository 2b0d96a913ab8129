"""Tests cleaning with a judge: its requests, its scores, and where dialogues are cut."""

from pathlib import Path
from typing import Any

import pytest
from in_process import run, run_here, work_on

from zephyr_ray.engines.model import Model
from zephyr_ray.engines.rules import RulesSettings
from zephyr_ray.messages import Message, assistant, user
from zephyr_ray.stage import Work
from zephyr_ray.text import cleaning
from zephyr_ray.text.cleaning import Clean

SYSTEM = {"role": "system", "content": "Be brief."}
Row = dict[str, Any]


class Grades:
    """A judge that gives some texts a score and all others 10; `requests` records its calls."""

    def __init__(self, scores: dict[str, float | None]):
        self._scores = scores
        self.requests: list[tuple[str, Row, list[Row]]] = []

    def ask_for(self, model: Model, row: Row) -> "Grades":
        return self

    async def judge(self, form: str, row: Row, answers: list[Row]) -> Row:
        self.requests.append((form, row, answers))
        [answer] = answers
        return {"score": self._scores.get(answer["text"], 10), "reason": "", "checks": {}}


def dialogue(name: str, *messages: Message, constraint: Row | None = None) -> Row:
    return {"id": name, "messages": list(messages), "constraint": constraint}


def question(text: str, stated: str = "") -> Message:
    """Returns a user message: a task, then the sentence that states its constraint."""
    return user(f"{text}{stated}", instruction=text)


def answer(text: str, finish_reason: str = "stop") -> Message:
    return assistant(text, finish_reason=finish_reason)


def clean(folder: Path, rows: list[Row], **settings: Any) -> tuple[dict[str, Row], Work]:
    work = work_on(folder, dialogues=rows)
    work.models = {"judge": Model("judge", RulesSettings())}
    cleaned = run(Clean(dialogues="dialogues", judge="judge", **settings), work)
    return {row["id"]: row for row in cleaned}, work


def texts(row: Row) -> list[str]:
    return [message["content"] for message in row["messages"]]


def judged_by(monkeypatch: pytest.MonkeyPatch, **scores: float | None) -> Grades:
    judge = Grades({f"{name}.": score for name, score in scores.items()})
    run_here(monkeypatch, cleaning, judge)
    return judge


def test_an_answer_of_exactly_min_score_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged_by(monkeypatch, Above=8.5, Exact=8, Below=7.9)
    names = ("Above", "Exact", "Below")
    rows = [dialogue(n, question(f"Say {n}!"), answer(f"{n}.")) for n in names]
    cleaned, work = clean(tmp_path, rows, min_score=8)
    assert list(cleaned) == ["Above", "Exact"]
    assert work.counts["dropped/answer below min_score"] == 1
    assert work.examples["dropped/answer below min_score"] == [
        {"prompt": "Say Below!", "answer": "Below.", "left": "nothing"}
    ]


def test_only_full_marks_stay_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judged_by(monkeypatch, Ten=10, Nine=9.9)
    rows = [dialogue(n, question(f"Say {n}!"), answer(f"{n}.")) for n in ("Ten", "Nine")]
    assert list(clean(tmp_path, rows)[0]) == ["Ten"]


def test_an_answer_without_a_score_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judged_by(monkeypatch, Two=None)
    row = dialogue("d", question("One?"), answer("One."), question("Two?"), answer("Two."))
    cleaned, work = clean(tmp_path, [row], min_score=1)
    assert texts(cleaned["d"]) == ["One?", "One."]
    assert work.counts["dropped/answer not scored"] == 1


def test_the_judge_is_asked_about_each_prompt_as_it_was_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = judged_by(monkeypatch)
    constraint = {"kind": "max_words", "n": 9}
    stated = " Use at most 9 words."
    row = dialogue(
        "d",
        *(question("Name a pet.", stated), answer("A cat.")),
        *(question("Why?", stated), answer("It p", "length")),
        constraint=constraint,
    )
    clean(tmp_path, [row])
    assert [form for form, _, _ in judge.requests] == ["score", "score"]
    facts = ("instruction", "prompt", "constraint")
    assert [[request[name] for name in facts] for _, request, _ in judge.requests] == [
        ["Name a pet.", "Name a pet. Use at most 9 words.", constraint],
        ["Why?", "Why? Use at most 9 words.", constraint],
    ]
    assert [answers for _, _, answers in judge.requests] == [
        [{"text": "A cat.", "finish_reason": "stop"}],
        [{"text": "It p", "finish_reason": "length"}],
    ]


def test_after_a_system_message_each_answer_is_judged_with_its_own_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = judged_by(monkeypatch, Two=3)
    row = dialogue(
        "d",
        *(SYSTEM, question("One?"), answer("One.")),
        *(question("Two?"), answer("Two."), question("Three?"), answer("Three.")),
    )
    cleaned, _ = clean(tmp_path, [row])
    assert [(request["prompt"], answers[0]["text"]) for _, request, answers in judge.requests] == [
        ("One?", "One."),
        ("Two?", "Two."),
        ("Three?", "Three."),
    ]
    # Cut before the question whose answer is bad.
    assert texts(cleaned["d"]) == ["Be brief.", "One?", "One."]


def test_a_bad_first_answer_drops_a_dialogue_with_a_system_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged_by(monkeypatch, Bad=1)
    rows = [
        dialogue("bad", SYSTEM, question("One?"), answer("Bad.")),
        dialogue("good", SYSTEM, question("One?"), answer("Good.")),
    ]
    cleaned, work = clean(tmp_path, rows)
    assert list(cleaned) == ["good"] and work.counts["dropped dialogues"] == 1


def test_the_rules_judge_gets_the_bare_instruction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_here(monkeypatch, cleaning)
    stated = " First repeat this request word for word, then answer it."
    repeat = {"kind": "repeat_question"}
    ask = question("Name a pet.", stated)
    rows = [
        dialogue("kept", ask, answer("Name a pet. A cat."), constraint=repeat),
        dialogue("broken", ask, answer("A cat."), constraint=repeat),
        dialogue("cut off", ask, answer("Name a pet. A dog.", "length"), constraint=repeat),
    ]
    assert list(clean(tmp_path, rows)[0]) == ["kept"]


def test_the_bare_instruction_is_compared_with_held_out_prompts(tmp_path: Path) -> None:
    ask = question("Name a pet.", " First repeat this request word for word, then answer it.")
    messages = [question("Hi?"), answer("Hello."), ask, answer("A cat.")]
    # With the constraint, 3 of 13 words are common: ROUGE-L F = 2 * 3 / (3 + 13) = 0.38.
    held_out = [{"instruction": "Name a pet."}]
    work = work_on(tmp_path, dialogues=[dialogue("d", *messages)], heldout=held_out)
    [row] = run(Clean(dialogues="dialogues", apart_from="heldout"), work)
    assert texts(row) == ["Hi?", "Hello."]
    assert work.counts["dropped/near a held-out prompt"] == 1


@pytest.mark.parametrize(
    ("first", "second", "count"),
    [
        (("Q?", "A."), ("q?", "a."), 1),  # in any casing
        (("Q?", "A."), ("Q?", "B."), 2),
        (("Q?", "A."), ("R?", "A."), 2),
        (("Q?", "A.", "More?", "Yes."), ("Q?", "A.", "Else?", "No."), 1),  # the first exchange
    ],
)
def test_dialogues_that_begin_alike_are_duplicates(
    first: tuple[str, ...],
    second: tuple[str, ...],
    count: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    judged_by(monkeypatch)
    rows = [
        dialogue(name, *(answer(t) if i % 2 else question(t) for i, t in enumerate(texts)))
        for name, texts in (("first", first), ("second", second))
    ]
    cleaned, work = clean(tmp_path, rows)
    assert list(cleaned) == ["first", "second"][:count]
    assert work.counts.get("dropped/duplicate", 0) == 2 - count


def test_a_duplicate_has_the_same_system_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged_by(monkeypatch)
    rows = [
        dialogue(name, {"role": "system", "content": text}, question("Q?"), answer("A."))
        for name, text in [("a", "Be brief."), ("b", "Be kind."), ("c", "Be brief.")]
    ]
    assert list(clean(tmp_path, rows)[0]) == ["a", "b"]
