"""The evaluated model as a folder that evaluators can read, from a Hugging Face folder or a checkpoint with its config.

transformers 4 does not support InternLM2: a model in its layout is converted to the llama layout in the work dir.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from xtuner.core import hub, path_kinds
from xtuner.core.errors import CheckpointError, ConfigError
from xtuner.core.files import MANIFEST, file_entry, read_json
from xtuner.core.log import logger, progress
from xtuner.export.hf import LOADABLE, export_hf
from xtuner.export.sources import recognise
from xtuner.families import find_family
from xtuner.tools.model_converters.pth_to_hf import from_config

COPY = "model"  # of the work dir
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class EvaluatedModel:
    """Args: words: HF_DIR, or CONFIG.py and CHECKPOINT; options: overrides of the config.

    Raises: ConfigError, CheckpointError for anything else.
    """

    def __init__(self, words: Sequence[str], options: Sequence[str] = ()) -> None:
        self._words, self._options = words, options
        do = "give HF_DIR, or CONFIG.py CHECKPOINT, before the options"
        if not words:
            raise ConfigError("no model is given", where="MODEL", do=do)
        if len(words) > 2 or (len(words) == 2 and not words[0].endswith(".py")):
            raise ConfigError(f"{' '.join(words)} is not a model", where="MODEL", do=do)
        if len(words) == 2:
            recognise(words[1])
            self.name = f"{Path(words[0]).stem}-{Path(words[1]).resolve().stem}"  # for folders and tables
            return
        if options:
            raise ConfigError("there is no config to change", where="--cfg-options", do="omit it")
        self._hf = Path(os.path.abspath(hub.resolve(words[0])))
        self.name = self._hf.name if Path(words[0]).expanduser().is_dir() else words[0].rpartition("/")[2]
        _check(self._hf)

    def work_dir(self, requested: Path | None) -> Path:
        """The absolute folder for results. Raises: ConfigError for one inside the model's folder."""
        found = (requested or Path("work_dirs") / "eval" / self.name).expanduser().resolve()
        if len(self._words) == 1 and found.is_relative_to(self._hf.resolve()):
            raise ConfigError("results would be in the model's folder", where=str(found), do="give another --work-dir")
        return found

    def folder(self, work_dir: Path, any_layout: bool = False) -> Path:
        """The model's folder, converted to a layout of transformers unless `any_layout` is accepted.

        Raises: ConfigError, CheckpointError.
        """
        target = work_dir / COPY
        if len(self._words) == 2:
            logger.info(f"exporting {self._words[1]} to {target}")
            return from_config(self._words[0], self._options, self._words[1], target, layout=LOADABLE)
        folder, hf = self._hf, read_json(self._hf / "config.json")
        _check_weights(folder)
        if (folder / "tokenizer.json").is_file() and (any_layout or not find_family(hf).loads_as):
            return folder
        dtype = _DTYPES.get(str(hf.get("torch_dtype") or hf.get("dtype")), torch.bfloat16)
        layout = find_family(hf).loads_as or find_family(hf).name
        logger.info(f"transformers 4 cannot read {folder}; converting it to {target} in the {layout} layout")
        return export_hf(folder, target, folder, layout, dtype)


def _check(folder: Path) -> None:
    """Raises: ConfigError unless the folder is an exported model."""
    usual = (path_kinds.HF, path_kinds.BARE, path_kinds.UNKNOWN)
    path_kinds.require_kind(folder, usual, "MODEL", "give {} as the model", "give its config, too: CONFIG.py {}")
    missing = hub.missing_files(folder) + hub.missing_files(folder, tokenizer_only=True)
    if missing:
        raise ConfigError(
            f"this is not an exported model: {missing[0]} is missing",
            where=str(folder),
            do="give a Hugging Face folder, as `xtuner convert pth_to_hf` writes it, or CONFIG.py CHECKPOINT",
        )


def _check_weights(folder: Path) -> None:
    """Compare weights with the manifest of our export, if any: a flipped bit would only show as a lower score.

    Other files, such as a chat template, may have been changed since. Raises: CheckpointError.
    """
    files = read_json(folder / MANIFEST).get("files", {}) if (folder / MANIFEST).is_file() else {}
    weights = {folder / name: entry for name, entry in files.items() if name.endswith(".safetensors")}
    for path in progress(list(weights), "checking weights"):
        if not path.is_file() or file_entry(path) != weights[path]:
            what = f"{path.name} has changed since the export: its sha256 is not that of the manifest"
            raise CheckpointError(what, where=str(path), do="export it again")
