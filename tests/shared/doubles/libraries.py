"""Libraries that are not what they should be, put where they are imported from."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest


def fake_library(monkeypatch: pytest.MonkeyPatch, folder: Path, name: str, source: str) -> None:
    """Let a module be what ``source`` makes of it, whatever is installed."""
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(source)
    if name not in sys.modules:  # so that the fake one goes with the test
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for module in [module for module in sys.modules if module == name or module.startswith(f"{name}.")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.syspath_prepend(folder)
