"""The protocol between ranks, with real processes over gloo: what happens to one is known to all."""

import json
import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.configs import with_hook
from helpers.ranks import exit_codes, on_ranks, start_ranks, stderr_of
from helpers.runs import records

from xtuner.core import files
from xtuner.core.errors import CheckpointError, ConfigError, DataError
from xtuner.data.loading.batch import Batch
from xtuner.data.loading.loader import PackLoader
from xtuner.data.loading.sampler import Position
from xtuner.dist.collectives import ALL, Ranks
from xtuner.engine.state.snapshot import Snapshot
from xtuner.train.checkpoints import checkpoint, history
from xtuner.train.state import TrainState
from xtuner.train.stop import Stop

pytestmark = pytest.mark.processes


def part(rank: int, value: float = 1.0) -> Snapshot:
    """A rank's files: 400 kB."""
    name = f"optimizer/rank_{rank:05d}.safetensors"
    return Snapshot({name: {"exp_avg/a": torch.full((100_000,), value)}})


def save(ranks: Ranks, folder: Path, iteration: int, keep: int = -1) -> Path:
    return checkpoint.write(folder, TrainState(iteration=iteration), part(ranks.rank), {}, ranks, keep)[0]


def messages_and_errors(ranks: Ranks, folder: Path) -> None:
    me = ranks.rank
    assert ranks.gather({"rank": me}) == [{"rank": r} for r in range(3)]
    assert ranks.broadcast(["ä", me]) == ["ä", 0]
    assert ranks.sum(2**40 + me) == 3 * 2**40 + 3
    for values in ([0, 1, me], [me * 7, 479, 3 - me], [me * 1000, 2, 0], []):  # the last but one: beyond a power of 2
        wanted = [max(v) for v in zip(*ranks.gather(values), strict=True)]
        assert ranks.sums_and_maxima([2.0**40 + me, me == 1], values) == ([3 * 2**40 + 3, 1], wanted)
    assert ranks.broadcast_int(me + 2**40) == 2**40
    assert ranks.sum_on_device(torch.tensor(0.5 * me)) == 1.5
    assert ranks.run_on_all(lambda: me * 10) == me * 10
    assert ranks.run_on_main(lambda: [me]) == [0]

    def fails_on_two() -> None:
        if me == 2:
            raise DataError("a torn line", where="file:7", why="w", do="d")

    with pytest.raises(DataError, match="a torn line") as error:
        ranks.run_on_all(fails_on_two)
    assert (error.value.where, error.value.reported_elsewhere) == ("file:7", me != 2)
    with pytest.raises(ConfigError, match="main alone"):
        ranks.run_on_main(lambda: (_ for _ in ()).throw(ConfigError("main alone")))
    with pytest.raises(CheckpointError, match="No such file"):  # the system's errors are told, too
        ranks.run_on_all(lambda: open(folder / "nothing").close() if me == 1 else None)
    other = ranks.new_group()  # a group of its own, for another thread
    assert other.gather(me) == [0, 1, 2]
    for whole in (torch.tensor([-0.0, 1.5, float("nan")]), torch.randn(3)):
        bits = torch.zeros(3, dtype=torch.int32)
        bits[me : me + 1] = whole.view(torch.int32)[me : me + 1] if ranks.is_main else 0
        everyone = ranks.gather(whole.view(torch.int32).tolist())[0]
        bits[me] = everyone[me]
        ranks.reduce(bits, 1)
        assert me != 1 or bits.tolist() == everyone  # bit for bit, the sign of zero and NaNs too


def test_messages_and_errors_reach_all(tmp_path: Path) -> None:
    assert on_ranks(3, messages_and_errors, tmp_path) == [0, 0, 0]


