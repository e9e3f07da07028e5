"""What this process runs on, for the record beside a measurement."""

from __future__ import annotations

import os
import platform
import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from snugpt.errors import BadQuestionError
from snugpt.spec.catalogue import find_gpu
from snugpt.spec.measurement import Environment

_CHECKOUT = Path(__file__).parents[3]


def this_environment(device: torch.device) -> Environment:
    """Return the versions and settings in force here, `device` being the one that computes."""
    on_cuda = device.type == "cuda" and torch.cuda.is_available()
    cudnn = torch.backends.cudnn.version() if on_cuda else None
    allocator = os.environ.get("PYTORCH_ALLOC_CONF", os.environ.get("PYTORCH_CUDA_ALLOC_CONF"))
    return Environment(
        python=platform.python_version(),
        platform=platform.platform(),
        device=device_name(device),
        snugpt=_own_version(),
        torch=str(torch.__version__),
        driver=_driver_version() if on_cuda else None,
        cuda=torch.version.cuda if on_cuda else None,
        cudnn=str(cudnn) if cudnn else None,
        allocator=allocator,
        num_threads=torch.get_num_threads(),
        git_commit=_git_commit(),
    )


def device_name(device: torch.device) -> str:
    """Return what the driver calls the card, or the kernel the processor."""
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_name(device)
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def gpu_id_of(device: torch.device) -> str | None:
    """Return the card's id in the catalogue; None for the CPU and for a card not in it."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    with suppress(BadQuestionError):
        return find_gpu(device_name(device)).id
    return None


def _own_version() -> str:
    try:
        return version("snugpt")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "unknown"


def _driver_version() -> str | None:
    with suppress(ImportError):
        import pynvml

        with suppress(pynvml.NVMLError):
            pynvml.nvmlInit()
            return str(pynvml.nvmlSystemGetDriverVersion())
    return None


def _git_commit() -> str | None:
    # Only a checkout of snugpt itself: an installed copy may lie inside anyone's repository.
    if not (_CHECKOUT / ".git").exists():
        return None
    command = ["git", "-C", str(_CHECKOUT), "rev-parse", "HEAD"]
    with suppress(OSError, subprocess.SubprocessError):
        found = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
        return found.stdout.strip() or None
    return None
