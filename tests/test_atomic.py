# SPDX-License-Identifier: Apache-2.0
"""Files that hold their old content or their new."""

import os

import pytest

from dino.atomic import replacing


def test_a_file_is_replaced_when_the_new_one_is_complete(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["file"]


def test_after_an_error_the_old_content_stays_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), replacing(path) as temporary:
        temporary.write_text("half of the n")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_pipe_is_written_to_and_stays_a_pipe(tmp_path):
    """As a device does: --output /dev/null must not make a file of /dev/null."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with replacing(path) as target:
        target.write_text("content")
    assert os.read(reader, 100) == b"content"
    assert path.is_fifo()
    os.close(reader)


def test_the_error_of_a_full_disk_names_the_file():
    with pytest.raises(OSError, match="No space left") as error, replacing("/dev/full") as target:
        target.write_text("content")
    assert error.value.filename == "/dev/full"
