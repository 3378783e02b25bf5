"""The page "Add a method in 25 lines" is true: its code, taken from the page, works."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "add-a-method.md"

USE = """
import sys
from types import SimpleNamespace
import numpy as np, pytest
import clipadapt
from clipadapt.data import Split
from clipadapt.errors import DataError
from clipadapt.methods import card, method
from tests.images import colours
from tests.tiny import tiny_clip
sys.path.insert(0, sys.argv[1])

backbone, support, queries = clipadapt.load_backbone(tiny_clip()), colours(4, seed=1), colours(3, seed=2)

import nearest_mean
from clipadapt.evaluation.selection import select
assert "nearest-mean" in clipadapt.list_methods("nearest*")
model = clipadapt.create("nearest-mean", ratio=1.0).fit(backbone, support)
assert model.score(queries) > clipadapt.create("zero-shot").fit(backbone, support).score(queries)
assert clipadapt.load(model.save(sys.argv[2]), backbone).score(queries) == model.score(queries)
assert "nearest-mean" in {t.key for t in select(backbone, support, keys=["nearest-mean"], folds=2).trials}

card.TASKS["Counter"] = "counter"
from counting import Counter
@method("bright", title="Bright pixels", family="tests", signal="none")
class Bright(Counter):
    def _counts(self, image):
        return [int(np.asarray(image).max() >= level) for level in (0, 256)]
model = clipadapt.create("bright").fit(backbone, class_names=["any", "none"])
assert model.task == model.card.task == "counter"
assert model.predict(queries).tolist() == [[1, 0]] * 12
assert model.score(SimpleNamespace(items=queries.items, targets=[[1, 1]] * 12)) == 0.5
with pytest.raises(clipadapt.ClipadaptError, match="class_names"):
    clipadapt.create("bright").fit(backbone)

import blurred
split, plain = Split(support, support, queries), clipadapt.create("nearest-mean")
sharp = blurred.run(plain, backbone, split, 1, shots=2, radius=0.0)
assert sharp.figures["accuracy"] == sharp.model.score(queries)
soft = blurred.run(plain, backbone, split, 1, shots=2)
assert soft.figures.keys() == sharp.figures.keys() and soft.figures != sharp.figures

from archives import image_archive
file = sys.argv[1] + "/colours.npz"
images = np.stack([np.asarray(item.open()) for item in support.items])
np.savez(file, images=images, labels=support.labels, names=support.class_names)
read = image_archive(file)
assert (read.name, read.labels, read.class_names) == ("colours", support.labels, support.class_names)
assert [a.digest() for a in read.items] == [a.digest() for a in clipadapt.data.as_items(list(images))]
np.savez(file, images=images)
for wrong in (file, sys.argv[0], "nowhere.npz"):
    with pytest.raises(DataError, match="not an archive of images, labels and names"):
        image_archive(wrong)
"""


def test_the_code_on_the_page_works(tmp_path):
    page = PAGE.read_text()
    blocks = re.findall(r"`[\w/]+/(\w+\.py)`:\s+```python\n(.*?)```", page, re.S)
    assert [name for name, _ in blocks] == ["nearest_mean.py", "counting.py", "blurred.py", "archives.py"]
    assert page.count("```python") == len(blocks)
    for name, code in blocks:
        assert len([line for line in code.splitlines() if line.strip()]) <= 40
        (tmp_path / name).write_text(code)
    subprocess.run(
        [sys.executable, "-c", USE, tmp_path, tmp_path / "model"], check=True, cwd=PAGE.parents[1], timeout=120
    )
