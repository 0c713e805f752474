"""xtuner eval opencompass MODEL --datasets NAME … (or --custom FILE): evaluate with OpenCompass."""

import argparse
from pathlib import Path

from xtuner.cli.eval.common import add_shared, environment
from xtuner.core import log
from xtuner.core.errors import ConfigError
from xtuner.tools.evaluators.environment import Environment, exclusive

COMMAND = "xtuner eval opencompass"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="*", metavar="MODEL", help="Hugging Face folder; or CONFIG.py CHECKPOINT")
    data = parser.add_mutually_exclusive_group()
    data.add_argument(
        "--datasets", nargs="+", default=[], metavar="NAME", help="datasets of OpenCompass, e.g. ceval_ppl mmlu_gen"
    )
    data.add_argument("--custom", type=Path, metavar="FILE.jsonl", help="your own questions or multiple-choice items")
    parser.add_argument(
        "--infer",
        choices=("ppl", "gen"),
        help="for --custom: likelihood of the options (default), or generated answers",
    )
    parser.add_argument(
        "--backend",
        choices=("hf", "turbomind"),
        default="hf",
        help="library that runs the model: transformers or LMDeploy",
    )
    parser.add_argument(
        "--model-type",
        choices=("chat", "base"),
        help="prompt with the chat template, or with plain text (default: chat if possible)",
    )
    parser.add_argument(
        "--gpus", type=int, metavar="N", help="GPUs per copy of the model (default: 1; 0 without a GPU)"
    )
    parser.add_argument("--batch-size", type=int, metavar="N", help="prompts per batch (default: hf 8, turbomind 64)")
    parser.add_argument(
        "--max-seq-len", type=int, metavar="N", help="maximum tokens of a prompt and its answer (default: the model's)"
    )
    parser.add_argument("--max-out-len", type=int, metavar="N", help="maximum tokens of an answer (default: 1024)")
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder whose data/ has OpenCompass's datasets")
    parser.add_argument(
        "--dry-run", action="store_true", help="let OpenCompass check what it would run, without running it"
    )
    add_shared(parser, "OpenCompass")


def run(args: argparse.Namespace) -> int:
    from xtuner.export.opencompass import Settings, config_text, has_chat_template
    from xtuner.tools.evaluators import opencompass
    from xtuner.tools.evaluators.model import EvaluatedModel
    from xtuner.tools.evaluators.table import text

    turbomind = args.backend == "turbomind"
    if args.install and not args.model:
        environment(args, COMMAND, turbomind)
        return 0
    given = EvaluatedModel(args.model, args.cfg_options)
    _check_options(args)
    questions = opencompass.read_file(args.custom, args.infer) if args.custom else None
    found = environment(args, COMMAND, turbomind)
    found.need(opencompass.PACKAGE)
    questions = questions or opencompass.read_names(args.datasets, found)
    gpus = _gpus(args, found)
    if args.model_type == "chat" and questions.by_likelihood:
        what, why = "likelihoods cannot be computed with a chat model", "OpenCompass's chat models only generate"
        raise ConfigError(what, where="--model-type chat", why=why, do="give base, or use gen instead of ppl")
    work_dir = given.work_dir(args.work_dir)
    with exclusive(work_dir / ".evaluating", "another process evaluates there"):
        folder = given.folder(work_dir, any_layout=turbomind)
        speaks = has_chat_template(folder)
        if args.model_type == "chat" and not speaks:
            raise ConfigError("the tokenizer has no chat template", where="--model-type chat", do="give base")
        kind = args.model_type or ("chat" if speaks and not questions.by_likelihood else "base")
        log.logger.info(f"evaluated as a {kind} model (--model-type)")
        chosen = Settings(kind, gpus, args.batch_size, args.max_seq_len, args.max_out_len)
        model = config_text(folder, args.backend, folder, given.name, chosen)
        results = opencompass.evaluate(found, questions, model, work_dir, args.data, args.extra, args.dry_run)
    if results is None:
        print("OpenCompass would run this; nothing was run")
        return 0
    rows = opencompass.scores(results)
    print(text(rows))
    print(f"results: {results}")
    opencompass.check_scores(rows, work_dir / "opencompass.log")
    return 0


def _check_options(args: argparse.Namespace) -> None:
    """Raises: ConfigError."""
    if not args.datasets and not args.custom:
        raise ConfigError("no datasets are given", where=COMMAND, do="give --datasets NAME …, or --custom FILE.jsonl")
    if args.infer and not args.custom:
        raise ConfigError("--infer is for --custom only", where="--infer", do="choose datasets named …_ppl or …_gen")
    if args.data and not (args.data / "data").is_dir():
        do = "give the parent folder of data/"
        raise ConfigError("there is no folder data/ in it", where=f"--data {args.data}", do=do)
    for option in ("gpus", "batch_size", "max_seq_len", "max_out_len"):
        value, least = getattr(args, option), 0 if option == "gpus" else 1
        if value is not None and value < least:
            raise ConfigError(
                f"{value} is not valid", where=f"--{option.replace('_', '-')}", do=f"give {least} or more"
            )


def _gpus(args: argparse.Namespace, found: Environment) -> int:
    """GPUs per copy of the model. Raises: ConfigError if the backend or the GPUs are not available."""
    turbomind, where = args.backend == "turbomind", f"--backend {args.backend}"
    if turbomind and args.gpus == 0:
        raise ConfigError("TurboMind runs on GPUs only", where="--gpus 0", do="give 1 or more, or --backend hf")
    if args.dry_run:
        return int(turbomind) if args.gpus is None else int(args.gpus)
    if turbomind and found.probe("lmdeploy")["lmdeploy"] is None:
        do = f"run `{found.to_install(turbomind=True)}`, or use --backend hf"
        raise ConfigError("LMDeploy is not in the environment", where=f"{where}, {found.folder}", do=do)
    there = found.probe(gpus=True)["gpus"]
    if turbomind and not there:
        why = "TurboMind runs on GPUs only"
        raise ConfigError("there is no GPU here", where=where, why=why, do="use --backend hf")
    wanted = min(1, there) if args.gpus is None else args.gpus
    if wanted > there:
        do = f"give {there} at most" if there else "leave it out"
        raise ConfigError(f"GPUs here: {there}", where=f"--gpus {wanted}", why="OpenCompass would fail", do=do)
    return int(wanted)
