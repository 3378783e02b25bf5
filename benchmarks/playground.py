"""Playground pictures per minute on one core, by size and by style.

    python benchmarks/playground.py [PICTURES]

Prints JSON lines. Scenes are complete: picture, captions, boxes and masks.
"""

from __future__ import annotations

import json
import platform
import sys
import time

from clipadapt.data.playground.drawing import STYLES, Playground


def per_minute(world: Playground, pictures: int) -> int:
    """Scenes per minute of this process's own CPU time."""
    world.scene(0)
    start = time.process_time()
    for index in range(pictures):
        world.scene(index)
    return round(60 * pictures / (time.process_time() - start))


if __name__ == "__main__":
    pictures = int(sys.argv[1]) if len(sys.argv) > 1 else 500
    machine = f"{platform.machine()}, Python {platform.python_version()}"
    for size in (48, 64, 128, 224):
        rate = per_minute(Playground(size=size), pictures)
        print(json.dumps({"size": size, "style": "all", "scenes_per_minute": rate, "machine": machine}))
    for style in STYLES:
        rate = per_minute(Playground(styles=(style,)), pictures)
        print(json.dumps({"size": 64, "style": style, "scenes_per_minute": rate, "machine": machine}))
