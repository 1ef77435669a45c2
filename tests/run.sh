#!/usr/bin/env bash
# Installs what is missing, then runs every check and test. Runs again at any time; `tests/run.sh --help` says more.
set -euo pipefail

# shellcheck source=scripts/setup.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/../scripts/setup.sh"
# shellcheck source=scripts/nixl.sh
. "$repo_root/scripts/nixl.sh"
# shellcheck source=scripts/rdma.sh
. "$repo_root/scripts/rdma.sh"
# shellcheck source=scripts/steps.sh
. "$repo_root/scripts/steps.sh"

# A new kind of check or test is one line here and its functions below; what it installs is said in `prepare`.
declare_steps() {
    #    name           function           condition
    step format         check_format       has_rustfmt
    step scripts        check_scripts      has_shellcheck
    step clippy         check_clippy       has_clippy
    step docs           build_docs
    step other-arch     check_other_arch   has_other_arch
    step tests          run_tests
    step fake-gpu       run_fake_gpu
    step faults         run_faults
    step doc-tests      run_doc_tests
    step loom           run_loom
    step simulator      run_simulator
    step memcheck       run_memcheck       has_valgrind
    step fuzz           run_fuzz
    step build          build_and_inspect
    step bench          smoke_bench        has_bench
    step rdma           run_rdma           has_rdma
    step nixl           run_nixl           has_nixl
    step nixl-rdma      run_nixl_rdma      has_nixl_rdma
    step nixl-versions  run_nixl_versions  has_all_nixl
}

# The simulator builds the engine with deliberate bugs (feature `sim`): never together with what users get.
readonly product_only=(--exclude corelane-sim)
readonly tests_only=(--exclude corelane-tests --exclude corelane-nixl-tests --exclude corelane-faults --exclude corelane-fake-cuda
    --exclude corelane-fake-verbs)

