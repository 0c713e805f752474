"""A run survives: killed at every write of a save, damaged files, full disks, requests to stop, NaNs.

Real processes, SIGKILL from outside. After each fault what was resumed equals an uninterrupted run bit for bit, or the
refusal says why. docs/reliability.md lists promise, test and result.
"""

import errno
import multiprocessing
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.configs import with_hook
from helpers.corpus import write_corpus
from helpers.processes import SHORT, assert_resume_is_exact, killed_at, states_at_write_points
from helpers.runs import contents, records

from xtuner.cli.main import main
from xtuner.core import files
from xtuner.core.errors import CheckpointError, DataError, DivergedError, XTunerError
from xtuner.train.checkpoints.async_saver import TOLERATED

pytestmark = pytest.mark.processes

Command = Callable[..., int]


@pytest.mark.slow
def test_killed_at_every_write_point_of_every_save(tiny: Path, tmp_path: Path, straight: Path) -> None:
    """Also between publishing and pruning: three saves, of which two are kept. Resume is exact from every state of the
    checkpoints that there is at a write point, and after a real kill at every tenth."""
    work_dir, saved = tmp_path / "w", 0
    words = ["train", str(tiny), "--work-dir", str(work_dir), "--cfg-options", *SHORT]
    points, states = states_at_write_points(words, work_dir, tmp_path / "states")

    def check() -> None:
        assert all((p / files.MANIFEST).is_file() for p in work_dir.glob("iter_*.pth"))  # pruned ones included
        assert_resume_is_exact(tiny, work_dir, straight)
        shutil.rmtree(work_dir)

    shutil.rmtree(work_dir)
    for state in states:
        shutil.copytree(state, work_dir, symlinks=True)
        saved += any(work_dir.glob("iter_*.pth"))
        check()
    assert points > 30
    assert len(states) > 15
    assert saved > 10
    for point in range(5, points, 10):
        assert killed_at(point, words)
        check()


@pytest.mark.slow
def test_killed_at_write_points_of_a_resume_and_of_exports(tiny: Path, tmp_path: Path, straight: Path) -> None:
    begun = tmp_path / "begun"
    shutil.copytree(straight.parent, begun)
    shutil.rmtree(begun / straight.name)
    for point in (1, 4, 7):
        work_dir = tmp_path / f"w{point}"
        shutil.copytree(begun, work_dir)
        assert killed_at(point, ["train", str(tiny), "--work-dir", str(work_dir), "--resume", "--cfg-options", *SHORT])
        assert_resume_is_exact(tiny, work_dir, straight)
    export = ["convert", "pth_to_hf", str(tiny), str(straight), str(tmp_path / "hf")]
    turbomind = ["convert", "turbomind", str(tmp_path / "hf"), "--dst-path", str(tmp_path / "tm")]
    for words, target in ((export, tmp_path / "hf"), (turbomind, tmp_path / "tm")):
        point, left = 1, 0
        while killed_at(point, words):
            left += any(tmp_path.glob(f".{target.name}.*"))
            if target.exists():
                files.verify(target)  # whole, or not there
            point += 1
        assert point > 5
        assert left > 5
        assert main(words) == 0
        files.verify(target)
    one, other, point = tmp_path / "one.safetensors", tmp_path / "other.safetensors", 1
    assert main(["convert", "weights", str(straight), str(other)]) == 0
    while killed_at(point, ["convert", "weights", str(straight), str(one)]):
        assert not one.exists() or one.read_bytes() == other.read_bytes()
        point += 1
    assert point > 3
    assert main(["convert", "weights", str(straight), str(one)]) == 0
    assert [p for p in tmp_path.iterdir() if p.name.startswith(".")] == []  # each cleans up after those before it


