#!/bin/bash
# `flowdata score` on Slurm: the nodes of a job share the work of one data set.
#
#     sbatch examples/slurm_score.sh MODEL DATA --store /shared/scores [options of flowdata score]
#
# MODEL and DATA are folders and files that all nodes share, or hub ids; the store is a folder that
# they share, or a URL (s3://…). Set the lines below to your cluster, and load the environment that
# has flowdata before sbatch.
#
# A job that is preempted, or that reaches its time limit, goes back into the queue and later goes on
# where it stopped, on as many nodes as it gets then: what is scored lies in the store. The losses
# are those of a job that nothing stopped, to the last bit.

#SBATCH --job-name=flowdata-score
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=16
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# Two minutes before the time limit this script, and no process that it started, gets SIGUSR1. So it
# does at preemption where the cluster has a GraceTime and PreemptParameters=send_user_signal.
#SBATCH --signal=B:USR1@120

set -euo pipefail

# SIGTERM lets the processes write what they have scored, and end.
stop() {
    scancel --signal=TERM "$SLURM_JOB_ID" # its steps, not this script
    wait "$step" || true
}
trap 'stop; scontrol requeue "$SLURM_JOB_ID"; exit 0' USR1
trap 'stop; exit 143' TERM # of a preemption without grace: Slurm has requeued the job already

first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# Bash runs a trap only when no command runs in the foreground: the step runs in the background.
srun torchrun \
    --nnodes="$SLURM_JOB_NUM_NODES" \
    --nproc-per-node="${SLURM_GPUS_ON_NODE:-1}" \
    --rdzv-backend=c10d \
    --rdzv-id="$SLURM_JOB_ID" \
    --rdzv-endpoint="$first_node:$((20000 + SLURM_JOB_ID % 10000))" \
    --max-restarts=3 \
    -m flowdata score "$@" &
step=$!
wait "$step"
