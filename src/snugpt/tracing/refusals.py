"""What a traced model may not do, said with the line that did it.

A trace has shapes and no data. Code that asks for a value, sends a tensor to the host or mixes
devices stops with an exception of PyTorch's; it becomes one line here, as does whatever else the
user's code raises, SystemExit too. `os._exit` ends the process at once: nobody can say a word then.
"""

from __future__ import annotations

import linecache
import os
import sysconfig
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from snugpt.errors import FailedError, SnugError

LONGEST_LINE, LONGEST_MESSAGE = 70, 160
TORCH_FOLDER = str(Path(torch.__file__).parent) + os.sep
OUR_FOLDER = str(Path(__file__).parents[1]) + os.sep
STANDARD_LIBRARY = sysconfig.get_path("stdlib") + os.sep
INSTALLED = ("site-packages", "dist-packages")
NOT_THEIRS = (TORCH_FOLDER, OUR_FOLDER, "<frozen")
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


@contextmanager
def users_code(where: str | Callable[[], str]) -> Iterator[None]:
    """While code of the user runs: what it raises becomes a SnugError, an interrupt is let through.

    `where` says what is being done. Warnings from the source of PyTorch and of snugpt are dropped:
    they are about the meta device and not about the user's code.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(torch|snugpt)(\.|$)")
        try:
            yield
        except (SnugError, KeyboardInterrupt):
            raise
        except BaseException as error:
            raise refusal(error, where if isinstance(where, str) else where()) from error


def refusal(error: BaseException, where: str) -> SnugError:
    """Return the error for the user's eyes; `where` says what was being done."""
    if isinstance(error, SnugError):
        return error
    place, code, library = _place(error)
    message = _message(error)
    said = f"{place}: `{code}`{library}" if place else f"in {where}"
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
        call = "torch.cuda." in code
        return FailedError(
            f"{said} asks for CUDA itself, and a trace has none",
            hint="put it behind `if torch.cuda.is_available():`" if call else "device=x.device",
        )
    if len(message) > LONGEST_MESSAGE:
        message = message[: LONGEST_MESSAGE - 1] + "…"
    raised = type(error).__name__ + (f": {message}" if message else "")
    return FailedError(f"{said} raised {raised}", hint="snugpt trace --help")


def _message(error: BaseException) -> str:
    """An exception's words on one line; an exception of the user's may fail to have any."""
    try:
        words = error.msg if isinstance(error, SyntaxError) else str(error)
        return " ".join(words.split())
    except KeyboardInterrupt:
        raise
    except BaseException as second:
        return f"(its __str__ raised {type(second).__name__})"


def _place(error: BaseException) -> tuple[str, str, str]:
    """`model.py:81`, the code there, and ` (in linear.py:12)` where it called an installed package.

    The line is the user's innermost, or the innermost of other packages, or of PyTorch's
    optimizers. A SyntaxError points to itself.
    """
    if isinstance(error, SyntaxError) and error.filename and Path(error.filename).is_file():
        code = (error.text or "").strip()
        return f"{_short(error.filename)}:{error.lineno}", code[:LONGEST_LINE], ""
    frames = traceback.extract_tb(error.__traceback__)[::-1]
    theirs = [each for each in frames if not each.filename.startswith(NOT_THEIRS)]
    packages = [each for each in theirs if _is_users(each.filename) or _is_installed(each.filename)]
    users = [each for each in packages if _is_users(each.filename)]
    optimizer = [each for each in frames if each.filename.startswith(OPTIMIZERS)]
    for frame in users or packages or optimizer:
        code = (frame.line or linecache.getline(frame.filename, frame.lineno or 0)).strip()
        deeper = packages[0] if users and packages[0] is not frame else None
        library = f" (in {_short(deeper.filename)}:{deeper.lineno})" if deeper else ""
        return f"{_short(frame.filename)}:{frame.lineno}", code[:LONGEST_LINE], library
    return "", "", ""


def _is_users(filename: str) -> bool:
    """Whether a file is neither the standard library's nor installed nor made up."""
    return not (filename.startswith((STANDARD_LIBRARY, "<")) or _is_installed(filename))


def _is_installed(filename: str) -> bool:
    return any(part in INSTALLED for part in Path(filename).parts)


def _short(filename: str) -> str:
    """A path as the user would type it: relative where it lies below the current directory."""
    try:
        return str(Path(filename).relative_to(Path.cwd()))
    except (ValueError, OSError):
        return Path(filename).name
