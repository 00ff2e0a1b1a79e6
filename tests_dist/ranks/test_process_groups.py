"""Layer 2: keys, groups and processes, as docs/reliability.md has them ("Processes and groups"), on real ranks."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import cpattn
from cpattn import AttnMaskSpec
from cpattn.keys import cache
from tests_dist.support.harness import run_on_ranks

HEADS = {"num_heads_q": 2, "num_heads_kv": 1, "head_dim": 16}


def key_of(length: int, group: dist.ProcessGroup | None = None) -> cpattn.AttnKey:
    return cpattn.make_key(AttnMaskSpec.causal(length), cp_group=group or dist.group.WORLD, **HEADS)


def attend(key: cpattn.AttnKey) -> torch.Tensor:
    return cpattn.attention(*(torch.ones(key.num_tokens, h, 16) for h in (2, 1, 1)), key)


def check_a_hit_on_one_rank() -> None:
    """Rank 0 asks for the oldest key once more; past the limit both ranks drop that one, and both make it anew."""
    cpattn.clear_key_cache()
    dist.barrier()  # or one would find here what the other makes anew
    room, cache.MAX_CACHED_KEYS = cache.MAX_CACHED_KEYS, 3
    try:
        kept = [key_of(length) for length in (10, 11, 12)]
        if dist.get_rank() == 0:
            assert key_of(10) is kept[0]
        key_of(13)
        assert key_of(11) is kept[1]
        assert key_of(10) is not kept[0], "it was dropped on this rank too"
        attend(key_of(10))
    finally:
        cache.MAX_CACHED_KEYS = room


def test_a_hit_on_one_rank_changes_nothing_for_the_others():
    run_on_ranks(2, check_a_hit_on_one_rank)


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def check_destroyed_groups(clear: bool) -> None:
    """Sockets of groups that are no more go when the next key is made, or the cache is cleared."""
    attend(key_of(20))
    before = open_files()
    for length in (21, 22, 23):
        group = dist.new_group(timeout=timedelta(seconds=60))
        assert group is not None
        attend(key_of(length, group))
        dist.barrier(group)
        dist.destroy_process_group(group)
        del group
    assert open_files() > before, "keys keep a destroyed group, until the next is made"
    cpattn.clear_key_cache() if clear else key_of(24)
    gc.collect()  # a key and its handle hold each other
    dist.barrier()
    assert open_files() <= before
    attend(key_of(20))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts files in /proc")
@pytest.mark.parametrize("clear", [False, True])
def test_destroyed_groups_are_let_go(clear):
    run_on_ranks(2, check_destroyed_groups, clear=clear)


def check_fork() -> None:
    """The child of a rank is refused the group and the keys, and may plan; its parent goes on."""
    key = key_of(30)
    attend(key)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        told = []
        for call in (lambda: attend(key), lambda: key_of(31)):
            try:
                call()
                told.append("nothing was raised")
            except RuntimeError as error:
                told.append(str(error))
        told.append(str(cpattn.make_plan(AttnMaskSpec.causal(31), cp_size=2, **HEADS).plan.cp_size))
        os.write(writing, "\n".join(told).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        attending, making, planned = pipe.read().splitlines()
    os.waitpid(child, 0)
    for words in (attending, making):
        assert f"process {child} was forked from the one that made this process group, and cannot use it" in words
    assert planned == "2"
    attend(key)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_is_refused_its_parents_group():
    run_on_ranks(2, check_fork)


SCRIPT = """
import torch.distributed as dist
import cpattn
spec, heads = cpattn.AttnMaskSpec.causal(40), {"num_heads_q": 2, "num_heads_kv": 1, "head_dim": 16}
assert cpattn.make_key(spec, cp_group="self", **heads).num_tokens == 40
try:
    cpattn.make_key(spec, cp_group=dist.group.WORLD, **heads)
except ValueError as error:
    assert "cp_group is None and WORLD_SIZE is 2" in str(error), error
    assert "init_process_group first, or say that each rank is alone with cp_group='self'" in str(error), error
else:
    raise AssertionError("a key of one rank was made without a word")
dist.init_process_group("gloo")
assert cpattn.make_key(spec, cp_group=dist.group.WORLD, **heads).cp_size == 2
assert cpattn.make_key(spec, cp_group=None, **heads).num_tokens == 40
"""


@pytest.mark.parametrize(
    "launcher",
    [
        ["-m", "cpattn.launch.torchrun"],
        pytest.param(["-m", "torch.distributed.run", "--standalone"], marks=pytest.mark.nightly),
    ],
    ids=["ours", "torchrun"],
)
def test_a_group_that_is_not_there_yet_is_asked_for(launcher, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, *launcher, "--nproc-per-node", "2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
