#!/usr/bin/env bash
# Trains on all GPUs of this machine with torchrun. Arguments are passed to `minigpt train`.
#   GPUS=8 CONFIG=gpt2_124m configs/launch/one_machine.sh --data.file FINEWEB_EDU.jsonl
# torchrun is optional: `minigpt train` also starts one process per GPU, and after a signal it waits until the
# checkpoint is saved. torchrun kills processes that still run 30 seconds after a signal (some versions have
# --shutdown_timeout).
set -euo pipefail
gpus=${GPUS:-8}
config=${CONFIG:-gpt2_124m}
run=${RUN:-$config}

exec "${PYTHON:-python}" -m torch.distributed.run --standalone --nproc_per_node "$gpus" \
  -m minigpt train --config "$config" --run_name "$run" --resume auto --trainer.devices "$gpus" "$@"
