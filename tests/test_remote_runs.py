"""Tests complete runs against an endpoint that fails: what is kept, printed and sent again."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_endpoint import GOOD, NO_CREDITS, Answer, Endpoint, endpoint, error

from zephyr_ray import pipeline

pytestmark = pytest.mark.usefixtures("ray_cluster")

RECIPE = """
name: remote
models:
  m: {{engine: openai, model: peer, base_url: "{url}", concurrency: {concurrency}}}
stages:
  prompts: {{kind: prompts, seeds: seeds.jsonl, constrained: 0}}
  answers: {{kind: completions, models: [m], prompts: prompts, max_tokens: 24}}
"""
FILTERED = error(400, "flagged", code="content_filter")
Reply = Callable[[int, dict[str, Any]], Answer]


class Runs:
    """Runs of one recipe against one endpoint."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture, rows: int):
        self._folder, self._capsys = folder, capsys
        tasks = [{"instruction": f"Name thing number {n}."} for n in range(rows)]
        (folder / "seeds.jsonl").write_text("".join(json.dumps(t) + "\n" for t in tasks))

    def run(self, server: Endpoint, reply: Reply, *overrides: str, concurrency: int = 4) -> int:
        """Returns the exit code; `server.bodies` are then the requests of this run."""
        server.reply = reply
        server.bodies.clear()
        path = self._folder / "recipe.yaml"
        path.write_text(RECIPE.format(url=server.url, concurrency=concurrency))
        sets = (f"storage={self._folder / 'runs'}", *overrides)
        code = pipeline.main([str(path), *(part for s in sets for part in ("--set", s))])
        self.printed = self._capsys.readouterr().err
        return code

    @property
    def error(self) -> str:
        [line] = [li for li in self.printed.splitlines() if li.startswith("error: ")]
        return line

    def manifest(self) -> dict[str, Any] | None:
        paths = list(self._folder.glob("runs/store/completions-*/manifest.json"))
        return json.loads(paths[0].read_text()) if paths else None

    def answered(self) -> set[str]:
        path = self._folder / "runs/remote/data/answers/rows.jsonl"
        return {json.loads(line)["prompt"] for line in path.read_text().splitlines()}


def prompts(server: Endpoint) -> list[str]:
    return [body["messages"][0]["content"] for body in server.bodies]


def good(number: int, body: dict[str, Any]) -> Answer:
    return GOOD


def test_after_credits_ran_out_only_the_missing_rows_are_sent(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    runs = Runs(tmp_path, capsys, rows=12)
    with endpoint(good) as server:
        code = runs.run(server, lambda number, body: GOOD if number < 5 else NO_CREDITS)
        assert code == 2 and runs.manifest() is None
        assert "status 402: Insufficient credits; add credits, then run again" in runs.error
        assert "(5 finished rows are kept)" in runs.error
        # After the first refusal, only requests already in flight are sent.
        assert len(server.bodies) <= 5 + 4
        paid = set(prompts(server)[:5])
        assert runs.run(server, good) == 0
        assert len(server.bodies) == 7 and paid.isdisjoint(prompts(server))
    assert len(runs.answered()) == 12
    assert runs.manifest()["counts"]["failed/rows"] == 0


def test_an_endpoint_that_refuses_everything_gets_three_requests(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    runs = Runs(tmp_path, capsys, rows=60)
    with endpoint(good) as server:
        code = runs.run(server, lambda number, body: error(400, "tools are down"), concurrency=1)
        assert code == 2 and runs.manifest() is None
        assert "3 rows in succession were not answered; the last: model 'peer'" in runs.error
        assert "status 400: tools are down" in runs.error and len(server.bodies) == 3


def test_too_many_failed_rows_stop_a_run_and_a_higher_limit_continues_it(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    runs = Runs(tmp_path, capsys, rows=20)

    def reply(number: int, body: dict[str, Any]) -> Answer:
        return FILTERED if body["messages"][0]["content"].endswith("7.") else GOOD

    with endpoint(good) as server:
        assert runs.run(server, reply) == 2 and runs.manifest() is None
        assert "2 of 20 rows failed (10%: content filter 2), max_failed allows 1; " in runs.error
        assert "status 400: flagged; raise answers.max_failed to go on" in runs.error
        sent = prompts(server)
        assert runs.run(server, reply, "answers.max_failed=0.1") == 0
        # No row is sent twice, not even one that failed.
        assert len({*sent, *prompts(server)}) == len([*sent, *prompts(server)]) == 20
        assert "done 18 rows · 2 failed (content filter 2) · " in runs.printed
        counts = runs.manifest()["counts"]
        assert (counts["failed/rows"], counts["failed/content filter"]) == (2, 2)
        assert runs.run(server, reply) == 0 and server.bodies == []  # cached: the key is the same


def test_the_setting_in_the_error_line_gives_up_an_unanswered_row(
    tmp_path: Path, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    """The driver also logs the warnings of actors, here one about a parameter."""
    runs = Runs(tmp_path, capsys, rows=6)

    def reply(number: int, body: dict[str, Any]) -> Answer:
        if "max_tokens" in body:
            return error(
                400, "Unsupported parameter: use max_completion_tokens", param="max_tokens"
            )
        odd = body["messages"][0]["content"].endswith("3.")
        return error(400, "Something odd with this prompt") if odd else GOOD

    with endpoint(good) as server:
        assert runs.run(server, reply) == 2 and runs.manifest() is None
        notices = [r.getMessage() for r in caplog.records if r.name == "zephyr_ray.rows"]
        assert notices == [
            f"answers: model 'peer' at {server.url} does not support max_tokens; sending "
            "max_completion_tokens instead"
        ]
        assert "1 row was not answered (row 'p0000" in runs.error
        [setting] = shlex.split(runs.error.partition("--set ")[2])
        assert runs.run(server, reply, setting) == 0 and server.bodies == []
        assert "done 5 rows · 1 failed (given up 1) · " in runs.printed
