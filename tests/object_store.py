"""Local object stores for tests: on 127.0.0.1, on free ports, gone with the block that starts them.

Amazon is moto. Google's client (obstore's) speaks to moto too: what it uses of Google's XML interface is what S3 has,
and no emulator that registries offer serves that (fake-gcs-server and gcp-storage-emulator refuse or lack its puts or
lists). Azure is Microsoft's Azurite, which only npm has: `npm install azurite`, and `azurite-blob` on PATH or its path
in AZURITE_BLOB.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import logging
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from email.utils import formatdate

import pytest

AZURE_ACCOUNT = "vitacache"
AZURE_KEY = base64.b64encode(b"of a server that lives as long as a test").decode()


@contextmanager
def local_s3(bucket: str) -> Iterator[str]:
    """Serve an empty bucket; obstore finds it through the environment. Yields `s3://<bucket>`."""
    with moto_server(bucket) as server:
        variables = {
            "AWS_ENDPOINT": server,
            "AWS_ALLOW_HTTP": "true",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_REGION": "us-east-1",
        }
        with environment(variables):
            yield f"s3://{bucket}"


@contextmanager
def local_google(bucket: str) -> Iterator[str]:
    """As local_s3, by Google's client. Yields `gs://<bucket>`."""
    # moto reads in the token which service is meant, as in Amazon's signatures.
    token = "test/20260101/us-east-1/s3/aws4_request"
    with moto_server(bucket) as server, environment({"GOOGLE_BASE_URL": server, "GOOGLE_BEARER_TOKEN": token}):
        yield f"gs://{bucket}"


@contextmanager
def local_azure(container: str) -> Iterator[str]:
    """As local_s3, by Azurite; skips the test where that is not installed. Yields `az://<container>`."""
    pytest.importorskip("obstore", reason="needs obstore: pip install '.[remote]'")
    program = os.environ.get("AZURITE_BLOB") or shutil.which("azurite-blob")
    if program is None:
        pytest.skip("needs Azurite: npm install azurite, and azurite-blob on PATH or its path in AZURITE_BLOB")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ["--blobHost", "127.0.0.1", "--blobPort", str(port), "--inMemoryPersistence", "--silent"]
    options += ["--skipApiVersionCheck", "--disableTelemetry"]
    account = {"AZURITE_ACCOUNTS": f"{AZURE_ACCOUNT}:{AZURE_KEY}"}
    server = subprocess.Popen([program, *options], env={**os.environ, **account}, stdout=subprocess.DEVNULL)
    try:
        wait_for(port, server)
        endpoint = f"http://127.0.0.1:{port}/{AZURE_ACCOUNT}"
        variables = {
            "AZURE_STORAGE_ENDPOINT": endpoint,
            "AZURE_ALLOW_HTTP": "true",
            "AZURE_STORAGE_ACCOUNT_NAME": AZURE_ACCOUNT,
            "AZURE_STORAGE_ACCOUNT_KEY": AZURE_KEY,
        }
        with environment(variables):
            create_container(endpoint, container)
            yield f"az://{container}"
    finally:
        server.terminate()
        server.wait(20)


@contextmanager
def moto_server(bucket: str) -> Iterator[str]:
    """Yields the address of a server with an empty bucket."""
    server_module = pytest.importorskip("moto.server", reason="needs moto: pip install '.[dev]'")
    pytest.importorskip("obstore", reason="needs obstore: pip install '.[remote]'")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # not every request
    server.start()
    try:
        host, port = server.get_host_and_port()
        urllib.request.urlopen(urllib.request.Request(f"http://{host}:{port}/{bucket}", method="PUT")).close()
        yield f"http://{host}:{port}"
    finally:
        server.stop()


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        yield


def wait_for(port: int, server: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        try:
            return socket.create_connection(("127.0.0.1", port)).close()
        except OSError:
            assert server.poll() is None, "the server has ended"
            time.sleep(0.1)
    raise AssertionError("the server does not answer")


def create_container(endpoint: str, container: str) -> None:
    """Azure's "Create Container", signed with the shared key: obstore has nothing for it."""
    date, version = formatdate(usegmt=True), "2021-08-06"
    canonical = f"x-ms-date:{date}\nx-ms-version:{version}\n/{AZURE_ACCOUNT}/{AZURE_ACCOUNT}/{container}"
    text = f"PUT{11 * chr(10)}\n{canonical}\nrestype:container"
    signature = hmac.new(base64.b64decode(AZURE_KEY), text.encode(), hashlib.sha256).digest()
    headers = {
        "x-ms-date": date,
        "x-ms-version": version,
        "Content-Length": "0",
        "Authorization": f"SharedKey {AZURE_ACCOUNT}:{base64.b64encode(signature).decode()}",
    }
    request = urllib.request.Request(f"{endpoint}/{container}?restype=container", method="PUT", headers=headers)
    urllib.request.urlopen(request).close()