usage() {
    cat <<TEXT
Usage: tests/run.sh [STEP]...

Runs every check and test of corelane, or only the steps named: ${step_names[*]}.
Installs what is missing first (Debian packages as root or by sudo, Rust into your home); CORELANE_NO_INSTALL=1 forbids it.
Like the crates, NIXL comes from its registry in any case, into environments of its own in target/nixl/ (350 MB for each
of ${#nixl_tested[@]} versions), and where there is no RDMA device, the packages of a machine with soft-RoCE, to emulate it
in target/rdma-rig/ (300 MB). Name the steps you want to go without.
Ends with a table of the steps and the test runner's summary line. The exit status is 0 when nothing failed, 1 when a
step failed, 2 when the set-up could not be done; with CI=true a step that is not run fails too, unless it is for
want of hardware. The output of every step is kept in target/test-logs/.
TEXT
}

prepare() {
    if is_selected scripts; then
        want "shellcheck" have_shellcheck shellcheck
    fi
    if is_selected memcheck; then
        want "valgrind" have_valgrind valgrind libc6-dbg
    fi
    if is_selected loom; then
        crate_flag_sets+=("$loom_flags")
    fi
    if is_selected fuzz; then
        crate_manifests+=("$repo_root/fuzz/Cargo.toml")
    fi
    need "a C++ compiler" can_compile_cxx g++
    want "libclang with its headers" have_libclang libclang-dev
    want_rdma
    choose_nixl_versions
    if ((${#nixl_chosen[@]} > 0)); then
        want_nixl "${nixl_chosen[@]}"
    fi
    prepare_machine
    can_compile_cxx || give_up "still no C++ compiler that links a C++20 program after installing g++"
    choose_cargo_features
    choose_everything
    # What makes the next build quicker only makes the first one slower.
    ! in_ci || export CARGO_INCREMENTAL="${CARGO_INCREMENTAL:-0}"
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
    # Tests name here what they do not run for want of a right; no runner shows what a test that passes has said.
    export CORELANE_TEST_SKIPPED=$log_dir/skipped
    mkdir -p -- "$log_dir"
    : >"$CORELANE_TEST_SKIPPED"
    make_nixl_environments
    if is_selected rdma || is_selected nixl-rdma; then
        make_rdma_rig
    fi
}

# --- format, scripts, clippy, docs

has_rustfmt() {
    have_rustfmt || cannot_run "rustfmt is missing: rustup component add rustfmt"
}

check_format() {
    cargo fmt --all --check -- --color never
    cargo fmt --manifest-path fuzz/Cargo.toml --check -- --color never
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

# Then the engine without RDMA and with the deliberate bugs. The harness as users build it is looked at by the step build.
check_clippy() {
    cargo clippy "${everything[@]}" --all-targets --locked -- -D warnings &&
        cargo clippy --package corelane --package corelane-sim --no-default-features --all-targets --locked -- -D warnings
}

build_docs() {
    RUSTDOCFLAGS="${RUSTDOCFLAGS:-} -D warnings" cargo doc "${everything[@]}" --no-deps --locked
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

# The C++ part of the plugin takes a C++ compiler for that architecture, and RDMA the libraries that it is built with.
check_other_arch() {
    local left_out=(--exclude corelane-nixl-tests) compiler
    compiler=$(other_architecture)-linux-gnu-g++
    if ! have_command "$compiler"; then
        printf 'without corelane-nixl, the plugin, since %s is missing\n' "$compiler"
        left_out+=(--exclude corelane-nixl)
    fi
    cargo check --workspace "${product_only[@]}" "${left_out[@]}" --no-default-features --locked --target "$other_target"
}

# --- tests

# What is compiled for tests is compiled once: cargo chooses the features of all crates by the packages and features that it is asked
# for, so that every step asks for the same ones, and takes its part of what comes out.
choose_everything() {
    everything=(--workspace "${product_only[@]}" "${cargo_features[@]}")
    # The bindings of NIXL are generated by libclang whenever they are compiled.
    if have_libclang; then
        everything+=(--features "corelane-bench/nixl,corelane-bench/png")
    else
        say "going on without corelane-nixl-tests, since libclang is missing: $(package_command libclang-dev)"
        everything+=(--exclude corelane-nixl-tests --features corelane-bench/png)
    fi
}

# Also the libraries that tests load, which `cargo test` does not leave behind; with the tests, whose dependencies count as well.
build_everything() {
    cargo build "${everything[@]}" --lib --bins --tests --locked
    export CORELANE_TEST_LIBRARIES=$target/debug
}

have_nextest() {
    cargo nextest --version >/dev/null 2>&1
}

# All but those that need a NIXL, which the step nixl runs.
run_tests() {
    build_everything
    run_cargo_tests
}

# GPU memory on a driver whose GPUs are threads: where there is a GPU, `tests` has used that.
run_fake_gpu() {
    build_everything
    make_fake_driver
    if builds_rdma; then
        local -x CORELANE_NOOP_VERBS=$target/debug/libcorelane_noop_verbs.so
    fi
    local -x LD_LIBRARY_PATH=$fake_driver${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
    run_cargo_tests --test gpu --test gpu_faults
    run_cargo_tests --test cli vram
}

# Leaves a libcuda.so.1 in the directory `fake_driver`.
make_fake_driver() {
    fake_driver=$target/fake-cuda
    mkdir -p "$fake_driver"
    cp "$target/debug/libcorelane_fake_cuda.so" "$fake_driver/libcuda.so.1"
}

# run_cargo_tests [WORD]...   without those of NIXL; the words choose among the rest.
run_cargo_tests() {
    if have_nextest; then
        cargo nextest run "${everything[@]}" --exclude corelane-nixl-tests "$@" --locked --no-fail-fast --failure-output final
    elif (($# > 0)); then
        cargo test "${everything[@]}" --exclude corelane-nixl-tests "$@" --locked --no-fail-fast
    else
        cargo test "${everything[@]}" --exclude corelane-nixl-tests --tests --locked --no-fail-fast
    fi
}

# Peers killed and stopped under load, a selection; docs/reliability.md has the commands and figures of whole runs. This machine may
# have other things to do: that a death is seen at once is judged by the median, and that none is noticed by a timeout only, by
# timeouts which are far longer than a machine stands still.
run_faults() {
    local faults=$target/debug/corelane-faults transport failed=0
    build_everything
    for transport in local tcp; do
        "$faults" kill --transport "$transport" --rounds 60 --liveness 5000 --slack 10 --log "$log_dir/faults-kill-$transport.jsonl" || failed=1
        "$faults" stall --transport "$transport" --rounds 60 --jobs 4 --slack 10 \
            --log "$log_dir/faults-stall-$transport.jsonl" || failed=1
    done
    "$faults" soak --duration 10s || failed=1
    return "$failed"
}

run_doc_tests() {
    cargo test --doc "${everything[@]}" --exclude corelane-nixl-tests --locked --no-fail-fast
}

# The runners' own words on the tests of each step: nextest's line, or cargo's lines, one for each test binary; pytest's.
runner_summary() {
    local name
    for name in tests rdma nixl nixl-rdma nixl-versions; do
        if is_selected "$name" && [[ -f $log_dir/$name.log ]]; then
            runner_lines "$log_dir/$name.log" ||
                printf 'No summary of the step %s: it did not get that far, see %s\n' "$name" "$log_dir/$name.log"
        fi
    done
}

# What tests have left out because this machine does not let them: it passes, and shows nothing.
skipped_tests() {
    local count
    count=$(wc -l <"$CORELANE_TEST_SKIPPED")
    ((count == 0)) || printf '%d times a test, or a part of one, was not run:\n' "$count"
    sort "$CORELANE_TEST_SKIPPED" | uniq -c
}

runner_lines() {
    grep -E '^ *Summary \[|^test result: .* [1-9][0-9]* (passed|failed)|^=* ?[0-9]+ (passed|failed).* in [0-9.]+s' "$1"
}

# --- loom: every interleaving of the lock-free parts, within a bound on preemptions

readonly loom_flags="--cfg loom"

# The flag compiles all crates once more: without RDMA, which is long to build and has no such test. With a target named, it is
# not for the programs that run while compiling, which are taken as the other steps have left them.
run_loom() {
    local output=$scratch/loom-tests.log
    RUSTFLAGS="${RUSTFLAGS:-} $loom_flags" LOOM_MAX_PREEMPTIONS="${LOOM_MAX_PREEMPTIONS:-3}" \
        cargo test --locked --package corelane-runtime --package corelane --no-default-features --target "$(host_triple)" \
        --lib loom | tee "$output"
    if (($(grep -c '^running [1-9]' "$output") != 2)); then
        printf 'one of corelane-runtime and corelane has no loom test: expected some in a module named loom\n'
        return 1
    fi
}

# --- the simulator: fixed seeds of the protocol as it is, and of variants with deliberate bugs, all of which it has to find

run_simulator() {
    local simulator=(cargo run --quiet --profile sim --locked --package corelane-sim --)
    "${simulator[@]}" --seeds 10000 --coverage &&
        "${simulator[@]}" --seeds 2 --engines 1000 &&
        "${simulator[@]}" --seeds 1000 --mutation all
}

# --- end-to-end tests under valgrind

have_valgrind() {
    have_command valgrind
}

has_valgrind() {
    have_valgrind || cannot_run "valgrind is missing: $(package_command valgrind)"
}

# Bytes, registrations and bad input: what touches most memory in the least time. Each costs some thirty times as long as without.
readonly memcheck_tests='/(bytes|regions|bad_input)-[0-9a-f]*$'
# A gibibyte, and what counts on time.
readonly too_much_for_memcheck=(--skip one_gibibyte --skip 100000)

# Invalid reads and writes, use of memory that was never written, and memory that is lost for good, are failures.
run_memcheck() {
    local program shim=$scratch/enter.so
    cc -O2 -shared -fPIC -o "$shim" tests/memcheck/enter.c -ldl
    end_to_end_programs >"$scratch/programs"
    grep -E "$memcheck_tests" "$scratch/programs" >"$scratch/memcheck-programs"
    while read -r program; do
        printf '%s\n' "${program##*/}"
        LD_PRELOAD=$shim valgrind --fair-sched=yes --quiet --error-exitcode=9 --leak-check=full \
            --errors-for-leak-kinds=definite --show-leak-kinds=definite \
            "$program" --test-threads 4 "${too_much_for_memcheck[@]}" </dev/null
    done <"$scratch/memcheck-programs"
}

# --- fuzz: every decoder and the protocol core, from the committed corpus, for a moment each

run_fuzz() {
    CARGO_TARGET_DIR=$target fuzz/run.sh --seconds "${CORELANE_TEST_FUZZ_SECONDS:-5}" --jobs 2
}

# --- the benchmark as a user runs it

# What users run, compiled as they do. All that tests only is left out: it takes as long, and nobody runs it like that.
build_release() {
    cargo build --release --workspace "${product_only[@]}" "${tests_only[@]}" "${cargo_features[@]}" --locked
}

# No warning, since users see it: and the lints have seen the harness only with its features.
build_and_inspect() {
    local output=$scratch/build.log
    build_release 2>&1 | tee "$output"
    if grep -q '^warning' "$output"; then
        printf 'the compiler warns: see above\n'
        return 1
    fi
    inspect_artifacts
}

# What users run has to start on machines without these libraries, which it loads when it needs them.
inspect_artifacts() {
    local artifact linked failed=0
    for artifact in "$target"/release/*.so "$target/release/corelane-bench"; do
        if linked=$(ldd "$artifact" | grep -E 'lib(ibverbs|rdmacm|mlx[45]|cuda)\.so'); then
            printf '%s is linked with what it has to load at run time: %s\n' "$artifact" "$linked"
            failed=1
        fi
    done
    return "$failed"
}

has_bench() {
    if [[ ! -x $target/release/corelane-bench ]] || { builds_rdma && [[ ! -e $target/release/libcorelane_noop_verbs.so ]]; }; then
        cannot_run "corelane-bench, or what it measures with, is not built: see the step build"
    fi
}

# In a directory of its own, for the files it writes.
smoke_bench() {
    mkdir -p -- "$log_dir/bench"
    cd -- "$log_dir/bench"
    # As users run it, less what was installed and built before: cargo would choose other features, and compile for minutes.
    CORELANE_NO_INSTALL=1 CORELANE_BENCH=$target/release/corelane-bench "$repo_root/bench/run.sh" loopback --quick
    if builds_rdma; then
        "$target/release/corelane-bench" posting --duration 50ms
    fi
}

# --- tests that need an RDMA device: this machine's own, or those of an emulated machine

# As the tests over rdma are named; another filter shows how others do there.
readonly rdma_filter=${CORELANE_RDMA_FILTER:-rdma}

# Minutes each on an emulated processor, or more memory than it has; a machine with a device of its own runs them.
readonly too_much_for_rdma_rig=(one_gibibyte_arrives can_be_posted_thousands_of_times
    lanes_pinned_to_one_core_all_complete)

make_rdma_rig() {
    if builds_rdma && ! has_rdma_device && rig_is_for_this_machine && ! ensure_rdma_rig; then
        say "$rdma_rig_problem; going on without"
    fi
}

has_rdma() {
    builds_rdma || cannot_run "RDMA is not built, since this is missing: $rdma_missing" || return
    has_rdma_device && return
    rig_is_for_this_machine || lacks_hardware "no RDMA device, and the rig that has one takes an x86-64 machine" || return
    [[ -z $rdma_rig_problem ]] || cannot_run "$rdma_rig_problem"
}

run_rdma() {
    local programs program on_gpu=() others=() place=() part failed=0
    build_everything
    if ! has_rdma_device; then
        place=(-r "$rdma_rig")
        for part in "${too_much_for_rdma_rig[@]}"; do
            place+=(-x "$part")
        done
    fi
    mapfile -t programs < <(end_to_end_programs)
    ((${#programs[@]} > 0)) || return
    for program in "${programs[@]}"; do
        case ${program##*/} in
            rdma_gpu*) on_gpu+=("$program") ;;
            *) others+=("$program") ;;
        esac
    done
    tests/rdma/suite.sh -f "$rdma_filter" "${place[@]}" "$log_dir/rdma" "${others[@]}" || failed=1
    run_rdma_on_gpu "${place[@]}" -- "${on_gpu[@]}" || failed=1
    return "$failed"
}

# run_rdma_on_gpu PLACE... -- PROGRAM...   GPU memory by RDMA, on a driver and a libibverbs of the tests' own, where the machine has not
# both of the real ones. In a boot of its own, so that all else runs on the library that users have.
run_rdma_on_gpu() {
    local words=()
    while [[ $1 != -- ]]; do
        words+=("$1")
        shift
    done
    shift
    if ! has_rdma_device || [[ ! -e /dev/nvidiactl ]]; then
        make_fake_driver
        words+=(-e "LD_LIBRARY_PATH=$fake_driver" -e "CORELANE_LIBIBVERBS=$target/debug/libcorelane_fake_verbs.so")
        words+=(-e FAKE_CUDA_GPUS=3 -e "FAKE_CUDA_ORDERING=native,flush,none")
    fi
    printf '\nGPU memory:\n'
    tests/rdma/suite.sh -f "" "${words[@]}" "$log_dir/rdma-gpu" "$@"
}

# Prints the files of the end-to-end tests.
end_to_end_programs() {
    programs_of tests '\["test"\]'
}

# programs_of FOLDER KIND   prints the files of the test programs of the package in a folder; KIND is a pattern.
programs_of() {
    cargo test "${everything[@]}" --tests --locked --no-run --message-format json-render-diagnostics |
        grep -F "\"manifest_path\":\"$repo_root/$1/Cargo.toml\"" | grep -E '"overflow_checks":[a-z]*,"test":true' |
        sed -n '/"kind":'"$2"'/s/.*"executable":"\([^"]*\)".*/\1/p'
}

# --- the plugin in the NIXL that users have, from PyPI

readonly nixl_tested=("$nixl_newest" "$nixl_middle" "$nixl_oldest" "$nixl_too_old")
declare -A nixl_problems=()

choose_nixl_versions() {
    nixl_chosen=()
    if is_selected nixl-versions; then
        nixl_chosen=("${nixl_tested[@]}")
    elif is_selected nixl || is_selected nixl-rdma; then
        nixl_chosen=("$nixl_newest")
    fi
}

# Here and not in a step, for the progress that a long download shows. What is missing is said by the step.
make_nixl_environments() {
    local version
    for version in "${nixl_chosen[@]}"; do
        if ! ensure_nixl "$version"; then
            nixl_problems[$version]=$nixl_problem
            say "$nixl_problem; going on without"
        fi
    done
}

has_nixl() {
    have_nixl_versions "$nixl_newest" || return
    have_libclang || cannot_run "libclang is missing: $(package_command libclang-dev)"
}

has_all_nixl() {
    have_nixl_versions "${nixl_tested[@]}"
}

have_nixl_versions() {
    local version
    for version in "$@"; do
        [[ -z ${nixl_problems[$version]:-} ]] || cannot_run "${nixl_problems[$version]}" || return
    done
}

run_nixl() {
    local failed=0
    build_release
    build_everything
    printf '\nNIXL %s, from Rust:\n' "$nixl_newest"
    with_nixl "$nixl_newest" run_tests_of corelane-nixl-tests tests/nixl || failed=1
    run_python_tests "$nixl_newest" "not too_old" || failed=1
    with_nixl "$nixl_newest" check_nixl_bench || failed=1
    return "$failed"
}

# run_tests_of PACKAGE FOLDER [--ignored]   all tests of one package, or those that `tests` leaves out for want of a NIXL.
run_tests_of() {
    local words=(--locked --no-fail-fast --failure-output final) program failed=0
    if have_nextest; then
        [[ ${3:-} != --ignored ]] || words+=(--run-ignored only)
        cargo nextest run "${everything[@]}" -E "package($1)" "${words[@]}"
        return
    fi
    programs_of "$2" '.*' >"$scratch/programs"
    while read -r program; do
        (cd -- "$2" && "$program" "${@:3}" </dev/null) || failed=1
    done <"$scratch/programs"
    return "$failed"
}

# The harness with its driver of NIXL: the tests that take one, and every scenario once, for a moment.
check_nixl_bench() {
    local harness=$target/debug/corelane-bench
    printf '\nNIXL %s, from corelane-bench:\n' "$nixl_newest"
    mkdir -p -- "$log_dir/bench"
    printf 'time_s,bytes\n0,4096\n0.01,1000000\n0.02,65536\n' >"$log_dir/bench/requests.csv"
    run_tests_of corelane-bench bench --ignored &&
        "$harness" nixl --vs UCX@UCX_TLS=tcp --baseline raw-cma,raw-memcpy --sizes 64,1M --rounds 1 --duration 20ms \
            --scenario all,fault,trace --trace "$log_dir/bench/requests.csv" --fault-timeout 2s --phase-duration 200ms --out-dir "$log_dir/bench/nixl" &&
        check_nixl_results "$log_dir/bench/nixl/results.json" &&
        "$harness" nixl --vs UCX --num_threads 3 --start_block_size 4096 --max_batch_size 2 --num_iter 99 --rounds 1 --format nixlbench \
            --out-dir "$log_dir/bench/threads" &&
        check_nixl_results "$log_dir/bench/threads/results.json" &&
        "$harness" many-peers --vs UCX --vs UCX@UCX_TLS=tcp --peers 1,3 --rounds 1 --duration 20ms --out-dir "$log_dir/bench/many-peers" &&
        "$harness" plot "$log_dir/bench/nixl/results.json" "$log_dir/bench/many-peers/results.json" --out "$log_dir/bench/nixl/again.html"
}

# What must be in a file: an exit code does not tell one that lacks half from a whole one.
check_nixl_results() {
    "$(nixl_venv_python "$nixl_newest")" - "$1" <<'PYTHON'
import json
import math
import sys

results = json.load(open(sys.argv[1]))
options = results["options"]
assert results["complete"], results["failure"]
others = options["vs"] + options["baselines"]
samples = {(row["backend"], row["id"]): row["samples"] for row in results["series"]}
assert samples and all(samples.values()), samples
for name in [options["backend"], *options["vs"]]:
    assert all((name, of) in samples for backend, of in samples), f"not all cases are of {name}"
for name in options["baselines"]:
    kinds = {of.split("/")[0] for backend, of in samples if backend == name}
    assert kinds == {"read", "write", "kv", "notify"}, (name, kinds)
assert {row["vs"] for row in results["comparisons"]} == set(others)
for row in results["comparisons"]:
    for figure in ("p50", "p99", "p99.9"):
        ratio = row["ratios"][figure]["median"]
        assert math.isfinite(ratio) and ratio > 0, row
assert [row["backend"] for row in results["threads"]] == [options["backend"], *others]
if options["num_iter"]:
    whole = [row for row in results["series"] if row["part"] == "completion"]
    assert whole and all(row["samples"] == options["num_iter"] for row in whole), whole
    assert all(row["operations_per_s"] > 0 for row in whole)
else:
    kinds = {of.split("/")[0] for backend, of in samples}
    assert kinds == {"read", "write", "kv", "notify", "post", "decode-under-prefill", "trace"}, kinds
    load = next(row for row in results["loads"] if row["backend"] == options["backend"])
    assert load["served_share"] > 0.5 and load["bulk_share"]["median"] > 0, load
    faults = [row for row in results["faults"] if row["backend"] == options["backend"]]
    assert {row["kind"] for row in faults} == {"kill", "stop"}, faults
    assert all(row["recovered_ms"] is not None for row in faults), faults
    assert all(row["detected_ms"] is not None for row in faults if row["kind"] == "kill"), faults
PYTHON
}

# --- the plugin in NIXL, over RDMA and nothing else

readonly nixl_rdma_tests='/(bytes|notifications|peers|rdma_transfers)-[0-9a-f]*$'

# These ask for TCP, since they stop a peer to keep transfers in flight, where devices do without the peer; or their
# notifications are so long that they go over the session.
readonly nixl_tcp_tests=(a_connected_peer_killed a_peer_killed_after_post a_peer_killed_under_many a_peer_stopped
    forgetting_a_peer_ends one_dead_peer large_and_small_ones large_ones_arrive_whole)

has_nixl_rdma() {
    has_rdma && has_nixl
}

# What is loaded there is the C library of NIXL, the plugin, and whatever of the wheel they need, at the paths of this machine.
run_nixl_rdma() {
    local programs words=() part libraries
    libraries=$(nixl_dir "$nixl_newest")/mirror/libs
    for part in "${nixl_tcp_tests[@]}"; do
        words+=(-x "$part")
    done
    # Lines of the log would stand between a test's name and its outcome.
    for part in LD_LIBRARY_PATH="$libraries" NIXL_PLUGIN_DIR="$libraries/plugins" CORELANE_PLUGIN="$(corelane_plugin)" \
        CORELANE_TRANSPORTS=rdma CORELANE_LOG_LEVEL=off; do
        words+=(-e "$part")
    done
    has_rdma_device || words+=(-r "$rdma_rig")
    build_release
    mapfile -t programs < <(programs_of tests/nixl '\["test"\]' | grep -E "$nixl_rdma_tests")
    ((${#programs[@]} == 4)) || return
    tests/rdma/suite.sh -f "" "${words[@]}" "$log_dir/nixl-rdma" "${programs[@]}"
}

# A selection on the other versions; what has another plugin ABI must be refused in a way that users understand.
run_nixl_versions() {
    local failed=0 version
    build_release
    for version in "$nixl_middle" "$nixl_oldest"; do
        run_python_tests "$version" versions || failed=1
    done
    run_python_tests "$nixl_too_old" too_old || failed=1
    return "$failed"
}

# run_python_tests VERSION MARKERS   leaves no files in the checkout.
run_python_tests() {
    local version=$1 markers=$2
    printf '\nNIXL %s, from Python:\n' "$version"
    PYTHONDONTWRITEBYTECODE=1 with_nixl "$version" \
        "$(nixl_venv_python "$version")" -m pytest --color=no --tb=short -q --rootdir "$repo_root/tests/python" \
        -m "$markers" "$repo_root/tests/python"
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
    skipped_tests
    return "$verdict"
}

main "$@"
