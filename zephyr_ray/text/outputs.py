"""Reads a model's published answers, in AlpacaEval's model_outputs format, as completions.

The file is a list of objects (or JSONL, or Parquet) with `instruction`, `output` and `generator`,
the model's name; `finish_reason` and `tokens`, which `zephyr export` adds, are optional.
"""

from pathlib import Path
from typing import Annotated, Any

from zephyr_ray.errors import Permanent
from zephyr_ray.formatting import shorten
from zephyr_ray.messages import visible
from zephyr_ray.published_files import located_rows
from zephyr_ray.settings import FILE, Reads
from zephyr_ray.stage import BoundedStage, Stage, Work

FIELDS = ("instruction", "output", "generator")
FORMATS = (".json", ".jsonl", ".parquet")
NO_ANSWER = "no answer in the file"
NO_PROMPT = "unused/instruction of no prompt"
REPEATED = "unused/another answer to an instruction"
EXAMPLE = 100
"""Maximum characters of a text in an example."""

Row = dict[str, Any]


class Outputs(BoundedStage):
    """Joins the answers of a file to `prompts` by the text of the instruction, ignoring whitespace,
    so that any published model can be compared."""

    kind = "outputs"
    makes = "completions"
    limits = "The limits of the published answers apply; see their own source."

    prompts: Annotated[str, Reads("prompts")]
    file: Annotated[str, FILE]

    def check(self, files: dict[str, Path], reads: dict[str, Stage]) -> None:
        read_outputs(files["file"])

    def run(self, work: Work) -> None:
        prompts, path = work.inputs[self.prompts].rows(), work.files["file"]
        answers = _by_text(read_outputs(path), "instruction")
        asked = _by_text(prompts, "prompt")
        if answers.keys().isdisjoint(asked):
            [(first, *_), *_] = answers.values()
            fix = "make the prompts from the same instructions"
            if not answers.keys().isdisjoint(_by_text(prompts, "instruction")):
                fix = (
                    "the prompts are its instructions with a constraint added; set constrained: 0 "
                    "in the stage that makes the prompts"
                )
            raise Permanent(
                f"stage '{work.name}': no prompt of '{self.prompts}' is an instruction of {path}, "
                f"such as {shorten(first['instruction'], EXAMPLE)!r}; {fix}"
            )
        for text, own in answers.items():
            for answer in own[len(asked.get(text, ())) :]:
                rule = REPEATED if text in asked else NO_PROMPT
                work.count(rule, shorten(answer["instruction"], EXAMPLE))
        completions: dict[str, Row] = {}
        for text, same in asked.items():
            for number, prompt in enumerate(same):
                # Prompts with one text get its answers in order; the last answer serves the rest.
                if own := answers.get(text, []):
                    completions[prompt["id"]] = _completion(own[min(number, len(own) - 1)])
                else:
                    work.drop(NO_ANSWER, shorten(prompt["prompt"], EXAMPLE))
        work.check_dropped(len(prompts))
        model = next(iter(completions.values()))["model"]
        work.counts |= {"answers": len(completions), f"made/{model}": len(completions)}
        if empty := sum(not visible(completion["text"]) for completion in completions.values()):
            work.counts["empty"] = empty
        work.write_rows(
            {**prompt, "completions": [completions[prompt["id"]]]}
            for prompt in prompts
            if prompt["id"] in completions
        )


def read_outputs(path: Path) -> list[Row]:
    """Returns the rows of a file. Raises Permanent if one lacks a field, or if several models wrote
    the answers."""
    if path.suffix not in FORMATS:
        formats = f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
        raise Permanent(f"{path} is not a {formats} file; convert it")
    rows: list[Row] = []
    for where, row in located_rows(path):
        for field in FIELDS:
            # An answer may be empty; an instruction or a name may not.
            if not isinstance(row.get(field), str) or not (field == "output" or row[field].strip()):
                raise Permanent(f'{where}: "{field}" is not a text; correct it')
        if rows and row["generator"] != rows[0]["generator"]:
            raise Permanent(
                f"{where}: the generator is '{row['generator']}', but "
                f"'{rows[0]['generator']}' in the rows before it; write one file per generator"
            )
        rows.append(row)
    if not rows:
        raise Permanent(f"{path} has no answers; name another file")
    return rows


def _by_text(rows: list[Row], column: str) -> dict[str, list[Row]]:
    """Returns the rows by the text of a column, ignoring whitespace."""
    by_text: dict[str, list[Row]] = {}
    for row in rows:
        by_text.setdefault(" ".join(row[column].split()), []).append(row)
    return by_text


def _completion(output: Row) -> Row:
    reason, tokens = output.get("finish_reason"), output.get("tokens")
    return {
        "model": output["generator"],
        "principle": None,
        "system": None,
        "text": output["output"],
        # Published answers rarely state whether they were cut, so they count as complete.
        "finish_reason": reason if isinstance(reason, str) else "stop",
        "tokens": tokens if isinstance(tokens, int) else None,
    }
