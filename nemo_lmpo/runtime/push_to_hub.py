"""A directory's way to the Hugging Face hub, with a sentence for whoever has to do something where it fails."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from nemo_lmpo.errors import UserError, first_line


def push(
    directory: Path,
    repository: str,
    *,
    private: bool,
    kind: Literal["model", "dataset"] = "model",
    leave_out: Sequence[str] = (),
) -> str:
    """Push a directory to the hub in one commit; returns its address.

    Repeated after a failure, it sends what the hub does not hold yet.

    Args:
        directory: what is pushed.
        repository: `OWNER/NAME`, made if it is not there.
        private: of a repository that is made.
        kind: of the repository.
        leave_out: patterns of files that stay here.

    Raises:
        UserError: the hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi

    # The base of all that the hub's HTTP library raises: requests, httpx or httpx2, by its version.
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    try:
        api = HfApi()
        address = api.create_repo(repository, private=private, exist_ok=True, repo_type=kind)
        api.upload_folder(
            repo_id=repository,
            folder_path=directory,
            repo_type=kind,
            ignore_patterns=list(leave_out),
            commit_message="Upload by nemo_lmpo",
        )
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"--push-to-hub {repository}: {_why_not_pushed(error, api.endpoint)}. All of it is kept in {directory}"
        ) from None
    return str(address)


def _why_not_pushed(error: BaseException, endpoint: str) -> str:
    """Who has to do what; threads that upload hide the reason behind another error."""
    chain = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    responses = [found for one in chain if (found := getattr(one, "response", None)) is not None]
    status = responses[0].status_code if responses else None
    said = ": ".join(dict.fromkeys(first_line(one).rstrip(".") for one in (chain if status is None else chain[:1])))
    if status == 401:
        return f"{endpoint} does not accept the token ({said}); log in with `hf auth login` or set HF_TOKEN"
    if status == 403:
        return f"the token may not write there ({said}); take one that may, or another name"
    if isinstance(error, ValueError) or (status is not None and status < 500):
        return f"{endpoint} refuses ({said}); check the name"
    return (
        f"{endpoint} cannot be reached or broke off ({said}); run the same command again, which sends what is missing"
    )
