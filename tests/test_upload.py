"""`--upload-repo`: the real huggingface_hub code against a stand-in of the hub on this machine."""

import base64
import hashlib
import json
import re
import threading
from http.server import ThreadingHTTPServer

import pytest
from test_convert import copy_golden
from test_hub import COMMIT, Hub, command

from mlx_specstream.cli.main import main


class Uploads(Hub):
    """The stand-in, with repositories that can be made and filled."""

    repositories: dict[str, dict[str, bytes]]  # id -> file -> content
    stored: dict[str, bytes]  # large files by their hash, before a commit names them
    refuse = ""

    def do_POST(self):
        path = self.path.partition("?")[0]
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Authorization") != "Bearer hf_test":
            self.reply({"error": "who are you?"}, 401)
        elif self.refuse and re.search(self.refuse, path):
            self.reply({"error": "quota exceeded"}, 403)
        elif path == "/api/repos/create":
            name = json.loads(body)["name"]
            owner = json.loads(body).get("organization") or "someone"
            self.repositories.setdefault(f"{owner}/{name}", {})
            self.reply({"url": f"http://{self.headers['Host']}/{owner}/{name}"})
        elif path == "/api/validate-yaml":
            self.reply({"warnings": [], "errors": []})
        elif "/preupload/" in path:
            rows = [
                {"path": f["path"], "uploadMode": mode(f["path"]), "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]
            self.reply({"files": rows})
        elif path.endswith("/info/lfs/objects/batch"):
            base = f"http://{self.headers['Host']}/store/"
            objects = [
                {**o, "actions": {"upload": {"href": base + o["oid"]}}}
                for o in json.loads(body)["objects"]
            ]
            self.reply({"transfer": "basic", "objects": objects})
        elif "/commit/" in path:
            self.commit(path, [json.loads(line) for line in body.splitlines()])
        else:
            self.reply({"error": path}, 404)

    def do_PUT(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        assert hashlib.sha256(body).hexdigest() == self.path.rpartition("/")[2]
        self.stored[self.path.rpartition("/")[2]] = body
        self.reply({})

    def commit(self, path: str, lines: list[dict]) -> None:
        repository = self.repositories[re.search(r"/api/models/(.+)/commit/", path)[1]]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                repository[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repository[value["path"]] = self.stored[value["oid"]]
        url = f"http://{self.headers['Host']}/someone/new/commit/{COMMIT}"
        self.reply({"success": True, "commitUrl": url, "commitOid": COMMIT, "hookOutput": ""})

    def reply(self, value: dict, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def mode(path: str) -> str:
    return "lfs" if path.endswith(".safetensors") else "regular"


@pytest.fixture
def hub():
    """(address, handler class) of a hub of its own."""
    handler = type("OwnUploads", (Uploads,), {"repositories": {}, "stored": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", handler
    server.shutdown()
    server.server_close()


CARD = """---
license: apache-2.0
language: [en, de]
tags: [secret-tag]
---
# A fine-tune
"""


def convert(hub, tmp_path, *options, **environment):
    folder = copy_golden(tmp_path / "my-finetune", "phi3")
    (folder / "README.md").write_text(CARD)
    argv = ["convert", "--hf-path", str(folder), "--mlx-path", str(tmp_path / "out"), *options]
    return command(hub[0], tmp_path / "cache", *argv, **environment)


def test_a_conversion_is_uploaded_whole_with_its_card(hub, tmp_path):
    options = ["-q", "--q-bits", "8", "--q-group-size", "32", "--upload-repo", "someone/new"]
    done = convert(hub, tmp_path, *options, HF_TOKEN="hf_test")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1] == f"{hub[0]}/someone/new"
    here = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    there = hub[1].repositories["someone/new"]
    there.pop(".gitattributes", None)
    assert there == here
    card = here["README.md"].decode()
    head, text = card.split("---\n")[1:]
    assert "license: apache-2.0" in head
    assert "library_name: mlx" in head
    assert "- en\n- de\n" in head
    assert "base_model" not in head  # a folder has no address
    assert "- source: my-finetune\n" in text
    assert "- architecture: phi3\n" in text
    assert "- quantisation: group_size 32, bits 8, mode affine\n" in text
    assert "mlx-lm" in text
    assert "secret-tag" not in card
    assert str(tmp_path) not in card


def test_a_refused_upload_leaves_the_result(hub, tmp_path):
    hub[1].refuse = "/commit/"
    done = convert(hub, tmp_path, "--upload-repo", "someone/new", HF_TOKEN="hf_test")
    assert done.returncode == 2
    error = done.stderr.splitlines()[-1]
    assert error.startswith("mlx-specstream: error: [upload] ")
    assert "did not take it" in error
    assert "hf upload someone/new" in error
    assert "Traceback" not in done.stderr
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert hub[1].repositories["someone/new"] == {}


def test_what_cannot_succeed_is_said_before_any_work(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    argv = ["convert", "--hf-path", str(tmp_path / "no"), "--mlx-path", str(tmp_path / "out")]
    for options, words in (
        (["--upload-repo", "someone/new"], "log in with hf auth login"),
        (["--upload-repo", "../new repo"], "is no repository id"),
        (["--upload-repo", "someone/new", "--dry-run"], "--dry-run"),
        (["--report", "--dry-run"], "--dry-run"),
    ):
        assert main([*argv, *options]) == 2
        assert words in capsys.readouterr().err
    assert hub[1].repositories == {}


def test_a_folder_that_needed_nothing_is_not_published(hub, tmp_path):
    """It may hold what nobody meant to publish."""
    first = convert(hub, tmp_path)
    assert first.returncode == 0
    argv = ["convert", "--hf-path", str(tmp_path / "out"), "--mlx-path", str(tmp_path / "again")]
    argv += ["--upload-repo", "someone/new"]
    done = command(hub[0], tmp_path / "cache", *argv, HF_TOKEN="hf_test")
    assert done.returncode == 2
    assert "nothing was converted, so nothing was uploaded" in done.stderr
    assert hub[1].repositories == {}


def test_a_source_on_the_hub_is_named(tmp_path, monkeypatch):
    from mlx_specstream.converters import model_card

    source = tmp_path / "snapshots" / COMMIT
    source.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    text = model_card.model_card("new", "someone/model", source, {"architecture": "llama"})
    assert "base_model: someone/model\n" in text
    assert f"- source: someone/model, commit {COMMIT}\n" in text


@pytest.mark.parametrize(
    "card",
    [
        "---\n- a\n---\n",
        "---\nlicense: [1, {}]\n---",
        "\xff",
        "---\na: &a [*a]\n---\n",
        "x" * (2 << 20),
    ],
)
def test_a_strange_card_of_the_source_is_no_obstacle(card, tmp_path):
    from mlx_specstream.converters.model_card import kept_metadata

    (tmp_path / "README.md").write_bytes(card.encode("latin-1"))
    assert kept_metadata(tmp_path / "README.md") == {}
    assert kept_metadata(tmp_path / "none") == {}
