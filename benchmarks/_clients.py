"""Clients that search by vector without a pause, for load.py: locust itself would take a sixth of two cores.

`python -m benchmarks._clients ADDRESS FILE CLIENTS SECONDS [--cached]`, with the file of load --keep; prints figures as
locust does.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import Counter
from pathlib import Path

import gevent  # type: ignore[import-untyped]  # it has no types; geventhttpclient brings it
from geventhttpclient import HTTPClient

PATH = "/v1/libraries/load/search"


def main() -> None:
    """Ask until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address")
    parser.add_argument("file", type=Path)
    parser.add_argument("clients", type=int)
    parser.add_argument("seconds", type=float)
    parser.add_argument("--cached", action="store_true", help="the query cache may answer; else each is carried out")
    options = parser.parse_args()
    told = json.loads(options.file.read_text())
    bodies = [json.dumps({"vector": vector, "k": 10}).encode() for vector in told["vectors"]]
    headers = {"Authorization": f"Bearer {told['key']}", "Content-Type": "application/json"}
    if not options.cached:
        headers["Cache-Control"] = "no-cache"
    client = HTTPClient.from_url(
        options.address, concurrency=options.clients, network_timeout=60, connection_timeout=60
    )
    times: Counter[int] = Counter()
    failures = 0
    until = time.perf_counter() + options.seconds

    def search() -> None:
        nonlocal failures
        while (started := time.perf_counter()) < until:
            response = client.post(PATH, random.choice(bodies), headers)
            response.read()
            times[round((time.perf_counter() - started) * 1000)] += 1
            failures += response.status_code != 200

    gevent.joinall([gevent.spawn(search) for _ in range(options.clients)], raise_error=True)
    print(json.dumps([{"name": "search", "response_times": times, "num_failures": failures}]))


if __name__ == "__main__":
    main()
