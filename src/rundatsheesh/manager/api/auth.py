"""Who is calling: API keys, the session cookie, and the refusal of cross-site requests."""

from __future__ import annotations

import hashlib
import hmac
import time
from collections import OrderedDict
from dataclasses import dataclass
from datetime import datetime
from typing import Literal
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Send
from starlette.types import Scope as ASGIScope

from rundatsheesh.manager.api.problems import Unauthenticated
from rundatsheesh.manager.api.ratelimit import TOO_MANY, Clock, Recent, Throttle, TokenBuckets
from rundatsheesh.manager.api.services import CredentialService
from rundatsheesh.manager.errors import Forbidden, InvalidInput, LimitReached
from rundatsheesh.manager.model import ApiKey, Caller, Rights, Scope, Session, now
from rundatsheesh.manager.settings import DEVELOPMENT_API_KEY, Settings

COOKIE = "rds_session"
MAX_TOKEN_CHARS = 256
CACHE_S = 10.0  # how long another manager's revocation may take to be seen here; our own is immediate
MAX_CACHED = 1024
MARK_USED_S = 60.0
BAD_CREDENTIALS_PER_MINUTE = 600  # per address: bounds the database look-ups that guessing can cause
# Wrong logins. These brakes refill, so that whoever fails now and then holds nobody up; one address alone cannot use up
# what all have together.
WRONG_LOGINS_PER_ADDRESS_AND_MINUTE = 30
WRONG_LOGINS_PER_MINUTE = 120
KNOWN_ADDRESS_S = 30 * 24 * 3600.0  # for so long after a login its address is not held up by what others do
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})


EVERYTHING = Rights(scopes=frozenset(Scope))


@dataclass(frozen=True, slots=True)
class Identity:
    """A proven caller."""

    who: str  # as in model.Caller
    kind: Literal["main_key", "api_key", "session"]
    rights: Rights = EVERYTHING  # of the admin's login, and of the key of the settings, which is the admin's too


