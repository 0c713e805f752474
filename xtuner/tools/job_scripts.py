"""Job scripts for Slurm, Kubernetes and Aliyun DLC, from the templates in `xtuner/templates/`.

Every value is quoted for its context. Names must follow the scheduler's rules; paths may contain blanks, quotes and any
other printable character.
"""

import json
import re
import shlex
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from xtuner.config.load import SHIPPED
from xtuner.core.errors import ConfigError, did_you_mean

TEMPLATES = Path(__file__).parent.parent / "templates"
MARK = "Written by `xtuner launch"  # in the first lines of every script
ENGINES = sorted(p.stem for p in (SHIPPED / "deepspeed").glob("*.json"))
SHORTEST = 600  # s of a Slurm job: the signal to stop comes 300 s before its end
CONFIG_MAP_BYTES = 2**20 - 4096  # Kubernetes's limit, with room for names
MOUNTED = "/etc/xtuner"  # where the template mounts the ConfigMap

_NOT_YAML = r"[^\t\n\x20-\x7e\xa0-\u2027\u202a-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]"
_WORD = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_LABEL = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"  # RFC 1123
_LONGEST = 40  # characters of a job's name: pods are named NAME-worker-1023, with at most 63


@dataclass(frozen=True)
class Job:
    """The values of a job script.

    `config` and `work_dir` are paths inside the job; on Kubernetes the script contains `files` (name → text).
    """

    config: str
    work_dir: str
    name: str
    nodes: int
    gpus: int  # per node
    engine: tuple[str, ...]  # arguments of `xtuner train`
    partition: str | None = None
    time: str | None = None
    image: str | None = None
    namespace: str = "default"
    volumes: tuple[tuple[str, str], ...] = ()  # (claim, path)
    files: Mapping[str, str] = field(default_factory=dict)


class _Template(string.Template):
    delimiter = "@"  # $ is for the shell


def fill_template(template: str, **values: object) -> str:
    """A file of `templates/` with its placeholders `@{NAME}` replaced by values."""
    return _Template((TEMPLATES / template).read_text(encoding="utf-8")).substitute(values)


def slurm(job: Job) -> str:
    directives = {"partition": job.partition, "time": job.time}
    return _fill(
        "slurm.sh",
        shlex.quote,
        job,
        directives="".join(f"#SBATCH --{key}={value}\n" for key, value in directives.items() if value),
    )


def dlc(job: Job) -> str:
    return _fill("dlc.sh", shlex.quote, job)


def k8s(job: Job) -> str:
    workers = f"    Worker:\n      replicas: {job.nodes - 1}\n      restartPolicy: OnFailure\n      template: *pod"
    return _fill(
        "kubernetes.yaml",
        yaml_value,
        job,
        namespace=yaml_text(job.namespace),
        image=yaml_text(job.image or ""),
        files="\n".join(f"  {yaml_text(name)}: {yaml_block(text)}" for name, text in job.files.items()),
        mounts="\n".join(
            f"                - name: data-{i}\n                  mountPath: {yaml_text(path)}"
            for i, (_, path) in enumerate(job.volumes)
        ),
        volumes="\n".join(
            f"            - name: data-{i}\n              persistentVolumeClaim:\n"
            f"                claimName: {yaml_text(claim)}"
            for i, (claim, _) in enumerate(job.volumes)
        ),
        workers=workers if job.nodes > 1 else "",
    )


RENDER: dict[str, Callable[[Job], str]] = {"slurm": slurm, "k8s": k8s, "dlc": dlc}


def _fill(template: str, quote: Callable[[str], str], job: Job, **more: str) -> str:
    text = fill_template(
        template,
        config=quote(job.config),
        work_dir=quote(job.work_dir),
        name=job.name if quote is shlex.quote else yaml_text(job.name),
        nodes=job.nodes,
        gpus=job.gpus,
        engine=shlex.join(job.engine),
        **more,
    )
    return text.rstrip("\n") + "\n"


def yaml_text(text: str) -> str:
    """Printable text as a double-quoted YAML scalar; JSON's form is valid YAML."""
    return json.dumps(text, ensure_ascii=False)


def yaml_value(text: str) -> str:
    """Like `yaml_text`, for fields in which Kubernetes expands `$(NAME)` and reads `$$` as a dollar sign."""
    return yaml_text(text.replace("$", "$$"))


def yaml_block(text: str) -> str:
    """A file's text as a literal block under a key that is indented by 2.

    Raises: ConfigError for characters that YAML cannot represent.
    """
    odd = re.search(_NOT_YAML, text)
    if odd:
        line = text.count("\n", 0, odd.start()) + 1
        raise ConfigError(f"YAML cannot carry the character U+{ord(odd[0]):04X}", where=f"the config, line {line}")
    lines = [f"    {line}" if line else "" for line in text.rstrip("\n").split("\n")]
    return "|2\n" + "\n".join(lines)  # 2: indentation relative to the key, also if the first line begins with blanks


def path(text: str, option: str) -> str:
    """Raises: ConfigError for text that a script cannot contain, such as a line break."""
    if not text or not text.isprintable():
        raise ConfigError(f"{text!r} is empty or contains a character that is not printable", where=option)
    return text


