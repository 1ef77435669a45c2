#!/usr/bin/env bash
# Installs what is missing, builds the release binary, and measures over loopback. Runs again at any time.
set -euo pipefail

# shellcheck source=scripts/setup.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/../scripts/setup.sh"

usage() {
    cat <<'TEXT'
Usage: bench/run.sh [OPTION OF corelane-bench loopback]...

Moves real bytes between two processes on this machine and prints the latency histogram. Installs what is missing first
(Debian packages as root or by sudo, Rust into your home); with CORELANE_NO_INSTALL=1 it installs nothing.

Once it is built, `corelane-bench loopback --help` lists the options, for example:
    bench/run.sh --json results.json
TEXT
}

build_bench() {
    cargo build --release --locked --manifest-path "$repo_root/Cargo.toml" --package corelane-bench
}

main() {
    local bench
    case ${1:-} in
        -h | --help)
            usage
            return
            ;;
    esac
    prepare_machine
    build_bench
    bench=$(target_dir)/release/corelane-bench
    remove_scratch_dir
    exec "$bench" loopback "$@"
}

main "$@"
