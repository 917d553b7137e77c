"""The other ranks of a job: which of them to look at when one no longer answers.

A rank that ends leaves its reason in the job's store, where the others find it. One that was killed leaves none; on the
same host it is missed among the processes.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from nemo_lmpo.errors import TrainingError, first_line

_PATIENCE_SECONDS = 3.0
_FOLLOWED = "it lost another rank"
_GLOO = ("gloo", "Connection closed by peer", "Connection reset by peer", "Broken pipe")


@dataclass(frozen=True)
class Peer:
    """A rank of the job."""

    rank: int
    host: str
    pid: int

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host})"


@dataclass
class Peers:
    """The job's ranks as they were when it began."""

    ranks: list[Peer]
    own: int

    @classmethod
    def meet(cls) -> Peers:
        """Learn of all ranks. Communicates: one object all-gather over all ranks."""
        me = Peer(dist.get_rank(), socket.gethostname(), os.getpid())
        ranks: list[Peer] = [me] * dist.get_world_size()
        if dist.get_world_size() > 1:
            dist.all_gather_object(ranks, me)
        return cls(ranks, me.rank)

    def leave_reason(self, error: BaseException) -> None:
        """Tell the others why this rank ends."""
        reason = _FOLLOWED if lost_connection(error) else first_line(error)
        try:
            _store().set(_key(self.own), reason)
        except (dist.DistError, RuntimeError):  # its server went with another rank
            return

    def explain(self, error: BaseException) -> TrainingError | None:
        """The message for a connection that was lost or did not answer; None for any other error.

        Waits a moment for what the others leave behind.
        """
        found = lost_connection(error)
        if found is None:
            return None
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while not (message := self._reported()) and time.monotonic() < deadline:
            time.sleep(0.05)
        message = message or self._unknown(found)
        return TrainingError(f"{message}; nothing more was saved: remove the cause and run the same command to resume")

    def _reported(self) -> str:
        """What can be said of ranks that ended or are stopped."""
        reasons = {peer.rank: _reason(peer.rank) for peer in self._others()}
        failed = [f"{peer} has ended: {reasons[peer.rank]}" for peer in self._others() if reasons[peer.rank]]
        followed = [peer.rank for peer in self._others() if reasons[peer.rank] == _FOLLOWED]
        failed = [line for line in failed if not line.endswith(_FOLLOWED)]
        if failed:
            return failed[0]
        here = [peer for peer in self._others() if peer.host == self.ranks[self.own].host]
        gone = [str(peer) for peer in here if peer.rank not in followed and _state(peer.pid) in ("", "Z", "X")]
        if gone:
            return f"{' and '.join(gone)} has ended without a word, as when it is killed or crashes; look at its output"
        stopped = [str(peer) for peer in here if _state(peer.pid) in ("T", "t")]
        return f"{' and '.join(stopped)} is stopped and does not answer" if stopped else ""

    def _unknown(self, error: BaseException) -> str:
        hosts = sorted({peer.host for peer in self._others()})
        where = f"{len(self.ranks) - 1} other ranks on {', '.join(hosts)}"
        return f"one of the {where} does not answer ({first_line(error)[:200]}); look at their output"

    def _others(self) -> Iterator[Peer]:
        return (peer for peer in self.ranks if peer.rank != self.own)


def lost_connection(error: BaseException | None) -> BaseException | None:
    """The error of the network below ``error``, if that is its cause."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, dist.DistError):
            return error
        if isinstance(error, RuntimeError) and any(part in str(error) for part in _GLOO):
            return error
        found = raised_by_rank(error)
        error = found[1] if found is not None else error.__cause__ or error.__context__
    return None


def raised_by_rank(error: BaseException) -> tuple[int, BaseException] | None:
    """A rank and what it raised, which torch's checkpoint errors hold instead of a cause; None for any other error."""
    failures = getattr(error, "failures", None)
    if not isinstance(failures, dict) or not failures:
        return None
    rank, wrapped = next(iter(failures.items()))
    return rank, wrapped[0] if isinstance(wrapped, tuple) else wrapped


def _state(pid: int) -> str:
    """The system's letter for what a process of this host does; empty: there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


def _key(rank: int) -> str:
    return f"nemo_lmpo/ended/{rank}"


def _store() -> dist.Store:  # torch exports it only where it is built with it
    from torch.distributed.distributed_c10d import _get_default_store

    return _get_default_store()


def _reason(rank: int) -> str:
    try:
        store = _store()
        return store.get(_key(rank)).decode() if store.check([_key(rank)]) else ""
    except (dist.DistError, RuntimeError):
        return ""
