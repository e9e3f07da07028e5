"""What a compiled layer keeps and how high its memory stands, read from Inductor's own CUDA plan.

    python bench/inductor_oracle.py [--write] [ROWS]

Needs an environment of its own with PyTorch's CUDA wheel (5 GB; no card): in a fresh venv,
`pip install torch==2.13.0 msgspec click` from the default index, and `PYTHONPATH=src`. About 15 s a
row on a 2-core machine. `--write` replaces tests/estimate/golden/inductor_blocks.json, which
`tests/estimate/test_compiled.py` holds the function of `estimate/compiled.py` to, and the table in
bench/results. ROWS is a comma-separated list of row numbers.

Bytes are live tensors, each rounded up to 512, without weights. A layer's input is counted from the
start, its incoming gradient through the whole backward pass, its weights' gradients to the end.
"""

from __future__ import annotations

import json
import sys
from functools import cache, partial
from pathlib import Path

import torch
from torch._subclasses import FakeTensorMode

from inductor_plan import Alive, Plan, meta, outputs_of, placeholders_of, plan, runnable
from snugpt.model.compiling import sublayer_backend
from snugpt.model.gpt import DTYPES, GPT
from snugpt.spec.runtime import Runtime
from snugpt.spec.shape import ModelShape, shape_for

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests/estimate/golden/inductor_blocks.json"
TABLE = ROOT / "bench/results/inductor_oracle.txt"
DEPTH = 8  # of the model a layer is taken from: some layers have windows, every second a table


def row(style: str, width: int, seq_len: int, batch: int, layer: int = DEPTH - 1, **pinned) -> dict:
    capability = list(pinned.pop("capability", (9, 0)))
    return {
        "style": style, "width": width, "seq_len": seq_len, "batch": batch, "layer": layer,
        "compute_dtype": "bf16", "capability": capability, "pinned": pinned,
    }  # fmt: skip


ROWS = (
    # the last layer sees the whole context and has a value embedding; 6 has no table; 1 both
    row("nanochat", 256, 512, 1), row("nanochat", 256, 512, 1, 6),
    row("nanochat", 512, 1024, 4), row("nanochat", 512, 1024, 4, 6),
    row("nanochat", 768, 2048, 8), row("nanochat", 768, 2048, 8, 6),
    row("nanochat", 768, 2048, 8, 1), row("nanochat", 768, 2048, 8, 0),
    row("nanochat", 1024, 2048, 16, 6), row("nanochat", 1024, 4096, 2),
    row("nanochat", 1536, 2048, 16), row("nanochat", 1536, 2048, 16, 6),
    row("nanochat", 2048, 4096, 4), row("nanochat", 2048, 2048, 1, 6),
    row("nanochat", 128, 256, 2), row("nanochat", 4096, 2048, 2),
    row("nanochat", 640, 777, 3), row("nanochat", 640, 1000, 5, 6),
    row("nanochat", 1024, 2048, 8, kv_heads=2), row("nanochat", 1024, 2048, 8, 6, kv_heads=1),
    row("nanochat", 768, 2048, 8, vocab_size=512), row("nanochat", 768, 1024, 4, mlp=1000),
    row("nanochat", 1536, 2048, 8, capability=(8, 0)),
    row("llama", 256, 512, 1), row("llama", 512, 1024, 4), row("llama", 768, 2048, 8),
    row("llama", 1024, 2048, 16), row("llama", 1024, 4096, 2), row("llama", 1536, 2048, 8),
    row("llama", 2048, 4096, 4), row("llama", 2048, 1024, 1), row("llama", 640, 777, 3),
    row("llama", 4096, 1024, 2), row("llama", 128, 100, 1),
    row("llama", 1024, 2048, 8, kv_heads=16), row("llama", 1024, 2048, 8, kv_heads=1),
    row("llama", 768, 1024, 4, mlp=1000), row("llama", 1024, 2048, 8, heads=8),
    row("llama", 1536, 2048, 8, capability=(8, 0)),
    row("gpt2", 256, 512, 1), row("gpt2", 512, 1024, 4), row("gpt2", 768, 1024, 8),
    row("gpt2", 1024, 2048, 16), row("gpt2", 1024, 4096, 2), row("gpt2", 1600, 1024, 8),
    row("gpt2", 2048, 2048, 4), row("gpt2", 2048, 1024, 1), row("gpt2", 640, 777, 3),
    row("gpt2", 4096, 512, 1), row("gpt2", 64, 64, 2), row("gpt2", 384, 256, 64),
    row("gpt2", 1024, 2048, 8, kv_heads=4), row("gpt2", 768, 1024, 4, mlp=1000),
    row("gpt2", 1600, 1024, 8, capability=(8, 0)),
)  # fmt: skip


