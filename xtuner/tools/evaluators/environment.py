"""The virtual environment of the evaluators. It is separate, since their requirements conflict with ours.

A virtual environment cannot be renamed (its scripts contain its path), so it is created in place, with a marker file
that says "incomplete" until the installation has finished. A manually created one has no marker file; only the versions
in it are checked.
"""

import contextlib
import fcntl
import hashlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xtuner.core.errors import BusyError, CheckpointError, ConfigError
from xtuner.core.files import read_json, user_cache_dir, write_json
from xtuner.core.log import logger
from xtuner.tools.evaluators.process import ToolError, environ, last_line, run, tail

HERE = Path(__file__).resolve().parent
REQUIREMENTS = HERE / "evaluation.txt"
TURBOMIND = HERE / "turbomind.txt"
MARK = "xtuner-environment.json"
NEWEST_PYTHON = (3, 12)  # the newest for which all packages have wheels
PROBE_SECONDS = 300  # importing torch from a cold network disk takes minutes
_PROBE = """
import importlib.metadata, json, sys
found = {}
for name in sys.argv[2:]:
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        found[name] = None
if sys.argv[1] == "gpus":
    import torch
    found["gpus"] = torch.cuda.device_count()
print(json.dumps(found))
"""


def default_folder() -> Path:
    return user_cache_dir() / "evaluation"


def pinned(package: str) -> str:
    """The version of a package in the requirements."""
    found = re.search(rf"^{package}==(\S+)", REQUIREMENTS.read_text() + TURBOMIND.read_text(), re.MULTILINE)
    assert found, package
    return found[1]


