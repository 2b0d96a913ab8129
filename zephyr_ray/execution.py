"""Executes a plan: makes the missing artifacts of its steps in order, with engines that stay up
between them."""

from dataclasses import dataclass, field
from datetime import UTC, datetime

from zephyr_ray import __version__
from zephyr_ray.clock import Clock
from zephyr_ray.display import Display, summarize
from zephyr_ray.engines.pool import EnginePool, identify
from zephyr_ray.engines.settings import ModelSettings
from zephyr_ray.plan import Step
from zephyr_ray.recipe import Recipe
from zephyr_ray.run_folder import link_artifact
from zephyr_ray.settings import Reads, marked
from zephyr_ray.spending import Spending
from zephyr_ray.stage import MAX_FAILED, Stage, Work
from zephyr_ray.store import Artifact, Store, content_key
from zephyr_ray.tracking.pipeline_run import Tracking
from zephyr_ray.tracking.stage_run import StageRun


@dataclass(frozen=True)
class Execution:
    """One run of the steps of a plan."""

    recipe: Recipe
    store: Store
    steps: list[Step]
    spending: Spending
    engines: EnginePool = field(default_factory=EnginePool)

    def run(self) -> str:
        """Makes the missing artifacts; shows progress on the display and logs it to MLflow. Returns
        the path of the runs' page in the MLflow UI."""
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
                    if step.same_as:
                        step.artifact = step.same_as.artifact
                    if step.artifact:
                        display.set(step.name, "cached", summarize(step.artifact))
                        tracking.record_cached(step.name, step.artifact)
                    else:
                        self._run_step(step, tracking, display)
            self.engines.close()
            status = "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        finally:
            tracking.finish(status)
        return tracking.page

    def _run_step(self, step: Step, tracking: Tracking, display: Display) -> None:
        """Makes the artifact of a step and links it."""
        stage_run = tracking.start_stage(
            step.name,
            step.stage.kind,
            step.key,
            step.stage.model_dump(mode="json"),
            reads=self.recipe.stages_read(step.stage),
        )
        try:
            step.artifact = self._make_artifact(step, stage_run, display)
        except BaseException as error:
            interrupted = isinstance(error, KeyboardInterrupt)
            stage_run.fail("interrupted" if interrupted else f"{error}" or type(error).__name__)
            display.set(step.name, "interrupted" if interrupted else "failed")
            raise
        stage_run.finish(step.artifact)
        run_folder = self.store.storage / self.recipe.name
        link_artifact(run_folder, step.name, step.stage.view, step.artifact.folder)
        display.set(step.name, "done", summarize(step.artifact))

    def _make_artifact(self, step: Step, stage_run: StageRun, display: Display) -> Artifact:
        """Runs one stage in its folder and commits the folder as an artifact."""
        recipe, stage = self.recipe, step.stage
        artifacts = {s.name: s.artifact for s in self.steps if s.artifact}
        reads = recipe.lineage(stage) if stage.reads_lineage else recipe.stages_read(stage)
        seed = getattr(stage, "seed", recipe.seed)
        folder = self.store.folder(stage.kind, step.key)
        keys = {s.name: s.key for s in self.steps}
        models = {
            name: model.to_model(
                artifacts,
                model.answer_log(self.store.storage, keys, seed),
                self.spending.meter(folder.name, name),
            )
            for name, model in recipe.models_read(stage).items()
        }
        work = Work(
            name=step.name,
            folder=folder,
            seed=seed,
            inputs={name: artifacts[name] for name in reads},
            stages={name: recipe.stages[name] for name in reads},
            variants=recipe.variants,
            recipe=recipe.name,
            models=models,
            files=recipe.files(stage),
            log_metrics=stage_run.log_metrics,
            max_failed=getattr(stage, "max_failed", MAX_FAILED),
            give_up=getattr(stage, "give_up", ()),
            engines=self.engines,
        )
        work.scratch.mkdir(parents=True, exist_ok=True)
        self._make_room(step, artifacts)
        display.set(step.name, "running", progress=work.progress)
        cost = self.spending.stage_spending(folder.name, work.progress, work.log_metrics)

        def tick() -> None:
            cost.tick()
            display.tick(step.name)

        clock = Clock(work.scratch / "clock.json", tick)
        try:
            with clock:
                stage.run(work)
        finally:
            cost.tick(end=True)
        work.counts |= cost.counts()
        return self.store.commit(
            stage.kind,
            step.key,
            identity=step.identity,
            name=step.name,
            recipe=recipe.name,
            settings=stage.model_dump(mode="json"),
            reads={name: artifacts[name].key for name in recipe.stages_read(stage)},
            models={name: model.facts() for name, model in models.items()},
            counts=work.counts,
            examples=work.examples,
            seconds=clock.seconds,
            attempts=clock.attempts,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            zephyr_ray=__version__,
        )

    def _make_room(self, step: Step, artifacts: dict[str, Artifact]) -> None:
        """Stops engines that do not fit beside the step, and engines that neither this step nor a
        later one uses."""
        models = self.recipe.models_read(step.stage)
        queried = self._models_queried(step.stage, artifacts)
        pending = [s for s in self.steps if s.must_run]
        self.engines.prepare(
            queried,
            [
                identify(*model)
                for s in pending
                for model in self._models_queried(s.stage, artifacts)
            ],
            memory=step.stage.footprint(models).memory,
            trains=bool(models) and not queried,
        )

    def _models_queried(
        self, stage: Stage, artifacts: dict[str, Artifact]
    ) -> list[tuple[ModelSettings, int]]:
        """Returns the settings of the models that a stage queries, each with the stage's seed.
        Omits models whose weights are not trained yet."""
        names = [
            name
            for _, mark, names in marked(stage, Reads)
            if mark.is_model and mark.what != "weights"
            for name in names
        ]
        models = [self.recipe.models[name] for name in names]
        seed = getattr(stage, "seed", self.recipe.seed)
        return [
            (model.to_model(artifacts).settings, seed)
            for model in models
            if artifacts.keys() >= set(model.stages)
        ]
