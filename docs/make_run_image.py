"""Draws docs/run.svg: what a real run of the main job prints, in colour, exactly as it came.

python docs/make_run_image.py PHOTOS [OPTIONS...]     # everything after the script goes to `clipadapt adapt`
"""

from __future__ import annotations

import io
import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

WIDTH = 88


def still(progress: str) -> str:
    """The lines that stay when progress bars and spinners have gone, without control codes."""
    lines = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", line).rstrip() for line in progress.split("\n")]
    moving = re.compile("[\u2500-\u257f\u2800-\u28ff]")  # box drawing and braille
    return "".join(f"{line}\n" for line in lines if line and not moving.search(line))


def main() -> None:
    arguments = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"FORCE_COLOR": "1", "COLUMNS": str(WIDTH), "CLIPADAPT_CACHE": f"{folder}/cache"}
        command = [sys.executable, "-m", "clipadapt.cli", "adapt", *arguments, "--out", f"{folder}/model"]
        run = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        printed = (still(run.stderr) + run.stdout).replace(f"{folder}/", "")
    shown = [Path(arguments[0]).name, *arguments[1:]]
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(Text(f"$ clipadapt adapt {shlex.join(shown)} --out model/", style="bold"))
    console.print(Text.from_ansi(printed))
    image = Path(__file__).with_name("run.svg")
    image.write_text(console.export_svg(title="clipadapt adapt"))
    print(image)


if __name__ == "__main__":
    main()
