"""Backups and point-in-time recovery: really taken, really restored, of the bundled PostgreSQL and of another one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx2
import msgspec
import psutil
import psycopg
import pytest
from click.testing import CliRunner

from pgshelf import (
    backups,
    base_backup,
    doctor,
    embedded,
    embedded_account,
    embedded_settings,
    migrate,
    postgres_programs,
    restore,
)
from pgshelf.backup_manifest import verify
from pgshelf.backups import Backup, BackupError, BackupRunning, Backups
from pgshelf.base_backup import Job
from pgshelf.cli import main
from pgshelf.embedded import EmbeddedServer
from pgshelf.restore import Recovery
from tests.replication.servers import FAST, folder, wait_until
from tests.rest.asking import ok, problem

pytestmark = pytest.mark.xdist_group("replication")

WROTE = "select array_agg(name order by name) from pgshelf.keys"


def run(*arguments: str, **environment: str) -> Any:
    cleared = {name: None for name in os.environ if name.startswith("PGSHELF_")}
    return CliRunner().invoke(main, arguments, env={**cleared, **environment})


def ask(url: str, statement: str, *parameters: Any) -> Any:
    with psycopg.connect(url, autocommit=True) as connection:
        row = connection.execute(statement.encode(), parameters or None).fetchone()
    return row and row[0]


def write(url: str, name: str) -> None:
    ask(url, "select pgshelf.create_key(%s, 'reader', null, null, %s, 'pgs_')", name, name.encode())


class Shelf:
    """A bundled PostgreSQL that archives its WAL, a backup of it, and writes around a moment that is known."""

    def __init__(self, place: Path, version: int) -> None:
        self.place, self.version = place, version
        self.archive, self.directory = place / "wal", place / "backups"
        self.server = EmbeddedServer(place / "data", version, FAST, 60, self.archive)
        self.environment = {
            "PGSHELF_DATA_DIR": str(place / "data"),
            "PGSHELF_POSTGRES_VERSION": str(version),
            "PGSHELF_BACKUP_DIRECTORY": str(self.directory),
            "PGSHELF_WAL_ARCHIVE": str(self.archive),
        }

    def fill(self) -> None:
        migrate.upgrade(self.server.url(), warn=False)
        write(self.server.url(), "before")
        self.told = run("backup", "--label", "nightly", **self.environment)
        write(self.server.url(), "first")
        self.moment: datetime = ask(self.server.url(), "select clock_timestamp()")
        self.lsn: str = ask(self.server.url(), "select pg_current_wal_insert_lsn()::text")
        ask(self.server.url(), "select pg_create_restore_point('between')")
        time.sleep(0.02)
        write(self.server.url(), "second")
        last = ask(self.server.url(), "select pg_walfile_name(pg_switch_wal())")
        wait_until(lambda: (self.archive / last).exists())

    def settings(self, make_settings: Any, **overrides: Any) -> Any:
        known = {"backup_directory": self.directory, "worker_enabled": False, "embedder": "none", "auth": "off"}
        return make_settings(self.server.url(), **known | overrides)


@pytest.fixture(scope="module")
def shelf(postgres_version: int) -> Iterator[Shelf]:
    with folder() as place:
        made = Shelf(place, 16 if postgres_version == 16 else 18)
        made.server.start()
        with made.server:
            made.fill()
            yield made


@pytest.fixture
def spare(tmp_path: Path) -> Backups:
    return Backups(tmp_path / "backups")


def test_a_backup_is_complete_and_described(shelf: Shelf) -> None:
    assert shelf.told.exit_code == 0, shelf.told.output
    [backup] = Backups(shelf.directory).all()
    assert f"{backup.id}  done" in shelf.told.output and "nightly" in shelf.told.output
    assert (backup.state, backup.label, backup.error, backup.timeline) == ("done", "nightly", None, 1)
    data = shelf.directory / backup.id / "data"
    manifest = json.loads((data / "backup_manifest").read_text())
    [span] = manifest["WAL-Ranges"]
    assert (backup.start_lsn, backup.end_lsn) == (span["Start-LSN"], span["End-LSN"])
    assert backup.bytes is not None and backup.bytes >= sum(file["Size"] for file in manifest["Files"])
    assert backup.postgres == ask(shelf.server.url(), "show server_version")
    assert backup.finished_at is not None and backup.started_at < backup.finished_at < shelf.moment
    assert stat.S_IMODE(shelf.directory.stat().st_mode) == stat.S_IMODE(data.stat().st_mode) == 0o700
    listed = run("backup", "--list", **shelf.environment)
    assert listed.output.startswith(f"{backup.id}  done") and listed.output.count("\n") == 1
    if shelf.version == 16:  # the bundled one of 18 crashes
        programs = embedded.bin_dir(16)
        subprocess.run([str(programs / "pg_verifybackup"), str(data)], check=True)


def restored(target: Path, version: int) -> list[str]:
    with embedded.start(target, version, settings=FAST) as server:
        assert ask(server.url(), "select not pg_is_in_recovery()")
        write(server.url(), "later")
        assert ask(server.url(), "show recovery_target_time") == ""  # nothing of it is left
        found: list[str] = ask(server.url(), WROTE)
    return found


def test_a_moment_between_two_writes_has_the_first_and_not_the_second(shelf: Shelf) -> None:
    target = shelf.place / "to-time"
    told = run("restore", "--to", str(target), "--to-time", shelf.moment.isoformat(), **shelf.environment)
    assert told.exit_code == 0, told.output
    assert f"pgshelf serve --data-dir {target}" in told.output
    assert restored(target, shelf.version) == ["before", "first", "later"]
    again = run("restore", "--to", str(target), **shelf.environment)
    assert again.exit_code == 1 and "is not empty" in again.output


@pytest.mark.parametrize(
    ("archived", "expected"), [(True, ["before", "first", "later", "second"]), (False, ["before", "later"])]
)
def test_without_a_moment_it_goes_as_far_as_there_is_wal(shelf: Shelf, archived: bool, expected: list[str]) -> None:
    target = shelf.place / f"all-{archived}"
    environment = shelf.environment | ({} if archived else {"PGSHELF_WAL_ARCHIVE": ""})
    told = run("restore", "--to", str(target), **environment)
    assert told.exit_code == 0, told.output
    assert restored(target, shelf.version) == expected


def test_a_moment_that_was_never_reached_is_an_error(shelf: Shelf) -> None:
    later = datetime.now(UTC) + timedelta(hours=1)
    told = run("restore", "--to", str(shelf.place / "future"), "--to-time", later.isoformat(), **shelf.environment)
    assert told.exit_code == 1 and "recovery ended before configured recovery target was reached" in told.output
    early = run("restore", "--to", str(shelf.place / "past"), "--to-time", "2020-01-01T00:00:00Z", **shelf.environment)
    assert early.exit_code == 1 and "is old enough for that" in early.output
    assert not (shelf.place / "past").exists()


@pytest.mark.parametrize("target", ["--to-lsn", "--to-name"])
def test_another_postgresql_is_backed_up_and_restored(shelf: Shelf, target: str) -> None:
    """The copy is made a plain server's: what the bundled one has more is a file of settings."""
    store, place = Backups(shelf.place / f"plain{target}"), shelf.place / f"server{target}"
    [backup] = Backups(shelf.directory).all()
    shutil.copytree(shelf.directory / backup.id, store.directory / backup.id)
    forget(store.data(backup), "pgshelf.conf")
    value = {"--to-lsn": shelf.lsn, "--to-name": "between"}[target]
    told = run("restore", "--from", str(store.directory), "--to", str(place), target, value, **shelf.environment)
    assert told.exit_code == 0, told.output
    assert f"-D {place} start" in told.output
    with (place / "postgresql.conf").open("a") as config:
        config.write(f"unix_socket_directories = '{shelf.server.socket_dir}'\nport = 5433\nlisten_addresses = ''\n")
        config.write("fsync = off\nmax_connections = 200\nmax_locks_per_transaction = 256\n")
    server = shelf.server
    if server._account:
        embedded_account.give(place, *server._account)
    done = server._run("pg_ctl", "start", "-w", "-D", str(place), "-l", str(place / "started"))
    assert done.returncode == 0, (place / "started").read_text()
    try:
        url = f"postgresql://postgres@/pgshelf?host={shelf.server.socket_dir}&port=5433"
        wait_until(lambda: ask(url, "select not pg_is_in_recovery()"))
        assert ask(url, WROTE) == ["before", "first"]
        auto = (place / "postgresql.auto.conf").read_text()
        assert "recovery_" not in auto and "restore_command" not in auto  # a standby copied from it would stop there
        left = "recovery_target_time = '2026-01-01'\nwork_mem = '5MB'\nRestore_Command = '2026-01-01'\n"
        (place / "postgresql.auto.conf").write_text(f"{auto}{left}")
        again = base_backup.take(claimed(store, url), [embedded.bin_dir(shelf.version)], {"PATH": os.defpath})
        assert (again.state, again.error, again.timeline) == ("done", None, 2)
    finally:
        server._run("pg_ctl", "stop", "-w", "-m", "immediate", "-D", str(place))
    last = shelf.place / f"last{target}"
    told = run(
        "restore", again.id, "--from", str(store.directory), "--to", str(last), "--to-name", "then", **shelf.environment
    )
    assert told.exit_code == 0, told.output
    found = (last / "postgresql.auto.conf").read_text()
    assert "work_mem" in found and "2026-01-01" not in found
    lines = [line for line in found.splitlines() if line.startswith("recovery_target")]
    assert lines.count("recovery_target_name = 'then'") == 1 and "recovery_target_time = ''" in lines
    assert sum("''" in line for line in lines) == 4 and len(lines) == 6


