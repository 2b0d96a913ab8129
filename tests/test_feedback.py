"""Tests feedback in several forms, and the judge's self-check, by hand and against references."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from in_process import run, run_here, work_on
from scipy.stats import spearmanr

from zephyr_ray.engines.language import LanguageEngine
from zephyr_ray.engines.model import Model
from zephyr_ray.engines.openai import OpenAISettings
from zephyr_ray.engines.rules import RulesSettings
from zephyr_ray.errors import Permanent
from zephyr_ray.judges import RATING_FORMS
from zephyr_ray.judges.agreement import krippendorff_alpha, spearman
from zephyr_ray.judges.aspects import ASPECTS, shuffled
from zephyr_ray.judges.form import Rating
from zephyr_ray.judges.self_check import Rated, check_table, self_check, to_json
from zephyr_ray.manifest import Manifest
from zephyr_ray.messages import Message
from zephyr_ray.models.contract import Reply, Sampling
from zephyr_ray.section import Histogram
from zephyr_ray.settings import typed
from zephyr_ray.stage import Stage
from zephyr_ray.store import Artifact, content_key
from zephyr_ray.text import feedback
from zephyr_ray.text.completions import Completions
from zephyr_ray.text.feedback import Feedback

TEXTS = ("a", "bb", "cccc", "dddddddd")


class Judge(LanguageEngine):
    """Rates an answer by its length, and adds one point for the first place in the list."""

    def __init__(self, unreadable: str = "no such text"):
        self.unreadable = unreadable
        self.questions: list[str] = []

    async def answer(self, messages: list[Message], sampling: Sampling) -> Reply:
        question = messages[0]["content"]
        self.questions.append(question)
        if self.unreadable in question:
            return Reply("hm", "stop")
        if "<answer_1>" not in question:
            [text] = [text for text in TEXTS if f"Answer:\n{text}\n" in question]
            return Reply(json.dumps({"critique": f"say more than {text}", "overall": 9}), "stop")
        places = {text: question.index(f">\n{text}\n<") for text in TEXTS}
        order = sorted(TEXTS, key=places.__getitem__)
        ratings = {
            f"answer_{n}": {
                "rationale": f"about {text}",
                "rating": "N/A" if "honest answers" in question else TEXTS.index(text) + (n == 1),
            }
            for n, text in enumerate(order, 1)
        }
        for rated in ratings.values():
            if rated["rating"] == 0:
                rated["rating"] = 1
        return Reply(json.dumps(ratings), "stop")


def give(
    folder: Path, monkeypatch: pytest.MonkeyPatch, engine: Judge, **settings: Any
) -> tuple[list[dict[str, Any]], Any, Feedback]:
    run_here(monkeypatch, feedback, engine)
    prompts = [
        {
            "id": f"p{number}",
            "prompt": f"Write {number}.",
            "instruction": f"Write {number}.",
            "constraint": None,
            "completions": [{"model": f"m{n}", "text": text} for n, text in enumerate(TEXTS)],
        }
        for number in range(3)
    ]
    work = work_on(folder, answers=prompts)
    judge = OpenAISettings(model="judge", base_url="http://127.0.0.1/v1")
    work.models = {"judge": Model("judge", judge)}
    stage = Feedback(judge="judge", completions="answers", **settings)
    return run(stage, work), work, stage


def test_both_forms_rate_every_completion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Judge()
    settings = {"forms": ["aspects", "critique"], "rated_again": 0}
    rows, work, _ = give(tmp_path, monkeypatch, engine, **settings)
    assert len(engine.questions) == 3 * (4 + 4)  # four aspects, and a critique per answer
    for row in rows:
        assert [c["text"] for c in row["completions"]] == list(TEXTS)
        for index, completion in enumerate(row["completions"]):
            assert completion["critique"] == f"say more than {completion['text']}"
            assert completion["overall"] == 9
            rated = completion["aspects"]
            assert rated["honesty"]["rating"] is None
            first = {name: rated[name]["position"] == 1 for name in ASPECTS}
            expected = [max(1, index + first[name]) for name in ASPECTS if name != "honesty"]
            assert [rated[n]["rating"] for n in ASPECTS if n != "honesty"] == expected
            assert completion["score"] == pytest.approx(sum(expected) / 3)
    assert work.counts["unparsable"] == 0 and work.counts["answers"] == 12


def test_the_first_form_decides_the_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, work, _ = give(tmp_path, monkeypatch, Judge(), forms=["critique", "aspects"])
    assert [c["score"] for c in rows[0]["completions"]] == [9] * 4
    assert work.counts["score_mean"] == 9


def test_a_score_is_never_that_of_another_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The request about the aspects failed, for example because it was too long.
    results = [{"id": "p/0/critique", "score": 9, "reason": "fine", "checks": {}}]
    monkeypatch.setattr(feedback, "run_rows", lambda *_: results)
    completions = [{"model": "m", "text": "cat"}, {"model": "m", "text": "dog"}]
    work = work_on(tmp_path, answers=[{"id": "p", "prompt": "A pet?", "completions": completions}])
    work.models = {"judge": Model("judge", RulesSettings())}
    stage = Feedback(judge="judge", completions="answers", forms=["aspects", "critique"])
    [row] = run(stage, work)
    [completion] = row["completions"]
    assert (completion["score"], completion["reason"]) == (None, "not judged")
    assert (completion["overall"], completion["critique"]) == (9, "fine")
    section = stage.section(Artifact(work.folder, Manifest(kind="feedback", key="k", files={})))
    assert section and section.chapters[1].blocks


def test_replies_that_stay_unreadable_are_counted_by_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The truthfulness request of each prompt, which is sent twice.
    rows, work, _ = give(tmp_path, monkeypatch, Judge("how true"), forms=["aspects"], rated_again=0)
    assert (work.counts["unparsable"], work.counts["unparsable_at_first"]) == (3, 3)
    completion = rows[0]["completions"][0]
    assert (completion["score"], completion["aspects"]) == (None, None)
    assert completion["reason"] == "truthfulness: unparsable: 'hm'"
    checks = json.loads((work.folder / feedback.SELF_CHECK).read_text())
    assert {c["name"]: c["unparsable"] for c in checks} == {
        "instruction_following": 0, "honesty": 0, "truthfulness": 12, "helpfulness": 0
    }  # fmt: skip


def test_a_sample_is_rated_again_in_another_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Judge()
    rows, work, stage = give(tmp_path, monkeypatch, engine, forms=["aspects"], rated_again=1)
    assert len(engine.questions) == 3 * 2 * 4 and len(set(engine.questions)) == 3 * 2 * 4
    checks = {c["name"]: c for c in json.loads((work.folder / feedback.SELF_CHECK).read_text())}
    assert checks["honesty"]["not_applicable"] == 12 and checks["honesty"]["alpha"] is None
    helpfulness = checks["helpfulness"]
    # The judge favors the first place, so answers that leave or take it change their rating.
    assert helpfulness["rated_again"] == 12
    assert 0 < helpfulness["alpha"] < 1 and helpfulness["same"] < 1
    assert helpfulness["length_correlation"] > 0.8
    assert helpfulness["position_correlation"] is not None
    assert work.counts["alpha/helpfulness"] == helpfulness["alpha"]
    (tmp_path / "once").mkdir()
    once = give(tmp_path / "once", monkeypatch, Judge(), forms=["aspects"], rated_again=0)
    assert rows == once[0]  # the second ratings only check the judge
    section = stage.section(Artifact(work.folder, Manifest(kind="feedback", key="k", files={})))
    assert section
    histograms = [b for b in section.chapters[0].blocks if isinstance(b, Histogram)]
    assert [h.highest for h in histograms] == [5] * 4


@pytest.mark.parametrize("number", [2, 3, 4, 5])
def test_each_answer_is_rated_again_in_another_place(number: int) -> None:
    completions = [{"model": "m", "text": text} for text in "abcde"[:number]]
    prompts = [{"id": f"p{n}", "completions": completions} for n in range(5)]
    stage = Feedback(judge="j", completions="c", forms=["aspects"], rated_again=1)
    places: dict[str, list[int]] = {}
    for request in stage._requests(prompts):
        for place, index in enumerate(shuffled(number, request["order_seed"])):
            places.setdefault(request["answers"][index], []).append(place)
    assert len(places) == 5 * number and all(first != again for first, again in places.values())


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.07, 7), (0.071, 8), (1.0, 100)])
def test_the_sample_is_as_large_as_planned(share: float, count: int) -> None:
    completions = [{"model": "m", "text": text} for text in TEXTS]
    prompts = [{"id": f"p{n}", "completions": completions} for n in range(100)]
    stage = Feedback(judge="j", completions="c", forms=["aspects"], rated_again=share)
    again = [row["id"] for row in stage._requests(prompts) if row["again"]]
    assert len(again) == count
    reads: dict[str, Stage] = {"c": Completions(models=list("abcd"), prompts="p")}
    assert stage.calls({"c": 100}, reads)["j"].calls == 4 * (100 + count)


@pytest.mark.parametrize(
    ("forms", "line"),
    [
        (["aspect"], "no form 'aspect' rates answers; did you mean 'aspects'"),
        (["pairwise"], "no form 'pairwise' rates answers; known: aspects, critique, score"),
        (["score", "score"], "names a form twice"),
        ([], "at least 1 item"),
    ],
)
def test_forms_that_rate_nothing_are_refused(forms: list[str], line: str) -> None:
    settings = {"judge": "j", "completions": "c", "forms": forms}
    with pytest.raises(Permanent, match=line):
        typed(Feedback, settings, "recipe")


def test_the_key_has_the_wording_of_all_forms_except_the_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def keys() -> list[str]:
        forms = (["score"], ["aspects"], ["score", "critique"], ["critique", "score"])
        stages = [Feedback(judge="j", completions="c", forms=list(names)) for names in forms]
        return [content_key(stage.identity()) for stage in stages]

    before = keys()
    assert len(set(before)) == 4
    for form in ("score", "critique"):
        [question] = RATING_FORMS[form].questions
        changed = (replace(question, wording=f"{question.wording} Be strict."),)
        monkeypatch.setattr(type(RATING_FORMS[form]), "questions", changed)
    changed_keys = [old != new for old, new in zip(before, keys(), strict=True)]
    assert changed_keys == [False, False, True, True]


def test_calls_of_both_forms_by_hand() -> None:
    stage = Feedback(judge="j", completions="c", forms=["aspects", "critique"], rated_again=0.1)
    reads: dict[str, Stage] = {"c": Completions(models=list("abcd"), prompts="p", max_tokens=200)}
    calls = stage.calls({"c": 100}, reads)["j"]
    # Per prompt 4 aspects, again for a tenth of the prompts, and 4 critiques.
    assert calls.calls == pytest.approx(100 * (1.1 * 4 + 4))
    assert calls.tokens_out == pytest.approx(100 * (1.1 * 4 * (96 + 4 * 160) + 4 * 768))
    together, alone = 320 + 256 + 4 * 200, 256 + 256 + 200
    assert calls.tokens_in == pytest.approx(100 * (1.1 * 4 * together + 4 * alone))


def test_the_table_shows_that_no_rating_was_repeated() -> None:
    answers = [Rated(f"{n}", "m", 9, {"overall": Rating(n)}) for n in (1, 2)]
    again = [Rated(f"{n}", "m", 9, {"overall": Rating(n + 1)}) for n in (1, 2)]
    table = check_table(to_json([self_check("overall", answers, again)]))
    headings = [column.heading for column in table.columns]
    assert headings == ["Rating", "Rated", "Mean", "Rated again", "Agreement", "Same rating"]
    assert table.rows[0][-1] == 0.0


# --- statistics ----------------------------------------------------------------------------------

_ = None
OBSERVERS = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, _, _, _],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, _, 3],
    [_, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, _],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, _],
]
"""The example of Krippendorff 2011, section C: four observers, twelve units."""


def test_alpha_of_the_published_example() -> None:
    units = [[v for v in unit if v is not None] for unit in zip(*OBSERVERS, strict=True)]
    assert krippendorff_alpha(units) == pytest.approx(0.815, abs=5e-4)


def test_alpha_by_hand() -> None:
    assert krippendorff_alpha([(1, 1), (5, 5)]) == 1
    # Four ratings 1, 1, 2, 2; observed: each unit disagrees. All distances are (2/2 + 2/2)² = 4:
    # observed 4 coincidences × 4, expected 2 × (2 × 2) × 4 / 3, so alpha = 1 − 16 / (32 / 3).
    assert krippendorff_alpha([(1, 2), (2, 1)]) == pytest.approx(-0.5)
    assert krippendorff_alpha([(3, 3), (3, 3)]) is krippendorff_alpha([]) is None
    assert krippendorff_alpha([(1, 1), (5, 5), (3,)]) == 1


def test_spearman_agrees_with_scipy() -> None:
    a, b = [1, 1, 2, 3, 3, 3, 5], [4, 2, 2, 9, 1, 8, 10]
    assert spearman(a, b) == pytest.approx(spearmanr(a, b).statistic)
    assert spearman([1, 2], [1, 2]) is spearman([1, 1, 1], [1, 2, 3]) is spearman([], []) is None


def test_a_self_check_by_hand() -> None:
    def rated(id: str, characters: int, value: float | None, position: int) -> Rated:
        return Rated(id, "m" + id, characters, {"x": Rating(value, position)})

    answers = [
        rated("a", 10, 1, 3),
        rated("b", 20, 3, 2),
        rated("c", 30, 5, 1),
        rated("d", 40, None, 4),
        Rated("e", "me", 50, {}),
    ]
    again = [
        rated("a", 10, 1, 1),
        rated("b", 20, 4, 3),
        rated("d", 40, 2, 1),
        Rated("c", "mc", 30, {}),
    ]
    check = self_check("x", answers, again)
    assert (check.rated, check.mean, check.not_applicable, check.unparsable) == (3, 3, 1, 1)
    assert check.mean_by_model == {"ma": 1, "mb": 3, "mc": 5}
    assert check.length_correlation == pytest.approx(1)
    assert check.position_correlation == pytest.approx(-1)
    assert (check.rated_again, check.same) == (2, 0.5)
    assert check.alpha == krippendorff_alpha([(1, 1), (3, 4)])
