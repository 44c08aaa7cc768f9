# SPDX-License-Identifier: Apache-2.0
"""Batches in a reproducible order: a loader that outlives its workers, and the sampler."""

import contextlib
import functools
import gc
import itertools
import math
import re
import signal
from multiprocessing import connection

import torch
from torch.utils.data import DataLoader, DistributedSampler

from dino.data.images import UnreadableImage, reading_rules, set_reading_rules
from dino.data.items import Replaced, collate_readable
from dino.errors import UserError
from dino.signals import leave_signals_to_parent

MOST_BAD = 0.01  # share of bad images that --on_bad_image skip tolerates
DYING = 5.0  # seconds that a process takes to die, at most
LOOK = 5.0  # seconds between two looks for a batch and for dead workers: torch's own interval
LATE = 60.0  # seconds without a batch after which it is said


class ImageLoader(DataLoader):
    """A DataLoader that raises the UnreadableImage that comes instead of a batch.

    It counts Replaced images, and replaces a worker that the system has killed, starting from the
    batch that is due. The seed that a DataLoader draws for its workers, which nothing here uses,
    comes from a generator of its own: torch's global one would advance, and change stochastic
    depth.
    """

    def __init__(self, dataset, finish=None, **options):
        """`finish` is what this process still does to a batch, such as DeviceStage."""
        self.skipped, self.new_skipped = set(), set()
        self.workers = []  # the processes of the latest pass
        self.finish = finish or (lambda batch: batch)
        self.while_waiting = lambda: None  # called at each look for a batch that does not come
        super().__init__(
            dataset,
            timeout=LOOK if options.get("num_workers") else 0,
            collate_fn=collate_readable,
            generator=torch.Generator(),
            worker_init_fn=functools.partial(start_worker, reading_rules()),
            **options,
        )

    def __iter__(self):
        try:
            yield from self.batches_despite_deaths()
        except GeneratorExit:  # also in a forked copy, whose workers these are not
            raise
        except BaseException:
            self.end_workers()
            raise

    def batches_despite_deaths(self):
        delivered, deaths = 0, 0
        while True:
            try:
                for batch in self.batches(delivered):
                    delivered, deaths = delivered + 1, 0
                    yield self.finish(self.readable(batch))
                return
            except (RuntimeError, ConnectionError, EOFError, FileNotFoundError) as error:
                if self.num_workers == 0:
                    raise
                if not is_death(error):  # the user's own code raised it in a worker
                    if isinstance(error, RuntimeError):
                        raise
                    # an OSError would be reported in a line, without the worker's traceback
                    raise RuntimeError(str(error)) from None
                deaths += 1
                self.after_death(error, deaths)
                self.end_workers()
            # The pass that failed and its error refer to each other. If a new worker is forked
            # before they are freed, it frees its copy, and complains that it has no such workers.
            gc.collect()

    def batches(self, delivered):
        """An iterator over the batches of a pass after the first `delivered` ones."""
        if isinstance(self.sampler, EpochSampler):
            with self.sampler.further(delivered * self.batch_size):
                whole = super().__iter__()
            delivered = 0
        else:
            whole = super().__iter__()
        self.workers = getattr(whole, "_workers", [])
        # torch raises from this signal wherever the main thread is, in the middle of a step too;
        # without it the loader finds out by itself, when it waits for a batch
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        return itertools.islice(awaited(whole, self.while_waiting), delivered, None)

    def after_death(self, error, deaths):
        """Report a killed worker; UserError the third time."""
        # by somebody, such as scancel
        terminated = not is_caught(error) and exit_codes(self.workers) == {-signal.SIGTERM}
        if terminated and deaths <= 2:
            print("A loader process was terminated, and is replaced.", flush=True)
            return
        reason = last_line(error)
        advice = (
            "The system kills them when memory, or shared memory (in Docker --shm-size), runs out:"
            " lower --num_workers or --batch_size_per_gpu."
        )
        if deaths > 2:
            raise UserError(f"Loader processes died three times in a row ({reason}). {advice}")
        print(f"Warning: a loader process died and is replaced ({reason}). {advice}", flush=True)

    def end_workers(self):
        """Terminate the workers: torch waits 5 s for each while an error refers to their pass."""
        self._iterator = None  # of persistent workers: the next pass makes new ones
        if not self.pin_memory:  # else torch first ends the thread that reads what they write
            for worker in self.workers:
                worker.terminate()

    def readable(self, batch):
        if isinstance(batch, UnreadableImage):
            raise batch
        if not isinstance(batch, Replaced):
            return batch
        self.new_skipped |= {(error.path, str(error)) for error in batch.bad} - self.skipped
        self.skipped |= self.new_skipped
        if len(self.skipped) > MOST_BAD * len(self.dataset):
            _, reason = min(self.skipped)
            raise UserError(
                f"--on_bad_image skip: {len(self.skipped)} of {len(self.dataset)} images could not"
                f" be read, more than {MOST_BAD:.0%}. The first: {reason} For all of them:"
                " python check_data.py PATH."
            )
        return batch.item

    def batch_of(self, keys):
        """What the loader would yield for these items of the data set, made here and now."""
        return self.finish(self.readable(collate_readable([self.dataset[key] for key in keys])))

    def take_skipped(self):
        """[(path, reason)] of the images replaced since the last call."""
        taken, self.new_skipped = sorted(self.new_skipped), set()
        return taken


