"""Scratch: what kernels allocate inside themselves, seen neither from Python nor on meta tensors.

The walk and the trace are both told these bytes, from here; nothing else is assumed twice. Each
function names the file of PyTorch it was read from; those of CUDA stay assumed until a record of a
real card confirms them.

Shapes: T tokens (queries), S keys, H heads, K kv heads, D head size; per sequence unless said
otherwise.
"""

from __future__ import annotations

from typing import NamedTuple

from snugpt.units import MIB, round_up

FP32 = 4  # bytes

CUBLAS_WORKSPACE_BYTES = 4096 * 2 * 1024 + 8 * 16 * 1024  # ":4096:2:16:8", 8.125 MiB
HOPPER_CUBLAS_WORKSPACE_BYTES = 32 * MIB
TRANSPOSE_TILE = 60  # a transposed matrix is copied by tiles of 60 x 60 (aten/native/Copy.cpp)


def cublas_workspace(capability: tuple[int, int] | None) -> int:
    """One handle's workspace (ATen/cuda/CublasHandlePool.cpp, `getChosenWorkspaceSize`)."""
    hopper = capability is not None and capability[0] == 9
    return HOPPER_CUBLAS_WORKSPACE_BYTES if hopper else CUBLAS_WORKSPACE_BYTES


def flash_backward(T: int, H: int, K: int, D: int, element_bytes: int) -> tuple[int, ...]:
    """FlashAttention-2 (flash_api.cpp, `mha_bwd`): one fp32 sum per row, an fp32 query gradient.

    T is rounded up to 128, D to 32; with grouped heads dk and dv are first made for every head.
    """
    rows = round_up(T, 128) * H
    expanded = (T * H * D * element_bytes,) * 2 if K < H else ()
    return (rows * FP32, rows * round_up(D, 32) * FP32, *expanded)


def efficient_backward(T: int, H: int, D: int, element_bytes: int) -> tuple[int, ...]:
    """The memory-efficient kernel (attention_backward.cu): below fp32 an fp32 query gradient."""
    rows = round_up(T, 32) * H
    return (rows * FP32, rows * D * FP32) if element_bytes < FP32 else (rows * FP32,)


def cpu_attention_tile(T: int, S: int) -> tuple[int, int]:
    """Tile of the CPU's kernel in queries and keys (FlashAttentionKernel.cpp)."""
    queries = 256 if T >= 768 else 64 if T >= 192 else 32
    return min(queries, T), min(512, S)


def cpu_attention_forward(T: int, S: int, D: int, num_threads: int) -> tuple[int, ...]:
    """Scores, row maxima and sums, and the output of one tile, for each thread, in fp32.

    The same for any number of sequences.
    """
    queries, keys = cpu_attention_tile(T, S)
    return (queries * (keys + 2 + D) * FP32 * num_threads,)


def cpu_attention_backward(T: int, S: int, num_threads: int) -> tuple[int, ...]:
    """Two tiles for each thread and one row of sums; the same for any number of sequences."""
    queries, keys = cpu_attention_tile(T, S)
    return (2 * queries * keys * FP32 * num_threads, queries * FP32)


def cpu_layer_norm_backward(channels: int, num_threads: int) -> tuple[int, ...]:
    """Partial sums of the weight gradient, (2, threads, C) fp32 (layer_norm_kernel.cpp)."""
    return (2 * num_threads * channels * FP32,)


def cpu_transposed_copy(rows: int, columns: int, element_bytes: int) -> tuple[int, ...]:
    """The tile through which a transposed matrix is copied, once it is as large as one tile."""
    return (TRANSPOSE_TILE**2 * element_bytes,) if rows * columns >= TRANSPOSE_TILE**2 else ()


class Assumed(NamedTuple):
    """A kernel's bytes that both sides assume: what, how much, and where PyTorch says so."""

    operation: str
    device: str
    bytes: str
    source: str


ASSUMED: tuple[Assumed, ...] = (
    Assumed("matrix product (cuBLAS workspace, one per thread that multiplies)", "cuda",
            "32 MiB on Hopper, else 8.125 MiB; two while training",
            "ATen/cuda/CublasHandlePool.cpp"),
    Assumed("flash attention, backward", "cuda",
            "B·T128·H·4 + B·T128·H·D32·4; grouped heads + 2·B·T·H·D·2",
            "ATen/native/transformers/cuda/flash_attn/flash_api.cpp"),
    Assumed("memory-efficient attention, backward", "cuda",
            "B·T32·H·4; below fp32 + B·T32·H·D·4",
            "ATen/native/transformers/cuda/attention_backward.cu"),
    Assumed("cuDNN attention, forward and backward", "cuda", "none counted",
            "ATen/native/cudnn/MHA.cpp"),
    Assumed("fused RMSNorm and LayerNorm, forward and backward", "cuda",
            "none counted", "ATen/native/cuda/layer_norm_kernel.cu"),
    Assumed("gradient of an embedding that is not ours", "cuda",
            "none counted; it sorts, (N / 10 + min(N, V))·C·4 at the end of backward",
            "ATen/native/cuda/EmbeddingBackwardKernel.cu"),
    Assumed("index_add_", "cuda", "none counted", "ATen/native/cuda/Indexing.cu"),
    Assumed("fused AdamW", "cuda", "none counted", "ATen/native/cuda/FusedAdamWKernel.cu"),
    Assumed("norms of all gradients (_foreach_norm)", "cuda", "none counted",
            "ATen/native/cuda/ForeachReduceOp.cu"),
    Assumed("sums and means over an axis", "cuda", "none counted", "ATen/native/cuda/Reduce.cuh"),
    Assumed("attention, forward", "cpu", "tile·(keys + 2 + D)·4 per thread",
            "ATen/native/cpu/FlashAttentionKernel.cpp"),
    Assumed("attention, backward", "cpu", "2 tiles·4 per thread + tile rows·4",
            "ATen/native/cpu/FlashAttentionKernel.cpp"),
    Assumed("LayerNorm, backward", "cpu", "2·threads·C·4",
            "ATen/native/cpu/layer_norm_kernel.cpp"),
    Assumed("copy of a transposed matrix", "cpu", "60·60 elements", "ATen/native/Copy.cpp"),
)  # fmt: skip
