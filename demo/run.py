"""make demo: from text to a trained model with the public commands, on any laptop in minutes.

The text is available on every machine with Python: functions of the standard library. Each command is printed before it
runs, so that it can be repeated by hand. All output is in demo/out.
"""

import ast
import contextlib
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

OUT = Path(__file__).resolve().parent / "out"
CONFIG = "internlm2_tiny_w_tokenized_dataset_copy"
WORK_DIR = f"work_dirs/{CONFIG}"
VOCABULARY = 2048
SKIPPED_FOLDERS = {"site-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data"}  # mostly tables
LENGTHS = range(60, 1500)  # characters of a function
HELD_OUT = 50  # every 50th source file is held out for validation
SHARDS = {"train": 4, "valid": 1}
STOP_AT = 40
MUST_FALL_BY = 2.0  # nats; the tiny model starts near ln 2048 = 7.6
BOLD, RESET = ("\033[1m", "\033[0m") if sys.stdout.isatty() and "NO_COLOR" not in os.environ else ("", "")


def print_title(text: str) -> None:
    print(f"\n{BOLD}── {text}{RESET}", flush=True)


def run_command(*words: str, expect: int = 0, stop_at: int | None = None) -> str:
    """Run a public command; print and return its output. `stop_at`: send SIGTERM after that iteration."""
    print(f"{BOLD}$ {shlex.join(words)}{RESET}", flush=True)
    xtuner = [sys.executable, "-m", "xtuner.cli.main"] if words[0] == "xtuner" else [sys.executable]
    process = subprocess.Popen(
        [*xtuner, *words[1:]], cwd=OUT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert process.stdout is not None
    output = ""
    for line in process.stdout:
        print(line, end="", flush=True)
        output += line
        if stop_at and re.search(rf"iter +{stop_at}/", line):
            print(f"{BOLD}  (the demo now sends SIGTERM){RESET}", flush=True)
            process.send_signal(signal.SIGTERM)
    code = process.wait()
    if code != expect:
        sys.exit(f"demo: the command ended with exit code {code}, expected {expect}")
    return output


def collect_functions() -> list[list[str]]:
    """Functions of the standard library, by file: the same selection on every run.

    They are normalised, without comments and docstrings, so that little text suffices to learn from. They are short, so
    that every pack contains several from different files, and packs are similar.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(p for p in root.rglob("*.py") if not SKIPPED_FOLDERS & set(p.parts))
    functions = []
    for file in files:
        with contextlib.suppress(SyntaxError, ValueError):  # a template, or for another Python version
            functions.append([*normalise_functions(file.read_text(encoding="utf-8", errors="ignore"))])
    return functions


def normalise_functions(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            if ast.get_docstring(node) is not None:
                node.body = node.body[1:] or [ast.Pass()]
            text = ast.unparse(node)
            if len(text) in LENGTHS:
                yield text + "\n"


def prepare_data() -> None:
    """Train a tokenizer on the text, and write the text as .bin and .bin.meta files of data type `code`."""
    import sentencepiece

    from xtuner.core.log import progress
    from xtuner.data.format.writer import write_bin

    files = collect_functions()
    texts = [text for file in files for text in file]
    (OUT / "tokenizer").mkdir(parents=True)
    size = sum(map(len, texts)) / 1e6
    print(f"{len(texts):,} functions, {size:.1f} MB; training a BPE of {VOCABULARY} pieces", flush=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line + "\n" for text in texts[::2] for line in text.split("\n") if line),
        model_prefix=str(OUT / "tokenizer" / "tokenizer"),
        model_type="bpe",
        vocab_size=VOCABULARY,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        character_coverage=0.9995,
        num_threads=2,
        minloglevel=2,
    )
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(OUT / "tokenizer" / "tokenizer.model"))
    documents = [[[1, *tokenizer.encode(text), 2] for text in file] for file in progress(files, "tokenizing")]
    held_out = documents[::HELD_OUT]
    parts = {"valid": held_out, "train": [file for i, file in enumerate(documents) if i % HELD_OUT]}
    for part, of_part in parts.items():
        docs = [document for file in of_part for document in file]
        random.Random(0).shuffle(docs)  # so that each shard is a mixture of all files
        shards = [docs[i :: SHARDS[part]] for i in range(SHARDS[part])]
        counts = [write_bin(OUT / "data" / part / "code" / f"{i:02d}.bin", shard) for i, shard in enumerate(shards)]
        print(f"data/{part}/code: {len(counts)} files, {len(docs):,} documents, {sum(t for _, t in counts):,} tokens")


def read_losses() -> list[float]:
    """Training loss of every iteration, over all starts of the run."""
    lines = [
        json.loads(line)
        for file in sorted((OUT / WORK_DIR).glob("*/vis_data/scalars.json"))
        for line in file.read_text().splitlines()
    ]
    training = [record for record in lines if "loss" in record]  # the others are validation losses
    return [record["loss"] for record in sorted(training, key=lambda r: r["iter"])]


def parse_validation_loss(output: str) -> float:
    found = re.search(r"^all +[\d,]+ +([\d.]+)", output, re.MULTILINE)
    assert found, "eval loss printed no line `all`"
    return float(found[1])


def main() -> None:
    begin = time.monotonic()
    if OUT.exists():
        shutil.rmtree(OUT)
    print_title("1. Text to tokens")
    prepare_data()
    print_title("2. A config")
    run_command("xtuner", "copy-cfg", "internlm2_tiny_w_tokenized_dataset", ".")
    config = OUT / f"{CONFIG}.py"
    text = config.read_text()
    for old, new in (
        ("/path/to/your/dataset", "data/train"),
        ("/path/to/your/tokenizer", "tokenizer"),
        ("val_folder = None", "val_folder = 'data/valid'"),
        ("data_order_path = None", "data_order_path = 'order/data_order.txt'"),
    ):
        assert old in text, old
        text = text.replace(old, new)
    config.write_text(text)
    print(f"{config.name}: dataset_folder, val_folder, tokenizer_path and data_order_path set")
    print_title("3. The order of files")
    run_command(
        "xtuner", "data", "order", "--data-folder", "data/train", "--save-folder", "order", "--file-type", ".bin"
    )
    print_title("4. Loss before")
    before = parse_validation_loss(
        run_command("xtuner", "eval", "loss", config.name, "data/valid", "--max-length", "1024")
    )
    print_title("5. Train; stop in the middle")
    shown_often = ("--cfg-options", "default_hooks.logger.interval=10", "val_interval=100")
    run_command("xtuner", "train", config.name, *shown_often, expect=75, stop_at=STOP_AT)
    print_title("6. Resume")
    run_command("xtuner", "train", config.name, "--resume", *shown_often)
    print_title("7. To Hugging Face")
    last = (OUT / WORK_DIR / "last_checkpoint").read_text().strip()
    run_command("xtuner", "convert", "pth_to_hf", config.name, f"{WORK_DIR}/{last}", "hf")
    print_title("8. Loss after, and a few lines")
    after = parse_validation_loss(run_command("xtuner", "eval", "loss", "hf", "data/valid", "--max-length", "1024"))
    for prompt in ("def __init__(self, ", "def read", "def is_"):
        sample = ("--max-new-tokens", "60", "--temperature", "0.5", "--template", "plain")
        run_command("xtuner", "chat", "hf", "--prompt", prompt, *sample)
    run_command("xtuner", "plot-loss", WORK_DIR, "-o", "loss.png")

    curve = read_losses()
    print_title(f"Done in {time.monotonic() - begin:.0f} s")
    print(f"loss on unseen files   {before:.3f} → {after:.3f} nats per token")
    print(f"training loss          {curve[0]:.3f} → {sum(curve[-5:]) / 5:.3f}")
    for what, where in (
        ("model", "hf"),
        ("checkpoints, logs", WORK_DIR),
        ("loss curves", "loss.png"),
        ("config", config.name),
        ("data, tokenizer", "data, tokenizer"),
    ):
        print(f"{what:<22} demo/out/{where}")
    if not after < before - MUST_FALL_BY:
        sys.exit(f"demo: the loss fell only from {before:.3f} to {after:.3f}; expected a decrease of {MUST_FALL_BY}")


if __name__ == "__main__":
    main()
