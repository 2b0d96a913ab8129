"""Estimates the memory of a training worker in bytes, by purpose.

The coefficients count what DeepSpeed and PyTorch hold; tests compare them with what a small model
allocates. Weights, gradients and optimizer state are fp32; matrix products are bf16 or fp32.
"""

from bisect import bisect_left
from dataclasses import dataclass

from zephyr_ray.demand import GPU_RESERVE, PROCESS_BYTES
from zephyr_ray.models.shapes import Shape
from zephyr_ray.train.cpu import CPU_TILE
from zephyr_ray.train.kernels import LIKE_LLAMA
from zephyr_ray.train.settings import BUCKET, TrainingSettings, WorkerSettings

FLAT = 500_000_000
"""Maximum gradients that DeepSpeed without ZeRO copies into one buffer to sum them over workers."""
LIVE = 1_000_000_000
"""Maximum parameters that ZeRO-3 keeps gathered (DeepSpeed's stage3_max_live_parameters)."""
TILE_TOKENS, TILE_VOCABULARY = 4096, 32_768
"""Maximum tokens and vocabulary entries per tile of logits in the output layer on a GPU (TRL)."""
TILE_BYTES_GPU, TILE_BYTES_CPU = 2, 31
"""Bytes per logit of a tile: TRL's GPU kernel works in place; its CPU code holds the tile in bf16,
seven intermediate results in fp32 and a mask (trl.kernels.chunked_logprob)."""
GRAIN = 256
"""Tokens between two proposed values of `micro_batch`."""
FOUR_BITS = 0.5 + 4 / 64
"""Bytes per weight in NF4: four bits, and an fp32 scale per 64 weights."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one worker by purpose: on its GPU, or in host memory without a GPU."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    buffers: float
    reserve: float
    """Libraries, and the overhead of their allocators."""
    host: float = 0
    """Bytes offloaded from the GPU to host memory."""

    @property
    def total(self) -> float:
        parts = self.weights + self.gradients + self.optimizer + self.activations + self.buffers
        return parts + self.reserve


def trained_parameters(settings: TrainingSettings, shape: Shape) -> int:
    """Returns the number of parameters that have gradients."""
    lora = settings.lora
    return shape.adapter_parameters(lora.r, lora.targets) if lora else shape.parameters


def worker_memory(settings: TrainingSettings, shape: Shape) -> Memory:
    """Returns the peak memory of one worker that trains on the largest micro-batches."""
    weights, gradients, optimizer, buffers, host = model_states(settings, shape)
    tokens = settings.largest_pass
    activation_bytes = activations(settings, shape, tokens) + output_layer(settings, shape, tokens)
    reserve = GPU_RESERVE if settings.gpus_per_worker else PROCESS_BYTES
    return Memory(weights, gradients, optimizer, activation_bytes, buffers, reserve, host)


def forward_memory(settings: WorkerSettings, shape: Shape) -> Memory:
    """Returns the peak memory of one worker that only runs the largest forward passes."""
    tokens = settings.largest_pass
    weights, buffers, host = start_weights(settings, shape), 0.0, 0.0
    if settings.zero == 3:
        weights /= settings.workers.least
        buffers = 6 * min(LIVE, shape.parameters) * (settings.workers.most > 1)
    if settings.offload == "all":
        host, weights = weights, 0
    # Residuals and the norm's result in fp32, the norm's output, and three results of the MLP.
    size = 2 if settings.precision == "bf16" else 4
    layer = tokens * (12 * shape.hidden + size * (shape.hidden + 3 * shape.ffn))
    peak = max(layer, output_tile(settings, shape, tokens) + 8 * tokens * shape.hidden)
    reserve = GPU_RESERVE if settings.gpus_per_worker else PROCESS_BYTES
    return Memory(weights, 0, 0, peak, buffers, reserve, host)


def largest_micro_batch(settings: TrainingSettings, shape: Shape, capacity: float) -> int | None:
    """Returns the largest `micro_batch` with which a worker fits into `capacity` bytes, in steps of
    GRAIN tokens: at most the tokens of a step on one worker, None if one row does not fit."""

    def too_large(tokens: int) -> bool:
        changed = settings.model_copy(update={"micro_batch": tokens})
        return worker_memory(changed, shape).total > capacity

    row = settings.longest_row
    most = settings.step_tokens
    choices = [row, *range(row + GRAIN - row % GRAIN, most, GRAIN), *([most] * (most > row))]
    fitting = bisect_left(choices, True, key=too_large)
    return choices[fitting - 1] if fitting else None


def model_states(
    settings: TrainingSettings, shape: Shape, bucket: int = BUCKET
) -> tuple[float, float, float, float, float]:
    """Returns the bytes of weights, gradients, optimizer state (with fp32 master weights) and
    buffers on one GPU, and the bytes in host memory."""
    trained, workers = trained_parameters(settings, shape), settings.workers.least
    several = settings.workers.most > 1
    all_weights = start_weights(settings, shape) + (4 * trained if settings.lora else 0)
    if settings.zero == 0:
        return all_weights, 4 * trained, 8 * trained, 4 * min(FLAT, trained) * several, 0
    # ZeRO 1 and 2 alternate two fp32 buckets; ZeRO-3 has one in fp32 and one in bf16.
    buffers = 2 * 4 * min(bucket, trained) if settings.zero < 3 else 6 * min(bucket, trained)
    # At every ZeRO stage the optimizer has fp32 master weights beside its two moments.
    weights, gradients, optimizer, host = all_weights, 4.0 * trained, 12 * trained / workers, 0.0
    if settings.zero >= 2:
        gradients /= workers
    if settings.zero == 3:
        weights /= workers
        # Gathered in fp32, and in transit in bf16.
        buffers += 6 * min(LIVE, shape.parameters) * several
    if settings.offload != "none":
        # The host holds gradients twice: as received, and as the optimizer reads them.
        host, optimizer = optimizer + 8 * trained / workers, 0
        gradients = 0 if settings.zero == 3 else gradients
    if settings.offload == "all":
        host, weights = host + weights, 0
    return weights, gradients, optimizer, buffers, host


def start_weights(settings: WorkerSettings, shape: Shape) -> float:
    """Returns the bytes of the complete start model."""
    if settings.is_quantized():
        return FOUR_BITS * shape.linear_parameters + 4 * (
            shape.parameters - shape.linear_parameters
        )
    return 4 * shape.parameters


def activations(settings: TrainingSettings, shape: Shape, tokens: int) -> float:
    """Returns the peak bytes that the layers store for the backward pass."""
    h, f, kv, is_bf16 = shape.hidden, shape.ffn, shape.kv, settings.precision == "bf16"
    # Residuals and norms in fp32, matrix inputs, queries, keys, values, attention output, the MLP.
    layer = 30 * h + 4 * kv + 8 * f if is_bf16 else 32 * h + 8 * kv + 16 * f
    tail = 26 * h if is_bf16 else 33 * h  # the last norm, and gradients in the backward pass
    quantized = settings.lora is not None and settings.lora.quantized
    if settings.lora:
        # Frozen matrices store no inputs; adapters store inputs, inner values and dropout masks.
        layer += 28 * settings.lora.r - 6 * h + (6 * h + f) * (settings.lora.dropout > 0)
    elif is_bf16 and shape.family in LIKE_LLAMA:
        layer -= 6 * h  # norms round their output once, not for each matrix product
    if quantized:
        layer += 6 * f  # 4-bit matrices return fp32
    elif settings.gpus_per_worker and shape.family in LIKE_LLAMA:
        # Liger's kernels recompute the normalized input of a norm and the output of an activation.
        layer -= 8 * h + (2 if is_bf16 else 4) * f
    rounded = _rounded_weights(settings, shape) if is_bf16 else 0
    if not settings.gradient_checkpointing:
        return rounded + tokens * (shape.layers * layer + tail)
    forward = rounded + tokens * layer / 2
    return max(forward, tokens * (layer + tail)) + tokens * 4 * h * shape.layers


def _rounded_weights(settings: TrainingSettings, shape: Shape) -> float:
    """Returns the bytes of bf16 copies of weights. Autocast holds copies of trained weights until
    the forward pass ends, and of frozen ones for the backward pass; ZeRO-3 and 4-bit weights are
    converted one layer at a time."""
    one_layer = 2 * shape.linear_parameters / shape.layers
    if settings.zero == 3 or (settings.lora and settings.lora.quantized):
        return one_layer
    if settings.lora and settings.gradient_checkpointing:
        return one_layer
    return 2 * shape.linear_parameters


def output_layer(settings: TrainingSettings, shape: Shape, tokens: int) -> float:
    """Returns the bytes of one tile of logits, the weight's gradient and the gradients of the
    input, as in TRL's chunked log-probabilities."""
    weight_gradient = 0 if settings.lora else 4 * shape.vocabulary * shape.hidden
    return output_tile(settings, shape, tokens) + weight_gradient + 8 * tokens * shape.hidden


def output_tile(settings: WorkerSettings, shape: Shape, tokens: int) -> float:
    """Returns the bytes of one tile of logits in the output layer."""
    on_gpu = settings.gpus_per_worker > 0
    rows, columns = (TILE_TOKENS, TILE_VOCABULARY) if on_gpu else CPU_TILE
    per_logit = TILE_BYTES_GPU if on_gpu else TILE_BYTES_CPU
    return per_logit * min(tokens, rows) * min(shape.vocabulary, columns)