class Authenticator:
    """Proves callers. The main key costs no look-up; sessions and further keys are remembered for CACHE_S."""

    def __init__(self, settings: Settings, credentials: CredentialService, clock: Clock = time.monotonic) -> None:
        self._credentials = credentials
        self._main_key = _digest(settings.effective_api_key)
        email, password = settings.effective_admin
        self._admin = (_digest(email), _digest(password))
        self._cache: OrderedDict[bytes, tuple[float, ApiKey | Session | None]] = OrderedDict()
        self._generation = 0  # of revocations: a look-up that overlaps one is not remembered
        self._marked: OrderedDict[str, float] = OrderedDict()
        self._guesses = TokenBuckets(BAD_CREDENTIALS_PER_MINUTE, "wrong credentials")
        self.logins = Throttle(free=5, longest=300, clock=clock)
        self._wrong_here = TokenBuckets(WRONG_LOGINS_PER_ADDRESS_AND_MINUTE, "wrong logins", clock, TOO_MANY)
        self._wrong_anywhere = TokenBuckets(WRONG_LOGINS_PER_MINUTE, "wrong logins", clock, TOO_MANY)
        self._known_addresses = Recent(KNOWN_ADDRESS_S, clock)

    async def identify(self, connection: HTTPConnection) -> Identity:
        """Raises Unauthenticated. An API key, where given, is the only thing that counts."""
        key = connection.headers.get("x-api-key")
        if key is not None:
            return await self._identify_key(key, client_address(connection.scope))
        session = await self.find_session(connection)
        if session is None:
            raise Unauthenticated("no valid credentials", hint="send X-API-Key, or log in")
        if connection.scope["method"] not in SAFE_METHODS:
            refuse_cross_site(connection.headers)
        return Identity(f"session:{session.email}", "session")

    async def _identify_key(self, key: str, address: str) -> Identity:
        digest = _digest(key)
        if hmac.compare_digest(digest, self._main_key):
            return Identity("key:main", "main_key")
        found = self._recall(digest)
        if found is None and len(key) <= MAX_TOKEN_CHARS:
            self._guesses.take(address)
            generation = self._generation
            found = await self._credentials.find_api_key(key)
            self._remember(digest, found, generation)
        if not isinstance(found, ApiKey) or (found.expires_at is not None and found.expires_at <= now()):
            raise Unauthenticated("the API key is not valid")
        await self._mark_used(found)
        return Identity(f"key:{found.id}", "api_key", found.rights)

    async def find_session(self, connection: HTTPConnection) -> Session | None:
        """The session of the request's cookie, if it is valid."""
        token = session_token(connection.headers)
        if token is None:
            return None
        digest = _digest(token)
        found = self._recall(digest)
        if found is None:
            self._guesses.take(client_address(connection.scope))
            generation = self._generation
            found = await self._credentials.find_session(token)
            self._remember(digest, found, generation)
        return found if isinstance(found, Session) and found.expires_at > now() else None

    async def log_in(self, email: str, password: str, address: str) -> tuple[str, Session]:
        """A new session and its token. Raises Unauthenticated, and LimitReached after repeated failures."""
        throttle_key = f"{address} {_digest(email).hex()}"
        self.logins.check(throttle_key)
        self._wrong_here.check(address)
        if address not in self._known_addresses:
            self._wrong_anywhere.check("")
        right_email = hmac.compare_digest(_digest(email), self._admin[0])
        right_password = hmac.compare_digest(_digest(password), self._admin[1])
        if not (right_email and right_password):
            self._note_wrong_login(throttle_key, address)
            raise Unauthenticated("wrong e-mail or password", code="wrong_login")
        self.logins.succeed(throttle_key)
        self._known_addresses.note(address)
        return await self._credentials.create_session(email)

    def _note_wrong_login(self, throttle_key: str, address: str) -> None:
        self.logins.fail(throttle_key)
        self._wrong_here.take(address)
        if address not in self._known_addresses:
            self._wrong_anywhere.take("")

    async def log_out(self, connection: HTTPConnection) -> None:
        """Revoke the session of the request's cookie, if it has one."""
        token = session_token(connection.headers)
        if token is not None:
            await self._credentials.revoke_session(token)
            self._forget()

    async def create_api_key(self, name: str, expires_at: datetime | None, rights: Rights) -> tuple[ApiKey, str]:
        created = await self._credentials.create_api_key(name, expires_at, rights)
        self._forget()
        return created

    async def revoke_api_key(self, key_id: str) -> ApiKey:
        """From now on nobody is let in with it."""
        revoked = await self._credentials.revoke_api_key(key_id)
        self._forget()
        return revoked

    def _recall(self, digest: bytes) -> ApiKey | Session | None:
        until, found = self._cache.get(digest, (0.0, None))
        return found if time.monotonic() < until else None

    def _remember(self, digest: bytes, found: ApiKey | Session | None, generation: int) -> None:
        if found is None or generation != self._generation:
            return
        self._cache[digest] = (time.monotonic() + CACHE_S, found)
        self._cache.move_to_end(digest)
        if len(self._cache) > MAX_CACHED:
            self._cache.popitem(last=False)

    def _forget(self) -> None:
        self._generation += 1
        self._cache.clear()

    async def _mark_used(self, key: ApiKey) -> None:
        """At most one write a minute for each key."""
        at = time.monotonic()
        if at - self._marked.get(key.id, -MARK_USED_S) < MARK_USED_S:
            return
        self._marked[key.id] = at
        self._marked.move_to_end(key.id)
        if len(self._marked) > MAX_CACHED:
            self._marked.popitem(last=False)
        await self._credentials.mark_used({key.id: now()})


