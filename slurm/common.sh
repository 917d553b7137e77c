# shellcheck shell=bash
# What the templates share: the cluster's settings, rendezvous, starting processes, and what happens when they end.
# Sourced by the *.sbatch files; it runs on the job's first node. docs/slurm.md explains every line of the log that
# begins with "slurm:".

MAX_ATTEMPTS=3 # in a row without a new checkpoint

say() { echo "slurm: $*"; }
die() {
    echo "slurm: error: $*" >&2
    exit 1
}

# ---- settings

# Reads cluster.env, finds the interpreter, and makes the job's folder.
setup_job() {
    find_job
    slurm_dir=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd) || exit 1
    local settings=${NEMO_LMPO_CLUSTER_ENV:-$slurm_dir/cluster.env}
    if [ -f "$settings" ]; then
        # shellcheck source=/dev/null
        . "$settings" 2> >(hide_lines >&2) || die "$settings ends with an error; it is a bash file"
    elif [ -n "${NEMO_LMPO_CLUSTER_ENV:-}" ]; then
        die "NEMO_LMPO_CLUSTER_ENV=$settings does not exist; copy slurm/cluster.env.example there"
    fi
    if [ -n "${NEMO_LMPO_SETUP:-}" ]; then
        eval "$NEMO_LMPO_SETUP" 2> >(hide_lines >&2) || die "NEMO_LMPO_SETUP failed; correct it in $settings"
    fi
    check_settings
    jobs_dir=${NEMO_LMPO_JOBS_DIR:-$SLURM_SUBMIT_DIR/runs/slurm}
    job_dir=$jobs_dir/$job_name
    # A cluster that was set up anew gives out old numbers again.
    [ "$SLURM_RESTART_COUNT" != 0 ] || remove_job_dir
    mkdir -p "$job_dir" || die "$job_dir cannot be made; set NEMO_LMPO_JOBS_DIR to a folder that all nodes can write"
    export NEMO_LMPO_JOB_DIR=$job_dir PYTHONUNBUFFERED=1
    # Since Slurm 22.05 srun no longer takes this over from sbatch, and every process would get one core.
    export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
}

# Settings may hold keys, and bash's errors quote the line: the log gets its number only.
hide_lines() { sed -u -E 's/^(.*: line [0-9]+: ).*/\1bash reports an error here/'; }

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
        [ -x "$NEMO_LMPO_PYTHON" ] || die "NEMO_LMPO_VENV=$NEMO_LMPO_VENV has no bin/python; correct it"
    fi
    export NEMO_LMPO_PYTHON=${NEMO_LMPO_PYTHON:-python}
    if [ -n "${NEMO_LMPO_INTERFACE:-}" ]; then
        export NCCL_SOCKET_IFNAME=$NEMO_LMPO_INTERFACE GLOO_SOCKET_IFNAME=$NEMO_LMPO_INTERFACE
    fi
}

# The job's own folder is all that the templates ever remove.
remove_job_dir() {
    if ! is_job_name "${job_name:?}" || [ "${job_dir:?}" != "${jobs_dir:?}/$job_name" ]; then
        die "$job_dir is not the folder of job $job_name, so it is not removed"
    fi
    rm -rf -- "${job_dir:?}"
}

# ---- the job as Slurm sees it

is_job_name() { [[ $1 =~ ^[0-9]+(_[0-9]+)?$ ]]; }

# Sets job_name, by which every command of Slurm gets this job: NUMBER, or ARRAY_TASK for a task of a job array. (The
# last task's number is that of its array, so that commands would act on all tasks.) The variables alone do not tell:
# a shell may keep those of a job that has ended, and a job that is submitted from inside another inherits its
# variables. Therefore Slurm is asked.
find_job() {
    local remedy="submit it with sbatch" found
    is_job_name "${SLURM_JOB_ID:-}" || die "this runs inside of a Slurm job only; $remedy"
    job_name=$SLURM_JOB_ID
    if [ -n "${SLURM_ARRAY_JOB_ID:-}" ] && [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
        job_name=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
        found=$(job_field JobId) || die "Slurm does not answer for job $job_name; $remedy again"
        if [ "$found" != "$SLURM_JOB_ID" ]; then # the variables of another job
            unset "${!SLURM_ARRAY_@}"
            job_name=$SLURM_JOB_ID
        fi
    fi
    found=$(job_field JobState) || die "Slurm does not answer for job $job_name; $remedy again"
    case $found in
        RUNNING | CONFIGURING | SUSPENDED | COMPLETING) ;;
        *) die "job $job_name, which SLURM_JOB_ID of this shell names, is not running; $remedy" ;;
    esac
    SLURM_RESTART_COUNT=$(job_field Restarts)
    export SLURM_RESTART_COUNT=${SLURM_RESTART_COUNT:-0}
}

