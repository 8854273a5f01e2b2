# What the batch scripts share; each sources it in the project's folder. It defines
#   id                     the job's number in SLURM, the date and time elsewhere: a name that a requeued job keeps
#   runs                   the folder of all run directories
#   model                  by for_model: papermill's arguments for MODEL, DATA and EVAL_DATA
#   launch                 empty, or what stands before papermill to start it in several processes
#   attempt RUN_DIR papermill NOTEBOOK OUT ARGUMENTS...   one attempt at a run, after its pre-flight; a signal stops it with a checkpoint and a requeue
# How the pieces work together stands in slurm/README.md.
# shellcheck shell=bash disable=SC2034

MAX_RESTARTS=${MAX_RESTARTS:-10}     # requeues of one job, so that one that never gets anywhere ends
GRACE=${GRACE:-90}                   # seconds a run has for its checkpoint; --signal comes 120 s before the end
launch=()

umask 077
command -v cbnb >/dev/null || PATH=$PWD/.venv/bin:$PATH   # no environment with cbnb is active: conda's own may be
export PATH JUPYTER_PREFER_ENV_PATH=1          # a user-level kernel named python3 must not shadow the environment's
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"
# kernels of many jobs fight over one history and one folder of connection files where the home folder is shared
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export IPYTHONDIR=$scratch/ipython JUPYTER_RUNTIME_DIR=$scratch/jupyter

# SLURM_JOB_ID alone proves nothing: it is set in a terminal or a Jupyter inside an allocation too, and that one must not be requeued.
job=
if [ "${SLURM_TASK_PID:-}" = $$ ]; then      # this script is the job
    job=$SLURM_JOB_ID                        # of an array's last task this is the number of the whole array
    [ -z "${SLURM_ARRAY_JOB_ID:-}" ] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
fi
id=${job:-$(date +%Y%m%d-%H%M%S)}
[ -z "$job" ] || [ ! -f /proc/self/fd/1 ] || chmod go= /proc/self/fd/1     # SLURM made the log before the umask was set
runs=${CBNB_RUNS:-$PWD/runs}

# the time limit is near (USR2), preemption or scancel (TERM), Ctrl-C (INT)
stopping=
trap 'stopping=${stopping:-$SECONDS}' USR2 TERM INT

# every byte that is no plain character is a question mark: a folder's name may hold what a terminal obeys
say() { local LC_ALL=C; printf '%s: %s\n' "$(date +%T)" "${*//[![:print:]]/?}"; }

# for_model ARGUMENTS...: sets `model`. ARGUMENTS are the published ones for an 8B model, in whose place the tiny agent has those of its preset.
for_model() {
    MODEL=${MODEL:-meta-llama/Llama-3.1-8B-Instruct}
    if [ "$MODEL" = tinyagent ]; then
        model=(-p preset tinyagent-adv -p data "${DATA:-tinyagent}")
    else
        [ -n "${DATA:-}" ] || { echo "DATA is not set: DATA=harmful.jsonl,benign.jsonl names transcripts of both labels, DATA=tinyagent an invented world for a trial" >&2; exit 2; }
        model=(-p preset llama-3.1-8b-instruct -p model "$MODEL" -p data "$DATA" "$@")
    fi
    [ -z "${EVAL_DATA:-}" ] || model+=(-p eval_data "$EVAL_DATA")
}

# next_out RUN_DIR: where the executed notebook of the next attempt goes.
next_out() {
    local n=1
    while [ -e "$1/out.$n.ipynb" ]; do n=$((n + 1)); done
    echo "$1/out.$n.ipynb"
}

# state_of RUN_DIR: its state, `new` without one; a run that calls itself running although its process is gone is `dead`.
state_of() {
    python - "$1" <<'PY'
import sys
from cbnb.run.stages import read_status, still_running
status = read_status(sys.argv[1])
state = status.get("state", "new")
print("dead" if state == "running" and not still_running(sys.argv[1], status) else state)
PY
}

# reviewable NOTEBOOK: whether nbs/preflight.ipynb knows all of its parameters.
reviewable() {
    python - "$1" <<'PY'
import sys
from cbnb.sweep.spec import notebook_parameters
sys.exit(not notebook_parameters(sys.argv[1]).keys() <= notebook_parameters("nbs/preflight.ipynb").keys())
PY
}

