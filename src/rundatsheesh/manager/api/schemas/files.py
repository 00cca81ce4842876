"""Transfers."""

from __future__ import annotations

from pydantic import Field

from rundatsheesh.manager.api.schemas.base import GuestPath, Query


class UploadQuery(Query):
    dest: GuestPath = Field(description="Directory under /workspace to unpack into.", examples=["/workspace/project"])


class DownloadQuery(Query):
    path: GuestPath = Field(description="Directory or file under /workspace.", examples=["/workspace/project"])
