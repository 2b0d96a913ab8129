"""Defines the settings that all engines share, and what each engine declares.

An engine is one file: a subclass of `ModelSettings` with its settings in a recipe, and the code
that answers. Behavior that depends on the engine is a method of its settings; no other code
compares engine names."""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Protocol, Self

from pydantic import Field

from zephyr_ray.demand import Calls
from zephyr_ray.engines.tariff import Tariff
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
PER_ANSWER = {
    *("temperature", "top_p", "demonstrations", "questions", "actors", "concurrency"),
    *("price", "requests_per_minute", "tokens_per_minute"),
}
"""Settings that may differ between models that share one running engine."""
ROWS_PER_REQUEST = 1.5
"""Rows in flight per request slot: the extra rows prepare a request or wait for a slot. Without
them, slots would be idle while rows are prepared and stored, and at the end of a pass over rows
with several requests."""
BLOCKS_IN_FLIGHT = 2
"""Minimum blocks of rows in flight per actor, so that no actor idles between two blocks."""


class Engine(Protocol):
    """A running engine."""

    def ask_for(self, model: Any, row: dict[str, Any]) -> Ask:
        """Returns the `Ask` of one row, with the sampling and demonstrations of `model`."""


class JudgeEngine:
    """A running engine that judges, and answers no prompts."""

    def ask_for(self, model: Any, row: dict[str, Any]) -> Self:
        return self

    async def __call__(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError("the engine is a judge and answers no prompts")

    async def judge(
        self, form: str, row: dict[str, Any], answers: list[dict[str, Any]]
    ) -> dict[str, Any]:
        """Returns the judgement of the answers. Raises as `Ask` does."""
        raise NotImplementedError


class ModelSettings(Strict):
    """Settings of one model of the recipe."""

    uses: ClassVar[frozenset[str]]
    """Uses that a stage may make of the model: "weights" (train), "model" (answer), "judge"."""
    calls_counted: ClassVar[bool] = True
    """Whether the plan counts calls; False for an engine that runs no model."""
    metered: ClassVar[bool] = False
    """Whether calls cost money."""
    has_slots: ClassVar[bool] = False
    """Whether requests wait for a slot of `contract.REQUESTS`."""
    served: ClassVar[bool] = True
    """Whether `zephyr serve` may host it as the judge."""
    limits: ClassVar[str] = ""
    """A known limitation of its answers or judgements, as a sentence for cards."""
    serve_cpus: ClassVar[int] = 1
    """CPUs that Serve reserves for the engine as a judge."""

    engine: str
    actors: Annotated[int, OPERATIONAL] = Field(1, ge=1)
    """Number of processes, each with its own engine."""
    concurrency: Annotated[int, OPERATIONAL] = Field(64, ge=1)
    """Maximum requests in flight per actor; maximum rows if the engine has no slots."""

    @property
    def rows_in_flight(self) -> int:
        """Maximum rows in flight per actor."""
        return int((ROWS_PER_REQUEST if self.has_slots else 1) * self.concurrency)

    @property
    def gpus_per_actor(self) -> float:
        """GPUs per actor; a fraction shares one."""
        return 0.0

    @property
    def blocks_per_actor(self) -> int:
        """Blocks of rows per actor; with more and smaller blocks, actors have more equal loads."""
        return 4

    def start(self, seed: int) -> Engine:
        """Starts the engine in this process. Weights are folders, packaged names or hub ids."""
        raise NotImplementedError

    def identity(self) -> dict[str, Any]:
        """Returns the settings that determine an answer, for content keys."""
        return SHARED_IDENTITY | self.model_dump(mode="json", exclude=not_in_key(self))

    def process_identity(self) -> str:
        """Returns the settings in which models must agree to share one running engine."""
        return self.model_dump_json(exclude=PER_ANSWER)

    def pass_identity(self) -> str:
        """Returns the settings in which models must agree to answer in one pass over rows: those
        of the engine, and how many actors and rows in flight they may have."""
        return f"{self.process_identity()} {self.actors} {self.concurrency}"

    def judges(self, form: str) -> bool:
        """Returns whether the model can judge with this form of `judges.FORMS`."""
        return "judge" in self.uses

    def environment_variables(self) -> list[str]:
        """Returns the names of the environment variables that the engine reads."""
        return []

    def check_weights(self, folder: Path) -> None:
        """Raises Permanent if the engine cannot use the weights in this folder."""

    def preflight(self) -> None:
        """Raises Permanent if a user must change something before the engine can start."""

    def memory(self, shape: Shape | None) -> float:
        """Returns the bytes of host memory per actor; `shape` is the model's, None if unknown."""
        return 0.0

    def limit(self, shape: Shape | None) -> int | None:
        """Returns the maximum tokens of prompt and answer together, None if unknown; `shape` is the
        model's. Raises Permanent if a setting exceeds the model's limit."""
        return None

    def own_calls(self, calls: Calls) -> Calls:
        """Returns the calls that the engine makes where a language model would make `calls`."""
        return calls

    def dollars(self, calls: Calls) -> float | None:
        """Returns the cost of the calls in dollars; None if no price is set."""
        return None

    def tariff(self) -> Tariff | None:
        """Returns the limits and the price of its calls; None if it has neither."""
        return None

    def describe_memory(self, shape: Shape, gpu_gib: float | None) -> str:
        """Returns a line about weights and KV cache for the plan; empty if the engine holds none.
        `gpu_gib` is the memory per GPU in GiB, None if it is not stated."""
        return ""
