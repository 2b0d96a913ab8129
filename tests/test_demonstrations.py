"""Tests which worked examples a model gets, for which rows, and where in the conversation."""

import asyncio
from pathlib import Path
from typing import Any

from zephyr_ray.engines import demonstrations
from zephyr_ray.engines.language import LanguageEngine
from zephyr_ray.engines.model import Model
from zephyr_ray.engines.vllm import VllmSettings
from zephyr_ray.messages import Message, assistant, user
from zephyr_ray.models.contract import Reply, Sampling
from zephyr_ray.store import write_rows

EXAMPLES = [
    {"constraint": {"kind": "uppercase"}, "prompt": "Name a cow. In capitals.", "answer": "BESS."},
    {"constraint": {"kind": "json"}, "prompt": "Name a cat. In JSON.", "answer": '{"answer": 1}'},
    {"constraint": {"kind": "uppercase"}, "prompt": "Name a dog. In capitals.", "answer": "REX."},
]
CAPITALS = [
    *(user("Name a cow. In capitals."), assistant("BESS.")),
    *(user("Name a dog. In capitals."), assistant("REX.")),
]
SYSTEM = {"role": "system", "content": "Be brief."}
QUESTION = user("Name a fish.", instruction="Name a fish.")
PLAIN = user("Name a fish.")


class Recorder(LanguageEngine):
    def __init__(self) -> None:
        self.seen: list[tuple[list[Message], Sampling]] = []

    async def answer(self, messages: list[Message], sampling: Sampling) -> Reply:
        self.seen.append((messages, sampling))
        return Reply("Fine.", "stop")


def shown(
    kind: str | None, messages: list[Message], **options: Any
) -> tuple[list[Message], Sampling]:
    """Returns what an engine receives for a row with this kind of constraint."""
    engine = Recorder()
    model = Model("m", VllmSettings(weights="w", temperature=0.2, top_p=0.5), EXAMPLES)
    ask = engine.ask_for(model, {"id": "r", "constraint": {"kind": kind} if kind else None})
    asyncio.run(ask(messages, max_tokens=9, **options))
    [seen] = engine.seen
    return seen


def test_examples_of_the_rows_kind_come_before_its_question() -> None:
    assert shown("uppercase", [QUESTION])[0] == [*CAPITALS, PLAIN]
    assert shown("json", [QUESTION])[0] == [
        user("Name a cat. In JSON."),
        assistant('{"answer": 1}'),
        PLAIN,
    ]


def test_a_system_message_stays_first() -> None:
    assert shown("uppercase", [SYSTEM, QUESTION])[0] == [SYSTEM, *CAPITALS, PLAIN]


def test_earlier_turns_come_after_the_examples() -> None:
    turns = [QUESTION, assistant("Cod.", finish_reason="stop"), user("Another.")]
    asked = [PLAIN, assistant("Cod."), user("Another.")]
    assert shown("uppercase", [SYSTEM, *turns])[0] == [SYSTEM, *CAPITALS, *asked]


def test_a_later_system_message_stays_in_its_place() -> None:
    turns = [PLAIN, assistant("Cod."), SYSTEM, PLAIN]
    assert shown("uppercase", [SYSTEM, *turns])[0] == [SYSTEM, *CAPITALS, *turns]


def test_no_examples_for_another_kind_or_no_kind_or_if_turned_off() -> None:
    assert shown("lowercase", [SYSTEM, QUESTION])[0] == [SYSTEM, PLAIN]
    assert shown(None, [QUESTION])[0] == [PLAIN]
    assert shown("uppercase", [QUESTION], with_demonstrations=False)[0] == [PLAIN]


def test_answers_are_sampled_with_the_models_settings() -> None:
    assert shown("json", [QUESTION])[1] == Sampling(temperature=0.2, top_p=0.5, max_tokens=9)


def test_a_row_program_can_state_the_temperature() -> None:
    assert shown("json", [QUESTION], temperature=0.0)[1].temperature == 0.0
    assert shown("json", [QUESTION], temperature=0.9)[1].temperature == 0.9


def test_a_prompt_states_its_constraint(tmp_path: Path) -> None:
    row = {"instruction": "Name pets.", "constraint": {"kind": "bullets", "n": 3}, "answer": "* a"}
    write_rows(tmp_path, [row])
    [read] = demonstrations.read(tmp_path / "rows.jsonl")
    assert read == {
        **row,
        "prompt": "Name pets. Answer with exactly 3 bullet points, each on its own line and "
        'starting with "* ".',
    }
