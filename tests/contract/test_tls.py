"""HTTPS with certificate files of one's own."""

from __future__ import annotations

import secrets
import ssl
import subprocess
from pathlib import Path

import httpx
import pytest

from server_support import Dns, Server

pytestmark = pytest.mark.usefixtures("dns")


def certificate(directory: Path, name: str = "server", *more: str) -> tuple[Path, Path]:
    """Self-signed, for 127.0.0.1; paths of certificate and key."""
    cert, key = directory / f"{name}.crt", directory / f"{name}.key"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"]
    algorithm = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
    files = ["-keyout", str(key), "-out", str(cert), "-days", "2"]
    command = ["openssl", "req", "-x509", *algorithm, *(more or ("-nodes",)), *subject, *files]
    subprocess.run(command, check=True, capture_output=True)
    return cert, key


def a_server(directory: Path, dns: Dns, cert: Path | str, key: Path | str, trusted: str = "") -> Server:
    name = secrets.token_hex(3)
    settings = {"DNS_SERVER_IP": dns.address, "TLS_CERT_FILE": str(cert), "TLS_KEY_FILE": str(key)}
    return Server(directory / name, Path("/run") / f"rdst-{name}", settings, tls=trusted)


def test_calls_and_logins_go_over_tls(directory: Path, tmp_path: Path, dns: Dns) -> None:
    cert, key = certificate(tmp_path)
    with a_server(directory, dns, cert, key, trusted=str(cert)).running() as server:
        assert server.url.startswith("https://")
        assert server.http.get("/v1/vms").json() == []
        login = {"email": "admin@localhost", "password": "admin"}
        cookie = server.http.post("/auth/login", json=login).raise_for_status().headers["set-cookie"]
        assert "; Secure" in cookie and "HttpOnly" in cookie
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            httpx.get(server.url + "/health", timeout=60)
        with pytest.raises(httpx.HTTPError):
            httpx.get(server.url.replace("https:", "http:") + "/health", timeout=60)
        old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        old.load_verify_locations(cert)
        old.maximum_version = ssl.TLSVersion.TLSv1_2
        assert httpx.get(server.url + "/health", verify=old, timeout=60).status_code == 200


def test_the_cookie_is_secure_behind_a_proxy_that_speaks_tls(server: Server) -> None:
    login = {"email": "admin@localhost", "password": "admin"}
    through = {"X-Forwarded-Proto": "https", "X-Forwarded-For": "192.0.2.7"}
    plain = httpx.post(server.url + "/auth/login", json=login, timeout=60)
    behind = httpx.post(server.url + "/auth/login", json=login, headers=through, timeout=60)
    assert "; Secure" not in plain.headers["set-cookie"]
    assert "; Secure" in behind.headers["set-cookie"]


@pytest.mark.parametrize("case", ["no key", "missing file", "of another", "with a passphrase", "not PEM"])
def test_certificates_that_cannot_be_used_are_refused_at_the_start(tmp_path: Path, dns: Dns, case: str) -> None:
    cert, key = certificate(tmp_path)
    if case == "of another":
        _, key = certificate(tmp_path, "other")
    elif case == "with a passphrase":
        cert, key = certificate(tmp_path, "locked", "-passout", "pass:secret")
    elif case == "not PEM":
        cert.write_text("hello")
    wrong = {"no key": "", "missing file": str(tmp_path / "gone")}.get(case, str(key))
    refused = a_server(tmp_path, dns, cert, wrong)
    with pytest.raises(AssertionError, match="the server does not start"):
        refused.start()
    said = refused.log.read_text()
    assert "TLS_KEY_FILE" in said and "Traceback" not in said
    assert not refused.storage.exists(), "nothing was touched"
