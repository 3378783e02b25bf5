"""Old module paths: for one version they are still imported as their new modules, each with one FutureWarning.

`MODULES` maps an old path to the new one; folders that are gone need no entry. `NAMES` is for a module that became a
package: what it held can still be imported from there, if its `__init__` has `__getattr__ = old_names(__name__)`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any
from warnings import warn

# Old folder -> new folder -> modules that kept their names.
_FOLDERS = {
    "data": {"data.readers": "coop folders hub lists shards tables"},
    "evaluation": {
        "evaluation.bench": "published suite",
        "evaluation.studies": "pretraining survey wise_ft_curve",
        "metrics": "calibration multilabel retrieval",
    },
    "features": {"embeddings": "executors listing remote"},
    "methods.analysis": {"methods.analysis_evaluation": "backbone_effects_study"},
    "methods.few_shot": {
        "methods.feature_adapter": (
            "ape_t clap clip_adapter cross_modal_probe labclip linear_probe lp_plus_plus mf_adapter "
            "multi_modal_adapter reco taskres tip_adapter_f vdt_adapter"
        ),
        "methods.training_free_few_shot": "ape caps_adapter gda_clip proker sus_x tip_adapter transclip",
        "methods.zero_shot_inference": "zero_shot",
    },
    "methods.finetuning": {
        "methods.peft_weights": "clip_lora saft vl_adapter",
        "methods.robust_fine_tuning": (
            "clipood fine_tune flyp full_fine_tune m2_mix omniview_tuning r_adapter tecoa wise_ft"
        ),
    },
    "methods.prompts": {
        "methods.prompt_learning": (
            "cocoop coop eco gopro ivlp kgcoop map maple mocoop pre prograd promptsrc ship sync_clip tai_dpt vpt"
        ),
    },
    "methods.zero_shot": {"methods.zero_shot_inference": "comclip falip gc_clip x_more"},
    "search": {"search.stores": "store"},
}

MODULES = {
    "clipadapt.backbones.captioner": "clipadapt.sources.captioners",
    "clipadapt.backbones.detector": "clipadapt.sources.detectors",
    "clipadapt.data.corpus_sources": "clipadapt.data.corpus.sources",
    "clipadapt.data.dataset": "clipadapt.data.examples",
    "clipadapt.data.playground_factors": "clipadapt.data.playground.factors",
    "clipadapt.data.playground_kinds": "clipadapt.data.playground.kinds",
    "clipadapt.data.playground_styles": "clipadapt.data.playground.styles",
    "clipadapt.evaluation.metrics": "clipadapt.metrics.classification",
    "clipadapt.evaluation.select": "clipadapt.evaluation.selection",
    "clipadapt.features.embeddings": "clipadapt.embeddings.format",
    "clipadapt.features.sources": "clipadapt.sources.images",
    **{
        f"clipadapt.{old}.{module}": f"clipadapt.{new}.{module}"
        for old, folders in _FOLDERS.items()
        for new, modules in folders.items()
        for module in modules.split()
    },
}

NAMES: Mapping[str, Sequence[str]] = {
    "clipadapt.data.corpus": ["clipadapt.data.corpus.pairs"],
    "clipadapt.evaluation.bench": ["clipadapt.evaluation.bench.run"],
    "clipadapt.evaluation.protocols": ["clipadapt.evaluation.protocol"],
    "clipadapt.features": ["clipadapt.embeddings"],
}


def install() -> None:
    """Let old paths be imported; they are looked for only where no module of that name exists."""
    sys.meta_path.append(_OldPaths())


def old_names(package: str) -> Callable[[str], Any]:
    """A `__getattr__` for a package that finds the names which `NAMES` says have moved."""

    def __getattr__(name: str) -> Any:
        if not name.startswith("_") and find_spec(f"{package}.{name}") is None:
            for home in NAMES[package]:
                if hasattr(module := import_module(home), name):
                    _warn(f"{package}.{name}", f"{home}.{name}", stacklevel=3)
                    value = vars(sys.modules[package])[name] = getattr(module, name)  # from now on without a warning
                    return value
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return __getattr__


class _OldPaths(MetaPathFinder, Loader):
    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name in MODULES:
            return ModuleSpec(name, self)
        if any(old.startswith(f"{name}.") for old in MODULES):
            return ModuleSpec(name, None, is_package=True)  # a folder that is gone: empty, but for its old modules
        return None

    def exec_module(self, module: ModuleType) -> None:
        old = module.__name__
        sys.modules[old] = import_module(MODULES[old])  # which is what the import system then hands out
        _warn(old, MODULES[old], stacklevel=3)


def _warn(old: str, new: str, stacklevel: int) -> None:
    warn(f"{old} is now {new}; the old name works in this version only.", FutureWarning, stacklevel=stacklevel)
