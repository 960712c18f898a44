"""Benchmarks, run from a checkout: `python -m benchmarks [CASE ...]`.

cases/       one module per case: checks that all compute the same, then measures
baselines/   other implementations to measure against
harness.py   interleaved repeats, figures    processes.py   the same figure from several processes
inputs.py    shapes and random caches        models.py   random models of these shapes    checks.py   same results?
floors.py    how fast it could be: counted work over rates that peak.c measures in the same run
options.py   the command line    report.py   tables, plots, files    compare.py   do two runs agree?
results/     runs worth keeping
gpu/         the CUDA backend's, a command of their own; run_gpu.sh runs them with everything else a GPU is needed for

A figure is one JSON object: what was measured ("case", "shape", "d_p", "dtype", "batch", "prior", "step", "top_k",
"threads", as far as they apply), of ours "median_s", "min_s", "max_s", "spread" (interquartile range over median) and
"repeats"; "baselines" (median seconds by name), "ratios" (by name, the median of baseline over ours, repeat by repeat)
and "ratio_spread"; "floor_s", "floor_fraction" (floor over median) and "floor" (what was counted, what bounds it).
With several processes, "processes", their number, and each number is the median of the processes' own, but for "min_s",
"max_s" and "repeats", which are over all; "range" (of "median_s") and "ratio_range" are the smallest and the largest of
the processes' medians: the stated spread.
The first line of a run describes machine, versions, commit, options and measured rates.
"""
