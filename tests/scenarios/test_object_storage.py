"""Data, start weights and checkpoints in object storage, on a real server that throttles, fails and cuts answers."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.object_storage import BUCKET, CLIENT, KEYS, SECRET, Proxy, start_server
from helpers.processes import shell
from helpers.runs import contents, records
from helpers.token_files import draw_documents, write_jsonl

from xtuner.core import files
from xtuner.core.errors import CheckpointError, ConfigError, DataError, XTunerError
from xtuner.core.remote import store
from xtuner.core.remote.cache import Cache, open_cache
from xtuner.core.remote.transfer import download_files, list_names, upload_files
from xtuner.core.remote.url import parse_url
from xtuner.data import build_packed_dataset, load_intern_repo_tokenized_dataset, load_token_files, mixture
from xtuner.data.format.file_order import walk_files
from xtuner.data.loading.prefetch_files import prefetch_files

pytestmark = pytest.mark.processes
SHORT = ["custom_hooks=[]", "max_length=128", "save_steps=1", "save_total_limit=2"]  # 3 iterations


@pytest.fixture(scope="module")
def server() -> Iterator[Proxy]:
    with start_server() as proxy:
        yield proxy


@pytest.fixture
def storage(server: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Proxy:
    for name, value in {**KEYS, "AWS_ENDPOINT_URL": server.endpoint}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XTUNER_OBJECT_CACHE", str(tmp_path / "objects"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XTUNER_OBJECT_ATTEMPTS", "4")
    server.requests.clear()
    return server


@pytest.fixture(scope="module")
def straight(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run on local files."""
    from xtuner.cli.main import main

    work_dir = tmp_path_factory.mktemp("straight")
    assert main(["train", str(tiny), "--work-dir", str(work_dir), "--cfg-options", *SHORT]) == 0
    return work_dir


def test_data_are_those_of_the_disk(
    storage: Proxy, tiny: Path, corpus: Path, straight: Path, tmp_path: Path, xtuner: Any
) -> None:
    storage.put_folder(corpus, "data")
    work_dir = tmp_path / "w"
    options = [*SHORT, f"dataset_folder=s3://{BUCKET}/data"]
    assert xtuner("train", tiny, "--work-dir", work_dir, "--cfg-options", *options) == 0
    assert records(work_dir) == records(straight)
    last = (straight / "last_checkpoint").read_text().strip()
    assert contents(work_dir / last) == contents(straight / last)


def test_a_mixture_of_the_server_and_the_disk(storage: Proxy, corpus: Path, tmp_path: Path) -> None:
    """The packs are those of the disk, of cut and of whole documents, and of several kinds of files."""
    write_jsonl(tmp_path / "b.jsonl", draw_documents(80))
    storage.put_folder(corpus, "data")

    def build(first: str, packing: Any) -> Any:
        own = dict(type=load_intern_repo_tokenized_dataset, folder=f"{first}/en", name="a")
        other = dict(type=load_token_files, folder=str(tmp_path / "b.jsonl"), name="b", weight=2)
        return build_packed_dataset(dict(type=mixture, sources=[own, other]), 64, packing=packing)

    for packing in ("cut", "whole"):
        there, here = (build(first, packing) for first in (f"s3://{BUCKET}/data", str(corpus)))
        assert there.fingerprint() == here.fingerprint()
        assert len(there) == len(here) > 10
        numbers = list(range(len(here)))
        ahead = prefetch_files(there, itertools.cycle(numbers))
        assert list(itertools.islice(ahead, len(numbers))) == numbers
        ahead.close()  # type: ignore[attr-defined]
        for i in numbers:
            assert {k: v.tolist() for k, v in there[i].items()} == {k: v.tolist() for k, v in here[i].items()}


