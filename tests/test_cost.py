"""Tests how a run shows what it pays: progress line, MLflow, last line of a stage, report."""

import re
from pathlib import Path
from typing import Any

import pytest

from zephyr_ray.display import summarize
from zephyr_ray.engines.ledger import Ledger, Spent, ledger_folder
from zephyr_ray.engines.tariff import Usage
from zephyr_ray.manifest import Manifest
from zephyr_ray.report.cost_section import cost_section
from zephyr_ray.report.page import Report
from zephyr_ray.report.summary import summarize_stages
from zephyr_ray.section import Table
from zephyr_ray.spending import StageSpending
from zephyr_ray.stage import Progress, Stage, Work
from zephyr_ray.store import Artifact


def manifest(recipe: str = "", **models: Spent) -> Manifest:
    counts = {
        f"paid/{model}/{name}": value
        for model, spent in models.items()
        for name, value in vars(spent).items()
    }
    counts = {"rows": 5} | counts
    return Manifest(kind="feedback", key="k", files={}, recipe=recipe, counts=counts, seconds=12)


def cost_rows(html: str) -> list[list[str]]:
    """Returns the cells of the table of costs, without its headings."""
    [table] = re.findall(
        r"<table>(?:(?!<table>).)*?Requests of unknown cost.*?</table>", html, re.S
    )
    rows = re.findall("<tr>(.*?)</tr>", table, re.S)
    return [re.findall("<t[hd].*?>(.*?)</t[hd]>", row) for row in rows][1:]


class Silent(Stage):
    """A stage that contributes nothing to the report."""

    makes = "nothing"


JUDGE = Spent(3, 100, 40, 30, 1.25, 2, 0.5, 1)


def test_the_report_lists_the_cost_per_stage_and_model() -> None:
    stages = {
        "pairs": manifest(),
        "feedback": manifest(judge=JUDGE, idle=Spent()),
        "winrate": manifest(judge=Spent(1, 2, 0, 3, 0.25)),
    }
    section = cost_section(stages, {})
    assert section
    [table] = section.chapters[0].blocks
    assert isinstance(table, Table)
    assert table.rows == (
        ("feedback", "judge", 3, 100, 40, 30, 1.25, 2, 0.5, 1),
        ("winrate", "judge", 1, 2, 0, 3, 0.25, 0, 0.0, 0),
        ("all", "", 4, 102, 40, 33, 1.5, 2, 0.5, 1),
    )
    assert all(len(row) == len(table.columns) for row in table.rows)


def test_a_report_without_paid_models_has_no_costs() -> None:
    assert cost_section({"pairs": manifest(), "feedback": manifest(judge=Spent())}, {}) is None


def test_the_report_lists_what_the_recipe_spent_on_other_stages(tmp_path: Path) -> None:
    """A feedback stage of $15 was stopped; after a change of its settings, another one cost $1. An
    artifact that another recipe made cost that recipe $2, after ours had paid $4 for its start."""
    made = {
        name: Artifact(
            tmp_path / "store" / f"{name}-new", manifest(recipe, judge=Spent(1, 9, 0, 9, usd))
        )
        for name, recipe, usd in (("feedback", "quick", 1.0), ("answers", "theirs", 2.0))
    }
    ledger = Ledger(ledger_folder(tmp_path, "quick"), "run")
    for stage, usd in (("feedback-old", 15.0), ("feedback-new", 1.0), ("answers-new", 4.0)):
        ledger.settle(ledger.reserve(stage, "judge", 20), Usage(9, 9), usd)
    Ledger(ledger_folder(tmp_path, "quick"), "killed").reserve("feedback-old", "judge", 0.5)
    work = Work("page", tmp_path / "store" / "report-k", 0, made, {}, {}, recipe="quick")
    work.stages.update(dict.fromkeys(made, Silent()))
    work.folder.mkdir(parents=True)
    Report(of=list(made)).run(work)
    html = (work.folder / "report.html").read_text(encoding="utf-8")
    assert "<dt>Cost</dt><dd>$22.50</dd>" in html
    assert cost_rows(html) == [
        ["feedback", "judge", "1", "9", "0", "9", "1.0000", "0", "0.0000", "0"],
        ["answers", "judge", "1", "9", "0", "9", "2.0000", "0", "0.0000", "0"],
        ["other stages", "judge", "2", "18", "0", "18", "19.0000", "1", "0.5000", "1"],
        ["all", "", "4", "36", "0", "36", "22.0000", "1", "0.5000", "1"],
    ]


def test_an_artifact_of_two_names_was_paid_for_once(tmp_path: Path) -> None:
    artifact = Artifact(tmp_path / "store" / "feedback-k", manifest(judge=JUDGE))
    made = {"feedback": artifact, "same": artifact}
    work = Work("page", tmp_path / "store" / "report-k", 0, made, {}, {})
    work.stages.update(dict.fromkeys(made, Silent()))
    work.folder.mkdir(parents=True)
    Report(of=list(made)).run(work)
    html = (work.folder / "report.html").read_text(encoding="utf-8")
    assert "<dt>Cost</dt><dd>$1.75</dd>" in html
    assert "<dt>Time</dt><dd>12 s, 2 stages</dd>" in html
    assert [row[:2] for row in cost_rows(html)] == [["feedback", "judge"]]


def test_costs_are_not_listed_with_other_counts() -> None:
    [stage] = summarize_stages({"s": Artifact(Path(), manifest(judge=JUDGE))})
    assert stage.counts == {} and stage.paid == 1.75


def test_the_last_line_of_a_stage_says_what_it_cost() -> None:
    paid = Artifact(Path(), manifest(judge=JUDGE, other=Spent(dollars=1)))
    assert summarize(paid) == "5 rows · $2.75 · 12 s"
    assert summarize(Artifact(Path(), manifest(judge=Spent()))) == "5 rows · 12 s"


@pytest.mark.parametrize(
    ("budget", "text"),
    [
        (None, "$12.00 spent, $16.00 after this stage"),
        (20, "$12.00 of $20.00 spent, $16.00 after this stage"),
    ],
)
def test_spent_and_projected_cost(
    budget: float | None, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Earlier attempts answered 10 of 40 rows for $2; since then 20 more cost $8."""
    figures = {None: {"judge": Spent(dollars=4)}, "s": {"judge": Spent(dollars=2)}}
    monkeypatch.setattr(StageSpending, "_figures", lambda self, stage, seconds: figures[stage])
    logged: list[tuple[dict[str, float], int]] = []
    progress = Progress(done=10, total=40, resumed=10)

    def log(metrics: dict[str, float], step: int) -> None:
        logged.append((metrics, step))

    spending = StageSpending(object(), budget, "s", progress, log)
    spending.tick(end=True)
    assert logged == [({"spent_usd": 4, "stage_usd": 2}, 10)]
    assert progress.note == text.replace("$12.00", "$4.00").partition(",")[0]
    progress.done = 30
    figures |= {
        None: {"judge": Spent(dollars=11, unknown_dollars=1)},
        "s": {"j": Spent(dollars=10)},
    }
    spending.tick(end=True)
    assert logged[1] == ({"spent_usd": 12, "stage_usd": 10, "projected_usd": 16}, 30)
    assert progress.note == text


def test_a_run_without_a_governor_shows_no_cost() -> None:
    def log(*_: Any) -> None:
        raise AssertionError

    progress = Progress()
    spending = StageSpending(None, None, "s", progress, log)
    spending.tick(end=True)
    assert progress.note == "" and spending.counts() == {}
