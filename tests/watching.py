"""What coverage watches: a test's first case, or what a marker says, and the processes that are started meanwhile.

Being watched makes Python many times slower, so collecting the tests, with all that they import, is not.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import os
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import coverage
import pytest

PROCESSES = "COVERAGE_PROCESS_CONFIG"  # coverage's own: what is started with it is watched, too


def coverage_of(config: pytest.Config) -> Any:
    """What pytest-cov controls coverage with; None where it does not run."""
    controller = getattr(config.pluginmanager.getplugin("_cov"), "cov_controller", None)
    return None if controller is None or controller.cov is None else controller


def watch(config: pytest.Config, wanted: bool) -> None:
    """Let coverage watch from here on, or neither this process nor those that it starts.

    What changes nothing is left alone: to begin again takes coverage longer than many a test.
    """
    controller = coverage_of(config)
    if controller is None or controller.started == wanted:
        return
    if wanted:
        leave = os._exit
        controller.resume()  # which tells processes, too
        os._exit = leave  # coverage has wrapped it once more
    else:
        controller.pause()
        os.environ.pop(PROCESSES, None)


def watch_once() -> None:
    """End what has begun before pytest-cov begins for the tests, as it does in a worker of xdist to see plugins load:
    it would watch whatever the later one is told not to."""
    while (running := coverage.Coverage.current()) is not None:
        running.stop()


def watch_imports(config: pytest.Config) -> None:
    """Import all of ours while coverage watches, after what others wrote, and let it watch no more."""
    import pgshelf
    import pgshelf_client

    watch(config, False)
    for package in (pgshelf, pgshelf_client):
        for name in sorted(_imported(Path(package.__path__[0]))):
            with contextlib.suppress(ImportError):  # an extra that is not installed
                importlib.import_module(name)
    watch(config, True)
    for package in (pgshelf, pgshelf_client):
        for name in _modules(package):
            importlib.import_module(name)
    watch(config, False)


def _imported(folder: Path) -> Iterator[str]:
    """What others wrote and the modules in a folder import when they are imported."""
    for path in folder.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import):
                yield from (each.name for each in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                if node.module.split(".")[0] not in ("pgshelf", "pgshelf_client"):
                    yield node.module


def _modules(package: ModuleType) -> Iterator[str]:
    return (each.name for each in pkgutil.walk_packages(package.__path__, f"{package.__name__}."))
