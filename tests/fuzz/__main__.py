"""Give every reader of foreign bytes odd inputs for a while, and report those that it does not take as it should.

    python -m fuzz [TARGET…] [--seconds 600] [--seed N]
    python -m fuzz --case FILE        read one input again, with the error's traceback

An input that was found lies in a file below --finds: the target's name, and the case in Python's notation.
"""

import argparse
import ast
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
NAMES = (
    "data", "sources", "caches", "order", "options", "config", "checkpoint", "network", "weights", "pickle", "zip",
    "zero2", "zero3", "internevo", "tokenizer.model", "tokenizer.json", "texts", "records",
)  # fmt: skip


def explore(names: list[str], seed: int, seconds: float) -> Iterator[dict[str, Any]]:
    """One report for each target: "target", "inputs", "rejected", "seconds" and "finds" [(name, text, case)].

    A process that dies is a find of the target that it was at; the others go to a new process.
    """
    left = list(names)
    while left:
        with tempfile.TemporaryDirectory(prefix="xtuner-fuzz-", dir=_memory()) as sandbox:
            words = [sys.executable, "-m", "fuzz.child", sandbox, str(seed), str(seconds), *left]
            paths = os.pathsep.join((str(TESTS), str(TESTS.parent)))
            env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
            env |= {"XDG_CACHE_HOME": sandbox, "HF_HUB_OFFLINE": "1", "HOME": sandbox, "TMPDIR": sandbox}
            with open(Path(sandbox, "errors"), "w+", errors="replace") as errors:
                child = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=errors, text=True, env=env)
                assert child.stdout is not None
                for line in child.stdout:
                    if line.startswith("{"):
                        report = json.loads(line)
                        left.remove(report["target"])
                        yield report
                child.wait()
                errors.seek(0)
                said = errors.read()[-3000:]
            if child.returncode or left:
                last = Path(sandbox, "last")
                target, _, case = (last.read_text() if last.exists() else "").partition("\n")
                text = f"the process ended with {child.returncode}: {said}"
                if target not in left:
                    raise RuntimeError(text)
                left.remove(target)
                yield {
                    "target": target,
                    "inputs": 0,
                    "rejected": 0,
                    "seconds": 0,
                    "finds": [["the process died", text, case]],
                }


def _memory() -> str | None:
    """A folder in memory, where each of the files that are synced takes no time; None where there is none."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def main() -> int:
    parser = argparse.ArgumentParser("fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(NAMES)}; all without")
    parser.add_argument(
        "--seconds", type=float, default=600, help="for each target (default: 600); 0: a few inputs each"
    )
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the first inputs (default: the time)")
    parser.add_argument("--finds", type=Path, default=Path("fuzz-finds"), help="folder for them (default: fuzz-finds)")
    parser.add_argument("--case", type=Path, help="read this input once")
    args = parser.parse_args()
    if args.case:
        return read_once(args.case)
    found = 0
    print(f"{args.seconds:g} s for each target, from seed {args.seed}", flush=True)
    for report in explore(args.targets or list(NAMES), args.seed, args.seconds):
        words = f"{report['inputs']:,} inputs in {report['seconds']} s, {report['rejected']:,} rejected"
        print(f"{report['target']}: {words}, {len(report['finds'])} finds", flush=True)
        for name, text, case in report["finds"]:
            found += 1
            digest = hashlib.sha256(case.encode(errors="surrogatepass")).hexdigest()[:8]
            path = args.finds / f"{report['target']}-{digest}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{report['target']}\n{case}\n", errors="surrogatepass")
            print(f"FIND {name}\n{text}\nagain: PYTHONPATH=tests {sys.executable} -m fuzz --case {path}\n", flush=True)
    return int(found > 0)


def read_once(path: Path) -> int:
    import shutil

    from fuzz.targets import targets

    name, _, case = path.read_text(errors="surrogatepass").partition("\n")
    with tempfile.TemporaryDirectory(prefix="xtuner-fuzz-") as sandbox:
        folder = Path(sandbox, "input")
        target = targets(Path(sandbox))[name]
        shutil.rmtree(folder, ignore_errors=True)
        value = ast.literal_eval(case)
        for file, data in value.items() if isinstance(value, dict) else ():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_bytes(data)
        target.read(folder, value)
    print("no error")
    return 0


if __name__ == "__main__":
    sys.exit(main())
