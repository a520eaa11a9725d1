"""The main job on the embedded checkpoint: train, extract, edit, compare, audit.

    accelerate launch recipes/quickstart.py

Runs the five recipes one after the other, with the commands it prints; each reads the previous one's
files. `--run FOLDER` chooses the run folder (runs/quickstart); run again, it goes on where it stopped.
"""

import runpy
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
STAGES = ("train", "extract", "edit", "compare", "audit")


def main() -> None:
    arguments = sys.argv[1:] or ["--run", "runs/quickstart"]
    timings = []
    for verb in STAGES:
        command = [
            f"recipes/{verb}.py",
            "--config",
            str(HERE / "python" / f"{verb}.yaml"),
            *arguments,
        ]
        sys.stderr.write(f"\n$ accelerate launch {' '.join(command)}\n")
        started = time.monotonic()
        sys.argv = command
        runpy.run_path(str(HERE / f"{verb}.py"), run_name="__main__")
        timings.append(f"{verb} {time.monotonic() - started:.0f} s")
    sys.stderr.write(f"\n{', '.join(timings)}\n")


if __name__ == "__main__":
    main()
