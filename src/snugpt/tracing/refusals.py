"""What a traced model may not do, said with the line that did it.

A trace has shapes and no data. Code that asks for a value, sends a tensor to the host or mixes
devices stops with an exception of PyTorch's; it becomes one line here.
"""

from __future__ import annotations

import linecache
import os
import traceback
from pathlib import Path

import torch

from snugpt.errors import FailedError, SnugError

LONGEST_LINE, LONGEST_MESSAGE = 70, 160
TORCH_FOLDER = str(Path(torch.__file__).parent) + os.sep
OUR_FOLDER = str(Path(__file__).parents[1]) + os.sep
NOT_THE_USERS = (TORCH_FOLDER, OUR_FOLDER, "<frozen")
OPTIMIZERS = TORCH_FOLDER + "optim" + os.sep
WAITS = (
    "cannot be called on meta tensors",
    "Cannot copy out of meta tensor",
    "to numpy",
    "with Meta tensors, but there was no fake impl",
    "raises unimplemented by default, as a correct data-independent",
    "repeat_interleave a meta tensor",
    "can be converted to an index",
    "format string passed to Tensor",
    "only dense CPU tensors can be pinned",
    "data_ptr",
)
MIXES = ("is not on the expected device meta", "Expected all tensors to be on the same device")
NO_CUDA = (
    "not compiled with CUDA",
    "No CUDA GPUs",
    "Found no NVIDIA driver",
    "linked with support",
)


class Remedy(str):
    """A hint for Python, with the flags that mean the same to `snugpt trace`; None drops one."""

    flags: dict[str, str | None]

    def __new__(cls, python: str, **flags: str | None) -> Remedy:
        """Keep the flags beside the text."""
        made = super().__new__(cls, python)
        made.flags = flags
        return made


class MixedDevicesError(RuntimeError):
    """One operation is given tensors of the model's device and of the CPU."""

    def __init__(self, operation: str) -> None:
        super().__init__(f"{MIXES[1]}, found a CPU tensor in {operation}")


def refusal(error: Exception, where: str) -> SnugError:
    """Return the error for the user's eyes; `where` says what was being done."""
    if isinstance(error, SnugError):
        return error
    place, code = _place(error)
    message = " ".join(str(error).split())
    said = f"{place}: `{code}`" if place else f"in {where}"
    if any(text in message for text in WAITS):
        return FailedError(
            f"{said} waits for data, and a trace has only shapes",
            hint="take sizes from shapes, and leave a mask whose values are asked for out of the"
            " batch",
        )
    if any(text in message for text in MIXES):
        return FailedError(
            f"{said} mixes a CPU tensor with the model's",
            hint="create it where the model is: torch.arange(n, device=x.device)",
        )
    if any(text in message for text in NO_CUDA):
        return FailedError(
            f"{said} asks for CUDA itself, and a trace has none", hint="device=x.device"
        )
    if len(message) > LONGEST_MESSAGE:
        message = message[: LONGEST_MESSAGE - 1] + "…"
    return FailedError(
        f"{said} raised {type(error).__name__}: {message}", hint="snugpt trace --help"
    )


def _place(error: Exception) -> tuple[str, str]:
    """`model.py:81` and the code there: the innermost line that is neither PyTorch's nor ours.

    Without one it is the innermost of PyTorch's optimizers.
    """
    frames = traceback.extract_tb(error.__traceback__)[::-1]
    theirs = [each for each in frames if not each.filename.startswith(NOT_THE_USERS)]
    optimizer = [each for each in frames if each.filename.startswith(OPTIMIZERS)]
    for frame in theirs or optimizer:
        code = (frame.line or linecache.getline(frame.filename, frame.lineno or 0)).strip()
        return f"{_short(frame.filename)}:{frame.lineno}", code[:LONGEST_LINE]
    return "", ""


def _short(filename: str) -> str:
    """A path as the user would type it: relative where it lies below the current directory."""
    try:
        return str(Path(filename).relative_to(Path.cwd()))
    except (ValueError, OSError):
        return Path(filename).name
