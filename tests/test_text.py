"""Tests row programs of text stages with a scripted model, and other parts against hand-computed
values."""

import asyncio
import json
import math
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from in_process import Scripted, run, run_here, work_on

from zephyr_ray import model_pool
from zephyr_ray.engines.model import Model
from zephyr_ray.engines.rules import RulesSettings
from zephyr_ray.engines.vllm import VllmSettings
from zephyr_ray.errors import Permanent
from zephyr_ray.manifest import Manifest
from zephyr_ray.messages import assistant, plain, user
from zephyr_ray.models.constraint_kinds import KINDS
from zephyr_ray.models.contract import Reply
from zephyr_ray.models.similarity import SimilarityIndex, diversity
from zephyr_ray.principles import draw
from zephyr_ray.section import Text
from zephyr_ray.stage import Work
from zephyr_ray.store import Artifact, read_jsonl
from zephyr_ray.text import feedback
from zephyr_ray.text.cleaning import Clean
from zephyr_ray.text.completions import complete
from zephyr_ray.text.dialogues import self_refine
from zephyr_ray.text.feedback import Feedback
from zephyr_ray.text.preferences import Chosen, Preferences
from zephyr_ray.text.prompts import Prompts, SelfInstruct, invent, read_list
from zephyr_ray.text.votes import Votes


def instructions(row: dict[str, Any]) -> list[str]:
    return [m["instruction"] for m in row["messages"] if m["role"] == "user"]


def finish_reasons(row: dict[str, Any]) -> list[str]:
    return [m["finish_reason"] for m in row["messages"] if m["role"] == "assistant"]


# Row programs


def test_self_refine_asks_in_the_papers_order() -> None:
    row = {"id": "p1", "instruction": "Name a pet.", "prompt": "Name a pet. Use no commas."}
    ask = Scripted(
        "A cat.", '"What does it eat?"\nI hope so.', "Fish.", "Where does it sleep?", "In"
    )
    result = asyncio.run(self_refine(row, ask, turns=3, max_tokens=9))
    first, refine_1, second, refine_2, third = ask.requests
    dialogue = [user("Name a pet. Use no commas."), assistant("A cat.")]
    assert first == (dialogue[:1], 9, True)
    # The teacher refines from (x⁰, y⁰) alone, without the conversation or its demonstrations.
    [question] = refine_1[0]
    assert "Name a pet." in question["content"] and "A cat." in question["content"]
    assert "commas" not in question["content"] and refine_1[2] is False
    dialogue += [user("What does it eat? Use no commas."), assistant("Fish.")]
    assert second == (dialogue[:3], 9, True)
    assert "What does it eat?" in refine_2[0][0]["content"]
    assert "Fish." in refine_2[0][0]["content"] and "A cat." not in refine_2[0][0]["content"]
    dialogue += [user("Where does it sleep? Use no commas."), assistant("In")]
    assert third == (dialogue[:5], 9, True)
    assert plain(result["messages"]) == dialogue
    assert instructions(result) == ["Name a pet.", "What does it eat?", "Where does it sleep?"]
    assert finish_reasons(result) == ["stop", "stop", "stop"]
    assert result["id"] == "p1"


def test_self_refine_keeps_the_question_when_the_teacher_is_silent() -> None:
    row = {"id": "p1", "instruction": "Name a pet.", "prompt": "Name a pet."}
    ask = Scripted("A cat.", " \n", Reply("A d", "length"))
    result = asyncio.run(self_refine(row, ask, turns=2, max_tokens=9))
    assert instructions(result) == ["Name a pet.", "Name a pet."]
    assert finish_reasons(result) == ["stop", "length"]


def test_invent_shows_eight_tasks_at_most_two_machine_made() -> None:
    seeds = [f"seed task {n}" for n in range(20)]
    ask = Scripted(
        "9. made one\n10. made two\n11. made three",
        Reply("9. made four\n10. cut o", "length"),
    )
    result = asyncio.run(invent({"id": "r1", "seed": 0.5}, ask, seeds=seeds))
    assert result == {
        "id": "r1",
        "instructions": ["made one", "made two", "made three", "made four"],
    }
    machine_made = []
    for messages, _, with_demonstrations in ask.requests:
        listed = [line for line in messages[0]["content"].splitlines() if line[:1].isdigit()]
        assert [int(line.split(".")[0]) for line in listed] == list(range(1, 9))
        assert "list from 9" in messages[0]["content"]
        assert len(set(listed)) == 8 and not with_demonstrations
        machine_made.append(sum("made" in line for line in listed))
    assert machine_made == [0, 2]


def test_invent_is_the_same_for_the_same_row() -> None:
    def first_request(seed: float) -> str:
        ask = Scripted("1. a", "1. b", "1. c")
        row = {"id": "r", "seed": seed}
        asyncio.run(invent(row, ask, seeds=[f"task {n}" for n in range(50)]))
        return ask.requests[0][0][0]["content"]

    assert first_request(0.25) == first_request(0.25) != first_request(0.75)


@pytest.mark.parametrize(
    ("text", "complete_", "items"),
    [
        ("9. Name a pet.\n10) Name a tree.", True, ["Name a pet.", "Name a tree."]),
        ("9. Name a pet.\n10) Name a tr", False, ["Name a pet."]),
        ("Here you are:\n\n  1. **Name a pet.**\n- 'Sing.'\n* Run.\nBye", True,
         ["Name a pet.", "Sing.", "Run."]),
        ("1.5 metres are long\n2.\n3. ", True, []),
        ("", False, []),
    ],
)  # fmt: skip
def test_read_list(text: str, complete_: bool, items: list[str]) -> None:
    assert read_list(text, complete=complete_) == items


