"""Runs `zephyr serve`: starts Ray Serve here or on the cluster at RAY_ADDRESS, and waits."""

import logging
import os
import re
import signal
import socket
import threading
from typing import TYPE_CHECKING

from zephyr_ray.errors import Permanent
from zephyr_ray.ray_cluster import cluster_address, connect, temporary_folder
from zephyr_ray.run_folder import judge_of
from zephyr_ray.serve.app import ServeSettings, build_application, served_models
from zephyr_ray.serve.keys import KEYS_VARIABLE, read_keys, require_keys

if TYPE_CHECKING:
    from ray.serve.schema import ServeStatus

APPLICATION_NAME = "zephyr"
RAY_SETTINGS = {
    # The first saves threads and copies per token; the next two undo its side effects: a port on
    # every replica, and a log that is written only every thousand lines.
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_ENABLE_DIRECT_INGRESS": "0",
    "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1",
    "RAY_SERVE_LOG_TO_STDERR": "0",
    # Ray lowers the priority of its workers by default, but here users wait for them.
    "RAY_worker_niceness": "0",
}


def serve(settings: ServeSettings, host: str, port: int) -> int:
    """Serves until Ctrl-C or SIGTERM. Raises Permanent for user errors before Ray starts."""
    keys = read_keys()
    require_keys(host, keys)
    _check_port(host, port)
    # On a remote cluster the gateway and the judge run on other nodes, with their own environment.
    local = cluster_address() is None
    judge = judge_of(settings.run)
    if local and judge:
        judge.check()
    models = served_models(settings)
    for name, value in RAY_SETTINGS.items():
        os.environ.setdefault(name, value)
    import ray
    from ray import serve as ray_serve

    replicas = settings.max_replicas or settings.replicas
    # Engines may share cores; with the real count, Ray would wait for one core per engine.
    connect(cpus=max(os.cpu_count() or 1, replicas * len(models) + 1))
    gpus = replicas * len(models) * settings.gpus
    if local and gpus > (available := ray.cluster_resources().get("GPU", 0)):
        raise Permanent(
            f"--gpus: {len(models)} models need {gpus} GPUs, this machine has {int(available)}; "
            "lower --gpus or serve fewer models"
        )
    try:
        print(f"starting {', '.join(models)}: a minute or more …", flush=True)
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        session = ray.get_runtime_context().get_session_name()
        logs = f"{temporary_folder()}/{session}/logs/serve/replica_{APPLICATION_NAME}"
        application = build_application(settings, models, keys_needed=bool(keys) or not local)
        ray_serve.start(http_options={"host": host, "port": port})
        try:
            ray_serve.run(application, name=APPLICATION_NAME, route_prefix="/")
        except RuntimeError as error:
            raise _start_failure(ray_serve.status(), error, logs) from error
        url_host = f"[{host}]" if ":" in host else host
        print(f"page      http://{url_host}:{port}/")
        print(
            f"API       http://{url_host}:{port}/v1"
            + ("" if keys else f" (no keys; set {KEYS_VARIABLE})")
        )
        for node in ray.nodes():
            metrics = f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
            print(f"metrics   http://{metrics} (Prometheus)")
        if local:
            print(f"logs      {logs}_gateway*")
        print(f"chat      zephyr chat http://{url_host}:{port}", flush=True)
        stop = threading.Event()
        signal.signal(signal.SIGTERM, lambda *_: stop.set())
        stop.wait()
    finally:
        ray_serve.delete(APPLICATION_NAME)
        ray.shutdown()
        print("stopped")
    return 0


def _start_failure(status: "ServeStatus", error: RuntimeError, logs: str) -> Permanent:
    """Returns the error of the first deployment that does not start, with the last line of its
    traceback."""
    for name, deployment in status.applications[APPLICATION_NAME].deployments.items():
        if lines := deployment.message.strip().splitlines():
            reason = re.sub(r"^(\w+\.)*\w+: ", "", lines[-1])
            return Permanent(f"'{name}' does not start: {reason}; see {logs}_{name}*")
    return Permanent(f"the service does not start: {error}; see {logs}*")


def _check_port(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            raise Permanent(
                f"cannot serve on {host}:{port} ({error}); choose another --port"
            ) from None
