# SPDX-License-Identifier: Apache-2.0
"""Published weights: what a server sends is kept only if it is whole and right. A real server."""

import hashlib
import http.server
import sys
import threading

import pytest
import torch

import eval_knn
from dino.backbones import build_backbone
from dino.errors import UserError
from dino.evaluation.linear_files import LinearClassifier, published_head
from dino.weights import published
from dino.weights.pretrained import load_pretrained_weights, published_weights
from vision_transformer import vit_nano

FILE = "nano/nano.pth"


@pytest.fixture
def server(monkeypatch, tmp_path):
    """Answers to any path as the test says: `server.answer` is (status, promised length, body)."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.requested.append(self.path)
            status, length, body = self.server.answer
            self.send_response(status)
            if length is not None:
                self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            """Be silent."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        server.requested = []
        monkeypatch.setattr(published, "PUBLISHED_URL", f"http://127.0.0.1:{server.server_port}/")
        monkeypatch.setitem(published.PUBLISHED_BACKBONES, ("vit_nano", 8), "nano")
        monkeypatch.setitem(published.PUBLISHED_HEADS, ("vit_nano", 8), (FILE, {}))
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """{name: bytes of a file}: right ones, and others that a checkpoint might be."""
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    weights = vit_nano(8).state_dict()
    renamed = {name.replace("norm.", "ln."): value for name, value in weights.items()}
    head = {f"module.{k}": v for k, v in LinearClassifier(96, 3).state_dict().items()}
    contents = {
        "right": weights,
        "of another size": build_backbone("vit_tiny", 8)[0].state_dict(),
        "with other names": renamed,
        "a list": [1, 2],
        "head": {"epoch": 3, "state_dict": head, "best_acc": 1.0},
    }
    for name, content in contents.items():
        torch.save(content, folder / name)
    return {name: (folder / name).read_bytes() for name in contents}


def kept(tmp_path):
    return [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("says_length", [True, False])
def test_a_whole_file_is_kept_under_its_name_and_fetched_once(
    server, files, tmp_path, capsys, says_length
):
    body = files["right"]
    server.answer = (200, len(body) if says_length else None, body)
    first, again = published_weights("vit_nano", 8), published_weights("vit_nano", 8)
    assert server.requested == [f"/{FILE}"]
    assert kept(tmp_path) == [tmp_path / "hub" / "checkpoints" / "nano.pth"]
    assert kept(tmp_path)[0].read_bytes() == body
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert hashlib.sha256(body).hexdigest() in capsys.readouterr().out
    model = vit_nano(8)
    load_pretrained_weights(model, "", "teacher", "vit_nano", 8)
    assert torch.equal(model.cls_token, first["cls_token"])


PAGE = b"<!DOCTYPE html><html><body>Please log in to the network.</body></html>"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda files: (200, 100_000, files["right"][:5000]), "only 5000 of 100000 bytes came"),
        (
            lambda files: (200, None, files["right"][:5000]),
            "did not send a checkpoint: it begins with",
        ),
        (lambda files: (200, len(PAGE), PAGE), r"begins with b'<!DOCTYPE html.*a proxy"),
        (lambda files: (200, 0, b""), "did not send a checkpoint: it begins with b''"),
        (lambda files: (404, len(PAGE), PAGE), "could not be downloaded .*404"),
        (lambda files: (503, 0, b""), "could not be downloaded .*503"),
        (lambda files: (200, None, files["of another size"]), "does not fit this network"),
        (lambda files: (200, None, files["with other names"]), r"norm\.weight is missing"),
        (lambda files: (200, None, files["a list"]), "holds a list, not the weights"),
        (lambda files: (200, None, files["head"]), "has no entry 'teacher'"),
    ],
)
def test_a_broken_or_wrong_download_is_an_error_and_leaves_nothing(
    server, files, tmp_path, monkeypatch, capsys, make, message
):
    server.answer = make(files)
    with pytest.raises(UserError, match=message):
        published_weights("vit_nano", 8)
    assert kept(tmp_path) == []
    server.answer = (200, None, files["right"])
    published_weights("vit_nano", 8)  # the next attempt is not in its way


def test_a_server_that_is_not_there_is_an_error_of_the_script(
    server, class_folders, tmp_path, monkeypatch, capsys
):
    server.shutdown()
    server.server_close()
    flags = ["--arch", "vit_nano", "--patch_size", "8", "--data_path", str(class_folders)]
    monkeypatch.setattr(sys, "argv", ["eval_knn.py", *flags, "--device", "cpu"])
    with pytest.raises(SystemExit, match="2"):
        eval_knn.main()
    assert "could not be downloaded" in capsys.readouterr().err
    assert kept(tmp_path) == []


def test_a_file_whose_hash_is_known_must_have_it(server, files, tmp_path, monkeypatch):
    server.answer = (200, None, files["right"])
    monkeypatch.setitem(published.SHA256, FILE, "0" * 64)
    with pytest.raises(UserError, match=rf"has the SHA-256 [0-9a-f]{{64}}, not {'0' * 64}"):
        published_weights("vit_nano", 8)
    assert kept(tmp_path) == []
    monkeypatch.setitem(published.SHA256, FILE, hashlib.sha256(files["right"]).hexdigest())
    published_weights("vit_nano", 8)
    files = {f"{name}/{name}.pth" for name in published.PUBLISHED_BACKBONES.values()}
    assert set(published.SHA256) <= files


def test_a_head_is_checked_like_a_backbone(server, files, tmp_path):
    server.answer = (200, None, files["right"])
    with pytest.raises(UserError, match="does not hold a linear classifier"):
        published_head("vit_nano", 8)
    assert kept(tmp_path) == []
    server.answer = (200, None, files["head"])
    assert "module.linear.weight" in published_head("vit_nano", 8)["state_dict"]


def test_a_file_that_was_broken_before_says_that_it_can_be_deleted(server, files, tmp_path):
    server.answer = (200, None, files["right"])
    published_weights("vit_nano", 8)
    (broken,) = kept(tmp_path)
    broken.write_bytes(files["right"][:5000])
    with pytest.raises(UserError, match=r"nano\.pth: damaged.* Delete it, and it is down"):
        published_weights("vit_nano", 8)


def test_a_folder_that_cannot_keep_a_download_is_told_with_what_sets_it(
    server, tmp_path, monkeypatch
):
    """As a read-only home: its name alone was said, and neither why nor what to do."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"published ones are used, but .*file.*Set TORCH_HOME to"):
        published_weights("vit_nano", 8)
    assert not server.requested
