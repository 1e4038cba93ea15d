"""The command for training an adapter on annotated scans; see :mod:`fseft_edge.cli.commands`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from fseft_edge.cli.options import Common, common_options
from fseft_edge.cli.start import loading
from fseft_edge.cli.training_options import ADAPTERS, TUNINGS, MethodChoice, Support, support_options, was_given
from fseft_edge.runtime.errors import UsageError

if TYPE_CHECKING:
    from fseft_edge.adapters.network import Activation, Levels


@click.command()
@support_options("Adapter to write, NAME.adapter.")
@click.option(
    "--method",
    type=MethodChoice(["auto", *ADAPTERS], TUNINGS, "fseft-edge finetune"),
    default="spatial",
    show_default=True,
    help="Kind of adapter. auto chooses the kind and the levels that are best in cross-validation.",
)
@click.option(
    "--levels",
    type=click.Choice(["finest", "all"]),
    default="all",
    show_default=True,
    help="Use only the finest level of the feature pyramid, or all levels. --method auto chooses the levels.",
)
@click.option(
    "--validate/--no-validate",
    default=True,
    show_default=True,
    help="Estimate the accuracy on new scans by cross-validation: one patient per fold; with more than ten patients, "
    "ten folds of several patients each.",
)
@click.option(
    "--activation",
    type=click.Choice(["sigmoid", "softmax"]),
    default="sigmoid",
    show_default=True,
    help="Activation of the output.",
)
@click.option(
    "--epochs",
    type=click.IntRange(min=1),
    help="Largest number of epochs; not for --method linear.  [default: depends on the number of scans]",
)
@click.option(
    "--variations",
    type=click.IntRange(min=0, max=64),
    help="Number of variations (rotated, zoomed, restyled) of each scan.  [default: depends on the number of scans]",
)
@click.option("--whole-scan", is_flag=True, help="Encode all windows of the scans, and train no locator.")
@click.option(
    "--windows-elsewhere",
    type=click.IntRange(min=0),
    default=2,
    show_default=True,
    help="Largest number of windows of each scan to encode at random places, in addition to those around the organs. "
    "Only for encoders with windows.",
)
@common_options
def adapt(
    *,
    support: Support,
    method: str,
    levels: Levels,
    validate: bool,
    activation: Activation,
    epochs: int | None,
    variations: int | None,
    whole_scan: bool,
    windows_elsewhere: int,
    common: Common,
) -> None:
    """Train an adapter on a few annotated CTs. The encoder stays as it is."""
    _check_method(method, validate=validate, epochs=epochs)
    with loading():
        from fseft_edge.adaptation.adapt import adapt as run  # noqa: PLC0415 - brings in torch
        from fseft_edge.adaptation.training import TrainingSettings  # noqa: PLC0415 - brings in torch
        from fseft_edge.adapters.network import AdapterSettings  # noqa: PLC0415 - brings in torch

    kind: dict[str, Any] = {} if method == "auto" else {"method": method, "levels": levels}
    with common.progress() as progress:
        file = run(
            *support.scans,
            reviewed=support.reviewed,
            settings=AdapterSettings(activation=activation, **kind),
            training=TrainingSettings(seed=support.seed, epochs=epochs, variations=variations),
            choose=method == "auto",
            validate=validate,
            cases=support.cases,
            groups=support.groups,
            structure_set=support.structure_set,
            interpolate=support.interpolate,
            cache=common.cache,
            cache_gb=common.cache_gb,
            device=common.device,
            backend=common.backend,
            precision=common.precision,
            memory_gb=common.memory,
            vram_gb=common.vram,
            whole_scan=whole_scan,
            windows_elsewhere=windows_elsewhere,
            progress=progress,
        )
    support.print_result(file)


def _check_method(method: str, *, validate: bool, epochs: int | None) -> None:
    """Raise UsageError if an option has no effect with the method or contradicts the method."""
    wrong = None
    if method == "auto" and not validate:
        wrong, why = "--no-validate", "needs cross-validation"
    elif method == "auto" and was_given("levels"):
        wrong, why = "--levels", "chooses the levels"
    elif method == "linear" and epochs is not None:
        wrong, why = "--epochs", "is solved and has no epochs"
    if wrong:
        raise UsageError(
            f"--method {method} {why}, so {wrong} cannot be used with it.",
            remedy=f"Remove {wrong}, or choose another --method.",
        )
