"""The Hugging Face hub, or the local cache of it where there is no network."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path
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
    with cache_only():
        yield


@contextlib.contextmanager
def cache_only() -> Iterator[None]:
    """Inside, hub names resolve from the local cache alone."""
    import datasets
    import huggingface_hub.constants as constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def downloaded_dataset(name: str) -> Path | None:
    """The folder in the hub's cache that `hf download --repo-type dataset NAME` filled; None if there is none."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, repo_type="dataset", local_files_only=True))
    except (LocalEntryNotFoundError, OSError, ValueError):  # not there, not readable, a name that the hub has not
        return None


def downloaded_tokenizer(name: str) -> Path | None:
    """The folder in the hub's cache with a tokenizer's files; None if it has none."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, OSError, ValueError):  # not there, not readable, a name that the hub has not
        return None
    files = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
    return folder if any((folder / file).is_file() for file in files) else None


def is_cached_dataset(name: str) -> bool:
    """Whether a dataset of the hub is on this machine, fetched by `hf download` or by `datasets`."""
    import datasets
    from datasets.naming import camelcase_to_snakecase

    if downloaded_dataset(name) is not None:
        return True
    owner, _, short = name.rpartition("/")
    folder = f"{owner}___{camelcase_to_snakecase(short)}" if owner else camelcase_to_snakecase(short)
    return (Path(datasets.config.HF_DATASETS_CACHE) / folder).is_dir()


def _host_is_known(endpoint: str) -> bool:
    """Whether the name resolves; behind a proxy the proxy resolves names, so nothing can be said here."""
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    try:
        socket.getaddrinfo(urlsplit(endpoint).hostname, 443)
    except OSError:
        return False
    return True
