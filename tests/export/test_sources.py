"""Other tools' checkpoints → ours: equal to their own consolidation, nothing in them runs, damage is named."""

import contextlib
import io
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.checkpoints import Tensors, internlm2_weights, write_internevo, write_zero
from helpers.paths import reference
from safetensors.torch import load_file, save_file

from xtuner.core.errors import CheckpointError, ConfigError, XTunerError
from xtuner.core.pickles import load_tensors
from xtuner.export.consolidate import consolidate
from xtuner.export.sources import recognise
from xtuner.export.sources.zero import ZeroFolder
from xtuner.families import LLAMA
from xtuner.model import load_pretrained
from xtuner.model.weights import split_for_family

Command = Callable[..., int]
STAGES = ("zero1_bf16_2ranks", "zero2_bf16_2ranks", "zero3_bf16_2ranks")
NOT_READ = ("zero_pp_rank_1_mp_rank_00_model_states.pt",)  # says what rank 0's says, unless parameters are frozen
SHAPES = {  # the networks of the reference checkpoints
    "zero": "vocab_size=131, hidden_size=30, intermediate_size=70, num_hidden_layers=2, num_attention_heads=3, "
    "num_key_value_heads=1",
    "internevo": "vocab_size=199, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=8, "
    "num_key_value_heads=2, rope_theta=10000.0, rope_scaling={'type': 'linear', 'factor': 4.0}",
}


def sources() -> Iterator[tuple[Path, Tensors, str]]:
    """Every reference checkpoint of another tool, what it holds in fp32, and the network's name in SHAPES."""
    for stage in STAGES:
        folder = reference("zero_ckpt", stage)
        expected = load_file(folder / "expected_fp32_state_dict.safetensors")
        yield folder / "iter_3.pth", {n.removeprefix("llm."): t for n, t in expected.items()}, "zero"
    single = reference("zero_ckpt", "zero2_bf16_no_optimizer", "iter_3.pth")
    state = load_tensors(single, opaque=True)["state_dict"]
    assert all(t.dtype == torch.bfloat16 for t in state.values())
    yield single, {n.removeprefix("llm."): t.float() for n, t in state.items()}, "zero"
    weights = load_file(reference("models", "e_linear") / "model.safetensors")
    yield reference("internevo_ckpt", "e_linear_tp2"), weights, "internevo"


def same(path: Path, expected: Tensors) -> None:
    """Equal bit for bit, and laid out as safetensors asks: whole, without gaps."""
    loaded = load_file(path)
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        assert loaded[name].dtype == torch.float32
        assert loaded[name].equal(tensor), name


def config_of(folder: Path, network: str) -> Path:
    path = folder / f"{network}.py"
    path.write_text(f"from xtuner.model import from_scratch\nmodel = dict(type=from_scratch, {SHAPES[network]})\n")
    return path