def shape_of(asked: dict) -> ModelShape:
    return shape_for(
        asked["style"], DEPTH, context_len=asked["seq_len"], width=asked["width"], **asked["pinned"]
    )


@cache
def sublayer(asked_json: str, name: str) -> tuple[Plan, Plan]:
    """Inductor's plans of one sublayer of one row, forward and backward."""
    asked = json.loads(asked_json)
    shape, capability = shape_of(asked), tuple(asked["capability"])
    runtime = Runtime(device="cuda", attention="flash", capability=capability)
    B, T, C = asked["batch"], asked["seq_len"], asked["width"]

    def trace(inner_compile) -> None:
        with FakeTensorMode():
            model = GPT(shape, runtime, asked["compute_dtype"])
            inputs = model.layer_inputs(torch.zeros(B, T, dtype=torch.int64), None, 0)
            x = torch.empty(B, T, C, dtype=DTYPES[asked["compute_dtype"]], requires_grad=True)
            block = model.blocks[asked["layer"]]
            backend = partial(sublayer_backend, inner_compile=inner_compile)
            function = partial(getattr(block, name), inputs=inputs) if name == "attention" else (
                block.mlp
            )  # fmt: skip
            torch.compile(function, backend=backend, fullgraph=True, dynamic=False)(x)

    return plan(trace, capability)


