"""Figures about the running server, in the text format that Prometheus reads."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Sequence

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
ITEMS = (1, 2, 4, 8, 16, 32, 64, 128)

_Labels = tuple[tuple[str, str], ...]


class Metrics:
    """Counters and histograms by name and labels; used from the event loop's thread only."""

    def __init__(self) -> None:
        self._help: dict[str, tuple[str, str]] = {}  # name -> kind, what it is
        self._counts: dict[str, Counter[_Labels]] = defaultdict(Counter)
        self._histograms: dict[str, dict[_Labels, _Histogram]] = defaultdict(dict)
        self._bounds: dict[str, Sequence[float]] = {}
        self._describe("counter", "clipadapt_requests_total", "Requests answered, by route and status.")
        self._describe("counter", "clipadapt_images_total", "Images received.")
        self._describe("counter", "clipadapt_pictures_total", "The old name of clipadapt_images_total.")
        self._describe("counter", "clipadapt_reloads_total", "Models loaded again, by result.")
        self._describe("histogram", "clipadapt_request_seconds", "From a request to its answer.", SECONDS)
        self._describe("histogram", "clipadapt_batch_items", "Items that went through the model at once.", ITEMS)

    def _describe(self, kind: str, name: str, text: str, bounds: Sequence[float] = ()) -> None:
        self._help[name] = kind, text
        self._bounds[name] = bounds

    def count(self, name: str, number: int = 1, **labels: str) -> None:
        """Add to a counter."""
        self._counts[name][tuple(labels.items())] += number

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Add a value to a histogram."""
        rows, key = self._histograms[name], tuple(labels.items())
        if key not in rows:
            rows[key] = _Histogram(self._bounds[name])
        rows[key].add(value)

    def text(self, **gauges: float) -> str:
        """Everything as text; `gauges` are what holds at this moment."""
        lines = []
        for name, (kind, text) in self._help.items():
            lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
            lines += [f"{name}{_labels(labels)} {count}" for labels, count in sorted(self._counts[name].items())]
            for labels, histogram in sorted(self._histograms[name].items(), key=lambda row: row[0]):
                lines += histogram.lines(name, labels)
        for name, value in gauges.items():
            lines += [f"# TYPE clipadapt_{name} gauge", f"clipadapt_{name} {value:g}"]
        return "\n".join(lines) + "\n"


class _Histogram:
    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def lines(self, name: str, labels: _Labels) -> list[str]:
        lines, total = [], 0
        for bound, count in zip([*map("{:g}".format, self.bounds), "+Inf"], self.counts, strict=True):
            total += count
            lines.append(f"{name}_bucket{_labels((*labels, ('le', bound)))} {total}")
        return [*lines, f"{name}_sum{_labels(labels)} {self.sum:.6f}", f"{name}_count{_labels(labels)} {total}"]


def _labels(labels: _Labels) -> str:
    if not labels:
        return ""
    escaped = ((key, value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")) for key, value in labels)
    return "{" + ",".join(f'{key}="{value}"' for key, value in escaped) + "}"
