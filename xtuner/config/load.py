"""Load a config: a Python file that is run. An override of a top-level name replaces its assignment before the run; one
with dots is applied when the file has assigned the value that it changes. Derived values follow both.

    --cfg-options max_length=4096 train_dataloader.num_workers=2 betas="[0.9, 0.95]"
"""

import ast
import contextlib
import copy
import io
import math
import re
import tokenize
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xtuner.config import statements
from xtuner.config.config import Config, Replacement
from xtuner.config.redact import secret_literals
from xtuner.config.schema import Schema
from xtuner.config.settings import SCHEMA
from xtuner.core import secrets
from xtuner.core.errors import ConfigError, did_you_mean, from_system_exit
from xtuner.core.foreign_inputs import short_repr

MAX_DEPTH = 50  # of nested brackets or signs in a value of --cfg-options
_NOT_FINITE = {"nan": math.nan, **{f"{sign}inf": float(f"{sign}inf") for sign in ("", "+", "-")}}
SHIPPED = Path(__file__).parent.parent / "configs"
# Names of shipped configs in older tools → ours for the same data and model
ALIASES = {
    "internlm2_7b_full_intern_repo_dataset_template": "internlm2_7b_w_tokenized_dataset",
    "internlm2_7b_w_internevo_dataset": "internlm2_7b_w_tokenized_dataset",
}


def shipped_names() -> list[str]:
    return sorted(p.stem for p in SHIPPED.glob("*.py") if p.stem != "__init__")


def shipped_file(name: str) -> Path | None:
    """The file of a shipped config, by its name or an older name."""
    name = ALIASES.get(name, name)
    return SHIPPED / f"{name}.py" if name in shipped_names() else None


def find(name_or_path: str) -> Path:
    """The path of a config file or of a shipped config. Raises: ConfigError with the nearest name."""
    with contextlib.suppress(OSError, RuntimeError):  # a name that is too long, an unknown ~user
        path = Path(name_or_path).expanduser()
        if path.is_file():
            return path
    if shipped := shipped_file(name_or_path):
        return shipped
    known = [*shipped_names(), *ALIASES]
    raise ConfigError(
        f"no config file and no shipped config {name_or_path!r}." + did_you_mean(name_or_path, known),
        do="`xtuner list-cfg` lists the shipped ones, `xtuner copy-cfg NAME .` copies one here",
    )


@dataclass(frozen=True)
class Dialect:
    """How configs of other tools are translated (see compat/).

    Args:
        schema: all accepted settings.
        imports: translates the imports of the file.
        values: translates the values that it assigns.
        overridden: called after overrides with dots were applied.
    """

    schema: Schema = SCHEMA
    imports: Callable[[ast.Module, str], tuple[ast.Module, list[Replacement]]] = lambda tree, path: (tree, [])
    values: Callable[[Config], None] = lambda config: None
    overridden: Callable[[Config], None] = lambda config: None


SHARERS, AUTO = "sequence_parallel_size", "auto"


def load(name_or_path: str, options: list[str] | None = None, dialect: Dialect = Dialect()) -> Config:
    """Run a config file with overrides.

    Args:
        options: `key=value` each, as given to --cfg-options.
        dialect: of the file; by default that of xtuner.

    Raises: ConfigError for a file that cannot be run, and for overrides of paths that do not exist.
    """
    path = find(name_or_path)
    source = _read(path)
    try:
        return _load(path, source, options or [], dialect)
    except SyntaxError as e:
        raise ConfigError(f"the config is not Python: {e.msg}", where=f"{path}:{e.lineno or 1}") from None
    except ValueError as e:  # of ast.parse: zero bytes
        raise ConfigError(f"the config is not Python: {e}", where=str(path)) from None
    except (RecursionError, MemoryError):  # of ast.parse, or of walking the tree
        raise ConfigError("the config has an expression that is nested too deeply", where=str(path)) from None


