"""Bytes on one GPU: of a training worker, by what they are for, and of an engine that answers.

The coefficients are counted from what DeepSpeed and PyTorch hold, and tests compare them with what
a small model really allocates. Weights, gradients and optimiser state are fp32, as the trainer
keeps them; products are bf16.
"""

from dataclasses import dataclass

from zephyr_ray.demand import GPU_RESERVE, PROCESS_BYTES
from zephyr_ray.models.shapes import Shape
from zephyr_ray.train.settings import BUCKET, TrainingSettings

FLAT = 500_000_000
"""Gradients that DeepSpeed without ZeRO copies into one piece to sum them over the workers."""
LIVE = 1_000_000_000
"""Parameters that ZeRO-3 keeps gathered at most (DeepSpeed's stage3_max_live_parameters)."""
TOKENS, WORDS = 4096, 32_768
"""A tile of the output layer (TRL): so many tokens times so many words."""
FOUR_BITS = 0.5 + 4 / 64
"""Bytes of one weight in NF4: four bits, and an fp32 scale for each 64."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU, by purpose; `host` are those of one worker in its node's memory."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    buffers: float
    reserve: float
    """Libraries and what their allocators lose."""
    host: float = 0

    @property
    def total(self) -> float:
        parts = self.weights + self.gradients + self.optimizer + self.activations + self.buffers
        return parts + self.reserve


def trained(settings: TrainingSettings, shape: Shape) -> int:
    """Parameters that have gradients."""
    lora = settings.lora
    return shape.adapters(lora.r, lora.targets) if lora else shape.parameters


def training(settings: TrainingSettings, shape: Shape) -> Memory:
    """Returns the bytes of one worker while it trains on micro-batches of full length."""
    weights, gradients, optimizer, buffers, host = model_states(settings, shape)
    tokens = settings.batches()[0] * settings.sequences_per_row * settings.max_length
    grown = activations(settings, shape, tokens) + output_layer(settings, shape, tokens)
    reserve = GPU_RESERVE if settings.gpus_per_worker else PROCESS_BYTES
    return Memory(weights, gradients, optimizer, grown, buffers, reserve, host)


def model_states(
    settings: TrainingSettings, shape: Shape, bucket: int = BUCKET
) -> tuple[float, float, float, float, float]:
    """Bytes of weights, gradients, optimiser (fp32 masters too) and buffers on one GPU, and on the
    host, while the model trains."""
    new, split = trained(settings, shape), settings.workers
    whole = start_weights(settings, shape) + (4 * new if settings.lora else 0)
    if settings.zero == 0:
        return whole, 4 * new, 8 * new, 4 * min(FLAT, new) * (split > 1), 0
    # Two buckets in turn; ZeRO-3 has one in fp32 and one in bf16.
    buffers = 2 * 4 * min(bucket, new) if settings.zero < 3 else 6 * min(bucket, new)
    # The optimiser has fp32 weights of its own beside its two moments, ZeRO-3's too.
    weights, gradients, optimizer, host = whole, 4.0 * new, 12 * new / split, 0.0
    if settings.zero >= 2:
        gradients /= split
    if settings.zero == 3:
        weights /= split
        buffers += 6 * min(LIVE, shape.parameters)  # gathered, and on their way in bf16
    if settings.offload != "none":
        # Gradients lie there twice: as they come, and as the optimiser takes them.
        host, optimizer = optimizer + 8 * new / split, 0
        gradients = 0 if settings.zero == 3 else gradients
    if settings.offload == "all":
        host, weights = host + weights, 0
    return weights, gradients, optimizer, buffers, host


def start_weights(settings: TrainingSettings, shape: Shape) -> float:
    """The start model, whole."""
    if settings.lora and settings.lora.quantized:
        return FOUR_BITS * shape.linear + 4 * (shape.parameters - shape.linear)
    return 4 * shape.parameters


def activations(settings: TrainingSettings, shape: Shape, tokens: int) -> float:
    """What the layers keep for the way back, at its highest."""
    h, f, kv, low = shape.hidden, shape.ffn, shape.kv, settings.precision == "bf16"
    # Residuals and norms in fp32, inputs of matrices, queries, keys, values, answers, the MLP.
    layer = 30 * h + 4 * kv + 8 * f if low else 32 * h + 8 * kv + 16 * f
    one_more = 26 * h if low else 33 * h  # the last norm, and gradients on their way
    if settings.lora:
        # Frozen matrices keep no inputs; adapters keep theirs, what lies between, dropout's masks.
        layer += 28 * settings.lora.r - 6 * h + (6 * h + f) * (settings.lora.dropout > 0)
    rounded = _rounded_weights(settings, shape) if low else 0
    if not settings.gradient_checkpointing:
        return rounded + tokens * (shape.layers * layer + one_more)
    forward = rounded + tokens * layer / 2
    return max(forward, tokens * (layer + one_more)) + tokens * 4 * h * shape.layers


def _rounded_weights(settings: TrainingSettings, shape: Shape) -> float:
    """bf16 copies of weights. Autocast keeps those of trained ones until the forward pass ends;
    frozen ones are kept for the way back; ZeRO-3 and 4 bits round one layer at a time."""
    one_layer = 2 * shape.linear / shape.layers
    if settings.zero == 3 or (settings.lora and settings.lora.quantized):
        return one_layer
    if settings.lora and settings.gradient_checkpointing:
        return one_layer
    return 2 * shape.linear


def output_layer(settings: TrainingSettings, shape: Shape, tokens: int) -> float:
    """A tile of logits, and gradients of what goes in; as TRL's kernels for GPUs have it."""
    tile = 2 * min(tokens, TOKENS) * min(shape.vocabulary, WORDS)
    own = 0 if settings.lora else 4 * shape.vocabulary * shape.hidden
    return tile + own + 8 * tokens * shape.hidden
