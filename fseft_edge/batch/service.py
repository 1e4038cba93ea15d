"""systemd units that run a batch every night."""

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
    """The units that were written."""

    service: Path
    timer: Path


def write_units(folder: Path, command: Sequence[str], *, at: str, limit_minutes: float) -> InstalledService:
    """Write a service and a timer that starts it every day.

    Args:
        folder: where systemd looks: ``~/.config/systemd/user`` for an account's own, ``/etc/systemd/system`` for the
            machine's.
        command: the program, by its absolute path, and its arguments.
        at: time of day, HH:MM.
        limit_minutes: how long the cases in hand get to finish when the service is stopped.

    Raises:
        UsageError: an argument holds a line break, which a unit file cannot.
        OutOfSpaceError: the folder cannot be written to.
    """
    service, timer = folder / f"{NAME}.service", folder / f"{NAME}.timer"
    # SIGTERM to the coordinator alone finishes the cases in hand; what is left at the end is killed, which costs them.
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
    """Return the folders among the arguments, which may be mounts that have to be there first."""
    return [word for word in command[1:] if Path(word).is_absolute()]


def _quoted(word: str) -> str:
    """Return an argument as systemd reads it back (systemd.service(5), "Command lines")."""
    if "\n" in word:
        raise UsageError("A line break cannot stand in a unit file.", remedy="Choose plainer names for folders.")
    plain = word.replace("%", "%%").replace("$", "$$")
    if shlex.quote(word) == word:
        return plain
    escaped = plain.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _write(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
