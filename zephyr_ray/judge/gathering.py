"""Gathers the answers of several completions stages for a comparison, by model and by prompt."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from zephyr_ray.errors import Permanent
from zephyr_ray.models.role_markers import leaks_role
from zephyr_ray.models.spacing import spaced
from zephyr_ray.stage import Work

Row = dict[str, Any]
JUDGED = ("verdict", "reason", "flip", "orders")
"""Fields of a judgement that the artifact keeps, if the judge's form has them."""


@dataclass(frozen=True)
class Gathered:
    """The answers of several models; the first model is the baseline."""

    models: dict[str, str]
    """Model by stage."""
    prompts: dict[str, Row]
    """First row of each prompt, by prompt id, with "prompt", "instruction" and "constraint"."""
    answers: dict[str, dict[str, Row]]
    """Completions by model and prompt id."""

    def comparisons(self) -> Iterator[Row]:
        """Yields a row to judge for each model and each prompt that it and the baseline answered.

        The model's answer is `first`, so a verdict of 1 is its win. The baseline is compared with
        itself too, so that its answers are checked like all others.
        """
        baseline = next(iter(self.answers.values()))
        for model, answers in self.answers.items():
            for prompt_id, prompt in self.prompts.items():
                if prompt_id in answers and prompt_id in baseline:
                    yield {
                        "id": f"{prompt_id}/{model}",
                        "model": model,
                        **{name: prompt[name] for name in ("instruction", "prompt", "constraint")},
                        "prompt_id": prompt_id,
                        "first": answers[prompt_id],
                        "second": baseline[prompt_id],
                    }

    def side_by_side(self, judged: list[Row]) -> Iterator[Row]:
        """Yields one row per judged prompt, with the answer and the verdict of every model."""
        by_prompt: dict[str, dict[str, Row]] = {}
        for row in judged:
            by_prompt.setdefault(row["prompt_id"], {})[row["model"]] = row
        for prompt_id, by_model in by_prompt.items():
            yield {
                "id": prompt_id,
                "prompt": self.prompts[prompt_id]["prompt"],
                "constraint": self.prompts[prompt_id]["constraint"],
                "answers": {
                    model: _answer(self.answers[model][prompt_id], row["scores"])
                    for model, row in by_model.items()
                },
                "verdicts": {
                    model: {name: row[name] for name in JUDGED if name in row}
                    for model, row in by_model.items()
                },
            }

    def described(self, judged: list[Row]) -> dict[str, list[Row]]:
        """Returns the judged rows of each model that has any, with the facts of the answers."""
        baseline = next(iter(self.answers.values()))
        by_model: dict[str, list[Row]] = {model: [] for model in self.answers}
        for row in judged:
            model, prompt_id = row["model"], row["prompt_id"]
            facts = describe(self.answers[model][prompt_id], baseline[prompt_id])
            by_model[model].append(row | facts)
        return {model: rows for model, rows in by_model.items() if rows}


def gather(work: Work, stages: list[str]) -> Gathered:
    """Reads the answers of `stages`, one model each, the baseline's first.

    Raises Permanent if two stages have answers of one model, or different prompts under one id, or
    a stage has none of the baseline's prompts.
    """
    gathered = Gathered(models={}, prompts={}, answers={})
    for stage in stages:
        rows = work.inputs[stage].rows()
        if not rows:
            raise Permanent(f"stage '{work.name}': '{stage}' has no answers; give it prompts")
        model = rows[0]["completions"][0]["model"]
        if model in gathered.answers:
            [other] = [name for name, known in gathered.models.items() if known == model]
            raise Permanent(
                f"stage '{work.name}': '{stage}' and '{other}' both have answers of '{model}'; "
                "remove one, or rename the model"
            )
        gathered.models[stage] = model
        gathered.answers[model] = {row["id"]: row["completions"][0] for row in rows}
        if gathered.answers[model].keys().isdisjoint(next(iter(gathered.answers.values()))):
            raise Permanent(
                f"stage '{work.name}': '{stage}' answers none of the prompts of '{stages[0]}'; "
                "give both the same prompts"
            )
        for row in rows:
            if gathered.prompts.setdefault(row["id"], row)["prompt"] != row["prompt"]:
                raise Permanent(
                    f"stage '{work.name}': '{stage}' answers other prompts than "
                    f"'{stages[0]}' (row {row['id']}); give both the same prompts"
                )
    return gathered


def describe(answer: Row, other: Row) -> Row:
    """Returns facts about a model's answer, from which figures are computed; lengths are (the
    answer's, the other answer's)."""
    texts = answer["text"], other["text"]
    return {
        "words": [len(spaced(text).split()) for text in texts],
        "characters": [len(text) for text in texts],
        "leaks_role": leaks_role(answer["text"]),
        "cut": answer.get("finish_reason") == "length",
    }


def _answer(completion: Row, scores: list[Row] | None) -> Row:
    return {
        "text": completion["text"],
        "finish_reason": completion["finish_reason"],
        "score": scores[0]["score"] if scores else None,
        "reason": scores[0]["reason"] if scores else "",
    }