def flip(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 4
    file.write_bytes(raw)


def append(file: Path) -> None:
    with open(file, "ab") as f:
        f.write(b"\0")


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "flipped byte": flip,
    "truncated": lambda f: os.truncate(f, f.stat().st_size // 2),
    "appended byte": append,
    "gone": lambda f: f.unlink(),
    "empty": lambda f: f.write_bytes(b""),
}


@pytest.mark.slow
def test_every_damage_of_every_file(tiny: Path, tmp_path: Path, straight: Path) -> None:
    """The damaged checkpoint is set aside, the one before is used; `--strict-resume` refuses."""
    names = sorted(p.relative_to(straight).as_posix() for p in straight.rglob("*") if p.is_file())
    assert len(names) == 5
    for name in names:
        for damage, harm in DAMAGES.items():
            work_dir = tmp_path / "w"
            shutil.copytree(straight.parent, work_dir)
            harm(work_dir / straight.name / name)
            if not (name == files.MANIFEST and damage == "gone"):  # without a manifest it is none
                train = ["train", str(tiny), "--work-dir", str(work_dir), "--resume", "--strict-resume"]
                with pytest.raises(CheckpointError):
                    main([*train, "--cfg-options", *SHORT])
                assert not (work_dir / f"{straight.name}.damaged").exists()
            assert_resume_is_exact(tiny, work_dir, straight)
            if name != files.MANIFEST or damage != "gone":
                assert (work_dir / f"{straight.name}.damaged").is_dir(), (name, damage)
            shutil.rmtree(work_dir)


def limited(bytes_a_file: int, words: list[str]) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_a_file, bytes_a_file))
    try:
        code = main(words)
    except CheckpointError as e:
        code = e.exit_code
    os._exit(code)


def test_a_disk_that_takes_no_more(tiny: Path, tmp_path: Path, straight: Path, xtuner: Command) -> None:
    """Writes fail with the system's error: the old checkpoint stays, training continues, a third failure ends it."""
    work_dir = tmp_path / "w"
    shutil.copytree(straight.parent, work_dir)
    shutil.rmtree(work_dir / straight.name)
    words = ["train", str(tiny), "--work-dir", str(work_dir), "--cfg-options", *SHORT]
    child = multiprocessing.get_context("fork").Process(target=limited, args=(400_000, words))
    child.start()
    child.join()
    assert child.exitcode == 74
    (aside,) = work_dir.glob("before_*/iter_*.pth")  # a fresh start has moved it out of its way
    files.verify(aside)
    log = sorted(work_dir.glob("*/*.log"))[-1].read_text()
    assert "the checkpoint cannot be written: rank 0: " in log
    assert log.count("training continues") == TOLERATED
    assert [p.name for p in work_dir.glob(".iter*")] == []
    assert_resume_is_exact(tiny, work_dir, straight)


