"""/health: is the process alive; /health/ready: can it create VMs."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from rundatsheesh.manager.api import views
from rundatsheesh.manager.api.context import services_of
from rundatsheesh.manager.api.openapi import operation
from rundatsheesh.manager.api.schemas.admin import HealthView, ReadyView
from rundatsheesh.manager.errors import Unavailable

router = APIRouter(prefix="/health", tags=["Health"])


@router.get("", **operation("getHealth", "Is the server alive", answer=HealthView, public=True))
async def get_health(request: Request) -> Response:
    return views.answer({"status": "ok"})


@router.get("/ready", **operation("getReadiness", "Can VMs be created", answer=ReadyView, errors=(503,), public=True))
async def get_readiness(request: Request) -> Response:
    readiness = services_of(request).readiness()
    if not readiness.ready:
        raise Unavailable(readiness.reason or "not ready", code="not_ready", retry_after=5)
    return views.answer({"status": "ready"})
