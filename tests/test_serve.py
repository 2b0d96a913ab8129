"""Tests `zephyr serve` over HTTP, with a real service of a tiny model."""

import asyncio
import concurrent.futures
import contextlib
import glob
import inspect
import itertools
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import KEY, OTHER, Service

from zephyr_ray.engines.rules import RulesJudge, RulesSettings
from zephyr_ray.engines.service import ServedJudge, ServiceSettings
from zephyr_ray.serve import app
from zephyr_ray.serve.request_error import RequestError
from zephyr_ray.serve.requests import (
    MAX_JUDGED_ROWS,
    Body,
    ChatRequest,
    CompletionRequest,
    JudgedPrompt,
    VoteRequest,
    parse,
)
from zephyr_ray.serve.routing import MAX_BODY_BYTES

# --- OpenAI's client ------------------------------------------------------------------------------

QUESTION: list[Any] = [{"role": "user", "content": "def answer("}]
SIDE = {"model": "dpo", "text": "An owl."}


def test_models_are_listed_with_their_adapters(service: Service) -> None:
    assert [model.id for model in service.client.models.list()] == ["dpo", "slim"]
    assert service.client.models.retrieve("slim").id == "slim"


def test_an_answer_has_text_reason_and_usage(service: Service) -> None:
    reply = service.client.chat.completions.create(
        model="dpo", messages=QUESTION, max_tokens=12, temperature=0
    )
    [choice] = reply.choices
    assert choice.message.role == "assistant" and choice.message.content
    assert choice.finish_reason in ("stop", "length")
    assert reply.usage is not None and 1 <= reply.usage.completion_tokens <= 12


def test_the_template_is_applied_once(service: Service, tiny_model: Path) -> None:
    from transformers import AutoTokenizer

    from zephyr_ray.chat import ChatFormat

    reply = service.client.chat.completions.create(model="dpo", messages=QUESTION, max_tokens=1)
    prompt = ChatFormat.of(AutoTokenizer.from_pretrained(tiny_model)).prompt(QUESTION)
    assert reply.usage is not None and reply.usage.prompt_tokens == len(prompt)


def test_the_tokens_are_those_of_training(service: Service, tiny_model: Path) -> None:
    """If vLLM applied the template, line breaks would merge, and <|im_end|> would end the turn."""
    from transformers import AutoTokenizer

    from zephyr_ray.chat import ChatFormat

    messages: list[Any] = [
        *QUESTION,
        {"role": "assistant", "content": "\n\n\n  return<|im_end|>"},
        {"role": "user", "content": "<|im_start|>And\x00  \t?"},
    ]
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    prompt = ChatFormat.of(tokenizer).prompt(messages)
    templated = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    reply = service.client.chat.completions.create(model="dpo", messages=messages, max_tokens=1)
    assert reply.usage is not None
    assert reply.usage.prompt_tokens == len(prompt) != len(templated)


def test_an_answer_can_be_sent_back_as_history(service: Service) -> None:
    asked: dict[str, Any] = {"model": "dpo", "max_tokens": 8}
    first = service.client.chat.completions.create(messages=QUESTION, **asked)
    history = [*QUESTION, first.choices[0].message, {"role": "user", "content": "And?"}]
    second = service.client.chat.completions.create(messages=history, **asked)
    assert second.usage is not None and first.usage is not None
    assert second.usage.prompt_tokens > first.usage.total_tokens


def test_a_typed_control_token_does_not_end_the_turn(service: Service) -> None:
    def tokens(content: str) -> int:
        reply = service.client.chat.completions.create(
            model="dpo", messages=[{"role": "user", "content": content}], max_tokens=1
        )
        assert reply.usage is not None
        return reply.usage.prompt_tokens

    # As a control token, <|im_end|> would add only one token.
    assert tokens("a<|im_end|>") > tokens("a") + 3


def test_a_stream_has_the_same_text_and_ends_with_usage(service: Service) -> None:
    asked: dict[str, Any] = {
        "model": "dpo", "messages": QUESTION, "max_tokens": 24, "temperature": 0,
    }  # fmt: skip
    whole = service.client.chat.completions.create(**asked)
    stream = service.client.chat.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert len([c for c in chunks if c.choices and c.choices[0].delta.content]) > 1
    assert chunks[-1].usage == whole.usage


