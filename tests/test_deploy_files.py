"""The files around the code say what is true: compose, Dockerfile, Makefile, CI, pre-commit."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
TARGETS = {"help", "demo", "serve", "replicas", "test", "check", "bench", "soak"}


def load(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / name).read_text())


def make(*arguments: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in {"MAKEFLAGS", "MAKELEVEL", "ARGS"}}
    command = ["make", "--no-print-directory", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    return load("docker-compose.yml")["services"]


def test_compose_is_a_database_with_pgvector_a_migration_and_the_service(services):
    assert {name for name, service in services.items() if "profiles" not in service} == {"db", "migrate", "service"}
    assert services["db"]["image"] == "pgvector/pgvector:pg18"
    assert services["migrate"]["command"] == ["pgshelf", "migrate"]
    assert services["migrate"]["restart"] == "no"


def test_compose_keeps_the_data_where_postgresql_18_images_put_it(services):
    assert services["db"]["volumes"] == ["database:/var/lib/postgresql"]
    assert "database" in load("docker-compose.yml")["volumes"]
    assert services["db"]["shm_size"] == "1gb"


def test_compose_starts_in_order(services):
    assert services["migrate"]["depends_on"] == {"db": {"condition": "service_healthy"}}
    assert services["service"]["depends_on"] == {
        "db": {"condition": "service_healthy"},
        "migrate": {"condition": "service_completed_successfully"},
    }
    assert services["db"]["healthcheck"]["test"][1] == "pg_isready"
    assert "/ready" in services["service"]["healthcheck"]["test"][-1]


def test_compose_has_no_default_password(services):
    required = "${POSTGRES_PASSWORD:?set it in .env}"
    assert services["db"]["environment"]["POSTGRES_PASSWORD"] == required
    for name in ("migrate", "service"):
        assert services[name]["environment"]["PGPASSWORD"] == required
    assert re.search(r"^POSTGRES_PASSWORD=$", (ROOT / ".env.example").read_text(), re.MULTILINE)


def test_compose_publishes_the_service_on_this_machine_only(services):
    """That is also what lets it serve without authentication."""
    published = {name: service["ports"] for name, service in services.items() if "ports" in service}
    assert published.pop("grafana") == ["127.0.0.1:${GRAFANA_PORT:-3000}:3000"]
    assert published == {"service": ["127.0.0.1:${PGSHELF_PORT:-8432}:8432"]}
    assert services["service"]["environment"]["PGSHELF_ALLOW_UNAUTHENTICATED"] == "true"
    assert "ALLOW_UNAUTHENTICATED=true" not in (ROOT / ".env.example").read_text()


def test_monitoring_is_a_profile_over_the_files_of_the_documentation(services):
    monitoring = {name: service for name, service in services.items() if service.get("profiles") == ["monitoring"]}
    assert set(monitoring) == {"prometheus", "grafana"}
    configs = {
        name: yaml.safe_load(config["content"]) for name, config in load("docker-compose.yml")["configs"].items()
    }
    given = {config["source"] for service in monitoring.values() for config in service["configs"]}
    assert given == set(configs)
    files = [volume.split(":") for service in monitoring.values() for volume in service["volumes"]]
    bound = {source: target for source, target, *_ in files if source.startswith("./")}
    assert set(bound) == {"./docs/operations/alerts.yml", "./docs/operations/dashboard.json"}
    assert all((ROOT / source).is_file() for source in bound)
    named = {source for source, *_ in files} - set(bound)
    assert named <= set(load("docker-compose.yml")["volumes"])
    prometheus = configs["prometheus"]
    assert prometheus["rule_files"] == [bound["./docs/operations/alerts.yml"]]
    [job] = prometheus["scrape_configs"]
    assert (job["job_name"], job["static_configs"]) == ("pgshelf", [{"targets": ["service:8432"]}])
    assert "service" in environment_of(services, "")["PGSHELF_ALLOWED_HOSTS"].split(",")
    # what is to be uncommented when there is a key
    told = yaml.safe_load(re.sub(r"# (?=authorization|- \./prom)", "", (ROOT / "docker-compose.yml").read_text()))
    [job] = yaml.safe_load(told["configs"]["prometheus"]["content"])["scrape_configs"]
    mounted = [volume.split(":")[1] for volume in told["services"]["prometheus"]["volumes"]]
    assert job["authorization"]["credentials_file"] in mounted
    [provider] = configs["grafana_dashboards"]["providers"]
    assert bound["./docs/operations/dashboard.json"].startswith(provider["options"]["path"])
    [source] = configs["grafana_datasource"]["datasources"]
    assert source["url"] == "http://prometheus:9090"


def test_tls_is_laid_over_the_compose_file(services):
    over = load("docker-compose.tls.yml")["services"]
    assert set(over) == {"db", "migrate", "service"}
    switches = dict(each.split("=") for each in over["db"]["command"] if "=" in each)
    assert (switches["ssl"], switches["ssl_cert_file"]) == ("on", "/certificates/server.crt")
    for name in ("migrate", "service"):
        url = over[name]["environment"]["PGSHELF_DATABASE_URL"]
        plain, _, query = url.partition("?")
        assert plain == services[name]["environment"]["PGSHELF_DATABASE_URL"]
        assert query == "sslmode=verify-full&sslrootcert=/certificates/ca.crt"
        assert over[name]["volumes"] == ["./certificates/ca.crt:/certificates/ca.crt:ro"]


@pytest.mark.parametrize("file", ["docker-compose.yml", "docker-compose.ha.yml", ".env.example", "Dockerfile"])
def test_every_variable_is_a_setting(file):
    from pgshelf.settings import Settings

    variables = set(re.findall(r"\bPGSHELF_[A-Z_]+", (ROOT / file).read_text()))
    assert variables
    assert variables <= {f"PGSHELF_{name.upper()}" for name in Settings.__struct_fields__}


def test_every_variable_of_compose_is_explained():
    explained = set(re.findall(r"^#?([A-Z_]+)=", (ROOT / ".env.example").read_text(), re.MULTILINE))
    files = ("docker-compose.yml", "docker-compose.ha.yml")
    used = {name for file in files for name in re.findall(r"\$\{([A-Z_]+)", (ROOT / file).read_text())}
    assert used <= explained


def environment_of(services: dict[str, Any], dotenv: str, name: str = "service") -> dict[str, str]:
    """What compose gives a container: .env as its env_file and for what it fills in; `environment` wins."""
    assert services[name]["env_file"] == [{"path": ".env", "required": False}]
    own = dict(line.split("=", 1) for line in dotenv.splitlines() if line and not line.startswith("#"))

    def filled(text: str) -> str:
        return re.sub(r"\$\{([A-Z_]+)(?::-([^}]*)|:\?[^}]*)\}", lambda found: own.get(found[1]) or found[2] or "", text)

    return own | {variable: filled(value) for variable, value in services[name]["environment"].items()}


@pytest.mark.parametrize("file", ["docker-compose.yml", "docker-compose.ha.yml"])
@pytest.mark.parametrize("name", ["migrate", "service"])
def test_all_that_is_in_dotenv_reaches_the_service(file, name):
    from pgshelf.settings import Settings

    given = "PGSHELF_AUTH=on\nPGSHELF_RATE_LIMITS=team\nPGSHELF_LOG_FORMAT=json\nPGSHELF_PORT=9000\nPGSHELF_WORKERS=3\n"
    given += (
        "POSTGRES_PASSWORD=x\nPGSHELF_ALLOWED_HOSTS=shelf.example.org\nPGSHELF_DATABASE_URL=postgresql://elsewhere/x\n"
    )
    environment = environment_of(load(file)["services"], given, name)
    settings = Settings.from_env(environment)
    assert (settings.auth, settings.rate_limits, settings.log_format, settings.workers) == ("on", "team", "json", 3)
    assert settings.allowed_hosts == "shelf.example.org"
    assert "elsewhere" not in str(settings.database_url) and environment["PGPASSWORD"] == "x"
    if name == "service":
        assert settings.port == 8432


def test_compose_starts_the_service_with_settings_that_are_accepted(services):
    from pgshelf.settings import Settings

    example = re.sub(r"^#(?=[A-Z_]+=)", "", (ROOT / ".env.example").read_text(), flags=re.MULTILINE)
    for dotenv in ("", example):
        settings = Settings.from_env(environment_of(services, dotenv))
        assert settings.database_url == "postgresql://pgshelf@db:5432/pgshelf"
        assert settings.allow_unauthenticated
        assert (settings.api_prefix, settings.workers) == ("/v1", os.cpu_count() or 1)


@pytest.fixture(scope="module")
def replicated() -> dict[str, Any]:
    return load("docker-compose.ha.yml")


def test_the_replicated_compose_is_three_servers_with_the_same_settings(replicated):
    services = replicated["services"]
    assert set(services) == {"certificates", "db1", "db2", "db3", "migrate", "service"}
    servers = [services[name] for name in ("db1", "db2", "db3")]
    assert all(server["command"] == servers[0]["command"] for server in servers)
    given = dict(option.split("=", 1) for option in servers[0]["command"] if "=" in option)
    assert (given["ssl"], given["wal_log_hints"], given["hba_file"]) == ("on", "on", "/etc/pgshelf/pg_hba.conf")
    for server in servers:
        assert server["image"] == load("docker-compose.yml")["services"]["db"]["image"]
        assert server["environment"]["POSTGRES_PASSWORD"] == "${POSTGRES_PASSWORD:?set it in .env}"
        assert "ports" not in server
    assert services["service"]["ports"] == ["127.0.0.1:${PGSHELF_PORT:-8432}:8432"]
    assert services["migrate"]["depends_on"] == {"db1": {"condition": "service_healthy"}}
    assert {name: services[name]["environment"]["NAME"] for name in ("db2", "db3")} == {"db2": "db2", "db3": "db3"}


def test_nobody_comes_in_without_tls_and_nobody_replicates_without_a_certificate(replicated):
    lines = [line.split() for line in replicated["configs"]["pg_hba"]["content"].splitlines() if line.strip()]
    assert {line[0] for line in lines} == {"local", "hostssl"}
    assert [line[1:] for line in lines if line[1] == "replication"] == [["replication", "replicator", "all", "cert"]]
    assert not {"trust", "password", "md5"} & {line[-1] for line in lines}
    for name in ("migrate", "service"):
        url = replicated["services"][name]["environment"]["PGSHELF_DATABASE_URL"]
        assert "sslmode=verify-full" in url and "target_session_attrs=read-write" in url and "\n" not in url
        assert replicated["services"][name]["environment"]["PGPASSWORD"] == "${POSTGRES_PASSWORD:?set it in .env}"
    assert "sslmode=verify-full" in replicated["configs"]["follow"]["content"]


def test_the_replicated_service_starts_with_settings_that_are_accepted(replicated):
    from psycopg import conninfo

    from pgshelf.settings import Settings

    settings = Settings.from_env(environment_of(replicated["services"], ""))
    known = conninfo.conninfo_to_dict(settings.database_url or "")
    assert (known["host"], known["port"]) == ("db1,db2,db3", "5432,5432,5432")
    assert "PASSWORD" not in settings.summary()["database_url"]


def script(replicated: dict[str, Any], name: str, path: Path) -> Path:
    """A script of the file, as compose writes it."""
    path.write_text(replicated["configs"][name]["content"].replace("$$", "$"))
    subprocess.run(["sh", "-n", str(path)], check=True)
    return path


def test_the_scripts_of_the_replicated_compose_are_shell(replicated, tmp_path):
    script(replicated, "follow", tmp_path / "follow.sh")
    text = replicated["configs"]["follow"]["content"]
    assert not re.search(r"(?<!\$)\$(?!\$)[A-Za-z{@(]", text.replace("$$", "")), "compose would fill it in"


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
def test_the_certificates_are_those_that_the_servers_ask_for(replicated, tmp_path):
    made = tmp_path / "certificates"
    made.mkdir()
    making = script(replicated, "make_certificates", tmp_path / "make.sh")
    # not as root's: there is no user 999 to give them to
    making.write_text(making.read_text().replace("chown -R 999:999 db1 db2 db3", ":"))
    for _ in range(2):  # the second time it finds them
        subprocess.run(["sh", str(making), str(made)], check=True, capture_output=True)

    def openssl(*arguments: str) -> str:
        return subprocess.run(["openssl", *arguments], check=True, capture_output=True, text=True).stdout

    for name in ("db1", "db2", "db3"):
        server, client = made / name / "server.crt", made / name / "replicator.crt"
        openssl("verify", "-CAfile", str(made / name / "ca.crt"), "-verify_hostname", name, str(server))
        openssl("verify", "-CAfile", str(made / name / "ca.crt"), str(client))
        assert "CN" in openssl("x509", "-noout", "-subject", "-in", str(client))
        assert openssl("x509", "-noout", "-subject", "-in", str(client)).strip().endswith("replicator")
        assert (made / name / "server.key").stat().st_mode & 0o077 == 0
        assert (made / name / "replicator.key").stat().st_mode & 0o077 == 0
    assert not list(made.glob("public/*.key")) and (made / "public/ca.crt").exists()


def test_the_image_runs_as_its_own_user_on_the_default_port():
    from pgshelf.settings import Settings

    stage = (ROOT / "Dockerfile").read_text().rpartition("\nFROM ")[2]
    assert "\nUSER pgshelf\n" in stage
    assert f"\nEXPOSE {Settings().port}\n" in stage
    assert f"127.0.0.1:{Settings().port}/health" in stage
    assert 'CMD ["pgshelf", "serve", "--host", "0.0.0.0", "--port", "8432"]' in stage


def test_the_image_is_built_from_files_that_exist_and_reach_the_daemon():
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    sources = {name.removeprefix("./") for line in copied for name in line.split()}
    assert all((ROOT / name).exists() for name in sources)
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert sent == sources


def test_make_lists_every_target():
    phony = re.search(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony is not None
    assert set(phony[1].split()) == TARGETS
    assert set(re.findall(r"^  make (\w+)", make(), re.MULTILINE)) == TARGETS


def test_make_demo_keeps_serving_when_asked():
    assert "pgshelf demo --keep" in make("--dry-run", "demo", "KEEP=1")
    assert "--keep" not in make("--dry-run", "demo", "KEEP=")
    assert "--keep" not in make("--dry-run", "demo", "KEEP=0")


def test_make_test_judges_coverage_in_full_runs():
    assert "--cov-fail-under=97 " in make("--dry-run", "test")
    assert "--cov-fail-under=0 -k chunking" in make("--dry-run", "test", "ARGS=-k chunking")


def test_make_says_what_it_needs_where_no_python_is_new_enough(tmp_path):
    (tmp_path / "sdk").mkdir()
    for name in ("Makefile", "pyproject.toml", "sdk/pyproject.toml"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    old = tmp_path / "bin"
    old.mkdir()
    for name in ("python3.11", "python3.12", "python3.13", "python3"):
        (old / name).write_text("#!/bin/sh\nexit 1\n")
        (old / name).chmod(0o755)
    environment = {"PATH": f"{old}:{os.environ['PATH']}"}
    command = ["make", "-C", str(tmp_path), "demo"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode != 0
    assert "Python 3.11 or newer" in result.stderr
    assert not (tmp_path / ".venv").exists()


def test_pre_commit_runs_the_commands_of_make_check():
    hooks = [hook["entry"] for repository in load(".pre-commit-config.yaml")["repos"] for hook in repository["hooks"]]
    commands = make("--dry-run", "--always-make", "check").splitlines()
    checks = [line for line in commands if line.startswith(".venv/bin/") and " -m pip " not in line]
    assert hooks == ["make .venv/dev.stamp", *checks]


def test_ci_runs_every_supported_postgresql_and_python():
    jobs = load(".github/workflows/ci.yml")["jobs"]
    matrix = jobs["containers"]["strategy"]["matrix"]
    assert matrix["postgres"] == ["16", "17", "18"]
    classifiers = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["classifiers"]
    pythons = [line.removeprefix("Programming Language :: Python :: ") for line in classifiers]
    assert matrix["python"] == [version for version in pythons if re.fullmatch(r"3\.\d+", version)]
    commands = [step.get("run", "") for job in jobs.values() for step in job["steps"]]
    assert any(command.startswith("make check") for command in commands)
    assert any(command.startswith("make test") for command in commands)


def test_ci_run_is_executable_and_checks_before_it_tests():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    text = script.read_text()
    assert "set -euo pipefail" in text
    assert 0 < text.index("\nmake check") < text.index("\nmake test")


def test_every_ignored_lint_rule_has_its_reason():
    section = (ROOT / "pyproject.toml").read_text().split("[tool.ruff.lint.per-file-ignores]")[1].split("\n[tool.")[0]
    ignoring = [line for line in section.splitlines() if re.search(r'"[A-Z]+[0-9]+"', line)]
    assert ignoring
    assert all(re.search(r"# \S+", line) for line in ignoring)
