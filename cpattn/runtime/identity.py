"""Ranks tell each other who is calling before rows travel: ranks out of step are an error and not a wrong number.

Before each pass of a call every rank sends the others a header: what the call is (attention forward, backward of which
call, make_key, ...), and all that must be equal for it to make sense. What differs is raised on all ranks, with what
each of them has. Nothing whose size depends on any of it travels before. The n-th header of a rank meets the n-th of
each other, so calls have the same numbers everywhere, also after an error.

On gloo the pass waits for the headers: messages of a few hundred microseconds. On CUDA it does not: headers are
gathered in the stream of the exchanges and looked at when a later call finds them here (`_DeviceHeaders`).

Ranks that fail before a pass say so in their header's place (`fail`), and those that wait for them fail too, at once.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from cpattn.collectives import PendingHeaders, backend_of, control_device, gather_headers, roll_call

HEADER_BYTES = 4096
# Values in a header are for the message; a digest of each is what is compared.
_BRIEF = 200
# When an exchange has failed, all ranks that take part find out at about the same time.
ROLL_CALL_S = 5.0
_FAILED = "raised"


class LostRankError(RuntimeError):
    """Ranks of the group did not come to a call, or left in the middle of it; the transport's words are the cause."""


class Saying(NamedTuple):
    """What a rank says of a call.

    what: "attention, forward", "make_key". fields: what must be equal on all ranks, as digests. briefs: the same for
    people, cut short.
    """

    what: str
    fields: dict[str, str]
    briefs: dict[str, str]

    @classmethod
    def of(cls, what: str, fields: Mapping[str, Any]) -> Saying:
        """fields: values with a faithful `repr`."""
        texts = {name: repr(value) for name, value in fields.items()}
        return cls(what, {n: _digest(t) for n, t in texts.items()}, {n: _cut(t) for n, t in texts.items()})

    def encoded(self) -> Tensor:
        """uint8 [HEADER_BYTES]; briefs get the room that is left, digests never lack any."""
        for room in (_BRIEF, 80, 24, 0):
            briefs = {name: text[:room] for name, text in self.briefs.items()}
            data = json.dumps([self.what[:800], self.fields, briefs], ensure_ascii=True).encode()
            if len(data) <= HEADER_BYTES:
                break
        return torch.frombuffer(bytearray(data.ljust(HEADER_BYTES)), dtype=torch.uint8)

    def value(self, name: str) -> str:
        """A field for people."""
        return self.briefs.get(name, "nothing of that name")

    def in_words(self) -> str:
        """What is called, with what."""
        return f"{self.what} ({', '.join(f'{name} {text[:80]}' for name, text in self.briefs.items())})"

    @classmethod
    def decoded(cls, header: Tensor) -> Saying:
        return cls(*json.loads(header.numpy().tobytes()))


