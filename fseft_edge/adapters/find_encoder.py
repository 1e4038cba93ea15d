"""Finding the encoder bundle that an adapter was trained with."""

from __future__ import annotations

import logging
from pathlib import Path

from fseft_edge.runtime.encoder.bundle import EncoderBundle
from fseft_edge.runtime.errors import EncoderBundleError, InputError

_LOG = logging.getLogger(__name__)


def find_encoder(adapter: Path, encoder_id: str) -> Path:
    """Return the bundle an adapter was trained with: looked for beside the adapter, then in the working folder.

    Of several copies the one of the adapter's own name is taken, as `merge` writes them, else the first by name.

    Raises:
        InputError: there is none.
    """
    for folder in (adapter.resolve().parent, Path.cwd()):
        for path in sorted(folder.glob("*.encoder"), key=lambda path: (path.stem != adapter.stem, path.name)):
            try:
                if EncoderBundle.open(path).encoder_id == encoder_id:
                    return path
            except EncoderBundleError as error:
                _LOG.warning("%s passed over: %s", path, error)
    raise InputError(
        f"The encoder that {adapter} was trained with is neither beside it nor in the working folder.",
        remedy="Name it by --encoder.",
    )
