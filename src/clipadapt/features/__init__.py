"""Frozen features: encoded once per content and encoder, and kept on disk."""

from clipadapt.features.classes import encode_classes
from clipadapt.features.encode import Encoded, encode_images
from clipadapt.features.encoder import Adapted, Encoder
from clipadapt.renamed import old_names

__all__ = ["Adapted", "Encoded", "Encoder", "encode_classes", "encode_images"]

__getattr__ = old_names(__name__)
