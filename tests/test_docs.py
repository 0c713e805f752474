"""The commands of the documentation run as they stand, and both languages show the same ones."""

import argparse
import importlib
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(p.name for p in (ROOT / "docs" / "en").glob("*.md"))


def commands(page: Path) -> list[str]:
    """Lines of all blocks marked `bash run`."""
    blocks = re.findall(r"^```bash run\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line]


def test_both_languages_say_the_same() -> None:
    assert sorted(p.name for p in (ROOT / "docs" / "zh_cn").glob("*.md")) == PAGES
    for page in PAGES:
        english, chinese = (ROOT / "docs" / folder / page for folder in ("en", "zh_cn"))
        assert commands(english) == commands(chinese), page
        for mark in ("## ", "```", "| "):  # the same sections, examples and tables
            counts = [sum(line.startswith(mark) for line in p.read_text().splitlines()) for p in (english, chinese)]
            assert counts[0] == counts[1], (page, mark)
    fences = [
        re.findall(r"```bash\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)
        for name in ("README.md", "README_zh-CN.md")
    ]
    words = [[re.sub(r" *#.*", "", block) for block in blocks] for blocks in fences]
    assert words[0] == words[1]


def test_memory_by_arithmetic_is_the_programs() -> None:
    """The table of docs/*/cluster.md, from the shapes of the shipped templates' models on 8 GPUs."""
    import torch

    from xtuner.dist.mesh import Mesh
    from xtuner.engine import memory
    from xtuner.engine.zero import deepspeed_config, zero_memory
    from xtuner.model import from_scratch
    from xtuner.optim.optim_wrapper import OptimWrapper

    optim, cpu = OptimWrapper(dict(type=torch.optim.AdamW, lr=1), dtype="bf16"), torch.device("cpu")
    eight = Mesh(dp_shard=8, local_size=8)
    shapes = {"1.8B": (2048, 24, 16, 8192), "7B": (4096, 32, 32, 14336), "20B": (6144, 48, 48, 16384)}
    for name, (hidden, layers, heads, ffn) in shapes.items():
        source = from_scratch(
            vocab_size=92544, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
            num_key_value_heads=8, intermediate_size=ffn, activation_checkpointing=True,
        )  # fmt: skip
        stages = ("zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
        settings = {s: deepspeed_config.read_settings(f"deepspeed_{s}") for s in stages}
        state = {}
        for stage, zero in settings.items():
            free = None if "offload" in stage else 79 * 2**30
            state[stage] = zero_memory.plan_zero_memory(source, optim, cpu, eight, zero, free=free).state
        state["fsdp"] = memory.plan_memory(source, optim, torch.device("cuda"), eight, free=79 * 2**30).state
        parameters = memory.num_parameters(source.config)
        sizes = [16 * parameters, *(state[s] for s in (*stages[:3], "fsdp", *stages[3:]))]
        row = " | ".join([name, *(f"{size / 2**30:.1f}" for size in sizes)])
        host = ", ".join(f"{n * parameters / 2**30:.0f}" for n in (12, 14))
        for folder in ("en", "zh_cn"):
            assert f"| {row} | {host} |" in (ROOT / "docs" / folder / "cluster.md").read_text()


def test_links_lead_somewhere() -> None:
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        for link in re.findall(r"\]\(([^)#]+?)\)", page.read_text()):
            if "://" not in link:
                assert (page.parent / link).exists(), f"{page}: {link}"


def test_the_files_that_are_named_exist() -> None:
    """Paths in the pages for developers, from the root or within the package."""
    for page in (ROOT / "CONTRIBUTING.md", ROOT / "docs" / "architecture.md", *(ROOT / "docs").glob("*/extend.md")):
        for path in re.findall(r"`((?:\w+/)+\w+\.\w+)[`:]", page.read_text()):
            assert any((root / path).exists() for root in (ROOT, ROOT / "xtuner")), f"{page}: {path}"


def test_the_tests_that_are_named_exist() -> None:
    """Pages name tests by function, wherever its file is."""
    defined = {
        n for f in (ROOT / "tests").rglob("test_*.py") for n in re.findall(r"^def (test_\w+)", f.read_text(), re.M)
    }
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        for name in re.findall(r"`(test_\w+)`", page.read_text()):
            if page.name != "settings.md":  # there are settings of such names
                assert name in defined, f"{page}: {name}"


def test_the_verbs_and_options_of_the_documentation_exist() -> None:
    from xtuner.cli.main import VERBS

    seen = set()
    for page in [*ROOT.glob("README*.md"), *(ROOT / "docs").rglob("*.md")]:
        text = page.read_text().replace("\\\n", " ")
        for line in re.findall(r"^(?:\$ )?xtuner ([a-z][^#|&>\n]*)", text, re.MULTILINE):
            words = line.split()
            verb = next((v for v in (" ".join(words[:2]), words[0]) if v in VERBS), "")
            assert verb, f"{page}: xtuner {line}"
            parser = argparse.ArgumentParser()
            importlib.import_module(VERBS[verb][0]).add_arguments(parser)
            options = set(re.findall(r"(?<= )--[a-z-]+", line))
            assert options <= set(re.findall(r"--[a-z-]+", parser.format_help())), f"{page}: xtuner {line}"
            seen |= {(verb, option) for option in options}
    assert len(seen) > 40


def test_copies_of_configs_have_the_name_that_copy_cfg_gives_them() -> None:
    for page in (*ROOT.glob("README*.md"), *(ROOT / "docs").rglob("*.md")):
        trained = re.findall(r"xtuner [a-z-]+ (\w+_w_tokenized_dataset)\.py", page.read_text())
        assert not trained, f"{page}: copy-cfg writes {trained[0]}_copy.py"


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.skipif(sys.platform != "linux", reason="sed -i as on Linux")
def test_the_workflow_runs(tmp_path: Path, tokenizer_folder: Path) -> None:
    (tmp_path / "corpus").mkdir()
    root = Path(sysconfig.get_paths()["stdlib"])
    for name in ("argparse.py", "ast.py", "bisect.py", "calendar.py"):
        (tmp_path / "corpus" / f"{name}.txt").write_text((root / name).read_text()[:12000])
    os.symlink(tokenizer_folder, tmp_path / "tokenizer")
    os.symlink(ROOT / "xtuner", tmp_path / "xtuner")
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    for line in commands(ROOT / "docs" / "en" / "workflow.md"):
        done = subprocess.run(["bash", "-ec", line], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    assert (tmp_path / "hf" / "model.safetensors").is_file()
    assert (tmp_path / "losses.json").is_file()