def test_checkpoints_survive_the_loss_of_the_disk(
    storage: Proxy, tiny: Path, straight: Path, tmp_path: Path, xtuner: Any
) -> None:
    """Uploaded next to training, the manifest last; a run whose work dir is lost continues from them bit for bit."""
    work_dir, there = tmp_path / "w", f"s3://{BUCKET}/runs/a"
    last = (straight / "last_checkpoint").read_text().strip()
    options = ["--cfg-options", *SHORT, f"upload_dir={there}"]

    def never_the_last(method: str, path: str) -> int | None:
        return 403 if method in ("PUT", "POST") and f"/{last}/manifest.json" in path else None

    with storage.failing(never_the_last), pytest.raises(CheckpointError, match="is in the work dir, but cannot be up"):
        xtuner("train", tiny, "--work-dir", work_dir, *options)
    sent = [path.split("?")[0] for method, path in storage.requests if method in ("PUT", "POST")]
    before_last = sorted({path.split("/")[4] for path in sent if "/iter_" in path}, key=lambda n: int(n[5:-4]))[-2]
    of_one = [path for path in sent if f"/{before_last}/" in path]
    assert of_one[-1].endswith("manifest.json")
    assert len(of_one) == len(list(files_in(work_dir / before_last)))
    assert f"runs/a/{last}/trainer.json" in storage.keys("runs/a")  # without a manifest: not a checkpoint
    with pytest.raises(ConfigError, match="checkpoints of another run"):
        xtuner("train", tiny, "--work-dir", tmp_path / "fresh", *options)

    shutil.rmtree(work_dir)
    assert xtuner("train", tiny, "--work-dir", work_dir, "--resume", "auto", "--dry-run", *options) == 0
    assert not work_dir.exists()
    assert xtuner("train", tiny, "--work-dir", work_dir, "--resume", *options) == 0
    assert json.loads(next(work_dir.glob("*/start.json")).read_text())["resumed_from"] == before_last
    assert contents(work_dir / last) == contents(straight / last)
    events = [json.loads(line) for f in work_dir.glob("*/events.json") for line in f.read_text().splitlines()]
    assert [e["folder"] for e in events if e["event"] == "upload"] == [last]
    kept = {key.split("/")[2] for key in storage.keys("runs/a")}
    assert kept == {before_last, last}  # save_total_limit=2
    written = "".join(f.read_text(errors="replace") for f in files_in(work_dir) if f.suffix != ".safetensors")
    assert SECRET not in written

    other = tmp_path / "other"
    assert (
        xtuner("train", tiny, "--work-dir", other, "--resume", f"{there}/{before_last}", "--cfg-options", *SHORT) == 0
    )
    assert contents(other / last) == contents(straight / last)
    shutil.rmtree(other)  # the same, and what is newer there is hidden, not deleted
    again = ["--resume", f"{there}/{before_last}", *options]
    assert xtuner("train", tiny, "--work-dir", other, *again) == 0
    assert f"runs/a/{last}/manifest.json.superseded" in storage.keys("runs/a")
    assert f"runs/a/{last}/manifest.json" in storage.keys("runs/a")

    two, elsewhere = tmp_path / "two", f"s3://{BUCKET}/runs/two"  # ranks, each of which downloads and uploads a share
    words = ["--resume", f"{there}/{before_last}", "--cfg-options", *SHORT, f"upload_dir={elsewhere}"]
    ended = shell("train", tiny, "--work-dir", two, *words, NPROC_PER_NODE="2", PYTHONPATH=str(CLIENT))
    assert ended.returncode == 0, ended.stderr
    download_files(list_names(parse_url(f"{elsewhere}/{last}")), parse_url(f"{elsewhere}/{last}"), tmp_path / "copy")
    files.verify(tmp_path / "copy")
    assert len(list((two / last / "optimizer").iterdir())) == 2
    loss = {i: r["loss"] for i, r in records(straight).items()}
    assert {i: pytest.approx(r["loss"], abs=1e-5) for i, r in records(two).items()}.items() <= loss.items()


def files_in(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())


