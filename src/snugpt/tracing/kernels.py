"""Kernels: what a device runs where the meta device would take another way.

Three things differ. The fused RMSNorm falls back to seven operations where no GPU is; optimizers
refuse the meta device their fused and foreach forms; and what a kernel allocates inside itself
shows nowhere. `kernels_of` mends the first two, `scratch_of` tells the third.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from math import prod

import torch
from torch import Tensor
from torch.optim import adam, adamw, optimizer
from torch.utils import _foreach_utils

from snugpt.estimate import scratch
from snugpt.spec.runtime import Runtime

aten = torch.ops.aten
_meta = torch.library.Library("aten", "IMPL")  # lives as long as the process, for "meta" only


@contextmanager
def kernels_of(runtime: Runtime) -> Iterator[None]:
    """Let the meta device take the ways that `runtime`'s device takes."""
    _register_fused_norms()
    names = ["_get_fused_kernels_supported_devices"]
    if runtime.device == "cuda":
        names.append("_get_foreach_kernels_supported_devices")
    before = [
        (module, name, getattr(module, name))
        for module in (adam, adamw, optimizer, _foreach_utils)
        for name in names
        if hasattr(module, name)
    ]
    try:
        for module, name, function in before:
            setattr(module, name, partial(_with_meta, function))
        yield
    finally:
        for module, name, function in before:
            setattr(module, name, function)


def _with_meta(supported_devices) -> list[str]:
    return [*supported_devices(), "meta"]


def _register_fused_norms() -> None:
    """CUDA's shapes of the fused RMSNorm: the norm and one fp32 per row (layer_norm_kernel.cu)."""
    if "Meta" in str(torch._C._dispatch_dump("aten::_fused_rms_norm")).split("Composite")[0]:
        return
    _meta.m.impl("_fused_rms_norm", "Meta", _fused_rms_norm, False)
    _meta.m.impl("_fused_rms_norm_backward", "Meta", _fused_rms_norm_backward, False)


def _fused_rms_norm(x: Tensor, normalized_shape, weight, eps) -> tuple[Tensor, Tensor]:
    rows = x.shape[: x.dim() - len(normalized_shape)]
    rstd = torch.empty((*rows, *[1] * len(normalized_shape)), dtype=torch.float32, device="meta")
    return torch.empty_like(x), rstd


def _fused_rms_norm_backward(grad, x, normalized_shape, rstd, weight, output_mask):
    grad_weight = torch.empty_like(weight) if weight is not None and output_mask[1] else None
    return torch.empty_like(x), grad_weight


def scratch_of(runtime: Runtime):
    """Return the function that tells what an operation's kernel takes for itself, in bytes."""
    cuda = runtime.device == "cuda"
    rules = _cuda_rules(runtime.capability) if cuda else _cpu_rules(runtime.num_threads)
    rules[aten.multinomial.default] = _multinomial

    def inside(func, args, result) -> tuple[int, ...]:
        rule = rules.get(func)
        return () if rule is None else rule(*args)

    return inside


def _multinomial(probabilities: Tensor, *_) -> tuple[int, ...]:  # (B, V)
    return (probabilities.shape[0] * scratch.multinomial(probabilities.shape[1]),)


def _cuda_rules(capability: tuple[int, int] | None):
    def flash(grad, q, k, v, *_):  # (B, T, H, D), (B, S, K, D)
        B, T, H, D = q.shape
        sizes = scratch.flash_backward(T, H, k.shape[2], D, q.element_size())
        return tuple(B * size for size in sizes)

    def flash_of_any_model(grad, q, k, v, *_):  # (B, H, T, D), (B, K, S, D)
        B, H, T, D = q.shape
        sizes = scratch.flash_backward(T, H, k.shape[1], D, q.element_size())
        return tuple(B * size for size in sizes)

    def efficient(grad, q, k, v, *_):  # (B, H, T, D)
        B, H, T, D = q.shape
        sizes = scratch.efficient_backward(T, H, D, q.element_size(), capability)
        return tuple(B * size for size in sizes)

    return {
        aten._flash_attention_backward.default: flash,
        aten._scaled_dot_product_flash_attention_backward.default: flash_of_any_model,
        aten._scaled_dot_product_efficient_attention_backward.default: efficient,
    }


def _cpu_rules(num_threads: int):
    def forward(q, k, *_):  # (B, H, T, D)
        return scratch.cpu_attention_forward(q.shape[2], k.shape[2], q.shape[3], num_threads)

    def backward(grad, q, k, *_):
        return scratch.cpu_attention_backward(q.shape[2], k.shape[2], num_threads)

    def layer_norm(grad, x, normalized_shape, *_):
        return scratch.cpu_layer_norm_backward(prod(normalized_shape), num_threads)

    def addmm(total, first, second, *_):
        if total.is_contiguous() or not total.t().is_contiguous():
            return ()
        return scratch.cpu_transposed_copy(*total.shape, total.element_size())

    return {
        aten._scaled_dot_product_flash_attention_for_cpu.default: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward.default: backward,
        aten.native_layer_norm_backward.default: layer_norm,
        aten.addmm.default: addmm,
    }
