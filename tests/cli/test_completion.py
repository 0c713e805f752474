"""Completion: scripts for three shells from the parsers of the verbs; bash's is driven as bash drives it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from xtuner.cli.completion import SHELLS, verbs
from xtuner.cli.main import VERBS
from xtuner.config.load import shipped_names

CASES = [
    (["c"], {"copy-cfg", "check-cfg", "completion", "convert", "chat"}),
    (["data", "o"], {"order"}),
    (["eval", "l"], {"loss", "lm-eval"}),
    (["eval", "opencompass", "x", "--backend", ""], {"hf", "turbomind"}),
    (["convert", ""], {"pth_to_hf", "turbomind", "weights"}),
    (["train", "internlm2_"], {name for name in shipped_names() if name.startswith("internlm2_")}),
    (["check-cfg", "internlm2_7"], {"internlm2_7b_w_tokenized_dataset", "internlm2_7b_qlora_w_tokenized_dataset"}),
    (["copy-cfg", "internlm2_t"], {"internlm2_tiny_w_tokenized_dataset"}),
    (["convert", "pth_to_hf", "internlm2_t"], {"internlm2_tiny_w_tokenized_dataset"}),
    (["train", "my"], {"my config.py"}),
    (["train", "x.py", "--la"], {"--launcher"}),
    (["train", "x.py", "--launcher", ""], {"none", "pytorch", "slurm", "mpi"}),
    (["launch", "internlm2_t"], {"internlm2_tiny_w_tokenized_dataset"}),
    (["launch", "x.py", "--scheduler", ""], {"slurm", "k8s", "dlc"}),
    (["data", "order", "--"], {"--help", "--data-folder", "--save-folder", "--file-type"}),
    (["completion", ""], set(SHELLS)),
    (["train", "x.py", "my"], set()),  # files, by bash itself
    (["nonsense", "x"], set()),
]


def script(shell: str) -> str:
    """What the command prints; it imports no torch."""
    code = f"""
import sys
from xtuner.cli.main import main
code = main(["completion", {shell!r}])
assert not {{"torch", "numpy", "transformers"}} & set(sys.modules)
sys.exit(code)
"""
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def bash_script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("completion") / "xtuner.bash"
    path.write_text(script("bash"))
    (path.parent / "my config.py").touch()
    return path


@pytest.mark.processes
def test_bash(bash_script: Path) -> None:
    if not shutil.which("bash"):
        pytest.skip("no bash")
    lines = [f"set -u; source <(cat '{bash_script}')", "complete -p xtuner"]
    for words, _ in CASES:
        quoted = " ".join(f"'{w}'" for w in words)
        lines += [f"COMP_WORDS=(xtuner {quoted}); COMP_CWORD={len(words)}; COMPREPLY=(); _xtuner || echo FAILED"]
        lines += ['(IFS="|"; echo "= ${COMPREPLY[*]-}")']
    done = subprocess.run(
        ["bash", "--norc", "-c", "\n".join(lines)], capture_output=True, text=True, cwd=bash_script.parent
    )
    assert done.stderr == ""
    first, *answers = done.stdout.splitlines()
    assert first == "complete -o default -F _xtuner xtuner"
    assert len(answers) == len(CASES)
    for (words, expected), answer in zip(CASES, answers, strict=True):
        assert {w for w in answer[2:].split("|") if w} == expected, words


@pytest.mark.processes
def test_the_first_words(bash_script: Path) -> None:
    heads = {name.split()[0] for name in VERBS}
    run = f"source '{bash_script}'; COMP_WORDS=(xtuner ''); COMP_CWORD=1; _xtuner; echo ${{COMPREPLY[*]}}"
    done = subprocess.run(["bash", "-c", run], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == heads | {"--help", "--version"}


@pytest.mark.processes
@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_the_other_shells(shell: str, tmp_path: Path) -> None:
    """Every verb, option and config is in the script; where the shell is installed, it can read it."""
    text = script(shell)
    for name, words in verbs().items():
        for word in (*name.split(), *(o.lstrip("-") for o in words.options), *words.first):
            assert word in text, f"{name}: {word}"
    if program := shutil.which(shell):
        (tmp_path / "script").write_text(text)
        environment = {**os.environ, "HOME": str(tmp_path)}
        subprocess.run([program, "-n", str(tmp_path / "script")], check=True, env=environment)


def test_hidden_options_stay_hidden() -> None:
    assert "--local_rank" not in verbs()["train"].options
