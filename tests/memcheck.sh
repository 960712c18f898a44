#!/bin/sh
# The C core under valgrind (make valgrind): tests/core.c makes all that a call may not read inaccessible, and looks at
# whether all it writes is defined; then nothing may be left allocated. Valgrind knows no AVX-512, so "cpu" is AVX2.
set -eu
cd "$(dirname "$0")/.."
if ! command -v valgrind >/dev/null; then
    echo "make valgrind: valgrind is missing (Debian: apt install valgrind)" >&2
    exit 1
fi
build=build/valgrind
mkdir -p "$build"
cc=${CC:-cc}
sources=$(find csrc -name '*.c' ! -name 'py_*.c')
# shellcheck disable=SC2086 # a list of files
$cc -std=c11 -D_GNU_SOURCE -O2 -g -ffp-contract=off -Wall -Wextra -Werror -DBTX_MEMCHECK -Icsrc tests/core.c $sources \
    kernels/cpu/executor.c kernels/cpu/variant_*.c -o "$build/core" -pthread -lm -ldl
for backend in cpu cpu:scalar; do
    valgrind --quiet --error-exitcode=1 --leak-check=full --show-leak-kinds=all --errors-for-leak-kinds=all \
        "$build/core" memory "$backend"
done
echo "make valgrind: no error in the C core"
