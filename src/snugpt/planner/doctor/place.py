"""Where a traceback stood: phase of the step, the user's own line, the buffer that was asked for.

The outermost frame that says anything decides: a layer computed again in backward fails in forward
code, but the step is in backward.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from snugpt.planner.doctor.reading import Line
from snugpt.planner.doctor.report import LoggedPhase, Place

MOST_FRAMES_LINES = 400  # a compiled backward in a deep model has about a hundred frames
_FRAME = re.compile(r'^\s*File "([^"]{1,400})", line (\d{1,7}), in (\S{1,200})')
_START = "Traceback (most recent call last)"
_LIBRARY = ("site-packages", "dist-packages", "/lib/python", "<frozen", "<string>", "torchinductor",
            "\\Lib\\", "torch/")  # fmt: skip
_BUFFER = re.compile(r"empty_strided(?:_cuda|_cpu|_xpu)?\(\(([\d, ]{1,100})\)")
# The first that matches anywhere in the frames is the phase; in the order of who calls whom.
_PHASES: tuple[tuple[LoggedPhase, re.Pattern[str]], ...] = (
    ("evaluate", re.compile(
        r"in (?:evaluate\w*|estimate_loss|validate\w*|validation_\w+|eval_\w+)\b"
        r"|\b(?:evaluate_bpb|evaluate_core|estimate_loss|validate)\(")),
    ("backward", re.compile(
        r"\.backward\(|in backward\b|in _engine_run_backward|run_backward\(|in _backward_impl"
        r"|CompiledFunctionBackward")),
    ("clip", re.compile(r"clip_grad_norm|in clip_grads?")),
    ("optimizer", re.compile(
        r"\b(?:optimizer|opt|optim|scaler)\w*\.step\(|torch/optim/|nanochat/(?:optim|muon|adamw)\.py"
        r"|in _init_group")),
    ("load", re.compile(
        r"\bmodel\w*\.(?:to|cuda)\(|in to_empty|init_weights\(|load_state_dict\("
        r"|load_checkpoint\(|torch\.load\(|in from_pretrained|setup_optimizer")),
    ("loss", re.compile(r"cross_entropy|log_softmax|nll_loss|lm_head\(|softcap|\blogits =")),
    ("forward", re.compile(r"in forward\b|= model\(|= self\.model\(|in _call_impl")),
)  # fmt: skip


def place_of(lines: Sequence[Line], at: int) -> Place:
    """Return where the failure of line `at` was raised, from the traceback over it.

    Lines of other ranks, between which torchrun mixes them, are passed over.
    """
    rank, frames = lines[at].rank, []
    for line in reversed(lines[max(0, at - MOST_FRAMES_LINES) : at]):
        if line.rank != rank:
            continue
        if _START in line.text:
            break
        frames.append(line.text)
    else:
        if not any(_FRAME.match(text) for text in frames):
            return Place()
    frames.reverse()
    return Place(phase=_phase(frames), where=_where(frames), shape=_shape(frames))


def _phase(frames: list[str]) -> LoggedPhase | None:
    text = "\n".join(frames)
    return next((phase for phase, pattern in _PHASES if pattern.search(text)), None)


def _where(frames: list[str]) -> str | None:
    """The innermost line that lies in no library."""
    for text in reversed(frames):
        frame = _FRAME.match(text)
        if frame and not any(part in frame[1] for part in _LIBRARY):
            return f"{frame[1]}:{frame[2]}"
    return None


def _shape(frames: list[str]) -> tuple[int, ...] | None:
    """The sizes of the buffer that Inductor's code was about to make."""
    for text in reversed(frames[-6:]):
        found = _BUFFER.search(text)
        if found:
            sizes = [part.strip() for part in found[1].split(",")]
            return tuple(int(size) for size in sizes if size.isdecimal() and len(size) < 16)
    return None