def test_no_room_is_known_before(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room = tmp_path / "room"
    room.mkdir()
    if os.system(f"mount -t tmpfs -o size=3m none {room} 2>/dev/null") != 0:
        pytest.skip("tmpfs cannot be mounted here")
    try:
        with pytest.raises(CheckpointError, match=r"a checkpoint needs 3\.43 MiB .*, the disk has"):
            main(["train", str(tiny), "--work-dir", str(room / "w"), "--cfg-options", *SHORT])
        assert not list((room / "w").glob("*iter*"))
    finally:
        os.system(f"umount -l {room}")


@pytest.mark.parametrize("how", ["SIGTERM", "SIGUSR1", "SIGTERM twice", "STOP file", "--max-minutes", "Slurm"])
def test_stopped_on_request(
    how: str, tiny: Path, tmp_path: Path, straight: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 75 with a whole checkpoint although none was due, and a resume that ends like an undisturbed run."""
    work_dir = tmp_path / "w"
    actions = {
        "SIGTERM": "os.kill(os.getpid(), signal.SIGTERM)",
        "SIGUSR1": "os.kill(os.getpid(), signal.SIGUSR1)",
        "SIGTERM twice": "os.kill(os.getpid(), signal.SIGTERM), os.kill(os.getpid(), signal.SIGTERM)",
        "STOP file": f"open({str(work_dir / 'STOP')!r}, 'w').close()",
    }
    config = with_hook(tiny, tmp_path / "act.py", 1, actions.get(how, "None"))
    monkeypatch.setattr("xtuner.train.stop.POLL_SECONDS", 0.0)
    words = ["train", str(config), "--work-dir", str(work_dir)]
    words += ["--max-minutes", "0"] if how == "--max-minutes" else []
    if how == "Slurm":
        monkeypatch.setenv("SLURM_JOB_END_TIME", str(time.time() + 50))  # within the slack
    options = [o for o in SHORT if o not in ("custom_hooks=[]", "save_steps=1")]
    assert main([*words, "--cfg-options", *options, "save_steps=-1", "evaluation_inputs=[]"]) == 75
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    files.verify(work_dir / "iter_1.pth")
    assert_resume_is_exact(tiny, work_dir, straight)


def test_a_nan_is_not_applied(tiny: Path, tmp_path: Path, xtuner: Command) -> None:
    """The run ends with the packs and a command to see it again; with a budget it goes on without that iteration."""
    weight = "run.strategy.model.output.weight.data"
    config = with_hook(tiny, tmp_path / "poison.py", 1, f"self.keep = {weight}.clone(); {weight}.fill_(float('nan'))")
    heal = f"        if it.state.iteration == 2:\n            {weight}.copy_(self.keep)\n"
    config.write_text(config.read_text().replace("\n\nfrom xtuner.data", f"\n{heal}\nfrom xtuner.data", 1))
    options = ["evaluation_inputs=[]", *SHORT[1:]]
    train = ("train", config, "--work-dir")
    with pytest.raises(DivergedError) as error:
        xtuner(*train, tmp_path / "w", "--cfg-options", *options)
    text = str(error.value)
    for word in ("iteration 2: loss nan", "packs [", "xtuner train", "--resume", "iter_1.pth", "xtuner data show"):
        assert word in text
    assert error.value.exit_code == 65
    assert xtuner(*train, tmp_path / "v", "--cfg-options", *options, "train_cfg.max_skipped=1") == 0
    applied = [r["applied"] for r in records(tmp_path / "v").values()]
    assert applied == [True, False, *[True] * (len(applied) - 2)]


def test_another_runs_checkpoints_are_moved_aside(tiny: Path, tmp_path: Path, straight: Path, xtuner: Command) -> None:
    """A fresh start, or one from an older checkpoint, neither prunes nor resumes what another run has left."""
    work_dir = tmp_path / "w"
    shutil.copytree(straight.parent, work_dir)
    names = sorted(p.name for p in work_dir.glob("iter_*.pth"))
    train = ("train", tiny, "--work-dir", work_dir, "--cfg-options", *SHORT)
    assert xtuner(*train, "randomness.seed=7") == 0
    (aside,) = work_dir.glob("before_*")
    assert sorted(p.name for p in aside.iterdir()) == [*names, "last_checkpoint"]
    assert contents(aside / straight.name) == contents(straight)
    assert contents(work_dir / straight.name) != contents(straight)
    shutil.rmtree(work_dir)
    shutil.copytree(straight.parent, work_dir)
    (earlier,) = set(names) - {straight.name}
    assert xtuner("train", tiny, "--work-dir", work_dir, "--resume", work_dir / earlier, "--cfg-options", *SHORT) == 0
    assert contents(work_dir / straight.name) == contents(straight)
    assert [p.name for p in next(work_dir.glob("before_*")).iterdir()] == [straight.name]
    log = sorted(work_dir.glob("*/*.log"))[-1].read_text()
    assert f"checkpoints newer than {earlier}, which is resumed, were moved to {work_dir}/before_" in log
    assert "run were here" not in log


def remove_manifest(folder: Path) -> None:
    (folder / files.MANIFEST).unlink()


def put_deepspeed(folder: Path) -> None:
    """As XTuner leaves it; mmengine's last_checkpoint holds a whole path."""
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "mp_rank_00_model_states.pt").write_bytes(b"")
    (folder.parent / "last_checkpoint").write_text(str(folder))


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda folder: flip(folder / "weights" / "model.safetensors"), "is damaged: weights/model.safetensors is alt"),
        (shutil.rmtree, "last_checkpoint names iter_1.pth, which does not exist"),
        (lambda folder: folder.rename(f"{folder}.damaged"), "last_checkpoint names iter_1.pth, which does not exist"),
        (remove_manifest, "iter_1.pth is not a complete checkpoint"),
        (put_deepspeed, "iter_1.pth is a checkpoint of DeepSpeed"),
    ],
)
def test_nothing_whole_to_resume_from(
    harm: Callable[[Path], Any], words: str, tiny: Path, tmp_path: Path, straight: Path, xtuner: Command
) -> None:
    """The run is not thrown away: 74, nothing is changed, and how to start afresh on purpose is said; it does."""
    work_dir = tmp_path / "w"
    shutil.copytree(straight, work_dir / "iter_1.pth")
    (work_dir / "last_checkpoint").write_text("iter_1.pth\n")
    harm(work_dir / "iter_1.pth")
    before = {p: p.read_bytes() for p in work_dir.rglob("*") if p.is_file()}
    train = ("train", tiny, "--work-dir", work_dir)
    for resume in (["--resume"], ["--resume", "auto"], ["--resume", work_dir]):
        with pytest.raises(CheckpointError, match=words) as error:
            xtuner(*train, *resume, "--cfg-options", *SHORT)
        assert error.value.exit_code == 74
        assert "without --resume" in error.value.do
    with pytest.raises(CheckpointError):
        xtuner(*train, "--resume", "--strict-resume", "--cfg-options", *SHORT)
    assert {p: p.read_bytes() for p in before} == before
    assert not list(work_dir.glob("before_*"))
    assert xtuner(*train, "--cfg-options", *SHORT) == 0
    assert contents(work_dir / straight.name) == contents(straight)
    aside = next(work_dir.glob("before_*"))
    assert {(aside / p.relative_to(work_dir)).read_bytes() for p in before if "iter_1" in str(p)} <= set(
        before.values()
    )
    assert sorted(p.name for p in work_dir.glob("iter_*")) == sorted(p.name for p in straight.parent.glob("iter_*"))


