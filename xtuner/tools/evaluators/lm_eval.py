"""lm-eval 0.4.13 (EleutherAI's harness): its command line, and its results as a table.

lm_eval.log               output of the last run
lm_eval/MODEL/*.json      its results, and with --log_samples its samples
"""

import difflib
import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from xtuner.core.errors import ConfigError
from xtuner.core.log import logger
from xtuner.tools.evaluators.environment import Environment
from xtuner.tools.evaluators.process import ToolError, bar, environ, last_line, run

PACKAGE = "lm_eval"
_NAME = re.compile(r"^(?:task|group|tag):\s*[\"']?([\w.-]+)[\"']?\s*$", re.MULTILINE)


def evaluate(
    environment: Environment,
    model: Sequence[str],
    tasks: Sequence[str],
    include: Path | None,
    work_dir: Path,
    further: Sequence[str],
) -> Path:
    """Run it; returns the file of its results. Raises: ConfigError for unknown tasks, ToolError.

    Args:
        model: KEY=VALUE of its model `hf`: pretrained, the folder in the llama layout; dtype; …
        include: a folder with the user's own tasks (YAML). Relative paths in them start at the current folder.
        further: more arguments for its command line.
    """
    if "," in model[0]:
        raise ConfigError("the model's path has a comma, where lm-eval would split it", where=model[0], do="rename it")
    log, results = work_dir / "lm_eval.log", work_dir / PACKAGE
    before = set(results.rglob("results_*.json"))
    command = [str(environment.python), "-m", "lm_eval", "run", "--model", "hf"]
    command += ["--model_args", ",".join(model), "--tasks", ",".join(tasks)]
    command += ["--include_path", str(include.absolute())] if include else []
    command += ["--output_path", str(results), *further]
    logger.info(shlex.join(command))
    code = run(command, log, lambda: bar(log) or "lm-eval is starting", Path.cwd(), environ())
    if code:
        _explain(log, environment, include)
        raise ToolError(f"lm-eval ended with exit code {code}", where=str(log), why=last_line(log), do="see the log")
    written = sorted(set(results.rglob("results_*.json")) - before)
    if not written:
        raise ToolError("lm-eval has written no results", where=str(log), why=last_line(log))
    return written[-1]


def _explain(log: Path, environment: Environment, include: Path | None) -> None:
    found = re.search(r"ValueError: Tasks not found: (.+)", log.read_text(encoding="utf-8", errors="replace"))
    if not found:
        return
    known = _task_names(environment.site_packages() / PACKAGE / "tasks")
    known |= _task_names(include) if include else set()
    unknown = [name.strip() for name in found[1].split(",")]
    close = [near for name in unknown for near in difflib.get_close_matches(name, sorted(known), n=4)]
    raise ConfigError(
        f"lm-eval has no task {', '.join(map(repr, unknown))}",
        where="--tasks",
        do=f"close are: {', '.join(close) or 'none'}; `{environment.python} -m lm_eval ls tasks` lists all",
    )


def _task_names(folder: Path) -> set[str]:
    return {name for f in folder.rglob("*.yaml") for name in _NAME.findall(f.read_text(errors="replace"))}


def scores(file: Path) -> list[list[str]]:
    """The table of the results; the first row is the header."""
    found = json.loads(file.read_text(encoding="utf-8"))
    rows = [["task", "metric", "filter", "n-shot", "value", "stderr"]]
    for task, values in found["results"].items():
        shots = str(found.get("n-shot", {}).get(task, ""))
        for key, value in values.items():
            metric, _, name = key.partition(",")
            if name and not metric.endswith("_stderr"):
                error = values.get(f"{metric}_stderr,{name}", "")
                rows.append([task, metric, name, shots, _number(value), _number(error)])
    return rows


def _number(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) and abs(value) < 1e6 else str(value)
