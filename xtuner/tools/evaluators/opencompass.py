"""OpenCompass 0.5.4: its command line, its datasets by name, and its results as a table.

Files in the work dir:

    opencompass.log           output of the last run
    opencompass/TIMESTAMP/    configs, predictions, results, logs and summary, written by OpenCompass

OpenCompass exits with 0 even if a task has failed; here a dataset without a score is an error.
"""

import contextlib
import csv
import difflib
import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from xtuner.core.errors import ConfigError
from xtuner.core.log import logger
from xtuner.tools.evaluators import custom
from xtuner.tools.evaluators.environment import Environment
from xtuner.tools.evaluators.process import ToolError, bar, environ, last_line, run

PACKAGE = "opencompass"
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
_BY_LIKELIHOOD = re.compile(r"_(ppl|ll|clp|mixed)(_|$)", re.IGNORECASE)  # in names of datasets
_MODEL = "xtuner_model"


@dataclass(frozen=True)
class Questions:
    """The questions: OpenCompass's datasets by name, or a user's own file."""

    datasets: Sequence[str] = ()
    file: Path | None = None
    kind: str = ""  # of the file: the result of `custom.check`
    infer: str = ""  # of the file: "ppl" (choose the option with the lowest perplexity) or "gen" (generate an answer)

    @property
    def by_likelihood(self) -> bool:
        """Whether the model must return likelihoods of texts, which OpenCompass's chat models cannot."""
        return self.infer == "ppl" or any(_BY_LIKELIHOOD.search(name.split("/")[0]) for name in self.datasets)

    @property
    def words(self) -> list[str]:
        if self.file is None:
            return ["--datasets", *self.datasets]
        words = ["--custom-dataset-path", str(self.file.absolute())]
        return [*words, "--custom-dataset-data-type", self.kind, "--custom-dataset-infer-method", self.infer]


def read_file(path: Path, infer: str | None) -> Questions:
    """Questions of a user's own file. Raises: DataError, ConfigError."""
    kind = custom.check(path)
    if kind == custom.QUESTIONS and infer == "ppl":
        why = f"the rows of {path} have no options A, B, … whose likelihood could be compared"
        raise ConfigError("these questions need a generated answer", where="--infer ppl", why=why, do="omit it")
    return Questions(file=path, kind=kind, infer=infer or ("ppl" if kind == custom.CHOICES else "gen"))


def read_names(names: Sequence[str], environment: Environment) -> Questions:
    """Datasets of OpenCompass by name. Raises: ConfigError for unknown names, with similar ones."""
    configs = environment.site_packages() / PACKAGE / "configs"
    files = [f for part in ("datasets", "dataset_collections") for f in (configs / part).rglob("*.py")]
    known = sorted({f.stem for f in files if not f.stem.startswith("_")})
    for name in names:
        dataset = name.split("/")[0].removesuffix(".py")  # the part after a / names one of its lists
        if dataset not in known:
            raise ConfigError(
                f"OpenCompass has no dataset {dataset!r}",
                where="--datasets",
                do=f"one of its {len(known)} names; close are: {', '.join(_close(dataset, known)) or 'none'}",
            )
    return Questions(datasets=names)


def _close(name: str, known: list[str]) -> list[str]:
    plain = [k for k in known if re.fullmatch(rf"{re.escape(name)}_(gen|ppl)", k)]
    near = difflib.get_close_matches(name, known, n=6, cutoff=0.5)
    return list(dict.fromkeys([*plain, *near]))[:6]


