"""Tests row programs on real Ray Data actors with real vLLM engines and a tiny random model."""

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import psutil
import pytest
from ray import cloudpickle

from zephyr_ray.chat import ChatFormat
from zephyr_ray.engines.model import Model
from zephyr_ray.engines.pool import EnginePool
from zephyr_ray.engines.rules import RulesSettings
from zephyr_ray.engines.vllm import VllmSettings
from zephyr_ray.errors import Permanent, RowError, Temporary
from zephyr_ray.messages import assistant, user
from zephyr_ray.models.checks import load_chat_format
from zephyr_ray.models.contract import EngineDead
from zephyr_ray.rows import run_rows
from zephyr_ray.stage import Work

CONCURRENCY = 8
SHORT, LONG = 4, 96
"""Tokens per answer of fast and slow rows; a random model rarely stops early."""
FINISHED_BEFORE_KILL = 5
RANKS = [[{"model": "a", "rank": rank}, {"model": "b", "rank": 3 - rank}] for rank in (1, 2)]
SCORE: dict[str, Any] = {
    "type": "object",
    "properties": {
        "rationale": {"type": "string"},
        "score": {"type": "integer", "minimum": 1, "maximum": 10},
    },
    "required": ["rationale", "score"],
    "additionalProperties": False,
}
GUIDED: list[dict[str, Any]] = [
    {"schema": SCORE, "tokens": 96, "turns": 1},
    {"schema": {"enum": RANKS}, "tokens": 96, "turns": 1},
]
"""A judge's verdicts: an object with a text, and a ranking, whose root is a list."""

# Actors cannot import a test module, so the programs below are pickled by value.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

pytestmark = pytest.mark.usefixtures("ray_cluster")


def work_in(folder: Path, engines: EnginePool | None = None) -> Work:
    engines = engines or EnginePool()
    return Work("stage", folder, seed=0, inputs={}, models={}, files={}, engines=engines)


def entries(work: Work) -> list[dict[str, Any]]:
    return list(work.journal("rows").read_new())


def note(path: str, **event: Any) -> None:
    """Appends a line to the diary that processes share; short appends do not interleave."""
    with open(path, "ab", buffering=0) as file:
        file.write(json.dumps({"at": time.monotonic(), **event}).encode() + b"\n")


def diary(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# --- the rows of the shared run ------------------------------------------------------------------


async def mixed(row: dict[str, Any], ask: Any) -> dict[str, Any]:
    """Asks `row["turns"]` turns of at most `row["tokens"]` tokens; notes each in the diary."""
    _watch_steps(ask, row["diary"])
    messages, prompts = [], []
    for turn in range(row["turns"]):
        messages.append(user(row["prompt"]))
        note(row["diary"], row=row["id"], turn=turn, event="request")
        reply = await ask(
            messages,
            max_tokens=row["tokens"],
            with_demonstrations=row.get("demonstrations", True),
            schema=row.get("schema"),
            top_logprobs=row.get("top_logprobs", 0),
        )
        note(row["diary"], row=row["id"], turn=turn, event="answer")
        messages.append(assistant(reply.text))
        prompts.append(reply.prompt_tokens)
    first = reply.top_logprobs
    return {"id": row["id"], "messages": messages, "prompt_tokens": prompts, "first": first}


def _watch_steps(ask: Any, path: str) -> None:
    """Makes the engine note how many requests share each of its steps."""
    engine = ask._engine._engine
    if "step" in vars(engine):
        return
    step = engine.step

    def noted() -> Any:
        note(path, event="step", requests=engine.get_num_unfinished_requests())
        return step()

    engine.step = noted


@dataclass
class Mixed:
    work: Work
    rows: list[dict[str, Any]]
    results: list[dict[str, Any]]
    diary: list[dict[str, Any]]
    model: Model


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, ray_cluster: None) -> Mixed:
    """Runs one engine over 24 rows: most have two turns, some are special."""
    folder = tmp_path_factory.mktemp("mixed")
    path = folder / "diary"
    common = {"diary": str(path), "prompt": "Say it in a few words.", "tokens": 16, "turns": 2}
    slow = {"tokens": LONG, "turns": 1}
    capital = {"constraint": {"kind": "uppercase"}, "tokens": SHORT, "turns": 1}
    rows = [
        {"id": "fast", **common, "tokens": SHORT, "turns": 3},
        *({"id": f"slow{i}", **common, **slow} for i in range(5)),
        *({"id": f"two{i:02d}", **common} for i in range(12)),
        {"id": "too long", **common, "prompt": "a very long prompt " * 400},
        {"id": "plain", **common, "tokens": SHORT, "turns": 1},
        {"id": "shown", **common, **capital},
        {"id": "not shown", **common, **capital, "demonstrations": False},
        {"id": "other kind", **common, **capital, "constraint": {"kind": "lowercase"}},
        *({"id": f"guided{i}", **common, **GUIDED[i % 2]} for i in range(8)),
        {"id": "probed", **common, "tokens": 1, "turns": 1, "top_logprobs": 20},
    ]
    settings = VllmSettings(
        weights=str(tiny_model), temperature=1.0, top_p=1, concurrency=CONCURRENCY
    )
    example = {"constraint": {"kind": "uppercase"}, "prompt": "What do cows eat?", "answer": "HAY."}
    model = Model("tiny", settings, [example])
    work = work_in(folder / "artifact")
    results = run_rows(work, rows, mixed, [model])
    return Mixed(work, rows, results, diary(path), model)


