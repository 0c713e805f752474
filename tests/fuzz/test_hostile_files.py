"""Readers of foreign bytes: what fuzzing and hostile files found. Only our own errors, no waiting, no blow-up.

`tests/fuzz` looks for more (`make fuzz`); what it finds becomes a line here.
"""

import inspect
import io
import json
import os
import pickle
import signal
import socket
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.checkpoints import internlm2_weights, write_internevo, write_zero
from helpers.corpus import write_corpus
from safetensors.torch import save_file

from fuzz.targets import MARKS, NETWORK, archive
from xtuner.config.load import find, parse_option
from xtuner.core import hub
from xtuner.core.errors import CheckpointError, ConfigError, DataError, XTunerError
from xtuner.core.files import read_json, verify, write_manifest
from xtuner.core.foreign_inputs import open_regular, short_repr
from xtuner.core.pickles import load_tensors
from xtuner.core.system import sysinfo
from xtuner.data import load_intern_repo_tokenized_dataset, process_pool
from xtuner.data.format.file_order import read_order, walk_files
from xtuner.data.format.writer import write_bin
from xtuner.data.inspect.check_files import check_folder
from xtuner.data.tokenize.tokenize_files import tokenize
from xtuner.data.tokenize.tokenize_settings import TokenizeSettings
from xtuner.data.tokenizer import load_tokenizer
from xtuner.export.consolidate import consolidate
from xtuner.model import from_pretrained, from_scratch
from xtuner.model.weights import WeightFolder
from xtuner.train.checkpoints.checkpoint import read_trainer
from xtuner.train.checkpoints.work_dir_lock import WorkDirLock

Command = Callable[..., int]


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    """What waits for ever, or takes exponential time, fails here instead of holding the suite."""

    def fail(*_: object) -> None:
        raise TimeoutError("a reader hangs")

    old = signal.signal(signal.SIGALRM, fail)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, old)


def refused(action: Callable[[], Any], words: str, kind: type[XTunerError] = XTunerError) -> None:
    with pytest.raises(kind, match=words) as e:
        action()
    assert len(str(e.value)) < 3000


# ---- pipes, sockets, devices --------------------------------------------------------------------------------------


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    here = os.open(path.parent, os.O_RDONLY)  # the name of a socket is at most 107 bytes
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(f"/proc/self/fd/{here}/{path.name}")
    os.close(here)


