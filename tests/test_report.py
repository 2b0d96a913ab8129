"""Tests the report page, from artifacts on disk that have the stages' schemas."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from zephyr_ray.errors import Permanent
from zephyr_ray.judge.pairwise import Pairwise
from zephyr_ray.manifest import Manifest
from zephyr_ray.report.page import Report
from zephyr_ray.report.plots.histograms import Bins
from zephyr_ray.report.render import FOLDER
from zephyr_ray.report.summary import summarize_stages
from zephyr_ray.section import (
    Bars,
    Chapter,
    Column,
    Curve,
    Histogram,
    Interval,
    Place,
    Section,
    Table,
    Text,
)
from zephyr_ray.stage import Stage, Work
from zephyr_ray.store import Artifact
from zephyr_ray.text.feedback import Feedback
from zephyr_ray.train.dpo import Dpo
from zephyr_ray.train.sft import Sft

EVIL = "<script>alert('x')</script><img src=http://evil.example/a.png>"
MODELS = ("base", "sft", "dpo", "control")
PASS = dict(zip(MODELS, (0.208, 0.637, 0.783, 0.767), strict=True))


class Silent(Stage):
    """A stage that contributes nothing but its counts."""

    makes = "nothing"


STAGES: dict[str, Stage] = {
    "feedback": Feedback(judge="judge", completions="answers"),
    "sft": Sft(model="base", data="dialogues"),
    "dpo": Dpo(model="sft", data="pairs"),
    "pairwise": Pairwise(judge="judge", baseline="answers_base", answers=["answers_dpo"]),
    "self_instruct": Silent(),
}


def make(root: Path, name: str, kind: str, **manifest: Any) -> Artifact:
    folder = root / name
    folder.mkdir()
    fields = {"name": name, "kind": kind, "key": f"{len(name):016x}", "version": 1} | manifest
    fields.setdefault("counts", {"rows": 3})
    return Artifact(folder, Manifest(**{"files": {}} | fields))


def write(artifact: Artifact, name: str, rows: list[dict[str, Any]]) -> Artifact:
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (artifact.folder / name).write_text(lines, encoding="utf-8")
    return artifact


def feedback(root: Path) -> Artifact:
    completions = [
        {"model": m, "text": EVIL, "finish_reason": "stop", "score": s, "reason": "", "checks": {}}
        for m, s in (("base", 2), ("sft", 9), ("sft", None))
    ]
    rows = [{"id": str(i), "prompt": "p", "completions": completions} for i in range(3)]
    return write(make(root, "rated", "feedback", seconds=20.0), "rows.jsonl", rows)


def training(root: Path, name: str, kind: str) -> Artifact:
    artifact = make(
        root,
        name,
        kind,
        settings={"learning_rate": 5e-05, "model": "sft", "note": EVIL},
        reads={"rated": "0" * 16},
        seconds=95.0,
        attempts=2,
        counts={"rows": 3, "train/loss_final": 0.5},
        created="2026-11-22T10:00:00+00:00",
    )
    (artifact.folder / "mask.html").write_text("<p>the <mark>mask</mark></p>")
    extra = {"rewards/margins": 0.4, "rewards/accuracies": 0.8} if kind == "dpo" else {}
    steps = [{"step": i, "steps": 30, "loss": 3 - i / 15, **extra} for i in range(1, 31)]
    return write(artifact, "metrics.jsonl", steps)


def pairwise(root: Path, **changes: Any) -> Artifact:
    artifact = make(
        root,
        "evaluation",
        "pairwise",
        counts={"rows": 12, "dropped/near duplicate": 7, "truncated": 4, "failed/over_long": 0},
        examples={"dropped/near duplicate": [EVIL]},
        seconds=61.0,
    )
    models = {
        m: {
            "win_rate": 0.4871 if m == "base" else 0.77,
            "low": 0.72,
            "high": 0.83,
            **{"wins": 1501, "ties": 40, "losses": 30, "flips": 6, "parse_failures": 0},
            "prompts": 240,
            "pass_rate": PASS[m],
            "pass_low": PASS[m] - 0.06,
            "pass_high": PASS[m] + 0.06,
            "on_topic": 0.91,
            "words": 18.25,
            "length_bias": 0.48,
            "by_constraint": {"no_commas": {"pass_rate": 0.91, "prompts": 16}},
        }
        for m in MODELS
    }
    result = {
        "baseline": "base",
        "judge": "rules",
        "control": "control",
        "models": models,
        "differences": [
            {"a": "dpo", "b": "control", "pass_difference": 0.017, "low": -0.042, "high": 0.075}
        ],
        **changes,
    }
    (artifact.folder / "result.json").write_text(json.dumps(result))
    rows = [
        {
            "id": f"held-{i}",
            "prompt": f"Prompt number {i}.",
            "answers": {
                m: {"text": f"{m} says {EVIL}", "finish_reason": "length", "score": 3}
                for m in MODELS
                if (m, i) != ("sft", 0)
            },
            "verdicts": {"dpo": {"verdict": 1, "reason": "checks 3 to 1"}},
        }
        for i in range(12)
    ]
    return write(artifact, "rows.jsonl", rows)


def page(root: Path, *artifacts: Artifact, released: Any = None, **stages: Stage) -> str:
    inputs = {a.manifest.name: a for a in artifacts}
    known = {n: s for n, a in inputs.items() if (s := STAGES.get(a.manifest.kind))}
    work = Work("report", root / "report", 0, inputs, {}, {}, known | stages)
    work.folder.mkdir()
    Report(of=list(inputs), title="quickstart", released=released or {}).run(work)
    return (work.folder / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("run")
    stages = [training(root, "sft", "sft"), training(root, "dpo", "dpo")]
    return page(root, *stages, feedback(root), pairwise(root))


def labels(html: str) -> list[str]:
    """Returns the descriptions of the plots."""
    return re.findall(r'<svg [^>]*aria-label="([^"]+)"', html)


def words(html: str) -> str:
    """Returns the visible text on one line."""
    return re.sub(r"[ \n]+", " ", re.sub(r"<[^>]*>", " ", html))


def without_script(html: str) -> str:
    """Returns the page without its own script, which must occur exactly once."""
    script = f"<script>{(FOLDER / 'page.js').read_text(encoding='utf-8')}</script>"
    assert html.count(script) == 1
    return html.replace(script, "")


def headings(html: str) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", html)


def test_sections_come_in_order(full: str) -> None:
    assert headings(full) == [
        *("Result", "Training", "Scores the judge gave", "Samples", "Pipeline"),
        *("What failed, was dropped or was changed", "Settings and counts", "Loss mask"),
    ]


def test_headline_is_honest_about_the_control(full: str) -> None:
    assert (
        "Ship dpo: it has a win rate of 0.77 [0.72, 0.83] against base on 240 held-out prompts. "
        "Against control, the DPO term adds nothing measurable: checks passed +0.017 "
        "[−0.042, +0.075]; 78% of dpo&#39;s answers pass the checks (base: 21%), in 18 words on "
        "average (18)."
    ) in full


NO_DIFFERENCE = "cannot be distinguished from no difference (0.50)"


def test_headline_says_when_the_interval_includes_one_half(tmp_path: Path) -> None:
    figures = {"win_rate": 0.52, "low": 0.44, "high": 0.6, "prompts": 240}
    html = page(tmp_path, pairwise(tmp_path, models={"base": {}, "sft": figures}, differences=[]))
    assert NO_DIFFERENCE in html


@pytest.mark.parametrize(
    ("low", "high", "says"),
    [
        (0.55, 0.7, "Ship sft: it has"),
        (0.2, 0.45, "Ship base: the best of the other models, sft, has"),
    ],
)
def test_headline_of_a_winner_or_a_loser_leaves_no_doubt(
    tmp_path: Path, low: float, high: float, says: str
) -> None:
    figures = {"win_rate": (low + high) / 2, "low": low, "high": high, "prompts": 240}
    html = page(tmp_path, pairwise(tmp_path, models={"base": {}, "sft": figures}, differences=[]))
    assert f'<p class="headline">{says}' in html and NO_DIFFERENCE not in html


@pytest.mark.parametrize(
    ("entry", "effect"),
    [
        (
            {"a": "control", "b": "dpo", "pass_difference": -0.1, "low": -0.2, "high": -0.05},
            "helps: checks passed +0.100 [+0.050, +0.200]",
        ),
        (
            {"a": "dpo", "b": "control", "pass_difference": -0.1, "low": -0.2, "high": -0.05},
            "hurts: checks passed −0.100 [−0.200, −0.050]",
        ),
    ],
)
def test_headline_reads_the_difference_the_right_way_round(
    tmp_path: Path, entry: dict[str, Any], effect: str
) -> None:
    assert f"the DPO term {effect}" in page(tmp_path, pairwise(tmp_path, differences=[entry]))


@pytest.mark.parametrize(
    ("low", "high", "says"),
    [(0.0, 0.1, "includes 0"), (0.01, 0.1, "excludes 0"), (-0.1, -0.01, "excludes 0")],
)
def test_a_difference_says_whether_its_interval_includes_zero(
    tmp_path: Path, low: float, high: float, says: str
) -> None:
    entry = {"a": "dpo", "b": "sft", "pass_difference": 0.05, "low": low, "high": high}
    text = words(page(tmp_path, pairwise(tmp_path, differences=[entry])))
    assert says in text
    assert ("may be chance" in text) == (says == "includes 0")


def test_headline_is_about_the_model_whose_differences_were_taken(tmp_path: Path) -> None:
    figures = {"win_rate": 0.7, "low": 0.6, "high": 0.8, "prompts": 240}
    models = dict.fromkeys(("base", "dpo", "again_sft", "dpo_only"), figures)
    entry = {"a": "dpo", "b": "again_sft", "pass_difference": 0.1, "low": 0.05, "high": 0.2}
    html = page(
        tmp_path, pairwise(tmp_path, models=models, differences=[entry], control="again_sft")
    )
    assert '<p class="headline">Ship dpo: it has' in html
    assert "Against again_sft, the DPO term helps: checks passed +0.100" in html


def test_figures_of_models_and_constraints_appear(full: str) -> None:
    text = words(full)
    for figure in ("0.64", "[0.58, 0.70]", "18.3", "1\u202f501 / 40 / 30", "no_commas 16 0.91"):
        assert figure in text
    assert "0.49" not in text, "the baseline has no win rate against itself"


def test_stage_times_attempts_and_drops_appear(full: str) -> None:
    text = words(full)
    assert "dpo dpo 3 1 min 35 s 2 rated" in text and "train/loss_final 0.50" in text
    assert "Sum 4 min 31 s" in text
    assert "dropped/near duplicate 7" in text and "truncated 4" in text
    assert "over_long" not in text, "a count of 0 has no row"
    assert "learning_rate 5e-05" in text


def test_counts_are_integers_and_shares_have_decimals(tmp_path: Path) -> None:
    counts = {"rows": 3, "openings": 11.0, "all_unique": 1.0, "score_mean": 6.125}
    text = words(page(tmp_path, make(tmp_path, "seeds", "self_instruct", counts=counts)))
    assert "openings 11 all_unique 1.00 score_mean 6.13" in text


def test_text_from_models_is_escaped(full: str) -> None:
    assert "<script" not in without_script(full) and "<img" not in full
    assert full.count("&lt;script&gt;alert(") >= 40


def test_page_needs_nothing_from_outside(full: str) -> None:
    tags = re.findall(r"<[a-z][^>]*>", full)
    reached = re.findall(r"""(?:\bsrc|\bhref)\s*=\s*["']?([^"'\s>]+)""", " ".join(tags))
    reached += re.findall(r"url\(([^)]*)\)", full)
    assert reached and [target for target in reached if not target.startswith("#")] == []
    assert "@import" not in full and "<link" not in full


def test_samples_are_chosen_by_hash_of_the_id(full: str) -> None:
    import hashlib

    ids = sorted(range(12), key=lambda i: hashlib.sha256(f"held-{i}".encode()).hexdigest())
    shown = re.findall(r"Prompt number (\d+)\.", full)
    assert [int(i) for i in shown] == ids


def test_plots_are_inline_and_described(full: str) -> None:
    described = labels(full)
    assert "Win rate against base: sft 0.77 from 0.72 to 0.83; dpo" in described[0]
    assert "sft · loss over 30 steps: from 2.93 to 1" in described
    # Two bar charts, one curve of SFT, three of DPO, two histograms, and the pipeline twice.
    assert len(described) == 2 + 1 + 3 + 2 + 2


def test_each_rate_has_its_own_interval(full: str) -> None:
    assert (
        "Checks passed: base 0.21 from 0.15 to 0.27; sft 0.64 from 0.58 to 0.70" in labels(full)[1]
    )


def test_an_answer_without_a_score_is_counted_but_not_drawn(full: str) -> None:
    [sft] = [label for label in labels(full) if label.startswith("sft: ")]
    assert "scores around 1: 0" in sft and "scores around 9: 3" in sft
    assert "3 answers have no readable score." in full


def test_samples_show_who_won(tmp_path: Path) -> None:
    artifact = pairwise(tmp_path)
    answers = {m: {"text": f"{m} says", "finish_reason": "stop"} for m in MODELS}
    verdicts = {
        **{"sft": {"verdict": 0.0}, "dpo": {"verdict": 1.0}, "control": {"verdict": 0.5}},
        "base": {"verdict": 0.5, "reason": "equal"},
    }
    row = {"id": "h", "prompt": "Name a fish.", "answers": answers, "verdicts": verdicts}
    html = page(tmp_path, write(artifact, "rows.jsonl", [row]))
    headers = re.findall(r"<header>(.*?)</header>", html)
    assert [words(header).split() for header in headers] == [
        ["base"],
        ["sft", "loss"],
        ["dpo", "win"],
        ["control", "tie"],
    ]


class Toy(Stage):
    """A stage of a kind that the report does not know."""

    kind = "toy"
    makes = "toys"

    def section(self, artifact: Artifact) -> Section:
        cells = ("row", 1234, 0.745, Interval(-0.5, -0.745, 0.25), (3, 1), None, EVIL)
        columns = (*(Column(heading, digits=2) for heading in "abcdef"), Column("g"))
        blocks = (
            Text(f"A finding. {EVIL}"),
            Table(columns, (cells,), "Title", ("Explained.",)),
            Bars("Bars", (("x", Interval(0.745, 0.445, 0.9)),)),
            Histogram("y", (2.5, 7.75, 8.2)),
        )
        curve = Chapter(
            "Toys", Place.PROCESS, (Curve("height", ((1, 2.0), (2, 4.0))),), "An intro."
        )
        chapters = (Chapter("Toy results", Place.RESULT, blocks), curve)
        return Section(chapters, "Toys are fun.")


def bins_of(*scores: float, highest: int = 10) -> Bins:
    return Bins.of([Histogram("a", scores[:2], highest), Histogram("b", scores[2:], highest)])


def test_scores_from_1_on_have_a_bin_per_whole_number_and_others_ten_equal_ones() -> None:
    bins = bins_of(1, 2.4, 2.5, 10)
    assert bins.names() == [str(n) for n in range(1, 11)]
    assert bins.count([1, 2.4, 2.5, 10]) == [1, 1, 1, 0, 0, 0, 0, 0, 0, 1]
    assert bins_of(1, 4.5, 5, highest=5).count([1, 4.5, 5]) == [1, 0, 0, 0, 2]
    bins = bins_of(-3, 0, 1.5, 2)  # bins of half a point
    assert bins.names()[:3] == ["−2.75", "−2.25", "−1.75"]
    assert bins.count([-3, -2.5, 0, 1.5, 2]) == [1, 1, 0, 0, 0, 0, 1, 0, 0, 2]
    assert bins_of(-1.5, -1.5).count([-1.5, -1.5])[0] == 2


def test_the_section_of_a_new_stage_kind_is_drawn(tmp_path: Path) -> None:
    html = page(tmp_path, make(tmp_path, "toy", "toy"), toy=Toy())
    assert headings(html)[:2] == ["Toy results", "Toys"]
    assert '<p class="headline">Toys are fun.' in html
    text = words(html)
    for part in ("A finding.", "Title", "Explained.", "An intro."):
        assert part in text
    assert "row 1\u202f234 0.75 −0.50 [−0.75, 0.25] 3 / 1 –" in text
    assert "<script" not in without_script(html) and html.count("&lt;script") == 2
    bars, histogram, curve = labels(html)[:3]
    assert bars == "Bars: x 0.75 from 0.45 to 0.90"
    assert "scores around 3: 1" in histogram and "scores around 8: 2" in histogram
    assert curve == "toy · height over 2 steps: from 2 to 4"


def test_chapters_of_several_stages_name_them(tmp_path: Path) -> None:
    """The last stage's result comes first, because its finding is the verdict."""
    made = [make(tmp_path, name, "toy") for name in ("left", "right")]
    html = page(tmp_path, *made, left=Toy(), right=Toy())
    assert headings(html)[:2] == ["Toy results", "Toys"]
    assert re.findall(r"<h3><a [^>]*>(\w+)</a></h3>", html) == [
        *("right", "left"),
        *("left", "right"),
    ]
    assert html.count("An intro.") == 1


def test_the_loss_mask_is_in_a_sandboxed_frame(full: str) -> None:
    assert 'srcdoc="&lt;p&gt;the &lt;mark&gt;mask' in full
    assert len(re.findall("<iframe sandbox ", full)) == 2


def test_missing_kinds_leave_no_empty_section(tmp_path: Path) -> None:
    html = page(tmp_path, make(tmp_path, "seeds", "self_instruct", seconds=3.0))
    assert headings(html) == [
        "Pipeline",
        "What failed, was dropped or was changed",
        "Settings and counts",
    ]
    assert "Nothing." in html and 'href="#result"' not in html


def test_model_missing_from_parts_does_not_break_the_page(tmp_path: Path) -> None:
    models = {"base": {"prompts": 3}, "sft": {"win_rate": None}, "late": {}}
    html = page(tmp_path, pairwise(tmp_path, models=models, differences=[]))
    assert '<th scope="row">late</th>' in html


def test_step_written_twice_by_a_resumed_run_counts_once(tmp_path: Path) -> None:
    artifact = make(tmp_path, "sft", "sft")
    write(artifact, "metrics.jsonl", [{"step": s, "loss": v} for s, v in ((1, 9), (2, 8), (1, 7))])
    [label, *_] = labels(page(tmp_path, artifact))
    assert label == "sft · loss over 2 steps: from 7 to 8"


def validated(root: Path, counts: dict[str, float]) -> Artifact:
    """Returns a trained model with validation before training, after 20 steps and at the end."""
    artifact = make(root, "dpo", "dpo", counts={"rows": 3, **counts})
    steps: list[dict[str, Any]] = [{"step": n, "loss": 0.69 - n / 100} for n in range(1, 31)]
    steps.insert(0, {"step": 0, "validation/loss": 0.6931})
    for step, loss in ((20, 0.6), (30, 0.58)):
        steps[step]["validation/loss"] = loss
    return write(artifact, "metrics.jsonl", steps)


def test_validation_is_drawn_beside_training(tmp_path: Path) -> None:
    stage = Dpo(model="sft", data="pairs", validation=0.1)
    html = page(tmp_path, validated(tmp_path, {}), dpo=stage)
    [label, *_] = labels(html)
    assert label == "dpo · loss over 30 steps: from 0.68 to 0.39; validation from 0.693 to 0.58"
    svg = html[html.index("<svg ") : html.index("</svg>")]
    assert [word for word in ("training", "validation") if f">{word}</text>" in svg] == [
        *("training", "validation")
    ]
    assert "Validation is measured on held-out rows" in html


def test_curves_without_validation_have_no_legend(full: str) -> None:
    assert ">training</text>" not in full and "Validation" not in full


def test_released_figures_follow_the_result(tmp_path: Path) -> None:
    html = page(tmp_path, pairwise(tmp_path), released={"evaluation": {"win_rate/dpo": 0.9}})
    assert headings(html)[:2] == ["Result", "Compared with released figures"]


def test_released_figures_of_a_stage_without_a_section_are_in_order(tmp_path: Path) -> None:
    made = make(tmp_path, "seeds", "self_instruct"), pairwise(tmp_path)
    released = {"seeds": {"rows": 3}, "evaluation": {"win_rate/dpo": 0.9}}
    chapter = page(tmp_path, *made, released=released).partition("<h2>Compared with")[2]
    assert re.findall(r"<h3><a [^>]*>(\w+)</a></h3>", chapter) == ["evaluation", "seeds"]


def test_figures_of_a_released_model_are_beside_ours(tmp_path: Path) -> None:
    artifact = validated(tmp_path, {"validation/loss": 0.58})
    released = {"dpo": {"validation/loss": 0.7496, "validation/rewards/accuracies": 0.7812}}
    text = words(page(tmp_path, artifact, released=released))
    assert (
        "Figure This run Released validation/loss 0.580 0.750 validation/rewards/accuracies – 0.781"
    ) in text


def test_dropped_validation_rows_are_listed_with_dropped_rows(tmp_path: Path) -> None:
    counts = {"dropped/bad_rows": 1, "validation/dropped/bad_rows": 2, "validation/rows": 9}
    [stage] = summarize_stages({"dpo": validated(tmp_path, counts)})
    assert {row.what: row.count for row in stage.trouble} == {
        "dropped/bad_rows": 1,
        "validation/dropped/bad_rows": 2,
    }
    assert stage.counts == {"validation/rows": 9}


def test_released_figures_must_name_a_stage_of_the_report() -> None:
    report = Report(of=["sft"], released={"dpo": {"validation/loss": 1.0}})
    says = "released: the report is not about 'dpo'; write a stage that `of` lists"
    with pytest.raises(Permanent, match=re.escape(says)):
        report.check({}, {})


def test_a_count_with_examples_is_listed_with_them() -> None:
    manifest = SimpleNamespace(
        kind="published", key="k", seconds=1.0, attempts=1, created="", settings={}, models={},
        reads={}, counts={"rows": 3, "repaired/x": 2},
        examples={"repaired/x": ["r1", {"prompt": "p", "left": 2}]},
    )  # fmt: skip
    raw = cast(Any, SimpleNamespace(manifest=manifest, key="k"))
    [stage] = summarize_stages({"raw": raw})
    [line] = stage.trouble
    assert (line.what, line.count) == ("repaired/x", 2)
    assert line.examples == ("r1", "prompt: p\nleft: 2")
    assert stage.counts == {}
