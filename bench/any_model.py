"""Other people's models traced without a GPU, beside PyTorch's own MemTracker.

    pip install transformers
    git clone https://github.com/karpathy/nanoGPT
    python bench/any_model.py --nanogpt nanoGPT

No weights and no GPU are needed: the models are built from their configurations on the meta device.
MemTracker runs the same loop under the same choice of kernels and dtypes, so what is compared is
the accounting of memory: which storages live, when. It keeps no list of what lies inside kernels,
and neither is that in the requested bytes.

The last table has three cases whose peaks are known from an earlier tracer. That one raised the
logits to fp32 before `cross_entropy`. PyTorch's CUDA autocast does not: its list has `log_softmax`
and `nll_loss`, and `cross_entropy` asks `log_softmax` for the dtype of its input. So both ways are
shown; a model that raises its logits itself, as Hugging Face's do, is the same in both. A loop that
holds its output during backward, as nanoGPT's own does, keeps the bf16 logits besides: for cases A
and B that comes to the same bytes as the raised ones (`keep_outputs`, see bench/peers.py).
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch.distributed._tools.mem_tracker import MemTracker

import snugpt
from snugpt.spec.catalogue import find_gpu
from snugpt.spec.runtime import runtime_for
from snugpt.tracing.kernels import kernels_of
from snugpt.tracing.placing import OnDevice, called, loss_of
from snugpt.tracing.ways import ways_of
from snugpt.units import MIB

T = 1024


@dataclass(frozen=True)
class Case:
    """A model with its batch on a card."""

    name: str
    build: Callable[[], torch.nn.Module]
    batch: Callable[[int], Any]
    batch_size: int = 8
    gpu: str = "h100"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nanogpt", help="a checkout of karpathy/nanoGPT")
    folder = parser.parse_args().nanogpt
    warnings.filterwarnings("ignore")
    print(f"torch {torch.__version__}, two steps, AdamW fused, clip 1.0, T {T}; MiB\n")
    cases = [*(nanogpt(folder) if folder else ()), *hugging_face()]
    head = f"{'model':24}{'card':>9}{'batch':>6}{'autocast':>9}{'requested':>11}{'MemTracker':>11}"
    print(head + f"{'ratio':>9}  peak in  attention")
    for case in cases:
        one_row(case)
    print()
    largest_batches(cases)
    print()
    known_cases(cases)


def one_row(case: Case) -> None:
    with quiet():
        traced = snugpt.trace(case.build, case.batch, gpu=case.gpu, batch_size=case.batch_size)
    dtype = traced.tracer.autocast
    with quiet():
        tracker = mem_tracker_peak(case, dtype)
    # MemTracker rounds to 512 bytes on cuda only: so its meta figure stands beside unrounded ones.
    exact = replace(traced.timeline, block_bytes=1).read(1, workspace=False)[0].bytes
    attention = ", ".join(f"{count} {kernel}" for kernel, count in traced.attention.items())
    autocast = "-" if dtype is None else str(dtype).removeprefix("torch.")
    print(
        f"{case.name:24}{case.gpu:>9}{case.batch_size:6}{autocast:>9}"
        f"{traced.requested_bytes / MIB:11,.1f}{tracker / MIB:11,.1f}{exact / tracker:9.5f}"
        f"  {traced.peak_phase:8} {attention}"
    )


def mem_tracker_peak(case: Case, dtype: torch.dtype | None) -> int:
    """The peak of the second step in bytes, by PyTorch's own tracker."""
    gpu = find_gpu(case.gpu)
    runtime = runtime_for(gpu, "bf16" if dtype == torch.bfloat16 else "fp32")
    with kernels_of(runtime), ways_of(runtime), OnDevice(is_cuda=True):
        with torch.device("meta"):
            model = case.build().train()
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)

        def step() -> None:
            with torch.device("meta"):
                batch = case.batch(case.batch_size)
            with torch.autocast("cuda", dtype or torch.bfloat16, enabled=dtype is not None):
                output = called(model, batch)
                loss = loss_of(output)
                assert loss is not None, "a case without a loss"
            del output
            loss.backward()
            del loss, batch
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        step()
        tracker = MemTracker()
        tracker.track_external(model, optimizer)
        with tracker:
            step()
    snapshot = tracker.get_tracker_snapshot("peak")
    return sum(device["Total"] for device in snapshot.values())


