"""Runs a recipe: loads it, plans it, and makes the missing artifacts of its stages in order.

python -m zephyr_ray.pipeline [RECIPE] [--set stage.setting=value] [--until STAGE] [--plan]
    [--verify] [--wait SECONDS]
"""

import logging
import os
import shlex
import shutil
import sys
from pathlib import Path
from pkgutil import resolve_name

from rich.console import Console
from rich.table import Table
from rich.text import Text

from zephyr_ray import recipe as recipes
from zephyr_ray.display import CONSOLE, ConsoleHandler
from zephyr_ray.errors import Permanent, Temporary
from zephyr_ray.estimate.printing import print_estimate
from zephyr_ray.execution import Execution
from zephyr_ray.masking import ArgumentParser, masked
from zephyr_ray.plan import Step, make_plan
from zephyr_ray.preflight import check_files, check_settings, preflight
from zephyr_ray.ray_cluster import connect
from zephyr_ray.recipe import Recipe
from zephyr_ray.run_folder import link_artifact, unlink_stale, write_stages
from zephyr_ray.spending import Spending
from zephyr_ray.stage import Stage, log, original_name
from zephyr_ray.store import SCRATCH, Store

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
    "zephyr_ray.judge.mt_bench_answers:MtBenchAnswers",
    "zephyr_ray.judge.mt_bench:MtBench",
    "zephyr_ray.judge.corrected:Corrected",
    "zephyr_ray.judge.leaderboard:Leaderboard",
    "zephyr_ray.judge.likelihood:Likelihood",
    "zephyr_ray.report.page:Report",
    "zephyr_ray.text.votes:Votes",
    "zephyr_ray.text.published:Published",
    "zephyr_ray.text.outputs:Outputs",
)
"""The stage kinds. A new kind is one file and one line here."""
KINDS: dict[str, type[Stage]] = {stage.kind: stage for stage in map(resolve_name, STAGES)}


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0 done, 1 a failure that a retry may fix, 2 user error, 130
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
        if any(recipe.models_read(step.stage) for step in steps if step.must_run):
            connect()  # before any stage, in case Ray cannot start
        planned = make_plan(recipe, store) if until else steps
        view = store.storage / recipe.name
        view.mkdir(parents=True, exist_ok=True)
        unlink_stale(view, {s.link: s.artifact.folder for s in planned if s.artifact})
        write_stages(view, {name: original_name(name, recipe.variants) for name in recipe.stages})
        # Makes the next run close MLflow's run if this one is killed after the last manifest.
        unfinished, page = view / ".unfinished", ""
        if unfinished.exists() or any(step.must_run for step in steps):
            unfinished.touch()
            page = Execution(recipe, store, steps, Spending(recipe, store.storage, steps)).run()
            unfinished.unlink()
        else:
            CONSOLE.print(f"All {len(steps)} stages are cached.")
        store.check_lock()
        for step in steps:
            assert step.artifact
            link_artifact(view, step.name, step.stage.view, step.artifact.folder)
            # A kill right after the manifest leaves gigabytes of scratch that nothing reads again.
            shutil.rmtree(step.artifact.folder / SCRATCH, ignore_errors=True)
    _print_locations(recipe, store, page)


def print_plan(recipe: Recipe, steps: list[Step]) -> None:
    title = f"{recipe.name}: {len(steps)} stage{'s' if len(steps) != 1 else ''}"
    table = Table(title=title, box=None, title_justify="left")
    for heading in ("stage", "kind", "state", "rows", "why"):
        table.add_column(heading, overflow="fold")
    for step in steps:
        state = "[cyan]cached[/]" if step.artifact else "[yellow]to do[/]"
        bound = "" if step.artifact else "≤ "
        rows = "" if step.rows is None else f"{bound}{step.rows}"
        table.add_row(step.name, step.stage.kind, state, rows, Text(masked(step.reason)))
    Console().print(table)


def _print_locations(recipe: Recipe, store: Store, page: str) -> None:
    """Prints how to open the results; `page` is the path in MLflow's UI, or empty."""
    view = store.storage / recipe.name
    folder = os.path.relpath(view)
    zephyr, mlflow = (
        shutil.which(name) or os.path.relpath(Path(sys.executable).with_name(name))
        for name in ("zephyr", "mlflow")
    )
    database = shlex.quote(f"sqlite:///{os.path.relpath(store.storage)}/mlflow.db")
    has_make = Path("Makefile").exists() and store.storage == Path("runs").absolute()
    lines = [("open", f"{folder}/")]
    if (view / "report.html").exists():
        lines.append(("report", f"{folder}/report.html"))
    if (view / "models").exists():
        lines.append(("chat", f"{zephyr} chat {shlex.quote(folder)}"))
    if uri := os.environ.get("MLFLOW_TRACKING_URI"):
        server = masked(uri).rstrip("/")
        lines.append(("MLflow", server + page * server.startswith("http")))
    else:
        lines.append(
            ("MLflow", "make mlflow" if has_make else f"{mlflow} ui --backend-store-uri {database}")
        )
        if page:
            lines.append(("", f"http://127.0.0.1:5000{page}"))
    print("\n".join(f"{name:8}{text}" for name, text in lines))


if __name__ == "__main__":
    sys.exit(main())
