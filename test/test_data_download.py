"""Downloads from a server on loopback: resumed, verified, unpacked safely."""

from __future__ import annotations

import hashlib
import io
import re
import stat
import subprocess
import sys
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from maskrcnn_benchmark.data import download
from maskrcnn_benchmark.data.download import Archive, fetch, sha256_of, unpack
from maskrcnn_benchmark.errors import DataError

ROOT = Path(__file__).resolve().parents[1]
BODY = np.random.default_rng(0).bytes(3_000_000)


class Server(ThreadingHTTPServer):
    """Serves `files` by name. cut: bytes of a body after which it hangs up; ranges: whether it knows them; tag: of
    every file. Notes from which byte on it answered."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.cut: int | None = None
        self.ranges, self.tag, self.requests = True, '"one"', []
        self.address = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server, wanted = self.server, self.headers.get("Range")
        body = server.files.get(self.path.lstrip("/"))
        if body is None:
            self.send_error(404)
            return
        same = self.headers.get("If-Range", server.tag) == server.tag
        first = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted and server.ranges and same else 0
        server.requests.append(first)
        if first:
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{len(body) - 1}/{len(body)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(body) - first))
        if server.tag:
            self.send_header("ETag", server.tag)
        self.end_headers()
        self.wfile.write(body[first : server.cut])

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def server():
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def zipped(files: dict[str, bytes | str]) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return data.getvalue()


def everything_in(directory: Path) -> list[str]:
    return sorted(str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file())


# ---------------------------------------------------------------------------------------------- fetching


def test_an_interrupted_download_goes_on(server, tmp_path):
    server.files["a.zip"], server.cut = BODY, 1_000_000
    with pytest.raises(DataError, match="ended after 1000000 of 3000000 bytes"):
        fetch(f"{server.address}/a.zip", tmp_path / "a.zip")
    assert not (tmp_path / "a.zip").exists()
    server.cut = None
    fetch(f"{server.address}/a.zip", tmp_path / "a.zip")
    assert (tmp_path / "a.zip").read_bytes() == BODY and server.requests == [0, 1_000_000]
    assert everything_in(tmp_path) == ["a.zip"]


@pytest.mark.parametrize("change", ["another file", "no ranges", "no tag"])
def test_what_cannot_go_on_begins_anew(server, tmp_path, change):
    server.files["a.zip"], server.cut = BODY, 1_000_000
    server.tag = None if change == "no tag" else server.tag
    with pytest.raises(DataError):
        fetch(f"{server.address}/a.zip", tmp_path / "a.zip")
    server.cut, server.ranges = None, change != "no ranges"
    if change == "another file":
        server.files["a.zip"], server.tag = BODY[::-1], '"two"'
    fetch(f"{server.address}/a.zip", tmp_path / "a.zip")
    assert (tmp_path / "a.zip").read_bytes() == server.files["a.zip"]


def test_nothing_there(server, tmp_path):
    with pytest.raises(DataError, match=f"{server.address}/b.zip: the server says 404"):
        fetch(f"{server.address}/b.zip", tmp_path / "b.zip")
    with pytest.raises(DataError, match="no http or https address"):
        fetch(f"file://{tmp_path}/b.zip", tmp_path / "b.zip")
    server.server_close()
    with pytest.raises(DataError, match="cannot be downloaded"):
        fetch("http://127.0.0.1:9/b.zip", tmp_path / "b.zip")


def test_download_verifies_and_unpacks(server, tmp_path, monkeypatch):
    first = zipped({"annotations/a.json": "{}", "annotations/b.json": "[]"})
    second = zipped({"annotations/c.json": "1", "images/x.jpg": b"jpg"})
    server.files = {"one.zip": first, "two.zip": second}
    hashes = [hashlib.sha256(body).hexdigest() for body in (first, second)]
    archives = tuple(Archive(f"{server.address}/{n}.zip", h) for n, h in zip(("one", "two"), hashes))
    monkeypatch.setitem(download.DATASETS, "both", archives)
    server.files["two.zip"] = second[:-1] + b"!"
    with pytest.raises(DataError, match=rf"two\.zip has SHA-256 .* but must have {hashes[1]}"):
        download.download("both", tmp_path)
    assert everything_in(tmp_path) == [".downloads/one.zip.done", "annotations/a.json", "annotations/b.json"]
    server.files["two.zip"] = second
    download.download("both", tmp_path, keep_archives=True)
    assert len(server.requests) == 3, "the first archive is not fetched again"
    assert (tmp_path / "annotations" / "c.json").read_text() == "1" and (tmp_path / "images" / "x.jpg").exists()
    assert (tmp_path / ".downloads" / "two.zip").exists()
    download.download("both", tmp_path)
    assert len(server.requests) == 3


def test_unknown_hashes_are_asked_for(server, tmp_path, caplog):
    body = zipped({"PennFudanPed/readme.txt": "hello"})
    server.files = {"PennFudanPed.zip": body}
    digest = hashlib.sha256(body).hexdigest()
    with pytest.raises(DataError, match=r"--sha256 PennFudanPed\.zip=HASH.*--unverified"):
        download.download("penn-fudan", tmp_path / "a", mirror=server.address)
    assert server.requests == []
    with pytest.raises(DataError, match="must have 0000"):
        download.download("penn-fudan", tmp_path / "a", {"PennFudanPed.zip": "0" * 64}, mirror=server.address)
    download.download("penn-fudan", tmp_path / "a", {"PennFudanPed.zip": digest.upper()}, mirror=server.address)
    assert "NOT VERIFIED" not in caplog.text
    download.download("penn-fudan", tmp_path / "b", unverified=True, mirror=server.address)
    assert "NOT VERIFIED" in caplog.text and digest in caplog.text
    for directory in "ab":
        assert (tmp_path / directory / "PennFudanPed" / "readme.txt").read_text() == "hello"
    with pytest.raises(DataError, match=r"no archive other\.zip; it has PennFudanPed\.zip"):
        download.download("penn-fudan", tmp_path / "c", {"other.zip": digest})


def test_the_table():
    assert set(download.DATASETS) == {"coco2017", "penn-fudan", "balloon", "voc", "xiaoduxiong"}
    for archives in download.DATASETS.values():
        for archive in archives:
            assert archive.address.startswith(("http://", "https://")) and archive.name.endswith(
                (".zip", ".tar", ".gz")
            )
            assert archive.sha256 is None or re.fullmatch("[0-9a-f]{64}", archive.sha256)


def test_the_command(server, tmp_path):
    server.files = {"balloon_dataset.zip": zipped({"balloon/train/via_region_data.json": "{}"})}
    command = [sys.executable, str(ROOT / "tools" / "dataset.py"), "download", "balloon", str(tmp_path / "data")]
    command += ["--mirror", server.address]

    def call(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=300)

    refused = call()
    assert refused.returncode == 2 and "--unverified" in refused.stderr and refused.stderr.count("\n") == 1
    assert not (tmp_path / "data" / "balloon").exists()
    done = call("--unverified")
    assert done.returncode == 0 and "NOT VERIFIED" in done.stderr, done.stderr
    assert (tmp_path / "data" / "balloon" / "train" / "via_region_data.json").exists()


def test_sha256(tmp_path):
    (tmp_path / "a").write_bytes(BODY)
    assert sha256_of(tmp_path / "a") == hashlib.sha256(BODY).hexdigest()


# ---------------------------------------------------------------------------------------------- unpacking


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz"])
def test_unpack(tmp_path, kind):
    files = {"top.txt": b"top", "a/b/数据.bin": BODY, "a/empty": b""}
    file = tmp_path / f"archive.{kind}"
    if kind == "zip":
        file.write_bytes(zipped(files))
    else:
        with tarfile.open(file, "w:gz" if kind == "tar.gz" else "w") as archive:
            root = tarfile.TarInfo("./")
            root.type = tarfile.DIRTYPE
            archive.addfile(root)
            for name, content in files.items():
                info = tarfile.TarInfo(name)
                info.size, info.mode = len(content), 0o6777
                archive.addfile(info, io.BytesIO(content))
    unpack(file, tmp_path / "out")
    assert {name: (tmp_path / "out" / name).read_bytes() for name in files} == files
    assert everything_in(tmp_path / "out") == sorted(files)
    assert not (tmp_path / "out" / "top.txt").stat().st_mode & (stat.S_ISUID | 0o111), "modes are not taken over"


def evil_tar(path: Path, name: str, type_: bytes = tarfile.REGTYPE, linkname: str = "") -> Path:
    with tarfile.open(path, "w") as archive:
        for member, kind in (("first.txt", tarfile.REGTYPE), (name, type_)):
            info = tarfile.TarInfo(member)
            info.type, info.linkname = kind, linkname
            archive.addfile(info)
    return path


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/tmp/evil", "a\\..\\..\\evil", "C:/evil"])
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_paths_outside_are_refused(tmp_path, kind, name):
    file = tmp_path / f"evil.{kind}"
    if kind == "zip":
        file.write_bytes(zipped({"first.txt": "", name: "evil"}))
    else:
        evil_tar(file, name)
    with pytest.raises(DataError, match="outside the directory: refused"):
        unpack(file, tmp_path / "deep" / "out")
    assert everything_in(tmp_path) == [file.name], "all or nothing"


@pytest.mark.parametrize("type_", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_are_refused(tmp_path, type_):
    with pytest.raises(DataError, match="'x' is a link or a device"):
        unpack(evil_tar(tmp_path / "evil.tar", "x", type_, "/etc/passwd"), tmp_path / "out")
    assert everything_in(tmp_path) == ["evil.tar"]


def test_links_in_zips_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as archive:
        info = zipfile.ZipInfo("x")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(DataError, match="'x' is a link or a device"):
        unpack(tmp_path / "evil.zip", tmp_path / "out")


def test_a_link_in_the_way_is_not_followed(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "a.zip").write_bytes(zipped({"a/b.txt": "x"}))
    with pytest.raises(DataError, match="exists already"):
        unpack(tmp_path / "a.zip", tmp_path / "out")
    assert everything_in(tmp_path / "elsewhere") == []


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "a.zip").write_bytes(zipped({"new.txt": "n", "sub/old.txt": "changed"}))
    (tmp_path / "out" / "sub").mkdir(parents=True)
    (tmp_path / "out" / "sub" / "old.txt").write_text("mine")
    with pytest.raises(DataError, match=r"sub/old\.txt exists already"):
        unpack(tmp_path / "a.zip", tmp_path / "out")
    assert everything_in(tmp_path / "out") == ["sub/old.txt"]
    assert (tmp_path / "out" / "sub" / "old.txt").read_text() == "mine"


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_bombs_are_refused(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(download, "_HARMLESS", 1_000_000)
    content, file = bytes(20_000_000), tmp_path / f"bomb.{kind}"
    if kind == "zip":
        file.write_bytes(zipped({"a": content, "b": content}))
    else:
        with tarfile.open(file, "w:gz") as archive:
            info = tarfile.TarInfo("a")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    with pytest.raises(DataError, match=r"claims 20000000 bytes.*refused"):
        unpack(file, tmp_path / "out")
    assert everything_in(tmp_path) == [file.name]


def test_too_many_files(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "_MOST_FILES", 3)
    (tmp_path / "a.zip").write_bytes(zipped({f"{i}": "" for i in range(4)}))
    with pytest.raises(DataError, match="in 4 files"):
        unpack(tmp_path / "a.zip", tmp_path / "out")


def test_a_member_that_lies_about_its_size(tmp_path):
    body = zipped({"a": bytes(5000)})
    for place in (m.start() for m in re.finditer(rb"PK\x01\x02", body)):
        body = body[: place + 24] + (10).to_bytes(4, "little") + body[place + 28 :]
    (tmp_path / "a.zip").write_bytes(body)
    with pytest.raises(DataError, match=r"cannot be unpacked|holds more"):
        unpack(tmp_path / "a.zip", tmp_path / "out")
    assert everything_in(tmp_path / "out") == []


@pytest.mark.parametrize("damage", ["text", "truncated", "flipped", "twice"])
def test_damaged_archives(tmp_path, damage):
    body = bytearray(zipped({"a": BODY[:100_000]}))
    if damage == "flipped":
        body[50_000] ^= 255
    file = tmp_path / "a.zip"
    file.write_bytes({"text": b"<html>404</html>", "truncated": bytes(body[:-40])}.get(damage, bytes(body)))
    if damage == "twice":
        with zipfile.ZipFile(file, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("a", "again")
    words = {"text": "neither a zip nor a tar", "truncated": "neither", "flipped": "CRC", "twice": "'a' twice"}
    with pytest.raises(DataError, match=words[damage]):
        unpack(file, tmp_path / "out")
    assert everything_in(tmp_path / "out") == []


def test_a_header_with_an_impossible_length(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, type_, content in (("h", tarfile.XHDTYPE, b"99999999999999999999 path=x\n"), ("a", b"0", b"")):
            info = tarfile.TarInfo(name)
            info.type, info.size = type_, len(content)
            archive.addfile(info, io.BytesIO(content))
    # Python 3.13 sees the length already when it asks whether this is an archive
    with pytest.raises(DataError, match=r"a\.tar (cannot be unpacked|is neither a zip nor a tar)"):
        unpack(tmp_path / "a.tar", tmp_path / "out")
    assert everything_in(tmp_path / "out") == []