def test_results_come_in_row_order(run: Mixed) -> None:
    expected = [row["id"] for row in run.rows if row["id"] != "too long"]
    assert [result["id"] for result in run.results] == expected


def test_every_turn_of_every_row_is_answered(run: Mixed) -> None:
    turns = {row["id"]: row["turns"] for row in run.rows}
    for result in run.results:
        roles = [message["role"] for message in result["messages"]]
        assert roles == ["user", "assistant"] * turns[result["id"]]


def test_later_turns_carry_the_conversation(run: Mixed) -> None:
    first, second, third = run.results[0]["prompt_tokens"]
    assert first < second < third


def test_requests_share_engine_steps_up_to_concurrency(run: Mixed) -> None:
    assert len(run.rows) > CONCURRENCY
    widths = [entry["requests"] for entry in run.diary if entry["event"] == "step"]
    assert max(widths) == CONCURRENCY


def test_a_row_continues_while_others_are_in_their_first_turn(run: Mixed) -> None:
    """Batching is continuous: three short turns end while slow rows, sent before, are in flight."""
    at = {(e["row"], e["turn"], e["event"]): e["at"] for e in run.diary if e["event"] != "step"}
    end = at["fast", 2, "answer"]
    overtaken_rows = [
        i for i in range(5) if at[f"slow{i}", 0, "request"] < end < at[f"slow{i}", 0, "answer"]
    ]
    assert overtaken_rows


def test_a_waiting_row_starts_as_soon_as_one_ends(run: Mixed) -> None:
    """Rows beyond `concurrency` do not wait for the complete first batch."""
    starts = [e["at"] for e in run.diary if e["event"] == "request" and e["turn"] == 0]
    first_batch_ends = max(
        e["at"] for e in run.diary if e["event"] == "answer" and e["row"].startswith("slow")
    )
    assert sum(at < first_batch_ends for at in starts) > CONCURRENCY


def test_log_probabilities_are_those_of_the_model(run: Mixed, tiny_model: Path) -> None:
    """They match those of transformers up to bf16 rounding."""
    import torch
    from transformers import AutoModelForCausalLM

    chat = load_chat_format(tiny_model, ChatFormat.to_ask)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)
    [row] = [row for row in run.rows if row["id"] == "probed"]
    with torch.inference_mode():
        logits = model(torch.tensor([chat.prompt([user(row["prompt"])])])).logits[0, -1]
    values = logits.float().log_softmax(-1)
    [tokens] = [result["first"] for result in run.results if result["id"] == "probed"]
    # The sampled token is there too, even if it is not among the most likely ones.
    most_likely = sorted((value for _, value in tokens), reverse=True)[:20]
    assert most_likely == pytest.approx(values.topk(20).values.tolist(), abs=0.05)
    for text, value in tokens:
        ids = chat.tokenizer.encode(text, add_special_tokens=False)
        if len(ids) == 1:  # parts of characters have no text of their own
            assert value == pytest.approx(float(values[ids[0]]), abs=0.05)


def test_a_bad_row_fails_alone_and_is_counted_with_its_reason(run: Mixed) -> None:
    assert run.work.counts["failed/rows"] == 1
    [example] = run.work.examples["failed/rows"]
    assert example.startswith("too long: prompt of ") and "context of 512" in example


