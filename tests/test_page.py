"""Tests the page of `zephyr serve` in a real browser, against a real service with a tiny model.

Skipped without Chromium (`apt-get install chromium`).
"""

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chrome import Chrome
from serving import KEY, Service

from zephyr_ray.text.votes import read_votes

pytestmark = pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator[Chrome]:
    with Chrome() as browser:
        yield browser


@pytest.fixture
def page(browser: Chrome, service: Service) -> Chrome:
    """Opens the page with a valid key and an empty conversation."""
    browser.emulate()
    browser.open(f"{service.address}/")
    # Otherwise, the page would save its conversation again when it is left.
    browser.eval("removeEventListener('pagehide', save)")
    browser.eval("localStorage.clear()")
    browser.eval("sessionStorage.clear()")
    browser.open(f"{service.address}/")
    browser.wait("!document.querySelector('#key-form').hidden")
    browser.type("#key", KEY)
    browser.press("Enter")
    browser.wait("document.querySelectorAll('#model-a option').length === 2")
    browser.problems.clear()  # the 401 that made the page ask for the key
    return browser


def ask(page: Chrome, text: str) -> None:
    turns = page.eval("state.turns.length")
    page.type("#prompt", text)
    page.press("Enter")
    page.wait(f"state.turns.length > {turns} && !busy()", timeout=300)


def names_on(page: Chrome) -> list[str]:
    """Returns the texts on the page that name a model, except in menus and inside answers; the
    headers of answers come first."""
    return page.eval(
        """(() => {
          const copy = document.documentElement.cloneNode(true);
          for (const node of copy.querySelectorAll('script, select, .markdown')) node.remove();
          const announcer = copy.querySelector('#announcer');
          const announced = announcer.textContent.split('\\n')
            .filter((line) => / answered:/.test(line)).map((line) => line.split(' answered:')[0]);
          announcer.remove();
          const heads = [...copy.querySelectorAll('.message[data-role=assistant]')].map((node) => {
            const head = node.querySelector('header').textContent;
            if (node.ariaLabel === `Answer: ${head}`) node.remove();
            return head;
          });
          return [...heads, ...announced, copy.outerHTML].filter((text) => /dpo|slim/.test(text));
        })()"""
    )


def footers(page: Chrome) -> str:
    selector = ".message[data-role=assistant] footer"
    return page.eval(f"[...document.querySelectorAll('{selector}')].map(f => f.innerText).join()")


def votes_of(service: Service) -> list[dict[str, Any]]:
    """Returns the votes that a recipe would read, in the order in which they were stored."""
    folder = service.run / "votes"
    return read_votes(folder) if list(folder.glob("*.jsonl")) else []


def answer(page: Chrome, side: str) -> str:
    selector = f".message[data-role=assistant][data-side={side}] .markdown"
    return str(page.eval(f"[...document.querySelectorAll('{selector}')].at(-1).innerText"))


def test_a_wrong_key_is_refused_and_a_valid_one_accepted(browser: Chrome, service: Service) -> None:
    browser.open(f"{service.address}/")
    browser.eval("sessionStorage.clear()")
    browser.open(f"{service.address}/")
    browser.wait("!document.querySelector('#key-form').hidden")
    browser.type("#key", "not-the-key")
    browser.press("Enter")
    browser.wait("/refused this key/.test(document.querySelector('#key-form').innerText)")
    assert browser.eval("document.querySelectorAll('#model-a option').length") == 0
    browser.type("#key", KEY)
    browser.press("Enter")
    browser.wait("document.querySelectorAll('#model-a option').length === 2")


