"""The content of uploads and downloads on its way, in the channel itself or through the transfer disk."""

from __future__ import annotations

from collections.abc import AsyncIterator
from struct import Struct

from rundatsheesh.agent import wire
from rundatsheesh.manager.errors import GuestMisbehaved
from rundatsheesh.manager.guest_answers import SIMPLE_TIMEOUT, answer_of
from rundatsheesh.manager.guest_channel import GuestCall
from rundatsheesh.manager.guest_slots import RING_SLOTS, SLOT_BYTES, Ring

_LENGTH = Struct(">I")  # of the content of a slot
_FREE = b"\0"  # a slot
_PIECE = 1 << 18  # bytes that are read from a slot at once


class ChannelSender:
    """An upload's content, in the channel. `take` is for the call."""

    call: GuestCall

    def take(self, stream: int, data: bytes) -> None:
        raise GuestMisbehaved("data on a call that has none")

    async def send(self, chunks: AsyncIterator[bytes], table_bytes: int) -> None:
        """Send the canonical stream, whose first `table_bytes` are its table. Returns when all is sent, or the guest
        has ended the call."""
        async for chunk in chunks:
            if not await self.call.send(wire.FILE, chunk):
                return


class SlotSender:
    """An upload's content, through the transfer disk. `take` is for the call."""

    call: GuestCall

    def __init__(self, ring: Ring) -> None:
        self._ring = ring
        self._free = 0  # slots that the guest has given out
        self._number = 0  # of the slot that is being filled
        self._used = 0  # bytes of it

    def take(self, stream: int, data: bytes) -> None:
        self._free += len(data)
        if stream != wire.SLOT or self._free > RING_SLOTS:
            raise GuestMisbehaved("more free slots than there are")
        self.call.consumed(len(data))

    async def send(self, chunks: AsyncIterator[bytes], table_bytes: int) -> None:
        """As ChannelSender's. The content begins in a slot of its own, where a large file is aligned as disks want."""
        async for chunk in chunks:
            view = memoryview(chunk)
            while view:
                if not await self._has_slot():
                    return
                piece = view[: min(SLOT_BYTES - self._used, table_bytes or SLOT_BYTES)]
                self._ring.write(self._number, self._used, piece)
                self._used += len(piece)
                view = view[len(piece) :]
                ends_table = len(piece) == table_bytes
                table_bytes -= min(len(piece), table_bytes)
                if ends_table or self._used == SLOT_BYTES:
                    await self._hand_over()
        if self._used:
            await self._hand_over()

    async def _has_slot(self) -> bool:
        while not self._free and not self.call.ended:
            await self.call.news()
        return not self.call.ended

    async def _hand_over(self) -> None:
        await self.call.send(wire.SLOT, _LENGTH.pack(self._used))
        self._free -= 1
        self._number += 1
        self._used = 0


class Download:
    """A tar archive on its way. Iterate `chunks` to its end or close that iterator; either ends the call."""

    call: GuestCall | None = None

    def __init__(self, ring: Ring | None) -> None:
        """Takes over what the mover holds of the ring."""
        self.ring = ring
        self._waiting = bytearray()  # what came in the channel
        self._lengths: list[int] = []  # of the slots that are filled, the next first
        self._torn = b""
        self._slot = 0  # the number of the next
        self._over = False

    @property
    async def chunks(self) -> AsyncIterator[bytes]:
        """Raw tar bytes. Raises when the guest fails on the way: what was received is then incomplete."""
        assert self.call is not None
        try:
            while await self._more():
                if self._lengths:
                    async for piece in self._read_slot():
                        yield piece
                else:
                    chunk, self._waiting = bytes(self._waiting), bytearray()
                    yield chunk
                    self.call.consumed(len(chunk))
            await answer_of(self.call, SIMPLE_TIMEOUT)
        finally:
            self.cancel()

    def take(self, stream: int, data: bytes) -> None:
        """For the call: GuestMisbehaved for content that cannot be."""
        if stream == wire.FILE:
            self._waiting += data
        elif stream == wire.SLOT and self.ring is not None:
            self._take_lengths(data)
        else:
            raise GuestMisbehaved(f"data on stream {stream}")

    async def first(self) -> None:
        """Return when there is something; the guest's error where it has refused."""
        assert self.call is not None
        if not await self._more():
            await answer_of(self.call, SIMPLE_TIMEOUT)
            raise self.call.condemned("an empty archive")

    def cancel(self) -> None:
        """Nobody reads it any more. Idempotent."""
        if self._over:
            return
        self._over = True
        if self.call is not None:
            self.call.cancel()
        if self.ring is not None:
            self.ring.release()

    async def _more(self) -> bool:
        """Whether anything is to be read; waits for it, or for the end of the call."""
        assert self.call is not None
        while not self._waiting and not self._lengths and not self.call.ended:
            await self.call.news()
        return bool(self._waiting or self._lengths)

    def _take_lengths(self, data: bytes) -> None:
        assert self.call is not None
        self._torn += data
        whole = len(self._torn) - len(self._torn) % _LENGTH.size
        lengths = [length for (length,) in _LENGTH.iter_unpack(self._torn[:whole])]
        if len(self._lengths) + len(lengths) > RING_SLOTS or not all(0 < length <= SLOT_BYTES for length in lengths):
            raise GuestMisbehaved("slots that do not exist")
        self._torn = self._torn[whole:]
        self._lengths += lengths
        self.call.consumed(len(data))

    async def _read_slot(self) -> AsyncIterator[bytes]:
        """Its content; the slot is free afterwards."""
        assert self.call is not None and self.ring is not None
        length = self._lengths[0]
        for at in range(0, length, _PIECE):
            yield self.ring.read(self._slot, at, min(_PIECE, length - at))
        del self._lengths[0]
        self._slot += 1
        await self.call.send(wire.SLOT, _FREE)