def test_complete_puts_the_principle_in_the_system_prompt() -> None:
    ask = Scripted("A cat.")
    row = {"id": "p1/0", "member": "base", "sample": 0, "prompt": "Name a pet.", "source": "t1"}
    answer = asyncio.run(complete(row, ask, max_tokens=7, principles=True, seed=3))
    principle = draw(3, row)
    assert ask.requests == [
        ([{"role": "system", "content": principle.system}, user("Name a pet.")], 7, True)
    ]
    assert answer == {
        "id": "p1/0",
        "model": "base",
        "principle": principle.name,
        "system": principle.system,
        "text": "A cat.",
        "finish_reason": "stop",
        "tokens": 3,
    }


def test_complete_without_a_principle_has_no_system_prompt() -> None:
    ask = Scripted("A cat.")
    row = {"id": "p1/0", "member": "base", "sample": 0, "prompt": "Name a pet."}
    asyncio.run(complete(row, ask, max_tokens=7))
    assert ask.requests[0][0] == [user("Name a pet.")]


# Similarity


@pytest.mark.parametrize(
    ("a", "b", "score"),
    [
        ("the cat sat down", "the cat sat down", 1.0),
        ("The cat, sat down!", "the CAT sat down", 1.0),  # words only, in lower case
        ("the cat sat", "the dog sat", 2 / 3),  # LCS "the sat": 2·2/(3+3)
        ("a b c d", "d c b a", 0.25),  # LCS is one word: 2·1/(4+4)
        ("a b c d e f", "a b", 0.5),  # 2·2/(6+2)
        ("one two", "three four", 0.0),
        ("don't stop", "dont stop", 0.5),
    ],
)
def test_rouge_l_by_hand(a: str, b: str, score: float) -> None:
    assert SimilarityIndex([a]).nearest(b) == pytest.approx(score)


def test_nearest_is_the_most_similar_text() -> None:
    index = SimilarityIndex(["a b c", "a b x"])
    assert index.nearest("a b c d") == pytest.approx(6 / 7)
    index.add("a b c d")
    assert index.nearest("a b c d") == 1.0
    assert index.nearest("a y z", cutoff=0.7) == 0.0
    assert SimilarityIndex([]).nearest("a b") == 0.0


def test_rouge_l_equals_the_textbook_algorithm() -> None:
    def textbook(a: list[str], b: list[str]) -> float:
        row = [0] * (len(b) + 1)
        for x in a:
            before = row
            row = [0]
            for j, y in enumerate(b):
                row.append(before[j] + 1 if x == y else max(before[j + 1], row[j]))
        return 2 * row[-1] / (len(a) + len(b))

    rng = random.Random(0)
    for _ in range(100):
        a, b = ([rng.choice("abcde") for _ in range(rng.randint(1, 12))] for _ in range(2))
        assert SimilarityIndex([" ".join(a)]).nearest(" ".join(b)) == pytest.approx(textbook(a, b))


def test_diversity_of_three_texts_by_hand() -> None:
    # write a poem | write a song | name three birds: 9 words, 7 distinct; 6 bigrams, 5 distinct.
    figures = diversity(["Write a poem.", "Write a song.", "Name three birds."])
    assert figures["distinct_1"] == 7 / 9
    assert figures["distinct_2"] == 5 / 6
    assert figures["nearest_max"] == pytest.approx(2 / 3)
    assert figures["nearest_mean"] == pytest.approx((2 / 3 + 2 / 3 + 0) / 3)
    assert figures["openings"] == 2.0
    bits = 2 / 3 * math.log2(3 / 2) + 1 / 3 * math.log2(3)
    assert figures["openings_bits"] == pytest.approx(bits)


def test_diversity_of_one_text_and_of_none() -> None:
    assert diversity([]) == {}
    one = diversity(["Write a poem."])
    assert (one["nearest_max"], str(one["openings_bits"])) == (0.0, "0.0")


# Prompts


def seeds_file(folder: Path, *tasks: dict[str, Any]) -> dict[str, Path]:
    path = folder / "seeds.jsonl"
    path.write_text("\n".join(map(json.dumps, tasks)))
    return {"seeds": path}


def test_prompts_carry_their_own_constraint_or_a_drawn_one(tmp_path: Path) -> None:
    work = work_on(tmp_path)
    own = {"kind": "max_words", "n": 9}
    work.files = seeds_file(
        tmp_path,
        {"id": "s1", "instruction": " Name a pet. ", "constraint": own},
        {"instruction": "Name a tree."},
        {"instruction": "Name a bird."},
    )
    first, second = run(Prompts(seeds="seeds.jsonl", count=2, seed=1), work)
    assert (first["id"], first["source"], first["constraint"]) == ("p00000", "s1", own)
    assert first["instruction"] == "Name a pet."
    assert first["prompt"].startswith("Name a pet. ") and "9 words" in first["prompt"]
    assert second["constraint"]["kind"] and second["source"] == "generated"
    assert second["prompt"].startswith("Name a tree. ") and second["prompt"] != "Name a tree. "
    assert work.counts["rows"] == 2


def test_prompts_without_constraints(tmp_path: Path) -> None:
    work = work_on(tmp_path)
    work.files = seeds_file(tmp_path, {"instruction": "Name a tree."})
    [row] = run(Prompts(seeds="seeds.jsonl", constrained=0), work)
    assert (row["constraint"], row["prompt"]) == (None, "Name a tree.")