class Sublayer:
    """One sublayer's wrappers on meta tensors, all counted by one `Alive`."""

    def __init__(self, plans: tuple[Plan, Plan], x: torch.Tensor, alive: Alive) -> None:
        self.plans, self.alive = plans, alive
        self.run_forward, self.run_backward = (runnable(each) for each in plans)
        self.weights: dict[str, torch.Tensor] = {}
        for node in placeholders_of(plans[0].graph):
            value = node.meta["val"]
            if value.shape != x.shape or value.dtype != x.dtype:
                self.weights[node.name] = meta(value)
                alive.follow(self.weights[node.name], counted=False)
        self.kept: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inputs = [self.weights.get(n.name, x) for n in placeholders_of(self.plans[0].graph)]
        with self.alive:
            out, *self.kept = self.run_forward(inputs)
        return out

    def kept_sizes(self, x: torch.Tensor) -> dict[str, int]:
        """What is kept by name and size, each storage once, weights and x left out."""
        found = {x.untyped_storage()._cdata: ("x", 0)}
        names = [node.name for node in outputs_of(self.plans[0].graph)[1:]]
        for name, tensor in zip(names, self.kept, strict=True):
            key = tensor.untyped_storage()._cdata
            found.setdefault(key, (name, self.alive.bytes_of(tensor)))
        return {name: size for name, size in found.values() if size}

    def backward(self, gradient: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Gradients of x and of the weights; only the caller still holds the incoming one."""
        inputs = []
        for node in placeholders_of(self.plans[1].graph):
            inputs.append(gradient if node.name.startswith("tangents") else self.kept.pop(0))
            assert inputs[-1].shape == node.meta["val"].shape, node.name
        assert not self.kept
        with self.alive:
            results = list(self.run_backward(inputs))
        where = [n.name for n in placeholders_of(self.plans[0].graph)]
        index = next(i for i, name in enumerate(where) if name not in self.weights)
        grad_x = results.pop(index)
        return grad_x, [tensor for tensor in results if tensor is not None]


def measure(asked: dict) -> dict:
    """The golden figures of one row: a layer of two sublayers, forward and backward."""
    alive = Alive()
    x = tensor_of(asked, alive)
    layers = sublayers_of(asked, x, alive)
    figures: dict = {"attention": {}, "mlp": {}}
    middle = layers[0].forward(x)
    figures["attention"] = {"kept": layers[0].kept_sizes(x), "forward_crest": alive.highest}
    alive.restart()
    out = layers[1].forward(middle)
    figures["mlp"] = {"kept": layers[1].kept_sizes(middle), "forward_crest": alive.highest}
    figures["kept"] = alive.bytes - alive.bytes_of(out)
    del out, middle, x
    figures["backward_crest"] = backward(layers, [tensor_of(asked, alive)], alive, figures)
    figures["recomputed_crest"] = checkpointed(asked)
    return figures


def checkpointed(asked: dict) -> int:
    """The crest where only x was kept: both sublayers run forward again, then backward."""
    alive = Alive()
    x, incoming = tensor_of(asked, alive), [tensor_of(asked, alive)]
    layers = sublayers_of(asked, x, alive)
    layers[1].forward(layers[0].forward(x))
    again = alive.highest
    return max(again, backward(layers, incoming, alive, {"attention": {}, "mlp": {}}))


def sublayers_of(asked: dict, x: torch.Tensor, alive: Alive) -> list[Sublayer]:
    key = json.dumps(asked)
    return [Sublayer(sublayer(key, name), x, alive) for name in ("attention", "mlp")]


def tensor_of(asked: dict, alive: Alive) -> torch.Tensor:
    """A tensor of the residual stream, or its gradient."""
    size = asked["batch"], asked["seq_len"], asked["width"]
    tensor = torch.empty(size, dtype=DTYPES[asked["compute_dtype"]], device="meta")
    alive.follow(tensor)
    return tensor


def backward(layers: list[Sublayer], incoming: list, alive: Alive, figures: dict) -> int:
    """Run both sublayers backward, emptying `incoming`; their own crests go into `figures`."""
    highest, weights = 0, []
    gradient = incoming.pop()
    for name, each in (("mlp", layers[1]), ("attention", layers[0])):
        alive.restart()
        gradient, more = each.backward(gradient)
        weights += more
        figures[name]["backward_crest"] = alive.highest
        highest = max(highest, alive.highest)
    return highest


def text_of(asked: dict, figures: dict) -> str:
    pinned = " ".join(f"{name} {value}" for name, value in asked["pinned"].items())
    mib = [figures[name] / 2**20 for name in ("kept", "backward_crest", "recomputed_crest")]
    crest = max(figures[name]["forward_crest"] for name in ("attention", "mlp")) / 2**20
    place = (
        f"{asked['style']:8} C {asked['width']:4} B {asked['batch']:2} T {asked['seq_len']:4}"
        f" layer {asked['layer']} sm {asked['capability'][0]}.{asked['capability'][1]}"
    )
    return f"{place}  {mib[0]:9.2f} {crest:9.2f} {mib[1]:9.2f} {mib[2]:9.2f}  {pinned}".rstrip()


def main() -> None:
    words = sys.argv[1:]
    chosen = [int(w) for word in words if word != "--write" for w in word.split(",")]
    head = (
        f"torch {torch.__version__}: a compiled layer in MiB, weights left out: kept for backward"
        " (its input included),\nhighest in forward, in backward, in backward with checkpoint ="
        " blocks"
    )
    print(head)
    found, lines = [], [head]
    for number in chosen or range(len(ROWS)):
        figures = measure(ROWS[number])
        sublayer.cache_clear()
        found.append(ROWS[number] | figures)
        lines.append(text_of(ROWS[number], figures))
        print(lines[-1], flush=True)
    if "--write" in words:
        GOLDEN.parent.mkdir(exist_ok=True)
        rows = ",\n".join(json.dumps(each) for each in found)
        version = json.dumps(torch.__version__)
        GOLDEN.write_text(f'{{"torch": {version}, "depth": {DEPTH}, "rows": [\n{rows}\n]}}\n')
        TABLE.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    if torch.version.cuda is None:
        raise SystemExit("inductor_oracle: this PyTorch has no CUDA; see the top of the file")
    main()