def _read(path: Path) -> str:
    """The text of a config, in the encoding that its first lines declare, by default UTF-8."""
    data = b""
    try:
        data = path.read_bytes()
        encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
        return data.decode(encoding)
    except OSError as e:
        raise ConfigError(f"the config cannot be read: {e.strerror}", where=str(path)) from None
    except (SyntaxError, UnicodeError, LookupError) as e:
        declared = re.search(rb"^#.*?coding[:=][ \t]*([-\w.]+)", b"\n".join(data.splitlines()[:2]), re.MULTILINE)
        name = declared[1].decode() if declared else "UTF-8"
        at = _first_wrong_byte(data, name)
        line = None if at is None else data.count(b"\n", 0, at) + 1
        raise ConfigError(
            f"the config is not {name} text: " + (str(e) if at is None else f"byte 0x{data[at]:02x}"),
            where=f"{path}:{line or 1}",
            do="save it as UTF-8, or declare its encoding in the first line: # -*- coding: gbk -*-",
        ) from None


def _first_wrong_byte(data: bytes, encoding: str) -> int | None:
    try:
        data.decode(encoding)
    except UnicodeDecodeError as e:
        return e.start
    except (LookupError, UnicodeError):
        pass
    return None


def _load(path: Path, source: str, options: list[str], dialect: Dialect) -> Config:
    tree = ast.parse(source, str(path))
    read, (lines, names) = statements.names_read(tree), statements.written_lines(tree)
    tree, imported = dialect.imports(tree, str(path))
    overrides = dict(parse_option(o) for o in options)
    secrets.learn(overrides)
    for node, name in secret_literals(tree):
        secrets.learn(getattr(node, "value", None), name)
    inner = sorted((key for key in overrides if "." in key), key=lambda key: key.count("."))  # outer values first
    tree = statements.Override({k: v for k, v in overrides.items() if k not in inner}).visit(tree)
    assigned = _run(ast.fix_missing_locations(tree), path, overrides, inner)
    if AUTO in (assigned.get(SHARERS), overrides.get(SHARERS)):  # other settings may be multiplied by it
        config = _load(path, source, [*options, f"{SHARERS}=1"], dialect)
        config.with_sharers = lambda number: _load(path, source, [*options, f"{SHARERS}={number}"], dialect)
        return config
    public = {name: value for name, value in assigned.items() if not name.startswith("_")}
    config = Config(path, source, public, lines, names=names, replaced=imported, schema=dialect.schema)
    values = config.values
    dialect.values(config)
    values.update((key, value) for key, value in overrides.items() if key not in inner and key not in assigned)
    for key in inner:
        _set(assigned if key.startswith("_") else values, key, overrides[key])
    dialect.overridden(config)
    secrets.learn(values)  # including computed ones
    config.unread = [key for key in overrides if (name := key.partition(".")[0]) not in read or name not in assigned]
    config.unused = [n for n in values if n not in read and n not in (key.partition(".")[0] for key in config.unread)]
    return config


def parse_option(option: str) -> tuple[str, Any]:
    """`a.b=v` → ("a.b", value). Lists: `k=[a, b]` or `k=a,b`; nested: `k=[(a, b), (c, d)]`."""
    key, equals, text = option.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"{short_repr(option)} is not of the form key=value", where="--cfg-options")
    try:
        return key.strip(), parse_value(text.strip())
    except (TypeError, RecursionError, MemoryError) as e:
        how = "it is nested too deeply" if not isinstance(e, TypeError) else str(e)
        raise ConfigError(
            f"{short_repr(text.strip())} is not a value: {how}", where=f"--cfg-options {short_repr(key.strip())[1:-1]}"
        ) from None


def parse_value(text: str) -> Any:
    """A Python literal, else true/false/none/nan/inf, else a comma-separated list, else the text itself.

    Raises: TypeError, RecursionError, MemoryError for an invalid literal.
    """
    if max(map(text.count, "([{-+~")) > MAX_DEPTH and _depth(text) > MAX_DEPTH:
        raise RecursionError
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        pass
    words = {"true": True, "false": False, "none": None, "null": None, **_NOT_FINITE}
    if text.lower() in words:
        return words[text.lower()]
    if re.fullmatch(r"\[.*\]|\(.*\)", text, re.DOTALL):
        items = [parse_value(part) for part in _split(text[1:-1])]
        return tuple(items) if text.startswith("(") else items
    parts = _split(text)
    return [parse_value(p) for p in parts] if len(parts) > 1 else text


def _depth(text: str) -> int:
    """Depth of nested brackets and signs; Python's parser fails in many ways if it is too large."""
    deepest = depth = signs = 0
    for c in text:
        depth += (c in "([{") - (c in ")]}")
        signs = signs + 1 if c in "+-~" else signs if c == " " else 0
        deepest = max(deepest, depth, signs)
    return deepest


