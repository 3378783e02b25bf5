"""Sentences for class names."""

from clipadapt.data.templates.sets import class_texts, template_sets, with_published_names

__all__ = ["class_texts", "template_sets", "with_published_names"]
