"""Where kernels need a C++ compiler, passes run uncompiled until somebody has had them made."""

import os
import shutil
import subprocess
import sys
import tempfile

import mlx.core as mx
import pytest
from tiny_models import attached, make_tokenizer

from mlx_specstream import stream_generate
from mlx_specstream.decode import buckets, compiling
from mlx_specstream.decode.buckets import Buckets
from mlx_specstream.decode.compiling import compile_from_now_on, compiles, mark_of, remember_kernels
from mlx_specstream.measure.rows import measure_costs
from mlx_specstream.measure.warm import warm_up

PROMPT = [3, 5, 7, 3, 5]


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """A machine with a compiler and no kernels; how many functions are compiled there."""
    monkeypatch.setattr(compiling, "waits_for_compiler", lambda: True)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    calls = []

    def compile(function):
        calls.append(function)
        return function

    monkeypatch.setattr(buckets.mx, "compile", compile)
    return calls


@pytest.fixture
def used(monkeypatch):
    """Keys of the buckets that were asked for."""
    keys = []

    class Seen(Buckets):
        def get(self, key, make, compiled=True):
            keys.append(key)
            return super().get(key, make, compiled)

    monkeypatch.setattr(compiling, "Buckets", Seen)
    return keys


def decode(seams):
    tokens = [
        r.token
        for r in stream_generate(
            seams.model, make_tokenizer(ends=False), PROMPT, max_tokens=9, tree="best:5"
        )
    ]
    assert len(tokens) == 9
    return tokens


def test_nothing_is_compiled_before_kernels_are_there(folder):
    seams = attached()
    want = decode(seams)
    assert folder == []
    assert not compiles(seams)
    assert not seams.compiles, "the gate of SwiGLU is a kernel, too"

    mark_of(seams).parent.mkdir(parents=True)
    remember_kernels(seams)
    assert not compiles(seams), "this process has its functions"
    later = attached()
    later.kept["buckets"] = Buckets(worth=0)
    assert decode(later) == want
    assert len(folder) >= 2


def test_a_mark_is_of_one_model(folder):
    seams, other = attached(), attached("mixtral")
    mark_of(seams).parent.mkdir(parents=True)
    remember_kernels(seams)
    assert compiles(attached())
    assert not compiles(other)


def test_whoever_measures_has_it_compiled(folder):
    seams = attached()
    decode(seams)
    assert not folder
    measure_costs(seams, rows=(1, 2), contexts=(6,), repeats=1)
    assert folder
    assert "buckets" not in seams.kept, "these traces are of no answer"
    assert not mark_of(seams).is_file(), "not all that decoding needs"
    compile_from_now_on(seams)
    assert seams.compiles


def test_a_warm_up_makes_every_kind_and_leaves_a_mark(folder, used):
    seams = attached()
    mark_of(seams).parent.mkdir(parents=True)
    seams.kept["copies"] = learned = object()
    mx.random.seed(4)
    state = mx.random.state[0].tolist()
    warm_up(seams.model, make_tokenizer(ends=False))
    assert mx.random.state[0].tolist() == state
    assert seams.kept["copies"] is learned
    assert mark_of(seams).is_file()
    assert {"pass", "streams", "commit and streams"} <= {key[0] for key in used}
    assert {key[-1] for key in used if key[0] == "pass"} == {True, False}
    for greedy in (True, False):  # all streams and fewer of them
        gammas = {key[-1] for key in used if "streams" in key[0] and key[-2] != greedy}
        assert gammas == {None, 1, 2}
    assert {key[-2] for key in used if key[0] == "pass"} == {0, 3}, "fewer are filled up"
    assert len(folder) >= len(set(used)) > 5


@pytest.mark.parametrize("settings", [{"num_streams": 1}, {"main_sees_streams": True}])
def test_a_warm_up_makes_drafts_without_text_where_no_fewer_streams_are_asked(
    folder, used, settings
):
    """Nothing else would make such a pass there: the planner's drafts have a text, an empty one at least."""
    seams = attached(**settings)
    mark_of(seams).parent.mkdir(parents=True)
    warm_up(seams.model, make_tokenizer(ends=False))
    drafts = {key[-2:] for key in used if key[0] == "pass" and key[-2]}
    streams = settings.get("num_streams", 3)
    assert drafts == {(streams, True), (streams, False)}


def test_a_folder_that_cannot_be_written_is_no_failure(folder):
    remember_kernels(attached())  # MLX's folder is not there


def test_who_waits_for_a_compiler(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.cpu, 0))
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/g++")
    assert compiling.waits_for_compiler()
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert not compiling.waits_for_compiler()
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/g++")
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu, 0))
    assert not compiling.waits_for_compiler()


KERNELS = """
import sys
from pathlib import Path
import mlx.core as mx
from mlx_specstream.decode.draft import CopiedText, Guesses, draft
from mlx_specstream.decode.tree import TreeShape
from mlx_specstream.model.rows import clamped

def tree(root, tokens, logprobs, text, rights, shape):
    make = lambda *a: list(draft(a[0], Guesses(*a[1:3]), CopiedText(*a[3:]), shape, 5))
    return mx.compile(make)(root, tokens, logprobs, text, rights)

def made(g, K, C, most):
    tokens = mx.arange(g * K, dtype=mx.int32).reshape(g, K)
    logprobs = mx.log(mx.softmax(mx.random.uniform(shape=(g, K, K)), axis=-1))
    text, rights = mx.arange(C, dtype=mx.int32), mx.full((2, C), -0.7)
    mx.eval(tree(mx.array(3), tokens, logprobs, text, rights, TreeShape("best", 6)))
    mx.eval(mx.compile(lambda at: clamped(at, most))(mx.array(7)))
    return len(list(Path(sys.argv[1]).rglob("*.so")))

first = made(3, 4, 5, 100)
print(first, made(4, 6, 3, 90))
"""


@pytest.mark.skipif(not compiling.waits_for_compiler(), reason="kernels of a C++ compiler")
def test_a_kernel_serves_all_sizes(tmp_path):
    """Numbers that depend on sizes stay out of the code: else every draft and buffer has kernels of its own."""
    done = subprocess.run(
        [sys.executable, "-c", KERNELS, str(tmp_path)],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    first, second = map(int, done.stdout.split())
    assert 0 < first == second
