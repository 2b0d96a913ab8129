"""Runs a recipe: loads it, plans it, and makes the missing artifacts of its stages in order.

python -m zephyr_ray.pipeline [RECIPE] [--set stage.setting=value] [--until STAGE] [--plan]
    [--verify] [--wait SECONDS]
"""

import logging
import os
import shlex
import shutil
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from pkgutil import resolve_name

from rich.console import Console
from rich.table import Table
from rich.text import Text

from zephyr_ray import __version__
from zephyr_ray import recipe as recipes
from zephyr_ray.clock import Clock
from zephyr_ray.display import CONSOLE, ConsoleHandler, Display
from zephyr_ray.errors import Permanent, Temporary
from zephyr_ray.estimate.printing import print_estimate
from zephyr_ray.formatting import duration, list_counts
from zephyr_ray.masking import ArgumentParser, masked
from zephyr_ray.plan import Step, make_plan
from zephyr_ray.preflight import check_files, check_settings, preflight
from zephyr_ray.ray_cluster import connect
from zephyr_ray.recipe import Recipe
from zephyr_ray.run_folder import link_artifact, unlink_stale
from zephyr_ray.stage import MAX_FAILED, Stage, Work, log
from zephyr_ray.store import SCRATCH, Artifact, Store, content_key
from zephyr_ray.tracking import StageRun, Tracking

