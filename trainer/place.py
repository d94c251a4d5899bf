"""Where a dataset lies, a local folder or a URL, as one kind of path; what a URL needs besides."""

import hashlib
import os
import stat
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, BinaryIO, cast
from urllib.parse import urlsplit

import fsspec
from pydantic import PlainSerializer, PlainValidator
from upath import UPath

from trainer.errors import BadInput, BadWorld

NUM_REQUESTS = 32
"""Requests to a remote storage at the same time, where many small ones are due."""

_EXTRAS = {"s3": "s3", "s3a": "s3"}
# A server that is being restarted is back within these attempts: 15 s on average, 31 s at most.
_PATIENT = {"mode": "standard", "max_attempts": 6}
_HASTY = {"mode": "standard", "max_attempts": 1}
_TIMEOUTS_S = {"connect_timeout": 5, "read_timeout": 60}
_CREDENTIALS = (
    "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or AWS_PROFILE with ~/.aws/credentials)"
)
_ENDPOINT = "AWS_ENDPOINT_URL_S3 for a server that is not Amazon's, and AWS_DEFAULT_REGION"


def place(where: str | Path) -> Path:
    """Give the path of a local folder or of a URL that fsspec knows (s3://bucket/name, memory://x).

    Paths of URLs can do what is asked of a dataset's path, but are no `os.PathLike`: what wants a
    file's name needs `is_local` first. Their listings are never cached.

    Raises:
        BadInput: The URL has credentials in it, or nothing here can open it.
    """
    if not isinstance(where, str) or "://" not in where:
        return Path(where) if isinstance(where, str) else where
    protocol = where.partition("://")[0]
    if "@" in urlsplit(where).netloc or "::" in protocol:
        raise BadInput(
            f"a URL {protocol}://... with credentials or further protocols in it is refused: "
            f"configurations are stored and printed. Give the plain URL, and set {_CREDENTIALS}."
        )
    if protocol in {"file", "local"}:
        return Path(urlsplit(where).path)
    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        extra = _EXTRAS.get(protocol)
        remedy = f"pip install -e '.[{extra}]'" if extra else f"pip install what it names: {error}"
        raise BadInput(
            f"{where}: {protocol}:// needs a package that is missing: {remedy}"
        ) from error
    except ValueError as error:
        raise BadInput(
            f"{where}: {protocol}:// is unknown. Give a folder, s3://BUCKET/NAME, or another URL "
            "that fsspec knows."
        ) from error
    return cast(Path, UPath(where, **_options(protocol, _PATIENT)))


Place = Annotated[Path, PlainValidator(place), PlainSerializer(str, return_type=str)]
"""A config's folder or URL."""


def _options(protocol: str, retries: dict[str, Any]) -> dict[str, Any]:
    if protocol not in _EXTRAS:
        return {"use_listings_cache": False}
    return {"use_listings_cache": False, "config_kwargs": {"retries": retries, **_TIMEOUTS_S}}


def is_local(path: Path) -> bool:
    """Whether the operating system knows the path."""
    return isinstance(path, Path)


def remote(path: Path) -> tuple[Any, str]:
    """Give the fsspec file system of a remote path, and its name there."""
    where = cast(UPath, path)
    return where.fs, where.path


def read_bytes(path: Path) -> bytes:
    """Read a whole file, with one request."""
    if is_local(path):
        return path.read_bytes()
    fs, name = remote(path)
    return cast(bytes, fs.cat_file(name))


def put_bytes(path: Path, data: bytes) -> None:
    """Write a whole remote file, with one request: nobody sees a part of it."""
    fs, name = remote(path)
    fs.pipe_file(name, data)


def open_sparsely(path: Path) -> BinaryIO:
    """Open a file of which little is read, here and there; remote, each read is one request."""
    if is_local(path):
        return path.open("rb")
    fs, name = remote(path)
    return cast(BinaryIO, fs.open(name, "rb", cache_type="none"))


def sizes_bytes(paths: Sequence[Path]) -> list[int | None]:
    """Measure files, remote ones at the same time; None is a file that is not there."""
    if all(is_local(path) for path in paths):
        return [_size_bytes(path) for path in paths]
    with ThreadPoolExecutor(NUM_REQUESTS) as threads:
        return list(threads.map(_size_bytes, paths))


