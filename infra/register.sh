#!/usr/bin/env bash
# Make pools, automations and deployments on the Prefect server at $PREFECT_API_URL: see register.py. Safe to call again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
: "${PREFECT_API_URL:?set it to the address of your Prefect server, for example http://127.0.0.1:4200/api}"
exec "${PYTHON:-.venv/bin/python}" infra/register.py "$@"