def _device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.processes
@pytest.mark.parametrize("make", [_pipe, _socket, _device])
def test_only_regular_files_are_opened(
    make: Callable[[Path], None], tmp_path: Path, tiny: Path, tokenizer_folder: Path, xtuner: Command
) -> None:
    kind = {_pipe: "a named pipe", _socket: "a socket", _device: "a device"}[make]  # type: ignore[index]

    def at(name: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        make(path)
        return path

    folder = write_corpus(tmp_path / "data", 3, types=("en",))
    (folder / "en" / "a.bin").unlink()
    at("data/en/a.bin")
    assert any(row.file == "en/a.bin" and kind in row.what for row in check_folder(folder, workers=1).rows)
    refused(lambda: load_intern_repo_tokenized_dataset(folder), kind, DataError)
    (folder / "en" / "a.bin").unlink()
    (folder / "en" / "b.bin.meta").unlink()
    at("data/en/b.bin.meta")
    assert any(kind in row.what for row in check_folder(folder, fix_meta=True, workers=1).rows)
    refused(lambda: read_order(at("order.txt"), folder), kind, ConfigError)
    inputs = TokenizeSettings(str(tokenizer_folder), "txt")
    refused(lambda: tokenize([str(at("texts/x.txt").parent)], str(tmp_path / "out"), inputs, workers=1), kind)
    refused(lambda: tokenize([str(at("x.txt"))], str(tmp_path / "out"), inputs, workers=1), kind, DataError)
    refused(lambda: read_json(at("x.json")), kind, CheckpointError)
    refused(lambda: verify(at("c/manifest.json").parent), kind, CheckpointError)
    refused(lambda: load_tensors(at("a.pth")), kind, CheckpointError)
    for name in ("model.safetensors", "pytorch_model.bin", hub.INDEX):
        refused(lambda name=name: WeightFolder(at(f"w{len(name)}/{name}").parent).shapes, kind, CheckpointError)
    refused(lambda: load_tokenizer(at("t/tokenizer.model").parent), "neither tokenizer.model nor", ConfigError)
    refused(lambda: xtuner("check-cfg", at("config.py")), "no config file", ConfigError)
    refused(lambda: xtuner("convert", "weights", at("a.pth"), tmp_path / "o.safetensors"), "not a file")
    refused(lambda: from_pretrained(str(at("m/config.json").parent)), kind, CheckpointError)
    (work_dir := at("w/last_checkpoint").parent).joinpath("2026/vis_data").mkdir(parents=True)
    words = ("train", tiny, "--work-dir", work_dir)
    refused(lambda: xtuner(*words, "--resume"), "not a complete checkpoint", CheckpointError)
    with pytest.raises(OSError, match=kind):
        WorkDirLock(at("w/.lock").parent)
    with pytest.raises(IsADirectoryError):
        open_regular(tmp_path)


# ---- pickles ------------------------------------------------------------------------------------------------------


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


# a tuple of 60 lists, each of which mentions the one before twice: `repr` needs 2^60 steps
BOMB = b"(]q\0" + b"".join(b"](h%ch%ceq%c" % (i, i, i + 1) for i in range(60)) + b"t"
STORAGE = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\x06tQ"
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"
PAIRS = b"](" + (text("k") + b"K\1\x86") * 5000 + b"eq\0"
FROZEN = b"".join(b"(h%ch%c\x85\x91q%c" % (n - 1, n - 1, n) if n else b"(K\1\x91q\0" for n in range(40))
SMALL_BOMBS: dict[str, tuple[bytes, str]] = {
    "size": (REBUILD + b"(" + STORAGE + b"K\0" + BOMB + b"\x85K\1\x85\x89}tR", "a tensor of size"),
    "strides": (REBUILD + b"(" + STORAGE + b"K\0K\1\x85" + BOMB + b"\x85\x89}tR", "strides"),
    "a class": (b"ctorch._tensor\n_rebuild_from_type_v2\n(" + REBUILD + BOMB + b")}tR", "of the class"),
    "an encoding": (b"c_codecs\nencode\n(" + text("a") + BOMB + b"tR", "in the encoding"),
    "a key": (b"}" + BOMB + b"K\1s", "as a key"),
    "a key of a tuple": (b"}" + BOMB + b"\x85K\1s", "as a key"),
    "keys with one hash": (b"}(" + b"".join(b"\x8a\x0a" + (n * (2**61 - 1)).to_bytes(10, "little") + b"N"
                                            for n in range(1, 20000)) + b"u", "as a key"),
    "equal frozen sets": (b"}(" + FROZEN + b"N" + FROZEN + b"Nu", "as a key"),
    "a dict built over and over": (PAIRS + b"ccollections\nOrderedDict\nq\1" + b"h\1h\0\x85R" * 5000, "too many times"),
    "a set built over and over": (PAIRS + b"cbuiltins\nset\nq\1" + b"h\1h\0\x85R" * 5000, "too many times|as a key"),
    "bytes made over and over": (text("a" * 9000) + b"q\0c_codecs\nencode\nq\1" + b"h\1h\0\x85R" * 5000,
    "too many times"),
    "a long name": (b"\x80\4" + text("a" * 9000) + b"q\0" + b"h\0h\0\x93" * 5000, "refers to"),
    "many arguments": (b"(" + b"N" * 9000 + b"tq\0" + REBUILD + b"q\1" + (b"h\1h\0R") * 3000, "over and over|damaged"),
    "a wide tensor": (REBUILD + b"(" + STORAGE + b"K\0(" + b"K\1" * 70 + b"t(" + b"K\1" * 70 + b"t\x89}tR",
    "a tensor of size"),
    "a large tensor": (REBUILD + b"(" + STORAGE + b"K\0J\xff\xff\xff\x7f\x85K\0\x85\x89}tR",
    r"in a file of [\d,]+ bytes"),
}  # fmt: skip


@pytest.mark.parametrize("name", SMALL_BOMBS)
def test_small_pickles_that_describe_large_things(name: str, tmp_path: Path) -> None:
    """Refused in time and memory that go with their size, opaque or not; the message is short, too."""
    code, words = SMALL_BOMBS[name]
    path = tmp_path / "a.pth"
    path.write_bytes(archive(b"\x80\2" + code + b".", [bytes(24)]))
    refused(lambda: load_tensors(path), words, CheckpointError)
    if name != "a long name":
        refused(lambda: load_tensors(path, opaque=True), words, CheckpointError)
    else:  # 5,000 placeholders, whose names together are 500 times the file
        assert len(load_tensors(path, opaque=True).name) <= 2001


def test_members_of_a_zip_share_no_bytes(tmp_path: Path) -> None:
    """200 members of 200 kB in a file of 250 kB; and one that begins where another does."""
    tensor = b"".join(
        text(f"t{i}") + REBUILD + b"(" + STORAGE.replace(text("0"), text(str(i))).replace(b"K\6", b"M\x50\xc3")
        + b"K\0M\x50\xc3\x85K\1\x85\x89}tR" for i in range(200)
    )  # fmt: skip
    code, data = b"\x80\2}(" + tensor + b"u.", bytes(200_000)

    def write(begins: Callable[[int], int]) -> None:
        """data.pkl, 200 headers of members one after the other, and bytes for the last of them alone."""
        names = ["a/data.pkl", *(f"a/data/{i:03d}" for i in range(200))]
        body = ends = b""
        for number, name in enumerate(names):
            size = len(code if number == 0 else data)
            fields = struct.pack("<HHHHHIIIHH", 20, 0, 0, 0, 0, 0, size, size, len(name), 0)
            ends += b"PK\1\2\x14\0" + fields + struct.pack("<HHHII", 0, 0, 0, 0, begins(len(body))) + name.encode()
            body += b"PK\3\4" + fields + name.encode() + (code if number == 0 else b"")
        size = len(names)
        body += data
        last = struct.pack("<HHHHIIH", 0, 0, size, size, len(ends), len(body), 0)
        path.write_bytes(body + ends + b"PK\5\6" + last)

    path = tmp_path / "shared.pth"
    code = code.replace(text("0"), text("000"))
    for i in range(1, 200):
        code = code.replace(text(str(i)) + text("cpu"), text(f"{i:03d}") + text("cpu"))
    first = 30 + len("a/data.pkl") + len(code)
    write(lambda at: at)
    assert len(zipfile.ZipFile(path).namelist()) == 201
    refused(lambda: load_tensors(path), "shares bytes with another member", CheckpointError)
    refused(lambda: consolidate(path, tmp_path / "o.safetensors"), "shares bytes", CheckpointError)
    write(lambda at: min(at, first))
    refused(lambda: load_tensors(path), "two members begin at the same byte", CheckpointError)


def test_a_value_is_shown_by_its_beginning() -> None:
    nested: list[Any] = []
    for _ in range(100):
        nested = [nested, nested]
    for value, shown in (
        (nested, "[[[…], […]], [[…], […]]]"), ("a" * 10**6, "'" + "a" * 120 + "'…"),
        (10**5000, "an integer of 16610 bits"),
        ({"a": (1,), "b": {2}, 3: None}, "{'a': (1,), 'b': {2}, 3: None}"), (list(range(99)), "[0, 1, 2, 3, …]"),
        (torch.ones(2**20), "<Tensor>"), ([], "[]"), (b"\0", "b'\\x00'"), (1.5, "1.5"), (True, "True"),
        (int, "<class int>"),
        (frozenset(), "frozenset()"), ((), "()"), ({}, "{}"),
    ):  # fmt: skip
        assert short_repr(value) == shown
        assert len(short_repr(["b" * 99] * 9, 50)) < 60


# ---- other tools' checkpoints -------------------------------------------------------------------------------------


def test_files_of_torch_that_hold_something_else(tmp_path: Path) -> None:
    cases: list[tuple[str, Any, str]] = [
        ("list", [1], "does not contain tensors by name"), ("text", "x", "does not contain tensors by name"),
        ("empty", {}, "does not contain tensors by name"), ("numbers", {1: torch.ones(1)}, "contain tensors by name"),
        ("inner", {"a": {"b": 1}}, "'a' is not a tensor"),
    ]  # fmt: skip
    for name, value, words in cases:
        folder = tmp_path / name
        folder.mkdir()
        torch.save(value, folder / "pytorch_model.bin")
        refused(lambda folder=folder: WeightFolder(folder).shapes, words, CheckpointError)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("optimizer_state_dict.partition_count", [10**30], "the number of ranks"),
        ("optimizer_state_dict.partition_count", 10**5 + 1, r"100000 of 100001 \*_optim|99999 of 100001 \*_optim"),
        ("optimizer_state_dict.base_optimizer_state", {"state": {0: {"step": 10**400}}}, "different steps"),
        ("optimizer_state_dict.base_optimizer_state", {"state": {0: {"step": torch.ones(1) * 1j}}}, "different steps"),
        ("optimizer_state_dict.base_optimizer_state", torch.ones(2), "different steps"),
        ("frozen_param_shapes", torch.ones(0), "does not contain param_shapes"),
        ("shared_params", torch.ones(2), "does not contain shared_params"),
        ("module", torch.ones(2), "does not contain a module"),
        ("optimizer_state_dict.param_alignment_paddings", [[2**80] * 7, [2**80] * 3], "describes"),
        ("param_shapes.0", {"a": (2**40, 2**40)}, "gives no shape for 'a'"),
        ("param_shapes.0", {"a": (10**5000,)}, "gives no shape for 'a'"),
        ("param_shapes.0", {"a": (1,) * 99}, "gives no shape for 'a'"),
        ("param_shapes.0", {("a",): (1,)}, r"gives no shape for \('a',\)"),
        ("param_shapes.1", "again", "a parameter in two groups"),
    ],
)
def test_crafted_files_of_deepspeed(key: str, value: Any, words: str, tmp_path: Path) -> None:
    folder = write_zero(tmp_path / "z", internlm2_weights(), 2, 2, padding=1)
    first = "optimizer" if key.startswith("optimizer") else "mp_rank"
    path = next(p for p in sorted(folder.iterdir()) if ("optim" if first == "optimizer" else "model") in p.name)
    content = torch.load(path, weights_only=False)
    *above, last = key.split(".")
    at = content
    for part in above:
        at = at[part]
    place = int(last) if isinstance(at, list) else last
    at[place] = at[0] if value == "again" else value
    torch.save(content, path)
    refused(lambda: consolidate(folder, tmp_path / "o.safetensors"), words, CheckpointError)


