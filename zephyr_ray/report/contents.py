"""What the report says, read from artifacts: plain values and plots for the template.

Everything here may be missing: a recipe may lack a stage, a model may lack answers.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from zephyr_ray.report import plots
from zephyr_ray.store import Artifact, read_jsonl

Inputs = dict[str, Artifact]
SAMPLES = 10
LONGEST_TEXT = 2000
CURVES = {
    "loss": "loss",
    "rewards/margins": "reward margin",
    "rewards/accuracies": "reward accuracy",
}
TROUBLE = ("dropped", "failed", "truncated", "flips", "parse_failures", "unparsable", "over_long")


class Palette(dict[str, str]):
    """One colour a model or stage, the same in every plot, given out in order of appearance."""

    def __missing__(self, name: str) -> str:
        self[name] = plots.COLOURS[len(self) % len(plots.COLOURS)]
        return self[name]


def evaluations(inputs: Inputs, colours: Palette) -> list[dict[str, Any]]:
    """One entry a pairwise stage: models with figures, plots, kinds of constraint, samples."""
    found = []
    for name, artifact in inputs.items():
        path = artifact.folder / "result.json"
        if artifact.manifest.kind != "pairwise" or not path.is_file():
            continue
        result = json.loads(path.read_text(encoding="utf-8"))
        models = result["models"]
        bars = {model: colours[model] for model in models}
        wins = [
            (m, figures["win_rate"], figures["low"], figures["high"])
            for m, figures in models.items()
            if m != result["baseline"] and _numbers(figures, "win_rate", "low", "high")
        ]
        passes = [
            (m, figures["pass_rate"], figures["pass_low"], figures["pass_high"])
            for m, figures in models.items()
            if _numbers(figures, "pass_rate", "pass_low", "pass_high")
        ]
        title = f"Win rate against {result['baseline']}"
        found.append(
            {
                **result,
                "stage": name,
                "judged_by": _model(artifact.manifest.models.get(result["judge"], {})),
                "prompts": max((m.get("prompts", 0) for m in models.values()), default=0),
                "plots": [
                    *([plots.interval_bars(title, wins, bars, 0.5)] if wins else []),
                    *([plots.interval_bars("Checks passed", passes, bars)] if passes else []),
                ],
                "constraints": _by_constraint(models),
                "samples": list(_samples(artifact, list(models))),
            }
        )
    return found


def headline(evaluation: dict[str, Any]) -> str:
    """One sentence: how the last model fares, and whether the DPO term beats the control.

    The differences are the last model's; the control is named by the result, or by its name.
    """
    models, baseline = evaluation["models"], evaluation["baseline"]
    differences = evaluation.get("differences", [])
    compared = {model for entry in differences for model in (entry["a"], entry["b"])}
    control = evaluation.get("control") or next(
        (m for m in sorted(compared) if "control" in m), None
    )
    trained = [m for m in models if m not in (baseline, control)]
    last = next((m for m in reversed(trained) if _numbers(models[m], "win_rate")), None)
    if differences and differences[0]["a"] in trained:
        last = differences[0]["a"]
    if last is None or not _numbers(models[last], "win_rate"):
        return ""
    figures = models[last]
    low, high = figures.get("low"), figures.get("high")
    text = f"{last} has a win rate of {figures['win_rate']:.2f}"
    if _numbers(figures, "low", "high"):
        text += f" [{low:.2f}, {high:.2f}]"
    text += f" against {baseline} on {figures.get('prompts', 0)} held-out prompts"
    if _numbers(figures, "low", "high") and low <= 0.5 <= high:
        text += ", which cannot be told from no difference (0.50)"
    for entry in differences:
        pair = {entry["a"]: 1, entry["b"]: -1}
        if {last, control} != set(pair):
            continue
        sign = pair[last]
        ends = sorted((sign * entry["low"], sign * entry["high"]))
        adds = "adds" if ends[0] > 0 else "costs" if ends[1] < 0 else "adds nothing certain"
        text += (
            f"; over {control}, the DPO term {adds}: {signed(sign * entry['pass_difference'])} "
            f"[{signed(ends[0])}, {signed(ends[1])}] of checks passed"
        )
        break
    text += "."
    before = models.get(baseline, {})
    if _numbers(figures, "pass_rate", "words") and _numbers(before, "pass_rate", "words"):
        text += (
            f" {figures['pass_rate']:.0%} of its answers pass the checks ({baseline}: "
            f"{before['pass_rate']:.0%}), in {figures['words']:.0f} words on average "
            f"({before['words']:.0f})."
        )
    return text


def curves(inputs: Inputs, colours: Palette) -> list[Any]:
    """Training figures; where a resumed run wrote a step twice, the later line counts."""
    drawn = []
    for name, artifact in _with_file(inputs, "metrics.jsonl"):
        by_step = {row["step"]: row for row in read_jsonl(artifact.folder / "metrics.jsonl")}
        for key, title in CURVES.items():
            points = [(s, r[key]) for s, r in sorted(by_step.items()) if _numbers(r, key)]
            if points:
                drawn.append(plots.curve(f"{name} · {title}", points, colours[name]))
    return drawn


def scores(inputs: Inputs, colours: Palette) -> list[dict[str, Any]]:
    """Score distributions a feedback stage, one plot a model."""
    found = []
    for name, artifact in inputs.items():
        if artifact.manifest.kind != "feedback":
            continue
        by_model: dict[str, list[float]] = {}
        unscored = 0
        for row in artifact.rows():
            for completion in row["completions"]:
                if _numbers(completion, "score"):
                    by_model.setdefault(completion["model"], []).append(completion["score"])
                else:
                    unscored += 1
        top = max((s.count(v) for s in by_model.values() for v in s), default=0)
        drawn = [plots.histogram(m, s, top, colours[m]) for m, s in by_model.items()]
        if drawn:
            found.append({"stage": name, "plots": drawn, "unscored": unscored})
    return found


def stages(inputs: Inputs) -> list[dict[str, Any]]:
    """Every stage with its counts, settings, reads and what went wrong in it."""
    found = []
    for name, artifact in inputs.items():
        manifest = artifact.manifest
        counts = manifest.counts
        trouble = {k: v for k, v in counts.items() if k.startswith(TROUBLE)}
        examples = manifest.examples
        found.append(
            {
                "name": name,
                **{k: getattr(manifest, k) for k in ("kind", "key", "seconds", "attempts")},
                "created": manifest.created[:16].replace("T", " "),
                "settings": {k: _text(v) for k, v in manifest.settings.items()}
                | {f"model {n}": _model(spec) for n, spec in manifest.models.items()},
                "reads": manifest.reads,
                "rows": counts.get("rows"),
                "counts": {k: v for k, v in counts.items() if k != "rows" and k not in trouble},
                "metrics": {},
                "trouble": [
                    {"what": k, "count": trouble.get(k), "examples": _texts(examples.get(k, []))}
                    for k in sorted({*trouble, *examples})
                    if trouble.get(k) or examples.get(k)
                ],
            }
        )
    return found


def wall_time(rows: list[dict[str, Any]]) -> Any:
    items = [(r["name"], r["seconds"], duration(r["seconds"])) for r in rows if r["seconds"]]
    return plots.time_bars(items, plots.COLOURS[0]) if items else None


def proofs(inputs: Inputs) -> list[dict[str, str]]:
    """The coloured loss masks, as the training stages wrote them."""
    return [
        {"stage": name, "html": (artifact.folder / "mask.html").read_text(encoding="utf-8")}
        for name, artifact in _with_file(inputs, "mask.html")
    ]


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def number(value: Any, digits: int = 2) -> str:
    """A figure for people: whole numbers with thousands apart, `digits` decimals, – for none."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return "–" if value is None else str(value)
    if float(value).is_integer() and not (0 <= value <= 1 and isinstance(value, float)):
        return f"{int(value):,}".replace(",", "\u202f")
    return f"{value:.{digits}f}"


def signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def _by_constraint(models: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of the table kind of constraint x model, the most frequent kind first."""
    tables = {m: figures.get("by_constraint") or {} for m, figures in models.items()}
    prompts: dict[str, int] = {}
    for table in tables.values():
        for kind, cell in table.items():
            prompts[kind] = max(prompts.get(kind, 0), cell.get("prompts", 0))
    return [
        {
            "kind": kind,
            "prompts": count,
            "rates": [table.get(kind, {}).get("pass_rate") for table in tables.values()],
        }
        for kind, count in sorted(prompts.items(), key=lambda item: (-item[1], item[0]))
    ]


def _samples(artifact: Artifact, models: list[str]) -> Iterator[dict[str, Any]]:
    """The prompts whose ids have the smallest hashes: nobody chose them for their answers."""
    rows = artifact.rows() if (artifact.folder / "rows.jsonl").is_file() else []
    rows.sort(key=lambda row: hashlib.sha256(str(row["id"]).encode()).hexdigest())
    for row in rows[:SAMPLES]:
        answers = []
        for model in [m for m in models if m in row["answers"]]:
            answer, verdict = row["answers"][model], row.get("verdicts", {}).get(model, {})
            answers.append(
                {
                    "model": model,
                    "text": _cut(answer.get("text") or ""),
                    "finish_reason": answer.get("finish_reason"),
                    "score": answer.get("score"),
                    "reason": _cut(answer.get("reason") or ""),
                    "outcome": {1: "win", 0.5: "tie", 0: "loss"}.get(verdict.get("verdict")),
                    "verdict_reason": _cut(verdict.get("reason") or ""),
                }
            )
        yield {"id": row["id"], "prompt": _cut(row["prompt"]), "answers": answers}


def _model(spec: dict[str, Any]) -> str:
    """A model in a line: what it is and how answers are drawn from it."""
    weights = Path(spec.get("weights") or "")
    trained = weights.name == "model"  # of an artifact: its name says which
    parts = [weights.parent.name if trained else str(spec.get("weights") or "")]
    parts += [str(spec.get(k) or "") for k in ("engine", "model", "base_url")]
    if spec.get("relevance"):
        parts.append(f"on topic by {Path(spec['relevance']).name} ≥ {spec['relevance_min']}")
    if spec.get("engine") in ("vllm", "openai"):
        parts.append(f"temperature {spec['temperature']}, top_p {spec['top_p']}")
    if spec.get("demonstrations"):
        parts.append("with worked examples")
    return ", ".join(part for part in parts if part)


def _with_file(inputs: Inputs, name: str) -> list[tuple[str, Artifact]]:
    return [(n, a) for n, a in inputs.items() if (Path(a.folder) / name).is_file()]


def _numbers(row: dict[str, Any], *names: str) -> bool:
    return all(isinstance(row.get(name), int | float) for name in names)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _texts(values: list[Any]) -> list[str]:
    return [_cut(_text(value)) for value in values]


def _cut(text: str) -> str:
    more = len(text) - LONGEST_TEXT
    return text if more <= 0 else f"{text[:LONGEST_TEXT]} … ({more} more characters)"
