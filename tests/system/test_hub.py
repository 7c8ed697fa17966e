"""Downloads, from a small server that speaks the Hub's protocol and fails as the Hub does."""

import hashlib
import http.server
import json
import os
import re
import shutil
import threading
from unittest.mock import call, create_autospec

import pytest
from huggingface_hub import HfApi, ModelCard
from support import make_drafter

from mlx_redrafter import UserError
from mlx_redrafter.cli.main import main
from mlx_redrafter.drafting.kinds import open_drafter
from mlx_redrafter.system.hub import fetch
from mlx_redrafter.text.loading import EMBEDDED

COMMIT = "0" * 40


class HubServer(http.server.ThreadingHTTPServer):
    """Holds the files, counts down how often it breaks off, and notes what it was asked."""

    files: dict[str, bytes]
    asked: list
    breaks: int


class Hub(http.server.BaseHTTPRequestHandler):
    server: HubServer
    """The three requests that a download makes: what is in the repository, about a file, the file or its rest."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        hub, path = self.server, self.path.split("?")[0]
        hub.asked.append((self.command, path, self.headers.get("Range")))
        if "/gated/" in path and "/resolve/" not in path and "/tree/" not in path:
            body = json.dumps(self.listing("gated/model")).encode()
            return self.answer(200, body, Content_Type="application/json")
        if "gated/" in path:
            return self.answer(403, X_Error_Code="GatedRepo", X_Error_Message="Access to this is restricted.")
        if "someone/drafter" not in path:
            return self.answer(401, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        if match := re.fullmatch(r"/someone/drafter/resolve/\w+/(.+)", path):
            return self.file(match[1])
        if "/tree/" in path:
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in hub.files.items()
            ]
            return self.answer(200, json.dumps(entries).encode(), Content_Type="application/json")
        return self.answer(200, json.dumps(self.listing("someone/drafter")).encode(), Content_Type="application/json")

    def listing(self, name):
        siblings = [{"rfilename": name} for name in self.server.files]
        return {"id": name, "sha": COMMIT, "siblings": siblings, "private": False, "tags": [], "downloads": 0}

    def file(self, name):
        data = self.server.files[name]
        about = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if self.command == "HEAD":
            self.send_response(200)
            for key, value in {**about, "Content-Length": len(data)}.items():
                self.send_header(key, str(value))
            self.end_headers()
            return
        begin = int(re.fullmatch(r"bytes=(\d+)-.*", self.headers["Range"])[1]) if self.headers.get("Range") else 0
        self.send_response(206 if begin else 200)
        for key, value in {**about, "Content-Length": len(data) - begin}.items():
            self.send_header(key, str(value))
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        end = len(data)
        if name.endswith(".safetensors") and self.server.breaks > 0:
            self.server.breaks -= 1
            end = begin + (end - begin) // 2
        self.wfile.write(data[begin:end])
        if end < len(data):
            self.wfile.flush()
            self.close_connection = True


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A running Hub with someone/drafter, which breaks off as often as `breaks` says."""
    from huggingface_hub import constants, file_download

    source = tmp_path / "hub-files"
    drafter = make_drafter(hidden=64, vocab=8192, exit_dim=128)
    drafter.save(source)
    server = HubServer(("127.0.0.1", 0), Hub)
    server.files = {path.name: path.read_bytes() for path in source.iterdir()}
    server.asked, server.breaks = [], 0
    shutil.rmtree(source)
    address = f"http://127.0.0.1:{server.server_address[1]}"
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", address)
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.setattr(constants, name, str(tmp_path / "cache"), raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 2**16)  # our file is smaller than one of the usual ones
    monkeypatch.setattr(file_download.time, "sleep", lambda seconds: None)  # between its own attempts
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def convert(tmp_path, repo):
    return main(["convert", "drafter", "--hf-path", repo, "--mlx-path", str(tmp_path / "mlx")])


