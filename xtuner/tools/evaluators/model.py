"""What is evaluated, as a folder that evaluators read: a Hugging Face folder as it is, or a checkpoint with its config.

transformers 4 has no InternLM2. What is in its layout is written again in that of llama, below the work dir.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from xtuner.core import hub, path_kinds
from xtuner.core.errors import CheckpointError, ConfigError
from xtuner.core.files import MANIFEST, file_entry, read_json
from xtuner.core.log import logger, progress
from xtuner.export.hf import LOADABLE, export
from xtuner.export.sources import recognise
from xtuner.families import find_family
from xtuner.tools.model_converters.pth_to_hf import from_config

COPY = "model"  # of the work dir
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Given:
    """Args: words: HF_DIR, or CONFIG.py and CHECKPOINT; options: overrides of the config.

    Raises: ConfigError, CheckpointError for what is none of these.
    """

    def __init__(self, words: Sequence[str], options: Sequence[str] = ()) -> None:
        self._words, self._options = words, options
        do = "give HF_DIR, or CONFIG.py CHECKPOINT, before the options"
        if not words:
            raise ConfigError("no model is given", where="MODEL", do=do)
        if len(words) > 2 or (len(words) == 2 and not words[0].endswith(".py")):
            raise ConfigError(f"{' '.join(words)} is no model", where="MODEL", do=do)
        if len(words) == 2:
            recognise(words[1])
            self.name = f"{Path(words[0]).stem}-{Path(words[1]).resolve().stem}"  # for folders and tables
            return
        if options:
            raise ConfigError("there is no config that it could change", where="--cfg-options", do="leave it out")
        self._hf = Path(os.path.abspath(hub.resolve(words[0])))
        self.name = self._hf.name if Path(words[0]).expanduser().is_dir() else words[0].rpartition("/")[2]
        _check(self._hf)

    def work_dir(self, asked: Path | None) -> Path:
        """Where results go, absolute. Raises: ConfigError inside the model, which would not be what was exported."""
        found = (asked or Path("work_dirs") / "eval" / self.name).expanduser().resolve()
        if len(self._words) == 1 and found.is_relative_to(self._hf.resolve()):
            raise ConfigError("results would lie in the model's folder", where=str(found), do="give another --work-dir")
        return found

    def folder(self, work_dir: Path, any_layout: bool = False) -> Path:
        """Where the evaluators find it, in a layout of transformers unless `any_layout` will do.

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
        logger.info(f"transformers 4 does not read {folder} as it is; writing it to {target} in the {layout} layout")
        return export(folder, target, folder, layout, dtype)


def _check(folder: Path) -> None:
    """Raises: ConfigError for what is no export."""
    usual = (path_kinds.HF, path_kinds.BARE, path_kinds.UNKNOWN)
    path_kinds.require_kind(folder, usual, "MODEL", "give {} as the model", "give its config, too: CONFIG.py {}")
    missing = hub.missing_files(folder) + hub.missing_files(folder, tokenizer_only=True)
    if missing:
        raise ConfigError(
            f"this is no exported model: {missing[0]} is missing",
            where=str(folder),
            do="give a Hugging Face folder, as `xtuner convert pth_to_hf` writes it, or CONFIG.py CHECKPOINT",
        )


def _check_weights(folder: Path) -> None:
    """Against the manifest of an export of ours: a flipped bit would only be seen as a lower score.

    Other files may have been changed since, such as a chat template. Raises: CheckpointError.
    """
    files = read_json(folder / MANIFEST).get("files", {}) if (folder / MANIFEST).is_file() else {}
    weights = {folder / name: entry for name, entry in files.items() if name.endswith(".safetensors")}
    for path in progress(list(weights), "checking weights"):
        if not path.is_file() or file_entry(path) != weights[path]:
            what = f"{path.name} is not what was exported: its sha256 is not the manifest's"
            raise CheckpointError(what, where=str(path), do="export it again")
