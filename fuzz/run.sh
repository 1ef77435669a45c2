#!/usr/bin/env bash
# Builds the fuzz targets with AddressSanitizer and runs each from the committed corpus; `fuzz/run.sh --help` says more.
set -euo pipefail

fuzz_dir=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
readonly fuzz_dir
readonly work=${CARGO_TARGET_DIR:-$fuzz_dir/../target}/fuzz
mapfile -t all_targets < <(cd -- "$fuzz_dir/fuzz_targets" && printf '%s\n' *.rs | sed 's/\.rs$//')

usage() {
    cat <<TEXT
Usage: fuzz/run.sh [--seconds N] [--jobs N] [--keep] [TARGET]...

Runs the targets named, or all: ${all_targets[*]}.
Each starts from fuzz/corpus/TARGET and runs for N seconds (10). What it finds goes to target/fuzz/TARGET/ and is not
committed; --keep adds to fuzz/corpus what covers more than the corpus did, in its smallest form. An input that
fails is left in target/fuzz/findings/: put it into fuzz/corpus, where the ordinary tests run it, too.
Any toolchain that builds corelane does: the compiler's own instrumentation is used, without cargo-fuzz.
TEXT
}

seconds=10
jobs=1
keep=no
targets=()
while (($# > 0)); do
    case $1 in
        -h | --help)
            usage
            exit
            ;;
        --seconds)
            seconds=$2
            shift
            ;;
        --jobs)
            jobs=$2
            shift
            ;;
        --keep) keep=yes ;;
        *) targets+=("$1") ;;
    esac
    shift
done
((${#targets[@]} > 0)) || targets=("${all_targets[@]}")

host=$(rustc -vV | sed -n 's/^host: //p')
readonly host

# True where the toolchain has the sanitizer's run-time library, as those of rustup have.
has_address_sanitizer() {
    compgen -G "$(rustc --print target-libdir)/librustc*_rt.asan.a" >/dev/null
}

# What `cargo fuzz build` would say to the compiler. The sanitizer is one of rustc's unstable options, which
# RUSTC_BOOTSTRAP lets a stable compiler take.
build() {
    local flags=(
        --cfg fuzzing -Cpasses=sancov-module
        -Cllvm-args=-sanitizer-coverage-level=4
        -Cllvm-args=-sanitizer-coverage-inline-8bit-counters
        -Cllvm-args=-sanitizer-coverage-pc-table
        -Cllvm-args=-sanitizer-coverage-trace-compares
        -Cforce-frame-pointers=yes
    )
    if has_address_sanitizer; then
        flags+=(-Zsanitizer=address)
    else
        printf 'without AddressSanitizer, which this toolchain does not have\n'
    fi
    RUSTC_BOOTSTRAP=1 RUSTFLAGS="${RUSTFLAGS:-} ${flags[*]}" CARGO_TARGET_DIR="$work/build" \
        cargo build --release --locked --manifest-path "$fuzz_dir/Cargo.toml" --target "$host"
}

# A minute for one input, since the machine may be busy; they take milliseconds.
# The largest allocation that one input may cause, in MiB: decoders state less than a page; a session holds one
# notification of 16 MiB.
malloc_limit() {
    case $1 in
        session | stream) printf 40 ;;
        *) printf 2 ;;
    esac
}

run_target() {
    local target=$1 log=$work/$1.log verdict=0
    mkdir -p -- "$work/$target" "$work/findings"
    RUST_BACKTRACE=0 "$work/build/$host/release/$target" "$work/$target" "$fuzz_dir/corpus/$target" \
        -max_total_time="$seconds" -timeout=60 -rss_limit_mb=1024 -malloc_limit_mb="$(malloc_limit "$target")" \
        -max_len=8192 -print_final_stats=1 -artifact_prefix="$work/findings/$target-" >"$log" 2>&1 || verdict=$?
    report "$target" "$log" "$verdict"
    return "$verdict"
}

report() {
    local target=$1 log=$2 verdict=$3 runs coverage
    runs=$(sed -n 's/^stat::number_of_executed_units: *//p' "$log")
    coverage=$(sed -n 's/.* cov: \([0-9]*\) .*/\1/p' "$log" | tail -n 1)
    if ((verdict == 0)); then
        printf '%-12s %12s inputs %8s edges  no finding\n' "$target" "$runs" "$coverage"
    else
        printf '%-12s FAILED:\n' "$target"
        grep -E -A 30 'panicked at|ERROR: |SUMMARY: ' "$log" | head -n 60
    fi
}

keep_target() {
    local target=$1
    "$work/build/$host/release/$target" -merge=1 -max_len=8192 "$fuzz_dir/corpus/$target" "$work/$target" \
        >>"$work/$target.log" 2>&1
}

build
failed=0
running=0
printf '%s s for each target\n' "$seconds"
for target in "${targets[@]}"; do
    if ((running == jobs)); then
        wait -n || failed=1
        running=$((running - 1))
    fi
    run_target "$target" &
    running=$((running + 1))
done
while ((running > 0)); do
    wait -n || failed=1
    running=$((running - 1))
done
if [[ $keep == yes && $failed == 0 ]]; then
    for target in "${targets[@]}"; do
        keep_target "$target"
    done
fi
exit "$failed"
