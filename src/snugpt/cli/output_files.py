"""Files that a verb writes where the user says: checked before the work, written whole after it."""

from __future__ import annotations

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
        usable = path.name != "" and path.parent.is_dir() and not path.is_symlink()
        usable = usable and (path.is_file() or not path.exists())
    except (OSError, ValueError):
        usable = False
    if str(path) == "-" or not usable:
        raise bad_value(field, str(path), "a file's path in a folder that exists", hint=hint)
    if suffix and path.suffix.lower() != suffix:
        raise bad_value(field, str(path), f"a name that ends in {suffix}", hint=hint)


def write_output(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, and say where it is."""
    from snugpt.data.durable_file import write_durably

    write_durably(path, content)
    click.echo(f"written to {path}", err=True, color=colour())
