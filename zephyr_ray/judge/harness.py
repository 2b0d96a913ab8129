"""Builds questions and computes metrics with lm-eval: its task files, prompts, token boundaries,
metrics and standard errors. The log-probabilities come from engines/continuations.py."""

import contextlib
import io
import logging
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

import datasets
import lm_eval.tasks
from lm_eval.api.instance import Instance
from lm_eval.api.metrics import mean_stderr, pooled_sample_stderr
from lm_eval.api.model import TemplateLM
from lm_eval.api.task import ConfigurableTask

from zephyr_ray.errors import Permanent
from zephyr_ray.judge.question_sets import TASKS, Reader, Row

SHOTS_SEED = 1234
"""Seed that draws few-shot examples, as in lm-eval."""
OWN_TASK = {
    "output_type": "multiple_choice",
    "test_split": "test",
    "doc_to_text": "Question: {{question}}\nAnswer:",
    "doc_to_choice": "choices",
    "doc_to_target": "answer",
    "metric_list": [
        {"metric": name, "aggregation": "mean", "higher_is_better": True}
        for name in ("acc", "acc_norm")
    ],
}
"""The task definition of a user's own questions, in the format of ARC's."""

logging.getLogger("lm_eval").setLevel(logging.ERROR)


@dataclass(frozen=True)
class Question:
    """One question of a task, as requests for the log-probabilities of continuations."""

    task: ConfigurableTask
    number: int
    """Position among the questions of its task."""
    requests: list[Instance]

    @property
    def id(self) -> str:
        return f"{self.task.task_name}/{self.number}"

    def choices(self) -> list[str]:
        """Returns the texts that distinguish the requests: their continuations or, if the contexts
        differ, the last lines of the contexts."""
        contexts, continuations = zip(*(r.args for r in self.requests), strict=True)
        if len(set(contexts)) == 1:
            return [c.strip() for c in continuations]
        return [context.rpartition("\n")[2] for context in contexts]

    def metrics(self, scores: list[list[Any]]) -> dict[str, float]:
        """Returns the question's metrics from (log-probability, is greedy) per request."""
        metrics = self.task.process_results(
            self.requests[0].doc, [(float(total), bool(greedy)) for total, greedy in scores]
        )
        return {name: float(value) for name, value in metrics.items()}


@dataclass(frozen=True)
class Asked:
    """The questions of a task or group of tasks that a stage names."""

    name: str
    questions: list[Question]
    shots: int
    split: str
    """The split that the questions are from."""
    shots_from: str | None
    """The split that few-shot examples are from; None without any."""
    stored: int
    """Number of questions before the limit is applied."""

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics, in the order of the task file."""
        return list(self.questions[0].task.aggregation())

    def standard_error(self, values: list[float]) -> float | None:
        """Returns lm-eval's standard error of the mean of one value per question; None if a task
        has a single question."""
        by_task: dict[str, list[float]] = {}
        for question, value in zip(self.questions, values, strict=True):
            by_task.setdefault(question.task.task_name, []).append(value)
        sizes = [len(own) for own in by_task.values()]
        if min(sizes) < 2:
            return None
        errors = [mean_stderr(own) for own in by_task.values()]
        return float(errors[0] if len(errors) == 1 else pooled_sample_stderr(errors, sizes))


class _Task(ConfigurableTask):
    """A task whose data set is read by a `Reader`. If the source lacks a split that the task file
    names, another replaces it; few-shot examples never include the question itself."""

    def __init__(self, config: dict[str, Any]):
        self._read: Reader = config["metadata"].pop("reader")
        super().__init__(config={k: v for k, v in config.items() if k != "class"})

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        config, shots = self.config, self.fewshot_cfg
        asked = [config.test_split, config.validation_split]
        wanted = [*asked, *([shots.split or config.training_split] if config.num_fewshot else [])]
        read = self._read(
            config.dataset_path, config.dataset_name, dict.fromkeys(filter(None, wanted))
        )
        self.dataset = {name: datasets.Dataset.from_list(rows) for name, rows in read.items()}
        stored = [split for split in asked if split in read]
        if not stored:
            raise Permanent(
                f"task '{config.task}': {config.dataset_path} {config.dataset_name or ''} has no "
                f"{' or '.join(filter(None, asked))} split in this source; set data: or folder: to "
                "one that has it"
            )
        for name in ("training_split", "validation_split", "test_split"):
            if getattr(config, name) not in read:
                setattr(config, name, None)
        if not config.num_fewshot:
            shots.split = None
        elif shots.split not in read and not config.training_split:
            shots.split = stored[-1]
            # lm-eval leaves out the question itself only if it is from `test_split`.
            config.test_split = stored[0]

    @property
    def asked_split(self) -> str:
        """The split that the questions are from."""
        return str(self.config.test_split or self.config.validation_split)

    @property
    def shots_split(self) -> str | None:
        """The split that few-shot examples are from; None without any."""
        if not self.config.num_fewshot:
            return None
        return str(self.fewshot_cfg.split or self.config.training_split)


def load(
    tasks: dict[str, tuple[int, int | None]],
    own: dict[str, list[Row]],
    own_limit: int | None,
    read: Reader,
) -> list[Asked]:
    """Returns the questions of lm-eval's tasks and of the user's own sets. `tasks` maps a task to
    its number of shots and its maximum questions per task file."""
    asked = []
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars
        for name, (shots, limit) in tasks.items():
            asked.append(_ask(name, _load(name, shots, read), shots, limit))
        for name, rows in own.items():
            asked.append(_ask(name, [_own_task(name, rows)], 0, own_limit))
    return asked


def check_data_sets(tasks: dict[str, tuple[int, int | None]], read: Reader) -> None:
    """Reads the data sets of tasks. Raises Permanent if one is missing."""
    with contextlib.redirect_stderr(io.StringIO()):
        for name, (shots, _) in tasks.items():
            _load(name, shots, read)


def _load(name: str, shots: int, read: Reader) -> list[_Task]:
    """Returns lm-eval's task of this name, or the tasks of its group."""
    known = TASKS[name]
    files = Path(lm_eval.tasks.__file__).parent / known.files
    manager = lm_eval.tasks.TaskManager(include_defaults=False, include_path=files)
    overrides = {"class": _Task, "num_fewshot": shots, "metadata": {"reader": read}}
    names = manager.all_subtasks if known.group else [name]
    members = [{"task": name, **overrides} for name in names]
    return list(manager.load([{"group": "asked", "task": members}])["tasks"].values())


