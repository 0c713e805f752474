"""What is read, and how inputs for it are made. A case is files by name, or options; `read` raises our errors alone."""

import ast
import io
import json
import os
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from helpers.checkpoints import internlm2_weights, write_internevo, write_zero
from helpers.corpus import train_tokenizer
from helpers.token_files import draw_documents, write_jsonl
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from safetensors.torch import save

from fuzz.strategies import ABSURD, DEEP, changed, json_bytes, mutated, one_changed, pickles
from xtuner.compat.translate import load
from xtuner.config.check import find_mistakes
from xtuner.config.load import SHIPPED
from xtuner.core import hub
from xtuner.core.errors import ConfigError, XTunerError
from xtuner.core.files import file_entry, verify, write_manifest
from xtuner.core.pickles import load_tensors
from xtuner.data import load_intern_repo_tokenized_dataset, load_token_files
from xtuner.data.chat_template import INTERNLM2_MARKS
from xtuner.data.format.file_order import read_order
from xtuner.data.format.writer import write_bin
from xtuner.data.inspect.build_caches import build_caches
from xtuner.data.inspect.check_files import check_folder
from xtuner.data.inspect.check_sources import check_sources
from xtuner.data.inspect.statistics import compute_statistics
from xtuner.data.packing import document_order
from xtuner.data.packing.pack import PackedDataset
from xtuner.data.sources.columns import Columns
from xtuner.data.sources.convert import convert
from xtuner.data.sources.files import find_files
from xtuner.data.sources.megatron_writer import MegatronWriter
from xtuner.data.tokenize.tokenize_files import tokenize
from xtuner.data.tokenize.tokenize_settings import TokenizeSettings
from xtuner.data.tokenizer import load_tokenizer
from xtuner.export.consolidate import consolidate
from xtuner.families import FAMILIES, read_config
from xtuner.model import from_pretrained
from xtuner.model.weights import WeightFolder, hf_shapes
from xtuner.train.checkpoints.checkpoint import read_trainer
from xtuner.train.state import TrainState

Files = dict[str, bytes]
LAST_WEEK = 1_790_000_000 * 10**9  # ns; caches know files by their times


@dataclass(frozen=True)
class Target:
    name: str
    inputs: SearchStrategy[Any]
    right: Any  # a case that is read without an error
    read: Callable[[Path, Any], None]
    few: int = 150  # inputs that take 2 or 3 seconds, for `make test`
    may_exec: bool = False  # a config is a program


def targets(sandbox: Path) -> dict[str, Target]:
    """All of them. `sandbox`: a folder for what they share, such as a tokenizer."""
    shared = sandbox / "shared"
    shared.mkdir(exist_ok=True)
    document_order.SMALL = 0
    made = [
        _data(),
        _sources(shared),
        _caches(shared),
        _order(),
        _options(shared),
        _config(shared),
        _checkpoint(shared),
        _network(),
    ]
    made += [_weights(), _pickle(), _zip(), *_foreign(shared), *_tokenizers(shared), *_inputs(shared)]
    return {target.name: target for target in made}


def every(*steps: Callable[[], Any]) -> None:
    """All steps, whatever becomes of those before; then the last error."""
    error: XTunerError | None = None
    for step in steps:
        try:
            step()
        except XTunerError as e:
            error = e
    if error:
        raise error


# ---- data ---------------------------------------------------------------------------------------------------------

DOCUMENTS = [[1, -2, 3], [4] * 40, [], [-7, 99999999, 0], [2**31 - 1]]


def _pair(documents: list[list[int]]) -> tuple[bytes, bytes]:
    lines = [b'{"tokens": ' + json.dumps(d).encode() + b"}\n" for d in documents]
    starts = np.cumsum([0, *map(len, lines)])[:-1]
    out = io.BytesIO()
    np.save(out, np.stack((starts, [len(d) for d in documents]), axis=1))
    return b"".join(lines), out.getvalue()


def _read_data(folder: Path, case: Any = None) -> None:
    data = folder / "data"
    for path in data.rglob("*.bin*"):
        os.utime(path, ns=(LAST_WEEK, LAST_WEEK))

    def packs() -> None:
        dataset = PackedDataset(load_intern_repo_tokenized_dataset(data), 8)
        for i in range(min(len(dataset), 20)):
            dataset[i]

    every(
        lambda: check_folder(data, 92544, workers=1),
        packs,
        lambda: compute_statistics(load_intern_repo_tokenized_dataset(data), 8, workers=1),
        lambda: build_caches(load_intern_repo_tokenized_dataset(data), 1024, workers=1),
        packs,
        lambda: check_folder(data, fix_meta=True, workers=1),
        packs,
    )