def test_answers_follow_their_schema_even_from_a_random_model(run: Mixed) -> None:
    answers = {r["id"]: r["messages"][-1]["content"] for r in run.results}
    for number in range(8):
        schema = GUIDED[number % 2]["schema"]
        jsonschema.validate(json.loads(answers[f"guided{number}"], strict=False), schema)


def test_demonstrations_of_the_same_constraint_precede_the_conversation(run: Mixed) -> None:
    from transformers import AutoTokenizer

    from zephyr_ray.chat import ChatFormat

    chat = ChatFormat.of(AutoTokenizer.from_pretrained(run.model.weights))
    question = user("Say it in a few words.")
    bare = len(chat.prompt([question]))
    full = len(chat.prompt([user("What do cows eat?"), assistant("HAY."), question]))
    tokens = {result["id"]: result["prompt_tokens"][0] for result in run.results}
    assert full > bare
    assert {name: tokens[name] for name in ("plain", "shown", "not shown", "other kind")} == {
        "plain": bare,
        "shown": full,
        "not shown": bare,
        "other kind": bare,
    }


def test_a_second_attempt_asks_nothing_again(run: Mixed) -> None:
    """Answered and failed rows are taken from the journal."""
    before = entries(run.work)
    again = work_in(run.work.folder)
    results = run_rows(again, run.rows, mixed, [run.model])
    assert results == run.results
    assert again.counts["failed/rows"] == 1
    assert entries(again) == before
    assert diary(Path(run.rows[0]["diary"])) == run.diary
    assert again.progress.resumed == again.progress.done == len(run.rows)


# --- engines that stay up ------------------------------------------------------------------------


async def where(row: dict[str, Any], ask: Any) -> dict[str, Any]:
    """Returns the process and the engine that run the row, and the memory of that process."""
    reply = await ask([user("Go on.")], max_tokens=SHORT)
    engine = ask._engine
    is_watched = "step" in vars(engine._engine)
    memory = psutil.Process().memory_info().rss
    place = {"pid": os.getpid(), "context": engine.context, "is_watched": is_watched}
    return {"id": row["id"], "tokens": reply.completion_tokens, "memory": memory, **place}


def resident() -> int:
    """Returns the resident bytes of this process, Ray and its workers."""
    this, total = psutil.Process(), 0
    for process in (this, *this.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            total += process.memory_info().rss
    return total


def test_the_next_stage_reuses_the_running_engine_or_replaces_it_in_its_process(
    run: Mixed, tmp_path: Path
) -> None:
    """Each engine has a KV cache of 1 GiB, so the process's memory would show two at once."""
    engines, settings = run.work.engines, run.model.settings
    stages = [
        Model("cool", settings.model_copy(update={"temperature": 0.1})),
        Model("short", settings.model_copy(update={"context": 256})),
        Model("longer", settings.model_copy(update={"context": 300})),
    ]
    [same], [short], [longer] = (
        run_rows(work_in(tmp_path / model.name, engines), [{"id": "a"}], where, [model])
        for model in stages
    )
    assert same["is_watched"] and not short["is_watched"] and not longer["is_watched"]
    assert [place["context"] for place in (same, short, longer)] == [512, 256, 300]
    assert same["pid"] == short["pid"] == longer["pid"]
    assert longer["memory"] < same["memory"] + 2**29
    before = resident()
    engines.close()
    # A zombie has exited too, but Ray has not reaped it yet.
    with contextlib.suppress(psutil.NoSuchProcess):
        assert psutil.Process(same["pid"]).status() == psutil.STATUS_ZOMBIE
    assert resident() < before - 2**30


# --- a killed actor ------------------------------------------------------------------------------


async def kills_once(row: dict[str, Any], ask: Any) -> dict[str, Any]:
    """Kills the actor's process with SIGKILL, once, after some rows are finished."""
    note(row["diary"], row=row["id"], pid=os.getpid())
    reply = await ask([user("Go on.")], max_tokens=SHORT)
    finished = Path(row["finished"])
    if (
        sum(1 for _ in finished.glob("*")) >= FINISHED_BEFORE_KILL
        and not Path(row["killed"]).exists()
    ):
        Path(row["killed"]).write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGKILL)
    (finished / row["id"]).touch()
    return {"id": row["id"], "text": reply.text}


