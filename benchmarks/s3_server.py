"""The tests' S3 server on one of the hosts of `links`, behind a link like those of the workers.

As a program it serves at the address it is given until its input ends, as it does when who started it dies.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping

from benchmarks.links import Host


@dataclasses.dataclass(frozen=True)
class Bucket:
    """A new bucket.

    Attributes:
        url: of it.
        environment: what a process on another host needs to reach it.
    """

    url: str
    environment: Mapping[str, str]


@contextlib.contextmanager
def serving(host: Host) -> Iterator[Bucket]:
    """A server there, with an empty bucket, while the context lasts."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.s3_server", host.address]
    with host.start(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        try:
            told = server.stdout.readline()
            if not told:
                raise RuntimeError(f"the S3 server at {host.address} did not start")
            yield Bucket(**json.loads(told))
        finally:
            server.kill()


def main(address: str) -> None:
    from tests.fixtures_store import S3Server

    server = S3Server(address)
    print(json.dumps({"url": f"s3://{server.bucket()}", "environment": server.environment()}), flush=True)
    sys.stdin.read()
    server.stop()


if __name__ == "__main__":
    main(sys.argv[1])
