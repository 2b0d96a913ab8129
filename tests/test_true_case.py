"""Tests that true-casing corrects prose and leaves code, data, mathematics and verse unchanged."""

import time
from pathlib import Path

import pytest

from zephyr_ray.models.prose import FILLER, mask
from zephyr_ray.models.true_case import true_case


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("Hello. how are you?", "Hello. How are you?"),
        ("hello there. I am Ann.", "Hello there. I am Ann."),
        ("Yes! it is. do you see? i do.", "Yes! It is. Do you see? I do."),
        ("Well, i think i'm right and i’ve won.", "Well, I think I'm right and I’ve won."),
        ("First line.\nsecond line.", "First line.\nSecond line."),
        ("Mail bob@foo.org. he will answer.", "Mail bob@foo.org. He will answer."),
        ("See https://a.com/b?x=1. then call.", "See https://a.com/b?x=1. Then call."),
        ("Type `x = 1; y`. it works. now go on.", "Type `x = 1; y`. It works. Now go on."),
        ("Open the file(s) here. then wait.", "Open the file(s) here. Then wait."),
        ("1. Go home. it is late.\n2. Sleep.", "1. Go home. It is late.\n2. Sleep."),
        ("> He left. then i\nI agree. it is so.", "> He left. then i\nI agree. It is so."),
        (
            "Sure. here it is:\n\n```py\n# Sort. then go.\nfor i in x\n```\n\nDone. it works.",
            "Sure. Here it is:\n\n```py\n# Sort. then go.\nfor i in x\n```\n\nDone. It works.",
        ),
        ("Take $x. y$ twice. then stop.", "Take $x. y$ twice. Then stop."),
        ("Apple Inc. is big. it grew.", "Apple Inc. is big. It grew."),
        ("He said no. it is not. he sat. then he saw the sun. it rose.",
         "He said no. It is not. He sat. Then he saw the sun. It rose."),
        ("Yahoo! was big, really! was it?", "Yahoo! was big, really! Was it?"),
        ("Let n be prime. p divides it. a proof follows.",
         "Let n be prime. p divides it. A proof follows."),
    ],
)  # fmt: skip
def test_prose_is_corrected(before: str, after: str) -> None:
    assert true_case(before) == after