def test_a_checkpoint_of_an_older_version(tiny: Path, tmp_path: Path, straight: Path, xtuner: Command) -> None:
    """Neither a sha256 of the manifest nor names of data files: it resumes, and what can be said of a change is."""
    work_dir = tmp_path / "w"
    shutil.copytree(straight.parent, work_dir)
    shutil.rmtree(work_dir / straight.name)
    (folder,) = work_dir.glob("iter_*.pth")
    facts = files.read_json(folder / "trainer.json")
    del facts["files"]
    files.write_json(folder / "trainer.json", facts)
    manifest = files.read_json(folder / files.MANIFEST)
    del manifest["sha256"]
    manifest["files"]["trainer.json"] = files.file_entry(folder / "trainer.json")
    files.write_json(folder / files.MANIFEST, manifest)
    other = write_corpus(tmp_path / "other", 10, seed=1)
    train = ("train", tiny, "--work-dir", work_dir, "--resume", "--cfg-options", *SHORT)
    with pytest.raises(DataError, match=r"documents of its files, or the order of files, have changed \(7 packs then"):
        xtuner(*train, f"dataset_folder={other}")
    for key, value in (("iteration", 3), ("kind", "export!")):
        files.write_json(folder / files.MANIFEST, {**manifest, key: value})
        with pytest.raises(CheckpointError, match="is damaged: the manifest was altered: it is for "):
            xtuner(*train)
    files.write_json(folder / files.MANIFEST, manifest)
    assert_resume_is_exact(tiny, work_dir, straight)


def test_a_full_disk_at_the_start(tiny: Path, tmp_path: Path) -> None:
    """Which folder, and 74: nothing is wrong with the config."""
    words = ["train", str(tiny), "--work-dir", str(tmp_path / "w"), "--cfg-options", *SHORT]
    real = os.fsync

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    os.fsync = full
    try:
        with pytest.raises(CheckpointError, match="the work dir cannot be written: No space left") as error:
            main(words)
    finally:
        os.fsync = real
    assert error.value.where.startswith(str(tmp_path / "w"))
    assert not list(tmp_path.iterdir()), "a run that has not begun leaves nothing"


@pytest.mark.parametrize(
    ("option", "kind"),
    [
        ("default_hooks.logger.interval=7", "harmless"),
        ("dataloader_num_workers=1", "harmless"),
        ("train_dataloader.balance=0", "harmless"),
        ("lr=0.1", "changes the result"),
        ("max_norm=3", "changes the result"),
        ("train_dataset.label_rule=xtuner", "data"),
        ("optim_wrapper.optimizer.type=torch.optim.NAdam", "impossible"),
        ("hidden_size=256", "impossible"),
    ],
)
def test_a_changed_config(option: str, kind: str, tiny: Path, tmp_path: Path, straight: Path, xtuner: Command) -> None:
    work_dir = tmp_path / "w"
    shutil.copytree(straight.parent, work_dir)
    shutil.rmtree(work_dir / straight.name)
    train = ("train", tiny, "--work-dir", work_dir, "--resume")
    options = ("--cfg-options", *SHORT, option)
    if kind == "harmless":
        assert xtuner(*train, *options) == 0
        assert "harmless: " in sorted(work_dir.glob("*/*.log"))[-1].read_text()
        assert contents(work_dir / straight.name) == contents(straight)
        return
    words = {"impossible": "another model's", "data": "not what the checkpoint", "changes the result": "changed since"}
    with pytest.raises(XTunerError, match=words[kind]):
        xtuner(*train, *options)
    if kind == "impossible":
        with pytest.raises(XTunerError, match="another model's"):
            xtuner(*train, "--allow-change", *options)
    else:
        assert xtuner(*train, "--allow-change", *options) == 0
        assert contents(work_dir / straight.name) != contents(straight)