def test_n_seed_stop_and_logprobs(service: Service) -> None:
    def ask(seed: int) -> Any:
        return service.client.chat.completions.create(
            model="dpo",
            messages=QUESTION,
            max_tokens=16,
            n=2,
            seed=seed,
            logprobs=True,
            top_logprobs=3,
            temperature=1.0,
        )

    one, two, other = ask(1), ask(1), ask(2)
    texts = [[c.message.content for c in r.choices] for r in (one, two, other)]
    assert texts[0] == texts[1] != texts[2] and len(texts[0]) == 2
    tokens = one.choices[0].logprobs.content
    assert len(tokens) > 0 and all(t.logprob <= 0 and len(t.top_logprobs) == 3 for t in tokens)
    greedy = service.client.chat.completions.create(
        model="dpo", messages=QUESTION, max_tokens=30, temperature=0
    )
    text = greedy.choices[0].message.content or ""
    stop = text[5:8]
    stopped = service.client.chat.completions.create(
        model="dpo", messages=QUESTION, max_tokens=30, temperature=0, stop=[stop]
    )
    assert stopped.choices[0].message.content == text[: text.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"


def test_plain_completions(service: Service) -> None:
    reply = service.client.completions.create(
        model="dpo", prompt="import ", max_tokens=8, echo=True
    )
    assert reply.choices[0].text.startswith("import ")
    assert reply.usage is not None and reply.usage.completion_tokens <= 8


@pytest.mark.parametrize("prompt", [[70, 71, 72], [[70], [71, 72]], ["a", "b"]])
def test_a_completion_of_token_ids_or_of_several_prompts(prompt: Any, service: Service) -> None:
    reply = service.client.completions.create(model="dpo", prompt=prompt, max_tokens=2)
    assert len(reply.choices) == (1 if prompt[0] == 70 else 2)


def test_the_prompt_alone_is_echoed_with_its_logprobs(service: Service) -> None:
    reply = service.client.completions.create(
        model="dpo", prompt="import os", max_tokens=0, echo=True, logprobs=1
    )
    assert reply.choices[0].text == "import os"
    assert reply.choices[0].logprobs is not None and reply.choices[0].logprobs.tokens


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt": ""}, "non-empty"),
        ({"prompt": ["a", ""]}, "cannot be empty"),
        ({"prompt": [999_999]}, "token IDs must be below 1000"),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
    ],
)
def test_a_request_that_the_engine_refuses_gets_its_message(
    change: dict[str, Any], words: str, service: Service
) -> None:
    asked = {"model": "dpo", "prompt": "a", "max_tokens": 2, **change}
    for stream in (False, True):
        reply = service.post("/v1/completions", {**asked, "stream": stream})
        assert reply.status_code == 400, reply.text
        assert words in reply.json()["error"]["message"]


def test_several_greedy_answers_are_refused_with_the_reason(service: Service) -> None:
    asked = {"model": "dpo", "messages": QUESTION, "max_tokens": 8, "temperature": 0}
    assert service.post("/v1/chat/completions", {**asked, "n": 1}).status_code == 200
    reply = service.post("/v1/chat/completions", {**asked, "n": 3})
    assert reply.status_code == 400
    assert "all answers at temperature 0 are the same" in reply.json()["error"]["message"]


def test_a_token_id_outside_the_vocabulary_does_not_kill_the_engine(service: Service) -> None:
    """The tiny model has 1000 tokens; vLLM itself accepts the ID 1000, and then crashes."""
    for token, status in ((999, 200), (1000, 400), (1001, 400), (999, 200)):
        asked = {"model": "dpo", "prompt": [[1, token]], "max_tokens": 1}
        reply = service.post("/v1/completions", asked)
        assert reply.status_code == status, reply.text


def test_a_silent_assistant_in_the_history_is_accepted(service: Service) -> None:
    history = [*QUESTION, {"role": "assistant", "content": None}, *QUESTION]
    reply = service.client.chat.completions.create(model="dpo", messages=history, max_tokens=2)
    assert reply.usage is not None and reply.usage.completion_tokens >= 1


