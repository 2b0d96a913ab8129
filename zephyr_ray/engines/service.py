"""Uses the judge of a running `zephyr serve`; each form is one of its routes."""

from typing import Any, ClassVar, Literal

from zephyr_ray.engines.endpoint import Endpoint, EndpointSettings
from zephyr_ray.engines.replies import Rejected, Unavailable
from zephyr_ray.engines.settings import JudgeEngine
from zephyr_ray.errors import RowError
from zephyr_ray.judges import FORMS

REFUSED = "judge_refused"
"""Error code of the service for a row that the judge cannot judge."""


class ServiceSettings(EndpointSettings):
    """Settings of the judge served at `base_url`."""

    uses: ClassVar[frozenset[str]] = frozenset({"judge"})
    served = False

    engine: Literal["service"] = "service"

    def start(self, seed: int) -> "ServedJudge":
        return ServedJudge(self)


class ServedJudge(JudgeEngine):
    """A client of the served judge, used like an engine."""

    def __init__(self, settings: ServiceSettings):
        self._endpoint = Endpoint(settings, "the judge")

    async def judge(
        self, form: str, row: dict[str, Any], answers: list[dict[str, Any]]
    ) -> dict[str, Any]:
        request = {name: row.get(name) for name in ("prompt", "instruction", "constraint")}
        request |= {"reference": row["reference"]} if row.get("reference") else {}
        judged = [{part: a[part] for part in ("text", "finish_reason")} for a in answers]
        fields = FORMS[form].fields
        if fields is None:
            request |= {"order_seed": row.get("order_seed"), "completions": judged}
        else:
            request |= zip(fields, judged, strict=True)
        try:
            body = {"requests": [request]}
            return await self._endpoint.post(f"/judge/{form}", body, _judgement)
        except Rejected as rejected:
            if REFUSED in rejected.error.codes:
                raise RowError(str(rejected), "not judged") from None
            raise


def _judgement(data: dict[str, Any], where: str) -> dict[str, Any]:
    results = data.get("results")
    if not isinstance(results, list) or not results or not isinstance(results[0], dict):
        raise Unavailable(f"{where}: the reply has no judgement")
    return results[0]