def test_start_weights(storage: Proxy, tiny: Path, straight: Path, tmp_path: Path, xtuner: Any) -> None:
    """A Hugging Face folder and its tokenizer; only what training reads is downloaded, once."""
    last = straight / (straight / "last_checkpoint").read_text().strip()
    assert xtuner("convert", "pth_to_hf", tiny, last, tmp_path / "hf", "--fp32") == 0
    storage.put_folder(tmp_path / "hf", "models/tiny")
    storage.put("models/tiny/model.py", b"raise SystemExit")
    storage.put_folder(last, "models/iter_3.pth")
    runs = {}
    for name, source in (("disk", str(tmp_path / "hf")), ("remote", f"s3://{BUCKET}/models/tiny"),
                         ("checkpoint", f"s3://{BUCKET}/models/iter_3.pth")):  # fmt: skip
        options = [*SHORT, f"load_from={source}"]
        assert xtuner("train", tiny, "--work-dir", tmp_path / name, "--cfg-options", *options) == 0
        runs[name] = records(tmp_path / name)
    assert runs["remote"] == runs["disk"] == runs["checkpoint"]
    assert runs["disk"] != records(straight)

    from xtuner.core import hub

    storage.requests.clear()
    folder = hub.resolve(f"s3://{BUCKET}/models/tiny")
    assert {p.name for p in folder.iterdir()} >= {"config.json", "model.safetensors"}
    assert not (folder / "model.py").exists()
    assert not any("model.py" in path for _, path in storage.requests)
    storage.requests.clear()
    assert hub.resolve(f"s3://{BUCKET}/models/tiny") == folder
    assert [method for method, _ in storage.requests] == ["GET"]  # the list
    for wrong, message in (
        ("models/none", "there is no model at"),
        ("models/iter_3.pth/optimizer", "has no config.json"),
    ):
        with pytest.raises(ConfigError, match=message):
            hub.resolve(f"s3://{BUCKET}/{wrong}")


