#!/usr/bin/env bash
# Make .venv from the locks with plain pip: all that running needs, and with --dev all that testing needs too.
# Called again it does nothing until a lock, pyproject.toml or this script changes, or the checkout moves.
# $PYTHON names the interpreter to use; the default is the first suitable one on PATH.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf 'setup: %s\n' "$*" >&2; }
fail() { say "$*"; exit 1; }

case "${1:-}" in
  "") locks=(requirements.lock) profile=run ;;
  --dev) locks=(requirements.lock requirements-dev.lock) profile=dev ;;
  *) fail "unknown argument '$1'; the only one is --dev" ;;
esac

# What an environment was made from. It holds absolute paths, so the folder and the interpreter belong to that.
state_of() {
  { pwd; readlink -f .venv/bin/python; cat infra/setup.sh pyproject.toml "$@"; } 2>/dev/null | sha256sum | cut -d' ' -f1
}
other_python() {
  [[ -n "${PYTHON:-}" && "$("$PYTHON" --version 2>&1)" != "$(.venv/bin/python --version 2>&1)" ]]
}
ready() {
  [[ -x .venv/bin/python && ! -e .venv/.unfinished ]] && ! other_python \
    && [[ "$(cat ".venv/.ready-$profile" 2>/dev/null)" == "$(state_of "${locks[@]}")" ]]
}
if ready; then exit 0; fi

mkdir -p .venv
exec 9>.venv/.lock
flock 9 # two commands at a time: the second finds the first one's work
if ready; then exit 0; fi

suitable() { "$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null; }

find_python() {
  local candidate
  if [[ -n "${PYTHON:-}" ]]; then
    suitable "$PYTHON" || fail "PYTHON=$PYTHON cannot be used: Python 3.11, 3.12 or 3.13 with its venv module is needed"
    echo "$PYTHON"
    return
  fi
  for candidate in python3 python3.11 python3.12 python3.13; do
    if suitable "$candidate"; then
      echo "$candidate"
      return
    fi
  done
  fail "Python 3.11, 3.12 or 3.13 with its venv module is needed; found: $(python3 --version 2>&1 || true)." \
    "On Debian and Ubuntu: apt-get install python3-venv. Elsewhere, name one: make PYTHON=/path/to/python3.12 ..."
}

# Nothing is compiled on installation: the few modules that are really imported compile themselves at first use.
pip_install() {
  .venv/bin/python -m pip install --quiet --no-input --disable-pip-version-check --no-compile "$@"
}

install_torch() {
  local version said
  version=$(sed -n 's/^torch==//p' requirements.lock)
  if .venv/bin/python -c "import importlib.metadata as m, sys; sys.exit(m.version('torch').split('+')[0] != '$version')" \
    2>/dev/null; then
    return
  fi
  if nvidia-smi -L >/dev/null 2>&1; then
    say "torch $version with CUDA libraries: nvidia-smi sees a GPU"
    pip_install --constraint requirements.lock "torch==$version"
    return
  fi
  if said=$(pip_install --no-deps "torch==$version+cpu" 2>&1); then
    say "torch $version, CPU build: there is no GPU"
  elif [[ "$said" == *"No matching distribution"* || "$said" == *ResolutionImpossible* ]]; then
    # The second is what pip says of a build that is not on offer where the site's configuration constrains torch.
    say "no CPU build of torch $version is on offer, so the default build comes with gigabytes of CUDA libraries;" \
      "to avoid them, set PIP_EXTRA_INDEX_URL to PyTorch's CPU wheel index and call this again"
    pip_install --constraint requirements.lock "torch==$version"
  else
    fail "torch $version could not be installed: $said"
  fi
}

# Scripts in a virtual environment begin with its path: after a move they would start another checkout's Python.
usable() {
  [[ ! -e .venv/.unfinished ]] && ! other_python && .venv/bin/python -m pip --version >/dev/null 2>&1 \
    && head -n 3 .venv/bin/pip | grep -qF "$PWD/.venv/"
}
if ! usable; then
  python=$(find_python)
  say "creating .venv with $("$python" --version)"
  find .venv -mindepth 1 -maxdepth 1 ! -name .lock -exec rm -rf {} +
  "$python" -m venv .venv
fi

count=$(cat "${locks[@]}" | grep -c '==')
say "installing $count packages; about two minutes the first time"
touch .venv/.unfinished # an installation that was cut off is begun afresh
pip_install --no-deps "$(grep '^setuptools==' requirements.lock)"
install_torch
for lock in "${locks[@]}"; do
  # The three source packages among them are built with the setuptools just installed, not with one fetched for each.
  pip_install --no-deps --no-build-isolation --use-pep517 --requirement "$lock"
done
pip_install --no-deps --no-build-isolation --editable .
rm .venv/.unfinished
state_of "${locks[@]}" >".venv/.ready-$profile"
if [[ "$profile" == dev ]]; then state_of requirements.lock >.venv/.ready-run; fi
say "ready"
