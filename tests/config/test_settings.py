"""A setting is declared once; everything that knows settings reads the declaration."""

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from xtuner.compat.translate import load
from xtuner.config import types
from xtuner.config.build import build
from xtuner.config.check import check, find_mistakes
from xtuner.config.load import SHIPPED
from xtuner.config.schema import REQUIRED, Rule, Setting
from xtuner.config.settings import SCHEMA
from xtuner.core.errors import ConfigError, DataError
from xtuner.data import InternRepoSampler, build_packed_dataset, load_intern_repo_tokenized_dataset
from xtuner.dist.mesh import Mesh
from xtuner.engine import OptimWrapper
from xtuner.families import FAMILIES
from xtuner.model import from_pretrained, from_scratch
from xtuner.tools.settings_pages import LANGUAGES, render_page
from xtuner.tools.shipped_configs import render_configs
from xtuner.train import hooks, preflight
from xtuner.train.checkpoints.history import ResumeChoice
from xtuner.train.plan import make_plan
from xtuner.train.reporting.config_changes import compare_configs
from xtuner.train.resume import ResumePoint, require_same_run
from xtuner.train.state import TrainState

DOCS = Path(__file__).resolve().parents[2] / "docs"
NEW = Setting(
    "train_cfg.warm_restarts", int, 3, "times that the schedule begins anew", "学习率重新开始的次数", "impossible",
    (Rule(lambda v: v < 9, "is not below 9", "< 9"),),
)  # fmt: skip


@pytest.fixture
def _new(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SCHEMA, "declared", (*SCHEMA.declared, NEW))


@pytest.mark.usefixtures("_new")
def test_one_declaration_is_all_that_a_setting_needs(tiny: Path, xtuner: Any, capsys: Any) -> None:
    option = f"{NEW.key}="
    assert load(str(tiny)).setting(NEW.key) == 3
    assert load(str(tiny), [option + "4"]).setting(NEW.key) == 4
    assert xtuner("check-cfg", tiny, "--cfg-options", option + "4") == 0
    for value, words in (("9", "= 9 is not below 9"), ("x", "= 'x' is not a whole number")):
        with pytest.raises(ConfigError, match=words) as error:
            xtuner("check-cfg", tiny, "--cfg-options", option + value)
        assert "tiny.py:" in error.value.where
    with pytest.raises(ConfigError, match="Did you mean 'warm_restarts'"):
        check(load(str(tiny), ["train_cfg.warm_restart=1"]))
    capsys.readouterr()
    assert xtuner("list-cfg", "--settings", "-p", "restarts") == 0
    assert capsys.readouterr().out.split("\n") == [
        f"{NEW.key}: int, < 9, default 3", f"    {NEW.help}; at a resume: impossible", ""
    ]  # fmt: skip
    for language, text in (("en", NEW.help), ("zh_cn", NEW.zh)):
        assert f"| `{NEW.key}` | `int, < 9` | `3` | {text} |" in render_page(language)
    (change,) = compare_configs({"train_cfg": {}}, {"train_cfg": {"warm_restarts": 4}})
    assert (change.key, change.kind) == (NEW.key, "impossible")


def test_without_the_declaration_it_is_nobodys(tiny: Path) -> None:
    with pytest.raises(ConfigError, match="train_cfg has no setting 'warm_restarts'"):
        check(load(str(tiny), [f"{NEW.key}=4"]))
    (change,) = compare_configs({"train_cfg": {}}, {"train_cfg": {"warm_restarts": 4}})
    assert change.kind == "changes the result"


def test_the_pages_are_up_to_date() -> None:
    """`make settings` writes them."""
    for language in LANGUAGES:
        assert (DOCS / language / "settings.md").read_text() == render_page(language)
    assert all(s.zh for s in SCHEMA.settings if s.help)


def test_shipped_configs_are_up_to_date() -> None:
    """They are what `make configs` writes, and no other file is there."""
    shipped = {file.name: file.read_text(encoding="utf-8") for file in SHIPPED.glob("*.py") if file.stem != "__init__"}
    assert shipped == dict(render_configs())


def test_what_shipped_configs_suggest_in_comments_is_accepted(tmp_path: Path) -> None:
    text = (SHIPPED / "internlm2_7b_w_tokenized_dataset.py").read_text()
    suggested = r"adapter=|frozen_weights=|optimizer=|param_scheduler = |    type=|\)$"
    text, lines = re.subn(rf"(?m)^( *)# (?={suggested})", r"\1", text)
    assert lines == 6
    text = text.replace("    optimizer=dict(type=optim_type, lr=lr, betas=betas, weight_decay=weight_decay),\n", "")
    (tmp_path / "config.py").write_text(text)
    config = load(str(tmp_path / "config.py"))
    assert find_mistakes(config) == []
    values = config.values
    assert (values["model"]["adapter"]["rank"], values["param_scheduler"]["decay"]) == (16, 0.1)
    assert build(values["optim_wrapper"]).muon.adamw["lr"] == 4e-5


