"""Adapted models behind HTTP: classify, embed, search."""
