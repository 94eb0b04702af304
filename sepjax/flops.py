"""How much arithmetic a training step needs, and how much the devices can do: the two sides of MFU.

MFU = needed FLOPs per second / peak FLOPs per second. Needed means what the method asks for: recomputation
(`model.remat`) and masked-out work that an implementation does anyway are not counted, so neither can raise it.
"""

import dataclasses
import re
import time
from typing import Any

import jax
import jax.numpy as jnp

from sepjax.config import Config, ModelConfig
from sepjax.config.lora import adapter_parameters

# Dense bfloat16 FLOP/s of one JAX device, from the makers' data sheets (for GPUs the figures without 2:4 sparsity).
# A TPU v4, v5p chip is one device, its two cores fused; a TPU7x chip (2307e12) is two devices.
PEAK_BFLOAT16 = {
    "TPU v4 lite": 138e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 1153.5e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100": 989e12,
    "NVIDIA GH200": 989e12,
    "NVIDIA H200 NVL": 836e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA GB200": 2500e12,
}


@dataclasses.dataclass(frozen=True)
class Peak:
    """The most FLOP/s that all devices of the run can do together."""

    flops_per_second: float
    source: str  # "table: ..." or "measured: ..."

    def __str__(self) -> str:
        return f"{self.flops_per_second / 1e12:.3g} TFLOP/s ({self.source})"


def matmul_parameters(model: ModelConfig) -> int:
    """Parameters that every token is multiplied with: all matrices, LM head included (tied or not).

    Embedding tables are read, not multiplied; biases and norms are left out, as is usual.
    """
    D, N, K, H, F = model.embed_dim, model.num_heads, model.num_kv_heads, model.head_dim, model.mlp_dim
    attention = D * H * (N + 2 * K) + N * H * D
    mlp = (3 if model.gated_mlp else 2) * D * F
    return model.num_layers * (attention + mlp) + D * model.vocab_size


def training_flops(config: Config, pairs_per_row: int | float) -> float:
    """Needed FLOPs of one training step per token of a row, forward and backward.

        6 * matmul_parameters + 12 * N * H * L * pairs_per_row / T

    A parameter costs one multiply-add (2 FLOPs) forward and two backward. A visible (query, key) pair costs a dot
    product and a weighted sum over each of N heads of size H: 4 N H FLOPs forward and twice that backward.
    Frozen parameters (`lora.rank`) have no gradient of their own: 4 in place of 6 for the base, 6 for adapters.

    Args:
      config: gives the shape and T = `data.sequence_length`.
      pairs_per_row: visible pairs of a row of T tokens, averaged over rows and layers; where a part of the rows is
        padding, those of as many rows as their tokens would fill.
    """
    model = config.model
    attention = 12 * model.num_heads * model.head_dim * model.num_layers * pairs_per_row / config.data.sequence_length
    if config.lora.rank:
        return 4 * matmul_parameters(model) + 6 * adapter_parameters(config.lora, model) + attention
    return 6 * matmul_parameters(model) + attention


def dense_pairs(length: int) -> int:
    """Causal pairs of a row of T tokens that is one document: T (T + 1) / 2."""
    return length * (length + 1) // 2


def flops_report(config: Config, pairs_per_row: float, tokens_per_second: float, peak: Peak) -> dict[str, float]:
    """The `throughput/` metrics.

    `throughput/mfu` counts the pairs that are visible. `throughput/mfu_dense_equivalent` counts all pairs of dense
    causal attention over whole rows, needed or not: the MFU that a dense run would have at this speed. It compares
    patterns with each other and may pass 1.

    Args:
      config: the run's.
      pairs_per_row: as in `training_flops`.
      tokens_per_second: of the whole run, over all devices; padding is none.
      peak: from `peak_flops`.
    """
    dense = training_flops(config, dense_pairs(config.data.sequence_length))
    return {
        "throughput/tokens_per_second": tokens_per_second,
        "throughput/mfu": tokens_per_second * training_flops(config, pairs_per_row) / peak.flops_per_second,
        "throughput/mfu_dense_equivalent": tokens_per_second * dense / peak.flops_per_second,
    }


def peak_flops(dtype: str) -> Peak:
    """The peak of all devices of all processes, for matmuls in `dtype`.

    From `PEAK_BFLOAT16` where the device is known and `dtype` has 16 bits, else measured: the best of a few square
    matmuls on one device, within half a second. The CPU devices of a host share its cores, so a host counts as one.
    """
    device = jax.local_devices()[0]
    listed = _listed_peak(device.device_kind) if jnp.dtype(dtype).itemsize == 2 else None
    if listed:
        name, flops = listed
        return Peak(flops * jax.device_count(), f"table: {jax.device_count()} x {name}, bfloat16")
    n, count = (1024, jax.process_count()) if device.platform == "cpu" else (4096, jax.device_count())
    source = f"measured: {n} x {n} {dtype} matmul on {device.device_kind}"
    return Peak(count * _measure_matmul(n, dtype, device), source)


def _listed_peak(device_kind: str) -> tuple[str, float] | None:
    if "MIG" in device_kind:  # a slice of a GPU that calls itself by the whole one's name
        return None
    names = [name for name in PEAK_BFLOAT16 if re.match(rf"{re.escape(name)}\b", device_kind)]
    name = max(names, key=len, default=None)
    return (name, PEAK_BFLOAT16[name]) if name else None


def _measure_matmul(n: int, dtype: str, device: Any, seconds: float = 0.2) -> float:
    x = jax.device_put(jax.random.normal(jax.random.key(0), (n, n), dtype), device)  # zeros or ones run too fast
    matmul = jax.jit(jnp.matmul)
    matmul(x, x).block_until_ready()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        matmul(x, x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best
