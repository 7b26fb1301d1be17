"""The recall probe: now and then vectors of a library look for themselves in its index, so that lost links are seen.

What it found is counted, not kept: of counters the processes of a service can be added up, and one of a library that is
gone just stands still. A share is the growth of one counter by the growth of another.
"""

from __future__ import annotations

import logging
import random
import time
from weakref import WeakKeyDictionary

import psycopg
import sqlalchemy
from prometheus_client import Counter
from sqlalchemy.pool import Pool

from pgshelf import database
from pgshelf.settings import Settings

log = logging.getLogger("pgshelf.worker")
SAMPLED = Counter("pgshelf_recall_sampled", "Vectors that looked for themselves in an index.", ["library"])
FOUND_SELF = Counter("pgshelf_recall_found_self", "Those that found themselves, or a copy.", ["library"])
COMPARED = Counter("pgshelf_recall_compared", "Those whose hits were compared with an exact search.", ["library"])
RECALL = Counter("pgshelf_recall_sum", "The sum of their recall, each between 0 and 1.", ["library"])
SAMPLES = 20
ROWS = 2_000_000  # looked at by the exact searches of one probe: about two seconds
LIBRARIES = """select l.id, l.name from pgshelf.libraries l
where l.deleted_at is null and l.shelf <> 0 and l.index_actual ->> 'type' <> 'flat'
order by pgshelf.shelf_rows(l.shelf) desc, l.id limit %s"""
PROBE = "select * from pgshelf.probe_index(%s, %s, %s)"
_due: WeakKeyDictionary[Pool, float] = WeakKeyDictionary()


async def probe(engine: sqlalchemy.Engine, settings: Settings) -> bool:
    """A step of the worker: probe one library once in PGSHELF_RECALL_INTERVAL. There is never more to do at once."""
    now = time.monotonic()
    if settings.recall_interval == 0 or now < _due.setdefault(engine.pool, now + settings.recall_interval):
        return False
    # jitter: processes that began together shall not probe together
    _due[engine.pool] = now + settings.recall_interval * random.uniform(0.75, 1.25)  # noqa: S311
    libraries = await database.run(engine, LIBRARIES, settings.metrics_libraries)
    if not libraries:
        return False
    library, name = random.choice(libraries)  # noqa: S311 - each gets its turn, whatever process looks
    try:
        [(sampled, found_self, compared, recall)] = await database.run(engine, PROBE, library, SAMPLES, ROWS)
    except psycopg.Error as error:  # deleted meanwhile, or too large for the statement timeout
        log.info("an index could not be probed: %s", error)
        return False
    SAMPLED.labels(name).inc(sampled)
    FOUND_SELF.labels(name).inc(found_self)
    COMPARED.labels(name).inc(compared)
    RECALL.labels(name).inc(compared * (recall or 0))
    if found_self < sampled:
        log.warning("%d of %d vectors did not find themselves in the index of a library", sampled - found_self, sampled)
    return False
