"""What all shapes share."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.alias_generators import to_camel


class Body(BaseModel):
    """A request body: exact types, no unknown fields."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, alias_generator=to_camel)


class Query(BaseModel):
    """Query parameters: text that is read as what the field says; no unknown names."""

    model_config = ConfigDict(extra="forbid", frozen=True, alias_generator=to_camel)


class NoQuery(Query):
    """No query parameters."""


class View(BaseModel):
    """An answer. Handlers build the JSON themselves; this documents it, and tests compare both."""

    model_config = ConfigDict(strict=True, extra="forbid", alias_generator=to_camel)


# Patterns rather than validator functions: OpenAPI shows them too. `requests.py` has the sentences for people.
NO_NUL = r"^[^\x00]*$"
ONE_LINE = r"^[^\x00-\x1f\x7f-\x9f\u2028\u2029]*$"


def _digits(value: object) -> object:
    """Python's own idea of a number has underscores, blanks and decimal points."""
    if isinstance(value, str) and not re.fullmatch(r"-?[0-9]+", value):
        raise ValueError("must be an integer, in digits")
    return value


QueryInt = Annotated[int, BeforeValidator(_digits)]
Text = Annotated[str, Field(pattern=NO_NUL)]
Line = Annotated[str, Field(pattern=ONE_LINE)]
GuestPath = Annotated[str, Field(pattern=NO_NUL, min_length=1, max_length=4096)]
Timestamp = Annotated[str, Field(json_schema_extra={"format": "date-time"})]


class Problem(View):
    """Every error has this body."""

    message: str = Field(description="What happened, for people.")
    code: str = Field(description="What happened, as a stable snake_case word.", examples=["vm_not_found"])
    request_id: str = Field(description="Also in X-Request-Id, in the server's log and in the VM's execution log.")
    hint: str | None = Field(None, description="What to do about it.")
    retryable: bool | None = Field(None, description="Whether the same call may succeed later.")
    details: dict[str, Any] | None = Field(None, description="Facts about the error; depends on `code`.")
