"""Operations alone: what a kernel takes beside its results, to replace assumed figures.

Each is called twice and counted the second time, when libraries have what they keep. The scratch is
the allocator's peak above what is allocated after the call; beside it stands what the estimate says
where it says anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from campaign.counters import part
from campaign.jobs import Scratch
from snugpt.estimate.attending import attention
from snugpt.estimate.operations import Buffer, Net
from snugpt.model.attention import attend
from snugpt.run.cpu_allocations import CpuAllocations
from snugpt.spec.runtime import Runtime
from snugpt.spec.shape import ModelShape, shape_for

aten = torch.ops.aten
Call = Callable[[], object]
Case = tuple[str, Callable[[], Call], int | None]  # what, maker of the call, predicted scratch
BLOCK_BYTES = 512


def scratch(job: Scratch) -> dict[str, Any]:
    """Run one group; every case that fails says why and costs no other."""
    torch.manual_seed(0)
    groups = {"attention": attention_cases, "weights": weight_cases, "optimizer": optimizer_cases}
    missing: dict[str, str] = {}
    found = []
    for name, make, predicted in groups[job.group](job):
        counted = part(missing, name, lambda make=make: count(make(), job.device))
        if counted is not None:
            found.append({"case": name, **counted, "predicted_scratch_bytes": predicted})
    return {"cases": found, "missing": missing}


def count(call: Callable[[], object], device: str) -> dict[str, int]:
    """Bytes of the results of `call`, and the most it took beside them."""
    call()
    if device == "cpu":
        with CpuAllocations(keep_events=False) as allocations:
            results = call()
        kept = allocations.live_bytes
        del results
        return {"result_bytes": kept, "scratch_bytes": allocations.peak_bytes - kept}
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before, requested = torch.cuda.memory_allocated(), requested_now("current")
    torch.cuda.reset_peak_memory_stats()
    results = call()
    torch.cuda.synchronize()
    after, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    found = {
        "result_bytes": after - before,
        "scratch_bytes": peak - after,
        "requested_result_bytes": requested_now("current") - requested,
        "requested_scratch_bytes": requested_now("peak") - requested_now("current"),
    }
    del results
    return found


def requested_now(which: str) -> int:
    """PyTorch's count of requested bytes, before it rounds them up."""
    return int(torch.cuda.memory_stats()[f"requested_bytes.all.{which}"])


def attention_cases(job: Scratch) -> Iterable[Case]:
    """Forward and backward of every kernel: lengths, head sizes, grouped heads, windows."""
    backends = (("cpu", "fp32"),) if job.device == "cpu" else (
        ("flash", "bf16"), ("efficient", "bf16"), ("efficient", "fp32"),
    )  # fmt: skip
    sizes = (
        (2, 2048, 6, 6, 128), (8, 1024, 12, 12, 64), (3, 1000, 12, 3, 64), (1, 4096, 16, 1, 64),
        (1, 8192, 6, 6, 128), (5, 777, 4, 4, 80),
    )  # fmt: skip
    for backend, dtype in backends:
        for B, T, H, K, D in ((2, 64, 4, 2, 16),) if job.toy else sizes:
            shape = shape_for("llama", 1, context_len=T, width=H * D, heads=H, kv_heads=K)
            capability = torch.cuda.get_device_capability() if job.device == "cuda" else None
            runtime = Runtime(device=job.device, attention=backend, capability=capability,
                              num_threads=torch.get_num_threads())  # fmt: skip
            name = f"{backend} {dtype} B{B} T{T} H{H} K{K} D{D}"
            predicted = predicted_attention(shape, runtime, dtype, B)
            sizes_of_case = job, backend, dtype, B, T, H, K, D
            yield f"{name} forward", partial(attention_forward, *sizes_of_case), None
            yield f"{name} backward", partial(attention_backward, *sizes_of_case), predicted


def predicted_attention(shape: ModelShape, runtime: Runtime, dtype: str, batch: int) -> int:
    """What the estimate says the backward takes beside the gradients of q, k and v.

    Events name a buffer when it is allocated and again when it is freed.
    """
    net = Net(shape, runtime, dtype, shape.context_len)
    q, k, v = (net.per_token(n, h * shape.head_dim, "") for n, h in (
        ("q", shape.num_heads), ("k", shape.num_kv_heads), ("v", shape.num_kv_heads),
    ))  # fmt: skip
    operation = attention(net, q, k, v)
    gradients = {gradient for _, gradient in operation.gradients}
    alive: set[Buffer] = set()
    highest = now = 0
    for buffer in operation.backward:
        size = rounded(buffer.fixed_bytes + batch * buffer.sequence_bytes, runtime.block_bytes)
        now += -size if buffer in alive else size
        alive ^= {buffer}
        highest = max(highest, now)
    results = sum(
        rounded(g.fixed_bytes + batch * g.sequence_bytes, runtime.block_bytes)
        for g in gradients
        if g is not None
    )
    return highest - results


