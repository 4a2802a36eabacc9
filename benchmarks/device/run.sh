#!/usr/bin/env bash
# Everything that one GPU can tell about this project, in minutes:
#
#     benchmarks/device/run.sh [--wheels DIR] [--out DIR] [--minutes 8] [--rehearse] [--only PART ...] [--commit ID]
#
# Needs Python with PyTorch, NumPy, SciPy, safetensors, scikit-learn, tqdm, hypothesis and pytest, and no network. Five parts
# run in order of worth, each within a time of its own: correct, overhead, chains, batch_cost, fpdm. Each writes DIR/PART.json
# as it goes; DIR/summary.json and a table come last. --rehearse runs the same code with tiny sizes on the CPU.
# Pictures are made later, from the JSON alone: python -m benchmarks.device.report DIR
#
# What such a machine lacks comes as wheels, all in pure Python; what needs a missing one is left out by name:
#
#     diffusers==0.42.1            (needs huggingface_hub 1.32 or later on the machine)
#     importlib_metadata==10.2.0   (imported by diffusers)
#     lazy_importer==0.1.0         (imported by importlib_metadata)
#     zipp==4.1.2                  (imported by importlib_metadata)
#     torchdeq==0.1.0
#
# These two commands fetch them, where there is a network:
#
#     mkdir -p wheels
#     python3 -m pip download --no-deps --only-binary=:all: -d wheels diffusers==0.42.1 importlib_metadata==10.2.0 lazy_importer==0.1.0 zipp==4.1.2 torchdeq==0.1.0
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=${PYTHON:-python3}
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT

arguments=("$@")
wheels=
while [ $# -gt 0 ]; do
    case $1 in
        --wheels=*) wheels=${1#--wheels=} ;;
        --wheels) wheels=${2:?--wheels needs a folder} ;;
    esac
    shift
done

if [ -n "$wheels" ]; then
    # One by one: a wheel that does not fit this machine costs what needs it, and nothing else.
    for wheel in "$wheels"/*.whl; do
        "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "$wheel" ||
            echo "not installed: $wheel" >&2
    done
fi

export PYTHONPATH="$root:$site${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 DIFFUSERS_VERBOSITY=error
"$python" -m benchmarks.device "${arguments[@]}"
