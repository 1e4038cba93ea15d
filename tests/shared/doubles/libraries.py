"""Simulated libraries that replace installed ones."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest


def fake_library(monkeypatch: pytest.MonkeyPatch, folder: Path, name: str, source: str) -> None:
    """Replace a library by a module with this source code, whether or not the library is installed."""
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(source)
    if name not in sys.modules:  # so that the simulated module is removed after the test
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for module in [module for module in sys.modules if module == name or module.startswith(f"{name}.")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.syspath_prepend(folder)
