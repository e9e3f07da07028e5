"""What snugpt and PyTorch's MemTracker say of the common cases of `bench/peers.py`.

Two programs are told apart. The peers are asked about the case's own program: nanoGPT in A and B,
Hugging Face's Llama built from its configuration in C. `snugpt trace` and MemTracker run its step
on the meta device. Our own trainer takes the same shape another way and keeps less: there the
closed form of `snugpt plan`, which needs no torch, stands beside the trace of what is run. Its
vocabulary is padded to a multiple of 64, 50304 in A and B.
"""

from __future__ import annotations

import subprocess
import warnings
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import snugpt
from common_cases import CASES, Case, row
from snugpt.spec.plan import Plan
from snugpt.spec.question import Question
from snugpt.units import MIB

if TYPE_CHECKING:
    import any_model
    from snugpt.tracing.trace_result import Trace

GPU = "h100"
# The cases by what `any_model.py` calls them. HF's cache of keys is for generation: without it.
PROGRAMS = {
    "A": ("nanoGPT GPT-2 124M", 8),
    "B": ("nanoGPT GPT-2 124M", 32),
    "C": ("HF Llama no cache", 8),
}
LOSSES = {"plain": "plain loss", "chunked": "loss in chunks"}
SCRATCH, CACHE = "scratch inside kernels", "PyTorch's cache, CUDA context"
Rows = dict[tuple[str, str, str], dict[str, float]]  # who, asked for, leaves out: MiB by case
PROGRAM_HEAD = "the case's own program, traced: nanoGPT (A, B), Hugging Face's Llama (C)"
TRAINER_HEAD = "our own trainer in the same shape: another program, which keeps less"
NOTES = """\
Peers are to be compared with the traced peak of the program itself, the first rows: `requested`
where the loop lets go of the logits before backward, `outputs kept` where it holds them, as
nanoGPT's train.py does. That is a trace on a CPU: no row of this table was measured on a GPU.
"""


def program_lines(nanogpt: Path | None) -> tuple[list[str], list[str]]:
    """The rows of the programs themselves, and what is to be said of them below the table."""
    if find_spec("torch") is None:
        return [], ["not traced: torch is not installed"]
    import any_model

    warnings.filterwarnings("ignore")
    cases: list[any_model.Case] = []
    used, missing = [f"torch {version('torch')}"], []
    letters = ""
    if nanogpt is None:
        missing.append("not traced: nanoGPT: --nanogpt names a checkout of it")
    else:
        cases += any_model.nanogpt(str(nanogpt))
        letters += "AB"
        used.append(f"nanoGPT {_commit(nanogpt)}")
    if find_spec("transformers") is None:
        missing.append("not traced: Hugging Face's Llama: transformers is not installed")
    else:
        cases += any_model.hugging_face()
        letters += "C"
        used.append(f"transformers {version('transformers')}")
    by_name = {(case.name, case.batch_size): case for case in cases if case.gpu == GPU}
    rows: Rows = {}
    for letter in letters:
        for name, mib in program_figures(by_name[PROGRAMS[letter]]).items():
            rows.setdefault(name, {})[letter] = mib
    notes = [NOTES] if rows else []
    return _lines(rows), [*notes, "traced with: " + ", ".join(used), *missing]


def program_figures(case: any_model.Case) -> dict[tuple[str, str, str], float]:
    """One step of somebody's model by trace and by MemTracker, MiB by row."""
    from any_model import mem_tracker_peak, quiet

    def traced(keep_outputs: bool) -> Trace:
        return snugpt.trace(
            case.build, case.batch, gpu=case.gpu, batch_size=case.batch_size,
            keep_outputs=keep_outputs,
        )  # fmt: skip

    with quiet():
        dropped, kept = traced(False), traced(True)
        tracker = mem_tracker_peak(case, dropped.tracer.autocast)
    return {
        ("snugpt trace", "requested", SCRATCH): dropped.requested_bytes / MIB,
        ("MemTracker", "the same", f"{SCRATCH}, rounding"): tracker / MIB,
        ("snugpt trace", "allocated", CACHE): dropped.allocated_bytes / MIB,
        ("snugpt trace", "outputs kept", SCRATCH): kept.requested_bytes / MIB,
    }


def trainer_lines() -> list[str]:
    """The rows of our own trainer: requested, by the closed form and by a trace of our step."""
    rows: Rows = {}
    for loss, label in LOSSES.items():
        for letter, case in CASES.items():
            plan = own_plan(case, loss)
            predicted = rows.setdefault(("snugpt plan", label, SCRATCH), {})
            predicted[letter] = plan.memory.requested_bytes / MIB
            if find_spec("torch") is not None:
                traced = rows.setdefault(("snugpt trace", label, SCRATCH), {})
                traced[letter] = _traced_bytes(plan) / MIB
    return _lines(rows)


def own_plan(case: Case, loss: str) -> Plan:
    """Our plan of a case, eager, with nothing left to choose that moves memory."""
    eager = {"compile": "off"} if "compile" in Question.__struct_fields__ else {}
    return snugpt.plan(
        gpu=GPU, style=case.style, layers=case.layers, width=case.width, heads=case.heads,
        kv_heads=case.heads, mlp=case.mlp, vocab_size=case.vocab, tie=case.tied,
        seq_len=case.seq_len, batch_size=case.batch, device_batch_size=case.batch,
        num_iterations=10, compute_dtype="bf16", optimizer="adamw", checkpoint="none", loss=loss,
        **eager,
    )  # fmt: skip


def _traced_bytes(plan: Plan) -> int:
    from snugpt.estimate.memory import batch_of, runtime_of
    from snugpt.tracing.steps import trace

    runtime = runtime_of(plan.shape, plan.recipe, plan.gpu, 1)
    timeline = trace(plan.shape, plan.recipe, runtime)
    return timeline.read(batch_of(plan.recipe), workspace=False)[0].bytes


def _lines(rows: Rows) -> list[str]:
    return [row(who, asked, mib, leaves_out) for (who, asked, leaves_out), mib in rows.items()]


def _commit(checkout: Path) -> str:
    done = subprocess.run(
        ["git", "-C", checkout, "rev-parse", "--short", "HEAD"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.stdout.strip() or "of an unknown commit"
