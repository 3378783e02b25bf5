"""Writes docs/reports from the recorded results of benchmarks/.

python docs/make_reports.py
"""

from __future__ import annotations

from pathlib import Path

from clipadapt.evaluation.bench.run import read_rows
from clipadapt.evaluation.bench.suite import load_suite
from clipadapt.evaluation.report.page import write_report

HERE = Path(__file__).resolve().parent
RECORDED = {"few-shot": "few_shot.jsonl", "playground-towers": "playground_towers.jsonl"}

for name, file in RECORDED.items():
    suite = load_suite(name)
    rows = read_rows(HERE.parent / "benchmarks" / file)
    rows.sort(key=lambda row: suite.data.index(row["data"]))
    command = f"clipadapt bench {name} --out DIR --data DATA"
    page = write_report(
        rows, HERE / "reports" / name, title=suite.title, command=command, cells_in=f"benchmarks/{file}"
    )
    print(page.relative_to(HERE.parent), f"{page.stat().st_size:,} bytes")
