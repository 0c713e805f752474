"""Renders all settings as documentation pages and for `xtuner list-cfg --settings`.

python -m xtuner.tools.settings_pages docs        writes docs/en/settings.md and docs/zh_cn/settings.md
"""

import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xtuner.compat.settings import SCHEMA
from xtuner.config.schema import ABSENT, REQUIRED, Setting
from xtuner.core.files import atomic_file

_EN = {
    "title": "All settings",
    "intro": "By dotted path in a config, as `--cfg-options` takes them; a shipped config assigns many at its top.\n"
    "Written by `make settings` from `xtuner/config/settings.py`.",
    "head": "setting | type | default | what it is | another value, at a resume",
    "top": "Top level",
    "old": "Accepted for older tools",
    "old head": "setting | accepted values",
}
_ZH = {
    "title": "全部设置",
    "intro": "按配置里的点分路径排列，`--cfg-options` 也用这种写法；自带配置把其中许多放在文件开头赋值。\n"
    "本页由 `make settings` 从 `xtuner/config/settings.py` 生成。",
    "head": "设置 | 类型 | 默认值 | 含义 | 恢复训练时改动",
    "top": "顶层",
    "old": "为旧工具而接受",
    "old head": "设置 | 接受的值",
    "needed": "必填",
    "all, without effect": "全部，不起作用",
    "harmless": "无影响",
    "changes the result": "改变结果",
    "impossible": "无法恢复",
    "not compared": "不比较",
}
LANGUAGES = {"en": _EN, "zh_cn": _ZH}


def render_page(language: str) -> str:
    """The page in "en" or "zh_cn"."""
    words = LANGUAGES[language]
    sections: dict[str, list[str]] = {}
    for s in SCHEMA.settings:
        root = s.key.partition(".")[0]
        if s.is_legacy and (s.no_effect or s.allowed):
            taken = _code(*s.allowed.values) if s.allowed else words.get("all, without effect", "all, without effect")
            sections.setdefault(words["old"], []).append(f"`{s.key}` | {taken}")
        elif not s.is_legacy:
            title = root if any(SCHEMA.inside(root)) else words["top"]
            sections.setdefault(title, []).append(_row(s, words, s.help if words is _EN else s.zh))
    parts = [f"# {words['title']}\n\n{words['intro']}\n"]
    for title, rows in sections.items():
        head = words["old head" if title == words["old"] else "head"]
        lines = [head, " | ".join("---" for _ in head.split("|")), *rows]
        parts.append(f"## {title}\n" + "".join(f"| {line} |\n" for line in lines))
    return "\n".join(parts)


def list_settings(word: str = "") -> Iterator[str]:
    """The entry of each setting with `word` in its path or description."""
    for s in SCHEMA.settings:
        if not s.is_legacy and word.lower() in f"{_title(s)} {s.help}".lower():
            given = "needed" if s.default is REQUIRED else f"default {s.default!r}"
            yield f"{_title(s)}: {_type(s)}, {given}\n    {s.help}; at a resume: {_meaning(s)}"


def _title(s: Setting) -> str:
    return f"{s.key} ({s.owner})" if s.owner else s.key


def _type(s: Setting) -> str:
    """`int | None, ≥ 1`."""
    return ", ".join([_annotation(s.kind), *(rule.range for rule in s.rules if rule.range)])


def _annotation(kind: Any) -> str:
    inner = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal:
        return " | ".join(f'"{value}"' for value in inner)
    if inner and typing.get_origin(kind) is not list:
        return " | ".join(map(_annotation, inner))
    return {Any: "any", type(None): "None"}.get(kind) or (str(kind) if inner else kind.__name__)


def _meaning(s: Setting) -> str:
    return SCHEMA.resume(s.key, ABSENT, ABSENT)


def _row(s: Setting, words: dict[str, str], text: str) -> str:
    default = words.get("needed", "needed") if s.default is REQUIRED else _code(s.default)
    path, _, of = _title(s).partition(" ")
    cells = f"`{path}` {of}".strip(), _code_text(_type(s)), default, text, words.get(_meaning(s), _meaning(s))
    return " | ".join(cells)


def _code(*values: Any) -> str:
    return ", ".join(_code_text(repr(value)) for value in values)


def _code_text(text: str) -> str:
    return f"`{text.replace('|', chr(92) + '|')}`"


if __name__ == "__main__":
    for name in LANGUAGES:
        with atomic_file(Path(sys.argv[1]) / name / "settings.md") as f:
            f.write(render_page(name))
