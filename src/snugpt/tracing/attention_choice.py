"""Which kernel `F.scaled_dot_product_attention` runs, by PyTorch's own rules.

On the meta device it always takes the plain form, whose scores are T x T; no GPU does where it has
a better one. The rules are those of aten/src/ATen/native/transformers/cuda/sdp_utils.cpp (read at
commit 001f694) and of sdp_utils_cpp.h in the installed headers; how each kernel is called is in
attention.cpp. Where that commit is newer than PyTorch 2.13, 2.13 is followed. Nested tensors and
ROCm are not covered.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from snugpt.spec.runtime import MASK_MULTIPLE, Runtime

Kernel = Literal["cudnn", "flash", "efficient", "math", "cpu"]
Version = tuple[int, int]

aten = torch.ops.aten
HALVES = (torch.float16, torch.bfloat16)
BACKENDS: dict[int, Kernel] = {0: "math", 1: "flash", 2: "efficient", 3: "cudnn"}  # SDPBackend
DEFAULT_ORDER = [1, 2, 0, 3, 4]
FIRST_FLASH, LAST_FUSED = (8, 0), (12, 1)  # check_flash_attention_hardware_support
LARGEST_FLASH_HEAD, LARGEST_CUDNN_HEAD = 256, 128
FLASH_MULTIPLE = 8  # the head size is padded up to it before the kernel


class Call(NamedTuple):
    """The arguments of one call: (B, H, T, D), (B, K, S, D), (B, K, S, Dv)."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    dropout: float
    causal: bool
    scale: float | None
    grouped: bool

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value."""
        return self.query, self.key, self.value

    @property
    def needs_grad(self) -> bool:
        """Whether a backward pass will come."""
        return torch.is_grad_enabled() and any(each.requires_grad for each in self.tensors)


def attention_kernel(call: Call, runtime: Runtime) -> Kernel:
    """Return the kernel that `runtime`'s device runs this call with.

    Raises:
        RuntimeError: `sdpa_kernel` allows none that could.
    """
    if runtime.device == "cpu":
        fused = torch.backends.cuda.flash_sdp_enabled() and call.dropout == 0
        return "cpu" if fused and _fused_shapes(call, grouped=True) else "math"
    capability = runtime.capability or (0, 0)
    for kernel in _order(capability):
        if _allowed(kernel) and _RULES[kernel](call, capability):
            return kernel
    raise RuntimeError("No available kernel. Aborting execution.")


def attend(kernel: Kernel, call: Call) -> Tensor:
    """Run the call on the meta device as that kernel: what it returns and what it keeps."""
    query, key, value = call.tensors
    mask = _added(call.mask, query.dtype)
    if kernel == "cudnn":
        return aten._scaled_dot_product_cudnn_attention(
            query, key, value, mask, call.needs_grad, call.dropout, call.causal, False,
            scale=call.scale,
        )[0]  # fmt: skip
    if kernel == "flash":
        size = query.shape[-1]
        scale = size**-0.5 if call.scale is None else call.scale
        padded = (_padded(each, FLASH_MULTIPLE) for each in call.tensors)
        output = aten._scaled_dot_product_flash_attention(
            *padded, call.dropout, call.causal, False, scale=scale
        )[0]
        return output if output.shape[-1] == size else output[..., :size]
    if kernel == "efficient":
        if mask is not None:
            mask = _aligned(mask).expand(*query.shape[:3], key.shape[-2])
        return aten._scaled_dot_product_efficient_attention(
            query, key, value, mask, call.needs_grad, call.dropout, call.causal, scale=call.scale
        )[0]
    if kernel == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, call.dropout, call.causal, attn_mask=mask, scale=call.scale
        )[0]
    return aten._scaled_dot_product_attention_math(
        query, key, value, mask, call.dropout, call.causal, scale=call.scale,
        enable_gqa=call.grouped,
    )[0]  # fmt: skip


def _order(capability: Version) -> list[Kernel]:
    """`priority_order`: what the user set, else cuDNN first on Hopper and its successor."""
    numbers = torch._C._get_sdp_priority_order()
    if numbers == DEFAULT_ORDER and _prefers_cudnn(capability):
        return ["cudnn", "flash", "efficient", "math"]
    return [BACKENDS[number] for number in numbers if number in BACKENDS]


def _prefers_cudnn(capability: Version) -> bool:
    """`check_prefer_cudnn_attention`; wheels from 2.11 on bring the cuDNN it asks for."""
    major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    return (major, minor) >= (2, 11) and capability[0] in (9, 10)


def _allowed(kernel: Kernel) -> bool:
    """What `torch.nn.attention.sdpa_kernel` leaves on."""
    switches = torch.backends.cuda
    return {
        "cudnn": switches.cudnn_sdp_enabled,
        "flash": switches.flash_sdp_enabled,
        "efficient": switches.mem_efficient_sdp_enabled,
        "math": switches.math_sdp_enabled,
    }[kernel]()


def _can_cudnn(call: Call, capability: Version) -> bool:
    head, value_head = call.query.shape[-1], call.value.shape[-1]
    sizes_fit = (
        max(head, value_head) <= LARGEST_CUDNN_HEAD or (head, value_head) == (192, 128)
    ) and head % 8 == value_head % 8 == 0
    return (
        FIRST_FLASH <= capability <= LAST_FUSED
        and _dtypes_in(call, HALVES)
        and _fused_shapes(call, grouped=call.grouped)
        and _mask_fits(call)
        and sizes_fit
        and call.key.shape[-2] != 1
        and (call.dropout * 16).is_integer()
        and not (call.dropout and call.query.shape[-2] == 1)
        and not torch.are_deterministic_algorithms_enabled()
    )


def _can_flash(call: Call, capability: Version) -> bool:
    head = call.query.shape[-1]
    same_heads = head == call.key.shape[-1] == call.value.shape[-1]
    small_card = (8, 6) <= capability <= (8, 9) or (12, 0) <= capability <= (12, 1)
    wide = call.needs_grad and small_card and not (head <= 192 or (not call.dropout and head > 224))
    square = call.query.shape[-2] == call.key.shape[-2]
    return (
        FIRST_FLASH <= capability <= LAST_FUSED
        and _dtypes_in(call, HALVES)
        and call.mask is None
        and _fused_shapes(call, grouped=call.grouped)
        and same_heads
        and head <= LARGEST_FLASH_HEAD
        and not wide
        and (square or not call.causal)
    )


def _can_efficient(call: Call, capability: Version) -> bool:
    """As up to 2.13, without grouped heads; pull request 191085 brings them later."""
    dtypes = (*HALVES, torch.float32) if capability >= (8, 0) else (torch.float16, torch.float32)
    head = call.query.shape[-1]
    half = call.query.dtype in HALVES
    tensor_cores = capability >= (8, 0) or (capability >= (7, 0) and half)
    multiple = 128 // (16 if half else 32) if tensor_cores else 1  # minimum_gemm_alignment
    return (
        (5, 0) <= capability <= LAST_FUSED
        and _dtypes_in(call, dtypes)
        and _fused_shapes(call, grouped=False)
        and head == call.key.shape[-1]
        and head % multiple == call.value.shape[-1] % multiple == 0
    )


def _can_math(call: Call, capability: Version) -> bool:
    return True


_RULES = {
    "cudnn": _can_cudnn,
    "flash": _can_flash,
    "efficient": _can_efficient,
    "math": _can_math,
}


def _dtypes_in(call: Call, allowed: tuple[torch.dtype, ...]) -> bool:
    return call.query.dtype in allowed and len({each.dtype for each in call.tensors}) == 1


def _fused_shapes(call: Call, *, grouped: bool) -> bool:
    """Four dimensions, one batch size, whole groups of heads, rows in one piece, no empty ones."""
    query, key, value = call.tensors
    if not query.dim() == key.dim() == value.dim() == 4:
        return False
    if not query.shape[0] == key.shape[0] == value.shape[0] or 0 in (
        query.shape[-2],
        key.shape[-2],
    ):
        return False
    if any(each.stride(-1) != 1 for each in call.tensors):
        return False
    heads = query.shape[1], key.shape[1], value.shape[1]
    if grouped:
        return heads[1] == heads[2] and heads[0] % heads[1] == 0
    return heads[0] == heads[1] == heads[2]


def _mask_fits(call: Call) -> bool:
    """`check_attn_mask_shape`."""
    mask, query, key = call.mask, call.query, call.key
    if mask is None:
        return True
    full = (*query.shape[:3], key.shape[-2])
    if mask.requires_grad or mask.dim() not in (2, 4):
        return False
    return all(
        size in (1, whole) for size, whole in zip(mask.shape, full[-mask.dim() :], strict=True)
    )


def _added(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """`convert_boolean_attn_mask`: a mask of truths becomes one that is added."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    minus_infinity = torch.full((), -torch.inf, dtype=dtype, device=mask.device)
    return torch.where(mask, 0.0, minus_infinity)


def _padded(tensor: Tensor, multiple: int) -> Tensor:
    rest = -tensor.shape[-1] % multiple
    return F.pad(tensor, (0, rest)) if rest else tensor


def _aligned(mask: Tensor) -> Tensor:
    """`preprocess_mask`: rows that begin at 16 bytes, cut back to their length."""
    padded = _padded(mask, MASK_MULTIPLE)
    return padded[..., : mask.shape[-1]]