# preflight RUN_DIR papermill NOTEBOOK OUT ARGUMENTS...: the review of the run that this command makes; returns 1 where it refuses. It is left out with
# SKIP_PREFLIGHT=1, for a run that goes on from a checkpoint, and where it was passed before.
preflight() {
    local run_dir=$1 notebook=$3 pid code=0
    shift 4
    [ "${SKIP_PREFLIGHT:-0}" != 1 ] || return 0
    ! ls -d "$run_dir"/checkpoints/checkpoint-* >/dev/null 2>&1 || return 0
    ! grep -qE '^ "verdict": "(pass|warn)"' "$run_dir/preflight.json" 2>/dev/null || return 0
    reviewable "$notebook" || { say "no pre-flight: $notebook has parameters that nbs/preflight.ipynb does not know"; return 0; }
    say "$run_dir: pre-flight (SKIP_PREFLIGHT=1 leaves it out)"
    (trap '' USR2 TERM INT; exec python -m cbnb.run.execute nbs/preflight.ipynb "$run_dir/preflight.ipynb" "$@") &
    pid=$!
    while kill -0 "$pid" 2>/dev/null && [ -z "$stopping" ]; do sleep 1 & wait $! || true; done
    [ -z "$stopping" ] || { kill -KILL "$pid"; return 0; }    # attempt sees the signal, too
    wait "$pid" || code=$?
    [ "$code" -ne 0 ] || return 0
    say "$run_dir: refused by the pre-flight, see $run_dir/preflight.ipynb"
    python -m cbnb.run close "$run_dir" "$code" >/dev/null
    return 1
}

# attempt RUN_DIR papermill NOTEBOOK OUT ARGUMENTS...: reviews the run that this command makes in RUN_DIR and runs it to its end. Returns 0 where the run is
# done, now or before. After a signal it asks for a checkpoint and requeues the job, which ends this script.
attempt() {
    local run_dir=$1 pid code=0 state
    shift
    mkdir -p "$run_dir" || return 1
    state=$(state_of "$run_dir") || return 1         # a status that cannot be read: the error says it
    case $state in
        done) say "$run_dir is done already"; return 0 ;;
        running) say "$run_dir is running elsewhere (status.json says where): left alone"; return 1 ;;
    esac
    preflight "$run_dir" "$@" || return 1
    [ -z "$stopping" ] || { requeue; return 1; }
    # papermill, whose notebook is whole, private and without secrets; rank.sh does the same for each process
    [ "$1" != papermill ] || [ "${#launch[@]}" -ne 0 ] || set -- python -m cbnb.run.execute "${@:2}"
    say "$run_dir ($state): starts on ${SLURMD_NODENAME:-$(hostname)}, GPU ${CUDA_VISIBLE_DEVICES:-none}"
    # SLURM's TERM goes to every process of the job; only this script listens, and papermill ends when the run has ended
    (trap '' USR2 TERM INT; exec "${launch[@]}" "$@") &
    pid=$!
    while kill -0 "$pid" 2>/dev/null; do
        if [ -n "$stopping" ]; then
            touch "$run_dir/stop"            # again and again: a run that is just opening removes it
            [ $((SECONDS - stopping)) -lt "$GRACE" ] || { say "no checkpoint within $GRACE s"; requeue; stopping=$SECONDS; }
        fi
        sleep 1 & wait $! || true            # unlike sleep alone, a signal ends this wait
    done
    wait "$pid" || code=$?
    rm -f "$run_dir/stop"
    state=$(state_of "$run_dir") || state=failed
    # papermill takes a killed kernel for a success: only the run's own word counts, and one that left none has failed
    if [ "$state" != running ]; then state=$(python -m cbnb.run close "$run_dir" "$code") || state=failed; fi
    say "$run_dir: $state (exit status $code)"
    [ "$state" != "done" ] || return 0
    if [ "$state" = interrupted ] && [ -n "$stopping" ]; then requeue; fi
    [ "$code" -ne 0 ] || code=1
    return "$code"
}

# requeue: hands the job back to SLURM and ends the script; returns where that cannot be, or the job was cancelled.
requeue() {
    local now
    [ -n "$job" ] || { say "stopped; the same run directory goes on from its last checkpoint"; return 0; }
    now=$(squeue -h -j "$job" -o %T | grep -oxE '[A-Z_]+' | tail -n 1 || true)     # a site may print a banner with it
    case $now in
        CANCELLED | COMPLETING | '') say "the job was cancelled: no requeue"; return 0 ;;
    esac
    if [ "${SLURM_RESTART_COUNT:-0}" -ge "$MAX_RESTARTS" ]; then say "restarted $MAX_RESTARTS times: no requeue"; return 0; fi
    trap '' USR2 TERM INT                    # scontrol requeue ends this script too, by TERM
    say "requeue after restart ${SLURM_RESTART_COUNT:-0}"
    scontrol requeue "$job" || { say "SLURM refuses the requeue"; return 0; }
    exit 0
}
