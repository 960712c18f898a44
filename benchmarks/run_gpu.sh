#!/usr/bin/env bash
# Builds, tests, sanitizes and measures the CUDA backend on a machine with a GPU, nvcc and torch, without a network:
#
#     benchmarks/run_gpu.sh OUT_DIR [PART ...]        parts: build parity sanitize bench; none: all, in this order
#
# Each part writes OUT_DIR/PART.log, bench also OUT_DIR/bench.jsonl. A part that passed is noted in OUT_DIR/done with a
# hash of what it depends on, and is left out by a later call with the same OUT_DIR while that has not changed; bench
# goes on where it stopped. A part that fails does not keep the others from running, but for build. A short table comes
# last. The exit status is 0 where every part asked for has passed, now or before.
#
#     LIMIT=540                      seconds for all of it; each part has a limit of its own besides
#     BOTTLENECKED_CUDA_ARCHS=90a    what to build for
#     BOTTLENECKED_COMMIT=...        what the results are of, where no git tells
#     SKIP_BUILD=1                   the extension came along: only look whether it has CUDA
#     BENCH='boundary decode'        cases of the benchmarks; none: all
set -u
if [ $# -lt 1 ]; then
    sed -n '2,17s/^# \{0,1\}//p' "$0"
    exit 2
fi
mkdir -p "$1"
out=$(cd "$1" && pwd)
shift
parts=${*:-build parity sanitize bench}
for part in $parts; do
    case $part in
        build | parity | sanitize | bench) ;;
        *) echo "there is no part '$part': build, parity, sanitize, bench" >&2 && exit 2 ;;
    esac
done
cd "$(dirname "$0")/.."

limit=${LIMIT:-540}
python=${PYTHON:-python3}
export PYTHONPATH="$PWD/python:$PWD" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false TQDM_DISABLE=1
export BOTTLENECKED_CUDA_ARCHS=${BOTTLENECKED_CUDA_ARCHS:-90a}
export PATH="$PATH:/usr/local/cuda/bin"
if [ -z "${BOTTLENECKED_COMMIT:-}" ] && commit=$(git rev-parse HEAD 2>/dev/null); then
    export BOTTLENECKED_COMMIT=$commit
fi
touch "$out/done"

# What a part depends on, as one word.
hash_of() {
    local paths="csrc kernels setup.py bottleneck_ext/__init__.py"
    case $1 in
        parity) paths="$paths python tests" ;;
        sanitize) paths="$paths python tests/sanitize_cuda.py tests/cases.py" ;;
        bench) paths="$paths python benchmarks" ;;
    esac
    # shellcheck disable=SC2086
    find $paths -type f \( -name '*.[ch]' -o -name '*.cu' -o -name '*.cuh' -o -name '*.py' \) -print0 | sort -z |
        xargs -0 sha256sum | sha256sum | cut -c1-16
}

# At most so many seconds, and no more than are left.
within() {
    local seconds=$1 left=$((limit - SECONDS))
    shift
    [ "$left" -lt "$seconds" ] && seconds=$left
    [ "$seconds" -lt 5 ] && echo "no time left" && return 124
    timeout --kill-after=5 "$seconds" "$@"
}

has_cuda() {
    "$python" -c '
import bottleneck_ext, sys
about = bottleneck_ext.build_info()
print(about)
cuda = about["cuda"]
sys.exit(not (cuda.get("compiled", True) if isinstance(cuda, dict) else cuda))'
}

run_build() {
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv || true
    nvcc --version | tail -2 || true
    if [ -z "${SKIP_BUILD:-}" ]; then
        within 280 "$python" setup.py --quiet build_ext --inplace --parallel "$(nproc)" || return
    fi
    has_cuda
}

run_parity() {
    local together="parity or cpu_backend or selection or ties or attention_mass or where_this" status=0
    local pytest="$python -m pytest -q -p no:cacheprovider --durations=8 --maxfail=30 tests/test_cuda.py"
    export BOTTLENECKED_REQUIRE_CUDA=1
    if "$python" -c 'import xdist' 2>/dev/null; then
        # These need the host more than the device: they are compared with float64 there.
        OMP_NUM_THREADS=2 within 170 $pytest -n 8 -k "$together" || status=$?
        within 170 $pytest -k "not ($together or compiled_into)" || status=$?
        within 150 $pytest -k compiled_into || status=$?
    else
        within 300 $pytest || status=$?
    fi
    return $status
}

run_sanitize() {
    local status=0 logs tool
    logs=$(mktemp -d)
    local -A jobs
    # Every tensor an allocation of its own, so that a step beyond it is seen.
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1 OMP_NUM_THREADS=2
    for tool in memcheck racecheck initcheck synccheck; do
        (within 150 compute-sanitizer --tool $tool --error-exitcode 9 --print-limit 20 \
            "$python" -m tests.sanitize_cuda >"$logs/$tool" 2>&1) &
        jobs[$tool]=$!
    done
    for tool in memcheck racecheck initcheck synccheck; do
        wait "${jobs[$tool]}"
        local tool_status=$?
        sed "s/^/$tool: /" "$logs/$tool"
        echo "$tool: exit status $tool_status"
        [ $tool_status -eq 0 ] && grep -q '^all done' "$logs/$tool" || status=1
    done
    rm -rf "$logs"
    return $status
}

run_bench() {
    local seconds=$((limit - SECONDS - 25))
    [ $seconds -gt 300 ] && seconds=300
    # shellcheck disable=SC2086
    within 330 "$python" -m benchmarks.gpu ${BENCH:-} --output "$out/bench.jsonl" --seconds $seconds
}

failed=""
for part in $parts; do
    hash=$(hash_of "$part")
    if grep -q "^$part $hash$" "$out/done"; then
        echo "== $part: passed before"
        continue
    fi
    echo "== $part, $SECONDS s after the start"
    begin=$SECONDS
    "run_$part" >"$out/$part.log" 2>&1
    status=$?
    if [ $status -eq 0 ]; then
        echo "$part $hash" >>"$out/done"
        echo "== $part: passed in $((SECONDS - begin)) s"
    else
        failed="$failed $part"
        echo "== $part: FAILED with status $status after $((SECONDS - begin)) s"
        grep -v '^SKIPPED' "$out/$part.log" | tail -30
        [ "$part" = build ] && break
    fi
done

echo
for part in $parts; do
    case $part in
        parity) [ -f "$out/parity.log" ] && grep -E '^(FAILED|ERROR)|(passed|failed|error).* in ' "$out/parity.log" ;;
        sanitize) [ -f "$out/sanitize.log" ] && grep -E 'SUMMARY|exit status' "$out/sanitize.log" ;;
        bench) [ -f "$out/bench.jsonl" ] && "$python" -m benchmarks.gpu --table --output "$out/bench.jsonl" ;;
    esac
done
echo "total $SECONDS s; failed:${failed:- nothing}"
[ -z "$failed" ]
