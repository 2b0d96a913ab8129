"""Tests retries, waits and parameter changes at an endpoint, and the checks before a run."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from fake_endpoint import (
    GOOD,
    HTML,
    NO_CREDITS,
    Answer,
    Endpoint,
    closed_port,
    completion,
    endpoint,
    error,
)
from simulated import simulate

from zephyr_ray.engines import endpoint as endpoints
from zephyr_ray.engines.endpoint import RETRIES
from zephyr_ray.engines.http_client import HttpReply
from zephyr_ray.engines.openai import OpenAIEngine, OpenAISettings
from zephyr_ray.engines.replies import Rejected
from zephyr_ray.engines.service import ServedJudge, ServiceSettings
from zephyr_ray.errors import Permanent, RowError, Temporary
from zephyr_ray.judges import FORMS
from zephyr_ray.messages import user
from zephyr_ray.models.contract import REQUESTS, STOPPING, Reply, Sampling, StopRun
from zephyr_ray.serve.requests import judge_request, parse
from zephyr_ray.settings import typed

PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoints, "FIRST_DELAY", 0.01)
    monkeypatch.setattr(endpoints, "LONGEST_DELAY", 0.02)
    # A late reply to the check before a run would count as a good one.
    monkeypatch.setattr(endpoints, "PREFLIGHT_SECONDS", 60)
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


def ask(server: Endpoint, times: int = 1, **settings: Any) -> list[Reply]:
    """Asks one engine several questions at once."""

    async def main() -> list[Reply]:
        engine = OpenAIEngine(OpenAISettings(model="peer", base_url=server.url, **settings))
        sampling = Sampling(0.7, 0.9, 8)
        answers = (engine.answer([user("Hello")], sampling) for _ in range(times))
        return await asyncio.gather(*answers)

    return asyncio.run(main())


def in_turn(*replies: Answer) -> Callable[[int, Any], Answer]:
    """Returns a handler that gives the replies in turn, then repeats the last one."""
    return lambda number, body: replies[min(number, len(replies) - 1)]


BREAKS_OFF = Answer(200, completion(), {"Content-Length": "9999"})


@pytest.mark.parametrize(
    "first",
    [
        error(500),
        error(408),
        error(409),
        error(425),
        HTML,
        BREAKS_OFF,
        Answer(200, completion(None)),
    ],
)
def test_the_same_question_is_asked_again(first: Answer) -> None:
    with endpoint(in_turn(first, GOOD)) as server:
        assert ask(server) == [Reply("Good day.", "stop", 5, 3)]
    assert len(server.bodies) == 2 and server.bodies[0] == server.bodies[1]


def test_a_server_that_stays_broken_leaves_the_row_to_the_next_run() -> None:
    with (
        endpoint(in_turn(Answer(524, "<html>timeout</html>"))) as server,
        pytest.raises(Temporary, match="model 'peer' at http://127.0.0.1.*status 524"),
    ):
        ask(server)
    assert len(server.bodies) == 1 + RETRIES


def test_a_rate_limit_is_waited_out_as_long_as_it_says() -> None:
    limit = Answer(429, "", {"Retry-After": "0.5"})
    start = time.monotonic()
    with endpoint(in_turn(limit, GOOD)) as server:
        assert ask(server)[0].text == "Good day."
    assert 0.5 <= time.monotonic() - start < 30


def test_a_rate_limit_may_outlast_the_retries() -> None:
    limits = [Answer(429, "")] * (RETRIES + 3)
    with endpoint(in_turn(*limits, GOOD)) as server:
        assert ask(server)[0].text == "Good day."


def test_no_request_is_sent_or_retried_once_the_stage_stops() -> None:
    """The stage stops while the first request waits a minute for its next try."""

    async def main(server: Endpoint) -> None:
        stopping, loop = asyncio.Event(), asyncio.get_running_loop()
        STOPPING.set(stopping)

        def reply(number: int, body: dict[str, Any]) -> Answer:
            loop.call_soon_threadsafe(loop.call_later, 0.2, stopping.set)
            return Answer(429, "", {"Retry-After": "60"})

        server.reply = reply
        engine = OpenAIEngine(OpenAISettings(model="peer", base_url=server.url))
        for reason in ("status 429", "the stage stopped before the request was sent"):
            with pytest.raises(Temporary, match=reason):
                async with asyncio.timeout(30):
                    await engine.answer([user("Hello")], Sampling(0.7, 0.9, 8))

    with endpoint(in_turn(GOOD)) as server:
        asyncio.run(main(server))
    assert len(server.bodies) == 1


def test_waiting_requests_are_sent_before_rows_with_a_reply_continue() -> None:
    """Both slots become free at once; replies are read, and so stored, before new requests."""
    events: list[str] = []

    class Client:
        async def send(self, method: str, path: str, json: Any) -> HttpReply:
            events.append("sent")
            if len(events) == 2:
                replied.set()
            await replied.wait()
            return HttpReply(200, {}, '{"read": true}')

    async def main() -> None:
        REQUESTS.set(asyncio.Semaphore(2))
        target = endpoints.Endpoint(OpenAISettings(model="p", base_url="http://127.0.0.1:1"), "m")
        target._client = Client()  # type: ignore[assignment]

        async def row() -> None:
            await target.post("/", {}, lambda *_: events.append("read"))
            events.append("continued")

        await asyncio.gather(*(row() for _ in range(4)))

    replied = asyncio.Event()
    asyncio.run(main())
    assert events[:3] == ["sent", "sent", "read"]
    assert events.index("continued") == 8 and events.count("sent") == events.count("read") == 4


def test_retries_are_announced_at_intervals(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main(server: Endpoint) -> None:
        engine = OpenAIEngine(OpenAISettings(model="peer", base_url=server.url))
        for _ in range(3):
            await engine.answer([user("Hello")], Sampling(0.7, 0.9, 8))

    def lines() -> list[str]:
        return [r.getMessage() for r in caplog.records if r.name == "zephyr_ray"]

    with endpoint(in_turn(*[error(503), GOOD] * 3)) as server:
        asyncio.run(main(server))
    assert len(server.bodies) == 6
    [line] = lines()
    assert "status 503" in line and line.endswith("; retrying")
    caplog.clear()
    monkeypatch.setattr(endpoints, "NOTICE_SECONDS", 0)
    with endpoint(in_turn(error(503), error(503), GOOD)) as server:
        ask(server)
    assert len(lines()) == 2


def post_simulated(
    monkeypatch: pytest.MonkeyPatch, reply: Callable[[float], HttpReply], times: int = 1
) -> None:
    """Posts requests at once on a simulated clock; `reply` gets the time of each try."""

    class Client:
        async def send(self, *_: Any, **__: Any) -> HttpReply:
            return reply(asyncio.get_running_loop().time())

    async def main() -> None:
        clock = SimpleNamespace(monotonic=asyncio.get_running_loop().time)
        monkeypatch.setattr(endpoints, "time", clock)
        target = endpoints.Endpoint(OpenAISettings(model="p", base_url="http://a/v1"), "m")
        target._client = Client()  # type: ignore[assignment]
        await asyncio.sleep(1)  # the clock of a machine does not show 0
        await asyncio.gather(*(target.post("/", {}, lambda *_: None) for _ in range(times)))

    simulate(main())


@pytest.mark.parametrize("delay", ["0", "0.1", "3600"])
def test_the_wait_for_an_endpoint_that_answers_nothing_is_bounded(
    delay: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoints, "WAIT_SECONDS", 10)
    tries: list[float] = []

    def reply(now: float) -> HttpReply:
        assert now < 100
        tries.append(now)
        return HttpReply(429, {"retry-after": delay}, "")

    with pytest.raises(Temporary, match="status 429"):
        post_simulated(monkeypatch, reply)
    assert len(tries) == 1 if delay == "3600" else 9.8 < tries[-1] - tries[0] <= 10


def test_a_row_waits_while_others_are_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit of one answer per 0.4 s is no reason to give up after 2.5 s."""
    monkeypatch.setattr(endpoints, "WAIT_SECONDS", 2.5)
    answers = [0.0]

    def reply(now: float) -> HttpReply:
        if now - answers[-1] < 0.4:
            return HttpReply(429, {}, "")
        answers.append(now)
        return HttpReply(200, {}, "{}")

    post_simulated(monkeypatch, reply, times=8)
    assert len(answers) == 1 + 8 and answers[-1] - answers[1] > 2.5