def test_an_adapter_answers_differently_from_its_base(service: Service) -> None:
    answers = [
        service.client.chat.completions.create(
            model=model, messages=QUESTION, max_tokens=24, temperature=0
        )
        .choices[0]
        .message.content
        for model in ("dpo", "slim")
    ]
    assert answers[0] != answers[1]


# --- keys, bounds, errors, log --------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/votes", "/judge/score", "/nowhere"])
@pytest.mark.parametrize("key", [None, "wrong", ""])
def test_a_request_without_a_valid_key_gets_401(
    path: str, key: str | None, service: Service
) -> None:
    reply = service.post(path, {}, key)
    assert reply.status_code == 401
    assert reply.json()["error"]["code"] == "invalid_api_key"
    assert reply.headers["www-authenticate"] == "Bearer"


def test_every_key_is_accepted(service: Service) -> None:
    for key in (KEY, OTHER):
        assert service.post("/nowhere", {}, key).status_code == 404


def test_page_and_health_need_no_key(service: Service) -> None:
    page = service.http.get(service.address)
    assert page.status_code == 200 and "<title>" in page.text
    nonce = page.headers["content-security-policy"].split("script-src 'nonce-")[1].split("'")[0]
    assert f'<script nonce="{nonce}"' in page.text and "{{nonce}}" not in page.text
    assert service.http.get(f"{service.address}/health").json()["models"] == ["dpo", "slim"]


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        ({"model": "gpt"}, 404, "model 'gpt' not found; use one of dpo, slim"),
        ({"max_tokens": 201}, 400, "max_tokens is 201, the limit is 200"),
        ({"temperature": 3}, 400, "temperature"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "robot", "content": "a"}]}, 400, "messages.0.role"),
        ({"tools": [{}]}, 400, "tools: not supported here"),
        ({"x-new": 1}, 400, "x-new: not supported here"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            400,
            "messages.0.content",
        ),
        ({"messages": [{"role": "user", "content": 1}]}, 400, "content: must be text, or parts of"),
        ({"n": 9}, 400, "n: "),
        ({"messages": [{"role": "user", "content": "long " * 300}]}, 400, "context length"),
        ({"stream_options": {"include_usage": True}}, 400, "stream"),
        # The engine refuses this, and the error quotes its message.
        ({"top_logprobs": 2}, 400, "`logprobs` must be set to true."),
    ],
)
def test_an_invalid_request_names_the_error(
    change: dict[str, Any], status: int, message: str, service: Service
) -> None:
    reply = service.post("/v1/chat/completions", {"model": "dpo", "messages": QUESTION, **change})
    assert reply.status_code == status, reply.text
    assert message in reply.json()["error"]["message"]


def test_a_wrong_path_or_method_is_named(service: Service) -> None:
    reply = service.post("/chat/completions", {})
    assert reply.status_code == 404
    assert "use /v1/chat/completions" in reply.json()["error"]["message"]
    reply = service.http.get(
        f"{service.address}/v1/votes", headers={"Authorization": f"Bearer {KEY}"}
    )
    assert reply.status_code == 405
    assert reply.json()["error"]["message"] == "/v1/votes does not accept GET"


def test_a_request_leaves_one_line_without_its_prompt(service: Service) -> None:
    pattern = re.search(r"^logs +(\S+)$", service.log.read_text(), re.MULTILINE)
    assert pattern
    body = {"model": "dpo", "messages": [{"role": "user", "content": "sesame"}], "max_tokens": 2}
    reply = service.post("/v1/chat/completions", body)
    deadline, lines = time.monotonic() + 20, list[str]()
    while not lines and time.monotonic() < deadline:
        written = "".join(path.read_text() for path in map(Path, glob.glob(pattern[1])))
        lines = [line for line in written.splitlines() if reply.headers["x-request-id"] in line]
        lines = [line for line in lines if "seconds_to_response" in line]
        time.sleep(0.2)
    assert len(lines) == 1
    line = json.loads(lines[0][lines[0].index("{") :])
    assert (line["path"], line["status"], line["model"]) == ("/v1/chat/completions", 200, "dpo")
    assert "sesame" not in written and KEY not in written


