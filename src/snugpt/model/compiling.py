"""The lever `compile = on`: each sublayer of each block is one graph for torch.compile.

The embedding, the loss, the optimizers and evaluation stay as they are. Attention is compiled up to
four times, once per pair of window and value embedding, the mlp once: layers alike share the code.

What the compiler keeps for the backward pass and when it frees a tensor is part of the product, so
the settings that decide it are pinned here. `estimate/compiled.py` is their torch-free twin, held
to PyTorch's own CUDA plan by `bench/inductor_oracle.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._dynamo import config as dynamo_config
from torch._functorch import config as functorch_config

from snugpt.model.gpt import GPT

# What is kept: pointwise results are made again, though a matrix product then reads them from
# memory and though they were made long before. So a norm's output, an activation's output and the
# bf16 copies of the weights are not kept; statistics, products and what attention reads are.
KEEPS = {
    "ban_recompute_materialized_backward": False,
    "ban_recompute_used_far_apart": False,
}
# When tensors live: in the order of the graph, as large as they are, and one that is done with goes
# back to the allocator at once instead of waiting for another of its size. A norm's weight gradient
# is summed by the kernel that goes back through the norm, 64 rows at a time, whatever batch and
# card.
LIVES = {
    "reorder_for_peak_memory": False,
    "allow_buffer_reuse": False,
    "comprehensive_padding": False,
    "shape_padding": False,
    "triton.mix_order_reduction_non_strict_mode": True,
    "triton.mix_order_reduction_split_size": 64,
}
MOST_GRAPHS = 64  # of one sublayer's code in a process: up to four a model


def compile_sublayers(model: GPT) -> None:
    """Let the training step run every sublayer compiled, from its next call on."""
    dynamo_config.recompile_limit = max(dynamo_config.recompile_limit, MOST_GRAPHS)
    for block in model.blocks:
        block.compiled = compiled(block.attention), compiled(block.mlp)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A sublayer as one compiled graph; each shape is compiled at its first call."""
    return torch.compile(function, backend=sublayer_backend, fullgraph=True, dynamic=False)


def sublayer_backend(graph: torch.fx.GraphModule, inputs: list[Any], **options: Any):
    """Inductor with the settings above, those that the installed PyTorch knows."""
    from torch._inductor import config as inductor_config  # 3 s of imports
    from torch._inductor.compile_fx import compile_fx

    known = inductor_config.get_config_copy()
    with functorch_config.patch(KEEPS):
        lives = {name: value for name, value in LIVES.items() if name in known}
        return compile_fx(graph, inputs, config_patches=lives, **options)
