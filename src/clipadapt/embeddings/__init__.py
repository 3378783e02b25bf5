"""Embeddings of many images: a format that others can read, listings, remote files, executors."""

from clipadapt.embeddings.format import Embeddings, encode_shard

__all__ = ["Embeddings", "encode_shard"]
