"""Runs a suite: cells in worker processes, one JSON line each, what is done already is not done again.

`results.jsonl` in the output folder has a line for each cell: what was run (data, backbone, protocol, options, method,
hyper-parameters, seed), with which versions and revision, and either the figures, or `error` (it failed; it is tried
again next time), or `skipped` (it cannot be: the method needs what the backbone lacks). Features are encoded once and
shared through the cache. A cell that fails, hangs or runs out of memory affects no other: its worker is replaced.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict
from functools import lru_cache, partial
from hashlib import blake2b
from itertools import count
from pathlib import Path
from typing import Any

from clipadapt.backbones import load_backbone
from clipadapt.backbones.published import PublishedFeatures
from clipadapt.data import Split
from clipadapt.data.definitions.definition import DATA, Loaded, definition, load
from clipadapt.errors import ClipadaptError
from clipadapt.evaluation.bench.suite import Cell, Suite, cells
from clipadapt.evaluation.protocol import NotApplicable, protocol
from clipadapt.features import encode_images
from clipadapt.jobs import Processes, RayTasks, Work, side_by_side, threads_each
from clipadapt.methods.loading import from_recipe

Row = dict[str, Any]
Tell = Callable[[str], None]


def run_suite(
    suite: Suite,
    out: Path,
    *,
    root: Path | None = None,
    jobs: int = 1,
    threads: int | None = None,
    ray: str | None = None,
    only: str | None = None,
    tell: Tell = lambda line: None,
) -> list[Row]:
    """Run the cells that `out`/results.jsonl lacks; all rows of the suite, in its order.

    Args:
        root: the folder of the data sets.
        jobs: cells at a time.
        threads: threads of each, by default the cores shared out among the jobs.
        ray: run the cells on a Ray cluster: its address, "auto" for the one that runs here, or "local" for one of this
            run's own. Needs the extra `[ray]`; a cluster's machines need this library, and `root` and the cache in the
            same place. Waiting for a free machine counts for a cell's time, so let `jobs` be what runs at once.
        only: the identity of a cell (or how it begins): it alone is run, even if it was run before.
        tell: gets a line for each cell that ends.
    """
    out.mkdir(parents=True, exist_ok=True)
    file = out / "results.jsonl"
    done = {row["cell"]: row for row in read_rows(file) if "error" not in row}
    threads = threads or threads_each(jobs)
    facts = versions() | {"suite": suite.name, "threads": threads}
    plan: list[tuple[str, Cell, Row | None]] = []  # a cell's identity, itself, and its row where it is known already
    fingerprints: dict[tuple[str, str], tuple[str, str] | ClipadaptError | OSError] = {}
    for cell in cells(suite):
        place = (cell.data, cell.backbone)
        if place not in fingerprints:
            fingerprints[place] = _fingerprints(cell, root)
        found = fingerprints[place]
        if isinstance(found, Exception):
            row = (
                facts
                | asdict(cell)
                | {"cell": cell.identity(cell.data, ""), "error": f"{type(found).__name__}: {found}"}
            )
            plan.append((row["cell"], cell, row))
            tell(one_line(row))
        else:
            identity = cell.identity(*found)
            plan.append((identity, cell, done.get(identity)))
    if only is not None:
        plan = [(identity, cell, None) for identity, cell, _ in plan if identity.startswith(only)]
        if not plan:
            raise ClipadaptError(f"{suite.name} has no cell {only!r}; results.jsonl and the report list the names.")
    rows = {identity: known for identity, _, known in plan if known is not None}
    waiting: dict[str, dict[str, Cell]] = {}  # cells with one result between them, by the identity of the one to run
    for identity, cell, known in plan:
        if known is None:
            found = fingerprints[cell.data, cell.backbone]
            assert isinstance(found, tuple)
            waiting.setdefault(cell.stand_in.identity(*found), {})[identity] = cell
    total, number = sum(map(len, waiting.values())), count(1)
    stand_ins = {identity: next(iter(group.values())).stand_in for identity, group in waiting.items()}
    for data, backbone in dict.fromkeys((cell.data, cell.backbone) for cell in stand_ins.values()):
        tell(f"encoding {data} with {backbone}")
        _encode(next(c for c in stand_ins.values() if (c.data, c.backbone) == (data, backbone)), root)
    run = _runner(root, threads, jobs, suite.timeout, ray)
    _drop_half_line(file)
    with open(file, "a", encoding="utf-8") as lines, closing(run), closing(side_by_side(run, stand_ins, jobs)) as ended:
        for one, result in ended:
            found = fingerprints[stand_ins[one].data, stand_ins[one].backbone]
            assert isinstance(found, tuple)
            places = {"data_fingerprint": found[0], "backbone_fingerprint": found[1]}
            for identity, cell in waiting[one].items():
                rows[identity] = facts | asdict(cell) | places | {"cell": identity} | result
                lines.write(json.dumps(rows[identity], ensure_ascii=False) + "\n")
                lines.flush()
                tell(f"[{next(number)}/{total}] {one_line(rows[identity])}")
    return [rows[identity] | asdict(cell) for identity, cell, _ in plan]  # the same run may have two labels


def read_rows(file: Path) -> list[Row]:
    """The rows of a results file; a last line that was cut off is left out."""
    if not file.exists():
        return []
    rows = []
    lines = file.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise ClipadaptError(f"{file}, line {number} is damaged: it is not JSON.") from None
    return rows


def one_line(row: Row) -> str:
    """A cell and its result, in words."""
    where = f"{row['data']} {row['backbone']} {row['protocol']} {options_of(row)} {row['label']} seed {row['seed']}"
    if "figures" in row:
        result = ", ".join(f"{name} {value:.3f}" for name, value in row["figures"].items())
    else:
        result = f"failed: {row['error']}" if "error" in row else f"skipped: {row['skipped']}"
    return f"{where}: {result}"


def options_of(row: Mapping[str, Any]) -> str:
    """A cell's options in words; long ones, such as lists of names, are cut."""
    texts = ((name, json.dumps(value, ensure_ascii=False)) for name, value in row["options"].items())
    return " ".join(f"{name}={text if len(text) <= 40 else text[:37] + '...'}" for name, text in texts)


