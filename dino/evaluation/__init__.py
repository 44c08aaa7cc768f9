# SPDX-License-Identifier: Apache-2.0
"""What frozen backbones are worth.

`features` (from a loader, over all ranks), `knn` on them with `neighbours` (exact search),
`linear` classifiers with `linear_files` (a head's file) and `linear_run` (what resumes),
`retrieval` of images with `retrieval_pictures`, `copy_detection`, `without_labels` (RankMe). For
ViTs alone, which `vits` opens: `attention` maps and masks, and `video_segmentation` by label
propagation, with `video_scores`, `video_results` (the folder of masks) and `video_pictures`.

For extract_features.py: `tokens` (which features), `extraction` into an `unfinished` folder, then
into `feature_files`, and `neighbour_pictures`.
"""
