"""Tests following a RayJob to its end through failures, and status, logs and stop."""

import copy
import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from cluster_lab import JOBS, TEAM, created_job, end_job, error
from kube_api import TOKEN, Api, Fault, Request

from zephyr_ray import cli
from zephyr_ray.cluster import kube, logs, watch
from zephyr_ray.cluster.checks import REQUIRED_VERBS
from zephyr_ray.cluster.command import follow
from zephyr_ray.errors import Permanent, Temporary


def run_two_stages(api: Api, name: str) -> None:
    """Plays KubeRay for a run of two stages; ends it when all faults have occurred."""
    api.wait_for(lambda: any("watch" in r.query for r in api.requests))
    api.status(name, jobDeploymentStatus="Initializing", rayClusterName=f"{name}-c")
    api.status(name, jobDeploymentStatus="Running", jobStatus="RUNNING")
    api.pod("submitter", name)
    api.log("submitter", "12:00:01 prompts: running", "2026-01-01T12:00:01.5Z")
    api.log("submitter", "12:00:02 prompts: done 2 rows", "2026-01-01T12:00:02Z")
    api.wait_for(lambda: bool(api.sent("GET", "submitter/log")))
    api.log("submitter", "12:00:03 answers: done 2 rows", "2026-01-01T12:00:03Z")
    api.wait_for(lambda: not any(fault.times for fault in api.faults))
    api.phase("submitter", "Succeeded")
    end_job(api, name)


LOG = [
    "12:00:01 prompts: running",
    "12:00:02 prompts: done 2 rows",
    "12:00:03 answers: done 2 rows",
]


def shown(out: str) -> list[str]:
    """Returns the log lines of a followed job, without the three that name it."""
    return out.splitlines()[3:]


