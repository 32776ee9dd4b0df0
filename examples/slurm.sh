#!/bin/bash
# Trains a classifier on several nodes under Slurm and continues it over the time limit of a job:
#
#     sbatch examples/slurm.sh --data-dir /path/to/imagenet --model coc_tiny -b 64 --amp --experiment coc_tiny
#
# The arguments are options of `cluster-zoo train`; --experiment names the folder that a requeued job resumes from, which
# all nodes must see. Run it from the checkout, or with the package installed, in the environment of the training.
# It is tested with stand-ins for Slurm's commands and has not run on a cluster.
#
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300

# Slurm sends USR1 to this shell alone (B:), 300 seconds before the time limit: torchrun itself would die of it. torchrun
# passes TERM on to the training, which saves a checkpoint and stops; it waits for that as long as this says (seconds).
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=240

stopped=0
trap 'stopped=1; scancel --signal=TERM "$SLURM_JOB_ID"' USR1 # scancel signals what srun has started, not this shell

# One torchrun on each node. Those without the first process end while it still writes the checkpoint, which must not
# make srun kill it.
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --kill-on-bad-exit=0 torchrun \
    --nnodes="$SLURM_NNODES" --nproc-per-node="${PROCESSES_PER_NODE:-gpu}" \
    --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID" --rdzv-endpoint="$head:${RENDEZVOUS_PORT:-29500}" \
    -m cluster_zoo train "$@" --resume auto &
step=$!

wait "$step" # the signal ends it early
status=$?
if ((stopped)); then
    wait "$step"
    status=$?
fi
if ((stopped && status)); then # not if the training has ended in time
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
