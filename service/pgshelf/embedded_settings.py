"""What the bundled PostgreSQL is set to, and the command that archives its WAL."""

import contextlib
import shlex
import shutil
from pathlib import Path

import psutil

MIB = 1024 * 1024


def server_settings(cluster_name: str, socket_dir: Path) -> dict[str, str]:
    """Return the server's settings, sized from this machine's memory within modest bounds."""
    memory = _memory_bytes() // MIB
    maintenance = min(max(memory // 32, 32), 512)
    shared = Path("/dev/shm")  # noqa: S108 - only its free space is read
    roomy = not shared.exists() or shutil.disk_usage(shared).free > (maintenance + 256) * MIB
    return {
        "cluster_name": cluster_name,
        "listen_addresses": "",
        "port": "5432",
        "unix_socket_directories": '"{}"'.format(str(socket_dir).replace('"', '""')),
        "unix_socket_permissions": "0700",
        "max_connections": "200",
        "max_locks_per_transaction": "256",  # a statement may touch many shelves
        "shared_buffers": f"{min(max(memory // 8, 32), 1024)}MB",
        "effective_cache_size": f"{max(memory // 2, 64)}MB",
        "maintenance_work_mem": f"{maintenance}MB",
        # a parallel index build keeps its graph in dynamic shared memory; containers have 64 MB of it
        "dynamic_shared_memory_type": "posix" if roomy else "mmap",
        "work_mem": "16MB",
        "random_page_cost": "1.1",
        "jit": "off",
        "wal_level": "replica",
        "wal_compression": "on",
        "fsync": "on",
        "synchronous_commit": "on",
        "max_wal_size": f"{min(max(memory // 8, 256), 2048)}MB",
        "checkpoint_timeout": "5min",
        "timezone": "UTC",
        "log_timezone": "UTC",
        "logging_collector": "on",
        "log_directory": "log",
        "log_filename": "postgresql-%a.log",  # with truncation: one week of logs
        "log_rotation_age": "1d",
        "log_rotation_size": "0",
        "log_truncate_on_rotation": "on",
        "log_line_prefix": "%m [%p] %q%u@%d ",
        "log_lock_waits": "on",
    }


def archiving(directory: Path) -> dict[str, str]:
    """Every segment is kept, and a minute's changes at the latest: more than that is not lost with the disk."""
    return {"archive_mode": "on", "archive_timeout": "60s", "archive_command": archive_command(directory)}


def archive_command(directory: Path) -> str:
    """Keep one segment of WAL: under its name only when it is whole and on the disk, and never over another one.

    PostgreSQL may ask twice for the same one, after a crash say.
    """
    to = shlex.quote(str(directory)).replace("%", "%%")
    copy = f"cp %p {to}/%f.part && sync {to}/%f.part && mv {to}/%f.part {to}/%f && sync {to}"
    return f"if test -e {to}/%f; then cmp -s %p {to}/%f; else {copy}; fi"


def _memory_bytes() -> int:
    memory = int(psutil.virtual_memory().total)
    with contextlib.suppress(OSError, ValueError):  # "max" is no number
        memory = min(memory, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return memory


def escaped(value: str) -> str:
    """A value as it stands between the quotes of a file of settings."""
    return value.replace("\\", "\\\\").replace("'", "''")
