"""Configs of XTuner 0.1 and 0.2: run as they are, to the weights of their equals of ours; logged; refused in words."""

import importlib.util
import json
import logging
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.corpus import VOCABULARY
from helpers.paths import REFERENCE, ROOT
from safetensors.torch import load_file, save_file

from xtuner.compat.moved import MOVED
from xtuner.compat.names import REPLACED
from xtuner.compat.names import find_ours as resolve_name
from xtuner.compat.report import DIFFERENCES, log_report, report_paragraphs
from xtuner.compat.settings import SCHEMA
from xtuner.compat.translate import find_unknown, load, replace_names
from xtuner.config import types
from xtuner.config.adapter import find_adapter
from xtuner.config.build import build, check_arguments, resolve_type
from xtuner.config.check import check, find_mistakes
from xtuner.core.errors import ConfigError

Command = Callable[..., int]

# The shape of the old tool's configs for tokenized data; paths are filled in.
LEGACY = """
from mmengine.hooks import (CheckpointHook, DistSamplerSeedHook, IterTimerHook,
                            LoggerHook, ParamSchedulerHook)
from mmengine.optim import AmpOptimWrapper, CosineAnnealingLR, LinearLR
from torch.optim import AdamW
from torch.utils.data import BatchSampler
from transformers import AutoModelForCausalLM, AutoTokenizer

from xtuner.dataset.collate_fns import intern_repo_collate_fn
from xtuner.dataset.intern_repo import (build_packed_dataset,
                                        load_intern_repo_tokenized_dataset)
from xtuner.dataset.samplers import InternRepoSampler
from xtuner.engine import (DatasetInfoHook, EvaluateChatHook, ThroughputHook,
                           VarlenAttnArgsToMessageHubHook)
from xtuner.engine.runner import TrainLoop
from xtuner.model import SupervisedFinetune
from xtuner.utils import PROMPT_TEMPLATE

pretrained_model_name_or_path = 'MODEL'
use_varlen_attn = True
dataset_folder = 'DATA'
prompt_template = PROMPT_TEMPLATE.internlm2_chat
max_length = 32
pack_to_max_length = True
sequence_parallel_size = 1
batch_size = 1
accumulative_counts = 2
accumulative_counts *= sequence_parallel_size
dataloader_num_workers = 0
max_epochs = 2
optim_type = AdamW
lr = 1e-3
betas = (0.9, 0.95)
weight_decay = 0.01
max_norm = 1
warm_up_ratio = 0.1
save_steps = 10
save_total_limit = -1
evaluation_freq = 10
SYSTEM = ''
evaluation_inputs = ['def main(']

tokenizer = dict(
    type=AutoTokenizer.from_pretrained,
    pretrained_model_name_or_path='TOKENIZER',
    trust_remote_code=True,
    padding_side='right')
model = dict(
    type=SupervisedFinetune,
    use_varlen_attn=use_varlen_attn,
    llm=dict(
        type=AutoModelForCausalLM.from_pretrained,
        pretrained_model_name_or_path=pretrained_model_name_or_path,
        trust_remote_code=True))

train_dataset = dict(
    type=build_packed_dataset,
    dataset_cfg=dict(
        type=load_intern_repo_tokenized_dataset,
        data_order_path=None,
        folder=dataset_folder,
        min_length=0,
        file_type='.bin'),
    packed_length=max_length,
    seed=1024)
train_dataloader = dict(
    batch_size=batch_size,
    num_workers=dataloader_num_workers,
    dataset=train_dataset,
    sampler=dict(type=InternRepoSampler, shuffle=True, seed=1024),
    batch_sampler=dict(type=BatchSampler, drop_last=True, batch_size=batch_size),
    collate_fn=dict(type=intern_repo_collate_fn, use_varlen_attn=use_varlen_attn))

optim_wrapper = dict(
    type=AmpOptimWrapper,
    optimizer=dict(type=optim_type, lr=lr, betas=betas, weight_decay=weight_decay),
    clip_grad=dict(max_norm=max_norm, error_if_nonfinite=False),
    accumulative_counts=accumulative_counts,
    loss_scale='dynamic')
param_scheduler = [
    dict(type=LinearLR, start_factor=1 / 40, by_epoch=True, begin=0,
         end=warm_up_ratio * max_epochs, convert_to_iter_based=True),
    dict(type=CosineAnnealingLR, eta_min=lr * 0.15, by_epoch=True,
         begin=warm_up_ratio * max_epochs, end=max_epochs, convert_to_iter_based=True),
]
train_cfg = dict(type=TrainLoop, max_epochs=max_epochs)

custom_hooks = [
    dict(type=DatasetInfoHook, tokenizer=tokenizer, is_intern_repo_dataset=True),
    dict(type=EvaluateChatHook, tokenizer=tokenizer, every_n_iters=evaluation_freq, max_new_tokens=4,
         stop_word='<|im_end|>', evaluation_inputs=evaluation_inputs, system=SYSTEM,
         prompt_template=prompt_template),
    dict(type=ThroughputHook),
]
if use_varlen_attn:
    custom_hooks += [dict(type=VarlenAttnArgsToMessageHubHook)]

default_hooks = dict(
    timer=dict(type=IterTimerHook),
    logger=dict(type=LoggerHook, log_metric_by_epoch=False, interval=1),
    param_scheduler=dict(type=ParamSchedulerHook),
    checkpoint=dict(type=CheckpointHook, by_epoch=False, interval=save_steps, max_keep_ckpts=save_total_limit),
    sampler_seed=dict(type=DistSamplerSeedHook))
env_cfg = dict(
    cudnn_benchmark=False,
    mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0),
    dist_cfg=dict(backend='nccl'))
visualizer = None
log_level = 'INFO'
load_from = None
resume = False
randomness = dict(seed=None, deterministic=False)
log_processor = dict(by_epoch=False, window_size=1, mean_pattern=r'.*(loss|time|data_time|grad_norm|tflops).*')
launcher = 'none'
"""


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder of a tiny InternLM2."""
    from xtuner.core.files import write_json
    from xtuner.families import INTERNLM2
    from xtuner.model import from_scratch

    sizes = dict(vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2)
    source = from_scratch(seed=3, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32, **sizes)
    folder = tmp_path_factory.mktemp("weights")
    save_file({n: p.detach() for n, p in source.build().named_parameters()}, folder / "model.safetensors")
    write_json(folder / "config.json", INTERNLM2.write_config(source.config, "float32"))
    return folder


@pytest.fixture(scope="module")
def legacy_text(weights: Path, corpus: Path, tokenizer_folder: Path) -> str:
    filled = LEGACY.replace("MODEL'", f"{weights}'").replace("DATA'", f"{corpus}'")
    return filled.replace("'TOKENIZER'", repr(str(tokenizer_folder)))


@pytest.fixture(scope="module")
def legacy(legacy_text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("legacy") / "legacy.py"
    path.write_text(legacy_text)
    return path


FORMS = sorted((REFERENCE / "legacy_configs").glob("*.py"))


@pytest.fixture(scope="module")
def options(weights: Path, corpus: Path, tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What makes a 7B config a tiny one: 30 packs of 32 tokens an epoch, 2 an iteration, 2 epochs."""
    start = shutil.copytree(weights, tmp_path_factory.mktemp("start") / "model")
    shutil.copy(tokenizer_folder / "tokenizer.model", start)
    numbers = dict(max_length=32, accumulative_counts=2, max_epochs=2, lr=1e-3, warm_up_ratio=0.1, save_steps=10)
    more = dict(pretrained_model_name_or_path=start, dataset_folder=corpus, dataloader_num_workers=0)
    return [f"{key}={value}" for key, value in (numbers | more).items()]


