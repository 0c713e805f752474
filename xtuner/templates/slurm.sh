#!/usr/bin/env bash
# Written by `xtuner launch --scheduler slurm`. Submit it from a shell where `xtuner` is on PATH: sbatch passes PATH on.
#SBATCH --job-name=@{name}
#SBATCH --nodes=@{nodes}
#SBATCH --ntasks-per-node=@{gpus}
#SBATCH --gpus-per-node=@{gpus}
@{directives}#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=USR1@@300
# Tasks receive USR1 300 s before the time limit: they finish the iteration, save and exit with 75.
# More CPUs per task: sbatch --cpus-per-task=16 THIS_FILE; other options of sbatch can be added in the same way.
set -u

config=@{config}
work_dir=@{work_dir}

command -v xtuner > /dev/null || { echo "xtuner is not on PATH: activate its environment, then sbatch" >&2; exit 2; }
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then
    export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"  # since Slurm 22.05 srun does not inherit it
fi
echo "job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, restart ${SLURM_RESTART_COUNT:-0}"

# --wait: when a task has ended, the others have 60 s; after that, tasks that hang in a collective are killed.
srun --wait=60 xtuner train "$config" --launcher slurm @{engine} --work-dir "$work_dir" --resume auto
code=$?

# 75: stopped on request and saved. A job that was cancelled, or that Slurm itself requeues, is no longer RUNNING.
if [ "$code" -eq 75 ] && [ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" = RUNNING ]; then
    echo "stopped and saved: starting again from the checkpoint"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
