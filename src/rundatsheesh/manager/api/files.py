"""/v1/vms/{id}/files: tar.gz in and out, streamed."""

from __future__ import annotations

import posixpath
import re

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from rundatsheesh.manager.api import parse, views
from rundatsheesh.manager.api.auth import authorize
from rundatsheesh.manager.api.context import VmId, services_of
from rundatsheesh.manager.api.openapi import GUEST_ERRORS, operation
from rundatsheesh.manager.api.problems import UnsupportedMediaType
from rundatsheesh.manager.api.requests import check_declared_length, read_query, stream_body
from rundatsheesh.manager.api.schemas.files import DownloadQuery, UploadQuery
from rundatsheesh.manager.api.streaming import StreamedDownload, until_disconnect
from rundatsheesh.manager.model import Scope

router = APIRouter(prefix="/v1/vms/{vm_id:ident}/files", tags=["Files"])

UPLOAD_TYPES = ("application/gzip", "application/x-gzip", "application/octet-stream")
_BINARY = {"schema": {"type": "string", "format": "binary"}}


@router.post(
    "/upload",
    **operation(
        "uploadFiles",
        "Unpack a tar.gz in the VM",
        status=204,
        query=UploadQuery,
        body=dict.fromkeys(UPLOAD_TYPES, _BINARY),
        errors=(400, 404, 408, 409, 413, 415, *GUEST_ERRORS),
    ),
)
async def upload(request: Request, vm_id: VmId) -> Response:
    caller = authorize(request.scope, Scope.FILES)
    services = services_of(request)
    dest = parse.guest_path(read_query(request, UploadQuery).dest, "dest")
    _check_media_type(request)
    limit = services.settings.max_upload_bytes
    too_large = f"the upload is larger than {limit} bytes (MAX_UPLOAD_BYTES)"
    check_declared_length(request, limit, too_large)
    body = stream_body(request, limit, too_large)
    await services.vms.upload(vm_id, dest, body, caller)
    return views.nothing()


@router.get(
    "/download",
    **operation(
        "downloadFiles",
        "A directory or a file as tar.gz",
        query=DownloadQuery,
        answer={"application/gzip": _BINARY},
        errors=(400, 404, 409, *GUEST_ERRORS),
    ),
)
async def download(request: Request, vm_id: VmId) -> Response:
    caller = authorize(request.scope, Scope.FILES)
    path = parse.guest_path(read_query(request, DownloadQuery).path, "path")
    opening = services_of(request).vms.download(vm_id, path, caller)
    chunks = await until_disconnect(request, opening)
    return StreamedDownload(chunks, media_type="application/gzip", filename=_archive_name(path))


def _check_media_type(request: Request) -> None:
    given = request.headers.get("content-type")
    if given is not None and given.partition(";")[0].strip().lower() not in UPLOAD_TYPES:
        raise UnsupportedMediaType(
            f"an upload cannot be {given[:64]!r}", hint=f"send the tar.gz with content-type {UPLOAD_TYPES[0]}"
        )


def _archive_name(path: str) -> str:
    """Safe between quotes in a header."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", posixpath.basename(path)) + ".tar.gz"