def test_serve_run_and_rayservice_can_build_the_application() -> None:
    """Ray passes the arguments as an instance of the class that annotates the one parameter."""
    [parameter] = inspect.signature(app.build).parameters.values()
    assert parameter.annotation is app.ServeSettings
    read = app.ServeSettings.model_validate({"run": "r", "models": "base, dpo,", "context": "512"})
    assert (read.models, read.context) == (["base", "dpo"], 512)


@pytest.mark.parametrize(
    ("body", "status"),
    [(b"{", 400), (b'{"model": "\xff"}', 400), (b"", 400), (b" " * (MAX_BODY_BYTES + 1), 413)],
)
def test_an_invalid_or_too_large_body_is_rejected(
    body: bytes, status: int, service: Service
) -> None:
    reply = service.post("/v1/chat/completions", body)
    assert reply.status_code == status
    assert reply.json()["error"]["message"]


# --- hostile bodies ------------------------------------------------------------------------------

ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(),
    st.sampled_from(["\x00", "<|im_end|>", 10**400, "9" * 5000, "\ud800"]),
    st.lists(st.none() | st.text(max_size=5), max_size=3),
)
EDGES: list[Any] = [
    0, 1, 2, 8, 9, 20, 21, -1, 2**31, 2**63 - 1, 2**63, 0.5, 1e-9, 2.0, True, False, "", "a",
    "a " * 900, [], {}, [""], ["a", "b"], [1, 2], [[1], [2]], [10**6], {"type": "text"},
    {"include_usage": True}, {"a": "b"}, [{"role": "assistant", "content": None}],
    [{"type": "text", "text": "a"}],
]  # fmt: skip
"""Values at the limits of some field, and values that only the engine refuses."""
BODIES: dict[str, tuple[type[Body], dict[str, Any]]] = {
    "/v1/chat/completions": (ChatRequest, {"model": "dpo", "messages": QUESTION, "max_tokens": 1}),
    "/v1/completions": (CompletionRequest, {"model": "dpo", "prompt": "a", "max_tokens": 1}),
    "/v1/votes": (VoteRequest, {"messages": QUESTION, "left": SIDE, "right": SIDE, "vote": "both"}),
    "/judge/score": (JudgedPrompt, {"prompt": "a", "completion": {"text": "b"}}),
    "/judge/pairwise": (JudgedPrompt, {"prompt": "a", "first": {"text": "b"}, "second": {}}),
}


def is_valid(schema: type[Body], body: dict[str, Any]) -> bool:
    with contextlib.suppress(RequestError):
        parse(schema, json.dumps(body).encode())
        return True
    return False


def bodies(path: str) -> st.SearchStrategy[tuple[str, bytes]]:
    """Draws bodies for one route: a valid body with changed fields, whether valid or not; deeply
    nested JSON; and arbitrary bytes."""
    schema, valid = BODIES[path]
    names = sorted({*schema.model_fields, *schema.without_effect, *valid, "zzz"})
    pairs = [
        (name, edge)
        for name, edge in itertools.product(names, EDGES)
        if is_valid(schema, {**valid, name: edge})
    ]
    changes = st.dictionaries(st.sampled_from(names), st.sampled_from(EDGES) | ODD, max_size=2)
    if pairs:
        changes |= st.lists(st.sampled_from(pairs), max_size=4).map(dict)
    rows = changes.map(lambda fields: {**valid, **fields})
    whole = rows.map(lambda row: {"requests": [row]} if schema is JudgedPrompt else row)
    deep = st.integers(1, 3000).map(lambda depth: b'{"a":' * depth)
    return st.tuples(
        st.just(path), whole.map(lambda body: json.dumps(body).encode()) | st.binary() | deep
    )


INTERNAL = re.compile(
    r"Traceback|site-packages|\.py\b|Error'|[a-z]Request\b|ValidationError|0x[0-9a-f]{6}"
)


