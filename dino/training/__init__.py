# SPDX-License-Identifier: Apache-2.0
"""What a run of main_dino.py does around its steps.

Before: `flags`, `view_flags`, `flag_checks`, `presets`; `data` (the images and views that the flags
ask for) and `own_views` (those of the user's own code); `building` (all that trains and measures);
for --preset auto `auto` (the rules), `settings`, `correlation` and `budget` (what it measures), and
`advice` (its settings for check_data.py). Between steps: `run` (in what order), `agreement` (stop
or save, on all ranks), `recorder` (figures), `health` (what they mean), `checkpoint` (what is saved
and restored), `saver` (when, by whom), `plots`. After a failure: `failures`.

The paper's ablations: `ablation_flags`, `studies` (which runs), `study_report`, `study_plots`.
"""