def _data() -> Target:
    text, meta = _pair(DOCUMENTS)
    other = _pair([[5, 6]])
    right = {"data/a.bin": text, "data/a.bin.meta": meta, "data/b/c.bin": other[0], "data/b/c.bin.meta": other[1]}
    odd = [b'{"tokens": [1, 2.5]}\n', b'{"tokens": {"a": 1}}\n', b"[1, 2]\n", b'{"tokens": [true, "1", null]}\n']
    odd += [b'{"tokens": [' + d.encode() + b"]}\n" for d in DEEP] + [b'\xff\xfe{\x00"\x00', b'{"token": []}\n']
    texts = st.one_of(mutated(text), mutated(text), st.sampled_from(odd), st.sampled_from(odd).map(lambda b: text + b))
    rows = st.lists(st.tuples(*[st.sampled_from([0, 1, 15, -1, 2**31, 2**40, 2**62, -(2**63)])] * 2), max_size=40)
    dtypes = st.sampled_from(["<i8", "<i4", ">i8", "<u8", "<f8", "|b1", "<i2", "<c16", "|S8"])

    def header(rows: list[tuple[int, int]], dtype: str, shape: str) -> bytes:
        words = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
        body = np.array(rows or np.zeros((0, 2)), np.int64).tobytes()
        return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(words)) + words + body

    shapes = ["(5, 2)", "(2,)", "()", "(1, 2)", "(5, 2, 1)", "(99999999999999999999, 2)", "(0, 7)", f"({'9' * 5000},)"]
    shapes += ["(4611686018427387904, 0)", "(" + "1, " * 70 + ")", "(3, 5)"]
    metas = st.one_of(mutated(meta), mutated(meta), st.builds(header, rows, dtypes, st.sampled_from(shapes)))
    metas |= rows.map(lambda rows: header(rows, "<i8", f"({len(rows)}, 2)"))
    files = {"data/a.bin": texts, "data/a.bin.meta": metas, "data/b/c.bin.meta": mutated(other[1])}
    return Target("data", one_changed(files, right), right, _read_data, few=60)


def _sources(shared: Path) -> Target:
    """Token files of other tools, as far as no library of theirs reads them."""
    made = shared / "sources"
    write_jsonl(made / "jsonl" / "a.jsonl", documents := draw_documents(30))
    with MegatronWriter(made / "megatron" / "a.bin", "<u2") as writer:
        ids, learned = (np.array([v for d in documents for v in d[part]]) for part in (0, 1))
        writer.write(np.array([len(i) for i, _ in documents]), ids, learned.astype(bool))
        writer.commit()
    right = {p.relative_to(made).as_posix(): p.read_bytes() for p in made.rglob("*") if p.is_file()}
    files = {name: mutated(data) for name, data in right.items()}
    odd = [f'{{"input_ids": {value}}}\n'.encode() for value in (*map(json.dumps, ABSURD), *DEEP)]
    files["jsonl/a.jsonl"] = st.one_of(files["jsonl/a.jsonl"], st.sampled_from(odd))

    def read(folder: Path, case: Any) -> None:
        def packs(kind: str) -> None:
            dataset = PackedDataset(load_token_files(folder / kind), 8)
            for i in range(len(dataset)):
                dataset[i]

        def rest(kind: str) -> None:
            found = find_files(folder / kind, "auto", Columns())
            check_sources(found, 92544, workers=1)
            convert(found, folder / f"{kind} converted", "internevo", lossy=True, overwrite=True, workers=1)

        every(*(lambda k=k, step=step: step(k) for k in ("jsonl", "megatron") for step in (packs, rest, packs)))

    return Target("sources", one_changed(files, right), right, read, few=60)


