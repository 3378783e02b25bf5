"""Contrastive training started by the usual launchers, as people start it: two processes give what one gives."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from clipadapt.training.contrastive import train_contrastive
from tests.training.test_contrastive import RECIPE, Squares, fresh, weights

SCRIPT = """
import sys
from dataclasses import replace
from pathlib import Path

from accelerate import PartialState

from clipadapt.training.contrastive import train_contrastive
from tests.training.test_contrastive import RECIPE, Squares, fresh

train_contrastive(fresh(), Squares(), replace(RECIPE, steps=2), sys.argv[1])
Path(sys.argv[1], f"process-{PartialState().process_index}").touch()
"""
LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node=2"],
    "accelerate-fsdp": [
        *("accelerate.commands.launch", "--num_processes=2", "--main_process_port=0"),
        *("--use_fsdp", "--fsdp_version=2"),
    ],
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_launched_processes_equal_one(launcher, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    root = Path(__file__).parents[2]
    outside = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST", "ACCELERATE"))}
    environment = outside | {"PYTHONPATH": os.pathsep.join([str(root / "src"), str(root)]), "OMP_NUM_THREADS": "1"}
    # A free port that a launcher picks may be taken by the time that its processes are up; a standalone rendezvous
    # holds its port from the start.
    environment |= {"ACCELERATE_USE_CPU": "true", "PET_STANDALONE": "1"}
    command = [sys.executable, "-m", *LAUNCHERS[launcher], str(script), str(tmp_path / "two")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(file.name for file in (tmp_path / "two").glob("process-*")) == ["process-0", "process-1"]
    train_contrastive(fresh(), Squares(), replace(RECIPE, steps=2), tmp_path / "one")
    assert (weights(tmp_path / "one") - weights(tmp_path / "two")).abs().max() <= 1e-5
