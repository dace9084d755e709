#!/usr/bin/env bash
# Submit the cells of this bundle, each level after those whose models it reads. Options go to every sbatch:
# ./submit.sh --partition=gpu --gres=gpu:1 --time=8:00:00
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
