"""The PyTorch that is installed, read from its files: importing it would take seconds."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import msgspec

_CUDA = re.compile(r"^cuda(?:: [^=]{1,40})? = ['\"](\d{1,3})\.(\d{1,3})", re.MULTILINE)
_HIP = re.compile(r"^hip(?:: [^=]{1,40})? = ['\"]([\w.]{1,40})", re.MULTILINE)


class TorchBuild(msgspec.Struct, frozen=True, kw_only=True):
    """An installed PyTorch. `cuda` is the CUDA it was built with; None for CPU and ROCm builds."""

    version: str
    cuda: tuple[int, int] | None = None
    rocm: str | None = None
    triton: bool = False


def torch_at_hand() -> TorchBuild | None:
    """Return the installed PyTorch without importing it; None where there is none."""
    try:
        number = version("torch")
        spec = find_spec("torch")
    except (PackageNotFoundError, ImportError, ValueError):
        return None
    text = ""
    if spec is not None and spec.origin is not None:
        try:
            text = Path(spec.origin).with_name("version.py").read_text("utf-8", "replace")
        except OSError:
            text = ""
    cuda, hip = _CUDA.search(text), _HIP.search(text)
    return TorchBuild(
        version=number,
        cuda=(int(cuda[1]), int(cuda[2])) if cuda else None,
        rocm=hip[1] if hip else None,
        triton=find_spec("triton") is not None,
    )