class Authentication:
    """Lets nothing under /v1 through without an identity, before anything else about the request is looked at."""

    def __init__(self, app: ASGIApp, authenticator: Authenticator, calls: TokenBuckets) -> None:
        self._app = app
        self._authenticator = authenticator
        self._calls = calls
        self._own_calls = TokenBuckets(None, "calls of this API key", code=LimitReached.code)

    async def __call__(self, scope: ASGIScope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (scope["path"] == "/v1" or scope["path"].startswith("/v1/")):
            identity = await self._authenticator.identify(HTTPConnection(scope))
            scope["rds.identity"] = identity
            self._calls.take(identity.who)
            if (own := identity.rights.limits.calls_per_minute) is not None:
                self._own_calls.take(identity.who, own)
        await self._app(scope, receive, send)


class DevelopmentHost:
    """While the well-known development key is in force: no requests under a foreign name.

    A web page may point a name of its own at the loopback address and then talk to this server as its own origin
    (DNS rebinding), with a key that everybody knows. An address, or localhost, cannot be such a name.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._active = settings.effective_api_key == DEVELOPMENT_API_KEY

    async def __call__(self, scope: ASGIScope, receive: Receive, send: Send) -> None:
        if self._active and scope["type"] == "http" and not _is_own_name(Headers(scope=scope).get("host", "localhost")):
            raise Forbidden(
                "the development key works on localhost only",
                code="host_not_allowed",
                hint="set API_KEY to use another host name",
            )
        await self._app(scope, receive, send)


def identity_of(scope: ASGIScope) -> Identity:
    """Set by Authentication for every request under /v1."""
    identity = scope.get("rds.identity")
    if not isinstance(identity, Identity):
        raise Unauthenticated("no valid credentials")
    return identity


def caller_of(scope: ASGIScope) -> Caller:
    """For calls that have their own proof of what the caller may do; see `authorize`."""
    identity = identity_of(scope)
    return Caller(request_id=scope["rds.request_id"], who=identity.who, limits=identity.rights.limits)


def authorize(scope: ASGIScope, needed: Scope) -> Caller:
    """The caller, who may do this. Raises Forbidden (`forbidden`) that names the scope which the key lacks."""
    if needed not in identity_of(scope).rights.scopes:
        raise Forbidden(
            f"this API key lacks the scope {needed.value!r}",
            hint="use a key with that scope; the admin can make one",
            details={"scope": needed.value},
        )
    return caller_of(scope)


def require_admin(scope: ASGIScope) -> None:
    if Scope.ADMIN not in identity_of(scope).rights.scopes:
        raise Forbidden(
            "this needs admin rights",
            code="admin_required",
            hint="log in, or use the server's main key",
            details={"scope": Scope.ADMIN.value},
        )


def require_admin_session(scope: ASGIScope) -> None:
    if identity_of(scope).kind != "session":
        raise Forbidden("this needs the admin's login", code="admin_session_required", hint="POST /auth/login first")


def client_address(scope: ASGIScope) -> str:
    client = scope.get("client")
    return str(client[0]) if client else ""


def refuse_cross_site(headers: Headers) -> None:
    """A browser says where a request comes from; only pages of this server may change something with its cookie.

    Programs send none of these headers, and no browser lets a page leave out all of them.
    """
    site = headers.get("sec-fetch-site")
    if site is not None:
        allowed = site in ("same-origin", "none")
    elif (origin := headers.get("origin", headers.get("referer"))) is not None:
        allowed = _netloc(origin) == headers.get("host", "").lower()
    else:
        allowed = True
    if not allowed:
        raise Forbidden("a page of another site may not do this", code="cross_site_request")


def session_token(headers: Headers) -> str | None:
    for part in headers.get("cookie", "").split(";"):
        name, _, value = part.strip().partition("=")
        if name == COOKIE and 0 < len(value) <= MAX_TOKEN_CHARS:
            return value
    return None


def _netloc(origin: str) -> str | None:
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError as error:
        raise InvalidInput("the Origin or Referer header is not a URL") from error


def _digest(text: str) -> bytes:
    """Comparing digests takes the same time whatever the lengths."""
    return hashlib.sha256(text.encode(errors="surrogatepass")).digest()


def _is_own_name(host: str) -> bool:
    try:
        name = urlsplit("//" + host).hostname or ""
    except ValueError:
        return False
    return name == "localhost" or name.endswith(".localhost") or ":" in name or name.replace(".", "").isdigit()
