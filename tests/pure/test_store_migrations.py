"""The schema and its migrations say the same."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine

from rundatsheesh.manager import migrations
from rundatsheesh.manager.errors import HostError
from rundatsheesh.manager.store import Store, schema


def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'rds.db'}"


def test_the_head_is_the_newest_migration() -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    assert ScriptDirectory.from_config(config).get_heads() == [schema.HEAD]


async def test_migrating_makes_the_schema(tmp_path: Path) -> None:
    await (await Store.open(url(tmp_path))).close()
    assert (tmp_path / "rds.db").stat().st_mode & 0o777 == 0o600
    engine = create_engine(url(tmp_path))
    with engine.connect() as connection:
        context = MigrationContext.configure(connection)
        assert compare_metadata(context, schema.metadata) == []
    engine.dispose()


async def test_a_newer_database_is_refused(tmp_path: Path) -> None:
    await (await Store.open(url(tmp_path))).close()
    with closing(sqlite3.connect(tmp_path / "rds.db")) as database:
        database.execute("UPDATE alembic_version SET version_num = '9999'")
        database.commit()
    with pytest.raises(HostError) as refused:
        await Store.open(url(tmp_path))
    assert refused.value.code == "database_version" and refused.value.hint


async def test_an_up_to_date_database_opens_without_alembic(tmp_path: Path) -> None:
    await (await Store.open(url(tmp_path))).close()
    code = (
        "import asyncio, sys\n"
        "from rundatsheesh.manager.store import Store\n"
        f"async def main(): await (await Store.open({url(tmp_path)!r})).close()\n"
        "asyncio.run(main())\n"
        "assert 'alembic' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize(
    "url", ["no url", "sqlite:////nowhere/at/all.db", "mongodb://localhost/x", "sqlite:////dev/null"]
)
async def test_what_cannot_be_opened_is_told(url: str) -> None:
    with pytest.raises(HostError) as refused:
        await Store.open(url)
    assert refused.value.code == "database_unavailable"
