#!/bin/sh
# The tests of the C core and the extension under AddressSanitizer and UndefinedBehaviorSanitizer (make asan).
# The sanitized extension lives in a copy of the package, so that the ordinary build stays as it is.
set -eu
cd "$(dirname "$0")/.."
python=$PWD/.venv/bin/python
build=build/asan
rm -rf "$build"
mkdir -p "$build"
cp -r setup.py pyproject.toml README.md LICENSE csrc kernels bottleneck_ext python tests "$build"
rm -f "$build"/bottleneck_ext/*.so
cd "$build"
BOTTLENECKED_SANITIZE=address,undefined BOTTLENECKED_WERROR=1 "$python" setup.py --quiet build_ext --inplace

# The interpreter is not sanitized, so the runtimes come first; it also keeps memory at exit by design.
cc=${CC:-cc}
LD_PRELOAD="$($cc -print-file-name=libasan.so) $($cc -print-file-name=libubsan.so)"
export LD_PRELOAD
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=1:allocator_may_return_null=1
export UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
export PYTHONPATH="$PWD:$PWD/python"
export BOTTLENECKED_PARITY_EXAMPLES="${BOTTLENECKED_PARITY_EXAMPLES:-60}"
"$python" -c "import bottleneck_ext._core as m; assert '/asan/' in m.__file__, m.__file__"
"$python" -m pytest -q -p no:cacheprovider "$@" \
    tests/test_extension.py tests/test_linear.py tests/test_parity.py tests/test_config.py tests/test_boundary.py \
    tests/test_checkpoint.py tests/test_reference.py
echo "make asan: no memory error and no undefined behaviour in the C core and the extension"
