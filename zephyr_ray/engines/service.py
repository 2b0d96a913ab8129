"""Uses the judge of a running `zephyr serve`; each form is one of its routes."""

from typing import Any, ClassVar, Literal

from zephyr_ray.engines.endpoint import EndpointSettings, typed_errors
from zephyr_ray.judges import FORMS


class ServiceSettings(EndpointSettings):
    """Settings of the judge served at `base_url`."""

    uses: ClassVar[frozenset[str]] = frozenset({"judge"})
    served = False

    engine: Literal["service"] = "service"

    def start(self, seed: int) -> "ServedJudge":
        return ServedJudge(self)


class ServedJudge:
    """A client of the served judge, used like an engine."""

    def __init__(self, settings: ServiceSettings):
        self._client = settings.client()

    def ask_for(self, model: Any, row: dict[str, Any]) -> "ServedJudge":
        return self

    async def __call__(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError("a served judge answers no prompts")

    async def judge(
        self, form: str, row: dict[str, Any], answers: list[dict[str, Any]]
    ) -> dict[str, Any]:
        request = {name: row.get(name) for name in ("prompt", "instruction", "constraint")}
        for name, answer in zip(FORMS[form].fields, answers, strict=True):
            request[name] = {part: answer[part] for part in ("text", "finish_reason")}
        with typed_errors(self._client, "the judge"):
            reply: Any = await self._client.post(
                f"/judge/{form}", cast_to=object, body={"requests": [request]}
            )
        judgement: dict[str, Any] = reply["results"][0]
        return judgement
