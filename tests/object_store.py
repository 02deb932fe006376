"""A local S3 server (moto) for tests: on 127.0.0.1, on a free port, gone with the fixture that starts it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def local_s3(bucket: str) -> Iterator[str]:
    """Serve an empty bucket; obstore finds it through the environment. Yields `s3://<bucket>`."""
    server_module = pytest.importorskip("moto.server", reason="needs moto: pip install '.[dev]'")
    pytest.importorskip("obstore", reason="needs obstore: pip install '.[remote]'")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    with pytest.MonkeyPatch.context() as environment:
        host, port = server.get_host_and_port()
        for name, value in {
            "AWS_ENDPOINT": f"http://{host}:{port}",
            "AWS_ALLOW_HTTP": "true",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_REGION": "us-east-1",
        }.items():
            environment.setenv(name, value)
        import urllib.request

        urllib.request.urlopen(urllib.request.Request(f"http://{host}:{port}/{bucket}", method="PUT")).close()
        try:
            yield f"s3://{bucket}"
        finally:
            server.stop()
