# SPDX-License-Identifier: Apache-2.0
"""Images on their way to the network.

`images` finds and reads files; `augmentations` draws and applies views, `augmentations_on_device`
does the second half on the device; `loaders` serves batches in a reproducible order; `demo` is the
embedded data set, `masks` are images with ground-truth masks. `davis` is a data set of videos
with masks, `demo_videos` makes one; `frames` are files in a folder, `videos` files of their own.
"""
