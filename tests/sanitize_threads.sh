#!/bin/sh
# Threads under ThreadSanitizer (make tsan): the C core in tests/core.c, and the extension from Python threads.
# Of the process only our own code is watched, and what the C library and locks do; a report ends the run.
set -eu
cd "$(dirname "$0")/.."
python=$PWD/.venv/bin/python
build=build/tsan
rounds="${TSAN_ROUNDS:-24}"
rm -rf "$build"
mkdir -p "$build"
cp -r setup.py pyproject.toml README.md LICENSE csrc kernels bottleneck_ext python tests "$build"
rm -f "$build"/bottleneck_ext/*.so
cd "$build"
BOTTLENECKED_SANITIZE=thread BOTTLENECKED_WERROR=1 "$python" setup.py --quiet build_ext --inplace --build-temp objects

cc=${CC:-cc}
objects=$(find objects -name '*.o' ! -name 'py_*.o')
# shellcheck disable=SC2086 # a list of files
$cc -std=c11 -D_GNU_SOURCE -O1 -g -fsanitize=thread -Wall -Wextra -Werror -Icsrc tests/core.c $objects -o core \
    -pthread -lm -ldl

export TSAN_OPTIONS="halt_on_error=1 exitcode=66 second_deadlock_stack=1 ${TSAN_OPTIONS:-}"
# The runtime of older compilers wants memory where a randomised address space may not have it.
fixed=""
if setarch "$(uname -m)" -R true 2>/dev/null; then fixed="setarch $(uname -m) -R"; fi
for backend in cpu cpu:scalar; do
    $fixed ./core threads "$backend" "$rounds"
done
PYTHONPATH="$PWD:$PWD/python" LD_PRELOAD="$($cc -print-file-name=libtsan.so)" $fixed "$python" -m tests.threads 6
echo "make tsan: no data race in the C core and the extension"