def versions() -> Row:
    """What the figures depend on besides the cell."""
    import torch
    import transformers

    import clipadapt

    return {
        "clipadapt": clipadapt.__version__,
        "git": _revision(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
    }


def run_cell(cell: Cell, root: Path | None, threads: int) -> Row:
    """One cell in this process: its figures, or why it was skipped or failed."""
    import torch

    torch.set_num_threads(threads)
    _peak_mib(reset=True)
    try:
        loaded, backbone = _load(cell, root)
        method = from_recipe({"method": cell.method, "hyperparameters": cell.hyperparameters})
        begun = time.perf_counter()
        with _data_in(root):
            outcome = protocol(cell.protocol)(method, backbone, loaded.split, cell.seed, **cell.options)
    except NotApplicable as error:
        return {"skipped": str(error)}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {
        "figures": outcome.figures,
        "per_class": outcome.per_class,
        "details": outcome.details,
        "seconds": outcome.seconds,
        "judging_seconds": time.perf_counter() - begun - outcome.seconds,
        "peak_mib": _peak_mib(),
        "trained_parameters": outcome.model.trained_parameters,
    }


@contextmanager
def _data_in(root: Path | None) -> Iterator[None]:
    """Protocols that read other data sets find them in `root`; the caller's own environment is put back."""
    before = os.environ.get(DATA)
    if root is not None:
        os.environ[DATA] = str(root)
    try:
        yield
    finally:
        if before is not None:
            os.environ[DATA] = before
        else:
            os.environ.pop(DATA, None)


def _peak_mib(reset: bool = False) -> float:
    """Largest resident memory of this process since the last reset; since its start where the system has no reset."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) / 2**10
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


# -- data and backbones ----------------------------------------------------------------------------------------------


def _load(cell: Cell, root: Path | None) -> tuple[Loaded, Any]:
    return _load_once(cell.data, cell.backbone, cell.published, root)


@lru_cache(maxsize=2)  # cells of the same data come one after another
def _load_once(data: str, source: str, published: bool, root: Path | None) -> tuple[Loaded, Any]:
    loaded = load(data, root, source if published else None)
    if loaded.class_features is not None:
        return loaded, PublishedFeatures(source, loaded.class_features, loaded.logit_scale)
    return loaded, load_backbone(source)


def _fingerprints(cell: Cell, root: Path | None) -> tuple[str, str] | ClipadaptError | OSError:
    """(of the data, of the backbone), or what is wrong with them."""
    try:
        loaded, backbone = _load(cell, root)
        return _content(cell, loaded.split, root), backbone.fingerprint
    except (ClipadaptError, OSError) as error:
        return error


def _content(cell: Cell, split: Split, root: Path | None) -> str:
    """What a split consists of: which images, by name, with which labels; the files are not read."""
    digest = blake2b(definition(cell.data).name.encode(), digest_size=16)
    base = str(root.resolve()) if root is not None else ""
    for data in (split.train, split.val, split.test):
        names = [str(Path(name).resolve()).removeprefix(base) if base in name else name for name in data.paths]
        digest.update(json.dumps([names, data.labels, data.class_names, data.domains]).encode())
    return digest.hexdigest()


def _encode(cell: Cell, root: Path | None) -> None:
    """Features into the cache, so that no cell waits for them; what cannot be read fails in its own cells."""
    try:
        loaded, backbone = _load(cell, root)
        for data in (loaded.split.train, loaded.split.val, loaded.split.test):
            encode_images(backbone, data, progress=True, on_error="skip")
    except (ClipadaptError, OSError):
        pass


# -- where cells run -------------------------------------------------------------------------------------------------


def _runner(root: Path | None, threads: int, jobs: int, timeout: float, ray: str | None) -> Any:
    if ray:
        return RayTasks(ray, _worker(root, threads), threads=threads, jobs=jobs, timeout=timeout)
    # Workers are forked from a process that has the imports already, which take most of a short cell's time.
    preload = ("clipadapt.evaluation.bench.run", "transformers.models.clip")
    return Processes(partial(_worker, root, threads), timeout=timeout, preload=preload)


def _worker(root: Path | None, threads: int) -> Work:
    return partial(run_cell, root=root, threads=threads)


def _drop_half_line(file: Path) -> None:
    """Cut off what a killed run left of its last line."""
    if file.exists():
        content = file.read_bytes()
        if content and not content.endswith(b"\n"):
            file.write_bytes(content[: content.rfind(b"\n") + 1])


def _revision() -> str | None:
    """The commit of the library where it runs from its repository, with a + where it was changed since."""
    here = str(Path(__file__).parent)

    def git(*arguments: str) -> str:
        command = ["git", "-C", here, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "../../..") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