def copied(source: Path, folder: Path) -> Path:
    """A copy that can be changed; the reference data cannot."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    files = [source] if source.is_file() else list(source.iterdir())
    for file in files:
        (folder / file.name).write_bytes(file.read_bytes())
    return folder / source.name if source.is_file() else folder


def test_equal_to_their_own_consolidation(tmp_path: Path, xtuner: Command, capsys: Any) -> None:
    for i, (source, expected, network) in enumerate(sources()):
        target = tmp_path / f"{i}.safetensors"
        assert xtuner("convert", "weights", source, target) == 0
        same(target, expected)
        hf = tmp_path / f"hf{i}"
        assert xtuner("convert", "pth_to_hf", config_of(tmp_path, network), source, hf, "--fp32") == 0
        same(hf / "model.safetensors", expected)
        llama = tmp_path / f"llama{i}"
        words = ("--layout", "llama", "--max-shard-size", "20KB")
        assert xtuner("convert", "pth_to_hf", config_of(tmp_path, network), source, llama, *words) == 0
        model = load_pretrained(llama, dtype=torch.bfloat16)
        assert all(t.equal(expected[n].bfloat16()) for n, t in model.state_dict().items())
        assert len(list(llama.glob("*.safetensors"))) > 2
        assert "Converted with xtuner" in (hf / "README.md").read_text()
    said = capsys.readouterr().err
    for words in ("ZeRO-1, 2 ranks", "ZeRO-2, 2 ranks", "ZeRO-3, 2 ranks", "no fp32 masters", "2 tensor × 1 pipeline"):
        assert words in said


@pytest.mark.processes
def test_hugging_face_folders_and_our_checkpoints(tmp_path: Path, tiny: Path, xtuner: Command) -> None:
    folder = reference("models", "a_gqa")
    masters = load_file(folder / "model.safetensors")
    consolidate(folder, tmp_path / "a.safetensors")
    same(tmp_path / "a.safetensors", masters)
    assert xtuner("convert", "pth_to_hf", tiny, folder, tmp_path / "llama", "--layout", "llama", "--fp32") == 0
    consolidate(tmp_path / "llama", tmp_path / "a.safetensors")  # replaces its own
    same(tmp_path / "a.safetensors", masters)
    work_dir = tmp_path / "run"
    assert xtuner("train", tiny, "--work-dir", work_dir, "--cfg-options", "custom_hooks=[]") == 0
    checkpoint = work_dir / (work_dir / "last_checkpoint").read_text().strip()
    consolidate(checkpoint, tmp_path / "b.safetensors")
    weights = checkpoint / "weights" / "model.safetensors"
    same(tmp_path / "b.safetensors", load_file(weights))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(CheckpointError, match="is altered"):
        consolidate(checkpoint, tmp_path / "c.safetensors")
    assert not (tmp_path / "c.safetensors").exists()


# ---- ZeRO folders of any shape ------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_groups_padding_and_frozen_parameters(stage: int, tmp_path: Path) -> None:
    weights = internlm2_weights(layers=2)
    frozen = ("model.tok_embeddings.weight", "model.norm.weight")
    for ranks in (1, 2, 3, 8, 13):
        for padding in (0, 5) if stage < 3 else (0,):
            folder = tmp_path / f"{ranks}-{padding}"
            write_zero(folder, weights, stage, ranks, frozen if ranks != 2 else (), padding)
            consolidate(folder, tmp_path / "a.safetensors")
            same(tmp_path / "a.safetensors", weights)


def test_shared_parameters(tmp_path: Path, xtuner: Command) -> None:
    weights = internlm2_weights()
    folder = write_zero(tmp_path / "z", {n: t for n, t in weights.items() if n != "output.weight"}, 2, 2)
    path = folder / "mp_rank_00_model_states.pt"
    model = torch.load(path, weights_only=False)
    model["shared_params"] = {"llm.output.weight": "llm.model.tok_embeddings.weight"}
    torch.save(model, path)
    consolidate(folder, tmp_path / "a.safetensors")
    tied = {**weights, "output.weight": weights["model.tok_embeddings.weight"]}
    same(tmp_path / "a.safetensors", tied)
    text = "from xtuner.model import from_scratch\nmodel = dict(type=from_scratch, vocab_size=7, hidden_size=6, "
    text += "intermediate_size=10, num_hidden_layers=1, num_attention_heads=3, num_key_value_heads=1)\n"
    (tmp_path / "config.py").write_text(text)
    assert xtuner("convert", "pth_to_hf", tmp_path / "config.py", folder, tmp_path / "hf", "--fp32") == 0
    same(tmp_path / "hf" / "model.safetensors", tied)


def test_names_of_the_llama_layout(tmp_path: Path, xtuner: Command) -> None:
    """XTuner trains Llama, too: its masters need a config that says how many heads there are."""
    model = load_pretrained(reference("models", "a_gqa"))
    state = model.state_dict()
    llama: Tensors = {}
    for name, tensor in state.items():
        llama |= split_for_family(name, tensor, LLAMA, model.config)
    torch.save({"state_dict": {f"llm.{n}": t.clone() for n, t in llama.items()}}, tmp_path / "iter_1.pth")
    with pytest.raises(CheckpointError, match=r"(?s)the number of heads is unknown.*pth_to_hf CONFIG"):
        consolidate(tmp_path / "iter_1.pth", tmp_path / "a.safetensors")
    config = tmp_path / "config.py"
    path = str(reference("models", "a_gqa"))
    text = "from xtuner.model import from_pretrained\n"
    config.write_text(f"{text}model = dict(type=from_pretrained, pretrained_model_name_or_path={path!r})\n")
    assert xtuner("convert", "pth_to_hf", config, tmp_path / "iter_1.pth", tmp_path / "hf", "--fp32") == 0
    same(tmp_path / "hf" / "model.safetensors", dict(state))


# ---- InternEvo ----------------------------------------------------------------------------------------------------


class Config(dict):  # type: ignore[type-arg]
    """InternEvo's runs save a class of their own."""


