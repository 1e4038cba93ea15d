"""Processor seconds that commands take before and beside their work: `make benchmark BENCHMARK=start`.

Every command runs in a process of its own on one core. Rounds alternate between the commands, and the table shows the
fastest and the middle round. The commands are: start of Python, `import fseft_edge`, `import torch`, `--help`,
`segment` of a scan whose features are in the cache (small, so that almost everything is start), and `export`.
`--other PYTHON` measures another installation in the same rounds, for a comparison with an earlier version.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_EXPORTS = 2
"""Rounds that measure an export, after the first round."""

RUN = "from fseft_edge.cli.main import main; main()"


def processor_seconds(command: list[str], environment: dict[str, str], folder: Path) -> float:
    """Return the processor time of a command and of its child processes, which run in a folder without modules.

    Raises:
        SystemExit: the command failed; its messages are printed.
    """
    before = os.times()
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)  # noqa: S603 - fixed commands
    after = os.times()
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
    return after.children_user + after.children_system - before.children_user - before.children_system


def commands(python: str, scans: list[Path], encoder: str, folder: Path) -> dict[str, list[str]]:
    """Return the commands of an installation by name; their results go into new folders below ``folder``."""
    output, cache = folder / f"out_{time.monotonic_ns()}", folder / "cache"
    found = {
        "python": [python, "-c", "pass"],
        "import fseft_edge": [python, "-c", "import fseft_edge"],
        "import torch": [python, "-c", "import torch"],
        "--help": [python, "-c", RUN, "--help"],
    }
    for scan in scans:
        where = ["--encoder", encoder, "-o", str(output), "--cache", str(cache), "--device", "cpu"]
        found[f"segment {scan.name.partition('.')[0]}"] = [python, "-c", RUN, "segment", str(scan), *where]
    found["export"] = [python, "-c", RUN, "export", "-o", str(folder / f"{output.name}.encoder")]
    return found


def main() -> None:
    """Measure all commands, and print the table and JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    small = Path(os.environ.get("FSEFT_EDGE_DATA", "."), "abdomen", "ct_sm.nii.gz")
    parser.add_argument("scans", type=Path, nargs="*", default=[small], help="CTs to segment from the cache")
    parser.add_argument("--encoder", default="edge_base", help="encoder bundle, or edge_base (built in)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--without-export", action="store_true", help="do not measure the export, which takes longest")
    parser.add_argument("--other", help="Python of another installation to measure in the same rounds")
    options = parser.parse_args()
    scans = [scan.resolve() for scan in options.scans]
    encoder = str(Path(options.encoder).resolve()) if Path(options.encoder).exists() else options.encoder
    # Modules are compiled once, as after an installation, and one thread computes.
    with tempfile.TemporaryDirectory() as scratch:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPYCACHEPREFIX": f"{scratch}/compiled"}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        pythons = {"this": sys.executable} | ({"other": options.other} if options.other else {})
        seconds: dict[tuple[str, str], list[float]] = {}
        for turn in range(options.rounds + 1):
            for version, python in pythons.items():
                folder = Path(scratch, version)
                folder.mkdir(exist_ok=True)
                for name, command in commands(python, scans, encoder, folder).items():
                    if name == "export" and (options.without_export or turn > _EXPORTS):
                        continue
                    measured = processor_seconds(command, environment, folder)
                    if turn:  # the first round compiles modules and fills the cache
                        seconds.setdefault((version, name), []).append(measured)
    print("| installation | command | fastest, s | middle, s |\n|---|---|---|---|")
    for (version, name), rounds in seconds.items():
        print(f"| {version} | {name} | {min(rounds):.2f} | {statistics.median(rounds):.2f} |")
    for (version, name), rounds in seconds.items():
        print(json.dumps({"installation": version, "command": name, "processor_s": [round(s, 3) for s in rounds]}))


if __name__ == "__main__":
    main()
