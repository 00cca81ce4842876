"""/auth: the admin's login in a browser."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from rundatsheesh.manager.api import views
from rundatsheesh.manager.api.auth import COOKIE, client_address, refuse_cross_site
from rundatsheesh.manager.api.context import context_of
from rundatsheesh.manager.api.openapi import operation
from rundatsheesh.manager.api.problems import Unauthenticated
from rundatsheesh.manager.api.requests import read_json, read_nothing
from rundatsheesh.manager.api.schemas.admin import LoginBody, LoginView, OkView
from rundatsheesh.manager.model import Caller, now

router = APIRouter(prefix="/auth", tags=["Login"])

_BODY_ERRORS = (400, 403, 408, 413)


@router.post(
    "/login",
    **operation(
        "logIn",
        "Log in; sets the session cookie",
        body=LoginBody,
        answer=LoginView,
        errors=(*_BODY_ERRORS, 401, 429),
        public=True,
    ),
)
async def log_in(request: Request) -> Response:
    refuse_cross_site(request.headers)
    body = await read_json(request, LoginBody)
    address = client_address(request.scope)
    context = context_of(request)
    token, session = await context.authenticator.log_in(body.email, body.password, address)
    caller = Caller(request.scope["rds.request_id"], f"session:{session.email}")
    await context.services.history.record_activity("login", caller=caller)
    response = views.answer({"email": session.email})
    life = int((session.expires_at - now()).total_seconds())
    _set_cookie(request, response, token, life)
    return response


@router.post("/logout", **operation("logOut", "Revoke the session", answer=OkView, errors=_BODY_ERRORS, public=True))
async def log_out(request: Request) -> Response:
    refuse_cross_site(request.headers)
    await read_nothing(request)
    await context_of(request).authenticator.log_out(request)
    response = views.answer({"ok": True})
    _set_cookie(request, response, "", 0)
    return response


@router.get("/me", **operation("whoAmI", "Who is logged in", answer=LoginView, errors=(401, 429), public=True))
async def who_am_i(request: Request) -> Response:
    session = await context_of(request).authenticator.find_session(request)
    if session is None:
        raise Unauthenticated("not logged in")
    return views.answer({"email": session.email})


def _set_cookie(request: Request, response: Response, value: str, life_s: int) -> None:
    secure = request.url.scheme == "https"
    attributes = f"HttpOnly; SameSite=Lax; Path=/; Max-Age={life_s}" + ("; Secure" if secure else "")
    response.headers.append("Set-Cookie", f"{COOKIE}={value}; {attributes}")
