# SPDX-License-Identifier: Apache-2.0
"""Weights: `files` writes atomically and reads without running code, `pretrained` turns a file of
any layout into a backbone, `published` knows and downloads what the authors released. `results`
protects what a run has written from other runs.
"""
