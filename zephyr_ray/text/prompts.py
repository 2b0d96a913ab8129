"""Makes prompts from a file of tasks, or from seed tasks by Self-Instruct (arXiv 2212.10560)."""

import random
import re
from collections.abc import Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from zephyr_ray.demand import Calls
from zephyr_ray.errors import Permanent, suggest
from zephyr_ray.messages import user
from zephyr_ray.model_pool import ModelPool, Names, names_of, share_calls
from zephyr_ray.models import constraints
from zephyr_ray.models.contract import Ask
from zephyr_ray.models.repetition import loops
from zephyr_ray.models.similarity import SimilarityIndex, diversity
from zephyr_ray.models.spacing import is_unspaced, spaced
from zephyr_ray.settings import FILE, Reads
from zephyr_ray.stage import PROMPT_TOKENS, RowStage, Stage, Work
from zephyr_ray.store import numbered_jsonl

IN_CONTEXT, MACHINE_MADE = 8, 2
"""Maximum tasks shown per request, and maximum machine-made ones among them (Self-Instruct)."""
CHAIN = 2
"""Requests per chain; each after the first also shows tasks from earlier replies."""
NEW_TASKS = 8
"""Tasks asked for per request."""
LIST_TOKENS = 128
"""Maximum tokens per list of new tasks."""
MIN_WORDS, MAX_WORDS = 4, 150
"""Minimum and maximum words per instruction."""
IMPOSSIBLE = re.compile(
    r"\b(images?|pictures?|photos?|graphs?|charts?|maps?|files?|videos?|audio|draw|plot|link|url)\b",
    re.IGNORECASE,
)
"""Matches tasks that a text model cannot do."""
FIELDS = {"id", "instruction", "constraint", "category"}
"""Fields of a task in a file; `category` is for its author and is not read."""
YIELD = 3
"""Expected new tasks kept per chain, a low estimate."""
MIN_ROWS = 24
"""Minimum rows (chains) per round: another round waits for its slowest chain, while chains in one
batch cost little more than a single chain."""
MAX_ROUNDS = 4
"""Maximum rounds; after them the stage may have fewer prompts than `count`."""


class Tasks(Stage):
    """Settings shared by both prompt stages: a file of tasks, and random constraints for them."""

    seeds: Annotated[str, FILE]
    count: int | None = Field(None, ge=1)
    """Number of prompts; by default one per task."""
    constrained: float = Field(1.0, ge=0, le=1)
    """Probability that a task without a constraint gets a random one."""
    seed: int = 0

    def check(self, files: dict[str, Path], reads: dict[str, Stage]) -> None:
        list(read_tasks(files["seeds"]))

    def _row(self, number: int, task: dict[str, Any], rng: random.Random) -> dict[str, Any]:
        """Returns a prompt row; a task without its own constraint may get a random one."""
        instruction, constraint = task["instruction"].strip(), task.get("constraint")
        sentence = ""
        if constraint:
            sentence = constraints.phrase(rng, constraint)
        elif rng.random() < self.constrained:
            constraint, sentence = constraints.draw(rng, instruction)
        prompt = instruction
        if sentence and ("\n" in instruction or is_unspaced(instruction[-1])):
            prompt = f"{instruction}\n\n{sentence}"
        elif sentence:
            instruction += "." if instruction[-1].isalnum() else ""
            prompt = f"{instruction} {sentence}"
        return {
            "id": f"p{number:05d}",
            "instruction": instruction,
            "constraint": constraint or None,
            "prompt": prompt,
            "source": task.get("id", "generated"),
            **({"author": task["author"]} if "author" in task else {}),
        }


