"""Writes every sentence about the result of a comparison."""

from collections.abc import Iterator
from typing import Any

from zephyr_ray.formatting import number, percent, signed, with_interval
from zephyr_ray.judge.figures import left_out, read
from zephyr_ray.judge.length_control import MIN_PROMPTS, length_may_explain_verdicts, moves_far

EFFECTS = {
    1: ("helps", "the DPO term improves on plain SFT with the same answers"),
    -1: ("hurts", "the DPO term does worse than plain SFT with the same answers"),
    0: ("adds nothing measurable", "the DPO term adds nothing measurable on these prompts"),
}
"""Short and full wording of a difference from the control, by `direction`."""
NO_CONTROL = (
    "No control was run: if DPO trained the last model, plain SFT on the same chosen answers may "
    "do as well. configs/ablation.yaml measures it."
)
DIFFERENCES = (
    ("win_differences", "win_difference", "win rate"),
    ("differences", "pass_difference", "checks passed"),
)
"""Lists of differences between models in result.json, the name of their value, and the figure that
differs; the first known value is used."""
ENOUGH_QUESTIONS = 10
"""Questions below which a headline warns that intervals are too narrow."""


def direction(low: float, high: float, even: float = 0.0) -> int:
    """Returns 1 if the interval is above `even`, -1 if it is below, 0 if it includes it."""
    return 1 if low > even else -1 if high < even else 0


def few_questions(questions: int) -> str:
    """Returns a warning to end a headline with; empty if there are enough questions."""
    few = questions < ENOUGH_QUESTIONS
    return " The intervals are too narrow, because there are few questions." if few else ""


def certainty(difference: dict[str, Any]) -> str:
    """Says whether the interval of a difference leaves room for chance."""
    above_or_below = direction(difference["low"], difference["high"])
    return "excludes 0" if above_or_below else "includes 0: may be chance"


def control_note(result: dict[str, Any]) -> str:
    """Says how the last model compares with the control; empty without one of them."""
    control, (_, last) = result["control"], _subjects(result)
    if not control or not last:
        return ""
    if (effect_of_dpo := _against(result, last, control)) is None:
        return f"{last} and {control} have no verdicts in common, so the DPO term is not isolated."
    difference, sign = effect_of_dpo
    _, effect = EFFECTS[sign]
    return f"{last} against {control}, the control: {difference}: {effect}."


def headline(result: dict[str, Any]) -> str:
    """Says which model to ship and how sure that is, in at most two sentences.

    `result` is the content of result.json. The headline is about the model with the highest
    win rate; among equal ones, the last.
    """
    models, baseline = result["models"], result["baseline"]
    subject, last = _subjects(result)
    figures, before = models.get(subject, {}), models.get(baseline, {})
    if not figures.get("prompts"):
        return ""
    text = f"{_verdict(subject, figures, baseline)}{_win_rate(figures, baseline)}"
    text += f"{_lead(result, subject)}."
    facts = []
    control = result["control"]
    if effect_of_dpo := _against(result, last, control):
        difference, sign = effect_of_dpo
        effect, _ = EFFECTS[sign]
        of = f" of {last}" if last != subject else ""
        facts.append(f"against {control}, the DPO term{of} {effect}: {difference}")
    if None not in (figures.get("pass_rate"), before.get("pass_rate")):
        facts.append(
            f"{percent(figures['pass_rate'])} of {subject}'s answers pass the checks ({baseline}: "
            f"{percent(before['pass_rate'])}), in {number(figures['words'], 0)} words on average "
            f"({number(before['words'], 0)})"
        )
    if facts:
        text += f" {facts[0][0].upper()}{'; '.join(facts)[1:]}."
    return text


def length_notes(result: dict[str, Any]) -> Iterator[str]:
    """Yields AlpacaEval's warning for each rate that length control moves far, and why a model has
    no rate at equal length."""
    for model, figures in result["models"].items():
        if model == result["baseline"]:
            continue
        if obstacle := figures.get("length_control_obstacle"):
            yield f"{model} has no win rate at equal length: {obstacle}."
        elif _moves_far(figures):
            yield (
                f"Warning: length control moves the win rate of {model} from "
                f"{number(figures['win_rate'])} to {number(figures['length_controlled'])}. Either "
                "length decided many verdicts, or the estimate at equal length is unreliable."
            )


def _subjects(result: dict[str, Any]) -> tuple[str, str]:
    """Returns the model with the highest win rate, and the last trained model; empty for none."""
    models, baseline, control = result["models"], result["baseline"], result["control"]
    trained = [model for model in models if model not in (baseline, control)]
    # If rules judged, "differences" are those of the last model.
    order = [d["a"] for d in result["differences"] if d["a"] in trained] + trained[::-1]
    last = next(iter(order), "")
    candidates = [model for model in (*order, control) if models.get(model, {}).get("prompts")]
    best = max(candidates, key=lambda model: models[model].get("win_rate") or 0, default="")
    return best, last


