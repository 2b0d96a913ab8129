"""Tests word splitting for scripts without spaces, combining marks and full-width letters."""

import json
import re
from pathlib import Path

import pytest

from zephyr_ray.filters.held_out import NEAR
from zephyr_ray.models.constraint_kinds import words
from zephyr_ray.models.constraints import holds
from zephyr_ray.models.repetition import loops
from zephyr_ray.models.similarity import SimilarityIndex, split_words

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("用Python写3个程序。", ["用", "python", "写", "3", "个", "程", "序"]),
        ("カタカナー", ["カ", "タ", "カ", "ナ", "ー"]),
        ("กินข้าว", ["กิ", "น", "ข้", "า", "ว"]),  # marks belong to their letter
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("한국의 수도", ["한국의", "수도"]),  # Korean has spaces
        ("ＡＢＣ　ｶﾞ", ["abc", "ガ"]),
        ("cafe\u0301", ["café"]),
        ("It's 1️⃣ ❤️‍🔥 don’t", ["it's", "1", "don't"]),
        ("🎉 😀", ["🎉", "😀"]),  # characters, if there is no word
    ],
)
def test_words_of_every_script(text: str, expected: list[str]) -> None:
    assert split_words(text) == expected


NEARLY_EQUAL = {
    "Chinese": ("请写一首关于春天的短诗。", "请写一首关于春天的小诗"),
    "Japanese": ("東京の人口は何人ですか？", "東京の人口は今何人ですか"),
    "Thai": ("เขียนบทกวีสั้นเกี่ยวกับทะเล", "เขียนบทกวีเกี่ยวกับทะเล"),
    "Khmer": ("តើអ្វីជារាជធានីរបស់ប្រទេសកម្ពុជា", "តើអ្វីជារាជធានីប្រទេសកម្ពុជា"),
    "Burmese": ("မြန်မာနိုင်ငံ၏မြို့တော်ကဘာလဲ", "မြန်မာနိုင်ငံရဲ့မြို့တော်ကဘာလဲ"),
    "Lao": ("ນະຄອນຫຼວງຂອງປະເທດລາວແມ່ນຫຍັງ", "ນະຄອນຫຼວງປະເທດລາວແມ່ນຫຍັງ"),
    "mixed": ("用Python写一个排序函数", "请用python写一个排序函数"),
    "Hindi": ("भारत की राजधानी क्या है", "भारत की राजधानी क्या है?"),
}
DIFFERENT = {
    "Chinese": ("请写一首关于春天的短诗。", "如何修理漏水的水龙头？"),
    "Japanese": ("東京の人口は何人ですか？", "パスタの作り方を教えてください"),
    "Thai": ("เขียนบทกวีสั้นเกี่ยวกับทะเล", "เมืองหลวงของประเทศฝรั่งเศสคืออะไร"),
    "Khmer": ("តើអ្វីជារាជធានីរបស់ប្រទេសកម្ពុជា", "សូមសរសេរកំណាព្យអំពីសមុទ្រ"),
    "Burmese": ("မြန်မာနိုင်ငံ၏မြို့တော်ကဘာလဲ", "ကြောင်အကြောင်းကဗျာရေးပါ"),
    "Hindi": ("हिन्दी में कविता लिखो", "हमें दिल्ली के बारे में बताओ"),
    "emoji": ("🎉🎉", "😀"),
    "marks": ("?", "!!!"),
}


@pytest.mark.parametrize(("a", "b"), NEARLY_EQUAL.values(), ids=NEARLY_EQUAL)
def test_nearly_equal_sentences_are_near_duplicates(a: str, b: str) -> None:
    assert SimilarityIndex([a]).nearest(b) > NEAR


@pytest.mark.parametrize(("a", "b"), DIFFERENT.values(), ids=DIFFERENT)
def test_different_sentences_are_not_near_duplicates(a: str, b: str) -> None:
    assert SimilarityIndex([a]).nearest(b) < NEAR


def test_words_of_english_are_runs_of_letters_and_digits() -> None:
    rows = [
        json.loads(line)
        for path in (ROOT / "configs/seeds").glob("*.jsonl")
        for line in path.read_text().splitlines()
    ]
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    texts = [value for row in rows for value in row.values() if isinstance(value, str)]
    texts += [line for page in pages for line in page.read_text().splitlines()]
    assert len(texts) > 2000
    for text in filter(str.isalpha, texts):
        assert split_words(text) == [text.lower()]
    for text in texts:
        assert words(text) == re.findall(r"\w+(?:['’]\w+)*", text.casefold())
        if expected := re.findall(r"\w+(?:'\w+)?", text.lower()):
            assert split_words(text) == expected


@pytest.mark.parametrize(
    ("constraint", "text", "holding"),
    [
        ({"kind": "max_words", "n": 8}, "我每天早上都喜欢吃一个红苹果。", False),
        ({"kind": "max_words", "n": 8}, "我喜欢吃苹果。", True),
        ({"kind": "min_words", "n": 8}, "我每天早上都喜欢吃一个红苹果。", True),
        ({"kind": "max_words", "n": 5}, "用Python写程序", True),
        ({"kind": "include_word", "word": "简单"}, "这很简单的。", True),
        ({"kind": "include_word", "word": "简单"}, "简洁单调。", False),
        ({"kind": "avoid_word", "word": "Python"}, "用Python写程序", False),
        ({"kind": "include_word", "word": "राम"}, "आरामदायक है", False),
        ({"kind": "start_with", "phrase": "好问题"}, "好问题这是苹果。", True),
        ({"kind": "end_with", "phrase": "祝你好运"}, "去吧祝你好运！", True),
    ],
)
def test_constraints_count_and_find_words_of_every_script(
    constraint: dict, text: str, holding: bool
) -> None:
    assert holds(constraint, text, "")[0] == holding


def test_a_loop_in_a_script_without_spaces_needs_several_letters_per_word() -> None:
    assert loops("我喜欢吃苹果。" * 4)
    # Three occurrences of a country's name are not a loop.
    country = "中华人民共和国"
    assert not loops(f"{country}成立。{country}的首都。{country}的人口。")
