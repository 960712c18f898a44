"""What is measured: one module per case, each with

    run(context: Context) -> Iterator[Figure]

which first checks that ours and the baselines compute the same on the very inputs, raising SystemExit where they do
not, and then measures; of several processes the first checks what is expensive to check. Modules are imported when they
run: not every case needs transformers.
"""

from __future__ import annotations

CASES = {  # name: module
    "gemm": "gemm",
    "mass": "mass",
    "top_k": "top_k",
    "gather": "gather",
    "write": "write",
    "boundary": "boundary",
    "paged": "paged",
    "decode": "decode",
    "memory": "memory",
    "import": "importing",
    "threads": "threads",
    "scaling": "scaling",
    "training": "training",
}
ON_REQUEST = ("training",)  # minutes for every process: left out where no case is named
