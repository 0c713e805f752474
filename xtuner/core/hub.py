"""Find the folder of a model: a local folder, or a snapshot in the Hugging Face cache or of a folder in object storage,
downloaded once per node.

huggingface_hub reads HF_ENDPOINT, HF_HUB_OFFLINE, HF_HOME and HF_TOKEN. Only weights, configs and tokenizers are
downloaded, never code; pickles (`.bin`) only from repositories without safetensors.
"""

import os
import re
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from urllib.parse import urlsplit

from xtuner.core import path_kinds
from xtuner.core.errors import CheckpointError, ConfigError
from xtuner.core.files import read_json
from xtuner.core.log import logger
from xtuner.core.remote.transfer import cache_folder
from xtuner.core.remote.url import Url, is_remote, parse_url

TOKENIZER_FILES = ["tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "tokenizer_config.json"]
TOKENIZER_FILES += ["special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "qwen.tiktoken"]
_SMALL = ["config.json", "generation_config.json", *TOKENIZER_FILES]
INDEX = "model.safetensors.index.json"
_SAFETENSORS = ["*.safetensors", INDEX]
_PICKLES = ["pytorch_model*.bin", "pytorch_model.bin.index.json"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")  # organisation/name
_EXCLUDED = ["*/*", "consolidated*"]  # other formats in sub-folders; a second copy of the weights (Mistral)


def is_hub_id(name: str) -> bool:
    """Whether `name` has the form organisation/name."""
    return bool(_HUB_ID.fullmatch(name))


def not_found(name: str, what: str = "model", where: str = "") -> ConfigError:
    """The error for a name that is neither a folder nor a hub id; `what` it should be."""
    return ConfigError(
        f"the {what} {name!r} is neither a folder here nor a hub id",
        where=where,
        why="a hub id has the form organisation/name",
        do="check the spelling, and that this machine sees the disk of the folder",
    )


def resolve(name_or_path: str, *, revision: str | None = None, tokenizer_only: bool = False) -> Path:
    """The folder of a model.

    Args:
        name_or_path: a folder (`~` is expanded), an address in object storage, or a hub id such as
            `internlm/internlm2-7b`. A folder has precedence. A model that is complete in the cache
            is used without a network request.
        revision: branch, tag or commit of a hub id; the main branch by default.
        tokenizer_only: the weights are not needed.
    Raises: ConfigError if there is no such folder or model, or the hub cannot be reached or read.
    """
    if is_remote(name_or_path):
        return _from_object_storage(parse_url(name_or_path), tokenizer_only)
    path = Path(os.path.expanduser(name_or_path))
    if name_or_path and os.path.isdir(path):
        return path
    if is_hub_id(name_or_path) and not os.path.exists(path):
        return _from_hub(name_or_path, revision, tokenizer_only)
    if os.path.isfile(path):
        path_kinds.require_kind(path, (), str(path.absolute()), "give {} as the model")
    raise not_found(name_or_path, where=str(path.absolute()))


def is_local(name_or_path: str, tokenizer_only: bool = False) -> bool:
    """Whether `resolve` returns or fails without a network request."""
    if is_remote(name_or_path):
        return False
    path = Path(os.path.expanduser(name_or_path))
    if os.path.exists(path) or not is_hub_id(name_or_path):
        return True
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    patterns = _SMALL if tokenizer_only else _SMALL + _SAFETENSORS
    try:
        return not missing_files(_snapshot(name_or_path, None, patterns, local=True), tokenizer_only)
    except LocalEntryNotFoundError:
        return False
    except HFValidationError:
        return True


def may_be_local(name: str) -> bool:
    """Whether there is a folder for a valid hub id, which may be incomplete. Unlike `is_local` it imports no HTTP
    client, which takes a tenth of a second."""
    from huggingface_hub import constants

    return (
        os.path.exists(name)
        or (Path(constants.HF_HUB_CACHE).expanduser() / f"models--{name.replace('/', '--')}").exists()
    )


def resolve_folder(name: str) -> Path:
    """A folder (`~` is expanded), or all files of one in object storage. Raises: ConfigError; CheckpointError."""
    if not is_remote(name):
        return Path(name).expanduser()
    return _require_objects(parse_url(name), lambda name: True)


def _from_object_storage(url: Url, tokenizer_only: bool) -> Path:
    patterns = [] if tokenizer_only else [*_SAFETENSORS, *_PICKLES]

    def is_wanted(name: str) -> bool:
        inside = "/" not in name and not fnmatch(name, _EXCLUDED[1])
        return inside and (name in _SMALL or any(fnmatch(name, pattern) for pattern in patterns))

    folder = _require_objects(url, is_wanted)
    if missing := missing_files(folder, tokenizer_only):
        raise ConfigError(f"the model {url} has no {missing[0]}", where=str(url), do="complete the copy of the folder")
    return folder


def _require_objects(url: Url, wanted: Callable[[str], bool]) -> Path:
    if found := cache_folder(url, wanted):
        return found
    raise ConfigError(
        f"there is no model at {url}",
        where=str(url),
        why="training starts from its weights and tokenizer",
        do="give the folder that contains its config.json",
    )


def missing_files(folder: Path, tokenizer_only: bool = False) -> list[str]:
    """What is missing from a model's folder, by its own index of weights; empty if it is complete."""
    if tokenizer_only:
        return [] if any(os.path.isfile(folder / name) for name in TOKENIZER_FILES[:3]) else ["a tokenizer"]
    missing = [] if os.path.isfile(folder / "config.json") else ["config.json"]
    for index, pattern in ((INDEX, "*.safetensors"), (_PICKLES[1], _PICKLES[0])):
        if os.path.exists(folder / index):
            try:
                return missing + [name for name in indexed_files(folder / index) if not os.path.isfile(folder / name)]
            except CheckpointError:
                return [*missing, f"a readable {index}"]
        # without an index, files named PREFIX-00001-of-00002 may be a part of the weights
        if any("-of-" not in file.name for file in folder.glob(pattern) if os.path.isfile(file)):
            return missing
    return [*missing, "weights"]


def indexed_files(index: Path) -> list[str]:
    """The files named in an index of weights (`model.safetensors.index.json`), sorted. Raises: CheckpointError."""
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not names or not all(isinstance(name, str) for name in names):
        raise CheckpointError(
            "the index does not map tensor names to file names",
            where=f"{index}: weight_map",
            do="copy the model's file there again",
        )
    return sorted(set(names))


def _snapshot(name: str, revision: str | None, patterns: list[str], local: bool) -> Path:
    from huggingface_hub import snapshot_download  # imported late: slow, and it reads the environment at import

    return Path(
        snapshot_download(
            name, revision=revision, allow_patterns=patterns, ignore_patterns=_EXCLUDED, local_files_only=local
        )
    )


def _from_hub(name: str, revision: str | None, tokenizer_only: bool) -> Path:
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import LocalEntryNotFoundError
    from huggingface_hub.utils import WeakFileLock

    patterns = _SMALL if tokenizer_only else _SMALL + _SAFETENSORS
    partial: Path | None = None  # a folder of the cache with missing files

    def cached() -> Path | None:
        nonlocal partial
        try:
            partial = _snapshot(name, revision, patterns, local=True)
            return None if missing_files(partial, tokenizer_only) else partial
        except LocalEntryNotFoundError as e:
            partial = Path(e.snapshot_path) if hasattr(e, "snapshot_path") else None
            return None

    try:
        if folder := cached():
            return folder
        lock = Path(constants.HF_HUB_CACHE).expanduser() / ".locks" / f"xtuner--{name.replace('/', '--')}.lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(lock):  # the other processes of this node wait here, then find it in the cache
            if folder := cached():
                return folder
            folder = _snapshot(name, revision, patterns, local=False)
            if not tokenizer_only and not any(folder.glob("*.safetensors*")):
                _snapshot(name, revision, _SMALL + _PICKLES, local=False)
        if missing := missing_files(folder, tokenizer_only):
            # older versions of huggingface_hub return what the cache has if they do not reach the hub
            HfApi().model_info(name, revision=revision or "main")
    except Exception as e:  # of huggingface_hub, its HTTP library, or the disk
        if partial is None or missing_files(partial, tokenizer_only):
            raise _explain(e, name, revision) from None
        logger.warning(f"{name}: the hub cannot be read; using the cached files in {partial}")
        return partial
    if missing:
        what = f"the model {name} has no {missing[0]}" + (f" ({len(missing)} missing)" if missing[1:] else "")
        raise ConfigError(what, where=str(folder), do="choose a model with safetensors weights, or convert this one")
    return folder


def _explain(error: Exception, name: str, revision: str | None) -> ConfigError:
    """The error for users. huggingface_hub's text is left out: it may contain the password of an endpoint."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RevisionNotFoundError

    url = urlsplit(constants.ENDPOINT)
    hub = url._replace(netloc=url.netloc.rpartition("@")[2], query="").geturl()
    elsewhere = f"or run `hf download {name}` on a machine with a network, and give the folder that it prints"
    status, cause = None, error
    while status is None and cause is not None:
        status = getattr(getattr(cause, "response", None), "status_code", None)
        cause = cause.__cause__  # type: ignore[assignment]

    if isinstance(error, HFValidationError):
        return not_found(name, where=f"{hub}/{name}")
    if constants.HF_HUB_OFFLINE:
        what = f"the model {name} is not complete in the cache {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE is set"
        do = f"unset HF_HUB_OFFLINE, {elsewhere}"
    elif isinstance(error, RevisionNotFoundError):
        what, do = f"the model {name} has no revision {revision!r}", "give a branch, tag or commit of the model"
    elif isinstance(error, GatedRepoError) or status == 403:
        what = f"no permission to read the model {name} (gated or private)"
        do = "accept its terms on its page, then set HF_TOKEN or run `hf auth login`"
    elif status in (401, 404):
        what = f"no folder {name} here, and no readable model of that name on the hub ({status})"
        do = "check the spelling; for a private model set HF_TOKEN or run `hf auth login`"
    elif status is not None:
        what, do = f"the hub answered {status} to the request for the model {name}", f"try again later, {elsewhere}"
    elif isinstance(error, OSError) and error.errno and not isinstance(error, ConnectionError):
        what = f"the model {name} cannot be written to the cache {constants.HF_HUB_CACHE}: {error.strerror}"
        do = "set HF_HOME to a writable disk with free space"
    else:
        what = f"there is no folder {name} here, and the hub cannot be reached ({type(error).__name__})"
        do = f"set HF_ENDPOINT to a mirror that this machine reaches, {elsewhere}"
    return ConfigError(what, where=f"{hub}/{name}", why="training starts from its weights and tokenizer", do=do)