def test_a_redirect_is_not_followed() -> None:
    with (
        endpoint(in_turn(Answer(307, "", {"Location": "/v1/chat/completions"}))) as server,
        pytest.raises(StopRun, match="redirects to"),
    ):
        ask(server)
    assert len(server.bodies) == 1


@pytest.mark.parametrize(
    "reply", [NO_CREDITS, error(429, code="insufficient_quota"), error(401), error(404)]
)
def test_a_fault_that_fails_every_row_is_not_retried(reply: Answer) -> None:
    with endpoint(in_turn(reply)) as server, pytest.raises(StopRun, match="model 'peer' at http"):
        ask(server)
    assert len(server.bodies) == 1


# --- parameters ----------------------------------------------------------------------------------

NO_MAX_TOKENS = error(
    400,
    "Unsupported parameter: 'max_tokens' is not supported with this model. Use "
    "'max_completion_tokens' instead.",
    param="max_tokens",
    code="unsupported_parameter",
)
NOT_BOTH = error(400, "`temperature` and `top_p` cannot both be specified for this model.")
NO_TEMPERATURE = error(
    400,
    "'temperature' does not support 0.7 with this model. Only the default (1) value is supported.",
    param="temperature",
    code="unsupported_value",
)
EXTRA = Answer(
    422, {"detail": [{"type": "extra_forbidden", "loc": ["body", "top_p"], "msg": "Not permitted"}]}
)


