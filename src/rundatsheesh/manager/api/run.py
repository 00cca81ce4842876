"""/v1/vms/{id}/exec, run-ts and run-js. A client that goes away ends its call."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from rundatsheesh.manager.api import parse, views
from rundatsheesh.manager.api.auth import authorize
from rundatsheesh.manager.api.context import VmId, services_of
from rundatsheesh.manager.api.openapi import GUEST_ERRORS, operation
from rundatsheesh.manager.api.requests import read_json
from rundatsheesh.manager.api.schemas.run import ExecBody, ExecView, RunJsBody, RunTsBody, ScriptView
from rundatsheesh.manager.api.streaming import until_disconnect
from rundatsheesh.manager.model import Scope

router = APIRouter(prefix="/v1/vms/{vm_id:ident}", tags=["Commands"])


def _call(id_: str, summary: str, body: type[BaseModel], answer: type[BaseModel]) -> dict[str, Any]:
    return operation(id_, summary, body=body, answer=answer, errors=(400, 404, 408, 409, 413, *GUEST_ERRORS))


@router.post("/exec", **_call("execInVm", "Run a shell command", ExecBody, ExecView))
async def exec_command(request: Request, vm_id: VmId) -> Response:
    caller = authorize(request.scope, Scope.EXEC)
    services = services_of(request)
    call = parse.exec_call(await read_json(request, ExecBody), services.settings)
    outcome = await until_disconnect(request, services.vms.exec(vm_id, call, caller))
    return views.answer(views.outcome(outcome))


@router.post("/run-ts", **_call("runTypeScriptInVm", "Run TypeScript with Deno", RunTsBody, ScriptView))
async def run_ts(request: Request, vm_id: VmId) -> Response:
    return await _run_script(request, vm_id, RunTsBody)


@router.post("/run-js", **_call("runJavaScriptInVm", "Run JavaScript with Node.js", RunJsBody, ScriptView))
async def run_js(request: Request, vm_id: VmId) -> Response:
    return await _run_script(request, vm_id, RunJsBody)


async def _run_script(request: Request, vm_id: str, model: type[RunTsBody] | type[RunJsBody]) -> Response:
    caller = authorize(request.scope, Scope.EXEC)
    services = services_of(request)
    body: RunTsBody | RunJsBody = await read_json(request, model)
    call = parse.script_call(body, services.settings)
    outcome = await until_disconnect(request, services.vms.run_script(vm_id, call, caller))
    return views.script_answer(outcome)
