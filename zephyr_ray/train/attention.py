"""Attends within the segments of a row: packed dialogues, or the two answers of a pair that share
their prompt.

Registered with transformers under `SEGMENTED`; the segments reach `attend` as keyword arguments of
`model(...)`, under the names of transformers' padding-free batches. Cost and memory grow with each
segment's length, not with the row's. Imports PyTorch: import this module only in a worker.
"""

from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

SEGMENTED = "segmented"
"""Name of this attention in a model's configuration."""
GROUPED = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}
"""Argument that enables grouped-query attention; PyTorch 2.11 needs none."""


@dataclass(frozen=True)
class Segments:
    """Segments of a row. Each is a run of queries and the run of keys that they attend to, causally
    and aligned at the end: the last query attends to all keys."""

    query_offsets: Tensor
    """Cumulative numbers of queries, int32, from 0."""
    key_offsets: Tensor
    """Cumulative numbers of keys, int32, from 0."""
    max_queries: int
    max_keys: int
    key_rows: Tensor | None = None
    """Position of each key in the row; None if the keys are the row's tokens in order."""

    def select(self, states: Tensor) -> Tensor:
        """Returns the keys or values of all segments, one segment after the other."""
        return states if self.key_rows is None else states[:, :, self.key_rows]


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scale: float | None = None,
    window: int | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Returns the attention output of one row, in the query's shape.

    Shapes are (1, heads, tokens, head size), with fewer heads of keys and values in grouped-query
    attention. `window` is the maximum number of keys per query.
    """
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if _varlen_runs(query, value, dropout):
        return attend_varlen(query, key, value, segments, scale, window)
    return attend_sdpa(query, key, value, segments, scale, window, dropout)


def attend_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Computes `attend` in one kernel for all segments, on a GPU in half precision."""
    key, value = segments.select(key), segments.select(value)
    # squeeze, because the backward pass of an index would copy each gradient.
    query, key, value = (states.squeeze(0).transpose(0, 1) for states in (query, key, value))
    output = varlen_attn(
        query,
        key,
        value,
        segments.query_offsets,
        segments.key_offsets,
        segments.max_queries,
        segments.max_keys,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        **GROUPED,
    )
    return output.transpose(0, 1).unsqueeze(0)


def attend_sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scale: float | None = None,
    window: int | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Computes `attend` with one call per segment, on any device and in any precision."""
    queries, keys = segments.query_offsets.diff().tolist(), segments.key_offsets.diff().tolist()
    parts = (
        query.split(queries, dim=2),
        segments.select(key).split(keys, dim=2),
        segments.select(value).split(keys, dim=2),
    )
    outputs = [
        scaled_dot_product_attention(
            *part,
            dropout_p=dropout,
            scale=scale,
            enable_gqa=True,
            **_causal(part[0].shape[2], part[1].shape[2], window, query.device),
        )
        for part in zip(*parts, strict=True)
    ]
    return torch.cat(outputs, dim=2)


def _causal(queries: int, keys: int, window: int | None, device: torch.device) -> dict[str, Any]:
    """Returns the arguments of a causal mask that is aligned at the end."""
    if window is None or window >= keys:
        if queries == keys:
            return {"is_causal": True}
        window = keys
    diagonal = keys - queries
    mask = torch.ones(queries, keys, dtype=torch.bool, device=device)
    return {"attn_mask": mask.tril(diagonal).triu(diagonal - window + 1)}


def _varlen_runs(query: Tensor, value: Tensor, dropout: float) -> bool:
    """Returns whether PyTorch's kernel for segments (FlashAttention) supports this attention."""
    size = query.shape[-1]
    half = query.is_cuda and query.dtype in (torch.bfloat16, torch.float16)
    return half and size == value.shape[-1] and size <= 256 and size % 8 == 0 and not dropout


def _forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int = 0,
    max_length_k: int = 0,
    key_rows: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Computes the attention of one layer; without segments, uses transformers' "sdpa"."""
    if cu_seq_lens_q is None or cu_seq_lens_k is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **others
        )
    segments = Segments(cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k, key_rows)
    output = attend(query, key, value, segments, scaling, sliding_window, dropout)
    return output.transpose(1, 2).contiguous(), None


def _mask(*sizes: Any, attention_mask: Tensor | None = None, **others: Any) -> Tensor | None:
    """Returns the mask of a padded batch; a row of segments needs none."""
    if attention_mask is None:
        return None
    return sdpa_mask(*sizes, attention_mask=attention_mask, **others)


AttentionInterface.register(SEGMENTED, _forward)
AttentionMaskInterface.register(SEGMENTED, _mask)


def attend_by_segments(model: Any) -> None:
    """Makes the model attend per segment of a row."""
    model.set_attn_implementation(SEGMENTED)
    model.base_model.register_forward_pre_hook(_skip_mask, with_kwargs=True)


def _skip_mask(module: Any, inputs: Any, keywords: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Passes a placeholder for the mask of a row of segments: transformers leaves a mask with four
    dimensions alone, and would otherwise wait for the GPU to search the positions for segments."""
    ids = keywords.get("input_ids")
    if ids is not None and "cu_seq_lens_q" in keywords and uses_segments(module):
        keywords["attention_mask"] = ids.new_empty(1, 1, 1, 1)
    return inputs, keywords


def uses_segments(model: Any) -> bool:
    """Returns whether the model attends per segment (`model.use_segments`)."""
    return bool(model.config._attn_implementation == SEGMENTED)
