"""Benchmarks of the CUDA backend: `python -m benchmarks.gpu [CASE ...] --output FILE.jsonl`.

boundary.py   one boundary: ours, the paper in eager PyTorch, ours in PyTorch, beside the floor
compiled.py   the same beside both under torch.compile
mass.py       the attention mass alone, beside its bound
decode.py     whole decoding in a CUDA graph, with a boundary every 30 tokens, against stock; the capture alone
memory.py     device memory that all of it takes
profile.py    a boundary by kernel, and the host's time to enqueue it
timing.py     device events, cold caches, interleaved repeats
peaks.py      rates of this card, measured in the same run; exp_peak.cu is the loop of exponentials

Shapes, inputs, checks, baselines, counts and figures are those of the CPU's benchmarks. Weights are random: the cost
depends on shapes alone. `../run_gpu.sh` builds, tests, sanitizes (tests/sanitize_cuda.py) and measures on a bare
machine. `--device cpu --quick` runs the same code without a GPU, to see that it runs; what it then measures means
nothing.

A figure's "median_s" is the median over repeats of the median time of one asynchronous call, between two events around
it on the device, after the last-level cache was overwritten. A call that the host cannot issue as fast as the device
works it off is thus charged for that. "host_s" is the host's time to issue one.
"""
