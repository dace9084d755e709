#!/usr/bin/env bash
# Create the work pools and deployments on the Prefect server at $PREFECT_API_URL. Safe to call again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
: "${PREFECT_API_URL:?set it to the address of your Prefect server, for example http://127.0.0.1:4200/api}"
# Two words are possible: `python -m prefect`.
prefect="${PREFECT:-.venv/bin/prefect}"
export SPARSEFORGE_CHECKOUT="${SPARSEFORGE_CHECKOUT:-$PWD}"
for pool in grids cpu gpu-1 gpu-8; do
  # A pool that is there keeps its settings: someone may have paused or limited it.
  $prefect work-pool inspect "$pool" >/dev/null 2>&1 || $prefect work-pool create "$pool" --type process >/dev/null
done
$prefect --no-prompt deploy --all --prefect-file infra/prefect.yaml
