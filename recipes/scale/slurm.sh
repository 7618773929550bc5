#!/bin/bash
# One run on several nodes that outlives its time limit: sbatch recipes/scale/slurm.sh
# Submit with the environment active (`. .venv/bin/activate`), so that `koff` is found on all nodes.
#SBATCH --job-name=koff
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8        # one process for each GPU
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append         # the log goes on where it was
#SBATCH --signal=TERM@300          # five minutes before the end: a step and a checkpoint must fit in
set -u

CONFIG=${CONFIG:-llama31_8b_12pct.yaml}
ROOT=${ROOT:-runs/${CONFIG%.yaml}}

export OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK

# --offline: `koff prepare --prefetch-only` on a node with network has fetched everything; what is missing is listed.
# --kill-on-bad-exit: one process that fails ends all; on SIGTERM all leave together, after the checkpoint is written.
srun --kill-on-bad-exit=1 koff fit --offline --config "$CONFIG" --config hardware/fsdp.yaml \
    --trainer.num_nodes="$SLURM_NNODES" --trainer.devices="$SLURM_NTASKS_PER_NODE" \
    --trainer.default_root_dir="$ROOT" --ckpt_path last
status=$?

# 143 near the end of the time: asked to end (SIGTERM); the checkpoint of that very step is written. Anything else is a
# failure to look at, also an earlier 143: srun ends the others by SIGTERM when one process has failed.
if [ "$status" -eq 143 ] && [ "$(date +%s)" -ge "$((${SLURM_JOB_END_TIME:-0} - 600))" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