def count(number: int, option: str) -> int:
    if number < 1:
        raise ConfigError(f"{number} is not a number of at least 1", where=option, why="training runs on GPUs there")
    return number


def duration(text: str) -> str:
    """Slurm's formats: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S."""
    with_days = r"(?P<d>\d+)-(?P<dh>\d+)(?::(?P<dm>\d+)(?::(?P<ds>\d+))?)?"
    without = r"(?:(?P<h>\d+):(?=\d+:))?(?P<m>\d+)(?::(?P<s>\d+))?"
    parts = re.fullmatch(f"{with_days}|{without}", text, re.ASCII)
    if not parts:
        raise ConfigError(
            f"{text!r} is not a duration", where="--time", do="write 24:00:00 (H:M:S), 2-00 (D-H) or 90 (minutes)"
        )
    d, h, m, s = (sum(int(parts[k] or 0) for k in keys) for keys in (("d",), ("h", "dh"), ("m", "dm"), ("s", "ds")))
    if ((d * 24 + h) * 60 + m) * 60 + s < SHORTEST:
        raise ConfigError(
            f"{text!r} is shorter than {SHORTEST // 60} minutes",
            where="--time",
            why="the run gets a signal to save and stop 5 minutes before the end",
            do="90 means minutes, 24:00:00 hours, 2-00 days",
        )
    return text


def slurm_word(text: str, option: str) -> str:
    """A partition (or several, separated by commas) or a job's name."""
    if not re.fullmatch(rf"{_WORD}(,{_WORD})*", text, re.ASCII):
        raise ConfigError(
            f"{text!r} is not a valid name for Slurm", where=option, do="use letters, digits, '.', '_' and '-'"
        )
    return text


def namespace(text: str) -> str:
    if not re.fullmatch(_LABEL, text, re.ASCII) or len(text) > 63:
        raise ConfigError(
            f"{text!r} is not a valid namespace", where="--namespace", do="use at most 63 of a-z, 0-9 and '-'"
        )
    return text


def name(text: str, scheduler: str) -> str:
    """A job's name. On Kubernetes it is also the name of services: it must begin with a letter (RFC 1035)."""
    if scheduler != "k8s":
        return slurm_word(text, "--name")
    if not re.fullmatch(f"(?=[a-z]){_LABEL}", text, re.ASCII) or len(text) > _LONGEST:
        raise ConfigError(
            f"{text!r} is not a valid name for a job on Kubernetes",
            where="--name",
            do=f"use at most {_LONGEST} of a-z, 0-9 and '-'; a letter first, no '-' at the end",
        )
    return text


def name_from(config: str, scheduler: str) -> str:
    """Derive a job's name from a config's."""
    if scheduler == "k8s":
        return re.sub(r"[^a-z0-9]+", "-", config.lower()).lstrip("0123456789-")[:_LONGEST].strip("-") or "train"
    return re.sub(r"[^A-Za-z0-9._-]+", "_", config).lstrip("._-")[:60] or "train"


def image(text: str) -> str:
    if not re.fullmatch(r"[a-z0-9][A-Za-z0-9._/:@-]*", text, re.ASCII):
        raise ConfigError(f"{text!r} is not a valid image", where="--image", do="write it as REGISTRY/NAME:TAG")
    return text


def volume(text: str) -> tuple[str, str]:
    """`CLAIM:/path` → (claim, path)."""
    claim, _, where = text.partition(":")
    if not re.fullmatch(rf"{_LABEL}(\.{_LABEL})*", claim, re.ASCII) or len(claim) > 253:
        raise ConfigError(
            f"{claim!r} is not a valid name of a volume claim", where=f"--pvc {text}", do="write NAME:/PATH"
        )
    parts = PurePosixPath(path(where, "--pvc") if where else "").parts
    if ":" in where or parts[:1] != ("/",) or ".." in parts or len(parts) < 2:
        raise ConfigError(
            f"{where!r} is not an absolute folder to mount at", where=f"--pvc {text}", do="write NAME:/PATH"
        )
    if where.rstrip("/") in (MOUNTED, "/dev/shm"):
        raise ConfigError(f"{where} is used by the template itself", where=f"--pvc {text}", do="mount it elsewhere")
    return claim, where


def engine(deepspeed: str | None, fsdp: bool) -> tuple[str, ...]:
    """Arguments of `xtuner train`: a ZeRO stage by name or JSON file, or FSDP."""
    if fsdp:
        return ("--fsdp",)
    name = deepspeed or ENGINES[0]
    if name.endswith(".json"):
        if not Path(name).expanduser().is_file():
            raise ConfigError(f"there is no file {name!r}", where="--deepspeed")
        return ("--deepspeed", path(str(Path(name).expanduser().resolve()), "--deepspeed"))
    if name not in ENGINES:
        hint = did_you_mean(name, ENGINES)
        raise ConfigError(
            f"no DeepSpeed setting {name!r}.{hint}", where="--deepspeed", do=f"one of {', '.join(ENGINES)}"
        )
    return ("--deepspeed", name)
