#!/usr/bin/env bash
# One training run on one GPU of a SLURM cluster. From a checkout of this project on a shared disk:
#
#   sbatch docs/examples/slurm.sh runs/walker --configs dmc_vision --task dmc_walker_walk
#
# The first argument is the logdir; the others go to `dreamer train`. Three minutes before the time limit the run gets
# SIGTERM, saves a checkpoint and ends; the job then queues itself again and resumes. The same at a preemption, where
# the cluster sends the job's signal then (PreemptParameters=send_user_signal); otherwise it resumes from the newest
# checkpoint, at most run.checkpoint_minutes old.
#SBATCH --job-name=dreamer
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=8
#SBATCH --mem=32G
#SBATCH --time=08:00:00
#SBATCH --signal=B:TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=dreamer-%j.log
set -uo pipefail

logdir="${1:?expected the logdir as the first argument, then options of dreamer train}"
shift
cd "${SLURM_SUBMIT_DIR:-.}" || exit 2
source .venv/bin/activate || exit 2

stopped=""
dreamer train "$@" --logdir "$logdir" --run.platform gpu --run.display false &
child=$!
trap 'stopped=yes; kill -TERM "$child"' TERM

# A signal interrupts the waiting, not the run, which is still writing its checkpoint.
while kill -0 "$child" 2>/dev/null; do wait "$child"; done
wait "$child"
code=$?
[ -z "$stopped" ] || [ "$code" != 0 ] || scontrol requeue "$SLURM_JOB_ID"
exit "$code"
