"""Every published way of adapting a CLIP-like model that the library holds: one file each, in family folders."""

from clipadapt.methods.artifact import load
from clipadapt.methods.base import Card, FeatureMethod, Method, Support, hyper
from clipadapt.methods.registry import create, list_methods, method_class, register

__all__ = [
    "Card",
    "FeatureMethod",
    "Method",
    "Support",
    "create",
    "hyper",
    "list_methods",
    "load",
    "method_class",
    "register",
]