def _caches(shared: Path) -> Target:
    data = shared / "cached" / "data"
    write_bin(data / "a.bin", DOCUMENTS)
    _read_data(data.parent)
    right = {f"data/{p.relative_to(data).as_posix()}": p.read_bytes() for p in data.rglob("*") if p.is_file()}
    caches = {name: data for name, data in right.items() if ".xtuner-cache" in name and data}

    def head(whole: bytes) -> SearchStrategy[bytes]:
        """A changed header line in front of the right body."""
        first, begin = whole[:4096], whole[:4096].index(b"{")
        values = json_bytes(json.loads(first[begin:]))
        return values.map(lambda new: (first[:begin] + new).ljust(4095)[:4095] + b"\n" + whole[4096:])

    files = {name: st.one_of(mutated(whole), head(whole)) for name, whole in caches.items()}
    assert len(files) == 3, sorted(files)
    return Target("caches", one_changed(files, right), right, _read_data, few=60)


def _order() -> Target:
    names = ["a.bin", "b/c.bin", "b/é.bin"]
    right = {f"data/{name}": b"" for name in names} | {"order.txt": "\n".join(names).encode()}
    words = [*names, "", " ", ".", "..", "../a.bin", "/", "a" * 300, "d/" * 300, "a\0b", "\ufeff", "~", "data/a.bin"]
    lines = st.lists(st.sampled_from(words), max_size=6).map(lambda words: "\n".join(words).encode())
    inputs = st.one_of(mutated(right["order.txt"]), lines).map(lambda order: {**right, "order.txt": order})

    def read(folder: Path, case: Any) -> None:
        os.makedirs(folder / "data", exist_ok=True)
        every(*(lambda f=f: read_order(folder / "order.txt", folder / f) for f in ("data", "data/b")))

    return Target("order", inputs, right, read)


# ---- configs ------------------------------------------------------------------------------------------------------


def _small_config(shared: Path) -> str:
    folder = shared / "corpus"
    write_bin(folder / "a.bin", DOCUMENTS)
    text = (SHIPPED / "internlm2_tiny_w_tokenized_dataset.py").read_text()
    text = text.replace("/path/to/your/dataset", str(folder))
    return text.replace("/path/to/your/tokenizer", str(_sentencepiece(shared)))


def _read_options(config: Path, options: list[str]) -> None:
    found = find_mistakes(load(str(config), options), paths=True)
    if found:
        raise ConfigError("\n".join(map(str, found))[:10_000])


def _options(shared: Path) -> Target:
    config = shared / "options.py"
    config.write_text(_small_config(shared))
    keys = (
        "lr data_order_path max_length save_steps accumulative_counts max_epochs warm_up_ratio betas load_from resume "
    )
    keys += "work_dir dataset_folder tokenizer_path randomness.seed optim_wrapper.clip_grad.max_norm model.hidden_size "
    keys += (
        "param_scheduler.0.end custom_hooks param_scheduler.² model.² default_hooks.checkpoint.interval x. .x a.b.c "
    )
    keys += "train_dataloader.num_workers model train_dataloader.dataset model.type optim_wrapper.type "
    keys += "val_interval visualizer train_dataloader.balance"
    values = [
        "{[]:1}",
        "-" * 3000 + "1",
        "[" * 3000,
        "[a,b",
        "(1,",
        "6.05e234",
        "1e999",
        "y" * 300,
        "~nobody/x",
        "{1:{[]}}",
    ]
    values += [
        "not " * 3000 + "1",
        "9" * 5000,
        "[[a,b],[c]]",
        "a.b.C",
        "{'type': 'a.b'}",
        "{'a': 1, **x}",
        "b'x'",
        "1if",
        "...",
    ]
    values += [
        "os.system",
        "__import__('os').system('true')",
        "[x for x in y]",
        "\ud800",
        "torch.optim.SGD",
        "dict(type=x)",
    ]
    texts = st.one_of(
        st.sampled_from(values), st.sampled_from(ABSURD).map(repr), st.text(alphabet="[](){},:-+'\"1ax. ~", max_size=30)
    )
    pair = st.tuples(st.sampled_from(keys.split()), st.sampled_from(["=", "=", "=", "", "==", " = "]), texts).map(
        "".join
    )
    inputs = st.lists(pair, min_size=1, max_size=3)
    return Target("options", inputs, ["lr=1e-4"], lambda folder, case: _read_options(config, case), 60, may_exec=True)