@given(st.one_of(*map(bodies, BODIES)))
@settings(
    max_examples=1000, deadline=None, database=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
def test_no_body_makes_a_server_error(service: Service, sent: tuple[str, bytes]) -> None:
    reply = service.post(*sent)
    assert reply.status_code < 500, (sent, reply.text)
    if reply.status_code >= 400:
        error = reply.json()["error"]
        assert error.keys() == {"message", "type", "param", "code"}, (sent, reply.text)
        assert error["type"] == "invalid_request_error" and isinstance(error["code"], str)
        assert error["message"] and not INTERNAL.search(reply.text), (sent, reply.text)
    else:
        assert 'data: {"error"' not in reply.text, (sent, reply.text)


def test_head_is_answered_without_a_body(service: Service) -> None:
    reply = service.http.head(f"{service.address}/health")
    assert (reply.status_code, reply.content) == (200, b"")


def test_a_page_of_another_origin_cannot_vote(service: Service) -> None:
    folder = service.run / "votes"
    before = {path: path.read_bytes() for path in folder.glob("*")}
    vote = {"messages": QUESTION, "left": SIDE, "right": SIDE, "vote": "left"}
    assert service.post("/v1/votes", vote, Origin="http://evil.example").status_code == 403
    assert service.post("/v1/votes", vote, **{"Content-Type": "text/plain"}).status_code == 415
    assert {path: path.read_bytes() for path in folder.glob("*")} == before
    assert service.post("/v1/votes", vote).status_code == 200
    assert {path: path.read_bytes() for path in folder.glob("*")} != before


# --- cancelled requests, votes, judge, chat -------------------------------------------------------

CANCELLED = 8
"""Number of clients that hang up."""
STABLE_READS = 5
"""Consecutive equal reads of a counter after which the engine counts as idle."""


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_frees_its_slot(stream: bool, service: Service) -> None:
    """The engine does not finish long answers whose clients hung up."""
    asked = {"model": "dpo", "messages": QUESTION, "max_tokens": 200, "n": 8, "seed": 1}
    start = time.monotonic()
    whole = service.post("/v1/chat/completions", asked).json()["usage"]["completion_tokens"]
    # Long enough for the engine to start on several such requests, too short to finish one.
    patience = min(max(0.3, (time.monotonic() - start) / 4), 2)

    def hang_up(_: int) -> None:
        headers = {"Authorization": f"Bearer {KEY}"}
        url = f"{service.address}/v1/chat/completions"
        body = {**asked, "stream": stream}
        if not stream:
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(
                    url, json=body, headers=headers, timeout=httpx.Timeout(60, read=patience)
                )
            return
        with httpx.stream("POST", url, json=body, headers=headers, timeout=60) as events:
            next(events.iter_lines())

    before = generated_tokens(service)
    with concurrent.futures.ThreadPoolExecutor(CANCELLED) as pool:
        list(pool.map(hang_up, range(CANCELLED)))
    assert 0 < generated_tokens(service) - before < CANCELLED * whole / 2


def generated_tokens(service: Service) -> float:
    """Waits until the engine is idle; returns its token count from Ray's Prometheus endpoint."""
    [address] = re.findall(r"metrics +(http://\S+)", service.log.read_text())
    counts: list[float] = []
    deadline = time.monotonic() + 120
    while len(counts) < STABLE_READS or len(set(counts[-STABLE_READS:])) > 1:
        assert time.monotonic() < deadline, counts
        time.sleep(1)
        lines = service.http.get(address).text
        tokens = re.findall(r"^ray_vllm_generation_tokens_total\{.*\} (\S+)", lines, re.MULTILINE)
        counts.append(sum(map(float, tokens)))
    return counts[-1]


def test_a_vote_is_a_row_that_preferences_reads(service: Service, tmp_path: Path) -> None:
    from zephyr_ray.manifest import Manifest
    from zephyr_ray.stage import Work
    from zephyr_ray.store import Artifact, read_jsonl
    from zephyr_ray.text.preferences import Preferences
    from zephyr_ray.text.votes import Votes

    talk = [
        {"role": "user", "content": "Hi."},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Name a bird."},
    ]
    sides = {"left": {"model": "dpo", "text": "An owl.", "finish_reason": "stop"},
             "right": {"model": "slim", "text": "A bird", "finish_reason": "length"}}  # fmt: skip

    def stored() -> bytes:
        files = sorted((service.run / "votes").glob("*.jsonl"))
        return b"".join(file.read_bytes() for file in files)

    before = stored()
    for vote in ("right", "tie"):
        reply = service.post("/v1/votes", {"messages": talk, **sides, "vote": vote})
        assert reply.status_code == 200, reply.text
    file = tmp_path / "votes.jsonl"
    file.write_bytes(stored().removeprefix(before))
    work = Work("votes", tmp_path / "votes", 0, {}, {}, {"file": file})
    work.folder.mkdir()
    Votes(file=str(file)).run(work)
    assert work.counts == {"rows": 2, "ties": 1}
    votes = Artifact(work.folder, Manifest(kind="votes", key="k", files={}))
    made = Work("pairs", tmp_path, 0, {"votes": votes}, {}, {})
    Preferences(feedback="votes").run(made)
    [pair] = read_jsonl(tmp_path / "rows.jsonl")
    asked = [*talk[:2], {**talk[2], "instruction": "Name a bird."}]
    better = {"role": "assistant", "content": "A bird", "finish_reason": "length"}
    worse = {"role": "assistant", "content": "An owl.", "finish_reason": "stop"}
    assert (pair["chosen"], pair["rejected"]) == ([*asked, better], [*asked, worse])


def test_the_served_judge_returns_what_the_judge_returns(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        {
            "prompt": "Name three birds in CAPITALS.",
            "instruction": "Name three birds.",
            "constraint": {"kind": "uppercase"},
            "first": {"text": first, "finish_reason": "stop"},
            "second": {"text": second, "finish_reason": "length"},
        }
        for first, second in (("OWL, EMU, HEN", "owl"), ("owl", "OWL"), ("OWL", "OWL"))
    ]
    served = service.post("/judge/pairwise", {"requests": rows})
    assert served.status_code == 200, served.text
    judge = RulesJudge(RulesSettings())
    own = [judge.compare(row, row["first"], row["second"]) for row in rows]
    assert served.json()["results"] == own
    assert {result["verdict"] for result in own} >= {1.0}
    monkeypatch.setenv("ZEPHYR_TEST_KEY", KEY)
    client = ServedJudge(ServiceSettings(base_url=service.address, api_key_env="ZEPHYR_TEST_KEY"))

    async def through() -> list[dict[str, Any]]:
        return [await client.judge("pairwise", r, [r["first"], r["second"]]) for r in rows]

    assert asyncio.run(through()) == own
    wrong = service.post(
        "/judge/pairwise", {"requests": [{**rows[0], "constraint": {"kind": "zzz"}}]}
    )
    assert wrong.status_code == 400 and "zzz" in wrong.json()["error"]["message"]
    many = service.post("/judge/pairwise", {"requests": rows * MAX_JUDGED_ROWS})
    assert many.status_code == 400


def test_the_judge_scores_an_answer_to_a_prompt_without_a_constraint(service: Service) -> None:
    answers = [{"text": "A cat."}, {"text": "A c", "finish_reason": "length"}]
    rows = [{"prompt": "Name a pet.", "completion": answer} for answer in answers]
    reply = service.post("/judge/score", {"requests": rows})
    assert reply.status_code == 200, reply.text
    # Score: 1 + 9 × share of checks passed (the answer ends on its own; it does not repeat itself).
    assert [result["score"] for result in reply.json()["results"]] == [10, 5.5]


def test_zephyr_chat_with_an_address(service: Service) -> None:
    command = [sys.executable, "-m", "zephyr_ray.cli", "chat", service.address, "--model", "slim"]
    done = subprocess.run(
        command,
        input="Hello.\nAnd?\n",
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "ZEPHYR_API_KEY": KEY},
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.strip()) > 10
    refused = subprocess.run(
        command, input="", capture_output=True, text=True, env={**os.environ, "ZEPHYR_API_KEY": ""}
    )
    assert refused.returncode == 2 and "requires a key; set ZEPHYR_API_KEY" in refused.stderr
    refused = subprocess.run(
        command, input="", capture_output=True, text=True, env={**os.environ, "ZEPHYR_API_KEY": "x"}
    )
    assert "does not accept the key in ZEPHYR_API_KEY" in refused.stderr
