"""Compares runs: `zephyr compare`."""
