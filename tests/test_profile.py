"""Where measured profiles lie: found again, never mixed up, never in a user's way."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_specstream import profile
from mlx_specstream.decode.costs import Costs, default_costs
from mlx_specstream.errors import BadArgument

PLAIN = {
    "machine": "Apple M9, 10 GPU cores",
    "model": "llama 32x4096",
    "quantization": "4 bits, groups of 64, affine",
    "dtype": "bfloat16",
    "streams": {"num_streams": 3, "msa_layers": 2, "main_sees_streams": False},
    "versions": {"mlx": "0.33.1", "mlx-lm": "0.32.5"},
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(profile.FOLDER, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def key():
    return profile.profile_key(**PLAIN)


def test_a_profile_is_found_again(key, folder):
    costs = default_costs("gpu", 32, 4)
    path = profile.save_profile(key, costs.to_json())
    assert path.parent == folder
    assert profile.load_profile(key, Costs.from_json) == costs
    assert profile.load_profile(key) == json.loads(json.dumps(costs.to_json()))
    assert [p.name for p in folder.iterdir()] == [path.name]  # no temporary file is left
    assert json.loads(path.read_text())["key"] == key  # a person can see what it is of


def test_it_can_be_written_again(key):
    profile.save_profile(key, {"x": 1})
    profile.save_profile(key, {"x": 2})
    assert profile.load_profile(key) == {"x": 2}


def test_every_part_of_the_key_counts(key):
    changed = [
        {**PLAIN, "machine": "Apple M8"},
        {**PLAIN, "model": "qwen3 36x2560"},
        {**PLAIN, "quantization": "none"},
        {**PLAIN, "dtype": "float16"},
        {**PLAIN, "streams": None},
        {**PLAIN, "streams": {**PLAIN["streams"], "msa_layers": 4}},
        {**PLAIN, "versions": {**PLAIN["versions"], "mlx": "0.33.2"}},
    ]
    keys = [key, *(profile.profile_key(**values) for values in changed)]
    assert len({profile.profile_path(k) for k in keys}) == len(keys)
    profile.save_profile(key, {"x": 1})
    assert [profile.load_profile(k) for k in keys] == [{"x": 1}] + [None] * len(changed)


def test_the_order_of_values_does_not_count(key):
    other = {name: key[name] for name in reversed(key)}
    assert profile.profile_path(other) == profile.profile_path(key)


def test_the_stored_key_must_be_the_same(key):
    other = profile.profile_key(**{**PLAIN, "dtype": "float16"})
    path = profile.save_profile(other, {"x": 1})
    os.replace(path, profile.profile_path(key))  # two keys of one name, or a file moved about
    assert profile.load_profile(key) is None


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe\x00",
        b"{",
        b"[]",
        b"null",
        b"{}",
        b'{"format_version": 1}',
        b'{"format_version": 1, "key": {}, "profile": {}}',
        b"[" * 100_000,
    ],
)
def test_a_damaged_file_counts_as_none(key, folder, content):
    folder.mkdir()
    profile.profile_path(key).write_bytes(content)
    assert profile.load_profile(key) is None


def test_another_version_counts_as_none(key, monkeypatch):
    profile.save_profile(key, {"x": 1})
    monkeypatch.setattr(profile, "FORMAT_VERSION", 2)
    assert profile.load_profile(key) is None


def test_a_cut_off_file_counts_as_none(key):
    path = profile.save_profile(key, default_costs("cpu", 8, 2).to_json())
    path.write_bytes(path.read_bytes()[:-20])
    assert profile.load_profile(key) is None


def test_a_huge_file_is_not_read(key):
    path = profile.save_profile(key, {"x": "y" * profile.LARGEST})
    assert path.stat().st_size > profile.LARGEST
    assert profile.load_profile(key) is None


def test_costs_that_break_a_rule_count_as_none(key):
    bad = {**default_costs("cpu", 8, 2).to_json(), "plain_ms": [-1.0]}
    profile.save_profile(key, bad)
    assert profile.load_profile(key) is not None
    assert profile.load_profile(key, Costs.from_json) is None


def test_a_folder_in_its_place_counts_as_none(key):
    profile.profile_path(key).mkdir(parents=True)
    assert profile.load_profile(key) is None


def test_a_folder_that_cannot_be_written_is_one_line(key, folder):
    folder.write_text("a file")
    with pytest.raises(BadArgument, match=profile.FOLDER) as caught:
        profile.save_profile(key, {"x": 1})
    assert "\n" not in str(caught.value)
    assert profile.load_profile(key) is None


def test_a_failed_write_leaves_the_old_profile(key, folder, monkeypatch):
    profile.save_profile(key, {"x": 1})

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(profile.os, "replace", full)
    with pytest.raises(BadArgument, match="No space left"):
        profile.save_profile(key, {"x": 2})
    assert profile.load_profile(key) == {"x": 1}
    assert len(list(folder.iterdir())) == 1


@pytest.mark.parametrize("value", [float("nan"), {1, 2}])
def test_only_json_is_stored(key, value):
    with pytest.raises(BadArgument, match="plain JSON"):
        profile.save_profile(key, {"x": value})


def test_the_folder_follows_the_customs_of_the_system(monkeypatch, tmp_path):
    monkeypatch.delenv(profile.FOLDER)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr(profile.sys, "platform", "linux")
    assert profile.cache_folder() == tmp_path / "xdg/mlx-specstream/profiles"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert profile.cache_folder() == tmp_path / ".cache/mlx-specstream/profiles"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert profile.cache_folder() == tmp_path / ".cache/mlx-specstream/profiles"
    monkeypatch.setattr(profile.sys, "platform", "darwin")
    assert profile.cache_folder() == tmp_path / "Library/Caches/mlx-specstream/profiles"
    monkeypatch.setenv(profile.FOLDER, "~/mine")
    assert profile.cache_folder() == tmp_path / "mine"


def test_without_a_home_there_is_no_profile(key, monkeypatch):
    monkeypatch.delenv(profile.FOLDER)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(profile.Path, "home", homeless)
    assert profile.load_profile(key) is None
    with pytest.raises(BadArgument, match=profile.FOLDER):
        profile.save_profile(key, {"x": 1})


def test_it_imports_nothing_heavy():
    code = (
        "import sys, mlx_specstream.profile\n"
        "print(*[m for m in ('mlx', 'mlx_lm', 'numpy') if m in sys.modules])"
    )
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root
    )
    assert done.stdout.strip() == ""
