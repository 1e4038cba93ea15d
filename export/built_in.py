"""Encoders that a user can name instead of giving a bundle: the built-in models, exported once for each user."""

from __future__ import annotations

import logging
import os
import shutil
from importlib import resources
from pathlib import Path

from fseft_edge._version import __version__
from fseft_edge.export.zoo import MODELS
from fseft_edge.runtime.encoder.bundle import EncoderBundle, sha256_of_file
from fseft_edge.runtime.errors import EncoderBundleError, OutOfSpaceError, UsageError
from fseft_edge.runtime.system.user_cache import user_cache

_log = logging.getLogger(__name__)


def open_encoder(encoder: str | Path) -> EncoderBundle:
    """Open an encoder bundle, or the bundle of a built-in model that is given by its name.

    The first use of a built-in model exports its encoder into the folder ``encoders`` of
    :func:`fseft_edge.runtime.system.user_cache.user_cache`. Later uses of the same version of the toolkit open this
    bundle. A file or folder with the name of a model has priority over the model.

    Args:
        encoder: path of a bundle, or the name of a built-in model: ``"edge_base"``.

    Raises:
        UsageError: ``encoder`` is the name of a model that is not built in.
        EncoderBundleError: the path does not exist or is not an encoder bundle.
        OutOfSpaceError: the bundle of a built-in model cannot be written.
    """
    name = str(encoder)
    if os.path.lexists(encoder):
        return EncoderBundle.open(Path(encoder))
    if name not in MODELS:
        built_in = ", ".join(model for model, spec in MODELS.items() if spec.built_in is not None)
        raise EncoderBundleError(
            f"The encoder {name} does not exist.",
            remedy=f"Give a folder that `fseft-edge export` wrote, or the name of a built-in encoder: {built_in}.",
        )
    if MODELS[name].built_in is None:
        raise UsageError(
            f"The encoder {name} is the name of a model that is not part of fseft-edge.",
            remedy=f"Export the checkpoint of the model with `fseft-edge export CHECKPOINT --model {name}`, and give "
            "the bundle.",
        )
    bundle = _folder() / f"{_bundle_name(name)}.encoder"
    if not bundle.exists():
        _export(name, bundle)
    return EncoderBundle.open(bundle)


def exported_built_in_encoders() -> list[Path]:
    """Return the bundles of built-in models that were exported for this user, those of this version first.

    Bundles of earlier versions remain for the adapters that were trained with them.
    """
    built_in = [name for name, spec in MODELS.items() if spec.built_in is not None]
    current = [_folder() / f"{_bundle_name(name)}.encoder" for name in built_in]
    found = {path for name in built_in for path in _folder().glob(f"{name}-*.encoder")}
    return [path for path in current if path in found] + sorted(found.difference(current))


def _folder() -> Path:
    return user_cache() / "encoders"


def _bundle_name(model: str) -> str:
    """Return a name that changes with the version of the toolkit, with the weights and with the tiling."""
    weights = resources.files("fseft_edge").joinpath(str(MODELS[model].built_in))
    return f"{model}-{__version__}-{sha256_of_file(Path(str(weights)))[:12]}-whole"


def _export(model: str, bundle: Path) -> None:
    """Export a built-in model. The bundle appears complete; of several processes, the first one keeps its bundle."""
    from fseft_edge.export.export import export_encoder  # noqa: PLC0415 - loads the tools of the export

    _log.warning("the built-in encoder %s is exported once into %s, which later runs use", model, bundle)
    unfinished = bundle.with_name(f".{bundle.name}.{os.getpid()}")
    try:
        unfinished.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(unfinished, ignore_errors=True)
        export_encoder(None, model=model, output=unfinished)
        if not bundle.exists():
            unfinished.rename(bundle)
    except OSError as error:
        if not bundle.exists():
            raise OutOfSpaceError(
                f"The bundle {bundle} of the built-in encoder cannot be written: {error.strerror or error}.",
                remedy="Free some disk space, set the environment variable XDG_CACHE_HOME to a writable folder, or "
                f"export the encoder with `fseft-edge export --output {model}.encoder` and give this bundle.",
            ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
