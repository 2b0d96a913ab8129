"""Prompts: from a file of tasks, or grown from seed tasks by Self-Instruct (arXiv 2212.10560)."""

import random
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from zephyr_ray.errors import Permanent
from zephyr_ray.messages import user
from zephyr_ray.models import constraints
from zephyr_ray.models.contract import Ask
from zephyr_ray.models.repetition import loops
from zephyr_ray.models.similarity import Kept, diversity
from zephyr_ray.rows import run_rows
from zephyr_ray.settings import FILE, Reads
from zephyr_ray.stage import Stage, Work
from zephyr_ray.store import numbered_jsonl

IN_CONTEXT, MACHINE_MADE = 8, 2
"""Tasks shown in one request, and how many of them are machine-made (Self-Instruct)."""
CHAIN = 2
"""Requests of one row, each showing tasks that the one before made."""
NEW_TASKS = 8
LIST_TOKENS = 128
MIN_WORDS, MAX_WORDS = 4, 150
IMPOSSIBLE = re.compile(
    r"\b(images?|pictures?|photos?|graphs?|charts?|maps?|files?|videos?|audio|draw|plot|link|url)\b",
    re.IGNORECASE,
)
"""What a text model cannot do."""
YIELD, LEAST_ROWS = 3, 24
"""New tasks kept of one row, a low guess, and the rows of the smallest round: a second round starts
its engines again, while rows that run beside each other cost little more than one."""
ROUNDS = 4


class Tasks(Stage):
    """Settings shared by both kinds: a file of tasks, and constraints drawn for them."""

    seeds: Annotated[str, FILE]
    count: int | None = Field(None, ge=1)
    constrained: float = Field(1.0, ge=0, le=1)
    """The share of prompts that carry a checkable constraint."""
    seed: int = 0

    def check(self, files: dict[str, Path], reads: dict[str, Stage]) -> None:
        list(read_tasks(files["seeds"]))

    def _row(self, number: int, task: dict[str, Any], rng: random.Random) -> dict[str, Any]:
        """A prompt row; a task without a constraint of its own is given one at random."""
        instruction, constraint = task["instruction"].strip(), task.get("constraint")
        if instruction[-1].isalnum():  # a sentence that states the constraint may follow
            instruction += "."
        sentence = ""
        if constraint:
            sentence = constraints.phrase(rng, constraint)
        elif rng.random() < self.constrained:
            constraint, sentence = constraints.draw(rng, instruction)
        return {
            "id": f"p{number:05d}",
            "instruction": instruction,
            "constraint": constraint or None,
            "prompt": f"{instruction} {sentence}".rstrip(),
            "source": task.get("id", "generated"),
        }


class Prompts(Tasks):
    """The first `count` tasks of a file, as they are."""

    kind = "prompts"
    makes = "prompts"
    version = 2

    def check(self, files: dict[str, Path], reads: dict[str, Stage]) -> None:
        tasks = len(list(read_tasks(files["seeds"])))
        if self.count and self.count > tasks:
            raise Permanent(f"count is {self.count}, {files['seeds']} has {tasks} tasks")

    def run(self, work: Work) -> None:
        tasks = list(read_tasks(work.files["seeds"]))[: self.count]
        rng = random.Random(self.seed)
        work.write_rows(self._row(i, task, rng) for i, task in enumerate(tasks))
        work.counts |= diversity([task["instruction"] for task in tasks])

    def expected(self, rows: dict[str, int]) -> int | None:
        return self.count


