"""Pretrained two-tower models behind one interface."""

from clipadapt.backbones.backbone import Backbone, ImageTokens
from clipadapt.backbones.convert import convert
from clipadapt.backbones.loading import load_backbone
from clipadapt.backbones.surgery import Insertion

__all__ = ["Backbone", "ImageTokens", "Insertion", "convert", "load_backbone"]