def test_a_download(hub, tmp_path):
    assert convert(tmp_path, "someone/drafter") == 0
    found = (tmp_path / "mlx" / "model.safetensors").read_bytes()
    assert {(path, method) for method, path, _ in hub.asked if "/resolve/" in path} == {
        (f"/someone/drafter/resolve/{COMMIT}/{name}", method) for name in hub.files for method in ("HEAD", "GET")
    }
    assert len(found) - len(hub.files["model.safetensors"]) in range(-64, 64)  # their headers may differ


def gets(hub, name):
    """The Range of every request for a file's contents."""
    return [where for method, path, where in hub.asked if method == "GET" and path.endswith(f"/{name}")]


def test_a_broken_connection_is_taken_up_again(hub, tmp_path):
    """If this fails, a connection that breaks costs what was downloaded so far."""
    hub.breaks = 1
    assert convert(tmp_path, "someone/drafter") == 0
    first, second = gets(hub, "model.safetensors")
    assert first is None and int(re.match(r"bytes=(\d+)", second)[1]) > 2**20
    assert open_drafter(tmp_path / "mlx").config.vocab_size == 8192


def test_a_download_that_ends_in_the_middle(hub, tmp_path, capsys):
    """If this fails, a lost network ends in a traceback or half a directory, or whole files are downloaded again."""
    hub.breaks = 100
    assert convert(tmp_path, "someone/drafter") == 2
    err = capsys.readouterr().err
    assert err.count("mlx-redrafter: error") == 1 and "Traceback" not in err
    line = next(line for line in err.splitlines() if "mlx-redrafter: error" in line)
    assert "--hf-path someone/drafter: the download broke off" in line and "whole files are kept" in line
    assert not (tmp_path / "mlx").exists()
    hub.breaks, hub.asked[:] = 0, []
    assert convert(tmp_path, "someone/drafter") == 0
    assert len(gets(hub, "model.safetensors")) == 1 and not gets(hub, "config.json")


@pytest.mark.parametrize(
    "repo, message",
    [
        ("nobody/nothing", "no such directory here and no such repository on the Hub"),
        ("gated/model", "access to this repository is gated; accept its terms on the Hub"),
    ],
)
def test_refusals(hub, tmp_path, capsys, repo, message):
    """If this fails, a repository that is not for us ends in a traceback, or leaves half a directory."""
    assert convert(tmp_path, repo) == 2
    err = capsys.readouterr().err
    assert f"--hf-path {repo}: {message}" in err and err.count("\n") == 1
    assert not (tmp_path / "mlx").exists()


class HubAnswer:
    """A recorded answer of the Hub, enough for its errors to be made."""

    def __init__(self, status):
        self.status_code, self.headers, self.request = status, {}, None


@pytest.mark.parametrize(
    "error, message",
    [
        ("RepositoryNotFoundError", "no such directory here and no such repository on the Hub"),
        ("GatedRepoError", "gated; accept its terms"),
        ("LocalEntryNotFoundError", "and the Hub: recorded"),
        ("HfHubHTTPError", r"the download broke off \(recorded\)"),
        ("XetDownloadError", r"the download broke off \(recorded\)"),
        ("TimeoutError", r"the download broke off \(recorded\)"),
    ],
)
def test_recorded_failures(monkeypatch, error, message):
    from huggingface_hub import errors

    kind = getattr(errors, error, TimeoutError)

    def failing(*args, **kwargs):
        if issubclass(kind, errors.HfHubHTTPError):
            raise kind("recorded", response=HubAnswer(404))  # type: ignore[call-arg]
        raise kind("recorded")

    monkeypatch.setattr("mlx_redrafter.system.hub.snapshot_download", failing)
    with pytest.raises(UserError, match=message):
        fetch("someone/something", "--model")


