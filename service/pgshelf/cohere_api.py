"""Cohere's API, version 2, through the `cohere` package: what its rerankers and embedders share."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from pgshelf import providers
from pgshelf.providers import Connection, Errors, Provider, Refusal, Unreadable
from pgshelf.settings import Settings

if TYPE_CHECKING:
    from cohere import AsyncClientV2

NAME = "Cohere"


async def ask(settings: Settings, model: str, errors: Errors, send: Callable[[AsyncClientV2], Awaitable[Any]]) -> Any:
    """What Cohere answers to `send`, within PGSHELF_COHERE_TIMEOUT; `model` says what is asked, for its refusals."""
    key, url = settings.cohere_api_key or "", settings.cohere_base_url
    client = await providers.connected((NAME, key, url), functools.partial(_connect, key, url))

    async def attempt() -> Any:
        from cohere.core.api_error import ApiError
        from cohere.core.parse_error import ParsingError

        try:
            return await send(client)
        except ApiError as error:
            said = error.body.get("message") if isinstance(error.body, dict) else None
            raise Refusal(error.status_code, said, error.headers or {}) from error
        except ParsingError as error:
            raise Unreadable from error

    provider = Provider(NAME, "PGSHELF_COHERE", key, settings.cohere_timeout, model, errors)
    return await providers.ask(provider, attempt)


def _connect(api_key: str, base_url: str) -> Connection:
    from cohere import AsyncClientV2

    http = providers.http_client()
    client = AsyncClientV2(api_key, base_url=base_url, client_name="pgshelf", max_retries=0, httpx_client=http)
    return Connection(client, http)
