# SPDX-License-Identifier: Apache-2.0
"""What frozen backbones are worth.

`features` (from a loader, over all ranks), `knn` on them with `neighbours` (exact search),
`linear` classifiers with `linear_files` (what is saved of them), `attention` maps and masks,
`retrieval` of images with `retrieval_pictures`, `copy_detection`.
"""
