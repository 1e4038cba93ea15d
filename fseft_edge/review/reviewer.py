"""The name of the person who reviews or corrects masks."""

from __future__ import annotations

import os
import pwd
from typing import Final

from fseft_edge.runtime.errors import UsageError

_LONGEST_NAME: Final = 100


def reviewer_name(given: str | None) -> str:
    """Return the name of the reviewer; None means the user name of this account.

    Raises:
        UsageError: the name is empty, too long or unknown, or has characters that cannot be displayed.
    """
    if given is None:
        try:
            return pwd.getpwuid(os.getuid()).pw_name
        except KeyError as error:
            raise UsageError(
                "This account has no user name, so it is not known who reviews the masks.",
                remedy="Give the name of the reviewer with --reviewer.",
            ) from error
    name = given.strip()
    if not name or len(name) > _LONGEST_NAME or not name.isprintable():
        raise UsageError(
            f"--reviewer must be a name of 1 to {_LONGEST_NAME} printable characters.",
            remedy="Give the name of the reviewer, for example --reviewer 'A. Lovelace'.",
        )
    return name
