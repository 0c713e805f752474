"""OpenCompass's description of an exported model: what it loads with which backend, and how it speaks.

    opencompass_turbomind.py    through LMDeploy, on a GPU
    opencompass_hf.py           through transformers

Both are configs of OpenCompass 0.5 and lie in the exported folder. `xtuner eval opencompass` writes the same text anew,
with the path that the folder has then.
"""

from dataclasses import dataclass
from pathlib import Path

import xtuner
from xtuner.core.files import read_json
from xtuner.data.tokenizer import load_tokenizer
from xtuner.families import find_family, read_config

BACKENDS = ("hf", "turbomind")
CLASSES = {
    ("hf", "chat"): "HuggingFacewithChatTemplate",
    ("hf", "base"): "HuggingFaceBaseModel",
    ("turbomind", "chat"): "TurboMindModelwithChatTemplate",
    ("turbomind", "base"): "TurboMindModel",
}
BATCH = {"hf": 8, "turbomind": 64}  # prompts at a time; TurboMind schedules them itself
MAX_OUT_LEN = 1024


@dataclass(frozen=True)
class Settings:
    """What may be chosen; None is found out from the folder."""

    kind: str | None = None  # "chat" speaks through the tokenizer's chat template, "base" continues texts
    gpus: int = 1  # that hold one copy of the model
    batch_size: int | None = None
    max_seq_len: int | None = None  # tokens of a prompt with its answer
    max_out_len: int | None = None  # tokens of an answer


def has_chat_template(folder: Path) -> bool:
    path = folder / "tokenizer_config.json"
    return (folder / "chat_template.jinja").is_file() or bool(path.is_file() and read_json(path).get("chat_template"))


def stop_words(folder: Path) -> list[str]:
    """Names of the tokens at which an answer ends: those of generation_config.json, and the chat template's."""
    names = {i: name for name, i in load_tokenizer(folder).special.items()}
    path = folder / "generation_config.json"
    ids = read_json(path).get("eos_token_id", []) if path.is_file() else read_config(_hf(folder)).eos_token_id
    found = [names[i] for i in (ids if isinstance(ids, list) else [ids]) if i in names]
    chat = find_family(_hf(folder)).chat
    return list(dict.fromkeys([*found, *(name for name in names.values() if chat and name in chat.stop_words)]))


def config_text(folder: Path, backend: str, path: Path, name: str, chosen: Settings | None = None) -> str:
    """A config of OpenCompass as text.

    Args:
        folder: where the export can be read now.
        backend: one of BACKENDS.
        path: where it will be read by OpenCompass, absolute.
        name: of the column in OpenCompass's tables.

    Raises: ConfigError, CheckpointError for a folder that cannot be read.
    """
    chosen = chosen or Settings()
    kind = chosen.kind or ("chat" if has_chat_template(folder) else "base")
    seq_len = chosen.max_seq_len or read_config(_hf(folder)).max_position_embeddings
    batch = chosen.batch_size or BATCH[backend]
    cls = CLASSES[backend, kind]
    entry = [f"abbr={f'{name}-{backend}'!r}", f"path={str(path)!r}"]
    if backend == "hf":  # no code of the folder is run
        entry += ["model_kwargs=dict(trust_remote_code=False, torch_dtype='auto', device_map='auto')"]
        entry += ["tokenizer_kwargs=dict(trust_remote_code=False)"]
    else:
        entry += [f"backend={backend!r}"]
        entry += [f"engine_config=dict(tp={chosen.gpus}, session_len={seq_len}, max_batch_size={batch})"]
        entry += ["gen_config=dict(do_sample=False)"]
    if cls != "TurboMindModel":  # which takes none
        entry += [f"stop_words={stop_words(folder)!r}"]
    entry += [f"max_seq_len={seq_len}", f"max_out_len={chosen.max_out_len or min(MAX_OUT_LEN, seq_len // 2)}"]
    entry += [f"batch_size={batch}", f"run_cfg=dict(num_gpus={chosen.gpus})"]
    lines = [f"# OpenCompass 0.5: {name!r} through {backend}; written by xtuner {xtuner.__version__}"]
    lines += [
        *_notes(folder, backend),
        f"from opencompass.models import {cls}",
        "",
        "datasets = []",
        "models = [",
        "    dict(",
    ]
    lines += [f"        {part}," for part in (f"type={cls}", *entry)]
    return "\n".join([*lines, "    )", "]", ""])


def write_configs(folder: Path, target: Path) -> None:
    """Both files into `folder`, which will be found as `target`. A folder without tokenizer.json gets none."""
    if (folder / "tokenizer.json").is_file():
        for backend in BACKENDS:
            text = config_text(folder, backend, target, target.name)
            (folder / f"opencompass_{backend}.py").write_text(text, encoding="utf-8")


def _notes(folder: Path, backend: str) -> list[str]:
    notes = [f"# xtuner eval opencompass HF_DIR --backend {backend} --datasets NAME   does all that is needed."]
    if backend == "hf" and (other := find_family(_hf(folder)).loads_as):
        notes += [
            f"# transformers does not know this layout (--layout {other} it does); `xtuner eval opencompass` converts."
        ]
    if backend == "hf":
        notes += ["# On a machine without a GPU: num_gpus=0. A model that only continues texts: HuggingFaceBaseModel."]
    else:
        notes += ["# A model that only continues texts: TurboMindModel, without stop_words."]
    notes += ["# By hand: import `models` from here into a config with datasets, and give that to `opencompass`."]
    return notes


def _hf(folder: Path) -> dict[str, object]:
    found = read_json(folder / "config.json")
    assert isinstance(found, dict)
    return found
