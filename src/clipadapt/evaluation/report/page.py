"""A suite's results as one self-contained page, with every plot and table also as a separate file.

`report.html` holds everything (styles, plots as SVG, one short script that sorts tables) and loads nothing. Next to it
are figures/*.svg and *.png, and tables/*.csv, *.md and *.tex.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any

from clipadapt.errors import ClipadaptError
from clipadapt.evaluation.bench.published import beside
from clipadapt.evaluation.bench.run import options_of
from clipadapt.evaluation.statistics import bootstrap_interval, compare, rank
from clipadapt.files import written_aside

Row = Mapping[str, Any]
HERE = Path(__file__).parent
# What a protocol is judged by: the first of these that it has; of all, more is better.
MAIN = ("harmonic", "unseen", "corrupted", "attacked", "matching", "accuracy", "macro")
COSTS = {"seconds": "seconds to learn", "peak_mib": "peak memory in MiB", "trained_parameters": "trained numbers"}
SHOWN = 10  # methods in a plot with a line for each


@dataclass(frozen=True)
class Table:
    """A table of strings and numbers; `caption` says what it shows."""

    name: str
    caption: str
    head: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Plot:
    """A plot with the sentence that replaces it where it cannot be seen."""

    name: str
    alt: str
    svg: str


def write_report(rows: Sequence[Row], out: Path, *, title: str, command: str, cells_in: str | None = None) -> Path:
    """Write report.html, figures/ and tables/ into `out`; the path of the page. Needs the extra `[bench]`.

    Args:
        rows: those of `run_suite`.
        command: what made them.
        cells_in: where every cell is kept. The page is then brief and names that place: it has no table of all cells,
            no classes, reliability diagrams and costs but seconds, and nothing is written next to it but tables/*.csv.
    """
    check_installed()
    from jinja2 import Environment
    from markupsafe import Markup

    from clipadapt.evaluation.report import figures

    page = _Page(out, figures, brief=cells_in is not None)
    own = (".yaml", ".yml")  # a user's definition is called by its file's name
    rows = [{**row, "data": Path(row["data"]).stem if row["data"].endswith(own) else row["data"]} for row in rows]
    groups = _group([row for row in rows if "figures" in row])
    sections = []
    for (data, backbone, protocol), found in groups.items():
        main = next((name for name in MAIN if name in found[0]["figures"]), next(iter(found[0]["figures"])))
        sections.append(
            {
                "heading": f"{data}, {backbone}: {protocol}",
                "anchor": _slug(f"{data}-{backbone}-{protocol}"),
                "plots": page.plots_of(found, main, f"{data} {backbone} {protocol}"),
                "tables": [page.results(found, main, f"{data} {backbone} {protocol}")],
                "published": page.published(found, data, backbone, protocol),
            }
        )
    overall = page.overall(groups)
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((HERE / "report.html.j2").read_text(encoding="utf-8"))
    text = template.render(
        title=title,
        command=command,
        facts=_facts(rows),
        overall=overall,
        sections=sections,
        cells=None if cells_in is not None else page.cells(rows),
        cells_in=cells_in,
        failed=[(_where(row), row["error"]) for row in rows if "error" in row],
        skipped=_skipped(rows),
        svg=Markup,
    )
    with written_aside(out / "report.html") as aside:
        aside.write_text(text, encoding="utf-8")
    return out / "report.html"


def check_installed() -> None:
    """Raise ClipadaptError if what a report needs is not installed."""
    for module in ("jinja2", "matplotlib"):
        if find_spec(module) is None:
            raise ClipadaptError(f"A report needs {module}: pip install 'clipadapt[bench]', or give --no-report.")


class _Page:
    """Makes plots and tables, and writes each to its own file as well."""

    def __init__(self, out: Path, figures: Any, brief: bool = False) -> None:
        self.out, self.figures, self.brief = out, figures, brief
        for folder in ("tables",) if brief else ("figures", "tables"):
            (out / folder).mkdir(parents=True, exist_ok=True)

    # -- all data sets together -------------------------------------------------------------------------------------

    def overall(self, groups: Mapping[tuple[str, str, str], list[Row]]) -> list[dict[str, Any]]:
        """For each protocol: methods over all blocks on which all of them ran, ranked and compared with zero-shot."""
        by_protocol: dict[str, dict[str, dict[tuple[Any, ...], list[float]]]] = {}
        for (data, backbone, protocol), rows in groups.items():
            main = next((name for name in MAIN if name in rows[0]["figures"]), None)
            for row in rows if main else ():
                block = (data, backbone, json.dumps(row["options"], sort_keys=True))
                scores = by_protocol.setdefault(protocol, {}).setdefault(row["label"], {})
                scores.setdefault(block, []).append(row["figures"][main])
        found = []
        for protocol, methods in by_protocol.items():
            every = {block for blocks_of in methods.values() for block in blocks_of}
            complete = {m: s for m, s in methods.items() if s.keys() == every}
            partial = sorted(methods.keys() - complete.keys())
            if len(complete) < 2 or len(every) < 2:
                continue
            blocks = sorted(every)
            means = {m: [fmean(s[b]) for b in blocks] for m, s in complete.items()}
            found.append(self._ranking(protocol, means, len(blocks), partial))
        return found

    def _ranking(
        self, protocol: str, scores: dict[str, list[float]], blocks: int, partial: list[str]
    ) -> dict[str, Any]:
        ranking = rank(scores)
        base = scores.get("zero-shot")
        body = []
        for method, place in ranking.ranks.items():
            line = [method, f"{place:.2f}", _percent(fmean(scores[method]))]
            if base is not None and method != "zero-shot":
                d = compare(scores[method], base)
                bounds = f"{100 * d.interval[0]:+.1f} to {100 * d.interval[1]:+.1f}"
                p = ranking.p.get((method, "zero-shot"), ranking.p.get(("zero-shot", method), 1.0))
                verdict = "within noise" if p > 0.05 else "better" if d.mean > 0 else "worse"
                line += [f"{100 * d.mean:+.1f}", bounds, f"{d.wins} / {d.ties} / {d.losses}"]
                line += [f"{p:.3f}" if p >= 0.001 else "< 0.001", verdict]
            else:
                line += ["–"] * 5
            body.append(line)
        head = ["method", "mean rank", "mean", "against zero-shot", "95 % interval", "wins / ties / losses", "p", ""]
        caption = (
            f"{protocol}: {len(scores)} methods on {blocks} blocks (data set x backbone x options, seeds averaged). "
            "p: Wilcoxon's signed-rank test, corrected by Holm for all pairs of methods."
        )
        if partial:
            caption += f" Not on all blocks, so left out: {', '.join(partial)}."
        table = self._table(f"ranks {protocol}", caption, head, body)
        plots = []
        if len(ranking.ranks) <= 40:
            alt = (
                f"Mean ranks of {len(scores)} methods, {next(iter(ranking.ranks))} first; connected ones do not differ."
            )
            title = f"{protocol}: mean ranks over {blocks} blocks"
            plots.append(self._plot(f"ranks {protocol}", alt, self.figures.ranks(ranking, title=title)))
        return {
            "heading": f"All data: {protocol}",
            "anchor": _slug(f"all-{protocol}"),
            "plots": plots,
            "tables": [table],
        }

    # -- one data set, backbone and protocol ------------------------------------------------------------------------

    def plots_of(self, rows: list[Row], main: str, where: str) -> list[Plot]:
        """Curves over an option that varies, accuracy against costs, classes, reliability; if brief, the first two."""
        best = _best(rows, main)
        plots = []
        for option in _varying(rows):
            lines: dict[str, dict[float, list[float]]] = {m: defaultdict(list) for m in best[:SHOWN]}
            for row in rows:
                if row["label"] in lines:
                    lines[row["label"]][row["options"][option]].append(row["figures"][main])
            drawn = self.figures.curves(lines, x=option, y=f"{main} in %", title=where)
            alt = f"{main} over {option} of the {len(lines)} best methods on {where}; best at the end: {best[0]}."
            plots.append(self._plot(f"curve {option} {where}", alt, drawn))
        last = _at_largest(rows)
        for cost, label in list(COSTS.items())[: 1 if self.brief else None]:
            points = {
                method: (fmean(r[cost] for r in mine), fmean(r["figures"][main] for r in mine))
                for method, mine in _by_label(last).items()
            }
            drawn = self.figures.pareto(points, x=label, y=f"{main} in %", title=where)
            if len({cost for cost, _ in points.values()}) < 2:
                continue  # all cost the same, mostly nothing
            front = self.figures.front(points)
            some = ", ".join(front[-8:]) + f" and {len(front) - 8} worse and cheaper ones" * (len(front) > 8)
            alt = f"{main} against {label} on {where}; none is better and cheaper than {some}."
            plots.append(self._plot(f"cost {cost} {where}", alt, drawn))
        if self.brief:
            return plots
        classes = {
            method: {c: fmean(r["per_class"][c] for r in mine if c in r["per_class"]) for c in mine[0]["per_class"]}
            for method, mine in _by_label(last).items()
            if method in best[:20] and all(r.get("per_class") for r in mine)
        }
        if classes:
            hardest = min(next(iter(classes.values())).items(), key=lambda item: item[1])[0]
            alt = (
                f"Accuracy of each class by {len(classes)} methods on {where}; the hardest for the first is {hardest}."
            )
            ordered = {m: classes[m] for m in best if m in classes}
            plots.append(self._plot(f"classes {where}", alt, self.figures.heat_map(ordered, title=where)))
        bins = {
            method: mine[0]["details"]["reliability"]
            for method, mine in _by_label(last).items()
            if method in best[:6] and "reliability" in mine[0].get("details", {})
        }
        if bins:
            alt = f"Accuracy against confidence of {', '.join(bins)} on {where}."
            plots.append(self._plot(f"reliability {where}", alt, self.figures.reliability(bins, title=where)))
        return plots

    def results(self, rows: list[Row], main: str, where: str) -> Table:
        """Each method at each set of options: figures, mean with standard interval over seeds, and costs."""
        names = list(rows[0]["figures"])
        options = _varying(rows)
        body = []
        for (label, *_), mine in sorted(_by(rows, lambda r: (r["label"], *_values(r, options))).items()):
            values = [row["figures"][main] for row in mine]
            low, high = bootstrap_interval(values)
            line = [label, *(str(v) for v in _values(mine[0], options)), str(len(mine)), _percent(fmean(values))]
            line.append(f"{100 * low:.1f}–{100 * high:.1f}" if len(values) > 1 else "–")
            line += [f"{100 * fmean(r['figures'][n] for r in mine):.1f}" for n in names if n != main]
            line.append(f"{fmean(r['seconds'] for r in mine):.2f}")
            line.append(f"{max(r['peak_mib'] for r in mine):.0f}")
            line.append(f"{mine[0]['trained_parameters']:,}")
            body.append(line)
        head = ["method", *options, "seeds", f"{main}, %", "over seeds", *(f"{n}, %" for n in names if n != main)]
        head += ["seconds", "peak MiB", "trained"]
        caption = f"{where}: means over seeds; 'over seeds' is a 95 % bootstrap interval of the mean."
        return self._table(f"results {where}", caption, head, body)

    def published(self, rows: list[Row], data: str, backbone: str, protocol: str) -> Table | None:
        """What others published for the same methods on this data set, next to ours."""
        setting = {"few-shot": "few-shot", "base-to-new": "base-to-new"}.get(protocol, protocol)
        ours = _by(rows, lambda r: (r["label"], r["options"].get("shots")))
        body = []
        for label, method in sorted({(row["label"], row["method"]) for row in rows}):
            for p in beside(method, data, setting):
                mine = ours.get((label, p.shots), ours.get((label, None), []))
                figure = {"top1": "accuracy", "H": "harmonic"}.get(p.metric, p.metric)
                values = [row["figures"][figure] for row in mine if figure in row["figures"]]
                own = f"{100 * fmean(values):.1f} ({backbone})" if values else "–"
                shots, theirs = "" if p.shots is None else str(p.shots), f"{p.value:.1f} ({p.backbone})"
                body.append([label, shots, p.metric, own, theirs, p.method, p.source, p.caveat])
        if not body:
            return None
        head = ["method", "shots", "metric", "ours", "published", "as", "source", "caveat"]
        caption = f"{data}: figures published by others, on their own backbones; not ours, and not averaged."
        return self._table(f"published {data} {protocol}", caption, head, body)

    def cells(self, rows: Sequence[Row]) -> Table:
        """Every cell, with what repeats it."""
        body = []
        for row in rows:
            if "figures" in row:
                figures = ", ".join(f"{name} {100 * value:.1f}" for name, value in row["figures"].items())
                place = [row["data"], row["backbone"], row["protocol"], row["label"]]
                body.append([*place, options_of(row), str(row["seed"]), row["cell"], figures])
        head = ["data", "backbone", "protocol", "method", "options", "seed", "cell", "figures in %"]
        caption = "Every cell. Add --only CELL to the command above to run one again."
        return self._table("cells", caption, head, body)

    # -- files ------------------------------------------------------------------------------------------------------

    def _plot(self, name: str, alt: str, figure: Any) -> Plot:
        file = self.out / "figures" / _slug(name)
        text = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))  # so that equal plots are equal files
        figure.savefig(text, format="svg", metadata=nothing)
        svg = text.getvalue()
        if not self.brief:
            figure.savefig(file.with_suffix(".png"), dpi=150)
            file.with_suffix(".svg").write_text(svg, encoding="utf-8")
        inline = re.sub(r' d="[^"]*"', _round, svg[svg.index("<svg") :])
        for mark in ('id="', "url(#", 'href="#'):  # ids must differ between the plots of one page
            inline = inline.replace(mark, f"{mark}{_slug(name)}-")
        return Plot(_slug(name), alt, inline)

    def _table(self, name: str, caption: str, head: list[str], rows: list[list[str]]) -> Table:
        file = self.out / "tables" / _slug(name)
        with open(file.with_suffix(".csv"), "w", encoding="utf-8", newline="") as out:
            csv.writer(out).writerows([head, *rows])
        if self.brief:
            return Table(_slug(name), caption, head, rows)
        lines = [head, ["---"] * len(head), *rows]
        file.with_suffix(".md").write_text("".join(f"| {' | '.join(line)} |\n" for line in lines), encoding="utf-8")
        file.with_suffix(".tex").write_text(_latex(caption, head, rows), encoding="utf-8")
        return Table(_slug(name), caption, head, rows)


def _round(path: re.Match[str]) -> str:
    """An outline to a hundredth of a point, which is not visible."""
    return re.sub(r"(\.\d\d)\d+", r"\1", path[0])


def _latex(caption: str, head: list[str], rows: list[list[str]]) -> str:
    def escaped(cell: str) -> str:
        for char in "&%$#_{}":
            cell = cell.replace(char, "\\" + char)
        return cell.replace("–", "--")

    body = [" & ".join(map(escaped, line)) + r" \\" for line in rows]
    lines = [r"\begin{table}", r"\centering", rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}", r"\toprule"]
    lines += [" & ".join(map(escaped, head)) + r" \\", r"\midrule", *body, r"\bottomrule", r"\end{tabular}"]
    return "\n".join([*lines, rf"\caption{{{escaped(caption)}}}", r"\end{table}", ""])


def _group(rows: Iterable[Row]) -> dict[tuple[str, str, str], list[Row]]:
    return _by(rows, lambda row: (row["data"], row["backbone"], row["protocol"]))


def _by(rows: Iterable[Row], key: Callable[[Row], Any]) -> dict[Any, list[Row]]:
    found: dict[Any, list[Row]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return found


def _by_label(rows: Iterable[Row]) -> dict[str, list[Row]]:
    return _by(rows, lambda row: row["label"])


def _varying(rows: Sequence[Row]) -> list[str]:
    """The options that have several values, numbers all of them."""
    names = rows[0]["options"]
    values = {name: {json.dumps(row["options"][name]) for row in rows} for name in names}
    number = {n for n in names if all(isinstance(r["options"][n], int | float) for r in rows)}
    return [name for name in names if len(values[name]) > 1 and name in number]


def _values(row: Row, options: Sequence[str]) -> tuple[Any, ...]:
    return tuple(row["options"][name] for name in options)


def _at_largest(rows: Sequence[Row]) -> list[Row]:
    """The rows at the largest value of every option that varies, such as 16 shots."""
    options = _varying(rows)
    largest = tuple(max(row["options"][name] for row in rows) for name in options)
    return [row for row in rows if _values(row, options) == largest]


def _best(rows: Sequence[Row], main: str) -> list[str]:
    """Methods by their mean at the largest options; zero-shot is always among those shown."""
    means = {m: fmean(r["figures"][main] for r in mine) for m, mine in _by_label(_at_largest(rows)).items()}
    order = sorted(means, key=lambda m: (-means[m], m))
    if "zero-shot" in order[SHOWN:]:
        order.remove("zero-shot")
        order.insert(SHOWN - 1, "zero-shot")
    return order


def _facts(rows: Sequence[Row]) -> dict[str, str]:
    """What all rows share of their versions and machine."""
    names = ("clipadapt", "git", "torch", "transformers", "python", "machine", "threads")
    values = {name: sorted({str(row[name]) for row in rows if row.get(name) is not None}) for name in names}
    done = sum("figures" in row for row in rows)
    return {"cells": f"{done} of {len(rows)}"} | {name: ", ".join(v) for name, v in values.items() if v}


def _skipped(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Why methods do not occur on a data set, each reason once."""
    found = {(f"{r['data']}, {r['backbone']}, {r['protocol']}", r["skipped"]) for r in rows if "skipped" in r}
    return sorted(found)


def _where(row: Row) -> str:
    return f"{row['data']}, {row['backbone']}, {row['protocol']} {options_of(row)}, {row['label']}, seed {row['seed']}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _slug(text: str) -> str:
    return "-".join("".join(c if c.isalnum() or c == "." else " " for c in text.lower()).replace(".", "-").split())
