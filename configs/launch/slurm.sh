#!/usr/bin/env bash
# A training stage on several nodes of a SLURM cluster. From the repository's root:
#   sbatch configs/launch/slurm.sh -m pretrain.train --config configs/gpt2-100m/pretrain.yaml
# Cut off by the time limit or a failing node, submit the same line again: the run goes on from its
# last whole checkpoint. (Not run by the project's tests, but for its syntax and the launcher's line.)

#SBATCH --job-name=ladderlm          # the name in squeue
#SBATCH --nodes=2                    # machines
#SBATCH --ntasks-per-node=1          # one launcher a node; it starts a process a GPU itself
#SBATCH --gpus-per-node=4            # GPUs a node
#SBATCH --cpus-per-task=32           # cores a node: at least as many as data loaders and processes
#SBATCH --time=24:00:00              # the limit after which SLURM ends the job
#SBATCH --output=output/%x-%j.log    # the log: %x is the job's name, %j its number
#SBATCH --requeue                    # after a node's failure, SLURM submits the job again itself
#SBATCH --open-mode=append           # and the log goes on where it ended

set -euo pipefail                    # stop at the first error, also within a pipe
cd "${SLURM_SUBMIT_DIR:-.}"          # the directory of sbatch: the repository, on a shared disk
. .venv/bin/activate                 # the environment, installed once, before

nodes=${SLURM_JOB_NUM_NODES:-1}      # how many machines SLURM has given
gpus=${SLURM_GPUS_ON_NODE:-4}        # GPUs of one of them
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1) # machine 0, where all meet
port=$((20000 + SLURM_JOB_ID % 20000)) # the same on all nodes, another for each job
export OMP_NUM_THREADS=$((${SLURM_CPUS_PER_TASK:-8} / gpus)) # threads of one process
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-8} # SLURM 22.05 and newer: else it has one core
export HF_HUB_OFFLINE=1              # compute nodes have no internet: download before

# srun runs one launcher a node. SLURM_NODEID is the node's number: it is known only there, so the
# single quotes keep it until then. --kill-on-bad-exit ends all nodes when one fails.
srun --kill-on-bad-exit=1 bash -c '
  accelerate launch --config_file configs/launch/multi_node.yaml \
    --num_machines "$0" --num_processes "$1" --machine_rank "$SLURM_NODEID" \
    --main_process_ip "$2" --main_process_port "$3" "${@:4}"
' "$nodes" $((nodes * gpus)) "$first" "$port" "$@"
