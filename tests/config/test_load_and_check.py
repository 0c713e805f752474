"""Configs: overrides, all mistakes at once, shipped templates, learning rates."""

from pathlib import Path
from typing import Any

import pytest

from xtuner.compat.translate import load
from xtuner.config.check import check
from xtuner.config.load import parse_option, shipped_names
from xtuner.core.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a=1", 1),
        ("a=1e-4", 1e-4),
        ("a=True", True),
        ("a=false", False),
        ("a=None", None),
        ("a=some/path", "some/path"),
        ("a=", ""),
        ("a=[x,y]", ["x", "y"]),
        ("a=x,y", ["x", "y"]),
        ("a=1,2", (1, 2)),
        ("a=[(1,x),(2,y)]", [(1, "x"), (2, "y")]),
        ("a='1'", "1"),
        ("a=x=y", "x=y"),
    ],
)
def test_option_values(text: str, value: Any) -> None:
    assert parse_option(text) == ("a", value)


def test_overrides_reach_what_is_derived(tiny: Path) -> None:
    c = load(str(tiny), ["max_length=64", "lr=0.1", "train_dataloader.num_workers=3", "param_scheduler.0.begin=0.05"])
    assert c.get("train_dataset.packed_length") == 64
    assert c.get("train_dataloader.dataset.packed_length") == 64
    assert c.get("model.max_position_embeddings") == 64
    assert c.get("optim_wrapper.optimizer.lr") == 0.1
    assert c.values["param_scheduler"][1]["eta_min"] == pytest.approx(0.015)
    assert c.values["param_scheduler"][0]["begin"] == 0.05
    assert c.get("train_dataloader.num_workers") == 3
    check(c)
    assert c.resolved()["model"]["type"] == "xtuner.model.source.from_scratch"


def test_overrides_inside_of_values_reach_every_line_that_uses_them(tmp_path: Path) -> None:
    """An override has its effect everywhere, or is rejected."""
    (tmp_path / "c.py").write_text(
        "import os\n"
        'folders = ["/a", "/b"]\nfirst = folders[0]\n'
        "if first:\n    sizes: list = [dict(n=1)]\n    double = sizes[0]['n'] * 2\n"
        "betas = (0.9, (0.1, 0.2))\nbeta = betas[1][0]\n"
        "sources = []\nfor f in folders:\n    sources.append(dict(folder=f))\nsecond = sources[1]['folder']\n"
        "wrapper = {}\nwrapper['optimizer'] = dict(lr=1)\nlr = wrapper['optimizer']['lr']\n"
        "table = {0: 5}\ntotal = table[0] * 2\ntable[0] += 1\n"
        "_hidden = dict(x=1)\nx = _hidden['x']\n"
        "one = other = 3\n"
        "if os.sep == 'no':\n    load_from = '/never'\n"
        "def local(folders=folders):\n    folders = 3\n    return folders\n"
    )

    def values(*options: str) -> dict[str, Any]:
        found = load(str(tmp_path / "c.py"), [*options]).values
        return {name: found[name] for name in found if found[name] != plain.get(name)}

    plain: dict[str, Any] = {}
    plain = values()
    assert values("folders.0=/x") == {
        "folders": ["/x", "/b"],
        "first": "/x",
        "sources": [{"folder": "/x"}, {"folder": "/b"}],
    }
    assert values("sizes.0.n=5") == {"sizes": [{"n": 5}], "double": 10}
    assert values("betas.1.0=0.5", "betas.0=7") == {"betas": (7, (0.5, 0.2)), "beta": 0.5}
    assert values("sources.1.folder=/y") == {"sources": [{"folder": "/a"}, {"folder": "/y"}], "second": "/y"}
    assert values("wrapper.optimizer.lr=3", "wrapper.optimizer={'b': 1}") == {
        "wrapper": {"optimizer": {"b": 1, "lr": 3}},
        "lr": 3,
    }
    assert values("table.0=9") == {"table": {0: 9}, "total": 18}
    assert values("_hidden.x=2") == {"x": 2}
    assert values("one=9") == {"one": 9}
    assert values("load_from=/w") == {"load_from": "/w"}
    for option, words in (
        ("folders.2=/x", "no entry '2' in a list of 2"),
        ("betas.1.2=1", "no entry '2' in a list of 2"),
        ("folders.0.n=1", "'0' is '/a', which has no parts"),
        ("os.sep=1", "no 'os' in the config"),
        ("load_from.x=1", "no 'load_from' in the config"),
        ("wrapper.optimiser.lr=1", "Did you mean 'optimizer'"),
        ("sizes.0.n={}", r"c.py:6\n.*\n.*check the values of --cfg-options: sizes.0.n"),
    ):
        with pytest.raises(ConfigError, match=words):
            values(option)


