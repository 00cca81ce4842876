"""What is sent and fetched: incompressible bytes, and a tree of small files. The same in every run."""

from __future__ import annotations

import gzip
import io
import random
import tarfile

MEGABYTE = 1_000_000
STREAM_MB = 50
SMALL_FILES = 2_000
SMALL_BYTES = 1_000
PER_DIRECTORY = 100


def stream_archive() -> bytes:
    """A tar.gz of one file, /stream, of STREAM_MB megabytes that do not compress."""
    return _archive([("stream", random.Random(1).randbytes(STREAM_MB * MEGABYTE))])


def files_archive() -> bytes:
    """A tar.gz of SMALL_FILES files of SMALL_BYTES bytes in directories of PER_DIRECTORY."""
    source = random.Random(2)
    names = (f"d{number // PER_DIRECTORY:03}/f{number:05}" for number in range(SMALL_FILES))
    return _archive([(name, source.randbytes(SMALL_BYTES)) for name in names])


def _archive(files: list[tuple[str, bytes]]) -> bytes:
    target = io.BytesIO()
    with (
        gzip.GzipFile(fileobj=target, mode="wb", compresslevel=1, mtime=0) as compressed,
        tarfile.open(fileobj=compressed, mode="w|") as tar,
    ):
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return target.getvalue()