def _split(text: str) -> list[str]:
    """Split at commas outside brackets."""
    parts, depth = [""], 0
    for c in text:
        depth += (c in "([{") - (c in ")]}")
        if c == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += c
    return [p.strip() for p in parts if p.strip()]


def _run(tree: ast.Module, path: Path, overrides: dict[str, Any], inner: list[str]) -> dict[str, Any]:
    """The values of all top-level names that the file assigns.

    Args:
        inner: the keys of `overrides` that have dots. They are applied after each statement that may have created or
            copied the value, so that no later line sees another one.
    """
    assigned = {name.id for node in ast.walk(tree) for name in statements.assigned(node)}
    present = [key for key in inner if key.partition(".")[0] in assigned]

    def apply() -> None:
        for key in present:
            with contextlib.suppress(ConfigError):  # not created yet
                _set(namespace, key, overrides[key])

    namespace: dict[str, Any] = {"__name__": "xtuner_config", "__file__": str(path), "_apply_overrides": apply}
    statements.insert_calls(tree.body, {key.partition(".")[0] for key in present}, apply="_apply_overrides")
    try:
        exec(compile(tree, str(path), "exec"), namespace)
    except (ConfigError, KeyboardInterrupt):
        raise
    except SystemExit as e:
        raise from_system_exit(e, f"{path}:{_line(e, path)}", "the config") from None
    except BaseException as e:
        line = _line(e, path)
        raise ConfigError(
            f"the config cannot be run: {type(e).__name__}: {_words(e)}",
            where=f"{path}:{line}",
            why=_values_at(tree, line, namespace),
            do=_remedy(e, [key for n in _names_at(tree, line) for key in overrides if n == key.partition(".")[0]]),
        ) from None
    return {name: namespace[name] for name in namespace if name in assigned}


def _line(error: BaseException, path: Path) -> int:
    """The line of the config at which it failed, directly or in a call."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return error.lineno or 1
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
    return (frames[-1].lineno if frames else None) or 1


def _words(error: BaseException) -> str:
    """The first line of an error's message."""
    try:
        lines = str(error).strip().splitlines()
    except Exception:  # raised by its __str__
        return ""
    return lines[0][:500] if lines else ""


def _remedy(error: BaseException, overridden: list[str]) -> str:
    if overridden:
        return f"check the values of --cfg-options: {', '.join(overridden)}"
    if isinstance(error, ImportError):
        return "the config may be for another version: `xtuner copy-cfg` copies a current one"
    return "correct the line; `xtuner copy-cfg` copies a config to compare with"


def _names_at(tree: ast.Module, line: int) -> list[str]:
    names = [n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and n.lineno == line]
    return list(dict.fromkeys(names))


def _values_at(tree: ast.Module, line: int, namespace: dict[str, Any]) -> str:
    """`with lr = 'abc' and max_epochs = 1`: the variables of the line that failed."""
    names = [n for n in _names_at(tree, line) if n in namespace]
    plain = [n for n in names if isinstance(namespace[n], str | int | float | list | tuple | None)]
    return "with " + " and ".join(f"{n} = {short_repr(namespace[n])}" for n in plain) if plain else ""


def _set(values: dict[str, Any], key: str, new: Any) -> None:
    """Set the value at a dotted path, of which all but the last part must exist."""

    def changed(at: Any, owner: str, parts: list[str]) -> Any:
        """`at` with the new value; a tuple is built anew."""
        part, *rest = parts
        if not isinstance(at, dict | list) and type(at) is not tuple:
            raise ConfigError(f"{owner!r} is {short_repr(at)}, which has no parts", where=f"--cfg-options {key}")
        names: dict[str, Any] = {str(k): k for k in (at if isinstance(at, dict) else range(len(at)))}
        if part not in names and rest:
            hint = did_you_mean(part, [*names])
            raise ConfigError(f"no {part!r} in the config.{hint}", where=f"--cfg-options {key}")
        if part not in names and not isinstance(at, dict):
            raise ConfigError(f"no entry {part!r} in a list of {len(at)}", where=f"--cfg-options {key}")
        name = names.get(part, part)
        value = changed(at[name], part, rest) if rest else copy.deepcopy(new)
        if isinstance(at, tuple):
            return (*at[:name], value, *at[name + 1 :])
        at[name] = value
        return at

    changed(values, "", key.split("."))
