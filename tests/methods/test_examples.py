"""The example in each method's docstring runs, on the tiny backbone."""

from __future__ import annotations

import doctest
from importlib import import_module

import pytest
import torch

from clipadapt.backbones import load_backbone
from clipadapt.methods import create, list_methods, method_class
from tests.images import colours
from tests.tiny import tiny_clip


@pytest.fixture(scope="module")
def given() -> dict[str, object]:
    """What the examples speak of: sixteen labelled images of four colours and eight others."""
    return {
        "backbone": load_backbone(tiny_clip()),
        "support": colours(4, seed=1),
        "val": colours(1, seed=3),
        "queries": colours(2, seed=2),
        "unlabelled": colours(3, seed=4),
        "create": create,
        "torch": torch,
    }


@pytest.mark.parametrize("key", list_methods())
def test_the_example_runs(key, given):
    cls = method_class(key)
    names = vars(import_module(cls.__module__)) | given
    [example] = doctest.DocTestFinder(recurse=False).find(cls, key, globs=dict(names))
    assert example.examples, f"{key} has no example"
    said: list[str] = []
    doctest.DocTestRunner(verbose=False).run(example, out=said.append)
    assert not said, "".join(said)
