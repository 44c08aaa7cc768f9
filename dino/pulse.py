# SPDX-License-Identifier: Apache-2.0
"""A sign of life of every rank, in the store: who is gone when a collective fails, or never ends.

gloo notices a dead peer at once. NCCL waits for it on the device, while the host runs ahead and
then waits too, until a watchdog ends it after ten minutes.
"""

import contextlib
import os
import sys
import threading
import time

BEAT = 1.0  # seconds between two signs
LOOK = 10.0  # seconds between two looks at the others' signs
SILENCE = 60.0  # seconds without a sign after which a rank is gone

GONE = "left"  # the last sign of a rank that has done its work

_store, _rank, _world_size = None, 0, 1


def start(store, rank, world_size):
    """Give signs from a thread, until the process ends. `store` is for that thread alone."""
    global _store, _rank, _world_size
    _store, _rank, _world_size = store, rank, world_size
    store.set(key(rank), "0")
    threading.Thread(target=beat, daemon=True).start()


def stop():
    """Take leave: the others need not wait for further signs."""
    global _store
    if _store is not None:
        store, _store = _store, None
        with contextlib.suppress(RuntimeError):  # the store may have ended first
            store.set(key(_rank), GONE)


def beat():
    signs, looked, awake = 0, time.monotonic(), time.monotonic()
    last = {}  # rank: (its last sign, when that was first seen)
    while (store := _store) is not None:
        if time.monotonic() - awake > LOOK:  # stopped meanwhile, as the others may have been
            last.clear()
        awake = time.monotonic()
        try:
            signs += 1
            store.set(key(_rank), str(signs))
            if time.monotonic() - looked > LOOK:
                looked = time.monotonic()
                end_if_silent(store, last)
        except RuntimeError:  # the store is gone with rank 0: who needs a peer will notice
            return
        time.sleep(BEAT)


def end_if_silent(store, last):
    """End this process if another gave no sign for too long: nothing else may get it to end."""
    now = time.monotonic()
    for rank, sign in read_signs(store).items():
        if sign == GONE or last.get(rank, (None, now))[0] != sign:
            last[rank] = (sign, now)
        elif now - last[rank][1] > SILENCE:
            print(
                f"No sign of life from rank {rank} for {SILENCE:.0f} s; stopping. See that rank's"
                " log, or the system log if it was killed. Run the same command to resume.",
                file=sys.stderr,
                flush=True,
            )
            os._exit(1)


def read_signs(store):
    """{rank: its last sign} of all ranks that have given one."""
    ranks = [rank for rank in range(_world_size) if store.check([key(rank)])]
    return {rank: store.get(key(rank)).decode() for rank in ranks}


def lost_ranks():
    """The ranks that give no sign within some beats."""
    if (store := _store) is None:
        return []
    try:
        before = read_signs(store)
        time.sleep(3 * BEAT)
        now = read_signs(store)
    except RuntimeError:  # the store lives in rank 0
        return [0]
    return [rank for rank in range(_world_size) if now.get(rank) == before.get(rank)]


def key(rank):
    return f"pulse of {rank}"
