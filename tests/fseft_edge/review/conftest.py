"""Fixtures of the tests in a browser."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from doubles.browser import CHROMIUM, SOFTWARE_WEBGL, Tab


@pytest.fixture(scope="module")  # while the driver runs, no other test of this process can use asyncio
def chromium() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM:
        pytest.skip("Chromium is not installed: install it, or set FSEFT_EDGE_CHROMIUM to its path")
    with playwright.sync_playwright() as driver:
        # The sandbox of Chromium does not work for root, the account of tests in containers.
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=[*SOFTWARE_WEBGL, *sandbox])
        yield browser
        browser.close()


@pytest.fixture
def new_tab(chromium: Any) -> Iterator[Callable[[], Tab]]:
    """A function that opens a page with cookies of its own."""
    contexts = []

    def opened() -> Tab:
        context = chromium.new_context(viewport={"width": 1280, "height": 800})
        contexts.append(context)
        page = context.new_page()
        tab = Tab(page)
        page.on("request", lambda request: tab.requested.append(request.url))
        page.on("pageerror", lambda error: tab.problems.append(str(error)))
        page.on("console", tab.add_console_line)
        return tab

    yield opened
    for context in contexts:
        context.close()


@pytest.fixture
def tab(new_tab: Callable[[], Tab]) -> Tab:
    return new_tab()
