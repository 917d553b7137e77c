# shellcheck shell=bash
# shellcheck disable=SC2154 # job_dir, step_options and inside come from common.sh
# A model's server for the time of a job, and evaluations or samples of it. Sourced by evaluate.sbatch and pairs.sbatch,
# after common.sh.

# Suites and options: those of the judge go to the suites that have one.
run_evaluation() { # SUITE,SUITE,... OPTION...
    local usage="sbatch slurm/evaluate.sbatch alpaca_eval,arena_hard --model runs/RUN --judge-endpoint URL"
    if [ $# = 0 ] || [[ $1 = -* ]]; then die "give the suites first: $usage"; fi
    local suites suite failed=() shared=() judged=() model=
    IFS=, read -ra suites <<<"$1"
    shift
    while [ $# -gt 0 ]; do
        case $1 in
            --judge*=* | --data=* | --answers=* | --anchor=*) judged+=("$1") ;;
            --judge* | --data) judged+=("$1" "${2:-}"); shift ;;
            --model) model=${2:-}; shift ;;
            --model=*) model=${1#--model=} ;;
            *) shared+=("$1") ;;
        esac
        shift
    done
    begin "$model" "$usage"
    start_server "$model"
    for suite in "${suites[@]}"; do
        local options=(--model "$model" --endpoint "http://127.0.0.1:$server_port" "${shared[@]}")
        [ "$suite" = leaderboard ] || options+=("${judged[@]}")
        say "evaluate $suite"
        in_step "$NEMO_LMPO_PYTHON" -m nemo_lmpo.evaluate "$suite" "${options[@]}" || failed+=("$suite")
    done
    stop_server
    [ ${#failed[@]} = 0 ] || die "failed: ${failed[*]}; submit the same line again to resume"
    say "all suites are done"
    remove_job_dir
}

# Samples from a server, and scores when it is gone: the GPUs are the reward model's then. Where the pairs are there
# already, nothing is served: a chain of jobs that is submitted again passes quickly over what is done.
run_pairs() { # --model MODEL --output DIR OPTION...
    local usage="sbatch slurm/pairs.sbatch --model runs/RUN --output pairs/NAME --prompts SOURCE --reward-model MODEL"
    local model="" output="" rest=()
    while [ $# -gt 0 ]; do
        case $1 in
            --model) [ -z "$model" ] || die "give one --model a job"; model=${2:-}; shift ;;
            --model=*) [ -z "$model" ] || die "give one --model a job"; model=${1#--model=} ;;
            --endpoint* | --served-name* | --until*) die "$1 is the job's own; leave it out" ;;
            --output) output=${2:-}; rest+=("$1" "$output"); shift ;;
            --output=*) output=${1#--output=}; rest+=("$1") ;;
            *) rest+=("$1") ;;
        esac
        shift
    done
    [ -n "$output" ] || die "give --output: $usage"
    begin "$model" "$usage"
    local again="failed; see above, and submit the same line again to resume"
    if [ -f "$output/pairs.json" ]; then
        server_port=9 served_model=none # which nobody asks
    else
        start_server "$model"
    fi
    local pairs=(-m nemo_lmpo.pairs --model "$model" --endpoint "http://127.0.0.1:$server_port"
        --served-name "$served_model" "${rest[@]}")
    if [ -n "${server_pid:-}" ]; then
        say "pairs: sampling"
        in_step "$NEMO_LMPO_PYTHON" "${pairs[@]}" --until sample || die "sampling $again"
        stop_server
    fi
    say "pairs: scoring and choosing"
    in_step "$NEMO_LMPO_PYTHON" "${pairs[@]}" || die "scoring $again"
    say "the pairs are done"
    remove_job_dir
}

# What jobs with a server begin with; the server ends with the job, however it ends.
begin() { # MODEL USAGE
    [ -n "$1" ] || die "give --model: $2"
    setup_job
    announce 1
    trap stop_server EXIT
}

# A command on the job's node, in the container if there is one; beside the server, so with --overlap.
in_step() {
    container_command
    srun --overlap --nodes=1 --ntasks=1 "${step_options[@]}" "${inside[@]}" "$@"
}

# Exports the model if need be, starts the server on all GPUs of the job, and waits until it is ready: server_port and
# served_model.
start_server() { # MODEL
    local served serve=${NEMO_LMPO_SERVE:-vllm serve --generation-config vllm} seconds=${NEMO_LMPO_SERVE_SECONDS:-1800} log=$job_dir/server.log
    [[ $seconds =~ ^[0-9]+$ ]] || die "NEMO_LMPO_SERVE_SECONDS=$seconds is not a whole number of seconds"
    served=$(in_step "$NEMO_LMPO_PYTHON" -m nemo_lmpo.evaluate export --model "$1" --output "$job_dir/huggingface") ||
        die "the model cannot be exported; see above"
    local port=$((30000 + SLURM_JOB_ID % 20000))
    until port_is_free "$port"; do port=$((port + 1)); done
    server_port=$port
    served_model=$served
    say "server: starting on port $port for $served (its output: $log)" # not its command, which may hold a key
    # NEMO_LMPO_SERVE is a shell command of the site, variables included.
    srun --overlap --nodes=1 --ntasks=1 bash -c "exec $serve \"\$@\"" serve "$served" --host 127.0.0.1 --port "$port" \
        >"$log" 2>&1 &
    server_pid=$!
    local waited=0
    until (exec 3<>"/dev/tcp/127.0.0.1/$port" && printf 'GET /health HTTP/1.0\r\n\r\n' >&3 && grep -q ' 200 ' <&3) 2>/dev/null; do
        if ! kill -0 "${server_pid:?}" 2>/dev/null; then
            tail -n 20 "$log"
            die "the server ended before it was ready; its last lines are above"
        fi
        [ "$waited" -lt "$seconds" ] || die "the server is not ready after $seconds seconds; see $log"
        sleep 2
        waited=$((waited + 2))
    done
    say "server: ready after about $waited seconds"
}

stop_server() {
    [ -n "${server_pid:-}" ] || return 0
    kill "${server_pid:?}" 2>/dev/null
    wait "$server_pid" 2>/dev/null
    server_pid=
}
