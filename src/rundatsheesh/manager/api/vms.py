"""/v1/vms: create, look, start, stop, delete, logs."""

from __future__ import annotations

from dataclasses import replace

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from rundatsheesh.manager.api import parse, views
from rundatsheesh.manager.api.auth import authorize, identity_of
from rundatsheesh.manager.api.context import VmId, context_of, services_of
from rundatsheesh.manager.api.egress import check_ceiling
from rundatsheesh.manager.api.openapi import GUEST_ERRORS, operation
from rundatsheesh.manager.api.requests import read_json, read_no_query, read_nothing, read_query
from rundatsheesh.manager.api.schemas.vms import (
    CreateVmBody,
    ExecLogsQuery,
    ExecLogsView,
    ListVmsQuery,
    LogsQuery,
    LogsView,
    UpdateVmBody,
    VmView,
)
from rundatsheesh.manager.api.streaming import until_disconnect
from rundatsheesh.manager.model import Scope, State

router = APIRouter(prefix="/v1/vms", tags=["VMs"])

BODY_ERRORS = (400, 408, 413)
IDEMPOTENCY_KEY = {
    "Idempotency-Key": "For 24 hours the same key and body give the same VM. 1 to 255 visible ASCII characters."
}
_LIST = {"application/json": {"schema": {"type": "array", "items": {"$ref": "#/components/schemas/VmView"}}}}


@router.post(
    "",
    **operation(
        "createVm",
        "Create and start a VM",
        status=201,
        body=CreateVmBody,
        answer=VmView,
        headers=IDEMPOTENCY_KEY,
        errors=(*BODY_ERRORS, 404, 409, *GUEST_ERRORS),
    ),
)
async def create_vm(request: Request) -> Response:
    context, caller = context_of(request), authorize(request.scope, Scope.VM_WRITE)
    context.creates.take(caller.who)
    body = await read_json(request, CreateVmBody)
    wanted = parse.create_vm(body, context.services.settings)
    check_ceiling(wanted, identity_of(request.scope).rights)
    caller = replace(caller, once=parse.once(request.headers, body))
    record = await until_disconnect(request, context.services.vms.create(wanted, caller))
    return views.answer(views.vm(record), 201)


@router.get("", **operation("listVms", "List VMs, oldest first", query=ListVmsQuery, answer=_LIST, errors=(400,)))
async def list_vms(request: Request) -> Response:
    authorize(request.scope, Scope.VM_READ)
    query = read_query(request, ListVmsQuery)
    state = None if query.state is None else State(query.state)
    records = await services_of(request).vms.list(state=state, labels=parse.label_filter(query.label))
    return views.answer([views.vm(record) for record in records])


@router.get("/{vm_id:ident}", **operation("getVm", "Look at a VM", answer=VmView, errors=(400, 404)))
async def get_vm(request: Request, vm_id: VmId) -> Response:
    authorize(request.scope, Scope.VM_READ)
    read_no_query(request)
    return views.answer(views.vm(await services_of(request).vms.get(vm_id)))


@router.patch(
    "/{vm_id:ident}",
    **operation(
        "updateVm", "Extend or clear a VM's lifetime", body=UpdateVmBody, answer=VmView, errors=(*BODY_ERRORS, 404, 503)
    ),
)
async def update_vm(request: Request, vm_id: VmId) -> Response:
    caller = authorize(request.scope, Scope.VM_WRITE)
    change = parse.lifetime_change(await read_json(request, UpdateVmBody))
    return views.answer(views.vm(await services_of(request).vms.change_lifetime(vm_id, change, caller)))


@router.delete(
    "/{vm_id:ident}",
    **operation("deleteVm", "Delete a VM and its files", status=204, errors=(*BODY_ERRORS, 404, 409)),
)
async def delete_vm(request: Request, vm_id: VmId) -> Response:
    caller = authorize(request.scope, Scope.VM_WRITE)
    await read_nothing(request)
    await services_of(request).vms.destroy(vm_id, caller)
    return views.nothing()


@router.post(
    "/{vm_id:ident}/start",
    **operation("startVm", "Start a stopped VM", status=204, errors=(*BODY_ERRORS, 404, 409, *GUEST_ERRORS)),
)
async def start_vm(request: Request, vm_id: VmId) -> Response:
    caller = authorize(request.scope, Scope.VM_WRITE)
    await read_nothing(request)
    await services_of(request).vms.start(vm_id, caller)
    return views.nothing()


@router.post(
    "/{vm_id:ident}/stop",
    **operation("stopVm", "Stop a VM; /workspace stays", status=204, errors=(*BODY_ERRORS, 404, 409, *GUEST_ERRORS)),
)
async def stop_vm(request: Request, vm_id: VmId) -> Response:
    caller = authorize(request.scope, Scope.VM_WRITE)
    await read_nothing(request)
    await services_of(request).vms.stop(vm_id, caller)
    return views.nothing()


@router.get(
    "/{vm_id:ident}/logs",
    **operation("getVmLogs", "Tail of an engine or console log", query=LogsQuery, answer=LogsView, errors=(400, 404)),
)
async def get_logs(request: Request, vm_id: VmId) -> Response:
    authorize(request.scope, Scope.VM_READ)
    query = read_query(request, LogsQuery)
    return views.answer(views.logs(await services_of(request).vms.logs(vm_id, query.type, query.tail)))


@router.get(
    "/{vm_id:ident}/exec-logs",
    **operation(
        "getVmExecLogs", "Calls into a VM, newest first", query=ExecLogsQuery, answer=ExecLogsView, errors=(400, 404)
    ),
)
async def get_exec_logs(request: Request, vm_id: VmId) -> Response:
    authorize(request.scope, Scope.VM_READ)
    query = read_query(request, ExecLogsQuery)
    page = await services_of(request).vms.exec_logs(vm_id, query.limit, query.type)
    return views.answer({"entries": [views.exec_log_entry(entry) for entry in page.entries], "hasMore": page.has_more})
