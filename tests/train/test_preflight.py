"""What `xtuner train` would refuse before its first iteration, `check-cfg` and the dry run refuse in the same words.

One table of wrong configs and command lines. Each row goes through every command that can see it: the verdict and the
message must be the same, name what the user wrote, and nothing may have been written.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from helpers.corpus import VOCABULARY, write_corpus
from safetensors.torch import load_file, save_file

from xtuner.cli.main import main
from xtuner.compat.translate import load
from xtuner.core.errors import XTunerError
from xtuner.data.format.writer import write_bin
from xtuner.families import INTERNLM2, read_config
from xtuner.model.weights import hf_shapes
from xtuner.train.checkpoints.work_dir_lock import WorkDirLock

Edit = Callable[[str], str | bytes]
MODEL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}


class Row(NamedTuple):
    """Options, or an edit of the config's text, with which it is refused; the exit code; what the message says."""

    exit: int
    says: list[str]
    options: Sequence[str] = ()
    edit: Edit | None = None
    words: Sequence[str] = ()  # of the command line: only `train` and its dry run can see them


def put(old: str, new: str) -> Edit:
    def edit(text: str) -> str:
        assert old in text, old
        return text.replace(old, new)

    return edit


def first(lines: str) -> Edit:
    return put("from torch.optim import AdamW\n", f"from torch.optim import AdamW\n{lines}\n")


def last(lines: str) -> Edit:
    return lambda text: f"{text}\n{lines}\n"


def pretrained(folder: str) -> Edit:
    def edit(text: str) -> str:
        text = text.replace("import from_scratch", "import from_pretrained")
        begin = text.index("model = dict(")
        model = f'model = dict(type=from_pretrained, pretrained_model_name_or_path="{folder}")\n'
        return text[:begin] + model + text[text.index("####", begin) :]

    return edit


