"""Pretrained two-tower models behind one interface."""

from clipadapt.backbones.backbone import Backbone
from clipadapt.backbones.convert import convert_checkpoint
from clipadapt.backbones.edits import (
    AttentionMode,
    DropMLP,
    DropResidual,
    Edit,
    ExtraChannels,
    InsertedModules,
    LongerPositions,
)
from clipadapt.backbones.image_tower import ImageTokens
from clipadapt.backbones.insertion import Insertion
from clipadapt.backbones.loading import load_backbone
from clipadapt.backbones.model import Model
from clipadapt.backbones.text_tower import TextTokens

__all__ = [
    "AttentionMode",
    "Backbone",
    "DropMLP",
    "DropResidual",
    "Edit",
    "ExtraChannels",
    "ImageTokens",
    "InsertedModules",
    "Insertion",
    "LongerPositions",
    "Model",
    "TextTokens",
    "convert_checkpoint",
    "load_backbone",
]
