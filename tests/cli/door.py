"""What the tests of the verbs share: a small training, and how an error looks."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

SMALL = (
    "--gpu cpu --layers 1 --width 32 --heads 2 --seq-len 32 --vocab-size 300"
    " --total-batch-tokens 128 --input text.txt"
)


class Done(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


Door = Callable[[str], Done]  # a command line goes in


@contextmanager
def at_home_in(folder: Path) -> Iterator[None]:
    """Run commands in `folder`, with a text to train on and the caches there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.setenv("XDG_DATA_HOME", str(folder / "data"))
        patch.setenv("NO_COLOR", "1")
        write_text(folder / "text.txt")
        yield


def write_text(path: Path) -> None:
    """Words of a made-up language, the same at every call."""
    chance = random.Random(5)
    words = ["".join(chance.choices("aeioklmnrst", k=chance.randint(1, 7))) for _ in range(200)]
    path.write_text(" ".join(chance.choices(words, k=4000)) + "\n", encoding="utf-8")


def refusal(done: Done, code: int) -> tuple[str, str]:
    """The error and its hint, which are the last two lines and the only ones of their kind."""
    assert done.code == code, done.err
    lines = done.err.splitlines()
    assert [line[:6] for line in lines].count("error:") == 1
    assert (lines[-2][:7], lines[-1][:6]) == ("error: ", "hint: ")
    assert "Traceback" not in done.err
    return lines[-2].removeprefix("error: "), lines[-1].removeprefix("hint: ")


def names_under(folder: Path) -> set[str]:
    """Every file below `folder`, by its path within."""
    found = (Path(at, name) for at, _, names in os.walk(folder) for name in names)
    return {path.relative_to(folder).as_posix() for path in found}
