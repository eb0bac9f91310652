#!/usr/bin/env bash
# Create .venv in the checkout, with fxprune and one of its extras; does nothing if it exists.
# Usage: tools/setup.sh EXTRA        (examples or test)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extra=${1:?name an extra: examples or test}

find_python() {
    for name in python3.11 python3.12 python3.13 python3.14 python3; do
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$name"
            return
        fi
    done
    echo "fxprune needs Python 3.11 or newer, and there is none on the PATH" >&2
    exit 1
}

# The marker is written last, and names what was installed: a half-made .venv is completed, and a
# changed pyproject.toml is installed again.
marker=.venv/.fxprune-$extra
wanted=$(cksum <pyproject.toml)
if [[ -f $marker && $(<"$marker") == "$wanted" ]]; then
    exit 0
fi
if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    python=$(find_python)
    "$python" -m venv --clear .venv
fi
echo "installing fxprune[$extra] into .venv; the first time downloads PyTorch" >&2
# One command, so that pip finds versions of torch, torchvision and timm that fit each other.
.venv/bin/python -m pip install --quiet --editable ".[$extra]"
echo "$wanted" >"$marker"
