"""A strict, incremental reader of tar streams that come from callers.

It accepts what an upload may hold, regular files and directories in the v7, ustar, GNU and pax formats, and refuses
everything else, and everything on whose meaning tar readers differ. Sans-I/O: bytes in, entries and content out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

from rundatsheesh.manager.errors import InvalidInput

BLOCK = 512
MAX_PATH_BYTES = 4096
MAX_COMPONENT_BYTES = 255
# A pax header may carry extended attributes and access lists besides the name; more than this is an attack.
MAX_EXTENSION_BYTES = 1 << 20
# The largest size that eleven octal digits hold. Beyond it a pax `size` record is the only truth, and writers put
# 0 or this value into the header.
_OCTAL_MAX = 0o77777777777
_MAX_INT64 = 2**63 - 1

_POSIX_MAGIC, _GNU_MAGIC, _V7_MAGIC = b"ustar\x0000", b"ustar  \x00", bytes(8)
_REFUSED_TYPES = {
    b"1": "hard link",
    b"2": "symbolic link",
    b"3": "character device",
    b"4": "block device",
    b"6": "fifo",
    b"K": "link",
    b"S": "sparse file",
}
_EXTENSION_TYPES = (b"L", b"x", b"g")
_NUMBER = re.compile(rb"[ ]*([0-7]+)[ \0]*|[ \0]*")
_PAX_TIME = re.compile(rb"(-?)(\d{1,20})(?:\.(\d*))?")
# Records that change which bytes make up an entry, or what it is, in some readers only.
_REFUSED_PAX = (b"linkpath", b"GNU.sparse.", b"GNU.volume.", b"SCHILY.realsize", b"SCHILY.filetype")


class TarEntry(NamedTuple):
    """A regular file or directory. `path` is relative, without `.`, `..` or empty parts; empty for the root itself."""

    path: bytes
    is_dir: bool
    mode: int  # the nine permission bits
    size: int
    mtime_ns: int
    start: int  # of its content in the stream


@dataclass(frozen=True, slots=True)
class _Extension:
    """What the extension headers before an entry said about it."""

    kind: bytes = b""
    path: bytes | None = None
    size: int | None = None
    mtime_ns: int | None = None


_NO_EXTENSION = _Extension()


@dataclass(slots=True)
class _Pending:
    """An extension header whose content is being collected."""

    kind: bytes
    size: int
    content: bytearray = field(default_factory=bytearray)


def refusal(reason: str, why: str, entry: bytes | None = None) -> InvalidInput:
    """The error for an archive that is not taken. `reason` is a stable word, `why` a clause for people."""
    details = {"reason": reason}
    if entry is None:
        return InvalidInput(f"the archive is refused: {why}", code="archive_invalid", details=details)
    details["entry"] = printable(entry)
    return InvalidInput(
        f"the archive is refused: entry {details['entry']}: {why}", code="archive_invalid", details=details
    )


def printable(name: bytes) -> str:
    """A hostile name as one quoted, bounded line of text."""
    text = name[:200].decode("utf-8", "backslashreplace")
    safe = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return f"'{safe[:120]}…'" if len(safe) > 120 or len(name) > 200 else f"'{safe}'"


class TarReader:
    """Feed it chunks of the stream, then `close()`. Raises InvalidInput (`archive_invalid`) at the first offence."""

    def __init__(self) -> None:
        self._torn = b""  # the beginning of a header of which the chunk before had no more
        self._extension = _NO_EXTENSION
        self._pending: _Pending | None = None
        self._fed = 0  # bytes of all chunks so far
        self._skipped = 0  # bytes of content and padding before the next header
        self._zero_blocks = 0
        self._global_headers = 0

    def feed(self, chunk: bytes) -> Iterator[TarEntry]:
        """Yield each entry when its header is complete. Its content need not have been fed by then."""
        position, end = 0, len(chunk)
        while position < end:
            if self._skipped:
                taken = min(self._skipped, end - position)
                self._skipped -= taken
                position += taken
            elif self._zero_blocks == 2:
                _require_zeros(memoryview(chunk)[position:])
                position = end
            elif self._pending:
                position += self._collect_extension(self._pending, memoryview(chunk)[position:])
            else:
                header = self._torn + chunk[position : position + BLOCK - len(self._torn)]
                position += len(header) - len(self._torn)
                self._torn = header if len(header) < BLOCK else b""
                if not self._torn and (entry := self._take_header(header, self._fed + position)):
                    yield entry
        self._fed += end

    def close(self) -> None:
        """Tell that the stream ended; refuses one that ended early."""
        if self._zero_blocks != 2:
            raise refusal("truncated", "it ends before the end-of-archive mark")

    def _collect_extension(self, pending: _Pending, view: memoryview) -> int:
        """How much of the view belonged to it."""
        missing = pending.size - len(pending.content)
        pending.content += view[:missing]
        if len(pending.content) == pending.size:
            self._pending = None
            self._skipped = -pending.size % BLOCK
            self._take_extension(pending.kind, bytes(pending.content))
        return min(missing, len(view))

    def _take_header(self, header: bytes, position: int) -> TarEntry | None:
        if not any(header):
            if self._extension.kind:
                raise refusal("malformed", "an extension header belongs to no entry")
            self._zero_blocks += 1
            return None
        if self._zero_blocks:
            raise refusal("trailing_data", "there is data after the end-of-archive mark")
        rest = _rest(header[156:])
        _check_header(header, rest)
        if rest.kind in _EXTENSION_TYPES:
            self._start_extension(rest.kind, header)
            return None
        extension, self._extension = self._extension, _NO_EXTENSION
        entry = _entry(rest, header, extension, position)
        self._skipped = entry.size + -entry.size % BLOCK
        return entry

    def _start_extension(self, kind: bytes, header: bytes) -> None:
        size = _number(header[124:136], "size", b"")
        if self._extension.kind:
            raise refusal("malformed", "two extension headers stand before one entry")
        if size > MAX_EXTENSION_BYTES or (kind == b"L" and size > MAX_PATH_BYTES + 1):
            raise refusal("name_too_long", f"an extension header of {size} bytes is over the limit")
        if kind == b"g":
            self._global_headers += 1
            if self._global_headers > 16:
                raise refusal("malformed", "there are more than 16 global headers")
        if size == 0:
            raise refusal("malformed", "an extension header is empty")
        self._pending = _Pending(kind, size)

    def _take_extension(self, kind: bytes, content: bytes) -> None:
        if kind == b"L":
            self._extension = _Extension(kind, path=content[:-1] if content.endswith(b"\0") else content)
            return
        records = _pax_records(content)
        if kind == b"g":
            for key in (b"path", b"size"):
                if key in records:
                    raise refusal("malformed", f"a global header sets {key.decode()}")
            return
        size = records.get(b"size")
        mtime = records.get(b"mtime")
        self._extension = _Extension(
            kind,
            path=records.get(b"path"),
            size=None if size is None else _decimal(size),
            mtime_ns=None if mtime is None else _pax_time(mtime),
        )


def _check_header(header: bytes, rest: _Rest) -> None:
    recorded = _NUMBER.fullmatch(header[148:156])
    actual = _sum(header[:148]) + 8 * ord(" ") + rest.sum
    if not recorded or not recorded[1] or int(recorded[1], 8) != actual:
        raise refusal("not_tar", "a header has a wrong checksum, so this is not a tar stream or it is damaged")
    if rest.magic not in (_POSIX_MAGIC, _GNU_MAGIC, _V7_MAGIC):
        raise refusal("not_tar", "a header is of no known tar format")
    if header[508:512] == b"tar\0":
        raise refusal("not_tar", "the xstar format is not supported")


class _Rest(NamedTuple):
    """Of a header behind its checksum: what the files of an archive mostly have in common."""

    sum: int  # of the bytes
    kind: bytes
    magic: bytes
    prefix: bytes  # only POSIX headers have one; GNU keeps times and sparse maps in the same place


@lru_cache(maxsize=64)
def _rest(raw: bytes) -> _Rest:
    magic = raw[101:109]
    return _Rest(_sum(raw), raw[:1], magic, raw[189:344].rstrip(b"\0") if magic == _POSIX_MAGIC else b"")


def _sum(raw: bytes) -> int:
    """Most of a header is zeros, which are faster left out than added."""
    return sum(raw.translate(None, b"\0"))


def _entry(rest: _Rest, header: bytes, extension: _Extension, start: int) -> TarEntry:
    raw = _header_name(header, rest) if extension.path is None else extension.path
    kind = rest.kind
    if kind != b"0":
        _check_kind(kind, raw)
    # Before typeflag 5 existed, a name with a trailing slash was how a directory looked.
    is_dir = kind == b"5" or (kind == b"\0" and raw.endswith(b"/"))
    path = _normalised(raw, is_dir)
    size = _entry_size(header, extension, raw)
    if is_dir and size:
        raise refusal("malformed", "a directory has content", raw)
    mode = _number(header[100:108], "mode", raw) & 0o777
    return TarEntry(path, is_dir, mode, size, _mtime(header, extension, raw), start)


def _check_kind(kind: bytes, raw: bytes) -> None:
    if kind in _REFUSED_TYPES:
        raise refusal("link" if kind in b"12K" else "special_file", f"a {_REFUSED_TYPES[kind]} is not allowed", raw)
    if kind not in (b"\0", b"7", b"5"):
        raise refusal("unknown_type", f"its type {printable(kind)} is not supported", raw)


def _header_name(header: bytes, rest: _Rest) -> bytes:
    name = _text(header[0:100])
    return _text(rest.prefix) + b"/" + name if rest.prefix else name


def _text(raw: bytes) -> bytes:
    """A NUL-padded field; bytes behind the first NUL would be read by some readers and not by others."""
    value = raw.rstrip(b"\0")
    if b"\0" in value:
        raise refusal("bad_name", "the name holds a NUL byte", value)
    return value


def _normalised(raw: bytes, is_dir: bool) -> bytes:
    if not raw:
        raise refusal("bad_name", "the name is empty", raw)
    if b"\0" in raw:
        raise refusal("bad_name", "the name holds a NUL byte", raw)
    if raw.startswith(b"/"):
        raise refusal("absolute_name", "the name is absolute", raw)
    if len(raw) > MAX_PATH_BYTES:
        raise refusal("name_too_long", f"the name is longer than {MAX_PATH_BYTES} bytes", raw)
    parts = raw.split(b"/")
    if b".." in parts:
        raise refusal("parent_name", "the name holds '..'", raw)
    if not is_dir and parts[-1] in (b"", b"."):
        raise refusal("bad_name", "a file has the name of a directory", raw)
    if len(raw) > MAX_COMPONENT_BYTES and any(len(part) > MAX_COMPONENT_BYTES for part in parts):
        raise refusal("name_too_long", f"a part of the name is longer than {MAX_COMPONENT_BYTES} bytes", raw)
    if b"" in parts or b"." in parts:
        return b"/".join(part for part in parts if part not in (b"", b"."))
    return raw


def _entry_size(header: bytes, extension: _Extension, raw: bytes) -> int:
    size = _number(header[124:136], "size", raw)
    if extension.size is None or extension.size == size:
        return size
    if extension.size > _OCTAL_MAX and size in (0, _OCTAL_MAX):
        return extension.size
    raise refusal("malformed", f"the pax size {extension.size} contradicts the header's {size}", raw)


def _mtime(header: bytes, extension: _Extension, raw: bytes) -> int:
    """Nanoseconds since 1970; times before it count as 1970."""
    if extension.mtime_ns is not None:
        return extension.mtime_ns
    seconds = _number(header[136:148], "mtime", raw, negative_ok=True)
    return max(0, min(seconds * 10**9, _MAX_INT64))


def _number(raw: bytes, what: str, entry: bytes, *, negative_ok: bool = False) -> int:
    """An octal field, or GNU's base-256 where the first bit is set. Blank is 0."""
    if raw[0] & 0x80:
        value = int.from_bytes(raw, "big", signed=True) if raw[0] == 0xFF else int.from_bytes(raw[1:], "big")
        if raw[0] not in (0x80, 0xFF) or (value < 0 and not negative_ok) or not -_MAX_INT64 <= value <= _MAX_INT64:
            raise refusal("bad_number", f"its {what} is out of range", entry)
        return value
    octal = _octal(raw)
    if octal is None:
        raise refusal("bad_number", f"its {what} is not a number", entry)
    return octal


