"""Every archive that an upload must refuse is refused, with the reason, and nothing of it is handed on."""

from __future__ import annotations

import gzip
import io
from collections.abc import AsyncIterator

import pytest
from archive_samples import END, GNU, V7, directory, file, gnu_long, header, padded, pax, record, tgz
from hypothesis import given, settings
from hypothesis import strategies as st

from rundatsheesh.manager.disk import archive
from rundatsheesh.manager.disk.archive import CheckedUpload, UploadLimits, check_upload
from rundatsheesh.manager.errors import InvalidInput, TooLarge

LIMITS = UploadLimits(compressed=64 << 20, content=256 << 20)
GOOD = file(b"first.txt")


async def check(data: bytes, limits: UploadLimits = LIMITS, step: int = 65536) -> CheckedUpload:
    async def body() -> AsyncIterator[bytes]:
        for start in range(0, len(data), step):
            yield data[start : start + step]

    return await check_upload(body(), io.BytesIO(), limits)


def base256(value: int) -> bytes:
    return (value % (1 << 96)).to_bytes(12, "big", signed=False) if value < 0 else b"\x80" + value.to_bytes(11, "big")


whole = gzip.compress(GOOD + END)

HOSTILE: dict[str, tuple[str, bytes]] = {
    # the envelope
    "empty body": ("truncated", b""),
    "plain text": ("not_gzip", b"hello, I am not an archive"),
    "a bare tar": ("not_gzip", GOOD + END),
    "a zip": ("not_gzip", b"PK\x03\x04" + bytes(100)),
    "only the gzip magic": ("truncated", b"\x1f\x8b"),
    "gzip cut in its header": ("truncated", whole[:7]),
    "gzip cut in its content": ("truncated", whole[: len(whole) // 2]),
    "gzip cut in its checksum": ("truncated", whole[:-3]),
    "gzip with a wrong checksum": ("not_gzip", whole[:-8] + bytes([whole[-8] ^ 1]) + whole[-7:]),
    "gzip with a wrong length": ("not_gzip", whole[:-1] + bytes([whole[-1] ^ 1])),
    "garbage behind the gzip": ("not_gzip", whole + b"garbage behind the end"),
    "little garbage behind the gzip": ("not_gzip", whole + b"garbage"),
    "one letter": ("not_gzip", b"g"),
    "zeros behind the gzip": ("not_gzip", whole + bytes(64)),
    "half a second member": ("truncated", whole + whole[:10]),
    "gzip of nothing": ("truncated", gzip.compress(b"")),
    "gzip of text": ("not_tar", gzip.compress(b"just some text, " * 100)),
    "gzip of gzip": ("not_tar", gzip.compress(whole * 20)),
    # the shape of the tar
    "tar without an end mark": ("truncated", gzip.compress(GOOD)),
    "tar with one zero block": ("truncated", gzip.compress(GOOD + bytes(512))),
    "tar cut in a header": ("truncated", gzip.compress(GOOD[:300])),
    "tar cut in a file": ("truncated", gzip.compress(file(b"a", b"x" * 2000)[:1500])),
    "tar cut in padding": ("truncated", gzip.compress(GOOD[:900])),
    "tar cut in a pax header": ("truncated", gzip.compress(pax(record(b"path", b"x"))[:520])),
    "pax header without entry": ("malformed", tgz(pax(record(b"path", b"x")))),
    "an entry behind a zero block": ("trailing_data", tgz(GOOD, bytes(512), file(b"hidden"))),
    "an entry behind the end": ("trailing_data", gzip.compress(GOOD + END + file(b"hidden"))),
    "text behind the end": ("trailing_data", gzip.compress(GOOD + END + b"text")),
    "a second archive behind the end": ("trailing_data", whole + gzip.compress(file(b"hidden") + END)),
    "wrong header checksum": ("not_tar", tgz(file(b"a", checksum=b"000001\0 "))),
    "blank header checksum": ("not_tar", tgz(file(b"a", checksum=bytes(8)))),
    "unknown magic": ("not_tar", tgz(file(b"a", magic=b"mustard!"))),
    "xstar": ("not_tar", tgz(file(b"a", tail=bytes(8) + b"tar\0"))),
    # names
    "absolute": ("absolute_name", tgz(file(b"/etc/passwd"))),
    "absolute directory": ("absolute_name", tgz(directory(b"/"))),
    "absolute by prefix": ("absolute_name", tgz(file(b"passwd", prefix=b"/etc"))),
    "absolute by long name": ("absolute_name", tgz(gnu_long(b"/" + b"a" * 120), file(b"a", magic=GNU))),
    "absolute by pax": ("absolute_name", tgz(pax(record(b"path", b"/etc/passwd")), file(b"a"))),
    "parent": ("parent_name", tgz(file(b"../evil"))),
    "parent inside": ("parent_name", tgz(file(b"a/../../evil"))),
    "parent that stays inside": ("parent_name", tgz(file(b"a/../b"))),
    "parent at the end": ("parent_name", tgz(directory(b"a/.."))),
    "parent by prefix": ("parent_name", tgz(file(b"evil", prefix=b".."))),
    "parent by long name": ("parent_name", tgz(gnu_long(b"a/" * 60 + b"../x"), file(b"a", magic=GNU))),
    "parent by pax": ("parent_name", tgz(pax(record(b"path", b"../evil")), file(b"a"))),
    "parent behind a dot": ("parent_name", tgz(file(b"./../evil"))),
    "empty name": ("bad_name", tgz(file(b""))),
    "NUL in a name": ("bad_name", tgz(file(b"good\0/../../evil"))),
    "NUL in a pax name": ("bad_name", tgz(pax(record(b"path", b"good\0evil")), file(b"a"))),
    "NUL in a long name": ("bad_name", tgz(gnu_long(b"good\0evil"), file(b"a", magic=GNU))),
    "the root as a file": ("bad_name", tgz(file(b"."))),
    "a file with a slash": ("bad_name", tgz(file(b"name/"))),
    "a long part": ("name_too_long", tgz(pax(record(b"path", b"a" * 256)), file(b"a"))),
    "a long name": ("name_too_long", tgz(pax(record(b"path", b"a/" * 2048 + b"b")), file(b"a"))),
    "a very long GNU name": ("name_too_long", tgz(gnu_long(b"a/" * 3000), file(b"a", magic=GNU))),
    # kinds
    "symbolic link": ("link", tgz(header(b"link", kind=b"2", link=b"/etc/passwd"))),
    "symbolic link then through it": ("link", tgz(header(b"d", kind=b"2", link=b"/etc"), file(b"d/passwd"))),
    "hard link": ("link", tgz(GOOD, header(b"link", kind=b"1", link=b"first.txt"))),
    "GNU long link": ("link", tgz(gnu_long(b"target", kind=b"K"))),
    "character device": ("special_file", tgz(header(b"null", kind=b"3"))),
    "block device": ("special_file", tgz(header(b"sda", kind=b"4"))),
    "fifo": ("special_file", tgz(header(b"pipe", kind=b"6"))),
    "GNU sparse": ("special_file", tgz(header(b"sparse", kind=b"S", magic=GNU))),
    "pax sparse 0.1": ("special_file", tgz(pax(record(b"GNU.sparse.map", b"0,1")), file(b"a"))),
    "pax sparse 1.0": ("special_file", tgz(pax(record(b"GNU.sparse.name", b"../x")), file(b"a"))),
    "pax link path": ("special_file", tgz(pax(record(b"linkpath", b"/etc")), file(b"a"))),
    "star real size": ("special_file", tgz(pax(record(b"SCHILY.realsize", b"9")), file(b"a"))),
    "multi-volume": ("unknown_type", tgz(header(b"part", kind=b"M", magic=GNU))),
    "GNU directory dump": ("unknown_type", tgz(header(b"dump", kind=b"D", magic=GNU))),
    "Solaris extension": ("unknown_type", tgz(header(b"x", kind=b"X"))),
    "unknown letter": ("unknown_type", tgz(header(b"z", kind=b"Z"))),
    "unknown byte": ("unknown_type", tgz(header(b"z", kind=b"\xff"))),
    # numbers
    "size of letters": ("bad_number", tgz(header(b"a", size=b"hello world\0"))),
    "size with digits behind blanks": ("bad_number", tgz(header(b"a", size=b"0000 000001\0"))),
    "decimal size": ("bad_number", tgz(header(b"a", size=b"00000000009\0"))),
    "negative size": ("bad_number", tgz(header(b"a", size=b"-0000000001\0"))),
    "negative base-256 size": ("bad_number", tgz(header(b"a", size=base256(-512)))),
    "enormous base-256 size": ("bad_number", tgz(header(b"a", size=base256(1 << 80)))),
    "large base-256 size": ("too_big_unpacked", tgz(header(b"a", size=base256(1 << 60)))),
    "odd base-256 size": ("bad_number", tgz(header(b"a", size=b"\xc0" + bytes(11)))),
    "size over the workspace": ("too_big_unpacked", tgz(header(b"a", size=1 << 31))),
    "mode of letters": ("bad_number", tgz(header(b"a", mode=b"rwxr-xr\0"))),
    "mtime of letters": ("bad_number", tgz(header(b"a", mtime=b"yesterday..\0"))),
    "directory with content": ("malformed", tgz(header(b"d", kind=b"5", size=512), bytes(512))),
    # extension headers
    "pax size mismatch": ("malformed", tgz(pax(record(b"size", b"512")), file(b"a"))),
    "pax size of zero": ("malformed", tgz(pax(record(b"size", b"0")), file(b"a"))),
    "pax size over a zero header": (
        "malformed",
        tgz(pax(record(b"size", b"600")), file(b"a", b""), padded(b"x" * 600)),
    ),
    "pax size negative": ("bad_number", tgz(pax(record(b"size", b"-1")), file(b"a"))),
    "pax size of letters": ("bad_number", tgz(pax(record(b"size", b"0x10")), file(b"a"))),
    "pax size enormous": ("bad_number", tgz(pax(record(b"size", b"9" * 19)), file(b"a"))),
    "pax mtime of letters": ("bad_number", tgz(pax(record(b"mtime", b"now")), file(b"a"))),
    "pax path twice": ("malformed", tgz(pax(record(b"path", b"a"), record(b"path", b"b")), file(b"a"))),
    "pax path deleted": ("malformed", tgz(pax(record(b"path", b"")), file(b"a"))),
    "pax in pax": ("malformed", tgz(pax(record(b"path", b"a")), pax(record(b"path", b"b")), file(b"a"))),
    "pax then long name": ("malformed", tgz(pax(record(b"path", b"a")), gnu_long(b"b"), file(b"a"))),
    "pax then global": ("malformed", tgz(pax(record(b"path", b"a")), pax(record(b"comment", b"b"), kind=b"g"), GOOD)),
    "global path": ("malformed", tgz(pax(record(b"path", b"../evil"), kind=b"g"), GOOD)),
    "global size": ("malformed", tgz(pax(record(b"size", b"1"), kind=b"g"), GOOD)),
    "global link path": ("special_file", tgz(pax(record(b"linkpath", b"/"), kind=b"g"), GOOD)),
    "many global headers": ("malformed", tgz(pax(record(b"comment", b"x"), kind=b"g") * 17, GOOD)),
    "huge pax header": ("name_too_long", tgz(header(b"pax", kind=b"x", size=(1 << 20) + 1))),
    "huge long name": ("name_too_long", tgz(header(b"long", kind=b"L", size=1 << 30, magic=GNU))),
    "empty pax header": ("malformed", tgz(header(b"pax", kind=b"x", size=0), GOOD)),
    "pax record without length": ("malformed", tgz(pax(b"path=evil\n"), GOOD)),
    "pax record too short": ("malformed", tgz(pax(b"3 path=evil\n"), GOOD)),
    "pax record too long": ("malformed", tgz(pax(b"99 path=evil\n"), GOOD)),
    "pax record of zero": ("malformed", tgz(pax(b"0 path=evil\n"), GOOD)),
    "pax record of length one": ("malformed", tgz(pax(b"1 "), GOOD)),
    "pax record without newline": ("malformed", tgz(pax(b"11 path=evil"), GOOD)),
    "pax record without value": ("malformed", tgz(pax(b"8 abcde\n"), GOOD)),
    "pax record with huge length": ("malformed", tgz(pax(b"9" * 100 + b" path=x\n"), GOOD)),
    # the tree
    "the same file twice": ("duplicate", tgz(file(b"a"), file(b"a", b"other"))),
    "the same file under two spellings": ("duplicate", tgz(file(b"d/a"), file(b"./d//./a", b"other"))),
    "a file as a directory": ("duplicate", tgz(file(b"a"), file(b"a/b"))),
    "a file, then a directory": ("duplicate", tgz(file(b"a"), directory(b"a/"))),
    "a directory, then a file": ("duplicate", tgz(directory(b"a/"), file(b"a"))),
    "an implied directory, then a file": ("duplicate", tgz(file(b"a/b"), file(b"a"))),
}


@pytest.mark.parametrize("name", HOSTILE)
async def test_is_refused_with_its_reason(name: str) -> None:
    reason, data = HOSTILE[name]
    with pytest.raises(InvalidInput) as caught:
        await check(data)
    assert (caught.value.code, caught.value.details["reason"]) == ("archive_invalid", reason)
    assert caught.value.message.isprintable() and len(caught.value.message) < 400


BEHIND = {
    "a byte": b"g",
    "text": b"garbage",
    "more text": b"garbage behind the end",
    "zeros": bytes(3),
    "more zeros": bytes(64),
    "a beginning": whole[:10],
    "another archive": GOOD,
}


@pytest.mark.parametrize("behind", BEHIND.values(), ids=BEHIND)
async def test_what_follows_the_archive_is_told_as_such(behind: bytes) -> None:
    with pytest.raises(InvalidInput, match="follows the archive"):
        await check(whole + behind, step=len(whole) + 1)


@pytest.mark.parametrize("step", [7, 511, 513])
async def test_is_refused_however_the_body_is_cut(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "_BATCH", step)
    for reason, data in HOSTILE.values():
        with pytest.raises(InvalidInput) as caught:
            await check(data, step=step)
        assert caught.value.details["reason"] == reason


async def test_names_in_messages_are_harmless() -> None:
    with pytest.raises(InvalidInput) as caught:
        await check(tgz(file(b"../\x1b[31m\n\xff" + b"\xe2\x80\xae" + b"x" * 50)))
    assert "\\x1b" in caught.value.message and "\\n" in caught.value.message and "\u202e" not in caught.value.message


async def test_compressed_limit_is_told_at_once() -> None:
    """The sender is stopped when the limit is passed, not when it has sent everything."""
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 65536
            yield bytes(65536)

    with pytest.raises(InvalidInput):  # zeros are not gzip: found out before the limit
        await check_upload(endless(), io.BytesIO(), UploadLimits(compressed=1 << 40, content=1 << 40))
    assert sent <= 8 << 20
    sent = 0
    with pytest.raises(TooLarge) as caught:
        await check_upload(endless(), io.BytesIO(), UploadLimits(compressed=200_000, content=1 << 40))
    assert caught.value.code == "upload_too_large" and sent == 4 * 65536


@pytest.mark.parametrize(
    ("megabytes", "content_limit", "reason"),
    [(400, 10 << 30, "bomb"), (100, 50 << 20, "too_big_unpacked")],
)
async def test_bomb(megabytes: int, content_limit: int, reason: str) -> None:
    size = megabytes << 20
    data = gzip.compress(header(b"zeros", size=size) + bytes(size) + END, 6)
    with pytest.raises(InvalidInput) as caught:
        await check(data, UploadLimits(compressed=1 << 30, content=content_limit))
    assert caught.value.details["reason"] == reason


async def test_bomb_behind_the_end_of_the_archive() -> None:
    with pytest.raises(InvalidInput) as caught:
        await check(gzip.compress(GOOD + END + bytes(300 << 20), 6))
    assert caught.value.details["reason"] == "bomb"


@pytest.mark.parametrize("kind", ["files", "implied directories", "deep names"])
async def test_too_many_entries(kind: str) -> None:
    if kind == "files":
        blocks = [header(b"%d" % i, magic=V7) for i in range(archive.MAX_ENTRIES + 1)]
    elif kind == "implied directories":
        blocks = [header(b"%d/a/b" % i) for i in range(archive.MAX_NODES // 3 + 1)]
    else:
        blocks = [pax(record(b"path", b"%d/" % i + b"a/" * 2000 + b"b")) + file(b"x") for i in range(70)]
    with pytest.raises(InvalidInput) as caught:
        await check(gzip.compress(b"".join(blocks) + END, 1))
    assert caught.value.details["reason"] == "too_many_entries"


async def test_too_many_gzip_members(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "MAX_GZIP_MEMBERS", 1000)
    with pytest.raises(InvalidInput) as caught:
        await check(gzip.compress(b"") * 1001 + whole)
    assert caught.value.details["reason"] == "bomb"


@settings(max_examples=200, deadline=None)
@given(st.data())
async def test_damage_never_crashes(data: st.DataObject) -> None:
    """Any change of the bytes gives a refusal of the documented kind, or an archive that is still sound."""
    plain = bytearray(pax(record(b"path", b"d/name"), record(b"mtime", b"1.5")) + file(b"a") + directory(b"d") + END)
    for _ in range(data.draw(st.integers(1, 4))):
        plain[data.draw(st.integers(0, len(plain) - 1))] = data.draw(st.integers(0, 255))
    repaired = bytes(plain)
    if data.draw(st.booleans()):  # a right checksum brings the damage past the first gate
        block = bytearray(plain[1024:1536])
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
        repaired = bytes(plain[:1024] + block + plain[1536:])
    try:
        upload = await check(gzip.compress(repaired, 1))
    except InvalidInput as refused:
        assert refused.code == "archive_invalid"
    else:
        chunks = [chunk async for chunk in upload.canonical_chunks()]
        assert sum(map(len, chunks)) == upload.manifest.stream_bytes
