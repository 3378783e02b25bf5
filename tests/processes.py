"""Processes of tests are forked from one that has imported already what would take most of their time."""

from __future__ import annotations

from multiprocessing import get_context

FORKED = get_context("forkserver")
FORKED.set_forkserver_preload(
    [
        "clipadapt.evaluation.selection",
        "clipadapt.methods",
        "clipadapt.training.contrastive",
        "sklearn.datasets",
        "pytest",
    ]
)