def every_third(kinds: tuple[int | str, ...]) -> Any:
    """A fault of each kind in turn, at every third request."""
    count = itertools.count()

    def fault(method: str, path: str) -> int | str | None:
        number = next(count)
        return None if number % 3 else kinds[number // 3 % len(kinds)]

    return fault


def test_a_run_survives_a_server_that_fails(
    storage: Proxy, tiny: Path, corpus: Path, straight: Path, tmp_path: Path, xtuner: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Throttled, failing and cut answers: same losses, same checkpoints; also with worker processes."""
    monkeypatch.setattr(store, "FIRST_PAUSE", 0.001)
    monkeypatch.setenv("XTUNER_OBJECT_ATTEMPTS", "5")
    storage.put_folder(corpus, "data")
    storage.put("data/data_order.txt", "\n".join(walk_files(corpus)).encode())
    last = (straight / "last_checkpoint").read_text().strip()
    options = [*SHORT, f"dataset_folder=s3://{BUCKET}/data", f"upload_dir=s3://{BUCKET}/runs/b"]
    options += [f"data_order_path=s3://{BUCKET}/data/data_order.txt", "dataloader_num_workers=1"]
    with storage.failing(every_third((503, "cut", 500, 429))):
        assert xtuner("train", tiny, "--work-dir", tmp_path / "w", "--cfg-options", *options) == 0
    log = next((tmp_path / "w").glob("*/2*.log")).read_text()
    assert "attempt 1 of 5" in log
    assert SECRET not in log
    assert records(tmp_path / "w") == records(straight)
    shutil.rmtree(tmp_path / "w")
    resume = ["--resume", f"s3://{BUCKET}/runs/b", "--cfg-options", *SHORT]
    with storage.failing(every_third((500, "cut"))):
        assert xtuner("train", tiny, "--work-dir", tmp_path / "w", *resume) == 0
    assert contents(tmp_path / "w" / last) == contents(straight / last)


@pytest.mark.parametrize(
    ("wrong", "kind", "message"),
    [
        ({"AWS_ACCESS_KEY_ID": ""}, ConfigError, "only one is set"),
        ({"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, ConfigError, "no credentials"),
        ({"fault": 403}, ConfigError, "403 AccessDenied"),
        ({"folder": "s3://no-such-bucket/data"}, ConfigError, "bucket 'no-such-bucket' does not exist"),
        ({"folder": f"s3://{BUCKET}/none"}, DataError, "no .bin file in the data folder"),
        ({"folder": f"s3://key:{SECRET}@{BUCKET}/data"}, ConfigError, "contains credentials"),
        ({"folder": "s3://"}, ConfigError, "not an address"),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, CheckpointError, "no connection; 2 attempts"),
        ({"AWS_ENDPOINT_URL": "http://user:pw@host"}, ConfigError, "not the address of a server"),
        ({"fault": 503}, CheckpointError, "503 SlowDown; 2 attempts"),
        ({"XTUNER_OBJECT_CACHE_SIZE": "100B"}, CheckpointError, "XTUNER_OBJECT_CACHE_SIZE to more than 1"),
        ({"XTUNER_OBJECT_CACHE_SIZE": "lots"}, ConfigError, "is not a size"),
    ],
)
def test_what_is_wrong_is_said(
    storage: Proxy, corpus: Path, monkeypatch: pytest.MonkeyPatch, wrong: dict[str, Any], kind: type, message: str,
    tmp_path: Path,
) -> None:  # fmt: skip
    """A message of its own, after the retries; never the secret, never a hang."""
    monkeypatch.setattr(store, "FIRST_PAUSE", 0.001)
    monkeypatch.setenv("XTUNER_OBJECT_ATTEMPTS", "2")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:9")  # the machine has no role
    storage.put_folder(corpus, "data")
    for name, value in wrong.items():
        if name.isupper():
            monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name)
    folder = wrong.get("folder", f"s3://{BUCKET}/data")
    with storage.failing(lambda method, path: wrong.get("fault")), pytest.raises(XTunerError) as caught:
        load_intern_repo_tokenized_dataset(folder)[0].open()
    assert isinstance(caught.value, kind), caught.value
    assert message in str(caught.value)
    assert SECRET not in str(caught.value)


def test_an_object_that_changes_under_the_run(storage: Proxy, corpus: Path) -> None:
    storage.put_folder(corpus, "moving")
    data = build_packed_dataset(dict(type=load_intern_repo_tokenized_dataset, folder=f"s3://{BUCKET}/moving"), 32)
    before = [data[i]["input_ids"].tolist() for i in range(len(data))]
    name = data.documents.names[0]
    text = storage.request("GET", f"/{BUCKET}/moving/{name}")[1]
    shutil.rmtree(open_cache().folder)
    assert [data[i]["input_ids"].tolist() for i in range(len(data))] == before  # the cache may vanish
    shutil.rmtree(open_cache().folder)
    storage.put(f"moving/{name}", text.replace(b"1", b"2", 1))
    with pytest.raises(DataError, match="has changed since it was indexed"):
        data[0]
    assert storage.request("DELETE", f"/{BUCKET}/moving/{name}")[0] == 204
    with pytest.raises(DataError, match="no such object"):
        data[0]


def test_the_cache_stays_within_its_bound(storage: Proxy, tmp_path: Path) -> None:
    """Three processes read 30 objects of 100 kB in an order of their own through a cache of 450 kB."""
    for i in range(30):
        storage.put(f"many/{i}", bytes([i]) * 100_000)
    children = [
        subprocess.Popen([sys.executable, "-c", READ_MANY, str(seed)], stdout=subprocess.PIPE, text=True,
                         env={**os.environ, "XTUNER_OBJECT_CACHE_SIZE": "450kB", "PYTHONPATH": str(CLIENT)})
        for seed in range(3)
    ]  # fmt: skip
    most = [json.loads(child.communicate()[0]) for child in children]
    assert [child.returncode for child in children] == [0] * 3
    assert 0 < max(most) <= 450 * 1024
    assert {p.stat().st_size for p in (tmp_path / "objects" / "files").iterdir()} == {100_000}
    left = sorted((tmp_path / "objects" / "files").iterdir(), key=lambda p: p.stat().st_atime)
    used, _ = Cache(tmp_path / "objects", 450 * 1024), os.utime(left[0], ns=(2**62, left[0].stat().st_mtime_ns))
    with used.open_file("s3://other/object", 100_000, 1, lambda fd: None):
        assert left[0].exists()  # used last
        assert not left[1].exists()
    folder = used.open_folder(
        "s3://a/model", 1, 300_000, lambda path: (path / "w").write_bytes(b"x" * 300_000) and None
    )
    with pytest.raises(CheckpointError, match="are in use"):  # the folder stays while this process runs
        used.open_file("s3://a/large", 200_000, 1, lambda fd: None)
    assert (folder / "w").stat().st_size == 300_000


READ_MANY = """
import fcntl, json, os, random, sys
from xtuner.core.remote.cache import open_cache
from xtuner.core.remote.path import make_path
def used_now():  # while nothing is reserved, renamed or removed
    folder, sizes = open_cache().folder, {}
    with open(folder / "locks" / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for entry in os.scandir(folder / "files"):
            sizes[entry.stat().st_ino] = entry.stat().st_size
    return sum(sizes.values())
order, most = list(range(30)) * 2, 0
random.Random(int(sys.argv[1])).shuffle(order)
for i in order:
    with make_path(f"s3://bucket/many/{i}").open() as f:
        most = max(most, used_now())
        assert f.read() == bytes([i]) * 100_000
print(json.dumps(most))
"""


def test_a_folder_larger_than_the_cache(
    storage: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """Documents are read by ranges, also those of 100,000 tokens; nothing but metas is downloaded."""
    random = np.random.RandomState(0)
    (tmp_path / "data").mkdir()
    for name, lengths in (("a", random.randint(1, 300, 200)), ("b", [100_000, 5, 40_000])):
        with open(tmp_path / "data" / f"{name}.bin", "wb") as text:
            rows = []
            for length in lengths:
                rows.append((text.tell(), length))
                text.write(b'{"tokens": %s}\n' % str(random.randint(-90, 90, length).tolist()).encode())
        np.save(tmp_path / "data" / f"{name}.bin.meta", np.array(rows))
        (tmp_path / "data" / f"{name}.bin.meta.npy").rename(tmp_path / "data" / f"{name}.bin.meta")
    storage.put_folder(tmp_path / "data", "large")
    monkeypatch.setenv("XTUNER_OBJECT_CACHE_SIZE", "100kB")
    caplog.set_level("INFO", "xtuner")
    cfg = dict(type=load_intern_repo_tokenized_dataset)
    here = build_packed_dataset({**cfg, "folder": str(tmp_path / "data")}, 4096)
    there = build_packed_dataset({**cfg, "folder": f"s3://{BUCKET}/large"}, 4096)
    assert "documents are read from the server" in caplog.text
    assert there.fingerprint() == here.fingerprint()
    storage.requests.clear()
    for i in range(len(here)):
        found = there[i]
        assert all(found[name].equal(value) for name, value in here[i].items()), i
    assert len(here) > 30
    assert (
        sum(path.endswith("a.bin") for _, path in storage.requests) < 3 * here.packs_per_file[0]
    )  # not one a document
    assert {p.stat().st_size for p in (tmp_path / "objects" / "files").iterdir()} == {
        p.stat().st_size for p in (tmp_path / "data").glob("*.meta")
    }


def test_files_of_several_parts(storage: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up and down under faults: parts that failed are sent again; an upload that was not completed is invisible."""
    monkeypatch.setattr(store, "FIRST_PAUSE", 0.001)
    monkeypatch.setenv("XTUNER_OBJECT_ATTEMPTS", "6")
    (tmp_path / "up").mkdir()
    (tmp_path / "up" / "large").write_bytes(np.random.RandomState(0).bytes(2 * store.PART + 4_000_000))
    url = parse_url(f"s3://{BUCKET}/parts")
    never_done = storage.failing(lambda method, path: 403 if method == "POST" and "uploadId" in path else None)
    with never_done, pytest.raises(ConfigError, match="403"):
        upload_files(tmp_path / "up", ["large"], url)
    assert storage.keys("parts") == []
    storage.requests.clear()
    with storage.failing(every_third((503, 500))):
        upload_files(tmp_path / "up", ["large"], url)
    sent = [path for method, path in storage.requests if "partNumber" in path]
    assert 3 < len(sent) <= 6
    storage.requests.clear()
    with storage.failing(every_third(("cut", 503))):
        download_files(list_names(url), url, tmp_path / "down")
    assert (tmp_path / "down" / "large").read_bytes() == (tmp_path / "up" / "large").read_bytes()
