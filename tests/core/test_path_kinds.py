"""Every command that takes a model says of any other what it is, and gives the command that makes it fit."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from xtuner.core import path_kinds
from xtuner.core.errors import XTunerError
from xtuner.dist.collectives import attempt

Command = Callable[..., int]


@pytest.fixture(scope="module")
def given(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One of each kind; ours are real, of others the names are enough."""
    from xtuner.cli.main import main

    folder = tmp_path_factory.mktemp("kinds")
    options = ["--cfg-options", "custom_hooks=[]", "max_length=128", "save_optimizer=False"]
    assert main(["train", str(tiny), "--work-dir", str(folder / "w"), *options]) == 0
    (ours,) = (folder / "w").glob("iter_*.pth")
    assert main(["convert", "pth_to_hf", str(tiny), str(ours), str(folder / "hf")]) == 0
    assert main(["convert", "turbomind", str(folder / "hf"), "--dst-path", str(folder / "tm")]) == 0
    assert main(["convert", "weights", str(ours), str(folder / "one.safetensors")]) == 0
    for name in ("zero/mp_rank_00_model_states.pt", "zeros/global_step7/zero_pp_rank_0_mp_rank_00_optim_states.pt"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_bytes(b"")
    for name in ("internevo/model_tp0_pp0.pt", "lora/adapter_config.json", "bare/model.safetensors", "no/notes.txt"):
        (folder / name).parent.mkdir()
        (folder / name).write_bytes(b"")
    (folder / "x.pth").write_bytes(b"")
    (folder / "half" / "weights").mkdir(parents=True)
    found = {
        path_kinds.CHECKPOINT: ours,
        path_kinds.HF: folder / "hf",
        path_kinds.TURBOMIND: folder / "tm",
        path_kinds.SAFETENSORS: folder / "one.safetensors",
        path_kinds.ZERO: folder / "zero",
        path_kinds.INTERNEVO: folder / "internevo",
        path_kinds.ADAPTER: folder / "lora",
        path_kinds.BARE: folder / "bare",
        path_kinds.UNKNOWN: folder / "no",
        path_kinds.SINGLE: folder / "x.pth",
        path_kinds.FILE: folder / "no" / "notes.txt",
        path_kinds.PARTIAL: folder / "half",
        path_kinds.WORK_DIR: folder / "w",
        path_kinds.NOTHING: folder / "nothing",
    }
    assert {path_kinds.recognise(path).what for path in found.values()} == found.keys()
    assert all(path_kinds.recognise(path).what == what for what, path in found.items())
    found["a folder of theirs"] = folder / "zeros"
    return found


CONVERT = (path_kinds.ZERO, path_kinds.INTERNEVO, path_kinds.SINGLE)
DOORS = {  # command line with {} for the path → the kinds it takes
    "check-cfg {tiny} --cfg-options load_from={}": (path_kinds.CHECKPOINT, path_kinds.HF),
    "train {tiny} --dry-run --cfg-options load_from={}": (path_kinds.CHECKPOINT, path_kinds.HF),
    "train {tiny} --work-dir {w} --resume {}": (path_kinds.CHECKPOINT, path_kinds.WORK_DIR),
    "check-cfg {model} --cfg-options path={}": (path_kinds.HF,),
    "eval loss {} {data} --max-length 64": (path_kinds.CHECKPOINT, path_kinds.HF),
    "chat {} --prompt x --max-new-tokens 1 --tokenizer {tokenizer}": (path_kinds.CHECKPOINT, path_kinds.HF),
    "convert turbomind {} --dst-path {w}": (path_kinds.HF,),
    "convert weights {} {w}/a.safetensors": (path_kinds.CHECKPOINT, path_kinds.HF, path_kinds.FILE, *CONVERT),
    "eval lm-eval {}": (path_kinds.HF,),
}


@pytest.mark.processes
@pytest.mark.parametrize("door", DOORS)
def test_every_door_knows_every_kind(
    door: str,
    given: dict[str, Path],
    tiny: Path,
    corpus: Path,
    tokenizer_folder: Path,
    tmp_path: Path,
    xtuner: Command,
) -> None:
    model = tmp_path / "model.py"
    begin, _, rest = tiny.read_text().partition("model = dict(")
    source = "from xtuner.model import from_pretrained\npath = None\n"
    model.write_text(
        f"{source}{begin}model = dict(type=from_pretrained, pretrained_model_name_or_path=path)\nold = dict({rest}"
    )
    names = {"tiny": tiny, "model": model, "data": corpus, "tokenizer": tokenizer_folder, "w": tmp_path / "w"}
    for what, path in given.items():
        words = [w.format(path, **names) for w in door.split()]
        takes = DOORS[door]
        if what in takes:
            if "lm-eval" not in door:  # which would need an environment
                failure = attempt(partial(xtuner, *words))[1]  # the next thing that is not right, if there is any
                assert (
                    failure is None
                    or what in (*CONVERT, path_kinds.FILE)
                    or "was trained on: max_length" in failure["what"]
                )
            continue
        with pytest.raises(XTunerError) as error:
            xtuner(*words)
        text = str(error.value)
        assert error.value.exit_code in (2, 74)
        if what in CONVERT:
            assert what in text
            assert f"xtuner convert pth_to_hf CONFIG {path} HF_DIR --fp32" in text
        elif what in (path_kinds.WORK_DIR, "a folder of theirs"):
            newest = given[path_kinds.CHECKPOINT] if what == path_kinds.WORK_DIR else path / "global_step7"
            assert str(newest) in text
        elif what in (path_kinds.TURBOMIND, path_kinds.ADAPTER, path_kinds.PARTIAL):
            assert what in text
            assert "next: " in text
        elif what == path_kinds.CHECKPOINT:
            assert f"load_from = '{path}'" in text or f"CONFIG.py {path}" in text or "pth_to_hf" in text
        elif what == path_kinds.SAFETENSORS:
            assert "config.json" in text
    assert not (tmp_path / "w").exists() or "--resume" in door or "weights" in door or "turbomind" in door
