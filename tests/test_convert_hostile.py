"""Conversions of a stranger's files: one line, exit code 2, no code run, nothing written, at once."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from hostile_files import CASES
from test_convert import copy_golden

from mlx_specstream.cli.main import main

LONGEST = 5.0  # seconds
LARGEST = 400 << 20  # bytes that a refusal may take; the readers' own limits come to less
MEMORY = Path("/proc/self/clear_refs")  # Linux: writing 5 forgets the peak


def peak() -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x)
    return int(line.split()[1]) << 10


def everything(folder: Path) -> dict:
    """What lies below a folder, and when files were written; nothing is followed or opened."""
    found = {}
    for top, folders, files in os.walk(folder):
        found |= dict.fromkeys(Path(top) / name for name in folders)
        found |= {Path(top) / name: (Path(top) / name).lstat().st_mtime_ns for name in files}
    return found


@pytest.fixture
def sandbox(tmp_path, monkeypatch):
    """A folder for everything, temporary files and the home included."""
    for name in ("home", "tmp"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return tmp_path


@pytest.fixture(scope="module", autouse=True)
def warm(tmp_path_factory):
    """A good conversion, so that no case pays for imports."""
    top = tmp_path_factory.mktemp("warm")
    argv = ["--hf-path", str(copy_golden(top / "hf")), "--mlx-path", str(top / "out")]
    assert main(["convert", *argv]) == 0


SLOW = ("pickle nests as a key", "pickle of endless steps", "pickle of endless lists")


def looks(case: str) -> bool:
    """Whether `inspect` is tried, too: it opens no tokenizer."""
    return case not in SLOW and not case.startswith("tokenizer")


@pytest.mark.parametrize(
    ("command", "case"),
    [("convert", case) for case in CASES] + [("inspect", case) for case in CASES if looks(case)],
)
def test_a_stranger_gets_one_line(case, command, sandbox, capsys):
    damage, words = CASES[case]
    folder = copy_golden(sandbox / "hf")
    damage(folder)
    before = everything(sandbox)
    argv = {
        "convert": [
            "convert",
            "--hf-path",
            str(folder),
            "--mlx-path",
            str(sandbox / "new" / "out"),
        ],
        "inspect": ["inspect", str(folder)],
    }
    if MEMORY.exists():
        MEMORY.write_text("5")
        least = peak()
    began = time.process_time()  # of this process alone; a busy machine does not fail the test
    assert main(argv[command]) == 2
    assert time.process_time() - began < LONGEST
    if MEMORY.exists():
        assert peak() - least < LARGEST
    assert everything(sandbox) == before
    assert not (sandbox / "canary").exists()
    errors = [x for x in capsys.readouterr().err.splitlines() if "error:" in x or "Trace" in x]
    assert len(errors) == 1
    assert errors[0].startswith("mlx-specstream: error: ")
    assert errors[0].isprintable()
    assert len(errors[0]) < 1100
    assert re.search(words, errors[0]), errors[0]


# A conversion that waits in the middle of writing, for a signal to arrive there.
WAITING = """
import pathlib, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background of a shell
import mlx_specstream.converters.shards as shards
from mlx_specstream.cli.main import main
def wait(path, *rest):
    pathlib.Path(path).write_bytes(b"half")
    pathlib.Path(sys.argv[1]).touch()
    time.sleep(60)
shards.write_safetensors = wait
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_leaves_what_was_there(number, code, sandbox):
    folder = copy_golden(sandbox / "hf", "qwen2")  # pickled: there is a staged file, too
    (sandbox / "old").mkdir()
    (sandbox / "old" / "model.safetensors").write_text("of an earlier conversion")
    before, ready = everything(sandbox), sandbox / "ready"
    argv = ["convert", "--hf-path", str(folder), "--mlx-path", str(sandbox / "new" / "out")]
    run = [sys.executable, "-c", WAITING, str(ready), *argv]
    with subprocess.Popen(run, stderr=subprocess.PIPE, text=True) as process:
        while not ready.exists() and process.poll() is None:
            time.sleep(0.02)
        assert any(sandbox.glob("new/.out.*/model.safetensors"))  # the litter that there could be
        process.send_signal(number)
        process.send_signal(number if number == signal.SIGTERM else signal.SIGCONT)
        errors = process.communicate(timeout=60)[1]
    assert process.returncode == code
    assert "Traceback" not in errors
    ready.unlink()
    assert everything(sandbox) == before
    assert main(argv) == 0  # and the next try works


def test_the_whole_program_refuses_within_seconds(sandbox):
    folder = copy_golden(sandbox / "hf")
    CASES["pickle runs code: REDUCE"][0](folder)
    run = [sys.executable, "-m", "mlx_specstream", "convert", "--hf-path", str(folder)]
    done = subprocess.run(
        [*run, "--mlx-path", str(sandbox / "out")], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert "os.system" in done.stderr
    assert not (sandbox / "canary").exists()
