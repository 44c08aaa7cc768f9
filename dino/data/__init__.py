# SPDX-License-Identifier: Apache-2.0
"""Images on their way to the network.

`images` finds and reads files; `augmentations` draws and applies views, `augmentations_on_device`
does the second half on the device; `loaders` serves batches in a reproducible order; `demo` is the
embedded data set, `masks` are images with ground-truth masks. `channels` reads images of any number
of channels, `datasets` opens those of torchvision or one's own, `survey` says what a data set is
like. `retrieval_set` (revisited Oxford and Paris, with a ground truth that `plain_pickle` reads),
`copydays` and `davis` are benchmarks' layouts, `name_lists` their text files; `demo_videos` makes a
set of videos with masks; `frames` are files in a folder, `videos` files of their own.
"""
