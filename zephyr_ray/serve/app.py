"""The Ray Serve application: a deployment for each model, the judge, and the gateway in front.

`zephyr serve RUN`, or on a cluster `serve run zephyr_ray.serve.app:build run=RUN` or a RayService
with this import path.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from zephyr_ray.chat import ChatFormat
from zephyr_ray.engines.base import Model
from zephyr_ray.errors import Permanent
from zephyr_ray.models.vllm import CPU_ENVIRONMENT, KV_CACHE_BYTES
from zephyr_ray.models.weights import resolve
from zephyr_ray.run_folder import judge_of, models_of
from zephyr_ray.serve.answers import Format
from zephyr_ray.serve.gateway import Gateway, Limits
from zephyr_ray.serve.judge import JudgeService

if TYPE_CHECKING:
    from ray.serve import Application

GATEWAY_ENVIRONMENT = {"VLLM_CONFIGURE_LOGGING": "0"}
HEALTH_SECONDS = 3
"""Between two checks of a replica; three bad ones replace it."""
DRAIN_SECONDS = 120
"""How long a replica that goes may take to end its answers."""


class ServeSettings(BaseModel):
    """What is served, and how much of it. From the command line or a Serve config file."""

    model_config = ConfigDict(extra="forbid")

    run: Path
    """The folder of a run, such as runs/quickstart."""
    models: list[str] | None = None
    """By default every trained model of the run, and those it started from."""
    adapters: dict[str, Path] = {}
    """LoRA adapter folders by the name they are served under, on the first of `models`."""
    replicas: int = Field(1, ge=1)
    """Least replicas of each model."""
    max_replicas: int | None = Field(None, ge=1)
    """Most; `replicas` where absent. Between them Serve follows `requests_per_replica`."""
    requests_per_replica: int = Field(8, ge=1)
    """Requests in flight of one replica above which another one is started."""
    gpus: int = Field(0, ge=0)
    """GPUs of one replica, which share its model."""
    context: int = Field(2048, ge=64)
    """Tokens of prompt and answer together."""
    max_tokens: int = Field(1024, ge=1)
    """Most tokens of one answer."""
    most_waiting: int = Field(256, ge=1)
    """Requests in flight of one replica, and again as many waiting; more are told to come again."""
    requests_per_minute: int = Field(600, ge=1)
    """Of one key."""
    log_prompts: bool = False

    @field_validator("models", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        """`serve run` passes text."""
        if not isinstance(value, str):
            return value
        return [name.strip() for name in value.split(",") if name.strip()] or None

    @field_validator("max_replicas")
    @classmethod
    def _at_least_the_least(cls, most: int | None, info: ValidationInfo) -> int | None:
        least = info.data.get("replicas", 1)
        if most is not None and most < least:
            raise ValueError(f"{most} is less than replicas, {least}")
        return most


def build(settings: ServeSettings) -> "Application":
    """What `serve run` and a RayService call, with the settings as its one parameter. The gateway
    does not start on a node without keys in its environment."""
    return application(settings, keys_needed=True)


def models_served(settings: ServeSettings) -> dict[str, str]:
    """Weights by name. Permanent where the run has no such model, or an adapter is none."""
    known = models_of(settings.run)
    names = settings.models or list(known)
    for name in names:
        if name not in known:
            raise Permanent(f"{settings.run} has no model '{name}'; it has {', '.join(known)}")
    for name, folder in settings.adapters.items():
        if not folder.is_dir():
            raise Permanent(f"adapter '{name}': there is no folder {folder}")
        if not (folder / "adapter_config.json").is_file():
            raise Permanent(f"adapter '{name}': {folder} has no adapter_config.json")
        if name in known:
            raise Permanent(f"adapter '{name}' is named like a model; give it another name")
    return {name: known[name] for name in names}


def application(settings: ServeSettings, keys_needed: bool) -> "Application":
    """Deployments of the models, the judge and the gateway. Permanent as `models_served`."""
    from ray import serve

    weights = models_served(settings)
    names = list(weights)
    folders = {name: resolve(place) for name, place in weights.items()}
    servers = {
        name: _model_server(settings, name, folder, settings.adapters if name == names[0] else {})
        for name, folder in folders.items()
    }
    chats = {name: _chat_format(folder) for name, folder in folders.items()}
    formats = {name: Format(c.control_tokens, c.stop_token_id) for name, c in chats.items()}
    for adapter in settings.adapters:
        servers[adapter], formats[adapter] = servers[names[0]], formats[names[0]]
    judge = judge_of(settings.run)
    limits = Limits(settings.requests_per_minute, settings.max_tokens, settings.log_prompts)
    gateway = serve.deployment(
        serve.ingress()(Gateway),
        name="gateway",
        # The models say when they are full, with an error that a client can read.
        max_ongoing_requests=100_000,
        graceful_shutdown_timeout_s=DRAIN_SECONDS,
        # vLLM, which the gateway imports, would close the handlers of its log.
        ray_actor_options={"num_cpus": 0, "runtime_env": {"env_vars": GATEWAY_ENVIRONMENT}},
    )
    return gateway.bind(
        servers,
        judge and _judge_server(judge),
        (settings.run / "votes.jsonl").absolute(),
        formats,
        limits,
        keys_needed,
    )


def _model_server(
    settings: ServeSettings, name: str, folder: Path, adapters: dict[str, Path]
) -> "Application":
    from ray.serve.llm import LLMConfig, build_llm_deployment

    engine: dict[str, Any] = {
        "max_model_len": settings.context,
        "dtype": "bfloat16",
        "generation_config": "vllm",
        # The template that training and evaluation write, whatever the folder says.
        "chat_template": _chat_format(folder).template,
        # What an answer may have where the client names no number.
        "override_generation_config": {"max_new_tokens": settings.max_tokens},
    }
    if settings.gpus > 1:
        engine["tensor_parallel_size"] = settings.gpus
    if not settings.gpus:
        engine |= {
            "enforce_eager": True,
            "kv_cache_memory_bytes": KV_CACHE_BYTES,
            # vLLM's CPU sampler fails on a seed of a request whose prompt comes in pieces.
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(settings.context, 4096),
        }
    if adapters:
        engine |= {
            "enable_lora": True,
            "max_loras": len(adapters),
            "max_lora_rank": max(16, *(_rank(path) for path in adapters.values())),
            "lora_modules": [{"name": n, "path": str(p.absolute())} for n, p in adapters.items()],
        }
    replicas = {"min_replicas": settings.replicas}
    replicas["max_replicas"] = max(settings.replicas, settings.max_replicas or 0)
    config = LLMConfig(
        model_loading_config={"model_id": name, "model_source": str(folder)},
        accelerator_config={"kind": "gpu" if settings.gpus else "cpu"},
        placement_group_config={"bundle_per_worker": {"CPU": 1, "GPU": min(1, settings.gpus)}},
        engine_kwargs=engine,
        deployment_config={
            "autoscaling_config": {
                **replicas,
                "target_ongoing_requests": settings.requests_per_replica,
            },
            "health_check_period_s": HEALTH_SECONDS,
            "ray_actor_options": {"num_cpus": 0},
            "max_ongoing_requests": settings.most_waiting,
            "max_queued_requests": settings.most_waiting,
            "graceful_shutdown_timeout_s": DRAIN_SECONDS,
        },
        runtime_env={} if settings.gpus else {"env_vars": CPU_ENVIRONMENT},
        # A token is sent on at once: waiting for more would be latency that nobody asked for.
        experimental_configs={"stream_batching_interval_ms": 0},
    )
    return build_llm_deployment(config, name_prefix="model-")


def _judge_server(judge: Model) -> "Application":
    from ray import serve

    deployment = serve.deployment(
        JudgeService,
        name="judge",
        max_ongoing_requests=judge.spec.concurrency,
        graceful_shutdown_timeout_s=DRAIN_SECONDS,
        ray_actor_options={
            "num_cpus": 0 if judge.spec.engine == "openai" else 1,
            "num_gpus": judge.spec.gpus,
        },
    )
    return deployment.bind(judge)


def _chat_format(folder: Path) -> ChatFormat:
    from transformers import AutoTokenizer

    return ChatFormat.of(AutoTokenizer.from_pretrained(folder))


def _rank(adapter: Path) -> int:
    """The rank of an adapter, rounded up to one that vLLM has kernels for."""
    rank = int(json.loads((adapter / "adapter_config.json").read_text())["r"])
    return next(r for r in (8, 16, 32, 64, 128, 256, 320, 512) if r >= rank)
