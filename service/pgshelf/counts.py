"""The numbers of all processes of a service: what each counts, added up.

Serving processes write their numbers to files of one folder, which `pgshelf serve` makes and names to
prometheus-client.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import psutil
from litestar.di import NamedDependency
from litestar.params import SkipValidation
from prometheus_client import REGISTRY, CollectorRegistry, multiprocess

# Where the processes of a service keep their numbers; None where there is but one process.
Folder = NamedDependency[SkipValidation[Path | None]]


def everywhere(folder: Path | None) -> CollectorRegistry:
    """What all processes count."""
    if folder is None:
        return REGISTRY
    for file in folder.glob("gauge_live*.db"):
        pid = int(re.findall(r"\d+", file.stem)[-1])
        if not psutil.pid_exists(pid):
            multiprocess.mark_process_dead(pid, str(folder))  # type: ignore[no-untyped-call]
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry, str(folder))  # type: ignore[no-untyped-call]
    return registry


def sums(folder: Path | None, names: str) -> Callable[..., int]:
    """Adds up samples of metrics that begin with `names`: by their whole name and, where given, their labels."""
    families = [family for family in everywhere(folder).collect() if family.name.startswith(names)]
    samples = [sample for family in families for sample in family.samples]

    def found(name: str, **labels: str) -> int:
        return int(sum(each.value for each in samples if each.name == name and labels.items() <= each.labels.items()))

    return found
