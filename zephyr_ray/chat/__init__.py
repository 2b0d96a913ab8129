"""The chat format of a model: turns conversations into tokens, with a verified loss mask."""

from zephyr_ray.chat.format import ChatFormat, Messages, pad_token_id
from zephyr_ray.chat.own import OwnFormat
from zephyr_ray.chat.template import CHATML, ZEPHYR

__all__ = ["CHATML", "ZEPHYR", "ChatFormat", "Messages", "OwnFormat", "pad_token_id"]