def forget(data: Path, name: str) -> None:
    """Take a file out of a backup and of its manifest, as if it had never been there."""
    import hashlib

    (data / name).unlink()
    text = (data / "backup_manifest").read_text()
    lines = [line for line in text.splitlines(keepends=True) if f'"Path": "{name}"' not in line]
    head = "".join(lines).rpartition('"Manifest-Checksum"')[0]
    digest = hashlib.sha256(head.encode()).hexdigest()
    (data / "backup_manifest").write_text(f'{head}"Manifest-Checksum": "{digest}"}}\n')


def test_a_copy_that_was_touched_is_refused(shelf: Shelf, tmp_path: Path) -> None:
    [backup] = Backups(shelf.directory).all()
    programs = embedded.bin_dir(shelf.version)
    data = tmp_path / "data"
    shutil.copytree(Backups(shelf.directory).data(backup), data)
    verify(data, programs)
    (data / "postgresql.auto.conf").write_text("# may differ\n")
    verify(data, programs)

    def refused(message: str) -> None:
        with pytest.raises(BackupError, match=message):
            verify(data, programs)

    (data / "extra").write_text("x")
    refused("extra is not in the manifest")
    (data / "extra").unlink()
    victim = data / "global/pg_control"
    content = victim.read_bytes()
    victim.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    refused("pg_control is not as it was written")
    victim.unlink()
    refused("pg_control is missing")
    victim.write_bytes(content)
    for segment in (data / "pg_wal").glob("0*"):
        segment.write_bytes(b"\0" * 1024)
    refused("WAL|pg_waldump|segment")
    manifest = data / "backup_manifest"
    manifest.write_text(manifest.read_text().replace("global/pg_control", "global/pg_contrul"))
    refused("the manifest of")


