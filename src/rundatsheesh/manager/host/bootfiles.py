"""The files of an image with which a virtual machine boots. Who builds an image and who boots it both know them by this
name; they lie beside the image's root directory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class BootFiles:
    directory: Path

    @property
    def kernel(self) -> Path:
        """Uncompressed ELF: an emulated CPU would need seconds to unpack it."""
        return self.directory / "vmlinux"

    @property
    def initrd(self) -> Path:
        """A cpio archive that depends on the image alone; the agent is appended to it at start."""
        return self.directory / "initrd.base"

    @property
    def root(self) -> Path:
        """erofs, with the same files as root/."""
        return self.directory / "root.erofs"

    @property
    def all(self) -> tuple[Path, Path, Path]:
        return self.kernel, self.initrd, self.root

    def complete(self) -> bool:
        return all(path.is_file() for path in self.all)
