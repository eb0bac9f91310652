#!/usr/bin/env bash
# Run all checks: style, types, sizes, rendered docs, tests. Arguments are passed to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
tools/setup.sh test
exec .venv/bin/python tools/check.py "$@"
