"""Search for the encoder bundle that an adapter was trained with."""

from __future__ import annotations

import logging
from pathlib import Path

from fseft_edge.runtime.encoder.bundle import EncoderBundle
from fseft_edge.runtime.errors import EncoderBundleError, InputError

_LOG = logging.getLogger(__name__)


def find_encoder(adapter: Path, encoder_id: str) -> Path:
    """Return the encoder bundle that an adapter was trained with.

    The search covers the folder of the adapter, then the working folder. If a folder contains several copies of the
    bundle, the copy with the name of the adapter has priority (`merge` writes such pairs), then the first by name.

    Args:
        adapter: path of the adapter file.
        encoder_id: id of the encoder that the adapter was trained with.

    Raises:
        InputError: both folders do not contain the encoder.
    """
    for folder in (adapter.resolve().parent, Path.cwd()):
        for path in sorted(folder.glob("*.encoder"), key=lambda path: (path.stem != adapter.stem, path.name)):
            try:
                if EncoderBundle.open(path).encoder_id == encoder_id:
                    return path
            except EncoderBundleError as error:
                _LOG.warning("%s is skipped: %s", path, error)
    raise InputError(
        f"The encoder of {adapter} (id {encoder_id[:12]}) is not in the folder of the adapter and not in the working "
        "folder.",
        remedy="Give the encoder bundle with --encoder.",
    )
