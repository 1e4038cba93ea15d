"""Structure of the code: its rooms, the imports between rooms, and the rooms that are used to segment a scan.

A room is a module or a folder directly in ``runtime/`` or ``fseft_edge/``. A top folder without subfolders
(``export/``) is one room. ``python benchmarks/rooms.py`` counts the rooms of this checkout, ``--root`` those of another
checkout. ``--walk`` trains an adapter on two phantoms, segments one phantom, and lists the rooms of all functions that
were called.
"""

from __future__ import annotations

import argparse
import ast
import sys
import tempfile
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType

_TOPS = {"runtime": "fseft_edge.runtime", "export": "fseft_edge.export", "fseft_edge": "fseft_edge"}


def modules(root: Path) -> dict[str, Path]:
    """Return the path below ``root`` of every module of the package, by the dotted name of the module."""
    found = {}
    for top, package in _TOPS.items():
        for path in sorted((root / top).rglob("*.py")):
            parts = path.relative_to(root / top).with_suffix("").parts
            found[".".join([package, *(part for part in parts if part != "__init__")])] = path.relative_to(root)
    return found


def room_of(path: Path, root: Path) -> str:
    """Return the room of a module: ``folder/part``, or ``folder`` if the folder has no subfolders."""
    top = path.parts[0]
    has_folders = any(part.is_dir() and any(part.glob("*.py")) for part in (root / top).iterdir())
    return str(Path(*path.parts[:2])) if has_folders else top


def imports(root: Path) -> Iterator[tuple[str, str]]:
    """Yield each pair of modules of which the first imports the second, without the imports of ``__init__`` modules."""
    known = modules(root)
    for name, path in known.items():
        if path.name == "__init__.py":
            continue
        for node in ast.walk(ast.parse((root / path).read_text(encoding="utf-8"))):
            targets = []
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                targets = [f"{node.module}.{alias.name}" for alias in node.names]
            for target in targets:
                module = target
                while module and module not in known:
                    module = module.rpartition(".")[0]
                if module and module not in {name, "fseft_edge"}:
                    yield name, module


def circles(graph: Mapping[str, set[str]]) -> list[set[str]]:
    """Return the sets of nodes that import each other in a cycle (strongly connected components)."""
    reached: dict[str, set[str]] = {node: set() for node in graph}
    for node, seen in reached.items():
        waiting = list(graph[node])
        while waiting:
            other = waiting.pop()
            if other not in seen:
                seen.add(other)
                waiting += graph.get(other, set())
    found: list[set[str]] = []
    for node, seen in reached.items():
        if node in seen and not any(node in circle for circle in found):
            found.append({node, *(other for other in seen if node in reached.get(other, set()))})
    return found


def floors(graph: Mapping[str, set[str]]) -> int:
    """Return the length of the longest chain of imports between rooms; a cycle of rooms counts as one room."""
    groups = {node: frozenset(circle) for circle in circles(graph) for node in circle}
    heights: dict[frozenset[str], int] = {}

    def height(node: str) -> int:
        group = groups.get(node, frozenset({node}))
        if group not in heights:
            below = {other for member in group for other in graph.get(member, set())} - group
            heights[group] = 1 + max((height(other) for other in below), default=0)
        return heights[group]

    return max(height(node) for node in graph)


def count(root: Path) -> None:
    """Print the counts of a checkout."""
    known = modules(root)
    by_file: dict[str, set[str]] = {name: set() for name in known}
    by_room: dict[str, set[str]] = defaultdict(set)
    for path in known.values():
        if path.name not in {"__init__.py", "_version.py"}:
            by_room[room_of(path, root)] |= set()
    for name, module in imports(root):
        by_file[name].add(module)
        first, second = room_of(known[name], root), room_of(known[module], root)
        if first != second and second in by_room:
            by_room[first].add(second)
    of_rooms = circles(by_room)
    print(f"rooms                      {len(by_room)}")
    print(f"imports between rooms      {sum(map(len, by_room.values()))}")
    print(f"floors                     {floors(by_room)}")
    print(f"circles of files           {len(circles(by_file))}")
    print(f"circles of rooms           {len(of_rooms)}: {[sorted(circle) for circle in of_rooms]}")


def walk(root: Path) -> None:
    """Print the rooms of all functions that are called while an adapter is trained and while a scan is segmented."""
    from fseft_edge import OrganLabel, TrainingSettings, adapt, export_encoder, segment  # noqa: PLC0415 - slow to import
    from fseft_edge.phantom import SITES, phantom  # noqa: PLC0415 - slow to import

    writer = next(
        name for name in ("fseft_edge.runtime.scans.nifti", "fseft_edge.runtime.nifti") if name in modules(root)
    )
    nifti = __import__(writer, fromlist=["write_ct"])
    files = {root / path for path in modules(root).values()}
    entered: set[Path] = set()

    def note(frame: FrameType, event: str, _: object) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and frame.f_code.co_name != "<module>" and path in files:
            entered.add(path)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for seed in (1, 2):
            scan = phantom(seed, shape=(96, 72, 64), site=SITES["shifted"])
            for part in ("images", "labels"):
                (folder / part).mkdir(exist_ok=True)
            nifti.write_ct(folder / "images" / f"{seed}.nii.gz", scan.volume)
            nifti.write_label_map(folder / "labels" / f"{seed}.nii.gz", scan.labels)
        encoder = folder / "edge_base.encoder"
        export_encoder(None, model="edge_base", output=encoder)
        adapter = folder / "liver.adapter"

        def train() -> None:
            organs, training = [OrganLabel("liver", 1)], TrainingSettings(blocks=8)
            adapt(encoder, folder / "images", folder / "labels", organs, adapter, training=training)

        def mask() -> None:
            segment([folder / "images" / "1.nii.gz"], [adapter], folder / "masks")

        for what, work in (("adapt", train), ("segment", mask)):
            entered.clear()
            threading.setprofile(note)
            sys.setprofile(note)
            work()
            sys.setprofile(None)
            threading.setprofile(None)
            rooms = sorted({room_of(path.relative_to(root), root) for path in entered})
            print(f"rooms entered by {what:8}  {len(rooms)}: {', '.join(rooms)}")


def main() -> None:
    """Count a checkout."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[1], help="checkout of the project")
    parser.add_argument("--walk", action="store_true", help="also list the rooms that `adapt` and `segment` use")
    arguments = parser.parse_args()
    root = arguments.root.resolve()
    count(root)
    if arguments.walk:
        walk(root)


if __name__ == "__main__":
    main()
