"""Tests what engines send to an endpoint and read from it, with a local server."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web
from fake_endpoint import completion

from zephyr_ray.engines.model import Model
from zephyr_ray.engines.openai import OpenAIEngine, OpenAISettings
from zephyr_ray.engines.service import ServiceSettings
from zephyr_ray.messages import user
from zephyr_ray.models.contract import Reply, Sampling

Requests = list[tuple[dict[str, str], dict[str, Any]]]


def exchange(
    route: str, reply: dict[str, Any], call: Callable[[str], Awaitable[Any]]
) -> tuple[Any, Requests]:
    """Starts a server that answers every request with `reply`, and passes its base URL to `call`.
    Returns the result of `call`, and the headers and bodies sent."""
    sent: Requests = []

    async def answer(request: web.Request) -> web.Response:
        sent.append((dict(request.headers), json.loads(await request.text())))
        return web.json_response(reply)

    async def main() -> Any:
        application = web.Application()
        application.router.add_post(f"/v1{route}", answer)
        runner = web.AppRunner(application, shutdown_timeout=0)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        try:
            return await call(f"http://127.0.0.1:{runner.addresses[0][1]}/v1")
        finally:
            await runner.cleanup()

    return asyncio.run(main()), sent


def ask(
    reply: dict[str, Any], sampling: Sampling | None = None, **settings: Any
) -> tuple[Reply, Requests]:
    """Returns how the `openai` engine reads a server's `reply`, and the requests it sent."""

    async def call(address: str) -> Reply:
        engine = OpenAIEngine(OpenAISettings(model="peer", base_url=address, **settings))
        return await engine.answer([user("Hello")], sampling or Sampling(0.7, 0.95, 8))

    return exchange("/chat/completions", reply, call)


@pytest.mark.parametrize("sampling", [Sampling(0.2, 0.5, 9), Sampling(0, 1, 512)])
def test_the_request_has_the_sampling_settings(sampling: Sampling) -> None:
    _, [(_, body)] = ask(completion(), sampling)
    assert body == {
        "model": "peer",
        "messages": [{"role": "user", "content": "Hello"}],
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_tokens": sampling.max_tokens,
    }


def test_texts_of_files_that_utf8_cannot_encode_are_sent() -> None:
    example = {
        "constraint": {"kind": "json"},
        "prompt": "A cat\ud83d",
        "answer": "\ude00 \U0001f600",
    }

    async def call(address: str) -> Reply:
        model = Model("m", OpenAISettings(model="peer", base_url=address), [example])
        ask = model.settings.start(seed=0).ask_for(model, {"id": "r", **example})
        return await ask([user("A dog\ud83d")], max_tokens=8)

    reply, [(_, body)] = exchange("/chat/completions", completion(), call)
    assert reply.text == "Good day."
    assert [m["content"] for m in body["messages"]] == ["A cat?", "? \U0001f600", "A dog?"]


def test_parameters_override_sampling_settings() -> None:
    parameters = {"temperature": None, "reasoning_effort": "low"}
    _, [(_, body)] = ask(completion(), Sampling(0.2, 0.5, 9), parameters=parameters)
    assert (body["temperature"], body["top_p"], body["reasoning_effort"]) == (None, 0.5, "low")


@pytest.mark.parametrize("name", ["model", "messages", "stream", "n"])
def test_parameters_cannot_replace_what_the_engine_sets(name: str) -> None:
    with pytest.raises(ValueError, match=f"must not contain {name}"):
        OpenAISettings(model="m", base_url="http://a/v1", parameters={name: 2})


def test_the_key_comes_from_its_variable_without_white_space(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ZEPHYR_TEST_KEY", " sk-test-1\n")
    _, [(headers, _)] = ask(completion(), api_key_env="ZEPHYR_TEST_KEY")
    assert headers["Authorization"] == "Bearer sk-test-1"


def test_a_served_judge_gets_both_answers_in_their_order() -> None:
    asked = {"prompt": "Name a fish. Answer in JSON.", "instruction": "Name a fish."}
    row = {**asked, "constraint": {"kind": "json"}}
    first = {"text": "Cod.", "finish_reason": "stop"}
    second = {"text": "An eel or", "finish_reason": "length"}

    async def call(address: str) -> Any:
        judge = ServiceSettings(base_url=address).start(seed=0)
        return await judge.judge("pairwise", {"id": "r", **row}, [first, second])

    judgement = {"verdict": 1.0, "reason": "", "scores": None}
    read, [(_, body)] = exchange("/judge/pairwise", {"results": [judgement]}, call)
    assert body == {"requests": [{**row, "first": first, "second": second}]}
    assert read == judgement
