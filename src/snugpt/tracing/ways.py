"""Ways: where an operation of any model goes on a device, and not on the meta device.

PyTorch decides some things by the device before autograd sees the operation: the attention kernel,
the dtype under autocast, whether dropout and RMSNorm are one kernel. The decisions are made here
at that same place of the dispatcher, under a key that is switched on for the time of a trace and
that no device of the present uses (AutocastIPU). So what C++ calls is caught like what Python does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet, _ExcludeDispatchKeyGuard

from snugpt.errors import FailedError
from snugpt.spec.runtime import Runtime
from snugpt.tracing import autocast
from snugpt.tracing.attention_choice import Call, attend, attention_kernel
from snugpt.tracing.refusals import Remedy

KEY = DispatchKey.AutocastIPU
KEY_NAME = "AutocastIPU"
aten = torch.ops.aten
RECURRENT = ("lstm.input", "gru.input", "rnn_tanh.input", "rnn_relu.input")


class Ways:
    """The device's ways for the time of one trace, and which were taken."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.attention: Counter[str] = Counter()
        self.casts = autocast.Casts()


_taken: list[Ways] = []


@contextmanager
def ways_of(runtime: Runtime) -> Iterator[Ways]:
    """Send operations on meta tensors the way that `runtime`'s device takes."""
    _register()
    ways = Ways(runtime)
    with ExitStack() as stack:
        if runtime.device == "cuda":
            has_bf16 = (runtime.capability or (0, 0)) >= (8, 0)
            stack.enter_context(autocast.honoured(ways.casts, has_bf16))
        _taken.append(ways)
        stack.callback(_taken.pop)
        _switch(on=True)
        stack.callback(_switch, on=bool(_taken[:-1]))
        yield ways


def _switch(*, on: bool) -> None:
    torch._C._dispatch_tls_set_dispatch_key_excluded(KEY, not on)
    torch._C._dispatch_tls_set_dispatch_key_included(KEY, on)


def _below() -> _ExcludeDispatchKeyGuard:
    """Calls inside go on without us, as autocast's own do."""
    return _ExcludeDispatchKeyGuard(DispatchKeySet(KEY))


@cache
def _register() -> tuple[torch.library.Library, ...]:
    """Register every operation of the lists; without the key they are never reached."""
    others = torch.library.Library("_", "IMPL")
    others.fallback(torch.library.fallthrough_kernel, KEY_NAME)
    ours = torch.library.Library("aten", "IMPL")
    special: dict[str, Callable[..., Any]] = {
        "scaled_dot_product_attention": _attention,
        "rms_norm": _rms_norm,
        "dropout": _dropout,
    }
    special |= {name: _recurrent(_operation(name)) for name in RECURRENT}
    policies = (
        (autocast.LOWER, _lower),
        (autocast.FP32, _fp32),
        (autocast.FP32_DTYPE, _fp32_dtype),
        (autocast.PROMOTE, _promote),
        (autocast.APPENDED, _append_dtype),
    )
    for names, policy in policies:
        for name in names:
            if name not in special:
                special[name] = policy(_operation(name))
    for name, kernel in special.items():
        ours.impl(name, kernel, KEY_NAME)
    return others, ours


def _operation(name: str):
    packet, _, overload = name.partition(".")
    return getattr(getattr(aten, packet), overload or "default")


def _lower(operation):
    def kernel(*args, **kwargs):
        with _below():
            if autocast.is_on():
                args, kwargs = _taken[-1].casts.lower((args, kwargs))
            return operation(*args, **kwargs)

    return kernel


def _fp32(operation):
    def kernel(*args, **kwargs):
        with _below():
            if autocast.is_on():
                args, kwargs = _taken[-1].casts.fp32((args, kwargs))
            return operation(*args, **kwargs)

    return kernel


def _promote(operation):
    def kernel(*args, **kwargs):
        with _below():
            if autocast.is_on():
                args, kwargs = _taken[-1].casts.promoted((args, kwargs))
            return operation(*args, **kwargs)

    return kernel


