"""The pages for people: `/`, the guide under `/docs/`, Swagger UI, and the OpenAPI document."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markdown_it import MarkdownIt
from markdown_it.token import Token
from pydantic import SecretStr
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from rundatsheesh.manager.api import openapi
from rundatsheesh.manager.api.schemas.admin import CreateApiKeyBody, LoginBody
from rundatsheesh.manager.api.schemas.run import ExecBody, RunJsBody, RunTsBody
from rundatsheesh.manager.api.schemas.vms import CreateVmBody, UpdateVmBody
from rundatsheesh.manager.errors import NotFound
from rundatsheesh.manager.settings import Settings

router = APIRouter(include_in_schema=False)

# In the order of the navigation.
PAGES = ("index", "quickstart", "api", "settings", "operation", "security", "threat-model", "engines", "performance")
SWAGGER_PACKAGE = "fastapi_swagger.resources"  # carries the unchanged files of swagger-ui-dist
BODIES = (CreateVmBody, UpdateVmBody, ExecBody, RunTsBody, RunJsBody, LoginBody, CreateApiKeyBody)

_HERE = Path(__file__).parent
MARKDOWN = _HERE / "pages"  # the repository's docs/, linked here so that an installation carries it
_SITE = _HERE / "site"
_CACHED = "public, max-age=3600"
_PAGE_CSP = "default-src 'none'; style-src 'self'; img-src 'self'; form-action 'none'; base-uri 'none'"
_SWAGGER_CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'"
)
_ASSETS = {
    "swagger-ui.css": "text/css",
    "swagger-ui-bundle.js": "text/javascript",
    "favicon-32x32.png": "image/png",
    "swagger-init.js": "text/javascript",
    "style.css": "text/css",
}


@dataclass(frozen=True, slots=True)
class Heading:
    title: str
    anchor: str


@dataclass(frozen=True, slots=True)
class Page:
    name: str
    title: str
    html: str
    sections: tuple[Heading, ...]  # of the second level

    @property
    def href(self) -> str:
        return "/docs/" if self.name == "index" else f"/docs/{self.name}"


@router.get("/")
async def landing() -> Response:
    return _html("landing.html", csp=_PAGE_CSP)


@router.get("/docs")
async def docs_without_slash() -> Response:
    return RedirectResponse("/docs/", 308)


@router.get("/docs/")
async def docs_index() -> Response:
    return _docs_page("index")


@router.get("/docs/{name}")
async def docs_page(name: str) -> Response:
    if name not in PAGES:
        raise NotFound("no such page", code="page_not_found", hint="/docs/ lists the pages")
    return _docs_page(name)


@router.get("/swagger")
async def swagger() -> Response:
    return _html("swagger.html", csp=_SWAGGER_CSP)


@router.get("/swagger/")
async def swagger_with_slash() -> Response:
    return RedirectResponse("/swagger", 308)


@router.get("/assets/{name}")
async def asset(name: str) -> Response:
    if name not in _ASSETS:
        raise NotFound("no such file", code="page_not_found")
    return Response(_asset(name), media_type=_ASSETS[name], headers={"Cache-Control": _CACHED})


@router.get("/favicon.ico")
async def favicon() -> Response:
    return await asset("favicon-32x32.png")


@router.get("/openapi.json")
async def document(request: Request) -> Response:
    return Response(_document(request.app), media_type="application/json")


@cache
def load_pages() -> dict[str, Page]:
    """All pages, by name. Raises FileNotFoundError when the installation lacks them."""
    return {name: _render(name, (MARKDOWN / f"{name}.md").read_text(encoding="utf-8")) for name in PAGES}


def _document(app: FastAPI) -> bytes:
    """Built at its first use, then kept on the app."""
    kept: bytes | None = getattr(app.state, "openapi", None)
    if kept is None:
        kept = json.dumps(openapi.build_document(app, BODIES)).encode()
        app.state.openapi = kept
    return kept


def _docs_page(name: str) -> Response:
    pages = load_pages()
    return _html("page.html", csp=_PAGE_CSP, page=pages[name], pages=list(pages.values()))


def _html(template: str, *, csp: str, **values: Any) -> Response:
    html = _templates().get_template(template).render(values)
    return Response(html, media_type="text/html", headers={"Content-Security-Policy": csp, "X-Frame-Options": "DENY"})


@cache
def _templates() -> Environment:
    return Environment(loader=FileSystemLoader(_SITE), autoescape=True, undefined=StrictUndefined)


@cache
def _asset(name: str) -> bytes:
    own = _SITE / name
    return own.read_bytes() if own.exists() else resources.files(SWAGGER_PACKAGE).joinpath(name).read_bytes()


def _render(name: str, text: str) -> Page:
    markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = markdown.parse(re.sub(r"^```settings\n.*?^```$", settings_table(), text, flags=re.DOTALL | re.MULTILINE))
    headings = [_anchor(tokens[at], tokens[at + 1]) for at, token in enumerate(tokens) if token.type == "heading_open"]
    for token in tokens:
        for child in token.children or ():
            if child.type == "link_open":
                child.attrSet("href", re.sub(r"^([a-z-]+)\.md(#|$)", r"\1\2", str(child.attrGet("href"))))
    html = markdown.renderer.render(tokens, markdown.options, {})
    sections = tuple(heading for level, heading in headings if level == "h2")
    return Page(name, headings[0][1].title, html, sections)


def settings_table() -> str:
    """Every setting as a Markdown table."""
    rows = ["| variable | default | meaning |", "|---|---|---|"]
    for name, field in Settings.model_fields.items():
        rows.append(f"| `{name.upper()}` | {_default(name)} | {field.description} |")
    return "\n".join(rows)


def _default(name: str) -> str:
    if name == "max_cpu":
        return "the host's"  # the page is about the server, the value about the machine that shows it
    value = Settings.model_fields[name].default
    text = value.get_secret_value() if isinstance(value, SecretStr) else str(value)
    return f"`{text.lower() if isinstance(value, bool) else text}`" if text else ""


def _anchor(heading: Token, inline: Token) -> tuple[str, Heading]:
    """Give a heading an id to link to."""
    title = "".join(child.content for child in inline.children or ())
    anchor = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
    heading.attrSet("id", anchor)
    return heading.tag, Heading(title, anchor)