@pytest.fixture
def one_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes one watch last for a whole test: between two, a state may pass unseen."""
    monkeypatch.setattr(watch, "STARTING_SECONDS", 600)
    monkeypatch.setattr(watch, "RUNNING_SECONDS", 600)


def test_follow_shows_log_and_states_and_returns_the_jobs_code(
    api: Api, here: Path, one_watch: None, capsys: pytest.CaptureFixture
) -> None:
    api.operator = run_two_stages
    assert cli.main(["submit", "small.yaml", "--follow"]) == 0
    output = capsys.readouterr()
    assert shown(output.out) == LOG
    states = [line.partition("▸ ")[2] for line in output.err.splitlines()]
    assert states[0] == "waiting for the operator" and states[-1] == "complete, job succeeded"
    assert any(state.startswith("running, job running, on small-") for state in states)


@pytest.mark.parametrize(
    ("job", "status", "code"),
    [
        ("SUCCEEDED", {}, 0),
        ("FAILED", {"message": "Job entrypoint command failed with exit code 2, last"}, 2),
        ("FAILED", {"message": "Job entrypoint command failed with exit code -9, last"}, 137),
        ("FAILED", {"reason": "AppFailed", "message": "the head died"}, 1),
        ("FAILED", {"reason": "DeadlineExceeded"}, 124),
        ("STOPPED", {}, 130),
    ],
)
def test_wait_returns_the_jobs_code(
    api: Api, here: Path, job: str, status: dict[str, str], code: int
) -> None:
    api.operator = lambda api, name: end_job(api, name, job, **status)
    assert cli.main(["submit", "small.yaml", "--wait"]) == code
    assert not api.sent("GET", "/log")


def test_a_job_that_the_operator_rejects_ends_the_wait(
    api: Api, here: Path, capsys: pytest.CaptureFixture
) -> None:
    api.operator = lambda api, name: api.status(
        name, jobDeploymentStatus="ValidationFailed", message="name too long"
    )
    assert cli.main(["submit", "small.yaml", "--wait"]) == 2
    assert "validationfailed: name too long" in capsys.readouterr().err


def test_a_job_that_somebody_deletes_ends_the_wait(api: Api, here: Path) -> None:
    def operator(api: Api, name: str) -> None:
        api.wait_for(lambda: any("watch" in r.query for r in api.requests))
        api.put(f"{JOBS}/{name}", api.objects[f"{JOBS}/{name}"], "DELETED")

    api.operator = operator
    assert cli.main(["submit", "small.yaml", "--wait"]) == 130


def test_follow_goes_on_through_a_retry_on_a_fresh_cluster(
    api: Api, here: Path, one_watch: None, capsys: pytest.CaptureFixture
) -> None:
    def operator(api: Api, name: str) -> None:
        api.status(name, jobDeploymentStatus="Running", jobStatus="RUNNING")
        api.pod("first", name, created="2026-01-01T12:00:00Z")
        api.log("first", "one", "2026-01-01T12:00:01Z")
        api.wait_for(lambda: any("watch" in r.query for r in api.requests))
        api.wait_for(lambda: "first" in api.opened_logs)
        api.status(name, jobDeploymentStatus="Retrying", jobStatus="", failed=1)
        path = f"{TEAM}/pods/first"
        api.put(path, api.objects[path], "DELETED")
        api.status(name, jobDeploymentStatus="Running", jobStatus="RUNNING")
        api.pod("second", name, created="2026-01-01T12:01:00Z")
        api.log("second", "two", "2026-01-01T12:01:01Z")
        api.phase("second", "Succeeded")
        end_job(api, name)

    api.operator = operator
    assert cli.main(["submit", "small.yaml", "--follow"]) == 0
    output = capsys.readouterr()
    assert shown(output.out) == ["one", "two"]
    assert "retrying, after 1 failed attempt\n" in output.err
    assert re.search(r"log of first\n(.*\n)*.*log of second", output.err)


FAULTS = {
    "410 of the watch": [Fault("GET", r"rayjobs\?watch", 410)],
    "watch cut off": [Fault("CUT", "rayjobs", 0, times=2)],
    "watch dropped": [Fault("GET", r"rayjobs\?watch", "drop", times=2)],
    "reads fail": [Fault("GET", "rayjobs/", 503, times=3)],
    "log cut off": [Fault("CUT", "submitter/log", 0, times=2)],
    "log dropped": [Fault("GET", "submitter/log", "drop", times=2)],
    "log fails": [Fault("GET", "submitter/log", 500, times=2)],
    "pods fail": [Fault("GET", "pods$", 503, times=2)],
    "reads refused": [Fault("GET", "rayjobs/", 403, times=3)],
    "token refused": [Fault("GET", "rayjobs/", 401, times=5)],
    "resources not yet known": [Fault("GET", "rayjobs/", 404, times=3)],
    "watch refused": [Fault("GET", r"rayjobs\?watch", 403, times=3)],
    "log refused": [Fault("GET", "submitter/log", 403, times=3)],
    "pods refused": [Fault("GET", "pods$", 401, times=6)],
}


@pytest.mark.parametrize("faults", FAULTS.values(), ids=FAULTS)
def test_follow_survives(
    api: Api,
    here: Path,
    capsys: pytest.CaptureFixture,
    faults: list[Fault],
) -> None:
    """Every log line is shown exactly once."""
    api.faults, api.operator = copy.deepcopy(faults), run_two_stages
    assert cli.main(["submit", "small.yaml", "--follow"]) == 0
    assert shown(capsys.readouterr().out) == LOG


def test_follow_survives_a_watch_that_hangs(
    api: Api, here: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    api.faults, api.operator = [Fault("GET", r"rayjobs\?watch", "hang")], run_two_stages
    assert cli.main(["submit", "small.yaml"]) == 0
    # The creation of the job is not tried again, so its time is not shortened.
    monkeypatch.setattr(kube, "READ_SECONDS", 1.0)
    name = created_job(api)["metadata"]["name"]
    assert follow(kube.Kube(), name, logs=True) == 0
    assert shown(capsys.readouterr().out) == LOG


def test_a_watch_from_a_too_old_version_is_restarted(
    api: Api, here: Path, capsys: pytest.CaptureFixture
) -> None:
    """A real server sends the 410 as an event in the middle of a watch."""

    def operator(api: Api, name: str) -> None:
        api.wait_for(lambda: any("watch" in r.query for r in api.requests))
        api.oldest = 10**6
        with api.changed:
            api.changed.notify_all()
        api.wait_for(lambda: len(api.sent("GET", f"rayjobs/{name}")) >= 3)
        api.oldest = 0
        end_job(api, name)

    api.operator = operator
    assert cli.main(["submit", "small.yaml", "--wait"]) == 0
    assert "retrying" not in capsys.readouterr().err


def test_follow_survives_a_restart_of_the_server(
    api: Api, here: Path, capsys: pytest.CaptureFixture
) -> None:
    """A fresh server refuses valid credentials at first, on all paths at once."""

    def refused(resource: str) -> int:
        return sum(resource in path for path in api.refused_cold)

    def operator(api: Api, name: str) -> None:
        api.status(name, jobDeploymentStatus="Running", jobStatus="RUNNING")
        api.pod("submitter", name)
        api.log("submitter", "before", "2026-01-01T12:00:01Z")
        api.wait_for(lambda: bool(api.sent("GET", "submitter/log")))
        api.restart()
        api.log("submitter", "meanwhile", "2026-01-01T12:00:02Z")
        # One search for pods may be for those that do not start; the second is for the log.
        api.wait_for(lambda: refused("rayjobs") > 0 and refused("pods") > 1)
        api.cold = False
        api.log("submitter", "after", "2026-01-01T12:00:03Z")
        api.phase("submitter", "Succeeded")
        end_job(api, name)

    api.operator = operator
    assert cli.main(["submit", "small.yaml", "--follow"]) == 0
    output = capsys.readouterr()
    assert shown(output.out) == ["before", "meanwhile", "after"]
    assert output.err.count("retrying while the job keeps running") == 1
    assert output.err.count("trying again while the job runs") == 1


def credential(token: str) -> str:
    version = "client.authentication.k8s.io/v1"
    status = {"token": token, "expirationTimestamp": "2026-01-01T00:00:00Z"}
    return json.dumps({"apiVersion": version, "kind": "ExecCredential", "status": status})


def plugin(file: Path) -> dict[str, Any]:
    """Returns a user whose token comes from a program that prints a file."""
    version = "client.authentication.k8s.io/v1"
    arguments = {"command": "cat", "args": [str(file)], "interactiveMode": "Never"}
    return {"exec": {"apiVersion": version, **arguments}}


@pytest.mark.parametrize("source", ["tokenFile", "exec"])
def test_a_renewed_token_is_used(
    api: Api, here: Path, capsys: pytest.CaptureFixture, source: str
) -> None:
    """The first token expires while a job is followed; its file already has the next one."""
    file = here / "token"
    user = plugin(file) if source == "exec" else {"tokenFile": "token"}

    def write(token: str) -> None:
        file.write_text(credential(token) if source == "exec" else f"{token}\n")

    def operator(api: Api, name: str) -> None:
        api.wait_for(lambda: any("watch" in r.query for r in api.requests))
        write("the-second-token")
        api.token = "the-second-token"
        run_two_stages(api, name)

    write(TOKEN)
    (here / "kubeconfig").write_text(api.kubeconfig(user))
    api.operator = operator
    assert cli.main(["submit", "small.yaml", "--follow"]) == 0
    output = capsys.readouterr()
    assert shown(output.out) == LOG
    assert "accept these credentials" not in output.err


@pytest.mark.parametrize("meanwhile", ["", "\n"])
def test_a_token_file_may_be_empty_while_it_is_rewritten(
    api: Api, here: Path, meanwhile: str
) -> None:
    (here / "token").write_text(TOKEN)
    (here / "kubeconfig").write_text(api.kubeconfig({"tokenFile": "token"}))

    def operator(api: Api, name: str) -> None:
        api.wait_for(lambda: any("watch" in r.query for r in api.requests))
        (here / "token").write_text(meanwhile)
        refused = len(api.requests)
        api.token = "the-second-token"
        api.wait_for(lambda: len(api.requests) > refused + 1)
        (here / "token").write_text("the-second-token")
        end_job(api, name)

    api.operator = operator
    assert cli.main(["submit", "small.yaml", "--wait"]) == 0


def test_a_plugin_that_fails_later_is_reported_in_the_clients_own_lines(
    api: Api,
    here: Path,
    capsys: pytest.CaptureFixture,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(watch, "REFUSED_SECONDS", 0.3)
    (here / "credential").write_text(credential(TOKEN))
    (here / "kubeconfig").write_text(api.kubeconfig(plugin(here / "credential")))

    def operator(api: Api, name: str) -> None:
        api.wait_for(lambda: any("watch" in r.query for r in api.requests))
        (here / "credential").unlink()
        api.token = "of-tomorrow"

    api.operator = operator
    assert cli.main(["submit", "small.yaml", "--wait"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "the kubeconfig's exec plugin failed" in line and "keeps running" in line
    assert [record for record in caplog.records if record.name == "root"] == []


def test_a_token_that_ran_out_ends_the_wait_but_not_the_job(
    api: Api, here: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "REFUSED_SECONDS", 0.3)

    def operator(api: Api, name: str) -> None:
        api.status(name, jobDeploymentStatus="Running", jobStatus="RUNNING")
        api.wait_for(lambda: any("watch" in r.query for r in api.requests))
        api.token = "of-tomorrow"

    api.operator = operator
    assert cli.main(["submit", "small.yaml", "--follow"]) == 2
    name = created_job(api)["metadata"]["name"]
    line = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(
        rf"error: http\S+ does not accept these credentials; log in again; {name} keeps running; "
        rf"reconnect with zephyr logs {name} --follow",
        line,
    ), line


class Script:
    """Plays a server that answers successive reads of a job with the given states or errors."""

    def __init__(self, *answers: Exception | str) -> None:
        self.answers, self.now = list(answers), 0.0

    def path(self, kind: str, name: str = "") -> str:
        return kind

    def get(self, path: str) -> dict[str, Any]:
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return {"metadata": {"name": "one"}, "status": {"jobDeploymentStatus": answer}}

    def watch(self, path: str, seconds: int, **query: str) -> list[Any]:
        return []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += watch.REFUSED_SECONDS * 0.6


@pytest.mark.parametrize(
    ("between", "outlasts"),
    [
        (kube.Forbidden("cold"), False),
        (Temporary("reset"), True),
        (kube.Gone("old"), True),
        ("Running", True),
    ],
    ids=["refused", "broken", "too old", "answered"],
)
def test_only_uninterrupted_refusals_end_a_follow(
    monkeypatch: pytest.MonkeyPatch, between: Exception | str, outlasts: bool
) -> None:
    refused = kube.Forbidden("not allowed")
    server = Script(refused, refused, between, refused, refused, "Complete")
    monkeypatch.setattr(watch, "time", server)
    states = watch.states(server, "one", lambda line: None)
    if outlasts:
        assert list(states)[-1].deployment_status == "Complete"
    else:
        with pytest.raises(Permanent, match="not allowed|cold"):
            list(states)


def test_a_server_whose_versions_are_always_too_old_is_not_flooded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = Script(*[kube.Gone("old")] * 3, "Complete")
    monkeypatch.setattr(watch, "time", server)
    list(watch.states(server, "one", print))
    assert server.now == pytest.approx(3 * 0.6 * watch.REFUSED_SECONDS)


def warn(api: Api, kind: str, name: str, reason: str, message: str) -> None:
    event = f"e{len(api.objects)}"
    involved = {"kind": kind, "name": name, "namespace": "team"}
    body = {"type": "Warning", "reason": reason, "message": message, "involvedObject": involved}
    api.put(f"{TEAM}/events/{event}", {"metadata": {"name": event}, **body})


QUOTA = "exceeded quota: gpus, requested: requests.nvidia.com/gpu=8, used: 0, limited: 4"


def test_each_cause_of_delay_is_printed_once(
    api: Api, here: Path, capsys: pytest.CaptureFixture
) -> None:
    """The operator reports a refused pod on the RayCluster, under a new name at every try."""

    def operator(api: Api, name: str) -> None:
        warn(api, "RayJob", name, "InvalidRayJobSpec", "no such field")
        deleted = f'Failed to delete submitter K8s Job team/{name}: jobs.batch "{name}" not found'
        warn(api, "RayJob", name, "FailedToDeleteRayJobSubmitter", deleted)
        warn(api, "Job", name, "FailedCreate", "Error creating: pods is forbidden: no memory")
        warn(api, "RayCluster", "another", "FailedToCreateHeadPod", "of another job")
        for suffix in ("x7k2p", "b9c4d"):
            refused = f'cluster team/c1, pods "c1-gpu-worker-{suffix}" is forbidden: {QUOTA}'
            warn(api, "RayCluster", "c1", "FailedToCreateWorkerPod", refused)
        waiting = {"reason": "ImagePullBackOff", "message": "no such image"}
        api.put(
            f"{TEAM}/pods/head",
            {
                "metadata": {"name": "head", "labels": {"ray.io/cluster": "c1"}},
                "status": {
                    "conditions": [
                        {"type": "PodScheduled", "status": "False", "message": "0/3 nodes"}
                    ],
                    "containerStatuses": [{"state": {"waiting": waiting}}],
                },
            },
        )
        api.status(name, jobDeploymentStatus="Initializing", rayClusterName="c1")
        api.wait_for(lambda: len(api.sent("GET", "events")) >= 6)
        end_job(api, name)

    api.operator = operator
    assert cli.main(["submit", "small.yaml", "--wait"]) == 0
    messages = [line.partition("▸ ")[2] for line in capsys.readouterr().err.splitlines()]
    assert sorted(line for line in messages if ": " in line) == sorted(
        {
            "InvalidRayJobSpec: no such field",
            "FailedCreate: Error creating: pods is forbidden: no memory",
            'FailedToCreateWorkerPod: cluster team/c1, pods "c1-gpu-worker-…" is forbidden: '
            f"{QUOTA}",
            "head: ImagePullBackOff: no such image",
            "head is not scheduled: 0/3 nodes",
        }
    )


def test_status_shows_why_pods_are_refused(
    api: Api, here: Path, capsys: pytest.CaptureFixture
) -> None:
    a_job(api, "one", jobDeploymentStatus="Initializing", rayClusterName="c1")
    warn(api, "RayCluster", "c1", "FailedToCreateHeadPod", QUOTA)
    assert cli.main(["status", "one"]) == 0
    assert f"trouble   FailedToCreateHeadPod: {QUOTA}\n" in capsys.readouterr().out


def test_status_shows_why_a_volume_cannot_be_mounted(
    api: Api, here: Path, capsys: pytest.CaptureFixture
) -> None:
    a_job(api, "one", jobDeploymentStatus="Initializing", rayClusterName="c1")
    waiting = [{"state": {"waiting": {"reason": "ContainerCreating"}}}]
    for pod, phase in (("head", "Pending"), ("worker", "Running")):
        metadata = {"name": pod, "labels": {"ray.io/cluster": "c1"}}
        status = {"phase": phase, "containerStatuses": waiting}
        api.put(f"{TEAM}/pods/{pod}", {"metadata": metadata, "status": status})
        warn(api, "Pod", pod, "FailedMount", "no claim")
        warn(api, "Pod", pod, "BackOff", "shown by the status of the pod")
    assert cli.main(["status", "one"]) == 0
    trouble = [line for line in capsys.readouterr().out.splitlines() if "trouble" in line]
    assert trouble == ["trouble   head: FailedMount: no claim"]


@pytest.mark.parametrize(
    ("state", "shown"), [("Retrying", True), ("Suspending", True), ("Initializing", False)]
)
def test_a_deletion_that_fails_is_shown_while_the_job_waits_for_it(
    api: Api, here: Path, capsys: pytest.CaptureFixture, state: str, shown: bool
) -> None:
    a_job(api, "one", jobDeploymentStatus=state)
    warn(api, "RayJob", "one", "FailedToDeleteRayCluster", "a webhook says no")
    assert cli.main(["status", "one"]) == 0
    assert ("FailedToDeleteRayCluster" in capsys.readouterr().out) is shown


def test_lines_with_equal_time_stamps_are_not_repeated_when_a_log_resumes() -> None:
    seen = logs._Progress()
    first = ["2026-01-01T12:00:01.5Z a", "2026-01-01T12:00:01.51Z b", "2026-01-01T12:00:01.51Z b"]
    assert list(seen.only_new(first)) == ["a", "b", "b"]
    again = [*first, "2026-01-01T12:00:01.51Z b", "2026-01-01T12:00:02Z c", "2026-01-01T12:00:02Z "]
    assert list(seen.only_new(again)) == ["b", "c", ""]


@pytest.mark.parametrize(
    ("stamps", "again"),
    [
        (["12:00:30.0000003Z", "12:00:30.0000002Z"], [0, 1]),
        (["12:00:30Z", "12:00:00Z", "12:00:01Z"], [0, 2]),
        (["13:00:29+01:00", "13:00:30+01:00"], [1]),
    ],
    ids=["output and error race", "the clock is set back", "a node outside UTC"],
)
def test_no_line_is_lost_or_repeated_whatever_its_time_stamp(
    stamps: list[str], again: list[int]
) -> None:
    lines = [f"2026-01-01T{stamp} {number}" for number, stamp in enumerate(stamps)]
    seen = logs._Progress()
    assert list(seen.only_new(lines)) == [str(number) for number in range(len(stamps))]
    fresh = ["2026-01-01T11:59:59Z before", "2026-01-01T12:01:00Z after"]
    assert list(seen.only_new([*(lines[i] for i in again), *fresh])) == ["before", "after"]


def test_a_log_resumes_at_the_second_of_its_last_line_in_utc() -> None:
    seen = logs._Progress()
    assert list(seen.only_new(["2026-01-01T13:00:30.5+01:00 a"])) == ["a"]
    assert seen.since == "2026-01-01T12:00:30Z"


def test_a_message_of_the_node_is_shown() -> None:
    seen = logs._Progress()
    message = "unable to retrieve container logs"
    assert list(seen.only_new(["2026-01-01T12:00:30Z a", message])) == ["a", message]


def interrupted(api: Api, stdin: int, answer: Callable[[], object] = lambda: None) -> str:
    """Interrupts a waiting `zephyr submit`, then answers; returns its output."""
    api.operator = lambda api, name: api.status(
        name, jobDeploymentStatus="Running", jobStatus="RUNNING"
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "zephyr_ray.cli", "submit", "small.yaml", "--wait"],
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[1])},
        # A shell starts background jobs with SIGINT ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        api.wait_for(lambda: any("watch" in r.query for r in api.requests), 300)
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        answer()
        output = process.communicate(timeout=300)[0].decode()
    finally:
        process.kill()
    assert process.returncode == 130, output
    return output


@pytest.mark.parametrize(("answer", "left"), [("n", False), ("", True)])
def test_ctrl_c_asks_whether_to_leave_it_running(
    api: Api, here: Path, answer: str, left: bool
) -> None:
    master, terminal = pty.openpty()
    try:
        output = interrupted(api, terminal, lambda: os.write(master, f"{answer}\n".encode()))
    finally:
        os.close(master)
        os.close(terminal)
    assert "running? [Y/n]" in output
    assert bool([p for p in api.objects if p.startswith(f"{JOBS}/")]) is left


def test_without_a_terminal_the_job_keeps_running(api: Api, here: Path) -> None:
    """A closed or piped standard input must not count as an answer."""
    reading, writing = os.pipe()
    os.write(writing, b"n\n")
    try:
        output = interrupted(api, reading)
    finally:
        os.close(reading)
        os.close(writing)
    assert "[Y/n]" not in output and "keeps running" in output
    assert not api.sent("DELETE", "rayjobs")


def test_on_a_terminal_the_stages_are_a_table_below_the_log(api: Api, here: Path) -> None:
    def operator(api: Api, name: str) -> None:
        api.status(name, jobDeploymentStatus="Running", jobStatus="RUNNING")
        api.pod("submitter", name)
        progress = "120/400 rows · 2.0/s · 2 min 20 s left"
        for second, text in enumerate(
            (
                "12:00:00 prompts: waiting prompts",
                "12:00:00 answers: waiting completions",
                "12:00:01 prompts: done 2 rows · 1 s",
                f"12:00:02 answers: running {progress}",
                "the engine says something",
            )
        ):
            api.log("submitter", text, f"2026-01-01T12:00:0{second}Z")
        api.wait_for(lambda: bool(api.sent("GET", "submitter/log")))
        time.sleep(0.5)
        api.phase("submitter", "Succeeded")
        end_job(api, name)

    api.operator = operator
    master, terminal = pty.openpty()
    output = bytearray()

    def read() -> None:
        with suppress(OSError):  # raised once all have closed the terminal
            while True:
                output.extend(os.read(master, 2**16))

    reader = threading.Thread(target=read)
    reader.start()
    try:
        done = subprocess.run(
            [sys.executable, "-m", "zephyr_ray.cli", "submit", "small.yaml", "--follow"],
            stdin=subprocess.DEVNULL,
            stdout=terminal,
            stderr=terminal,
            env=os.environ
            | {"PYTHONPATH": str(Path(cli.__file__).parents[1]), "TERM": "xterm", "COLUMNS": "120"},
            timeout=300,
        )
    finally:
        os.close(terminal)
        reader.join()
        os.close(master)
    assert done.returncode == 0, output
    plain = re.sub(r"\x1b\[[\d;?]*\w", "", output.decode())
    assert re.search(r"prompts +prompts +done +2 rows", plain), plain
    assert re.search(r"answers +completions +running +━+.* 120/400 rows · 2.0/s · 2 min 20", plain)
    assert "the engine says something" in plain and "12:00:02 answers:" not in plain


# status, logs, stop


def a_job(api: Api, name: str, **status: Any) -> None:
    metadata = {"name": name, "creationTimestamp": "2026-01-01T00:00:00Z"}
    api.put(f"{JOBS}/{name}", {"metadata": metadata, "spec": {}, "status": status})


def permission(request: Request) -> tuple[str, str]:
    """Returns the verb and the resource that a real server would check against its roles."""
    resource, _, rest = request.path.partition("/namespaces/team/")[2].partition("/")
    name, _, part = rest.partition("/")
    verbs = {"POST": "create", "DELETE": "delete", "GET": "get" if name else "list"}
    verb = "watch" if "watch" in request.query else verbs[request.method]
    return verb, f"{resource}/{part}" if part else resource


def test_the_commands_use_exactly_the_permissions_that_are_checked_and_documented(
    api: Api, here: Path
) -> None:
    api.operator = run_two_stages
    assert cli.main(["submit", "small.yaml", "--follow"]) == 0
    name = created_job(api)["metadata"]["name"]
    for command in (["status"], ["status", name], ["logs", name], ["stop", name]):
        assert cli.main(command) == 0
    used = {permission(request) for request in api.requests}
    assert used == {(verb, kind) for _, kind, verbs in REQUIRED_VERBS for verb in verbs}
    documented = "; ".join(f"{kind} {', '.join(verbs)}" for _, kind, verbs in REQUIRED_VERBS)
    page = Path(cli.__file__).parents[1] / "docs" / "kubernetes-client.md"
    assert documented in " ".join(page.read_text().split())


def test_status_lists_jobs_and_shows_the_stages_of_one(
    api: Api, here: Path, capsys: pytest.CaptureFixture
) -> None:
    a_job(api, "one", jobDeploymentStatus="Complete", jobStatus="SUCCEEDED")
    a_job(api, "two", jobDeploymentStatus="Running", jobStatus="RUNNING", failed=1)
    assert cli.main(["status"]) == 0
    listed = capsys.readouterr().out
    assert re.search(r"one .*complete, job succeeded", listed)
    assert re.search(r"two .*running, job running, after 1 failed attempt", listed)
    api.pod("submitter", "two")
    for second, text in enumerate(
        ("prompts: running", "prompts: done 2 rows", "answers: running 1/2 rows", "noise")
    ):
        api.log("submitter", f"12:00:0{second} {text}", f"2026-01-01T12:00:0{second}Z")
    assert cli.main(["status", "two"]) == 0
    output = capsys.readouterr().out
    assert re.search(r"prompts +done +2 rows", output)
    assert re.search(r"answers +running +\S+ +1/2 rows", output)


@pytest.mark.parametrize("name", ["a/../../pods/b", "a?watch=true", ""])
def test_an_invalid_name_never_becomes_a_path(
    api: Api, here: Path, capsys: pytest.CaptureFixture, name: str
) -> None:
    assert "no job" in error(capsys, "stop", name)
    assert not api.requests


def test_logs_prints_the_log_so_far(api: Api, here: Path, capsys: pytest.CaptureFixture) -> None:
    a_job(api, "one", jobDeploymentStatus="Running", jobStatus="RUNNING")
    assert "one has no log: running" in error(capsys, "logs", "one")
    api.pod("submitter", "one")
    api.log("submitter", "hello", "2026-01-01T12:00:00Z")
    assert cli.main(["logs", "one"]) == 0
    assert capsys.readouterr().out == "hello\n"


def test_logs_follow_returns_the_jobs_code(api: Api, here: Path) -> None:
    a_job(api, "one", jobDeploymentStatus="Failed", jobStatus="FAILED")
    assert cli.main(["logs", "one", "--follow"]) == 1


def test_stop_deletes_the_job_and_its_dependents(api: Api, here: Path) -> None:
    a_job(api, "one")
    assert cli.main(["stop", "one"]) == 0
    [request] = api.sent("DELETE", "rayjobs/one")
    assert request.query["propagationPolicy"] == "Background"
    assert f"{JOBS}/one" not in api.objects


def test_without_a_profile_the_kubeconfig_names_the_namespace(api: Api, here: Path) -> None:
    (here / "zephyr-cluster.yaml").unlink()
    (here / "kubeconfig").write_text(api.kubeconfig(namespace="mine"))
    assert cli.main(["status"]) == 0
    assert api.requests[-1].path == "/apis/ray.io/v1/namespaces/mine/rayjobs"
