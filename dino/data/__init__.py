# SPDX-License-Identifier: Apache-2.0
"""Images on their way to the network.

Reading: `images` finds and reads files, `channels` those of any number of channels, `levels` their
numbers; `labels` lists images with their classes, `datasets` opens data sets of torchvision or
one's own. `inspection` looks at every image, `survey` says what a data set is like.

Views: `augmentations` draws and applies them, `augmentations_on_device` does the second half on the
device. Batches: `items` are of one image, `image_loader` collects them in a reproducible order,
`loaders` are those of training and of the evaluations.

Layouts of others: `masks`, images with ground-truth masks; `retrieval_set`, revisited Oxford and
Paris, with a ground truth that `plain_pickle` reads; `copydays`; `davis`; `name_lists`, the text
files of some. Videos: `frames` are files in a folder, `videos` files of their own, `own_pictures`
those that an earlier run wrote. Made from photographs: `demo`, images, and `demo_videos`.
"""