def _own_task(name: str, rows: list[Row]) -> _Task:
    reads = {"reader": lambda *_: {"test": rows}}
    return _Task(OWN_TASK | {"task": name, "num_fewshot": 0, "metadata": reads})


def _ask(name: str, tasks: list[_Task], shots: int, limit: int | None) -> Asked:
    questions = []
    for task in tasks:
        available = len(task.sampler.df) - (task.shots_split == task.asked_split)
        if shots > available:
            raise Permanent(
                f"task '{name}': {task.task_name} has {available} rows for {shots} few-shot "
                f"examples in its {task.shots_split} split; lower shots"
            )
        task.set_fewshot_seed(SHOTS_SEED)
        task.build_all_requests(limit=limit)
        for number, requests in groupby(task.instances, lambda r: r.doc_id):
            ordered = sorted(requests, key=lambda r: r.idx)
            questions.append(Question(task, number, ordered))
    first = tasks[0]
    return Asked(
        name,
        questions,
        shots,
        split=first.asked_split,
        shots_from=first.shots_split,
        stored=sum(len(task.task_docs) for task in tasks),
    )


class Tokens(TemplateLM):
    """Splits requests into tokens of contexts and continuations by lm-eval's rules."""

    def __init__(self, tokenizer: Any):
        super().__init__()
        self.tokenizer = tokenizer
        self._prefix = tokenizer.decode(self.prefix_token_id)
        # Caches the context, which the choices of a question usually share.
        self._encode = lru_cache(maxsize=2)(tokenizer.encode)

    def pairs(self, question: Question) -> list[tuple[list[int], list[int]]]:
        """Returns the tokens of the context and of the continuation of each request."""
        pairs: Any = self.loglikelihood(question.requests, disable_tqdm=True)
        return list(pairs)

    @property
    def eot_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return int(self.tokenizer.eos_token_id if bos is None else bos)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        if add_special_tokens is None:
            # A text that begins with a BOS token gets no second one.
            add_special_tokens = not string.startswith(self._prefix)
        ids: list[int] = self._encode(string, add_special_tokens=add_special_tokens)
        return ids

    def _loglikelihood_tokens(self, requests: list[Any], **kwargs: Any) -> list[Any]:
        return [(context, continuation) for _, context, continuation in requests]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
        raise NotImplementedError

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
        raise NotImplementedError
