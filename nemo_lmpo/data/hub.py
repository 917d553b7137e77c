"""The Hugging Face hub, or the local cache of it where there is no network."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from urllib.parse import urlsplit


@contextlib.contextmanager
def cache_only_without_network() -> Iterator[None]:
    """Inside, hub names resolve from the local cache at once if the hub's host cannot be found.

    The libraries would otherwise ask again for most of a minute before they look into the cache or give up.
    """
    import huggingface_hub.constants as constants

    if _host_is_known(constants.ENDPOINT):
        yield
        return
    import datasets

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def _host_is_known(endpoint: str) -> bool:
    """Whether the name resolves; behind a proxy the proxy resolves names, so nothing can be said here."""
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    try:
        socket.getaddrinfo(urlsplit(endpoint).hostname, 443)
    except OSError:
        return False
    return True