def rows(work_dir: Path) -> list[dict[str, Any]]:
    """What was learned from, and to what effect, iteration by iteration."""
    (file,) = work_dir.glob("*/vis_data/scalars.json")
    lines = map(json.loads, file.read_text().splitlines())
    return [{k: r[k] for k in ("iter", "lr", "loss", "grad_norm", "targets")} for r in lines if "loss" in r]


def checkpoints(work_dir: Path) -> dict[str, dict[str, torch.Tensor]]:
    files = sorted(work_dir.glob("iter_*.pth/**/*.safetensors"))
    return {str(f.relative_to(work_dir)): load_file(f) for f in files}


@pytest.fixture(scope="module")
def run_of_ours(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the shipped 7B config, made as tiny."""
    from xtuner.cli.main import main

    work_dir = tmp_path_factory.mktemp("ours")
    words = ["train", "internlm2_7b_w_tokenized_dataset", "--work-dir", str(work_dir), "--cfg-options"]
    assert main([*words, *options]) == 0
    assert len(rows(work_dir)) == 30
    return work_dir


@pytest.mark.processes
@pytest.mark.parametrize("form", FORMS, ids=lambda p: p.stem)
def test_every_form_trains_as_our_own_config(
    form: Path, options: list[str], run_of_ours: Path, tmp_path: Path, xtuner: Command, capsys: Any
) -> None:
    assert xtuner("check-cfg", form, "--cfg-options", *options) == 0
    assert "differences from XTuner 0.1 and 0.2:" in capsys.readouterr().out
    assert xtuner("train", form, "--work-dir", tmp_path / "dry", "--dry-run", "--cfg-options", *options) == 0
    assert xtuner("train", form, "--work-dir", tmp_path / "run", "--cfg-options", *options) == 0
    assert rows(tmp_path / "run") == rows(run_of_ours)
    old, new = checkpoints(tmp_path / "run"), checkpoints(run_of_ours)
    assert old.keys() == new.keys()
    for file, tensors in new.items():
        assert tensors.keys() == old[file].keys()
        assert all(torch.equal(tensor, old[file][name]) for name, tensor in tensors.items()), file
    last = tmp_path / "run" / "iter_30.pth"
    if form is FORMS[0]:
        assert xtuner("convert", "pth_to_hf", form, last, tmp_path / "hf", "--cfg-options", *options) == 0


@pytest.mark.processes
def test_mistral_with_added_tokens(legacy_text: str, tmp_path: Path, xtuner: Command) -> None:
    """The old mistral_7b_w_tokenized_dataset: `tokenizer=` in the model, whose new ids get rows in the embedding."""
    from helpers.neighbours import write_model

    from xtuner.model import from_pretrained, from_scratch

    sizes = dict(vocab_size=VOCABULARY - 30, hidden_size=64, intermediate_size=96, num_hidden_layers=2)
    mistral = from_scratch(
        family="mistral", seed=3, num_attention_heads=4, num_key_value_heads=2, sliding_window=9, **sizes
    )
    write_model(tmp_path / "mistral", mistral.config, "mistral")
    stored = load_file(tmp_path / "mistral" / "model.safetensors")
    random = {name: 0.1 * torch.randn(t.shape) for name, t in stored.items()}
    save_file(random, tmp_path / "mistral" / "model.safetensors")
    text = re.sub(
        "pretrained_model_name_or_path = '.*'", f"pretrained_model_name_or_path = '{tmp_path}/mistral'", legacy_text
    )
    text = text.replace("    llm=dict(", "    tokenizer=tokenizer,\n    llm=dict(")
    text = text.replace(
        "        trust_remote_code=True))",
        "        torch_dtype=torch.bfloat16, attn_implementation='flash_attention_2'))",
    )
    config = tmp_path / "mistral_7b_w_tokenized_dataset.py"
    config.write_text("import torch\n" + text)
    assert xtuner("check-cfg", config) == 0
    assert xtuner("train", config, "--work-dir", tmp_path / "run") == 0
    last = tmp_path / "run" / "iter_30.pth"
    grown = from_pretrained(str(last / "weights")).config
    assert (grown.vocab_size, grown.family, grown.sliding_window) == (448, "mistral", 9)
    assert xtuner("convert", "pth_to_hf", config, last, tmp_path / "hf") == 0
    weights = build(load(str(config)).values["model"], "model").build().state_dict()
    for ours, theirs in (("output", "lm_head"), ("model.tok_embeddings", "model.embed_tokens")):
        rows, old = weights[f"{ours}.weight"], random[f"{theirs}.weight"]
        assert rows[: len(old)].equal(old)
        torch.testing.assert_close(rows[len(old) :], old.mean(0).expand(448 - len(old), -1))


# The model of the old tool's QLoRA configs
QLORA = """
import torch
from peft import LoraConfig
from transformers import BitsAndBytesConfig
model = dict(
    type=SupervisedFinetune,
    use_varlen_attn=use_varlen_attn,
    llm=dict(
        type=AutoModelForCausalLM.from_pretrained,
        pretrained_model_name_or_path=pretrained_model_name_or_path,
        trust_remote_code=True,
        torch_dtype=torch.float16,
        quantization_config=dict(
            type=BitsAndBytesConfig,
            load_in_4bit=True,
            load_in_8bit=False,
            llm_int8_threshold=6.0,
            llm_int8_has_fp16_weight=False,
            bnb_4bit_compute_dtype=torch.float16,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_quant_type='nf4')),
    lora=dict(
        type=LoraConfig,
        r=16,
        lora_alpha=16,
        lora_dropout=0.1,
        bias='none',
        task_type='CAUSAL_LM'))
"""


@pytest.mark.processes
def test_qlora(legacy_text: str, weights: Path, tmp_path: Path, xtuner: Command, capsys: Any) -> None:
    """A QLoRA config of the old tool trains what our own config with the same adapter trains."""
    from helpers.lora import write_base

    base = write_base(tmp_path / "base", "internlm2", vocab_size=VOCABULARY)
    legacy_text = legacy_text.replace(repr(str(weights)), repr(str(base)))
    old, new = tmp_path / "old.py", tmp_path / "new.py"
    old.write_text(legacy_text + QLORA)
    new.write_text(
        f"{legacy_text}\nfrom xtuner.model import from_pretrained, lora\n"
        "model = dict(type=from_pretrained, pretrained_model_name_or_path=pretrained_model_name_or_path,\n"
        "    activation_checkpointing=True, frozen_weights='nf4',\n"
        "    adapter=dict(type=lora, rank=16, alpha=16, dropout=0.1))\n"
    )
    assert xtuner("check-cfg", old) == 0
    logged = capsys.readouterr().out
    for line in (
        "peft.LoraConfig → xtuner.legacy.peft.LoraConfig",
        "model.llm.quantization_config.bnb_4bit_compute_dtype: because",
        "in XTuner also the output layer of InternLM2",
    ):
        assert logged.count(line) == 1, line
    assert "in 8 bits" not in logged
    for config in (old, new):
        assert xtuner("train", config, "--work-dir", tmp_path / config.stem) == 0
    assert rows(tmp_path / "old") == rows(tmp_path / "new")
    trained, wanted = checkpoints(tmp_path / "old"), checkpoints(tmp_path / "new")
    assert trained.keys() == wanted.keys()
    for file, tensors in wanted.items():
        assert all(torch.equal(tensor, trained[file][name]) for name, tensor in tensors.items()), file
    assert xtuner("convert", "pth_to_hf", old, tmp_path / "old" / "iter_30.pth", tmp_path / "exported") == 0
    assert json.loads((tmp_path / "exported" / "adapter_config.json").read_text())["r"] == 16
    old.write_text(legacy_text + QLORA.replace("r=16", "r=8"))
    with pytest.raises(ConfigError, match=r"another model's or optimizer's: model\.lora\.r: 16 → 8"):
        xtuner("train", old, "--work-dir", tmp_path / "old", "--resume")
    small = write_base(tmp_path / "small", "internlm2", vocab_size=VOCABULARY - 30)
    grown = QLORA.replace("    lora=", "    tokenizer=tokenizer,\n    lora=")
    old.write_text(legacy_text.replace(str(base), str(small)) + grown)
    with pytest.raises(ConfigError, match=r"more ids \(400\) than the model \(370\)"):
        build(load(str(old)).values["model"], "model")


@pytest.mark.parametrize(
    ("old", "new", "adapter"),
    [
        ("", "", dict(targets="all")),
        ("task_type=", "target_modules=['wqkv', 'w2'], task_type=", dict(targets=["w2", "wqkv"])),
        ("task_type=", "target_modules='all-linear', use_rslora=True, task_type=", dict(scaling="alpha/sqrt(rank)")),
        ("task_type=", "use_dora=True, modules_to_save=['output', 'tok_embeddings'], task_type=",
         dict(dora=True, train=["output", "embedding"])),
        ("load_in_4bit=True,\n            load_in_8bit=False", "load_in_8bit=True", dict(frozen_weights="int8")),
        ("r=16,\n        lora_alpha=16,\n        lora_dropout=0.1,", "", dict(rank=8, alpha=8, dropout=0.0)),
        ("LoraConfig,", "'peft.LoraConfig',", {}),
        ("LoraConfig,", "'LoraConfig',", {}),
    ],
)  # fmt: skip
def test_adapters_of_other_settings(
    legacy_text: str, weights: Path, tmp_path: Path, old: str, new: str, adapter: dict[str, Any]
) -> None:
    from xtuner.model import from_pretrained, lora

    assert old in QLORA
    path = tmp_path / "legacy.py"
    path.write_text(legacy_text + QLORA.replace(old, new))
    config = load(str(path))
    check(config)
    kind = adapter.pop("frozen_weights", "nf4")
    settings = dict(type=lora, rank=16, alpha=16, dropout=0.1) | adapter
    own = from_pretrained(str(weights), activation_checkpointing=True, adapter=settings, frozen_weights=kind)
    assert build(config.values["model"], "model") == own


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("bias='none'", "bias='all'", ["bias = 'all' is not supported", "set bias = 'none'"]),
        ("r=16", "r=640", ["r = 640 is above the smaller side", "model.lora.r", "set r to"]),
        ("r=16", "r=0", ["r = 0", "model.lora.r"]),
        ("lora_dropout=0.1", "lora_dropout=1.5", ["lora_dropout = 1.5", "model.lora.lora_dropout"]),
        (
            "r=16",
            "target_modules=['output']",
            ["no matrix 'output'", 'give modules_to_save=["output"] to train it', "model.lora.target_modules.0"],
        ),
        ("r=16", "target_modules=[]", ["target_modules names no matrix", "'all-linear'"]),
        ("r=16", "target_modules=r'.*w[123]'", ["is a pattern", "list of names"]),
        ("r=16", "modules_to_save=['norm']", ["'norm' cannot be trained in full", "model.lora.modules_to_save.0"]),
        ("r=16", "init_lora_weights='pissa'", ["init_lora_weights = 'pissa'"]),
        ("r=16", "rank_pattern={'wqkv': 4}", ["rank_pattern = {'wqkv': 4}", "same rank"]),
        ("r=16", "rank=16", ["rank"]),
        ("type='nf4'", "type='fp4'", ["bnb_4bit_quant_type = 'fp4'", "set bnb_4bit_quant_type = 'nf4'"]),
        ("bnb_4bit_use_double_quant=True,", "", ["bnb_4bit_use_double_quant = False", "double quantization"]),
        ("load_in_8bit=False", "load_in_8bit=True", ["both True"]),
        ("bnb_4bit_quant_type='nf4'", "llm_int8_skip_modules=['wo']", ["llm_int8_skip_modules = ['wo']"]),
        ("    lora=dict(", "    peft_model='x.pth', lora=dict(", ["peft_model = 'x.pth'", "load_from"]),
        ("    lora=dict(", "    peft_config=dict(", ["peft_config"]),
        (QLORA[QLORA.index("    lora=dict(") :], ")\n", ["quantization_config without lora", "for adapters"]),
        ("type=LoraConfig,", "type=dict,", ["dict is not LoraConfig", "model.lora.type"]),
        ("type=BitsAndBytesConfig,", "type=dict,", ["dict is not BitsAndBytesConfig", "quantization_config.type"]),
        ("type=LoraConfig,", "", ["expected dict(type=…, …), found {'r': 16"]),
    ],
)
def test_adapters_that_would_mean_something_else_are_refused(
    legacy_text: str, tmp_path: Path, old: str, new: str, words: list[str]
) -> None:
    assert old in QLORA
    path = tmp_path / "legacy.py"
    path.write_text(legacy_text + QLORA.replace(old, new, 1))
    config = load(str(path))
    with pytest.raises(ConfigError) as error:  # noqa: PT012
        check(config)
        build(config.values["model"], "model")
    assert "model.adapter" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_what_is_told(legacy: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="xtuner"):
        config = load(str(legacy))
        check(config)
        log_report(config)
    logged = "\n".join(r.getMessage() for r in caplog.records)
    for line in (
        "mmengine.hooks.IterTimerHook → xtuner.train.hooks.IterTimerHook",
        "mmengine.hooks.CheckpointHook → xtuner.legacy.train.CheckpointHook",
        "xtuner.model.SupervisedFinetune → xtuner.legacy.model.SupervisedFinetune",
        "xtuner.utils.PROMPT_TEMPLATE → xtuner.legacy.data.PROMPT_TEMPLATE",
        "train_dataloader.collate_fn (intern_repo_collate_fn): because",
        "train_dataloader.batch_sampler: because",
        "optim_wrapper.loss_scale: because bf16 on GPUs",
        "optim_wrapper.clip_grad.error_if_nonfinite: because",
        "env_cfg: because",
        "visualizer: because",
        "log_processor: because",
        "launcher: because",
        "custom_hooks.3 (VarlenAttnArgsToMessageHubHook): because each batch contains the document borders",
        "custom_hooks.0.is_intern_repo_dataset: because",
        "tokenizer.padding_side: because",
        "tokenizer.trust_remote_code: because",
        "model.llm.trust_remote_code: because",
        "default_hooks.logger.log_metric_by_epoch: because",
        "LinearLR → xtuner.legacy.engine.LinearLR",
        "differences from XTuner 0.1 and 0.2:",
        "mean over the targets of all its packs",
        "count iterations (optimizer steps); in XTuner they counted packs",
        "label_rule='xtuner'",
        "never in fp16",
    ):
        assert logged.count(line) == 1, line
    assert "nothing reads" not in logged
    assert list(report_paragraphs(load("internlm2_7b_w_tokenized_dataset"))) == []


def section(language: str, number: int) -> str:
    """One of the sub-sections of the documentation's part on old configs."""
    text = (ROOT / "docs" / language / "config.md").read_text()
    return text.split("\n### ")[number].split("\n## ")[0]


def test_the_documentation_has_the_same_lists() -> None:
    lists = {}
    for language in ("en", "zh_cn"):
        _, *items = section(language, 1).split("\n- ")
        lists[language] = [" ".join(item.split()) for item in items]
    assert lists["en"] == [d.text for d in DIFFERENCES]
    codes = {language: [set(re.findall("`[^`]+`", item)) for item in items] for language, items in lists.items()}
    assert codes["zh_cn"] == codes["en"]
    facts = {new: find_adapter(resolve_type(new)) for new in REPLACED.values() if not new.endswith("PROMPT_TEMPLATE")}
    facts |= {new: find_adapter(getattr(resolve_type(new), "from_pretrained", None)) for new in facts if "Auto" in new}
    idle = {new.rpartition(".")[2] for new, f in facts.items() if f and f.unused}
    no_effect = {name for f in facts.values() if f for name in f.no_effect}
    plain = {name.partition("=")[0].rpartition(".")[2] for name in no_effect}
    parts = {s.name for s in SCHEMA.settings if s.no_effect}
    for language in ("en", "zh_cn"):
        cells = [line.split("|")[2] for line in section(language, 2).splitlines() if line.startswith("| ")]
        listed = {name.partition("=")[0] for cell in cells for name in re.findall("`([^`]+)`", cell)}
        assert listed == {*idle, *plain, *parts, "_scope_", "priority"}


@pytest.mark.parametrize(
    ("form", "line", "logged"),
    [
        ("xtuner_0_1_15", "", "visualizer.vis_backends.1 (WandbVisBackend): because nothing is sent to Weights"),
        ("xtuner_0_1_15", "", "randomness.diff_rank_seed: because"),
        ("xtuner_0_1_14", "from mmengine.visualization import Visualizer, WandbVisBackend\nvisualizer = dict("
         "type=Visualizer, vis_backends=[dict(type=WandbVisBackend)])", "(WandbVisBackend): because nothing is sent"),
        ("xtuner_0_1_17", "", "default_hooks.checkpoint.priority: because"),
        ("xtuner_0_1_17", "", "default_hooks.timer.priority: because"),
        ("registry_names", "", "only with `use_varlen_attn=True`"),
        ("registry_names", "", "param_scheduler.1._scope_: because"),
        ("registry_names", "train_dataloader['sampler'] = dict(type='DefaultSampler')", "another permutation"),
        ("dumped_names", "default_hooks['checkpoint'] = dict(type='CheckpointHook')", "named them `epoch_N.pth`"),
        ("xtuner_0_1_14", "optim_wrapper['accumulative_counts'] = 4", "in XTuner they counted packs of a rank"),
        ("xtuner_0_1_14", "optim_wrapper['accumulative_counts'] = 4", "used the rate of its last one"),
    ],
)  # fmt: skip
def test_what_is_dropped_or_differs_is_reported(form: str, line: str, logged: str, tmp_path: Path) -> None:
    text = (REFERENCE / "legacy_configs" / f"{form}.py").read_text()
    (tmp_path / "other.py").write_text(f"{text}\n{line}\n")
    config = load(str(tmp_path / "other.py"))
    assert find_mistakes(config) == []
    assert logged in "\n".join(report_paragraphs(config))
    plain = load(str(REFERENCE / "legacy_configs" / "xtuner_0_1_14.py"))
    assert logged not in "\n".join(report_paragraphs(plain)), "reported of a config that it does not concern"


@pytest.mark.processes
def test_neither_mmengine_nor_transformers_is_imported(legacy: Path) -> None:
    code = f"""
import sys
for name in ("mmengine", "transformers", "peft"):
    sys.modules[name] = None  # an import of it would fail
from xtuner.cli.main import main
sys.exit(main(["check-cfg", {str(legacy)!r}]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("legacy.py is valid\n")
    assert "mmengine.hooks.CheckpointHook → " in done.stdout


def test_what_stands_in_the_table_exists() -> None:
    for new in set(REPLACED.values()):
        if not new.endswith("PROMPT_TEMPLATE"):
            resolve_type(new)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (
            "from mmengine.hooks import SyncBuffersHook",
            ["mmengine.hooks.SyncBuffersHook has no replacement", "CheckpointHook"],
        ),
        ("from mmengine.hooks import CheckpontHook", ["Did you mean 'CheckpointHook'"]),
        ("from mmengine.optim import OptimWrapper", ["nearest: mmengine.optim.AmpOptimWrapper"]),
        ("from mmengine.runner import TrainLoop", ["import it from xtuner.engine.runner"]),
        ("from mmengine.config import read_base", ["a single file"]),
        ("import mmengine.hooks", ["`import mmengine.hooks`", "from mmengine.hooks import NAME"]),
        ("import transformers as t", ["from transformers import NAME"]),
        ("from peft import PeftModel", ["peft.PeftModel", "LoraConfig"]),
        ("from xtuner.dataset import process_hf_dataset", ["load_intern_repo_tokenized_dataset"]),
        ("from xtuner.engine import HFCheckpointHook", ["pth_to_hf"]),
        ("from xtuner.engine._strategy import DeepSpeedStrategy", ["leave strategy out"]),
        ("from xtuner.parallel.sequence import SequenceParallelSampler", ["InternRepoSampler"]),
        ("from xtuner.utils import *", ["xtuner.utils.* has no replacement", "PROMPT_TEMPLATE"]),
        ("t = PROMPT_TEMPLATE.baichuan_chat", ["baichuan_chat", "There are internlm2_chat, ", ", plain"]),
    ],
)
def test_what_there_is_nothing_for(legacy_text: str, tmp_path: Path, line: str, words: list[str]) -> None:
    path = tmp_path / "more.py"
    path.write_text(f"{legacy_text}\n{line}\n")
    with pytest.raises(ConfigError) as error:
        load(str(path))
    for word in (*words, f"more.py:{legacy_text.count(chr(10)) + 2}"):
        assert word in str(error.value)


def test_all_imports_are_judged_at_once(tmp_path: Path) -> None:
    path = tmp_path / "bad.py"
    path.write_text("from mmengine.hooks import LoggerHook, NoHook\nfrom peft import PeftModel\n")
    with pytest.raises(ConfigError, match="2 imports of the config") as error:
        load(str(path))
    assert "bad.py:1" in str(error.value)
    assert "bad.py:2" in str(error.value)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("    llm=dict(", "    max_position_embeddings=64,\n    llm=dict(", ["rotary frequencies"]),
        (
            "use_varlen_attn = True",
            "use_varlen_attn = False",
            ["use_varlen_attn = False is not supported\n  where", "see each other"],
        ),
        ("batch_size = 1\n", "batch_size = 2\n", ["batch_size = 2", "legacy.py:"]),
        ("drop_last=True, batch_size=batch_size", "drop_last=True, batch_size=4", ["batch_sampler.batch_size = 4"]),
        ("dict(type=intern_repo_collate_fn, use_varlen_attn=use_varlen_attn)", "dict(type=print)", ["not be called"]),
        ("error_if_nonfinite=False", "error_if_nonfinite=True", ["error_if_nonfinite = True"]),
        ("loss_scale='dynamic'", "dtype='fp8'", ["in bf16 or fp32 only"]),
        ("loss_scale='dynamic'", "paramwise_cfg=dict(dwconv_decay_mult=0)", ["no setting 'dwconv_decay_mult' here"]),
        ("TrainLoop, max_epochs=max_epochs)", "TrainLoop, max_iters=9)", ["train_cfg has no max_epochs\n"]),
        ("type=TrainLoop, max_epochs=max_epochs)", "max_iters=9, by_epoch=False)", ["train_cfg has no max_epochs\n"]),
        ("evaluation_inputs=evaluation_inputs", "evaluation_inputs=[1]", ["is not a string or a list of strings"]),
        ("train_cfg = dict(type=TrainLoop", "train_cfg = dict(type=print", ["a custom loop"]),
        ("launcher = 'none'", "val_cfg = dict(type='ValLoop')", ["val_cfg", "val_dataset"]),
        ("launcher = 'none'", "auto_scale_lr = dict(enable=True, base_batch_size=16)", ["set lr itself"]),
        ("trust_remote_code=True))", "cache_dir='/scratch'))", ["cache_dir = '/scratch'", "HF_HOME"]),
        ("every_n_iters=evaluation_freq", "every_n_epochs=1", ["give every_n_iters"]),
        ("launcher = 'none'", "strategy = dict(type='DeepSpeedStrategy')", ["--deepspeed"]),
        (
            "end=max_epochs, conv",
            "eta_min_ratio=0.1, end=max_epochs, conv",
            ["eta_min and eta_min_ratio are both given"],
        ),
        ("by_epoch=False, interval=save_steps", "save_best='loss', interval=1", ["save_best"]),
    ],
)
def test_what_would_mean_something_else_is_refused(
    legacy_text: str, tmp_path: Path, old: str, new: str, words: list[str]
) -> None:
    assert old in legacy_text
    path = tmp_path / "legacy.py"
    path.write_text(legacy_text.replace(old, new))
    with pytest.raises(ConfigError) as error:
        check(load(str(path)))
    for word in (*words, "legacy.py:"):
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("param_scheduler[0]['type'] = 'LinerLR'", ["no scheduler 'LinerLR'", "param_scheduler", "mean 'LinearLR'"]),
        ("param_scheduler = 'cosine'", ["param_scheduler = 'cosine' is not a list"]),
        ("optim_wrapper['optimizer']['type'] = 'AdamV'", ["no optimizer 'AdamV'", "Did you mean 'Adam"]),
        ("optim_wrapper['optimizer']['type'] = 'FusedAdam'", ["no optimizer 'FusedAdam'", "nearest: AdamW"]),
        ("optim_wrapper['type'] = 'OptimWrapper'", ["nearest: mmengine.optim.AmpOptimWrapper"]),
        ("optim_wrapper['type'] = 'DeepSpeedOptimWrapper'", ["--deepspeed on the command line"]),
        ("custom_hooks.append(dict(type='EMAHook'))", ["no hook 'EMAHook'", "custom_hooks.4", "ThroughputHook"]),
        (
            "custom_hooks.append({'type': 'mmengine.hooks.EMAHook'})",
            ["mmengine.hooks.EMAHook has no replacement", "LoggerHook"],
        ),
        ("default_hooks['x'] = dict(type='mmengine.hooks.logger_hook.LogHook')", ["Did you mean 'LoggerHook'"]),
        ("default_hooks.update(x=dict(type='mmengine.TimerHook'))", ["no hook 'mmengine.TimerHook'", "IterTimerHook"]),
        ("default_hooks['logger']['priority'] = 'SOON'", ["LoggerHook has no setting 'priority'"]),
        ("default_hooks['logger']['_delete_'] = True", ["_delete_", "a single file", "default_hooks.logger"]),
        ("_base_ = './base.py'", ["_base_ is not supported", "a single file"]),
        ("custom_imports = dict(imports=['hooks'])", ["custom_imports = ", "import these modules"]),
        ("framework = 'huggingface'", ["framework = 'huggingface'"]),
        ("train_cfg = dict(type='IterBasedTrainLoop', max_epochs=1)", ["TrainLoop with max_epochs"]),
        ("train_dataloader['sampler']['type'] = 'InfiniteSampler'", ["no sampler 'InfiniteSampler'", "InternRepo"]),
        ("train_dataloader['collate_fn'] = dict(type='pseudo_collate')", ["no collate function 'pseudo_collate'"]),
        ("train_dataset['type'] = 'ConcatDataset'", ["no dataset 'ConcatDataset'", "nearest: load_intern"]),
        ("train_dataset['type'] = 'PackDataset'", ["no dataset 'PackDataset'", "build_packed_dataset"]),
        ("model['llm']['type'] = 'AutoModel.from_pretrained'", ["no model 'AutoModel", "'AutoModelForCausalLM'"]),
        ("visualizer = dict(type='Visualiser')", ["no visualizer 'Visualiser'", "Did you mean 'Visualizer'"]),
        (
            "tokenizer['type'] = 'transformers.LlamaTokenizer'",
            ["transformers.LlamaTokenizer has no replacement", "AutoTokenizer"],
        ),
        ("custom_hooks[1]['prompt_template'] = 'xtuner.utils.PROMPT_TEMPLATE.internlm3'", ["internlm2_chat"]),
    ],
)
def test_names_in_values_that_there_is_nothing_for(
    legacy_text: str, tmp_path: Path, line: str, words: list[str]
) -> None:
    path = tmp_path / "legacy.py"
    path.write_text(f"{legacy_text}\n{line}\n")
    with pytest.raises(ConfigError) as error:
        check(load(str(path)))
    for word in (*words, "legacy.py:"):
        assert word in str(error.value)
    assert "mistakes" not in str(error.value)


_RATE = dict(begin=0, end=10**9, last_step=-1, by_epoch=True, verbose=False)
_LOADED = dict(
    pretrained_model_name_or_path="m", trust_remote_code=False, cache_dir=None, code_revision=None, subfolder="",
    force_download=False, local_files_only=False, proxies=None, revision="main", token=None,
)  # fmt: skip
_LOOP = dict(max_epochs=1, val_begin=1, val_interval=1)
_SERVICE = dict(save_dir=None, init_kwargs=None)
_SIZES = ("hidden_size", "num_layers", "vocab_size", "mlp_ratio", "is_casual", "use_activation_checkpointing")
# Signatures of mmengine 0.10.7 and XTuner 0.2.0: every setting at its default there, and what has none.
SIGNATURES: dict[str, dict[str, Any]] = {
    "mmengine.hooks.CheckpointHook": dict(
        interval=-1, by_epoch=True, save_optimizer=True, save_param_scheduler=True, out_dir=None, max_keep_ckpts=-1,
        save_last=True, save_best=None, rule=None, greater_keys=None, less_keys=None, file_client_args=None,
        filename_tmpl=None, backend_args=None, published_keys=None, save_begin=0,
    ),
    "mmengine.hooks.LoggerHook": dict(
        interval=10, ignore_last=True, interval_exp_name=1000, out_dir=None, keep_local=True, file_client_args=None,
        out_suffix=(".json", ".log", ".py", "yaml"), log_metric_by_epoch=True, backend_args=None,
    ),
    **{f"mmengine.hooks.{n}Hook": {} for n in ("IterTimer", "DistSamplerSeed", "ParamScheduler", "RuntimeInfo")},
    "mmengine.optim.AmpOptimWrapper": dict(
        optimizer=dict(type="AdamW", lr=1e-4), loss_scale="dynamic", dtype=None, use_fsdp=False, accumulative_counts=1,
        clip_grad=None, constructor="DefaultOptimWrapperConstructor", paramwise_cfg=None,
    ),
    "mmengine.optim.LinearLR": dict(start_factor=1 / 3, end_factor=1.0, **_RATE),
    "mmengine.optim.CosineAnnealingLR": dict(T_max=None, eta_min=0.0, eta_min_ratio=None, **_RATE),
    "mmengine.optim.CosineRestartLR": dict(
        periods=[2], restart_weights=(1,), eta_min=None, eta_min_ratio=None, **_RATE
    ),
    "mmengine.optim.ConstantLR": dict(factor=1 / 3, **_RATE),
    "mmengine.optim.MultiStepLR": dict(milestones=[2], gamma=0.1, **_RATE),
    "mmengine.runner.EpochBasedTrainLoop": dict(dynamic_intervals=None, **_LOOP),
    "mmengine.dataset.DefaultSampler": dict(dataset=[], shuffle=True, seed=None, round_up=True),
    "mmengine.visualization.Visualizer": dict(
        name="visualizer", image=None, vis_backends=None, save_dir=None, fig_save_cfg=dict(frameon=False),
        fig_show_cfg=dict(frameon=False),
    ),
    "mmengine.visualization.LocalVisBackend": dict(
        save_dir="x", img_save_dir="vis_image", config_save_file="config.py", scalar_save_file="scalars.json"
    ),
    "mmengine.visualization.TensorboardVisBackend": dict(save_dir="x"),
    "mmengine.visualization.WandbVisBackend": dict(
        save_dir="x", init_kwargs=None, define_metric_cfg=None, commit=True, log_code_name=None, watch_kwargs=None
    ),
    "swanlab.integration.mmengine.SwanlabVisBackend": dict(save_dir="x", init_kwargs=None),
    "mmengine.visualization.MLflowVisBackend": dict(save_dir="x", exp_name=None, tracking_uri=None),
    **{f"mmengine.visualization.{n}VisBackend": _SERVICE for n in ("ClearML", "Neptune", "DVCLive", "Aim")},
    "xtuner.engine.DatasetInfoHook": dict(tokenizer={}, is_intern_repo_dataset=False),
    "xtuner.engine.EvaluateChatHook": dict(
        tokenizer={}, evaluation_inputs=["x"], evaluation_images=None, image_processor=None, system="",
        prompt_template=None, every_n_iters=None, max_new_tokens=600, stop_word=None, stop_words=[],
        generation_kwargs={}, every_n_epochs=None,
    ),
    "xtuner.engine.ThroughputHook": dict.fromkeys(_SIZES),
    "xtuner.engine.VarlenAttnArgsToMessageHubHook": {},
    "xtuner.engine.runner.TrainLoop": dict(max_iters=None, **_LOOP),
    "xtuner.dataset.samplers.InternRepoSampler": dict(dataset=[], shuffle=True, seed=None),
    "xtuner.dataset.samplers.InternlmRepoSampler": dict(dataset=[], shuffle=True, seed=None),
    "xtuner.dataset.collate_fns.default_collate_fn": dict(instances=[], pad_index=0, return_hf_format=False),
    "xtuner.dataset.intern_repo.build_packed_dataset": dict(dataset_cfg={}, packed_length=8192, seed=1024),
    "xtuner.dataset.intern_repo.load_intern_repo_tokenized_dataset": dict(
        folder="x", min_length=0, data_order_path=None, file_type=".bin"
    ),
    "xtuner.model.SupervisedFinetune": dict(
        llm={}, lora=None, peft_model=None, use_activation_checkpointing=True, tokenizer=None,
        max_position_embeddings=None,
    ),
    "transformers.AutoModelForCausalLM.from_pretrained": _LOADED,
    "transformers.BitsAndBytesConfig": dict(
        load_in_8bit=False, load_in_4bit=False, llm_int8_threshold=6.0, llm_int8_skip_modules=None,
        llm_int8_enable_fp32_cpu_offload=False, llm_int8_has_fp16_weight=False, bnb_4bit_compute_dtype=None,
        bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=False, bnb_4bit_quant_storage=None,
    ),
    "peft.LoraConfig": dict(
        r=8, lora_alpha=8, lora_dropout=0.0, target_modules=None, modules_to_save=None, bias="none", use_rslora=False,
        use_dora=False, fan_in_fan_out=False, init_lora_weights=True, rank_pattern={}, alpha_pattern={},
        loftq_config={}, inference_mode=False, lora_bias=False, task_type=None, peft_type=None,
    ),
    "transformers.AutoTokenizer.from_pretrained": dict(encode_special_tokens=True, **_LOADED),
    "torch.utils.data.BatchSampler": dict(sampler=[], batch_size=1, drop_last=False),
}  # fmt: skip


def test_every_old_default_is_accepted() -> None:
    """Values at the old tools' defaults change nothing there, so they must not be refused here."""
    for name, defaults in SIGNATURES.items():
        kind = resolve_type(resolve_name(name) or name)
        check_arguments(kind, defaults, name)
        hints, facts = types.parameter_types(kind), find_adapter(kind)
        wrong = [n for n, value in defaults.items() if n in hints and not types.fits(value, hints[n])]
        assert wrong == [], name
        assert list(facts.find_rejected(defaults) if facts else ()) == [], name
    known = {name.removesuffix(".from_pretrained") for name in SIGNATURES}
    tabled = {new for (module, _), new in REPLACED.items() if not new.endswith(("PROMPT_TEMPLATE", "collate_fn"))}
    assert tabled <= {(resolve_name(name) or name) for name in known}


def test_registry_names_stand_for_the_same_as_dotted_ones() -> None:
    places = dict(
        hooks="default_hooks.x", optim="optim_wrapper", runner="train_cfg", dataset="train_dataloader.sampler",
        visualization="visualizer.vis_backends.0", engine="custom_hooks.0",
    )  # fmt: skip
    for (module, name), new in REPLACED.items():
        place = next((p for room, p in places.items() if f".{room}" in module), "model")
        assert resolve_name(name, place) == new
        assert resolve_name(name, "optim_wrapper.clip_grad") is None, "a value there, not a name"
        if module.startswith("mmengine."):
            assert resolve_name(f"mmengine.{name}") == resolve_name(f"{module}.some_module.{name}") == new
    for name in ("AdamW", "SGD", "Adam", "RMSprop", "LBFGS"):
        assert resolve_name(name, "optim_wrapper.optimizer") == f"torch.optim.{name}"
    assert resolve_name("xtuner.model.adapter.lora") == "xtuner.model.adapters.lora.lora"  # moved
    assert resolve_name("TorchAdafactor", "optim_wrapper.optimizer") == "torch.optim.Adafactor"
    unknown = find_unknown({"optim_wrapper": {"optimizer": {"type": "Adafactor"}}})  # there it is transformers'
    assert "no optimizer 'Adafactor'" in str(unknown["optim_wrapper.optimizer"])


def test_adapters_refuse_where_nothing_was_checked(legacy: Path) -> None:
    spec = load(str(legacy), ["model.peft_model=1"]).values["model"]
    with pytest.raises(ConfigError, match="peft_model = 1 is not supported"):
        build(spec)


def test_other_ways_of_writing_the_same(legacy_text: str, tmp_path: Path) -> None:
    """Names as strings, as the old tool dumped them; float16; one scheduler; mmengine's own default hooks."""
    text = legacy_text.replace(
        "type=AutoTokenizer.from_pretrained", "type='transformers.AutoTokenizer.from_pretrained'"
    )
    text = text.replace("dict(type=IterTimerHook)", "{'type': 'mmengine.hooks.IterTimerHook'}")
    text = text.replace("loss_scale='dynamic'", "dtype='float16'").replace("LoggerHook)", "LoggerHook as Log)")
    text = text.replace("train_cfg = dict(type=TrainLoop, ", "train_cfg = dict(by_epoch=True, val_interval=1, ")
    text = text[: text.index("param_scheduler = [")] + (
        "param_scheduler = dict(type=CosineAnnealingLR, eta_min=0.0, by_epoch=True, T_max=max_epochs,\n"
        "                       convert_to_iter_based=True)\n"
    ) + text[text.index("train_cfg = ") :]  # fmt: skip
    begin = text.index("default_hooks = ")
    text = text[:begin] + "default_hooks = dict(logger=None)\n" + text[text.index("env_cfg = ") :]
    text += "auto_scale_lr = dict(enable=False, base_batch_size=16)\n"
    text += "train_dataloader.update(drop_last=True, prefetch_factor=2)\ntokenizer['encode_special_tokens'] = True\n"
    path = tmp_path / "other.py"
    path.write_text(text)
    c = load(str(path))
    check(c)
    assert list(c.values["default_hooks"]) == ["timer", "sampler_seed", "param_scheduler", "checkpoint"]
    assert c.get("tokenizer.type") == "xtuner.legacy.data.AutoTokenizer.from_pretrained"
    logged = "\n".join(report_paragraphs(c))
    assert "optim_wrapper.dtype: because bf16 on GPUs and fp32 on CPUs" in logged
    for setting in ("train_cfg.val_interval", "train_dataloader.drop_last", "train_dataloader.prefetch_factor"):
        assert f"{setting}: because" in logged
    assert "tokenizer.encode_special_tokens: because" in logged
    assert "default_hooks.checkpoint" not in logged


def test_names_on_the_command_line_and_classes_of_the_real_packages(legacy: Path) -> None:
    of_mmengine = type("LoggerHook", (), {"__module__": "mmengine.hooks.logger_hook"})
    config = load(str(legacy), ["optim_wrapper.optimizer.type=SGD", "optim_wrapper.optimizer.betas=None"])
    assert config.get("optim_wrapper.optimizer.type") == "torch.optim.SGD"
    config.values["default_hooks"]["logger"]["type"] = of_mmengine
    replaced, _ = replace_names(config.values, config.where)
    assert [str(r) for r in replaced] == ["mmengine.hooks.logger_hook.LoggerHook → xtuner.legacy.train.LoggerHook"]
    assert resolve_type(config.get("default_hooks.logger.type")) is resolve_type("xtuner.legacy.train.LoggerHook")


def test_modules_that_have_moved() -> None:
    """The old ones are gone, the new ones are there, in one step; a name that a checkpoint recorded is found."""
    for old, new in MOVED.items():
        assert importlib.util.find_spec(new), new
        assert new not in MOVED
        with pytest.raises(ImportError):
            importlib.import_module(old)
    recorded = "xtuner.compat.adapters.train.LoggerHook"
    assert resolve_type(resolve_name(recorded)) is resolve_type("xtuner.legacy.train.LoggerHook")


def test_adapters_give_what_their_names_say() -> None:
    from xtuner.data.chat_template import PROMPT_TEMPLATE
    from xtuner.legacy.data import DefaultSampler, InternRepoSampler
    from xtuner.legacy.engine import AmpOptimWrapper, CosineAnnealingLR, LinearLR
    from xtuner.legacy.train import CheckpointHook, EvaluateChatHook
    from xtuner.optim.schedule import Schedule

    assert InternRepoSampler(range(9), seed=7).seed == 1024
    assert DefaultSampler(range(9), seed=7).seed == 7
    optimizer = dict(type=torch.optim.AdamW, lr=1.0)
    wrapper = AmpOptimWrapper(optimizer, dict(max_norm=2, error_if_nonfinite=False), dtype="bfloat16")
    assert (wrapper.max_norm, wrapper.dtype) == (2.0, "bf16")
    assert AmpOptimWrapper(optimizer, dtype="float16").dtype == "auto"
    for dtype, ours in ((torch.bfloat16, "bf16"), (torch.float32, "fp32"), (torch.float16, "auto")):
        assert AmpOptimWrapper(optimizer, dtype=dtype).dtype == ours
    with pytest.raises(ConfigError, match="in bf16 or fp32 only"):
        AmpOptimWrapper(optimizer, dtype=torch.float64)
    assert CheckpointHook(interval=1).by_epoch  # mmengine's default
    multipliers = dict(
        custom_keys={"attention": dict(lr_mult=0.5), "attention.wo": dict(decay_mult=2), "w2": dict()},
        norm_decay_mult=0, bias_lr_mult=2, flat_decay_mult=0.5,
    )  # fmt: skip
    found = AmpOptimWrapper(optimizer | dict(weight_decay=0.1), paramwise_cfg=multipliers)
    for name, group in (
        ("model.layers.3.attention.wo.weight", (1.0, 0.2)), ("model.layers.3.attention.wqkv.bias", (0.5, None)),
        ("model.layers.3.attention_norm.weight", (0.5, None)), ("model.norm.weight", (1.0, 0.0)),
        ("model.layers.3.feed_forward.w1.bias", (2.0, 0.05)), ("model.layers.3.feed_forward.w2.weight", (1.0, None)),
    ):  # fmt: skip
        assert (found.find_group(name).lr_scale, found.find_group(name).weight_decay) == group, name
    with pytest.raises(ConfigError, match=r"not a number of at least 0(.|\n)*custom_keys.w1"):
        AmpOptimWrapper(optimizer, paramwise_cfg=dict(custom_keys=dict(w1=dict(lr_mult="x"))))
    cosine = CosineAnnealingLR(eta_min=0.0, begin=1, T_max=2, convert_to_iter_based=True)
    warm = LinearLR(start_factor=0.5, end=1, convert_to_iter_based=True)
    assert [Schedule(1.0, [warm, cosine], 2)(i) for i in (0, 2, 4, 6)] == pytest.approx([0.5, 1.0, 0.5, 0.0])
    hook = EvaluateChatHook({}, ["x"], prompt_template=PROMPT_TEMPLATE.internlm2_chat, stop_word="</s>")
    assert hook.template is not None
    assert hook.template.stop_words == ("<|im_end|>", "</s>")
    hook = EvaluateChatHook({}, ["x"], prompt_template="xtuner.utils.PROMPT_TEMPLATE.internlm2_chat")
    assert hook.template is PROMPT_TEMPLATE.internlm2_chat


def test_check_of_paths_in_a_legacy_config(legacy_text: str, tmp_path: Path, corpus: Path) -> None:
    path = tmp_path / "legacy.py"
    path.write_text(legacy_text.replace(f"'{corpus}'", "'/nowhere'"))
    (problem,) = find_mistakes(load(str(path)), paths=True)
    line = legacy_text[: legacy_text.index("dataset_folder = ")].count("\n") + 1
    where: Any = f"legacy.py:{line} dataset_folder (train_dataloader.dataset.dataset_cfg.folder)"
    assert where in str(problem)
