"""The pages render, their links lead somewhere, their shell is shell, and they say what the code says."""

from __future__ import annotations

import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from fastapi import FastAPI
from httpx import ASGITransport, AsyncClient

from rundatsheesh.manager.api import docs, parse
from rundatsheesh.manager.api.problems import STATUS
from rundatsheesh.manager.api.schemas.vms import CreateVmBody
from rundatsheesh.manager.settings import Settings

REPOSITORY = Path(__file__).parents[2]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@pytest.fixture
async def site() -> AsyncClient:
    app = FastAPI(openapi_url=None)
    app.include_router(docs.router)
    return AsyncClient(transport=ASGITransport(app=app), base_url="http://localhost")


def source(name: str) -> str:
    return (docs.MARKDOWN / f"{name}.md").read_text()


class Links(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.targets: set[str] = set()
        self.ids: set[str] = set()
        self.inline: set[str] = set()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("href", "src"):
                self.targets.add(value or "")
            elif name == "id":
                self.ids.add(value or "")
            elif name == "style" or name.startswith("on"):
                self.inline.add(f"{tag} {name}")


def test_the_pages_are_the_files_of_the_repository() -> None:
    assert docs.MARKDOWN.resolve() == REPOSITORY / "docs"
    assert {path.stem for path in docs.MARKDOWN.glob("*.md")} == set(docs.PAGES)


@pytest.mark.parametrize("path", ["/", "/swagger", *(page.href for page in docs.load_pages().values())])
async def test_links_lead_somewhere(site: AsyncClient, path: str) -> None:
    answer = await site.get(path)
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/html")
    links = Links(answer.text)
    assert links.targets and not links.inline, "the page's policy allows nothing inline"
    for target in links.targets:
        if target.startswith("#"):
            assert target[1:] in links.ids
        elif target not in ("/health", "/openapi.json", "../openapi.json"):
            assert not re.match(r"[a-z]+:", target), f"{target} is on another server"
            assert (await site.get(str(answer.url.join(target)))).status_code == 200, target


async def test_redirects_stay_here(site: AsyncClient) -> None:
    assert (await site.get("/docs")).headers["location"] == "/docs/"
    assert (await site.get("/swagger/")).headers["location"] == "/swagger"


async def test_swagger_is_served_whole_and_by_us(site: AsyncClient) -> None:
    page = await site.get("/swagger")
    assert "script-src 'self'" in page.headers["content-security-policy"]
    assert "<script>" not in page.text
    bundle = await site.get("/assets/swagger-ui-bundle.js")
    assert bundle.headers["content-type"].startswith("text/javascript") and len(bundle.content) > 1_000_000
    assert "SwaggerUIBundle" in (await site.get("/assets/swagger-init.js")).text


def test_the_settings_page_has_every_setting() -> None:
    html = docs.load_pages()["settings"].html
    for name, field in Settings.model_fields.items():
        assert f"<code>{name.upper()}</code>" in html
        assert field.description, name
    assert "This block is replaced" not in html


@pytest.mark.parametrize("name", docs.PAGES)
def test_shell_blocks_are_shell(name: str) -> None:
    for language, block in FENCE.findall(source(name)):
        assert language in ("bash", "sh", "json", "python", "settings", "text"), f"{name}: a block of {language!r}"
        if language == "bash":
            subprocess.run(["bash", "-n"], input=block, text=True, check=True, timeout=10)
            assert "localhost" not in block or "RDS_URL:-" in block or "RDS_EMAIL" in block


def test_the_guide_names_every_field_and_status() -> None:
    guide = source("api")
    for name, field in CreateVmBody.model_fields.items():
        if name != "user_overlay_snapshot_id":
            assert f"`{field.alias}`" in guide
    assert all(re.search(rf"^\|.*\b{status}\b", guide, re.MULTILINE) for status in {*STATUS.values(), 401, 405, 415})
    assert parse.HOME_ALIAS in guide


def test_a_missing_page_is_told_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(docs, "MARKDOWN", tmp_path)
    docs.load_pages.cache_clear()
    try:
        with pytest.raises(FileNotFoundError, match=r"index\.md"):
            docs.load_pages()
    finally:
        docs.load_pages.cache_clear()
