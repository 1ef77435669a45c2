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
Usage: bench/run.sh [OPTION OF corelane-bench loopback]...
       bench/run.sh nixl [OPTION OF corelane-bench nixl]...

Moves real bytes between two processes on this machine and prints the latency histogram. Installs what is missing first
(Debian packages as root or by sudo, Rust into your home); with CORELANE_NO_INSTALL=1 it installs nothing.

With `nixl` as the first word it measures the NIXL plugin instead, beside NIXL's own UCX over TCP. For this it also needs a
C++ compiler and libclang (Debian packages), and NIXL from PyPI, in an environment of its own under target/.

Once it is built, `corelane-bench loopback --help` and `corelane-bench nixl --help` list the options, for example:
    bench/run.sh --json results.json
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
    build_bench
    bench=$(target_dir)/release/corelane-bench
    remove_scratch_dir
    exec "$bench" loopback "$@"
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
        *) measure_loopback "$@" ;;
    esac
}

main "$@"
