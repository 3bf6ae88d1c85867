"""Folders that appear whole, and what a run that was killed leaves behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_convert import copy_golden
from test_convert_hostile import WAITING

from mlx_specstream.cli.main import main
from mlx_specstream.converters.new_folder import YOUNG, check_free, lock, new_folder
from mlx_specstream.errors import BadArgument


def left_over(parent: Path, name: str, age: float = 2 * YOUNG) -> Path:
    """A hidden folder as a killed run leaves it."""
    folder = parent / name
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"half")
    os.utime(folder, (time.time() - age,) * 2)
    return folder


def test_only_stale_folders_of_the_same_target_are_swept(tmp_path):
    stale = left_over(tmp_path, ".out.abcd_123.partial")
    (tmp_path / ".out.elsewhere").symlink_to(stale)
    keep = [
        left_over(tmp_path, ".out.abcd_124.partial", age=1),  # just made, not locked yet
        left_over(tmp_path, ".other.abcd_123.partial"),
        left_over(tmp_path, ".out.abcd_123.backup"),
        left_over(tmp_path, ".out.new.abcd_123.partial"),
        left_over(tmp_path, "out.abcd_123.partial"),
        left_over(tmp_path, ".out.abcd_125.partial"),
    ]
    (tmp_path / ".out.abcd_126.partial").symlink_to(keep[1])
    with lock(keep[-1]), new_folder(tmp_path / "out") as folder:
        (folder / "x").write_text("new")
    assert not stale.exists()
    assert all((path / "model.safetensors").exists() for path in keep)
    assert (tmp_path / "out/x").read_text() == "new"


def test_two_at_once_do_not_sweep_one_another(tmp_path):
    with new_folder(tmp_path / "out") as first:
        os.utime(first, (0, 0))
        with new_folder(tmp_path / "other"):
            pass
        with new_folder(tmp_path / "out") as second:
            assert first.is_dir()
            assert first != second
            (second / "x").write_text("second")
        with pytest.raises(BadArgument, match="already exists"):
            check_free(tmp_path / "out")
        (tmp_path / "out").rename(tmp_path / "moved")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["moved", "other", "out"]


def test_the_next_conversion_removes_what_a_killed_one_left(tmp_path):
    folder, ready = copy_golden(tmp_path / "hf"), tmp_path / "ready"
    argv = ["convert", "--hf-path", str(folder), "--mlx-path", str(tmp_path / "new" / "out")]
    with subprocess.Popen([sys.executable, "-c", WAITING, str(ready), *argv]) as process:
        while not ready.exists() and process.poll() is None:
            time.sleep(0.02)
        (partial,) = tmp_path.glob("new/.out.*")
        os.utime(partial, (0, 0))
        with pytest.raises(BlockingIOError), lock(partial):  # alive: nobody else may sweep it
            pass
        process.send_signal(signal.SIGKILL)
    assert partial.is_dir()
    os.utime(partial, (0, 0))
    assert main(argv) == 0
    assert sorted((tmp_path / "new").iterdir()) == [tmp_path / "new" / "out"]
