"""The default browser of this account, opened on the review page."""

from __future__ import annotations

import contextlib
import html
import os
import tempfile
import webbrowser
from collections.abc import Iterator
from pathlib import Path

from fseft_edge.review.server import ReviewServer

_PAGE = """<!doctype html>
<html lang="en">
<title>fseft-edge review</title>
<meta name="referrer" content="no-referrer">
<meta http-equiv="refresh" content="0; url={address}">
<p><a href="{address}">Open the review</a></p>
</html>
"""


@contextlib.contextmanager
def open_in_browser(server: ReviewServer) -> Iterator[bool]:
    """Open the review page in the default browser; yield whether a browser was started.

    Every account of this machine can read the command line of the browser. The command line therefore contains the path
    of a file that only this account can read, and this file contains the address with the token. The file is deleted as
    soon as the browser has given the token, at the latest when the context ends.

    Args:
        server: the server of the review, which need not serve yet.
    """
    with tempfile.TemporaryDirectory(prefix="fseft-edge-review-") as folder:  # only this account can open the folder
        page = Path(folder) / "review.html"
        with os.fdopen(os.open(page, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            file.write(_PAGE.format(address=html.escape(server.address)))
        server.entered = lambda: page.unlink(missing_ok=True)
        try:
            yield webbrowser.open(page.as_uri())
        finally:
            server.entered = lambda: None
