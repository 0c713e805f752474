"""Join a run of several processes: process group, heartbeat, and an orderly end."""

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as torch_dist

from xtuner.core.errors import ConfigError, InterruptedRunError, XTunerError
from xtuner.dist.collectives import ALL
from xtuner.dist.heartbeat import Heartbeat, connect_store
from xtuner.dist.launchers import RankInfo

# Collectives may wait for a rank that prepares data or a checkpoint; the heartbeat detects ranks that hang.
COLLECTIVE_TIMEOUT = timedelta(days=2)
_SEGMENTS = "expandable_segments:True"  # segments of fixed size would fragment, as micro-batches differ in length
_PINNING = "pinned_use_cuda_host_register:True,pinned_num_register_threads:8"  # 21 GiB in 2.7 s instead of 16


def select_device(local_rank: int = 0) -> torch.device:
    """The GPU of a process, or the CPU where there is none. Raises: ConfigError for more processes than GPUs."""
    count = torch.cuda.device_count()
    if not count:
        return torch.device("cpu")
    if count > 1 and local_rank >= count:
        raise ConfigError(
            f"local rank {local_rank}, but only {count} GPUs are visible",
            where=f"CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', '')}",
            why="two processes would share a GPU, and its memory",
            do="start as many processes on a node as it has GPUs",
        )
    return torch.device(
        "cuda", local_rank if local_rank < count else 0
    )  # one visible GPU: the launcher has assigned it


# set in the environment while the run lasts, for engines that read them
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@contextlib.contextmanager
def join_run(info: RankInfo, group: bool) -> Iterator[tuple[torch.device, Heartbeat | None]]:
    """Yield this process's device and its heartbeat (None for a single process).

    Errors are propagated to the other ranks. An error that another rank's failure causes is raised as that failure.

    Args:
        group: create a process group for a single process also, as DeepSpeed needs it.
    """
    settings = os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")
    for name, wanted in (("pinned", _PINNING), ("expandable_segments", _SEGMENTS)):
        if name not in settings:
            settings = ",".join(filter(None, (settings, wanted)))
    os.environ["PYTORCH_CUDA_ALLOC_CONF"] = settings
    here = select_device(info.local_rank)
    if here.type == "cuda":
        torch.cuda.set_device(here)
    if info.size == 1 and not group:
        yield here, None
        return
    meeting = connect_store(info)
    before = {name: os.environ.get(name) for name in _VARIABLES}
    os.environ |= {"RANK": str(info.rank), "WORLD_SIZE": str(info.size), "LOCAL_RANK": str(info.local_rank)}
    os.environ |= {"MASTER_ADDR": info.address, "MASTER_PORT": str(meeting.port)}
    heartbeat = Heartbeat(info, meeting) if info.size > 1 else None
    try:
        torch_dist.init_process_group(
            "cpu:gloo,cuda:nccl" if here.type == "cuda" else "gloo",
            store=torch_dist.PrefixStore("run", meeting),
            rank=info.rank,
            world_size=info.size,
            timeout=COLLECTIVE_TIMEOUT,
        )
        hosts = ALL.gather(info.host)
        os.environ.setdefault("LOCAL_WORLD_SIZE", str(hosts.count(info.host)))  # srun and mpirun do not set it
        yield here, heartbeat
        torch_dist.barrier()  # rank 0 hosts the store, so it ends last
    except XTunerError as e:
        if heartbeat and (not e.reported_elsewhere or isinstance(e, InterruptedRunError)):
            heartbeat.report_failure(e)
        raise
    except Exception as e:
        if heartbeat and (lost := heartbeat.explain(e)):
            raise lost from None
        if heartbeat:
            heartbeat.report_failure(e)
        raise
    finally:
        if heartbeat:
            heartbeat.close()
        if torch_dist.is_initialized():
            torch_dist.destroy_process_group()
        for name, value in before.items():  # processes started later are not ranks of this run
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
