"""Learning rates for methods that run the towers, on the playground; writes the suite `playground-towers`.

    python benchmarks/towers.py RUNS --jobs 2
    clipadapt bench playground-towers --out RUNS --data DATA

The quick settings (`tiny`) were chosen on digits, of which the embedded model knows nothing: their rates are high, and
destroy what it knows of drawn things. So each method's rate is 1, 1/5 or 1/25 of that one (its own, and that of a
method that it wraps), whichever is best with four shots on drawings of another world (`drawn_for_rates.yaml`: the same
kinds and styles, no picture in common with playground-kinds); the smaller of equal ones. Every fit takes as many steps
as the quick setting with 8 shots of 10 classes. What was tried is in RUNS/rates/results.jsonl; a run that stopped goes
on.
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
from clipadapt.methods import Method, create
from clipadapt.methods.artifact import recipe

HERE = Path(__file__).parent
SUITE = suites.HERE / "playground-towers.yaml"
FACTORS = (1.0, 0.2, 0.04)
SHOTS = 4
HEAD = """\
# Methods that run the towers, with their quick settings but for the learning rates, which benchmarks/towers.py chose on
# other drawings of the same kinds. Each trains at every shot as many steps as its quick setting with 8 shots of digits.
"""


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
            changed = with_rate(create(entry.key, **entry.hyperparameters), factor)
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

    methods: list[Any] = []
    for entry in quick.methods:
        line: dict[str, Any] = {"method": entry.label}
        if tried[entry.label] and entry.steps_as is not None:
            best = max(reversed(tried[entry.label]), key=lambda label: accuracy[label])
            line |= {"preset": "tiny", "set": tried[entry.label][best], "steps_as": dict(entry.steps_as)}
        elif entry.label != "zero-shot":
            line |= {"preset": "tiny"}
        methods.append(line)
    content = {
        "title": "Few shots on the playground, methods that run the towers",
        "data": ["playground-kinds"],
        "protocols": {"few-shot": {"shots": [1, 2, 4, 8, 16]}},
        "seeds": [1, 2, 3],
        "timeout": 900,
        "tiny": {
            "protocols": {"few-shot": {"shots": [4]}},
            "methods": [line for line in methods if line["method"] in ("zero-shot", "coop", "clip-lora")],
            "seeds": [1],
        },
    }
    text = yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=200)
    lines = "".join(
        f"- {yaml.safe_dump(line, sort_keys=False, default_flow_style=True, width=1000)}" for line in methods
    )
    SUITE.write_text(f"{HEAD}{text}methods:\n{lines}", encoding="utf-8")
    print(f"{SUITE.name}: {len(methods)} methods")


if __name__ == "__main__":
    main()
