# SPDX-License-Identifier: Apache-2.0
"""What a run of main_dino.py does around its steps.

Before: `flags`, `view_flags`, `flag_checks`, `idle_flags`, `presets`; `data` (the images and views
that the flags ask for) and `own_views` (those of the user's own code); `building` (all that trains
and measures); for --preset auto `auto` (the rules), `settings`, `correlation` and `budget` (what it
measures), for --preset continue `continuing`, for check_data.py `advice`.

Between steps: `run` (in what order), `agreement` (stop or save, on all ranks), `recorder`
(figures), `health` (what they mean), `checkpoint` (what is saved and restored), `saver` (when, by
whom), `plots`, `attention_history`. After a failure: `failures`.

After a run: `logged_run` (what it has logged), `comparison` (rows of several), `html_report`,
`backbone_pictures`.

The paper's ablations: `ablation_flags`, `studies` (which runs), `study_report`, `study_plots`.
Supervised fine-tuning: `finetuning` (recipes, network, step), `finetuning_run` (around the steps).
"""
