"""How an operation is described, and the whole document."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.responses import Response

from rundatsheesh import __version__
from rundatsheesh.manager.api.schemas.base import Problem

Json = dict[str, Any]

_DESCRIPTIONS = {
    400: "The input is wrong; `message` and `details` say where.",
    401: "No credentials, or wrong ones.",
    403: "Not allowed to this caller.",
    404: "No such thing.",
    405: "The method is not allowed here.",
    408: "The client stopped sending.",
    409: "The state of the VM forbids it; `details.state` says which it is in.",
    413: "Too large.",
    415: "The content type is not allowed.",
    429: "Too many calls, or a quota is used up. `Retry-After` says when to try again.",
    500: "The server failed.",
    502: "The VM died during the call, or its agent misbehaved.",
    503: "Not ready, stopping, or out of capacity or storage. `Retry-After` says when to try again.",
    504: "The guest did not answer in time.",
}
# What a call can be answered before it is looked at: a host name that the development key does not serve, and a server
# that stops. And whatever writes to the database can find its disk full.
ALWAYS = (403, 500, 503)
GUEST_ERRORS = (502, 503, 504)
_TITLE = "run-dat-sheesh"
_ABOUT = "Runs untrusted code in sandboxes and virtual machines. A guide is at [/docs/](/docs/)."


def operation(
    id_: str,
    summary: str,
    *,
    status: int = 200,
    answer: type[BaseModel] | Json | None = None,
    body: type[BaseModel] | Json | None = None,
    query: type[BaseModel] | None = None,
    headers: Mapping[str, str] | None = None,
    errors: Iterable[int] = (),
    public: bool = False,
) -> Json:
    """Keyword arguments for a route decorator. `answer` and `body` are models, or OpenAPI content by media type;
    `headers` describes optional ones by name."""
    codes = {*errors, *ALWAYS, *(() if public else (401, 429))}
    responses: dict[int | str, Json] = {status: _answer(answer)}
    responses |= {code: {"model": Problem, "description": _DESCRIPTIONS[code]} for code in sorted(codes)}
    extra: Json = {}
    if query is not None:
        extra["parameters"] = _parameters(query)
    if headers is not None:
        extra["parameters"] = [*extra.get("parameters", ()), *(_header(*item) for item in headers.items())]
    if body is not None:
        content = body if isinstance(body, dict) else {"application/json": {"schema": {"$ref": _reference(body)}}}
        extra["requestBody"] = {"required": True, "content": content}
    if public:
        extra["security"] = []
    return {
        "operation_id": id_,
        "summary": summary,
        "status_code": status,
        "responses": responses,
        "response_model": None,
        "response_class": Response,  # without a media type: the document then has only what `responses` says
        "openapi_extra": extra,
    }


def build_document(app: FastAPI, bodies: Iterable[type[BaseModel]]) -> Json:
    """OpenAPI 3.1. `bodies` are the models that requests refer to."""
    document = get_openapi(
        title=_TITLE, version=__version__, description=_ABOUT, routes=app.routes, openapi_version="3.1.0"
    )
    _, definitions = models_json_schema(
        [(model, "validation") for model in bodies], ref_template="#/components/schemas/{model}"
    )
    components = document.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    schemas.update(definitions.get("$defs", {}))
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    components["securitySchemes"] = {
        "apiKey": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
        "session": {"type": "apiKey", "in": "cookie", "name": "rds_session"},
    }
    document["security"] = [{"apiKey": []}, {"session": []}]
    for path in document["paths"].values():
        for described in path.values():
            _finish_operation(described)
    return document


def _finish_operation(described: Json) -> None:
    described["responses"].pop("422", None)  # a wrong input is a 400 here
    for code, response in described["responses"].items():
        response.setdefault("headers", {})["X-Request-Id"] = {"schema": {"type": "string"}, "required": True}
        if code in ("429", "503"):
            response["headers"]["Retry-After"] = {"schema": {"type": "integer", "minimum": 1}, "required": True}


def _answer(answer: type[BaseModel] | Json | None) -> Json:
    if answer is None:
        return {"description": "Done."}
    if isinstance(answer, dict):
        return {"description": "Done.", "content": answer}
    return {"description": "Done.", "model": answer}


def _parameters(model: type[BaseModel]) -> list[Json]:
    schema = model.model_json_schema()
    required = schema.get("required", ())
    return [
        {
            "name": name,
            "in": "query",
            "required": name in required,
            "description": prop.get("description", ""),
            "schema": _plain(prop),
        }
        for name, prop in schema["properties"].items()
    ]


def _header(name: str, description: str) -> Json:
    schema = {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[!-~]+$"}
    return {"name": name, "in": "header", "required": False, "description": description, "schema": schema}


def _plain(prop: Json) -> Json:
    """Without what the parameter says itself, and without null, which a query string cannot carry."""
    kept = {key: value for key, value in prop.items() if key not in ("title", "description", "default")}
    choices = [choice for choice in kept.pop("anyOf", ()) if choice != {"type": "null"}]
    if "default" in prop and prop["default"] is not None:
        kept["default"] = prop["default"]
    return {**kept, **choices[0]} if choices else kept


def _reference(model: type[BaseModel]) -> str:
    return f"#/components/schemas/{model.__name__}"
