"""Pretrained two-tower models behind one interface."""

from clipadapt.backbones.backbone import Backbone, ImageTokens, TextTokens
from clipadapt.backbones.convert import convert_checkpoint
from clipadapt.backbones.loading import load_backbone
from clipadapt.backbones.surgery import Insertion

__all__ = ["Backbone", "ImageTokens", "Insertion", "TextTokens", "convert_checkpoint", "load_backbone"]
