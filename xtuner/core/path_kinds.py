"""Kinds of models and checkpoints, recognised by file names only: one list for all commands.

A command that accepts some kinds calls `require_kind`: its error says what the path is, and which command converts it.
"""

import os
import re
import shlex
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from xtuner.core.errors import ConfigError
from xtuner.core.files import MANIFEST

CHECKPOINT = "a checkpoint of xtuner"
PARTIAL = "not a complete checkpoint of xtuner: its manifest.json is missing"
HF = "a Hugging Face folder"
BARE = "a folder of weights whose config.json is missing"
ADAPTER = "an adapter (LoRA), not a complete model"
ZERO = "a checkpoint of DeepSpeed, as written by XTuner 0.1 and 0.2"
INTERNEVO = "a checkpoint of InternEvo"
SINGLE = "a single file of torch.save"
SAFETENSORS = "a single file of weights, without the config.json that describes their network"
FILE = "a file, not a folder with config.json and weights"
TURBOMIND = "a directory of TurboMind, for LMDeploy only"
WORK_DIR = "a folder of checkpoints"
UNKNOWN = "neither a model nor a checkpoint that xtuner knows"
NOTHING = "not there"
_FILES = {".safetensors": SAFETENSORS, ".pth": SINGLE, ".pt": SINGLE, ".bin": SINGLE, ".ckpt": SINGLE}
_NUMBERED = re.compile(r"(?:iter_|epoch_|global_step)(\d{1,15})(?:\.pth)?")
CONVERTIBLE = (CHECKPOINT, ZERO, INTERNEVO, SINGLE)  # accepted by `xtuner convert pth_to_hf`, in addition to HF


@dataclass(frozen=True)
class Kind:
    path: Path
    what: str  # one of the above
    inner: Path | None = None  # the newest checkpoint in a folder of checkpoints

    @property
    def exists(self) -> bool:
        return self.what != NOTHING

    @property
    def foreign(self) -> bool:
        """Recognised, but not as a checkpoint of xtuner."""
        return self.what not in (CHECKPOINT, PARTIAL, BARE, UNKNOWN, NOTHING)

    def advice(self, use: str) -> str:
        """What the user has to do to use it as a model.

        Args:
            use: how a model's folder is given in that setting, e.g. "load_from = '{}'".
        """
        if self.what == HF:
            return use.format(self.path)
        if self.what in CONVERTIBLE:
            merge = " --merge" if self.what == CHECKPOINT and (self.path / "adapter").is_dir() else ""
            command = f"xtuner convert pth_to_hf CONFIG {shlex.quote(str(self.path))} HF_DIR --fp32{merge}"
            return f"{command}   (CONFIG gives its model and tokenizer), then {use.format('HF_DIR')}"
        if self.what == SAFETENSORS:
            folder = f"a folder that holds it as model.safetensors, with the config.json of its model: {use}"
            return folder.format("that folder")
        others = {
            BARE: "copy the config.json of its model into it",
            PARTIAL: "give another one: this was being removed, or was copied incompletely",
            ADAPTER: "merge it into its model with the tool that trained it (xtuner: convert pth_to_hf --merge), then "
            + use.format("the merged model"),
            TURBOMIND: f"give the Hugging Face folder that it was converted from: {use.format('HF_DIR')}",
        }
        return others.get(self.what, "give a Hugging Face folder, or an iter_N.pth checkpoint of xtuner")


def require_kind(path: str | Path, kinds: Collection[str], where: str, use: str, checkpoint: str = "") -> Kind:
    """The kind of `path`, if it is one of `kinds`. Raises: ConfigError that says what it is and what to do.

    Args:
        where: the setting or argument that gave the path.
        use: see `Kind.advice`.
        checkpoint: what to do with a checkpoint of xtuner instead.
    """
    kind = recognise(path)
    if kind.what in kinds:
        return kind
    raise ConfigError(
        f"{path} is {kind.what}",
        where=where,
        why="this kind is not accepted there" if kind.exists else "",
        do=_advice(recognise(kind.inner) if kind.inner else kind, kinds, use, checkpoint),
    )


def _advice(kind: Kind, kinds: Collection[str], use: str, checkpoint: str) -> str:
    if kind.what in kinds:
        return use.format(kind.path)
    return checkpoint.format(kind.path) if checkpoint and kind.what == CHECKPOINT else kind.advice(use)


def recognise(path: str | Path) -> Kind:
    """The kind of `path`. No file is opened."""
    path = Path(os.path.expanduser(path))
    try:
        if path.is_file():
            return Kind(path, _FILES.get(path.suffix, FILE))
        if not path.is_dir():
            return Kind(path, NOTHING)
        names = {p.name for p in path.iterdir()}
    except (OSError, ValueError):  # also names that no file can have
        return Kind(path, NOTHING)
    if MANIFEST in names and names & {"weights", "adapter"}:
        return Kind(path, CHECKPOINT)
    if names & {"weights", "adapter"} and "config.json" not in names:
        return Kind(path, PARTIAL)
    if any(name.endswith(("_optim_states.pt", "_model_states.pt")) for name in names):
        return Kind(path, ZERO)
    if "model_config.pt" in names or any(re.fullmatch(r"model_[tw]p.*\.pt", n) for n in names):
        return Kind(path, INTERNEVO)
    if "triton_models" in names:
        return Kind(path, TURBOMIND)
    if "config.json" in names:
        return Kind(path, HF)
    if "adapter_config.json" in names:
        return Kind(path, ADAPTER)
    if any(n.endswith(".safetensors") or re.fullmatch(r"pytorch_model.*\.bin", n) for n in names):
        return Kind(path, BARE)
    numbered = [(int(m[1]), n) for n in names if (m := _NUMBERED.fullmatch(n))]
    return Kind(path, WORK_DIR, path / max(numbered)[1]) if numbered else Kind(path, UNKNOWN)
