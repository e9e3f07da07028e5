"""nanochat's own code beside our stacks: parameters, number formats, optimizer state, held buffers.

    python bench/nanochat_checkouts.py --checkout ../nanochat [--checkout ...]

Each checkout is a tree of nanochat at some commit; it is compared with the newest stack that is not
younger. Its model is built on the meta device at full size, and as a model on CUDA whose tensors
have no data, so that the casts it makes there are seen without a card. Its optimizers take two real
steps at toy size on the CPU, alone and as rank 0 of several, their collectives replaced by ones
that keep what ProcessGroupNCCL keeps: inputs and outputs until somebody waits on the work, else
until the next step's first collective. The mend that `snugpt plan` prints is put to a copy of the
tree in a temporary folder, after which they must keep nothing. Eager steps without
autocast are traced on the meta device, phase by phase. No GPU is needed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from snugpt.errors import unknown_name
from snugpt.estimate.stacks.catalogue import find_stack
from snugpt.estimate.stacks.nanochat.command import mend
from snugpt.estimate.stacks.nanochat.eager import EagerStep
from snugpt.estimate.stacks.nanochat.optimizer import OptimizerStep
from snugpt.estimate.stacks.nanochat.parameters import (
    all_tensors,
    flops_per_token,
    parameter_groups,
    shape_of,
)
from snugpt.estimate.stacks.nanochat.versions import VERSIONS, Version
from snugpt.spec.recipe import TrainingRecipe
from snugpt.spec.runtime import Runtime

DEPTHS = (4, 12, 20, 32)
TOY_DEPTH, TOY_VOCAB = 6, 4096
RANKS = (1, 2, 4, 8)
MENDED = "held, torchrun 8"
EAGER = ((2, 4, 512, 32768), (4, 8, 256, 32768), (6, 2, 1024, 512), (12, 2, 2048, 32768))
HOPPER = Runtime(device="cuda", attention="flash", capability=(9, 0))
GROUPS = {
    "wte": "embedding", "value_embeds": "value_embedding", "lm_head": "head", "h": "matrices",
}  # fmt: skip


# In the parent: what is predicted, and one child for each checkout.


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkout", action="append", type=Path, required=True)
    parser.add_argument("--observe", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.observe:
        print(json.dumps(observed(json.loads(arguments.observe))))
        return
    same = 0
    rows = 0
    print(f"{'nanochat, its own code':34}  {'predicted':>15}  {'observed':>15}  {'ratio':>8}")
    for checkout in arguments.checkout:
        commit, date = commit_of(checkout)
        version = version_at(date)
        print(f"{version.name} against {commit} of {date}")
        found = ask_child(checkout, version) | mended(checkout, version)
        for name, predicted in predictions(version).items():
            seen = found[name]
            rows += 1
            same += seen == predicted
            print(
                f"  {name:32}  {shown(predicted):>15}  {shown(seen):>15}  {ratio(predicted, seen)}"
            )
    print(f"{same} of {rows} equal")


def commit_of(checkout: Path) -> tuple[str, str]:
    """The commit of a checkout and its day."""
    command = ["git", "-C", str(checkout), "log", "-1", "--format=%h %cs"]
    commit, date = subprocess.check_output(command, text=True).split()
    return commit, date


def version_at(date: str) -> Version:
    """The newest version that is not younger than a day."""
    older = [version for version in VERSIONS if version.date <= date]
    if not older:
        raise unknown_name("version of", date, [v.date for v in VERSIONS], hint="git checkout")
    return older[-1]


def ask_child(checkout: Path, version: Version) -> dict[str, Any]:
    """Observe a checkout in a process of its own: two of them have modules of the same name."""
    asked = {"version": version.name, "checkout": str(checkout.resolve())}
    command = [sys.executable, __file__, "--checkout", str(checkout)]
    environment = {
        **os.environ, "TORCHDYNAMO_DISABLE": "1", "NANOCHAT_DTYPE": "bfloat16",
        "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1",
    }  # fmt: skip
    done = subprocess.run(
        [*command, "--observe", json.dumps(asked)],
        env=environment, check=False, text=True, stdout=subprocess.PIPE,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{checkout} could not be run")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def mended(checkout: Path, version: Version) -> dict[str, Any]:
    """What the collectives of a copy keep once the mend has been put to it."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        shutil.copytree(checkout / "nanochat", copy / "nanochat")
        subprocess.run(mend(version), shell=True, cwd=copy, check=True)
        found = ask_child(copy, version)
    return {f"{MENDED}, mended": found[MENDED]}


