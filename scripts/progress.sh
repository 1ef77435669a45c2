# shellcheck shell=bash
# Runs one long command at a time with its output in a log file; a terminal shows what runs and for how long.

job_pid=""      # the process group that runs now
job_status=0    # the exit status of the last one
job_too_long=no # whether the last one was stopped at its limit

# run_logged LABEL LOG LIMIT_SECONDS COMMAND...   leaves the exit status in `job_status`; never fails itself, so that
# `set -e` holds inside a COMMAND that is a shell function.
run_logged() {
    local label=$1 log=$2 limit_seconds=$3
    shift 3
    # A process group of its own: an interrupt ends all that the command started.
    set -m
    (
        set +m
        "$@"
    ) >"$log" 2>&1 </dev/null &
    job_pid=$!
    set +m
    watch_job "$label" "$log" "$limit_seconds"
    job_pid=""
}

# shellcheck disable=SC2034 # job_too_long is read by steps.sh, which bench/run.sh does not source
watch_job() {
    local label=$1 log=$2 limit_seconds=$3 started=$SECONDS
    while kill -0 "$job_pid" 2>/dev/null; do
        show_progress "$label" "$((SECONDS - started))" "$log"
        if ((SECONDS - started >= limit_seconds)); then
            stop_job
            hide_progress
            job_status=1 job_too_long=yes
            return
        fi
        sleep 0.2
    done
    hide_progress
    job_status=0 job_too_long=no
    wait "$job_pid" 2>/dev/null || job_status=$?
}

# Asks the process group to end, then makes it.
stop_job() {
    local deadline=$((SECONDS + 3))
    [[ -n $job_pid ]] || return 0
    kill -TERM -- "-$job_pid" 2>/dev/null || true
    while ((SECONDS < deadline)) && kill -0 -- "-$job_pid" 2>/dev/null; do
        sleep 0.1
    done
    kill -KILL -- "-$job_pid" 2>/dev/null || true
    wait "$job_pid" 2>/dev/null || true
}

show_progress() {
    local label=$1 seconds=$2 log=$3 last_line columns line
    [[ -t 2 ]] || return 0
    columns=$(stty size <&2 2>/dev/null | cut -d' ' -f2) || true
    last_line=$(tail -n 1 -- "$log" | tr -d '\r' | tr -c '[:print:]' ' ')
    printf -v line '%s  %d:%02d  %s' "$label" $((seconds / 60)) $((seconds % 60)) "$last_line"
    printf '\r\033[K%s' "${line:0:$((${columns:-80} - 1))}" >&2
}

hide_progress() {
    [[ -t 2 ]] || return 0
    printf '\r\033[K' >&2
}

interrupted() {
    trap '' INT TERM HUP
    hide_progress
    stop_job
    say "interrupted"
    exit 130
}

trap interrupted INT TERM HUP