REMOVED = error(400, "max_tokens has been removed, please use max_completion_tokens")
REQUIRED = error(400, "This model requires max_completion_tokens")


def refuse_if(condition: Callable[[dict[str, Any]], bool], refusal: Answer) -> Any:
    return lambda number, body: refusal if condition(body) else GOOD


@pytest.mark.parametrize(
    ("condition", "refusal", "left"),
    [
        (
            lambda body: "max_tokens" in body,
            NO_MAX_TOKENS,
            {"max_completion_tokens": 8, "temperature": 0.7, "top_p": 0.9},
        ),
        (
            lambda body: {"temperature", "top_p"} <= body.keys(),
            NOT_BOTH,
            {"max_tokens": 8, "temperature": 0.7},
        ),
        *(
            (
                lambda body: "max_tokens" in body,
                refusal,
                {"max_completion_tokens": 8, "temperature": 0.7, "top_p": 0.9},
            )
            for refusal in (REMOVED, REQUIRED)
        ),
        (lambda body: "temperature" in body, NO_TEMPERATURE, {"max_tokens": 8, "top_p": 0.9}),
        (lambda body: "top_p" in body, EXTRA, {"max_tokens": 8, "temperature": 0.7}),
        (
            lambda body: "temperature" in body,
            error(400, "`temperature` is deprecated for this model."),
            {"max_tokens": 8, "top_p": 0.9},
        ),
    ],
)
def test_a_parameter_is_adapted_once_for_all_rows(
    condition: Any, refusal: Answer, left: dict[str, Any]
) -> None:
    with endpoint(refuse_if(condition, refusal)) as server:

        async def main() -> None:
            engine = OpenAIEngine(OpenAISettings(model="peer", base_url=server.url))
            sampling = Sampling(0.7, 0.9, 8)
            # Three rows in flight are refused for the same reason; later ones are not.
            await asyncio.gather(*(engine.answer([user("Hello")], sampling) for _ in range(3)))
            await engine.answer([user("Hello")], sampling)

        asyncio.run(main())
    asked = {"model": "peer", "messages": [{"role": "user", "content": "Hello"}]}
    assert server.bodies[-1] == asked | left
    refused = [body for body in server.bodies if condition(body)]
    assert 1 <= len(refused) <= 3 and len(server.bodies) == 4 + len(refused)


