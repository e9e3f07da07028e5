"""Command lines in a log, and the same with some flags changed: every word is quoted again.

The words come from a log. What a shell would act on ends inside quotes.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence

MOST_WORDS = 200
MOST_JOINED_LINES = 40
LAUNCHERS = ("torchrun", "python", "accelerate", "deepspeed", "snugpt")
_LAUNCHER = re.compile(r"(?:torchrun|python[\d.]{0,5}|accelerate|deepspeed|snugpt)")
_VARIABLE = re.compile(r"\w{1,60}=")


def command_words(texts: Sequence[str]) -> tuple[str, ...]:
    """Return the words of the last command line that trains; lines ended by a backslash are one."""
    found: tuple[str, ...] = ()
    for at, text in enumerate(texts):
        if 'File "' in text or not any(name in text for name in LAUNCHERS):
            continue
        whole, next_at = text, at + 1
        while whole.endswith("\\") and next_at < min(len(texts), at + MOST_JOINED_LINES):
            whole = whole[:-1] + " " + texts[next_at]
            next_at += 1
        words = _from_launcher(whole)
        if any(word.startswith("--") or word.endswith(".py") for word in words):
            found = words
    return found


def _from_launcher(text: str) -> tuple[str, ...]:
    """The words from the program that is started, variables set before it included."""
    raw = text.split()[:MOST_WORDS]
    for at, word in enumerate(raw):
        if _LAUNCHER.fullmatch(word.rpartition("/")[2]):
            while at > 0 and _VARIABLE.match(raw[at - 1]):
                at -= 1
            return _words(" ".join(raw[at:]))
    return ()


def _words(text: str) -> tuple[str, ...]:
    try:
        words = shlex.split(text, comments=True)
    except ValueError:  # an open quote
        return ()
    for end in ("|", "&&", ";", "2>&1", ">", ">>", "&"):
        if end in words:
            words = words[: words.index(end)]
    return tuple(words[:MOST_WORDS])


def flags_of(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield `--a=b`, `--a b` and `--a` as pairs of a name with underscores and its text."""
    at = 0
    while at < len(words):
        name, equals, value = words[at].partition("=")
        at += 1
        if not name.startswith("--") or len(name) < 3:
            continue
        if not equals:
            value = "true"
            if at < len(words) and not words[at].startswith("--"):
                value = words[at]
                at += 1
        yield name[2:].replace("-", "_"), value


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
