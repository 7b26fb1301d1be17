"""Applications for tests: to make one takes longer than most tests, so one that is free is given another database."""

from __future__ import annotations

from collections import OrderedDict

import msgspec
from litestar import Litestar

from pgshelf.app import Parts, create_app
from pgshelf.settings import Settings

MOST = 8  # that are kept
OWN = ("database_url", "data_dir")  # what differs from test to test, and no handler knows
_free: OrderedDict[str, Litestar] = OrderedDict()  # by their settings, the last used at the end


def take(settings: Settings) -> Litestar:
    """An application over the database of `settings`: a new one, or one whose parts are all new."""
    app = _free.pop(_kind(settings), None)
    if app is None or not settings.database_url:
        return create_app(settings)
    parts: Parts = app._lifespan_managers[0].__self__  # type: ignore[union-attr]  # Parts.lifespan, as create_app has it
    guard, answers = parts.guard, parts.answers
    parts.__init__(settings, settings.database_url)  # type: ignore[misc]  # the handlers hold this very object
    guard.__dict__, parts.guard = parts.guard.__dict__, guard  # and the middleware these two
    answers.__dict__, parts.answers = parts.answers.__dict__, answers
    return app


def give_back(app: Litestar, settings: Settings) -> None:
    """Keep an application whose lifespan is over for the next test with such settings.

    None that traces, for its edge holds on to the traces that are closed by then, and none that knows replicas.
    """
    if settings.tracing or settings.replica_url:
        return
    _free[_kind(settings)] = app
    while len(_free) > MOST:
        _free.popitem(last=False)


def _kind(settings: Settings) -> str:
    said = msgspec.structs.asdict(settings)
    return str({name: value for name, value in said.items() if name not in OWN})
