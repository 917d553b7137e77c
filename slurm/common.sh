# shellcheck shell=bash
# What the templates share: the cluster's settings, rendezvous, starting processes, and what happens when they end.
# Sourced by the *.sbatch files; it runs on the job's first node. Every word of the log that begins with "slurm:"
# is explained in docs/slurm.md.

MOST_ATTEMPTS=3 # in a row without a new checkpoint

say() { echo "slurm: $*"; }
die() {
    echo "slurm: error: $*" >&2
    exit 1
}

# ---- settings

# Reads cluster.env, finds the interpreter, and makes the job's folder.
setup_job() {
    slurm_dir=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd) || exit 1
    local settings=${NEMO_LMPO_CLUSTER_ENV:-$slurm_dir/cluster.env}
    if [ -f "$settings" ]; then
        # shellcheck source=/dev/null
        . "$settings" || die "$settings ends with an error; it is a bash file"
    elif [ -n "${NEMO_LMPO_CLUSTER_ENV:-}" ]; then
        die "NEMO_LMPO_CLUSTER_ENV=$settings does not exist; copy slurm/cluster.env.example there"
    fi
    if [ -n "${NEMO_LMPO_SETUP:-}" ]; then
        eval "$NEMO_LMPO_SETUP" || die "NEMO_LMPO_SETUP='$NEMO_LMPO_SETUP' failed; correct it in $settings"
    fi
    check_settings
    jobs_dir=${NEMO_LMPO_JOBS_DIR:-$SLURM_SUBMIT_DIR/runs/slurm}
    job_dir=$jobs_dir/$SLURM_JOB_ID
    # A cluster that was set up anew gives out old numbers again.
    [ "${SLURM_RESTART_COUNT:-0}" != 0 ] || rm -rf "$job_dir"
    mkdir -p "$job_dir" || die "$job_dir cannot be made; set NEMO_LMPO_JOBS_DIR to a folder that all nodes can write"
    export NEMO_LMPO_JOB_DIR=$job_dir PYTHONUNBUFFERED=1
    # Since Slurm 22.05 srun no longer takes this over from sbatch, and every process would get one core.
    export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
}

check_settings() {
    case ${NEMO_LMPO_LAUNCHER:=srun} in
        srun | torchrun) ;;
        *) die "NEMO_LMPO_LAUNCHER=$NEMO_LMPO_LAUNCHER is unknown; choose srun or torchrun" ;;
    esac
    case ${NEMO_LMPO_CONTAINER:=none} in
        none) ;;
        pyxis | apptainer)
            [ -n "${NEMO_LMPO_IMAGE:-}" ] ||
                die "NEMO_LMPO_CONTAINER=$NEMO_LMPO_CONTAINER needs NEMO_LMPO_IMAGE; name the image" ;;
        *) die "NEMO_LMPO_CONTAINER=$NEMO_LMPO_CONTAINER is unknown; choose none, pyxis or apptainer" ;;
    esac
    if [ -z "${NEMO_LMPO_PYTHON:-}" ] && [ "$NEMO_LMPO_CONTAINER" = none ] && [ -n "${NEMO_LMPO_VENV:-}" ]; then
        NEMO_LMPO_PYTHON=$NEMO_LMPO_VENV/bin/python
        [ -x "$NEMO_LMPO_PYTHON" ] || die "NEMO_LMPO_VENV=$NEMO_LMPO_VENV holds no bin/python; correct it"
    fi
    export NEMO_LMPO_PYTHON=${NEMO_LMPO_PYTHON:-python}
    if [ -n "${NEMO_LMPO_INTERFACE:-}" ]; then
        export NCCL_SOCKET_IFNAME=$NEMO_LMPO_INTERFACE GLOO_SOCKET_IFNAME=$NEMO_LMPO_INTERFACE
    fi
}

# ---- the job as Slurm sees it

job_field() { # NAME
    scontrol --oneliner show job "$SLURM_JOB_ID" 2>/dev/null | tr ' ' '\n' | sed -n "s/^$1=//p" | head -n 1
}

