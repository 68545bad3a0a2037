"""Public data sets: fetched when asked for, resumed, verified, and unpacked without trust in the archive."""

from __future__ import annotations

import hashlib
import http.client
import logging
import lzma
import os
import shutil
import stat
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from ..errors import DataError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Archive:
    """sha256: hexadecimal, or None where no one has published one that we could copy."""

    address: str
    sha256: str | None

    @property
    def name(self) -> str:
        return self.address.rsplit("/", 1)[1]


_COCO = "http://images.cocodataset.org"
# The hashes of coco2017 and voc are those that TensorFlow Datasets publishes (url_checksums/coco.txt, voc.txt). The
# others' are not known here: whoever downloads them gives the hash, or says that none is wanted.
DATASETS: dict[str, tuple[Archive, ...]] = {
    "coco2017": (
        Archive(
            f"{_COCO}/annotations/annotations_trainval2017.zip",
            "113a836d90195ee1f884e704da6304dfaaecff1f023f49b6ca93c4aaae470268",
        ),
        Archive(f"{_COCO}/zips/val2017.zip", "4f7e2ccb2866ec5041993c9cf2a952bbed69647b115d0f74da7ce8f4bef82f05"),
        Archive(f"{_COCO}/zips/train2017.zip", "69a8bb58ea5f8f99d24875f21416de2e9ded3178e903f1f7603e283b9e06d929"),
    ),
    "voc": (
        Archive(
            "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
            "e14f763270cf193d0b5f74b169f44157a4b0c6efa708f4dd0ff78ee691763bcb",
        ),
    ),
    "penn-fudan": (Archive("https://www.cis.upenn.edu/~jshi/ped_html/PennFudanPed.zip", None),),
    "balloon": (Archive("https://github.com/matterport/Mask_RCNN/releases/download/v2.1/balloon_dataset.zip", None),),
    "xiaoduxiong": (Archive("https://bj.bcebos.com/paddlex/datasets/xiaoduxiong_ins_det.tar.gz", None),),
}

_CHUNK = 1 << 20
_TIMEOUT = 60  # seconds without a byte
# An archive that claims or yields more than this many times its own size, and more than a gigabyte, is taken for a
# bomb. COCO's annotations, JSON, are 4 times theirs; zip's and gzip's greatest possible ratio is about 1000.
_MOST_GROWTH, _HARMLESS = 30, 1 << 30
_MOST_FILES = 2_000_000
# What zipfile and tarfile raise at damaged, encrypted (RuntimeError) or unknown archives; OverflowError: a length in a
# tar's extended header that no index can be
_DAMAGES = (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError)
_DAMAGES += (EOFError, RuntimeError, ValueError, OverflowError, OSError, MemoryError)
_GOES_ON = "the same command goes on where it stopped"


def download(
    name: str,
    directory: str | Path,
    hashes: Mapping[str, str] | None = None,
    unverified: bool = False,
    mirror: str = "",
    keep_archives: bool = False,
) -> None:
    """Fetches and unpacks a data set of DATASETS. What is there already is not fetched again, and an interrupted
    download goes on where it stopped.

    Args:
        directory: where the data set's own directories and files come to lie; made when it is not there.
        hashes: archive name -> SHA-256, for those without one in the table, or in place of it.
        unverified: take archives of unknown hash as they come; their hash is logged.
        mirror: address under which the archives lie by name, instead of their own addresses.

    Raises:
        DataError: unknown name or hash, nothing there, a download that differs from its hash, an unsafe archive.
    """
    if name not in DATASETS:
        raise DataError(f"unknown data set {name!r}; known are {', '.join(DATASETS)}")
    hashes = dict(hashes or {})
    if strange := hashes.keys() - {archive.name for archive in DATASETS[name]}:
        raise DataError(f"{name} has no archive {min(strange)}; it has {', '.join(a.name for a in DATASETS[name])}")
    directory = Path(directory)
    for archive in DATASETS[name]:
        expected = hashes.get(archive.name, archive.sha256)
        if expected is None and not unverified:
            raise DataError(
                f"the SHA-256 of {archive.address} is not known here: give it by --sha256 {archive.name}=HASH, or"
                " accept whatever the server sends by --unverified"
            )
        _get(archive, directory, expected, mirror, keep_archives)


