"""Frozen features: encoded once per content and backbone, kept on disk, spread over processes."""

from clipadapt.features.classes import encode_classes
from clipadapt.features.encode import Encoded, encode_images, other_tower
from clipadapt.features.shards import Merged, encode_shard, merge

__all__ = ["Encoded", "Merged", "encode_classes", "encode_images", "encode_shard", "merge", "other_tower"]