VERSE, QUESTIONS = "写一首诗", "1. First question\n2. Second"


@pytest.mark.parametrize("text", [VERSE, QUESTIONS, "Translate to French: Hello", "Hi"])
def test_an_instruction_without_a_constraint_is_used_as_written(text: str, tmp_path: Path) -> None:
    work = work_on(tmp_path)
    work.files = seeds_file(tmp_path, {"instruction": f" {text}\n"})
    [row] = run(Prompts(seeds="seeds.jsonl", constrained=0), work)
    assert (row["instruction"], row["prompt"]) == (text, text)


@pytest.mark.parametrize(
    ("text", "instruction", "between"),
    [
        ("Name a tree", "Name a tree.", " "),
        ("Name a tree!", "Name a tree!", " "),
        (VERSE, VERSE, "\n\n"),
        (QUESTIONS, QUESTIONS, "\n\n"),
    ],
)
def test_a_constraint_follows_the_instruction(
    text: str, instruction: str, between: str, tmp_path: Path
) -> None:
    work = work_on(tmp_path)
    work.files = seeds_file(tmp_path, {"instruction": text, "constraint": {"kind": "json"}})
    [row] = run(Prompts(seeds="seeds.jsonl"), work)
    assert row["instruction"] == instruction
    sentences = KINDS["json"].phrasings
    assert row["prompt"] in [f"{instruction}{between}{words.format()}" for words in sentences]


TASKS = [{"instruction": f"Name {n} kinds of trees."} for n in range(400)]


def test_the_first_tasks_are_the_prompts(tmp_path: Path) -> None:
    for count, rows in ((None, 400), (7, 7), (400, 400)):
        (tmp_path / str(count)).mkdir()
        work = work_on(tmp_path / str(count))
        work.files = seeds_file(tmp_path, *TASKS)
        prompts = run(Prompts(seeds="seeds.jsonl", count=count), work)
        assert [row["instruction"] for row in prompts] == [t["instruction"] for t in TASKS[:rows]]


def drawn(folder: Path, stage: Prompts | SelfInstruct, *tasks: dict[str, Any]) -> list[Any]:
    """Returns the prompts and constraints that a stage draws for its tasks."""
    folder.mkdir()
    work = work_on(folder)
    work.files = seeds_file(folder, *tasks)
    return [(row["prompt"], row["constraint"]) for row in run(stage, work)]


def test_the_seed_draws_the_constraints_of_prompts(tmp_path: Path) -> None:
    stages = [Prompts(seeds="seeds.jsonl", seed=seed) for seed in (1, 1, 2)]
    one, same, other = (drawn(tmp_path / str(n), s, *TASKS) for n, s in enumerate(stages))
    assert one == same != other


def test_constrained_is_the_share_of_prompts_with_a_constraint(tmp_path: Path) -> None:
    own = {"kind": "json"}
    tasks = [*TASKS, *({**task, "constraint": own} for task in TASKS[:10])]
    prompts = drawn(tmp_path / "a", Prompts(seeds="seeds.jsonl", constrained=0.25), *tasks)
    count = sum(constraint is not None for _, constraint in prompts[:400])
    # 100 are expected, with a standard deviation of sqrt(400 · 1/4 · 3/4) = 9; allow four.
    assert 65 < count < 135
    assert [constraint for _, constraint in prompts[400:]] == [own] * 10
    every = drawn(tmp_path / "b", Prompts(seeds="seeds.jsonl"), *tasks)
    assert all(constraint for _, constraint in every)


class Inventor:
    """A model that lists dissimilar tasks; `requests` holds the prompts it got."""

    def __init__(self) -> None:
        self.requests: list[str] = []

    def ask_for(self, model: Model, row: dict[str, Any]) -> Any:
        async def ask(messages: list[Any], *, max_tokens: int, with_demonstrations: bool) -> Reply:
            self.requests.append(messages[0]["content"])
            numbers = range(8 * len(self.requests), 8 * len(self.requests) + 8)
            return Reply("\n".join(f"9. Explain a{n} b{n} c{n} d{n}" for n in numbers), "stop")

        return ask


def self_instruct(
    folder: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any
) -> tuple[list[str], list[Any], dict[str, float]]:
    """Returns the requests to the model, the prompts made from 20 seed tasks, and the counts."""
    folder.mkdir()
    work, engine = work_on(folder), Inventor()
    run_here(monkeypatch, model_pool, engine)
    work.models = {"base": Model("base", VllmSettings(weights="w"))}
    tasks = ({"instruction": f"Describe e{n} f{n} g{n} h{n}"} for n in range(20))
    work.files = seeds_file(folder, *tasks)
    rows = run(SelfInstruct(model="base", seeds="seeds.jsonl", **settings), work)
    columns = [(row["instruction"], row["constraint"], row["prompt"]) for row in rows]
    return engine.requests, columns, work.counts


def test_self_instruct_makes_count_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requests, rows, counts = self_instruct(tmp_path / "a", monkeypatch, count=50)
    # One round has 24 rows with two requests each, and each reply lists eight tasks.
    assert len(requests) == 48 and counts["generated"] == 384
    assert len({instruction for instruction, _, _ in rows}) == len(rows) == 50
    assert (counts["new"], counts["surplus"], counts["short_of_count"]) == (30, 354, 0)
    assert sum(instruction.startswith("Describe") for instruction, _, _ in rows) == 20


