#!/usr/bin/env bash
# Trains on several nodes: sbatch examples/slurm.sh --data.corpus CORPUS [more arguments of msa-train fit]
# Submitted again, it goes on from the run's last checkpoint. The run's folder must be on a disk that all nodes share.
#SBATCH --job-name=msa-train
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#SBATCH --requeue
#SBATCH --signal=USR1@300
set -euo pipefail

name=${NAME:-qwen3_4b_slurm}
runs=${RUNS:-checkpoints}
export OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK

resume=(--overwrite true)  # of a run that was ended before its first checkpoint
if compgen -G "$runs/$name/step=*.ckpt" > /dev/null; then
  resume=(--ckpt_path last)
fi

# a task per GPU: Lightning reads the ranks from SLURM, and devices must be the tasks of a node
code=0
srun --kill-on-bad-exit=1 msa-train fit \
  --config configs/qwen3_4b/model.yaml \
  --config configs/qwen3_4b/pretrain.yaml \
  --config configs/strategy/zero2.yaml \
  --trainer.num_nodes "$SLURM_NNODES" \
  --trainer.devices "$SLURM_NTASKS_PER_NODE" \
  --name "$name" --runs "$runs" \
  "${resume[@]}" "$@" || code=$?

# told to stop, five minutes before its time was up, the run has saved its step and asks to be started again
if [[ $code == 75 ]]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
