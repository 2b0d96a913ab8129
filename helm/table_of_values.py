"""Writes the table of settings in the chart's README from the comments in values.yaml.

python helm/table_of_values.py [--check]
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).parent / "zephyr"
BEGIN, END = "<!-- values: begin -->\n", "<!-- values: end -->\n"
KEY = re.compile(r"^( *)([A-Za-z][\w-]*):")


def rows(text: str) -> list[tuple[str, str, str]]:
    """Returns (name, default, meaning) of every setting; the meaning is the comment above it."""
    values = yaml.safe_load(text)
    settings: list[tuple[str, str, str]] = []
    path: list[tuple[int, str]] = []
    comment: list[str] = []
    for line in text.splitlines():
        stripped = line.strip()
        if stripped.startswith("#"):
            if not stripped.startswith("# ---"):
                comment.append(stripped.removeprefix("#").removeprefix(" "))
        elif not stripped:
            comment = []
        elif key := KEY.match(line):
            indent = len(key[1])
            path = [part for part in path if part[0] < indent] + [(indent, key[2])]
            names = [name for _, name in path]
            default = _at(values, names)
            meaning = _sentences(comment)
            if not isinstance(default, dict) or not default:
                settings.append((".".join(names), json.dumps(default), meaning))
            elif meaning:
                settings.append((".".join(names), "", meaning))
            comment = []
    return settings


def table(text: str) -> str:
    """Returns the Markdown table of all settings."""
    lines = ["| setting | default | meaning |", "|---|---|---|"]
    for setting, default, meaning in rows(text):
        shown = f"`{default}`" if default else ""
        lines.append(f"| `{setting}` | {shown} | {meaning.replace('|', chr(92) + '|')} |")
    return "\n".join(lines) + "\n"


def _at(values: Any, names: list[str]) -> Any:
    for name in names:
        values = values[name]
    return values


def _sentences(comment: list[str]) -> str:
    """Joins a comment into one line; indented lines are examples and become code."""
    text, before = "", False
    for line in comment:
        example = line.startswith("  ")
        line = " ".join(line.split())
        text += (", " if before else "<br>") + f"`{line}`" if example else f" {line}"
        before = example
    return text.strip()


def main() -> int:
    readme = CHART / "README.md"
    before = readme.read_text()
    head, rest = before.split(BEGIN)
    tail = rest.split(END)[1]
    after = f"{head}{BEGIN}{table((CHART / 'values.yaml').read_text())}{END}{tail}"
    if "--check" in sys.argv:
        return int(before != after)
    readme.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
