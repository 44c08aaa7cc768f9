# SPDX-License-Identifier: Apache-2.0
"""DINO v1: the method here, and four rooms around it.

The method: `loss` (Algorithm 1's H and center), `networks` (student, teacher, EMA), `backbones`
(--arch), `optim` (schedules, clipping, optimizers), `precision` (autocast), `ablations` (the
variants of Sec. 5, which no default uses).

The rooms: `data` (images, views, loaders), `weights` (files, any layout -> backbone), `training`
(what a run does around its steps), `evaluation` (frozen features and what is measured on them).

What all of them use: `distributed`, `sync_batchnorm`, `randomness`, `command_line`, `errors`,
`signals`, `meters`, `run_log`.

Imports go one way: scripts -> training, evaluation -> weights, data -> the method -> the rest.
"""
