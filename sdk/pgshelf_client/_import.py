"""Documents on their way into an import: cut into requests, counted when these are answered. Nothing here waits."""

import hashlib
import uuid
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from ._base import new_document
from .errors import FieldError, UnexpectedAnswer
from .types import ExportedDocument, ImportFailure, ImportProgress, ImportResult

BATCH_BYTES = 4 * 1024 * 1024  # a request ends behind the document that reaches this


class Line(msgspec.Struct):
    """One document of a batch: its place among all, itself as it was given, its key."""

    index: int
    document: Any
    key: str | None


class Batch(msgspec.Struct):
    """The documents of one request."""

    first: int
    lines: list[Line] = []
    keys: set[str] = set()
    parts: list[bytes] = []
    size: int = 0

    def body(self) -> bytes:
        """Its lines, which are not needed any more."""
        lines = b"".join(self.parts)
        self.parts = []
        return lines


class Keyed(msgspec.Struct):
    key: str | None = None


class Cutter:
    """Cuts documents into batches of at most `size`, and gives each batch its idempotency key."""

    def __init__(self, size: int, name: str | None, refuse: Callable[[ImportFailure], None]) -> None:
        if size < 1:
            raise ValueError(f"batch_size is {size}; it must be 1 at least")
        self.size = size
        self.name = name
        self.refuse = refuse
        self.run = uuid.uuid4().hex
        self.count = 0
        self.batch = Batch(0)

    def add(self, document: Any) -> Batch | None:
        """Take one more document; the batch that it fills, if it does. What has no form in JSON is refused."""
        index, self.count = self.count, self.count + 1
        try:
            encoded, key = encode(document)
        except (TypeError, ValueError) as error:  # msgspec's are among them
            detail, key = str(error), key_of(document)
            self.refuse(ImportFailure(index=index, document=document, key=key, code="not_sendable", detail=detail))
            return None
        batch = self.batch
        batch.lines.append(Line(index, document, key))
        batch.parts += (encoded, b"\n")
        if key is not None:
            batch.keys.add(key)
        batch.size += len(encoded)
        return self.rest() if len(batch.lines) >= self.size or batch.size >= BATCH_BYTES else None

    def rest(self) -> Batch | None:
        """What is left when there are no more documents."""
        batch, self.batch = self.batch, Batch(self.count)
        return batch if batch.lines else None

    def key(self, batch: Batch, body: bytes) -> str:
        """The same for a batch that is sent again, in this run or in another one of the same name.

        The content is part of it: a source that has changed since is imported, not taken for what was there before.
        """
        if self.name is None:
            return f"import-{self.run}-{batch.first}"
        digest = hashlib.sha256(msgspec.json.encode((self.name, batch.first)) + body)
        return f"import-{digest.hexdigest()[:40]}"


def encode(document: Any) -> tuple[bytes, str | None]:
    """A document as a line of JSON, and its key; bytes are such a line already."""
    if isinstance(document, bytes):
        if b"\n" in document:
            raise ValueError("a document given as bytes is one line of JSON; this one has several")
        return document, key_of(document)
    body = new_document(exported(document) if isinstance(document, ExportedDocument) else document)
    return msgspec.json.encode(body), body.get("key")


def exported(document: ExportedDocument) -> dict[str, Any]:
    fields = {name: getattr(document, name) for name in ("key", "title", "source", "metadata")}
    return {**fields, "chunks": [msgspec.structs.asdict(chunk) for chunk in document.chunks]}


def key_of(document: Any) -> str | None:
    """The key of a document that may be in any state."""
    if isinstance(document, Mapping):
        key = document.get("key")
        return key if isinstance(key, str) else None
    try:
        return msgspec.json.decode(document, type=Keyed).key
    except (TypeError, ValueError):
        return None


class Problem(msgspec.Struct, frozen=True):
    code: str = ""
    detail: str = ""
    errors: tuple[FieldError, ...] | None = None


class Failed(msgspec.Struct, frozen=True):
    line: int
    error: Problem
    key: str | None = None


class AnswerLine(msgspec.Struct, frozen=True):
    """What was committed, or at the end that all is done."""

    done: bool = False
    created: int = 0
    replaced: int = 0
    skipped: int = 0
    pending: int = 0
    failed: list[Failed] | int = 0
    consistency_token: str | None = None


ANSWER_LINE = msgspec.json.Decoder(AnswerLine)


class Tally:
    """Counts what became of the documents; failures are kept in order, or handed on."""

    def __init__(
        self,
        progress: Callable[[ImportProgress], Any] | None,
        on_failure: Callable[[ImportFailure], Any] | None,
        saw: Callable[[str | None], None],
    ) -> None:
        self.progress = progress
        self.saw = saw
        self.on_failure = on_failure
        self.so_far = ImportProgress()
        self.failures: list[ImportFailure] = []

    def refuse(self, failure: ImportFailure) -> None:
        """A document that was not sent at all."""
        self.count(documents=1, failed=1)
        self.hand_on(failure)

    def take(self, batch: Batch, answer: bytes) -> None:
        """What the server says of a batch."""
        try:
            *lines, last = map(ANSWER_LINE.decode, answer.rstrip().split(b"\n"))
        except msgspec.MsgspecError as error:
            raise UnexpectedAnswer(f"the answer to an import is not in the form of pgshelf: {error}") from error
        if not last.done:
            raise UnexpectedAnswer("the answer to an import does not tell of its end")
        self.saw(last.consistency_token)
        counted = {name: getattr(last, name) for name in ("created", "replaced", "skipped", "pending", "failed")}
        self.count(documents=len(batch.lines), **counted)
        for failed in [each for line in lines if isinstance(line.failed, list) for each in line.failed]:
            line, problem = batch.lines[failed.line - 1], failed.error
            self.hand_on(
                ImportFailure(
                    index=line.index,
                    document=line.document,
                    key=failed.key or line.key,
                    code=problem.code,
                    detail=problem.detail,
                    errors=problem.errors or (),
                )
            )
        if self.progress is not None:
            self.progress(self.so_far)

    def count(self, **more: int) -> None:
        sums = {name: getattr(self.so_far, name) + number for name, number in more.items()}
        self.so_far = msgspec.structs.replace(self.so_far, **sums)

    def hand_on(self, failure: ImportFailure) -> None:
        if self.on_failure is None:
            self.failures.append(failure)
        else:
            self.on_failure(failure)

    def result(self) -> ImportResult:
        done = self.so_far
        return ImportResult(
            created=done.created,
            replaced=done.replaced,
            skipped=done.skipped,
            pending=done.pending,
            failed=sorted(self.failures, key=lambda failure: failure.index),
        )
