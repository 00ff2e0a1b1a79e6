"""Some bytes from every rank of a group to every other: who calls, before anything travels whose size depends on it.

On gloo they are messages under a tag of their own. Collectives of a group meet in the order of their start, and a pair
of different ones, or of different sizes, ends the process in C++; a message waits until it is asked for, so ranks that
are about to do different things can still tell each other. Other transports have no tags: there it is an all-gather.
"""

from __future__ import annotations

import threading
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from .exchange import all_gather

# Of the messages, so that nobody's own on the same group are taken for them.
CALL_TAG, ROLL_TAG = 0x6371, 0x6372
# After one rank has failed to answer, what others have sent is here already.
_GRACE = timedelta(milliseconds=200)


class PendingHeaders:
    """Headers under way, one from each rank of the group.

    mine: uint8 [n], this rank's. tag: of the messages; headers of one tag match in the order of their start.
    """

    def __init__(self, mine: Tensor, group: dist.ProcessGroup, tag: int = CALL_TAG) -> None:
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        self._everyone = mine.new_empty((size, len(mine)))
        self._everyone[rank] = mine
        self._mine = mine  # until it is sent
        self._sending: list[dist.Work] = []
        self._receiving: dict[int, dist.Work] = {}
        self._missing: dict[int, RuntimeError] = {}
        for peer in range(size):
            if peer != rank:
                self._start(peer, group, tag)

    def _start(self, peer: int, group: dist.ProcessGroup, tag: int) -> None:
        try:
            received = dist.irecv(self._everyone[peer], group=group, tag=tag, group_src=peer)
            sent = dist.isend(self._mine, group=group, tag=tag, group_dst=peer)
        except RuntimeError as error:  # to a rank that is known to have gone
            self._missing[peer] = error
            return
        assert received is not None, "this rank is in the group"
        assert sent is not None
        self._receiving[peer] = received
        self._sending.append(sent)

    def wait(self, timeout: timedelta | None = None) -> tuple[Tensor, dict[int, RuntimeError]]:
        """Block until the headers are here.

        timeout: for each rank; None is the group's.

        Returns:
            headers uint8 [ranks, n], and for each rank whose header did not come the transport's words.
        """
        missing = dict(self._missing)
        for peer, work in self._receiving.items():
            try:
                if missing:
                    work.wait(_GRACE)
                elif timeout is None:
                    work.wait()
                else:
                    work.wait(timeout)
            except RuntimeError as error:
                missing[peer] = error
        if not missing:
            for sent in self._sending:
                sent.wait()
        return self._everyone, missing


def gather_headers(mine: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The headers of all ranks, uint8 [ranks, n], by a collective of the group; on a device it is in its stream."""
    return all_gather(mine[None], group)


def roll_call(group: dist.ProcessGroup, number: int, seconds: float) -> tuple[int, ...]:
    """Ranks of the group that do not answer within that time, when a call has failed on all of them (gloo).

    They answer in the group's store: after a timeout gloo closes the connections to healthy ranks, too. Where the store
    has gone with a rank, by messages. Whoever has not failed, and computes or waits elsewhere, does not answer either.
    The group is of no use afterwards.

    number: of the call; the same on all ranks, and another for every roll call.
    """
    answered: set[int] = set()
    asking = threading.Thread(target=_ask_store, args=(group, number, seconds, answered), daemon=True)
    asking.start()
    asking.join(seconds + 1)  # the store may be with a rank that is stopped, which no timeout of its own tells
    if answered:
        return tuple(rank for rank in range(dist.get_world_size(group)) if rank not in answered)
    pending = PendingHeaders(torch.zeros(1, dtype=torch.uint8), group, ROLL_TAG)
    _, missing = pending.wait(timedelta(seconds=seconds))
    return tuple(sorted(missing))


def _ask_store(group: dist.ProcessGroup, number: int, seconds: float, answered: set[int]) -> None:
    """Answer, and add those who do within that time, this rank among them; none if there is no store that works."""
    known = dist.distributed_c10d._world.pg_map.get(group)
    if known is None or known[1] is None:
        return
    store, end = known[1], time.monotonic() + seconds
    here: set[int] = set()
    names = [f"cpattn roll call {number} {rank}" for rank in range(dist.get_world_size(group))]
    try:
        store.set(names[dist.get_rank(group)], "here")
        while len(here) < len(names) and time.monotonic() < end:
            here |= {rank for rank, name in enumerate(names) if rank not in here and store.check([name])}
            time.sleep(0.02)
    except RuntimeError:
        return
    answered |= here