def _get(archive: Archive, directory: Path, expected: str | None, mirror: str, keep: bool) -> None:
    """One archive: fetched, verified, unpacked; its state in directory/.downloads."""
    state = directory / ".downloads"
    state.mkdir(parents=True, exist_ok=True)
    file, done = state / archive.name, state / f"{archive.name}.done"
    if done.exists():
        logger.info("%s is there already (%s says so)", archive.name, done)
        return
    if not file.exists():
        address = f"{mirror.rstrip('/')}/{archive.name}" if mirror else archive.address
        fetch(address, file)
    found = verify(file, expected)
    unpack(file, directory)
    done.write_text(f"{found}\n", encoding="ascii")
    if not keep:
        file.unlink()


def verify(file: Path, expected: str | None) -> str:
    """The file's SHA-256, which begins with `expected` or is `expected`; None: nothing is known. Deletes another file.

    Raises DataError: another hash.
    """
    found = sha256_of(file)
    if expected is None:
        logger.warning("%s is NOT VERIFIED: its SHA-256 is %s, and nothing is known to compare it with", file, found)
    elif not found.startswith(expected.lower()):
        file.unlink()
        raise DataError(
            f"{file.name} has SHA-256 {found}, but must have {expected}: it is damaged or another file, and was"
            " deleted; download again"
        )
    return found


def fetch(address: str, file: Path) -> None:
    """Downloads to `file`, by way of FILE.part, which the next call goes on from. Raises DataError."""
    if not address.startswith(("http://", "https://")):
        raise DataError(f"{address} is no http or https address")
    part, tag = Path(f"{file}.part"), Path(f"{file}.etag")
    try:
        total = _receive(address, part, tag)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # the part is longer than the file
            part.unlink(missing_ok=True)
        raise DataError(f"{address}: the server says {error.code} {error.reason}") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise DataError(f"{address} cannot be downloaded: {reason}; {_GOES_ON}") from error
    have = part.stat().st_size
    if total is not None and have != total:
        raise DataError(f"{address}: the connection ended after {have} of {total} bytes; {_GOES_ON}")
    os.replace(part, file)
    tag.unlink(missing_ok=True)


def _receive(address: str, part: Path, tag: Path) -> int | None:
    """Appends to `part` what is missing, or begins anew. Returns the size of the whole, where the server says it."""
    have = part.stat().st_size if part.exists() and tag.exists() else 0
    headers = {"User-Agent": "maskrcnn_benchmark", "Accept-Encoding": "identity"}
    if have:
        # The server sends the rest only if its file is still the one that the part is of.
        headers |= {"Range": f"bytes={have}-", "If-Range": tag.read_text(encoding="latin-1")}
    with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=_TIMEOUT) as response:
        resumed = response.status == 206
        if resumed and not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            raise ValueError(f"the server sends another part than the one from byte {have} on")
        have = have if resumed else 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else None
        validator = response.headers.get("ETag") or response.headers.get("Last-Modified")
        if validator and not validator.startswith("W/"):
            tag.write_text(validator, encoding="latin-1")
        else:
            tag.unlink(missing_ok=True)  # nothing to recognise the file by: the next call begins anew
        with open(part, "ab" if resumed else "wb") as output:
            _copy(response, output, have, total, part.name)
    return total


def _copy(response: IO[bytes], output: IO[bytes], have: int, total: int | None, name: str) -> None:
    """The body, with a line in the log every ten seconds."""
    logged = time.monotonic()
    while chunk := response.read(_CHUNK):
        output.write(chunk)
        have += len(chunk)
        if time.monotonic() - logged > 10:
            logged = time.monotonic()
            share = f" of {total / 1e6:.0f}" if total else ""
            logger.info("%s: %.0f%s MB", name, have / 1e6, share)


