"""Claims on blocks of slots: one node, one block, for as long as its storage is there or a link of it is left."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from net_lab import lab, shell

from rundatsheesh.manager.errors import NetworkError, Unavailable
from rundatsheesh.manager.net.blocks import BLOCKS, claim_block, is_claimed


def node(tmp_path: Path, name: str) -> tuple[str, Path]:
    root = tmp_path / name
    root.mkdir()
    (root / "node.json").write_text(f'{{"id": "{name}"}}')
    return name, root


async def test_first_come_first_served_and_the_same_again(tmp_path: Path) -> None:
    async with lab():
        one, two = node(tmp_path, "node-one"), node(tmp_path, "node-two")
        assert claim_block(*one, host_directory=tmp_path) == 0
        assert claim_block(*two, host_directory=tmp_path) == 1
        assert claim_block(*one, host_directory=tmp_path) == 0
        assert claim_block(*two, 5, host_directory=tmp_path) == 1


async def test_preferred_block_is_given_when_it_is_free(tmp_path: Path) -> None:
    async with lab():
        one, two = node(tmp_path, "node-one"), node(tmp_path, "node-two")
        assert claim_block(*one, 7, host_directory=tmp_path) == 7
        assert claim_block(*two, 7, host_directory=tmp_path) == 0


async def test_block_is_free_again_when_its_storage_is_gone_and_no_link_is_left(tmp_path: Path) -> None:
    async with lab():
        one, two, three = (node(tmp_path, f"node-{i}") for i in ("one", "two", "three"))
        assert claim_block(*one, host_directory=tmp_path) == 0
        (one[1] / "node.json").unlink()
        shell("ip link add rds0-300 type veth peer name other")
        assert claim_block(*two, host_directory=tmp_path) == 1
        shell("ip link del rds0-300")
        assert claim_block(*three, host_directory=tmp_path) == 0


async def test_whose_block_it_is_shows_when_another_has_it(tmp_path: Path) -> None:
    """A manager may run whose storage was taken away."""
    async with lab():
        one, two = node(tmp_path, "node-one"), node(tmp_path, "node-two")
        assert claim_block(*one, host_directory=tmp_path) == 0
        assert is_claimed("node-one", 0, host_directory=tmp_path)
        (one[1] / "node.json").unlink()
        assert is_claimed("node-one", 0, host_directory=tmp_path)
        assert claim_block(*two, host_directory=tmp_path) == 0
        assert not is_claimed("node-one", 0, host_directory=tmp_path)
        assert is_claimed("node-two", 0, host_directory=tmp_path)
        (tmp_path / "blocks/0").unlink()
        assert is_claimed("node-one", 0, host_directory=tmp_path)


async def test_storage_that_became_another_nodes_frees_the_block(tmp_path: Path) -> None:
    async with lab():
        one, two = node(tmp_path, "node-one"), node(tmp_path, "node-two")
        assert claim_block(*one, host_directory=tmp_path) == 0
        (one[1] / "node.json").write_text('{"id": "somebody-else"}')
        assert claim_block(*two, host_directory=tmp_path) == 0


async def test_links_without_a_claim_belong_to_who_remembers_the_block(tmp_path: Path) -> None:
    async with lab():
        one, two = node(tmp_path, "node-one"), node(tmp_path, "node-two")
        shell("ip link add rds0-300 type veth peer name other")
        assert claim_block(*two, host_directory=tmp_path) == 1
        assert claim_block(*one, 0, host_directory=tmp_path) == 0
        shell("ip link del rds0-300")


async def test_torn_claim_is_no_claim(tmp_path: Path) -> None:
    async with lab():
        (tmp_path / "blocks").mkdir()
        for number, text in enumerate(("", "{", "[]", '{"node_id": "x"}')):
            (tmp_path / "blocks" / str(number)).write_text(text)
        assert claim_block(*node(tmp_path, "node-one"), host_directory=tmp_path) == 0


async def test_all_taken(tmp_path: Path) -> None:
    async with lab():
        for number in range(BLOCKS):
            assert claim_block(*node(tmp_path, f"node-{number:03}"), host_directory=tmp_path) == number
        with pytest.raises(Unavailable):
            claim_block(*node(tmp_path, "one-more"), host_directory=tmp_path)


async def test_two_at_once_get_different_blocks(tmp_path: Path) -> None:
    async with lab():
        nodes = [node(tmp_path, f"node-{i}") for i in range(8)]
        got: list[int] = []
        threads = [
            threading.Thread(target=lambda n=n: got.append(claim_block(*n, host_directory=tmp_path))) for n in nodes
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(got) == list(range(8))


async def test_directory_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NetworkError):
        claim_block("node", tmp_path, host_directory=tmp_path / "file")
