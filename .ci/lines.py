#!/usr/bin/env python3
"""How many lines of a method's file are not its paper's. Fails where a file has more than 25, or the mean is above 18.

Counted are lines of code: no blank lines, comments or docstrings. Of these, the paper's own are: the decorator with the
card, the `hyper(...)` fields, module-level functions, classes next to the method (learners, networks), module-level
constants, and the bodies of the hooks below. Everything else is fixed: imports, the class line, class attributes, the
signatures of methods, and the bodies of methods that are not hooks. All lines stand next to them, since a hook that
carries plumbing is cheating.

    lines.py [FOLDER]        a source tree's methods; by default src/clipadapt/methods
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

MOST, MEAN = 25, 18
HOOKS = {
    "_fit", "_logits", "_objective", "_update", "_outputs", "_references", "_average", "_after_step", "_schedule",
    "_steps", "_optimizer", "_extras", "_prepare", "_scores", "_scorer", "_train", "_batches", "_adapted", "_answer",
    "_condition", "_maps", "_boxes", "_text", "_image", "_name", "_learn", "_reclassify", "_measure", "_changed_images",
    "__post_init__",
}  # fmt: skip
NOT_FAMILIES = {"tasks", "kinds"}


def code_lines(node: ast.AST, text: list[str]) -> set[int]:
    """The numbers of a node's lines that are code."""
    strings = {
        number
        for inner in ast.walk(node)
        if isinstance(inner, ast.Expr) and isinstance(inner.value, ast.Constant) and isinstance(inner.value.value, str)
        for number in range(inner.lineno, inner.end_lineno + 1)
    }
    first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
    lines = set(range(first, node.end_lineno + 1)) - strings
    return {n for n in lines if text[n - 1].strip() and not text[n - 1].strip().startswith("#")}


def is_method(node: ast.AST) -> bool:
    """Whether a class is a method's: it has the decorator of one."""
    names = [ast.unparse(d).split("(")[0] for d in getattr(node, "decorator_list", [])]
    return isinstance(node, ast.ClassDef) and bool({"method", "register"} & set(names))


def count(file: Path) -> tuple[int, int] | None:
    """(fixed lines, all lines) of a method's file; None for a file without a method."""
    source = file.read_text(encoding="utf-8")
    text, tree = source.splitlines(), ast.parse(source)
    if not any(is_method(node) for node in tree.body):
        return None
    fixed = 0
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom | ast.If):
            fixed += len(code_lines(node, text))
        elif is_method(node):
            own = code_lines(node, text)
            for decorator in node.decorator_list:
                if ast.unparse(decorator).startswith("method("):
                    own -= code_lines(decorator, text)
            for part in node.body:
                if isinstance(part, ast.AnnAssign) and part.value is not None and "hyper(" in ast.unparse(part.value):
                    own -= code_lines(part, text)
                elif isinstance(part, ast.FunctionDef) and part.name in HOOKS:
                    for statement in part.body:
                        own -= code_lines(statement, text)
            fixed += len(own)
    return fixed, len(text)


def main(folder: str = "src/clipadapt/methods") -> int:
    counts = {}
    for file in sorted(Path(folder).glob("*/*.py")):
        if file.parent.name not in NOT_FAMILIES and (found := count(file)) is not None:
            counts[file.stem.replace("_", "-")] = found
    mean = sum(fixed for fixed, _ in counts.values()) / len(counts)
    for name, (fixed, total) in counts.items():
        print(f"{name:26} {fixed:4} fixed {total:5} lines{'   too many' if fixed > MOST else ''}")
    print(f"{len(counts)} methods: {mean:.1f} fixed lines on average, {sum(t for _, t in counts.values())} lines")
    return int(mean > MEAN or any(fixed > MOST for fixed, _ in counts.values()))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
