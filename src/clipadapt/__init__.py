"""clipadapt: make a pretrained CLIP-like vision-language model good at your images."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from clipadapt import renamed

__version__ = "0.2.0"

# The public names and where they live; imported on first use, so that `import clipadapt` stays light.
_HOMES = {
    "load_backbone": "clipadapt.backbones",
    "new_backbone": "clipadapt.backbones.scratch",
    "image_folder": "clipadapt.data",
    "image_table": "clipadapt.data",
    "image_list": "clipadapt.data",
    "coop_split": "clipadapt.data",
    "hub_dataset": "clipadapt.data",
    "webdataset": "clipadapt.data",
    "Playground": "clipadapt.data",
    "create": "clipadapt.methods",
    "list_methods": "clipadapt.methods",
    "load": "clipadapt.methods",
    "ClipadaptError": "clipadapt.errors",
}

__all__ = ["__version__", *sorted(_HOMES)]

if TYPE_CHECKING:
    from clipadapt.backbones import load_backbone as load_backbone
    from clipadapt.backbones.scratch import new_backbone as new_backbone
    from clipadapt.data import Playground as Playground
    from clipadapt.data import coop_split as coop_split
    from clipadapt.data import hub_dataset as hub_dataset
    from clipadapt.data import image_folder as image_folder
    from clipadapt.data import image_list as image_list
    from clipadapt.data import image_table as image_table
    from clipadapt.data import webdataset as webdataset
    from clipadapt.errors import ClipadaptError as ClipadaptError
    from clipadapt.methods import create as create
    from clipadapt.methods import list_methods as list_methods
    from clipadapt.methods import load as load


renamed.install()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'clipadapt' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
