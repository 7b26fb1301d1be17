"""Replication and backups over REST: who follows whom, how far each is, and backups started and listed."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from datetime import datetime
from typing import Annotated, Literal

import msgspec
from litestar import Router, get, post
from litestar.params import JSONBody
from msgspec import Meta

from pgshelf import database
from pgshelf.backups import Backup, BackupRunning, Backups
from pgshelf.base_backup import Job
from pgshelf.connections import Connection
from pgshelf.errors import Problem
from pgshelf.http import Answer, Config, Engine, problems
from pgshelf.idempotency import Write
from pgshelf.settings import Settings

STATUS = """
select role, name, address, slot, state, sync_state, timeline, sent_lsn::text, written_lsn::text, flushed_lsn::text,
  replayed_lsn::text, lag_bytes, lag_seconds, last_message_at, last_heartbeat_at, wal_status, retained_bytes, conflicts,
  health, visible, current_user::text
from pgshelf.replication(%s, %s)
"""
Condition = Literal["healthy", "lagging", "disconnected"]
WORST: tuple[Condition, ...] = ("disconnected", "lagging", "healthy")
Place = Annotated[str | None, Meta(description="A place in the WAL.")]


class Server(msgspec.Struct):
    """A server that takes part in replication."""

    role: Annotated[
        Literal["primary", "standby", "replica", "subscriber"],
        Meta(
            description="`primary`, `standby`: the server that was asked; `replica`: follows it; `subscriber`: logical."
        ),
    ]
    name: Annotated[str | None, Meta(description="Its application_name, slot, or cluster_name.")]
    address: Annotated[str | None, Meta(description="A replica's own; a standby's: that of the server it follows.")]
    slot: Annotated[str | None, Meta(description="The replication slot that keeps WAL for it.")]
    state: Annotated[str | None, Meta(description="Of the connection: streaming, catchup ...; null: there is none.")]
    sync_state: Annotated[str | None, Meta(description="Whether commits wait for it: async, potential, sync, quorum.")]
    timeline: Annotated[int | None, Meta(description="Grows with every promotion; null for replicas.")]
    sent_lsn: Annotated[str | None, Meta(description="How far WAL was sent to it, or is known to a standby to exist.")]
    written_lsn: Annotated[str | None, Meta(description="How far it has written WAL.")]
    flushed_lsn: Annotated[str | None, Meta(description="How far that is on its disk.")]
    replayed_lsn: Annotated[str | None, Meta(description="How far searches on it see.")]
    lag_bytes: Annotated[int | None, Meta(description="WAL that it has not replayed; if it is away: not received.")]
    lag_seconds: Annotated[
        float | None, Meta(description="How old the last moment is of which it is known to have everything.")
    ]
    last_message_at: Annotated[
        datetime | None, Meta(description="A replica's last reply, by its clock; a standby's last message.")
    ]
    last_heartbeat_at: Annotated[datetime | None, Meta(description="When the last heartbeat seen here was written.")]
    wal_status: Annotated[
        str | None, Meta(description="Of its slot: reserved, extended, unreserved (about to be lost), lost.")
    ]
    retained_bytes: Annotated[int | None, Meta(description="WAL that its slot keeps on the server that was asked.")]
    conflicts: Annotated[
        dict[str, int] | None, Meta(description="Of a standby: queries that replay cancelled, by what they met.")
    ]
    health: Annotated[
        Condition | None, Meta(description="By PGSHELF_REPLICATION_LAG_BYTES and _SECONDS; null: not visible.")
    ]


class Replication(Server, kw_only=True):
    """The server that the service is connected to, and those that follow it."""

    overall: Annotated[Condition | None, Meta(description="The worst health of server and replicas that is visible.")]
    hidden: Annotated[
        str | None, Meta(description="Why positions are null, and what to do: the role lacks pg_monitor. Else null.")
    ]
    replicas: Annotated[list[Server], Meta(description="Those that follow it; one known by its slot only is away.")]


class StartBackup(msgspec.Struct, forbid_unknown_fields=True):
    """A backup of the whole server."""

    label: Annotated[
        Annotated[str, Meta(min_length=1, max_length=200, examples=["before the upgrade"])] | None,
        Meta(description="What to call it."),
    ] = None


class BackupList(msgspec.Struct):
    """All backups of the directory, the newest first."""

    items: Annotated[list[Backup], Meta(description="The newest first.")]
    next: Annotated[None, Meta(description="Always null: the list is whole.")] = None


@get(
    "/replication",
    responses=problems(),
    response_description="The state of replication",
    summary="Who follows whom, and how far each is",
    operation_id="getReplication",
)
async def get_replication(engine: Engine, settings: Config) -> Replication:
    """Tell what the server that the service is connected to, a primary or a standby, knows of replication."""
    limits = (settings.replication_lag_bytes, settings.replication_lag_seconds)
    [first, *others] = await database.run(engine, STATUS, *limits)
    *here, visible, role = first
    replicas = [Server(*row[:-2]) for row in others]
    found = {here[-1], *(each.health for each in replicas if each.role == "replica")}
    overall = next((each for each in WORST if each in found), None)
    todo = f"PostgreSQL hides the positions from {role}. A superuser runs: grant pg_monitor to {role}"
    fields = dict(zip(Server.__struct_fields__, here, strict=True))
    return Replication(**fields, overall=overall, hidden=None if visible else todo, replicas=replicas)


@post(
    "/replication/backups",
    status_code=202,
    responses=problems(409, 413, 415, 422),
    response_description="Started; the list says when it is done",
    summary="Start a backup",
    operation_id="startBackup",
)
async def start_backup(once: Write, settings: Config, data: JSONBody[StartBackup | None] = None) -> Answer[Backup]:
    """Start a backup of the whole PostgreSQL server, in a process of its own that outlives the one that answers.

    There is one at a time; `PGSHELF_BACKUP_KEEP` says how many are kept.
    """
    store = _store(settings)
    claimed: list[tuple[Backup, int]] = []

    async def claim(_: Connection) -> Answer[Backup]:
        if not claimed:  # a transaction may be tried again
            claimed.append(await asyncio.to_thread(_claim, store, data.label if data else None))
        once.note(detail=claimed[0][0].id)
        return Answer(claimed[0][0], status_code=202)

    try:
        answer = await once.run(claim)
    except BaseException:
        for backup, lock in claimed:
            store.abandon(backup, lock)
        raise
    for backup, lock in claimed:  # none where the answer was stored
        hand_over(store, settings, backup, lock)
    return answer


@get(
    "/replication/backups",
    responses=problems(422),
    response_description="The backups",
    summary="List backups",
    operation_id="listBackups",
)
async def list_backups(settings: Config) -> BackupList:
    """List the backups of PGSHELF_BACKUP_DIRECTORY, with their state, size and places in the WAL."""
    return BackupList(await asyncio.to_thread(_store(settings).all))


def _store(settings: Settings) -> Backups:
    if settings.backup_directory is None:
        detail = "This service takes no backups: PGSHELF_BACKUP_DIRECTORY is not set."
        raise Problem("backups_not_configured", detail)
    return Backups(settings.backup_directory)


def _claim(store: Backups, label: str | None) -> tuple[Backup, int]:
    try:
        return store.claim(label)
    except BackupRunning:
        detail = "Another backup is being taken. Wait until it is done; the list tells."
        raise Problem("backup_running", detail) from None


def hand_over(store: Backups, settings: Settings, backup: Backup, lock: int) -> None:
    """Let a process of its own take the backup; the lock goes with it."""
    job = Job(
        directory=str(store.directory),
        backup=backup,
        lock=lock,
        url=settings.backup_url or settings.database_url or "",
        pg_bin=None if settings.pg_bin is None else str(settings.pg_bin),
        keep=settings.backup_keep,
        archive=None if settings.wal_archive is None else str(settings.wal_archive),
    )
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "pgshelf.cli", "backup", "--job"],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, pass_fds=[lock], start_new_session=True,
        )  # fmt: skip
    finally:
        os.close(lock)
    told = msgspec.json.encode(job)
    threading.Thread(target=process.communicate, args=(told,), daemon=True, name="pgshelf backup").start()


router = Router("/", route_handlers=[get_replication, start_backup, list_backups], tags=["replication"])
