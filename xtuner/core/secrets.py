"""Mask tokens, passwords and keys as `***` in logs, dumps and messages.

A text is secret if it has a secret name (`hub_token`, not `pad_token`), the form of a known kind (`hf_…`,
`user:password@host`), or a known value: that of an environment variable with a secret name, or one passed to `learn`
from a config. Names and forms are heuristics: other secrets, and what a hook prints itself, are not masked.
A path is no name, and a sentence about one (`/data/secrets: no such file`) no value.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

MASK = "***"
SHORTEST = 8  # characters; a shorter value is masked under its name, but not searched for in other texts

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_ALONE = {
    "accesskey", "accesstoken", "apikey", "apitoken", "auth", "authorization", "authtoken", "bearer", "cookie",
    "cookies", "credential", "credentials", "dsn", "hftoken", "jwt", "passcode", "passphrase", "passwd", "passwds",
    "password", "passwords", "secret", "secretkey", "secrets", "webhook",
}  # fmt: skip
_KEYS = {"access", "account", "api", "auth", "encryption", "private", "secret", "service", "signing", "ssh", "storage"}
_PASS = {"admin", "db", "ftp", "http", "mail", "mysql", "pg", "postgres", "redis", "root", "smtp", "user"}
# Words before "token" that make it a token of text, as in `pad_token`; any other token is a credential (`hub_token`).
_OF_TEXT = {
    "additional", "assistant", "audio", "begin", "bos", "call", "cls", "context", "current", "each", "end", "eod",
    "eos", "eot", "extra", "fim", "first", "forced", "image", "img", "input", "last", "mask", "max", "min", "new",
    "next", "num", "output", "pad", "per", "placeholder", "plugin", "previous", "prompt", "response", "sep",
    "special", "start", "stop", "system", "target", "text", "think", "tool", "unk", "video", "vision", "word",
}  # fmt: skip
_NO_SECRETS = {"GOOGLE_APPLICATION_CREDENTIALS", "PWD", "OLDPWD"}  # paths
_PATH = re.compile(r"\.{0,2}[/\\]|~|[A-Za-z]:[/\\]|\w+://")  # how one begins
_FORMS_TEXT = (
    r"(?<![A-Za-z0-9])(?:hf_[A-Za-z0-9]{16,}|api_org_[A-Za-z0-9]{16,}|gh[opsru]_[A-Za-z0-9]{16,}|github_pat_\w{20,}"
    r"|glpat-[\w-]{16,}|xox[a-z]-[\w-]{10,}|AKIA[0-9A-Z]{12,}|ASIA[0-9A-Z]{12,}|LTAI[0-9A-Za-z]{12,}|AIza[\w-]{30,})",
    r"(?<![\w-])(?:sk-(?:[A-Za-z0-9]{16,}|(?=[\w-]*\d)[\w-]{16,})|eyJ[\w-]{8,}+\.[\w-]{8,}+\.[\w-]{8,})",
    r"(?<=[Bb]earer )[\w.~+/=-]{8,}|(?<=Basic )[A-Za-z0-9+/=]{12,}",
    r"(?<=PRIVATE KEY-----)[^-]+",
    r"(?<=://)[^\s/@:'\"]*:[^\s/@'\"]+(?=@)",  # user:password of a URL
    r"(?:(?<=\bs3://)|(?<=\boss://))[^\s/@:'\"]{0,200}:[^\s@'\"]{1,200}(?=@)",  # secret keys have slashes
    r"(?<=[?&]X-Amz-Signature=)\w{16,}|(?<=[?&]Signature=)[\w%+/=-]{16,}",  # of a signed URL
)
_FORMS = tuple(map(re.compile, _FORMS_TEXT))
# `name = value`, `"name": "value"`; the value is quoted, quoted with \", or ends at a delimiter
_NAME = re.compile(r"""(?<![\w.-])([A-Za-z_-][\w.-]*+)\\?["']?\s*((?<![=!<>])=(?!=)|:)\s*""")
_QUOTES = ('\\"', '"', "'")
# What follows the colon after a path, or after a name that folders have, and is no secret: a sentence, or another name
# in the next line
_FOLDERS = ("secrets", "credentials")
_SENTENCE = re.compile(r"(?:[A-Z]?[a-z]+(?:['-][a-z]+)*|\d[\d,.]*)[ \t]+[\w(*]")
_NEXT_NAME = re.compile(r"\w+:(?!\S)")
_VALUE = re.compile(r"""\\"[^"\n]*?\\"|"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*'|[^\s,;&"'()\[\]{}\\]+""")
_learned: set[str] = set()
_cached: tuple[dict[Any, Any], tuple[str, ...]] | None = None  # an environment, and what `_known` found in it


@lru_cache(4096)
def _kind(name: str) -> str:
    """ "secret", "token" (numbers and `<pad>` are not secret there), or "" if not secret. Decided by complete words."""
    if name in _NO_SECRETS or _PATH.match(name):
        return ""
    words = [w.lower() for w in _WORD.findall(name.rpartition(".")[2])]
    while words and (words[-1].isdigit() or words[-1] in ("header", "headers", "value")):
        words.pop()
    if not words:
        return ""
    last, before = words[-1], words[-2] if words[1:] else ""
    if last == "token":
        return "" if before in _OF_TEXT else "token"
    secret = (
        last in _ALONE
        or (last in ("key", "keys") and before in _KEYS)
        or (last == "pass" and before in _PASS)
        or (last == "pwd" and before not in ("", "old"))
        or words[-3:] == ["access", "key", "id"]
        or words[-2:] in (["connection", "string"], ["webhook", "url"])
    )
    return "secret" if secret else ""


