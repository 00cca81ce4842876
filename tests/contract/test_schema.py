"""The live server against its own document: every GET, with whatever parameters its schema allows."""

from __future__ import annotations

from typing import Any

import httpx
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from server_support import KEY, Box

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
PAGES = {"/", "/swagger", "/docs/{page}"}  # for people; not in JSON
EXAMPLES = 6


def test_every_get_keeps_to_the_document(box: Box) -> None:
    document = httpx.get(box.server.url + "/openapi.json", timeout=60).json()
    tried = [
        probe(operation.ok(), box)
        for operation in schemathesis.openapi.from_dict(document).get_all_operations()
        if operation.ok().method.lower() == "get" and operation.ok().path not in PAGES
    ]
    assert len(tried) >= 9, tried


def probe(operation: Any, box: Box) -> str:
    """Ask for an unknown VM and for a known one."""
    limits = {"max_examples": EXAMPLES, "deadline": None, "database": None, "derandomize": True}

    @settings(**limits, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(operation.as_strategy())
    def ask(case: Any) -> None:
        for vm_id in (case.path_parameters.get("vm_id"), box.id):
            if vm_id is not None:
                case.path_parameters["vm_id"] = vm_id
            answer = case.call(base_url=box.server.url, headers=KEY, timeout=60)
            case.validate_response(answer, checks=CHECKS)

    ask()
    return str(operation.path)
