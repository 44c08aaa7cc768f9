# SPDX-License-Identifier: Apache-2.0
"""Video files: frames in and frames out, one at a time. Needs PyAV."""

import contextlib
import os
from fractions import Fraction

import numpy as np
from PIL import Image

from dino.atomic import replacing
from dino.data.own_pictures import MARK
from dino.distributed import print0
from dino.errors import UserError
from dino.printable import printable

# Formats that are opened, by FFmpeg's names: none that names further files or addresses to open.
FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,mpegvideo,flv,ogg,asf,mxf,gif,dv"
# Of these encoders the first that FFmpeg was built with is taken. Browsers play H.264 alone.
ENCODERS = {"mp4": ("libx264", "mpeg4"), "avi": ("mpeg4",)}
GOOD_QUALITY = {"libx264": {"crf": "18"}, "mpeg4": {"qmin": "1", "qmax": "4"}}


def import_av():
    try:
        import av  # optional, and a second
    except ImportError:
        raise UserError("videos are read and written by PyAV: pip install av.") from None
    return av


def file_name(path):
    """The absolute path: of `a:b.mp4` FFmpeg would take `a` for a protocol."""
    return os.path.abspath(path)


@contextlib.contextmanager
def opened(path):
    """Yield (container, video stream) of a file; UserError where it is not a video."""
    av = import_av()
    try:
        options = {"format_whitelist": FORMATS, "protocol_whitelist": "file"}
        with av.open(file_name(path), options=options) as container:
            if not container.streams.video:
                raise UserError(f"{path}: there is no picture in this file, only sound or text.")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            limit = Image.MAX_IMAGE_PIXELS
            if limit is not None and stream.width * stream.height > limit:
                raise UserError(
                    f"{path}: frames of {stream.width} x {stream.height} pixels, more than"
                    f" --max_image_pixels {limit}."
                )
            yield container, stream
    except av.FFmpegError as error:
        raise UserError(
            f"{path}: cannot be read as a video ({error.strerror}). Give a video file, or a folder"
            " of frames (.jpg or .png)."
        ) from None


def read_frames(path):
    """Yield the frames of a video as PIL RGB, turned as the camera was held.

    They end with the first that cannot be decoded, with a warning. UserError where that is the
    first of all.
    """
    count = 0
    with opened(path) as (container, stream):
        try:
            for frame in container.decode(stream):
                image = frame.to_image()
                yield image.rotate(frame.rotation, expand=True) if frame.rotation else image
                count += 1
        except import_av().FFmpegError as error:
            print0(f"Warning: {printable(path)} ends after frame {count}: {error.strerror}.")
    if count == 0:
        raise UserError(f"{path}: not one frame of this video can be decoded.")


def frames_per_second(path):
    """Of a video file, as a float; 30 where the file does not say."""
    with opened(path) as (_, stream):
        return float(stream.average_rate or stream.guessed_rate or 30)


def is_own_video(path):
    """Whether `writing` wrote the file."""
    try:
        with opened(path) as (container, _):
            return container.metadata.get("comment") == MARK
    except UserError:
        return False


@contextlib.contextmanager
def writing(path, fps, width, height):
    """Yield a function that appends a frame (height, width, 3) uint8; the file is whole or absent.

    H.264 in .mp4, MPEG-4 in .avi. Their colours have half the resolution, so that an odd last row
    or column is left out.
    """
    av = import_av()
    suffix = path.suffix.removeprefix(".")
    encoder = next(name for name in ENCODERS[suffix] if name in av.codecs_available)
    with (
        replacing(path) as temporary,
        naming(path),
        av.open(file_name(temporary), "w", format=suffix) as container,
    ):
        container.metadata["comment"] = MARK
        rate = Fraction(fps).limit_denominator(1001)
        stream = container.add_stream(encoder, rate=rate, options=GOOD_QUALITY[encoder])
        stream.pix_fmt = "yuv420p"
        stream.width, stream.height = width - width % 2, height - height % 2

        def append(pixels):
            even = np.ascontiguousarray(pixels[: stream.height, : stream.width])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(even, "rgb24")))

        yield append
        container.mux(stream.encode())  # what the encoder still holds


@contextlib.contextmanager
def naming(path):
    """Raise PyAV's errors as OSError with the name of the file: not all of them are one."""
    try:
        yield
    except import_av().FFmpegError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