def predictions(version: Version) -> dict[str, Any]:
    """What our stack says, by the name of a row."""
    rows: dict[str, Any] = {}
    for depth in DEPTHS:
        shape = shape_of(version, depth)
        for group, number in parameter_groups(version, shape).items():
            rows[f"{depth} layers, {group}"] = number
        rows[f"{depth} layers, FLOPs per token"] = flops_per_token(version, shape)
    shape = shape_of(version, TOY_DEPTH, vocab_size=TOY_VOCAB)
    for tensor in all_tensors(version, shape):
        rows[f"format of {tensor.group}"] = {2: "bfloat16", 4: "float32"}[tensor.element_bytes]
    for launcher, ranks in starts():
        step = OptimizerStep(
            version, shape, ranks, communicates=version.communicates(launcher, ranks)
        )
        state = [b for b in step.state() if b.category == "optimizer"]
        rows[f"state, {launcher} {ranks}"] = sum(b.fixed_bytes for b in state)
        rows[f"held, {launcher} {ranks}"] = sum(b.fixed_bytes for b in step.held)
    rows[f"{MENDED}, mended"] = 0
    rows |= eager_predictions(version)
    return rows


def eager_predictions(version: Version) -> dict[str, int]:
    """Peaks of an eager micro-step and of the optimizer above what is there before them."""
    rows = {}
    for layers, batch, seq_len, vocab in EAGER if version.smear_channels else ():
        shape = shape_of(version, layers, seq_len=seq_len, vocab_size=vocab)
        recipe = TrainingRecipe(
            seq_len=seq_len, device_batch_size=batch, grad_accum_steps=1,
            total_batch_tokens=batch * seq_len, total_tokens=batch * seq_len,
            compute_dtype="bf16", loss="plain", loss_chunk_tokens=seq_len, checkpoint="none",
            optimizer="muon", compile="off", stack=version.name, schedule=None,
        )  # fmt: skip
        step = EagerStep(version, shape, recipe, HOPPER)
        timeline = step.timeline()
        resident = sum(timeline.bytes_of(b, batch) for b in timeline.resident)
        gradients = sum(timeline.bytes_of(b, batch) for b in step.optimizer.all_gradients())
        _, phases = timeline.read(batch)
        name = eager_name(layers, batch, seq_len, vocab)
        rows[f"{name} forward"] = max(phases["forward"], phases["loss"]) - resident
        rows[f"{name} backward"] = phases["backward"] - resident
        rows[f"{name} optimizer"] = phases["optimizer"] - resident - gradients
    return rows


def eager_name(layers: int, batch: int, seq_len: int, vocab: int) -> str:
    return f"L{layers} B{batch} T{seq_len} V{vocab}"


def starts() -> Iterable[tuple[str, int]]:
    """How the optimizer is started: plainly, and under torchrun on several cards."""
    return (("python", 1), *(("torchrun", ranks) for ranks in RANKS))


def shown(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:,}"


def ratio(predicted: Any, seen: Any) -> str:
    if predicted == seen:
        return f"{'=':>8}"
    if isinstance(predicted, str) or not seen:
        return f"{'differs':>8}"
    return f"{predicted / seen:8.6f}"


# In the child: nanochat's own code.


def observed(asked: dict[str, str]) -> dict[str, Any]:
    """Build and step the checkout's own model and optimizers."""
    sys.path.insert(0, asked["checkout"])
    stdout, sys.stdout = sys.stdout, sys.stderr  # nanochat prints
    try:
        version = find_stack(asked["version"]).version
        assert version is not None
        rows = counts(version)
        formats = formats_on_cuda(version)
        rows |= {f"format of {group_of(name)}": found for name, found in formats.items()}
        for launcher, ranks in starts():
            state, held = optimizer_bytes(version, formats, launcher, ranks)
            rows[f"state, {launcher} {ranks}"] = state
            rows[f"held, {launcher} {ranks}"] = held
        for sizes in EAGER if version.smear_channels else ():
            rows |= traced(version, *sizes)
    finally:
        sys.stdout = stdout
    return rows