def test_two_models_are_compared_voted_on_and_exported(
    page: Chrome, service: Service, tmp_path: Path
) -> None:
    page.click("#compare")
    page.choose("#model-a", "dpo")
    page.choose("#model-b", "slim")
    ask(page, "Name a bird.")
    assert answer(page, "left") != answer(page, "right")
    assert names_on(page) == []
    assert "tokens" not in footers(page)  # the speed could reveal the model
    page.click('.vote button[data-vote="right"]')
    page.wait("/saved/i.test(document.body.innerText)")
    vote = votes_of(service)[-1]
    assert (vote["prompt"], vote["blind"]) == ("Name a bird.", True)
    assert [c["score"] for c in vote["completions"]] == [1, 10]
    left, right = (c["model"] for c in vote["completions"])
    assert {left, right} == {"dpo", "slim"}
    assert names_on(page) == [f"Left: {left}", f"Right: {right}"]
    assert "tokens/s" in footers(page)
    page.downloads_to(tmp_path)
    page.click("#export")
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("*.jsonl")):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    [file] = tmp_path.glob("*.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert {row["model"] for row in rows} == {"dpo", "slim"}
    assert all(row["messages"][0]["content"] == "Name a bird." for row in rows)
    assert page.problems == []


def test_a_vote_is_taken_back_and_the_next_one_is_not_blind(page: Chrome, service: Service) -> None:
    before = len(votes_of(service))
    page.click("#compare")
    page.choose("#model-a", "dpo")
    page.choose("#model-b", "slim")
    ask(page, "Name a fish.")
    page.press("Escape")  # leaves the field, so that the key 1 votes
    page.press("1")
    page.wait("/saved/i.test(document.body.innerText)")
    assert len(votes_of(service)) == before + 1
    page.click('.vote button[data-vote="none"]')
    page.wait("!document.querySelector('.vote button[data-vote=tie]').disabled")
    assert len(votes_of(service)) == before
    assert len(names_on(page)) == 2  # the vote revealed both names
    page.click('.vote button[data-vote="tie"]')
    page.wait("/saved/i.test(document.body.innerText)")
    vote = votes_of(service)[-1]
    assert ([c["score"] for c in vote["completions"]], vote["blind"]) == ([5.5, 5.5], False)
    assert page.problems == []


def test_sides_are_random_while_both_models_have_the_same_conversation(page: Chrome) -> None:
    drawn = """(turns) => {
      Object.assign(state, {turns, compare: true, models: {a: 'dpo', b: 'slim'}});
      const draws = [...Array(64)].map(() => drawSides(turns.at(-1)));
      const blind = turns.at(-1).blind;
      state.turns = [];
      return [[...new Set(draws.map(({left, right}) => `${left} ${right}`))].sort(), blind];
    }"""
    both = {side: {"text": f"Answer {side}"} for side in ("left", "right")}
    past: dict[str, object] = {"prompt": "a", "answers": both, "swapped": True}
    new = {"prompt": "b", "answers": {}}
    every = ["dpo slim", "slim dpo"]
    assert page.eval(f"({drawn})({json.dumps([new])})") == [every, True]
    assert page.eval(f"({drawn})({json.dumps([{**past, 'vote': 'left'}, new])})") == [every, True]
    # Without a vote, each model goes on with its own answer.
    assert page.eval(f"({drawn})({json.dumps([past, new])})") == [["slim dpo"], False]


def test_a_conversation_survives_a_reload_and_nothing_leaves_the_origin(
    page: Chrome, service: Service
) -> None:
    ask(page, "Remember me.")
    text = answer(page, "left")
    page.open(f"{service.address}/")
    page.wait("document.querySelector('.message[data-role=assistant]')")
    assert answer(page, "left").split("\n")[0] == text.split("\n")[0]
    assert all(url.startswith((service.address, "data:", "blob:")) for url in page.requests)


def test_no_sideways_scroll_on_a_phone(page: Chrome) -> None:
    page.emulate(width=360, height=640)
    page.click("#compare")
    ask(page, "word " * 20 + "x" * 100)  # fits the model's context, but not the phone's width
    assert page.problems == []
    assert page.eval("document.documentElement.scrollWidth") <= 360


def show(page: Chrome, text: str) -> None:
    """Renders text as the page renders an answer, into a new element `seen`."""
    page.eval("document.body.append(window.seen = document.createElement('div')), null")
    page.eval(f"seen.append(markdown({json.dumps(text)})), null")


HOSTILE = """<img src=x onerror="window.hacked=1"><script>window.hacked=1</script>
[a](javascript:window.hacked=1) [b](data:text/html,x) ![c](http://elsewhere.example/x.png)
<a href="javascript:window.hacked=1">d</a> [e](java&#115;cript:window.hacked=1)"""


def test_an_answer_cannot_inject_markup(page: Chrome) -> None:
    show(page, HOSTILE)
    for link in ("a", "b", "e"):
        page.eval(f"[...seen.querySelectorAll('a')].find(a => a.text === '{link}')?.click()")
    assert page.eval("seen.querySelectorAll('img, script, iframe, [onerror]').length") == 0
    schemes = page.eval("[...seen.querySelectorAll('a')].map(a => a.protocol)")
    assert set(schemes) <= {"http:", "https:", "mailto:"}
    assert "<script>window.hacked=1</script>" in page.eval("seen.textContent")
    assert page.eval("window.hacked") is None
    assert page.problems == []


def test_markdown_is_rendered(page: Chrome) -> None:
    text = "# Title\n\n**bold** `code`\n\n1. one\n2. two\n\n```python\nx = '<b>'\n```\n"
    show(page, text)
    count = "(tag) => seen.querySelectorAll(tag).length"
    tags = page.eval(f"['strong', 'p code', 'ol li', 'pre code'].map({count})")
    assert tags == [1, 1, 2, 1]
    assert page.eval("seen.querySelector('pre code').textContent.trim()") == "x = '<b>'"
