"""Tests each filter of `clean` on handmade passages, at the edges of its rule."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zephyr_ray.errors import Permanent
from zephyr_ray.filters import evaluation_sets
from zephyr_ray.filters.answers import find_refusal
from zephyr_ray.filters.contamination import Contamination
from zephyr_ray.filters.duplicates import NearDuplicates, sketch
from zephyr_ray.filters.evaluation_sets import read_sets
from zephyr_ray.filters.language import check_languages, detect, find_language
from zephyr_ray.filters.lengths import find_length
from zephyr_ray.filters.passage import Fault, Passage
from zephyr_ray.filters.toxicity import ToxicWords, read_phrases

LETTERS = [chr(ord("a") + number) for number in range(26)]


def passage(prompt: str = "Why?", answer: str | None = "So.", **others: Any) -> Passage:
    return Passage((prompt,), prompt, answer, **others)


def rule(fault: Fault | None) -> str | None:
    return fault.rule if fault else None


# Evaluation sets

PUBLISHED = {
    "mt_bench.jsonl": {"question_id": 81, "category": "writing", "turns": ["One?", "Two?"]},
    "mt_bench_prompts.jsonl": {"prompt": ["One?", "Two?"], "prompt_id": 1, "reference": []},
    "arc.jsonl": {
        "id": "M_1",
        "question": {"stem": "One?", "choices": [{"text": "A", "label": "A"}]},
        "answerKey": "A",
    },
    "ai2_arc.jsonl": {"question": "One?", "choices": {"text": ["A"]}, "answerKey": "A"},
    "hellaswag.jsonl": {"ind": 4, "ctx_a": "One", "ctx_b": "?", "ctx": "One?", "endings": ["x"]},
    "truthful_qa.jsonl": {"type": "x", "question": "One?", "best_answer": "Yes."},
    "own.jsonl": {"prompt": "One?", "answer": "x"},
    "chat.jsonl": {
        "prompt": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "One?"},
            {"role": "assistant", "content": "x"},
            {"role": "user", "content": "Two?"},
        ]
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_an_evaluation_set_in_its_published_form(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(json.dumps(PUBLISHED[name]) + "\n")
    two = name in ("mt_bench.jsonl", "mt_bench_prompts.jsonl", "chat.jsonl")
    expected = ["One?", "Two?"] if two else ["One?"]
    assert read_sets(tmp_path / name) == {Path(name).stem: expected}


def test_alpaca_eval_and_truthful_qa_are_lists_in_one_file(tmp_path: Path) -> None:
    rows = [{"dataset": "d", "instruction": "One?", "output": "x"}, {"question": "Two?"}]
    (tmp_path / "alpaca_eval.json").write_text(json.dumps(rows, indent=1))
    assert read_sets(tmp_path / "alpaca_eval.json") == {"alpaca_eval": ["One?", "Two?"]}


def test_a_folder_has_a_set_per_file(tmp_path: Path) -> None:
    (tmp_path / "arc").mkdir()
    for name in ("b.jsonl", "arc/easy.test.jsonl", ".hidden.jsonl"):
        (tmp_path / name).write_text('{"prompt": "One?"}\n\n{"prompt": "One?"}\n')
    (tmp_path / "b.json").write_text('[{"prompt": "Two?"}]')
    assert read_sets(tmp_path) == {"arc/easy.test": ["One?"], "b": ["Two?", "One?"]}


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("a.jsonl", '{"prompt": "One?"}\n{"text": "Two?"}', r"a.jsonl line 2: no question; name"),
        ("a.jsonl", '{"prompt": " "}', r"a.jsonl line 1: no question; name"),
        ("a.json", '[{"prompt": "One?"}, 3]', r"a.json example 2: no question; name"),
        ("a.json", "[" * 100_000, r"a.json is not JSON; correct it"),
        ("a.jsonl", "", r"a.jsonl has no examples; remove it"),
        ("a.csv", "question", r"a.csv is neither a .jsonl nor a .json file; convert"),
        ("a.jsonl", '{"prompt": "%s"}' % ("x" * 99), r"has 113 bytes, more than 100; keep"),
    ],
)
def test_a_file_that_is_not_an_evaluation_set(
    name: str, content: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation_sets, "MAX_BYTES", 100 if "bytes" in line else 10**6)
    (tmp_path / name).write_text(content)
    with pytest.raises(Permanent, match=line):
        read_sets(tmp_path)


# Contamination

QUESTION = "a b c d e f g h i j k l m n o"


def contaminated(text: str, *questions: str) -> str | None:
    fault = Contamination({"set": list(questions)})(passage(text))
    assert fault is None or fault.rule == "in evaluation set set"
    return fault.evidence if fault else None


@pytest.mark.parametrize(
    ("text", "shared"),
    [
        ("x b c d e f g h i j k l m n x", "b c d e f g h i j k l m n"),  # 13 words
        ("x b c d e f g h i j k l m x", None),  # 12 words
        ("x b c d e f g h i j k x l m n", None),  # 13 words, interrupted by another
        ("B, c; D\n(e) f — g h I j k\tl m… n!", "b c d e f g h i j k l m n"),
        ("ｂ c d e f g h i j k l m n", "b c d e f g h i j k l m n"),
    ],
)
def test_sequences_of_13_words_of_long_questions(text: str, shared: str | None) -> None:
    assert contaminated(text, QUESTION) == shared


@pytest.mark.parametrize(
    ("words", "n"), [(4, 8), (9, 9), (13, 13), (40, 13)], ids=["bounded", "own", "top", "more"]
)
def test_the_5th_percentile_of_a_sets_lengths_is_the_length_of_sequences(
    words: int, n: int
) -> None:
    # Of 40 questions, index int(0.05 * 40) = 2: the third shortest.
    lengths = [3, 3, words, *[40] * 37]
    questions = [
        " ".join(f"w{row}x{i}" for i in range(length)) for row, length in enumerate(lengths)
    ]
    last = questions[-1].split()
    assert contaminated("start " + " ".join(last[:n]), *questions) == " ".join(last[:n])
    assert contaminated("start " + " ".join(last[: n - 1]), *questions) is None


def test_a_question_shorter_than_a_sequence_must_be_the_whole_text() -> None:
    assert contaminated("who are YOU?", "Who are you?") == "who are you"
    assert contaminated("Tell me, who are you?", "Who are you?") is None


def test_a_short_question_is_compared_without_its_constraint() -> None:
    sets = Contamination({"set": ["Who are you?"]})
    constrained = Passage(("Who are you?",), "Who are you? Answer in five words.", "So.")
    assert rule(sets(constrained)) == "in evaluation set set"


def test_wording_that_many_questions_share_is_no_contamination() -> None:
    wording = "please read this text and say in one word what it is about"
    questions = [f"{wording} w{n} x{n}" for n in range(11)]
    assert contaminated(f"Now {wording}.", *questions) is None
    assert contaminated(f"Now {wording}.", *questions[:10]) is not None


def test_every_text_of_a_passage_is_compared_and_the_set_is_named() -> None:
    sets = Contamination({"one": [QUESTION], "two": ["p q r s t u v w x y"]})
    assert sets.rules == ("in evaluation set one", "in evaluation set two")
    for texts in (
        passage(prompt=QUESTION),
        passage(answer=QUESTION),
        passage(system=("x", QUESTION)),
        passage(rejected=QUESTION),
    ):
        assert rule(sets(texts)) == "in evaluation set one"
    assert rule(sets(passage("P q r s t u v w x y z"))) == "in evaluation set two"
    assert sets(passage()) is None


@given(
    st.lists(st.lists(st.sampled_from("abc"), min_size=8, max_size=20), min_size=1, max_size=3),
    st.lists(st.sampled_from("abc"), max_size=40),
)
@settings(deadline=None, max_examples=200)
def test_contamination_is_a_common_sequence(questions: list[list[str]], text: list[str]) -> None:
    n = min(max(min(map(len, questions)), 8), 13)
    sequences = {tuple(q[i : i + n]) for q in questions for i in range(len(q) - n + 1)}
    shares = any(tuple(text[i : i + n]) in sequences for i in range(len(text) - n + 1))
    evidence = contaminated(" ".join(text), *(" ".join(q) for q in questions))
    assert (evidence is not None) == shares


# Lengths


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("one two", "shorter than min_words"),
        ("one two three", None),
        ("one two three four", None),
        ("one two three four five", "longer than max_words"),
        ("猫は好", None),  # Three letters of a script without spaces are three words.
    ],
)
def test_lengths_of_answers(answer: str, expected: str | None) -> None:
    assert rule(find_length(passage("w " * 9, answer), min_words=3, max_words=4)) == expected


def test_lengths_of_prompts_without_the_sentence_of_a_constraint() -> None:
    prompt = Passage(("one two",), "one two in three words")
    assert rule(find_length(prompt, min_words=None, max_words=2)) is None
    assert rule(find_length(prompt, min_words=3, max_words=None)) == "shorter than min_words"


# Languages

ENGLISH = "The lighthouse stands at the end of the harbour, where the fishing boats come home."
GERMAN = "Der Leuchtturm steht am Ende des Hafens, wo die Fischerboote abends nach Hause kommen."
JAPANESE = "灯台は港のはずれに立っていて、夕方になると漁船が帰ってきます。"


@pytest.mark.parametrize(
    ("prompt", "answer", "expected"),
    [
        (ENGLISH, ENGLISH, None),
        (ENGLISH, None, None),
        (GERMAN, GERMAN, "other language"),
        (GERMAN, None, "other language"),
        (JAPANESE, None, "other language"),
        ("Hallo, wie geht es dir?", "Gut.", "language not detected"),
        (
            "Name elements.",
            "Hydrogen, Helium, Lithium, Beryllium, Boron, Carbon, Nitrogen, Oxygen",
            "language not detected",
        ),  # German with a probability of 0.6.
        ("Code?", f"```\n{GERMAN}\n```", "language not detected"),
        (f"> {GERMAN}\n{ENGLISH}", ENGLISH, None),  # Quotations are ignored.
        ("?", "\ud800 123", "language not detected"),
    ],
)
def test_languages(prompt: str, answer: str | None, expected: str | None) -> None:
    fault = find_language(passage(prompt, answer), languages=["en"])
    assert rule(fault) == expected
    assert fault is None or fault.is_removed == (expected == "other language")


def test_the_language_of_a_text_does_not_depend_on_earlier_ones() -> None:
    mixed = f"{ENGLISH} {GERMAN}"
    probabilities = [detect(mixed) for _ in range(5)]
    detect(GERMAN)
    assert len({*probabilities, detect(mixed)}) == 1


def test_an_unknown_language_is_an_error() -> None:
    check_languages(["en", "zh-cn"])
    with pytest.raises(Permanent, match="languages: unknown 'english'"):
        check_languages(["english"])


# Toxic words

LIST = "# A comment\n\nFool\nGo to hell\nstraße\n"


@pytest.mark.parametrize(
    ("text", "evidence"),
    [
        ("You FOOL!", "“fool”"),
        ("a f\u200bool", "“fool”"),  # A zero-width space inside.
        ("𝐟𝐨𝐨𝐥 ﬁne", "“fool”"),  # Mathematical letters.
        ("Go\nto, hell", "“go to hell”"),
        ("STRASSE", "“strasse”"),
        ("You _fool_! __Go_to__ hell", "“fool”"),  # Emphasis in Markdown.
        ("a fool’s errand", "“fool”"),
        ("foolish tomfool fools", None),
        ("go to the hell", None),
    ],
)
def test_toxic_words_are_whole_words(text: str, evidence: str | None, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text(LIST, encoding="utf-8")
    find = ToxicWords(read_phrases(tmp_path / "list.txt"))
    for texts in (passage(text), passage(answer=text), passage(system=(text,))):
        fault = find(texts)
        assert (fault.evidence if fault else None) == evidence
    # The rejected answer of a pair may be toxic.
    assert find(passage(rejected=text)) is None


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"# nothing\n", "has no words; write one"),
        (b"fine\n" + b"w " * 11, "line 2: 11 words; write 1 to 10"),
        (b"fine\n!!\n", None),
        (b"\xff\xfe", "is not UTF-8; convert"),
        (b"x" * 1_000_001, "has more than 1000000 bytes; name"),
    ],
)
def test_lists_of_toxic_words(content: bytes, line: str | None, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_bytes(content)
    if line is None:
        assert read_phrases(tmp_path / "list.txt") == [["fine"], ["!", "!"]]
        return
    with pytest.raises(Permanent, match=line):
        read_phrases(tmp_path / "list.txt")


def test_the_list_that_is_shipped() -> None:
    path = Path(__file__).resolve().parents[1] / "configs" / "words" / "toxic-en.txt"
    phrases = [" ".join(words) for words in read_phrases(path)]
    assert phrases == sorted(set(phrases))
    find = ToxicWords(read_phrases(path))
    assert find(passage("A classic cocktail in Scunthorpe, with a shiitake assassin.")) is None


# Refusals


@pytest.mark.parametrize(
    "answer",
    [
        "I'm sorry, but I can't assist with that.",
        "I’m sorry, I can’t help with that request. Is there something else?",
        "I cannot fulfill this request.",
        "As an AI language model, I cannot provide instructions for that.",
        "Sorry, but I am unable to provide that information.",
        "I apologize, but I will not write that story.",
        "I must decline to answer this.",
        "I am sorry. I cannot help you.",
        "Thank you for asking, but I can't discuss that.",
        "I do not feel comfortable writing that.",
        "I'm afraid I can't help with that.",
        "I simply cannot in good conscience provide this.",
        "As an AI model I am sorry but I cannot help with that.",
        "Sorry, I won't be able to help you with that.",
    ],
)
def test_refusals(answer: str) -> None:
    assert rule(find_refusal(passage(answer=answer))) == "refusal"


@pytest.mark.parametrize(
    "answer",
    [
        None,
        "I can help with that.",
        "I can't find an error in your code; it looks right.",
        "I cannot provide an exact figure, but about 5 million people live there.",
        "I'm sorry to hear that. You could ask a friend.",
        "I couldn't help but notice the sea. I can't help thinking of it.",
        '"I cannot help," he said, and left.',
        "Dear Sir, I am sorry that I cannot attend.",
        "Sure. Here is a poem.\n\nOnce there was a king.\n\nI cannot help you, he said.",
        "Unfortunately, the museum is closed.",
        "We can't divide by zero, so there is no solution.",
        "I refuse to give up on this proof. Let n be even.",
    ],
)
def test_no_refusals(answer: str | None) -> None:
    assert find_refusal(passage(answer=answer)) is None


def test_repeated_openings_of_a_refusal_take_no_time() -> None:
    seconds = []
    for _ in range(3):  # the garbage collector may add its time to one
        start = time.process_time()
        assert find_refusal(passage(answer="as an AI " * 50)) is None
        seconds.append(time.process_time() - start)
    # Takes less than 1 ms; a pattern that tried all combinations of openings took 3 s.
    assert min(seconds) < 0.1


# Near duplicates


def test_near_duplicates_by_their_shingles() -> None:
    words = [f"w{number}" for number in range(202)]
    near = NearDuplicates(0.7)
    assert near.add(3, sketch(" ".join(words))) is None
    # A word replaced in the middle changes 3 of 200 shingles: 197 / 203 = 0.97.
    assert near.add(7, sketch(" ".join([*words[:90], "other", *words[91:]]))) == 3
    # The first half is the same: 100 shingles of 300 different ones.
    assert near.add(8, sketch(" ".join([*words[:102], *(f"x{n}" for n in range(100))]))) is None
    assert near.add(9, sketch(" ".join(words[::-1]))) is None
    assert near.add(10, sketch(", ".join(words).upper())) == 3


def test_the_earliest_of_several_near_duplicates_is_named() -> None:
    words = [f"w{number}" for number in range(160)]
    near = NearDuplicates(0.6)
    # The first two share 78 of 158 shingles; the third shares 98 of 138 with each of them.
    assert near.add(9, sketch(" ".join(words[40:]))) is None
    assert near.add(10, sketch(" ".join(words[:120]))) is None
    assert near.add(11, sketch(" ".join(words[20:140]))) == 9


def test_near_duplicates_are_seldom_missed() -> None:
    near = NearDuplicates(0.8)
    for number in range(50):
        words = [f"w{number}x{n}" for n in range(62)]
        assert near.add(number, sketch(" ".join(words))) is None
        # The last three words replaced: 57 of 63 shingles are common, 0.90.
        assert near.add(99, sketch(" ".join([*words[:59], "x", "y", "z"]))) == number


@pytest.mark.parametrize("text", ["", "?!", "one", "one two"])
def test_texts_shorter_than_a_shingle(text: str) -> None:
    near = NearDuplicates(0.9)
    assert near.add(0, sketch("one two three")) is None
    assert near.add(1, sketch(text)) is None
    assert near.add(2, sketch(text)) == 1
