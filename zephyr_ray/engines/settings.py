"""The settings that every engine shares, and what an engine says about itself.

An engine is one file: a subclass of `ModelSettings` with the settings of a recipe, beside the code
that answers. Whatever depends on the engine is asked of its settings; nothing compares its name.
"""

from typing import Annotated, Any, ClassVar, Protocol

from pydantic import Field

from zephyr_ray.demand import Calls
from zephyr_ray.models.contract import Ask
from zephyr_ray.models.shapes import Shape
from zephyr_ray.settings import OPERATIONAL, Strict

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
"""What the identity of an engine holds for a setting that it does not have: content keys hash these
names for every engine."""
PER_ANSWER = {"temperature", "top_p", "demonstrations", "actors", "concurrency", "price"}
"""Settings in which models that share one running engine may differ."""


class Engine(Protocol):
    """A started engine: it gives each row what its program asks."""

    def ask_for(self, model: Any, row: dict[str, Any]) -> Ask:
        """Returns the `ask` of one row, answered as the `Model` says."""


class ModelSettings(Strict):
    """How one model of the recipe is started and asked."""

    uses: ClassVar[frozenset[str]]
    """What a stage may use the model for: "weights" to train, "model" to answer, "judge"."""
    calls_counted: ClassVar[bool] = True
    """Whether the plan counts calls; False for an engine that answers by code."""
    metered: ClassVar[bool] = False
    """Whether calls are paid for."""
    served: ClassVar[bool] = True
    """Whether `zephyr serve` may host it as the judge."""
    serve_cpus: ClassVar[int] = 1
    """CPUs reserved for the engine as a served judge."""

    engine: str
    actors: Annotated[int, OPERATIONAL] = Field(1, ge=1)
    """Processes, each with an engine of its own."""
    concurrency: Annotated[int, OPERATIONAL] = Field(64, ge=1)
    """Rows in flight per actor."""

    @property
    def gpus_per_actor(self) -> float:
        return 0.0

    def start(self, seed: int) -> Engine:
        """Starts the engine in this process. Weights are folders, packaged names or hub ids."""
        raise NotImplementedError

    def identity(self) -> dict[str, Any]:
        """Returns the settings that decide an answer, for content keys."""
        operational = {
            name for name, field in type(self).model_fields.items() if OPERATIONAL in field.metadata
        }
        return SHARED_IDENTITY | self.model_dump(mode="json", exclude=operational)

    def process_identity(self) -> str:
        """Returns what models must agree in to share one running engine."""
        return self.model_dump_json(exclude=PER_ANSWER)

    def judges(self, form: str) -> bool:
        """Returns whether the model can judge by this form."""
        return "judge" in self.uses

    def variables(self) -> list[str]:
        """Returns the names of the environment variables that the engine reads."""
        return []

    def preflight(self) -> None:
        """Raises Permanent if a user must change something before the engine can start."""

    def memory(self, shape: Shape | None) -> float:
        """Returns bytes of host memory per actor; `shape` is the model's, if it is known."""
        return 0.0

    def dollars(self, calls: Calls) -> float | None:
        """Returns the price of so many calls, or None if it is not stated."""
        return None

    def describe_memory(self, shape: Shape, gpu_gib: float | None) -> str:
        """Returns one line about weights and KV cache for the plan; empty if nothing is held
        here. `gpu_gib` is the memory of one GPU in GiB, if it is stated."""
        return ""
