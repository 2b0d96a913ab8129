"""Builds what a finished training stage contributes to the report."""

from collections.abc import Iterator

from zephyr_ray.section import Chapter, Curve, Document, Place, Section
from zephyr_ray.store import Artifact, read_jsonl

CURVES = {
    "loss": "loss",
    "rewards/margins": "reward margin",
    "rewards/accuracies": "reward accuracy",
}
"""Titles of the metrics that are drawn."""
REWARDS = (
    "Reward margin and accuracy are measured on the training pairs; they say nothing about "
    "held-out quality."
)
MASK = "Which tokens the loss counts, as the training stage saw them."


def training_section(artifact: Artifact) -> Section:
    """Returns the curves of metrics.jsonl and the loss mask of mask.html."""
    chapters = []
    if curves := tuple(_curves(artifact)):
        intro = REWARDS if any(curve.title.startswith("reward") for curve in curves) else ""
        chapters.append(Chapter("Training", Place.PROCESS, curves, intro))
    mask = artifact.folder / "mask.html"
    if mask.is_file():
        page = Document(mask.read_text(encoding="utf-8"))
        chapters.append(Chapter("Loss mask", Place.APPENDIX, (page,), MASK))
    return Section(tuple(chapters))


def _curves(artifact: Artifact) -> Iterator[Curve]:
    """If a resumed run wrote a step twice, the later line counts."""
    by_step = {row["step"]: row for row in read_jsonl(artifact.folder / "metrics.jsonl")}
    for name, title in CURVES.items():
        steps = sorted(by_step.items())
        if points := tuple((step, row[name]) for step, row in steps if name in row):
            yield Curve(title, points)
