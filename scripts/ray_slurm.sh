#!/usr/bin/env bash
#SBATCH --job-name=lscollapse
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --gpus-per-node=4
#SBATCH --time=04:00:00
#
# A sweep on every node of a SLURM job: Ray's head on the first, one `ray start` on each of the others, then the driver.
# An example to adapt; it was not run, no SLURM was at hand. Start it in the folder of the checkout, on a file system that
# all nodes see (the environment, the models, and the run folder are there), with arguments of any verb, for example
#     sbatch scripts/ray_slurm.sh sweep-lambda --config configs/paper.yaml --offline
# Submitted again after a time-out it continues the run.
set -euo pipefail

bin=$PWD/.venv/bin
export RAY_USAGE_STATS_ENABLED=0
# Ray runs code for whoever reaches its ports: only those who can read this file may.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$PWD/runs/ray-token-$SLURM_JOB_ID
mkdir -p runs
(umask 077 && head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n' > "$RAY_AUTH_TOKEN_PATH")
trap 'rm -f "$RAY_AUTH_TOKEN_PATH"' EXIT

head=$(hostname)
port=6379
size=(--num-cpus="$SLURM_CPUS_PER_TASK" --num-gpus="${SLURM_GPUS_ON_NODE:-0}" --block)

srun --nodes=1 --ntasks=1 --nodelist="$head" "$bin/ray" start --head --port=$port --include-dashboard=false "${size[@]}" &
until "$bin/python" -c "import socket; socket.create_connection(('$head', $port), 1)" 2>/dev/null; do sleep 1; done
others=$((SLURM_JOB_NUM_NODES - 1))
if ((others > 0)); then
  srun --nodes=$others --ntasks=$others --exclude="$head" "$bin/ray" start --address="$head:$port" "${size[@]}" &
fi
until "$bin/python" -c "import ray; ray.init('$head:$port', log_to_driver=False, logging_level='ERROR')
exit(len(ray.nodes()) < $SLURM_JOB_NUM_NODES)"; do sleep 2; done

"$bin/lscollapse" "$@" --engine ray --address "$head:$port"
