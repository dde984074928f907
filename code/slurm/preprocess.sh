#!/bin/bash
# One job a section. Set the dataset and its sections; then:
#   job=$(sbatch --parsable code/slurm/preprocess.sh)
#   sbatch --dependency=afterok:$job --wrap ". .venv/bin/activate && python code/preprocess_spatialLIBD_2.py"
# The second line chooses the panels once all sections are done; it reads no section again.
#SBATCH --job-name=heclip-preprocess
#SBATCH --array=0-7
#SBATCH --cpus-per-task=2
#SBATCH --mem=8G
#SBATCH --time=00:30:00

cd "$SLURM_SUBMIT_DIR"
. .venv/bin/activate
sections=(151669 151670 151671 151672 151673 151674 151675 151676)
python code/preprocess_spatialLIBD_2.py --section "${sections[$SLURM_ARRAY_TASK_ID]}"
