"""OpenCompass configs of an exported model: how to load it with each backend, and how to prompt it.

    opencompass_turbomind.py    through LMDeploy, on a GPU: its TurboMind, or its PyTorch engine for networks that only
                                that one computes
    opencompass_hf.py           through transformers

Both are configs of OpenCompass 0.5 in the exported folder. `xtuner eval opencompass` writes the same text again with
the folder's current path.
"""

from dataclasses import dataclass
from pathlib import Path

import xtuner
from xtuner.core.errors import ConfigError
from xtuner.core.files import read_json
from xtuner.data.tokenizer import load_tokenizer
from xtuner.data.tokenizer_template import read_template
from xtuner.export.turbomind_support import find_engine
from xtuner.families import find_family, read_config, read_model

BACKENDS = ("hf", "turbomind")
CLASSES = {
    ("hf", "chat"): "HuggingFacewithChatTemplate",
    ("hf", "base"): "HuggingFaceBaseModel",
    ("turbomind", "chat"): "TurboMindModelwithChatTemplate",
    ("turbomind", "base"): "TurboMindModel",
}
BATCH = {"hf": 8, "turbomind": 64}  # prompts at a time; TurboMind does its own scheduling
MAX_OUT_LEN = 1024


@dataclass(frozen=True)
class OpenCompassSettings:
    """Choices for a config; None derives the value from the folder."""

    kind: str | None = None  # "chat" uses the tokenizer's chat template, "base" continues texts
    gpus: int = 1  # for one copy of the model
    batch_size: int | None = None
    max_seq_len: int | None = None  # tokens of a prompt with its answer
    max_out_len: int | None = None  # tokens of an answer


def has_chat_template(folder: Path) -> bool:
    path = folder / "tokenizer_config.json"
    return (folder / "chat_template.jinja").is_file() or bool(path.is_file() and read_json(path).get("chat_template"))


def stop_words(folder: Path) -> list[str]:
    """Names of the tokens that end an answer: those of generation_config.json, and the chat template's."""
    tokenizer = load_tokenizer(folder)
    names = {i: name for name, i in tokenizer.special.items()}
    found = [names[i] for i in read_model(folder)[1].stop_ids if i in names]
    chat = find_family(_hf(folder)).chat_for(names.values())
    words = {word for template in (read_template(tokenizer), chat) if template for word in template.stop_words}
    return list(dict.fromkeys([*found, *(name for name in names.values() if name in words)]))


def render_config(folder: Path, backend: str, path: Path, name: str, chosen: OpenCompassSettings | None = None) -> str:
    """The text of an OpenCompass config.

    Args:
        folder: where the export is now.
        backend: one of BACKENDS.
        path: absolute path from which OpenCompass will load the export.
        name: name of the column in OpenCompass's tables.

    Raises: ConfigError, CheckpointError for a folder that cannot be read; ConfigError for a network that no engine of
    the backend computes.
    """
    chosen = chosen or OpenCompassSettings()
    engine = _require_engine(folder) if backend == "turbomind" else ""
    kind = chosen.kind or ("chat" if has_chat_template(folder) else "base")
    seq_len = chosen.max_seq_len or read_config(_hf(folder)).max_position_embeddings
    batch = chosen.batch_size or BATCH[backend]
    cls = CLASSES[backend, kind]
    entry = [f"abbr={f'{name}-{backend}'!r}", f"path={str(path)!r}"]
    if backend == "hf":  # without running code of the folder
        entry += ["model_kwargs=dict(trust_remote_code=False, torch_dtype='auto', device_map='auto')"]
        entry += ["tokenizer_kwargs=dict(trust_remote_code=False)"]
    else:
        entry += [f"backend={engine!r}"]
        entry += [f"engine_config=dict(tp={chosen.gpus}, session_len={seq_len}, max_batch_size={batch})"]
        entry += ["gen_config=dict(do_sample=False)"]
    if cls != "TurboMindModel":  # it has no such argument
        entry += [f"stop_words={stop_words(folder)!r}"]
    entry += [f"max_seq_len={seq_len}", f"max_out_len={chosen.max_out_len or min(MAX_OUT_LEN, seq_len // 2)}"]
    entry += [f"batch_size={batch}", f"run_cfg=dict(num_gpus={chosen.gpus})"]
    lines = [f"# OpenCompass 0.5: {name!r} through {backend}; written by xtuner {xtuner.__version__}"]
    lines += [
        *_notes(folder, backend, engine),
        f"from opencompass.models import {cls}",
        "",
        "datasets = []",
        "models = [",
        "    dict(",
    ]
    lines += [f"        {part}," for part in (f"type={cls}", *entry)]
    return "\n".join([*lines, "    )", "]", ""])


def write_configs(folder: Path, target: Path) -> None:
    """Write the file of each backend that computes the network into `folder`, which will be renamed to `target`.

    Without tokenizer.json, none is written.
    """
    if (folder / "tokenizer.json").is_file():
        for backend in BACKENDS:
            if backend == "turbomind" and not find_engine(*read_model(folder)):
                continue
            text = render_config(folder, backend, target, target.name)
            (folder / f"opencompass_{backend}.py").write_text(text, encoding="utf-8")


def _require_engine(folder: Path) -> str:
    """The engine of LMDeploy that computes the network. Raises: ConfigError if none does."""
    engine = find_engine(*read_model(folder))
    if not engine:
        raise ConfigError(
            "the model has sliding windows in some layers only, which no engine of LMDeploy computes",
            where=str(folder / "config.json"),
            why="its TurboMind has no windows, and its PyTorch engine gives all layers the same one",
            do="use the backend hf",
        )
    return engine


def _notes(folder: Path, backend: str, engine: str) -> list[str]:
    notes = [
        f"# The command `xtuner eval opencompass HF_DIR --backend {backend} --datasets NAME` does everything needed."
    ]
    if backend == "hf" and (other := find_family(_hf(folder)).loads_as):
        notes += [
            f"# transformers does not support this layout, but --layout {other}; `xtuner eval opencompass` converts it."
        ]
    if engine == "pytorch":
        notes += ["# LMDeploy's PyTorch engine computes this network; its TurboMind does not, or computes another one."]
    if backend == "hf":
        notes += ["# On a machine without a GPU: num_gpus=0. For a base model without chat: HuggingFaceBaseModel."]
    else:
        notes += ["# For a base model without chat: TurboMindModel, without stop_words."]
    notes += ["# By hand: import `models` from here into a config with datasets, and run `opencompass` with that."]
    return notes


def _hf(folder: Path) -> dict[str, object]:
    found = read_json(folder / "config.json")
    assert isinstance(found, dict)
    return found