class Calls:
    """The calls of one group from the view of a rank: what has been said in it, by whom."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = weakref.ref(group)
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._by_message = _is_gloo(group)
        self.count = 0
        self._lock = threading.Lock()
        self._process = os.getpid()
        self._unread: list[PendingHeaders] = []  # of calls that failed here before they were made
        self._on_device = _DeviceHeaders()

    @contextmanager
    def passing(self, saying: Saying, device: torch.device | None = None) -> Iterator[int]:
        """Say what is called; run the block once all ranks have said the same. Gives the number of the call.

        device: of the tensors; None: the ranks wait for each other in any case.

        Raises:
            ValueError: ranks say different things.
            LostRankError: a rank did not say anything, or an exchange in the block failed.
            RuntimeError: another thread is in a call of the group, or the process is a fork of the one that made it.
        """
        with self._alone():
            number = self.count
            self.count += 1
            try:
                self._say(saying, device)
            except (ValueError, LostRankError) as error:
                _mark_told(error)  # the others have this call's header
                raise
            with self.arriving(saying, number):
                yield number

    @contextmanager
    def arriving(self, saying: Saying, number: int) -> Iterator[None]:
        """Around what waits for the exchanges of a call that was said before.

        Raises:
            LostRankError: one of them failed.
        """
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, LostRankError) or not _is_transport(error):
                raise
            self._lost(saying, number, error)

    def fail(self, what: str, error: BaseException) -> None:
        """Tell the ranks that wait for this one's header that it comes no more; nothing is waited for.

        Once for an error, and not for one of a call whose header they have had.
        """
        if not self._by_message or self._process != os.getpid() or _is_told(error):
            return
        _mark_told(error)
        self.count += 1
        words = f"{_FAILED} in {what}: {type(error).__name__}: {error}"
        pending = PendingHeaders(Saying(words, {_FAILED: _digest(words)}, {}).encoded(), self.group)
        self._unread.append(pending)

    @property
    def group(self) -> dist.ProcessGroup:
        group = self._group()
        assert group is not None, "a key of the group is in use"
        return group

    def _say(self, saying: Saying, device: torch.device | None) -> None:
        everyone = range(self.size)
        if self._by_message:
            headers, missing = PendingHeaders(saying.encoded(), self.group).wait()
            self._compare(saying, headers, [rank for rank in everyone if rank not in missing])
            if missing:
                self._absent(saying, missing)
            self._unread.clear()  # they have come before these
        elif device is None or device.type != "cuda":
            mine = saying.encoded().to(control_device(self.group))
            self._compare(saying, gather_headers(mine, self.group).cpu(), everyone)
        else:
            for said, headers in self._on_device.say(saying, self.group, device):
                self._compare(said, headers, everyone)

    def _compare(self, saying: Saying, headers: Tensor, present: Sequence[int]) -> None:
        """Raise what differs, in the same words on all ranks; `headers` of the ranks that are present."""
        first, *others = present
        different = [rank for rank in others if not torch.equal(headers[rank], headers[first])]
        if not different:
            return
        told = {rank: Saying.decoded(headers[rank]) for rank in present}
        for rank, theirs in told.items():
            if _FAILED in theirs.fields:
                here_now = saying.in_words()
                raise LostRankError(f"rank {self.rank} is in {here_now}, and rank {rank} of the group {theirs.what}")
        # Of the two that are shown, one is this rank.
        here, there = (first, self.rank) if self.rank in different else (self.rank, different[0])
        one, other = told[here], told[there]
        who = f"ranks {different} of the group do not have what rank {first} has; rank {here}"
        if one.what != other.what:
            raise ValueError(
                f"ranks are out of step: {who} is in {one.in_words()}, rank {there} in {other.in_words()}. All "
                f"ranks of a group make the same calls in the same order"
            )
        names = [n for n in {**one.fields, **other.fields} if one.fields.get(n) != other.fields.get(n)]
        also = f", and other {', '.join(names[1:])}" if names[1:] else ""
        raise ValueError(
            f"{saying.what}: {names[0]} differs between ranks: {who} has {one.value(names[0])}, rank {there} has "
            f"{other.value(names[0])}{also}. All ranks of a context-parallel group must pass the same {names[0]}"
        )

    def _absent(self, saying: Saying, missing: dict[int, RuntimeError]) -> NoReturn:
        cause = next(iter(missing.values()))
        raise LostRankError(
            f"rank {self.rank} waits in {saying.in_words()}, and ranks {sorted(missing)} of the group did not come: "
            f"they have ended, hang, or do something else ({_first_line(cause)})"
        ) from cause

    def _lost(self, saying: Saying, number: int, error: RuntimeError) -> NoReturn:
        silent = list(roll_call(self.group, number, ROLL_CALL_S)) if self._by_message else []
        where = f" ({exchange_of(error)})" if exchange_of(error) else ""
        who = f"ranks {silent} of the group do not answer" if silent else "all ranks of the group still answer"
        raise LostRankError(
            f"rank {self.rank} in {saying.in_words()}: an exchange failed{where}, and {who}; the group is of no use "
            f"any more ({_first_line(error)})"
        ) from error

    @contextmanager
    def _alone(self) -> Iterator[None]:
        require_own_process(self._process)
        if not self._lock.acquire(blocking=False):
            raise RuntimeError(
                "two threads are in calls of one process group at the same time, and their exchanges would mix: make "
                "these calls from one thread, or give each thread a group (dist.new_group) and a key of its own"
            )
        try:
            yield
        finally:
            self._lock.release()


class _DeviceHeaders:
    """Headers on CUDA, looked at when they have come; the host never waits for those of the last call."""

    def __init__(self) -> None:
        self._under_way: deque[tuple[Saying, Tensor, torch.cuda.Event]] = deque()
        self._stream: torch.cuda.Stream | None = None

    def say(self, saying: Saying, group: dist.ProcessGroup, device: torch.device) -> list[tuple[Saying, Tensor]]:
        """Start to gather; returns what was said in earlier calls, and by now is here."""
        here = []
        while self._under_way and (len(self._under_way) > 1 or self._under_way[0][2].query()):
            said, headers, event = self._under_way.popleft()
            event.synchronize()
            here.append((said, headers))
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        mine = saying.encoded().pin_memory()
        everyone = torch.empty((dist.get_world_size(group), HEADER_BYTES), dtype=torch.uint8, pin_memory=True)
        # A stream of its own: the headers need not wait for the kernels before them.
        with torch.cuda.stream(self._stream):
            everyone.copy_(gather_headers(mine.to(device, non_blocking=True), group), non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._under_way.append((saying, everyone, event))
        return here


def calls_of(group: dist.ProcessGroup) -> Calls:
    """The calls of a group; the same object as long as the group lives."""
    calls = _calls.get(group)
    if calls is None:
        require_own_process(os.getpid(), group)
        calls = _calls.setdefault(group, Calls(group))
    return calls


def require_own_process(process: int, group: dist.ProcessGroup | None = None) -> None:
    """Check that a group's sockets are this process's own.

    Raises:
        RuntimeError: the process was forked from the one that made the group.
    """
    if process != os.getpid() or group in _inherited:
        raise RuntimeError(
            f"process {os.getpid()} was forked from the one that made this process group, and cannot use it: the "
            f"connections and threads belong to the parent. Start workers by spawn and make a group there, or plan in "
            f"the worker with make_plan, which needs no group"
        )


def _note_fork() -> None:
    """In a forked child: the groups there are belong to the parent."""
    if dist.is_available() and dist.is_initialized():
        _inherited.update(dist.distributed_c10d._world.pg_map)


_calls: weakref.WeakKeyDictionary[dist.ProcessGroup, Calls] = weakref.WeakKeyDictionary()
_inherited: weakref.WeakSet[dist.ProcessGroup] = weakref.WeakSet()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


def _is_gloo(group: dist.ProcessGroup) -> bool:
    """Whether all that travels goes by gloo; where CUDA's rows go by NCCL, the host does not wait for headers."""
    return backend_of(group, "cpu") == "gloo" and backend_of(group, "cuda") != "nccl"


def _is_transport(error: RuntimeError) -> bool:
    """Whether an error is of an exchange: gloo's name files of its own, NCCL's its library."""
    text = str(error)
    return isinstance(error, dist.DistError) or "gloo" in text or "NCCL" in text or "onnection" in text


def _mark_told(error: BaseException) -> None:
    """The other ranks have heard of this error: by a header in its place, or as it is theirs, too."""
    error._cpattn_told = True  # type: ignore[attr-defined]


def _is_told(error: BaseException | None) -> bool:
    """Whether they have, of this error or the one that it was made of."""
    return error is not None and (
        getattr(error, "_cpattn_told", False) or _is_told(error.__cause__ or error.__context__)
    )


def exchange_of(error: RuntimeError) -> str | None:
    """What travelled in the exchange that failed, where it is known: "keys 2, stage 2"."""
    return getattr(error, "cpattn_exchange", None)


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def _cut(text: str) -> str:
    return text if len(text) <= _BRIEF else text[: _BRIEF - 3] + "..."


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0][:300] if str(error) else type(error).__name__
