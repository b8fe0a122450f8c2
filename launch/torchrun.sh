#!/usr/bin/env bash
# torchrun on every machine of a job; ends with the job's own exit code (75: queue again).
#
#   launch/torchrun.sh train launch/recipes/demo.yaml                        # one machine
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 launch/torchrun.sh train ...   # on each machine, with its NODE_RANK
#
# NPROC_PER_NODE: ranks a machine; default: its GPUs, or 2 on CPUs. Arguments are privtrain's: train | doctor CONFIG ...
set -euo pipefail

if [ -z "${NPROC_PER_NODE:-}" ]; then
  NPROC_PER_NODE=$(python -c 'import torch; print(torch.cuda.device_count() or 2)')
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec python -m privtrain launch python -m torch.distributed.run \
  --nnodes "${NNODES:-1}" --node-rank "${NODE_RANK:-0}" --nproc-per-node "$NPROC_PER_NODE" \
  --master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "${MASTER_PORT:-29500}" \
  -m privtrain "$@"
