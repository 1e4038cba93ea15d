"""Search for the encoder bundle that an adapter was trained with."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

from fseft_edge.export.built_in import exported_built_in_encoders
from fseft_edge.runtime.encoder.bundle import EncoderBundle
from fseft_edge.runtime.errors import EncoderBundleError, InputError

_LOG = logging.getLogger(__name__)


def find_encoder(adapter: Path | None, encoder_id: str, encoder_name: str) -> Path:
    """Return the encoder bundle that an adapter was trained with.

    The search covers the folder of the adapter, then the working folder, then the built-in encoders that were exported
    for this user. If a folder contains several copies of the bundle, the copy with the name of the adapter has priority
    (`merge` writes such pairs), then the first by name.

    Args:
        adapter: path of the adapter file; None for an adapter in memory.
        encoder_id: id of the encoder that the adapter was trained with.
        encoder_name: name of this encoder, for messages.

    Raises:
        InputError: none of these places contains the encoder.
    """
    explained = ""
    for path in _candidates(adapter):
        try:
            bundle = EncoderBundle.open(path)
        except EncoderBundleError as error:
            _LOG.warning("%s is skipped: %s", path, error)
            continue
        if bundle.encoder_id == encoder_id:
            return path
        explained = explained or bundle.tiling_explained(encoder_id)
    raise InputError(
        f"{encoder_name} (id {encoder_id[:12]}), the encoder of {adapter or 'the adapter in memory'}, is not in the "
        "folder of the adapter, in the working folder, or among the built-in encoders that were exported.",
        remedy=explained + "Give the encoder bundle with --encoder. If the adapter was trained with the built-in "
        "encoder, write --encoder edge_base.",
    )


def _candidates(adapter: Path | None) -> Iterator[Path]:
    stem = adapter.stem if adapter else ""
    for folder in (adapter.resolve().parent, Path.cwd()) if adapter else (Path.cwd(),):
        yield from sorted(folder.glob("*.encoder"), key=lambda path: (path.stem != stem, path.name))
    yield from exported_built_in_encoders()
