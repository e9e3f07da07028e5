"""Files that a verb writes where the user says: checked before the work, written whole after it."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import click

from snugpt.cli.screen import colour
from snugpt.errors import bad_value

PICTURE_SUFFIX = ".svg"


def check_output(field: str, path: Path, *, hint: str, suffix: str = "") -> None:
    """Refuse what is no place for a file: it is replaced whole, devices and links must not be.

    Raises:
        BadQuestionError: no file can be written there, or its name does not end in `suffix`.
    """
    try:
        why = _why_no_file(path)
    except OSError as error:  # a name that is too long, say
        why = (error.strerror or str(error)).lower()
    except ValueError:
        why = "no name has a zero byte"
    if why is None and suffix and path.suffix.lower() != suffix:
        bare = path.name.lower() == suffix
        why = f"a name that ends in {suffix}" + " and has something before it" * bare
    if why is not None:
        raise bad_value(field, str(path), why, hint=hint)


def _why_no_file(path: Path) -> str | None:
    """What keeps a file from being put there, whole and under this very name."""
    from snugpt.data.durable_file import partial_of

    folder = path.parent
    if str(path) == "-":
        return "a file's name, it is not written to stdout"
    with suppress(FileNotFoundError, NotADirectoryError):
        path.lstat()  # says what is wrong with the name itself
    if path.is_symlink():
        to = "" if path.exists() else " to nothing"
        return f"it is a link{to}, which would be replaced; name the file itself"
    if path.is_dir():  # "." and "/" have no name of their own
        return "it is a folder, a file's name is needed"
    if not folder.exists():
        return f"there is no folder {str(folder)!r}"
    if not folder.is_dir():
        return f"{str(folder)!r} is no folder"
    if path.exists() and not path.is_file():
        return "it is a device or a pipe and no file"
    with suppress(FileNotFoundError):
        partial_of(path).lstat()  # the longer name it is written under first
    return None


def write_output(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, and say where it is."""
    from snugpt.data.durable_file import write_durably

    write_durably(path, content)
    click.echo(f"written to {path}", err=True, color=colour())
