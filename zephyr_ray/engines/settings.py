"""Defines the settings that all engines share, and what each engine declares.

An engine is one file: a subclass of `ModelSettings` with its settings in a recipe, and the code
that answers. Behavior that depends on the engine is a method of its settings; no other code
compares engine names."""

from typing import Annotated, Any, ClassVar, Protocol

from pydantic import Field

from zephyr_ray.demand import Calls
from zephyr_ray.models.contract import Ask
from zephyr_ray.models.shapes import Shape
from zephyr_ray.settings import OPERATIONAL, Strict, not_in_key

SHARED_IDENTITY = {
    "weights": None,
    "temperature": 0.7,
    "top_p": 0.95,
    "demonstrations": None,
    "model": None,
    "relevance": None,
    "relevance_min": 0.3,
    "context": 2048,
}
"""Values that stand in for settings that an engine lacks, because content keys hash these names for
every engine."""
PER_ANSWER = {"temperature", "top_p", "demonstrations", "actors", "concurrency", "price"}
"""Settings that may differ between models that share one running engine."""


class Engine(Protocol):
    """A running engine."""

    def ask_for(self, model: Any, row: dict[str, Any]) -> Ask:
        """Returns the `Ask` of one row, with the sampling and demonstrations of `model`."""


class ModelSettings(Strict):
    """Settings of one model of the recipe."""

    uses: ClassVar[frozenset[str]]
    """Uses that a stage may make of the model: "weights" (train), "model" (answer), "judge"."""
    calls_counted: ClassVar[bool] = True
    """Whether the plan counts calls; False for an engine that runs no model."""
    metered: ClassVar[bool] = False
    """Whether calls cost money."""
    served: ClassVar[bool] = True
    """Whether `zephyr serve` may host it as the judge."""
    serve_cpus: ClassVar[int] = 1
    """CPUs that Serve reserves for the engine as a judge."""

    engine: str
    actors: Annotated[int, OPERATIONAL] = Field(1, ge=1)
    """Number of processes, each with its own engine."""
    concurrency: Annotated[int, OPERATIONAL] = Field(64, ge=1)
    """Maximum rows in flight per actor."""

    @property
    def gpus_per_actor(self) -> float:
        """GPUs per actor; a fraction shares one."""
        return 0.0

    def start(self, seed: int) -> Engine:
        """Starts the engine in this process. Weights are folders, packaged names or hub ids."""
        raise NotImplementedError

    def identity(self) -> dict[str, Any]:
        """Returns the settings that determine an answer, for content keys."""
        return SHARED_IDENTITY | self.model_dump(mode="json", exclude=not_in_key(self))

    def process_identity(self) -> str:
        """Returns the settings in which models must agree to share one running engine."""
        return self.model_dump_json(exclude=PER_ANSWER)

    def judges(self, form: str) -> bool:
        """Returns whether the model can judge with this form of `judges.FORMS`."""
        return "judge" in self.uses

    def environment_variables(self) -> list[str]:
        """Returns the names of the environment variables that the engine reads."""
        return []

    def preflight(self) -> None:
        """Raises Permanent if a user must change something before the engine can start."""

    def memory(self, shape: Shape | None) -> float:
        """Returns the bytes of host memory per actor; `shape` is the model's, None if unknown."""
        return 0.0

    def limit(self, shape: Shape | None) -> int | None:
        """Returns the maximum tokens of prompt and answer together, None if unknown; `shape` is the
        model's. Raises Permanent if a setting exceeds the model's limit."""
        return None

    def dollars(self, calls: Calls) -> float | None:
        """Returns the price of the calls in dollars; None if no price is set."""
        return None

    def describe_memory(self, shape: Shape, gpu_gib: float | None) -> str:
        """Returns a line about weights and KV cache for the plan; empty if the engine holds none.
        `gpu_gib` is the memory per GPU in GiB, None if it is not stated."""
        return ""