def _size_bytes(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return None


def file_version(path: Path) -> str | None:
    """Give what changes when a file is written again; None if it is not there.

    Of a local file the time of its change, of a remote one what its storage says of it, with one
    request.
    """
    try:
        if is_local(path):
            return str(path.stat().st_mtime_ns)
        fs, name = remote(path)
        facts = fs.info(name)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return str(facts.get("ETag") or facts.get("LastModified") or facts.get("size"))


def remove(path: Path) -> None:
    """Remove a file, if it is there."""
    if is_local(path):
        path.unlink(missing_ok=True)
        return
    fs, name = remote(path)
    try:
        fs.rm_file(name)
    except FileNotFoundError:
        return


def local_folder(path: Path) -> Path:
    """Give this user's folder on this machine for what belongs to a remote place.

    It lies in the system's temporary folder; TMPDIR names another one.
    """
    name = hashlib.sha256(str(path).encode()).hexdigest()[:16]
    own = Path(tempfile.gettempdir()) / f"kiln-{os.getuid()}"
    own.mkdir(mode=0o700, exist_ok=True)
    found = own.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise BadWorld(f"{own} is not a folder of this user. Set TMPDIR to a folder that is.")
    folder = own / name
    folder.mkdir(exist_ok=True)
    return folder


@contextmanager
def storage(where: Path) -> Iterator[None]:
    """Do work on a dataset: the storage is asked first, and its errors say what to do.

    Raises:
        BadInput: No such bucket, or it does not take the credentials.
        BadWorld: The storage cannot be reached, or failed in mid-work.
    """
    with storage_errors(where):
        if not is_local(where):
            _ask(cast(UPath, where))
        yield


def _ask(where: UPath) -> None:
    if where.protocol not in _EXTRAS:
        where.exists()
        return
    # A listing, as its errors have a body that tells a wrong key from a missing bucket.
    bucket, _, prefix = where.path.partition("/")
    fs = fsspec.filesystem(where.protocol, **_options(where.protocol, _HASTY))
    fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=f"{prefix}/", MaxKeys=1)


@contextmanager
def storage_errors(where: Path) -> Iterator[None]:
    """Turn what an S3 storage or its client says into errors that say what to do."""
    try:
        yield
    except (BadInput, BadWorld):
        raise
    except Exception as error:
        explained = None if is_local(where) else explain(where, error)
        if explained is None:
            raise
        raise explained from error


def explain(where: Path, error: Exception) -> BadInput | BadWorld | None:
    """Say what is wrong and what to do about it; None for errors that are not the storage's."""
    ours: BaseException | None = error
    while ours is not None:
        answer = getattr(ours, "response", None)  # as botocore gives it, in all of its errors
        if isinstance(answer, dict):
            problem = answer.get("Error", {})
            return _refused(where, str(problem.get("Code")), str(problem.get("Message")))
        ours = ours.__cause__
    if type(error).__name__ in {"NoCredentialsError", "PartialCredentialsError"}:
        return BadInput(f"{where}: no credentials found. Set {_CREDENTIALS}.")
    if type(error).__module__.partition(".")[0] in {"botocore", "aiobotocore", "aiohttp"}:
        return BadWorld(
            f"{where}: the storage cannot be reached or broke off ({error}). What is published is "
            f"valid; give the same command again. If it never works, set {_ENDPOINT}."
        )
    return None


def _refused(where: Path, code: str, message: str) -> BadInput | BadWorld:
    text = f"{where}: the storage says {code}: {message}"
    if code in {"NoSuchBucket", "InvalidBucketName"}:
        return BadInput(f"{text}. Make the bucket, or give another one; {_ENDPOINT} say where.")
    if code in {"AccessDenied", "AllAccessDisabled", "403"}:
        return BadInput(
            f"{text}. These credentials may not do that: reading needs the rights to list and get, "
            f"`kiln prepare` and `kiln encode` also those to put and delete. Set {_CREDENTIALS}."
        )
    if code in {"InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"}:
        return BadInput(f"{text}. Check {_CREDENTIALS}; {_ENDPOINT} say where they hold.")
    return BadWorld(f"{text}. What is published is valid; give the same command again.")
