"""The commands for the review and correction of a batch's masks by a person."""

from __future__ import annotations

import contextlib
from pathlib import Path

import click

from fseft_edge.cli.options import PATH, logging_options
from fseft_edge.cli.start import loading


@click.command()
@click.argument("outbox", type=PATH)
@click.option(
    "--state", type=PATH, help="State file of the batch, if `batch run` was started with --state.  [default: in OUTBOX]"
)
@click.option(
    "--corrected",
    type=PATH,
    help="Folder of corrected masks <key>.nii.gz, which are displayed instead of the masks in OUTBOX.",
)
@click.option(
    "--reviewer",
    metavar="NAME",
    help="Name of the person who decides; it is stored with each decision.  [default: user name of this account]",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=0,
    show_default=True,
    help="Port of the server on this machine (127.0.0.1); 0 means any free port.",
)
@click.option(
    "--show-ids", is_flag=True, help="Also show the file names of the scans, which may contain patients' names."
)
@click.option("--open", "open_browser", is_flag=True, help="Open the page in the default browser.")
@logging_options
def review(
    *,
    outbox: Path,
    state: Path | None,
    corrected: Path | None,
    reviewer: str | None,
    port: int,
    show_ids: bool,
    open_browser: bool,
    quiet: bool,
) -> None:
    """Review the masks of the batch in OUTBOX in the browser: accept, reject or correct masks, and write notes."""
    with loading():
        from fseft_edge.review.browser import open_in_browser  # noqa: PLC0415 - only this command needs it
        from fseft_edge.review.server import open_review  # noqa: PLC0415 - only this command needs it

    with (
        open_review(
            outbox, state=state, corrected=corrected, reviewer=reviewer, port=port, show_ids=show_ids
        ) as server,
        contextlib.ExitStack() as stack,
    ):
        click.echo(server.address)
        if not quiet:
            click.echo(
                f"Open this address in a browser on this machine. Decisions and corrections are stored under the name "
                f"{server.reviewer}. Do not share the address: anyone who has it can see the scans and decide. Press "
                "Ctrl-C to end.",
                err=True,
            )
        if open_browser and not stack.enter_context(open_in_browser(server)):
            click.echo("No browser was found on this machine. Open the address above in a browser.", err=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
        click.echo(str(server.progress()))


@click.command("review-import")
@click.argument("outbox", type=PATH)
@click.argument("files", type=PATH, nargs=-1, required=True)
@click.option("--case", metavar="KEY", help="Key of the case, for a single file.  [default: name of the file]")
@click.option(
    "--state", type=PATH, help="State file of the batch, if `batch run` was started with --state.  [default: in OUTBOX]"
)
@click.option(
    "--reviewer",
    metavar="NAME",
    help="Name of the person who corrected the masks.  [default: user name of this account]",
)
@logging_options
def review_import(
    *,
    outbox: Path,
    files: tuple[Path, ...],
    case: str | None,
    state: Path | None,
    reviewer: str | None,
    quiet: bool,  # noqa: ARG001 - logging_options passes quiet
) -> None:
    """Make masks that were corrected in another program the corrections of their cases in OUTBOX.

    FILES are label maps, such as <key>.nii.gz, with the label values and the lattice of the masks of the batch, or
    .seg.nrrd files, RT Structure Sets or DICOM Segmentations whose structures have the names of the organs.
    """
    with loading():
        from fseft_edge.review.importing import import_corrections  # noqa: PLC0415 - only this command needs it

    for key, saved in import_corrections(outbox, files, case=case, state=state, reviewer=reviewer).items():
        changed = [organ.name for organ in saved.correction.organs if organ.mean_distance_mm != 0]
        click.echo(f"{key}: corrected by {saved.correction.reviewer} ({', '.join(changed) or 'no organ differs'})")
