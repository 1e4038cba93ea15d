"""The folder of a user for files that the toolkit can make again at any time."""

from __future__ import annotations

import os
from pathlib import Path

from fseft_edge.runtime.errors import EnvironmentProblemError


def user_cache() -> Path:
    """Return ``$XDG_CACHE_HOME/fseft-edge``, or ``~/.cache/fseft-edge`` if the variable is not set.

    The XDG Base Directory Specification requires that a relative path in the variable is ignored.

    Raises:
        EnvironmentProblemError: the account has no home folder.
    """
    root = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not root.is_absolute():
        try:
            root = Path.home() / ".cache"
        except RuntimeError as error:
            raise EnvironmentProblemError(
                "This account has no home folder, so nothing can be stored for later runs.",
                remedy="Set the environment variable XDG_CACHE_HOME to a folder.",
            ) from error
    return root / "fseft-edge"