# What Slurm says of this job, or nothing for a job that it does not know. A busy controller is asked again;
# status 1: it has not answered.
job_field() { # NAME
    local record='' tries=1
    until record=$(SLURM_TIME_FORMAT=standard scontrol --oneliner show job "${job_name:?}" 2>&1); do
        case $record in *'Invalid job id'*) return 0 ;; esac
        [ "$tries" -lt 4 ] && [[ $record != *'command not found'* ]] || return 1
        tries=$((tries + 1))
        sleep 2
    done
    # The job's name may be any text; only the numbers stand before it.
    [ "$1" = JobId ] || record="UserId=${record#* UserId=}"
    tr ' ' '\n' <<<"$record" | sed -n "s/^$1=//p" | head -n 1
}

# Unix seconds, or nothing for a job without a limit.
job_end() {
    date -d "$(job_field EndTime)" +%s 2>/dev/null || true
}

port_is_free() { ! (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

# Processes meet on this node, which is the first of the list. Jobs that share it differ by their number; the range
# lies below the one that the kernel gives out by itself.
setup_rendezvous() {
    local port=$((10000 + SLURM_JOB_ID % 20000)) tries
    MASTER_ADDR=$(scontrol show hostnames "${SLURM_JOB_NODELIST:?}" | head -n 1)
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

# Starts a module as one process per task, in the background: step_pid. Rank 0's output goes to the job's log.
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
        trap '' TERM USR1 INT # it shows the run's last lines after a signal, too
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
        kill -0 "${step_pid:?}" 2>/dev/null || break
    done
    while kill -0 "${tail_pid:?}" 2>/dev/null; do wait "$tail_pid"; done
    return "$status"
}

# For jobs that do not train: one command, no requeueing.
run_command() { # MODULE ARGUMENT...
    setup_job
    announce 1
    start_ranks 1 "$@"
    local status=0
    wait_for_ranks || status=$?
    if [ "$status" = 0 ]; then
        remove_job_dir
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
    echo "=== job $job_name, restart $SLURM_RESTART_COUNT, $1 $(if [ "$1" = 1 ]; then echo process; else echo processes; fi) on $SLURM_JOB_NODELIST," \
        "$(if [ -n "$end" ]; then date -d "@$end" '+ends %F %T'; else echo 'no time limit'; fi)"
}

# ---- training

# Trains until all steps are done, with as many restarts of the job as that needs.
run_training() { # RECIPE [OVERRIDE...]
    [ $# -ge 1 ] || die "give a recipe, and overrides if you like: sbatch slurm/train.sbatch lmpo_llama3_8b KEY=VALUE"
    local recipe=$1 status=0
    shift
    setup_job
    setup_rendezvous
    announce "$SLURM_NTASKS"
    rm -f -- "${job_dir:?}/outcome"
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
    find_job
    local recipe=$1 index=${SLURM_ARRAY_TASK_ID:-} fixed=() swept=() chosen=() name='' count=1 argument key values
    local several='^[A-Za-z_][A-Za-z0-9_.]*=[^]["'"'"'{}]*,[^]["'"'"'{}]*$'
    [[ $index =~ ^[0-9]+$ ]] || die "this is a template for job arrays; submit it with --array"
    shift
    for argument; do
        # Several values are separated by commas; lists in brackets are one value.
        if [[ $argument =~ $several ]]; then swept+=("$argument"); else fixed+=("$argument"); fi
    done
    [ ${#swept[@]} -gt 0 ] || swept=('loss.lam=0.05,0.2,1.0' 'model.seed=1,2,3')
    for argument in "${swept[@]}"; do
        key=${argument%%=*}
        if [[ $argument = *$'\n'* || ,${argument#*=}, = *,,* ]]; then
            die "$key has an empty value or a line break among its values; correct it"
        fi
        IFS=, read -ra values <<<"${argument#*=}"
        chosen+=("$key=${values[index / count % ${#values[@]}]}")
        name+=${name:+_}$key-${values[index / count % ${#values[@]}]}
        count=$((count * ${#values[@]}))
    done
    if [ "$index" -ge "$count" ]; then
        say "there are only $count combinations, with indices from 0; nothing to do for task $index"
        exit 0
    fi
    say "combination $index of $count: ${chosen[*]}"
    local stem=${recipe##*/}  # of a recipe that is given as a path
    # A directory's name, whatever the values are: no slash, nothing that Hydra would read.
    stem=${stem%.yaml}
    name=${stem//[^A-Za-z0-9._+-]/_}_sweep/${name//[^A-Za-z0-9._+-]/_}
    run_training "$recipe" "run_dir=runs/$name" "${chosen[@]}" "${fixed[@]}"
}

# Slurm sends USR1 some minutes before the time limit (--signal in the templates).
on_usr1() {
    say "USR1: the time limit is near, or a user sent it; saving, then the job is requeued"
    scancel --signal=USR1 "${job_name:?}" # the processes, not this script
}

# Ending a job, Slurm sends TERM to the processes as well; `scancel --batch --signal=TERM` reaches this script only.
on_term() {
    if [ "$(job_field JobState)" = RUNNING ] && ! is_preempted; then
        say "TERM: saving, then the job ends"
        scancel --signal=TERM "${job_name:?}"
    else
        say "TERM: Slurm ends this turn of the job; saving, if there is time"
    fi
}

# With a grace time, a preempted job still counts as running.
is_preempted() {
    case $(job_field PreemptTime) in '' | None | N/A) return 1 ;; esac
}

# Slurm's reason counts, too: the limit may have been changed since the turn began.
time_is_over() {
    if [ -n "$NEMO_LMPO_JOB_END" ] && [ "$(date +%s)" -ge "$NEMO_LMPO_JOB_END" ]; then return 0; fi
    [ "$(job_field Reason)" = TimeLimit ]
}

# The trainer writes to `outcome` how it ended: "done", "stopped REASON", "refused" (an error that would occur again)
# or nothing (it crashed, or was killed).
conclude() { # STATUS
    local status=$1 outcome state
    outcome=$(cat "$job_dir/outcome" 2>/dev/null)
    state=$(job_field JobState)
    case $outcome in
        done)
            say "all steps are done"
            rm -f -- "${job_dir:?}"/rank-*.log
            exit 0 ;;
        refused)
            say "failed with status $status; it would fail again, so the job is not requeued"
            last_error
            exit 1 ;;
    esac
    if is_requeued; then
        say "${outcome:-killed}; Slurm starts the job again (preempted, a node failed, or scontrol requeue)"
        exit 0
    fi
    # Where Slurm does not answer, the job counts as running; a cancelled one cannot be requeued anyway.
    if [ "${state:=RUNNING}" != RUNNING ] && ! time_is_over; then
        say "cancelled (${outcome:-killed before it could save}); not requeued"
        exit 1
    fi
    if [ "$outcome" = "stopped SIGTERM" ] && [ "$state" = RUNNING ] && ! is_preempted; then
        say "saved and stopped as requested; not requeued; submit it again to resume"
        exit 0
    fi
    [ -n "$outcome" ] || show_failed_rank "$status"
    requeue "${outcome:-crashed with status $status}" "$state"
}

# By Slurm or a user, since this turn began.
is_requeued() {
    local restarts
    restarts=$(job_field Restarts)
    [ "${restarts:-0}" -gt "$SLURM_RESTART_COUNT" ]
}

requeue() { # REASON STATE
    local attempts=0 refusal
    if ! has_new_checkpoint; then
        attempts=$(($(cat "$job_dir/attempts" 2>/dev/null || echo 0) + 1))
    fi
    echo "$attempts" >"$job_dir/attempts"
    if [ "$attempts" -ge "$MAX_ATTEMPTS" ]; then
        say "$1; $attempts attempts in a row without a new checkpoint, so the job is not requeued"
        last_error
        exit 1
    fi
    say "$1; requeueing${attempts:+ (attempts without a new checkpoint: $attempts of $MAX_ATTEMPTS)}"
    if ! refusal=$(scontrol requeue "${job_name:?}" 2>&1) && ! is_requeued; then
        die "Slurm does not requeue the job ($refusal); submit the same line again to resume"
    fi
    [ "$2" = RUNNING ] || exit 0 # the time limit is over, and Slurm ends the job already
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

# The cause may be in the log of a rank other than 0. The rank whose log ends first failed first; the others report a
# lost connection.
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
