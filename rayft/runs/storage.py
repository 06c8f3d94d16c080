"""Storage: a local folder or a bucket behind one small interface. A file is complete or absent.

Buckets (s3:// gs:// abfss:// through pyarrow, anything else through fsspec) know neither append nor rename, so nothing
here appends, and what needs a real file system (a lock) refuses a bucket.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow.fs as fs
from filelock import FileLock, Timeout

from rayft.errors import UsageError

MARKER = ".complete"


@dataclass(frozen=True)
class Location:
    """A file or folder: ``path`` inside ``filesystem``. ``str()`` gives a path or URI that opens it again.

    In a bucket the URI says more than the path (host, account), and a query may follow it (endpoint, region): what lies
    in a folder is ``folder / name``, never ``f"{folder}/{name}"``.
    """

    filesystem: fs.FileSystem
    path: str
    uri: str = ""
    """Without the query; empty on a local file system."""
    query: str = ""

    def __str__(self) -> str:
        return f"{self.uri or self.path}{self.query}"

    def __truediv__(self, name: str) -> Location:
        return Location(self.filesystem, f"{self.path}/{name}", self.uri and f"{self.uri}/{name}", self.query)

    @property
    def name(self) -> str:
        return self.path.rsplit("/", 1)[-1]

    @property
    def parent(self) -> Location:
        return Location(self.filesystem, self.path.rsplit("/", 1)[0], self.uri.rsplit("/", 1)[0], self.query)

    @property
    def is_local(self) -> bool:
        return isinstance(self.filesystem, fs.LocalFileSystem)

    @property
    def local(self) -> Path:
        """The path on this machine's file system. Raises UsageError R405 for a bucket."""
        if not self.is_local:
            raise UsageError("R405", f"{self} is a bucket, and this needs a file system", "use a folder all nodes see")
        return Path(self.path)

    def is_file(self) -> bool:
        return bool(self.filesystem.get_file_info(self.path).type == fs.FileType.File)

    def is_folder(self) -> bool:
        return bool(self.filesystem.get_file_info(self.path).type == fs.FileType.Directory)

    def exists(self) -> bool:
        return bool(self.filesystem.get_file_info(self.path).type != fs.FileType.NotFound)

    def children(self) -> list[Location]:
        """What lies directly in this folder, by name; nothing when there is no such folder."""
        found = self.filesystem.get_file_info(fs.FileSelector(self.path, allow_not_found=True))
        return [self / name for name in sorted(info.base_name for info in found)]

    def folders(self) -> list[Location]:
        """The folders directly in this folder, by name."""
        found = self.filesystem.get_file_info(fs.FileSelector(self.path, allow_not_found=True))
        return [self / name for name in sorted(info.base_name for info in found if info.type == fs.FileType.Directory)]

    def files(self) -> dict[str, int]:
        """Relative name -> size in bytes of every file in this folder and below."""
        selector = fs.FileSelector(self.path, recursive=True, allow_not_found=True)
        files = [info for info in self.filesystem.get_file_info(selector) if info.type == fs.FileType.File]
        return {info.path[len(self.path) + 1 :]: info.size for info in sorted(files, key=lambda info: info.path)}

    def read(self) -> bytes:
        with self.filesystem.open_input_stream(self.path, compression=None) as stream:
            return bytes(stream.read())

    def write(self, data: bytes) -> None:
        """Replace the file's content in one piece: a reader sees the old bytes or the new ones, also after a crash."""
        if self.is_local:
            _replace_local(self.local, data)
        else:
            with self.filesystem.open_output_stream(self.path, compression=None) as stream:
                stream.write(data)

    def make_folder(self) -> None:
        self.filesystem.create_dir(self.path, recursive=True)

    def remove(self) -> None:
        """Delete the file or the whole folder; nothing happens when it is not there."""
        if self.is_folder():
            self.filesystem.delete_dir(self.path)
        elif self.exists():
            self.filesystem.delete_file(self.path)

    def copy_to(self, target: Location) -> None:
        """Copy this folder's content into the folder ``target``, on whichever storage it lies."""
        target.make_folder()
        fs.copy_files(
            self.path,
            target.path,
            source_filesystem=self.filesystem,
            destination_filesystem=target.filesystem,
            use_threads=self.is_local or target.is_local,
        )

    def move_to(self, target: Location) -> None:
        """Rename the folder. In a bucket, which cannot: copy everything, then delete."""
        if self.is_local and target.is_local:
            os.rename(self.local, target.local)
        else:
            self.copy_to(target)
            self.remove()