def test_a_killed_actor_is_restarted_and_rows_are_answered_once(
    tmp_path: Path, tiny_model: Path
) -> None:
    paths = {name: str(tmp_path / name) for name in ("diary", "finished", "killed")}
    Path(paths["finished"]).mkdir()
    rows = [{"id": f"r{i:02d}", **paths} for i in range(20)]
    settings = VllmSettings(weights=str(tiny_model), concurrency=2)
    work = work_in(tmp_path / "artifact")
    results = run_rows(work, rows, kills_once, [Model("tiny", settings)])
    assert [result["id"] for result in results] == [row["id"] for row in rows]
    written = entries(work)
    assert sorted(entry["id"] for entry in written) == [row["id"] for row in rows]
    starts = diary(tmp_path / "diary")
    killed = int((tmp_path / "killed").read_text())
    assert {entry["pid"] for entry in starts} > {killed}
    # Only the rows in flight at the kill may have started twice.
    assert len(starts) <= len(rows) + settings.rows_in_flight


RULES = Model("rules", RulesSettings())


async def kills_the_engine(row: dict[str, Any], ask: Any) -> dict[str, Any]:
    """Fails row "bad" as if an engine step with its request had raised."""
    if row["id"] == "bad":
        await asyncio.sleep(0.2)
        raise EngineDead("a step raised")
    await asyncio.sleep(0.01 if row["id"] < "r05" else 1)
    return {"id": row["id"]}


def test_a_row_that_always_kills_its_engine_is_left_unanswered(tmp_path: Path) -> None:
    rows = [{"id": i} for i in ("r00", "r01", "bad", *(f"r{i:02d}" for i in range(2, 10)))]
    work = work_in(tmp_path)
    reason = "the engine died 3 times while this row was in flight"
    with pytest.raises(Permanent, match=f"1 row was not answered .row 'bad': {reason}"):
        run_rows(work, rows, kills_the_engine, [RULES])
    answered = {entry["id"] for entry in entries(work) if "row" in entry}
    assert answered == {r["id"] for r in rows if r["id"] != "bad"}
    assert work.counts["failed/rows"] == 0


# --- without a model ------------------------------------------------------------------------------


async def stumbles(row: dict[str, Any], judge: Any) -> dict[str, Any]:
    note(row["diary"], row=row["id"])
    if row["id"] == "b" and not Path(row["open"]).exists():
        raise Temporary("the server is busy")
    return {"id": row["id"]}


def test_a_temporary_failure_is_retried_by_the_next_attempt(tmp_path: Path) -> None:
    paths = {"diary": str(tmp_path / "diary"), "open": str(tmp_path / "open")}
    rows = [{"id": name, **paths} for name in "abc"]
    first, second = work_in(tmp_path / "artifact"), work_in(tmp_path / "artifact")
    with pytest.raises(Permanent, match=r"1 row was not .*row 'b': the server is busy"):
        run_rows(first, rows, stumbles, [RULES])
    (tmp_path / "open").touch()
    results = run_rows(second, rows, stumbles, [RULES])
    assert [r["id"] for r in results] == ["a", "b", "c"]
    assert second.counts["failed/rows"] == 0
    assert sorted(entry["row"] for entry in diary(tmp_path / "diary")) == ["a", "b", "b", "c"]


async def has_a_bug(row: dict[str, Any], judge: Any) -> dict[str, Any]:
    if row["id"] == "b" and not Path(row["fixed"]).exists():
        raise KeyError("missing")
    return {"id": row["id"]}


def test_an_unexpected_exception_loses_no_row(tmp_path: Path) -> None:
    """It is a bug, not the row's fault: the run stops, and the next attempt asks the row again."""
    rows = [{"id": name, "fixed": str(tmp_path / "fixed")} for name in "abc"]
    with pytest.raises(Permanent, match="1 row was not answered .row 'b': KeyError: 'missing'"):
        run_rows(work_in(tmp_path / "artifact"), rows, has_a_bug, [RULES])
    (tmp_path / "fixed").touch()
    second = work_in(tmp_path / "artifact")
    results = run_rows(second, rows, has_a_bug, [RULES])
    assert [r["id"] for r in results] == ["a", "b", "c"]
    assert second.counts["failed/rows"] == 0


async def refuses(row: dict[str, Any], judge: Any) -> dict[str, Any]:
    raise RowError(f"row {row['id']} is no good")


def test_every_row_failing_stops_the_stage_with_the_first_reason(tmp_path: Path) -> None:
    rows = [{"id": "a"}, {"id": "b"}]
    work = work_in(tmp_path)
    with pytest.raises(Permanent, match="every row failed; the first: row [ab] is no good"):
        run_rows(work, rows, refuses, [RULES])
    assert work.counts["failed/rows"] == 2
