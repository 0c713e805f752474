"""Static analysis of a config file: the names that its statements assign and read, and their lines; and replacing
assigned values by overrides.
"""

import ast
from typing import Any


class Override(ast.NodeTransformer):
    """Replaces the values that the file assigns to top-level names."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values

    def visit_Assign(self, node: ast.Assign) -> ast.AST | list[ast.AST]:
        more: list[ast.AST] = []
        for name in [n for n in assigned(node) if n.id in self.values]:
            value = ast.copy_location(_literal(self.values[name.id]), node.value)
            if node.targets == [name]:
                node.value = value
            else:  # a, b = … or a = b = …
                more.append(ast.copy_location(ast.Assign([name], value), node))
        return [node, *more]

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST | list[ast.AST]:
        plain = isinstance(node.target, ast.Name) and node.value is not None
        return self.visit_Assign(_without_annotation(node)) if plain else node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        return node  # names inside are local

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        return node


def insert_calls(body: list[ast.stmt], names: set[str], apply: str) -> None:
    """Call the function `apply` after every statement that contains one of `names`, also inside of `if`, `for`, …"""
    for i, node in reversed([*enumerate(body)]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue  # names inside are local
        parts = [node, *getattr(node, "handlers", ()), *getattr(node, "cases", ())]
        for block in (getattr(part, field, []) for part in parts for field in ("body", "orelse", "finalbody")):
            insert_calls(block, names, apply)
        if any(isinstance(n, ast.Name) and n.id in names for n in ast.walk(node)):
            call = ast.Expr(ast.Call(ast.Name(apply, ast.Load()), [], []))
            body.insert(i + 1, ast.fix_missing_locations(ast.copy_location(call, node)))


def assigned(node: ast.AST) -> list[ast.Name]:
    """Names that a statement assigns to: `a = …`, `a: int = …`, `a, b = …`."""
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    inside = [e for t in targets for e in (t.elts if isinstance(t, ast.Tuple | ast.List) else [t])]
    return [name for name in inside if isinstance(name, ast.Name)]


def _without_annotation(node: ast.AnnAssign) -> ast.Assign:
    assert node.value is not None
    return ast.copy_location(ast.Assign([node.target], node.value), node)


def _literal(value: Any) -> ast.expr:
    """An expression with this value. `repr` does not work for inf and nan."""
    if isinstance(value, set) and value:
        return ast.Set([_literal(v) for v in value])
    if isinstance(value, list | tuple | set):
        items = [_literal(v) for v in value]
        return ast.Tuple(items, ast.Load()) if isinstance(value, tuple) else ast.List(items, ast.Load())
    if isinstance(value, dict):
        return ast.Dict([_literal(k) for k in value], [_literal(v) for v in value.values()])
    return ast.Constant(value)


def names_read(tree: ast.Module) -> set[str]:
    return {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}


def written_lines(tree: ast.Module) -> tuple[dict[str, int], dict[str, str]]:
    """Dotted path → line where it is written, and dotted path → top-level name that is its value."""
    lines: dict[str, int] = {}
    names: dict[str, str] = {}
    statements = [_without_annotation(n) if isinstance(n, ast.AnnAssign) and n.value else n for n in tree.body]
    known = {name.id for n in statements for name in assigned(n)}

    def add(path: str, node: ast.expr, line: int) -> None:
        lines[path] = line
        if isinstance(node, ast.IfExp) and isinstance(node.body, ast.Call | ast.Dict):
            node = node.body  # dict(type=…, folder=val_folder) if val_folder else None
        if isinstance(node, ast.Name) and node.id in known and node.id != path:
            names[path] = node.id
        elif isinstance(node, ast.Call):
            for k in node.keywords:
                if k.arg:
                    add(f"{path}.{k.arg}", k.value, k.value.lineno)
        elif isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and isinstance(key.value, str):
                    add(f"{path}.{key.value}", value, value.lineno)
        elif isinstance(node, ast.List | ast.Tuple):
            for i, item in enumerate(node.elts):
                add(f"{path}.{i}", item, item.lineno)

    for n in (s for s in statements if isinstance(s, ast.Assign)):
        for target in n.targets:
            if isinstance(target, ast.Tuple) and isinstance(n.value, ast.Tuple):
                pairs = list(zip(target.elts, n.value.elts, strict=False))
            else:
                pairs = [(target, n.value)]
            for part, value in pairs:
                if path := _path(part):
                    add(path, value, n.lineno)
    return lines, names


def _path(target: ast.expr) -> str:
    """`a["b"][0]` → "a.b.0"; empty for other targets."""
    if isinstance(target, ast.Name):
        return target.id
    if isinstance(target, ast.Subscript) and isinstance(target.slice, ast.Constant):
        owner, part = _path(target.value), target.slice.value
        return f"{owner}.{part}" if owner and isinstance(part, str | int) else ""
    return ""