def model_of(version: Version, depth: int, vocab_size: int, seq_len: int = 2048) -> Any:
    """nanochat's GPT at a depth of its dial, as base_train makes it."""
    from nanochat.gpt import GPT, GPTConfig

    width = 64 * depth
    if version.whole_heads:
        width = -(-width // 128) * 128
    heads = -(-width // 128)
    return GPT(
        GPTConfig(
            sequence_len=seq_len, vocab_size=vocab_size, n_layer=depth, n_head=heads,
            n_kv_head=heads, n_embd=width,
        )
    )  # fmt: skip


def group_of(name: str) -> str:
    parts = name.removeprefix("transformer.").split(".")
    return GROUPS.get(parts[0], "scalars")


def counts(version: Version) -> dict[str, Any]:
    import torch

    rows: dict[str, Any] = {}
    for depth in DEPTHS:
        with torch.device("meta"):
            model = model_of(version, depth, version.vocab_size)
        for name, parameter in model.named_parameters():
            row = f"{depth} layers, {group_of(name)}"
            rows[row] = rows.get(row, 0) + parameter.numel()
        rows[f"{depth} layers, FLOPs per token"] = model.estimate_flops()
    return rows


def formats_on_cuda(version: Version) -> dict[str, str]:
    """The number format of each parameter after `init_weights` on CUDA, without a card."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    def to(module: Any, *_: Any, dtype: Any) -> Any:
        """`Module.to` for tensors without data, which can't be swapped."""
        for name, parameter in module._parameters.items():
            module._parameters[name] = torch.nn.Parameter(parameter.detach().to(dtype))
        return module

    plain, random = torch.nn.Module.to, dict(vars(torch.nn.init))
    torch.nn.Module.to = to  # type: ignore[method-assign, assignment]
    for name in random:
        if name.endswith("_") and not name.startswith("_"):  # there are no numbers to draw
            setattr(torch.nn.init, name, lambda tensor, *_, **__: tensor)
    try:
        with FakeTensorMode(), torch.no_grad():
            with torch.device("meta"):
                model = model_of(version, TOY_DEPTH, TOY_VOCAB)
            for module in model.modules():
                for name, parameter in module._parameters.items():
                    if parameter is not None:
                        # single numbers can't be set on a card that is not there
                        device = "cuda" if parameter.dim() > 1 else "cpu"
                        there = torch.empty_like(parameter, device=device)
                        module._parameters[name] = torch.nn.Parameter(there)
            tables = model.cos, model.sin
            model._precompute_rotary_embeddings = lambda *_, **__: tables
            model.init_weights()
            named = list(model.named_parameters())
            return {name: str(p.dtype).removeprefix("torch.") for name, p in named}
    finally:
        torch.nn.Module.to = plain  # type: ignore[method-assign]
        vars(torch.nn.init).update(random)


class Work:
    """A collective's handle. It keeps its tensors until somebody waits on it."""

    kept: list[Work] = []  # noqa: RUF012  those nobody waited on

    def __init__(self, tensors: list[Any], flattened_bytes: int = 0) -> None:
        self.tensors, self.flattened_bytes = tensors, flattened_bytes
        Work.kept.append(self)

    def wait(self) -> None:
        Work.kept.remove(self)

    def get_future(self) -> Any:
        import torch

        future: Any = torch.futures.Future()
        future.set_result(None)
        return future


def one_process_of(ranks: int) -> None:
    """Make torch.distributed believe it is rank 0 of several, with collectives of `Work`."""
    import torch.distributed as dist

    def size(tensors: list[Any]) -> int:
        return sum(t.numel() * t.element_size() for t in tensors)

    def reduce_scatter_tensor(output: Any, source: Any, **_: Any) -> Work:
        output.copy_(source.flatten()[: output.numel()].view_as(output))
        return Work([output, source])

    def all_gather_into_tensor(output: Any, source: Any, **_: Any) -> Work:
        return Work([output, source])

    def all_reduce(tensor: Any, **_: Any) -> Work:
        return Work([tensor])

    # ProcessGroupNCCL copies a list into one tensor and keeps that beside the list.
    def reduce_scatter(output: Any, sources: list[Any], **_: Any) -> Work:
        return Work([output, *sources], size(sources))

    def all_gather(outputs: list[Any], source: Any, **_: Any) -> Work:
        return Work([source, *outputs], size(outputs))

    stand_ins = (reduce_scatter_tensor, all_gather_into_tensor, all_reduce, reduce_scatter,
                 all_gather)  # fmt: skip
    for stand_in in stand_ins:
        setattr(dist, stand_in.__name__, stand_in)
    dist.get_rank = lambda *_: 0  # type: ignore[assignment]
    dist.get_world_size = lambda *_: ranks  # type: ignore[assignment]
    dist.is_initialized = lambda: True


def started_alone() -> None:
    """Take back what torchrun says of its processes."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)


def optimizer_bytes(
    version: Version, formats: dict[str, str], launcher: str, ranks: int
) -> tuple[int, int]:
    """Bytes of rank 0's state after two steps, and of what their collectives still keep."""
    import torch
    import torch.distributed as dist

    started_alone()
    saved = dict(vars(dist))
    if launcher == "torchrun":
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(ranks)}
        one_process_of(ranks)
    try:
        model = model_of(version, TOY_DEPTH, TOY_VOCAB)
        for name, parameter in model.named_parameters():
            parameter.data = torch.randn(parameter.shape).to(getattr(torch, formats[name]))
        optimizers = optimizers_of(model)
        for _ in range(2):
            Work.kept.clear()  # the first collective of a step drops what the last one left
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape).to(parameter.dtype)
            for optimizer in optimizers:
                optimizer.step()
            model.zero_grad(set_to_none=True)
    finally:
        vars(dist).update(saved)
    owned = {p.untyped_storage().data_ptr() for p in model.parameters()}
    for optimizer in optimizers:
        owned |= {g["zero_buffer"].untyped_storage().data_ptr() for g in optimizer.param_groups
                  if "zero_buffer" in g}  # fmt: skip
    state = [
        value
        for optimizer in optimizers
        for entry in optimizer.state.values()
        for value in entry.values()
        if isinstance(value, torch.Tensor)
    ]
    state_bytes = sum(tensor.untyped_storage().nbytes() for tensor in state)
    held = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for work in Work.kept
        for tensor in work.tensors
        if tensor.untyped_storage().data_ptr() not in owned
    }
    flattened = sum(work.flattened_bytes for work in Work.kept)
    return state_bytes, sum(held.values()) + flattened


