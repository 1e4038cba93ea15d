"""The file that leads the default browser to the review page, and the command line of this browser."""

from __future__ import annotations

import os
import re
import stat
import webbrowser
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import pytest
from doubles.reviewed import Batch, run_batch
from doubles.reviewer import Reviewer, served

from fseft_edge.review.browser import open_in_browser


@pytest.fixture
def batch(tmp_path: Path) -> Batch:
    return run_batch(tmp_path, (1,))


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The arguments of the browser, which every account of the machine can read."""
    arguments: list[str] = []

    def browser(url: str) -> bool:
        arguments.append(url)
        return True

    monkeypatch.setattr(webbrowser, "open", browser)
    return arguments


def test_the_command_line_of_the_browser_does_not_contain_the_token(batch: Batch, opened: list[str]) -> None:
    with served(batch.outbox) as reviewer:
        token = reviewer.server.access.token
        with open_in_browser(reviewer.server) as started:
            assert started
            (url,) = opened
            assert urlsplit(url).scheme == "file"
            page = Path(url2pathname(urlsplit(url).path))
            assert token not in url
            assert re.search(rf"url=http://{re.escape(reviewer.host)}/\?token={re.escape(token)}\"", page.read_text())
            assert stat.S_IMODE(page.stat().st_mode) == 0o600
            assert stat.S_IMODE(page.parent.stat().st_mode) == 0o700
            assert page.stat().st_uid == os.getuid()
            assert Reviewer(reviewer.server).ask("/?token=wrong").status == 403
            assert page.exists()
            assert Reviewer(reviewer.server).ask(f"/?token={token}").status == 200
            assert not page.exists()  # as soon as a browser has the cookie
        assert not page.parent.exists()
        assert Reviewer(reviewer.server).ask(f"/?token={token}").status == 200  # the person may open the address again


def test_the_file_is_deleted_at_the_end_if_no_browser_has_read_it(batch: Batch, opened: list[str]) -> None:
    with served(batch.outbox) as reviewer, open_in_browser(reviewer.server):
        page = Path(url2pathname(urlsplit(opened[0]).path))
        assert page.exists()
    assert not page.parent.exists()
