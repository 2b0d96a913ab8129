"""Runs pods as containers instead of on a cluster: podman with runc, in an isolated network.

Needs root; the distribution's podman, runc, conmon, netavark, aardvark-dns and iproute2; and the
image (`make image`). `CONTAINERS_CONF` may name a file to use instead of SETTINGS.
"""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from pod_flags import Document, Node, in_order, run_flags

NETWORK = "zephyr-lab"
NAMES = Path("/run/containers/networks/aardvark-dns")
"""Folder of Podman's DNS server: one file per network, and its process ID."""
SETTINGS = """
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
[containers]
log_driver = "k8s-file"
default_ulimits = ["nofile=20000:20000", "nproc=16384:16384"]
[network]
network_backend = "netavark"
"""


@dataclass
class Lab:
    node: Node
    settings: Path
    pods: list[str] = field(default_factory=list)

    def podman(self, *arguments: str, seconds: float = 120) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["nsenter", f"--net=/run/netns/{NETWORK}", "podman", *arguments],
            **{"capture_output": True, "text": True, "timeout": seconds},
            env=os.environ | {"CONTAINERS_CONF": str(self.settings)},
        )

    def start(self, pod: Document, name: str, *service: str) -> None:
        """Starts the pod; `service` are the DNS names of the Services that select it."""
        aliases = [f"alias={alias}" for alias in service]
        network = ":".join([NETWORK, ",".join(aliases)]) if aliases else NETWORK
        *first, pod = in_order(pod)
        for init in first:
            flags = run_flags(init, f"{name}-init", self.node)
            done = self.podman("run", "--rm", f"--network={NETWORK}", *flags)
            assert done.returncode == 0, done.stderr
        flags = run_flags(pod, name, self.node)
        done = self.podman("run", "--detach", f"--network={network}", *flags)
        self.pods.append(name)
        assert done.returncode == 0, done.stderr

    def execute(self, name: str, *command: str, seconds: float = 120) -> tuple[int, str]:
        """Runs a command in a pod; returns its exit code and the output of both streams."""
        done = self.podman("exec", name, *command, seconds=seconds)
        return done.returncode, done.stdout + done.stderr

    def kill(self, name: str) -> None:
        """Kills a pod without warning, like the OOM killer or a lost node."""
        assert self.podman("kill", "--signal=KILL", name).returncode == 0

    def remove(self, name: str) -> None:
        self.podman("rm", "--force", "--time=0", name)
        self.pods.remove(name)

    def state(self, name: str) -> str:
        return self.podman("inspect", "--format={{.State.Status}}", name).stdout.strip()

    def logs(self, name: str) -> str:
        done = self.podman("logs", "--tail=40", name)
        return done.stdout + done.stderr


@contextmanager
def lab(folder: Path, image: str) -> Iterator[Lab]:
    missing = [tool for tool in ("podman", "runc", "conmon", "ip") if not shutil.which(tool)]
    if missing or os.getuid():
        pytest.skip(f"needs root and {', '.join(missing) or 'nothing else'}")
    settings = Path(os.environ.get("CONTAINERS_CONF") or folder / "containers.conf")
    if not settings.exists():
        settings.write_text(SETTINGS)
    here = Lab(Node(folder, {}, {}), settings)
    _clear(here)
    subprocess.run(["ip", "netns", "add", NETWORK], check=True)
    try:
        subprocess.run(["ip", "-n", NETWORK, "link", "set", "lo", "up"], check=True)
        if here.podman("image", "exists", image).returncode:
            pytest.skip(f"no image {image}; run make image")
        created = here.podman("network", "create", NETWORK)
        assert created.returncode == 0, created.stderr
        yield here
    finally:
        for pod in list(here.pods):
            here.remove(pod)
        here.podman("network", "rm", "--force", NETWORK)
        subprocess.run(["ip", "netns", "delete", NETWORK], check=True)


def _clear(here: Lab) -> None:
    """Removes what a killed run left: containers, the network, and its name server."""
    if Path("/run/netns", NETWORK).exists():
        here.podman("network", "rm", "--force", NETWORK)
        subprocess.run(["ip", "netns", "delete", NETWORK], check=True)
    (NAMES / NETWORK).unlink(missing_ok=True)
    with suppress(OSError, ValueError):
        # The DNS server rereads its folder on SIGHUP, and exits if no network is left.
        os.kill(int((NAMES / "aardvark.pid").read_text()), signal.SIGHUP)