def test_the_seed_of_self_instruct_draws_examples_order_and_constraints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, same, other = (
        self_instruct(tmp_path / str(n), monkeypatch, count=50, seed=seed)
        for n, seed in enumerate([1, 1, 2])
    )
    assert one == same
    assert one[0] != other[0]
    for column in range(2):
        assert [row[column] for row in one[1]] != [row[column] for row in other[1]]


USABLE = {
    "Name three kinds of big trees": None,
    "Name a tree": "length",
    " ".join(["word"] * 151): "length",
    "": "length",
    "3 trees that are big": "does not start with a letter",
    "Draw a tree with leaves": "not for a text model",
    "Describe the Picture of a tree": "not for a text model",
    "Explain how a drawing is made": None,
    "写一首关于大海的短诗": None,  # each character is a word
    "写诗": "length",
    "go on and on as we say " * 3: "repeats itself",
    "Tell me about the sea today": "near duplicate",
    "Which river is the longest one": "held-out, exact",
    "Which river is the longest ever": "held-out, near",
}


@pytest.mark.parametrize("instruction", USABLE)
def test_each_filter_of_self_instruct_counts_what_it_drops(
    instruction: str, tmp_path: Path
) -> None:
    rule, work = USABLE[instruction], work_on(tmp_path)
    accepted = SimilarityIndex(["Tell me about the sea"])
    held_out = SimilarityIndex(["Which river is the longest one"])
    stage = SelfInstruct(model="base", seeds="seeds.jsonl", count=1)
    usable = stage._usable({"instruction": instruction}, accepted, held_out, work)
    assert usable == (rule is None)
    assert work.counts == ({f"dropped/{rule}": 1} if rule else {})
    assert work.examples == ({f"dropped/{rule}": [instruction]} if rule else {})


def test_a_task_at_exactly_the_similarity_limit_is_kept(tmp_path: Path) -> None:
    stage = SelfInstruct(model="base", seeds="seeds.jsonl", count=1, max_similarity=0.75)
    work = work_on(tmp_path)
    # LCS 3 of 4 and 4 words: 0.75.
    assert stage._usable(
        {"instruction": "tell me the time"},
        SimilarityIndex(["tell me the news"]),
        SimilarityIndex([]),
        work,
    )
    stage = stage.model_copy(update={"max_similarity": 0.74})
    assert not stage._usable(
        {"instruction": "tell me the time"},
        SimilarityIndex(["tell me the news"]),
        SimilarityIndex([]),
        work,
    )


def test_self_instruct_with_enough_seeds_asks_no_model(tmp_path: Path) -> None:
    held_out = [{"id": "h1", "instruction": "Which river is the longest one"}]
    work = work_on(tmp_path, heldout=held_out)
    work.models = {"base": Model("base", VllmSettings(weights="w"))}
    work.files = seeds_file(
        tmp_path,
        {"instruction": "Name three kinds of trees"},
        {"instruction": "Which river is the longest one?"},
    )
    stage = SelfInstruct(model="base", seeds="seeds.jsonl", count=1, apart_from="heldout")
    [row] = run(stage, work)
    # A full stop is added, because a constraint's sentence may follow.
    assert row["instruction"] == "Name three kinds of trees."
    assert work.counts["dropped/held-out, exact"] == 1
    assert (work.counts["seeds"], work.counts["new"], work.counts["short_of_count"]) == (1, 0, 0)


# Cleaning


def dialogue(name: str, *texts: str, constraint: dict[str, Any] | None = None) -> dict[str, Any]:
    messages = [
        assistant(text, finish_reason="stop") if i % 2 else user(text, instruction=text)
        for i, text in enumerate(texts)
    ]
    return {"id": name, "messages": messages, "constraint": constraint}


BAD = "As an AI, I do not have feelings."


def test_clean_cuts_before_the_first_bad_answer(tmp_path: Path) -> None:
    rows = [
        dialogue("good", "Q1?", "A1.", "Q2?", "A2."),
        dialogue("late", "Q3?", "A3.", "Q4?", BAD, "Q5?", "A5."),
        dialogue("early", "Q6?", BAD, "Q7?", "A7."),
        dialogue("empty", "Q8?", "A8.", "Q9?", " \n\u200b"),
        dialogue("again", "q1?", "a1.", "Other?", "Yes."),
    ]
    work = work_on(tmp_path, dialogues=rows)
    cleaned = {row["id"]: row for row in run(Clean(dialogues="dialogues"), work)}
    assert list(cleaned) == ["good", "late", "empty"]
    assert cleaned["good"]["messages"] == rows[0]["messages"]
    assert cleaned["late"]["messages"] == rows[1]["messages"][:2]
    assert cleaned["empty"]["messages"] == rows[3]["messages"][:2]
    assert work.counts == {
        "rows": 3,
        "dropped/unhelpful assistant": 2,
        "dropped/empty answer": 1,
        "dropped/duplicate": 1,
        "dropped dialogues": 1,
    }
    assert work.examples["dropped/unhelpful assistant"] == [
        {"prompt": "Q4?", "answer": BAD, "left": "the exchanges before it: 1"},
        {"prompt": "Q6?", "answer": BAD, "left": "nothing"},
    ]


def test_clean_corrects_capitals_and_keeps_examples(tmp_path: Path) -> None:
    work = work_on(tmp_path, dialogues=[dialogue("d", "Who are you? tell me.", "Ann. i think so.")])
    [row] = run(Clean(dialogues="dialogues"), work)
    assert [m["content"] for m in row["messages"]] == [
        "Who are you? Tell me.",
        "Ann. I think so.",
    ]
    assert work.counts["true-cased"] == 2
    assert work.examples["true-cased"][1] == ["Ann. i think so.", "Ann. I think so."]


