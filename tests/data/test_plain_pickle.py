# SPDX-License-Identifier: Apache-2.0
"""Pickles of plain values are read as pickle reads them; nothing else in a file is carried out."""

import os
import pickle

import numpy as np
import pytest

from dino.data.plain_pickle import MOST_BYTES, read_plain_pickle
from dino.errors import UserError

VALUE = {
    "gnd": [{"bbx": [136.5, 34, 648.5, 955.0], "easy": [*range(70)], "junk": [], "none": None}],
    "imlist": ["all_souls_000013", "Zürich\n", ""],
    "more": (1, (2, 3), (4, 5, 6), (), True, False, -1, 2**40, -(2**80), 1e-300),
}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_values_of_every_protocol_are_read_as_pickle_reads_them(tmp_path, protocol):
    path = tmp_path / "gnd.pkl"
    path.write_bytes(pickle.dumps(VALUE, protocol=protocol))
    assert read_plain_pickle(path) == VALUE


class RunsACommand:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_code_in_a_file_is_refused_and_does_not_run(tmp_path, protocol):
    path, marker = tmp_path / "gnd.pkl", tmp_path / "it_ran"
    path.write_bytes(pickle.dumps({**VALUE, "code": RunsACommand(marker)}, protocol=protocol))
    with pytest.raises(UserError, match=r"holds more than plain values .*nothing in it was run"):
        read_plain_pickle(path)
    assert not marker.exists()
    pickle.loads(path.read_bytes())  # which is what pickle.load, in the official script, does
    assert marker.exists()


KEY = 2**61 - 1  # multiples of it have the same hash
COLLIDING_KEYS = b"".join(b"\x8a\x0c" + (i * KEY).to_bytes(12, "little") + b"N" for i in range(9))
HOSTILE = {
    "numpy": (pickle.dumps({"easy": np.arange(3)}), "write lists, not numpy arrays"),
    "a memo of 32 GiB": (b"]r\xff\xff\xff\xff.", None),  # harmless here: the memo is a dict
    "keys that collide": (b"}(" + COLLIDING_KEYS + b"u.", "keys that are not text"),
    "a persistent id": (b"Pid\n.", "PERSID"),
    "an extension": (b"\x82\x01.", "EXT1"),
    "a build": (b"}}b.", "BUILD"),
    "a set": (b"\x80\x04\x8f.", "EMPTY_SET"),
    "bytes": (b"\x80\x03C\x01a.", "SHORT_BINBYTES"),
    "too many operations": (b"]" * 2_200_000 + b".", "more than 2097152 operations"),
    "too large": (b"]" * (MOST_BYTES + 1), "more than the 16777216 that are read"),
    "marks that are not there": (b"u.", "damaged, or not a pickle"),
    "an odd number of items": (b"}(X\x01\x00\x00\x00au.", "damaged, or not a pickle"),
    "values that are not there": (b"a.", "damaged, or not a pickle"),
    "two values": (b"]].", "damaged, or not a pickle"),
    "cut short": (pickle.dumps(VALUE)[:-9], "damaged, or not a pickle"),
    "not a pickle": (b"version https://git-lfs.github.com/spec/v1\n", "damaged, or not a pickle"),
    "nothing": (b"", "damaged, or not a pickle"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_or_damaged_file_is_refused_in_a_sentence(tmp_path, name):
    content, message = HOSTILE[name]
    path = tmp_path / "gnd.pkl"
    path.write_bytes(content)
    if message is None:
        assert read_plain_pickle(path) == []
        return
    with pytest.raises(UserError, match=message):
        read_plain_pickle(path)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.pkl: no such file"):
        read_plain_pickle(tmp_path / "nowhere.pkl")