def _fp32_dtype(operation):
    """Ask for fp32 unless the caller asks for a dtype himself."""

    def kernel(*args, **kwargs):
        with _below():
            if autocast.is_on() and autocast.eligible(args[0]):
                names = [each.name for each in operation._schema.arguments]
                place = names.index("dtype")
                if len(args) > place:
                    given = args[place] or torch.float32
                    args = (*args[:place], given, *args[place + 1 :])
                elif kwargs.get("dtype") is None:
                    kwargs = {**kwargs, "dtype": torch.float32}
            return operation(*args, **kwargs)

    return kernel


def _append_dtype(operation):
    name = operation._schema.name.removeprefix("aten::")
    overload = autocast.APPENDED[f"{name}.{operation._overloadname}"]
    with_dtype = getattr(getattr(aten, name), overload)
    has_dim = operation._overloadname.endswith("dim")

    def kernel(self: Tensor, p=2, dim=(), keepdim=False):
        with _below():
            rest = (dim, keepdim) if has_dim else ()
            if autocast.is_on() and autocast.eligible(self):
                return with_dtype(self, p, *rest, dtype=torch.float32)
            return operation(self, p, *rest)

    return kernel


def _attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None,
    enable_gqa=False,
) -> Tensor:  # fmt: skip
    """The kernel that the device would choose; autocast is off inside, our own ways are not."""
    ways, on = _taken[-1], autocast.is_on()
    with _below():
        if on:
            query, key, value, attn_mask = ways.casts.lower((query, key, value, attn_mask))
        call = Call(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        if query.device.type != "meta":
            return aten.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale,
                enable_gqa=enable_gqa,
            )  # fmt: skip
        kernel = attention_kernel(call, ways.runtime)
        ways.attention[kernel] += 1
        if kernel != "math":
            return attend(kernel, call)
    with _autocast_off(on):
        return attend(kernel, call)


@contextmanager
def _autocast_off(on: bool) -> Iterator[None]:
    torch.set_autocast_enabled(autocast.DEVICE, False)
    try:
        yield
    finally:
        torch.set_autocast_enabled(autocast.DEVICE, on)


def _rms_norm(x: Tensor, normalized_shape, weight=None, eps=None) -> Tensor:
    """One kernel on CUDA where the weight has the input's dtype (layer_norm.cpp, `rms_norm`)."""
    ways = _taken[-1]
    with _below():
        if autocast.is_on():
            x, weight = ways.casts.fp32((x, weight))
        if x.device.type != "meta":
            return aten.rms_norm(x, normalized_shape, weight, eps)
        one_dtype = weight is None or weight.dtype == x.dtype
        if ways.runtime.device == "cuda" and one_dtype and x.dtype != torch.float64:
            return aten._fused_rms_norm(x, normalized_shape, weight, eps)[0]
        return _rms_norm_in_parts(x, normalized_shape, weight, eps)


def _rms_norm_in_parts(x: Tensor, normalized_shape, weight, eps) -> Tensor:
    """`rms_norm_composite` of layer_norm.cpp, which runs on the CPU: halves are raised to fp32."""
    dims = list(range(x.dim() - len(normalized_shape), x.dim()))
    wide = x.to(torch.float32) if x.dtype in (torch.float16, torch.bfloat16) else x
    eps = torch.finfo(wide.dtype).eps if eps is None else eps
    scale = torch.rsqrt(torch.mean(torch.pow(wide, 2), dims, keepdim=True).add_(eps))
    normed = wide.mul(scale)
    if weight is not None:
        normed = normed.mul(weight)
    return normed.type_as(x)


def _recurrent(operation):
    """Refuse on CUDA: cuDNN runs the layer as one, and keeps what only it knows."""

    def kernel(*args, **kwargs):
        if _taken[-1].runtime.device == "cuda" and args[0].device.type == "meta":
            raise FailedError(
                f"{operation._schema.name.removeprefix('aten::')} runs inside cuDNN on a GPU, and"
                " how much it keeps is not known",
                hint=Remedy("snugpt.trace(..., gpu='cpu')", gpu="cpu", compute_dtype=None),
            )
        with _below():
            return operation(*args, **kwargs)

    return kernel


def _dropout(x: Tensor, p: float, train: bool) -> Tensor:
    """One kernel on CUDA, which keeps one byte per element (Dropout.cpp)."""
    with _below():
        fused = _taken[-1].runtime.device == "cuda" and x.device.type == "meta"
        if fused and train and 0 < p < 1 and x.numel():
            return aten.native_dropout(x, p, train)[0]
        return aten.dropout(x, p, train)
