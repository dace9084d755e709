#!/usr/bin/env bash
# Audit the dependencies: offline first (infra/audit.py), then advisories of every locked version by pip-audit, which
# lives in a folder of its own and asks the network; a package that it cannot judge is an error, not silence. Exit codes:
# 1 something was found; 3 advisories were out of reach.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

.venv/bin/python infra/audit.py

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"${PYTHON:-python3}" -m venv "$scratch/venv"
if ! "$scratch/venv/bin/python" -m pip install --quiet --disable-pip-version-check "pip-audit>=2.7,<3" 2>"$scratch/said"; then
  echo "audit: advisories were NOT checked, pip-audit cannot be installed: $(tail -n 1 "$scratch/said")" >&2
  exit 3
fi
# The locks name every package, so nothing is resolved; a condition after a pin would be.
grep -hv '^#' requirements.lock requirements-dev.lock | sed 's/ ;.*//' >"$scratch/locked"
code=0
"$scratch/venv/bin/pip-audit" --requirement "$scratch/locked" --no-deps --disable-pip --strict --progress-spinner off \
  2>"$scratch/said" || code=$?
# "Could not connect to PyPI's vulnerability feed" is no finding, and its last line says what its traceback does.
if ((code)) && ! grep -qE '^Found [0-9]+ known vulnerabilit' "$scratch/said"; then
  echo "audit: advisories were NOT checked, they are out of reach from here: $(tail -n 1 "$scratch/said")" >&2
  exit 3
fi
cat "$scratch/said" >&2
exit "$code"
