"""Imports run strictly downwards, as docs/architecture.md shows, and commands that need no torch import none."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent / "xtuner"
# bottom to top
LEVELS = [
    "core", "dist", "config", "compat", "families", "data", "model", "optim", "engine", "export",
    "train", "tools", "cli", "legacy",
]  # fmt: skip


def imports(file: Path) -> list[str]:
    """Rooms of the package that a file imports from, also inside functions."""
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        modules += [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module == "xtuner":
            modules = [f"xtuner.{a.name}" for a in node.names]
        found += [m.split(".")[1] for m in modules if m.startswith("xtuner.")]
    return found


@pytest.mark.processes
def test_imports_run_downwards() -> None:
    for file in ROOT.rglob("*.py"):
        room = file.relative_to(ROOT).parts[0]
        if room in ("configs", "__init__.py", "__main__.py"):
            continue  # of users' configs: nothing imports these
        for other in imports(file):
            assert LEVELS.index(other) <= LEVELS.index(room), f"{file} imports from xtuner.{other}, which lies above"
            if other == "train":
                assert room in ("train", "cli", "legacy")


@pytest.mark.processes
def test_families_are_light() -> None:
    """What `data` and `model` both use imports `core` alone, and no library that is heavy."""
    for file in (ROOT / "families").rglob("*.py"):
        assert set(imports(file)) <= {"core", "families"}, file
    code = "import sys, xtuner.families; assert not {'torch', 'numpy', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_imports_in_circles() -> None:
    """Not between two files either: those inside functions and for type hints count."""
    files = {".".join(f.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): f
             for f in ROOT.rglob("*.py")}  # fmt: skip
    wanted: dict[str, set[str]] = {}
    for name, file in files.items():
        nodes = [n for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.ImportFrom) and n.module]
        named = {(f"{n.module}.{a.name}", str(n.module)) for n in nodes for a in n.names}
        wanted[name] = {inner if inner in files else outer for inner, outer in named} - {name}
    TopologicalSorter(wanted).prepare()


def test_files_are_small() -> None:
    for file in ROOT.rglob("*.py"):
        assert len(file.read_text().splitlines()) <= 400, file


def test_nothing_passes_arguments_by_the_side() -> None:
    """No context variables, no fields that are filled later; globals are a cache, and what the heartbeat reports."""
    for file in ROOT.rglob("*.py"):
        assert not re.search(r"\bContextVar\b|\binit=False\b", file.read_text()), file
    found = {str(f.relative_to(ROOT)) for f in ROOT.rglob("*.py") if re.search(r"^ +global ", f.read_text(), re.M)}
    assert found == {"core/activity.py", "core/secrets.py"}


def test_only_the_mesh_knows_the_world() -> None:
    """Whoever counts ranks asks the mesh, which says what kind of ranks."""
    asks = re.compile(r"world_size\(\)|\bALL\.size|\"WORLD_SIZE\"|\"LOCAL_WORLD_SIZE\"")
    found = {str(f.relative_to(ROOT)) for f in ROOT.rglob("*.py") if asks.search(f.read_text())}
    assert found == {"dist/collectives.py", "dist/mesh.py", "dist/shipped_launchers.py", "dist/process_group.py"}


def test_the_map_names_every_room() -> None:
    text = (ROOT.parent / "docs" / "architecture.md").read_text()
    for room in LEVELS:
        assert f"`xtuner/{room}/`" in text, room


@pytest.mark.processes
@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["list-cfg"],
        ["train", "--help"],
        ["doctor", "--help"],
        ["launch", "--help"],
        ["eval", "opencompass", "--help"],
        ["eval", "lm-eval", "--help"],
        ["copy-cfg", "NAME", "DIR"],
        ["data", "order", "DIR"],
    ],
)
def test_light_commands_import_no_torch(words: list[str], tmp_path: Path) -> None:
    if words[0] == "copy-cfg":
        words = ["copy-cfg", "internlm2_tiny_w_tokenized_dataset", str(tmp_path)]
    if words[0] == "data":
        (tmp_path / "a.bin").write_text("")
        words = ["data", "order", "--data-folder", str(tmp_path), "--save-folder", str(tmp_path)]
    code = f"""
import sys
from xtuner.cli.main import main
try:
    main({words!r})
except SystemExit:
    pass
heavy = {{"torch", "numpy", "rich", "transformers"}} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_no_test_imports_another() -> None:
    """What several share lies in tests/helpers; a module's program in a child process may import the module itself."""
    files = [f for f in ROOT.parent.joinpath("tests").rglob("*.py") if "reference" not in f.parts]
    tests = {f.stem for f in files if f.stem.startswith("test_")}
    assert len(tests) == sum(f.stem.startswith("test_") for f in files), "two files of one name"
    for file in files:
        found = re.findall(r"^\s*(?:from|import) (conftest|test_\w+)", file.read_text(), re.M)
        assert set(found) <= {file.stem}, file
    for room in (f.parent.name for f in files if f.stem.startswith("test_") and f.parent.name != "tests"):
        assert room in (*LEVELS, "benchmarks", "fuzz", "scenarios"), room
