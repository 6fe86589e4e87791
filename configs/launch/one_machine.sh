#!/usr/bin/env bash
# Trains on all GPUs of this machine, started by torchrun; more flags of `minigpt train` may follow.
#   GPUS=8 CONFIG=gpt2_124m configs/launch/one_machine.sh --data.file FINEWEB_EDU.jsonl
# `minigpt train` starts its processes itself just as well, and then waits for a save however long it takes; torchrun
# kills what has not left 30 seconds after a signal, unless told otherwise (--shutdown_timeout, where it has that).
set -euo pipefail
gpus=${GPUS:-8}
config=${CONFIG:-gpt2_124m}
run=${RUN:-$config}

exec "${PYTHON:-python}" -m torch.distributed.run --standalone --nproc_per_node "$gpus" \
  -m minigpt train --config "$config" --run_name "$run" --resume auto --trainer.devices "$gpus" "$@"
