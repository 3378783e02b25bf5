"""Suites of cells: method x backbone x data set x protocol x seed, run once each, resumable, in parallel."""

from clipadapt.renamed import old_names

__getattr__ = old_names(__name__)
