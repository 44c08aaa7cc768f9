# SPDX-License-Identifier: Apache-2.0
"""What frozen backbones are worth.

`features` (from a loader, over all ranks), `knn` on them with `neighbours` (exact search),
`linear` classifiers with `linear_files` (what is saved of them), `attention` maps and masks.
`video_segmentation` by label propagation, with `video_scores`, `video_results` (the folder of
masks) and `video_pictures`.
"""
