"""The command as a user meets it: verbs, exit codes, and a wheel that works outside the checkout."""

import argparse
import importlib
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.paths import ROOT
from helpers.processes import shell

from xtuner.cli.main import VERBS, main
from xtuner.compat.translate import load
from xtuner.core.errors import ConfigError

Command = Callable[..., int]


def test_list_and_copy(tmp_path: Path, corpus: Path, xtuner: Command, capsys: Any) -> None:
    at_home = ["--cfg-options", f"dataset_folder={corpus}", "max_length=64", "max_epochs=3"]
    assert xtuner("list-cfg") == 0
    names = capsys.readouterr().out.split()
    internlm2 = [f"internlm2_{size}" for size in ("1_8b", "20b", "5_7b_1m", "7b_qlora", "7b", "tiny")]
    others = ["internlm3_8b", "llama3_1_8b", "mistral_7b", "qwen2_5_7b", "qwen3_8b"]
    assert names == [f"{model}_w_tokenized_dataset" for model in [*internlm2, *others]]
    assert xtuner("list-cfg", "-p", "7b") == 0
    assert capsys.readouterr().out.split() == [*names[2:5], *names[8:10]]
    assert xtuner("list-cfg", "-p", "internevo") == 0
    assert capsys.readouterr().out == (
        "internlm2_7b_w_internevo_dataset (an older name of internlm2_7b_w_tokenized_dataset)\n"
    )
    older = "internlm2_7b_w_internevo_dataset"
    assert xtuner("copy-cfg", older, tmp_path) == xtuner("check-cfg", tmp_path / f"{older}_copy.py", *at_home) == 0
    assert load(older).source == (tmp_path / f"{older}_copy.py").read_text() == load(names[4]).source
    capsys.readouterr()
    with pytest.raises(ConfigError, match="no shipped config matches"):
        xtuner("list-cfg", "-p", "gpt5")
    assert xtuner("copy-cfg", names[3], tmp_path / "new") == 0
    copy = tmp_path / "new" / f"{names[3]}_copy.py"
    assert copy.read_text() == (ROOT / "xtuner" / "configs" / f"{names[3]}.py").read_text()
    with pytest.raises(ConfigError, match="already exists"):
        xtuner("copy-cfg", names[3], tmp_path / "new")
    with pytest.raises(ConfigError, match="Did you mean 'internlm2_7b_w_tokenized_dataset'"):
        xtuner("copy-cfg", "internlm2_7b_tokenized_dataset", tmp_path)


@pytest.mark.processes
def test_exit_codes_are_the_truth(tmp_path: Path, tiny: Path, corpus: Path) -> None:
    for code, words, message in (
        (0, ["--version"], ""),
        (2, [], ""),
        (2, ["trian", "x"], "Did you mean 'train'"),
        (2, ["train", "nothing.py"], "no config file"),
        (2, ["train"], "required"),
        (0, ["data", "--help"], ""),
        (2, ["convert"], ""),
        (2, ["convert", "pth"], "Did you mean 'convert pth_to_hf'"),
        (2, ["data", "tokenise", "x"], "there is no verb 'data tokenise'. Did you mean 'data tokenize'?"),
        (65, ["eval", "loss", str(tiny), str(tmp_path)], "no .bin file"),
        (2, ["convert", "pth_to_hf", str(tiny), str(tmp_path / "x"), str(tmp_path / "y")], "there is no checkpoint"),
    ):
        done = shell(*words)
        assert done.returncode == code, done.stderr
        assert message in done.stderr
        assert "Traceback" not in done.stderr
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "a.bin").write_bytes(b'{"tokens": [1, 2, 3]\n' * 30)
    (broken / "a.bin.meta").write_bytes((corpus / "en" / "a.bin.meta").read_bytes())
    words = ["train", tiny, "--work-dir", tmp_path / "w", "--cfg-options", f"dataset_folder={broken}"]
    done = shell(*words, "custom_hooks=[]")
    assert done.returncode == 65, done.stderr
    script = ROOT / "xtuner" / "tools" / "get_data_order.py"
    order = [sys.executable, script, "--data-folder", f"{corpus}/", "--save-folder", tmp_path, "--file-type", ".bin"]
    subprocess.run(order, check=True, capture_output=True)
    assert (tmp_path / "data_order.txt").read_text() == "code/a.bin\ncode/b.bin\nen/a.bin\nen/b.bin\n"


@pytest.mark.processes
def test_a_wheel_works_outside_the_checkout(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    options = ["--no-deps", "--no-build-isolation", "-w", tmp_path]
    subprocess.run([*pip, "wheel", *options, ROOT], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("xtuner-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", tmp_path / "site", wheel], check=True)
    code = f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n"
    code += "import xtuner, runpy; assert xtuner.__file__.startswith(sys.path[0])\nfrom xtuner.cli.main import main\n"
    code += "main(['launch', '--scheduler', 'slurm', 'internlm2_7b_w_tokenized_dataset'])\n"
    code += f"main(['list-cfg']); main(['copy-cfg', 'internlm2_7b_w_tokenized_dataset', {str(tmp_path)!r}])\n"
    code += (
        f"from xtuner.config.load import load; load({str(tmp_path)!r} + '/internlm2_7b_w_tokenized_dataset_copy.py')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "internlm2_tiny_w_tokenized_dataset" in done.stdout
    assert "#SBATCH --signal=USR1@300\n" in done.stdout
    for name in ("py.typed", "tools/evaluators/evaluation.txt", "tools/evaluators/turbomind.txt"):
        assert (tmp_path / "site" / "xtuner" / name).is_file(), name


def test_a_group_shows_its_verbs(xtuner: Command, capsys: Any) -> None:
    assert xtuner("convert", "--help") == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: xtuner convert VERB ...\n")
    assert "convert turbomind" in shown
    assert "train" not in shown


def test_help_states_every_default_once(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    for verb, (module, _) in VERBS.items():
        parser = argparse.ArgumentParser()
        importlib.import_module(module).add_arguments(parser)
        with pytest.raises(SystemExit):
            main([*verb.split(), "--help"])
        shown = capsys.readouterr().out
        assert "(default: None)" not in shown
        blocks = [block.strip() for block in re.split(r"\n(?=  -)", shown)[1:]]
        for action in parser._actions:
            if not action.option_strings or argparse.SUPPRESS in (action.help, action.default):
                continue
            (line,) = (b for b in blocks if re.search(rf"{action.option_strings[-1]}(?![\w-])", b.split("   ")[0]))
            assert len(action.help or "") > 3, (verb, line)
            assert line.count("(default") <= 1, (verb, line)
            if action.default not in (None, "", []) and not isinstance(action.default, bool):
                assert "default" in line, (verb, line)
                assert str(action.default) in line or action.default in (0.0, "text"), (verb, line)
