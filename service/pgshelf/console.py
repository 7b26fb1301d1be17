"""What commands share that talk to a running service."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import click
import msgspec

from pgshelf.settings import Settings

if TYPE_CHECKING:
    from pgshelf_client import Client

URL = click.option(
    "--url",
    help="Of the service; this machine's by default, by PGSHELF_PORT and PGSHELF_API_PREFIX. Key: PGSHELF_API_KEY.",
)


class Failure(click.ClickException):
    """Ends a command with one line that says what to do."""

    def show(self, file: Any = None) -> None:
        """Print the line to stderr."""
        click.echo(f"pgshelf: {self.message}", err=True)


@contextlib.contextmanager
def connected(settings: Settings, url: str | None, retries: int = 3) -> Iterator[Client]:
    """A client of the running service; what goes wrong with it ends the command."""
    from pgshelf_client import Client, ConnectionFailed, PgshelfError, Unauthorized

    address = url or f"http://127.0.0.1:{settings.port}"
    try:
        _check_address(address)
        client = Client(address, api_prefix=settings.api_prefix, api_key=settings.api_key, retries=retries)
    except ValueError as error:
        raise Failure(f"--url {address!r} is no address such as http://127.0.0.1:8432: {error}") from None
    try:
        with client:
            yield client
    except ConnectionFailed as error:
        raise Failure(f"{error}. Is pgshelf serve running there? Say where with --url, or PGSHELF_PORT.") from None
    except Unauthorized as error:
        raise Failure(f"{error}. Set PGSHELF_API_KEY.") from None
    except (PgshelfError, TimeoutError) as error:
        raise Failure(str(error)) from None


def _check_address(address: str) -> None:
    """ValueError where one would only show itself when it is called."""
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("it begins with http:// or https://, and a host follows")
    parts.hostname.encode("idna")
    parts.port  # noqa: B018 - reading it is what checks it


def json_object(_: click.Context, option: click.Parameter, value: str | None) -> dict[str, Any] | None:
    """The value of an option that takes a JSON object."""
    try:
        return None if value is None else msgspec.json.decode(value, type=dict[str, Any])
    except msgspec.MsgspecError as error:
        raise click.BadParameter(f"needs a JSON object: {error}", param=option) from None


def listed(_: click.Context, option: click.Parameter, value: str | None) -> list[str] | None:
    """The value of an option that takes names with commas between them."""
    names = None if value is None else [name.strip() for name in value.split(",")]
    if names is not None and not all(names):
        raise click.BadParameter("needs names with commas between them", param=option)
    return names


def printable(text: str) -> str:
    """On one line, without what would control a terminal."""
    return "".join(character for character in " ".join(text.split()) if character.isprintable())
