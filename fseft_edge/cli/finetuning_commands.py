"""The commands `finetune` and `merge`; see :mod:`fseft_edge.cli.commands`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fseft_edge.cli.options import PATH, device_option, logging_options
from fseft_edge.cli.start import loading
from fseft_edge.cli.training_options import ADAPTERS, TUNINGS, MethodChoice, Support, support_options, was_given
from fseft_edge.runtime.errors import UsageError
from fseft_edge.runtime.system.progress import open_progress

if TYPE_CHECKING:
    from fseft_edge.adapters.network import Levels
    from fseft_edge.finetuning.settings import Decoder


@click.command()
@support_options("Tuning to write, NAME.tuning.")
@click.option(
    "--method",
    type=MethodChoice(["auto", *TUNINGS], ADAPTERS, "fseft-edge adapt"),
    required=True,
    help="What is trained in the encoder. auto tries two methods, and writes the tuning only if it is better than the "
    "adapter of --adapter.",
)
@click.option(
    "--decoder",
    type=click.Choice(["frozen", "tuned", "new"]),
    help="The encoder's decoder is not trained (frozen), trained from its weights (tuned), or trained from random "
    "weights (new).  [default: tuned for full and decoder, else frozen; --method auto chooses]",
)
@click.option(
    "--levels",
    type=click.Choice(["finest", "all"]),
    default="all",
    show_default=True,
    help="Classify with only the finest level of the feature pyramid, or with all levels.",
)
@click.option(
    "--validate/--no-validate",
    default=False,
    show_default=True,
    help="Estimate the accuracy on new scans by cross-validation: one patient per fold; with more than ten patients, "
    "ten folds of several patients each. --method auto always does this.",
)
@click.option(
    "--adapter",
    type=PATH,
    help="With --method auto: adapter that the tuning must surpass, trained by `adapt` on the same scans and organs.",
)
@click.option(
    "--time-limit",
    type=click.FloatRange(min=0, min_open=True),
    default=60.0,
    show_default=True,
    metavar="MINUTES",
    help="With --method auto: time limit for all trials together.",
)
@click.option("--steps", type=click.IntRange(min=1), default=400, show_default=True, help="Number of training steps.")
@click.option("--crops", type=click.IntRange(min=1), default=2, show_default=True, help="Crops in a training step.")
@click.option(
    "--accumulate",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Number of portions in which a step's crops are computed, to save memory.",
)
@click.option("--gradient-checkpointing", is_flag=True, help="Use less memory, but more time.")
@device_option
@logging_options
def finetune(
    *,
    support: Support,
    method: str,
    decoder: Decoder | None,
    levels: Levels,
    validate: bool,
    adapter: Path | None,
    time_limit: float,
    steps: int,
    crops: int,
    accumulate: int,
    gradient_checkpointing: bool,
    device: str,
    quiet: bool,
) -> None:
    """Fine-tune the encoder on a few annotated CTs; `merge` makes a new encoder bundle of the tuning."""
    _check_method(method, decoder=decoder, validate=validate, adapter=adapter)
    with loading():
        from fseft_edge.finetuning.choosing import try_finetuning  # noqa: PLC0415 - brings in torch
        from fseft_edge.finetuning.finetune import finetune as run  # noqa: PLC0415 - brings in torch
        from fseft_edge.finetuning.settings import TuningSettings  # noqa: PLC0415 - brings in torch

    settings = TuningSettings(
        "full" if method == "auto" else method,  # type: ignore[arg-type]  # click.Choice has checked it
        decoder,
        levels,
        seed=support.seed,
        steps=steps,
        crops=crops,
        accumulate=accumulate,
        checkpointing=gradient_checkpointing,
    )
    shared: dict[str, Any] = {
        "settings": settings,
        "reviewed": support.reviewed,
        "cases": support.cases,
        "groups": support.groups,
        "structure_set": support.structure_set,
        "interpolate": support.interpolate,
        "device": device,
    }
    with open_progress(quiet=quiet) as progress:
        if adapter is None:
            tuning = run(*support.scans, validate=validate, progress=progress, **shared)
        else:
            better = try_finetuning(adapter, *support.scans, minutes=time_limit, progress=progress, **shared)
            if better is None:
                _print_no_tuning(support, adapter)
                return
            tuning = better
    support.print_result(tuning)
    if not quiet:
        click.echo(
            f"To use the tuning: fseft-edge merge {support.output} -o {support.output.with_suffix('.encoder')}",
            err=True,
        )


@click.command()
@click.argument("tuning", type=PATH)
@click.option("-o", "--output", type=PATH, required=True, help="Encoder bundle to write, NAME.encoder.")
@click.option(
    "--encoder",
    type=PATH,
    help="Encoder that was fine-tuned.  [default: searched in the folder of TUNING and the working folder]",
)
@click.option(
    "--onnx/--no-onnx", default=True, show_default=True, help="Write ONNX graphs in addition to the weights, or not."
)
@click.option(
    "--parity-ct", type=PATH, multiple=True, help="CT on which backends are compared with PyTorch. May be repeated."
)
@logging_options
def merge(
    *, tuning: Path, output: Path, encoder: Path | None, onnx: bool, parity_ct: tuple[Path, ...], quiet: bool
) -> None:
    """Merge TUNING and its encoder into a new encoder bundle, and write NAME.adapter beside it for `segment`."""
    with loading():
        from fseft_edge.finetuning.merging import merge as run  # noqa: PLC0415 - brings in torch

    merged = run(tuning, output, encoder=encoder, onnx=onnx, parity_volumes=parity_ct)
    if not quiet:
        click.echo(f"{merged.bundle.path}: id {merged.bundle.encoder_id[:12]}; adapter for `segment`: {merged.adapter}")


def _check_method(method: str, *, decoder: Decoder | None, validate: bool, adapter: Path | None) -> None:
    """Raise UsageError if an option is missing, has no effect with the method or contradicts the method."""
    if method == "auto":
        if adapter is None:
            raise UsageError(
                "--method auto needs --adapter, an adapter to compare with.",
                remedy="Train an adapter with `fseft-edge adapt` on the same scans, or choose another --method.",
            )
        if not validate and was_given("validate"):
            wrong, why = "--no-validate", "needs cross-validation"
        elif decoder is not None:
            wrong, why = "--decoder", "chooses the training of the decoder"
        else:
            return
    elif adapter is not None:
        wrong, why = "--adapter", "does not compare with an adapter"
    elif was_given("time_limit"):
        wrong, why = "--time-limit", "has no time limit"
    else:
        return
    raise UsageError(
        f"--method {method} {why}, so {wrong} cannot be used with it.",
        remedy=f"Remove {wrong}, or choose another --method.",
    )


def _print_no_tuning(support: Support, adapter: Path) -> None:
    if support.as_json:
        click.echo("null")
    else:
        click.echo(f"No tuning was written: no fine-tuning was found that is better than {adapter}.")
