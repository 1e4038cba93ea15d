"""The adapters and the encoder of a segmentation: read, checked for consistency, or made from the encoder itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fseft_edge.adaptation.adapt import zero_shot_adapter
from fseft_edge.adapters.file import AdapterFile, read_adapter
from fseft_edge.adapters.find_encoder import find_encoder
from fseft_edge.export.built_in import open_encoder
from fseft_edge.runtime.encoder.bundle import EncoderBundle
from fseft_edge.runtime.errors import UsageError
from fseft_edge.runtime.scans.organs import OrganLabel
from fseft_edge.segmentation.inputs import check_organs
from fseft_edge.segmentation.settings import SegmentationSettings


@dataclass(frozen=True, eq=False)
class LoadedModels:
    """The adapters and the encoder bundle that the settings name, read from disk and checked for consistency."""

    adapters: tuple[AdapterFile, ...]
    bundle: EncoderBundle


def expects_sizes(files: Sequence[AdapterFile]) -> bool:
    """Return whether a threshold of the adapters follows the size of its organ."""
    return any(organ.expected_ml for file in files for organ in file.description.organs)


def load_models(settings: SegmentationSettings, in_memory: Sequence[AdapterFile] = ()) -> LoadedModels:
    """Read the adapters and the encoder, and check that they belong together.

    Args:
        settings: settings that name the adapters and the encoder.
        in_memory: further adapters, after those of the settings.

    Raises:
        UsageError: no adapter and no encoder is given, two adapters segment the same organ, or organs are given
            together with adapters.
        InputError: an adapter or the encoder is not usable, or the encoder does not know one of the organs.
    """
    if not settings.adapters and not in_memory:
        return _zero_shot_models(settings)
    if settings.organs:
        raise UsageError(
            "--organ can only be used without --adapter: an adapter segments all of its organs.",
            remedy="Remove --organ.",
        )
    files = (*(read_adapter(path) for path in settings.adapters), *in_memory)
    first = settings.adapters[0] if settings.adapters else None
    of_first = files[0].description
    encoder = settings.encoder or find_encoder(first, of_first.encoder_id, of_first.encoder_name)
    bundle = open_encoder(encoder)
    for path, file in zip((*settings.adapters, *[None] * len(in_memory)), files, strict=True):
        file.check_encoder(bundle, path=path)
    check_organs(files)
    if settings.transduction is not None:
        settings.transduction.check(files)
    return LoadedModels(files, bundle)


def _zero_shot_models(settings: SegmentationSettings) -> LoadedModels:
    """Return the encoder, with its own classifiers in place of an adapter."""
    if settings.encoder is None:
        raise UsageError(
            "No adapter and no encoder was given.",
            remedy="Give an adapter file with --adapter, or an encoder bundle with --encoder. An encoder without an "
            "adapter segments the organs that it knows.",
        )
    if settings.transduction is not None:
        raise UsageError(
            "--transductive refits the classifiers of an adapter, but no adapter was given.",
            remedy="Add --adapter, or remove --transductive.",
        )
    bundle = open_encoder(settings.encoder)
    names = settings.organs or bundle.manifest.organs
    if not names:
        raise UsageError(
            f"The encoder {settings.encoder} has no classifier for any organ.",
            remedy="Train an adapter with `fseft-edge adapt`, and give it with --adapter.",
        )
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(f"--organ contains {', '.join(twice)} more than once.", remedy="Give each organ once.")
    organs = [OrganLabel(name, label) for label, name in enumerate(names, start=1)]
    return LoadedModels((zero_shot_adapter(bundle, organs),), bundle)
