"""The plan on the page about scale is the one that its script reckons from what was measured."""

from __future__ import annotations

import runpy
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EMBED = runpy.run_path(str(ROOT / "benchmarks" / "embed.py"))
ROWS = [
    {"case": "throughput", "side": "clipadapt", "pictures_per_second": 250.0, "machine": "one GPU"},
    {"case": "throughput", "side": "transformers", "pictures_per_second": 200.0, "machine": "one GPU"},
    {"case": "bytes", "picture": 20000, "npy": 1024, "parquet": 120},
]


def test_the_table_is_that_of_the_results():
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    begin, end = EMBED["MARKERS"]
    shown = page.partition(begin)[2].partition(end)[0].strip()
    assert shown == EMBED["plan"](EMBED["read_results"]()), "run: python benchmarks/embed.py --plan docs/scale.md"


def test_its_sums_are_right(tmp_path):
    table = EMBED["plan"](ROWS)
    assert "| one GPU | 250.0 | 1e9 / 250.0 / 3,600 = 1,111 | 1,111 / 100 / 24 = 0.5 |" in table
    assert "| 1,024 | 1,024 x 1e9 = 1.02 TB |" in table
    assert "200.0" not in table
    page = tmp_path / "page.md"
    begin, end = EMBED["MARKERS"]
    page.write_text(f"above\n{begin}\nold\n{end}\nbelow\n")
    EMBED["write_plan"](page, table)
    assert page.read_text() == f"above\n{begin}\n{table}\n{end}\nbelow\n"
