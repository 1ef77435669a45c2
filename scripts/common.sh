# shellcheck shell=bash
# Sourced by bench/run.sh and tests/run.sh, first: where things are, and how the user is spoken to.

repo_root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
readonly repo_root
readonly caller_dir=$PWD

# Messages go to stderr, results to stdout.
say() {
    printf 'corelane: %s\n' "$*" >&2
}

# The set-up cannot go on: says why and what to do, in one line where one is enough.
give_up() {
    say "$@"
    exit 2
}

have_command() {
    command -v "$1" >/dev/null 2>&1
}

# True where version $1 is $2 or newer.
version_at_least() {
    printf '%s\n%s\n' "$2" "$1" | sort -V -C
}

installing_forbidden() {
    [[ ${CORELANE_NO_INSTALL:-0} != 0 ]]
}

# The words of $1 that are a sign of a network out of reach, whoever wrote them: apt, curl, wget, rustup, cargo.
looks_like_no_network() {
    grep -qiE 'resolv|network is unreachable|no route to host|connection (refused|timed out)|could not connect|failed to (connect|fetch|download)|unable to connect|could not download|timed? ?out|unable to fetch|dns error' "$1"
}

# The last line of log $1 that says something: where apt, rustup and cargo put the cause.
last_words() {
    grep -v '^[[:space:]]*$' "$1" | tail -n 1 | sed 's/^ *\([0-9]*: *\)\{0,1\}//'
}

# A directory for files that live no longer than this script.
make_scratch_dir() {
    scratch=$(mktemp -d)
    trap remove_scratch_dir EXIT
}

remove_scratch_dir() {
    rm -rf -- "$scratch"
}

# cargo and rustup keep what they fetch under HOME; some service managers and containers leave it unset.
find_home() {
    if [[ -z ${HOME:-} ]]; then
        HOME=$(getent passwd "$(id -u)" | cut -d: -f6) || true
        export HOME
    fi
    [[ -d ${HOME:-} || -n ${CARGO_HOME:-} ]] ||
        give_up "HOME ('${HOME:-}') is no directory: set HOME to one that you can write to, then run this again"
}

# A relative target directory means the caller's directory, not the repository.
find_target_dir() {
    if [[ -n ${CARGO_TARGET_DIR:-} && $CARGO_TARGET_DIR != /* ]]; then
        export CARGO_TARGET_DIR=$caller_dir/$CARGO_TARGET_DIR
    fi
}

# Prints cargo's target directory, wherever environment or configuration put it.
target_dir() {
    cargo metadata --format-version 1 --no-deps --offline --manifest-path "$repo_root/Cargo.toml" |
        sed -n 's/.*"target_directory":"\([^"]*\)".*/\1/p'
}

[[ $(uname -s) == Linux ]] || give_up "corelane needs Linux (6.1 or newer); this is $(uname -s)"
find_home
find_target_dir
make_scratch_dir
