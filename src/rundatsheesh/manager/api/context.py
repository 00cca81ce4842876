"""What handlers find on the app that serves them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, cast

from fastapi import Path
from starlette.convertors import Convertor, register_url_convertor
from starlette.requests import Request

from rundatsheesh.manager.api.auth import Authenticator
from rundatsheesh.manager.api.ratelimit import TokenBuckets
from rundatsheesh.manager.api.services import Services


@dataclass(frozen=True, slots=True)
class Context:
    services: Services
    authenticator: Authenticator
    creates: TokenBuckets


def context_of(request: Request) -> Context:
    return cast(Context, request.app.state.context)


def services_of(request: Request) -> Services:
    return context_of(request).services


class _Identifier(Convertor[str]):
    """A path segment that can be an id; others match no route, so nothing odd reaches the database."""

    regex = "[A-Za-z0-9_-]{1,64}"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("ident", _Identifier())

VmId = Annotated[str, Path(description="Id of a VM.", examples=["vm-0123456789abcdef"])]
KeyId = Annotated[str, Path(description="Id of an API key.", examples=["key-0123456789abcdef"])]
