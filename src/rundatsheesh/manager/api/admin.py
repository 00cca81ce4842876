"""/v1/admin: API keys, how full the host is, what happened, what leaked."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from rundatsheesh.manager.api import parse, views
from rundatsheesh.manager.api.auth import caller_of, require_admin, require_admin_session
from rundatsheesh.manager.api.context import KeyId, context_of, services_of
from rundatsheesh.manager.api.openapi import operation
from rundatsheesh.manager.api.requests import read_json, read_no_query, read_nothing, read_query
from rundatsheesh.manager.api.schemas.admin import (
    ActivityQuery,
    ActivityView,
    ApiKeyView,
    CreateApiKeyBody,
    HealingView,
    LeaksView,
    NewApiKeyView,
    OverviewView,
)

router = APIRouter(prefix="/v1/admin", tags=["Admin"])

_BODY_ERRORS = (400, 403, 408, 413)
_KEYS = {"application/json": {"schema": {"type": "array", "items": {"$ref": "#/components/schemas/ApiKeyView"}}}}


@router.post(
    "/api-keys",
    **operation(
        "createApiKey",
        "Create an API key; its secret is shown once",
        status=201,
        body=CreateApiKeyBody,
        answer=NewApiKeyView,
        errors=_BODY_ERRORS,
    ),
)
async def create_api_key(request: Request) -> Response:
    require_admin_session(request.scope)
    body = await read_json(request, CreateApiKeyBody)
    expires_at = None if body.expires_at is None else parse.future_time(body.expires_at, "expiresAt")
    context = context_of(request)
    key, secret = await context.authenticator.create_api_key(body.name, expires_at, parse.rights(body))
    await context.services.history.record_activity("key.create", caller=caller_of(request.scope), reason=key.id)
    return views.answer({**views.api_key(key), "secret": secret}, 201)


@router.get("/api-keys", **operation("listApiKeys", "List API keys, the revoked too", answer=_KEYS, errors=(400, 403)))
async def list_api_keys(request: Request) -> Response:
    require_admin_session(request.scope)
    read_no_query(request)
    keys = await services_of(request).credentials.list_api_keys()
    return views.answer([views.api_key(key) for key in keys])


@router.post(
    "/api-keys/{key_id:ident}/revoke",
    **operation("revokeApiKey", "Revoke an API key at once", answer=ApiKeyView, errors=(*_BODY_ERRORS, 404)),
)
async def revoke_api_key(request: Request, key_id: KeyId) -> Response:
    require_admin_session(request.scope)
    await read_nothing(request)
    context = context_of(request)
    key = await context.authenticator.revoke_api_key(key_id)
    await context.services.history.record_activity("key.revoke", caller=caller_of(request.scope), reason=key.id)
    return views.answer(views.api_key(key))


@router.get("/overview", **operation("getOverview", "How full this host is", answer=OverviewView, errors=(400, 403)))
async def get_overview(request: Request) -> Response:
    require_admin(request.scope)
    read_no_query(request)
    return views.answer(views.overview(await services_of(request).overview()))


@router.get(
    "/activity",
    **operation(
        "getActivity", "What happened, newest first", query=ActivityQuery, answer=ActivityView, errors=(400, 403)
    ),
)
async def get_activity(request: Request) -> Response:
    require_admin(request.scope)
    limit = read_query(request, ActivityQuery).limit
    entries = await services_of(request).history.activity(limit + 1)
    shown = [views.activity_entry(entry) for entry in entries[:limit]]
    return views.answer({"entries": shown, "hasMore": len(entries) > limit})


@router.get("/leaks", **operation("getLeaks", "Compare the records with the host", answer=LeaksView, errors=(400, 403)))
async def get_leaks(request: Request) -> Response:
    require_admin(request.scope)
    read_no_query(request)
    return views.answer({"leaks": [views.leak(leak) for leak in await services_of(request).audit()]})


@router.post(
    "/reconcile",
    **operation(
        "reconcile", "Heal what differs between records and host, now", answer=HealingView, errors=_BODY_ERRORS
    ),
)
async def reconcile(request: Request) -> Response:
    require_admin(request.scope)
    await read_nothing(request)
    return views.answer(views.healing(await services_of(request).reconcile()))