STYLES = [
    "all small. a style of its own.",
    "ALL BIG. A STYLE.",
    "iPhone sales rose. Good.",
    "It is sold. eBay has it.",
    "Roses are red.\n\nroses are red.\nviolets are blue.\nsugar is sweet,\nand i am You.",
    "A song:\n\nHello old friend\ni have come to talk\nagain with you\nand i am here",
    "* one\n* two\nDone.",
    "",
]
MARKED = [
    "> He wrote. then left. i think\n> I do. really it",
    "~~~\nGood. then i am\n~~~",
    "```\nNever closed. then i am",
    "Good. `see this. then` ok",
    "Here it is.\n\n    # Sort.\n    for row in rows:\n        print(row)\n",
    "<p>Hello there. how are you? i am</p>",
    "$$\nSo. then i am\n$$ Good",
    "\\begin{align}\nSo. then i am\n\\end{align} Good",
    "See www.example.com. It has 3.5 stars.",
    "https://example.com is a page. See it.",
    "Look here. example.com is a page.",
    "Use a path. /usr/bin/foo is there",
    "Use a tool, e.g. this one, i.e. mine.",
    "Bring apples, pears etc. and come. Bye.",
    "Cats vs. dogs: We like both.",
    "See Smith et al. have shown. Good.",
]
ABBREVIATIONS = [
    "Apple Inc. is a company.",
    "Ford Corp. has plants.",
    "Acme Ltd. was sold.",
    "ACME INC. was sold.",
    "Smith & Co. are here.",
    "Yahoo! was sold.",
    "Jeopardy! has won.",
    "On Jan. first it snowed.",
    "On Sun. evening it snowed.",
    "See vol. three.",
    "See Vol. three.",
    "See no. three and No. four.",
    "The dept. of trade. The Dept. of State.",
    "Well, ie. this one, eg. that one.",
    "See Fig. four.",
    "Main St. is long.",
    "King Jr. spoke.",
    "Let n be prime. p divides n.",
]
CODE = [
    "# Sort the rows.\nfor row in rows\nwith lock",
    "# Open the file.\nwith open(path) as f:\n    data = f.read()\n# Add.\nif x:\n    print(i)",
    "Sort Rows.\nfor row in rows:\n    print(row)",
    "Here is the loop.\nfor row in rows\n    print row\nwith that Done",
    "// Increment it.\nwhile true\n  i can be used",
    "-- Get rows.\nselect name\nfrom users\nwhere Id",
    "Here is SQL.\nselect name from users where Id",
    '" Load it.\npackadd justify Now',
    "Bash.\nif [ -f x ]; then\n  echo Hi. there it is\nfi",
    "Diff.\n- old. line here\n@@ -1 +1 @@\nif X",
    "Use foo.\nwith open(f) as g\nend Good",
    "Assembly.\nmov eax, 1 ; Foo. then it",
    "Run it. pip install foo",
    "ls -la Foo",
    "$ echo Hello there. then i am\nI",
    'def f(x):\n    """Return it."""\n    return x\nI do. then it',
    "Step 1.\nwhile x do:\nGood",
    '{"a": "Hi there. how are you. i am"}',
    "id,name,note\n1,ann,it works. really it does\nI do",
    "| A | b. c d |\n|---|---|\n| Hello there. then i am | x |",
    "key: Hello there. how are you",
    "INI.\n[main]\nkey=Foo. then it",
    "Functions.\nread\nIntros. foo. bar. baz. Names.",
    "Eq. a < b implies c. then i think $x$",
    "Math: Let n ≤ 0. then it is. Good",
    "Line one.\r\nfor row in rows\r\n  do it\r\nGood",
    "A comment # loop. for row in rows",
    "Bash.\nbreak # Done. then go",
]
VARIABLES = [
    "For a loop: for i in range(3): print(i). X is i is 3.",
    "Point i) and i. are roman. Good.",
    "List: i. ii. iii. Good.",
    "The i-th item. Good.",
    "Case (i) can be used. Good.",
    "The variable i will be incremented. I see.",
    "Here i is an index. i can be 3. Good.",
    "Let i be an integer. Then i can vary. I know.",
    "The first i elements. i should go. Good",
    "Elements i, j and k. i may grow. Good",
    "Proof that $i$ works. Then i can be even. I know.",
    "Take x[i] and go. Then i must grow. Good",
    "The loop uses i. It adds what `i` was. Then i will grow.",
]


@pytest.mark.parametrize("text", STYLES + MARKED + ABBREVIATIONS + CODE + VARIABLES)
def test_text_that_is_not_plain_prose_is_unchanged(text: str) -> None:
    assert true_case(text) == text


@pytest.mark.parametrize("introduction", ["Sure! Here it is:\n", "Here it is. Look.\n"])
def test_excerpts_of_our_own_code_are_unchanged(introduction: str) -> None:
    for path in sorted((Path(__file__).parents[1] / "zephyr_ray").rglob("*.py"))[::4]:
        lines = path.read_text().splitlines()
        for start in range(0, len(lines), 7):
            text = introduction + "\n".join(lines[start : start + 9])
            assert true_case(text) == text


def test_a_mask_keeps_length_and_line_breaks() -> None:
    text = "Yes.\n```\na\n```\nSee `b` now."
    masked = mask(text)
    assert masked == f"Yes.\n{FILLER * 3}\n{FILLER}\n{FILLER * 3}\nSee {FILLER * 3} now."


@pytest.mark.parametrize(
    "text",
    ["`", "` ", "$ ", "\\[", "\\(", "\\begin{a}", "<pre>", "<!--", "a-", "a/", "http://", "x@a",
     "for : ", ". select x ", "```\n", "a,", "  \n", "\t", " ", "\n", " \t", "# ",
     "# for a ", "a # "],
)  # fmt: skip
def test_the_time_is_linear_in_the_length(text: str) -> None:
    start = time.process_time()
    many = text * (100_000 // len(text))
    true_case(f"Aa. {many} b")
    true_case(f"Aa.\n{many}\nb")
    assert time.process_time() - start < 8
