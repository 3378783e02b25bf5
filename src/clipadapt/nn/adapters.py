"""The earlier names of `nn.updates`, for the methods that still use them; to be deleted when those are rewritten."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from clipadapt.nn.updates.access import site_of
from clipadapt.nn.updates.bottleneck import SHARING, Bottlenecks
from clipadapt.nn.updates.linear import LinearAdapter, LinearAdapters
from clipadapt.nn.updates.sites import SiteUpdate

__all__ = [
    "SHARING",
    "Adapters",
    "LinearAdapter",
    "bottlenecks",
    "for_another_task",
    "learned",
    "merged",
    "put_back",
    "site_of",
]


class Adapters(LinearAdapters):
    """`LinearAdapters` of parts that were made one by one."""

    def __init__(self, sites: Mapping[str, nn.Module]) -> None:
        SiteUpdate.__init__(self, nn.Module(), sites)


def bottlenecks(model: nn.Module, sites: Sequence[str], *, reduction: float = 8, share: str = "none") -> Adapters:
    return Bottlenecks(model, sites, reduction=reduction, share=share)  # type: ignore[return-value]


def for_another_task(adapters: Adapters, share: str = "all") -> Adapters:
    return adapters.for_another_task(share)  # type: ignore[operator]


def merged(model: nn.Module, adapters: Adapters, factor: float = 1.0) -> dict[str, Tensor]:
    adapters.biased = {site for site in adapters.sites if site_of(model, site).bias is not None}
    return adapters.merged(model, factor)


def learned(adapters: Adapters) -> dict[str, Tensor]:
    return adapters.tensors()


def put_back(adapters: Adapters, tensors: Mapping[str, Tensor]) -> Adapters:
    return adapters.load(tensors)