def traced(version: Version, layers: int, batch: int, seq_len: int, vocab: int) -> dict[str, int]:
    """The eager micro-step and optimizer step of its own code, traced on the meta device.

    Attention is FlashAttention-2's operation, which keeps what FlashAttention 3's does.
    """
    import nanochat.gpt
    import torch

    from snugpt.tracing.allocations import Allocations
    from snugpt.tracing.kernels import kernels_of, scratch_of

    def attention(q: Any, k: Any, v: Any, window_size: tuple[int, int], **_: Any) -> Any:
        left = window_size[0] if window_size[0] < q.shape[1] else None
        return torch.ops.aten._flash_attention_forward(
            q, k, v, None, None, q.shape[1], q.shape[1], 0.0, True, False,
            window_size_left=left, window_size_right=0,
        )[0]  # fmt: skip

    started_alone()
    nanochat.gpt.flash_attn.flash_attn_func = attention
    allocations = Allocations(scratch_of(HOPPER), str(Path(nanochat.gpt.__file__).parent))
    with kernels_of(HOPPER), allocations:
        with torch.device("meta"):
            model = model_of(version, layers, vocab, seq_len)
            tokens, targets = torch.empty(2, batch, seq_len, dtype=torch.int64).unbind()
        for name, parameter in model.named_parameters():
            if group_of(name) in ("embedding", "value_embedding"):
                parameter.data = parameter.data.to(torch.bfloat16)
        model.cos, model.sin = model.cos.to(torch.bfloat16), model.sin.to(torch.bfloat16)
        (optimizer,) = optimizers_of(model)
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter)
        optimizer.step()
        model.zero_grad(set_to_none=True)
        allocations.begin("forward")
        loss = model(tokens, targets)
        allocations.mark("backward")
        (loss / 2).backward()
        del loss
        allocations.mark("optimizer")
        optimizer.step()
    timeline = allocations.timeline(HOPPER.block_bytes)
    resident = sum(timeline.bytes_of(buffer, 1) for buffer in timeline.resident)
    gradients = sum(-(-p.numel() * p.element_size() // 512) * 512 for p in model.parameters())
    _, phases = timeline.read(1)
    name = eager_name(layers, batch, seq_len, vocab)
    return {
        f"{name} forward": phases["forward"] - resident,
        f"{name} backward": phases["backward"] - resident,
        f"{name} optimizer": phases["optimizer"] - resident - gradients,
    }


def optimizers_of(model: Any) -> list[Any]:
    """nanochat's optimizers: two until January 2026, one since."""
    if hasattr(model, "setup_optimizers"):
        return list(model.setup_optimizers())
    return [model.setup_optimizer()]


if __name__ == "__main__":
    main()
