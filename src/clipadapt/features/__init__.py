"""Frozen features: encoded once per content and backbone, kept on disk, spread over processes."""

from clipadapt.features.classes import encode_classes
from clipadapt.features.embeddings import Embeddings, encode_shard
from clipadapt.features.encode import Encoded, encode_images, other_tower

__all__ = ["Embeddings", "Encoded", "encode_classes", "encode_images", "encode_shard", "other_tower"]
