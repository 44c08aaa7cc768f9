# SPDX-License-Identifier: Apache-2.0
"""DINO v1: the method here, and four rooms around it.

The method: `loss` (Algorithm 1's H and center), `networks` (student, teacher, EMA), `backbones`,
`small_resnet` and `backbone_checks` (--arch), `optim` (schedules, clipping, optimizers),
`precision` (autocast), `ablations` (the variants of Sec. 5, which no default uses).

The rooms: `data` (images, views, loaders), `weights` (files, any layout -> backbone), `training`
(what a run does around its steps), `evaluation` (frozen features and what is measured on them).

What all of them use:
processes: `launch`, `distributed`, `sync_batchnorm`, `same_on_ranks`, `pulse`, `signals`;
draws and choices: `randomness`, `spread`;
the command line: `command_line`, `output_checks`, `errors`, `printable`, `own_code`,
`official_helpers`;
files: `atomic`, `run_lock`, `json_files`, `pickle_machine`;
figures: `meters`, `run_log`, `tensorboard_log`, `wandb_log`, `versions`, `figures`.

Imports go one way: scripts -> training, evaluation -> weights, data -> the method -> the rest.
"""
