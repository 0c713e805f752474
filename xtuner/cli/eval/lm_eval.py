"""xtuner eval lm-eval MODEL --tasks NAME …: evaluate with EleutherAI's lm-eval."""

import argparse
from pathlib import Path

from xtuner.cli.eval.common import add_shared, environment
from xtuner.core.errors import ConfigError
from xtuner.tools.evaluators.environment import exclusive

COMMAND = "xtuner eval lm-eval"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="*", metavar="MODEL", help="Hugging Face folder; or CONFIG.py CHECKPOINT")
    parser.add_argument("--tasks", nargs="+", default=[], metavar="NAME", help="tasks of lm-eval, or of --include-path")
    parser.add_argument("--include-path", type=Path, metavar="DIR", help="folder with your own tasks (YAML)")
    parser.add_argument(
        "--num-fewshot", type=int, metavar="N", help="solved examples before each question (default: the task's)"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="number of samples per task, for a trial (default: all)")
    parser.add_argument("--batch-size", default="8", metavar="N", help="texts per batch, or auto (default: 8)")
    parser.add_argument(
        "--model-args", nargs="+", default=[], metavar="KEY=VALUE", help="additional arguments of lm-eval's model"
    )
    add_shared(parser, "lm-eval")


def run(args: argparse.Namespace) -> int:
    from xtuner.tools.evaluators import lm_eval
    from xtuner.tools.evaluators.model import EvaluatedModel
    from xtuner.tools.evaluators.table import text

    if args.install and not args.model:
        environment(args, COMMAND)
        return 0
    given = EvaluatedModel(args.model, args.cfg_options)
    if not args.tasks:
        raise ConfigError("no tasks are given", where=COMMAND, do="give --tasks NAME …")
    if args.include_path and not args.include_path.is_dir():
        raise ConfigError("there is no such folder", where=f"--include-path {args.include_path}")
    found = environment(args, COMMAND)
    found.need(lm_eval.PACKAGE)
    words = ["--batch_size", args.batch_size, "--device", "cuda" if found.probe(gpus=True)["gpus"] else "cpu"]
    words += ["--num_fewshot", str(args.num_fewshot)] if args.num_fewshot is not None else []
    words += ["--limit", str(args.limit)] if args.limit is not None else []
    work_dir = given.work_dir(args.work_dir)
    with exclusive(work_dir / ".evaluating", "another process evaluates there"):
        folder = given.folder(work_dir)
        model = [f"pretrained={folder}", "dtype=auto", *args.model_args]
        file = lm_eval.evaluate(found, model, args.tasks, args.include_path, work_dir, [*words, *args.extra])
    print(text(lm_eval.scores(file)))
    print(f"results: {file}")
    return 0
