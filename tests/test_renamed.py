"""Every old module path is imported as its new module, with one warning that names it."""

from __future__ import annotations

import subprocess
import sys
import warnings
from importlib import import_module

import pytest
import torch

import clipadapt
from clipadapt.renamed import MODULES, NAMES, RENAMED, old_argument
from tests.tiny import tiny_clip


def run(code: str) -> subprocess.CompletedProcess[str]:
    """What a fresh interpreter says."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


@pytest.mark.parametrize("old", MODULES)
def test_an_old_path_is_the_new_module(old, monkeypatch):
    new = import_module(MODULES[old])
    monkeypatch.delitem(sys.modules, old, raising=False)
    with pytest.warns(FutureWarning, match=f"^{old} is now {MODULES[old]}; ") as caught:
        assert import_module(old) is new
    assert len(caught) == 1
    assert new.__name__ == new.__spec__.name == MODULES[old]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert import_module(old) is new, "and never another warning"


MOVED = {
    "clipadapt.data.corpus": ["Corpus", "build_corpus"],
    "clipadapt.evaluation.bench": ["run_suite", "read_rows"],
    "clipadapt.evaluation.protocols": ["NotApplicable", "Outcome", "protocol"],
    "clipadapt.features": ["Embeddings", "encode_shard"],
}


@pytest.mark.parametrize(("package", "name"), [(package, name) for package in MOVED for name in MOVED[package]])
def test_an_old_name_of_a_package_is_the_new_one(package, name, monkeypatch):
    module = import_module(package)
    monkeypatch.delitem(vars(module), name, raising=False)
    (home,) = NAMES[package]
    with pytest.warns(FutureWarning, match=f"^{package}.{name} is now {home}.{name}; ") as caught:
        found = getattr(module, name)
    assert found is getattr(import_module(home), name)
    assert len(caught) == 1


def test_every_package_with_old_names_is_tested():
    assert NAMES.keys() == MOVED.keys()


@pytest.mark.parametrize("package", NAMES)
def test_what_a_package_never_had_is_an_error(package):
    with pytest.raises(ImportError, match="nothing"):
        exec(f"from {package} import nothing")
    with pytest.raises(AttributeError, match="has no attribute '_hidden'"):
        _ = import_module(package)._hidden


def test_names_of_the_old_metrics_module_need_no_warning():
    code = "from clipadapt.metrics import average_precision, best_threshold, mean_average_precision"
    done = run(f"import warnings; warnings.simplefilter('error'); {code}")
    assert done.returncode == 0, done.stderr


def test_a_warning_points_at_the_line_that_imports():
    done = run("import clipadapt\n\nfrom clipadapt.data.dataset import Dataset\nimport clipadapt.data.dataset")
    assert done.returncode == 0
    assert done.stderr.count("FutureWarning") == 1
    assert done.stderr.startswith("<string>:3: FutureWarning: clipadapt.data.dataset is now clipadapt.data.examples")
    done = run("from clipadapt.data.corpus import Corpus")
    assert done.stderr.startswith("<string>:1: FutureWarning: clipadapt.data.corpus.Corpus is now")


def test_a_folder_that_is_gone_has_its_old_modules():
    assert import_module("clipadapt.methods.few_shot").__file__ is None
    sys.modules.pop("clipadapt.methods.few_shot.tip_adapter", None)
    with pytest.warns(FutureWarning, match="tip_adapter is now clipadapt.methods.training_free_few_shot.tip_adapter"):
        import_module("clipadapt.methods.few_shot.tip_adapter")
    with pytest.raises(ImportError):
        import_module("clipadapt.methods.few_shot.nothing")
    with pytest.raises(ImportError):
        import_module("clipadapt.nothing")


def test_old_paths_cost_nothing_until_they_are_used():
    done = run("import sys, clipadapt; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)")
    assert done.returncode == 0
    assert clipadapt.renamed.MODULES is MODULES


@pytest.mark.parametrize(("module", "old"), [(module, old) for module, names in RENAMED.items() for old in names])
def test_a_name_that_changed_is_found_under_both(module, old, monkeypatch):
    home = import_module(module)
    monkeypatch.delitem(vars(home), old, raising=False)
    new = RENAMED[module][old]
    with pytest.warns(FutureWarning, match=f"^{module}.{old} is now {module}.{new}; ") as caught:
        found = getattr(home, old)
    assert len(caught) == 1
    assert found is getattr(home, new)


def test_an_argument_that_changed_is_taken_by_both_names():
    @old_argument("pictures", "images")
    def count(*, images: int) -> int:
        return images

    assert count(images=2) == 2
    with pytest.warns(FutureWarning, match="The argument pictures of count is now images; "):
        assert count(pictures=3) == 3


def test_old_attributes_of_a_model_are_facts_of_its_encoder():
    model = clipadapt.create("zero-shot").fit(clipadapt.load_backbone(tiny_clip()), class_names=["red", "blue"])
    pixels = torch.zeros(1, 3, 32, 32)
    with pytest.warns(FutureWarning, match=r"ZeroShot.image_tower is now encoder;"):
        assert model.image_tower() is model.encoder
    with pytest.warns(FutureWarning, match=r"ZeroShot.encode_pixels is now encoder\.encode;"):
        assert torch.equal(model.encode_pixels(pixels), model.encoder.encode(pixels))
    with pytest.warns(FutureWarning, match="image_fingerprint"):
        assert model.image_fingerprint == model.encoder.image_fingerprint
