"""Test, tune and measure on this machine, and put it all into one report to share: ``make mac-report``.

    python benchmarks/mac_report.py --bundled build/e2e-sql-14m [--model M] [--streams S]

Made for Macs, which this project has none of; it works on Linux too. Writes build/mac-report.html and
build/mac-report.json: figures and token ids, no text, no names of folders above the model's. What fails
is said in the report, and the exit code is 1.
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

from mlx_specstream.files import write_text
from mlx_specstream.measure.report import page

ROOT = Path(__file__).resolve().parents[1]
STREAMS = ROOT / "examples/streams/e2e-sql-14m"
PROMPTS = (
    ROOT / "benchmarks/e2e-sql.jsonl"
)  # what the bundled model can do; other text makes it loop


def self_test() -> dict:
    """Run the tests, showing their output; the last line and the names of what failed."""
    lines = []
    with subprocess.Popen(
        [sys.executable, "-m", "pytest", "-rfE"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as tests:
        for line in tests.stdout:
            print(line, end="", flush=True)
            lines.append(line.strip())
    failed = [m[1] for line in lines if (m := re.match(r"(?:FAILED|ERROR) (\S+::\S+)", line))]
    return {
        "ok": tests.returncode == 0,
        "summary": next((line for line in reversed(lines) if " in " in line), "no result"),
        "failed": failed,
    }


def command(*argv) -> bool:
    """Run a command of ours, its output shown; did it work?"""
    shown = [str(a) for a in argv]
    print(f"\n$ mlx-specstream {' '.join(shown)}", flush=True)
    return subprocess.run([sys.executable, "-m", "mlx_specstream", *shown]).returncode == 0


def measure(folder: Path, name: str, model: list, prompts: list, notes: list[str]) -> list[dict]:
    """Tune, then bench; the results, or none and a note."""
    tuned, out = folder / f"{name}-tune.json", folder / f"{name}.json"
    for old in (tuned, out):
        old.unlink(missing_ok=True)
    if command("tune", *model, "--json", tuned):
        prompts = [*prompts, "--tune", tuned]
    else:
        notes.append(f"{name}: tune failed")
    if command("bench", *model, *prompts, "--json", out):
        return [json.loads(out.read_text(encoding="utf-8"))]
    notes.append(f"{name}: bench failed")
    return []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundled", required=True, help="the bundled model, as make demo makes it")
    parser.add_argument("--model", help="a model of your own, too: a folder or a hub id")
    parser.add_argument("--streams", help="its streams, if they lie elsewhere")
    parser.add_argument("--out", type=Path, default=ROOT / "build/mac-report")
    args = parser.parse_args()
    if args.streams and not args.model:
        parser.error("--streams needs --model")

    args.out.mkdir(parents=True, exist_ok=True)
    tests = self_test()
    notes: list[str] = []
    bundled = ["--model", args.bundled, "--streams", STREAMS]
    results = measure(args.out, "bundled", bundled, ["--data", PROMPTS], notes)
    if args.model:
        own = ["--model", args.model, *(["--streams", args.streams] if args.streams else [])]
        results += measure(args.out, "model", own, [], notes)
    said = f"Self-test: {tests['summary'].strip('= ')}"
    lines = [said, *(f"failed: {name}" for name in tests["failed"]), *notes]
    everything = {"self_test": tests, "notes": notes, "results": results}
    report = args.out.with_name(f"{args.out.name}.html")
    write_text(report.with_suffix(".json"), json.dumps(everything, indent=1) + "\n")
    write_text(report, page(results, lines))
    print(f"\n{report} and {report.with_suffix('.json').name}: please share them.")
    return 0 if tests["ok"] and not notes else 1


if __name__ == "__main__":
    sys.exit(main())
