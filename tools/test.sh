#!/usr/bin/env bash
# Everything that has to pass: style, types, sizes, rendered docs, tests. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
tools/setup.sh test
exec .venv/bin/python tools/check.py "$@"