def test_crafted_files_of_internevo(tmp_path: Path) -> None:
    for i, (changes, words) in enumerate((
        ({"no_bias": torch.ones(2)}, "no_bias = <Tensor>"), ({"num_layers": 10**5000}, "num_layers = an integer of"),
        ({"norm_head": [[]]}, r"norm_head = \[\[\]\]"), ({"hidden_size": 0}, "hidden_size = 0"),
        ({"num_kv_attention_heads": 2**31}, "num_kv_attention_heads"), ({"num_attention_heads": 7}, "describes"),
    )):  # fmt: skip
        folder = write_internevo(tmp_path / str(i), internlm2_weights(), 1, [1], **changes)
        refused(lambda folder=folder: consolidate(folder, tmp_path / "o.safetensors"), words, CheckpointError)
    folder = write_internevo(tmp_path / "far", internlm2_weights(), 1, [1])
    (folder / "model_tp0_pp0.pt").rename(folder / f"model_tp{'9' * 200}_pp0.pt")
    refused(lambda: consolidate(folder, tmp_path / "o.safetensors"), r"model_tp0_pp0\.pt is missing", CheckpointError)


# ---- models -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"num_attention_heads": 0}, "num_attention_heads"), ({"hidden_size": None}, "hidden_size"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"), ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"vocab_size": "7"}, "vocab_size"), ({"vocab_size": 7.5}, "vocab_size"),
        ({"intermediate_size": [1]}, "intermediate_size"),
        ({"intermediate_size": -1}, "intermediate_size"), ({"num_key_value_heads": 2}, "num_key_value_heads"),
        ({"head_dim": 3}, "head_dim"), ({"head_dim": None, "hidden_size": 9}, "hidden_size"),
        ({"head_dim": None, "hidden_size": 7}, "hidden_size"), ({"rms_norm_eps": "x"}, "rms_norm_eps"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"), ({"rope_theta": [1]}, "rope_theta"),
        ({"rope_theta": -1}, "rope_theta"),
        ({"rope_scaling": []}, ""), ({"rope_scaling": [1]}, "rope_scaling"),
        ({"rope_scaling": {"type": [1]}}, "rope_scaling"),
        ({"rope_scaling": {"type": "linear", "factor": "x"}}, "rope_scaling.factor"),
        *(({"rope_scaling": {"type": kind, "factor": 0}}, "rope_scaling.factor") for kind in ("linear", "dynamic")),
        ({"rope_parameters": 1}, "rope_parameters"),
        ({"eos_token_id": []}, "eos_token_id"), ({"bos_token_id": {}}, "bos_token_id"),
        ({"pad_token_id": "x"}, "pad_token_id"),
        ({"pad_token_id": 7}, "pad_token_id"), ({"hidden_act": {}}, "hidden_act"),
        ({"tie_word_embeddings": 0}, "tie_word_embeddings"),
        ({"attention_bias": "false"}, "attention_bias"), ({"model_type": []}, "model_type"),
        ({"max_position_embeddings": 2**50}, "max_position"), ({"xtuner_network": [1]}, "xtuner_network"),
        *(({"xtuner_network": {key: value}}, f"xtuner_network.{key}{more}") for key, value, more in (
            ("qk_norm", 1, ""), ("mlp_bias", "true", ""), ("later", True, ""), ("sliding_window", 0, ""),
            ("sliding_window", True, ""), ("sliding_layers", [True] * 9, ""), ("sliding_layers", {}, ""),
            ("rope_scaling", {"rope_type": "longrope", "factor": 2.0}, ""),
            ("rope_scaling", {"rope_type": "yarn"}, ".factor"),
            ("rope_scaling", {"rope_type": "yarn", "factor": 2.0, "beta_fast": 0}, ".beta_fast"),
            ("rope_scaling", {"rope_type": "yarn", "factor": 2.0, "truncate": 1}, ".truncate"),
            ("rope_scaling", {"rope_type": "llama3", "factor": 2, "low_freq_factor": 1, "high_freq_factor": 1},
             ".high_freq_factor"),
            ("rope_scaling", {"rope_type": "llama3", "factor": 2, "original_max_position_embeddings": 1.5},
             ".original_max_position_embeddings"),
        )),
    ],
)  # fmt: skip
def test_absurd_values_in_config_json(change: dict[str, Any], where: str, tmp_path: Path) -> None:
    """The key is named. `rope_scaling: []` is none."""
    (tmp_path / "config.json").write_text(json.dumps({**NETWORK, **change}))
    if not where:
        assert from_pretrained(str(tmp_path)).config.rope_scaling is None
        return
    with pytest.raises(ConfigError) as e:
        from_pretrained(str(tmp_path))
    assert e.value.where.startswith(f"{tmp_path}/config.json: {where}")


