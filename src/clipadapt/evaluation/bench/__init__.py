"""Suites of cells: method x backbone x data set x protocol x seed, run once each, resumable, in parallel."""
