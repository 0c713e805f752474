"""Which client for object storage: obstore next to fsspec's s3fs, on the same server (moto's) and the same objects.

    python benchmarks/object_storage.py --server DIR --client obstore=DIR --client s3fs=DIR [--large-mib 32]

Each DIR is what `pip install --target DIR` wrote: moto with its server, and the two clients. The server shares the
machine, and is slow: compare the CPU seconds of the client's process, and its memory, rather than wall seconds.
"""

import argparse
import contextlib
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

KEYS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_REGION": "us-east-1"}
OBJECTS, RANGES, RANGE, THREADS = 2_000, 1_000, 8_192, 16


@contextlib.contextmanager
def start_server(folder: str) -> Iterator[str]:
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
    server = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": folder}, stderr=subprocess.PIPE, text=True)
    assert server.stderr
    try:
        for line in server.stderr:
            if found := re.search(r"Running on (http://\S+)", line):
                break
        subprocess.Popen(["cat"], stdin=server.stderr, stdout=subprocess.DEVNULL)  # its log of requests
        yield found[1] if found else ""
    finally:
        server.terminate()
        server.wait()


def measure(tasks: dict[str, Callable[[], Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, task in tasks.items():
        begin, cpu = time.perf_counter(), time.process_time()
        task()
        found[name] = [time.process_time() - cpu, time.perf_counter() - begin]
    found["peak MiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return found


def offsets(large: int) -> list[int]:
    return [i * 7_919_111 % (large - RANGE) for i in range(RANGES)]


def run_obstore(endpoint: str, folder: Path, large: int) -> dict[str, Any]:
    state: dict[str, Any] = {}

    def start() -> None:
        import obstore
        from obstore.store import S3Store

        state["o"] = obstore
        state["s"] = S3Store("bench", endpoint=endpoint, client_options={"allow_http": True})

    def upload() -> None:
        state["o"].put(state["s"], "large", folder / "large")

    def put_many() -> None:
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(lambda i: state["o"].put(state["s"], f"many/{i}", b"x" * 1000), range(OBJECTS)))

    def list_all() -> None:
        assert sum(map(len, state["o"].list(state["s"], "many"))) == OBJECTS

    def ranges() -> None:
        def read(at: int) -> int:
            return len(state["o"].get_range(state["s"], "large", start=at, length=RANGE))

        with ThreadPoolExecutor(THREADS) as pool:
            assert set(pool.map(read, offsets(large))) == {RANGE}

    def download() -> None:
        with open(folder / "copy", "wb") as f:
            for chunk in state["o"].get(state["s"], "large").stream(min_chunk_size=2**20):
                f.write(chunk)
        assert (folder / "copy").stat().st_size == large

    return measure({"import": start, "upload": upload, "put many": put_many, "list": list_all, "ranges": ranges,
                    "download": download})  # fmt: skip


def run_s3fs(endpoint: str, folder: Path, large: int) -> dict[str, Any]:
    state: dict[str, Any] = {}

    def start() -> None:
        import s3fs

        state["f"] = s3fs.S3FileSystem(client_kwargs={"endpoint_url": endpoint})

    def upload() -> None:
        state["f"].put_file(str(folder / "large"), "bench/large")

    def put_many() -> None:
        state["f"].pipe({f"bench/many/{i}": b"x" * 1000 for i in range(OBJECTS)}, batch_size=THREADS)

    def list_all() -> None:
        assert len(state["f"].find("bench/many")) == OBJECTS

    def ranges() -> None:
        begins = offsets(large)
        ends = [at + RANGE for at in begins]
        found = state["f"].cat_ranges(["bench/large"] * RANGES, begins, ends, batch_size=THREADS)
        assert set(map(len, found)) == {RANGE}

    def download() -> None:
        state["f"].get_file("bench/large", str(folder / "copy"))
        assert (folder / "copy").stat().st_size == large

    return measure({"import": start, "upload": upload, "put many": put_many, "list": list_all, "ranges": ranges,
                    "download": download})  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", required=True, metavar="DIR")
    parser.add_argument("--client", action="append", default=[], metavar="NAME=DIR")
    parser.add_argument("--large-mib", type=int, default=32)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        name, endpoint, folder = args.child
        run = {"obstore": run_obstore, "s3fs": run_s3fs}[name]
        print(json.dumps(run(endpoint, Path(folder), args.large_mib * 2**20)))
        return
    results: dict[str, dict[str, Any]] = {}
    for name, folder in (client.split("=", 1) for client in args.client):
        with start_server(args.server) as endpoint, tempfile.TemporaryDirectory() as scratch:
            subprocess.run(["curl", "-sfX", "PUT", f"{endpoint}/bench"], check=True, stdout=subprocess.DEVNULL)
            (Path(scratch) / "large").write_bytes(os.urandom(args.large_mib * 2**20))
            command = [sys.executable, __file__, "--server", args.server, "--large-mib", str(args.large_mib)]
            command += ["--child", name, endpoint, scratch]
            env = {**os.environ, **KEYS, "PYTHONPATH": folder}
            results[name] = json.loads(subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE).stdout)
            results[name]["installed MiB"] = sum(p.stat().st_size for p in Path(folder).rglob("*")) // 2**20
    print(
        "| | "
        + " | ".join(f"{name}: CPU s (wall s)" for name in results)
        + " |\n|---" * 1
        + "|---" * len(results)
        + "|"
    )
    for task in next(iter(results.values())):
        cells = [r[task] for r in results.values()]
        shown = [f"{c[0]:.2f} ({c[1]:.2f})" if isinstance(c, list) else str(c) for c in cells]
        print(f"| {task} | " + " | ".join(shown) + " |")


if __name__ == "__main__":
    main()