STAGES = (
    "zephyr_ray.text.prompts:Prompts",
    "zephyr_ray.text.prompts:SelfInstruct",
    "zephyr_ray.text.dialogues:SelfRefine",
    "zephyr_ray.text.cleaning:Clean",
    "zephyr_ray.train.sft:Sft",
    "zephyr_ray.text.completions:Completions",
    "zephyr_ray.text.feedback:Feedback",
    "zephyr_ray.text.preferences:Preferences",
    "zephyr_ray.text.preferences:Chosen",
    "zephyr_ray.train.reference_stage:Reference",
    "zephyr_ray.train.dpo:Dpo",
    "zephyr_ray.judge.pairwise:Pairwise",
    "zephyr_ray.report.page:Report",
    "zephyr_ray.text.votes:Votes",
    "zephyr_ray.text.published:Published",
)
"""The kinds of stages. A new kind is one file and one line here."""
FLAWS = {
    "truncated": "truncated",
    "unparsable": "unparsable",
    "empty": "empty",
    "both_empty": "with two empty answers",
    "short_of_count": "short of count",
}
"""Counts of flawed or missing rows that are neither failed nor dropped, and their names in a
stage's last line."""
KINDS: dict[str, type[Stage]] = {stage.kind: stage for stage in map(resolve_name, STAGES)}


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0 done, 1 a failure that a retry can help, 2 user error, 130
    interrupted. Raises unexpected errors."""
    parser = ArgumentParser("zephyr_ray.pipeline", description="Run a recipe.")
    parser.add_argument("recipe", nargs="?", type=Path, help="a recipe file (default: quickstart)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="STAGE.SETTING=VALUE",
        help="change the recipe; also models.NAME.SETTING=VALUE, seed=N, storage=FOLDER",
    )
    parser.add_argument("--until", metavar="STAGE", help="stop after this stage")
    parser.add_argument("--plan", action="store_true", help="show what would run, and why")
    parser.add_argument("--verify", action="store_true", help="read all bytes of cached artifacts")
    parser.add_argument(
        "--wait",
        type=float,
        default=0,
        metavar="SECONDS",
        help="how long to wait for another run on the same storage (default: 0)",
    )
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(message)s", handlers=[ConsoleHandler()])
    log.setLevel(logging.INFO)
    try:
        recipe = recipes.load(options.recipe or default_recipe(), KINDS, options.set)
        store = Store(recipe.storage, read_all=options.verify)
        if options.plan:
            check_files(recipe)
            steps = make_plan(recipe, store, options.until)
            print_plan(recipe, steps)
            check_settings(recipe, steps)
            print_estimate(recipe, store, steps)
        else:
            run(recipe, store, options.until, options.wait)
        return 0
    except Permanent as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except Temporary as error:
        print(f"error: {' '.join(str(error).split())}; run again to continue", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; finished work is kept, run again to continue", file=sys.stderr)
        return 130


def default_recipe() -> Path:
    """Returns configs/quickstart.yaml, inside an installed wheel or beside the package."""
    package = Path(__file__).parent
    inside = package / "configs" / "quickstart.yaml"
    return inside if inside.exists() else package.parent / "configs" / "quickstart.yaml"


def run(recipe: Recipe, store: Store, until: str | None = None, wait: float = 0) -> None:
    """Makes every missing artifact of the recipe, up to `until`. Waits up to `wait` seconds for
    another run on the same storage."""
    store.prepare()
    with store.exclusive(wait, log.info):
        check_files(recipe)
        steps = make_plan(recipe, store, until)
        preflight(recipe, store, steps)
        if any(recipe.models_read(step.stage) for step in steps if step.artifact is None):
            connect()  # before any stage, in case Ray cannot start
        planned = make_plan(recipe, store) if until else steps
        view = store.storage / recipe.name
        unlink_stale(view, {s.link: s.artifact.folder for s in planned if s.artifact})
        # Makes the next run close MLflow's run, which a kill after the last manifest leaves open.
        unfinished = view / ".unfinished"
        if unfinished.exists() or any(step.artifact is None for step in steps):
            view.mkdir(parents=True, exist_ok=True)
            unfinished.touch()
            _Run(recipe, store, steps).execute()
            unfinished.unlink()
        else:
            CONSOLE.print(f"All {len(steps)} stages are cached.")
        store.check_lock()
        for step in steps:
            assert step.artifact
            link_artifact(view, step.name, step.stage.view, step.artifact.folder)
            # A kill right after the manifest leaves gigabytes of scratch that nothing reads again.
            shutil.rmtree(step.artifact.folder / SCRATCH, ignore_errors=True)
    _print_locations(recipe, store)


@dataclass(frozen=True)
class _Run:
    """One run of the steps of a plan."""

    recipe: Recipe
    store: Store
    steps: list[Step]

    def execute(self) -> None:
        """Makes the artifact of every step that has none, tracked in MLflow and on the display."""
        recipe, keys = self.recipe, {step.name: step.key for step in self.steps}
        tracking = Tracking.open(
            self.store.storage,
            recipe.name,
            content_key({"recipe": recipe.name, "stages": keys}),
            {"recipe": recipe.name, "seed": recipe.seed, "version": __version__},
        )
        status = "FAILED"
        try:
            with Display(self.steps) as display:
                for step in self.steps:
                    if step.artifact:
                        display.set(step.name, "cached", _summary(step.artifact))
                        tracking.cached(
                            step.name, step.key, step.artifact.manifest, step.artifact.folder
                        )
                    else:
                        self._run_step(step, tracking, display)
            status = "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        finally:
            tracking.finish(status)

    def _run_step(self, step: Step, tracking: Tracking, display: Display) -> None:
        """Makes the artifact of a step and links it."""
        settings = {"kind": step.stage.kind, **step.stage.model_dump(mode="json")}
        stage_run = tracking.stage(step.name, step.stage.kind, step.key, settings)
        try:
            step.artifact = self._make_artifact(step, stage_run, display)
        except BaseException as error:
            interrupted = isinstance(error, KeyboardInterrupt)
            stage_run.fail("interrupted" if interrupted else f"{error}" or type(error).__name__)
            display.set(step.name, "interrupted" if interrupted else "failed")
            raise
        stage_run.finish(step.artifact.manifest, step.artifact.folder)
        view = self.store.storage / self.recipe.name
        link_artifact(view, step.name, step.stage.view, step.artifact.folder)
        display.set(step.name, "done", _summary(step.artifact))

    def _make_artifact(self, step: Step, stage_run: StageRun, display: Display) -> Artifact:
        """Runs one stage in its folder and commits the folder as an artifact."""
        recipe, stage = self.recipe, step.stage
        artifacts = {s.name: s.artifact for s in self.steps if s.artifact}
        reads = recipe.lineage(stage) if stage.reads_lineage else recipe.stages_read(stage)
        models = {n: model.to_model(artifacts) for n, model in recipe.models_read(stage).items()}
        work = Work(
            name=step.name,
            folder=self.store.folder(stage.kind, step.key),
            seed=getattr(stage, "seed", recipe.seed),
            inputs={name: artifacts[name] for name in reads},
            stages={name: recipe.stages[name] for name in reads},
            variants=recipe.variants,
            models=models,
            files=recipe.files(stage),
            log_metrics=stage_run.log_metrics,
            max_failed=getattr(stage, "max_failed", MAX_FAILED),
            give_up=getattr(stage, "give_up", ()),
        )
        work.scratch.mkdir(parents=True, exist_ok=True)
        display.set(step.name, "running", progress=work.progress)
        clock = Clock(work.scratch / "clock.json", lambda: display.tick(step.name))
        with clock:
            stage.run(work)
        return self.store.commit(
            stage.kind,
            step.key,
            identity=step.identity,
            name=step.name,
            recipe=recipe.name,
            settings=stage.model_dump(mode="json"),
            reads={name: artifacts[name].key for name in recipe.stages_read(stage)},
            models={name: m.settings.model_dump(mode="json") for name, m in models.items()},
            counts=work.counts,
            examples=work.examples,
            seconds=round(clock.seconds, 1),
            attempts=clock.attempts,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            zephyr_ray=__version__,
        )


def _summary(artifact: Artifact) -> str:
    """Returns what the artifact has and what it lacks: 95 rows · 5 failed (too long 5) · 12 s."""
    manifest = artifact.manifest
    counts = manifest.counts
    parts = [f"{counts['rows']:.0f} rows"] if "rows" in counts else []
    parts += [f"{counts['steps']:.0f} steps"] if "steps" in counts else []
    for state in ("failed", "dropped"):
        by_cause = {
            name.partition("/")[2]: count
            for name, count in counts.items()
            if name.startswith(f"{state}/") and count
        }
        total = by_cause.pop("rows", 0) or sum(by_cause.values())
        listed = f" ({list_counts(by_cause)})" if by_cause else ""
        parts += [f"{total:.0f} {state}{listed}"] if total else []
    parts += [f"{counts[name]:.0f} {text}" for name, text in FLAWS.items() if counts.get(name)]
    return " · ".join([*parts, duration(manifest.seconds)])


def print_plan(recipe: Recipe, steps: list[Step]) -> None:
    title = f"{recipe.name}: {len(steps)} stage{'s' if len(steps) != 1 else ''}"
    table = Table(title=title, box=None, title_justify="left")
    for heading in ("stage", "kind", "state", "rows", "why"):
        table.add_column(heading, overflow="fold")
    for step in steps:
        state = "[cyan]cached[/]" if step.artifact else "[yellow]to do[/]"
        bound = "" if step.artifact else "≤ "
        rows = "" if step.rows is None else f"{bound}{step.rows:.0f}"
        table.add_row(step.name, step.stage.kind, state, rows, Text(masked(step.reason)))
    Console().print(table)


def _print_locations(recipe: Recipe, store: Store) -> None:
    view = store.storage / recipe.name
    folder = os.path.relpath(view)
    zephyr = shutil.which("zephyr") or os.path.relpath(Path(sys.executable).with_name("zephyr"))
    database = shlex.quote(f"sqlite:///{os.path.relpath(store.storage)}/mlflow.db")
    has_make = Path("Makefile").exists() and store.storage == Path("runs").absolute()
    lines = [("open", f"{folder}/")]
    if (view / "report.html").exists():
        lines.append(("report", f"{folder}/report.html"))
    if (view / "models").exists():
        lines.append(("chat", f"{zephyr} chat {shlex.quote(folder)}"))
    if uri := os.environ.get("MLFLOW_TRACKING_URI"):
        lines.append(("MLflow", masked(uri)))
    else:
        lines.append(
            ("MLflow", "make mlflow" if has_make else f"mlflow ui --backend-store-uri {database}")
        )
    print("\n".join(f"{name:8}{text}" for name, text in lines))


if __name__ == "__main__":
    sys.exit(main())