def test_pipeline_stages_and_embeddings_cut_by_columns(tmp_path: Path) -> None:
    weights = internlm2_weights(layers=5)
    for i, (stages, columns) in enumerate((([5], True), ([2, 3], False), ([1, 1, 3], True))):
        folder = write_internevo(tmp_path / str(i), weights, 1 + i, stages, embed_split_hidden=columns)
        consolidate(folder, tmp_path / "a.safetensors")
        same(tmp_path / "a.safetensors", weights)
        config = torch.load(folder / "model_config.pt", weights_only=True)
        torch.save(Config(config), folder / "model_config.pt")
        consolidate(folder, tmp_path / "a.safetensors")
        same(tmp_path / "a.safetensors", weights)


def test_pairs_become_halves(tmp_path: Path) -> None:
    """`adapt_hf` false: exactly what InternEvo's own converter makes of wqkv."""
    case = np.load(reference("internevo_ckpt", "wqkv_permute.npz"))
    native, wanted = (torch.from_numpy(case[f"wqkv_{n}"]) for n in ("native", "hf"))
    weights = internlm2_weights(hidden=native.shape[1])
    weights["model.layers.0.attention.wqkv.weight"] = native
    weights["model.layers.0.attention.wo.weight"] = torch.zeros(32, 32)
    heads = {"num_attention_heads": int(case["num_heads"]), "num_kv_attention_heads": int(case["num_kv_heads"])}
    for i, adapt in enumerate(({"adapt_hf": False}, {"adapt_hf": True})):
        for tp in (1, 2):
            folder = write_internevo(tmp_path / f"{i}{tp}", weights, tp, [1], **heads, **adapt)
            consolidate(folder, tmp_path / "a.safetensors")
            found = load_file(tmp_path / "a.safetensors")["model.layers.0.attention.wqkv.weight"]
            assert found.equal(wanted if i == 0 else native)
    assert not native.equal(wanted)


# ---- nothing runs -------------------------------------------------------------------------------------------------


class Obeying(pickle.Unpickler):
    """Calls what a file names as Python does, but imports nothing."""

    def find_class(self, module: str, name: str) -> Any:
        return os.system if (module, name) == ("posix", "system") else dict


def with_bomb(path: Path, marker: Path) -> None:
    """Put a call of os.system in front of everything else in a file's pickle: the rest stays what it was."""
    with zipfile.ZipFile(path) as old:
        members = {i.filename: old.read(i) for i in old.infolist()}
    name = next(n for n in members if n.endswith("/data.pkl"))
    code = members[name]
    assert code[:2] == b"\x80\x02"
    command = f"touch {marker}".encode()
    members[name] = code[:2] + b"cposix\nsystem\nX" + len(command).to_bytes(4, "little") + command + b"\x85R" + code[2:]
    with zipfile.ZipFile(path, "w") as new:
        for member, data in members.items():
            new.writestr(member, data)
    with contextlib.suppress(Exception):  # the control: Python's own reader meets the bomb first
        Obeying(io.BytesIO(members[name])).load()
    assert marker.exists()
    marker.unlink()