def sha256_of(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


# --------------------------------------------------------------------------------------------------- unpacking


@dataclass(frozen=True)
class _Member:
    """A file or directory of an archive. open: None for a directory."""

    name: str
    size: int
    open: Callable[[], IO[bytes]] | None


def unpack(file: Path, directory: Path) -> None:
    """Unpacks a zip or tar file; all of it or nothing. Nothing that lies there is overwritten.

    Raises DataError: a damaged archive, or one with a member outside `directory`, a link or device, a name twice, or
    more content than an honest archive of its size can have.
    """
    directory.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=directory, prefix=".unpacking-"))
    try:
        with _members(file) as members:
            _write_all(file, members, unfinished)
        entries = sorted(unfinished.iterdir())
        _check_free(entries, unfinished, directory)
        for entry in entries:
            _merge(entry, directory / entry.name)
    except _DAMAGES as error:
        raise DataError(f"{file} cannot be unpacked: {error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def _members(file: Path) -> Iterator[Iterator[_Member]]:
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            yield (_zip_member(archive, info, file) for info in archive.infolist())
    elif tarfile.is_tarfile(file):
        with tarfile.open(file) as archive:
            yield (_tar_member(archive, info, file) for info in archive)
    else:
        raise DataError(f"{file} is neither a zip nor a tar archive")


def _zip_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, file: Path) -> _Member:
    kind = stat.S_IFMT(info.external_attr >> 16)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise DataError(f"{file}: {info.filename!r} is a link or a device: refused")
    return _Member(info.filename, info.file_size, None if info.filename.endswith("/") else lambda: archive.open(info))


def _tar_member(archive: tarfile.TarFile, info: tarfile.TarInfo, file: Path) -> _Member:
    if not (info.isfile() or info.isdir()):
        raise DataError(f"{file}: {info.name!r} is a link or a device: refused")
    return _Member(info.name, info.size, None if info.isdir() else lambda: archive.extractfile(info))


def _write_all(file: Path, members: Iterator[_Member], root: Path) -> None:
    most = max(_HARMLESS, _MOST_GROWTH * file.stat().st_size)
    most = min(most, shutil.disk_usage(root).free)
    written = 0
    for number, member in enumerate(members):
        target = root / _safe_path(member.name, file)
        written += member.size
        if written > most or number >= _MOST_FILES:
            raise DataError(
                f"{file} claims {written} bytes in {number + 1} files by {member.name!r}: more than {most} bytes (free"
                f" space, or {_MOST_GROWTH} times its size) or {_MOST_FILES} files are refused"
            )
        target.mkdir(parents=True, exist_ok=True) if member.open is None else _write(member, target, file)


def _write(member: _Member, target: Path, file: Path) -> None:
    """What the member claims to hold, not a byte more: the claim was counted."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        raise DataError(f"{file} has {member.name!r} twice")
    with member.open() as source, open(target, "xb") as output:
        left = member.size
        while chunk := source.read(min(_CHUNK, left + 1)):
            left -= len(chunk)
            if left < 0:
                raise DataError(f"{file}: {member.name!r} holds more than the {member.size} bytes that it claims")
            output.write(chunk)


def _safe_path(name: str, file: Path) -> PurePosixPath:
    """The member's path below the directory of unpacking."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or set(name) & set("\\:\0"):
        raise DataError(f"{file}: {name!r} would be written outside the directory: refused")
    return path


def _check_free(entries: list[Path], unfinished: Path, directory: Path) -> None:
    for entry in entries:
        for path in [entry, *entry.rglob("*")] if entry.is_dir() else [entry]:
            target = directory / path.relative_to(unfinished)
            if target.is_symlink() or (target.exists() and not (path.is_dir() and target.is_dir())):
                raise DataError(f"{target} exists already: remove it, or choose another directory")


def _merge(source: Path, target: Path) -> None:
    """Moves a file or directory; a directory that is there already takes the new entries."""
    if not target.exists():
        source.rename(target)
        return
    for entry in source.iterdir():
        _merge(entry, target / entry.name)
