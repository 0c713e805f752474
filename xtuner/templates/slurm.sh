#!/usr/bin/env bash
# Written by `xtuner launch --scheduler slurm`. Submit it from a shell in which `xtuner` runs: sbatch keeps its PATH.
#SBATCH --job-name=@{name}
#SBATCH --nodes=@{nodes}
#SBATCH --ntasks-per-node=@{gpus}
#SBATCH --gpus-per-node=@{gpus}
@{directives}#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=USR1@@300
# USR1 goes to the tasks 300 s before the time limit: they finish the iteration, save and end with 75.
# More CPUs a task: sbatch --cpus-per-task=16 THIS_FILE; any other option of sbatch can be added in the same way.
set -u

config=@{config}
work_dir=@{work_dir}

command -v xtuner > /dev/null || { echo "xtuner is not on PATH: activate its environment, then sbatch" >&2; exit 2; }
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then
    export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"  # since Slurm 22.05 srun does not take it over by itself
fi
echo "job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, restart ${SLURM_RESTART_COUNT:-0}"

# --wait: when a task has ended, the others have 60 s; those that hang in a collective are killed then.
srun --wait=60 xtuner train "$config" --launcher slurm @{engine} --work-dir "$work_dir" --resume auto
code=$?

# 75: stopped on request, and saved. A job that was cancelled, or that Slurm requeues itself, is no longer RUNNING.
if [ "$code" -eq 75 ] && [ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" = RUNNING ]; then
    echo "stopped and saved: starting again where it stopped"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