def test_files_that_are_not_a_config_json(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    for content, words in (
        ("[]", r"contains \[\], not an object"), ("null", "contains None"), ("3", "contains 3"), ("{}", "type ''"),
        ("[" * 100_000, "nested too deeply"), ('{"a": ' * 3000 + "1" + "}" * 3000, "nested too deeply"),
        ("9" * 5000, "is not JSON"), ('{"vocab_size": ' + "9" * 5000 + "}", "is not JSON"), ("\ufeff{}", "is not JSON"),
    ):  # fmt: skip
        path.write_text(content)
        refused(lambda: from_pretrained(str(tmp_path)), words, ConfigError if content == "{}" else CheckpointError)
    path.write_bytes(b"\xff{}")
    refused(lambda: from_pretrained(str(tmp_path)), "is not JSON", CheckpointError)
    with pytest.raises(ConfigError) as e:  # a config's own setting is named, not a file that is not there
        from_scratch(vocab_size=8, hidden_size=9, intermediate_size=8, num_hidden_layers=1, num_attention_heads=3)
    assert e.value.where == "model.hidden_size"


def test_indexes_of_weights(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    for content, words in (
        ([], "does not map"), ({}, "does not map"), ({"weight_map": []}, "does not map"),
        ({"weight_map": {}}, "does not map"),
        ({"weight_map": {"a": 1}}, "does not map"),
        ({"weight_map": {"a": None, "b": "x"}}, "does not map"), ({"weight_map": {"a": ["x"]}}, "does not map"),
        ({"weight_map": {"a": "x" * 300}}, "which is missing"), ({"weight_map": {"a": "../x"}}, "outside its folder"),
        ({"weight_map": {"a": "a\0b"}}, "which is missing"), ({"weight_map": {"a": "\ud800"}}, "which is missing"),
        ({"weight_map": {"a": ""}}, "which is missing"), ({"weight_map": {"a": "."}}, "outside|missing"),
    ):  # fmt: skip
        (tmp_path / hub.INDEX).write_text(json.dumps(content))
        refused(lambda: WeightFolder(tmp_path), words, CheckpointError)
        assert hub.missing_files(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / hub.INDEX).unlink()
    for header in (b"[]", b'{"a": 1}', b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}', b"[" * 9000):
        (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + whole[-4:])
        refused(lambda: WeightFolder(tmp_path).shapes, "cannot be read as safetensors", CheckpointError)


def test_manifests_and_trainer_json(tmp_path: Path) -> None:
    entry: dict[str, Any] = {"bytes": 1, "sha256": "x"}
    for content, words in (
        ([], "not written by xtuner"), ({"files": []}, "not written by xtuner"),
        ({"files": {"a": 1}}, "no size and sha256 of 'a'"),
        ({"files": {}, "kind": [[]]}, "not written by xtuner"), ({"files": {"\ud800": entry}}, "altered"),
        ({"files": {"a": {**entry, "bytes": True}}}, "no size"), ({"files": {"a" * 9000: {}}}, "no size"),
        ({"files": {"/etc/passwd": entry}}, "outside"), ({"files": {"../" * 3000: entry}}, "outside"),
    ):  # fmt: skip
        (tmp_path / "manifest.json").write_text(json.dumps(content))
        refused(lambda: verify(tmp_path), words, CheckpointError)
    for name in ("x" * 300, "a/" * 3000, "a\0b", "."):
        write_manifest(tmp_path, {name: entry})
        refused(lambda: verify(tmp_path), "is missing", CheckpointError)
    for text in (
        "[" * 100_000,
        '{"files": ' * 2000 + "1" + "}" * 2000,
        "9" * 5000,
        '{"kind": ' + "[" * 900 + "]" * 900 + "}",
    ):
        (tmp_path / "manifest.json").write_text(text)
        (tmp_path / "trainer.json").write_text(text)
        refused(lambda: verify(tmp_path), "nested too deeply|is not JSON|not written by xtuner", CheckpointError)
        refused(lambda: read_trainer(tmp_path), "nested too deeply|is not JSON|format of this version", CheckpointError)


# ---- data ---------------------------------------------------------------------------------------------------------


def test_metas_that_do_not_fit_their_text(tmp_path: Path) -> None:
    """All are told at once, by `data check` in the same words, and `--fix-meta` mends each."""
    file, meta = tmp_path / "a.bin", tmp_path / "a.bin.meta"
    write_bin(file, [[1, 2, 3], [4, 5]])
    right, table = meta.read_bytes(), np.load(meta)

    def saved(array: Any) -> bytes:
        out = io.BytesIO()
        np.save(out, array)
        return out.getvalue()

    def header(**changes: str) -> bytes:
        words = right[10:128].decode()
        for old, new in changes.items():
            assert old != new
            words = words.replace({"descr": "<i8", "shape": "(2, 2)"}[old], new)
        return right[:8] + struct.pack("<H", len(words)) + words.encode() + right[128:]

    large = table.copy()
    large[1, 1] = 2**40
    for content, words in (
        (right + b"12345", "longer than its array: 165 bytes instead of 160"), (right[:-1], "cut short"),
        (saved(large), r"document 1 has 1,099,511,627,776 tokens by its meta, and the \.bin has 19 bytes"),
        (saved(np.concatenate([table] * 9)), r"counts at least 45 tokens, and the \.bin has \d+ bytes"),
        (saved(table.astype("S8")), "not numbers"), (saved(table.astype(complex)), "not numbers"),
        (header(descr="|S0"), "not numbers"), (header(descr="<V5"), "not numbers"),
        (header(descr="<i9"), "not an npy array"),
        (header(shape=f"({'9' * 5000},)"), "not an npy array"),
        (header(shape="(99999999999999999999, 2)"), "cut short"),
        (header(shape="(" + "1, " * 70 + ")"), "longer|not an npy array"),
        (header(shape="(4611686018427387904, 0)"), "longer"),
    ):  # fmt: skip
        meta.write_bytes(content)
        refused(lambda: load_intern_repo_tokenized_dataset(tmp_path), words, DataError)
        [row] = check_folder(tmp_path, fix_meta=True, workers=1).rows
        assert row.kind == "fixed"
        assert meta.read_bytes() == right
    long = tmp_path / ("x" * 251 + ".bin")  # its meta's name would be longer than names may be
    long.write_bytes(file.read_bytes())
    refused(lambda: load_intern_repo_tokenized_dataset(tmp_path), "has no meta", DataError)


def test_lines_that_are_not_documents(tmp_path: Path) -> None:
    for line, words in (
        (b"9" * 5000, "is not JSON"), (b"[" * 100_000, "nested too deeply"),
        (b'{"tokens": [' + b"[" * 900 + b"]" * 900 + b"]}", r"a token is \[\["),
        (b'{"tokens": ["' + b"x" * 9000 + b'"]}', "a token is 'xxx"),
        (b'{"tokens": [' + b"9" * 5000 + b"]}", "is not JSON"),
    ):  # fmt: skip
        (tmp_path / "a.bin").write_bytes(line + b"\n")
        [row] = [row for row in check_folder(tmp_path, workers=1).rows if "byte 0" in row.what]
        assert len(row.what) < 400
        assert any(word in row.what for word in words.replace("\\", "").split("|")), row.what


def test_names_in_a_data_order(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.bin").touch()
    order = tmp_path / "order.txt"
    for entries, words in (
        (["y" * 300], "no entry"), (["a.bin", "y" * 300], "1 files of the data order do not exist"),
        (["a.bin", "a\0b"], "not exist"),
        (["d/" * 3000 + "x", "a.bin"], "not exist"), (["../" * 3000], "leaves its folder"),
        (["/" * 9000 + "x"], "leaves"),
    ):  # fmt: skip
        order.write_text("\n".join(entries))
        refused(lambda: read_order(order, tmp_path / "data"), words, ConfigError)
    refused(lambda: read_order("o" * 300, tmp_path / "data"), "cannot be read", ConfigError)
    refused(lambda: read_order("a\0b", tmp_path / "data"), "cannot be read", ConfigError)
    refused(lambda: load_intern_repo_tokenized_dataset("d" * 300), "does not exist", ConfigError)
    refused(lambda: find("c" * 300), "no config file", ConfigError)
    refused(lambda: find("~nobody-of-that-name/x"), "no config file", ConfigError)
    refused(lambda: load_intern_repo_tokenized_dataset("~nobody-of-that-name/x"), "does not exist", ConfigError)


def test_deep_folders(tmp_path: Path) -> None:
    """Folders nest deeper than functions may; their order is that of the walk."""
    deep = "d/" * 300
    (tmp_path / deep).mkdir(parents=True)
    (tmp_path / deep / "x.bin").touch()
    (tmp_path / "a.bin").touch()
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack(0)) + 250)  # folders 1,200 deep would take seconds to make
    try:
        found, rows = list(walk_files(tmp_path)), check_folder(tmp_path, workers=1).rows
    finally:
        sys.setrecursionlimit(limit)
    assert found == ["a.bin", deep + "x.bin"]
    assert {row.file for row in rows} == set(found)


def test_tokenizer_files(tokenizer_folder: Path, tmp_path: Path) -> None:
    model = (tokenizer_folder / "tokenizer.model").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(model)
    for listed in (
        [], [1], {"x": {"content": "a"}}, {"1": []}, {"1": {"content": 3}}, {"1": {"content": ""}},
        {"9" * 20: {"content": "a"}},
        {"-1": {"content": "a"}}, {"1": {"content": "\ud800"}}, "x",
    ):  # fmt: skip
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({**MARKS, "added_tokens_decoder": listed}))
        if listed:
            refused(lambda: load_tokenizer(tmp_path), "added_tokens_decoder has", ConfigError)
        else:
            assert load_tokenizer(tmp_path).encode("x")
    (tmp_path / "tokenizer_config.json").unlink()
    for old, new in ((b"<unk>", b"<un\x85>"), (b"\n\x05<unk>", b"\n\x95<unk>")):
        assert old in model
        (tmp_path / "tokenizer.model").write_bytes(model.replace(old, new, 1))
        refused(lambda: load_tokenizer(tmp_path), r"tokenizer\.model cannot be read", ConfigError)
    (tmp_path / "tokenizer.model").unlink()
    words = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {"a": 0, "b": 9}, "merges": []}}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(words))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "\ud800", "eos_token": []}))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (10, None, None)  # ids may leave gaps
    broken = {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "a"]], "continuing_subword_prefix": "##"}
    path.write_text(json.dumps({**words, "model": broken}))
    refused(lambda: load_tokenizer(tmp_path), r"tokenizer\.json cannot be read", ConfigError)  # a panic of Rust


