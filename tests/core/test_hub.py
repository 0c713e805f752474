"""Hub ids against a hub of our own on the loopback device. In children: huggingface_hub reads its environment once."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest

from xtuner.core import hub
from xtuner.core.errors import ConfigError

SHA = "0123456789abcdef0123456789abcdef01234567"
SMALL = {name: name.encode() * 3 for name in ("config.json", "tokenizer.json", "tokenizer_config.json")}
CODE = {"modeling_evil.py": b"raise SystemExit", "tokenization_evil.py": b"", "README.md": b"", "a/config.json": b"{}"}
INDEX = json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}})
SHARDS = {f"model-0000{i}-of-00002.safetensors": os.urandom(3000) for i in (1, 2)}
BIN = {"pytorch_model.bin": b"pickled"}
REPOSITORIES = {
    "org/sharded": {**SMALL, **CODE, **SHARDS, **BIN, "model.safetensors.index.json": INDEX.encode()},
    "org/single": {**SMALL, **CODE, "model.safetensors": b"weights", "consolidated.safetensors": b"the same again"},
    "org/pickled": {**SMALL, **CODE, **BIN},
    "org/empty": {**SMALL, **CODE},
    "org/gated": {**SMALL, **SHARDS},
    "org/untouched": {**SMALL, "model.safetensors": b"weights"},
}

CHILD = """
import json, sys
from pathlib import Path
from xtuner.core.errors import ConfigError
from xtuner.core import hub
assert "huggingface_hub" not in sys.modules  # importing it is for those who need it
print("ready", flush=True)
for line in sys.stdin:
    name, options = json.loads(line)
    try:
        folder = hub.resolve(name, **options)
        answer = {"folder": str(folder), "files": sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*"))}
    except ConfigError as e:
        answer = {"error": str(e)}
    print(json.dumps(answer), flush=True)
"""


class Hub(http.server.ThreadingHTTPServer):
    """What huggingface_hub asks of a hub: a revision's commit, its list of files, and each file."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.asked: list[str] = []
        self.may_send_weights = threading.Event()
        self.may_send_weights.set()

    def fetched(self):
        """How often each file was fetched since the last question."""
        asked, self.asked = self.asked, []
        return Counter(path.rpartition("/")[2] for path in asked if path.startswith("GET") and "/resolve/" in path)


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def answer(self):
        path = self.path.partition("?")[0]
        self.server.asked.append(f"{self.command} {path}")
        parts = path.strip("/").split("/")
        if parts[0] == "api" and len(parts) > 4:
            self.api("/".join(parts[2:4]), *parts[4:])
        elif len(parts) > 4 and parts[2:4] == ["resolve", SHA]:
            self.file("/".join(parts[:2]), "/".join(parts[4:]))
        else:
            self.send(404)

    def api(self, name, what, revision):
        if name == "org/down":
            self.send(500)
        elif name not in REPOSITORIES:
            self.send(401, {"X-Error-Code": "RepoNotFound"} if name == "org/coded" else {})
        elif revision not in ("main", SHA):
            self.send(404, {"X-Error-Code": "RevisionNotFound"})
        elif what == "revision":
            self.send_json({"id": name, "sha": SHA, "siblings": [{"rfilename": f} for f in REPOSITORIES[name]]})
        else:
            files = [{"type": "file", "path": f, "size": len(d), "oid": etag(d)} for f, d in REPOSITORIES[name].items()]
            self.send_json(files)

    def file(self, name, file):
        data = REPOSITORIES[name][file]
        if name == "org/gated" and file.endswith(".safetensors"):
            return self.send(403, {"X-Error-Code": "GatedRepo"})
        if self.command == "GET" and file.endswith(".safetensors"):
            self.server.may_send_weights.wait(60)
        self.send(200, {"ETag": f'"{etag(data)}"', "X-Repo-Commit": SHA}, data)

    def send_json(self, value):
        self.send(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def send(self, status, headers=None, data=b""):
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)


def etag(data):
    return hashlib.sha1(data).hexdigest()


class Child:
    """A process that resolves names one after the other."""

    def __init__(self, home, endpoint, **environment):
        kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and not k.lower().endswith("_proxy")}
        root = str(Path(__file__).resolve().parents[2])
        kept |= {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([sys.executable, "-c", CHILD], env=kept | environment, **pipes)

    def __enter__(self):
        assert self.process.stdout.readline() == "ready\n"
        return self

    def __exit__(self, *error):
        self.process.stdin.close()
        self.process.stdout.close()
        assert self.process.wait(60) == 0 or any(error)

    def ask(self, name, **options):
        self.process.stdin.write(json.dumps([name, options]) + "\n")
        self.process.stdin.flush()

    def answer(self):
        return json.loads(self.process.stdout.readline())

    def resolve(self, name, **options):
        self.ask(name, **options)
        return self.answer()


@pytest.fixture
def server():
    with Hub() as hub:
        threading.Thread(target=hub.serve_forever, args=(0.01,), daemon=True).start()
        yield hub
        hub.shutdown()


@pytest.mark.processes
def test_from_a_hub_and_from_its_cache(server, tmp_path):
    weights = {**SHARDS, "model.safetensors.index.json": INDEX.encode()}
    with Child(tmp_path, server.address) as child:
        # the tokenizer alone
        answer = child.resolve("org/sharded", tokenizer_only=True)
        assert answer["files"] == sorted(SMALL)
        assert server.fetched() == Counter([*SMALL])
        # then the rest; of the repository's two formats the safetensors, and no code
        answer = child.resolve("org/sharded")
        folder = Path(answer["folder"])
        assert answer["files"] == sorted({**SMALL, **weights})
        assert all((folder / name).read_bytes() == data for name, data in {**SMALL, **weights}.items())
        assert server.fetched() == Counter([*weights])
        # what the cache has is not asked for again
        assert child.resolve("org/sharded") == answer
        assert child.resolve("org/sharded", tokenizer_only=True) == answer
        assert child.resolve("org/sharded", revision=SHA) == answer
        assert server.asked == []
        # unless a shard is lost
        lost = folder / "model-00002-of-00002.safetensors"
        lost.resolve().unlink()
        lost.unlink()
        assert child.resolve("org/sharded") == answer
        assert server.fetched() == {lost.name: 1}
        assert lost.read_bytes() == SHARDS[lost.name]

        assert child.resolve("org/single")["files"] == sorted([*SMALL, "model.safetensors"])
        assert child.resolve("org/pickled")["files"] == sorted([*SMALL, *BIN])
        assert server.fetched() == Counter([*SMALL, "model.safetensors", *SMALL, *BIN])
        assert "files" in child.resolve("org/pickled")
        assert server.asked == []

        for name, options, words in (
            ("org/empty", {}, "has no weights"),
            ("org/absent", {}, "no folder org/absent here, and no readable model of that name on the hub"),
            ("org/coded", {}, "(401)"),
            ("org/sharded", {"revision": "v9"}, "no revision 'v9'"),
            ("org/gated", {}, "gated or private"),
            ("org/down", {}, "answered 500"),
            ("org/" + "x" * 100, {}, "nor a hub id"),
        ):
            error = child.resolve(name, **options).get("error", "")
            assert words in error, name
            assert "next: " in error
        assert not any(path.endswith(".py") for path in server.asked)

    # Without a server what is whole still comes from the cache, and the rest says why not.
    dead = "http://someone:secret@127.0.0.1:1"
    for environment, why in (({}, "cannot be reached"), ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set")):
        with Child(tmp_path, dead, **environment) as child:
            assert child.resolve("org/sharded") == answer
            for name in ("org/untouched", "org/gated"):
                error = child.resolve(name)["error"]
                assert why in error
                assert f"hf download {name}" in error
                assert "http://127.0.0.1:1" in error
                assert "secret" not in error
            # config and weights are there: a lost side file is no reason to stop
            side = folder / "tokenizer_config.json"
            blob = os.readlink(side)
            side.unlink()
            assert child.resolve("org/sharded")["folder"] == str(folder)
            side.symlink_to(blob)


@pytest.mark.processes
def test_two_processes_of_a_node_download_once(server, tmp_path):
    server.may_send_weights.clear()
    with Child(tmp_path, server.address) as one, Child(tmp_path, server.address) as two:
        one.ask("org/sharded")
        two.ask("org/sharded")  # both are at it before the first weight leaves the server
        server.may_send_weights.set()
        answer = one.answer()
        assert answer == two.answer()
    fetched = server.fetched()
    assert set(fetched) == {*SMALL, *SHARDS, "model.safetensors.index.json"}
    assert set(fetched.values()) == {1}


def test_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    (tmp_path / "org" / "file").touch()
    assert hub.resolve(str(tmp_path)) == tmp_path
    assert hub.resolve("org/name") == Path("org/name")  # a folder wins over a hub id
    assert hub.resolve("~/org/name") == tmp_path / "org" / "name"
    absent = ["./x", "../x", "x/", "/x/y", "~/x", "~nobody-here/x", "a/b/c", ".\\x", "x\\y/z", "plain", "", "org/file"]
    for name in absent:
        with pytest.raises(ConfigError, match=r"neither a folder here|is a file") as e:
            hub.resolve(name)
        assert e.value.where
        assert e.value.why
        assert e.value.do


def test_what_a_folder_lacks(tmp_path):
    def after(**files):
        for file in tmp_path.iterdir():
            file.unlink()
        for name, text in files.items():
            (tmp_path / name.replace("__", ".").replace("_of_", "-of-")).write_text(text)
        return hub.missing_files(tmp_path)

    index = json.dumps({"weight_map": {"a": "1-of-2.safetensors", "b": "2-of-2.safetensors"}})
    assert after() == ["config.json", "weights"]
    assert after(config__json="{}", model__safetensors="") == []
    assert after(config__json="{}", pytorch_model__bin="") == []
    assert after(model__safetensors="") == ["config.json"]
    assert hub.missing_files(tmp_path, tokenizer_only=True) == ["a tokenizer"]
    half = {"config__json": "{}", "1_of_2__safetensors": ""}
    assert after(**half) == ["weights"]
    assert after(**half, model__safetensors__index__json=index) == ["2-of-2.safetensors"]
    assert after(**half, model__safetensors__index__json="{") == ["a readable model.safetensors.index.json"]
    assert after(**half, model__safetensors__index__json=index, **{"2_of_2__safetensors": ""}) == []
