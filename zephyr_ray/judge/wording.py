"""Words every sentence about the result of a comparison."""

from typing import Any

from zephyr_ray.formatting import number, percent, signed
from zephyr_ray.judge.figures import left_out

EFFECTS = {
    1: ("helps", "the DPO term improves on plain SFT with the same answers"),
    -1: ("hurts", "the DPO term does worse than plain SFT with the same answers"),
    0: ("adds nothing measurable", "the DPO term adds nothing measurable on these prompts"),
}
"""Short and full wording of a difference from the control, by `direction`."""
NO_CONTROL = (
    "No control was run: plain SFT on the same chosen answers may do as well as the last model. "
    "configs/quickstart-full.yaml measures it."
)


def direction(low: float, high: float, even: float = 0.0) -> int:
    """Returns 1 if the interval is above `even`, -1 if it is below, 0 if it includes it."""
    return 1 if low > even else -1 if high < even else 0


def certainty(difference: dict[str, Any]) -> str:
    """Says whether the interval of a difference leaves room for chance."""
    above_or_below = direction(difference["low"], difference["high"])
    return "excludes 0" if above_or_below else "includes 0: may be chance"


def control_note(differences: list[dict[str, Any]], last: str, control: str) -> str:
    """Says how the last model compares with the control."""
    difference = _between(differences, last, control)
    if difference is None:
        return f"No rules judge scored {last} and {control}, so the DPO term is not isolated."
    _, effect = EFFECTS[direction(difference["low"], difference["high"])]
    return f"{last} against {control}, the control: pass rate {_difference(difference)}: {effect}."


def headline(result: dict[str, Any]) -> str:
    """Says how the last model compares with the baseline, and whether the DPO term adds to it.

    `result` is the content of result.json.
    """
    models, baseline, control = result["models"], result["baseline"], result["control"]
    trained = [model for model in models if model not in (baseline, control)]
    # The last model is the one whose differences were taken, if rules judged.
    subjects = [d["a"] for d in result["differences"]] + trained[::-1]
    last = next((model for model in subjects if model in trained), "")
    figures, before = models.get(last, {}), models.get(baseline, {})
    if not figures.get("prompts"):
        return ""
    text = f"{last} has {_win_rate(figures, baseline)}"
    if difference := _between(result["differences"], last, control):
        effect, _ = EFFECTS[direction(difference["low"], difference["high"])]
        text += f"; against {control}, the DPO term {effect}: pass rate {_difference(difference)}"
    text += "."
    if None not in (figures.get("pass_rate"), before.get("pass_rate")):
        text += (
            f" {percent(figures['pass_rate'])} of its answers pass the checks ({baseline}: "
            f"{percent(before['pass_rate'])}), in {number(figures['words'], 0)} words on average "
            f"({number(before['words'], 0)})."
        )
    return text


def _win_rate(figures: dict[str, Any], baseline: str) -> str:
    """Words the win rate and the prompts that it leaves out."""
    unread = figures.get("parse_failures", 0)
    readable, omitted = figures["prompts"] - unread, left_out(figures)
    prompts = readable + omitted
    if figures.get("win_rate") is None:
        return f"no win rate against {baseline}: no readable verdict (0 of {prompts} prompts)"
    text = (
        f"a win rate of {number(figures['win_rate'])} [{number(figures['low'])}, "
        f"{number(figures['high'])}] against {baseline} on {readable} held-out prompts"
    )
    causes = {"not answered by both": omitted - unread, "without a readable verdict": unread}
    if reasons := [f"{count} {cause}" for cause, count in causes.items() if count]:
        text += f" (of {prompts}, {' and '.join(reasons)})"
    if direction(figures["low"], figures["high"], even=0.5) == 0:
        text += ", which cannot be distinguished from no difference (0.50)"
    return text


def _between(differences: list[dict[str, Any]], a: str, b: str | None) -> dict[str, Any] | None:
    """Returns `a` minus `b`, whichever way round the difference was taken."""
    for entry in differences:
        mean, low, high = entry["pass_difference"], entry["low"], entry["high"]
        if (entry["a"], entry["b"]) == (a, b):
            return entry
        if (entry["b"], entry["a"]) == (a, b):
            return {"pass_difference": -mean, "low": -high, "high": -low}
    return None


def _difference(entry: dict[str, Any]) -> str:
    return f"{signed(entry['pass_difference'])} [{signed(entry['low'])}, {signed(entry['high'])}]"
