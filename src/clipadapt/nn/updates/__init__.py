"""Updates: what of a model changes, as values that attach, merge, count and save themselves."""

from clipadapt.nn.updates.bottleneck import SHARING, Bottleneck, Bottlenecks
from clipadapt.nn.updates.linear import LinearAdapter, LinearAdapters
from clipadapt.nn.updates.low_rank import LowRank
from clipadapt.nn.updates.sites import SiteUpdate
from clipadapt.nn.updates.update import Change, Update
from clipadapt.nn.updates.weights import Full, Sparse

__all__ = [
    "SHARING",
    "Bottleneck",
    "Bottlenecks",
    "Change",
    "Full",
    "LinearAdapter",
    "LinearAdapters",
    "LowRank",
    "SiteUpdate",
    "Sparse",
    "Update",
]
