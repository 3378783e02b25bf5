"""Figures of predictions: pure functions of labels, scores and predictions, for any task."""

from clipadapt.metrics.multilabel import average_precision, best_threshold, mean_average_precision

__all__ = ["average_precision", "best_threshold", "mean_average_precision"]
