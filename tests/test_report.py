"""The report page, from artifacts on disk that have the stages' schemas."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from zephyr_ray.manifest import Manifest
from zephyr_ray.report import contents
from zephyr_ray.report.page import Report
from zephyr_ray.stage import Work
from zephyr_ray.store import Artifact

EVIL = "<script>alert('x')</script><img src=http://evil.example/a.png>"
MODELS = ("base", "sft", "dpo", "control")
PASS = dict(zip(MODELS, (0.208, 0.637, 0.783, 0.767), strict=True))


def make(root: Path, name: str, kind: str, **manifest: Any) -> Artifact:
    folder = root / name
    folder.mkdir()
    whole = {"name": name, "kind": kind, "key": f"{len(name):016x}", "version": 1} | manifest
    whole.setdefault("counts", {"rows": 3})
    return Artifact(folder, Manifest(**{"files": {}} | whole))


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
        metrics={"loss": 0.5},
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
        "models": models,
        "differences": [
            {"a": "dpo", "b": "control", "pass_difference": 0.017, "low": -0.042, "high": 0.075}
        ],
        "notes": ["the DPO term adds nothing that can be told from chance"],
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


def page(root: Path, *artifacts: Artifact) -> str:
    inputs = {a.manifest.name: a for a in artifacts}
    work = Work("report", root / "report", 0, inputs, {}, {})
    work.folder.mkdir()
    Report(of=list(inputs), title="quickstart").run(work)
    return (work.folder / "report.html").read_text(encoding="utf-8")


@pytest.fixture
def full(tmp_path: Path) -> str:
    parts = [feedback, pairwise]
    stages = [training(tmp_path, "sft", "sft"), training(tmp_path, "dpo", "dpo")]
    return page(tmp_path, *stages, *(part(tmp_path) for part in parts))


def words(html: str) -> str:
    """What a reader sees, in one line."""
    return re.sub(r"[ \n]+", " ", re.sub(r"<[^>]*>", " ", html))


def headings(html: str) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", html)


def test_sections_come_in_order(full: str) -> None:
    assert headings(full) == [
        *("Result", "Training", "Scores the judge gave", "10 samples", "Stages"),
        *("What failed and was dropped", "Settings", "Lineage", "Loss mask"),
    ]


def test_headline_is_honest_about_the_control(full: str) -> None:
    assert (
        "dpo has a win rate of 0.77 [0.72, 0.83] against base on 240 held-out prompts; over "
        "control, the DPO term adds nothing certain: +0.017 [−0.042, +0.075] of checks passed. "
        "78% of its answers pass the checks (base: 21%), in 18 words on average (18)."
    ) in full


def test_headline_says_when_the_interval_holds_one_half(tmp_path: Path) -> None:
    figures = {"win_rate": 0.52, "low": 0.44, "high": 0.6, "prompts": 240}
    html = page(tmp_path, pairwise(tmp_path, models={"base": {}, "sft": figures}, differences=[]))
    assert "cannot be told from no difference" in html


@pytest.mark.parametrize(
    ("entry", "verb"),
    [
        (
            {"a": "control", "b": "dpo", "pass_difference": -0.1, "low": -0.2, "high": -0.05},
            "adds:",
        ),
        (
            {"a": "dpo", "b": "control", "pass_difference": -0.1, "low": -0.2, "high": -0.05},
            "costs:",
        ),
    ],
)
def test_headline_reads_the_difference_the_right_way_round(
    tmp_path: Path, entry: dict[str, Any], verb: str
) -> None:
    assert f"the DPO term {verb}" in page(tmp_path, pairwise(tmp_path, differences=[entry]))


def test_headline_is_about_the_model_whose_differences_were_taken(tmp_path: Path) -> None:
    figures = {"win_rate": 0.7, "low": 0.6, "high": 0.8, "prompts": 240}
    models = dict.fromkeys(("base", "dpo", "again_sft", "dpo_only"), figures)
    entry = {"a": "dpo", "b": "again_sft", "pass_difference": 0.1, "low": 0.05, "high": 0.2}
    html = page(
        tmp_path, pairwise(tmp_path, models=models, differences=[entry], control="again_sft")
    )
    assert '<p class="headline">dpo has' in html
    assert "over again_sft, the DPO term adds: +0.100" in html


def test_figures_of_models_and_constraints_appear(full: str) -> None:
    text = words(full)
    for figure in ("0.64", "[0.58, 0.70]", "18.2", "1\u202f501 / 40 / 30", "no_commas 16 0.91"):
        assert figure in text
    assert "0.49" not in text, "the baseline has no win rate against itself"


def test_stage_times_attempts_and_drops_appear(full: str) -> None:
    text = words(full)
    assert "dpo dpo 3 1 min 35 s 2 loss 0.500" in text
    assert "Sum 4 min 31 s" in text
    assert "dropped/near duplicate 7" in text and "truncated 4" in text
    assert "over_long" not in text, "what never happened is no row"
    assert "learning_rate 5e-05" in text


def test_words_of_models_are_text(full: str) -> None:
    assert "<script" not in full and "<img" not in full
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
    assert [int(i) for i in shown] == ids[:10]


def test_plots_are_inline_and_described(full: str) -> None:
    labels = re.findall(r'<svg [^>]*aria-label="([^"]+)"', full)
    assert "Win rate against base: sft 0.77 from 0.72 to 0.83; dpo" in labels[0]
    assert "sft · loss over 30 steps: from 2.93 to 1" in labels
    # Two bars, one loss, three of DPO, two models, wall time.
    assert len(labels) == 2 + 1 + 3 + 2 + 1


def test_mask_proof_is_kept_apart(full: str) -> None:
    assert 'srcdoc="&lt;p&gt;the &lt;mark&gt;mask' in full
    assert len(re.findall("<iframe sandbox ", full)) == 2


def test_missing_kinds_leave_no_empty_section(tmp_path: Path) -> None:
    html = page(tmp_path, make(tmp_path, "seeds", "self_instruct", seconds=3.0))
    assert headings(html) == ["Stages", "What failed and was dropped", "Settings", "Lineage"]
    assert "Nothing." in html and 'href="#result"' not in html


def test_model_missing_from_parts_does_not_break_the_page(tmp_path: Path) -> None:
    models = {"base": {"prompts": 3}, "sft": {"win_rate": None}, "late": {}}
    html = page(tmp_path, pairwise(tmp_path, models=models, differences=[]))
    assert '<th scope="row">late</th>' in html


def test_step_written_twice_by_a_resumed_run_counts_once(tmp_path: Path) -> None:
    artifact = make(tmp_path, "sft", "sft")
    write(artifact, "metrics.jsonl", [{"step": s, "loss": v} for s, v in ((1, 9), (2, 8), (1, 7))])
    [plot] = contents.curves({"sft": artifact}, contents.Palette())
    assert "sft · loss over 2 steps: from 7 to 8" in plot


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(3.21, "3.2 s"), (59.4, "59 s"), (95, "1 min 35 s"), (3720, "1 h 2 min"), (None, "–")],
)
def test_duration(seconds: float | None, text: str) -> None:
    assert contents.duration(seconds) == text