# Unix seconds, or nothing for a job without a limit.
job_end() {
    local end=${SLURM_JOB_END_TIME:-} # newer Slurms tell it
    [ -n "$end" ] || end=$(date -d "$(job_field EndTime)" +%s 2>/dev/null) || true
    echo "$end"
}

port_is_free() { ! (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

# Processes meet on this node, which is the first of the list. Jobs that share it differ by their number; the range
# lies below the one that the kernel gives out by itself.
setup_rendezvous() {
    local port=$((10000 + SLURM_JOB_ID % 20000)) tries
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    for tries in 1 2 3 4 5 6 7 8; do
        port_is_free "$port" && break
        [ "$tries" != 8 ] || die "eight ports up to $port are in use on $MASTER_ADDR; requeue the job"
        port=$((port + 1))
    done
    export MASTER_ADDR MASTER_PORT=$port
}

# ---- starting processes

# Fills the arrays step_options (for srun) and inside (a command in front of the program).
container_command() {
    local mounts=$SLURM_SUBMIT_DIR,$slurm_dir,$jobs_dir${NEMO_LMPO_MOUNTS:+,$NEMO_LMPO_MOUNTS} entry
    step_options=()
    inside=()
    case $NEMO_LMPO_CONTAINER in
        pyxis)
            local pairs=() entries
            IFS=, read -ra entries <<<"$mounts"
            for entry in "${entries[@]}"; do
                case $entry in
                    *:*) pairs+=("$entry") ;;
                    *) pairs+=("$entry:$entry") ;;
                esac
            done
            step_options=(--container-image="$NEMO_LMPO_IMAGE" --container-workdir="$PWD"
                --container-mounts="$(IFS=,; echo "${pairs[*]}")") ;;
        apptainer) inside=(apptainer exec --nv --pwd "$PWD" --bind "$mounts" "$NEMO_LMPO_IMAGE") ;;
    esac
}

# Starts a module as one process a task, in the background: step_pid. Rank 0's output goes to the job's log.
start_ranks() { # TASKS MODULE ARGUMENT...
    local tasks=$1 nodes=${SLURM_JOB_NUM_NODES:-1} kind=rank
    shift
    local per_node=$((tasks / nodes))
    container_command
    [ $((per_node * nodes)) = "$tasks" ] || die "$tasks tasks do not divide by $nodes nodes; use --ntasks-per-node"
    if [ "$NEMO_LMPO_LAUNCHER" = torchrun ] && [ "$tasks" -gt 1 ]; then
        kind=node
        export NEMO_LMPO_RANKS_PER_NODE=$per_node NEMO_LMPO_NODES=$nodes
        SRUN_CPUS_PER_TASK=$((SRUN_CPUS_PER_TASK * per_node))
        tasks=$nodes per_node=1
    fi
    local log=$job_dir/rank-0.log size
    touch "$log"
    size=$(stat -c %s "$log")
    srun --kill-on-bad-exit=1 --nodes="$nodes" --ntasks="$tasks" --ntasks-per-node="$per_node" \
        "${step_options[@]}" "${inside[@]}" bash "$slurm_dir/task.sh" "$kind" "$NEMO_LMPO_PYTHON" -m "$@" &
    step_pid=$!
    (
        trap '' TERM USR1 INT # it shows the run's last words after a signal, too
        exec tail --follow=name --retry --sleep-interval=0.25 --pid="$step_pid" --bytes="+$((size + 1))" "$log" 2>/dev/null
    ) &
    tail_pid=$!
}

# Waits for the processes, through signals; their exit status.
wait_for_ranks() {
    local status
    while :; do
        wait "$step_pid"
        status=$?
        # A trap interrupts the wait; the step is over when nothing is left to wait for.
        kill -0 "$step_pid" 2>/dev/null || break
    done
    while kill -0 "$tail_pid" 2>/dev/null; do wait "$tail_pid"; done
    return "$status"
}

