#!/usr/bin/env bash
# Written by `xtuner launch --scheduler dlc`. The start command of a PyTorch job: every node runs it once, and
# `xtuner train` starts one process per GPU. Disks must be mounted at the same paths as on the machine that wrote this.
set -eu

config=@{config}
work_dir=@{work_dir}

export NPROC_PER_NODE="${KUBERNETES_CONTAINER_RESOURCE_GPU}"
export PORT="${MASTER_PORT}"
export NNODES="${WORLD_SIZE}"
export NODE_RANK="${RANK}"
export ADDR="${MASTER_ADDR}"
export XTUNER_MEET_SECONDS="${XTUNER_MEET_SECONDS:-600}"  # nodes start at different times

# exec: training receives signals, and its exit code is that of the node
exec xtuner train "$config" @{engine} --work-dir "$work_dir" --resume auto
