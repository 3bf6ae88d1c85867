"""What it takes to refuse a stranger's file: the whole command on every hostile case of the tests.

    python benchmarks/refusals.py --out benchmarks/results/refusals.json

Each case is a process of its own; its peak is the largest resident set that the system saw, interpreter
and libraries included. A good conversion of the same small model is told beside them.
"""

import mlx_specstream  # noqa: F401  before mlx: it picks the BLAS  # isort: skip
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import about_machine

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from hostile_files import CASES
from test_convert import copy_golden

LONGEST = 5.0  # seconds of computing
UNIT = 1 if sys.platform == "darwin" else 1 << 10  # bytes of ru_maxrss


def attempt(folder: Path, room: Path) -> dict:
    """One conversion: exit code, lines of error, what it took."""
    before = sorted(os.listdir(room))
    argv = ["convert", "--hf-path", str(folder), "--mlx-path", str(room / "out")]
    began = time.perf_counter()
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlx_specstream", *argv],
            stdout=subprocess.DEVNULL,
            stderr=errors,
        )
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        errors.seek(0)
        lines = [line for line in errors.read().decode().splitlines() if "error: " in line]
    return {
        "exit_code": process.returncode,
        "error_lines": len(lines),
        "seconds": round(time.perf_counter() - began, 2),
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 2),
        "peak_bytes": used.ru_maxrss * UNIT,
        "left_behind": sorted(set(os.listdir(room)) - set(before)),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    results = {"machine": about_machine(), "cases": {}}
    for name, (damage, _) in {"a good folder": (lambda folder: None, ""), **CASES}.items():
        with tempfile.TemporaryDirectory() as room:
            folder = copy_golden(Path(room) / "hf")
            damage(folder)
            results["cases"][name] = row = attempt(folder, Path(room))
            print(f"{name}: {row['cpu_seconds']} s, {row['peak_bytes'] / 1e6:.0f} MB", flush=True)
    good = results["cases"].pop("a good folder")
    results["a good folder"] = good
    refused = {"exit_code": 2, "error_lines": 1, "left_behind": []}
    wrong = [
        name
        for name, row in results["cases"].items()
        if {k: row[k] for k in refused} != refused or row["cpu_seconds"] > LONGEST
    ]
    rows = results["cases"].values()
    results["worst"] = {k: max(row[k] for row in rows) for k in ("cpu_seconds", "peak_bytes")}
    print(f"{len(rows)} cases, worst {results['worst']}; wrong: {wrong or 'none'}")
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")
    if good["exit_code"] or wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
