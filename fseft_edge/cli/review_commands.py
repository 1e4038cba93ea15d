"""The command with which a person goes through a batch's masks."""

from __future__ import annotations

import contextlib
import webbrowser
from pathlib import Path

import click

from fseft_edge.cli.options import PATH, logging_options


@click.command()
@click.argument("outbox", type=PATH)
@click.option("--state", type=PATH, help="The batch's state, if its run had a --state.  [default: in OUTBOX]")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=0,
    show_default=True,
    help="Port of this machine (127.0.0.1) to listen on; 0 takes a free one.",
)
@click.option("--show-ids", is_flag=True, help="Also show the names of the scans' files, which may be patients' names.")
@click.option("--open", "open_browser", is_flag=True, help="Open the page in this account's browser.")
@logging_options
def review(*, outbox: Path, state: Path | None, port: int, show_ids: bool, open_browser: bool, quiet: bool) -> None:
    """Look through the masks of a batch in the browser; accept, reject, leave notes."""
    from fseft_edge.review.server import open_review  # noqa: PLC0415 - only this command needs it

    with open_review(outbox, state=state, port=port, show_ids=show_ids) as server:
        click.echo(server.address)
        if not quiet:
            click.echo("Open this address on this machine. Whoever has it may see and decide. Ctrl-C ends.", err=True)
        if open_browser:
            webbrowser.open(server.address)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
        click.echo(str(server.progress()))
