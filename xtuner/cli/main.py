"""The `xtuner` command: find the verb, which parses its own arguments.

A verb is a module with `add_arguments(parser)` and `run(args) -> int`. It imports torch only inside `run`, so that
`xtuner --help` stays fast.

Only the module of the requested verb is imported. typer or cyclopts would replace `main` below, but are one more
dependency and take 0.05 s at each start; the error format and exit codes in `core/command.py` would still be needed.
"""

import importlib
import sys
from typing import NoReturn

from xtuner.core.command import exit_with, print_error, run_command
from xtuner.core.errors import EXIT_CONFIG

VERBS = {  # words → (module, what it does)
    "list-cfg": ("xtuner.cli.list_cfg", "list the shipped configs"),
    "copy-cfg": ("xtuner.cli.copy_cfg", "copy a shipped config here to edit it"),
    "check-cfg": ("xtuner.cli.check_cfg", "report all mistakes in a config"),
    "data order": ("xtuner.tools.get_data_order", "write the order of files for training"),
    "data tokenize": ("xtuner.cli.data.tokenize", "convert text to .bin and .bin.meta files for training"),
    "data convert": ("xtuner.cli.data.convert", "convert token files: .bin, Megatron, Parquet, Arrow, JSON lines"),
    "data check": ("xtuner.cli.data.check", "check files against their metas and the format; repair metas"),
    "data stats": ("xtuner.cli.data.stats", "statistics of documents, tokens, packs and balance: text, JSON or HTML"),
    "list-models": ("xtuner.cli.list_models", "list the known models, their features, exports and the GPUs they need"),
    "data cache": ("xtuner.cli.data.cache", "build index and token caches, so that a run starts at once"),
    "data show": ("xtuner.cli.data.show", "show a pack: text, learned and masked parts, document borders"),
    "log-dataset": ("xtuner.cli.log_dataset", "show the first packs that a config trains on"),
    "doctor": ("xtuner.cli.doctor", "check whether training will work on this machine"),
    "train": ("xtuner.cli.train", "train a model by a config"),
    "plan": ("xtuner.cli.plan", "predict what fits, how fast it trains and what it costs on other GPUs"),
    "launch": ("xtuner.cli.launch", "write a job script for Slurm, Kubernetes or Aliyun DLC"),
    "board": ("xtuner.cli.board", "follow and compare runs in a browser; export them as one HTML file"),
    "status": ("xtuner.cli.status", "show what a run is doing now"),
    "plot-loss": ("xtuner.cli.plot_loss", "plot the loss of a run"),
    "eval loss": ("xtuner.cli.eval.loss", "compute the mean loss of a model on tokenized data"),
    "eval opencompass": ("xtuner.cli.eval.opencompass", "evaluate with OpenCompass, on its datasets or your own file"),
    "eval lm-eval": ("xtuner.cli.eval.lm_eval", "evaluate with EleutherAI's lm-eval, on its tasks or your own"),
    "chat": ("xtuner.cli.chat", "chat with a model, or let it continue a text"),
    "convert pth_to_hf": ("xtuner.tools.model_converters.pth_to_hf", "convert a checkpoint to a Hugging Face folder"),
    "convert turbomind": ("xtuner.cli.convert.turbomind", "convert a Hugging Face folder for LMDeploy up to 0.9"),
    "convert weights": ("xtuner.cli.convert.weights", "write all weights of a checkpoint as fp32 to one file"),
    "completion": ("xtuner.cli.completion", "print a completion script for bash, zsh or fish"),
}


def usage(group: str = "") -> str:
    """Help text of all verbs, or of those in a group such as `data`."""
    first = f"{group} " if group else ""
    shown = {words: text for words, (_, text) in VERBS.items() if words.startswith(first)}
    width = max(map(len, shown))
    lines = [f"  {words:<{width}}  {text}" for words, text in shown.items()]
    verb = f"xtuner {first}VERB"
    return f"usage: {verb} ...\n\n" + "\n".join(lines) + f"\n\n`{verb} --help` describes a verb.\n"


def main(argv: list[str]) -> int:
    """Run one command line; returns the exit code."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage(), end="")
        return 0 if argv else EXIT_CONFIG
    if argv[0] in ("-V", "--version"):
        import xtuner

        print(f"xtuner {xtuner.__version__}")
        return 0
    words = next((w for n in (2, 1) if (w := " ".join(argv[:n])) in VERBS), None)
    group = argv[0] if any(w.startswith(f"{argv[0]} ") for w in VERBS) else ""
    if words is None and group and argv[1:] in ([], ["-h"], ["--help"]):
        print(usage(group), end="")
        return 0 if argv[1:] else EXIT_CONFIG
    if words is None:
        from xtuner.core.errors import did_you_mean

        given = " ".join(argv[: 2 if group else 1])
        near = did_you_mean(" ".join(argv[:2]), list(VERBS)) or did_you_mean(argv[0], list(VERBS))
        print_error(f"there is no verb {given!r}.{near}\n\n{usage(group)}".rstrip())
        return EXIT_CONFIG
    module_name, text = VERBS[words]
    module = importlib.import_module(module_name)
    rest = argv[len(words.split()) :]
    return run_command(f"xtuner {words}", text, module.add_arguments, module.run, rest)


def console() -> NoReturn:
    """Entry point."""
    exit_with(lambda: main(sys.argv[1:]))


if __name__ == "__main__":
    console()
