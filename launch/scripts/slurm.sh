#!/usr/bin/env bash
# Slurm: one task a node, which starts the ranks of its node.
#
#     sbatch --nodes 4 slurm.sh train.py --its options
#
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
set -euo pipefail
export NODES=$SLURM_JOB_NUM_NODES JOB=$SLURM_JOB_ID
HOST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export HOST
# sbatch runs a copy of this file, so the other script is looked for where the job was submitted.
# srun does not take over --cpus-per-task from sbatch (Slurm 22.05 and newer), so it is told.
exec srun ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} bash "${CPATTN_SCRIPTS:-$SLURM_SUBMIT_DIR}/several_nodes.sh" "$@"
