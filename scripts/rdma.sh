# shellcheck shell=bash
# RDMA: whether its bindings can be built here, and where its tests can run. Source it after setup.sh, say `want_rdma`
# before `prepare_machine`, and call `choose_cargo_features` after it.

# shellcheck disable=SC2034 # read by the scripts that source this file
rdma_rig_problem="" # after a failed `ensure_rdma_rig`: why, in words that end a sentence
rdma_rig=""         # the directory of the rig, once `ensure_rdma_rig` was called
rdma_missing=""     # what keeps RDMA from being built, in words
cargo_features=()   # for every cargo command that compiles: the feature `rdma` is on by default

readonly rdma_rig_limit_seconds=900

want_rdma() {
    want "what the bindings of libibverbs are built with" can_build_rdma \
        cmake make python3 pkg-config libclang-dev libnl-3-dev libnl-route-3-dev libibverbs-dev
}

# The crate ibverbs-sys configures and compiles rdma-core, and generates its bindings by libclang. False with `rdma_missing`.
can_build_rdma() {
    local missing=()
    have_command cmake || missing+=(cmake)
    have_command make || missing+=(make)
    have_command python3 || missing+=(python3)
    have_libclang || missing+=(libclang)
    if have_command pkg-config; then
        have_library libnl-3.0 || missing+=(libnl-3-dev)
        have_library libnl-route-3.0 || missing+=(libnl-route-3-dev)
        have_library libibverbs || missing+=(libibverbs-dev)
    else
        missing+=(pkg-config)
    fi
    rdma_missing=$(join_words "${missing[@]}")
    [[ -z $rdma_missing ]]
}

have_library() {
    pkg-config --exists "$1" 2>/dev/null
}

choose_cargo_features() {
    if ! can_build_rdma; then
        say "building without RDMA, since this is missing: $rdma_missing"
        cargo_features=(--no-default-features)
    fi
}

builds_rdma() {
    ((${#cargo_features[@]} == 0))
}

# True where the machine has an RDMA device, of whatever kind, that is connected.
has_rdma_device() {
    grep -qs ACTIVE /sys/class/infiniband/*/ports/*/state
}

rig_is_for_this_machine() {
    [[ $(uname -m) == x86_64 ]]
}

# Makes the rig in cargo's target directory, if it is not there yet. False, with `rdma_rig_problem`, where it cannot be had.
ensure_rdma_rig() {
    local log=$scratch/rdma-rig.log
    rdma_rig=$(target_dir)/rdma-rig
    run_logged "the RDMA rig, from packages of the distribution" "$log" "$rdma_rig_limit_seconds" \
        "$repo_root/tests/rdma/build.sh" "$rdma_rig"
    ((job_status != 0)) || return 0
    # shellcheck disable=SC2034
    if looks_like_no_network "$log"; then
        rdma_rig_problem="no network to fetch the RDMA rig with"
    else
        rdma_rig_problem=$(last_words "$log")
    fi
    return 1
}
