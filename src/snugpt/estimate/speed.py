"""Tokens per second from the card's rates: how fast a step can be, and how sure that is.

A step takes the time of its arithmetic at a share of the card's dense rate (MFU), a fixed cost for
every kernel that is started, and the optimizer's pass over memory. The shares are assumed until
records narrow them, so the band is wide. A machine that was measured brings its own rate.
"""

from __future__ import annotations

from typing import NamedTuple

from snugpt.estimate.flops import (
    forward_flops_per_token,
    muon_flops,
    recompute_factor,
    traffic_again_bytes_per_token,
)
from snugpt.estimate.fp8 import more_kernels_per_layer
from snugpt.estimate.lever_times import time_factor
from snugpt.estimate.parameters import num_parameters
from snugpt.estimate.sharding import sending_s
from snugpt.estimate.stacks.catalogue import stack_of
from snugpt.estimate.transfers import waiting_s
from snugpt.estimate.updating import FUSED_BYTES, Cost, Updating, update_cost
from snugpt.spec.gpu import Gpu
from snugpt.spec.memory import Band, Basis
from snugpt.spec.plan import SpeedEstimate
from snugpt.spec.recipe import BYTES, GenerationRecipe, Recipe, TrainingRecipe
from snugpt.spec.shape import ModelShape
from snugpt.units import SECONDS_PER_HOUR

# Share of the dense rate that eager PyTorch reaches in training; published runs of compiled
# nanochat are above. Assumed.
EAGER_SHARE = Band(0.20, 0.35, 0.50)
# Printed by nanochat on H100s: 41 % (12 layers), 46 to 50 % (16 to 32 layers), 59 % (24 layers in
# FP8, counted in bf16). Assumed for other cards.
COMPILED_SHARE = Band(0.38, 0.46, 0.55)
# Of 26 layers on 8 H100s, compiled, with the head (nanochat's log, 2 February 2026). Small models
# gain less; for ours, which starts every cast by itself, assumed.
FP8_SPEEDUP = 1.17
# Share of the dense rate that arithmetic reaches in generation. Assumed.
GENERATION_SHARE = 0.35
# Share of memory bandwidth that decoding reaches; gpt-fast reaches about 0.7 compiled. Assumed.
BANDWIDTH_SHARE = Band(0.25, 0.45, 0.70)
# On a CPU of unknown make, share of cores x 32 flops per cycle at 3 GHz. Assumed.
CPU_SHARE = Band(0.15, 0.45, 0.9)
MEASURED_BAND = 0.35  # a measured rate was taken on another shape: a third either way
KERNEL_START_S = {"cuda": 6e-6, "cpu": 12e-6, "mps": 12e-6, "rocm": 8e-6}
KERNELS_PER_LAYER = 90  # forward and backward of one layer, counted on the nanochat style
COMPILED_KERNELS_PER_LAYER = 30  # fused by the compiler. Assumed.


class Rate(NamedTuple):
    """Floating-point operations per second that training reaches, and what that rests on."""

    flops_per_s: Band
    basis: Basis
    source: str


def training_rate(
    gpu: Gpu, recipe: TrainingRecipe, measured_flops_per_s: float | None = None
) -> Rate:
    """The rate of training on a device: measured on it, else a share of its dense rate."""
    stack = stack_of(recipe)
    if measured_flops_per_s and stack.version is None:
        rate = measured_flops_per_s
        low, high = rate * (1 - MEASURED_BAND), rate * (1 + MEASURED_BAND)
        return Rate(Band(low, rate, high), "fitted", "measured on this machine")
    on_gpu = COMPILED_SHARE if recipe.compile == "on" else EAGER_SHARE
    share = CPU_SHARE if gpu.backend == "cpu" else on_gpu
    dtype = recipe.compute_dtype
    peak = dense_rate(gpu, dtype) * (FP8_SPEEDUP if recipe.fp8 == "on" else 1.0)
    band = Band(peak * share.low, peak * share.expected, peak * share.high)
    name = "fp8 beside bf16" if recipe.fp8 == "on" else dtype
    return Rate(band, "assumed", f"{share.expected:.0%} of {_three(peak / 1e12)} TFLOP/s {name}")


def _three(number: float) -> str:
    """Three significant digits, never as a power."""
    return f"{float(f'{number:.3g}'):g}"


def dense_rate(gpu: Gpu, dtype: str) -> float:
    """The card's dense rate for a compute dtype; fp32 is plain fp32, as PyTorch leaves TF32 off."""
    rates: dict[str, float] = {str(name): rate for name, rate in gpu.flops.items()}
    return rates.get(dtype, rates["fp32"])


