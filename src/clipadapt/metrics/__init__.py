"""Figures of predictions: pure functions of labels, scores and predictions, for any task."""
