"""Runs a function in its own process, whose end frees all GPU memory and undoes all patches."""

import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


class Failed(Exception):
    """The function raised in its process, or the process died or was too slow."""


class Isolated:
    """Forks processes if CUDA works after a fork, because a forked process has already imported
    everything; else spawns them, which takes seconds."""

    def __init__(self, log: Path):
        self.log = log
        self.method = "fork"
        try:
            self.run(_use_cuda, timeout=60)
        except Failed:
            self.method = "spawn"

    def run(
        self, function: Callable[..., Any], *args: Any, timeout: float, packages: str = ""
    ) -> Any:
        """Returns the function's result. Raises Failed if it raises (with its traceback), dies or
        takes longer than `timeout` seconds.

        `packages` is a folder of packages that only the new process imports.
        """
        context = multiprocessing.get_context("spawn" if packages else self.method)
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_child, args=(theirs, str(self.log), function, args))
        if packages:  # a spawned process copies the path
            sys.path.insert(0, packages)
        process.start()
        if packages:
            sys.path.remove(packages)
        theirs.close()
        try:
            if not ours.poll(timeout):
                process.kill()
                raise Failed(f"no result within {timeout:.0f} s")
            succeeded, result = ours.recv()
        except EOFError:
            process.join()
            raise Failed(f"the process died with exit code {process.exitcode}") from None
        finally:
            if process.is_alive():
                process.join(20)
                process.kill()
        if not succeeded:
            raise Failed(result)
        return result


def _use_cuda() -> None:
    import torch

    if torch.cuda.is_available():
        torch.zeros(1, device="cuda").item()


def _child(
    connection: Connection, log: str, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    try:
        connection.send((True, function(*args)))
    except BaseException:
        connection.send((False, traceback.format_exc()))
    connection.close()
    os._exit(0)  # process groups and engines would wait for each other at exit