CLASSES = """
from xtuner.data.loading.sampler import InternRepoSampler as _Sampler
from xtuner.data.packing.pack import build_packed_dataset as _packed
from xtuner.train.hooks import Hook as _Hook
class Plain:
    pass
class Fails(_Hook):
    def __init__(self): raise KeyError("mine")
class Ends(_Hook):
    def __init__(self): raise SystemExit(0)
class Leaves(_Sampler):
    def describe(self): raise SystemExit(0)
class Few:
    def __init__(self, dataset): ...
def mine(**settings): return [1, 2, 3]
def quits(params, lr): raise SystemExit(0)
def ends(**settings): raise SystemExit(0)
def broken(**settings): return {}["absent"]
"""
# name → row. {w} is the folder of the world below.
CONFIGS: dict[str, Row] = {
    # types that cannot be imported, wherever they stand
    "scheduler": Row(2, ["LinearLRR", "tiny.py:"], ["param_scheduler.0.type=LinearLRR"]),
    "scheduler_module": Row(2, ["nowhere.LinearLR"], ["param_scheduler.0.type=nowhere.LinearLR"]),
    "hook": Row(2, ["LoggerHok"], ["default_hooks.logger.type=LoggerHok"]),
    "hook_dotted": Row(2, ["xtuner.train.hooks.LoggerHok"], ["default_hooks.logger.type=xtuner.train.hooks.LoggerHok"]),
    "custom_hook": Row(2, ["NoHook", "custom_hooks.0"], ["custom_hooks=[{'type': 'NoHook'}]"]),
    "wrapper": Row(2, ["NoWrapper"], ["optim_wrapper.type=NoWrapper"]),
    "optimizer": Row(2, ["AdamV"], ["optim_wrapper.optimizer.type=AdamV"]),
    "optimizer_dotted": Row(2, ["torch.optim.AdamV"], ["optim_wrapper.optimizer.type=torch.optim.AdamV"]),
    "sampler_type": Row(2, ["NoSampler"], ["train_dataloader.sampler.type=NoSampler"]),
    "dataset_type": Row(2, ["no_dataset"], ["train_dataloader.dataset.type=no_dataset"]),
    "inner_dataset_type": Row(2, ["no_folder"], ["train_dataloader.dataset.dataset_cfg.type=no_folder"]),
    "tokenizer_in_hook": Row(2, ["no_tokenizer"], ["custom_hooks.0.tokenizer.type=no_tokenizer"]),
    "model_type": Row(2, ["no_model"], ["model.type=no_model"]),
    "no_callable": Row(2, ["type=3", "default_hooks.timer"], ["default_hooks.timer.type=3"]),
    "val_type": Row(2, ["no_folder", "val_dataset"], ["val_dataset={'type': 'no_folder', 'folder': '/'}"]),
    "val_no_dict": Row(2, ["val_dataset", "expected dict"], ["val_dataset=3"]),
    # parts that are missing, or not what the loop needs
    "no_sampler": Row(2, ["train_dataloader has no sampler", "tiny.py:"], edit=put(
        "    sampler=dict(type=InternRepoSampler, shuffle=True, seed=1024),\n", "")),
    "no_dataset": Row(2, ["train_dataloader has no dataset"], edit=put("    dataset=train_dataset,\n", "")),
    "dataset_none": Row(2, ["train_dataloader has no dataset"], ["train_dataloader.dataset=None"]),
    "no_optimizer": Row(2, ["optim_wrapper has no optimizer"], ["optim_wrapper.optimizer=None"]),
    "no_model": Row(2, ["no 'model'"], edit=put("model = dict(", "modell = dict(")),
    "plain_hook": Row(2, ["Plain is not a hook", "custom_hooks.0", "derive"], edit=lambda t: first(CLASSES)(
        str(last("custom_hooks = [dict(type=Plain)]")(t)))),
    "hook_fails": Row(2, ["custom_hooks.0 cannot be built: KeyError", "mine"], edit=lambda t: first(CLASSES)(
        str(last("custom_hooks = [dict(type=Fails)]")(t)))),
    "hook_ends": Row(2, ["custom_hooks.0 ends the program: SystemExit(0)", "tiny.py:"], edit=lambda t: first(CLASSES)(
        str(last("custom_hooks = [dict(type=Ends)]")(t)))),
    **{f"{name}_ends": Row(2, ["ends the program: SystemExit(0)", key, "tiny.py:"],
           edit=lambda t, line=line: first(CLASSES)(str(last(line)(t))))
       for name, key, line in (
           ("sampler", "train_dataloader.sampler", "train_dataloader['sampler'] = dict(type=ends)"),
           ("dataset", "train_dataloader.dataset", "train_dataloader['dataset'] = dict(type=ends)"),
           ("model", "model", "model = dict(type=ends)"),
           ("optimizer", "optim_wrapper.optimizer", "optim_wrapper['optimizer'] = dict(type=quits, lr=1)"),
           ("method", "tiny.py:", "train_dataloader['sampler'] = dict(type=Leaves)"),
       )},
    **{f"priority_{value}": Row(2, [f"P.priority = {value!r} is neither a number nor", "NORMAL", "custom_hooks.0"],
           edit=lambda t, v=value: first(f"{CLASSES}\nclass P(_Hook): priority = {v!r}")(
               str(last("custom_hooks = [dict(type=P)]")(t)))) for value in ("SOON", None, [])},
    "own_sampler": Row(2, ["Few has no describe, set_epoch, share, world_size", "train_dataloader.sampler"],
        edit=lambda t: first(CLASSES)(str(last("train_dataloader['sampler'] = dict(type=Few)")(t)))),
    "own_dataset": Row(2, ["list has no documents, fingerprint", "train_dataloader"],
        edit=lambda t: first(CLASSES)(str(last("train_dataloader['dataset'] = dict(type=mine)")(t)))),
    "dataset_fails": Row(2, ["train_dataloader.dataset cannot be built: KeyError", "absent", "tiny.py:"],
        edit=lambda t: first(CLASSES)(str(last("train_dataset['dataset_cfg'] = dict(type=broken, folder='/')")(t)))),
    "model_no_source": Row(2, ["mine makes no ModelSource"],
        edit=lambda t: first(CLASSES)(str(last("model = dict(type=mine)")(t)))),
    # numbers
    **{f"lr_{v}": Row(2, [f"lr = {v} is not", "lr (optim_wrapper.optimizer.lr)"], [f"lr={v}"]) for v in
       ("nan", "inf", "-inf", "0", "-0.001")},
    "weight_decay_nan": Row(2, ["weight_decay = nan is not a finite number"], ["weight_decay=nan"]),
    "beta_inf": Row(2, ["inf is not a finite number", "betas"], ["betas=(0.9,inf)"]),
    "max_norm_0": Row(2, ["max_norm = 0 is not above 0"], ["max_norm=0"]),
    "max_norm_inf": Row(2, ["max_norm = inf is not a finite number"], ["max_norm=inf"]),
    "eta_min_nan": Row(2, ["eta_min = nan", "param_scheduler.1.eta_min"], ["param_scheduler.1.eta_min=nan"]),
    "begin_nan": Row(2, ["begin = nan"], ["param_scheduler.0.begin=nan"]),
    "warm_up_nan": Row(2, ["end = nan"], ["warm_up_ratio=nan"]),
    "epochs_0": Row(2, ["max_epochs = 0 is not an integer of at least 1\n  where"], ["max_epochs=0"]),
    "epochs_1.5": Row(2, ["max_epochs = 1.5 is not an integer"], ["max_epochs=1.5"]),
    "epochs_absurd": Row(2, ["max_epochs = 1000000000000 is above 1,000,000"], ["max_epochs=1000000000000"]),
    "epochs_deleted": Row(2, ["the config has no 'train_cfg'\n  where"], edit=last("del train_cfg")),
    "epochs_infinite": Row(2, ["max_epochs = inf"], ["max_epochs=inf"]),
    "epochs_text": Row(2, ["max_epochs = 'x'"], ["max_epochs=x", "warm_up_ratio=1"]),
    "skipped": Row(2, ["max_skipped = 'x' is not a whole number"], ["train_cfg.max_skipped=x"]),
    "counts_0": Row(2, ["accumulative_counts = 0"], ["accumulative_counts=0"]),
    "seed_negative": Row(2, ["seed = -4", "randomness.seed"], ["randomness.seed=-4"]),
    "workers": Row(2, ["num_workers = -1"], ["dataloader_num_workers=-1"]),
    "interval_0": Row(2, ["interval = 0 is not -1", "save_steps"], ["save_steps=0"]),
    "log_interval_0": Row(2, ["interval = 0 is not at least 1"], ["default_hooks.logger.interval=0"]),
    "val_interval": Row(2, ["val_interval = 0"], ["val_interval=0"]),
    "keep_0": Row(2, ["max_keep_ckpts = 0", "save_total_limit"], ["save_total_limit=0"]),
    "length_absurd": Row(2, ["packed_length = 1000000", "max_length"], [f"max_length={10**30}"]),
    "size_absurd": Row(2, ["vocab_size = 1000000", "below 2^31"], [f"vocab_size={10**30}"]),
    "theta": Row(2, ["rope_theta = 0 is not above 0"], ["model.rope_theta=0"]),
    "scaling_number": Row(2, ["model", "tiny.py:"], ["model.rope_scaling=3"]),
    "randomness": Row(2, ["randomness = 3 is not a dict"], ["randomness=3"]),
    "work_dir_empty": Row(2, ["work_dir = '' is not a folder"], ["work_dir=''"]),
    "folder_empty": Row(2, ["data folder does not exist: ''", "dataset_folder"], ["dataset_folder=''"]),
    "length_0": Row(2, ["packed_length = 0", "max_length"], ["max_length=0"]),
    "lr_text": Row(2, ["lr = 'fast'", "check the values of --cfg-options: lr"], ["lr=fast"]),
    "work_dir_3": Row(2, ["work_dir = 3 is not a folder"], ["work_dir=3"]),
    "resume_3": Row(2, ["resume = 3"], ["resume=3"]),
    "misspelt": Row(2, ["max_lenght", "Did you mean 'max_length'"], ["max_lenght=3"]),
    "two": Row(2, ["2 mistakes", "lr = 0", "save_steps"], ["lr=0", "save_steps=0"]),
    # the file itself
    "gbk": Row(2, ["is not UTF-8 text", "tiny.py:1"], edit=lambda t: "# 学习率\n".encode("gbk") + t.encode()),
    "zero_byte": Row(2, ["tiny.py", "null bytes"], edit=last("\0")),
    "syntax": Row(2, ["tiny.py:", "not Python"], edit=last("a = (")),
    "sys_exit": Row(2, ["ends the program", "SystemExit(0)", "tiny.py:"], edit=last("import sys; sys.exit(0)")),
    "raises": Row(2, ["ZeroDivisionError", "tiny.py:"], edit=last("a = 1 / 0")),
    "import": Row(2, ["nothing_there", "tiny.py:"], edit=last("import nothing_there")),
    "deep": Row(2, ["nested too deep"], edit=last(f"a = {'-' * 5000}1")),
    "unhashable": Row(2, ["lr", "{[]:1}"], ["lr={[]:1}"]),
    # data
    "no_folder": Row(2, ["'/nowhere'", "set dataset_folder to", "dataset_folder (train"], ["dataset_folder=/nowhere"]),
    "folder_is_file": Row(2, ["is a file", "dataset_folder"], ["dataset_folder={w}/file"]),
    "long_name": Row(2, ["not exist", "dataset_folder"], ["dataset_folder=/" + "x" * 300]),
    "no_user": Row(2, ["not exist", "dataset_folder"], ["dataset_folder=~nobody_x/data"]),
    "empty_folder": Row(65, ["no .bin file", "{w}/empty", "dataset_folder"], ["dataset_folder={w}/empty"]),
    "short_data": Row(65, ["1 packs, and one iteration takes 2", "dataset_folder", "lower max_length or accumul"],
        ["dataset_folder={w}/short"]),
    "long_packs": Row(65, ["0 packs", "max_length"], ["max_length=100000"]),
    "long_documents": Row(65, ["0 packs", "lower train_dataset.dataset_cfg.min_length, max_length or"],
        ["train_dataloader.dataset.dataset_cfg.min_length=1000000000"]),
    "torn_data": Row(65, ["has 3 bytes", "b.bin"], ["dataset_folder={w}/torn"]),
    "no_meta": Row(65, ["b.bin has no meta", "dataset_folder"], ["dataset_folder={w}/bare"]),
    "large_ids": Row(65, ["token id 5000 is outside", "dataset_folder"], ["dataset_folder={w}/large"]),
    "order": Row(2, ["'/nowhere.txt'", "data_order_path"], ["data_order_path=/nowhere.txt"]),
    "order_folder": Row(2, ["the folder '{w}/empty' has no data_order.txt"], ["data_order_path={w}/empty"]),
    "order_device": Row(2, ["'/dev/null' is not a regular file", "data_order_path ("], ["data_order_path=/dev/null"]),
    "order_missing": Row(2, ["gone.bin", "order.txt", "data_order_path"], ["data_order_path={w}/order.txt"]),
    "order_empty": Row(2, ["data order is empty"], ["data_order_path={w}/file"]),
    "val_nowhere": Row(2, ["'/nowhere'", "set val_folder to", "val_folder (val_dataset"], ["val_folder=/nowhere"]),
    "val_empty": Row(65, ["no .bin file", "{w}/empty", "val_folder"], ["val_folder={w}/empty"]),
    "val_bare": Row(65, ["b.bin has no meta", "val_folder"], ["val_folder={w}/bare"]),
    # the model, its weights and its tokenizer
    "heads": Row(2, ["hidden_size = 250"], ["hidden_size=250"]),
    "rope": Row(2, ["yarn", "model"], ["model.rope_scaling={'type': 'yarn'}"]),
    "vocabulary": Row(2, ["ids, the model's vocabulary 300", "tokenizer_path", "set vocab_size"], ["vocab_size=300"]),
    "bos": Row(2, ["bos_token_id = 400 is not an id", "model"], ["model.bos_token_id=400"]),
    "tokenizer": Row(2, ["'/nowhere'", "tokenizer_path"], ["tokenizer_path=/nowhere"]),
    "template": Row(2, ["the chat template cannot be read", "tokenizer_config.json: chat_template", "tokenizer_path"],
                    ["tokenizer_path={w}/template"]),
    "tokenizer_torn": Row(2, ["tokenizer.model cannot be read", "tokenizer_path"], ["tokenizer_path={w}/half"]),
    "model_nowhere": Row(2, ["'/nowhere/model'"], edit=pretrained("/nowhere/model")),
    **{f"model_{name}": Row(code, [*says, "tiny.py:"], edit=pretrained(f"{{w}}/{name}"))
       for name, code, says in (
           ("tied", 2, ["tie_word_embeddings", "{w}/tied"]), ("gpt", 2, ["'gpt2'", "{w}/gpt/config.json"]),
           ("list", 74, ["contains [], not an object", "{w}/list/config.json"]),
           ("missing", 74, ["output.weight is missing"]), ("extra", 74, ["not in the model", "more.weight"]),
           ("shape", 74, ["model.norm.weight is [3]"]), ("cut", 74, ["cannot be read as safetensors"]),
           ("vocab", 2, ["the model's vocabulary 300"]),
       )},
    "resume_in_config": Row(2, ["no checkpoint '/nowhere'", "resume"], ["resume=/nowhere"]),
    "load_from": Row(2, ["'/nowhere'", "load_from"], ["load_from=/nowhere"]),
    "load_from_other": Row(74, ["is [", "load_from", "{w}/whole"], ["load_from={w}/whole"]),
    "load_from_empty": Row(2, ["neither a model nor a checkpoint", "load_from"], ["load_from={w}/empty"]),
}  # fmt: skip
COMMAND_LINES: dict[str, Row] = {
    "seed": Row(2, ["--seed -4 is not in 0"], words=["--seed", "-4"]),
    "seed_large": Row(2, ["--seed 4294967296"], words=["--seed", "4294967296"]),
    "seed_text": Row(2, ["--seed", "'x'"], words=["--seed", "x"]),
    **{f"minutes_{m}": Row(2, [f"--max-minutes {m} is not"], words=["--max-minutes", m])
       for m in ("-3", "nan", "inf")},
    "work_dir_file": Row(2, ["work dir cannot be written", "{w}/file"], words=["--work-dir", "{w}/file"]),
    "work_dir_below": Row(2, ["work dir cannot be written", "{w}/file"], words=["--work-dir", "{w}/file/a/b"]),
    "work_dir_proc": Row(2, ["work dir cannot be written", "/proc/x"], words=["--work-dir", "/proc/x/y"]),
    "work_dir_long": Row(2, ["work dir cannot be written"], words=["--work-dir", "{w}/" + "x" * 300]),
    "work_dir_user": Row(2, ["~nobody_x/w", "--work-dir"], words=["--work-dir", "~nobody_x/w"]),
    "work_dir_option_empty": Row(2, ["--work-dir is empty"], words=["--work-dir", ""]),
    "work_dir_locked": Row(73, ["another job uses this work dir", "{w}/busy/.lock"], words=["--work-dir", "{w}/busy"]),
    "work_dir_in_config": Row(2, ["cannot be written", "{w}/file"], ["work_dir={w}/file"], words=["--seed", "1"]),
    "both_engines": Row(2, ["--deepspeed deepspeed_zero1 and --fsdp full"],
        words=["--deepspeed", "deepspeed_zero1", "--fsdp"]),
    "deepspeed": Row(2, ["--deepspeed zero9"], words=["--deepspeed", "zero9"]),
    "deepspeed_empty": Row(2, ["--deepspeed is empty"], words=["--deepspeed", ""]),
    "fsdp": Row(2, ["--fsdp", "'half'"], words=["--fsdp", "half"]),
    "leaner_states": Row(2, ['states = "8bit" is not supported with DeepSpeed'], ["states=8bit"],
        words=["--deepspeed", "deepspeed_zero1"]),
    "attention": Row(2, ["attention", "cannot run here", "model.attention"], ["model.attention=flash4"],
        words=["--seed", "1"]),
    "launcher": Row(2, ["--launcher slurm needs SLURM_PROCID"], words=["--launcher", "slurm"]),
    "memory": Row(2, ["weights, gradients and optimizer state need", "deepspeed_zero3"],
        ["hidden_size=65536", "num_layers=1000"], words=["--seed", "1"]),
    "resume_nowhere": Row(2, ["--resume", "no such folder", "/nowhere"], words=["--resume", "/nowhere"]),
    "resume_long": Row(2, ["there is no such folder", "xxx"], words=["--resume", "x" * 300]),
    "resume_empty": Row(2, ["--resume", "an empty path"], words=["--resume", ""]),
    "resume_no_checkpoint": Row(2, ["no checkpoint there", "{w}/empty"], words=["--resume", "{w}/empty"]),
    "resume_file": Row(2, ["this is a file, not a folder", "{w}/file"], words=["--resume", "{w}/file"]),
    "resume_hf": Row(2, ["Hugging Face", "load_from = '{w}/whole'"], words=["--resume", "{w}/whole"]),
    "resume_cut": Row(74, ["bytes instead of", "{w}/hurt/iter_15.pth"], words=["--resume", "{w}/hurt/iter_15.pth"]),
    "resume_only_one_cut": Row(74, ["nothing to resume from", "bytes instead of", "{w}/hurt"],
        words=["--resume", "--work-dir", "{w}/hurt"]),
    "resume_model": Row(2, ["another model's", "hidden_size: 128 → 256"], ["hidden_size=256"],
        words=["--resume", "{w}/made/iter_15.pth"]),
    "resume_optimizer": Row(2, ["another model's or optimizer's", "optimizer.type"],
        ["optim_wrapper.optimizer.type=torch.optim.NAdam"], words=["--resume", "{w}/made"]),
    "resume_rate": Row(2, ["lr: 0.002 → 0.001 (optim_wrapper"], ["lr=0.001"], words=["--resume", "{w}/made"]),
    "resume_epochs": Row(2, ["15 iterations and would have 45", "max_epochs: 1 → 3"], ["max_epochs=3"],
        words=["--resume", "--work-dir", "{w}/made"]),
    "resume_length": Row(65, ["max_length: 32 → 16 (train_data"], ["max_length=16"], words=["--resume", "{w}/made"]),
    "resume_data": Row(65, ["not what the checkpoint was trained on", "b.bin"], ["dataset_folder={w}/other"],
        words=["--resume", "{w}/made"]),
}  # fmt: skip
REAL = ("plain_hook", "short_data", "model_shape", "work_dir_file", "resume_nowhere")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny: Path, tokenizer_folder: Path) -> Iterator[Path]:
    """Folders that the rows name, and a config that is right but for what a row changes."""
    w = tmp_path_factory.mktemp("world")
    (w / "file").write_text("")
    for name in ("empty", "half", "busy", "here"):
        (w / name).mkdir()
    shutil.copytree(tokenizer_folder, w / "template")
    (w / "template" / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages"}))
    (w / "half" / "tokenizer.model").write_bytes((tokenizer_folder / "tokenizer.model").read_bytes()[:1000])
    write_bin(w / "short" / "a.bin", [[5] * 40])
    write_bin(w / "masked" / "a.bin", [[-5] * 70] * 12)
    write_bin(w / "large" / "a.bin", [[5000] * 70, [5000] * 70])
    for name in ("torn", "bare"):
        write_corpus(w / name, 10, types=("en",))
    os.truncate(w / "torn" / "en" / "b.bin", 3)
    (w / "bare" / "en" / "b.bin.meta").unlink()
    (w / "order.txt").write_text("en/a.bin\nen/gone.bin\n")
    _models(w)
    write_corpus(w / "other", 20, types=("en",))
    (w / "tiny.py").write_text(tiny.read_text())
    assert main(["train", str(tiny), "--work-dir", str(w / "made"), "--cfg-options", "custom_hooks=[]"]) == 0
    shutil.copytree(w / "made" / "iter_15.pth", w / "hurt" / "iter_15.pth")
    os.truncate(w / "hurt" / "iter_15.pth" / "weights" / "model.safetensors", 1000)
    lock = WorkDirLock(w / "busy")
    yield w
    lock.release()


def _models(w: Path) -> None:
    def make(name: str, config: dict[str, Any] | None = None, **changes: Any) -> None:
        c = read_config({"model_type": "internlm2", "bias": False, "vocab_size": VOCABULARY, **MODEL, **(config or {})})
        (w / name).mkdir()
        (w / name / "config.json").write_text(json.dumps(INTERNLM2.write_config(c, "float32") | changes))
        save_file({n: torch.zeros(s) for n, s in hf_shapes(c).items()}, w / name / "model.safetensors")

    def change(name: str, **tensors: Any) -> None:
        make(name)
        file = w / name / "model.safetensors"
        found = {**load_file(file), **{n.replace("__", "."): t for n, t in tensors.items()}}
        save_file({n: t for n, t in found.items() if t is not None}, file)

    make("whole")
    make("tied", tie_word_embeddings=True)
    make("gpt", model_type="gpt2")
    make("list")
    (w / "list" / "config.json").write_text("[]")
    make("vocab", {"vocab_size": 300})
    make("short_context", {"max_position_embeddings": 16})
    make("scaled", {"max_position_embeddings": 16, "rope_scaling": {"type": "dynamic", "factor": 2.0}})
    change("missing", output__weight=None)
    change("extra", more__weight=torch.zeros(1))
    change("shape", model__norm__weight=torch.zeros(3))
    make("cut")
    os.truncate(w / "cut" / "model.safetensors", 100)


def tree(folder: Path) -> dict[str, Any]:
    """Everything below a folder, with sizes; not the lock that this test holds."""
    return {str(p): p.stat().st_size if p.is_file() else None for p in folder.rglob("*") if p.name != ".lock"}


def written(world: Path, row: Row) -> tuple[Path, list[str]]:
    """The row's config, and what follows it on the command line."""
    text: str | bytes = (world / "tiny.py").read_text()
    if row.edit:
        text = row.edit(str(text))
    if isinstance(text, str):
        text = text.replace("{w}", str(world)).encode()
    folder = world / "configs"
    folder.mkdir(exist_ok=True)
    (folder / "tiny.py").write_bytes(text)
    options = [o.replace("{w}", str(world)) for o in row.options]
    words = [o.replace("{w}", str(world)) for o in row.words]
    return folder / "tiny.py", [*words, *(["--cfg-options", *options] if options else [])]


def verdict(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[Any, str]:
    """The exit code of a command, and the error that it ends with."""
    try:
        return main(words), "no error"
    except XTunerError as e:
        return e.exit_code, str(e)
    except SystemExit as e:  # of argparse
        return e.code, capsys.readouterr().err


@pytest.mark.processes
@pytest.mark.parametrize("name", [*CONFIGS, *COMMAND_LINES])
def test_the_same_verdict_from_all(
    world: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = CONFIGS.get(name) or COMMAND_LINES[name]
    monkeypatch.chdir(world / "here")  # where work_dirs/ would be made
    config, more = written(world, row)
    before = tree(world)
    commands = [["train", "--dry-run"], ["train"], *([["check-cfg"]] if name in CONFIGS else [])]
    verdicts = [verdict([*command, str(config), *more], capsys) for command in commands]
    for found in verdicts:
        assert found == verdicts[0]
    code, message = verdicts[0]
    assert code == row.exit, message
    for text in row.says:
        assert text.replace("{w}", str(world)) in message
    assert tree(world) == before


def test_there_are_enough_rows() -> None:
    assert len(CONFIGS) + len(COMMAND_LINES) >= 80


@pytest.mark.processes
def test_the_right_config_is_right(world: Path, xtuner: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """What the rows change one thing of; a dry run leaves nothing either."""
    before = tree(world)
    config = world / "tiny.py"
    assert xtuner("check-cfg", config) == 0
    assert xtuner("train", config, "--dry-run", "--work-dir", world / "new") == 0
    assert tree(world) == before
    good = world / "good.py"
    hooks = "".join(f"class P{n}(_Hook): priority = {p!r}\n" for n, p in enumerate(("NORMAL", "very_low", 99.5)))
    hooks += "custom_hooks = [dict(type=P1), dict(type=P2), dict(type=P0)]"
    good.write_text(str(last(f"{CLASSES}\n{hooks}")(str(pretrained(f"{world}/whole")(config.read_text())))))
    assert xtuner("check-cfg", good, "--cfg-options", f"load_from={world}/whole", f"val_folder={world}/short") == 0
    good.unlink()
    capsys.readouterr()
    assert xtuner("check-cfg", config, "--cfg-options", f"dataset_folder={world}/masked") == 0
    assert "the first pack has no token to learn from" in capsys.readouterr().err
    assert xtuner("data", "stats", world / "masked", "--max-length", 32) == 0
    assert "there is nothing to learn: no token is above 0" in capsys.readouterr().out


@pytest.mark.processes  # the fixture trains
def test_documents_longer_than_the_context_are_reported(
    world: Path, xtuner: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Unless positions are scaled, or no document is longer."""
    text = (world / "tiny.py").read_text()
    for name, options, says in (
        ("own", ["model.max_position_embeddings=16"], "more than model.max_position_embeddings = 16"),
        ("short_context", [], "short_context/config.json has max_position_embeddings = 16 without rope_scaling"),
        ("scaled", [], ""),
        ("short_context", ["max_length=16"], ""),
        ("whole", [], ""),
    ):
        config = world / "context.py"
        config.write_text(text if name == "own" else str(pretrained(f"{world}/{name}")(text)))
        assert xtuner("check-cfg", config, *(["--cfg-options", *options] if options else [])) == 0
        shown = capsys.readouterr().err
        assert shown.count("there are documents of") == bool(says)
        assert says in shown
    config.unlink()


@pytest.mark.processes
def test_the_same_from_real_commands(world: Path) -> None:
    """Five of the rows by processes, each by `train` and another command: exit codes, no traceback, nothing left."""
    before = tree(world)
    jobs = []
    for name in REAL:
        row = CONFIGS.get(name) or COMMAND_LINES[name]
        config, more = written(world, row)
        own = world / name / "tiny.py"
        own.parent.mkdir()
        shutil.copy(config, own)
        for command in (["train"], ["check-cfg"] if name in CONFIGS else ["train", "--dry-run"]):
            jobs.append((row, [*command, str(own), *more]))

    def run(words: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "xtuner", *words], cwd=world / "here", text=True,
                              capture_output=True, check=False)  # fmt: skip

    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(lambda job: run(job[1]), jobs))
    for (row, words), process in zip(jobs, done, strict=True):
        assert process.returncode == row.exit, (words, process.stderr)
        assert "Traceback" not in process.stderr
        for text in row.says:
            assert text.replace("{w}", str(world)) in process.stderr
    for name in REAL:
        shutil.rmtree(world / name)
    assert tree(world) == before


@pytest.mark.processes
def test_a_state_that_cannot_fit(world: Path, xtuner: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """The dry run reports everything first; check-cfg, which runs on login nodes, makes a note of it."""
    options = ["--cfg-options", *COMMAND_LINES["memory"].options]
    with pytest.raises(XTunerError, match="weights, gradients and optimizer state need"):
        xtuner("train", world / "tiny.py", "--dry-run", *options)
    shown = capsys.readouterr()
    assert "plan of the run" in shown.out + shown.err
    assert xtuner("check-cfg", world / "tiny.py", *options) == 0
    shown = capsys.readouterr()
    assert "tiny.py is valid" in shown.out
    assert "note: " in shown.out
    assert "deepspeed_zero3" in shown.out


@pytest.mark.processes
def test_launch_finds_what_the_config_itself_gets_wrong(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("plain_hook", "no_sampler", "sys_exit"):
        config, _ = written(world, CONFIGS[name])
        found = verdict(["launch", "--scheduler", "slurm", str(config)], capsys)
        assert found == verdict(["check-cfg", str(config)], capsys)
        assert found[0] == 2


@pytest.mark.processes
def test_a_hub_model_that_is_not_here_is_not_fetched(world: Path, monkeypatch: pytest.MonkeyPatch, xtuner: Any) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(world / "no_cache"))
    config = world / "hub.py"
    config.write_text(str(pretrained("internlm/internlm2-7b")((world / "tiny.py").read_text())))
    assert xtuner("check-cfg", config) == 0
    with pytest.raises(XTunerError, match=r"no \.bin file"):
        xtuner("check-cfg", config, "--cfg-options", f"dataset_folder={world}/empty")
    config.unlink()


@pytest.mark.processes
def test_a_declared_encoding_is_read(world: Path) -> None:
    text = (world / "tiny.py").read_text()
    for encoded in (
        ("# -*- coding: gbk -*-\n# 学习率\n" + text).encode("gbk"),
        ("# 学习率\n" + text).encode("utf-8-sig"),
        text.replace("\n", "\r\n").encode(),
    ):
        (world / "encoded.py").write_bytes(encoded)
        assert load(str(world / "encoded.py")).get("optim_wrapper.optimizer.lr") == 2e-3
    (world / "encoded.py").unlink()
