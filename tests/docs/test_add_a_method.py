"""The page "Add a method in 25 lines" is true: its code, taken from the page, is a working method."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "add-a-method.md"

USE = """
import clipadapt, importlib.util, sys
spec = importlib.util.spec_from_file_location("nearest_mean", sys.argv[1])
spec.loader.exec_module(importlib.util.module_from_spec(spec))

from clipadapt.evaluation.selection import select
from tests.images import colours
from tests.tiny import tiny_clip

assert "nearest-mean" in clipadapt.list_methods("nearest*")
backbone, support, queries = clipadapt.load_backbone(tiny_clip()), colours(4, seed=1), colours(3, seed=2)
model = clipadapt.create("nearest-mean", ratio=1.0).fit(backbone, support)
assert model.score(queries) > clipadapt.create("zero-shot").fit(backbone, support).score(queries)
assert clipadapt.load(model.save(sys.argv[2]), backbone).score(queries) == model.score(queries)
assert "nearest-mean" in {t.key for t in select(backbone, support, keys=["nearest-mean"], folds=2).trials}
"""


def test_the_code_on_the_page_is_a_method(tmp_path):
    code = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.S).group(1)
    assert len([line for line in code.splitlines() if line.strip()]) <= 40  # the docstring of ten lines included
    file = tmp_path / "nearest_mean.py"
    file.write_text(code)
    subprocess.run(
        [sys.executable, "-c", USE, str(file), str(tmp_path / "model")], check=True, cwd=PAGE.parents[1], timeout=120
    )
