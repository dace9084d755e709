#!/usr/bin/env bash
# One cell of a bundle for each index of a SLURM job array; `submit.sh` beside it submits the levels in order.
# $SPARSEFORGE_PYTHON is a Python with torch and transformers (default python3); nothing else is needed, no network, no
# database, no secret. More options for every job: ./submit.sh --partition=gpu --gres=gpu:1 --time=8:00:00
#SBATCH --job-name=sparseforge
#SBATCH --output=array-%A_%a.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:TERM@120
set -uo pipefail
bundle="${SPARSEFORGE_BUNDLE:-${SLURM_SUBMIT_DIR:-$PWD}}"
: "${SLURM_ARRAY_TASK_ID:?this is a job array: start it with ./submit.sh, or set it to the index of a cell}"
export PYTHONPATH="$bundle/code${PYTHONPATH:+:$PYTHONPATH}" TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"

"${SPARSEFORGE_PYTHON:-python3}" -m sparseforge_core.run bundle "$bundle" --index "$SLURM_ARRAY_TASK_ID" &
child=$!
# SLURM tells the shell alone (B:), 120 s before the time is over or when it preempts: the training saves and ends.
trap 'asked=1; kill -TERM "$child" 2>/dev/null' TERM
while :; do # a signal ends `wait`, not the child
  asked=0 code=0
  wait "$child" || code=$?
  [ "$asked" = 1 ] || break
done

# 130: stopped with a checkpoint. The same index again goes on from there.
if [ "$code" = 130 ] && [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then
  echo "cell $SLURM_ARRAY_TASK_ID was stopped and saved; it goes back into the queue"
  exec scontrol requeue "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"
fi
exit "$code"