def _verdict(model: str, figures: dict[str, Any], baseline: str) -> str:
    """Returns the start of the headline, up to the win rate."""
    if figures.get("win_rate") is None:
        return f"{model} has "
    if read(figures) < MIN_PROMPTS:
        # Over so few prompts, an interval may have no width, although nothing is known.
        return f"Too few prompts to choose a model (below {MIN_PROMPTS}): the best, {model}, has "
    outcome = direction(figures["low"], figures["high"], even=0.5)
    if outcome < 0:
        return f"Ship {baseline}: the best of the other models, {model}, has "
    if outcome == 0:
        return f"No model is clearly better than {baseline}: the best, {model}, has "
    if figures.get("length_controlled") is None:
        obstacle = figures.get("length_control_obstacle") or ""
        is_better = not length_may_explain_verdicts(obstacle)
    else:
        ends = figures["length_controlled_low"], figures["length_controlled_high"]
        is_better = direction(*ends, even=0.5) > 0
    if is_better:
        return f"Ship {model}: it has "
    return f"{model} leads, but perhaps only by the length of its answers: it has "


def _win_rate(figures: dict[str, Any], baseline: str) -> str:
    """Describes the win rate, the prompts that it leaves out, and the rate at equal length."""
    unread = figures.get("parse_failures", 0)
    readable, omitted = read(figures), left_out(figures)
    prompts = readable + omitted
    if figures.get("win_rate") is None:
        return f"no win rate against {baseline}: no readable verdict (0 of {prompts} prompts)"
    text = (
        f"a win rate of {with_interval(figures['win_rate'], figures['low'], figures['high'])} "
        f"against {baseline} on {readable} held-out "
        f"{'prompt' if readable == 1 else 'prompts'}"
    )
    causes = {"not answered by both": omitted - unread, "without a readable verdict": unread}
    if reasons := [f"{count} {cause}" for cause, count in causes.items() if count]:
        text += f" (of {prompts}, {' and '.join(reasons)})"
    if direction(figures["low"], figures["high"], even=0.5) == 0:
        text += ", which cannot be distinguished from no difference (0.50)"
    if (rate := figures.get("length_controlled")) is not None:
        low, high = figures["length_controlled_low"], figures["length_controlled_high"]
        far = " (a move that AlpacaEval warns about)" if _moves_far(figures) else ""
        text += f", {with_interval(rate, low, high)} at equal length{far}"
    return text


def _lead(result: dict[str, Any], model: str) -> str:
    """Says how far the best model is ahead of the next; empty if unknown."""
    leads = list(_differences(result.get("win_differences", []), "win_difference", model))
    if not leads:
        return ""
    near = [lead for lead in leads if lead[2] <= 0]
    other, mean, low, high = min(near or leads, key=lambda lead: lead[1])
    amount = with_interval(mean, low, high, signed)
    if not near:
        return f"; it beats {other}, the next, by {amount}"
    more = f", nor than {len(near) - 1} more" if len(near) > 1 else ""
    return f"; it is not clearly better than {other} ({amount}){more}"


def _moves_far(figures: dict[str, Any]) -> bool:
    rate = figures.get("length_controlled")
    return rate is not None and moves_far(figures["win_rate"], rate)


def _against(result: dict[str, Any], model: str, control: str | None) -> tuple[str, int] | None:
    """Describes a model's difference from the control, in win rate or else in checks passed,
    and returns its `direction` too; None if neither is known."""
    figures = result["models"].get(model, {})
    if control == result["baseline"] and figures.get("win_rate") is not None:
        # A win rate of one half is no difference from the baseline.
        ends = (figures[name] - 0.5 for name in ("win_rate", "low", "high"))
        return _worded(DIFFERENCES[0][2], *ends)
    for listed, name, figure in DIFFERENCES:
        for other, mean, low, high in _differences(result.get(listed, []), name, model):
            if other == control:
                return _worded(figure, mean, low, high)
    return None


def _worded(figure: str, mean: float, low: float, high: float) -> tuple[str, int]:
    return f"{figure} {with_interval(mean, low, high, signed)}", direction(low, high)


def _differences(
    entries: list[dict[str, Any]], name: str, model: str
) -> Iterator[tuple[str, float, float, float]]:
    """Yields a model's differences from others as (other, mean, low, high), whichever way round
    they were taken."""
    for entry in entries:
        mean, low, high = entry[name], entry["low"], entry["high"]
        if entry["a"] == model:
            yield entry["b"], mean, low, high
        elif entry["b"] == model:
            yield entry["a"], -mean, -high, -low
