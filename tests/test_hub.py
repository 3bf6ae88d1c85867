"""Hub ids: the real huggingface_hub code against a stand-in of the hub on this machine."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "examples/models/e2e-sql-14m-4bit"
STREAMS = ROOT / "examples/streams/e2e-sql-14m"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@cache
def files() -> dict[str, bytes]:
    """The repository ``someone/model``: the bundled model with its streams inside."""
    found = {p.name: p.read_bytes() for p in MODEL.iterdir()} | {"LICENSE": b"as you like"}
    return found | {f"streams/{p.name}": p.read_bytes() for p in STREAMS.iterdir()}


class Hub(BaseHTTPRequestHandler):
    """Repository info, file tree, and files with the headers that huggingface_hub asks for."""

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer(with_body=True)

    def answer(self, with_body: bool):
        path = self.path.partition("?")[0]
        headers, body, status = {}, b"{}", 404
        if path.startswith("/api/models/someone/model/tree/"):
            rows = [
                {"type": "file", "path": n, "size": len(b), "oid": "0"} for n, b in files().items()
            ]
            body, status = json.dumps(rows).encode(), 200
        elif path.startswith("/api/models/someone/model"):
            siblings = [{"rfilename": name} for name in files()]
            info = {"id": "someone/model", "sha": COMMIT, "siblings": siblings, "private": False}
            body, status = json.dumps({**info, "tags": [], "downloads": 0}).encode(), 200
        elif path.startswith("/someone/model/resolve/"):
            name = path.split("/resolve/")[1].partition("/")[2]
            if name in files():
                body, status = files()[name], 200
                headers = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": COMMIT}
        else:
            headers = {"X-Error-Code": "RepoNotFound"}
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)


@pytest.fixture(scope="module")
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def command(hub: str, cache: Path, *argv: str, **environment: str):
    env = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    env |= {"HF_ENDPOINT": hub, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1", **environment}
    return subprocess.run(
        [sys.executable, "-m", "mlx_specstream", *argv],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_hub_id_brings_model_and_streams(hub, tmp_path):
    argv = ["generate", "--model", "someone/model", "-p", "MR: name[Aromi]\nText:", "-m", "20"]
    argv += ["--tree", "best:8"]
    done = command(hub, tmp_path, *argv)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    rate = float(done.stderr.split(" tokens-per-pass")[0].split()[-1])
    assert rate > 1.0  # the streams came along
    again = command("http://127.0.0.1:9", tmp_path, *argv, HF_HUB_OFFLINE="1")  # from the cache
    assert again.stdout == done.stdout


def test_an_unknown_hub_id_is_one_line(hub, tmp_path):
    done = command(hub, tmp_path, "generate", "--model", "someone/nothing", "-p", "a")
    assert done.returncode == 2
    assert "someone/nothing" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_what_was_downloaded_once_converts_offline(hub, tmp_path):
    """A repository holds files that a conversion never asks for: streams, here."""
    argv = ["convert", "--hf-path", "someone/model", "--dequantize", "--mlx-path"]
    done = command(hub, tmp_path, *argv, tmp_path / "online")
    assert done.returncode == 0, done.stderr
    again = command("http://127.0.0.1:9", tmp_path, *argv, tmp_path / "offline", HF_HUB_OFFLINE="1")
    assert again.returncode == 0, again.stderr
    name = "model.safetensors"
    assert (tmp_path / "online" / name).read_bytes() == (tmp_path / "offline" / name).read_bytes()


def test_streams_of_a_repository_come_along(hub, tmp_path):
    """Beside a conversion, back to PyTorch, and into an inspection; the loader takes them, too."""
    argv = ["convert", "--hf-path", "someone/model", "--dequantize", "--mlx-path", tmp_path / "out"]
    done = command(hub, tmp_path, *argv)
    said = next(line for line in done.stderr.splitlines() if "its streams were left out" in line)
    there = Path(said.partition("--streams ")[2])
    want = {path.name: path.read_bytes() for path in STREAMS.iterdir()}
    assert {path.name: path.read_bytes() for path in there.iterdir()} == want
    argv = ["export", "--model", "someone/model", "--dequantize", "--out", tmp_path / "back"]
    assert command(hub, tmp_path, *argv).returncode == 0
    assert (tmp_path / "back/pytorch_streams.safetensors").is_file()


def test_a_hub_id_is_inspected(hub, tmp_path):
    done = command(hub, tmp_path, "inspect", "someone/model", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["path"], report["kind"]) == ("someone/model", "model folder")
    assert report["downloaded to"].endswith(COMMIT)
    assert report["match"].startswith("alike")
    done = command(hub, tmp_path, "inspect", "someone/nothing")
    assert (done.returncode, len(done.stderr.strip().splitlines())) == (2, 1)
    assert "someone/nothing is neither a local folder nor downloadable" in done.stderr


def test_what_generate_downloaded_converts_offline(hub, tmp_path):
    """It brings no licence and no card, and other names than a conversion asks for."""
    argv = ["generate", "--model", "someone/model", "-p", "MR: name[Aromi]\nText:", "-m", "2"]
    assert command(hub, tmp_path, *argv).returncode == 0
    argv = ["convert", "--hf-path", "someone/model", "--dequantize", "--mlx-path", tmp_path / "out"]
    done = command("http://127.0.0.1:9", tmp_path, *argv, HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