def evaluate(
    environment: Environment,
    questions: Questions,
    model: str,
    work_dir: Path,
    data: Path | None,
    further: Sequence[str],
    dry_run: bool = False,
) -> Path | None:
    """Run it; returns the folder of its results, or None after a dry run.

    Args:
        model: the config of a model, as text.
        work_dir: absolute.
        data: the folder whose `data/` holds OpenCompass's datasets; None for its own rule.
        further: words for OpenCompass's own command line.

    Raises: ToolError.
    """
    log, results = work_dir / "opencompass.log", work_dir / PACKAGE
    env = environ(**(OFFLINE if questions.file else {}), **_data(data))
    with _running_in(work_dir) as cwd:
        (cwd / "configs" / "models").mkdir(parents=True)
        (cwd / "configs" / "models" / f"{_MODEL}.py").write_text(model, encoding="utf-8")
        if "COMPASS_DATA_CACHE" in env:
            (cwd / "data").symlink_to(Path(env["COMPASS_DATA_CACHE"]) / "data")
        words = [str(environment.python), "-m", "opencompass.cli.main", "--models", _MODEL]
        words += ["--config-dir", str(cwd / "configs"), *questions.words, "-w", str(results), *further]
        words += ["--dry-run"] if dry_run else []
        logger.info(shlex.join(words))
        earlier = set(_task_logs(results))
        code = run(words, log, lambda: _news(results, earlier), cwd, env)
    if code:
        raise ToolError(f"OpenCompass ended with exit code {code}", where=str(log), why=last_line(log), do=_advice(log))
    if dry_run:
        return None
    found = re.findall(r"Current exp folder: (.+)", log.read_text(encoding="utf-8", errors="replace"))
    return Path(found[-1].strip()) if found else results


@contextlib.contextmanager
def _running_in(work_dir: Path) -> Iterator[Path]:
    """A temporary folder to run in: OpenCompass leaves files in the current folder.

    It passes the folder's path to a shell without quoting, so a work dir with a blank in its path cannot be used.
    """
    work_dir.mkdir(parents=True, exist_ok=True)
    inside = str(work_dir)
    cwd = Path(tempfile.mkdtemp(prefix=".opencompass-", dir=inside if shlex.quote(inside) == inside else None))
    try:
        yield cwd
    finally:
        shutil.rmtree(cwd, ignore_errors=True)


def _data(given: Path | None) -> dict[str, str]:
    folder = given or os.environ.get("COMPASS_DATA_CACHE") or ("." if Path("data").is_dir() else None)
    return {"COMPASS_DATA_CACHE": str(Path(folder).expanduser().absolute())} if folder else {}


def _task_logs(results: Path) -> list[Path]:
    """Oldest first."""
    logs = [(f.stat().st_mtime_ns, f) for f in results.glob("*/logs/*/*/*.out")]
    return [f for _, f in sorted(logs)]


def _news(results: Path, earlier: set[Path]) -> str:
    logs = [f for f in _task_logs(results) if f not in earlier]
    if not logs:
        return "OpenCompass is starting"
    what = {"infer": "asking", "eval": "scoring"}.get(logs[-1].parents[1].name, "working on")
    return f"{what} {logs[-1].stem}: {bar(logs[-1]) or 'starting'}"


def scores(folder: Path) -> list[list[str]]:
    """The table of the summary; the first row is the header. `-` means no score."""
    files = sorted(folder.glob("summary/*.csv"))
    if not files:
        raise ToolError("OpenCompass has written no summary", where=str(folder))
    with open(files[-1], encoding="utf-8", newline="") as f:
        return list(csv.reader(f))


def check_scores(rows: list[list[str]], log: Path) -> None:
    """Raises: ToolError if a dataset has no score, with the last line of its task's log."""
    if missing := [row[0] for row in rows[1:] if row[-1] == "-"]:
        failed = re.findall(r"task .+ fail, see\s+(\S.*)", log.read_text(encoding="utf-8", errors="replace"))
        where = Path(failed[0].strip()) if failed else log
        raise ToolError(
            f"OpenCompass has no score for {', '.join(missing)}",
            where=str(where),
            why=last_line(where),
            do=_advice(where),
        )


def _advice(log: Path) -> str:
    said = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    if "out of memory" in said:
        return "give a smaller --batch-size, or more --gpus"
    if "URLError" in said or "ConnectionError" in said or "No valid url" in said:
        return "give --data DIR, whose data/ holds OpenCompass's datasets, or run it where there is a network"
    return "see the log"
