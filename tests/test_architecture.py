"""What holds for the code as a whole, read from its source."""

from __future__ import annotations

import ast
import io
import re
import tokenize
import tomllib
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import fseft_edge
from fseft_edge.runtime import errors

ROOT = Path(__file__).parents[1]
PACKAGE = ("runtime", "export", "fseft_edge")
EVERYTHING = (*PACKAGE, "tests", "benchmarks")


def files(*folders: str) -> list[Path]:
    found = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    assert found
    return found


def named(paths: list[Path]) -> dict[str, Path]:
    return {str(path.relative_to(ROOT)): path for path in paths}


def imports(path: Path) -> Iterator[str]:
    """Yield every ``package.module`` or ``package.module.name`` that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relative to itself"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and node.args:
            target = node.args[0]
            if isinstance(target, ast.Constant) and isinstance(target.value, str):
                yield target.value


MODULES = {
    ".".join(
        [package, *(part for part in path.relative_to(ROOT / top).with_suffix("").parts if part != "__init__")]
    ): path
    for top, package in (
        ("runtime", "fseft_edge.runtime"),
        ("export", "fseft_edge.export"),
        ("fseft_edge", "fseft_edge"),
    )
    for path in files(top)
}


def imports_within_the_package() -> Iterator[tuple[str, str]]:
    """Yield pairs of modules of which the first imports the second; the faces of packages are no rooms."""
    for name, path in MODULES.items():
        if name == "fseft_edge":
            continue
        for target in imports(path):
            module = target
            while module and module not in MODULES:
                module = module.rpartition(".")[0]
            if module and module != "fseft_edge" and not within(name, module):
                yield name, module


def room(module: str) -> str:
    parts = module.split(".")[1:]
    return "/".join(parts[:2]) if parts[0] == "runtime" and len(parts) > 1 else parts[0]


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


ROOMS = (
    "_version",
    "runtime/errors",
    "runtime/system",
    "runtime/scans",
    "runtime/encoder",
    "export",
    "phantom",
    "adapters",
    "masks",
    "evaluation",
    "report",
    "dicom_output",
    "outbox",
    "adaptation",
    "segmentation",
    "machine",
    "batch",
    "review",
    "pretraining",
    "finetuning",
    "demonstration",
    "cli",
)
"""From the ground up: a room imports only from rooms that stand before it. Most are folders in ``fseft_edge/``."""


def test_every_room_imports_only_from_rooms_below_it() -> None:
    wrong = [
        f"{name} imports {module}"
        for name, module in imports_within_the_package()
        if ROOMS.index(room(module)) > ROOMS.index(room(name))
    ]
    assert not wrong


def test_no_file_and_no_folder_stands_in_a_circle_of_imports() -> None:
    """At every level of folders, the parts of a folder import one another in one direction."""
    below: dict[tuple[str, str], set[str]] = {}
    for name, module in imports_within_the_package():
        first, second = name.split("."), module.split(".")
        shared = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), None)
        if shared is not None:
            folder = ".".join(first[:shared])
            below.setdefault((folder, first[shared]), set()).add(second[shared])
    for folder in {folder for folder, _ in below}:
        order = TopologicalSorter({part: parts for (where, part), parts in below.items() if where == folder})
        order.prepare()  # raises CycleError, which names the circle


def test_every_folder_of_the_package_is_installed() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        installed = set(tomllib.load(file)["tool"]["setuptools"]["packages"])
    assert {name for name, path in MODULES.items() if path.name == "__init__.py"} == installed
    assert {str(path.parent) for path in MODULES.values()} == {
        str(path.parent) for path in MODULES.values() if path.name == "__init__.py"
    }


def test_only_cli_code_reads_command_lines_and_nothing_below_it_prints() -> None:
    wrong = [
        f"{name} imports {module}"
        for name, path in named(files(*PACKAGE)).items()
        if "cli" not in path.parts
        for module in imports(path)
        if within(module, "click") or within(module, "fseft_edge.cli")
    ]
    assert not wrong


def test_nothing_is_ever_unpickled() -> None:
    """Nothing that could execute what a file holds: no pickle, and torch.load with ``weights_only=True`` alone."""
    wrong = []
    for name, path in named(files(*PACKAGE, "benchmarks")).items():
        wrong += [
            f"{name} imports {module}"
            for module in imports(path)
            if module.split(".")[0] in {"dill", "cloudpickle", "joblib", "shelve", "marshal"}
            or within(module, "pickle.load")
            or within(module, "pickle.loads")
        ]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            unsafe = (
                called in {"eval", "exec", "pickle.load", "pickle.loads", "pickle.Unpickler", "torch.jit.load"}
                or (called == "torch.load" and keywords.get("weights_only") != "True")
                or (called in {"np.load", "numpy.load"} and keywords.get("allow_pickle", "False") != "False")
            )
            if unsafe:
                wrong.append(f"{name}:{node.lineno} calls {ast.unparse(node)}")
    assert not wrong


def test_the_check_for_unpickling_sees_what_it_should(tmp_path: Path) -> None:
    """The other tests here read source; this one makes sure that they would find something."""
    path = tmp_path / "bad.py"
    path.write_text("def f():\n    from fseft_edge.adapters.network import Adapter\n    import click\n")
    assert list(imports(path)) == ["fseft_edge.adapters.network.Adapter", "click"]


SUPPRESSION = re.compile(
    r"#\s*(?P<rule>noqa: [A-Z]+[0-9]+(?:, ?[A-Z]+[0-9]+)*|type: ignore\[[a-z-]+(?:, ?[a-z-]+)*\])(?P<reason>.*)"
)


@pytest.mark.parametrize("folder", EVERYTHING)
def test_every_suppression_names_its_rule_and_its_reason(folder: str) -> None:
    """A reason holds for the lines directly below too, as long as they suppress the same rule."""
    wrong = []
    for name, path in named(files(folder)).items():
        explained: tuple[int, str] | None = None
        for token in tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline):
            if token.type != tokenize.COMMENT or not re.search(r"#\s*(noqa|type:\s*ignore|pragma)", token.string):
                continue
            line, matched = token.start[0], SUPPRESSION.match(token.string)
            if matched and (
                re.search(r"[a-zA-Z]{2,}.*[a-zA-Z]{2,}", matched["reason"]) or explained == (line - 1, matched["rule"])
            ):
                explained = (line, matched["rule"])
            else:
                wrong.append(f"{name}:{line} {token.string}")
    assert not wrong


def test_the_package_that_tests_import_is_the_projects_own() -> None:
    assert fseft_edge.__file__ is not None  # a folder without __init__.py has none


def test_every_error_class_has_an_exit_code_that_is_documented() -> None:
    documented = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    classes = [kind for kind in vars(errors).values() if isinstance(kind, type) and kind is not errors.FseftEdgeError]
    codes = {kind.__name__: kind.exit_code for kind in classes if issubclass(kind, errors.FseftEdgeError)}
    assert set(codes.values()) == {2, 3, 4, 5}
    assert [name for name in codes if name not in documented] == []


def test_every_public_name_is_listed_and_can_be_imported_and_others_are_refused() -> None:
    assert {"adapt", "segment", "evaluate", "export_encoder", "pretrain", "run_demo"} <= set(dir(fseft_edge))
    for name in fseft_edge.__all__:
        assert getattr(fseft_edge, name) is not None
    with pytest.raises(AttributeError, match="unheard_of"):
        _ = fseft_edge.unheard_of  # type: ignore[attr-defined]  # it does not exist
