"""A model of the recipe: its settings, and the model made ready to start."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field

from zephyr_ray.settings import FILE, OPERATIONAL, Strict


class ModelSpec(Strict):
    """One model of the recipe: who answers, and how answers are drawn from it."""

    weights: str | None = None
    """A packaged name, a hub id, a folder, or the name of a stage that trains a model."""
    engine: Literal["vllm", "openai", "rules", "service"] = "vllm"
    """`service` is the judge of `zephyr serve` at `base_url`."""
    temperature: float = Field(0.7, ge=0)
    """The paper samples for evaluation at temperature 0.7, top-p 0.95 (arXiv 2310.16944)."""
    top_p: float = Field(0.95, gt=0, le=1)
    demonstrations: Annotated[str | None, FILE] = None
    """JSONL of worked examples, shown before a prompt that carries the same kind of constraint."""
    model: str | None = None
    base_url: Annotated[str | None, OPERATIONAL] = None
    api_key_env: Annotated[str | None, OPERATIONAL] = None
    """The name of the environment variable that holds the key, never the key."""
    relevance: str | None = None
    """`rules` only: weights of a sentence encoder; an answer must be on topic to pass."""
    relevance_min: float = 0.3
    """Cosine similarity of prompt and answer from which an answer counts as on topic."""
    actors: Annotated[int, OPERATIONAL] = Field(1, ge=1)
    gpus: Annotated[float, OPERATIONAL] = Field(0, ge=0)
    """GPUs of one actor."""
    concurrency: Annotated[int, OPERATIONAL] = Field(64, ge=1)
    """Rows in flight on one actor."""
    context: int = Field(2048, ge=16)
    """Tokens of prompt and answer together; a longer conversation is a failed row."""
    price: Annotated[tuple[float, float] | None, OPERATIONAL] = None
    """Dollars for a million tokens of prompts and of answers, for the plan."""


@dataclass(frozen=True)
class Model:
    """A model ready to be started anywhere: its settings and where its weights lie.

    `weights` is a folder on shared storage, or a name that `models.weights.resolve` knows.
    """

    name: str
    spec: ModelSpec
    weights: str
    demonstrations: list[dict[str, Any]] = field(default_factory=list)
    """Rows of the demonstrations file, each with a "prompt" made of instruction and constraint."""