def _config(shared: Path) -> Target:
    source = _small_config(shared)
    nodes = [
        n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Constant | ast.List | ast.Dict) and n.lineno > 1
    ]
    begins = [0]
    for line in source.splitlines(keepends=True):
        begins.append(begins[-1] + len(line))
    spans = sorted({(begins[n.lineno - 1] + n.col_offset, begins[n.end_lineno - 1] + n.end_col_offset) for n in nodes})  # type: ignore[operator]

    def apply(edits: list[tuple[int, Any]]) -> Files:
        parts, at = [], 0
        for (begin, end), new in sorted({spans[i]: new for i, new in edits}.items()):
            if begin >= at:
                text = f"float('{new}')" if isinstance(new, float) else ascii(new)
                parts, at = [*parts, source[at:begin], text], end
        return {"config.py": "".join((*parts, source[at:])).encode()}

    inputs = st.lists(st.tuples(st.integers(0, len(spans) - 1), st.sampled_from(ABSURD)), max_size=4).map(apply)
    right = {"config.py": source.encode()}
    return Target(
        "config", inputs, right, lambda folder, case: _read_options(folder / "config.py", []), 100, may_exec=True
    )


# ---- checkpoints and models ---------------------------------------------------------------------------------------


def _checkpoint(shared: Path) -> Target:
    trainer = {"state": TrainState().to_json(), "seed": 1, "data": {"packs": 3}}
    text = json.dumps(trainer).encode()
    (shared / "trainer.json").write_bytes(text)
    entry = file_entry(shared / "trainer.json")
    write_manifest(shared, {"trainer.json": entry}, kind="checkpoint", iteration=3)
    sealed = (shared / "manifest.json").read_bytes()
    manifest = json.loads(sealed)
    right = {"c/manifest.json": sealed, "c/trainer.json": text}
    names = ["x" * 300, "../../x", "/etc/passwd", "a\0b", "\ud800", "", ".", "a/" * 2000]
    crafted = st.lists(
        st.tuples(st.sampled_from(names), st.sampled_from([entry, {}, {"bytes": True, "sha256": []}])), max_size=3
    )
    manifests = crafted.map(lambda files: json.dumps({"files": dict(files)}).encode())
    files = {"c/manifest.json": st.one_of(json_bytes(manifest), manifests), "c/trainer.json": json_bytes(trainer)}

    def read(folder: Path, case: Any) -> None:
        every(lambda: verify(folder / "c"), lambda: read_trainer(folder / "c"))

    return Target("checkpoint", one_changed(files, right), right, read)


NETWORK = {
    "model_type": "llama", "vocab_size": 7, "hidden_size": 12, "intermediate_size": 10, "num_hidden_layers": 1,
    "num_attention_heads": 3, "num_key_value_heads": 1, "rope_theta": 10000.0, "max_position_embeddings": 64,
    "rope_scaling": {"type": "dynamic", "factor": 2.0}, "attention_bias": False, "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "pad_token_id": 0, "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False, "head_dim": 4,
    "rope_parameters": None, "initializer_range": 0.02,
}  # fmt: skip


def _network() -> Target:
    right = {"config.json": json.dumps(NETWORK).encode()}

    def read(folder: Path, case: Any) -> None:
        source = from_pretrained(str(folder))
        config = read_config(json.loads(case["config.json"]))
        for layout in ("internlm2", "llama"):
            hf_shapes(config, FAMILIES[layout])
        source.build_empty(torch.device("meta"), torch.bfloat16)

    return Target("network", json_bytes(NETWORK).map(lambda data: {"config.json": data}), right, read)


def _weights() -> Target:
    network = {
        **NETWORK,
        "model_type": "internlm2",
        "bias": False,
        "rope_scaling": None,
        "hidden_size": 6,
        "head_dim": 2,
    }
    tensors = internlm2_weights(layers=1)
    names = ["model-1.safetensors", "model-2.safetensors"]
    halves = [dict(list(tensors.items())[:4]), dict(list(tensors.items())[4:])]
    weight_map = {name: file for file, half in zip(names, halves, strict=True) for name in half}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    right = {"config.json": json.dumps(network).encode(), hub.INDEX: json.dumps(index).encode()}
    right |= {file: save(half) for file, half in zip(names, halves, strict=True)}
    whole = right[names[0]]
    (length,) = struct.unpack("<Q", whole[:8])
    header = json.loads(whole[8 : 8 + length])
    headers = json_bytes(header).map(lambda new: struct.pack("<Q", len(new)) + new + whole[8 + length :])
    odd = ["F4", "F8_E5M2", "F8_E8M0", "U64", "C64", "BOOL", "I8", "x"]
    headers |= st.sampled_from(odd).map(lambda d: right[names[0]].replace(b'"F32"', json.dumps(d).encode()))
    files = {hub.INDEX: json_bytes(index), names[0]: st.one_of(headers, mutated(whole))}

    def read(folder: Path, case: Any) -> None:
        def tensors() -> None:
            source = WeightFolder(folder)
            for name in source:
                source[name].float()

        every(
            lambda: hub.missing_files(folder), tensors, lambda: consolidate(folder, folder.parent / "out.safetensors")
        )

    return Target("weights", one_changed(files, right), right, read)