class Call:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.processes
@pytest.mark.parametrize("real", [False, True])
def test_bombs_in_every_file(real: bool, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    weights = internlm2_weights(layers=2)
    cases = [(write_zero(tmp_path / f"zero{n}", weights, n, 2), weights, "") for n in (1, 2, 3)]
    cases += [(write_internevo(tmp_path / "internevo", weights, 3, [1, 1]), weights, "")]
    for source, expected, _ in sources() if real else cases:
        names = [source.name] if source.is_file() else sorted(p.name for p in source.iterdir())
        for name in names:
            copy = copied(source, tmp_path / "copy")
            path = copy if copy.is_file() else copy / name
            with_bomb(path, marker)
            consolidate(copy, tmp_path / "a.safetensors")
            same(tmp_path / "a.safetensors", expected)
            torch.save({"state_dict": {"llm.output.weight": Call(marker)}, "module": Call(marker)}, path)
            if name in NOT_READ:
                continue
            with pytest.raises(CheckpointError):
                consolidate(copy, tmp_path / "a.safetensors")
    assert not marker.exists()


# ---- damage -------------------------------------------------------------------------------------------------------


def changed(path: Path, change: Callable[[Any], Any]) -> Callable[[], None]:
    def apply() -> None:
        content = torch.load(path, weights_only=False)
        change(content)
        torch.save(content, path)

    return apply


def refused(
    source: Path, words: str, tmp_path: Path, where: str | None = None, kind: type[XTunerError] = CheckpointError
) -> None:
    with pytest.raises(kind, match=words) as e:
        consolidate(source, tmp_path / "never.safetensors")
    assert (where or source.name) in e.value.where
    assert e.value.do or e.value.why
    assert not list(tmp_path.glob("*never*"))


def test_a_rank_is_missing_or_of_another_run(tmp_path: Path) -> None:
    for stage in (2, 3):
        folder = write_zero(tmp_path / f"zero{stage}", internlm2_weights(), stage, 4, ("model.norm.weight",))
        name = "zero_pp_rank_{}_mp_rank_00_optim_states.pt"
        for rank in (0, 2, 3):
            path = folder / name.format(rank)
            path.rename(tmp_path / "aside")
            refused(folder, f"1 of 4 .*missing; the first is {path.name}", tmp_path)
            (tmp_path / "aside").rename(path)
        shutil.copy(path, folder / name.format(4))
        refused(folder, "more ranks than the 4", tmp_path)
        (folder / name.format(4)).rename(folder / "bf16_zero_pp_rank_3_mp_rank_00_optim_states.pt")
        refused(folder, "of the same rank", tmp_path)
        (folder / "bf16_zero_pp_rank_3_mp_rank_00_optim_states.pt").unlink()
        (folder / "mp_rank_01_model_states.pt").touch()
        refused(folder, "tensor parallelism", tmp_path)
        (folder / "mp_rank_01_model_states.pt").unlink()
        consolidate(folder, tmp_path / "a.safetensors")
    (folder / "zero_pp_rank_1_mp_rank_00_model_states.pt").unlink()  # has a part of the frozen parameter
    refused(folder, "zero_pp_rank_1_mp_rank_00_model_states", tmp_path)
    for file in folder.glob("*_model_states.pt"):
        file.unlink()
    refused(folder, "_model_states.pt files are missing", tmp_path)
    folder = tmp_path / "zero2"
    step = {"state": {0: {"step": torch.tensor(4.0)}}}
    path = folder / name.format(1)
    changed(path, lambda c: c["optimizer_state_dict"].update(base_optimizer_state=step))()
    refused(folder, "different steps or runs", tmp_path)
    for file in folder.glob("*_optim_states.pt"):
        file.unlink()
    refused(folder, "_optim_states.pt files are missing", tmp_path)


def test_contradictions_in_zero_files(tmp_path: Path) -> None:
    weights = internlm2_weights()
    output = "llm.output.weight"

    def shape(*sizes: int) -> Callable[[Any], Any]:
        return lambda model: model["param_shapes"][0].update({output: torch.Size(sizes)})

    def also(**values: Any) -> Callable[[Any], Any]:
        return lambda model: model.update(values)

    lost = also(frozen_param_shapes={"llm.x": torch.Size([2])}, frozen_param_fragments={"llm.y": torch.ones(1)})
    for i, (stage, words, change) in enumerate(
        (
            (2, "numbers in group 0", shape(8, 60)),
            (3, "numbers a rank", shape(8, 60)),
            (2, r"output.weight is \[6, 7\]", shape(6, 7)),
            (2, "gives no shape", lambda model: model["param_shapes"][0].update({output: (-1,)})),
            (2, "1 groups of parameters", lambda model: model["param_shapes"].pop()),
            (3, "lacks a list", also(param_shapes=None)),
            (2, "LoRA", also(shared_params={"llm.lora_A": output})),
            (2, "not in the model", also(shared_params={"llm.more": output})),
            (2, "was not saved", lost),
        )
    ):
        folder = write_zero(tmp_path / str(i), weights, stage, 2)
        changed(min(folder.glob("*_model_states.pt")), change)()
        refused(folder, words, tmp_path)
    folder = write_zero(tmp_path / "short", weights, 3, 2)
    path = max(folder.glob("*_optim_states.pt"))
    short = [torch.ones(3), torch.ones(3)]
    changed(path, lambda c: c["optimizer_state_dict"].update(fp32_flat_groups=short))()
    refused(folder, "6 of rank 1", tmp_path)
    changed(path, lambda c: c["optimizer_state_dict"].update(fp32_flat_groups=["x"]))()
    refused(folder, "is not a list of flat tensors", tmp_path)
    changed(path, lambda c: c.clear())()
    refused(folder, "does not contain", tmp_path)


def test_parts_of_internevo_that_do_not_fit(tmp_path: Path) -> None:
    weights = internlm2_weights(layers=2)
    number = iter(range(99))

    def folder(**changes: Any) -> Path:
        return write_internevo(tmp_path / f"e{next(number)}", weights, 3, [1, 1], **changes)

    for missing, words in (
        ("model_tp1_pp1.pt", "model_tp1_pp1.pt is missing"),
        ("model_config.pt", "model_config.pt is missing"),
        ("model_tp2_pp*.pt", r"describes \[7, 6\] for .*have \[5, 6\]"),
        ("model_tp*_pp1.pt", "describes 2 layers"),
        ("model_tp*.pt", "no model_tp"),
    ):
        path = folder()
        for file in path.glob(missing):
            file.unlink()
        refused(path, words, tmp_path)
    for changes, words in (
        ({"no_bias": False}, "no_bias = False is not supported"),
        ({"num_layers": "2"}, "is not a size"),
        ({"vocab_size": 8}, r"\[8, 6\] for model.tok_embeddings"),
        ({"num_kv_attention_heads": 3}, "wqkv"),
    ):
        refused(folder(**changes), words, tmp_path)
    for other in ("model_wp0_pp0.pt", "model_tp0_pp0_dp1.pt", "model_moe_layer0_expert0_tp0.pt"):
        path = folder()
        (path / other).touch()
        refused(path, "is of a model split by", tmp_path)
    path = folder()
    changed(path / "model_tp1_pp0.pt", lambda c: c.pop("model.layers.0.attention.wo.weight"))()
    refused(path, "model_tp1_pp0.pt lacks", tmp_path)
    changed(path / "model_tp1_pp0.pt", lambda c: c.update({"model.layers.0.attention.wo.weight": torch.ones(5, 2)}))()
    refused(path, "parts of model.layers.0.attention.wo.weight that fit", tmp_path)


def test_files_cut_short_and_files_of_other_kinds(tmp_path: Path) -> None:
    for source, _, _ in sources():
        names = [source.name] if source.is_file() else sorted(p.name for p in source.iterdir())
        for name in names:
            copy = copied(source, tmp_path / "copy")
            path = copy if copy.is_file() else copy / name
            path.write_bytes(path.read_bytes()[:-100])
            if name not in NOT_READ:
                refused(copy, "cut short", tmp_path, name)
    weights = internlm2_weights()
    (tmp_path / "empty").mkdir()
    (tmp_path / "torn" / "weights").mkdir(parents=True)
    half = {n: t for n, t in weights.items() if ".w2." not in n}
    for name, content, words in (
        ("list.pth", [1, 2], "does not contain tensors by name"),
        ("mixed.pth", {**weights, "epoch": 3}, "'epoch' is not a tensor"),
        ("lora.pth", {"llm.base_model.model.x.lora_A.weight": torch.ones(1)}, "LoRA"),
        ("half.pth", half, "w2.weight is missing"),
        (
            "gap.pth",
            {n.replace("layers.0", "layers.2") if "norm" in n else n: t for n, t in weights.items()},
            "missing",
        ),
        ("turned.pth", {n: t.t() if ".wo." in n or ".w2." in n else t for n, t in weights.items()}, "w2.weight is"),
        ("quantized.pth", {n: t.to(torch.int8) for n, t in weights.items()}, "int8"),
    ):
        torch.save(content, tmp_path / name)
        refused(tmp_path / name, words, tmp_path)
    refused(tmp_path / "empty", "not a checkpoint that can be recognised", tmp_path, kind=ConfigError)
    refused(tmp_path / "torn", "not a complete checkpoint", tmp_path, kind=ConfigError)
    refused(tmp_path / "nowhere", "there is no checkpoint", tmp_path, kind=ConfigError)
    torch.save(weights, tmp_path / "plain.pth")  # as `zero_to_fp32.py` writes it
    consolidate(tmp_path / "plain.pth", tmp_path / "a.safetensors")
    same(tmp_path / "a.safetensors", weights)


def test_only_its_own_output_is_replaced(tmp_path: Path) -> None:
    weights = internlm2_weights()
    folder = write_zero(tmp_path / "z", weights, 2, 2)
    (tmp_path / "folder.safetensors").mkdir()
    save_file(weights, tmp_path / "mine.safetensors")
    (tmp_path / "note.safetensors").write_text("precious")
    (tmp_path / "list.safetensors").write_bytes((8).to_bytes(8, "little") + b"[1, 2] ]")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    for name, words in (
        ("folder.safetensors", "not an earlier output"),
        ("mine.safetensors", "not an earlier output"),
        ("note.safetensors", "not an earlier output"),
        ("list.safetensors", "not an earlier output"),
        ("z/a.safetensors", "inside the checkpoint"),
        ("z/deeper/../a.safetensors", "inside the checkpoint"),
        ("a.bin", "must end in .safetensors"),
    ):
        with pytest.raises(ConfigError, match=words):
            consolidate(folder, tmp_path / name)
    with pytest.raises(CheckpointError, match="cannot be written"):
        consolidate(folder, "/proc/a.safetensors")
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    for _ in range(2):
        consolidate(folder, tmp_path / "new.safetensors")
        same(tmp_path / "new.safetensors", weights)
    assert oct((tmp_path / "new.safetensors").stat().st_mode & 0o777) == oct(0o666 & ~current_umask())


def current_umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def test_a_config_of_another_network(tmp_path: Path, xtuner: Command) -> None:
    folder = reference("internevo_ckpt", "e_linear_tp2")
    right = config_of(tmp_path, "internevo").read_text()
    config = tmp_path / "config.py"
    for old, new, error, words in (
        ("num_attention_heads=8", "num_attention_heads=16", ConfigError, "num_heads = 16, the checkpoint says 8"),
        ("rope_theta=10000.0", "rope_theta=1e6", ConfigError, "rope_theta = 1000000.0, the checkpoint says 10000"),
        ("vocab_size=199", "vocab_size=200", CheckpointError, "by the config's model"),
    ):
        assert old in right
        config.write_text(right.replace(old, new))
        with pytest.raises(error, match=words):
            xtuner("convert", "pth_to_hf", config, folder, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


MEMORY = """
import resource, sys
from pathlib import Path
import torch
from helpers.checkpoints import internlm2_weights, write_single, write_zero
from xtuner.export.consolidate import CHUNK, consolidate
from xtuner.export.sources import read_tensor, recognise

folder, stage = Path(sys.argv[1]), int(sys.argv[2])
write = write_zero if stage else write_single
write(folder / "small", internlm2_weights(), stage, 2)
weights = internlm2_weights(layers=5, hidden=768, inner=3072, vocabulary=4000)
total, largest = sum(t.nbytes for t in weights.values()), max(t.nbytes for t in weights.values())
write(folder / "large", weights, stage, 100)
del weights
consolidate(folder / "small", folder / "out_small.safetensors")  # imports and caches are there now
field = next(l for l in open("/proc/self/status") if l.startswith("VmData"))
CONSTANT = 2 * CHUNK * 4
files = (folder / "large").iterdir() if stage else [folder / "large"]
mapped = sum(p.stat().st_size + 4096 for p in files)  # counts, although it takes no memory
limit = int(field.split()[1]) * 1024 + mapped + largest + CONSTANT
assert total > 4 * (largest + CONSTANT), "too small a model to show anything"
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))  # fewer than ranks
consolidate(folder / "large", folder / "out.safetensors")
opened = recognise(folder / "large").open()  # the control: holding all weights
try:
    state = {name: read_tensor(opened, name).float() + 1 for name in opened.source}
except RuntimeError as e:
    assert "can't allocate memory" in str(e)
else:
    sys.exit("the limit limits nothing")
"""


@pytest.mark.processes
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA is Linux's")
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_memory_is_a_tensor(stage: int, tmp_path: Path) -> None:
    """The system itself refuses more than the largest tensor + 32 MiB; holding all weights fails under it.

    A single bf16 file (0), and ZeRO folders of 100 ranks, which are more files than a process may open at first.
    """
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    env["MALLOC_MMAP_THRESHOLD_"] = str(2**16)  # what is freed goes back at once, as tensors of a real model do
    words = [sys.executable, "-c", MEMORY, str(tmp_path), str(stage)]
    done = subprocess.run(words, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    weights = internlm2_weights(layers=5, hidden=768, inner=3072, vocabulary=4000)
    same(tmp_path / "out.safetensors", weights if stage else {n: t.bfloat16().float() for n, t in weights.items()})
    shutil.rmtree(tmp_path)


def test_kinds_are_told_by_file_names_alone(tmp_path: Path) -> None:
    """Nothing is opened to find out; the header of what is written is plain."""
    folder = write_zero(tmp_path / "z", internlm2_weights(), 2, 2)
    opened = recognise(folder).open()
    assert isinstance(opened.config, type(None))
    target = consolidate(folder, tmp_path / "a.safetensors")
    data = target.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert header.pop("__metadata__")["format"] == "pt"
    assert len(data) == 8 + length + sum(4 * math.prod(entry["shape"]) for entry in header.values())
    assert (8 + length) % 8 == 0
    assert ZeroFolder(folder)["llm.output.weight"].equal(internlm2_weights()["output.weight"])
