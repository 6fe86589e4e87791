#!/usr/bin/env bash
# Trains on several machines without a scheduler: the same command on each of them, at about the same time.
#   HEAD=node0 NODES=4 GPUS=8 configs/launch/several_machines.sh --data.file FINEWEB_EDU.jsonl
# HEAD is the name of one of them, which the others can reach at PORT. The code, and the folders of data and runs, must
# be the same on all (a shared disk); processes that were started differently are refused.
set -euo pipefail
gpus=${GPUS:-8}
nodes=${NODES:-4}
config=${CONFIG:-gpt2_124m_nodes}
run=${RUN:-$config}

exec "${PYTHON:-python}" -m torch.distributed.run --nnodes "$nodes" --nproc_per_node "$gpus" \
  --rdzv_id "$run" --rdzv_backend c10d --rdzv_endpoint "${HEAD:?is to name the machine to meet at}:${PORT:-29500}" \
  -m minigpt train --config "$config" --run_name "$run" --resume auto \
  --trainer.num_nodes "$nodes" --trainer.devices "$gpus" "$@"