def fake(path: Path, body: str) -> Path:
    """A directory of programs whose pg_basebackup is a script."""
    path.mkdir()
    for name in postgres_programs.PROGRAMS:
        (path / name).write_text(
            f'#!/bin/sh\n[ "$1" = --version ] && echo "{name} (PostgreSQL) $MAJOR.1" && exit\n{body}\n'
        )
        (path / name).chmod(0o755)
    return path


def claimed(store: Backups, url: str, **more: Any) -> Job:
    backup, lock = store.claim(None)
    return Job(str(store.directory), backup, lock, url, **more)


def test_a_password_is_on_no_command_line_and_in_no_state(shelf: Shelf, spare: Backups, tmp_path: Path) -> None:
    url = shelf.server.url() + "&password=s3cret%20word"
    out = tmp_path / "seen"
    programs = fake(tmp_path / "bin", f'echo "$@" > {out}; echo "$PGPASSWORD" >> {out}; echo "no way" >&2; exit 1')
    environment = {"PATH": os.defpath, "MAJOR": str(shelf.version)}
    (programs / "pg_basebackup").write_text(
        (programs / "pg_basebackup").read_text().replace("$MAJOR", str(shelf.version))
    )
    taken = base_backup.take(claimed(spare, url), [programs], environment)
    assert (taken.state, taken.error) == ("failed", "no way")
    arguments, password = out.read_text().splitlines()
    assert password == "s3cret word" and "s3cret" not in arguments and "--no-password" in arguments
    assert "s3cret" not in "".join(file.read_text() for file in spare.directory.rglob("*.json"))
    assert spare.all() == [taken]


