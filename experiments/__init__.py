"""Does a Processor help, and what of it? Experiments with equal-compute baselines, as files.

    python -m experiments registers            # what is missing of registers.yaml, then its tables and plots
    python -m experiments registers --report   # the tables and plots alone

NAME.yaml says all there is to an experiment. What is trained is kept in build/experiments/NAME, and every outcome, of
one variant on one backbone, in results/NAME/SEED-VARIANT.json: a run goes on where it stopped, on another day or
machine. results/NAME.json, NAME.md and NAME-*.svg are made from these.

plan.py         the YAML
lab.py          backbones, equal compute, training, outcomes
tasks.py        on synthetic tasks, with tiny backbones
text.py         on real words: generated answers
variants.py     one class per way to spend the compute
decode.py       generation with any of them
report.py       tables; plots.py, figures
"""
