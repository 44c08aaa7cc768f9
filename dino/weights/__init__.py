# SPDX-License-Identifier: Apache-2.0
"""Files of weights, and networks made of them.

`files` writes atomically and reads without running code: `pickles` knows what a pickle would do,
`integrity` whether the file is whole. `layouts` reads those of timm and transformers. `pretrained`
turns any of them into a backbone, `published` downloads what the authors released. A run begins
with `starting`, resumes with `loading`, and `results` protects what it has written from others.
`exports` writes backbones for other libraries, some as `graphs`.
"""
