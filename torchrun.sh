#!/usr/bin/env bash
# Trains: ./torchrun.sh [RECIPE.yaml] [section.key=value ...], from recipes/quickstart.yaml if no recipe is named.
# Paths count from this folder. Exit codes are the engine's (README). What starts where, each variable with its default:
#
#   NPROC_PER_NODE                 processes here: one per GPU that CUDA_VISIBLE_DEVICES leaves, two without a GPU
#   NNODES NODE_RANK MASTER_ADDR   one node; several take the same command on each, or one `srun --ntasks-per-node=1`
#   MASTER_PORT                    29500, or derived from the Slurm job
#   OMP_NUM_THREADS                on CPU: cores / processes
#   MAX_RESTARTS                   0; how often all ranks start again after one failed, from the newest checkpoint
#
# SIGTERM, SIGINT, SIGUSR1, a terminal that closes: all ranks finish their step, save, and 75 is returned; a second one ends them at once.
set -euo pipefail
cd "$(dirname "$0")"

fail() {  # NAME TEXT
  echo "ERROR E-LAUNCH-$1 $2" >&2
  exit 2
}

nodes=${NNODES:-${SLURM_NNODES:-1}}
[[ $nodes =~ ^[1-9][0-9]*$ ]] || fail NODES "NNODES: got $nodes, expected a whole number from 1"
if [ "$nodes" = 1 ]; then
  place=(--standalone)
  told="1 node"
else
  node=${NODE_RANK:-${SLURM_NODEID:-}}
  address=${MASTER_ADDR:-}
  if [ -z "$address" ] && [ -n "${SLURM_JOB_NODELIST:-}" ]; then
    read -r address < <(scontrol show hostnames "$SLURM_JOB_NODELIST") || true
  fi
  port=29500
  [ -z "${SLURM_JOB_ID:-}" ] || port=$((15000 + SLURM_JOB_ID % 15000))  # jobs may share a node, so each has its own
  port=${MASTER_PORT:-$port}
  [[ $node =~ ^[0-9]+$ ]] && ((node < nodes)) ||
    fail NODES "NODE_RANK: got '$node' with $nodes nodes, expected 0 to $((nodes - 1)), another on each node"
  [ -n "$address" ] || fail NODES "MASTER_ADDR: is not set with $nodes nodes, expected the host name of the node with NODE_RANK=0"
  [ "${SLURM_LOCALID:-0}" = 0 ] || fail NODES "srun: started several launchers on a node, expected --ntasks-per-node=1"
  place=(--nnodes "$nodes" --node-rank "$node" --master-addr "$address" --master-port "$port")
  told="node $node of $nodes, meeting at $address:$port"
fi

gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ' || true)
if [ "$gpus" != 0 ] && [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
  gpus=$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -cE '^ *([0-9]|GPU-|MIG-)' || true)
fi
ranks=${NPROC_PER_NODE:-$((gpus > 0 ? gpus : 2))}
[[ $ranks =~ ^[1-9][0-9]*$ ]] || fail RANKS "NPROC_PER_NODE: got $ranks, expected a whole number from 1"
[[ ${MAX_RESTARTS:-0} =~ ^[0-9]+$ ]] || fail RESTARTS "MAX_RESTARTS: got $MAX_RESTARTS, expected a whole number"
[ "${MAX_RESTARTS:-0}" = 0 ] || place+=(--max-restarts "$MAX_RESTARTS")

source ./environment.sh hub
if [ "$gpus" = 0 ]; then
  if [ -z "${OMP_NUM_THREADS:-}" ]; then
    cores=$(nproc 2>/dev/null || "$python" -c 'import os; print(os.cpu_count())')
    export OMP_NUM_THREADS=$((cores > ranks ? cores / ranks : 1))
  fi
  told="CPU, OMP_NUM_THREADS=$OMP_NUM_THREADS; $told"
else
  told="GPU; $told"
fi
[[ " $* " =~ " "(-h|--help)" " ]] || echo "Starting $ranks rank(s) per node on $told" >&2
exec "$python" -m engine.launch "${place[@]}" --nproc-per-node "$ranks" -m engine.train "$@"