def test_clean_keeps_the_casing_that_a_constraint_demands(tmp_path: Path) -> None:
    rows = [
        dialogue("low", "Greet me.", "hello. how are you?", constraint={"kind": "lowercase"}),
        dialogue("big", "Greet me, please.", "HELLO. HI.", constraint={"kind": "uppercase"}),
    ]
    cleaned = run(Clean(dialogues="dialogues"), work_on(tmp_path, dialogues=rows))
    assert [row["messages"][1]["content"] for row in cleaned] == [
        "hello. how are you?",
        "HELLO. HI.",
    ]


def test_clean_keeps_casing_whose_correction_breaks_the_constraint(tmp_path: Path) -> None:
    # After a closing quote, a lower-case letter continues the sentence; a capital starts another.
    said = 'She said "Go home!" i think.'
    rows = [
        dialogue("one", "Who said it?", said, constraint={"kind": "one_sentence"}),
        dialogue("broken", "Who?", f"{said} Bye.", constraint={"kind": "one_sentence"}),
        dialogue("free", "Who spoke?", said),
    ]
    work = work_on(tmp_path, dialogues=rows)
    made = run(Clean(dialogues="dialogues"), work)
    corrected = said.replace(" i ", " I ")
    answered = [row["messages"][1]["content"] for row in made]
    assert answered == [said, f"{corrected} Bye.", corrected]
    assert work.counts["true-cased"] == 2


def test_clean_that_drops_every_dialogue_is_an_error(tmp_path: Path) -> None:
    work = work_on(tmp_path, dialogues=[dialogue("d", "Q?", BAD)])
    with pytest.raises(
        Permanent, match=r"every dialogue was dropped \(1 unhelpful assistant\); increase"
    ):
        Clean(dialogues="dialogues").run(work)


# Preferences


def test_only_judged_answers_are_feedback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_rows(_: Any, requests: list[dict[str, Any]], *__: Any) -> list[dict[str, Any]]:
        """Judges three of four answers; the second call fails."""
        assert [row["id"] for row in requests] == ["p/0", "p/1", "p/2", "p/3"]
        judged = {"reason": "", "checks": None}
        scores = {"p/0": 8.0, "p/2": None, "p/3": 3.0}
        return [{"id": name, "score": score, **judged} for name, score in scores.items()]

    monkeypatch.setattr(feedback, "run_rows", run_rows)
    completions = [{"model": "m", "text": text} for text in ("cat", "dog", "eel", "fly")]
    work = work_on(tmp_path, answers=[{"id": "p", "prompt": "A pet?", "completions": completions}])
    work.models = {"judge": Model("judge", RulesSettings())}
    [row] = run(Feedback(judge="judge", completions="answers"), work)
    written = [(c["text"], c["score"]) for c in row["completions"]]
    assert written == [("cat", 8.0), ("eel", None), ("fly", 3.0)]
    assert work.counts == {"unparsable": 1, "answers": 3, "score_mean": 5.5, "rows": 1}


