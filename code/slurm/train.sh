#!/bin/bash
# Train on 2 nodes of 8 GPUs. Set the dataset, and what your cluster asks for; then: sbatch code/slurm/train.sh
# Whenever the job is stopped, submit it again: --resume goes on after the last finished epoch.
#SBATCH --job-name=heclip
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=04:00:00

cd "$SLURM_SUBMIT_DIR"
. .venv/bin/activate
host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun --nnodes "$SLURM_NNODES" --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint "$host:29500" \
    --rdzv_id "$SLURM_JOB_ID" code/main.py --dataset spatialLIBD_2 --type heg --batch_size 1024 --resume