def saves(ranks: Ranks, folder: Path) -> None:
    """A failing rank, a good save, damage in one rank's file, a stop asked of one rank."""
    me = ranks.rank
    first = save(ranks, folder, 1)
    ranks.run_on_all(lambda: files.verify(first))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if me == 1:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    with pytest.raises(CheckpointError, match="rank 1: ") as error:
        save(ranks, folder, 2)
    assert "rank 0: " not in error.value.what
    if me == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    ranks.gather(None)
    assert [p.name for p in folder.glob("*iter_*")] == ["iter_1.pth"]  # nothing half-written, the older one untouched
    ranks.gather(None)
    for n in (3, 4):
        save(ranks, folder, n, keep=2)
    assert sorted(p.name for p in folder.glob("iter_*")) == ["iter_3.pth", "iter_4.pth"]
    ranks.gather(None)
    if me == 0:
        damaged = folder / "iter_4.pth" / "optimizer" / "rank_00002.safetensors"
        raw = bytearray(damaged.read_bytes())
        raw[-9] ^= 1
        damaged.write_bytes(raw)
    ranks.gather(None)
    with pytest.raises(CheckpointError, match=r"rank_00002\.safetensors is altered"):
        history.latest_checkpoint(folder, ranks, strict=True)
    chosen = history.latest_checkpoint(folder, ranks)
    assert chosen == history.ResumeChoice(folder / "iter_3.pth", (folder / "iter_4.pth",))
    assert (folder / "iter_4.pth").is_dir()  # only found so far
    ranks.gather(None)
    ranks.run_on_main(lambda: history.set_aside_others(folder, chosen))
    assert (folder / "iter_4.pth.damaged").is_dir()
    stop = Stop(folder, ranks)
    assert not ranks.sum(stop.requested())
    if me == 2:
        os.kill(os.getpid(), signal.SIGUSR1)
    assert ranks.sum(stop.requested()) == 1
    stop.agree()
    assert stop.reason == "SIGUSR1"
    ranks.gather(None)
    if me == 0:
        (folder / "iter_3.pth" / "manifest.json").unlink()
    for resume in ("auto", str(folder)):
        with pytest.raises(CheckpointError, match=r"iter_4\.pth, which does not exist") as error:
            history.select_checkpoint(folder, resume, ranks)
        assert error.value.reported_elsewhere == (me != 0)
    with pytest.raises(ConfigError, match="no checkpoint there"):
        history.select_checkpoint(folder, str(folder / "iter_3.pth" / "optimizer"), ranks)
    empty = folder / "empty"
    empty.mkdir(exist_ok=True)
    assert history.select_checkpoint(empty, "auto", ranks) is None


def test_a_checkpoint_is_saved_and_found_by_all(tmp_path: Path) -> None:
    assert on_ranks(3, saves, tmp_path) == [0, 0, 0]
    assert list(json.loads((tmp_path / "iter_3.pth" / "trainer.json").read_text())) == ["state"]


def killed_in_its_part(ranks: Ranks, folder: Path) -> None:
    save(ranks, folder, 1)
    if ranks.rank == 1:
        real = os.fsync

        def fsync(fd: int) -> None:
            os.kill(os.getpid(), signal.SIGKILL)
            real(fd)

        os.fsync = fsync  # type: ignore[assignment]
    with pytest.raises(Exception) as error:  # noqa: PT011  the connection is lost: gloo's own error
        save(ranks, folder, 2)
    assert not isinstance(error.value, AssertionError)
    os._exit(7)


def test_a_rank_that_dies_in_a_save_publishes_nothing(tmp_path: Path) -> None:
    assert on_ranks(3, killed_in_its_part, tmp_path) == [7, -signal.SIGKILL, 7]
    assert [p.name for p in tmp_path.glob("iter_*")] == ["iter_1.pth"]
    files.verify(tmp_path / "iter_1.pth")
    files.recover(tmp_path, "iter_*.pth")
    assert [p for p in tmp_path.iterdir() if ".tmp-" in p.name] == []