@pytest.mark.parametrize("name", shipped_names())
def test_shipped_configs_are_right(name: str) -> None:
    c = load(name)
    check(c)
    assert [line for line in c.source.splitlines() if line.startswith("#   ") and "PART" in line] == [
        line for line in load("internlm2_7b_w_tokenized_dataset").source.splitlines() if "PART" in line
    ]


def test_the_1m_template_keeps_the_packs_of_a_step() -> None:
    """On as many devices, however many of them share a pack; written as in configs of XTuner 0.1."""
    name = "internlm2_5_7b_1m_w_tokenized_dataset"
    c = load(name)
    assert c.get("model.pretrained_model_name_or_path") == "internlm/internlm2_5-7b-chat-1m"
    assert c.get("train_dataset.packed_length") == 131072
    assert "\naccumulative_counts *= sequence_parallel_size" in c.source
    assert c.setting("sequence_parallel_size") == c.get("optim_wrapper.accumulative_counts") == 4
    for size in (1, 8):
        c = load(name, [f"sequence_parallel_size={size}"])
        assert c.get("optim_wrapper.accumulative_counts") == size


def test_the_7b_template_says_what_the_documentation_says() -> None:
    c = load("internlm2_7b_w_tokenized_dataset")
    for key, value in {
        "pretrained_model_name_or_path": "internlm/internlm2-7b",
        "use_varlen_attn": True,
        "max_length": 32768,
        "pack_to_max_length": True,
        "sequence_parallel_size": 1,
        "batch_size": 1,
        "max_epochs": 1,
        "save_steps": 500,
        "save_total_limit": 2,
        "optim_wrapper.optimizer.lr": 4e-5,
        "optim_wrapper.optimizer.betas": (0.9, 0.95),
        "optim_wrapper.optimizer.weight_decay": 0.01,
        "optim_wrapper.clip_grad.max_norm": 1,
        "train_dataset.packed_length": 32768,
        "train_dataset.seed": 1024,
        "train_dataset.dataset_cfg.min_length": 0,
        "train_dataset.dataset_cfg.file_type": ".bin",
        "train_dataloader.sampler.shuffle": True,
        "train_dataloader.sampler.seed": 1024,
        "default_hooks.checkpoint.interval": 500,
        "default_hooks.checkpoint.max_keep_ckpts": 2,
        "default_hooks.logger.interval": 1,
    }.items():
        assert c.get(key) == value, key


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["max_lenght=3"], ["max_lenght", "Did you mean 'max_length'"]),
        (["use_varlen_attn=False"], ["use_varlen_attn = False is not supported", "see each other", "tiny.py:"]),
        (["pack_to_max_length=False"], ["pack_to_max_length = False"]),
        (["sequence_parallel_size=0"], ["sequence_parallel_size = 0"]),
        (["batch_size=4"], ["batch_size = 4"]),
        (["train_dataloader.batch_size=4"], ["batch_size = 4"]),
        (["train_dataloader.sampler.shufle=1"], ["no setting 'shufle'", "Did you mean 'shuffle'"]),
        (["default_hooks.logger.intervall=1"], ["LoggerHook has no setting", "Did you mean 'interval'"]),
        (["train_dataloader.ballance=1"], ["no setting 'ballance'", "Did you mean 'balance'"]),
        (["train_dataloader.collate=1"], ["no setting 'collate'"]),
        (["max_epochs=0"], ["max_epochs = 0"]),
        (["accumulative_counts=1.5"], ["accumulative_counts = 1.5"]),
        (["train_dataloaders.seed=1"], ["Did you mean 'train_dataloader'"]),
        (["lr.x=1"], ["has no parts"]),
        (["max_lenght=3", "batch_size=4", "max_epochs=0"], ["3 mistakes", "max_lenght", "batch_size", "max_epochs"]),
        (["nonsense"], ["key=value"]),
    ],
)
def test_mistakes_are_explained(tiny: Path, options: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        check(load(str(tiny), options))
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        # wrong types: what stands there, what is asked for, and the line where it is written
        (
            ["accumulative_counts=two"],
            ["accumulative_counts = 'two' is not a whole number", "accumulative_counts (opt"],
        ),
        (["weight_decay=much"], ["weight_decay = 'much' is not a number", "weight_decay (optim_wrapper.optimizer"]),
        (["betas=0.9"], ["betas = 0.9 is not a list of a number"]),
        (["betas=[0.9,x]"], ["betas = [0.9, 'x']"]),
        (["dataset_folder=3"], ["folder = 3 is not a string"]),
        (["train_dataloader.sampler.shuffle=maybe"], ["shuffle = 'maybe' is not True or False"]),
        (
            ["save_steps=1.5"],
            ["interval = 1.5 is not a whole number", "save_steps (default_hooks.checkpoint.interval)"],
        ),
        (["evaluation_freq=x"], ["every_n_iters = 'x' is not a whole number or None"]),
        (["evaluation_inputs=3"], ["evaluation_inputs = 3 is not a string or a list of strings"]),
        (["prompt_template=plain"], ["prompt_template = 'plain' is not ChatFormat or None"]),
        (["train_dataloader.dataset.label_rule=old"], ["label_rule = 'old' is not one of 'internevo', 'xtuner'"]),
        (["dataloader_num_workers=x"], ["num_workers = 'x' is not a whole number"]),
        (["max_norm=x"], ["max_norm = 'x' is not a number or None"]),
        (["resume=3"], ["resume = 3"]),
        (["load_from=3"], ["load_from = 3"]),
        (["log_level=LOUD"], ["log_level = 'LOUD' is not one of CRITICAL"]),
        (["randomness.seed=x"], ["randomness.seed = 'x'"]),
        (["max_epochs=x", "warm_up_ratio=1"], ["max_epochs = 'x' is not an integer"]),
        (["lr=fast"], ["cannot be run: TypeError", "lr = 'fast'"]),
        # values out of range
        (["max_length=0"], ["packed_length = 0 is not at least 1 and below 2^31", "max_length (train_dataloader"]),
        (["train_dataloader.sampler.seed=-1"], ["seed = -1 is not in 0 … 2^32 - 1"]),
        (["dataloader_num_workers=-1"], ["num_workers = -1"]),
        (["train_dataloader.balance=-1"], ["balance = -1 is not at least 0"]),
        (["train_dataloader.balance=True"], ["balance = True is not a whole number"]),
        (["accumulative_counts=0"], ["accumulative_counts = 0 is not at least 1"]),
        (["save_steps=0"], ["interval = 0", "save_steps (default_hooks.checkpoint.interval)"]),
        (["save_total_limit=0"], ["max_keep_ckpts = 0 is not -1 (all) or at least 1"]),
        (["evaluation_freq=0"], ["every_n_iters = 0"]),
        (["optim_wrapper.optimizer.lr=-1"], ["lr = -1 is not above 0"]),
        (["max_norm=0"], ["max_norm = 0 is not above 0"]),
        (["betas=(0.9,1.5)"], ["AdamW does not take these values", "beta"]),
        (["optim_wrapper.dtype=fp8"], ["dtype = 'fp8' is not one of"]),
        (["optim_wrapper.optimizer.type=torch.optim.Adamm"], ["cannot be imported"]),
        (["optim_wrapper.clip_grad.value=1"], ["clip_grad supports only max_norm"]),
        # rules between fields
        (["warm_up_ratio=1.5"], ["ends (end = 1) before it begins (begin = 1.5 epochs)", "param_scheduler.1.begin"]),
        (["warm_up_ratio=-0.5"], ["begin = -0.5 is before the start of the run"]),
        (["param_scheduler.0.convert_to_iter_based=False"], ["whole epochs", "param_scheduler.0"]),
        (["hidden_size=250"], ["hidden_size = 250 is not a multiple of num_attention_heads = 3"]),
        (["model.num_key_value_heads=3"], ["num_attention_heads = 2 is not a multiple of num_key_value_heads = 3"]),
        (["num_layers=0"], ["num_hidden_layers = 0 is not a whole number above 0", "num_layers (model"]),
        (["vocab_size=many"], ["vocab_size = 'many'"]),
        (["model.color=red"], ["from_scratch has no setting 'color'"]),
        (["model.rope_scaling={'type': 'yarn'}"], ["yarn"]),
        (["train_cfg.epochs=3"], ["train_cfg has no setting 'epochs'", "Did you mean 'max_epochs'"]),
        (["train_cfg=3"], ["expected dict(max_epochs=…), found 3"]),
        (["train_dataloader=3"], ["expected dict(dataset=…, …), found 3"]),
        (["custom_hooks=3"], ["custom_hooks = 3 is not a list"]),
        (["default_hooks.logger=None"], ["expected dict(type=…, …), found None"]),
        (["default_hooks.logger=3"], ["expected dict(type=…, …), found 3"]),
        # paths
        (["dataset_folder=/nowhere"], ["data folder does not exist: '/nowhere'", "tiny.py:", "dataset_folder (train"]),
        (["data_order_path=/nowhere.txt"], ["no file '/nowhere.txt'", "xtuner data order"]),
        (
            ["tokenizer_path=/nowhere"],
            ["the tokenizer '/nowhere' is neither a folder here", "tokenizer_path (tokenizer"],
        ),
        (["load_from=/nowhere"], ["no folder '/nowhere' to take weights from"]),
        (["dataset_folder=/a", "hidden_size=250", "lr=1", "betas=x"], ["3 mistakes", "'/a'", "250", "betas"]),
    ],
)
def test_check_cfg_finds(
    tiny: Path, options: list[str], words: list[str], xtuner: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError) as error:
        xtuner("check-cfg", tiny, "--cfg-options", *options)
    for word in words:
        assert word in str(error.value)
    assert "is valid" not in capsys.readouterr().out


