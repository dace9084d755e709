#!/usr/bin/env bash
# Start one worker of a work pool: infra/worker.sh POOL [LIMIT]. Grids need one of 'grids' and one of each pool they use.
# A worker drains one device set, so it runs one drain at a time; that of 'grids' only waits, and takes any number.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
: "${PREFECT_API_URL:?set it to the address of your Prefect server, for example http://127.0.0.1:4200/api}"
pool="${1:?name a work pool: grids, cpu, gpu-1 or gpu-8}"
limit=()
[[ "$pool" == grids && -z "${2:-}" ]] || limit=(--limit "${2:-1}")
# A script's background jobs ignore SIGINT, which is how a worker ends itself on SIGTERM: give it the default back.
# $SPARSEFORGE_WORKER_HEALTH makes it answer on $PREFECT_WORKER_WEBSERVER_PORT, which one worker of a machine can have.
exec env --default-signal=INT PREFECT_WORKER_QUERY_SECONDS="${PREFECT_WORKER_QUERY_SECONDS:-2}" \
  ${PREFECT:-.venv/bin/prefect} worker start --pool "$pool" "${limit[@]}" --name "$pool-$(hostname)-$$" \
  ${SPARSEFORGE_WORKER_HEALTH:+--with-healthcheck}