def awaited(batches, while_waiting):
    """Yield from a DataLoader's iterator; print a warning where the next batch takes long.

    A worker may wait for a file system that does not answer, and be neither dead nor done.
    Meanwhile `while_waiting()` is called every LOOK seconds.
    """
    waited = 0.0
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except RuntimeError as error:
            if not str(error).startswith("DataLoader timed out"):
                raise
            thread = getattr(batches, "_pin_memory_thread", None)
            if thread is not None and not thread.is_alive():  # torch looks only without a timeout
                raise RuntimeError("the thread that pins memory is gone") from None
            while_waiting()
            waited += LOOK
            if waited - LOOK < LATE <= waited:
                print(
                    f"Warning: the loader processes have given no images for {LATE:.0f} s, and are"
                    " waited for. Look at the disk or the file system of the images.",
                    flush=True,
                )
        else:
            waited = 0.0
            yield batch


def is_death(error):
    """Whether an error of the loader says that a worker is gone, or has no room for a batch.

    What else is raised in one, as by an augmentation of the user's, says "Caught" and has a
    traceback.
    """
    if not isinstance(error, RuntimeError):  # of a tensor whose worker died as it handed it over
        return not is_of_worker(error)
    no_room = re.search(r"unable to (open|resize|write|mmap|allocate)", last_line(error))
    return "DataLoader worker" in str(error) and bool(no_room or not is_caught(error))


def is_caught(error):
    """Whether a worker raised it, and lives."""
    return str(error).startswith("Caught ")


def is_of_worker(error):
    """Whether a loader worker raised it, not the thread that pins memory."""
    return bool(re.match(r"Caught \w+ in DataLoader worker", str(error)))


def last_line(error):
    """What an error of a loader worker says behind its traceback."""
    return (str(error).strip().splitlines() or [repr(error)])[-1]


def exit_codes(workers):
    """The exit codes of those of the `workers` that have failed.

    A process that was lost may still be dying, without an exit code: wait for the first to be dead.
    """
    of_sentinels = {worker.sentinel: worker for worker in workers}
    for sentinel in connection.wait(list(of_sentinels), timeout=DYING):
        of_sentinels[sentinel].join()
    return {worker.exitcode for worker in workers} - {None, 0}


def start_worker(rules, number):
    """For DataLoader's worker_init_fn."""
    leave_signals_to_parent()
    set_reading_rules(*rules)


class EpochSampler(DistributedSampler):
    """The official order, torch's DistributedSampler, as (epoch, index): workers need the epoch."""

    used = 0

    def set_position(self, epoch, used=0):
        """The next pass is over `epoch` without its first `used` images, counted over all ranks."""
        self.set_epoch(epoch)
        self.used = used

    @contextlib.contextmanager
    def further(self, count):
        """A pass that begins here leaves out `count` more images of this rank."""
        self.used += count * self.num_replicas
        yield
        self.used -= count * self.num_replicas

    def __iter__(self):
        return iter(self.keys(self.epoch, self.used))

    def keys(self, epoch, used=0):
        """This rank's (epoch, index), without the first `used` images counted over all ranks."""
        generator = torch.Generator()
        generator.manual_seed(self.seed + epoch)
        order = torch.randperm(len(self.dataset), generator=generator).tolist()
        rest = order[used:]
        # as many for each rank, as in torch's sampler: the first images come again
        rest += itertools.islice(itertools.cycle(order), -len(rest) % self.num_replicas)
        return [(epoch, index) for index in rest[self.rank :: self.num_replicas]]


class EndlessSampler(EpochSampler):
    """The whole batches of an epoch, and then those of the epochs after it."""

    def __init__(self, *args, batch_size, **options):
        super().__init__(*args, **options)
        self.batch_size = batch_size

    def __iter__(self):
        if self.count_batches(used=0) == 0:
            return iter(())
        now = self.whole_batches(self.epoch, self.used)
        later = map(self.whole_batches, itertools.count(self.epoch + 1))
        return itertools.chain(now, itertools.chain.from_iterable(later))

    def whole_batches(self, epoch, used=0):
        return self.keys(epoch, used)[: self.count_batches(used) * self.batch_size]

    def count_batches(self, used):
        """The whole batches of an epoch without its first `used` images; draws no order."""
        share = math.ceil(max(0, len(self.dataset) - used) / self.num_replicas)
        return share // self.batch_size


class EndlessLoader(ImageLoader):
    """An ImageLoader whose workers load the next epoch while the end of one is worked on.

    Where epochs are of few batches, each would begin with a wait for the first. A pass is an epoch,
    of the EndlessSampler; no batch depends on whether it was loaded ahead.
    """

    ahead = None, None  # an epoch; its batches, and those of the epochs after it

    def batches(self, delivered):
        epoch, used = self.sampler.epoch, self.sampler.used
        (following, running), self.ahead = self.ahead, (None, None)
        if delivered or used or following != epoch:
            running = super().batches(delivered)
        yield from itertools.islice(running, self.sampler.count_batches(used) - delivered)
        self.ahead = epoch + 1, running
