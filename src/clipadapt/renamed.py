"""Old module paths: for one version they are still imported as their new modules, each with one FutureWarning.

`MODULES` maps an old path to the new one; folders that are gone need no entry. `NAMES` is for a module that became a
package, and `RENAMED` for names that changed within a module: the old ones can still be imported from there, if it has
`__getattr__ = old_names(__name__)`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import wraps
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any, TypeVar, cast
from warnings import warn

F = TypeVar("F", bound=Callable[..., Any])

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
    "clipadapt.search.pictures": "clipadapt.search.images",
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

RENAMED: Mapping[str, Mapping[str, str]] = {
    "clipadapt.data": {"picture_files": "image_files"},
    "clipadapt.data.playground.factors": {"factor_pictures": "factor_images"},
    "clipadapt.data.readers.folders": {"picture_files": "image_files"},
    "clipadapt.embeddings.listing": {"PART_PICTURES": "PART_IMAGES", "list_pictures": "list_images"},
    "clipadapt.evaluation.protocols.multi_object": {"Picture": "Layout", "pictures": "layouts"},
    "clipadapt.search.images": {"named_picture": "named_image"},
    "clipadapt.evaluation.protocol": {"judged": "judge"},
    "clipadapt.serve.limits": {"hashed": "hash_key", "check_picture": "check_image", "open_picture": "open_image"},
}


def install() -> None:
    """Let old paths be imported; they are looked for only where no module of that name exists."""
    sys.meta_path.append(_OldPaths())


def old_names(module: str) -> Callable[[str], Any]:
    """A `__getattr__` for a module that finds the names which `RENAMED` and `NAMES` say have changed or moved."""

    def __getattr__(name: str) -> Any:
        for home, new in _homes(module, name):
            if hasattr(found := import_module(home), new):
                _warn(f"{module}.{name}", f"{home}.{new}", stacklevel=3)
                value = vars(sys.modules[module])[name] = getattr(found, new)  # from now on without a warning
                return value
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return __getattr__


def old_argument(old: str, new: str) -> Callable[[F], F]:
    """Decorator: the function also takes its argument `new` by the name that it had before, with a FutureWarning."""

    def decorate(function: F) -> F:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if old in kwargs:
                _warn(f"The argument {old} of {function.__name__}", new, stacklevel=3)
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return cast(F, call)

    return decorate


def old_attribute(new: str, get: Callable[[Any], Any]) -> Any:
    """A property for the old name of an attribute: what `get` gives of the object, with a FutureWarning."""

    class Old:
        def __set_name__(self, owner: type, name: str) -> None:
            self.name = name

        def __get__(self, instance: Any, owner: type) -> Any:
            if instance is None:
                return self
            _warn(f"{owner.__name__}.{self.name}", new, stacklevel=3)
            return get(instance)

    return Old()


def _homes(module: str, name: str) -> Iterator[tuple[str, str]]:
    """The modules that may hold what `module.name` was, and its name there."""
    if name in (renamed := RENAMED.get(module, {})):
        yield module, renamed[name]
    elif module in NAMES and not name.startswith("_") and find_spec(f"{module}.{name}") is None:
        yield from ((home, name) for home in NAMES[module])


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
