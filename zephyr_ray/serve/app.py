"""Builds the Ray Serve application: one deployment per model, one for the judge, and the gateway.

`zephyr serve RUN` starts it; on a cluster, `serve run zephyr_ray.serve.app:build run=RUN` or a
RayService with this import path does.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from zephyr_ray.engines.model import Model
from zephyr_ray.engines.vllm import CPU_ENVIRONMENT, KV_CACHE_BYTES
from zephyr_ray.errors import Permanent
from zephyr_ray.models.checks import check_answers, read_config
from zephyr_ray.models.shapes import context_of
from zephyr_ray.models.weights import resolve
from zephyr_ray.run_folder import judge_of, models_of
from zephyr_ray.serve.gateway import Gateway, Limits
from zephyr_ray.serve.judge import JudgeService
from zephyr_ray.verification import verify_folder

if TYPE_CHECKING:
    from ray.serve import Application

GATEWAY_ENVIRONMENT = {"VLLM_CONFIGURE_LOGGING": "0"}
HEALTH_SECONDS = 3
"""Seconds between two health checks of a replica; three failures replace it."""
DRAIN_SECONDS = 120
"""Seconds that a stopping replica gets to finish its answers."""


class ServeSettings(BaseModel):
    """Holds the settings of a service, from the command line or a Serve config file."""

    model_config = ConfigDict(extra="forbid")

    run: Path
    """Folder of a run, such as runs/quickstart."""
    models: list[str] | None = None
    """Names of the models to serve; by default all trained models and those they started from."""
    adapters: dict[str, Path] = {}
    """LoRA adapter folders for the first of `models`, by the name to serve each under."""
    replicas: int = Field(1, ge=1)
    """Minimum replicas per model."""
    max_replicas: int | None = Field(None, ge=1)
    """Maximum replicas per model; by default `replicas`, which turns autoscaling off."""
    requests_per_replica: int = Field(8, ge=1)
    """Requests in flight per replica above which Ray adds a replica."""
    gpus: int = Field(0, ge=0)
    """GPUs per replica, across which its model is sharded; 0 serves on the CPU."""
    context: int = Field(2048, ge=64)
    """Maximum tokens of prompt and answer together, per request; the default is lowered to the
    model's."""
    max_tokens: int = Field(1024, ge=1)
    """Maximum tokens per answer; also the default if a chat request sets no maximum."""
    max_in_flight: int = Field(
        256, ge=1, validation_alias=AliasChoices("max_in_flight", "most_waiting")
    )
    """Maximum requests in flight per replica, and maximum queued; beyond that clients get 429."""
    requests_per_minute: int = Field(600, ge=1)
    """Maximum requests per minute, per key and gateway replica."""
    log_prompts: bool = False
    """Whether the log line of a request contains its prompt."""

    @field_validator("models", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        """Splits the comma-separated text that `serve run` passes."""
        if not isinstance(value, str):
            return value
        return [name.strip() for name in value.split(",") if name.strip()] or None

    @field_validator("max_replicas")
    @classmethod
    def _check_max_replicas(cls, maximum: int | None, info: ValidationInfo) -> int | None:
        minimum = info.data.get("replicas", 1)
        if maximum is not None and maximum < minimum:
            raise ValueError(f"{maximum} is less than replicas, {minimum}")
        return maximum


def build(settings: ServeSettings) -> "Application":
    """Builds the application for `serve run` and RayService, which pass settings of this class.

    The gateway does not start on a node without keys in the environment.
    """
    return build_application(settings, served_models(settings), keys_needed=True)


@dataclass(frozen=True)
class ServedModel:
    """A model to serve: its folder and its maximum context."""

    folder: Path
    context: int
    """Maximum tokens of prompt and answer together."""


def served_models(settings: ServeSettings) -> dict[str, ServedModel]:
    """Returns the models by name, without starting Ray.

    Raises Permanent if the run lacks a model, a model cannot be served as the settings say, or an
    adapter's folder or name cannot be used.
    """
    known = models_of(settings.run)
    names = settings.models or list(known)
    for name in names:
        if name not in known:
            raise Permanent(f"{settings.run} has no model '{name}'; use one of {', '.join(known)}")
    for name, folder in settings.adapters.items():
        if not folder.is_dir():
            raise Permanent(f"adapter '{name}': there is no folder {folder}; correct the path")
        if not (folder / "adapter_config.json").is_file():
            raise Permanent(
                f"adapter '{name}': {folder} has no adapter_config.json; give a LoRA adapter"
            )
        verify_folder(folder.resolve())
        if name in known:
            raise Permanent(f"adapter '{name}': a model has this name; choose another name")
        _adapter_rank(folder)
    return {name: _served_model(settings, name, known[name]) for name in names}


def _served_model(settings: ServeSettings, name: str, weights: str) -> ServedModel:
    folder = resolve(weights)
    check_answers(folder)
    limit = context_of(read_config(folder)) or settings.context
    if settings.context > limit and "context" in settings.model_fields_set:
        raise Permanent(
            f"context {settings.context} exceeds the {limit} tokens of model '{name}'; lower it"
        )
    return ServedModel(folder, min(settings.context, limit))


def build_application(
    settings: ServeSettings, models: dict[str, ServedModel], keys_needed: bool
) -> "Application":
    """Binds the deployments of models, judge and gateway."""
    from ray import serve

    servers: dict[str, Application] = {}
    folders = {name: model.folder for name, model in models.items()}
    for name, model in models.items():
        adapters = {} if servers else settings.adapters
        servers[name] = _model_deployment(settings, name, model, adapters)
    first = next(iter(servers))
    for adapter in settings.adapters:
        servers[adapter], folders[adapter] = servers[first], folders[first]
    judge = judge_of(settings.run)
    limits = Limits(settings.requests_per_minute, settings.max_tokens, settings.log_prompts)
    gateway = serve.deployment(
        serve.ingress()(Gateway),
        name="gateway",
        # The models reject excess requests with an error that clients understand.
        max_ongoing_requests=100_000,
        graceful_shutdown_timeout_s=DRAIN_SECONDS,
        # Otherwise vLLM, which the gateway imports, would close the handlers of the gateway's log.
        ray_actor_options={"num_cpus": 0, "runtime_env": {"env_vars": GATEWAY_ENVIRONMENT}},
    )
    return gateway.bind(
        servers,
        judge and _judge_deployment(judge),
        (settings.run / "votes").absolute(),
        folders,
        limits,
        keys_needed,
    )


def _model_deployment(
    settings: ServeSettings, name: str, model: ServedModel, adapters: dict[str, Path]
) -> "Application":
    from ray.serve.llm import LLMConfig, build_llm_deployment

    engine: dict[str, Any] = {
        "max_model_len": model.context,
        "dtype": "bfloat16",
        "generation_config": "vllm",
        # The maximum tokens of an answer if the client sets none.
        "override_generation_config": {"max_new_tokens": settings.max_tokens},
    }
    if settings.gpus > 1:
        engine["tensor_parallel_size"] = settings.gpus
    if not settings.gpus:
        engine |= {
            "enforce_eager": True,
            "kv_cache_memory_bytes": KV_CACHE_BYTES,
            # vLLM's CPU sampler fails if a request with a seed has its prompt prefilled in chunks.
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(model.context, 4096),
        }
    if adapters:
        engine |= {
            "enable_lora": True,
            "max_loras": len(adapters),
            "max_lora_rank": max(16, *(_adapter_rank(path) for path in adapters.values())),
            "lora_modules": [{"name": n, "path": str(p.absolute())} for n, p in adapters.items()],
        }
    config = LLMConfig(
        model_loading_config={"model_id": name, "model_source": str(model.folder)},
        accelerator_config={"kind": "gpu" if settings.gpus else "cpu"},
        placement_group_config={"bundle_per_worker": {"CPU": 1, "GPU": min(1, settings.gpus)}},
        engine_kwargs=engine,
        deployment_config={
            "autoscaling_config": {
                "min_replicas": settings.replicas,
                "max_replicas": settings.max_replicas or settings.replicas,
                "target_ongoing_requests": settings.requests_per_replica,
            },
            "health_check_period_s": HEALTH_SECONDS,
            "ray_actor_options": {"num_cpus": 0},
            "max_ongoing_requests": settings.max_in_flight,
            "max_queued_requests": settings.max_in_flight,
            "graceful_shutdown_timeout_s": DRAIN_SECONDS,
        },
        runtime_env={} if settings.gpus else {"env_vars": CPU_ENVIRONMENT},
        # Sends each token at once; batching them would add latency.
        experimental_configs={"stream_batching_interval_ms": 0},
    )
    return build_llm_deployment(config, name_prefix="model-")


def _judge_deployment(judge: Model) -> "Application":
    from ray import serve

    deployment = serve.deployment(
        JudgeService,
        name="judge",
        max_ongoing_requests=judge.settings.concurrency,
        graceful_shutdown_timeout_s=DRAIN_SECONDS,
        ray_actor_options={
            "num_cpus": judge.settings.serve_cpus,
            "num_gpus": judge.settings.gpus_per_actor,
        },
    )
    return deployment.bind(judge)


def _adapter_rank(adapter: Path) -> int:
    """Returns an adapter's rank, rounded up to one that vLLM supports. Raises Permanent if
    it is missing or above vLLM's maximum."""
    try:
        rank = int(json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))["r"])
        return next(r for r in (8, 16, 32, 64, 128, 256, 320, 512) if r >= rank)
    except (OSError, ValueError, KeyError, TypeError, StopIteration):
        raise Permanent(
            f"adapter {adapter}: adapter_config.json has no rank (r) of at most 512; give a LoRA "
            "adapter"
        ) from None
