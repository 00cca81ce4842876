"""The one table of settings, and the only reader of the environment.

Each field is an environment variable of the same name in upper case; a `.env` file in the working directory is read
too. `rds config` and the settings page of the docs are printed from this table.
"""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path
from typing import Any

from pydantic import Field, SecretStr, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

DEVELOPMENT_API_KEY = "dev-key"
DEVELOPMENT_EMAIL = "admin@localhost"
DEVELOPMENT_PASSWORD = "admin"
_KNOWN = {"api_key": DEVELOPMENT_API_KEY, "admin_password": DEVELOPMENT_PASSWORD}


class Settings(BaseSettings):
    """Values as read; raises pydantic.ValidationError naming each wrong variable."""

    model_config = SettingsConfigDict(env_file=".env", extra="ignore", frozen=True)

    api_key: SecretStr = Field(SecretStr(""), description="Key that `X-API-Key` must carry. `dev-key` on loopback.")
    admin_email: str = Field("", description="E-mail of the admin login. `admin@localhost` on loopback.")
    admin_password: SecretStr = Field(SecretStr(""), description="Password of the admin login. `admin` on loopback.")
    host: str = Field("127.0.0.1", description="Address to listen on. Anything but loopback requires real secrets.")
    port: int = Field(3000, ge=0, le=65535, description="TCP port to listen on; 0 takes a free one.")
    tls_cert_file: str = Field("", description="Certificate chain (PEM): serve HTTPS. Needs TLS_KEY_FILE.")
    tls_key_file: str = Field("", description="Private key (PEM) of TLS_CERT_FILE.")
    storage_root: Path = Field(Path("/var/lib/rundatsheesh"), description="Records and the VMs' disks.")
    image_cache: Path = Field(Path("/var/cache/rundatsheesh"), description="Guest images and runsc; shared by servers.")
    runtime_dir: Path = Field(Path("/run/rundatsheesh"), description="Sockets and locks; keep it short.")
    database_url: str = Field("", description="SQLAlchemy URL; a SQLite file in STORAGE_ROOT unless set.")
    engine: str = Field(
        "auto", pattern="^(auto|gvisor|qemu)$", description="Engine of VMs that name none: auto, gvisor or qemu."
    )
    gvisor_platform: str = Field("systrap", pattern="^(systrap|ptrace|kvm)$", description="How gVisor traps calls.")
    max_vms: int = Field(100, ge=1, le=700, description="VMs that may exist at once.")
    max_cpu: int = Field(os.cpu_count() or 1, ge=1, description="vCPUs of one VM at most; the host's number of CPUs.")
    max_mem_mb: int = Field(8192, ge=128, description="Memory of one VM at most, MiB.")
    max_disk_mb: int = Field(65536, ge=64, description="/workspace of one VM at most, MiB.")
    default_disk_mb: int = Field(10240, ge=64, description="/workspace of a VM that names no diskSizeMb, MiB (sparse).")
    max_allow_ips: int = Field(64, ge=0, description="Entries of allowIps, and of allowDomains, at most.")
    max_exec_timeout_ms: int = Field(3_600_000, ge=1, description="Longest timeoutMs of a call.")
    max_upload_bytes: int = Field(2 << 30, ge=1, description="Largest upload, compressed bytes.")
    max_output_bytes: int = Field(2 << 20, ge=1024, description="Output kept per stream of a call, bytes.")
    max_concurrent_boots: int = Field(
        max(2, os.cpu_count() or 1),
        ge=1,
        description="VMs that boot at the same time; others queue in order. The host's number of CPUs, but 2 at least: "
        "more are not faster together, and slow the calls into others.",
    )
    dns_server_ip: str = Field("", description="Upstream resolver of the guests; the host's own unless set.")
    enable_warm_pool: bool = Field(True, description="Keep VMs started ahead of demand.")
    warm_pool_target: int = Field(2, ge=0, description="Warm VMs to keep ready.")
    warm_pool_max_vms: int = Field(8, ge=0, description="Warm VMs at most, over all shapes.")
    rate_limit_per_minute: int = Field(6000, ge=0, description="Calls per key and minute; 0 is off.")
    log_level: str = Field("info", pattern="^(debug|info|warning|error)$", description="Least level that is logged.")

    @model_validator(mode="before")
    @classmethod
    def _empty_means_unset(cls, values: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in values.items() if v != ""}

    @model_validator(mode="after")
    def _secrets(self) -> Settings:
        if self.is_loopback:
            return self
        missing = [name.upper() for name in ("api_key", "admin_email", "admin_password") if not _text(self, name)]
        if missing:
            raise ValueError(f"HOST={self.host} is not a loopback address, so {', '.join(missing)} must be set")
        known = [name.upper() for name, value in _KNOWN.items() if _text(self, name) == value]
        if known:  # everybody can read them in the documentation
            raise ValueError(f"HOST={self.host} is not a loopback address, so {', '.join(known)} must be a real secret")
        return self

    @model_validator(mode="after")
    def _tls(self) -> Settings:
        if bool(self.tls_cert_file) != bool(self.tls_key_file):
            missing = "TLS_KEY_FILE" if self.tls_cert_file else "TLS_CERT_FILE"
            raise ValueError(f"{missing} must be set too: HTTPS needs a certificate and its key")
        return self

    @property
    def is_loopback(self) -> bool:
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def effective_api_key(self) -> str:
        return self.api_key.get_secret_value() or DEVELOPMENT_API_KEY

    @property
    def effective_admin(self) -> tuple[str, str]:
        """E-mail and password of the admin login."""
        return self.admin_email or DEVELOPMENT_EMAIL, self.admin_password.get_secret_value() or DEVELOPMENT_PASSWORD

    @property
    def effective_database_url(self) -> str:
        return self.database_url or f"sqlite+aiosqlite:///{self.storage_root / 'rds.db'}"


def _text(settings: Settings, name: str) -> str:
    value = getattr(settings, name)
    return value.get_secret_value() if isinstance(value, SecretStr) else str(value)


def inherited_environment() -> dict[str, str]:
    """The environment for the package tools of a set-up, which find proxies, mirrors and certificates there."""
    return dict(os.environ)
