#!/usr/bin/env bash
# The soft-RoCE rig by hand. `tests/rdma/rig.sh --help` says more.
set -euo pipefail

# shellcheck source=scripts/setup.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/../../scripts/setup.sh"
# shellcheck source=scripts/rdma.sh
. "$repo_root/scripts/rdma.sh"

usage() {
    cat <<'TEXT'
Usage: tests/rdma/rig.sh [OPTION OF run.sh]... exec COMMAND [ARGUMENT]...
       tests/rdma/rig.sh [OPTION OF run.sh]... perftest [OPTION OF perftest.sh]...
       tests/rdma/rig.sh [OPTION OF run.sh]... compare [OPTION OF compare.sh]...
       tests/rdma/rig.sh [OPTION OF run.sh]... shell

Boots an emulated machine with two connected soft-RoCE devices, rxe0 and rxe1, and runs one program in it, perftest, perftest and
corelane-bench side by side (as `cargo build --release -p corelane-bench` has left it), or a shell.
The repository and cargo's target directory are seen inside at the same paths, read-only; programs that were built here run
there. `tests/rdma/run.sh -h` lists the options and tells what else is inside. Makes the rig if it is not there yet, in
target/rdma-rig/. Files that the command leaves in $RESULTS come back, in target/rdma-rig/results/.
To run the tests: tests/run.sh rdma
TEXT
}

# Takes the options away, into `options`.
split_options() {
    options=()
    while [[ ${1:-} == -* && $1 != -h && $1 != --help ]]; do
        if [[ $1 == -?* && $1 != -i && ${#1} == 2 ]]; then
            options+=("$1" "${2:?the value of $1 is missing}")
            shift 2
        else
            options+=("$1")
            shift
        fi
    done
    words=("$@")
}

in_rig() {
    local results=$rdma_rig/results
    mkdir -p -- "$results"
    remove_scratch_dir
    exec "$repo_root/tests/rdma/run.sh" -s "$repo_root" -s "${rdma_rig%/*}" -e RUST_BACKTRACE=1 -e RESULTS="$results" \
        "${options[@]}" "$rdma_rig" "$results" "$@"
}

# As the caller names it, by a path or by the name of a program inside.
absolute() {
    if [[ -e $caller_dir/$1 ]]; then
        realpath -- "$caller_dir/$1"
    else
        printf '%s' "$1"
    fi
}

main() {
    split_options "$@"
    case ${words[0]:--h} in
        exec | perftest | compare | shell) ;;
        -h | --help)
            usage
            return
            ;;
        *) give_up "'${words[0]}' is none of exec, perftest, compare and shell: see tests/rdma/rig.sh --help" ;;
    esac
    rig_is_for_this_machine || give_up "the rig takes an x86-64 machine"
    find_rust || give_up "$rust_problem"
    ensure_rdma_rig || give_up "$rdma_rig_problem"
    case ${words[0]} in
        exec)
            ((${#words[@]} > 1)) || give_up "exec takes a command"
            in_rig "$(absolute "${words[1]}")" "${words[@]:2}"
            ;;
        perftest) in_rig "$repo_root/tests/rdma/perftest.sh" "${words[@]:1}" ;;
        compare)
            [[ -x ${rdma_rig%/*}/release/corelane-bench ]] ||
                give_up "corelane-bench is not built: cargo build --release -p corelane-bench"
            in_rig "$repo_root/tests/rdma/compare.sh" "${words[@]:1}" "${rdma_rig%/*}/release/corelane-bench"
            ;;
        shell)
            options+=(-i -t 86400)
            in_rig bash -i
            ;;
    esac
}

main "$@"