def is_secret_name(name: str) -> bool:
    """Whether values of this name (the last part of a dotted one) are masked."""
    return bool(_kind(name))


def mask(value: Any, key: str = "") -> Any:
    """`value` with every secret replaced: all texts below secret names, and what `mask_text` finds in other texts.

    Dicts, lists and tuples are copied; other objects are returned unchanged. Masking twice has no further effect.
    """
    return _mask(value, _kind(key), _known())


def _mask(value: Any, kind: str, known: tuple[str, ...]) -> Any:
    if isinstance(value, Mapping):
        return {_text(k, known): v if k == "type" else _mask(v, _kind(str(k)) or kind, known) for k, v in value.items()}
    if isinstance(value, tuple):
        return tuple(_mask(v, kind, known) for v in value)
    if isinstance(value, list | set | frozenset):
        return [_mask(v, kind, known) for v in value]
    if kind and isinstance(value, str | bytes) and not _is_open(value, kind):
        return MASK if isinstance(value, str) else MASK.encode()
    if kind == "secret" and isinstance(value, int | float) and not isinstance(value, bool):
        return MASK
    return _text(value, known)


def _text(value: Any, known: tuple[str, ...]) -> Any:
    return _mask_text(value, known) if isinstance(value, str) else value


def _is_open(value: str | bytes, kind: str) -> bool:
    """Not secret in spite of its name: empty, a switch, or a token of text (`<pad>`, `[SEP]`)."""
    text = value if isinstance(value, str) else value.decode("latin-1")
    switch = text.lower() in ("", "true", "false", "none", "null", MASK)
    return switch or (kind == "token" and bool(re.fullmatch(r"<[^<>]*>|\[[A-Z_]+\]|\d+", text)))


def mask_text(text: str) -> str:
    """`text` with known secrets, texts in the form of a secret, and values of secret names replaced."""
    return _mask_text(text, _known())


def _mask_text(text: str, known: tuple[str, ...]) -> str:
    text = _mask_forms(text, known)
    parts, done = [], 0
    for name in _NAME.finditer(text):
        kind = _kind(name[1])
        value = _VALUE.match(text, name.end()) if kind and name.end() >= done else None
        if value is None or _is_about_a_path(name):
            continue
        quote = next((q for q in _QUOTES if value[0].startswith(q)), "")
        annotation = kind == "token" and name[2] == ":" and not quote  # `token: str`
        if not annotation and not _is_open(value[0][len(quote) : len(value[0]) - len(quote)], kind):
            parts += [text[done : name.end()], quote, MASK, quote]
            done = value.end()
    return "".join((*parts, text[done:]))


def _is_about_a_path(name: re.Match[str]) -> bool:
    """Whether the name is that of a file or folder, and what follows its colon says something of it."""
    before = name.string[name.start() - 1 : name.start()]
    is_path = name[1].lower().endswith(_FOLDERS) or before in ("/", "\\")
    follows = _NEXT_NAME if "\n" in name[0] else _SENTENCE
    return name[2] == ":" and is_path and bool(follows.match(name.string, name.end()))


def _mask_forms(text: str, known: tuple[str, ...]) -> str:
    for secret in known:
        text = text.replace(secret, MASK)
    for form in _FORMS:
        text = form.sub(_keep_user, text)
    return text


def _keep_user(found: re.Match[str]) -> str:
    user, colon, _ = found[0].partition(":")
    return f"{user}{colon}{MASK}" if colon else MASK


def learn(value: Any, key: str = "") -> None:
    """Remember texts below secret names, so that they are masked wherever they occur later."""
    global _cached
    _learned.update(s for s in _secrets_in(value, _kind(key)) if len(s) >= SHORTEST)
    _cached = None


def _secrets_in(value: Any, kind: str) -> Iterator[str]:
    if isinstance(value, Mapping):
        for k, v in value.items():
            if k != "type":
                yield from _secrets_in(v, _kind(str(k)) or kind)
    elif isinstance(value, list | tuple | set | frozenset):
        for v in value:
            yield from _secrets_in(v, kind)
    elif kind and isinstance(value, str) and not _is_open(value, kind):
        yield value


def _known() -> tuple[str, ...]:
    """Values to search for, the longest first.

    Clusters set thousands of variables, and every log line is masked, so the result is cached until a variable changes.
    Comparing two dicts of the same objects takes 20 µs at 3,000 variables.
    """
    global _cached
    now = getattr(os.environ, "_data", os.environ)  # the bytes that CPython keeps: no decoding
    cached = _cached
    if cached is not None and now == cached[0]:
        return cached[1]
    environment = dict(now)
    values = {v for k, v in os.environ.items() if len(v) >= SHORTEST and (kind := _kind(k)) and not _is_open(v, kind)}
    values |= _learned
    found = tuple(sorted(values | {repr(v)[1:-1] for v in values}, key=len, reverse=True))
    _cached = environment, found
    return found


def mask_command(words: Sequence[str]) -> list[str]:
    """Mask a command line: values of `name=value`, `--name=value` and `--name value`."""
    known, masked, kind = _known(), [], ""
    for word in words:
        name, equals, value = word.partition("=")
        if kind and not word.startswith("-"):
            masked.append(_mask(word, kind, known))
        elif equals and _kind(name.lstrip("-")):
            masked.append(f"{name}={_mask(value, _kind(name.lstrip('-')), known)}")
        else:
            masked.append(_mask_text(word, known))
        kind = _kind(word.lstrip("-")) if word.startswith("-") and not equals else ""
    return masked
