"""What lies at a path, by the names of files alone: one list of the kinds of models and checkpoints for every command.

Whoever takes some of them calls `take`, which says what any other is and gives the command that makes it fit.
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
PARTIAL = "not a whole checkpoint of xtuner: its manifest.json is missing"
HF = "a Hugging Face folder"
BARE = "a folder of weights whose config.json is missing"
ADAPTER = "an adapter (LoRA), not a whole model"
ZERO = "a checkpoint of DeepSpeed, as XTuner 0.1 and 0.2 write them"
INTERNEVO = "a checkpoint of InternEvo"
SINGLE = "a single file of torch.save"
SAFETENSORS = "a single file of weights, without the config.json that describes their network"
FILE = "a file, not a folder with config.json and weights"
TURBOMIND = "a directory of TurboMind, for LMDeploy alone"
WORK_DIR = "a folder of checkpoints"
UNKNOWN = "neither a model nor a checkpoint that xtuner knows"
NOTHING = "not there"
_FILES = {".safetensors": SAFETENSORS, ".pth": SINGLE, ".pt": SINGLE, ".bin": SINGLE, ".ckpt": SINGLE}
_NUMBERED = re.compile(r"(?:iter_|epoch_|global_step)(\d{1,15})(?:\.pth)?")
CONVERTIBLE = (CHECKPOINT, ZERO, INTERNEVO, SINGLE)  # what `xtuner convert pth_to_hf` takes beside HF


@dataclass(frozen=True)
class Kind:
    path: Path
    what: str  # one of the above
    inner: Path | None = None  # of a folder of checkpoints: the newest

    @property
    def exists(self) -> bool:
        return self.what != NOTHING

    @property
    def foreign(self) -> bool:
        """Known as something else than a checkpoint of ours."""
        return self.what not in (CHECKPOINT, PARTIAL, BARE, UNKNOWN, NOTHING)

    def fits(self, use: str) -> str:
        """What to do so that it fits.

        Args:
            use: how the folder of a model is given there, as "load_from = '{}'".
        """
        if self.what == HF:
            return use.format(self.path)
        if self.what in CONVERTIBLE:
            command = f"xtuner convert pth_to_hf CONFIG {shlex.quote(str(self.path))} HF_DIR --fp32"
            return f"{command}   (CONFIG names its model and tokenizer), then {use.format('HF_DIR')}"
        if self.what == SAFETENSORS:
            folder = f"a folder that holds it as model.safetensors, with the config.json of its model: {use}"
            return folder.format("that folder")
        others = {
            BARE: "copy the config.json of its model there",
            PARTIAL: "give another one: this was being removed, or has been copied in part",
            ADAPTER: f"merge it into its model with the tool that trained it, then {use.format('the merged model')}",
            TURBOMIND: f"give the Hugging Face folder that it was made from: {use.format('HF_DIR')}",
        }
        return others.get(self.what, "give a Hugging Face folder, or an iter_N.pth checkpoint of xtuner")


def require_kind(path: str | Path, kinds: Collection[str], where: str, use: str, checkpoint: str = "") -> Kind:
    """What lies at `path`, if it is one of `kinds`. Raises: ConfigError, which says what it is and what to do.

    Args:
        where: the setting or argument that named it.
        use: see `Kind.fits`.
        checkpoint: what to do instead with a checkpoint of ours.
    """
    kind = recognise(path)
    if kind.what in kinds:
        return kind
    raise ConfigError(
        f"{path} is {kind.what}",
        where=where,
        why="it cannot be used there as it is" if kind.exists else "",
        do=_advice(recognise(kind.inner) if kind.inner else kind, kinds, use, checkpoint),
    )


def _advice(kind: Kind, kinds: Collection[str], use: str, checkpoint: str) -> str:
    if kind.what in kinds:
        return use.format(kind.path)
    return checkpoint.format(kind.path) if checkpoint and kind.what == CHECKPOINT else kind.fits(use)


def recognise(path: str | Path) -> Kind:
    """What lies at `path`. Nothing is opened."""
    path = Path(os.path.expanduser(path))
    try:
        if path.is_file():
            return Kind(path, _FILES.get(path.suffix, FILE))
        if not path.is_dir():
            return Kind(path, NOTHING)
        names = {p.name for p in path.iterdir()}
    except (OSError, ValueError):  # also names that no file can have
        return Kind(path, NOTHING)
    if MANIFEST in names and "weights" in names:
        return Kind(path, CHECKPOINT)
    if "weights" in names and "config.json" not in names:
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
