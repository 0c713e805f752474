"""xtuner launch --scheduler slurm|k8s|dlc CONFIG: write a job script for a cluster, without submitting it."""

import argparse
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path, PurePosixPath

from xtuner.config.config import Config
from xtuner.core.errors import ConfigError
from xtuner.core.files import atomic_file
from xtuner.tools import job_scripts
from xtuner.tools.job_scripts import Job

ONLY_FOR = {  # option → schedulers that use it
    "partition": ("slurm",),
    "time": ("slurm",),
    "image": ("k8s", "dlc"),
    "namespace": ("k8s",),
    "pvc": ("k8s",),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="config file, or the name of a shipped one")
    parser.add_argument("--scheduler", required=True, choices=("slurm", "k8s", "dlc"), help="scheduler of the cluster")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="number of machines")
    parser.add_argument("--gpus-per-node", type=int, default=8, metavar="G", help="processes per machine")
    parser.add_argument("--partition", metavar="P", help="Slurm: partition (default: the site's)")
    parser.add_argument(
        "--time", metavar="T", help="Slurm: time limit, e.g. 24:00:00 or 2-00; the job is then requeued"
    )
    parser.add_argument("--image", metavar="I", help="k8s, dlc: container image with xtuner in it")
    parser.add_argument("--namespace", metavar="NS", help="k8s: namespace (default: default)")
    parser.add_argument(
        "--pvc", action="append", metavar="NAME:PATH", help="k8s: mount a volume claim; may be repeated"
    )
    engine = parser.add_mutually_exclusive_group()
    engine.add_argument("--deepspeed", metavar="NAME_OR_JSON", help="ZeRO stage (default: deepspeed_zero1)")
    engine.add_argument("--fsdp", action="store_true", help="PyTorch's FSDP instead of DeepSpeed")
    parser.add_argument(
        "--work-dir", metavar="D", help="folder for checkpoints and logs, on a disk that all nodes share"
    )
    parser.add_argument("--name", metavar="JOB", help="name of the job (default: that of the config)")
    parser.add_argument("--output", metavar="FILE", help="file to write (default: standard output)")


def run(args: argparse.Namespace) -> int:
    from xtuner.compat.report import log_report
    from xtuner.compat.translate import load
    from xtuner.train import preflight

    for option, schedulers in ONLY_FOR.items():
        if getattr(args, option) and args.scheduler not in schedulers:
            what = f"--{option} has no effect with --scheduler {args.scheduler}"
            raise ConfigError(what, where=f"--{option}", do=f"leave it out; it is for {' and '.join(schedulers)}")
    config = load(args.config)
    preflight.check_settings(config, paths=False)  # of the cluster, which may see other disks
    log_report(config)
    job = _job(args, config)
    text = job_scripts.RENDER[args.scheduler](job)
    if args.output:
        _write(args.output, text)
    else:
        sys.stdout.write(text)
    print(f"submit it with: {_submit(args.scheduler, job, args.output)}", file=sys.stderr)
    return 0


def _job(args: argparse.Namespace, config: Config) -> Job:
    work_dir = args.work_dir or config.get("work_dir")
    job = Job(
        config=job_scripts.path(str(config.path.resolve()), "CONFIG"),
        work_dir=job_scripts.path(
            str(Path(work_dir or Path("work_dirs") / config.name).expanduser().absolute()), "--work-dir"
        ),
        name=job_scripts.name(args.name, args.scheduler)
        if args.name
        else job_scripts.name_from(config.name, args.scheduler),
        nodes=job_scripts.count(args.nodes, "--nodes"),
        gpus=job_scripts.count(args.gpus_per_node, "--gpus-per-node"),
        engine=job_scripts.engine(args.deepspeed, args.fsdp),
        partition=job_scripts.slurm_word(args.partition, "--partition") if args.partition else None,
        time=job_scripts.duration(args.time) if args.time else None,
        image=job_scripts.image(args.image) if args.image else None,
    )
    if args.scheduler != "k8s":
        return job
    job = replace(job, namespace=job_scripts.namespace(args.namespace or "default"))
    return _in_containers(job, config, work_dir, args.pvc or [])


def _in_containers(job: Job, config: Config, work_dir: str | None, claims: list[str]) -> Job:
    """The job with paths inside its containers, and the files of this machine that it mounts there."""
    if not job.image:
        raise ConfigError(
            "no container image is given", where="--image", do="build one with xtuner/templates/Dockerfile"
        )
    volumes = tuple(map(job_scripts.volume, claims))
    if len({mounted.rstrip("/") for _, mounted in volumes}) < len(volumes):
        raise ConfigError("two volumes have the same path", where="--pvc")
    target = work_dir or (f"{volumes[0][1].rstrip('/')}/work_dirs/{config.name}" if volumes else "")
    inside = PurePosixPath(target)
    if ".." in inside.parts or not any(inside.is_relative_to(mounted) for _, mounted in volumes):
        raise ConfigError(
            f"the work dir {target!r} is not on a volume" if volumes else "no volume is given",
            where="--work-dir" if volumes else "--pvc",
            why="checkpoints would be lost with the container, and the run could not be resumed",
            do="mount one that all nodes can write: --pvc NAME:/PATH"
            + (", and give a work dir on it" if target else ""),
        )
    name = re.sub(r"[^-._a-zA-Z0-9]", "_", config.path.name)
    files, engine = {name: config.source}, job.engine
    if engine[-1].endswith(".json"):
        files["deepspeed.json"] = Path(engine[-1]).read_text(encoding="utf-8")
        engine = ("--deepspeed", f"{job_scripts.MOUNTED}/deepspeed.json")
    if sum(len(text.encode()) for text in files.values()) > job_scripts.CONFIG_MAP_BYTES:
        raise ConfigError("the config exceeds the size limit of a ConfigMap (1 MiB)", where=str(config.path))
    work = job_scripts.path(target, "--work-dir")
    return replace(
        job, config=f"{job_scripts.MOUNTED}/{name}", work_dir=work, volumes=volumes, files=files, engine=engine
    )


def _write(output: str, text: str) -> None:
    target = Path(output).expanduser()
    if target.exists():
        head = target.read_bytes()[:500] if target.is_file() else b""
        if job_scripts.MARK.encode() not in head:
            raise ConfigError(
                "the file exists, and was not written by `xtuner launch`", where=output, do="choose another --output"
            )
    with atomic_file(target) as f:
        f.write(text)


def _submit(scheduler: str, job: Job, output: str | None) -> str:
    file = shlex.quote(str(Path(output).expanduser())) if output else ""
    if scheduler == "dlc":
        start = f"bash {shlex.quote(str(Path(output).expanduser().resolve()))}" if output else "bash FILE"
        words = ["dlc", "submit", "pytorchjob", f"--name={job.name}", f"--workers={job.nodes}"]
        words += [f"--worker_gpu={job.gpus}", *([f"--worker_image={job.image}"] if job.image else [])]
        return shlex.join([*words, f"--command={start}"])
    program = {"slurm": "sbatch", "k8s": "kubectl apply -f"}[scheduler]
    if file:
        return f"{program} {file}"
    return f"this command | {program}{' -' if scheduler == 'k8s' else ''}"