def test_two_parameters_are_adapted() -> None:
    def reply(number: int, body: dict[str, Any]) -> Answer:
        return (
            NO_MAX_TOKENS
            if "max_tokens" in body
            else NO_TEMPERATURE
            if "temperature" in body
            else GOOD
        )

    with endpoint(reply) as server:
        ask(server)
    assert server.bodies[-1].keys() == {"model", "messages", "max_completion_tokens", "top_p"}


@pytest.mark.parametrize(
    ("refusal", "settings", "requests"),
    [
        (error(400, "max_tokens and max_completion_tokens are unknown"), {}, 2),
        (error(400, "Unknown parameter: 'effort'"), {"parameters": {"effort": 1}}, 1),
        (NO_TEMPERATURE, {"parameters": {"temperature": 0.7}}, 1),
    ],
    ids=["the adapted one", "one of the recipe", "one that the recipe sets"],
)
def test_a_parameter_that_cannot_be_adapted_stops_the_run(
    refusal: Answer, settings: dict[str, Any], requests: int
) -> None:
    with endpoint(in_turn(refusal)) as server:
        words = refusal.body["error"]["message"][:20]
        with pytest.raises(StopRun, match=f"{words}.*correct the model's parameters"):
            ask(server, **settings)
    assert len(server.bodies) == requests


@pytest.mark.parametrize("text", ["What\ntemperature is it?", "Explain max_completion_tokens."])
def test_a_parameter_that_the_row_mentions_is_kept(text: str) -> None:
    refusal = error(400, f"Unsupported character in message '{text}'")

    def reply(number: int, body: dict[str, Any]) -> Answer:
        return refusal if text in body["messages"][0]["content"] else GOOD

    with endpoint(reply) as server:

        async def main() -> None:
            engine = OpenAIEngine(OpenAISettings(model="peer", base_url=server.url))
            with pytest.raises(Rejected, match="Unsupported character"):
                await engine.answer([user(text)], Sampling(0.7, 0.9, 8))
            await engine.answer([user("Hello")], Sampling(0.7, 0.9, 8))

        asyncio.run(main())
    sent = [(body["temperature"], body["max_tokens"]) for body in server.bodies]
    assert sent == [(0.7, 8), (0.7, 8)]


def test_a_parameter_whose_value_is_out_of_range_is_not_dropped() -> None:
    refusal = error(400, "temperature: expected a value <= 0.5", param="temperature")
    with endpoint(in_turn(refusal)) as server, pytest.raises(Temporary, match="expected a value"):
        ask(server)
    assert len(server.bodies) == 1


# --- the judge of a service ----------------------------------------------------------------------


def judge(reply: Answer) -> Any:
    async def main(url: str) -> Any:
        answer = {"text": "Cod.", "finish_reason": "stop"}
        served = ServedJudge(ServiceSettings(base_url=url))
        return await served.judge("score", {"prompt": "Name a fish."}, [answer])

    with endpoint(in_turn(reply)) as server:
        return asyncio.run(main(server.url))


@pytest.mark.parametrize(
    ("reply", "raised"),
    [
        (error(422, "the judge: too long", code="judge_refused"), RowError),
        (error(422, "text: too long", code="string_too_long"), RowError),
        (error(422, "constraint: unknown", code="invalid_value"), Temporary),
        (error(503, "the judge: no credits", code="judge_busy"), Temporary),
        (error(404, "no judge", code="no_judge"), StopRun),
        (Answer(200, {"results": []}), Temporary),
        (Answer(200, {"results": None}), Temporary),
        (Answer(200, {}), Temporary),
    ],
)
def test_a_judge_that_does_not_judge(reply: Answer, raised: type[Exception]) -> None:
    with pytest.raises(raised):
        judge(reply)