def test_what_cannot_be_taken_says_why(shelf: Shelf, spare: Backups, tmp_path: Path) -> None:
    def reason(url: str, *folders: Path) -> str:
        taken = base_backup.take(claimed(spare, url), folders, {"PATH": os.defpath})
        assert taken.state == "failed" and taken.error and taken.finished_at
        assert not spare.data(taken).exists()
        return taken.error

    other = embedded.bin_dir(34 - shelf.version)
    assert f"pg_basebackup of PostgreSQL {shelf.version} is needed" in reason(shelf.server.url(), tmp_path, other)
    assert "connection failed" in reason("postgresql://127.0.0.1:9/none", other)
    assert "sslpassword" in reason(shelf.server.url() + "&sslpassword=x", embedded.bin_dir(shelf.version))
    assert [each.state for each in spare.all()] == ["failed"] * 3


def test_one_at_a_time_and_an_interrupted_one_is_honest(spare: Backups) -> None:
    begun, lock = spare.claim("first")
    assert [each.state for each in spare.all()] == ["running"]
    with pytest.raises(BackupRunning):
        spare.claim("second")
    os.close(lock)  # as when its process is killed
    [found] = spare.all()
    assert (found.state, found.error) == ("failed", backups.INTERRUPTED)
    (spare.directory / begun.id / "data").mkdir()
    (spare.directory / ".deleting-x").mkdir()
    again, lock = spare.claim(None)
    os.close(lock)
    assert again.id != begun.id
    assert not (spare.directory / begun.id / "data").exists() and not (spare.directory / ".deleting-x").exists()
    stored = msgspec.json.decode((spare.directory / begun.id / "backup.json").read_bytes(), type=Backup)
    assert stored.state == "failed"


def made(store: Backups, state: Any, age: int, segment: str = "0" * 24) -> Backup:
    at = datetime(2026, 1, 1, tzinfo=UTC) - timedelta(days=age)
    backup = Backup(f"{at:%Y%m%dT%H%M%SZ}", None, state, None, at, at, 1, "0/1", f"0/{100 - age}", 1, "18.1")
    (store.directory / backup.id / "data").mkdir(parents=True)
    (store.data(backup) / "backup_label").write_text(f"START WAL LOCATION: 0/2000028 (file {segment})\n")
    store.write(backup)
    return backup


def test_only_so_many_are_kept_with_the_wal_that_they_need(spare: Backups, tmp_path: Path, shelf: Shelf) -> None:
    archive = tmp_path / "wal"
    archive.mkdir()
    for n in range(8):
        (archive / f"00000001000000000000000{n}").touch()
    for age, state in enumerate(["done", "failed", "done", "failed", "done", "done"]):
        made(spare, state, age, f"00000001000000000000000{7 - age}")
    assert spare.prune(0) is None
    assert spare.prune(5) is None
    assert len(spare.all()) == 6 and len(list(archive.iterdir())) == 8
    oldest = spare.all()[-1]
    with spare.reading(oldest):  # it is being restored
        kept = spare.prune(2)
    assert kept is not None
    base_backup.clear_archive(archive, spare.data(kept), embedded.bin_dir(shelf.version))
    assert [each.started_at.day for each in spare.all()] == [1, 31, 30, 27]
    assert sorted(path.name[-1] for path in archive.iterdir()) == ["5", "6", "7"]
    spare.prune(2)
    assert [each.state for each in spare.all()] == ["done", "failed", "done"]


