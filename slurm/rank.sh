#!/bin/bash
# One of the processes that make a run together: srun slurm/rank.sh papermill NOTEBOOK OUT ARGUMENTS...
# It tells torch what SLURM knows of it. OUT is the first one's; the others' notebooks stand in the run directory, as out.<attempt>.rank<k>.ipynb.
set -euo pipefail
export RANK=${RANK:-$SLURM_PROCID} WORLD_SIZE=${WORLD_SIZE:-$SLURM_NTASKS} LOCAL_RANK=${LOCAL_RANK:-$SLURM_LOCALID}
scratch=$(mktemp -d)      # a kernel's connection file; many at once must not share a folder
trap 'rm -rf "$scratch"' EXIT
export IPYTHONDIR=$scratch/ipython JUPYTER_RUNTIME_DIR=$scratch/jupyter
out=$3
[ "$RANK" = 0 ] || out=$scratch/out.ipynb
set -- "$1" "$2" "$out" "${@:4}"
[ "$1" != papermill ] || set -- python -m cbnb.run.execute "${@:2}"     # papermill, whose notebook is whole, private and without secrets
# SLURM's TERM goes to every process; only the batch script listens, and asks for a checkpoint
(trap '' USR2 TERM INT; exec "$@") &
trap : USR2 TERM INT      # a signal ends a wait, not this script
code=0
until wait $!; code=$?; ! kill -0 $! 2>/dev/null; do :; done
exit "$code"