def test_a_served_judge_gets_the_answers_that_it_judges_together() -> None:
    row = {"id": "p1/aspects", "order_seed": "p1", "prompt": "Name a fish."}
    answers = [{"text": text, "finish_reason": "stop", "model": "m"} for text in ("Cod.", "Eel.")]

    async def main(url: str) -> Any:
        served = ServedJudge(ServiceSettings(base_url=url))
        return await served.judge("aspects", row, answers)

    with endpoint(in_turn(Answer(200, {"results": [{"aspects": []}]}))) as server:
        assert asyncio.run(main(server.url)) == {"aspects": []}
    body = json.dumps(server.bodies[0]).encode()
    [judged] = parse(judge_request(FORMS["aspects"].fields), body).requests
    assert judged.row()["order_seed"] == "p1"
    assert [answer["text"] for answer in judged.answers()] == ["Cod.", "Eel."]


# --- before a run --------------------------------------------------------------------------------


def preflight(url: str, **settings: Any) -> None:
    OpenAISettings(model="m", base_url=url, **settings).preflight()


@pytest.fixture
def server() -> Iterator[Endpoint]:
    with endpoint(in_turn(GOOD)) as running:
        yield running


@pytest.mark.parametrize(
    "models",
    [
        Answer(200, {"data": []}),
        Answer(404, ""),
        error(403),
        error(500),
        Answer(307, "", {"Location": "/v1/models/"}),
        Answer(404, "<!doctype html><title>Not found</title>"),
    ],
)
def test_any_other_reply_shows_a_reachable_endpoint(models: Answer, server: Endpoint) -> None:
    server.models = models
    preflight(server.url)
    assert server.bodies == []


@pytest.mark.parametrize(
    ("models", "says"),
    [
        (HTML, "answers with a web page, not JSON; set base_url to the API itself"),
        (
            Answer(302, "", {"Location": "https://login.example/?next=secret"}),
            "redirects to https://login.example/; set base_url to the API itself",
        ),
        (Answer(302, "", {"Location": "/"}), "redirects to "),
    ],
)
def test_an_address_that_is_not_an_api_is_found_before_the_run(
    models: Answer, says: str, server: Endpoint
) -> None:
    server.models = models
    with pytest.raises(Permanent, match=says) as raised:
        preflight(server.url)
    assert "secret" not in str(raised.value)


def test_a_wrong_key_is_found_before_the_run(
    server: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.models = error(401, "Incorrect API key provided")
    with pytest.raises(Permanent, match="Incorrect API key provided; set api_key_env"):
        preflight(server.url)
    monkeypatch.setenv("ZEPHYR_TEST_KEY", "sk-test-1")
    with pytest.raises(
        Permanent, match="Incorrect.*; correct the key in ZEPHYR_TEST_KEY"
    ) as raised:
        preflight(server.url, api_key_env="ZEPHYR_TEST_KEY")
    assert "sk-test-1" not in str(raised.value)


@pytest.mark.parametrize(
    ("models", "says"),
    [(NO_CREDITS, "Insufficient credits; add"), (Answer(407, ""), "password of the proxy")],
)
def test_a_fault_that_fails_every_row_is_found_before_the_run(
    models: Answer, says: str, server: Endpoint
) -> None:
    server.models = models
    with pytest.raises(Permanent, match=says):
        preflight(server.url)


@pytest.fixture
def port() -> Iterator[int]:
    with closed_port() as closed:
        yield closed


@pytest.fixture
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zephyr_ray.engines.connection.PAUSES", ())


@pytest.mark.usefixtures("no_pause")
def test_a_dead_endpoint_is_one_line(port: int) -> None:
    with pytest.raises(Permanent, match="cannot connect to .*refused.*; start the server"):
        preflight(f"http://127.0.0.1:{port}/v1")
    with pytest.raises(Permanent, match="cannot connect to http://no-such-host.invalid/v1"):
        preflight("http://no-such-host.invalid/v1")
    with pytest.raises(Permanent, match="base_url is not a URL"):
        preflight("http://host:port/v1")
    with pytest.raises(Permanent, match="base_url is not a URL"):
        preflight("http://a..b/v1")


@pytest.mark.usefixtures("no_pause")
@pytest.mark.parametrize("sent", [b"", b"SSH-2.0-OpenSSH_9.2\r\n", b"\x15\x03\x01\x00\x02\x02F"])
def test_a_server_that_does_not_speak_http_is_one_line(sent: bytes) -> None:
    def serve() -> None:
        connection = listener.accept()[0]
        with connection:
            connection.recv(9999)
            connection.sendall(sent)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, daemon=True).start()
        with pytest.raises(Permanent, match="cannot connect to .*; start the server or correct"):
            preflight(f"http://127.0.0.1:{listener.getsockname()[1]}/v1")


