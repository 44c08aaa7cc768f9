# SPDX-License-Identifier: Apache-2.0
"""What a run of main_dino.py does around its steps.

Before: `flags`, `flag_checks`, `presets`. Between steps: `run` (in what order), `agreement` (stop
or save, on all ranks), `recorder` (figures), `health` (what they mean), `checkpoint` (what is saved
and restored), `saver` (when, by whom), `plots`. After a failure: `failures`.

The paper's ablations: `ablation_flags`, `studies` (which runs), `study_report`, `study_plots`.
"""
