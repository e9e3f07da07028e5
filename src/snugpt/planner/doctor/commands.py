"""A program's own command line with some flags changed: every word is quoted again.

The words come from a log. What a shell would act on ends inside quotes.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence


def with_flags(words: Sequence[str], changes: Mapping[str, object]) -> str:
    """Return the command with each flag of `changes` at its new value, spelled as it was.

    Names are compared without regard to hyphens; a flag that was not said is added at the end.
    """
    left = {name.replace("-", "_"): value for name, value in changes.items()}
    spelled = {name.replace("-", "_"): name for name in changes}
    made: list[str] = []
    at = 0
    while at < len(words):
        word = words[at]
        at += 1
        flag, equals, _ = word.partition("=")
        name = flag[2:].replace("-", "_") if flag.startswith("--") else ""
        if name not in left:
            made.append(word)
            continue
        value = left.pop(name)
        if equals:
            made.append(f"{flag}={value}")
        else:
            made += [flag, str(value)]
            at += at < len(words) and not words[at].startswith("--")
    made += [f"--{spelled[name]}={value}" for name, value in left.items()]
    return shlex.join(made)


def with_variable(setting: str, command: str | None) -> str:
    """Return the command with a variable set before it; `...` stands for one that is not known."""
    return f"{setting} {command or '...'}"