class Prompts(Tasks):
    """Takes the first `count` tasks of a file; those that get no constraint stay unchanged."""

    kind = "prompts"
    makes = "prompts"
    version = 2

    def check(self, files: dict[str, Path], reads: dict[str, Stage]) -> None:
        tasks = len(list(read_tasks(files["seeds"])))
        if self.count and self.count > tasks:
            raise Permanent(
                f"count is {self.count}, {files['seeds']} has {tasks} tasks; lower count"
            )

    def run(self, work: Work) -> None:
        tasks = list(read_tasks(work.files["seeds"]))[: self.count]
        rng = random.Random(self.seed)
        work.write_rows(self._row(i, task, rng) for i, task in enumerate(tasks))
        work.counts |= diversity([task["instruction"] for task in tasks])

    def expected(self, rows: dict[str, int]) -> int | None:
        return self.count

    def rows_of_files(self, files: dict[str, Path]) -> int | None:
        return len(list(read_tasks(files["seeds"])))


class SelfInstruct(Tasks, RowStage):
    """Makes `count` prompts: the seed tasks, then new tasks that a model writes in their style. A
    new task is kept if it passes the filters of `_usable`: length, form, feasibility, repetition,
    and similarity to kept tasks and to the `apart_from` prompts."""

    kind = "self_instruct"
    makes = "prompts"
    limits = "A model wrote new prompts in the style of the seed tasks; no person checked them."
    version = 3

    model: Annotated[Names, Reads("model")]
    """The teacher, or a list of teachers; each chain of requests goes to one of them."""
    count: int = Field(ge=1)
    apart_from: Annotated[str | None, Reads("prompts")] = None
    """Held-out prompts: tasks that are exact or near duplicates of one are dropped."""
    max_similarity: float = Field(0.7, gt=0, le=1)
    """ROUGE-L F above which two instructions count as near duplicates (Self-Instruct)."""

    def run(self, work: Work) -> None:
        rng = random.Random(self.seed)
        held_out = self._held_out(work)
        tasks = [
            t
            for t in read_tasks(work.files["seeds"])
            if not self._repeats_held_out(t, held_out, work)
        ]
        seeds = [t["instruction"] for t in tasks]
        if not seeds:
            raise Permanent(
                f"every seed task is a near duplicate of a prompt of '{self.apart_from}'; choose "
                "other seeds"
            )
        accepted = SimilarityIndex(seeds)
        work.counts["seeds"] = len(seeds)
        requests: list[dict[str, Any]] = []
        finished: set[str] = set()
        teachers = ModelPool.of(work, self.model, self.seed)
        program = partial(invent, seeds=seeds)
        for _ in range(MAX_ROUNDS):
            missing = self.count - len(tasks)
            if missing <= 0:
                break
            start = len(requests)
            requests += [
                {"id": f"r{start + i:05d}", "seed": rng.random()}
                for i in range(max(MIN_ROWS, missing // YIELD))
            ]
            for row in chain.from_iterable(teachers.run(work, requests, program)):
                if row["id"] in finished:
                    continue
                finished.add(row["id"])
                for instruction in row["instructions"]:
                    task = {"instruction": instruction, "author": row["model"]}
                    work.counts["generated"] = work.counts.get("generated", 0) + 1
                    if self._usable(task, accepted, held_out, work):
                        accepted.add(instruction)
                        tasks.append(task)
        work.counts["surplus"] = max(0, len(tasks) - self.count)
        tasks = tasks[: self.count]
        work.counts["short_of_count"] = self.count - len(tasks)
        work.counts["new"] = len(tasks) - min(len(seeds), len(tasks))
        work.counts |= diversity([task["instruction"] for task in tasks])
        teachers.count_made(work, (task["author"] for task in tasks if "author" in task))
        rng.shuffle(tasks)
        work.write_rows(self._row(i, task, rng) for i, task in enumerate(tasks))

    def expected(self, rows: dict[str, int]) -> int | None:
        return self.count

    def answer_tokens(self) -> int:
        return LIST_TOKENS

    def calls(self, rows: dict[str, int], reads: dict[str, Stage]) -> dict[str, Calls]:
        count = MAX_ROUNDS * max(MIN_ROWS, self.count // YIELD) * CHAIN
        total = Calls(count, count * PROMPT_TOKENS, count * LIST_TOKENS)
        return share_calls(total, names_of(self.model))

    def _held_out(self, work: Work) -> SimilarityIndex:
        rows = work.inputs[self.apart_from].rows() if self.apart_from else []
        return SimilarityIndex([row["instruction"] for row in rows])

    def _repeats_held_out(
        self, task: dict[str, Any], held_out: SimilarityIndex, work: Work
    ) -> bool:
        """Returns whether the task repeats a held-out prompt; if so, counts it as dropped."""
        nearest = held_out.nearest(task["instruction"], self.max_similarity)
        if nearest > self.max_similarity:
            rule = "held-out, exact" if nearest == 1.0 else "held-out, near"
            work.drop(rule, task["instruction"])
        return nearest > self.max_similarity

    def _usable(
        self,
        task: dict[str, Any],
        accepted: SimilarityIndex,
        held_out: SimilarityIndex,
        work: Work,
    ) -> bool:
        """Returns whether the task passes every filter; counts it under the first that it fails."""
        instruction = task["instruction"]
        if not MIN_WORDS <= len(spaced(instruction).split()) <= MAX_WORDS:
            work.drop("length", instruction)
        elif not instruction[0].isalpha():
            work.drop("does not start with a letter", instruction)
        elif IMPOSSIBLE.search(instruction):
            work.drop("not for a text model", instruction)
        elif loops(instruction):
            work.drop("repeats itself", instruction)
        elif accepted.nearest(instruction, self.max_similarity) > self.max_similarity:
            work.drop("near duplicate", instruction)
        else:
            return not self._repeats_held_out(task, held_out, work)
        return False


async def invent(row: dict[str, Any], ask: Ask, *, seeds: list[str]) -> dict[str, Any]:
    """Asks the model for new tasks in a chain of requests; each shows up to eight tasks, at most
    two of them machine-made."""
    rng = random.Random(row["seed"])
    new_tasks: list[str] = []
    for _ in range(CHAIN):
        machine_made = rng.sample(new_tasks, min(MACHINE_MADE, len(new_tasks)))
        shown = rng.sample(seeds, min(IN_CONTEXT - len(machine_made), len(seeds))) + machine_made
        rng.shuffle(shown)
        listed = "\n".join(f"{n}. {task}" for n, task in enumerate(shown, 1))
        reply = await ask(
            [
                user(
                    f"Here are {len(shown)} tasks for an assistant:\n{listed}\n\n"
                    f"Write {NEW_TASKS} more tasks of this kind about quite different subjects, "
                    f"as a numbered list from {len(shown) + 1}."
                )
            ],
            max_tokens=LIST_TOKENS,
            with_demonstrations=False,
        )
        new_tasks += read_list(reply.text, complete=reply.finish_reason == "stop")
    return {"id": row["id"], "instructions": new_tasks}


def read_list(text: str, complete: bool) -> list[str]:
    """Returns the items of a numbered list, without the last one if the text was cut off."""
    items = [
        match.group(1).strip(" *\"'")
        for line in text.splitlines()
        if (match := re.match(r"\s*(?:\d+[.)]|[-*])\s+(.*\S)", line))
    ]
    return items if complete else items[:-1]


def read_tasks(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the tasks of a file; of `FIELDS`, only `instruction` is required. Raises Permanent
    with the line number if a task is invalid."""
    number = 0
    for number, row in numbered_jsonl(path):
        instruction = row.get("instruction")
        if not isinstance(instruction, str) or not instruction.strip():
            raise Permanent(f'{path} line {number}: needs an "instruction" that is text; add one')
        if unknown := sorted(row.keys() - FIELDS):
            raise Permanent(
                f"{path} line {number}: unknown field '{unknown[0]}'{suggest(unknown[0], FIELDS)}"
            )
        if row.get("constraint"):
            try:
                constraints.validate(row["constraint"])
            except Permanent as error:
                raise Permanent(f"{path} line {number}: {error}") from None
        yield row
    if number == 0:
        raise Permanent(f"{path} is empty; write one JSON object per line")
