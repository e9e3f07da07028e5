"""Autocast on the meta device: which operations run in which dtype under `torch.autocast("cuda")`.

On the CPU build `torch.autocast("cuda")` switches itself off, and nowhere does it act on meta
tensors. The lists are those of ATen/autocast_mode.h in the installed headers (a test compares
them); the four policies and the cache of weights are those of the same file.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.amp import autocast_mode
from torch.utils._pytree import tree_map

LOWER = (
    "_convolution.deprecated", "_convolution", "conv1d", "conv2d", "conv3d", "conv_tbc",
    "conv_transpose1d", "conv_transpose2d.input", "conv_transpose3d.input", "convolution",
    "prelu", "addmm", "addmv", "addr", "matmul", "einsum", "mm", "mv", "linalg_vecdot",
    "linear", "addbmm", "baddbmm", "bmm", "chain_matmul", "linalg_multi_dot",
    "_thnn_fused_lstm_cell", "_thnn_fused_gru_cell", "lstm_cell", "gru_cell", "rnn_tanh_cell",
    "rnn_relu_cell", "_scaled_dot_product_flash_attention", "scaled_dot_product_attention",
)  # fmt: skip
FP32 = (
    "acos", "asin", "cosh", "erfinv", "exp", "expm1", "log", "log10", "log2", "log1p",
    "reciprocal", "rsqrt", "sinh", "tan", "pow.Tensor_Scalar", "pow.Tensor_Tensor",
    "pow.Scalar", "softplus", "layer_norm", "native_layer_norm", "rms_norm", "group_norm",
    "frobenius_norm.dim", "nuclear_norm", "nuclear_norm.dim", "cosine_similarity",
    "poisson_nll_loss", "cosine_embedding_loss", "nll_loss", "nll_loss2d",
    "hinge_embedding_loss", "kl_div", "l1_loss", "smooth_l1_loss", "huber_loss", "mse_loss",
    "margin_ranking_loss", "multilabel_margin_loss", "soft_margin_loss", "triplet_margin_loss",
    "multi_margin_loss", "binary_cross_entropy_with_logits", "dist", "pdist", "cdist", "renorm",
    "logsumexp", "upsample_nearest1d", "_upsample_nearest_exact1d", "upsample_nearest2d",
    "_upsample_nearest_exact2d", "upsample_nearest3d", "_upsample_nearest_exact3d",
    "upsample_linear1d", "upsample_bilinear2d", "_upsample_bilinear2d_aa",
    "upsample_trilinear3d", "upsample_bicubic2d", "_upsample_bicubic2d_aa",
)  # fmt: skip
FP32_DTYPE = (
    "prod", "prod.dim_int", "softmax.int", "log_softmax.int", "cumprod", "cumsum",
    "linalg_vector_norm", "linalg_matrix_norm", "linalg_matrix_norm.str_ord", "sum",
    "sum.dim_IntList",
)  # fmt: skip
PROMOTE = (
    "addcdiv", "addcmul", "atan2", "bilinear", "cross", "dot", "vdot", "grid_sampler",
    "index_put", "tensordot", "scatter_add",
)  # fmt: skip
APPENDED = {"norm.Scalar": "ScalarOpt_dtype", "norm.ScalarOpt_dim": "ScalarOpt_dim_dtype"}
DEVICE = "cuda"  # whose autocast is meant; meta tensors stand for it


class Casts:
    """The casts of one trace; the weights' copies live until the outermost context ends."""

    def __init__(self) -> None:
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}  # id of a weight -> it and its copy
        self.made_before = False  # a context from before the trace, switched off by PyTorch

    def clear(self) -> None:
        """Let the copies of weights go."""
        self._copies.clear()

    def lower(self, value: Any) -> Any:
        """Cast to the autocast dtype, as for a matrix product."""
        dtype = torch.get_autocast_dtype(DEVICE)
        return tree_map(lambda each: self._cast(each, dtype), value)

    def fp32(self, value: Any) -> Any:
        """Cast to fp32, as for a norm."""
        return tree_map(lambda each: self._cast(each, torch.float32), value)

    def promoted(self, value: Any) -> Any:
        """Cast to fp32 where any of the tensors is fp32, else to the autocast dtype."""
        found: list[torch.dtype] = []
        tree_map(lambda each: found.append(each.dtype) if eligible(each) else None, value)
        return self.fp32(value) if torch.float32 in found else self.lower(value)

    def _cast(self, value: Any, dtype: torch.dtype) -> Any:
        """`cached_cast`: leaves that need a gradient are cast once."""
        if not eligible(value) or value.dtype == dtype:
            return value
        kept = (
            dtype == torch.get_autocast_dtype(DEVICE)
            and value.dtype == torch.float32
            and value.requires_grad
            and value.is_leaf
            and not value._is_view()
            and torch.is_autocast_cache_enabled()
        )
        if not kept:
            return value.to(dtype)
        if id(value) not in self._copies:
            self._copies[id(value)] = value, value.to(dtype)
        return self._copies[id(value)][1]


def eligible(value: Any) -> bool:
    """Whether autocast looks at this argument."""
    return (
        isinstance(value, Tensor)
        and value.device.type == "meta"
        and value.is_floating_point()
        and value.dtype != torch.float64
    )


def is_on() -> bool:
    """Whether the code that runs now is inside `torch.autocast("cuda")`."""
    return bool(torch.is_autocast_enabled(DEVICE))


@contextmanager
def honoured(casts: Casts, has_bf16: bool) -> Iterator[None]:
    """Let `torch.autocast("cuda")` keep its state where there is no CUDA; "meta" means the same."""
    context = autocast_mode.autocast
    init, enter = context.__init__, context.__enter__
    enabled, dtype_of = torch.is_autocast_enabled, torch.get_autocast_dtype
    available, clear = autocast_mode.is_autocast_available, torch.clear_autocast_cache
    common = torch.cuda.amp.common
    absent, supported = common.amp_definitely_not_available, torch.cuda.is_bf16_supported

    def started(self, device_type, *arguments, **options):
        init(self, _device(device_type), *arguments, **options)
        self.made_in_trace = True

    def entered(self):
        if self.device == DEVICE and not hasattr(self, "made_in_trace") and absent():
            casts.made_before = self._enabled = True
        return enter(self)

    def cleared():
        casts.clear()
        clear()

    try:
        context.__init__, context.__enter__ = started, entered  # type: ignore[method-assign]
        torch.is_autocast_enabled = lambda device=DEVICE: enabled(_device(device))
        torch.get_autocast_dtype = lambda device: dtype_of(_device(device))
        for module in (autocast_mode, torch.amp):
            module.is_autocast_available = lambda device: available(_device(device))
        torch.clear_autocast_cache = cleared
        common.amp_definitely_not_available = lambda: False
        torch.cuda.is_bf16_supported = lambda *_, **__: has_bf16
        yield
    finally:
        context.__init__, context.__enter__ = init, enter  # type: ignore[method-assign]
        torch.is_autocast_enabled, torch.get_autocast_dtype = enabled, dtype_of
        for module in (autocast_mode, torch.amp):
            module.is_autocast_available = available
        torch.clear_autocast_cache = clear
        common.amp_definitely_not_available = absent
        torch.cuda.is_bf16_supported = supported
        casts.clear()


def _device(device_type: str) -> str:
    return DEVICE if device_type == "meta" else device_type
