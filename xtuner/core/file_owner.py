"""Which process made something that others find later, a lock or a temporary name, and whether that process still runs.

Process numbers are used again, start times are not; containers of one host have numbers of their own. So an owner is a
boot of a machine with a process namespace, a process number in it, and the start time of that process.
"""

import hashlib
import os
import re
import secrets
from pathlib import Path

_NOWHERE = "0" * 12  # where processes cannot be told apart


def namespace() -> str:
    """This boot of this machine and this process namespace; empty where there is no /proc."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def start_time(pid: int) -> str | None:
    """Start time of a process in clock ticks since boot; None if there is none."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as f:
            fields = f.read().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]


def owner_tag() -> str:
    """Names this process in the name of a file, and makes the name unique: `NAMESPACE-PID-BORN-RANDOM`."""
    pid = os.getpid()
    return f"{_short(namespace())}-{pid}-{start_time(pid) or 0}-{secrets.token_hex(4)}"


def is_owner_alive(name: str) -> bool | None:
    """Whether the process runs whose `mark` ends `name`; None if that cannot be seen from here.

    It cannot for a process of another machine, boot or container, and for names that carry no mark.
    """
    found = re.search(r"-([0-9a-f]{12})-(\d{1,10})-(\d{1,20})-[0-9a-f]{8}$", f"-{name}")
    if not found or found[1] == _NOWHERE or found[1] != _short(namespace()):
        return None
    return start_time(int(found[2])) == found[3]


def _short(namespace: str) -> str:
    return hashlib.sha256(namespace.encode()).hexdigest()[:12] if namespace else _NOWHERE
