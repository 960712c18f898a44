"""Mistakes of the kind kernels are made of, each put into a copy of the kernels: the tests must find every one.

`python -m tests.emulation.mutants [words]` tries those whose description or file holds all words, and prints what
became of each. A mutant is compiled for the emulation that sees races (`make -C tests/emulation VARIANT=races`) and
judged by tests/operations.cpp.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "kernels" / "cuda"
BUILD = ROOT / "build" / "emulation-races"
SEEDS = 60
TIMEOUT = 300


@dataclass(frozen=True)
class Mutant:
    """An edit of a kernel: new takes the place of old, which occurs once, spaces and line ends apart.

    about: the kernel's file; a header may hold the place as well.
    """

    about: str
    what: str
    old: str
    new: str

    def __str__(self) -> str:
        return f"{self.about}: {self.what}"

    def apply(self, folder: Path, write: bool = True) -> None:
        pattern = re.compile(r"\s+".join(re.escape(word) for word in self.old.split()))
        files = {folder / self.about, *folder.glob("*.cuh")}
        places = [path for path in files for _ in pattern.findall(path.read_text())]
        assert len(places) == 1, f"{self}: found in {len(places)} places; bring tests/emulation/mutants.py up"
        if write:
            places[0].write_text(pattern.sub(lambda _: self.new, places[0].read_text()))


MASS, TOP_K, SWIGLU, CAPTURE = "attention_mass.cu", "top_k.cu", "linear_swiglu.cu", "capture_queries.cu"
MASS_SM90 = "attention_mass_sm90.cu"

MUTANTS = [
    Mutant(
        MASS,
        "no barrier before a tile of keys is overwritten",
        "__syncthreads(); } partials += blockIdx.z * partials_of_layer(plan); #pragma unroll for (int m = 0;",
        "} partials += blockIdx.z * partials_of_layer(plan);\n#pragma unroll\n for (int m = 0;",
    ),
    Mutant(MASS, "waits for too few copies", "copy_async_wait<1>();", "copy_async_wait<2>();"),
    Mutant(
        MASS,
        "no barrier between the queries and the keys that take their place",
        "(warp * TILES + m) * 16, k * 16); } __syncthreads();",
        "(warp * TILES + m) * 16, k * 16); }",
    ),
    Mutant(MASS, "the last tile is not masked", "if (next > step.num_prior)", "if (key > step.num_prior)"),
    Mutant(MASS, "a query does not see itself", "> last_key[m][h])", ">= last_key[m][h])"),
    Mutant(
        MASS,
        "wrong rows of the right side",
        "(row + lane % 8 + lane / 16 * 8)",
        "(row + lane % 8 + lane / 8 % 2 * 8)",
    ),
    Mutant(
        MASS,
        "wrong columns of the left side",
        "column + lane / 16 * 8);",
        "column + lane / 8 % 2 * 8);",
    ),
    Mutant(MASS, "no tail guard", "if (lane % 4 == 0 && at < end)", "if (lane % 4 == 0)"),
    Mutant(
        MASS,
        "only the last queries count",
        "first_row == 0 ? sum * weight : mass[at] + sum * weight",
        "sum * weight",
    ),
    Mutant(
        MASS,
        "no barrier before queries are overwritten",
        "mass[at] + sum * weight; } } } __syncthreads(); }",
        "mass[at] + sum * weight; } } } }",
    ),
    Mutant(MASS, "rows behind the window have a probability", "float value = INFINITY;", "float value = 0.0f;"),
    Mutant(MASS, "a lost shuffle", "sum += __shfl_xor_sync(BTX_ALL_LANES, sum, 2);", ""),
    Mutant(MASS, "queries behind the window are read", "if (r >= all) {", "if (r > all) {"),
    Mutant(
        MASS,
        "no barrier between loading and scores, general",
        "queries[i][lane] = q; } __syncthreads();",
        "queries[i][lane] = q; }",
    ),
    Mutant(
        MASS,
        "columns behind the head are read, general",
        "if (key < key_end && column < plan.head_dim) {",
        "if (key < key_end) {",
    ),
    Mutant(MASS, "splits are not weighed", "sum += part.sum * exp2_fast(part.largest - largest);", "sum += part.sum;"),
    Mutant(MASS_SM90, "descriptors of other columns", "k / 4 * tile_rows * 64 + k % 4 * 16", "k * 8"),
    Mutant(
        MASS_SM90,
        "no barrier before a tile is read",
        "fence_async_proxy(); __syncthreads(); start_scores",
        "fence_async_proxy(); start_scores",
    ),
    Mutant(MASS_SM90, "waits for too few copies", "copy_async_wait<1>();", "copy_async_wait<2>();"),
    Mutant(
        MASS_SM90,
        "scores are read before they are there",
        "SPLIT_KEYS); wgmma_wait<0>(); wgmma_hold(score); add(later, score, key + 64);",
        "SPLIT_KEYS); wgmma_hold(score); add(later, score, key + 64);",
    ),
    Mutant(
        MASS_SM90,
        "the tile that is being read is overwritten",
        "stage == 0 ? SPLIT_STAGES - 1 : stage - 1);",
        "stage);",
    ),
    Mutant(
        MASS_SM90,
        "a lane finds the key of another turn",
        "chunk % TURNS * AT_ONCE + row, end - 1);",
        "row * TURNS + chunk % TURNS, end - 1);",
    ),
    Mutant(MASS_SM90, "a turn forgets to swizzle", "^ turn * AT_ONCE % 8 * 8);", ");"),
    Mutant(MASS_SM90, "blocks count from position 0", "step.block_offset - step.first_block};", "step.block_offset};"),
    Mutant(
        MASS_SM90,
        "the log-sum-exps of the first queries",
        "lse + block * 64 + lane % 4 * 2;",
        "lse + lane % 4 * 2;",
    ),
    Mutant(
        MASS_SM90,
        "lanes add up different rows",
        "second_row ? total[p][0] : total[p][1], 1);",
        "total[p][1], 1);",
    ),
    Mutant(MASS_SM90, "no tail guard", "if (stores && at < end)", "if (stores)"),
    Mutant(TOP_K, "no barrier behind the clearing", "histogram[i] = 0; __syncthreads();", "histogram[i] = 0;"),
    Mutant(TOP_K, "one bin too far", "left <= before + first;", "left < before + first;"),
    Mutant(
        TOP_K,
        "no barrier before the next histogram",
        "|= (BINS - 1u) << shift; __syncthreads();",
        "|= (BINS - 1u) << shift;",
    ),
    Mutant(
        TOP_K,
        "no barrier behind a warp's total",
        "totals[warp] = sum; __syncthreads();",
        "totals[warp] = sum;",
    ),
    Mutant(
        TOP_K,
        "one tie too many",
        "(is_equal && rank_equal < ties)",
        "(is_equal && rank_equal <= ties)",
    ),
    Mutant(
        TOP_K,
        "no barrier behind the warps' counts",
        "equal[warp] = num_equal; __syncthreads();",
        "equal[warp] = num_equal;",
    ),
    Mutant(TOP_K, "NaN is the largest", "value < 0.0f || value > 0.0f ?", "value != 0.0f ?"),
    Mutant(
        TOP_K,
        "positions count from the first token",
        "positions[taken] = step.sequence_begin + i + lane;",
        "positions[taken] = i + lane;",
    ),
    Mutant(
        TOP_K,
        "parts of other steps",
        "mass[(first + part) * plan.total_prior + i]",
        "mass[(first + part) * n + i]",
    ),
    Mutant(
        "rows.cuh",
        "no barrier in a block's sum",
        "storage[threadIdx.x / BTX_WARP] = x; __syncthreads();",
        "storage[threadIdx.x / BTX_WARP] = x;",
    ),
    Mutant(
        "rows.cuh",
        "a tail is read as if it were whole",
        "piece.count = min(8, plan.head_dim - piece.first);",
        "piece.count = 8;",
    ),
    Mutant(
        "gather_kv.cu",
        "no barrier behind the rotation's table",
        "fill_rotation(plan, index, cosines, sines); __syncthreads();",
        "fill_rotation(plan, index, cosines, sines);",
    ),
    Mutant("gather_kv.cu", "turned the wrong way", "(at < half ? other : -other)", "(at < half ? -other : other)"),
    Mutant(
        "gather_kv.cu", "the padding of an operand is left", "i = width + threadIdx.x;", "i = width + 1 + threadIdx.x;"
    ),
    Mutant("stage_kv.cu", "-0 becomes 0", "edit[i] == 0.0f ? old[i] : old[i] + edit[i];", "old[i] + edit[i];"),
    Mutant("stage_kv.cu", "infinity is written", "fits = fits && fabsf(sum) < largest_of<T>();", ""),
    Mutant("stage_kv.cu", "the gate of another layer", "gate[layer_index];", "gate[blockIdx.y];"),
    Mutant(
        "write_kv.cu",
        "a refused edit is written",
        "|| plan.refused->edit != BTX_NOT_REFUSED)",
        ")",
    ),
    Mutant(
        "write_kv.cu",
        "values go to the keys' column",
        "column = is_value ? i - half : i, head = column / plan.head_dim; T *to",
        "column = i, head = column / plan.head_dim; T *to",
    ),
    Mutant(
        "attention.cu",
        "no barrier before keys are overwritten",
        "key += KEYS) { __syncthreads();",
        "key += KEYS) {",
    ),
    Mutant(
        "attention.cu", "keys behind the last one count", "(dot[2] + dot[3]) : -INFINITY;", "(dot[2] + dot[3]) : 0.0f;"
    ),
    Mutant(
        "attention.cu",
        "no barrier before keys are overwritten, split",
        "key += SPLIT_KEYS) { __syncthreads();",
        "key += SPLIT_KEYS) {",
    ),
    Mutant(
        "attention.cu",
        "a key behind the last one counts, split",
        "lane % 4 * 2 + i % 2 >= num_rows)",
        "lane % 4 * 2 + i % 2 > num_rows)",
    ),
    Mutant("linear_general.cu", "the bias of another layer", "bias + pass->layer_begin * out_dim", "bias"),
    Mutant(
        "linear_general.cu",
        "no barrier behind the tiles",
        "* stride + k + d]) : 0.0f; } __syncthreads(); for",
        "* stride + k + d]) : 0.0f; } for",
    ),
    Mutant(SWIGLU, "waits for too few copies", "copy_async_wait<STAGES - 2>();", "copy_async_wait<STAGES - 1>();"),
    Mutant(
        SWIGLU,
        "no barrier behind the wait",
        "copy_async_wait<STAGES - 2>(); __syncthreads();",
        "copy_async_wait<STAGES - 2>();",
    ),
    Mutant(
        SWIGLU,
        "columns behind the row are read",
        "wanted = inside && i * PASS < rows_left;",
        "wanted = i * PASS < rows_left;",
    ),
    Mutant(
        SWIGLU,
        "no barrier behind the tiles, f32",
        "* stride + k + d] : 0.0f; } __syncthreads(); for (int d = 0;",
        "* stride + k + d] : 0.0f; } for (int d = 0;",
    ),
    Mutant(
        "store_mass.cu",
        "what is behind the prior is stored",
        "i < step.num_prior && part < num_parts;",
        "part < num_parts;",
    ),
    Mutant(
        "rms_norm.cu",
        "the weight of another layer",
        "weight += (layer_begin + blockIdx.y) * dim;",
        "weight += blockIdx.y * dim;",
    ),
    Mutant(
        "plan.cuh",
        "the ring of pages does not close",
        "(page % (unsigned)plan.pages_per_sequence)",
        "page",
    ),
    Mutant("plan.cuh", "blocks count from position 0", "- step.first_block]", "]"),
    Mutant(
        CAPTURE,
        "a negative slot is not skipped",
        "if (slot < 0 || block >= views.num_blocks)",
        "if (block >= views.num_blocks)",
    ),
    Mutant(
        CAPTURE,
        "a slot behind the blocks is not skipped",
        "if (slot < 0 || block >= views.num_blocks)",
        "if (slot < 0)",
    ),
    Mutant(
        CAPTURE,
        "a block without a page is not skipped",
        "if (page < 0 || page >= views.num_pages)",
        "if (page >= views.num_pages)",
    ),
    Mutant(
        CAPTURE, "a page that does not exist is written", "if (page < 0 || page >= views.num_pages)", "if (page < 0)"
    ),
    Mutant(CAPTURE, "wrong columns", "column * views.page_stride[3]", "column"),
    Mutant(CAPTURE, "the column of another head", "column = i - head * views.head_dim;", "column = i;"),
    Mutant(
        CAPTURE,
        "no tail guard",
        "i < views.heads * views.head_dim; i += THREADS",
        "i < (views.heads * views.head_dim + THREADS - 1) / THREADS * THREADS; i += THREADS",
    ),
    Mutant(CAPTURE, "what one thread cannot hold is lost", "i += THREADS)", "i += 2 * THREADS)"),
    Mutant(
        CAPTURE,
        "a vector where rows do not begin on one",
        "vector = vector && view->stride[d] % lanes == 0;",
        "vector = vector;",
    ),
    Mutant(CAPTURE, "slots are taken for one after the other", "token * views.slot_stride]", "token]"),
    Mutant(CAPTURE, "pages are taken for one after the other", "block * views.block_stride]", "block]"),
]


def make(*arguments: str, kernels: Path = KERNELS, build: Path = BUILD) -> subprocess.CompletedProcess[str]:
    command = ["make", "-s", "-C", str(ROOT / "tests" / "emulation"), "VARIANT=races"]
    command += [f"KERNELS={kernels}", f"BUILD={build}", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def build_unchanged() -> None:
    """What mutants are made from: only what a mutant changes is compiled again."""
    made = make(f"-j{os.cpu_count()}", str(BUILD / "operations"))
    assert made.returncode == 0, made.stderr


def judge(mutant: Mutant) -> str:
    """How the mutant was found, or "" where it was not."""
    with tempfile.TemporaryDirectory() as folder:
        kernels, build = Path(folder, "kernels"), Path(folder, "build")
        shutil.copytree(KERNELS, kernels)
        shutil.copytree(BUILD, build)
        mutant.apply(kernels)
        made = make(str(build / "operations"), kernels=kernels, build=build)
        assert made.returncode == 0, f"{mutant}: {made.stderr}"
        command = [str(build / "operations"), "0", str(SEEDS), "1"]
        environment = {**os.environ, "BTX_EMULATE_SM90A": str(int("sm90" in mutant.about))}
        try:
            run = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, env=environment)
        except subprocess.TimeoutExpired:
            return "does not end"
        if run.returncode == 0:
            return ""
        lines = run.stderr.splitlines() + run.stdout.splitlines()
        return next((line.strip() for line in lines if line.strip()), f"ended with {run.returncode}")


def main() -> None:
    words = sys.argv[1:]
    chosen = [mutant for mutant in MUTANTS if all(word in str(mutant) for word in words)]
    build_unchanged()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        verdicts = list(zip(chosen, pool.map(judge, chosen), strict=True))
    for mutant, found in verdicts:
        print(f"{mutant}\n    {found or 'NOT FOUND'}")
    missed = sum(not found for _, found in verdicts)
    print(f"{len(verdicts)} mutants, {missed} not found")
    sys.exit(missed > 0)


if __name__ == "__main__":
    main()
