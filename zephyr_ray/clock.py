"""Measures the wall time of a stage over all its attempts."""

import contextlib
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

from zephyr_ray.store import write_atomically


class Clock:
    """Wall time of a stage over all attempts; saved twice per second, so that little is lost if the
    process is killed."""

    def __init__(self, path: Path, tick: Callable[[], None]):
        self._path, self._tick, self._stop = path, tick, threading.Event()
        try:
            before = json.loads(path.read_text())
        except (OSError, ValueError):
            before = {"seconds": 0.0, "attempts": 0}
        self._before, self.attempts = before["seconds"], before["attempts"] + 1
        self._began = time.monotonic()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    @property
    def seconds(self) -> float:
        return self._before + time.monotonic() - self._began

    def _follow(self) -> None:
        while not self._stop.wait(0.5):
            saved = {"seconds": self.seconds, "attempts": self.attempts}
            # A disk that stays full also fails the stage, which reports it.
            with contextlib.suppress(OSError):
                write_atomically(self._path, json.dumps(saved))
            self._tick()

    def __enter__(self) -> "Clock":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
