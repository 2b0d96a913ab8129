"""Chooses ports for servers that bind them later."""

import random
import socket


def free_port() -> int:
    """Returns a free port that no other program gets by chance: it is below the ephemeral ports
    and above those of Ray's workers."""
    choose = random.SystemRandom()  # a seed would give all test processes the same port
    while True:
        port = choose.randrange(20_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
