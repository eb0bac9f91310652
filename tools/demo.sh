#!/usr/bin/env bash
# Compile the digits network to half its MACs and parameters, into out/digits.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
tools/setup.sh examples
exec .venv/bin/fxprune compile examples/digits/digits.safetensors \
    --arch examples.digits.model:digits_net --data digits \
    --target macs=50% --target params=50% --epochs 25 -o out/digits "$@"
