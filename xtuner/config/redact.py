"""Find secrets in the source of a config, and mask them in the copy that is kept with a run.

The user's file is not changed. In the copy only literals and comments are replaced.
"""

import ast
import io
import re
import tokenize
from collections.abc import Iterator

from xtuner.core.secrets import MASK, is_secret_name, mask, mask_text

_JOIN = ("join", "joinpath", "Path", "PurePath")  # of a folder's name, which may be "secrets", and a file's
_BOM = b"\xef\xbb\xbf"


def secret_literals(tree: ast.AST) -> Iterator[tuple[ast.expr, str]]:
    """Literals that are assigned to secret names anywhere in a program, each with its name."""
    for node in ast.walk(tree):
        for name, value in _given(node):
            if is_secret_name(name):
                yield from ((text, name) for text in _texts(value, name))


def without_secrets(source: bytes) -> bytes:
    """The source with `***` for each secret, in its encoding; unchanged if it has none.

    Raises: SyntaxError.
    """
    encoding, _ = tokenize.detect_encoding(io.BytesIO(source).readline)
    if encoding != "utf-8-sig":
        return _masked(source.decode(encoding)).encode(encoding)
    return _BOM + _masked(source.decode(encoding)).encode()


def _masked(text: str) -> str:
    tree = ast.parse(text)
    source = text.encode()  # column offsets of nodes count bytes of UTF-8
    begins = [0]
    for line in source.splitlines(keepends=True):
        begins.append(begins[-1] + len(line))
    spans: dict[tuple[int, int], bytes] = {}

    def span(node: ast.expr) -> tuple[int, int]:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        return begins[node.lineno - 1] + node.col_offset, begins[node.end_lineno - 1] + node.end_col_offset

    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str | bytes)):
            begin, end = span(node)
            old = source[begin:end]
            if (new := _open(node, old)) != old:
                spans[begin, end] = new
    for node, _ in secret_literals(tree):
        spans[span(node)] = repr(MASK.encode() if _is_bytes(node) else MASK).encode()
    spans |= _comments(text, begins)
    done, parts = 0, []
    for (begin, end), new in sorted(spans.items(), key=lambda item: (item[0][0], -item[0][1])):
        if begin >= done:  # else it is inside an f-string that is already replaced
            parts += [source[done:begin], new]
            done = end
    return b"".join((*parts, source[done:])).decode()


def _given(node: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    """(name, value) pairs of a node: assignments, arguments, defaults, dict entries, pairs, comparisons."""
    if isinstance(node, ast.Assign):
        for target in node.targets:
            yield from _assigned(target, node.value)
    elif isinstance(node, ast.AnnAssign | ast.AugAssign | ast.NamedExpr) and node.value:
        yield from _assigned(node.target, node.value)
    elif isinstance(node, ast.keyword) and node.arg:
        yield node.arg, node.value
    elif isinstance(node, ast.Dict):
        yield from ((_text(k), v) for k, v in zip(node.keys, node.values, strict=True) if k)
    elif isinstance(node, ast.arguments):
        positional = [*node.posonlyargs, *node.args]
        defaults = zip(positional[len(positional) - len(node.defaults) :], node.defaults, strict=True)
        yield from ((a.arg, d) for a, d in [*defaults, *zip(node.kwonlyargs, node.kw_defaults, strict=True)] if d)
    elif isinstance(node, ast.Call) and node.args[1:] and _name(node.func) not in _JOIN:
        # os.environ.setdefault("HF_TOKEN", "…")
        yield from ((_text(node.args[0]), value) for value in node.args[1:])
    elif isinstance(node, ast.Tuple | ast.List) and len(node.elts) == 2:
        yield _text(node.elts[0]), node.elts[1]
    elif isinstance(node, ast.Compare):
        yield from ((_name(node.left), value) for value in node.comparators)


def _assigned(target: ast.expr, value: ast.expr) -> Iterator[tuple[str, ast.expr]]:
    if isinstance(target, ast.Tuple | ast.List):
        several = isinstance(value, ast.Tuple | ast.List) and len(value.elts) == len(target.elts)
        values = value.elts if several and isinstance(value, ast.Tuple | ast.List) else [value] * len(target.elts)
        for t, v in zip(target.elts, values, strict=True):
            yield from _assigned(t, v)
    else:
        yield _name(target), value


def _name(node: ast.expr) -> str:
    """The name "a" for `a`, `x.a` and `x["a"]`."""
    if isinstance(node, ast.Subscript):
        return _text(node.slice)
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _text(node: ast.expr) -> str:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def _texts(node: ast.expr, name: str) -> Iterator[ast.expr]:
    """Literals in a secret value, without the names in `os.environ["HF_TOKEN"]` and `dict(type="…")`."""
    if isinstance(node, ast.Constant):
        text = node.value
        if isinstance(text, str | bytes) and text.strip() and not _is_variable(text) and mask(text, name) != text:
            yield node
        return
    if isinstance(node, ast.JoinedStr):
        if any(_text(part).strip() for part in node.values):
            yield node
        return
    for field, part in ast.iter_fields(node):
        if field not in ("slice", "keys", "test"):
            for inner in part if isinstance(part, list) else [part]:
                if isinstance(inner, ast.keyword) and inner.arg != "type":
                    yield from _texts(inner.value, name)
                elif isinstance(inner, ast.expr):
                    yield from _texts(inner, name)


def _is_variable(text: str | bytes) -> bool:
    return isinstance(text, str) and bool(re.fullmatch(r"[A-Z][A-Z0-9_]+", text)) and is_secret_name(text)


def _is_bytes(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, bytes)


def _open(node: ast.expr, written: bytes) -> bytes:
    """The source of a text with an open name, with known secrets and forms of secrets replaced."""
    if isinstance(node, ast.JoinedStr):
        new = mask_text(written.decode())
        try:
            ast.parse(new, mode="eval")
        except SyntaxError:
            new = repr(MASK)
        return new.encode()
    assert isinstance(node, ast.Constant)
    value = node.value
    assert isinstance(value, str | bytes)
    hidden = mask_text(value) if isinstance(value, str) else mask_text(value.decode("latin-1")).encode("latin-1")
    if hidden == value:
        return written
    as_written = mask_text(written.decode())
    try:
        if ast.literal_eval(as_written) == hidden:
            return as_written.encode()
    except (SyntaxError, ValueError):
        pass
    return repr(hidden).encode()


def _comments(source: str, begins: list[int]) -> dict[tuple[int, int], bytes]:
    found = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and (new := mask_text(token.string)) != token.string:
            begin = begins[token.start[0] - 1] + len(token.line[: token.start[1]].encode())
            found[begin, begin + len(token.string.encode())] = new.encode()
    return found
