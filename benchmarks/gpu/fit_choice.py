"""Fits the constants of the Hopper engine's choice of a kernel to a file of sweep.py; prints them for ``kH200`` in sm90/choose.cpp.

python -m benchmarks.gpu.fit_choice benchmarks/gpu/h200_sweep.json --rounds 3000
"""

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
SOURCES = ["tests/sm90_choice.cpp", "cuda/engine/sm90/igemm.cpp", "cuda/engine/sm90/choose.cpp", "cuda/engine/choose.cpp"]


def rows_of(path: Path) -> str:
    """The rows as tests/sm90_choice.cpp reads them."""
    lines = []
    for row in json.loads(path.read_text())["rows"]:
        shape = list(row["shape"])
        if row["op"] == "conv2d":  # without the groups
            shape = shape[:7] + shape[8:]
        times = (f"{name} {us}" for name, us in row["us"].items())
        lines.append(" ".join([row["op"], *map(str, shape), *times, "."]))
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path)
    parser.add_argument("--rounds", type=int, default=3000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        program = f"{folder}/choice"
        subprocess.run(["g++", "-std=c++20", "-O2", "-w", "-Icpp", "-Icuda", *SOURCES, "-o", program], check=True, cwd=ROOT)
        subprocess.run([program, "fit", str(options.rounds)], input=rows_of(options.sweep), text=True, check=True)


if __name__ == "__main__":
    main()