def test_only_what_is_needed_is_downloaded(monkeypatch, tmp_path):
    """If this fails, a model that has both kinds of weights is downloaded twice, or PyTorch's alone not at all."""
    from mlx_redrafter.convert.target import convert_target

    asked = []
    whole = tmp_path / "whole"
    shutil.copytree(EMBEDDED / "target", whole, ignore=shutil.ignore_patterns("*.safetensors"))

    def download(repo, repo_type, allow_patterns):
        asked.append(allow_patterns)
        return str(whole)

    monkeypatch.setattr("mlx_redrafter.system.hub.snapshot_download", download)
    assert fetch("someone/drafter", "--draft", ["config.json"]) == whole
    with pytest.raises(UserError, match="no weights"):
        convert_target("someone/target", str(tmp_path / "mlx"))
    assert asked[0] == ["config.json"]
    assert [any("bin" in pattern for pattern in patterns) for patterns in asked[1:]] == [False, True]
    (whole / "model.safetensors").symlink_to(EMBEDDED / "target" / "model.safetensors")
    asked.clear()
    convert_target("someone/target", str(tmp_path / "mlx"))
    assert len(asked) == 1


def test_a_directory_of_the_hub_s_cache(tmp_path, capsys):
    """If this fails, a path copied from the cache is refused, though the files are two levels below."""
    cache = tmp_path / "models--someone--target"
    old, new = cache / "snapshots" / "aaaa", cache / "snapshots" / "bbbb"
    for folder, when in ((old, 2_000_000_000), (new, 1_000_000_000)):
        shutil.copytree(EMBEDDED / "target", folder, ignore=shutil.ignore_patterns("*.safetensors"))
        (folder / "model.safetensors").symlink_to(EMBEDDED / "target" / "model.safetensors")
        os.utime(folder, (when, when))
    assert fetch(str(cache), "--model") == old  # the newest
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("bbbb")
    assert fetch(str(cache), "--model") == new
    assert fetch(str(new), "--model") == new
    assert main(["inspect", str(cache), "--bandwidth", "9"]) == 0
    assert "a target (llama)" in capsys.readouterr().out
    shutil.rmtree(cache / "snapshots")
    with pytest.raises(UserError, match="without a snapshot"):
        fetch(str(cache), "--model")


@pytest.fixture
def api(monkeypatch):
    """HfApi as the installed huggingface-hub has it: a call that it would refuse fails here, too."""
    api = create_autospec(HfApi, instance=True)
    api.create_repo.return_value = "https://hub/me/new"
    monkeypatch.setattr("mlx_redrafter.system.hub.HfApi", lambda: api)
    return api


def test_upload(hub, api, tmp_path, capsys):
    """If this fails, --upload-repo uploads something else than the result, or hides that it could not."""
    flags = ["convert", "drafter", "--hf-path", "someone/drafter", "--upload-repo", "me/new", "--mlx-path"]
    out = tmp_path / "mlx"
    assert main([*flags, str(out)]) == 0
    assert api.method_calls == [
        call.whoami(),
        call.create_repo("me/new", exist_ok=True),
        call.upload_folder(repo_id="me/new", folder_path=out, ignore_patterns=None),
    ]
    assert "me/new: uploaded, see https://hub/me/new" in capsys.readouterr().out
    card = ModelCard.load(out / "README.md")
    assert card.data.base_model == "someone/drafter" and card.data.library_name == "mlx"
    assert card.text.strip().startswith("# me/new\n")
    api.upload_folder.side_effect = ConnectionError("gone")
    assert main([*flags, str(tmp_path / "second")]) == 2
    assert f"--upload-repo me/new: gone; what was to go there is in {tmp_path / 'second'}" in capsys.readouterr().err
    assert (tmp_path / "second" / "config.json").exists()
    api.whoami.side_effect = OSError("Token is required")
    assert main([*flags, str(tmp_path / "third")]) == 2
    assert "log in with `hf auth login`" in capsys.readouterr().err
    assert not (tmp_path / "third").exists()