class Environment:
    """Args: folder: of the virtual environment; command: our command that installs it, for messages."""

    def __init__(self, folder: Path, command: str) -> None:
        self.folder = folder.expanduser().absolute()
        self.python = self.folder / "bin" / "python"
        self._mark = self.folder / MARK
        self._command = f"{command} --install" + ("" if self.folder == default_folder() else f" --env {folder}")

    def to_install(self, turbomind: bool = False) -> str:
        """The command that installs everything; a manually created environment is left to its owner."""
        if not self._mark.is_file() and self.python.is_file():
            files = [REQUIREMENTS, *([TURBOMIND] if turbomind else [])]
            return shlex.join([str(self.python), "-m", "pip", "install", *(w for f in files for w in ("-r", str(f)))])
        return self._command + (" --backend turbomind" if turbomind else "")

    def need(self, package: str) -> None:
        """Raises: ConfigError unless the environment is complete and has `package` in the tested version."""
        wanted = pinned(package)
        where, do = str(self.folder), f"run `{self.to_install()}` (some minutes, 2.3 GB; more with CUDA)"
        if not self.python.is_file():
            raise ConfigError(f"{package} is not installed: there is no such environment", where=where, do=do)
        if self._found_mark().get("whole") is False:
            raise ConfigError("the environment is incomplete: its installation did not finish", where=where, do=do)
        found = self.probe(package)[package]
        if found is None:
            raise ConfigError(f"{package} is not in the environment", where=where, do=do)
        if found != wanted:
            why = f"xtuner was tested with {wanted}"
            raise ConfigError(f"{package} is {found} there, not {wanted}", where=where, why=why, do=do)

    def probe(self, *packages: str, gpus: bool = False) -> dict[str, Any]:
        """Versions of packages, None for absent ones; "gpus": how many its torch sees.

        Raises: ConfigError if its Python does not run.
        """
        words = [str(self.python), "-I", "-c", _PROBE, "gpus" if gpus else "-", *packages]
        try:
            done = subprocess.run(words, capture_output=True, text=True, timeout=PROBE_SECONDS, env=environ())
            said = done.stderr.strip().splitlines()
        except (OSError, subprocess.SubprocessError) as e:
            done, said = None, [str(e)]
        if done is None or done.returncode:
            raise ConfigError(
                "the environment's Python does not run",
                where=str(self.python),
                why=said[-1] if said else "",
                do=f"run `{self.to_install()}`",
            )
        found = json.loads(done.stdout.splitlines()[-1])
        assert isinstance(found, dict)
        return found

    def site_packages(self) -> Path:
        return next(iter(sorted(self.folder.glob("lib/python3*/site-packages"))), self.folder)

    def install(self, turbomind: bool = False) -> None:
        """Create or complete the environment. Raises: ConfigError, BusyError, CheckpointError, ToolError."""
        found = self._found_mark()
        files = [REQUIREMENTS, *([TURBOMIND] if turbomind or found.get("turbomind") else [])]
        digest = hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()
        whole = bool(found.get("whole")) and self._runs()
        if whole and found.get("requirements") == digest:
            logger.info(f"{self.folder} is complete already")
            return
        self._check_place(bool(found))
        facts = {"turbomind": len(files) > 1, "requirements": digest}
        with exclusive(self.folder.parent / f".{self.folder.name}.lock", "another process installs there"):
            self._make(files, facts, fresh=not whole)

    def _runs(self) -> bool:
        try:
            self.probe()
        except ConfigError:  # the Python that created it is gone
            return False
        return True

    def _check_place(self, ours: bool) -> None:
        if sys.version_info[:2] > NEWEST_PYTHON:
            version = ".".join(map(str, NEWEST_PYTHON))
            by_hand = f"python{version} -m venv DIR; DIR/bin/pip install -r {REQUIREMENTS}; then give --env DIR"
            raise ConfigError(f"the evaluators need Python {version} or older", where=sys.executable, do=by_hand)
        if shlex.quote(str(self.folder)) != str(self.folder):
            raise ConfigError(
                "the path contains a special character of the shell",
                where=f"--env {self.folder}",
                why="OpenCompass starts its tasks through a shell without quoting",
                do="give another path",
            )
        if not ours and self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise ConfigError(
                "there is something else already", where=f"--env {self.folder}", do="give another path, or remove it"
            )

    def _make(self, files: list[Path], facts: dict[str, Any], fresh: bool) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self._mark, {"whole": False})
        log = self.folder / "install.log"
        if fresh:
            for inside in self.folder.iterdir():
                if inside != self._mark:
                    shutil.rmtree(inside) if inside.is_dir() and not inside.is_symlink() else inside.unlink()
            logger.info(f"creating {self.folder}")
            self._step([sys.executable, "-m", "venv", str(self.folder)], log)
        logger.info(f"installing {', '.join(f.name for f in files)}: some minutes; the log is {log}")
        pip = [str(self.python), "-m", "pip", "install", "--no-input", "--progress-bar", "off"]
        self._step([*pip, *(word for f in files for word in ("-r", str(f)))], log)
        write_json(self._mark, {"whole": True, **facts})
        logger.info(f"{self.folder} is complete")

    def _step(self, words: list[str], log: Path) -> None:
        def news() -> str | None:
            lines = [line for line in tail(log).splitlines() if line.startswith(("Collecting", "Installing"))]
            return lines[-1].partition(" (")[0][:100] if lines else None

        if run(words, log, news, self.folder, environ(PIP_DISABLE_PIP_VERSION_CHECK="1")):
            errors = [line for line in tail(log).splitlines() if line.startswith("ERROR")]
            why = errors[0] if errors else last_line(log)
            do = "see the log; pip follows PIP_INDEX_URL, PIP_FIND_LINKS and so on"
            raise ToolError(f"`{shlex.join(words[1:4])} …` failed", where=str(log), why=why, do=do)

    def _found_mark(self) -> dict[str, Any]:
        if not self._mark.is_file():
            return {}
        try:
            found = read_json(self._mark)
        except CheckpointError:
            return {"whole": False}
        return found if isinstance(found, dict) else {"whole": False}


@contextlib.contextmanager
def exclusive(path: Path, busy: str) -> Iterator[None]:
    """A lock between processes of one machine. It ends with the process.

    Raises: BusyError; CheckpointError if the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        f = open(path, "a")  # noqa: SIM115  # closed below, at the end of the context
    except OSError as e:
        raise CheckpointError(f"nothing can be written there: {e.strerror}", where=str(path.parent)) from None
    with f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BusyError(busy, where=str(path), do="wait for it, or give another folder") from None
        except OSError:
            logger.warning(f"{path.parent} is on a file system without locks: a second process will not be detected")
        yield