def test_the_newest_that_fits_is_chosen(spare: Backups) -> None:
    new, old = made(spare, "done", 1), made(spare, "done", 50)
    made(spare, "failed", 0)
    assert restore.find(spare, None, Recovery()) == new
    assert restore.find(spare, old.id, Recovery()) == old
    assert new.finished_at is not None
    assert restore.find(spare, None, Recovery(time=new.finished_at)) == old
    assert restore.find(spare, None, Recovery(time=new.finished_at + timedelta(seconds=1))) == new
    assert restore.find(spare, None, Recovery(lsn="0/80")) == old
    assert restore.find(spare, None, Recovery(lsn="1/0")) == new
    assert restore.find(spare, None, Recovery(name="between")) == new
    with pytest.raises(BackupError, match="no backup 7 that is done"):
        restore.find(spare, "7", Recovery())
    with pytest.raises(BackupError, match="is done"):
        restore.find(Backups(spare.directory / "none"), None, Recovery())


def test_archived_segments_are_whole_and_never_replaced(tmp_path: Path) -> None:
    archive = tmp_path / "it's 100% wal"
    archive.mkdir()
    segment = tmp_path / "segment"

    def archived(content: str) -> int:
        segment.write_text(content)
        command = (
            embedded_settings.archive_command(archive)
            .replace("%p", str(segment))
            .replace("%f", "0001")
            .replace("%%", "%")
        )
        return subprocess.run(["sh", "-c", command], check=False).returncode

    assert archived("one") == 0 and (archive / "0001").read_text() == "one"
    assert archived("one") == 0  # asked again
    assert archived("two") != 0 and (archive / "0001").read_text() == "one"
    fetch = restore.restore_command(archive).replace("%p", str(tmp_path / "back")).replace("%f", "0001")
    subprocess.run(["sh", "-c", fetch.replace("%%", "%")], check=True)
    assert (tmp_path / "back").read_text() == "one"
    assert [path.name for path in archive.iterdir()] == ["0001"]


async def test_over_rest(shelf: Shelf, make_settings: Any, make_client: Any) -> None:
    settings = shelf.settings(make_settings, backup_directory=shelf.place / "rest", backup_keep=1)
    client: httpx2.AsyncClient = await make_client(settings)
    assert ok(await client.get("/v1/replication/backups")) == {"items": [], "next": None}
    begun = ok(await client.post("/v1/replication/backups", json={"label": "by hand"}), 202)
    assert (begun["state"], begun["label"], begun["bytes"]) == ("running", "by hand", None)
    noted = "select count(*)::int from pgshelf.audit_log where (action, outcome) = ('backup.start', 'done')"
    assert ask(shelf.server.url(), noted) == 1
    found = await ended(client)
    [backup] = Backups(shelf.place / "rest").all()
    assert found == [msgspec.to_builtins(backup)]
    assert (backup.state, backup.id, backup.error) == ("done", begun["id"], None)
    other, lock = Backups(shelf.place / "rest").claim("of another process")
    assert problem(await client.post("/v1/replication/backups", json={}), 409, "backup_running")["detail"]
    Backups(shelf.place / "rest").abandon(other, lock)


async def ended(client: httpx2.AsyncClient) -> list[dict[str, Any]]:
    deadline = time.monotonic() + 60
    while True:
        items: list[dict[str, Any]] = ok(await client.get("/v1/replication/backups"))["items"]
        if not any(each["state"] == "running" for each in items):
            return items
        assert time.monotonic() < deadline
        time.sleep(0.1)  # noqa: ASYNC251 - nothing else runs here


async def test_a_killed_backup_is_told_over_rest(
    shelf: Shelf, make_settings: Any, make_client: Any, tmp_path: Path
) -> None:
    marker = tmp_path / "started"
    programs = fake(tmp_path / "bin", f"touch {marker}; exec sleep 600")
    for name in postgres_programs.PROGRAMS:
        (programs / name).write_text((programs / name).read_text().replace("$MAJOR", str(shelf.version)))
    settings = shelf.settings(make_settings, backup_directory=shelf.place / "killed", pg_bin=programs)
    client: httpx2.AsyncClient = await make_client(settings)
    ok(await client.post("/v1/replication/backups", json={}), 202)
    wait_until(marker.exists)
    [job] = [each for each in psutil.Process().children() if "--job" in each.cmdline()]
    assert shelf.server.url() not in " ".join(job.cmdline())
    [program] = job.children()
    job.kill()
    assert ok(await client.get("/v1/replication/backups"))["items"][0]["state"] == "running"  # its program is alive
    os.kill(program.pid, signal.SIGKILL)
    [item] = await ended(client)
    assert (item["state"], item["error"]) == ("failed", backups.INTERRUPTED)