def test_a_server_that_is_still_starting_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zephyr_ray.engines.connection.PAUSES", (0, 0))
    import httpx2
    import openai

    outcomes = iter([httpx2.ConnectError("no"), None])

    def get(*_: Any, **__: Any) -> httpx2.Response:
        if cause := next(outcomes):
            request = httpx2.Request("GET", "http://a")
            raise openai.APIConnectionError(request=request) from cause
        return httpx2.Response(200)

    monkeypatch.setattr(openai.OpenAI, "get", get)
    preflight("http://a/v1")


@pytest.mark.usefixtures("no_pause")
def test_a_dead_proxy_is_named_without_its_password(
    server: Endpoint, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", f"http://me:hunter2@127.0.0.1:{port}")
    with pytest.raises(
        Permanent, match="through the proxy of HTTP_PROXY .*; correct HTTP_PROXY"
    ) as e:
        preflight(server.url)
    assert "hunter2" not in str(e.value)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    preflight(server.url)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("socks5://me:hunter2@127.0.0.1:9", "not the URL of an http or https proxy"),
        ("htp://me:hunter2@127.0.0.1:9", "not the URL of"),
        ("http://me:hunt/er2@127.0.0.1:9", "not the URL of"),
        ("http://me:hunter2@127.0.0.1:9\n", "not the URL of"),
        ("http://", "not the URL of"),
    ],
)
@pytest.mark.parametrize("variable", ["ALL_PROXY", "HTTPS_PROXY", "http_proxy"])
def test_a_proxy_variable_that_cannot_work_is_one_line(
    value: str, says: str, variable: str, server: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    scheme = "https" if variable == "HTTPS_PROXY" else "http"
    with pytest.raises(Permanent, match=f"{variable.upper()} .*{says}") as raised:
        preflight(f"{scheme}://other.example/v1")
    assert "hunt" not in str(raised.value) and "\n" not in str(raised.value)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    preflight(server.url)


def test_a_proxy_without_a_scheme_is_used(
    port: int, server: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", server.url.removeprefix("http://").removesuffix("/v1"))
    preflight(f"http://127.0.0.1:{port}/v1")


@pytest.mark.parametrize("key", ["sk-1\nsk-2", "sk-1\r\n\tx", "sk-ä", "Bearer sk-1", "sk\x00-1"])
def test_an_invalid_key_is_refused_without_being_shown(
    key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = OpenAISettings(model="m", base_url="http://a/v1", api_key_env="ZEPHYR_TEST_KEY")
    monkeypatch.setattr("os.environ", {"ZEPHYR_TEST_KEY": key})
    with pytest.raises(Permanent, match="ZEPHYR_TEST_KEY .*export the key alone") as raised:
        settings.preflight()
    assert "sk" not in str(raised.value)
    monkeypatch.setattr("os.environ", {"ZEPHYR_TEST_KEY": " \n"})
    with pytest.raises(Permanent, match="ZEPHYR_TEST_KEY .*is not set"):
        settings.preflight()


@pytest.mark.parametrize(
    "value",
    [
        "sk-proj-1",
        "sk_live_1",
        "hf_abcdEFG",
        "3f9c1d7e5b",
        "AIzaSyD-9",
        "gsk_1",
        "AKIAIOSFODNN7EXAMPLE",
        "SK_LIVE_4EC39HQLYJWDARJT",
        "a b",
        "",
        ["sk-1"],
    ],
)
def test_a_key_in_place_of_its_name_is_never_shown(value: Any) -> None:
    raw = {"engine": "openai", "model": "m", "base_url": "http://a/v1", "api_key_env": value}
    with pytest.raises(Permanent, match="setting 'api_key_env': not the name of") as raised:
        typed(OpenAISettings, raw, "model 'm'")
    assert not value or str(value) not in str(raised.value)
