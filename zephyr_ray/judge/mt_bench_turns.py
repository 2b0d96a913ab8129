"""Gathers two-turn answers of several models, and makes one request per turn for the judge."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from zephyr_ray.errors import Permanent
from zephyr_ray.judge.mt_bench_questions import TURNS, Row
from zephyr_ray.messages import visible
from zephyr_ray.stage import Stage, Work

SCORE, COMPARISON = "turn_score", "brackets"
"""The form that scores one answer, and the form that compares two."""
CONTEXT = "Compare the answers to the second question; those to the first are their context."


@dataclass
class TwoTurns:
    """The answers of several models to the same questions."""

    questions: dict[str, Row] = field(default_factory=dict)
    """Questions by id, with "category", "turns" and "reference"."""
    answers: dict[str, dict[str, list[Row | None]]] = field(default_factory=dict)
    """Answers to the turns by model and question; None for a missing one."""

    def requests(self, baseline: str | None) -> Iterator[Row]:
        """Yields a request to the judge for each turn that a model answered: to score the answer,
        or to compare it with that of the baseline, if there is one and it has an answer. Two empty
        answers are not compared."""
        for model, by_question in self.answers.items():
            if model == baseline:
                continue
            for question_id, own in by_question.items():
                sides = [own]
                if baseline is not None:
                    sides.append(self.answers[baseline].get(question_id, [None] * TURNS))
                for turn in range(TURNS):
                    if _can_be_judged([side[turn] for side in sides]):
                        yield {
                            "id": f"{question_id}/{turn + 1}/{model}",
                            # Equal answers of two models get one judgement.
                            "sample": 0,
                            "question": question_id,
                            "turn": turn + 1,
                            "model": model,
                            **self._judged(self.questions[question_id], turn, sides),
                        }

    def _judged(self, question: Row, turn: int, sides: list[list[Row | None]]) -> Row:
        """Returns what the judge is asked about one turn."""
        texts = [[answer["text"] for answer in side[: turn + 1] if answer] for side in sides]
        answers = [answer for side in sides if (answer := side[turn])]
        reference = _reference(question, turn)
        if len(sides) == 1:
            prompt = _conversation(question["turns"], texts[0][:turn])
            form = SCORE
        else:
            form = COMPARISON
            prompt = question["turns"][0]
            if turn:
                prompt = f"{_numbered(question['turns'])}\n\n{CONTEXT}"
                answers = [
                    answer | {"text": _numbered(own)}
                    for answer, own in zip(answers, texts, strict=True)
                ]
            if reference:
                prompt += f"\n\nA right solution, to compare the answers with:\n{reference}"
        return {
            "category": question["category"],
            "form": form,
            "prompt": prompt,
            "instruction": prompt,
            "constraint": None,
            "reference": reference,
            "answers": answers,
        }


def models_of(stage: Stage) -> list[str]:
    """Returns the models whose answers a stage collects."""
    models: list[str] = getattr(stage, "models", [])
    return models


def gather(work: Work, stages: list[str]) -> TwoTurns:
    """Reads the answers of the stages. Raises Permanent if they have different questions under one
    id."""
    gathered = TwoTurns()
    for stage in stages:
        # A model without a single answer still has figures: all its turns are missing.
        gathered.answers |= {model: {} for model in models_of(work.stages[stage])}
        for row in work.inputs[stage].rows():
            question = {name: row[name] for name in ("category", "turns", "reference")}
            if gathered.questions.setdefault(row["id"], question) != question:
                raise Permanent(
                    f"stage '{work.name}': question {row['id']} of '{stage}' differs from that of "
                    f"'{stages[0]}'; give both the same questions"
                )
            for own in row["completions"]:
                gathered.answers[own["model"]][row["id"]] = own["turns"]
    return gathered


def _can_be_judged(answers: list[Row | None]) -> bool:
    """Returns whether no answer is missing, and two answers are not both empty; a single empty
    answer can be scored."""
    texts = [answer["text"] for answer in answers if answer]
    return len(texts) == len(answers) and (len(texts) == 1 or any(map(visible, texts)))


def _conversation(questions: list[str], answers: list[str]) -> str:
    """Returns the conversation up to the question after the last of `answers`."""
    if not answers:
        return questions[0]
    turns = [
        f"User:\n{question}\n\nAssistant:\n{answer}"
        for question, answer in zip(questions, answers, strict=False)
    ]
    return "\n\n".join([*turns, f"User:\n{questions[len(answers)]}"])


def _reference(question: Row, turn: int) -> str | None:
    """Returns the references up to a turn as one text; None if the question has none."""
    references: list[str] | None = question["reference"]
    if references is None:
        return None
    return _numbered(references) if turn else references[0]


def _numbered(texts: list[str]) -> str:
    """Returns the texts of both turns as one."""
    names = ("First", "Second")
    labeled = [f"{name} turn:\n{text}" for name, text in zip(names, texts, strict=True)]
    return "\n\n".join(labeled)