def archive(code: bytes, storages: list[bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        file.writestr("a/data.pkl", code)
        file.writestr("a/byteorder", b"little")
        for key, data in enumerate(storages):
            file.writestr(f"a/data/{key}", data)
    return out.getvalue()


def _saved(value: Any) -> bytes:
    out = io.BytesIO()
    torch.save(value, out)
    return out.getvalue()


def _read_pickle(folder: Path, case: Any) -> None:
    path = folder / "a.pth"
    every(
        *(lambda o=o, m=m: load_tensors(path, mmap=m, opaque=o) for o in (False, True) for m in (False, True)),
        lambda: consolidate(path, folder / "out.safetensors"),
        lambda: WeightFolder(folder / "hf").shapes,
    )


def _pickle() -> Target:
    right = {"a.pth": _saved({"state_dict": internlm2_weights()}), "hf/pytorch_model.bin": _saved(internlm2_weights())}
    seeds = [{"state_dict": {"a": [1, 2.5, None], "b": (1, "x", b"y")}, "c": {1, "z"}}]

    def files(code: bytes) -> Files:
        data = archive(code, [bytes(24), bytes(8)])
        return {"a.pth": data, "hf/pytorch_model.bin": data}

    return Target("pickle", pickles(seeds).map(files), right, _read_pickle)


def _zip() -> Target:
    whole = _saved({"state_dict": internlm2_weights()})
    right = {"a.pth": whole, "hf/pytorch_model.bin": _saved(internlm2_weights())}
    ends = len(whole) - 1200  # where the list of members lies

    inputs = st.one_of(mutated(whole), mutated(whole[ends:]).map(lambda end: whole[:ends] + end))
    return Target("zip", inputs.map(lambda data: {**right, "a.pth": data}), right, _read_pickle)


def _foreign(shared: Path) -> list[Target]:
    """DeepSpeed's and InternEvo's folders, with other values in their files."""
    values = [*ABSURD, 2**100000, (), (1,) * 70, (2**62, 2**62), torch.ones(3), torch.ones(3, dtype=torch.complex64),
              torch.ones(0), torch.tensor(1), torch.Size([2, 3]), -5]  # fmt: skip
    made = []
    for name, folder in (
        ("zero2", write_zero(shared / "zero2", internlm2_weights(), 2, 2, padding=1)),
        ("zero3", write_zero(shared / "zero3", internlm2_weights(), 3, 2, frozen=("model.norm.weight",))),
        ("internevo", write_internevo(shared / "internevo", internlm2_weights(layers=2), 1, [1, 1])),
    ):
        right = {path.name: path.read_bytes() for path in folder.iterdir()}
        files = {n: changed(torch.load(folder / n, weights_only=False), values).map(_saved) for n in right}
        cases = one_changed(files, right)
        odd = st.sampled_from(["model_tp99999999999_pp0.pt", "zero_pp_rank_99999999999_mp_rank_00_optim_states.pt"])
        more = st.tuples(cases, odd).map(lambda pair: {**pair[0], pair[1]: _saved({"a": torch.ones(1)})})

        def read(folder: Path, case: Any) -> None:
            consolidate(folder, folder.parent / "out.safetensors")

        made.append(Target(name, st.one_of(cases, cases, cases, more), right, read))
    return made


# ---- tokenizers and texts -----------------------------------------------------------------------------------------

MARKS = {"added_tokens_decoder": {str(500 + i): {"content": mark} for i, mark in enumerate(INTERNLM2_MARKS)}}


def _sentencepiece(shared: Path) -> Path:
    folder = shared / "tokenizer"
    if not folder.exists():
        train_tokenizer(folder)
        (folder / "tokenizer_config.json").write_text(json.dumps(MARKS))
    return folder


def _read_tokenizer(folder: Path, case: Any) -> None:
    tokenizer = load_tokenizer(folder)
    text = "def f(x): <|im_end|> é 中文\n\0 a"
    ids = [*tokenizer.encode(text), *tokenizer.encode_plain(text), *tokenizer.encode_plain(text, tokenizer.special)]
    tokenizer.decode(ids)
    tokenizer.decode([0, 1, tokenizer.vocab_size - 1, 10**6])
    assert max(ids, default=0) < tokenizer.vocab_size
    tokenizer.identity()


def _tokenizers(shared: Path) -> list[Target]:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    model = _sentencepiece(shared) / "tokenizer.model"
    piece = {"tokenizer.model": model.read_bytes(), "tokenizer_config.json": json.dumps(MARKS).encode()}
    configs = json_bytes({**MARKS, "bos_token": "<s>", "chat_template": "x"})
    whole = piece["tokenizer.model"]
    ends = [mutated(whole[:200]).map(lambda b: b + whole[200:]), mutated(whole[-600:]).map(lambda b: whole[:-600] + b)]
    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    fast.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=270, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    fast.train_from_iterator(["a word and a word"] * 10, trainer)
    fast.add_special_tokens([AddedToken("<|bos|>"), AddedToken("<|im_end|>")])
    described = json.loads(fast.to_str())
    right = {
        "tokenizer.json": fast.to_str().encode(),
        "tokenizer_config.json": b'{"bos_token": {"content": "<|bos|>"}}',
    }
    small = {**described, "model": {**described["model"], "vocab": {"a": 0, "b": 1}, "merges": [["a", "b"]]}}
    texts = st.one_of(json_bytes(described), json_bytes(small))
    models = {"tokenizer.model": st.one_of(mutated(whole), *ends), "tokenizer_config.json": configs}
    descriptions = {"tokenizer.json": texts, "tokenizer_config.json": configs}
    return [
        Target("tokenizer.model", one_changed(models, piece), piece, _read_tokenizer),
        Target("tokenizer.json", one_changed(descriptions, right), right, _read_tokenizer),
    ]


def _inputs(shared: Path) -> list[Target]:
    folder = _sentencepiece(shared)
    chat = [{"role": "user", "content": "a <s> b"}, {"role": "assistant", "content": "c", "loss": True, "name": "x"}]
    alpaca = {"instruction": "do", "input": "", "output": "done"}
    texts: dict[str, tuple[str, Any]] = {
        "txt": ("a.txt", None), "json": ("a.json", [{"text": "x"}, "y"]), "jsonl": ("a.jsonl", {"text": "x y"}),
        "alpaca": ("a.json", [alpaca, alpaca]), "chat": ("a.jsonl", {"messages": chat}),
        "ftdp": ("set/processed/x/a.jsonl", chat), "auto": ("a.json", [{"messages": chat}]),
    }  # fmt: skip

    def case(kind: str) -> SearchStrategy[Files]:
        name, value = texts[kind]
        plain = mutated(b"first line\nsecond <|im_end|> line\r\n\xef\xbb\xbf\xe4\xb8\xad\n")
        inner = plain if value is None else json_bytes(value)
        if name.endswith("l"):
            inner = st.lists(inner, max_size=3).map(b"\n".join)
        return inner.map(lambda data: {f"{kind}/{name}": data})

    def read(here: Path, case: Any) -> None:
        kind = next(iter(case)).partition("/")[0]
        settings = TokenizeSettings(str(folder), kind)
        every(
            lambda: tokenize([str(here / kind)], str(here / "out"), settings, workers=1),
            lambda: tokenize(
                [str(here / kind)],
                str(here / "whole"),
                TokenizeSettings(str(folder), "auto", whole_record=True),
                workers=1,
            ),
        )

    right = {"chat/a.jsonl": json.dumps({"messages": chat}).encode()}

    def read_again(here: Path, case: Any) -> None:
        tokenize([str(here / "chat")], str(here / "out"), TokenizeSettings(str(folder), "chat"), workers=1)

    made = shared / "made"
    (made / "chat").mkdir(parents=True)
    (made / "chat" / "a.jsonl").write_bytes(right["chat/a.jsonl"])
    read_again(made, right)
    outputs = {p.relative_to(made).as_posix(): p.read_bytes() for p in made.rglob("*") if p.is_file()}
    name = "out/made_from/en/a.json"
    return [
        Target("texts", st.sampled_from(sorted(texts)).flatmap(case), right, read, 80),
        Target("records", one_changed({name: json_bytes(json.loads(outputs[name]))}, outputs), outputs, read_again, 80),
    ]