async def test_without_a_directory_there_are_none(shelf: Shelf, make_settings: Any, make_client: Any) -> None:
    client: httpx2.AsyncClient = await make_client(shelf.settings(make_settings, backup_directory=None))
    problem(await client.post("/v1/replication/backups", json={}), 422, "backups_not_configured")
    problem(await client.get("/v1/replication/backups"), 422, "backups_not_configured")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["backup"], "say where backups are"),
        (["backup", "--list"], "say where backups are"),
        (["restore", "--to", "/x", "--from", "/nowhere"], "no backup in /nowhere is done"),
        (["restore", "--to", "/x", "--to-lsn", "0/1", "--to-name", "n"], "choose one of"),
        (["restore", "--to", "/x", "--to-name", "n"], "reached with archived WAL"),
        (["restore", "--to", "/x", "--to-time", "2027-01-31"], "with its zone"),
        (["restore", "--to", "/x", "--to-time", "soon"], "with its zone"),
        (["restore", "--to", "/x", "--to-lsn", "17"], "a place in the WAL"),
    ],
)
def test_refusals(arguments: list[str], said: str) -> None:
    told = run(*arguments)
    assert told.exit_code != 0 and said in told.output


def test_the_command_line_says_why_there_is_no_backup(shelf: Shelf, spare: Backups, tmp_path: Path) -> None:
    environment = shelf.environment | {"PGSHELF_BACKUP_DIRECTORY": str(spare.directory)}
    _, lock = spare.claim(None)
    told = run("backup", **environment)
    assert told.exit_code == 1 and "another backup is being taken into" in told.output
    os.close(lock)
    told = run("backup", **environment, PGSHELF_PG_BIN=str(tmp_path))
    assert told.exit_code == 1 and "the backup failed: pg_basebackup of PostgreSQL" in told.output
    listed = run("backup", "--list", **environment).output.splitlines()
    assert ["failed" in line for line in listed] == [True, True] and "PGSHELF_PG_BIN" in listed[0]


def test_one_that_is_stopped_or_cannot_tidy_up_says_so(
    spare: Backups, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(base_backup, "_copied", stopped)
    with pytest.raises(KeyboardInterrupt):
        base_backup.take(claimed(spare, "postgresql://nowhere"), [], {})
    [found] = spare.all()
    assert (found.state, found.error) == ("failed", backups.INTERRUPTED)

    def copied(_: Any, job: Job, *__: Any) -> tuple[Path, Backup]:
        return tmp_path, msgspec.structs.replace(job.backup, state="done", postgres="18.1")

    def full(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(base_backup, "_copied", copied)
    monkeypatch.setattr(Backups, "prune", full)
    taken = base_backup.take(claimed(spare, "postgresql://nowhere"), [], {})
    assert (taken.state, taken.error) == ("done", "older ones could not be cleared away: no space left")
    assert restore.find(spare, None, Recovery()) == taken


def test_programs_are_looked_for_where_they_should_be(tmp_path: Path) -> None:
    bundled = [tmp_path / "bundled"]
    assert postgres_programs.program_folders(tmp_path, "/nowhere", bundled) == [tmp_path]
    assert postgres_programs.program_folders(None, "/nowhere", bundled) == bundled
    fake(tmp_path / "path", "")
    assert postgres_programs.program_folders(None, str(tmp_path / "path"), bundled) == [tmp_path / "path", *bundled]


def test_doctor_tells_that_wal_is_not_archived(shelf: Shelf) -> None:
    url = shelf.server.url()

    def told() -> list[str]:
        with psycopg.connect(url) as connection:
            return [finding.text for finding in doctor._replication(connection)]

    assert told() == []
    following = ask(url, "select pg_walfile_name(pg_current_wal_insert_lsn())")
    (shelf.archive / following).write_text("another server's")
    ask(url, "select pg_switch_wal() from pg_logical_emit_message(true, 'x', 'x')")
    wait_until(lambda: ask(url, "select last_failed_wal from pg_stat_archiver") == following)
    [text] = told()
    assert f"WAL is not archived: {following} failed at" in text
    (shelf.archive / following).unlink()