@pytest.mark.parametrize(
    ("parent", "built"),
    [
        ("model", from_pretrained),
        ("model", from_scratch),
        ("optim_wrapper", OptimWrapper),
        ("train_dataloader.dataset", build_packed_dataset),
        ("train_dataloader.dataset.dataset_cfg", load_intern_repo_tokenized_dataset),
        ("train_dataloader.sampler", InternRepoSampler),
        ("default_hooks.logger", hooks.LoggerHook),
        ("default_hooks.checkpoint", hooks.CheckpointHook),
        ("custom_hooks.0", hooks.DatasetInfoHook),
        ("custom_hooks.0", hooks.EvaluateChatHook),
    ],
)
def test_what_is_built_takes_what_is_declared(parent: str, built: Any) -> None:
    given = {"self", "dataset", "rank", "world_size", "opening", "shape"}  # by the run
    hints = types.parameter_types(built)
    for name, parameter in inspect.signature(built).parameters.items():
        if name in given:
            continue
        setting = SCHEMA.find(f"{parent}.{name}", built.__name__)
        assert setting, f"{parent}.{name} is not declared"
        assert setting.default == (REQUIRED if parameter.default is parameter.empty else parameter.default), name
        if setting.kind not in (Any, dict, list):
            plain = set(get_args(hints[name]) or [hints[name]]) - {Path}
            assert plain == set(get_args(setting.kind) or [setting.kind]), name


def test_arguments_that_a_run_passes_are_no_settings(tiny: Path) -> None:
    """Neither accepted nor suggested; `rank` in a config would give every rank the same packs."""
    data, optimizer = "train_dataloader.dataset", "optim_wrapper.optimizer"
    for key, names, takes in (
        (f"{data}.dataset_cfg", ("opening",), "folder, min_length, data_order_path, file_type, cache_dir, learn_zero"),
        ("train_dataloader.sampler", ("dataset", "rank", "world_size"), "shuffle, seed"),
        (
            optimizer,
            ("params",),
            "lr, betas, eps, weight_decay, amsgrad, maximize, foreach, capturable, differentiable",
        ),
    ):
        for name in (*names, "shufle"):
            (error,) = find_mistakes(load(str(tiny), [f"{key}.{name}=0"]))
            assert f" has no setting {name!r}" in error.what
            assert error.do.startswith(f"it takes: {takes}")
            assert not set(names) & set(error.do.replace(",", "").split())
    words = tiny.read_text().replace("dataset_cfg=dict(", "dataset_cfg=dict(opening=None, ")
    (tiny.parent / "c.py").write_text(words)
    with pytest.raises(ConfigError, match="no setting 'opening'"):
        check(load(str(tiny.parent / "c.py")))


def test_every_field_of_a_family_is_declared() -> None:
    fields = {field for family in FAMILIES.values() for field in family.fields}
    assert [field for field in sorted(fields) if SCHEMA.find(f"model.{field}", "from_scratch") is None] == []


def test_the_plan_of_other_machines(tiny: Path, xtuner: Any, capsys: Any) -> None:
    """By one process, without weights: what 16 would do."""
    options = ["--cfg-options", "accumulative_counts=1", "max_length=8"]
    assert xtuner("train", tiny, "--dry-run", "--ranks", 16, "--fsdp", "hybrid", *options) == 0
    report = capsys.readouterr().out
    for words in ("FSDP, hybrid", "on each of 16 ranks", "tokens in packs: 16;", "one pack per rank and iteration"):
        assert words in report
    for words, message in ((["--ranks", 16], "needs --dry-run"), (["--ranks", 0, "--dry-run"], "0 is not 1 or more")):
        with pytest.raises(ConfigError, match=message):
            xtuner("train", tiny, *words)


@pytest.mark.processes
def test_a_list_of_settings_needs_no_torch() -> None:
    code = "import sys\nfrom xtuner.cli.main import main\n"
    code += "main(['list-cfg', '--settings'])\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True)
    assert done.stdout.count("\n") > 100


def test_a_resume_knows_what_hooks_once_switched_on(tiny: Path, tmp_path: Path) -> None:
    """Of a checkpoint of before: without these hooks, it had no schedule, and the first epoch's order in all epochs."""
    config = load(str(tiny))
    facts = make_plan(preflight.prepare_settings(config, [], tmp_path / "w", torch.device("cpu"), None, Mesh())).facts
    before = json.loads(json.dumps({k: v for k, v in facts.items() if k != "version"}))
    found = ResumePoint(ResumeChoice(tmp_path), TrainState(), before)
    require_same_run(found, dict(facts), allow_change=False)
    del before["config"]["default_hooks"]["param_scheduler"]
    with pytest.raises(ConfigError, match=r"param_scheduler.0.type: None → "):
        require_same_run(found, dict(facts), allow_change=False)
    del before["config"]["default_hooks"]["sampler_seed"]
    before["data"]["reshuffle"] = False
    with pytest.raises(DataError, match=r"train_dataloader.reshuffle: False → None"):
        require_same_run(found, dict(facts), allow_change=False)
    before["version"] = 2  # since then they are settings
    before["data"]["reshuffle"] = True
    require_same_run(found, dict(facts), allow_change=False)