@lru_cache(maxsize=256)  # the files of an archive have few modes, and often few times
def _octal(raw: bytes) -> int | None:
    match = _NUMBER.fullmatch(raw)
    if not match:
        return None
    return int(match[1], 8) if match[1] else 0


def _decimal(raw: bytes) -> int:
    if not re.fullmatch(rb"\d{1,19}", raw) or int(raw) > _MAX_INT64:
        raise refusal("bad_number", "a pax size is not a number in range")
    return int(raw)


def _pax_time(raw: bytes) -> int:
    match = _PAX_TIME.fullmatch(raw)
    if not match:
        raise refusal("bad_number", "a pax mtime is not a number")
    if match[1]:
        return 0
    fraction = int((match[3] or b"")[:9].ljust(9, b"0"))
    return min(int(match[2]) * 10**9 + fraction, _MAX_INT64)


def _pax_records(content: bytes) -> dict[bytes, bytes]:
    """The records `LENGTH KEY=VALUE\\n`, where LENGTH counts the whole record."""
    records: dict[bytes, bytes] = {}
    position = 0
    while position < len(content):
        space = content.find(b" ", position, position + 8)
        digits = content[position:space]
        if space < 0 or not re.fullmatch(rb"[1-9]\d*", digits):
            raise refusal("malformed", "a pax record has no length")
        end = position + int(digits)
        key, equals, value = content[space + 1 : end - 1].partition(b"=")
        if end > len(content) or content[end - 1 : end] != b"\n" or not key or not equals:
            raise refusal("malformed", "a pax record does not fit its length")
        if key.startswith(_REFUSED_PAX):
            raise refusal("special_file", f"the pax record {printable(key)} is not allowed", records.get(b"path"))
        if key in (b"path", b"size", b"mtime") and (key in records or not value):
            raise refusal("malformed", f"the pax record {key.decode()} is empty or given twice")
        if key in (b"path", b"size", b"mtime"):
            records[key] = value
        position = end
    return records


def _require_zeros(view: memoryview) -> None:
    if bytes(view).strip(b"\0"):
        raise refusal("trailing_data", "there is data after the end-of-archive mark")
