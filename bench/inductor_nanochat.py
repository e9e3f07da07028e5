"""The compiled peak of nanochat's own micro-step, read from Inductor's CUDA plan without a card.

    python bench/inductor_nanochat.py CHECKOUT [DEPTH ...]

CHECKOUT is a folder with nanochat's sources from 14 March 2026 on (`git archive COMMIT nanochat`);
older ones cast by autocast, which is another on the CPU where the tracing runs. The environment is
that of bench/inductor_oracle.py. The unmodified model is compiled whole, as its trainer does, with
attention by FlashAttention's contract: it keeps q, k, v, its output and one fp32 per query and
head. Printed beside the plan: the closed form of the kept table in
`estimate/stacks/nanochat/kept.py`, 37 bytes per token, channel and layer.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from torch._inductor.compile_fx import compile_fx
from torch._subclasses import FakeTensorMode

from inductor_plan import Alive, Plan, meta, outputs_of, placeholders_of, plan, runnable
from snugpt.model.attention import attend

BATCH, SEQ_LEN, VOCABULARY, HEAD = 4, 1024, 32768, 128
PER_CHANNEL, PER_CHANNEL_ONCE = 37, 6


def attention(q, k, v, causal: bool = True, window_size: tuple[int, int] = (-1, -1)):
    """FlashAttention's signature; the first window entry counts the tokens before the own one."""
    left = window_size[0]
    return attend(q, k, v, backend="flash", window=None if left < 0 else left + 1)


def plans_of(checkout: Path, depth: int) -> tuple[Plan, Plan]:
    os.environ["NANOCHAT_DTYPE"] = "bfloat16"
    if str(checkout) not in sys.path:
        sys.path.insert(0, str(checkout))
    from nanochat import gpt

    gpt.flash_attn.flash_attn_func = attention

    def trace(inner_compile) -> None:
        heads = 64 * depth // HEAD
        config = gpt.GPTConfig(
            sequence_len=SEQ_LEN, vocab_size=VOCABULARY, n_layer=depth, n_head=heads,
            n_kv_head=heads, n_embd=64 * depth,
        )  # fmt: skip
        with FakeTensorMode():
            model = gpt.GPT(config)
            for module in (model.transformer.wte, *model.value_embeds.values()):  # as init_weights
                module.weight = torch.nn.Parameter(module.weight.to(torch.bfloat16))
            tokens = torch.zeros(BATCH, SEQ_LEN, dtype=torch.int64)

            def backend(graph, inputs):
                return compile_fx(graph, inputs, inner_compile=inner_compile)

            torch.compile(model, backend=backend, dynamic=False)(tokens, tokens.clone())

    return plan(trace)


def peak(plans: tuple[Plan, Plan]) -> tuple[int, int]:
    """Bytes above the step's inputs: kept between forward and backward, and the highest."""
    alive = Alive()
    inputs = [meta(node.meta["val"]) for node in placeholders_of(plans[0].graph)]
    for tensor in inputs:
        alive.follow(tensor, counted=False)
    with alive:
        _, *kept = runnable(plans[0])(list(inputs))
    between = alive.bytes
    assert len(kept) == len(outputs_of(plans[0].graph)) - 1
    arguments = []
    for node in placeholders_of(plans[1].graph):
        tangent = node.name.startswith("tangents")
        arguments.append(meta(node.meta["val"]) if tangent else kept.pop(0))
        alive.follow(arguments[-1])
    with alive:
        gradients = runnable(plans[1])(arguments)
    del gradients
    return between, alive.highest


def closed_form(depth: int) -> int:
    """Section 1's sum: per token, then the casts of the weights and the head's gradient in bf16."""
    N, C, L, V = BATCH * SEQ_LEN, 64 * depth, depth, VOCABULARY
    H = C // HEAD
    gates = 2 * H * -(-L // 2)
    per_token = (PER_CHANNEL * C + 12 * H + 8) * L + PER_CHANNEL_ONCE * C + 2 * V + 16 + gates
    return N * per_token + 2 * (12 * C * C * L + V * C) + 2 * V * C


def main() -> None:
    checkout, *depths = sys.argv[1:]
    print(f"torch {torch.__version__}, {BATCH} x {SEQ_LEN}: MiB kept, at the peak, closed form")
    for depth in [int(word) for word in depths] or [2, 4]:
        kept, highest = peak(plans_of(Path(checkout).resolve(), depth))
        form = closed_form(depth)
        row = "  ".join(f"{size / 2**20:9.2f}" for size in (kept, highest, form))
        print(f"d{depth:<3} {row}  {form / highest:.4f}", flush=True)


if __name__ == "__main__":
    main()
