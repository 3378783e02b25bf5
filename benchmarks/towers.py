"""Learning rates for methods that run the towers, on the playground: the settings of the suite `playground-towers`.

    python benchmarks/towers.py RUNS --jobs 2

The settings of the suite `few-shot-towers` were chosen by looking at the test part of digits, of which the embedded
model knows nothing: their rates are high, and destroy what it knows of drawn things. So each method's rate is 1, 1/5 or
1/25 of that one (its own, and that of a method that it wraps), whichever is best with four shots on drawings of another
world (`drawn_for_rates.yaml`: the same kinds and styles, no image in common with playground-kinds); the smaller of
equal ones. Every fit takes as many steps as in few-shot-towers with 8 shots of 10 classes. What was tried is in
RUNS/rates/results.jsonl (for the suite's settings: towers_rates.jsonl); a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from clipadapt.evaluation.bench import suite as suites
from clipadapt.evaluation.bench.run import run_suite
from clipadapt.methods import Method
from clipadapt.methods.loading import from_recipe
from clipadapt.methods.recipe import recipe

HERE = Path(__file__).parent
FACTORS = (1.0, 0.2, 0.04)
SHOTS = 4


def with_rate(method: Method, factor: float) -> dict[str, Any]:
    """The hyper-parameters that differ, in JSON values, where learning rates are multiplied by `factor`."""
    changed: dict[str, Any] = {}
    if hasattr(method, "lr"):
        changed["lr"] = float(f"{method.lr * factor:.3g}")
    inner = getattr(method, "method", None)
    if isinstance(inner, Method):
        values = recipe(inner)["hyperparameters"] | with_rate(inner, factor)
        changed["method"] = {"method": inner.card.key, "hyperparameters": values}
    return changed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--jobs", type=int, default=1)
    given = parser.parse_args()

    quick = suites.load_suite("few-shot-towers")
    tried: dict[str, dict[str, Any]] = defaultdict(dict)  # method -> label -> what it sets
    entries = []
    for entry in quick.methods:
        for factor in FACTORS:
            changed = with_rate(from_recipe({"method": entry.key, "hyperparameters": entry.hyperparameters}), factor)
            label = f"{entry.label} x{factor:g}"
            if changed:
                tried[entry.label][label] = changed
                entries.append(suites.Entry(label, entry.key, entry.hyperparameters | changed, entry.steps_as))
    suite = replace(
        quick,
        name="towers-rates",
        data=[str(HERE / "drawn_for_rates.yaml")],
        protocols={"few-shot": {"shots": [SHOTS], "val": [False], "search": [False]}},
        methods=entries,
        seeds=[1],
    )
    rows = run_suite(suite, given.runs / "rates", jobs=given.jobs, threads=1, tell=print)
    accuracy = {row["label"]: row["figures"]["accuracy"] if "figures" in row else 0.0 for row in rows}

    print("settings:")
    for entry in quick.methods:
        values = dict(entry.hyperparameters)
        if tried[entry.label] and entry.steps_as is not None:
            values |= tried[entry.label][max(reversed(tried[entry.label]), key=lambda label: accuracy[label])]
        if values:
            line = yaml.safe_dump({entry.key: values}, sort_keys=False, default_flow_style=True, width=10_000)
            print(f"  {line.strip()[1:-1]}")


if __name__ == "__main__":
    main()
