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
LARGE_CUBLAS_WORKSPACE_BYTES = 32 * MIB
TRANSPOSE_TILE = 60  # a transposed matrix is copied by tiles of 60 x 60 (aten/native/Copy.cpp)


def cublas_workspace(capability: tuple[int, int] | None) -> int:
    """One handle's workspace (ATen/cuda/CublasHandlePool.cpp, `parseChosenWorkspaceSize`).

    PyTorch 2.13.0 takes the large one for capabilities 9 and 10; a later one for 12 as well.
    """
    large = capability is not None and capability[0] in (9, 10)
    return LARGE_CUBLAS_WORKSPACE_BYTES if large else CUBLAS_WORKSPACE_BYTES


def flash_backward(T: int, H: int, K: int, D: int, element_bytes: int) -> tuple[int, ...]:
    """FlashAttention-2 (flash_api.cpp, `mha_bwd`): one fp32 sum per row, an fp32 query gradient.

    T is rounded up to 128, D to 32 and above 128 to 64; with grouped heads dk and dv are first made
    for every head.
    """
    rows = round_up(T, 128) * H
    columns = round_up(D, 32 if D <= 128 else 64)
    expanded = (T * H * D * element_bytes,) * 2 if K < H else ()
    return (rows * FP32, rows * columns * FP32, *expanded)


def efficient_backward(
    T: int, H: int, D: int, element_bytes: int, capability: tuple[int, int] | None
) -> tuple[int, ...]:
    """The memory-efficient kernel (attention_backward.cu), the larger of two moments.

    In fp32 the product of outputs and their gradients is summed outside the kernel: the sums, the
    product, and the sums before they are copied by head. Then, from capability 7.0 up, the sums and
    an fp32 query gradient in tiles of 64 x 64, 16 bytes beside each (kernel_backward.h,
    `workspace_elements_gq`). Below fp32 the kernel sums by itself.
    """
    sums = T * H * FP32
    tiles = -(-T // 64) * -(-D // 64) * H
    gradient = tiles * (64 * 64 * FP32 + 16)
    if element_bytes < FP32:
        return (sums, gradient)
    before = (sums, T * H * D * FP32, sums)
    inside = (sums, gradient) if capability is None or capability >= (7, 0) else (sums,)
    return max(before, inside, key=sum)


def multinomial(V: int) -> int:
    """Exponential noise the size of the probabilities (aten/native/Distributions.cpp), fp32."""
    return V * FP32


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
    """A kernel's bytes that both sides assume: what, how much, and where PyTorch says so.

    `lines` are of the source at MAIN_COMMIT; of a header, as 2.13.0 installs it, where a full stop
    follows them. They are empty where the source was not opened.
    """

    operation: str
    device: str
    bytes: str
    source: str
    lines: str


# A state of PyTorch's main branch a little later than 2.13.0, the one that was read.
MAIN_COMMIT = "27a4844d7fb"
ASSUMED: tuple[Assumed, ...] = (
    Assumed("matrix product: a cuBLAS workspace for each thread that multiplies", "cuda",
            "32 MiB of capability 9 and 10, else 8.125 MiB; two while training",
            "ATen/cuda/CublasHandlePool.cpp", "179-182, 307-345"),
    Assumed("FP8 product (_scaled_mm)", "cuda",
            "none beyond the cuBLAS workspace of its thread, which cuBLASLt shares by default",
            "ATen/cuda/CUDABlas.cpp", ""),
    Assumed("scaling and casting to FP8 (mul into an FP8 tensor)", "cuda",
            "none: the kernel casts what it stores",
            "ATen/native/cuda/CUDALoops.cuh", "965-967, 1059-1069."),
    Assumed("flash attention, forward", "cuda",
            "none counted; n·B·H·T·(D32 + 1)·4 where B·H·⌈T/64⌉ is below 1.6 x multiprocessors and"
            " the keys are split n times",
            "ATen/native/transformers/cuda/flash_attn/flash_api.cpp", "331-355"),
    Assumed("flash attention, backward", "cuda",
            "B·T128·H·4 + B·T128·H·D32·4 (D64 above 128); grouped heads + 2·B·T·H·D·2",
            "ATen/native/transformers/cuda/flash_attn/flash_api.cpp", "908-911, 961-983"),
    Assumed("memory-efficient attention, backward: sums", "cuda",
            "in fp32 2·B·T·H·4 + B·T·H·D·4, then B·T·H·4; below fp32 B·T·H·4",
            "ATen/native/transformers/cuda/attention_backward.cu", "759-764"),
    Assumed("memory-efficient attention, backward: query gradient", "cuda",
            "B·H·⌈T/64⌉·⌈D/64⌉·(64·64·4 + 16); none in fp32 below capability 7.0",
            "ATen/native/transformers/cuda/mem_eff_attention/kernel_backward.h",
            "613-621, 871-890."),
    Assumed("cuDNN attention, forward and backward", "cuda", "none counted",
            "ATen/native/cudnn/MHA.cpp", ""),
    Assumed("gradient of an embedding that is not ours", "cuda",
            "none counted; it sorts, (N / 10 + min(N, V))·C·4 at the end of backward",
            "ATen/native/cuda/EmbeddingBackwardKernel.cu", ""),
    Assumed("LayerNorm and fused RMSNorm with weights, backward", "cuda",
            "none counted; min(⌈B·T/32⌉, 32768 ÷ ⌈C/32⌉)·C elements, at most 2 MiB in bf16, where"
            " B·T > 65536 and C < 16 x multiprocessors",
            "ATen/native/cuda/layer_norm_kernel.cu", "957-985"),
    Assumed("index_add_", "cuda", "none",
            "ATen/native/cuda/Indexing.cu", "1190-1345"),
    Assumed("fused AdamW", "cuda", "none counted",
            "ATen/native/cuda/fused_adamw_impl.cu", ""),
    Assumed("norms of all gradients (_foreach_norm)", "cuda",
            "none counted; 4·tensors·⌈largest tensor ÷ 65536⌉",
            "ATen/native/cuda/ForeachReduceOp.cu", "452-465"),
    Assumed("sums and means over an axis", "cuda",
            "none counted; 4·outputs·blocks where one output is summed by several blocks",
            "ATen/native/cuda/Reduce.cuh", "193-203, 1260-1263."),
    Assumed("drawing a token (multinomial)", "cuda", "B·V·4",
            "ATen/native/Distributions.cpp", ""),
    Assumed("attention, forward", "cpu", "(tile·keys + tile·2 + tile·D)·4 per thread",
            "ATen/native/cpu/FlashAttentionKernel.cpp", "456-467"),
    Assumed("attention, backward", "cpu", "2·tile·keys·4 per thread + tile·4",
            "ATen/native/cpu/FlashAttentionKernel.cpp", "889-893, 929"),
    Assumed("LayerNorm, backward", "cpu", "2·threads·C·4",
            "ATen/native/cpu/layer_norm_kernel.cpp", "553-559"),
    Assumed("copy of a transposed matrix", "cpu", "60·60 elements, from 3600 elements up",
            "ATen/native/Copy.cpp", "48-58, 74-83"),
    Assumed("embedding, backward", "cpu", "none", "ATen/native/Embedding.cpp", ""),
)  # fmt: skip
