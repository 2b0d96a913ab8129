"""Runs a recipe's stages in this process, without Ray, MLflow or a progress display; stop before
the first stage that needs Ray, such as training, with --until:

    python tests/recipe_here.py RECIPE --until STAGE --set name=value …

`RowActor` processes the rows and writes the same journals, answer log and ledger as a run on Ray.
"""

import argparse
import asyncio
import json
import uuid
from pathlib import Path
from typing import Any

from zephyr_ray import rows
from zephyr_ray.engines.governor import Governor
from zephyr_ray.engines.ledger import ledger_folder
from zephyr_ray.engines.meter import Meter
from zephyr_ray.engines.model import Model
from zephyr_ray.errors import Permanent
from zephyr_ray.pipeline import KINDS
from zephyr_ray.plan import Step, make_plan
from zephyr_ray.recipe import Recipe, load
from zephyr_ray.row_actor import Program, Row, RowActor
from zephyr_ray.run_folder import link_artifact
from zephyr_ray.stage import Work
from zephyr_ray.store import Store


def execute_here(
    work: Work, outcomes: Any, pending: list[Row], program: Program, members: list[Model]
) -> None:
    """Replaces `rows._execute`."""
    actor = RowActor(
        program=program,
        members={model.name: model for model in members},
        seed=work.seed,
        journal=str(outcomes.journal.folder),
        max_failed=outcomes.max_failed,
        flaw=outcomes.flaw,
        since=outcomes.journal.position,
    )
    asyncio.run(actor({"row": [json.dumps(row) for row in pending]}))
    outcomes.follow()
    if outcomes.stops:
        raise Permanent(outcomes.stops[0])


def make(recipe: Recipe, store: Store, steps: list[Step], step: Step, governor: Governor) -> None:
    """Makes the artifact of one step."""
    artifacts = {s.name: s.artifact for s in steps if s.artifact}
    stage, folder = step.stage, store.folder(step.stage.kind, step.key)
    seed, keys = getattr(stage, "seed", recipe.seed), {s.name: s.key for s in steps}
    models = {
        name: model.to_model(
            artifacts,
            model.answer_log(store.storage, keys, seed),
            Meter(governor, folder.name, name),
        )
        for name, model in recipe.models_read(stage).items()
    }
    inputs = {name: artifacts[name] for name in recipe.stages_read(stage)}
    work = Work(step.name, folder, seed, inputs, models, recipe.files(stage))
    work.scratch.mkdir(parents=True, exist_ok=True)
    stage.run(work)
    step.artifact = store.commit(stage.kind, step.key, name=step.name, counts=work.counts)
    link_artifact(store.storage / recipe.name, step.name, stage.view, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--until")
    parser.add_argument("--set", action="append", default=[])
    options = parser.parse_args()
    recipe = load(options.recipe, KINDS, options.set)
    store = Store(recipe.storage)
    store.prepare()
    steps = make_plan(recipe, store, options.until)
    tariffs = {name: model.settings.tariff() for name, model in recipe.models.items()}
    ledger = ledger_folder(store.storage, recipe.name)
    ledger.mkdir(parents=True, exist_ok=True)
    governor = Governor(ledger, uuid.uuid4().hex[:12], tariffs, recipe.budget_usd)
    rows._execute = execute_here
    for step in steps:
        if not step.artifact:
            make(recipe, store, steps, step, governor)


if __name__ == "__main__":
    main()
