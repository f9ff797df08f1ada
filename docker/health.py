"""Is the process in this container well? Exit status 0 says yes; anything else prints why not.

    health.py [grpc://HOST:PORT | grpcs://HOST:PORT | http://HOST:PORT/PATH]

Without an argument the address is $TRELLIS_HEALTH. gRPC addresses are asked by the standard health service; for grpcs,
$TRELLIS_HEALTH_CA is the authority's file and $TRELLIS_HEALTH_CERT, where nodes must show one, a certificate whose
key lies beside it as .key.
"""

import os
import sys
import urllib.request
from pathlib import Path

SECONDS = 4.0
DIRECT = [("grpc.enable_http_proxy", 0)]
"""What is asked is in this container: a proxy of the environment is for other machines, and does not know it."""


def grpc_problem(scheme: str, target: str) -> str:
    """Return what is wrong with a gRPC server, empty if nothing is."""
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    if scheme == "grpcs":
        certificate = os.environ.get("TRELLIS_HEALTH_CERT")
        credentials = grpc.ssl_channel_credentials(
            Path(os.environ["TRELLIS_HEALTH_CA"]).read_bytes(),
            Path(certificate).with_suffix(".key").read_bytes() if certificate else None,
            Path(certificate).read_bytes() if certificate else None,
        )
        channel = grpc.secure_channel(target, credentials, options=DIRECT)
    else:
        channel = grpc.insecure_channel(target, options=DIRECT)
    with channel:
        try:
            reply = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=SECONDS)
        except grpc.RpcError as error:
            return f"{error.code().name}: {error.details()}"
    return "" if reply.status == health_pb2.HealthCheckResponse.SERVING else f"status {reply.status}, not SERVING"


def main() -> int:
    """Ask, and return the exit status."""
    url = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("TRELLIS_HEALTH", "")
    scheme, _, target = url.partition("://")
    try:
        if scheme in ("grpc", "grpcs"):
            problem = grpc_problem(scheme, target)
        elif scheme == "http":
            direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            with direct.open(url, timeout=SECONDS) as answer:
                problem = "" if answer.status == 200 else f"status {answer.status}"
        else:
            problem = f"{url!r} is no grpc://, grpcs:// or http:// address; set TRELLIS_HEALTH"
    except (OSError, KeyError) as error:
        problem = f"{type(error).__name__}: {error}"
    if problem:
        sys.stderr.write(f"{url}: {problem}\n")
    return 1 if problem else 0


if __name__ == "__main__":
    sys.exit(main())
