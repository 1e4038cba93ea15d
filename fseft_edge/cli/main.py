"""``fseft-edge``: the command group, and the one place where errors become exit codes."""

from __future__ import annotations

import importlib
import logging
import signal
import sys
import traceback
from types import FrameType
from typing import NoReturn

import click

from fseft_edge._version import __version__
from fseft_edge.runtime.errors import EnvironmentProblemError, FseftEdgeError, OutOfMemoryError
from fseft_edge.runtime.system.memory import is_out_of_memory

_COMMANDS = {
    "demo": "commands",
    "models": "encoder_commands",
    "export": "encoder_commands",
    "build-engines": "encoder_commands",
    "adapt": "adaptation_commands",
    "merge": "adaptation_commands",
    "segment": "commands",
    "batch": "batch_commands",
    "export-adapter": "commands",
    "evaluate": "commands",
    "review": "review_commands",
    "pretrain": "encoder_commands",
    "doctor": "machine_commands",
    "benchmark": "machine_commands",
}
"""By name, the module of :mod:`fseft_edge.cli` that holds it."""
_INTERRUPTED = 130
_UNEXPECTED = 1
_MEMORY_REMEDY = "Close other programs, give a budget by --memory, or use a machine with more memory."


class _LazyGroup(click.Group):
    """Commands live in modules of their own, which are imported when one is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 - click's
        if cmd_name not in _COMMANDS:
            return None
        module = importlib.import_module(f"fseft_edge.cli.{_COMMANDS[cmd_name]}")
        command: click.Command = getattr(module, cmd_name.replace("-", "_"))
        return command


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, package_name="fseft-edge")
def cli() -> None:
    """Segment organs in CT with a frozen foundation encoder and a light adapter made from a few annotated scans.

    Exit codes: 0 done, 1 unexpected, 2 wrong use, 3 bad input, 4 environment, 5 some cases failed.
    """


def _stop(signal_number: int, frame: FrameType | None) -> NoReturn:  # noqa: ARG001 - the signal handler's signature
    """End as Ctrl-C does, so that temporary files, which derive from patients' images, are removed."""
    raise KeyboardInterrupt


def main() -> None:
    """Run the command line; a traceback is shown only for bugs."""
    logging.captureWarnings(capture=True)
    signal.signal(signal.SIGTERM, _stop)
    try:
        cli.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except FseftEdgeError as error:
        click.echo(f"Error: {error.message}\n{error.remedy}", err=True)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo(
            "Interrupted. Nothing is left half-written; run the command again (`pretrain` with --resume).", err=True
        )
        sys.exit(_INTERRUPTED)
    except OSError as error:
        click.echo(f"Error: {error}.\nCheck that the file is there and that you may read and write it.", err=True)
        sys.exit(EnvironmentProblemError.exit_code)
    except Exception as error:
        if is_out_of_memory(error):
            click.echo(f"Error: out of memory.\n{_MEMORY_REMEDY}", err=True)
            sys.exit(OutOfMemoryError.exit_code)
        traceback.print_exc()
        click.echo("This is a bug in fseft-edge: please report it with the lines above.", err=True)
        sys.exit(_UNEXPECTED)
