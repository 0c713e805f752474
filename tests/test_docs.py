"""The commands of the documentation run as they stand, and both languages show the same ones."""

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


def test_links_lead_somewhere() -> None:
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        for link in re.findall(r"\]\(([^)#]+?)\)", page.read_text()):
            if "://" not in link:
                assert (page.parent / link).exists(), f"{page}: {link}"


def test_the_verbs_of_the_documentation_exist() -> None:
    from xtuner.cli.main import VERBS

    for page in [*ROOT.glob("README*.md"), *(ROOT / "docs").rglob("*.md")]:
        for verb in re.findall(r"^(?:\$ )?xtuner ([a-z][a-z-]*(?: [a-z][a-z_-]*)?)", page.read_text(), re.MULTILINE):
            assert verb in VERBS or verb.split()[0] in VERBS, f"{page}: xtuner {verb}"


@pytest.mark.skipif(sys.platform != "linux", reason="sed -i as on Linux")
def test_the_workflow_runs(tmp_path: Path, tokenizer_folder: Path) -> None:
    (tmp_path / "corpus").mkdir()
    root = Path(sysconfig.get_paths()["stdlib"])
    for name in ("argparse.py", "ast.py", "bisect.py", "calendar.py"):
        (tmp_path / "corpus" / f"{name}.txt").write_text((root / name).read_text()[:12000])
    os.symlink(tokenizer_folder, tmp_path / "tokenizer")
    os.symlink(ROOT / "xtuner", tmp_path / "xtuner")
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "2"}
    for line in commands(ROOT / "docs" / "en" / "workflow.md"):
        done = subprocess.run(["bash", "-ec", line], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    assert (tmp_path / "hf" / "model.safetensors").is_file()
    assert (tmp_path / "losses.json").is_file()