def step_time_s(
    shape: ModelShape,
    recipe: TrainingRecipe,
    gpu: Gpu,
    flops_per_s: float,
    *,
    waits: bool = True,
) -> float:
    """Seconds of one optimizer step at a rate of arithmetic: counted, and fitted to records.

    Without `waits` copies to the host cost nothing; then it needs no walk, and is never too long.
    """
    tokens = recipe.total_batch_tokens / recipe.world_size
    arithmetic = stack_of(recipe).step_flops_per_token(shape, recipe) * tokens / flops_per_s
    recomputed = recompute_factor(shape, recipe)
    per_layer = COMPILED_KERNELS_PER_LAYER if recipe.compile == "on" else KERNELS_PER_LAYER
    if recipe.fp8 == "on" and recipe.compile == "off":
        per_layer += more_kernels_per_layer(shape)
    kernels = per_layer * shape.num_layers * recipe.grad_accum_steps * recomputed
    if recipe.stack == "snugpt":
        updates = update_cost(shape, Updating.of(recipe))
    else:
        updates = Cost(num_parameters(shape) * FUSED_BYTES, 0)  # fused and compiled
    kernels += updates.kernels
    owners = 1 if recipe.sharding == "none" or recipe.stack != "snugpt" else recipe.world_size
    optimizer = updates.bytes / owners / gpu.bandwidth_bytes_per_s
    again = traffic_again_bytes_per_token(shape, recipe) * tokens / gpu.bandwidth_bytes_per_s
    if recipe.optimizer == "muon":
        optimizer += muon_flops(shape) / matrix_sharers(recipe) / flops_per_s
    counted = arithmetic + again + kernels * KERNEL_START_S[gpu.backend] + optimizer
    if waits:
        counted += waiting_s(shape, recipe, gpu, arithmetic, optimizer)
    sending = sending_s(shape, recipe, gpu) if recipe.stack == "snugpt" else 0.0
    return counted * time_factor(recipe, gpu.backend) + sending


def matrix_sharers(recipe: TrainingRecipe) -> int:
    """Among how many devices Muon's matrices are divided. Ours are not where every rank updates
    everything, nor where each gathers all of them; nanochat divides them always."""
    ours = recipe.stack == "snugpt" and recipe.sharding != "optimizer"
    return 1 if ours else recipe.world_size


def speed_estimate(
    shape: ModelShape,
    recipe: Recipe,
    gpu: Gpu,
    *,
    measured_flops_per_s: float | None = None,
) -> SpeedEstimate:
    """Tokens per second, seconds per step and hours of a recipe on a device."""
    if isinstance(recipe, GenerationRecipe):
        return _generation_speed(shape, recipe, gpu)
    rate = training_rate(gpu, recipe, measured_flops_per_s)
    slow, step_s, fast = (
        step_time_s(shape, recipe, gpu, flops_per_s)
        for flops_per_s in (rate.flops_per_s.low, rate.flops_per_s.expected, rate.flops_per_s.high)
    )
    tokens = recipe.total_batch_tokens
    return SpeedEstimate(
        tokens_per_s=Band(tokens / slow, tokens / step_s, tokens / fast),
        step_s=step_s,
        total_tokens=recipe.total_tokens,
        hours=recipe.num_steps * step_s / SECONDS_PER_HOUR,
        basis=rate.basis,
        source=rate.source,
    )


def _generation_speed(shape: ModelShape, recipe: GenerationRecipe, gpu: Gpu) -> SpeedEstimate:
    """Decoding reads every weight and the cache once per token: bandwidth sets the pace."""
    cache = 2 * shape.num_layers * recipe.cache_len * shape.kv_dim * BYTES[recipe.kv_dtype]
    read_bytes = num_parameters(shape) * BYTES[recipe.weight_dtype] + recipe.batch * cache
    started = KERNELS_PER_LAYER / 3 * shape.num_layers * KERNEL_START_S[gpu.backend]
    arithmetic = recipe.batch * forward_flops_per_token(shape, recipe.cache_len)
    compute = arithmetic / (dense_rate(gpu, recipe.weight_dtype) * GENERATION_SHARE)
    slow, step_s, fast = (
        max(read_bytes / (gpu.bandwidth_bytes_per_s * share), compute) + started
        for share in (BANDWIDTH_SHARE.low, BANDWIDTH_SHARE.expected, BANDWIDTH_SHARE.high)
    )
    tokens = recipe.batch * recipe.max_new_tokens
    return SpeedEstimate(
        tokens_per_s=Band(recipe.batch / slow, recipe.batch / step_s, recipe.batch / fast),
        step_s=step_s,
        total_tokens=tokens,
        hours=recipe.max_new_tokens * step_s / SECONDS_PER_HOUR,
        basis="assumed",
        source=f"{BANDWIDTH_SHARE.expected:.0%} of {gpu.bandwidth_bytes_per_s / 1e9:.0f} GB/s",
    )
