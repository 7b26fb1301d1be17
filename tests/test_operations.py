"""The dashboard, the alerts and the documentation name what /metrics has, all of it and nothing else."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import promql_parser
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from pgshelf.app import create_app
from pgshelf.errors import CODES
from pgshelf.settings import Settings
from tests.conftest import _lifespan

DOCS = Path(__file__).parents[1] / "docs"
RANGES = {"$__rate_interval": "5m", "$job": "pgshelf"}
SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_count", "_sum"), "gauge": ("",)}


@pytest.fixture(scope="module")
def exposed(shared_database_url: str, vector_schema: str) -> str:
    """What /metrics says, after a request that found nothing."""

    async def asked() -> str:
        app = create_app(Settings(database_url=shared_database_url, vector_schema=vector_schema, embedder="none"))
        transport = httpx2.ASGITransport(app=app)  # type: ignore[arg-type]  # the same protocol, typed closer
        async with _lifespan(app), httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
            await client.get("/nowhere")
            return str((await client.get("/metrics")).text)

    return asyncio.run(asked())


@pytest.fixture
def families(exposed: str) -> dict[str, tuple[str, str]]:
    """The metrics of pgshelf as they are exposed: name to kind and meaning."""
    found = {family.name: (family.type, family.documentation) for family in text_string_to_metric_families(exposed)}
    # when a counter began is OpenMetrics' business
    return {name: told for name, told in found.items() if name.startswith("pgshelf_") and not name.endswith("_created")}


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((DOCS / "operations/dashboard.json").read_text())
    return found


def panels() -> list[dict[str, Any]]:
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((DOCS / "operations/alerts.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def expressions() -> list[str]:
    texts = [target["expr"] for panel in panels() for target in panel["targets"]] + [rule["expr"] for rule in rules()]
    for name, value in RANGES.items():
        texts = [text.replace(name, value) for text in texts]
    return texts


def selectors(node: Any) -> Iterator[Any]:
    """The selectors of a parsed expression."""
    if isinstance(node, promql_parser.VectorSelector):
        yield node
        return
    for name in dir(node):
        if not name.startswith("_"):
            parts = getattr(node, name)
            for part in parts if isinstance(parts, list) else [parts]:
                if isinstance(part, promql_parser.Expr):
                    yield from selectors(part)


def used() -> set[str]:
    return {each.name for text in expressions() for each in selectors(promql_parser.parse(text))}


def test_the_documentation_has_every_metric_and_no_other(families: dict[str, tuple[str, str]]) -> None:
    rows = re.findall(r"^\| `(pgshelf_[a-z_]+)` \| (\w+) \|", (DOCS / "operations.md").read_text(), re.MULTILINE)
    assert dict(rows) == {name: kind for name, (kind, _) in families.items()}
    assert all(meaning.endswith(".") for _, meaning in families.values())


def test_dashboard_and_alerts_use_only_what_there_is(families: dict[str, tuple[str, str]]) -> None:
    there = {name + suffix for name, (kind, _) in families.items() for suffix in SUFFIXES[kind]}
    assert used() - {"up"} <= there


def test_the_dashboard_shows_every_metric(families: dict[str, tuple[str, str]]) -> None:
    shown = {re.sub("_(total|bucket|count|sum)$", "", name) for name in used()} | used()
    assert set(families) <= shown


def test_labels_that_are_selected_exist(exposed: str) -> None:
    told = re.findall(r"^\| `(pgshelf_[a-z_]+)` \| \w+ \| ([a-z, ]*)\|", (DOCS / "operations.md").read_text(), re.M)
    labels = {name: set(filter(None, text.replace(" ", "").split(","))) for name, text in told}
    by_scraping = {"job", "instance", "le"}
    for text in expressions():
        for selector in selectors(promql_parser.parse(text)):
            name = re.sub("_(total|bucket|count|sum)$", "", selector.name)
            allowed = labels.get(name, set()) | labels.get(selector.name, set()) | by_scraping
            assert {matcher.name for matcher in selector.matchers.matchers} <= allowed, text
    for family in text_string_to_metric_families(exposed):
        for sample in family.samples:
            if family.name in labels:
                assert set(sample.labels) - {"le"} == labels[family.name], family.name


def test_every_alert_is_explained_and_every_explanation_has_its_alert() -> None:
    text = (DOCS / "operations.md").read_text()
    explained = set(re.findall(r"^### (Pgshelf\w+)$", text, re.MULTILINE))
    assert {rule["alert"] for rule in rules()} == explained
    for rule in rules():
        assert rule["labels"]["severity"] in {"warning", "critical"}
        assert rule["annotations"]["summary"]
        assert rule["annotations"]["runbook"] == f"docs/operations.md#{rule['alert'].lower()}"
        assert 'job="pgshelf"' in rule["expr"], rule["alert"]
    assert len({rule["alert"] for rule in rules()}) == len(rules())


def test_alerts_name_codes_that_there_are() -> None:
    lists = re.findall(r'code=~"([^"]+)"', " ".join(rule["expr"] for rule in rules()))
    assert lists and {code for codes in lists for code in codes.split("|")} <= set(CODES)


def test_the_dashboard_is_one_that_grafana_loads() -> None:
    found = dashboard()
    assert found["uid"] == "pgshelf" and found["schemaVersion"] >= 39
    ids = [panel["id"] for panel in found["panels"]]
    assert len(set(ids)) == len(ids)
    cells = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in found["panels"]]
    assert len(set(cells)) == len(cells)
    variables = {variable["name"] for variable in found["templating"]["list"]}
    assert set(re.findall(r"\$\{?([a-z]\w+)", json.dumps(found))) == variables
    for panel in panels():
        assert panel["title"] and panel["datasource"]["uid"] == "${datasource}" and panel["targets"]
