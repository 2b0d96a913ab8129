"""Words the sentences about the result of a comparison, each in this one place.

A result is the content of result.json; one written by an earlier version may lack parts.
"""

from typing import Any

from zephyr_ray.formatting import number, percent, signed

EFFECTS = {
    1: ("adds", "the DPO term adds to what the same answers teach by plain SFT"),
    -1: ("costs", "the DPO term does harm next to plain SFT on the same answers"),
    0: ("adds nothing certain", "the DPO term adds nothing that these prompts can show"),
}
"""What a difference to the control means, in short and in full, by `direction`."""
NO_CONTROL = (
    "No control was run: plain SFT on the same chosen answers may do as well as the last model. "
    "configs/quickstart-full.yaml measures it."
)


def direction(low: float, high: float, even: float = 0.0) -> int:
    """Returns 1 if the interval is above `even`, -1 if it is below, 0 if it holds it."""
    return 1 if low > even else -1 if high < even else 0


def certainty(difference: dict[str, Any]) -> str:
    """Says whether the interval of a difference leaves room for chance."""
    above_or_below = direction(difference["low"], difference["high"])
    return "excludes 0" if above_or_below else "holds 0: may be chance"


def control_note(differences: list[dict[str, Any]], last: str, control: str) -> str:
    """Says what the last model has over the control."""
    difference = next((d for d in differences if d["b"] == control), None)
    if difference is None:
        return f"No rule judged {last} and {control}, so the DPO term is not isolated."
    _, effect = EFFECTS[direction(difference["low"], difference["high"])]
    return f"{last} against {control}, the control: pass rate {_difference(difference)}: {effect}."


def headline(result: dict[str, Any]) -> str:
    """Says how the last model compares with the baseline, and whether the DPO term adds to it."""
    models, baseline = result["models"], result["baseline"]
    last, control = _last(result), _control(result)
    if last is None:
        return ""
    figures, before = models[last], models.get(baseline, {})
    text = _win_rate(last, figures, baseline)
    difference = _between(result, last, control)
    if difference:
        effect, _ = EFFECTS[direction(difference["low"], difference["high"])]
        text += (
            f"; over {control}, the DPO term {effect}: {_difference(difference)} of checks passed"
        )
    text += "."
    if _known(figures, "pass_rate", "words") and _known(before, "pass_rate", "words"):
        text += (
            f" {percent(figures['pass_rate'])} of its answers pass the checks ({baseline}: "
            f"{percent(before['pass_rate'])}), in {number(figures['words'], 0)} words on average "
            f"({number(before['words'], 0)})."
        )
    return text


def _win_rate(model: str, figures: dict[str, Any], baseline: str) -> str:
    text = f"{model} has a win rate of {number(figures['win_rate'])}"
    interval = _known(figures, "low", "high")
    if interval:
        text += f" [{number(figures['low'])}, {number(figures['high'])}]"
    text += f" against {baseline} on {figures.get('prompts', 0)} held-out prompts"
    if interval and direction(figures["low"], figures["high"], even=0.5) == 0:
        text += ", which cannot be distinguished from no difference (0.50)"
    return text


def _last(result: dict[str, Any]) -> str | None:
    """The model that the result is about: the one whose differences were taken."""
    models, control = result["models"], _control(result)
    trained = [m for m in models if m not in (result["baseline"], control)]
    differences = result.get("differences", [])
    if differences and differences[0]["a"] in trained:
        last: str = differences[0]["a"]
        return last if _known(models[last], "win_rate") else None
    return next((m for m in reversed(trained) if _known(models[m], "win_rate")), None)


def _control(result: dict[str, Any]) -> str | None:
    """The control; a result that does not name it may have a model that is called so."""
    differences = result.get("differences", [])
    compared = {model for entry in differences for model in (entry["a"], entry["b"])}
    called: str | None = next((m for m in sorted(compared) if "control" in m), None)
    return result.get("control") or called


def _between(result: dict[str, Any], a: str, b: str | None) -> dict[str, Any] | None:
    """The difference of `a` over `b`, whichever way round the result has it."""
    for entry in result.get("differences", []):
        if (entry["a"], entry["b"]) == (a, b):
            return dict(entry)
        if (entry["b"], entry["a"]) == (a, b):
            return {
                "pass_difference": -entry["pass_difference"],
                "low": -entry["high"],
                "high": -entry["low"],
            }
    return None


def _difference(entry: dict[str, Any]) -> str:
    return f"{signed(entry['pass_difference'])} [{signed(entry['low'])}, {signed(entry['high'])}]"


def _known(figures: dict[str, Any], *names: str) -> bool:
    return all(figures.get(name) is not None for name in names)
