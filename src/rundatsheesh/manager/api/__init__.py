"""The HTTP edge: declared routers, problems as JSON, credentials before anything else. No decisions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match

from rundatsheesh.manager.api import admin, docs, files, health, login, run, vms
from rundatsheesh.manager.api.auth import Authentication, Authenticator, DevelopmentHost
from rundatsheesh.manager.api.context import Context
from rundatsheesh.manager.api.middleware import RequestContext
from rundatsheesh.manager.api.problems import MethodNotAllowed
from rundatsheesh.manager.api.ratelimit import TokenBuckets
from rundatsheesh.manager.api.services import Readiness, Services, VmService
from rundatsheesh.manager.errors import InvalidInput, NotFound, RdsError

__all__ = ["Readiness", "Services", "VmService", "create_api"]

ROUTERS: Sequence[APIRouter] = (
    login.router,
    vms.router,
    run.router,
    files.router,
    admin.router,
    health.router,
    docs.router,
)
CREATES_SHARE = 10  # creating a VM costs more than asking for it: a tenth of the rate
_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")


def create_api(services: Services) -> FastAPI:
    """The ASGI application. It starts nothing and owns nothing: `services` live as long as their owner says."""
    settings = services.settings
    per_minute = settings.rate_limit_per_minute
    authenticator = Authenticator(settings, services.credentials)
    calls = TokenBuckets(per_minute, "calls")
    creates = TokenBuckets(per_minute and max(1, per_minute // CREATES_SHARE), "VM creations")
    app = FastAPI(
        openapi_url=None,  # docs.py serves the document, and Swagger UI without foreign assets
        redirect_slashes=False,
        exception_handlers={HTTPException: _routing_error},
        middleware=[
            Middleware(RequestContext),
            Middleware(DevelopmentHost, settings=settings),
            Middleware(Authentication, authenticator=authenticator, calls=calls),
        ],
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    for router in ROUTERS:
        app.include_router(router)
    app.state.context = Context(services, authenticator, creates)
    return app


async def _routing_error(request: Request, error: Any) -> Response:
    """What the router itself refuses, as problems. OPTIONS is answered for every path that exists."""
    allowed = _allowed_methods(request)
    if error.status_code == 405 and request.method == "OPTIONS":
        return Response(status_code=204, headers={"Allow": ", ".join(sorted(allowed | {"OPTIONS"}))})
    raise _as_problem(request, error, allowed)


def _as_problem(request: Request, error: HTTPException, allowed: frozenset[str]) -> RdsError:
    if error.status_code == 404:
        return NotFound("no such path", code="route_not_found", hint="/openapi.json lists what there is")
    if error.status_code == 405:
        return MethodNotAllowed(request.method, allowed)
    return InvalidInput(str(error.detail))


def _allowed_methods(request: Request) -> frozenset[str]:
    """Over all routes of the path: each method is a route of its own."""
    routes = request.app.routes
    matches = {
        method
        for method in _METHODS
        for route in routes
        if route.matches({**request.scope, "method": method})[0] is Match.FULL
    }
    return frozenset(matches | {"HEAD"} if "GET" in matches and not request.url.path.endswith("/download") else matches)
