#!/usr/bin/env bash
# Installs what is missing, then runs every check and test. Runs again at any time; `tests/run.sh --help` says more.
set -euo pipefail

# shellcheck source=scripts/setup.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/../scripts/setup.sh"
# shellcheck source=scripts/steps.sh
. "$repo_root/scripts/steps.sh"

# A new kind of check or test is one line here and its functions below; what it installs is said in `prepare`.
declare_steps() {
    #    name        function         condition
    step format      check_format     has_rustfmt
    step scripts     check_scripts    has_shellcheck
    step clippy      check_clippy     has_clippy
    step docs        build_docs
    step other-arch  check_other_arch has_other_arch
    step tests       run_tests
    step doc-tests   run_doc_tests
    step loom        run_loom
    step build       build_release
    step bench       smoke_bench      has_bench
}

usage() {
    cat <<TEXT
Usage: tests/run.sh [STEP]...

Runs every check and test of corelane, or only the steps named: ${step_names[*]}.
Installs what is missing first (Debian packages as root or by sudo, Rust into your home); CORELANE_NO_INSTALL=1 forbids it.
Ends with a table of the steps and the test runner's summary line. The exit status is 0 when nothing failed, 1 when a
step failed, 2 when the set-up could not be done; with CI=true a step that is not run fails too, unless it is for
want of hardware. The output of every step is kept in target/test-logs/.
TEXT
}

prepare() {
    if is_selected scripts; then
        want "shellcheck" have_shellcheck shellcheck
    fi
    if is_selected loom; then
        crate_flag_sets+=("$loom_flags")
    fi
    prepare_machine
    if is_selected format && ! have_rustfmt; then
        rustup_add component rustfmt
    fi
    if is_selected clippy && ! have_clippy; then
        rustup_add component clippy
    fi
    other_target=$(other_architecture)-unknown-linux-gnu
    if is_selected other-arch && ! have_target "$other_target"; then
        rustup_add target "$other_target"
    fi
    target=$(target_dir)
    log_dir=$target/test-logs
}

# --- format, scripts, clippy, docs

has_rustfmt() {
    have_rustfmt || cannot_run "rustfmt is missing: rustup component add rustfmt"
}

check_format() {
    cargo fmt --all --check -- --color never
}

have_shellcheck() {
    have_command shellcheck
}

has_shellcheck() {
    have_shellcheck || cannot_run "shellcheck is missing: $(package_command shellcheck)"
}

check_scripts() {
    local scripts
    mapfile -t scripts < <(shell_scripts)
    shellcheck --external-sources --check-sourced --source-path="$repo_root" "${scripts[@]}"
}

# Every shell script of the repository, by its first line; what they source is checked with them.
shell_scripts() {
    find . -name .git -prune -o -name target -prune -o -type f -exec \
        awk 'FNR == 1 && /^#!.*[\/ ](ba)?sh( |$)/ { print FILENAME }' {} +
}

has_clippy() {
    have_clippy || cannot_run "clippy is missing: rustup component add clippy"
}

check_clippy() {
    cargo clippy --workspace --all-targets --locked -- -D warnings
}

build_docs() {
    RUSTDOCFLAGS="${RUSTDOCFLAGS:-} -D warnings" cargo doc --workspace --no-deps --locked
}

# --- the architecture that this machine is not: compiled without its tests, which would take a C compiler for it

other_architecture() {
    case $(host_triple) in
        x86_64-*) printf 'aarch64' ;;
        *) printf 'x86_64' ;;
    esac
}

has_other_arch() {
    have_target "$other_target" || lacks_hardware "no Rust for another architecture: rustup target add $other_target"
}

check_other_arch() {
    cargo check --workspace --locked --target "$other_target"
}

# --- tests

have_nextest() {
    cargo nextest --version >/dev/null 2>&1
}

run_tests() {
    if have_nextest; then
        cargo nextest run --workspace --locked --no-fail-fast --failure-output final
    else
        cargo test --workspace --lib --bins --tests --locked --no-fail-fast
    fi
}

run_doc_tests() {
    cargo test --doc --workspace --locked --no-fail-fast
}

# The runner's own words on the tests of all crates: nextest's line, or cargo's lines, one for each test binary.
runner_summary() {
    local log=$log_dir/tests.log
    is_selected tests || return 0
    grep -E '^ *Summary \[' "$log" | tail -n 1 || grep -E '^test result: ' "$log" ||
        printf 'No summary of the tests: they did not get that far, see %s\n' "$log"
}

# --- loom: every interleaving of the lock-free parts, within a bound on preemptions

readonly loom_flags="--cfg loom"

run_loom() {
    run_loom_tests corelane-runtime
    run_loom_tests corelane
}

# In a target directory of its own, since the flag rebuilds everything; without LTO, which only slows the build here.
run_loom_tests() {
    local package=$1 output=$scratch/loom-tests.log
    RUSTFLAGS="${RUSTFLAGS:-} $loom_flags" \
        LOOM_MAX_PREEMPTIONS="${LOOM_MAX_PREEMPTIONS:-3}" \
        CARGO_TARGET_DIR="$target/loom" CARGO_PROFILE_RELEASE_LTO=off CARGO_PROFILE_RELEASE_CODEGEN_UNITS=16 \
        cargo test --release --locked --package "$package" --lib loom | tee "$output"
    if ! grep -q '^running [1-9]' "$output"; then
        printf '%s has no loom test: expected some in a module named loom\n' "$package"
        return 1
    fi
}

# --- the benchmark as a user runs it

build_release() {
    cargo build --release --workspace --locked
}

has_bench() {
    [[ -x $target/release/corelane-bench ]] || cannot_run "corelane-bench is not built: see the step build"
}

# In a directory of its own, for the files it writes.
smoke_bench() {
    mkdir -p -- "$log_dir/bench"
    cd -- "$log_dir/bench"
    "$target/release/corelane-bench" loopback --quick
}

main() {
    local verdict=0
    declare_steps
    case ${1:-} in
        -h | --help)
            usage
            return
            ;;
    esac
    select_steps "$@"
    prepare
    run_steps "$log_dir"
    print_table
    steps_verdict || verdict=$?
    runner_summary
    return "$verdict"
}

main "$@"
