#!/usr/bin/env bash
# Runs tests that need an RDMA device, out of test programs that cargo built: in the rig, all in one boot, or right here.
set -euo pipefail

here=$(dirname -- "$(realpath -- "${BASH_SOURCE[0]}")")
readonly here
repo_root=$(dirname -- "$(dirname -- "$here")")
readonly repo_root

readonly rig_failed=125
readonly rig_only=rdma_faults # breaks links and devices

filter=rdma
left_out=()
skipped=() # the same, as options of libtest
left_out_programs=()
environment=()
rig=""
memory_mb=1536
limit_seconds=900

usage() {
    cat <<'TEXT'
Usage: tests/rdma/suite.sh [OPTION]... RESULTS PROGRAM...

Runs the tests with the filter in their names, and all tests of programs that are named rdma_*, one program after another; those of
rdma_faults only in the rig.
  -f FILTER     of libtest, by default rdma
  -x PART       leaves out the tests with this in their names; may be repeated
  -e NAME=VALUE an environment variable of the programs; may be repeated
  -r RIG        inside the rig in this directory; without it on this machine
  -m MEGABYTES  memory of the rig, by default 1536
  -t SECONDS    the limit on the boot with all tests, by default 900
In the directory RESULTS are then: output, and results.txt with a line for each test, its outcome, program and name.
The exit status is 0 when every test is ok or ignored, 1 when not; 124 when time is up, 125 when the rig does not work.
TEXT
}

parse_options() {
    local option
    while getopts hf:x:e:r:m:t: option; do
        case $option in
            f) filter=$OPTARG ;;
            x) left_out+=("$OPTARG") skipped+=(--skip "$OPTARG") ;;
            e) environment+=("$OPTARG") ;;
            m) memory_mb=$OPTARG ;;
            r) rig=$OPTARG ;;
            t) limit_seconds=$OPTARG ;;
            h)
                usage
                exit
                ;;
            *) exit "$rig_failed" ;;
        esac
    done
    shift $((OPTIND - 1))
    if (($# < 2)); then
        usage >&2
        exit "$rig_failed"
    fi
    mkdir -p -- "$1"
    results=$(realpath -- "$1")
    programs=("${@:2}")
}

# Prints the name of the test program in file $1, which ends in a hash.
program_name() {
    local file=${1##*/}
    printf '%s' "${file%-*}"
}

# Leaves two files in the results: `plan`, what inside.sh runs, and `expected`, the tests that have to have an outcome.
make_plan() {
    local program name words
    rm -f -- "$results/results.txt"
    : >"$results/plan"
    : >"$results/expected"
    for program in "${programs[@]}"; do
        name=$(program_name "$program")
        if [[ -z $rig && $name == "$rig_only" ]]; then
            left_out_programs+=("$name")
            continue
        fi
        words=$filter
        [[ $name != rdma_* ]] || words=""
        "$program" --list "$words" "${skipped[@]}" | sed -n "s/: test\$//p" | sed "s/^/$name /" >"$results/listed"
        if [[ -s $results/listed ]]; then
            printf '%s\t%s\t%s\n' "$name" "$program" "$words" >>"$results/plan"
            cat -- "$results/listed" >>"$results/expected"
        fi
    done
    rm -f -- "$results/listed"
}

# Programs find their peer process, and their sources, at the paths that were compiled in.
run_plan() {
    local target variable words=()
    if [[ -z $rig ]]; then
        (cd -- "$repo_root/tests" && env "${environment[@]}" "$here/inside.sh" "$results/plan" "${skipped[@]}" 2>&1 </dev/null) |
            tee "$results/output"
        return
    fi
    for variable in "${environment[@]}"; do
        words+=(-e "$variable")
    done
    target=$(dirname -- "$(dirname -- "$(dirname -- "${programs[0]}")")")
    "$here/run.sh" -t "$limit_seconds" -m "$memory_mb" -s "$repo_root" -s "$target" -C "$repo_root/tests" -e RUST_BACKTRACE=1 \
        -e "RUST_TEST_THREADS=${RUST_TEST_THREADS:-2}" "${words[@]}" "$rig" "$results" "$here/inside.sh" "$results/plan" "${skipped[@]}"
}

# Reads libtest's own words. What a test writes may come between its name and its outcome, where one runs at a time.
read_outcomes() {
    awk '
        function outcome(word) { if (test != "") print word, program, test; test = "" }
        /^=== / { program = $2; test = "" }
        /^test .* \.\.\. / { test = $2 }
        /(^| )ok$/ { outcome("ok") }
        /(^| )FAILED$/ { outcome("FAILED") }
        /(^| )ignored(, .*)?$/ { outcome("ignored") }
    ' "$results/output"
}

# A test that was planned and did not come to an end is one of its own kind.
write_results() {
    read_outcomes >"$results/outcomes"
    awk '
        FILENAME == ARGV[1] { outcome[$2 " " $3] = $1; next }
        { print ($0 in outcome ? outcome[$0] : "missing"), $0 }
    ' "$results/outcomes" "$results/expected" >"$results/results.txt"
    rm -f -- "$results/outcomes"
}

count() {
    grep -c "^$1 " "$results/results.txt" || true
}

# Not in libtest's words, which are counted where they are.
print_summary() {
    local place="on this machine"
    [[ -z $rig ]] || place="in the RDMA rig"
    grep -E '^(FAILED|missing) ' "$results/results.txt" || true
    ((${#skipped[@]} == 0)) || printf 'left out: tests with one of these in the name: %s\n' "${left_out[*]}"
    ((${#left_out_programs[@]} == 0)) || printf 'left out: %s, which breaks devices, and takes the rig for it\n' "${left_out_programs[*]}"
    printf 'tests of RDMA: %d passed; %d failed; %d missing; %d ignored; of %d programs, %s, in %d s; %s\n' \
        "$(count ok)" "$(count FAILED)" "$(count missing)" "$(count ignored)" "$(wc -l <"$results/plan")" \
        "$place" "$SECONDS" "$results/results.txt"
}

main() {
    local status=0
    parse_options "$@"
    make_plan
    if [[ ! -s $results/plan ]]; then
        printf 'no test has %s in its name\n' "$filter" >&2
        exit 1
    fi
    run_plan || status=$?
    write_results
    print_summary
    if ((status == 0)) && grep -qE '^(FAILED|missing) ' "$results/results.txt"; then
        status=1
    fi
    exit "$status"
}

main "$@"
