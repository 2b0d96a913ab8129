"""Writes the table of settings in the chart's README and the defaults for its templates, both from
values.yaml.

python helm/table_of_values.py [--check]
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).parent / "zephyr"
DEFAULTS = CHART / "files" / "defaults.yaml"
"""Helm gives templates neither values.yaml nor, without a warning, a link to it."""
HEADER = "# Written by make chart-docs from values.yaml, which templates cannot read.\n"
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
    values, readme = (CHART / "values.yaml").read_text(), CHART / "README.md"
    head, rest = readme.read_text().split(BEGIN)
    files = {
        readme: f"{head}{BEGIN}{table(values)}{END}{rest.split(END)[1]}",
        DEFAULTS: HEADER + yaml.safe_dump(yaml.safe_load(values), sort_keys=False),
    }
    if "--check" in sys.argv:
        return int(any(path.read_text() != text for path, text in files.items()))
    for path, text in files.items():
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