class SelfInstruct(Tasks):
    """`count` prompts: the seed tasks themselves, then new ones that a model writes in their
    manner, kept when they differ from every kept one and from the `apart_from` prompts."""

    kind = "self_instruct"
    makes = "prompts"
    version = 3

    model: Annotated[str, Reads("model")]
    count: int = Field(ge=1)
    apart_from: Annotated[str | None, Reads("prompts")] = None
    """Prompts to stay apart from (held-out ones): exact and near duplicates are dropped."""
    max_similarity: float = Field(0.7, gt=0, le=1)
    """ROUGE-L F above which two instructions count as near duplicates (Self-Instruct)."""

    def run(self, work: Work) -> None:
        rng = random.Random(self.seed)
        held_out = self._held_out(work)
        seeds = [t for t in read_tasks(work.files["seeds"]) if not self._known(t, held_out, work)]
        if not seeds:
            raise Permanent(f"every seed task is a near duplicate of one of '{self.apart_from}'")
        kept, tasks = Kept([t["instruction"] for t in seeds]), list(seeds)
        work.counts["seeds"] = len(seeds)
        requests: list[dict[str, Any]] = []
        results: dict[str, list[str]] = {}
        program = partial(invent, seeds=[t["instruction"] for t in seeds])
        for _ in range(ROUNDS):
            missing = self.count - len(tasks)
            if missing <= 0:
                break
            start = len(requests)
            requests += [
                {"id": f"r{start + i:05d}", "seed": rng.random()}
                for i in range(max(LEAST_ROWS, missing // YIELD))
            ]
            rows = run_rows(work, requests, program, [work.models[self.model]])
            for row in rows:
                if row["id"] in results:
                    continue
                results[row["id"]] = row["instructions"]
                for instruction in row["instructions"]:
                    task = {"instruction": instruction}
                    work.counts["generated"] = work.counts.get("generated", 0) + 1
                    if self._usable(task, kept, held_out, work):
                        kept.add(instruction)
                        tasks.append(task)
        work.counts["surplus"] = max(0, len(tasks) - self.count)
        tasks = tasks[: self.count]
        work.counts["short_of_count"] = self.count - len(tasks)
        work.counts["new"] = len(tasks) - min(len(seeds), len(tasks))
        work.counts |= diversity([task["instruction"] for task in tasks])
        rng.shuffle(tasks)
        work.write_rows(self._row(i, task, rng) for i, task in enumerate(tasks))

    def expected(self, rows: dict[str, int]) -> int | None:
        return self.count

    def _held_out(self, work: Work) -> Kept:
        rows = work.inputs[self.apart_from].rows() if self.apart_from else []
        return Kept([row["instruction"] for row in rows])

    def _known(self, task: dict[str, Any], held_out: Kept, work: Work) -> bool:
        nearest = held_out.nearest(task["instruction"], self.max_similarity)
        if nearest > self.max_similarity:
            rule = "held-out, exact" if nearest == 1.0 else "held-out, near"
            work.drop(rule, task["instruction"])
        return nearest > self.max_similarity

    def _usable(self, task: dict[str, Any], kept: Kept, held_out: Kept, work: Work) -> bool:
        instruction = task["instruction"]
        if not MIN_WORDS <= len(instruction.split()) <= MAX_WORDS:
            work.drop("length", instruction)
        elif not instruction[0].isalpha():
            work.drop("does not start with a letter", instruction)
        elif IMPOSSIBLE.search(instruction):
            work.drop("not for a text model", instruction)
        elif loops(instruction):
            work.drop("repeats itself", instruction)
        elif kept.nearest(instruction, self.max_similarity) > self.max_similarity:
            work.drop("near duplicate", instruction)
        else:
            return not self._known(task, held_out, work)
        return False


async def invent(row: dict[str, Any], ask: Ask, *, seeds: list[str]) -> dict[str, Any]:
    """A chain of requests; each shows eight tasks, two of them made by the request before."""
    rng = random.Random(row["seed"])
    made: list[str] = []
    for _ in range(CHAIN):
        own = rng.sample(made, min(MACHINE_MADE, len(made)))
        shown = rng.sample(seeds, min(IN_CONTEXT - len(own), len(seeds))) + own
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
            shown=False,
        )
        made += read_list(reply.text, complete=reply.finish_reason == "stop")
    return {"id": row["id"], "instructions": made}


def read_list(text: str, complete: bool) -> list[str]:
    """The items of a numbered list; the last one is left out when the text was cut off."""
    items = [
        match.group(1).strip(" *\"'")
        for line in text.splitlines()
        if (match := re.match(r"\s*(?:\d+[.)]|[-*])\s+(.*\S)", line))
    ]
    return items if complete else items[:-1]


def read_tasks(path: Path) -> Iterator[dict[str, Any]]:
    """Rows `{"instruction": str, "constraint": {…} or absent}`; what is wrong names its line."""
    number = 0
    for number, row in numbered_jsonl(path):
        instruction = row.get("instruction")
        if not isinstance(instruction, str) or not instruction.strip():
            raise Permanent(f'{path} line {number}: needs an "instruction", a text')
        if row.get("constraint"):
            try:
                constraints.validate(row["constraint"])
            except Permanent as error:
                raise Permanent(f"{path} line {number}: {error}") from None
        yield row
    if number == 0:
        raise Permanent(f"{path} is empty; it needs one JSON object per line")