def test_records_of_what_was_tokenized(tokenizer_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text\n")
    again = [str(tmp_path / "a.txt")], str(tmp_path / "out"), TokenizeSettings(str(tokenizer_folder))
    assert tokenize(*again, workers=1).files == 1
    record = tmp_path / "out" / "made_from" / "en" / "a.json"
    right = json.loads(record.read_text())
    for change in ({"settings": 1.5}, {"settings": []}, {"outputs": 3}, {"outputs": [{}]}, {"outputs": None}):
        record.write_text(json.dumps({**right, **change}))
        refused(lambda: tokenize(*again, workers=1), "record of what it was made from is damaged", DataError)
    record.write_text(json.dumps(right))
    assert tokenize(*again, workers=1).skipped == 1


def test_caches_with_crafted_heads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are made again; nothing is read by what they say."""
    from xtuner.data.packing import document_order
    from xtuner.data.packing.pack import PackedDataset

    monkeypatch.setattr(document_order, "SMALL", 0)
    folder = write_corpus(tmp_path / "data", 10, types=("en",))
    dataset = PackedDataset(load_intern_repo_tokenized_dataset(folder), 16)
    expected = [dataset[i]["input_ids"].tolist() for i in range(len(dataset))]
    from xtuner.data.inspect.build_caches import build_caches

    build_caches(load_intern_repo_tokenized_dataset(folder), 1024, workers=1)
    caches = {p: p.read_bytes() for p in (folder / ".xtuner-cache").rglob("*") if p.is_file() and p.stat().st_size}
    assert len(caches) == 4  # two files' tokens, the catalog, the order
    for path, whole in caches.items():
        begin = whole.index(b"{")
        head = json.loads(whole[begin:4096])
        heads = [[], None, {}, *({k: v for k, v in head.items() if k != key} for key in head)]
        heads += [{**head, key: value} for key in head for value in (None, -1, 2**70, [], {}, "x", 0.5, True)]
        texts = [json.dumps(h).encode() for h in heads] + [b"[" * 4000, b"9" * 4000]
        for text in texts[:: max(len(texts) // 16, 1)] + texts[-2:]:
            path.write_bytes((whole[:begin] + text).ljust(4095)[:4095] + b"\n" + whole[4096:])
            dataset = PackedDataset(load_intern_repo_tokenized_dataset(folder), 16)
            assert [dataset[i]["input_ids"].tolist() for i in range(len(dataset))] == expected
        path.write_bytes(whole)


# ---- options ------------------------------------------------------------------------------------------------------


def test_values_of_options() -> None:
    for value, words in (
        ("{[]:1}", "unhashable"), ("-" * 3000 + "1", "too deeply"), ("[" * 3000, "too deeply"),
        ("(" * 99 + "1" + ")" * 99, "too deeply"),
        ("+ " * 3000 + "1", "too deeply"), ("not " * 9000 + "1", "too deeply"), ("1" + "+1j" * 9000, "too deeply"),
        ("a." * 9000 + "b", "too deeply"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=words) as e:
            parse_option(f"lr={value}")
        assert e.value.where == "--cfg-options lr"
        assert len(str(e.value)) < 400
    for value, expected in (
        ("[[a,b],[c]]", [["a", "b"], ["c"]]), ("[" * 20 + "]" * 20, None), ("a-b-c", "a-b-c"), ("{", "{"),
        ("(a, -1)", ("a", -1)), ("x" * 9000, "x" * 9000),
    ):  # fmt: skip
        found = parse_option(f"k={value}")[1]
        assert expected is None or found == expected


def test_a_long_value_is_not_repeated_in_messages(tmp_path: Path, xtuner: Command) -> None:
    (tmp_path / "config.py").write_text("lr = 1\nbetas = [1]\nend = lr * 0.5 * betas\n")
    options = ("check-cfg", tmp_path / "config.py", "--cfg-options")
    refused(lambda: xtuner(*options, "lr=" + "x" * 9000), r"with betas = \[1\] and lr = 'xxx", ConfigError)
    refused(lambda: xtuner(*options, "end=1", "lr=" + "x" * 9000, "lr.a.b=1"), "no 'a' in|has no parts", ConfigError)
    refused(lambda: xtuner(*options, "end=1", "betas.²=1"), "no entry '²' in a list of 1", ConfigError)


def test_a_quota_of_cpus_bounds_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `xtuner doctor` counts them: a container of one CPU on a host of 64 gets one worker."""
    monkeypatch.setattr(sysinfo.Path, "read_text", lambda self: "100000 100000\n")
    assert process_pool.usable_workers(None) == sysinfo.usable_cpus() == 1
    assert process_pool.usable_workers(5) == 5
    assert pickle.loads(pickle.dumps(process_pool.usable_workers))(2) == 2
