#!/usr/bin/env bash
# Draw the secrets that docker-compose.yml asks for, as lines of an .env file: infra/secrets.sh > .env
# Letters and digits only, so that they may stand in a URL. Keep the file to yourself: it is the stack's only key.
set -euo pipefail
umask 077
draw() { LC_ALL=C tr -dc 'A-Za-z0-9' </dev/urandom 2>/dev/null | head -c "${1:-32}" || true; }
cat <<LINES
SPARSEFORGE_DB_USER=sparseforge
SPARSEFORGE_DB_PASSWORD=$(draw)
SPARSEFORGE_PREFECT_AUTH=sparseforge:$(draw)
SPARSEFORGE_MLFLOW_USER=sparseforge
SPARSEFORGE_MLFLOW_PASSWORD=$(draw)
SPARSEFORGE_MLFLOW_SECRET=$(draw 48)
LINES
