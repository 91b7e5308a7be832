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
set -euo pipefail

name=${NAME:-qwen3_4b_slurm}
runs=${RUNS:-checkpoints}
export OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK

resume=()
if compgen -G "$runs/$name/last*.ckpt" > /dev/null; then
  resume=(--ckpt_path last)
fi

# a task per GPU: Lightning reads the ranks from SLURM, and devices must be the tasks of a node
srun --kill-on-bad-exit=1 msa-train fit \
  --config configs/qwen3_4b/model.yaml \
  --config configs/qwen3_4b/pretrain.yaml \
  --config configs/strategy/zero2.yaml \
  --trainer.num_nodes "$SLURM_NNODES" \
  --trainer.devices "$SLURM_NTASKS_PER_NODE" \
  --name "$name" --runs "$runs" \
  "${resume[@]}" "$@"