# For jobs that are no training: one command, no requeueing.
run_command() { # MODULE ARGUMENT...
    setup_job
    announce 1
    start_ranks 1 "$@"
    local status=0
    wait_for_ranks || status=$?
    if [ "$status" = 0 ]; then
        rm -rf "$job_dir"
    else
        say "failed with status $status"
        last_error
    fi
    exit "$status"
}

announce() { # TASKS
    local end
    end=$(job_end)
    export NEMO_LMPO_JOB_END=$end
    echo "=== job $SLURM_JOB_ID, restart ${SLURM_RESTART_COUNT:-0}, $1 process(es) on $SLURM_JOB_NODELIST," \
        "$(if [ -n "$end" ]; then date -d "@$end" '+ends %F %T'; else echo 'no time limit'; fi)"
}

# ---- training

# Trains until the recipe's steps are done, over as many restarts of the job as that needs.
run_training() { # RECIPE [OVERRIDE...]
    [ $# -ge 1 ] || die "give a recipe, and overrides if you like: sbatch slurm/train.sbatch lmpo_llama3_8b KEY=VALUE"
    local recipe=$1 status=0
    shift
    setup_job
    setup_rendezvous
    announce "$SLURM_NTASKS"
    rm -f "$job_dir/outcome"
    touch "$job_dir/started"
    trap on_usr1 USR1
    trap on_term TERM
    start_ranks "$SLURM_NTASKS" nemo_lmpo.train --config-name "$recipe" "$@"
    wait_for_ranks || status=$?
    conclude "$status"
}

# One task of a job array: trains with the combination of values that has the task's number.
run_sweep() { # RECIPE [KEY=VALUE,VALUE,...] [OVERRIDE...]
    [ $# -ge 1 ] || die "give a recipe: sbatch slurm/sweep.sbatch lmpo_llama3_8b loss.lam=0.05,0.2,1.0"
    local recipe=$1 index=${SLURM_ARRAY_TASK_ID:-} fixed=() swept=() chosen=() name='' count=1 argument key values
    local several='^[A-Za-z_][A-Za-z0-9_.]*=[^]["'"'"'{}]*,[^]["'"'"'{}]*$'
    [ -n "$index" ] || die "this is a template for job arrays; submit it with --array"
    shift
    for argument; do
        # Several values are separated by commas; lists in brackets are one value.
        if [[ $argument =~ $several ]]; then swept+=("$argument"); else fixed+=("$argument"); fi
    done
    [ ${#swept[@]} -gt 0 ] || swept=('loss.lam=0.05,0.2,1.0' 'model.seed=1,2,3')
    for argument in "${swept[@]}"; do
        key=${argument%%=*}
        IFS=, read -ra values <<<"${argument#*=}"
        chosen+=("$key=${values[index / count % ${#values[@]}]}")
        name+=${name:+_}$key-${values[index / count % ${#values[@]}]}
        count=$((count * ${#values[@]}))
    done
    if [ "$index" -ge "$count" ]; then
        say "there are only $count combinations, numbered from 0; nothing to do for task $index"
        exit 0
    fi
    say "combination $index of $count: ${chosen[*]}"
    run_training "$recipe" "run_dir=runs/${recipe}_sweep/$name" "${chosen[@]}" "${fixed[@]}"
}

# Slurm sends USR1 some minutes before the time limit (--signal in the templates).
on_usr1() {
    say "USR1: the time limit is near, or somebody asked; saving, then the job is requeued"
    scancel --signal=USR1 "$SLURM_JOB_ID" # the processes, not this script
}

# Ending a job, Slurm sends TERM to the processes as well; `scancel --batch --signal=TERM` reaches this script only.
on_term() {
    if [ "$(job_field JobState)" = RUNNING ] && ! is_preempted; then
        say "TERM: saving, then the job ends"
        scancel --signal=TERM "$SLURM_JOB_ID"
    else
        say "TERM: Slurm ends this turn of the job; saving, if there is time"
    fi
}

# With a grace time, a preempted job still counts as running.
is_preempted() {
    case $(job_field PreemptTime) in '' | None | N/A) return 1 ;; esac
}

time_is_over() { [ -n "$NEMO_LMPO_JOB_END" ] && [ "$(date +%s)" -ge "$NEMO_LMPO_JOB_END" ]; }

# The trainer leaves in `outcome` how it ended: "done", "stopped REASON", "refused" (an error that a repetition would
# meet again) or nothing (it crashed, or was killed).
conclude() { # STATUS
    local status=$1 outcome state
    outcome=$(cat "$job_dir/outcome" 2>/dev/null)
    state=$(job_field JobState)
    case $outcome in
        done)
            say "all steps are done"
            rm -f "$job_dir"/rank-*.log
            exit 0 ;;
        refused)
            say "failed with status $status; a repetition would fail again, so the job is not requeued"
            last_error
            exit 1 ;;
    esac
    if [ "$(job_field Restarts)" -gt "${SLURM_RESTART_COUNT:-0}" ]; then
        say "${outcome:-killed}; Slurm starts the job again (preempted, a node failed, or scontrol requeue)"
        exit 0
    fi
    if [ "$state" != RUNNING ] && ! time_is_over; then
        say "cancelled (${outcome:-killed before it could save}); not requeued"
        exit 1
    fi
    if [ "$outcome" = "stopped SIGTERM" ] && [ "$state" = RUNNING ] && ! is_preempted; then
        say "stopped and saved as asked; not requeued: submit it again to go on"
        exit 0
    fi
    [ -n "$outcome" ] || show_failed_rank "$status"
    requeue "${outcome:-crashed with status $status}"
}

requeue() { # REASON
    local attempts=0
    if ! has_new_checkpoint; then
        attempts=$(($(cat "$job_dir/attempts" 2>/dev/null || echo 0) + 1))
    fi
    echo "$attempts" >"$job_dir/attempts"
    if [ "$attempts" -ge "$MOST_ATTEMPTS" ]; then
        say "$1; $attempts attempts in a row without a new checkpoint, so the job is not requeued"
        last_error
        exit 1
    fi
    say "$1; requeueing${attempts:+ (attempts without a new checkpoint: $attempts of $MOST_ATTEMPTS)}"
    scontrol requeue "$SLURM_JOB_ID" ||
        die "this cluster does not let jobs requeue themselves; submit the same line again to go on"
    # Slurm ends this script when it has noted that.
    trap 'exit 0' TERM
    sleep 60 &
    wait $!
    exit 0
}

has_new_checkpoint() {
    local run_dir
    run_dir=$(cat "$job_dir/run_dir" 2>/dev/null) || return 1
    find "$run_dir/checkpoints" -maxdepth 1 -name 'step_*' ! -name '*.*' -newer "$job_dir/started" 2>/dev/null |
        grep -q .
}

# ---- what a failed job says last

# The lines of a rank's newest attempt.
newest_attempt() { awk '/^=== /{ text = "" } { text = text $0 "\n" } END { printf "%s", text }' "$1"; }

# A rank other than 0 may have met the cause, whose message is then in its own file. The first to fall silent was
# the first to fail; the others complain of a lost connection.
show_failed_rank() { # STATUS
    local log
    say "failed with status $1; every rank's output is in $job_dir/rank-*.log"
    while IFS= read -r log; do
        if newest_attempt "$log" | grep -qE 'Error|^error: |^Traceback'; then
            [ "$log" != "$job_dir/rank-0.log" ] || return 0 # in this log already
            say "the end of ${log##*/}:"
            newest_attempt "$log" | tail -n 20
            return 0
        fi
    done < <(find "$job_dir" -name 'rank-*.log' -printf '%T@ %p\n' | sort -n | cut -d' ' -f2-)
}

last_error() {
    local log
    for log in "$job_dir"/rank-*.log; do
        newest_attempt "$log" | grep -E '^error: |^[A-Za-z_.]*(Error|Exception)\b' | tail -n 3 | grep . && return 0
    done
    return 0
}
