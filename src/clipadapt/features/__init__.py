"""Frozen features: encoded once per content and backbone, and kept on disk."""

from clipadapt.features.classes import encode_classes
from clipadapt.features.encode import Encoded, encode_images, other_tower
from clipadapt.renamed import old_names

__all__ = ["Encoded", "encode_classes", "encode_images", "other_tower"]

__getattr__ = old_names(__name__)
