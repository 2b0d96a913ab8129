"""Lists the engines by their names in a recipe. A new engine is one file and one line here."""

from pkgutil import resolve_name

from zephyr_ray.engines.settings import ModelSettings

_NAMES = (
    "zephyr_ray.engines.vllm:VllmSettings",
    "zephyr_ray.engines.openai:OpenAISettings",
    "zephyr_ray.engines.rules:RulesSettings",
    "zephyr_ray.engines.reward:RewardSettings",
    "zephyr_ray.engines.likelihood:LikelihoodSettings",
    "zephyr_ray.engines.service:ServiceSettings",
)
ENGINES: dict[str, type[ModelSettings]] = {
    settings.model_fields["engine"].default: settings for settings in map(resolve_name, _NAMES)
}
DEFAULT = "vllm"
