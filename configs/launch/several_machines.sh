#!/usr/bin/env bash
# Trains on several machines without a scheduler. Run the same command on each machine, at about the same time:
#   HEAD=node0 NODES=4 GPUS=8 configs/launch/several_machines.sh --data.file FINEWEB_EDU.jsonl
# HEAD is the host name of one machine; the others must be able to reach it at PORT (default 29500). Code, data folder
# and runs folder must be the same on all machines (a shared disk). Processes with other settings are refused.
set -euo pipefail
gpus=${GPUS:-8}
nodes=${NODES:-4}
config=${CONFIG:-gpt2_124m_nodes}
run=${RUN:-$config}

exec "${PYTHON:-python}" -m torch.distributed.run --nnodes "$nodes" --nproc_per_node "$gpus" \
  --rdzv_id "$run" --rdzv_backend c10d --rdzv_endpoint "${HEAD:?must name one of the machines}:${PORT:-29500}" \
  -m minigpt train --config "$config" --run_name "$run" --resume auto \
  --trainer.num_nodes "$nodes" --trainer.devices "$gpus" "$@"