def test_check_cfg_of_a_right_config(tiny: Path, xtuner: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert xtuner("check-cfg", tiny) == 0
    assert capsys.readouterr().out == f"{tiny} is valid\n"
    assert xtuner("check-cfg", tiny, "--cfg-options", "betas=[0.9,0.95]", "lr=1", "param_scheduler=[]") == 0


def test_train_finds_the_same_before_anything_starts(tiny: Path, tmp_path: Path, xtuner: Any) -> None:
    options = ["dataset_folder=/nowhere", "tokenizer_path=/nowhere", "save_steps=x"]
    with pytest.raises(ConfigError, match="3 mistakes"):
        xtuner("train", tiny, "--work-dir", tmp_path / "w", "--cfg-options", *options)
    assert not (tmp_path / "w").exists()


def test_models_are_folders_or_hub_ids(tiny: Path, tmp_path: Path) -> None:
    from xtuner.config.check import find_mistakes

    text = tiny.read_text().replace("import from_scratch", "import from_pretrained")
    begin = text.index("model = dict(")
    model = 'model = dict(type=from_pretrained, pretrained_model_name_or_path="NAME")\n'
    text = text[:begin] + model + text[text.index("####", begin) :]
    for name, words in (
        ("internlm/internlm2-7b", None),
        ("internlm2-7b", "the model 'internlm2-7b' is neither a folder here nor a hub id"),
        ("/nowhere/a", "the model '/nowhere/a' is neither a folder here nor a hub id"),
        (str(tmp_path), "has no config.json"),
    ):
        (tmp_path / "c.py").write_text(text.replace("NAME", name))
        found = [str(p) for p in find_mistakes(load(str(tmp_path / "c.py")), paths=True)]
        assert len(found) == (words is not None)
        assert words is None or words in found[0]


def test_a_config_that_cannot_run_names_the_line(tmp_path: Path) -> None:
    for text, words in (
        ("a = 1\nb = a +\n", "bad.py:2"),
        ("a = 1\nimport nothing_there\n", "bad.py:2"),
        ("a = 1\nb = [][0]\n", "IndexError"),
        ("", "no 'model'"),
    ):
        (tmp_path / "bad.py").write_text(text)
        with pytest.raises(ConfigError, match=words):
            check(load(str(tmp_path / "bad.py")))
    text = load("internlm2_7b_w_tokenized_dataset").source
    (tmp_path / "bad.py").write_text(text.replace("load_from = None", "lod_from = None"))
    with pytest.raises(ConfigError, match=r"bad\.py:[0-9]+ lod_from"):
        check(load(str(tmp_path / "bad.py")))
    begin = text.index("custom_hooks = [")
    (tmp_path / "good.py").write_text(text[:begin] + "custom_hooks = []\n" + text[text.index("log_level") :])
    check(load(str(tmp_path / "good.py")))  # settings left over when hooks are removed are reported, not rejected
    for option in ("evaluation_freq=5", "evaluation_inputs.0=a"):  # unless they are overridden
        with pytest.raises(ConfigError, match=r"nothing reads the setting 'evaluation_.*\n.*--cfg-options evaluation_"):
            check(load(str(tmp_path / "good.py"), [option]))
    with pytest.raises(ConfigError, match="Did you mean 'internlm2_7b_w_tokenized_dataset'"):
        load("internlm2_7b_w_tokenised_dataset")
