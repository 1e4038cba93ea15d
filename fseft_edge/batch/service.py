"""systemd unit files that run a batch every night."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fseft_edge.runtime.errors import UsageError
from fseft_edge.runtime.system.atomic import atomic_path

NAME: Final = "fseft-edge-batch"


@dataclass(frozen=True)
class InstalledService:
    """Paths of the unit files that were written."""

    service: Path
    timer: Path


def write_units(folder: Path, command: Sequence[str], *, at: str, limit_minutes: float) -> InstalledService:
    """Write a systemd service and a timer that starts it every day.

    Args:
        folder: folder of the unit files: ``~/.config/systemd/user`` for one account, ``/etc/systemd/system`` for the
            whole machine.
        command: absolute path of the program, and its arguments.
        at: time of day at which the batch starts, HH:MM.
        limit_minutes: time in which the cases in progress can finish after the service was told to stop.

    Raises:
        UsageError: an argument contains a line break, which is not possible in a unit file.
        OutOfSpaceError: the folder is not writable.
    """
    service, timer = folder / f"{NAME}.service", folder / f"{NAME}.timer"
    # KillMode=mixed sends SIGTERM only to the coordinator, which then finishes the cases in progress. Processes that
    # still run after TimeoutStopSec are killed; their cases wait for the next run.
    _write(
        service,
        f"""\
[Unit]
Description=fseft-edge: segment the scans of the day
RequiresMountsFor={" ".join(_quoted(word) for word in _folders(command))}

[Service]
Type=exec
ExecStart={" ".join(_quoted(word) for word in command)}
KillMode=mixed
OOMPolicy=continue
TimeoutStopSec={round(limit_minutes * 60)}
SuccessExitStatus=5
Nice=10
UMask=0077
NoNewPrivileges=yes
""",
    )
    _write(
        timer,
        f"""\
[Unit]
Description=fseft-edge: every night

[Timer]
OnCalendar=*-*-* {at}:00
Persistent=true

[Install]
WantedBy=timers.target
""",
    )
    return InstalledService(service, timer)


def _folders(command: Sequence[str]) -> list[str]:
    """Return the absolute paths among the arguments: they may be on drives that have to be mounted first."""
    return [word for word in command[1:] if Path(word).is_absolute()]


def _quoted(word: str) -> str:
    """Return an argument with the quoting of unit files (systemd.service(5), section "Command lines")."""
    if "\n" in word:
        raise UsageError(
            f"The argument {word!r} contains a line break, which is not possible in a systemd unit file.",
            remedy="Use file and folder names without line breaks.",
        )
    plain = word.replace("%", "%%").replace("$", "$$")
    if shlex.quote(word) == word:
        return plain
    escaped = plain.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _write(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
