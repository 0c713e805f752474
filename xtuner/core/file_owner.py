"""Which process created a lock or a temporary file, and whether that process still runs.

Process ids are reused, and each container has its own. An owner is therefore identified by the boot of its machine, the
process namespace, the process id, and the start time of the process.
"""

import hashlib
import os
import re
import secrets
from pathlib import Path

_UNKNOWN = "0" * 12  # in place of the namespace where there is no /proc


def namespace() -> str:
    """Identifies this boot of this machine and this process namespace; empty where there is no /proc."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def start_time(pid: int) -> str | None:
    """Start time of a process in clock ticks since boot; None if there is no such process."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as f:
            fields = f.read().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]


def owner_tag() -> str:
    """A suffix that makes a file name unique and identifies this process: `NAMESPACE-PID-START_TIME-RANDOM`."""
    pid = os.getpid()
    return f"{_short(namespace())}-{pid}-{start_time(pid) or 0}-{secrets.token_hex(4)}"


def is_owner_alive(name: str) -> bool | None:
    """Whether the process whose `owner_tag` ends `name` still runs; None if that is unknown.

    It is unknown for a process of another machine, boot or container, and for names without a tag.
    """
    found = re.search(r"-([0-9a-f]{12})-(\d{1,10})-(\d{1,20})-[0-9a-f]{8}$", f"-{name}")
    if not found or found[1] == _UNKNOWN or found[1] != _short(namespace()):
        return None
    return start_time(int(found[2])) == found[3]


def _short(namespace: str) -> str:
    return hashlib.sha256(namespace.encode()).hexdigest()[:12] if namespace else _UNKNOWN