def rounded(num_bytes: int, block_bytes: int) -> int:
    """Up to whole blocks of the allocator."""
    return -(-num_bytes // block_bytes) * block_bytes


def inputs(job: Scratch, dtype: str, B: int, T: int, heads: Iterable[int], D: int) -> list[Tensor]:
    """Random tensors (B, T, heads, D) that want gradients."""
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    return [torch.randn(B, T, H, D, device=job.device).to(kind).requires_grad_() for H in heads]


def attention_forward(job: Scratch, backend, dtype, B, T, H, K, D) -> Call:
    """Attention with what it keeps for its backward."""
    q, k, v = inputs(job, dtype, B, T, (H, K, K), D)
    return lambda: attend(q, k, v, backend=backend)


def attention_backward(job: Scratch, backend, dtype, B, T, H, K, D) -> Call:
    """The backward alone: its results are the three gradients."""
    q, k, v = inputs(job, dtype, B, T, (H, K, K), D)
    out = attend(q, k, v, backend=backend)
    grad = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)


def weight_cases(job: Scratch) -> Iterable[Case]:
    """Norms with weights, the sum of an embedding's gradient, and products."""
    kind = torch.float32 if job.device == "cpu" else torch.bfloat16
    N, C, V = (128, 64, 512) if job.toy else (16384, 1536, 32768)
    x, grad = (torch.randn(N, C, device=job.device).to(kind) for _ in range(2))
    weight = torch.ones(C, device=job.device, dtype=kind)
    ids = torch.randint(V, (N,), device=job.device)
    wide = torch.randn(N, 4 * C, device=job.device).to(kind)
    rows = torch.randn(N, C, device=job.device)

    def layer_norm_backward() -> Call:
        _, mean, rstd = aten.native_layer_norm(x, [C], weight, None, 1e-5)
        wanted = [True, True, False]
        return lambda: aten.native_layer_norm_backward(
            grad, x, [C], mean, rstd, weight, None, wanted
        )

    def rms_norm_backward() -> Call:
        _, rstd = aten._fused_rms_norm(x, [C], weight, 1e-5)
        return lambda: aten._fused_rms_norm_backward(grad, x, [C], rstd, weight, [True, True])

    yield f"layer norm backward N{N} C{C}", layer_norm_backward, None
    if job.device == "cuda":  # elsewhere it is no kernel
        yield f"rms norm backward N{N} C{C}", rms_norm_backward, None
    calls: dict[str, tuple[Call, int | None]] = {
        f"layer norm N{N} C{C}": (lambda: aten.native_layer_norm(x, [C], weight, None, 1e-5), None),
        f"rms norm N{N} C{C}": (lambda: aten._fused_rms_norm(x, [C], None, 1e-5), None),
        f"product of weights' gradient N{N} C{C}": (lambda: wide.t() @ x, None),
        f"index_add N{N} V{V} C{C}": (
            lambda: torch.zeros(V, C, device=job.device).index_add_(0, ids, rows), 0
        ),
        f"sum over rows N{N} C{C}": (lambda: x.sum(0, dtype=torch.float32), None),
        f"mean of each row N{N} C{C}": (lambda: x.mean(-1, keepdim=True), None),
    }  # fmt: skip
    yield from ready(calls)


def optimizer_cases(job: Scratch) -> Iterable[Case]:
    """The fused AdamW, the norms of clipping, and reductions of the loss."""
    C, number = (64, 3) if job.toy else (1536, 24)
    weights = [torch.randn(4 * C, C, device=job.device).requires_grad_() for _ in range(number)]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    adamw = torch.optim.AdamW(weights, lr=1e-3, fused=True)
    grads = [weight.grad for weight in weights]
    N, V = (32, 512) if job.toy else (1024, 32768)
    logits = torch.randn(N, V, device=job.device)
    targets = torch.randint(V, (N, 1), device=job.device)
    probabilities = logits[:8].softmax(-1)
    calls: dict[str, tuple[Call, int | None]] = {
        f"fused AdamW {number} x {4 * C} x {C}": (adamw.step, 0),
        f"_foreach_norm {number} tensors": (lambda: torch._foreach_norm(grads), None),
        f"clip_grad_norm_ {number} tensors": (
            lambda: torch.nn.utils.clip_grad_norm_(weights, 1.0), None
        ),
        f"amax over logits N{N} V{V}": (lambda: logits.amax(1, keepdim=True), None),
        f"sum over logits N{N} V{V}": (lambda: logits.sum(1, keepdim=True), None),
        f"gather of targets N{N} V{V}": (lambda: logits.gather(1, targets), None),
        f"topk of 8 rows V{V}": (lambda: logits[:8].topk(50), None),
        f"multinomial of 8 rows V{V}": (lambda: torch.multinomial(probabilities, 1), None),
    }  # fmt: skip
    yield from ready(calls)


def ready(calls: dict[str, tuple[Call, int | None]]) -> Iterable[Case]:
    """Cases that need nothing made first."""
    for name, (call, predicted) in calls.items():
        yield name, partial(lambda call: call, call), predicted
