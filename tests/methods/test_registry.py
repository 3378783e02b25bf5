"""Methods are found by key, glob and near names."""

from __future__ import annotations

import dataclasses

import pytest

import clipadapt
from clipadapt.errors import ClipadaptError
from clipadapt.methods import Classifier, FeatureMethod, create, list_methods, method


def test_globbing():
    assert list_methods("tip-*") == ["tip-adapter", "tip-adapter-f"]
    assert set(list_methods("*adapter*")) >= {"clip-adapter", "tip-adapter", "tip-adapter-f"}
    assert list_methods("no-such-*") == []
    assert list_methods() == sorted(list_methods())
    assert clipadapt.list_methods is list_methods


@pytest.mark.parametrize(
    ("key", "near"), [("tipadapter", "'tip-adapter'"), ("gda", "'gda-clip'"), ("lora", "'clip-lora'")]
)
def test_unknown_keys_suggest_near_ones(key, near):
    with pytest.raises(ClipadaptError, match=near):
        create(key)


def test_unknown_hyperparameters_suggest_near_ones():
    with pytest.raises(ClipadaptError, match=r"tip-adapter: .*'alfa'.*'alpha'"):
        create("tip-adapter", alfa=1.0)


def test_a_key_can_be_taken_only_once():
    with pytest.raises(ValueError, match="Two methods are called 'zero-shot'"):

        @method("zero-shot", title="", arxiv=None)
        class Impostor(FeatureMethod, Classifier):
            pass


def test_a_method_is_a_dataclass_of_its_settings():
    chosen = create("tip-adapter", alpha=2.0)
    assert repr(chosen) == "TipAdapter(templates='photo', alpha=2.0, beta=5.5)"
    assert chosen == create("tip-adapter", alpha=2.0) != create("tip-adapter")
    assert dataclasses.replace(chosen, beta=1.0).alpha == 2.0