def locate(place: str | os.PathLike[str] | Location) -> Location:
    """The Location of a local path or a URI. Raises UsageError R415 when the URI cannot be understood."""
    if isinstance(place, Location):
        return place
    text = os.fspath(place)
    if "://" not in text:
        return Location(fs.LocalFileSystem(), os.path.abspath(os.path.expanduser(text)))
    bare, mark, query = text.partition("?")
    try:
        filesystem, path = fs.FileSystem.from_uri(text)
    except ValueError:  # pyarrow does not know this scheme
        filesystem, path = _through_fsspec(text)
    except OSError as problem:
        raise _not_opened(text, problem) from problem
    if isinstance(filesystem, fs.LocalFileSystem):
        return Location(filesystem, path.rstrip("/"))
    return Location(filesystem, path.rstrip("/"), bare.rstrip("/"), mark + query)


def _through_fsspec(uri: str) -> tuple[fs.FileSystem, str]:
    import fsspec

    try:
        handler, path = fsspec.core.url_to_fs(uri)
    except (ValueError, ImportError, OSError) as problem:
        raise _not_opened(uri, problem) from problem
    return fs.PyFileSystem(fs.FSSpecHandler(handler)), path


def _not_opened(uri: str, problem: Exception) -> UsageError:
    return UsageError(
        "R415", f"storage {uri!r} cannot be opened: {problem}", "use a folder, s3://, gs:// or abfss:// within reach"
    )


def _replace_local(path: Path, data: bytes) -> None:
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def local_copy(place: Location, target: Path) -> str:
    """Copy a folder of a bucket to ``target`` on this machine, once for all processes here, and return its path."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not is_committed(target):
            with staged(locate(target)) as folder:
                place.copy_to(locate(folder))
    return str(target)


def write_atomic(place: str | os.PathLike[str] | Location, data: bytes | str) -> None:
    """Write a file so that it is complete or absent; folders above it are made."""
    location = locate(place)
    if location.is_local:
        location.local.parent.mkdir(parents=True, exist_ok=True)
    location.write(data.encode() if isinstance(data, str) else data)


def commit(folder: str | os.PathLike[str] | Location) -> None:
    """Declare a folder complete: the marker is written after everything else."""
    (locate(folder) / MARKER).write(b"")


def is_committed(folder: str | os.PathLike[str] | Location) -> bool:
    return (locate(folder) / MARKER).is_file()


def lock(path: str | os.PathLike[str] | Location, timeout: float = 0) -> FileLock:
    """Take an exclusive lock on a file, waiting at most ``timeout`` seconds; it ends with ``release()`` or the process.

    Raises UsageError R405 for a bucket and R406 when another process holds the lock.
    """
    location = locate(path)
    file = FileLock(location.local)
    try:
        file.acquire(timeout=timeout)
    except Timeout as problem:
        raise UsageError(
            "R406", f"{location} is locked: another process works on it", "wait for it to end, or stop it first"
        ) from problem
    return file


def check_writable(folder: Location) -> None:
    """Write and delete a probe file. Raises UsageError R401 with the file system's own reason."""
    probe = folder / f".probe-{os.getpid()}"
    try:
        folder.make_folder()
        probe.write(b"")
        probe.remove()
    except (OSError, ValueError) as problem:
        reason = str(problem).splitlines()[0]
        raise UsageError(
            "R401",
            f"storage {str(folder)!r} cannot be written: {reason}",
            "choose another one: storage=/path/or/s3://...",
        ) from problem


@contextmanager
def staged(target: Location) -> Iterator[Path]:
    """A local folder that becomes ``target`` when the block ends without an error, and leaves no trace otherwise.

    A former ``target`` is replaced. On a file system the folder appears in one rename; in a bucket it is uploaded and
    committed by its marker, so readers ask `is_committed`.
    """
    parent = target.local.parent if target.is_local else None
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=parent))
    os.chmod(staging, 0o755)
    try:
        yield staging
        commit(staging)
        if target.is_local:
            if target.exists():
                former = staging.with_name(f"{staging.name}.former")
                os.rename(target.local, former)
                os.rename(staging, target.local)
                shutil.rmtree(former)
            else:
                os.rename(staging, target.local)
        else:
            (target / MARKER).remove()
            target.remove()
            (staging / MARKER).unlink()
            locate(staging).copy_to(target)
            commit(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
