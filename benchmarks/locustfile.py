"""What clients do, for locust. Of 21 requests 10 search by vector (3 of these with a filter), 5 by words and vector, 3
write a document, 2 a batch of ten, 1 looks at the library, its index or its documents.

`python -m benchmarks.load` makes the library, starts the service and runs this. By hand, against a service of your own:
LOAD_DATA=FILE locust -f benchmarks/locustfile.py --host http://... Open|Users, with the file of load --keep.
"""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path
from typing import Any

from locust import FastHttpUser, between, task

DATA: dict[str, Any] = json.loads(Path(os.environ["LOAD_DATA"]).read_text())
RATE = float(os.environ.get("LOAD_RATE", "100"))  # of all users of Open together
PATIENCE = 5.0  # seconds between the requests of one of them: none falls behind the rate before an answer takes longer
LIBRARY = "/v1/libraries/load"
KEYS = 5000  # documents that are written again and again, so that the library keeps its size
KEY = {"Authorization": f"Bearer {DATA['key']}"}
JSON = {**KEY, "Content-Type": "application/json"}


# Ready before the first request: this process shall have little to do.
SEARCHES = [json.dumps({"vector": vector, "k": 10}) for vector in DATA["vectors"]]
FILTER = {"spread.rank": {"$lt": 0.3}}
FILTERED = [json.dumps({"vector": vector, "k": 10, "filter": FILTER}) for vector in DATA["vectors"]]
HYBRID = [json.dumps({"query": query, "k": 10}) for query in DATA["queries"]]


class Client(FastHttpUser):
    """The mix."""

    abstract = True

    def ask(self, name: str, method: str, path: str, body: str | None = None) -> None:
        """One request; what is not 2xx is a failure."""
        self.client.request(method, LIBRARY + path, data=body, headers=JSON if body else KEY, name=name)

    @task(7)
    def by_vector(self) -> None:
        self.ask("search", "POST", "/search", random.choice(SEARCHES))

    @task(3)
    def with_filter(self) -> None:
        self.ask("search", "POST", "/search", random.choice(FILTERED))

    @task(5)
    def by_words(self) -> None:
        self.ask("hybrid", "POST", "/search", random.choice(HYBRID))

    @task(3)
    def write(self) -> None:
        self.ask("ingest", "POST", "/documents", json.dumps(self.document()))

    @task(2)
    def write_batch(self) -> None:
        documents = [self.document() for _ in range(10)]
        unique = list({each["key"]: each for each in documents}.values())
        self.ask("batch upsert", "POST", "/documents/batch", json.dumps({"documents": unique}))

    @task(1)
    def administer(self) -> None:
        self.ask("admin", "GET", random.choice(["", "/index", "/documents?limit=20"]))

    def document(self) -> dict[str, Any]:
        """One of the documents that are written again and again, with a text of one chunk or two."""
        return {
            "key": f"load-{random.randrange(KEYS)}",
            "title": "Written under load",
            "text": random.choice(DATA["texts"]),
            "metadata": {"spread": {"rank": random.random()}},
        }


class Open(Client):
    """As many requests a second as LOAD_RATE says, however long they take: LOAD_RATE * 5 users with -u."""

    def on_start(self) -> None:
        """They do not come all at once."""
        self.due = time.monotonic() + random.uniform(0, PATIENCE)
        time.sleep(self.due - time.monotonic())

    def wait_time(self) -> float:
        """Until PATIENCE after the last one was due; locust's constant_pacing brings all of them together."""
        self.due += PATIENCE
        return max(0.0, self.due - time.monotonic())


class Users(Client):
    """People, who look at what they got before they ask again."""

    wait_time = between(1, 3)

    def on_start(self) -> None:
        """They do not come all at once."""
        time.sleep(random.uniform(0, 3))
