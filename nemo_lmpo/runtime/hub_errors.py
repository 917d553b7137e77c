"""What the hub's client raises where something cannot be fetched, whatever it speaks HTTP with."""

from __future__ import annotations


def hub_errors() -> tuple[type[Exception], ...]:
    """Answers of the hub, connections that break off, files that cannot be written, names that the hub has not."""
    # The base of all that the hub's HTTP library raises: requests, httpx or httpx2, by its version.
    from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError  # type: ignore[attr-defined]

    return HTTPError, LocalEntryNotFoundError, OSError, ValueError
