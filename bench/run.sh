#!/usr/bin/env bash
# Installs what is missing, builds the release binary, and measures over loopback. Runs again at any time.
set -euo pipefail

# shellcheck source=scripts/setup.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/../scripts/setup.sh"
# shellcheck source=scripts/nixl.sh
. "$repo_root/scripts/nixl.sh"
# shellcheck source=scripts/rdma.sh
. "$repo_root/scripts/rdma.sh"

usage() {
    cat <<'TEXT'
Usage: bench/run.sh
       bench/run.sh loopback [OPTION OF corelane-bench loopback]...
       bench/run.sh nixl [OPTION OF corelane-bench nixl]...

Moves real bytes between two processes on this machine, prints latencies and draws a report. Installs what is missing first
(Debian packages as root or by sudo, Rust into your home); with CORELANE_NO_INSTALL=1 it installs nothing.

Without arguments, in less than three minutes once it is built: the engine beside bare sockets, then, where NIXL can be had
from PyPI, the NIXL plugin beside NIXL's UCX; at the end the five figures that matter and where the reports are. Options
without a first word go to `loopback`.

With `nixl` as the first word it measures the NIXL plugin instead, beside NIXL's own UCX over TCP. For this it also needs a
C++ compiler and libclang (Debian packages), and NIXL from PyPI, in an environment of its own under target/.

With `loopback` as the first word, CORELANE_BENCH=PROGRAM measures with a corelane-bench that is built already.

Once it is built, `corelane-bench loopback --help` and `corelane-bench nixl --help` list the options, for example:
    bench/run.sh loopback --json results.json
    bench/run.sh nixl --scenario kv --target-app sleep
TEXT
}

build_bench() {
    cargo build --release --locked --manifest-path "$repo_root/Cargo.toml" --package corelane-bench \
        "${cargo_features[@]}" "$@"
}

measure_loopback() {
    local bench
    want_rdma
    prepare_machine
    choose_cargo_features
    bench=${CORELANE_BENCH:-}
    if [[ -z $bench ]]; then
        build_bench
        bench=$(target_dir)/release/corelane-bench
    fi
    remove_scratch_dir
    exec "$bench" loopback "$@"
}

# --- all in less than three minutes

measure_default() {
    local bench results=corelane-bench-results
    want "a C++ compiler" can_compile_cxx g++
    want "libclang with its headers" have_libclang libclang-dev
    want_nixl "$nixl_newest"
    want_rdma
    prepare_machine
    choose_cargo_features
    if ! can_compile_cxx || ! have_libclang; then
        nixl_problem="a C++ compiler or libclang is missing"
    elif ensure_nixl "$nixl_newest"; then
        nixl_problem=""
    fi
    if [[ -n $nixl_problem ]]; then
        build_bench
    else
        build_bench --package corelane-nixl --features corelane-bench/nixl
    fi
    bench=$(target_dir)/release/corelane-bench
    printf '\nThe engine over TCP, beside bare sockets:\n'
    "$bench" loopback --baseline raw-tcp --rounds 3 --budget 20s --sizes 64,4KiB,64KiB,1MiB,16MiB \
        --scenario sizes,kv,notify,throughput,decode-under-prefill --phase-duration 1s --out-dir "$results/loopback"
    if [[ -n $nixl_problem ]]; then
        printf '\nNot compared with UCX through NIXL: %s.\n' "$nixl_problem"
        remove_scratch_dir
        return
    fi
    printf '\nThe NIXL plugin, beside UCX:\n'
    eval "$(nixl_environment "$nixl_newest")"
    remove_scratch_dir
    "$bench" nixl --vs UCX --op read --rounds 3 --duration 300ms --phase-duration 1s --out-dir "$results/nixl"
}

# --- nixl

measure_nixl() {
    local bench
    need "a C++ compiler" can_compile_cxx g++
    need "libclang with its headers" have_libclang libclang-dev
    need_nixl "$nixl_newest"
    want_rdma
    prepare_machine
    choose_cargo_features
    ensure_nixl "$nixl_newest" || give_up "cannot measure through NIXL: $nixl_problem"
    build_bench --package corelane-nixl --features corelane-bench/nixl
    bench=$(target_dir)/release/corelane-bench
    if ! names_a_peer "$@"; then
        set -- --vs UCX@UCX_TLS=tcp "$@"
    fi
    eval "$(nixl_environment "$nixl_newest")"
    remove_scratch_dir
    exec "$bench" nixl "$@"
}

names_a_peer() {
    local word
    for word in "$@"; do
        [[ $word != --vs && $word != --vs=* && $word != -h && $word != --help ]] || return 0
    done
    return 1
}

main() {
    case ${1:-} in
        -h | --help) usage ;;
        nixl)
            shift
            measure_nixl "$@"
            ;;
        "") measure_default ;;
        loopback)
            shift
            measure_loopback "$@"
            ;;
        *) measure_loopback "$@" ;;
    esac
}

main "$@"
