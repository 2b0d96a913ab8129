"""Lists the engines by their name in recipes. A new engine is one file and one entry here."""

from zephyr_ray.engines.openai import OpenAISettings
from zephyr_ray.engines.rules import RulesSettings
from zephyr_ray.engines.service import ServiceSettings
from zephyr_ray.engines.settings import ModelSettings
from zephyr_ray.engines.vllm import VllmSettings

_ALL: tuple[type[ModelSettings], ...] = (
    VllmSettings, OpenAISettings, RulesSettings, ServiceSettings,
)  # fmt: skip
ENGINES = {settings.model_fields["engine"].default: settings for settings in _ALL}
DEFAULT = "vllm"
