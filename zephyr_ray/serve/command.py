"""`zephyr serve`: starts Ray Serve here or on the cluster at RAY_ADDRESS, and waits."""

import logging
import os
import signal
import socket
import tempfile
import threading

from zephyr_ray.errors import Permanent
from zephyr_ray.serve.app import ServeSettings, application, models_served
from zephyr_ray.serve.keys import VARIABLE, check_address, read_keys

NAME = "zephyr"
RAY_SETTINGS = {
    # Fewer threads and copies on a token's way. Its port at every replica is not wanted, nor its
    # log that waits for a thousand lines.
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_ENABLE_DIRECT_INGRESS": "0",
    "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1",
    "RAY_SERVE_LOG_TO_STDERR": "0",
    # Ray's workers give way to everything else on a machine; a service has people waiting.
    "RAY_worker_niceness": "0",
}


def serve(settings: ServeSettings, host: str, port: int) -> int:
    """Serves until ctrl-C or SIGTERM. Everything a user can get wrong is a Permanent first."""
    keys = read_keys()
    check_address(host, keys)
    _check_port(host, port)
    models = list(models_served(settings))
    for name, value in RAY_SETTINGS.items():
        os.environ.setdefault(name, value)
    import ray
    from ray import serve as ray_serve

    from zephyr_ray.ray_cluster import connect

    # On a cluster the gateway may run elsewhere, under another address than this one.
    ours = not os.environ.get("RAY_ADDRESS")
    replicas = max(settings.replicas, settings.max_replicas or 0)
    # Engines share the cores of a laptop; Ray must not wait for one each.
    connect(cpus=max(os.cpu_count() or 1, replicas * len(models) + 1))
    gpus = replicas * len(models) * settings.gpus
    if ours and gpus > (here := ray.cluster_resources().get("GPU", 0)):
        raise Permanent(
            f"--gpus: {gpus} wanted ({len(models)} models), this machine has {here:.0f}"
        )
    try:
        print(f"starting {', '.join(models)}: a minute or more …", flush=True)
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        served = application(settings, keys_needed=bool(keys) or not ours)
        ray_serve.start(http_options={"host": host, "port": port})
        ray_serve.run(served, name=NAME, route_prefix="/")
        shown = f"[{host}]" if ":" in host else host
        print(f"page      http://{shown}:{port}/")
        print(f"API       http://{shown}:{port}/v1" + ("" if keys else f" (no key: {VARIABLE})"))
        for node in ray.nodes():
            metrics = f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
            print(f"metrics   http://{metrics} (Prometheus)")
        if ours:
            session = ray.get_runtime_context().get_session_name()
            temporary = os.environ.get("RAY_TMPDIR", tempfile.gettempdir())
            print(f"logs      {temporary}/ray/{session}/logs/serve/replica_{NAME}_gateway*")
        print(f"chat      zephyr chat http://{shown}:{port}", flush=True)
        stop = threading.Event()
        signal.signal(signal.SIGTERM, lambda *_: stop.set())
        stop.wait()
    finally:
        ray_serve.delete(NAME)
        ray.shutdown()
        print("stopped")
    return 0


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
