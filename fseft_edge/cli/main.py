"""``fseft-edge``: the command group, and the only place where errors become exit codes."""

from __future__ import annotations

import importlib
import logging
import signal
import sys
import threading
import traceback
from types import FrameType
from typing import NoReturn

import click

from fseft_edge._version import __version__
from fseft_edge.cli.start import leave
from fseft_edge.runtime.errors import EnvironmentProblemError, FseftEdgeError, OutOfMemoryError
from fseft_edge.runtime.system.memory import is_out_of_memory

_COMMANDS = {
    "demo": "commands",
    "models": "encoder_commands",
    "export": "encoder_commands",
    "build-engines": "encoder_commands",
    "contours": "annotation_commands",
    "adapt": "adaptation_commands",
    "finetune": "finetuning_commands",
    "merge": "finetuning_commands",
    "segment": "commands",
    "batch": "batch_commands",
    "export-adapter": "commands",
    "evaluate": "commands",
    "review": "review_commands",
    "review-import": "review_commands",
    "pretrain": "encoder_commands",
    "doctor": "machine_commands",
    "benchmark": "machine_commands",
}
"""For each command, the module of :mod:`fseft_edge.cli` that defines it."""
_INTERRUPTED = 130
_STOP_REQUESTED = threading.Event()
_UNEXPECTED = 1
_MEMORY_REMEDY = "Close other programs, set a limit with --memory, or use a machine with more memory."


class _LazyGroup(click.Group):
    """A command group that imports the module of a command only when this command is needed."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - the signature is click's
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 - the signature is click's
        if cmd_name not in _COMMANDS:
            return None
        module = importlib.import_module(f"fseft_edge.cli.{_COMMANDS[cmd_name]}")
        command: click.Command = getattr(module, cmd_name.replace("-", "_"))
        return command


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, package_name="fseft-edge")
def cli() -> None:
    """Segment organs in CT scans with a frozen encoder and a small adapter that is trained on a few annotated scans.

    Exit codes: 0 success; 1 unexpected error; 2 wrong use of a command or option; 3 problem with an input file;
    4 problem with this machine (memory, disk, GPU, missing software); 5 some cases failed.
    """


def _stop(signal_number: int, frame: FrameType | None) -> NoReturn:  # noqa: ARG001 - the signature of a signal handler
    """Raise KeyboardInterrupt, so that temporary files, which contain data of patients' images, are deleted."""
    _STOP_REQUESTED.set()
    raise KeyboardInterrupt


def _interrupted() -> int:
    resume = " Add --resume to continue." if sys.argv[1:2] == ["pretrain"] else ""
    click.echo(f"Interrupted. No incomplete files are left. Run the command again.{resume}", err=True)
    return _INTERRUPTED


def main() -> NoReturn:
    """Run the command line, and end the process."""
    leave(run())


def run() -> int:
    """Run the command line, and return the exit code; a traceback is printed only for unexpected errors."""
    logging.captureWarnings(capture=True)
    _STOP_REQUESTED.clear()
    signal.signal(signal.SIGTERM, _stop)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell may have it ignored
        signal.signal(signal.SIGINT, _stop)
    try:
        cli.main(standalone_mode=False)
    except (KeyboardInterrupt, click.Abort):
        return _interrupted()
    except click.exceptions.Exit as ended:
        return ended.exit_code
    except Exception as error:
        # An interrupt during the import of a library can leave it half-loaded and come out as any other error.
        return _interrupted() if _STOP_REQUESTED.is_set() else _exit_code_of(error)
    return 0


def _exit_code_of(error: Exception) -> int:
    """Print an error with its remedy, and return its exit code."""
    if isinstance(error, click.ClickException):
        error.show()
        return error.exit_code
    if isinstance(error, FseftEdgeError):
        click.echo(f"Error: {error.message}\n{error.remedy}", err=True)
        return error.exit_code
    if isinstance(error, OSError):
        click.echo(
            f"Error: {error}.\nCheck that the file exists and that you have the permission to read and write it.",
            err=True,
        )
        return EnvironmentProblemError.exit_code
    if is_out_of_memory(error):
        click.echo(f"Error: Memory ran out.\n{_MEMORY_REMEDY}", err=True)
        return OutOfMemoryError.exit_code
    traceback.print_exception(error)
    click.echo("This is a bug in fseft-edge. Please report the bug together with the lines above.", err=True)
    return _UNEXPECTED
