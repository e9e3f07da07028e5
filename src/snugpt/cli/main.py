"""The front door: finds the verb, runs it, turns errors into two lines and an exit code.

    0 done   1 failed   2 bad question   3 does not fit   130 interrupted

A verb is imported when it is called, so that `snugpt plan` pays for nothing else.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module

import click

from snugpt.errors import SnugError, unknown_name

TRAIN_EXTRA = ("torch", "numpy", "tokenizers", "safetensors")
INSTALL_TRAIN = "pip install 'snugpt[train]'"
INTERRUPTED = 130  # 128 + SIGINT, what shells give
VERBS: dict[str, tuple[str, str]] = {
    "plan": ("snugpt.cli.plan:plan", "What fits your GPU: settings, memory, time, and why."),
    "trace": ("snugpt.cli.trace:trace", "The real code without a GPU, beside what is predicted."),
    "train": ("snugpt.cli.train:train", "Train by a plan, with its receipt at the end."),
    "generate": ("snugpt.cli.generate:generate", "Text from a trained model."),
    "doctor": ("snugpt.cli.doctor:doctor", "What went wrong: reads a log, or checks this machine."),
    "gpus": ("snugpt.cli.gpus:gpus", "The cards snugpt knows, with the source of every figure."),
    "records": ("snugpt.cli.records:records", "All past runs: predicted ÷ measured."),
    "demo": ("snugpt.cli.demo:demo", "All of it in three minutes, no GPU, no download."),
}
HELP = """Plans, trains and runs the GPT that fits your GPU, predicting its memory to the byte.

\b
  snugpt plan --gpu rtx-4090 --depth 12     what fits, how fast, which settings
  snugpt plan --gpu rtx-4090 --hours 48     the best GPT of a weekend
  snugpt plan --help                        every flag
"""


class Doors(click.Group):
    """The group of verbs; each is imported by name when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The verbs in the order people need them."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one verb."""
        if cmd_name not in VERBS:
            return None
        module, _, name = VERBS[cmd_name][0].partition(":")
        command: click.Command = getattr(import_module(module), name)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the verb, or say which one may have been meant."""
        command = self.get_command(ctx, args[0])
        if command is None:
            raise unknown_name("command", args[0][:40], VERBS, hint="snugpt --help")
        return args[0], command, args[1:]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the verbs without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(verb, says) for verb, (_, says) in VERBS.items()])


def _print_version(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if not value:
        return
    from importlib.metadata import version

    click.echo(f"snugpt {version('snugpt')}")
    ctx.exit()


doors = Doors(
    "snugpt",
    help=HELP,
    params=[
        click.Option(
            ["--version"], is_flag=True, expose_value=False, is_eager=True,
            callback=_print_version, help="Print the version.",
        )
    ],
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its code; bad input never ends in a traceback."""
    try:
        code: int | str | None = run(list(sys.argv[1:] if argv is None else argv))
    except SystemExit as end:  # a rank whose sister has said why
        code = end.code
    if "torch.distributed" in sys.modules and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # All is written. A thread of gloo that still runs would abort the interpreter's own end.
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))
    sys.exit(code)


def run(argv: list[str]) -> int:
    """Run the command line; return the exit code."""
    argv = argv or ["--help"]
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal without our block characters gets "?"
            stream.reconfigure(errors="replace")
    try:
        code = doors.main(with_hyphens(argv), prog_name="snugpt", standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()  # a closed pipe is noticed here and not at exit
        return code if isinstance(code, int) else 0
    except SnugError as error:
        verb = f"{argv[0]} " if argv and argv[0] in VERBS else ""
        say_error(error.message, error.hint or f"snugpt {verb}--help")
        return error.exit_code
    except click.UsageError as error:
        say_error(*_usage(error, argv))
        return 2
    except click.ClickException as error:
        say_error(error.format_message(), None)
        return 1
    except ModuleNotFoundError as error:
        if error.name not in TRAIN_EXTRA:
            raise
        say_error(f"this verb needs {error.name}, which is not installed", INSTALL_TRAIN)
        return 1
    except (click.Abort, KeyboardInterrupt):
        click.echo(err=True)
        return INTERRUPTED
    except BrokenPipeError:
        _silence_stdout()
        return 0
    except OSError as error:
        if error.filename is not None:
            raise
        _silence_stdout()
        say_error(f"output can't be written: {error.strerror}", "df -h .")
        return 1


def with_hyphens(argv: list[str]) -> list[str]:
    """Write every flag with hyphens: `--seq_len=512` is `--seq-len=512`; values stay."""
    end = argv.index("--") if "--" in argv else len(argv)
    return [_with_hyphens(word) for word in argv[:end]] + argv[end:]


def say_error(message: str, hint: str | None) -> None:
    """Print an error as one line and its hint as another, on stderr."""
    label = click.style("error:", fg="red", bold=True)
    click.echo(f"{label} {' '.join(message.split())}", err=True, color=_colour())
    if hint:
        label = click.style("hint:", fg="cyan", bold=True)
        click.echo(f"{label} {' '.join(hint.split())}", err=True, color=_colour())


def _colour() -> bool | None:
    """False where NO_COLOR is set; None leaves it to whether stderr is a terminal."""
    return False if os.environ.get("NO_COLOR") else None


def _with_hyphens(word: str) -> str:
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value


def _usage(error: click.UsageError, argv: list[str]) -> tuple[str, str]:
    """click's message in our words: lower case, no full stop, the nearest option named.

    Of a flag without its value click does not say to which verb it belongs.
    """
    verb = argv[0] if argv[0] in VERBS else ""
    path = error.ctx.command_path if error.ctx else f"snugpt {verb}".rstrip()
    hint = f"{path} --help"
    if isinstance(error, click.NoSuchOption):
        flags = error.ctx.command.params if error.ctx else []
        known = [name for flag in flags for name in (*flag.opts, *flag.secondary_opts)]
        named = unknown_name("option", error.option_name[:40], known, hint=hint)
        return named.message, hint
    message = error.format_message().rstrip(".")
    return message[:1].lower() + message[1:], hint


def _silence_stdout() -> None:
    """Give Python's own flush at exit somewhere to write to."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