def test_feedback_without_a_readable_score_has_no_mean(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unreadable = {"id": "p/0", "score": None, "reason": "", "checks": {}}
    monkeypatch.setattr(feedback, "run_rows", lambda *_: [unreadable])
    completions = [{"model": "m", "text": "cat"}]
    work = work_on(tmp_path, answers=[{"id": "p", "prompt": "A pet?", "completions": completions}])
    work.models = {"judge": Model("judge", RulesSettings())}
    stage = Feedback(judge="judge", completions="answers")
    stage.run(work)
    assert work.counts == {"unparsable": 1, "answers": 1, "rows": 1}
    section = stage.section(Artifact(work.folder, Manifest(kind="feedback", key="k", files={})))
    assert section
    assert section.chapters[0].blocks == (Text("None of 1 answers has a readable score."),)


def rated(name: str, *answers: tuple[str, float | None]) -> dict[str, Any]:
    return {
        "id": name,
        "prompt": "Name a pet. Be short.",
        "instruction": "Name a pet.",
        "constraint": None,
        "completions": [
            {
                "text": text,
                "score": score,
                "model": f"by {text}",
                "finish_reason": "length" if text == "emu" else "stop",
            }
            for text, score in answers
        ],
    }


FOUR = rated("p1", ("cat", 9), ("dog", 4), ("cow", 7), ("emu", 2))


def pairs_of(
    folder: Path, rows: list[dict[str, Any]], **settings: Any
) -> tuple[list[tuple[str, str]], Work]:
    work = work_on(folder, feedback=rows)
    pairs = run(Preferences(feedback="feedback", **settings), work)
    return [(p["chosen"][1]["content"], p["rejected"][1]["content"]) for p in pairs], work


def test_a_pair_holds_both_answers_to_one_prompt(tmp_path: Path) -> None:
    work = work_on(tmp_path, feedback=[FOUR])
    [pair] = run(Preferences(feedback="feedback", rejected="lowest"), work)
    question = user("Name a pet. Be short.", instruction="Name a pet.")
    assert pair == {
        "id": "p1/0",
        "prompt": "Name a pet. Be short.",
        "instruction": "Name a pet.",
        "constraint": None,
        "chosen": [question, assistant("cat", finish_reason="stop")],
        "rejected": [question, assistant("emu", finish_reason="length")],
        "score_chosen": 9,
        "score_rejected": 2,
        "model_chosen": "by cat",
        "model_rejected": "by emu",
    }
    assert work.counts == {"rows": 1, "margin_mean": 7.0}


def test_a_pair_keeps_the_turns_before_its_prompt(tmp_path: Path) -> None:
    context = [{"role": "system", "content": "Be kind."}, user("Hi."), assistant("Hello.")]
    work = work_on(tmp_path, feedback=[{**FOUR, "context": context}])
    [pair] = run(Preferences(feedback="feedback", rejected="lowest"), work)
    conversation = [*context, user("Name a pet. Be short.", instruction="Name a pet.")]
    assert pair["chosen"] == [*conversation, assistant("cat", finish_reason="stop")]
    assert pair["rejected"] == [*conversation, assistant("emu", finish_reason="length")]


def test_rejected_all_is_every_other(tmp_path: Path) -> None:
    pairs, work = pairs_of(tmp_path, [FOUR], rejected="all")
    assert set(pairs) == {("cat", "dog"), ("cat", "cow"), ("cat", "emu")} and len(pairs) == 3
    assert [row["id"] for row in read_jsonl(work.folder / "rows.jsonl")] == ["p1/0", "p1/1", "p1/2"]


def test_rejected_delta_pairs_the_models_with_the_highest_and_the_lowest_mean(
    tmp_path: Path,
) -> None:
    # Mean scores: cow 6, cat 5, emu 5, dog 11/3; the scores of a pair still decide who wins it.
    rows = [
        FOUR,
        rated("p2", ("cat", 1), ("dog", 2), ("cow", 9), ("emu", 8)),
        rated("p3", ("cow", 2), ("dog", 5)),
    ]
    pairs, _ = pairs_of(tmp_path, rows, rejected="delta")
    assert pairs == [("cow", "dog"), ("cow", "dog"), ("dog", "cow")]


def test_rejected_delta_drops_a_row_whose_two_answers_are_empty(tmp_path: Path) -> None:
    # Mean scores: cat 6, cow 5, emu 3; so p2 pairs the empty answers of cat and emu.
    rows = [FOUR, rated("p2", ("cat", 3), ("cow", 3), ("emu", 4))]
    for answer in (rows[1]["completions"][0], rows[1]["completions"][2]):
        answer["text"] = ""
    pairs, work = pairs_of(tmp_path, rows, rejected="delta")
    assert pairs == [("cat", "emu")]
    assert work.examples == {"dropped/all answers are empty": ["p2"]}


def test_rejected_delta_pairs_two_answers_of_a_single_model(tmp_path: Path) -> None:
    row = rated("p1", ("cat", 3), ("dog", 8))
    for completion in row["completions"]:
        completion["model"] = "m"
    assert pairs_of(tmp_path, [row], rejected="delta")[0] == [("dog", "cat")]


def test_rejected_random_is_any_other_and_follows_the_seed(tmp_path: Path) -> None:
    rows = [{**FOUR, "id": f"p{n}"} for n in range(300)]
    runs = []
    for number, seed in enumerate([1, 1, 2]):
        folder = tmp_path / str(number)
        folder.mkdir()
        runs.append(pairs_of(folder, rows, seed=seed)[0])
    assert runs[0] == runs[1] != runs[2]
    counts = Counter(runs[0])
    assert set(counts) == {("cat", "dog"), ("cat", "cow"), ("cat", "emu")}
    # 100 each are expected, with a standard deviation of sqrt(300 · 1/3 · 2/3) = 8; allow four.
    assert min(counts.values()) > 67


def test_ties_are_dropped_by_default(tmp_path: Path) -> None:
    rows = [rated("tie", ("cat", 9), ("dog", 9)), rated("p2", ("cat", 9), ("dog", 8), ("cow", 9))]
    pairs, work = pairs_of(tmp_path, rows, rejected="all")
    assert [rejected for _, rejected in pairs] == ["dog"]
    assert work.counts["dropped/tie or margin too small"] == 1
    assert work.examples["dropped/tie or margin too small"] == ["tie"]


def test_kept_ties_favor_no_answer(tmp_path: Path) -> None:
    rows = [rated(f"p{n}", ("cat", 9), ("dog", 9)) for n in range(200)]
    pairs, _ = pairs_of(tmp_path, rows, ties="keep")
    assert len(pairs) == 200
    # 100 are expected, with a standard deviation of 7; allow four.
    assert 72 < Counter(pairs)[("cat", "dog")] < 128


@pytest.mark.parametrize(
    ("margin", "rejected"), [(2, {"dog", "cow", "emu"}), (2.5, {"dog", "emu"}), (7, {"emu"})]
)
def test_min_margin(margin: float, rejected: set[str], tmp_path: Path) -> None:
    pairs, _ = pairs_of(tmp_path, [FOUR], rejected="all", min_margin=margin)
    assert {text for _, text in pairs} == rejected


def by_aspects(name: str, *answers: tuple[str, list[float]]) -> dict[str, Any]:
    row = rated(name, *((text, None) for text, _ in answers))
    for completion, (_, ratings) in zip(row["completions"], answers, strict=True):
        completion["aspects"] = {str(n): {"rating": rating} for n, rating in enumerate(ratings)}
    return row


@pytest.mark.parametrize(
    ("cat", "other", "settings"),
    [
        ([5, 4, 4], ("dog", [4, 3, 3]), {"min_margin": 1}),  # 13/3 and 10/3
        ([4.1, 4.3], ("dog", [1, 1]), {"min_chosen": 4.2}),  # the mean is 4.199999999999999
        ([1.65, 1.65], ("", [1.1, 2.2]), {"ties": "keep"}),  # 1.65 and 1.6500000000000001
    ],
)
def test_numbers_that_differ_only_by_rounding_are_equal(
    cat: list[float], other: tuple[str, list[float]], settings: dict[str, Any], tmp_path: Path
) -> None:
    row = by_aspects("p1", ("cat", cat), other)
    pairs, _ = pairs_of(tmp_path, [row], score="aspects", **settings)
    assert pairs == [("cat", other[0])]


def test_a_tie_but_for_rounding_is_dropped(tmp_path: Path) -> None:
    rows = [
        by_aspects("p1", ("cat", [3.3]), ("dog", [3.3, 3.3, 3.3])),  # the mean is below 3.3
        by_aspects("p2", ("cat", [3.3]), ("dog", [3.2999])),
    ]
    pairs, work = pairs_of(tmp_path, rows, score="aspects")
    assert pairs == [("cat", "dog")]
    assert work.examples == {"dropped/tie or margin too small": ["p1"]}


def test_min_chosen(tmp_path: Path) -> None:
    rows = [FOUR, rated("p2", ("ant", 8.5), ("bee", 1))]
    pairs, work = pairs_of(tmp_path, rows, rejected="lowest", min_chosen=9)
    assert pairs == [("cat", "emu")]
    assert work.counts["dropped/no answer good enough to choose"] == 1


def test_scores_on_another_scale_have_no_minimum_unless_one_is_set(tmp_path: Path) -> None:
    rows = [rated("p1", ("cat", -0.5), ("dog", -7)), rated("p2", ("ant", -3), ("bee", -4))]
    (tmp_path / "all").mkdir()
    assert pairs_of(tmp_path / "all", rows)[0] == [("cat", "dog"), ("ant", "bee")]
    (tmp_path / "best").mkdir()
    assert pairs_of(tmp_path / "best", rows, min_chosen=-2)[0] == [("cat", "dog")]


def test_equal_texts_are_never_a_pair(tmp_path: Path) -> None:
    rows = [
        rated("same", ("cat", 9), ("cat", 3)),
        rated("some", ("cat", 9), ("cat", 1), ("dog", 5)),
    ]
    pairs, work = pairs_of(tmp_path, rows, rejected="all", ties="keep")
    assert pairs == [("cat", "dog")]
    assert work.counts["dropped/all answers are the same"] == 1


@pytest.mark.parametrize("other", ["cat\n", " cat", "cat\u200b", "\ufeffcat\r\n", "cat\u00a0"])
def test_texts_that_look_the_same_are_never_a_pair(other: str, tmp_path: Path) -> None:
    pairs, work = pairs_of(tmp_path, [rated("a", ("cat", 9), (other, 3)), FOUR], rejected="lowest")
    assert pairs == [("cat", "emu")]
    assert work.counts["dropped/all answers are the same"] == 1


@pytest.mark.parametrize("empty", ["", " \n", "\u200b", "\u2800\ufeff "])
def test_an_empty_text_is_never_chosen(empty: str, tmp_path: Path) -> None:
    rows = [
        rated("best is empty", (empty, 9), ("cat", 7), ("dog", 4)),
        rated("only one other", (empty, 9), ("cat", 7)),
        rated("rejected", ("cat", 7), (empty, 1)),
        rated("none", (empty, 9), (empty, 1)),
    ]
    pairs, work = pairs_of(tmp_path, rows, rejected="lowest")
    assert pairs == [("cat", "dog"), ("cat", empty)]
    assert work.counts["dropped/an empty answer scored best"] == 1
    assert work.counts["dropped/all answers are empty"] == 1


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (rated("a", ("", 9), ("cat", 7)), "scored best: 1.; use a judge that rates empty answers"),
        (rated("a", ("", 9), ("cat", 7), ("dog", 7)), "too small: 1.; set ties: keep"),
    ],
)
def test_a_stage_without_pairs_says_what_helps(
    row: dict[str, Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises(Permanent, match=says):
        pairs_of(tmp_path, [row])


def test_answers_without_a_score_are_left_out(tmp_path: Path) -> None:
    rows = [
        rated("one", ("cat", 9), ("dog", None)),
        rated("two", ("cat", 9), ("d", None), ("c", 1)),
    ]
    pairs, work = pairs_of(tmp_path, rows)
    assert pairs == [("cat", "c")]
    assert work.counts["dropped/fewer than two scored answers"] == 1


def test_no_pair_at_all_is_an_error_that_says_why(tmp_path: Path) -> None:
    with pytest.raises(Permanent, match="no answer good enough to choose: 1.; lower min_chosen"):
        pairs_of(tmp_path, [FOUR], min_chosen=10)


def test_feedback_without_rows_is_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(Permanent, match="has no rows to pair; add prompts"):
        pairs_of(tmp_path, [])


def test_no_pair_for_lack_of_scores_does_not_advise_on_min_chosen(tmp_path: Path) -> None:
    with pytest.raises(Permanent, match="fewer than two scored answers: 1.; use a judge whose"):
        pairs_of(tmp_path, [rated("p", ("cat", None), ("dog", None))])


def test_chosen_answers_become_dialogues_once(tmp_path: Path) -> None:
    def pair(name: str, question: str, answer: str) -> dict[str, Any]:
        finish = "length" if question == "R?" else "stop"
        chosen = [user(question, instruction="Q"), assistant(answer, finish_reason=finish)]
        return {"id": name, "prompt": question, "chosen": chosen}

    pairs = [pair("p1/0", "Q?", "A"), pair("p1/1", "Q?", "A"), pair("p2/0", "R?", "A")]
    work = work_on(tmp_path, pairs=pairs)
    assert run(Chosen(pairs="pairs"), work) == [
        {"id": row["id"], "messages": row["chosen"], "constraint": None}
        for row in (pairs[0], pairs[2])
    ]
    assert work.counts == {"rows": 2, "dropped/duplicate": 1}


def test_a_follow_up_near_a_held_out_prompt_is_cut(tmp_path: Path) -> None:
    questions = ["Name a bird of the sea.", "Name the longest river of the whole continent."]
    dialogue = {
        "id": "d",
        "constraint": None,
        "messages": [m for q in questions for m in (user(q), assistant(f"About {q}"))],
    }
    # 7 of 8 words in order: ROUGE-L F = 2 * 7 / (7 + 8) = 0.93.
    held_out = [{"instruction": "Name the longest river of the continent."}]
    work = work_on(tmp_path, dialogues=[dialogue], heldout=held_out)
    [row] = run(Clean(dialogues="dialogues", apart_from="heldout"), work)
    assert row["messages"] == dialogue["messages"][:2]
    assert work.counts["dropped/near a held-out prompt"] == 1


def voted(text: str, score: int) -> dict[str, Any]:
    return {"model": text, "text": text, "finish_reason": "stop", "score": score}


VOTE: dict[str, Any] = {
    "id": "v1",
    "prompt": "Name a pet.",
    "instruction": "Name a pet.",
    "constraint": None,
    "completions": [voted("cat", 10), voted("dog", 1)],
}


def test_votes_are_feedback_row_by_row(tmp_path: Path) -> None:
    tie = [voted("cat", 5), voted("dog", 5)]
    context = [user("Hi."), assistant("Hello.")]
    other = {**VOTE, "id": "v2", "context": context, "completions": tie}
    rows = [VOTE, other, {**VOTE, "id": "v3"}]
    path = tmp_path / "votes.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    work = work_on(tmp_path)
    work.files = {"file": path}
    Votes(file=str(path)).check({"file": path}, {})
    assert run(Votes(file=str(path)), work) == rows
    assert work.counts == {"rows": 3, "ties": 1}


def test_votes_cut_short_or_stored_twice_are_dropped_and_counted(tmp_path: Path) -> None:
    folder = tmp_path / "gateways"
    folder.mkdir()
    rows = [json.dumps({**VOTE, "id": f"v{number}"}) for number in range(3)]
    (folder / "a.jsonl").write_text(f"\n{rows[0]}\n\n{rows[1]}\n\n{rows[2][:40]}")
    (folder / "b.jsonl").write_bytes(f"{rows[1]}\n{rows[2]}\n".encode() + b'{"id": "\xc3')
    (folder / "notes.txt").write_text("no votes")
    work = work_on(tmp_path)
    work.files = {"file": folder}
    made = run(Votes(file=str(folder)), work)
    assert [row["id"] for row in made] == ["v0", "v1", "v2"]
    assert work.counts == {"rows": 3, "ties": 0, "dropped/unreadable": 2, "dropped/duplicate": 1}
    assert work.examples["dropped/unreadable"] == ["a.jsonl line 6", "b.jsonl line 3"]


@pytest.mark.parametrize("named", ["votes", "votes.jsonl"])
def test_votes_of_an_earlier_version_are_not_passed_over(named: str, tmp_path: Path) -> None:
    (tmp_path / "votes.jsonl").write_text(json.dumps(VOTE))
    stage = Votes(file=named)
    if named == "votes.jsonl":
        stage.check({"file": tmp_path / named}, {})
    (tmp_path / "votes").mkdir()
    (tmp_path / "votes" / "a.jsonl").write_text(json.dumps({**VOTE, "id": "v9"}))
    with pytest.raises(Permanent, match="votes.jsonl has votes of an earlier version.*move"):
        stage.check({"file": tmp_path / named}, {})
    (tmp_path / "votes.jsonl").rename(tmp_path / "votes" / "votes.jsonl")
    Votes(file="votes").check({"file": tmp_path / "votes"}, {})


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("[1]", "line 1: not a vote: it is not a JSON object; correct or remove it"),
        ('{"id": "v1", "prom', "has no votes"),
        ('{"id": "v1", "prompt": "Q"}', "needs text in 'instruction'"),
        ("", "has no votes"),
        (json.dumps({**VOTE, "completions": VOTE["completions"][:1]}), "needs two answers"),
        (json.dumps({**VOTE, "completions": VOTE["completions"] * 2}), "needs two answers"),
        (json.dumps({**VOTE, "context": "Hello."}), "a 'context' that is not a list"),
        (json.dumps({**VOTE, "instruction": None}), "needs text in 'instruction'"),
        (json.dumps({**VOTE, "constraint": "json"}), "a 'constraint' that is neither"),
        (json.dumps({**VOTE, "blind": "yes"}), "a 'blind' that is neither"),
        (
            json.dumps({**VOTE, "completions": [{"text": "a", "score": 1}] * 2}),
            "needs text in 'model' of both",
        ),
        (
            json.dumps({**VOTE, "completions": [{**a, "score": "1"} for a in VOTE["completions"]]}),
            "needs a number in 'score' of both",
        ),
        (json.dumps({**VOTE, "context": None}), "a 'context' that is not a list"),
        (json.dumps({**VOTE, "id": 1}), "needs text in 'id'"),
    ],
)
def test_a_file_without_votes_is_one_line(line: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "votes.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(Permanent, match=says):
        Votes(file=str(path)).check({"file": path}, {})
