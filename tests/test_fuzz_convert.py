"""A short run of the fuzzer, and proof that it would find something."""

import os
import subprocess
import time
from functools import partial
from pathlib import Path

import fuzz_convert
import pytest
from fuzz_convert import Finding, Target, attempt, fuzz, make_targets

from mlx_specstream.errors import BadCheckpoint


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    return make_targets(tmp_path_factory.mktemp("fuzz"))


def test_nothing_is_found_in_a_short_run(targets):
    counts = fuzz(6000, 1, targets)
    assert sum(counts.values()) == 6000 + sum(len(t.seeds) for t in targets.values())
    for name, target in targets.items():  # readers meet both kinds of input
        least = 20 if target.share > 0.02 else 5
        assert counts[name, "refused"] > least, name
        assert counts[name, "taken"] > least, name


def test_the_same_seed_makes_the_same_inputs():
    runs = []
    for seed in (3, 3, 4):
        inputs = []
        fuzz(50, seed, {"x": Target(inputs.append, [b'{"a": [1, 2]}', b"plain"], 1.0)})
        runs.append(inputs)
    assert runs[0] == runs[1] != runs[2]


def crash(data):
    raise KeyError("unforeseen")


def spin(data):
    while True:
        time.process_time()


def run_code(data):
    exec("pass")


FAULTS = {
    "crash": (crash, "KeyError"),
    "hang": (spin, "longer than"),
    "code": (run_code, "of code"),
    "program": (lambda data: subprocess.run(["true"], check=True), "Popen|posix_spawn|os.fork"),
    "shell": (lambda data: os.system("true"), "os.system"),
    "write": (lambda data: Path("stray").write_text("x"), "opens .* for writing"),
    "folder": (lambda data: os.mkdir("stray"), "os.mkdir"),
    "removal": (lambda data: os.remove("stray"), "os.remove"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_reader_is_found(fault, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fuzz_convert, "SECONDS", 0.2)
    read, words = FAULTS[fault]
    with pytest.raises(Finding, match=words):
        fuzz(1, 0, {"x": Target(partial(calls, read), [b"first", b"second"], 1.0)})
    assert list(tmp_path.iterdir()) == []


def calls(read, data):
    """Faulty for all but the first seed, with which the fuzzer warms up."""
    if data != b"first":
        read(data)


def test_refusals_are_no_findings():
    def refuse(data):
        raise BadCheckpoint("no")

    fuzz(0, 0, {})
    assert attempt(Target(refuse, [b"x"], 1.0), b"x") == "refused"
