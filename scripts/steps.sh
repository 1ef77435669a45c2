# shellcheck shell=bash
# The steps of tests/run.sh: declared with `step`, run in order by `run_steps`, told in a table by `print_table`.

step_names=()
step_functions=()
step_conditions=()

step_results=()  # ran, failed, not run
step_seconds=()  # tenths of seconds, or nothing
step_notes=()
excused=()       # the steps that are not run because the machine lacks the hardware

readonly step_limit_seconds=1500
readonly shown_log_lines=300
readonly shown_failures=25

# step NAME FUNCTION [CONDITION]
# FUNCTION does the work, in the repository root under `set -e`; its output goes to a log, shown when it fails. CONDITION
# returns false by `cannot_run` or `lacks_hardware`, which say why; without one the step always runs.
step() {
    step_names+=("$1")
    step_functions+=("$2")
    step_conditions+=("${3:-true}")
}

# For conditions: the step could run here after the change that the reason names. Fails the whole run where CI=true.
cannot_run() {
    not_run_because=$1
    return 1
}

# For conditions: this machine lacks the hardware or the kernel for it, which is no failure even where CI=true.
lacks_hardware() {
    not_run_because=$1
    not_run_excused=yes
    return 1
}

in_ci() {
    [[ ${CI:-} == true ]]
}

# Runs the selected steps, with their logs in the directory $1; returns when all have been tried.
run_steps() {
    local log_dir=$1 index
    mkdir -p -- "$log_dir"
    for index in "${selected[@]}"; do
        run_step "$index" "$log_dir/${step_names[index]}.log"
    done
}

# select_steps [NAME]...   takes the steps named, or all.
select_steps() {
    local index name
    for name in "$@"; do
        is_one_of "$name" "${step_names[@]}" || give_up "no step is called '$name'; the steps are: ${step_names[*]}"
    done
    selected=()
    for index in "${!step_names[@]}"; do
        if (($# == 0)) || is_one_of "${step_names[index]}" "$@"; then
            selected+=("$index")
        fi
    done
}

is_one_of() {
    local wanted=$1 word
    shift
    for word in "$@"; do
        [[ $word != "$wanted" ]] || return 0
    done
    return 1
}

# True where the step $1 is to run: what only an unselected step uses need not be installed.
is_selected() {
    local index
    for index in "${selected[@]}"; do
        [[ ${step_names[index]} != "$1" ]] || return 0
    done
    return 1
}

run_step() {
    local index=$1 log=$2 started
    not_run_because="" not_run_excused=no
    rm -f -- "$log"
    if ! "${step_conditions[index]}"; then
        [[ $not_run_excused == no ]] || excused+=("${step_names[index]}")
        record_step "$index" "not run" "" "$not_run_because"
        return
    fi
    started=$(tenths_of_seconds)
    run_logged "$(step_label "$index")" "$log" "$step_limit_seconds" run_step_function "$index"
    record_step "$index" "$(result_of_job)" "$(($(tenths_of_seconds) - started))" "$(note_of_job "$log")"
    ((job_status == 0)) || show_failure "${step_names[index]}" "$log"
}

run_step_function() {
    set -euo pipefail
    cd -- "$repo_root"
    "${step_functions[$1]}"
}

step_label() {
    local position=1 index
    for index in "${selected[@]}"; do
        ((index != $1)) || break
        position=$((position + 1))
    done
    printf '[%d/%d] %s' "$position" "${#selected[@]}" "${step_names[$1]}"
}

tenths_of_seconds() {
    local microseconds=${EPOCHREALTIME/[^0-9]/}
    printf '%d' $((microseconds / 100000))
}

result_of_job() {
    if ((job_status == 0)); then
        printf 'ran'
    else
        printf 'failed'
    fi
}

note_of_job() {
    if [[ $job_too_long == yes ]]; then
        printf 'stopped after %d minutes; output: %s' $((step_limit_seconds / 60)) "$1"
    elif ((job_status != 0)); then
        printf 'exit status %d; output: %s' "$job_status" "$1"
    fi
}

record_step() {
    local index=$1
    step_results[index]=$2
    step_seconds[index]=$3
    step_notes[index]=$4
    print_row "${step_names[index]}" "$2" "$3" "$4"
}

# First what failed there, in the words of nextest, cargo, rustc and pytest, for readers who see only the beginning.
show_failure() {
    local name=$1 log=$2
    printf '\n--- %s failed:\n' "$name"
    grep -E '^ +(FAIL|TIMEOUT|ABORT|SIG[A-Z]+|LEAK-FAIL) \[|[. ] FAILED(:|$)|^(FAILED|ERROR) |^error(\[|:)|panicked at|^E  +' "$log" |
        cut -c 1-300 | awk '!seen[$0]++' | head -n "$shown_failures" || true
    printf -- '--- the last lines of %s:\n' "$log"
    grep -vE '^ *(Compiling|Checking|Documenting|Downloading|Downloaded|Blocking|Fresh) ' "$log" |
        tail -n "$shown_log_lines" || true
    printf -- '--- end of %s\n\n' "$name"
}

print_row() {
    local name=$1 result=$2 tenths=$3 note=$4 time="" paint="" plain="" padded
    if [[ -n $tenths ]]; then
        time="$((tenths / 10)).$((tenths % 10)) s"
    fi
    if [[ -t 1 && -z ${NO_COLOR:-} ]]; then
        plain=$'\033[0m'
        case $result in
            ran) paint=$'\033[32m' ;;
            failed) paint=$'\033[31m' ;;
            'not run') paint=$'\033[33m' ;;
        esac
    fi
    printf -v padded '%-7s' "$result"
    printf '%-*s  %s  %9s%s\n' "$(name_width)" "$name" "$paint$padded$plain" "$time" "${note:+  $note}"
}

name_width() {
    local width=4 name
    for name in "${step_names[@]}"; do
        ((${#name} <= width)) || width=${#name}
    done
    printf '%d' "$width"
}

print_table() {
    local index
    printf '\n'
    printf '%-*s  %-7s  %9s\n' "$(name_width)" step result time
    for index in "${selected[@]}"; do
        print_row "${step_names[index]}" "${step_results[index]}" "${step_seconds[index]}" "${step_notes[index]}"
    done
    printf '\n'
}

# The exit status of the run: 1 where a step failed or, in CI, was left out for a reason that CI should not have.
steps_verdict() {
    local index verdict=0 name
    for index in "${selected[@]}"; do
        name=${step_names[index]}
        case ${step_results[index]} in
            failed) verdict=1 ;;
            'not run')
                if in_ci && ! is_one_of "$name" "${excused[@]}"; then
                    printf 'CI=true: %s has to run here, and did not: %s\n' "$name" "${step_notes[index]}"
                    verdict=1
                fi
                ;;
        esac
    done
    return "$verdict"
}
