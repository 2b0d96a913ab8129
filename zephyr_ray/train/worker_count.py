"""Defines the setting `workers`: a fixed number, or a range that follows what the cluster has."""

from typing import Any

from pydantic import Field, model_serializer, model_validator

from zephyr_ray.settings import Strict


class WorkerCount(Strict):
    """Number of workers of a stage: as many in the range as the cluster has room for. A recipe may
    state one number instead of a range."""

    least: int = Field(ge=1)
    """Minimum workers; with fewer, the stage waits."""
    most: int = Field(ge=1)
    """Maximum workers."""

    @model_validator(mode="before")
    @classmethod
    def _read_number(cls, value: Any) -> Any:
        if isinstance(value, WorkerCount | dict):
            return value
        if not isinstance(value, int) or value < 1:
            raise ValueError("neither a positive number nor {least: …, most: …}")
        return {"least": value, "most": value}

    @model_validator(mode="after")
    def _check_order(self) -> "WorkerCount":
        if self.least > self.most:
            raise ValueError(f"least {self.least} is more than most {self.most}")
        return self

    @model_serializer
    def as_written(self) -> int | dict[str, int]:
        """Returns the setting as recipes write it."""
        return {"least": self.least, "most": self.most} if self.is_elastic else self.least

    @classmethod
    def fixed(cls, workers: int) -> "WorkerCount":
        return cls(least=workers, most=workers)

    @property
    def is_elastic(self) -> bool:
        """Whether workers come and go while the stage runs."""
        return self.least < self.most

    def for_ray(self) -> int | tuple[int, int]:
        """Returns the value of `num_workers` of Ray Train's ScalingConfig."""
        return (self.least, self.most) if self.is_elastic else self.least

    def describe(self, device: str) -> str:
        """Returns text such as "1 GPU" or "2 to 8 workers"."""
        number = f"{self.least} to {self.most}" if self.is_elastic else f"{self.least}"
        return f"{number} {device}{'s' if self.most > 1 else ''}"

    def __str__(self) -> str:
        return f"{{least: {self.least}, most: {self.most}}}" if self.is_elastic else f"{self.least}"
