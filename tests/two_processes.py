"""Two processes that train together over gloo: forked, so that torch is imported once.

A process group's threads do not always end in peace: a case that a signal ends is run once more,
and the test says so.
"""

from __future__ import annotations

import os
import pickle
import signal
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed import TCPStore

import snugpt.model.fully_sharded  # noqa: F401  slow to import, so the parent has it

WAIT_S = 60


def run_ranks(
    work: Callable[[int], Any], folder: Path, *, size: int = 2, retries: int = 1
) -> list[Any]:
    """What `work(rank)` returns on each rank, whose process group is there; an error is raised."""
    for left in range(retries, -1, -1):
        codes = exit_codes(work, folder, size)
        if left and any(code == -signal.SIGABRT for code in codes):
            warnings.warn(f"a rank was aborted {codes}: run once more", stacklevel=2)
            continue
        break
    assert codes == [0] * size, (codes, _words(folder, size))
    return [pickle.loads((folder / f"rank-{rank}").read_bytes()) for rank in range(size)]


def exit_codes(work: Callable[[int], Any], folder: Path, size: int) -> list[int]:
    """Run `work` on every rank; return how each process ended.

    As with torchrun the parent keeps the store by which they find each other.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    children = [_fork_rank(work, folder, rank, size, store.port) for rank in range(size)]
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def _fork_rank(work: Callable[[int], Any], folder: Path, rank: int, size: int, port: int) -> int:
    """Start one rank; return its process number. What it returns is left in the folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # 3.12 warns of threads beside a fork
        child = os.fork()
    if child:
        return child
    code = 1
    try:
        signal.alarm(WAIT_S)  # no hang outlives the test
        torch.set_num_threads(1)  # the parent's worker threads do not exist here
        warnings.simplefilter("default")
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }  # fmt: skip
        found = work(rank)
        (folder / f"rank-{rank}").write_bytes(pickle.dumps(found))
        code = 0
    except SystemExit as error:
        code = int(error.code or 0)
    except BaseException:
        (folder / f"words-{rank}").write_text(traceback.format_exc())
    finally:
        os._exit(code)


def _words(folder: Path, size: int) -> str:
    files = (folder / f"words-{rank}" for rank in range(size))
    return "\n".join(file.read_text() for file in files if file.exists())