def largest_batches(cases: list[Case]) -> None:
    cards = ("t4", "rtx-4090", "a100-40gb", "h100")
    print("largest batch by three traces and a division, predicted, never run on a card")
    print(f"{'model':24}" + "".join(f"{card:>11}" for card in cards))
    for case in cases:
        if case.gpu != "h100" or case.batch_size != 8:
            continue
        row = f"{case.name:24}"
        for card in cards:
            with quiet():
                traced = snugpt.trace(case.build, case.batch, gpu=card, batch_size=2)
                row += f"{traced.largest_batch()!s:>11}"
        print(row)


def known_cases(cases: list[Case]) -> None:
    known = {
        ("nanoGPT GPT-2 124M", 8): ("A", 9005.6),
        ("nanoGPT GPT-2 124M", 32): ("B", 31042.9),
        ("HF Llama no cache", 8): ("C", 8793.6),
    }
    print(f"{'case':6}{'model':24}{'batch':>6}{'known':>11}{'fp32 loss':>11}{'ratio':>9}"
          f"{'as CUDA':>11}")  # fmt: skip
    for case in cases:
        name, mib = known.get((case.name, case.batch_size), ("", 0.0))
        if not name or case.gpu != "h100":
            continue
        with quiet():
            raised = snugpt.trace(
                lambda build=case.build: Raised(build()),
                case.batch,
                gpu=case.gpu,
                batch_size=case.batch_size,
            ).requested_bytes
            as_cuda = snugpt.trace(
                case.build, case.batch, gpu=case.gpu, batch_size=case.batch_size
            ).requested_bytes
        print(
            f"{name:6}{case.name:24}{case.batch_size:6}{mib:11,.1f}{raised / MIB:11,.1f}"
            f"{raised / MIB / mib:9.5f}{as_cuda / MIB:11,.1f}"
        )


class Raised(torch.nn.Module):
    """A model whose cross_entropy gets its logits in fp32."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args, **kwargs):
        plain = F.cross_entropy
        F.cross_entropy = lambda logits, *rest, **more: plain(logits.float(), *rest, **more)
        try:
            return self.model(*args, **kwargs)
        finally:
            F.cross_entropy = plain


def nanogpt(folder: str) -> Iterator[Case]:
    sys.path.insert(0, folder)
    from model import GPT, GPTConfig

    def build() -> torch.nn.Module:
        return GPT(GPTConfig(vocab_size=50257, dropout=0.0, bias=True))

    def medium() -> torch.nn.Module:
        return GPT(GPTConfig(n_layer=24, n_head=16, n_embd=1024, dropout=0.0, bias=False))

    yield Case("nanoGPT GPT-2 124M", build, pair)
    yield Case("nanoGPT GPT-2 124M", build, pair, 32)
    yield Case("nanoGPT GPT-2 124M", build, pair, gpu="t4")
    yield Case("nanoGPT GPT-2 350M", medium, pair)


def hugging_face() -> Iterator[Case]:
    try:
        from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
    except ModuleNotFoundError:
        return

    def gpt2() -> torch.nn.Module:
        return GPT2LMHeadModel(GPT2Config())

    def gpt2_dry() -> torch.nn.Module:
        none = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
        return GPT2LMHeadModel(GPT2Config(**none, use_cache=False))

    def llama(**options) -> torch.nn.Module:
        config = LlamaConfig(
            hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
            vocab_size=32000, max_position_embeddings=T, **options,
        )  # fmt: skip
        return LlamaForCausalLM(config)

    def recomputed() -> torch.nn.Module:
        model = llama(use_cache=False)
        model.gradient_checkpointing_enable()
        return model

    yield Case("HF GPT-2 124M", gpt2, labelled)
    yield Case("HF GPT-2 no dropout", gpt2_dry, labelled)
    yield Case("HF GPT-2 124M", gpt2, labelled, gpu="t4")
    yield Case("HF Llama 134M", llama, labelled)
    yield Case("HF Llama no cache", lambda: llama(use_cache=False), labelled)
    yield Case("HF Llama grouped heads", lambda: llama(num_key_value_heads=4), labelled)
    yield Case("HF Llama checkpointed", recomputed, labelled)
    yield Case("HF Llama 134M", llama, labelled, gpu="t4")


def pair(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and targets, in order."""
    one, other = (torch.empty(size, T, dtype=torch.int64, device="meta") for _ in range(2))
    return one, other


def labelled(size: int) -> dict[str, torch.Tensor]:
    """Tokens and labels by name, without a mask."""
    return dict(zip(("input_ids", "labels"), pair(size), strict=True))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What models print while they are built is not for this table."""
    with contextlib.redirect_stdout(None):
        yield


if __name__ == "__main__":
    main()