@pytest.mark.slow
@pytest.mark.parametrize(("chain", "balance"), [((1, 2, 2, 4, 1), 1), ((2, 1, 4), 1), ((1, 2, 4), 3)])
def test_one_stream_on_any_number_of_ranks(
    chain: tuple[int, ...], balance: int, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped and resumed by one command on other numbers of ranks: every iteration has the packs of a run on as many
    ranks as it was begun on that nobody stopped. 15 packs an epoch, 4 an iteration: both borders lie inside one.
    So do the stops inside windows of 3 iterations whose packs are dealt by cost."""
    run = [0]
    real = PackLoader.iterate_from

    def recording(self: PackLoader, position: Position) -> Iterator[Batch]:
        with open(tmp_path / f"packs.{run[0]}.{ALL.rank}", "w", buffering=1) as f:
            for batch in real(self, position):
                f.write(f"{batch.pack}\n")
                yield batch

    def iterations(ranks: int) -> list[set[int]]:
        """The packs of each iteration of this run, of all ranks."""
        taken = [list(map(int, (tmp_path / f"packs.{run[0]}.{r}").read_text().split())) for r in range(ranks)]
        each = 4 // ranks
        assert len({len(t) for t in taken}) == 1
        return [{p for t in taken for p in t[i : i + each]} for i in range(0, len(taken[0]), each)]

    def trained(config: Path, work_dir: Path, ranks: int) -> list[set[int]]:
        run[0] += 1
        words = ["train", config, "--work-dir", work_dir, "--resume", "auto", "--launcher", "pytorch"]
        (code,) = set(exit_codes(start_ranks(words, tmp_path, ranks)))
        assert code in (0, 75), stderr_of(tmp_path, 0)
        taken = iterations(ranks)
        return taken[:-1] if code == 75 else taken  # ranks agree on a stop with the next iteration's packs in hand

    monkeypatch.setattr(PackLoader, "iterate_from", recording)
    text = tiny.read_text()
    for old, new in (
        ("max_epochs = 1", "max_epochs = 3"),
        ("max_length = 32", "max_length = 64"),
        ("    balance=1,", f"    balance={balance},"),
        ("accumulative_counts = 2 ", f"accumulative_counts = {4 // chain[0]} "),
        ("evaluation_inputs = ", "evaluation_inputs = [] and "),
    ):
        assert old in text
        text = text.replace(old, new)
    plain = tmp_path / "plain.py"
    plain.write_text(text)
    stops = range(2, 2 * len(chain), 2)
    stopping = with_hook(
        plain, tmp_path / "run.py", f"0 or it.state.iteration in {[*stops]}", "os.kill(os.getpid(), signal.SIGTERM)"
    )
    straight = trained(plain, tmp_path / "straight", chain[0])
    per_epoch = 15 // chain[0] * chain[0]
    assert len(straight) == 3 * per_epoch // 4
    resumed = [packs for ranks in chain for packs in trained(stopping, tmp_path / "w", ranks)]
    assert resumed == straight
    lines, expected = records(tmp_path / "w"), records(tmp_path / "straight")
    assert lines.keys() == expected.keys() == set(range(1, len(straight) + 1))
    for number, line in expected.items():
        assert abs(lines[number]["loss"] - line["loss"]) < 1e-5
        assert [lines[number][k] for k in ("lr", "targets")] == [line[k] for k in ("lr", "targets")]
    last = f"iter_{len(straight)}.pth"
    state, other = (checkpoint.read_trainer(tmp_path / w / last)[0] for w in ("w", "straight"))
    assert state == other
    assert divmod(state.packs, per_epoch) == (state.position.epoch, state.position.offset)
    assert state.position.epoch < 3
    left = 3 * per_epoch - state.packs
    assert f"done: {len(straight)} iterations, {state.packs} packs" in stderr_of(tmp_path, 0)
    assert f"{left} packs at the end did not fill an iteration" in stderr_of(tmp_path, 0)
    facts = files.read_json(tmp_path / "w" / last / "trainer.json")
    assert (facts["begun_on"], facts["ranks"], facts["packs_per_iteration"]) == (chain[0], chain[-1], 4)
