# shellcheck shell=bash
# NIXL as users have it: from PyPI, each version in a virtual environment of its own in cargo's target directory. Source
# it after setup.sh, say `want_nixl` or `need_nixl` before `prepare_machine`, and call `ensure_nixl VERSION` after it;
# `with_nixl VERSION COMMAND...` then runs a command that finds this NIXL and, beside UCX, the plugin of this repository.

# shellcheck disable=SC2034 # read by the scripts that source this file
readonly nixl_newest=1.5.1 nixl_middle=1.3.2 nixl_oldest=1.0.1
# shellcheck disable=SC2034
readonly nixl_too_old=0.10.1 # has another plugin ABI: the plugin must refuse it

# Wheels exist for these Pythons, on x86-64 and aarch64 with glibc 2.28 or newer.
readonly nixl_pythons=(python3 python3.14 python3.13 python3.12 python3.11 python3.10)
readonly nixl_python_range="3.10 to 3.14"
readonly nixl_requirements=$repo_root/tests/python/requirements.txt
readonly nixl_limit_seconds=1200

nixl_root=""    # cargo's target directory, once cargo could be asked
nixl_python=""  # the Python that the environments are made with
nixl_problem="" # after a failed `ensure_nixl`: why, in words that end a sentence

# Called before `prepare_machine`, with the versions that will be asked for.
need_nixl() {
    nixl_versions=("$@")
    need "Python that makes virtual environments" have_nixl_python python3 python3-venv
}

want_nixl() {
    nixl_versions=("$@")
    want "Python that makes virtual environments" have_nixl_python python3 python3-venv
}

# Trying takes seconds: not where all environments are there already.
have_nixl_python() {
    all_nixl_ready "${nixl_versions[@]}" || find_nixl_python
}

all_nixl_ready() {
    local version
    for version in "$@"; do
        nixl_is_ready "$version" 2>/dev/null || return 1
    done
}

# Debian's python3 has the module venv without what it needs, so one is really made. `nixl_problem` says what is wrong.
find_nixl_python() {
    local python
    nixl_problem="Python $nixl_python_range is missing"
    for python in "${nixl_pythons[@]}"; do
        have_command "$python" || continue
        if ! python_has_wheels "$python"; then
            [[ $python != python3 ]] ||
                nixl_problem="NIXL has wheels for Python $nixl_python_range only, and python3 is $(python_version "$python")"
        elif "$python" -m venv --clear "$scratch/venv" >"$scratch/venv.log" 2>&1; then
            nixl_python=$python
            return
        else
            nixl_problem="$python makes no virtual environment: $(package_command python3-venv)"
        fi
    done
    return 1
}

python_has_wheels() {
    "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null
}

python_version() {
    "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null
}

# --- one environment

# Prints the directory of version $1: venv/, mirror/ and the stamp `made`.
nixl_dir() {
    printf '%s/nixl/%s' "$nixl_root" "$1"
}

nixl_venv() {
    printf '%s/venv' "$(nixl_dir "$1")"
}

# The environment's own Python, for tests and tools.
nixl_venv_python() {
    printf '%s/bin/python' "$(nixl_venv "$1")"
}

# True where the environment of version $1 is complete and made of what this file asks for.
nixl_is_ready() {
    local dir
    nixl_root=${nixl_root:-$(target_dir)} && [[ -n $nixl_root ]] || return 1
    dir=$(nixl_dir "$1")
    nixl_recipe "$1" | cmp -s - "$dir/made" && "$dir/venv/bin/python" -c '' 2>/dev/null
}

# All that decides what is in the environment; another text means that it is made anew.
nixl_recipe() {
    printf 'nixl %s, made by recipe 2\n' "$1"
    cat -- "$nixl_requirements"
}

# Makes what is missing of version $1. False, with `nixl_problem`, where it cannot be had.
ensure_nixl() {
    local version=$1 log=$scratch/nixl-$1.log
    if nixl_is_ready "$version"; then
        return
    fi
    [[ -n $nixl_python ]] || find_nixl_python || return
    run_logged "NIXL $version from PyPI" "$log" "$nixl_limit_seconds" make_nixl_venv "$version"
    if ((job_status != 0)); then
        nixl_problem="could not make an environment with NIXL $version: $(nixl_failure "$version" "$log")"
        return 1
    fi
}

# Only the lock keeps two runs, of tests and of the benchmark, from making the same environment at once.
make_nixl_venv() {
    local version=$1 dir
    dir=$(nixl_dir "$version")
    mkdir -p -- "$dir"
    exec 9>"$dir/lock"
    flock 9
    if nixl_is_ready "$version"; then
        return
    fi
    rm -rf -- "$dir/venv" "$dir/mirror" "$dir/made"
    "$nixl_python" -m venv "$dir/venv" &&
        install_nixl "$version" &&
        add_torch_stand_in "$version" &&
        link_nixl_plugins "$version" &&
        (cd / && "$dir/venv/bin/python" -c 'import nixl._api, numpy, pytest') &&
        nixl_recipe "$version" >"$dir/made"
}

# Without dependencies: NIXL names torch, gigabytes that nothing here needs, and every CUDA flavour of itself. A user's
# setting that makes pip install into the home directory fails in an environment.
install_nixl() {
    local version=$1
    PIP_USER=0 "$(nixl_venv_python "$version")" -m pip install --disable-pip-version-check --no-input --progress-bar off \
        --retries 2 --timeout 60 --no-deps --only-binary=:all: \
        "nixl==$version" "nixl-cu12==$version" --requirement "$nixl_requirements"
}

# NIXL before 1.4 imports torch, for the name of one class and the version of CUDA. What it gets is this, in this
# environment only.
add_torch_stand_in() {
    local version=$1 packages
    ! version_at_least "$version" 1.4 || return 0
    packages=$(echo "$(nixl_venv "$version")"/lib/python3*/site-packages)
    mkdir -p -- "$packages/torch"
    cat >"$packages/torch/__init__.py" <<'PYTHON'
"""Stands in for PyTorch, of which NIXL before 1.4 needs little more than the name of one class."""


class Tensor:
    """Nothing is an instance of it."""
PYTHON
    printf '"""As of a PyTorch without CUDA."""\n\ncuda = None\n' >"$packages/torch/version.py"
}

# Why pip failed, in one line, from its log $2.
nixl_failure() {
    local version=$1 log=$2
    if looks_like_no_network "$log" || grep -qE 'NewConnectionError|Max retries exceeded|ProxyError' "$log"; then
        printf 'no network to fetch it with'
    elif grep -q 'No matching distribution found for nixl' "$log"; then
        printf 'no wheel for Python %s on %s with this glibc; there are some for Python %s on x86-64 and aarch64, glibc 2.28 or newer' \
            "$(python_version "$nixl_python")" "$(uname -m)" "$nixl_python_range"
    else
        last_words "$log"
    fi
}

# --- what a process needs to find NIXL and the plugin

# NIXL_PLUGIN_DIR replaces the wheel's directory, so ours shows all plugins of the wheel beside the one of this repository.
# They find their libraries relative to themselves, hence the same tree of names, made of links.
link_nixl_plugins() {
    local version=$1 libraries mirror
    libraries=$(nixl_libraries "$version")
    mirror=$(nixl_dir "$version")/mirror
    mkdir -p -- "$mirror/libs/plugins" &&
        ln -sr -- "$libraries"/*.so* "$mirror/libs/" &&
        ln -sr -- "$libraries"/plugins/*.so "$mirror/libs/plugins/" &&
        ln -sr -- "${libraries%/*}/nixl_cu12.libs" "$mirror/" &&
        ln -sr -- "$(corelane_plugin)" "$mirror/libs/plugins/"
}

# Prints the directory of libnixl.so and libnixl_capi.so.
nixl_libraries() {
    echo "$(nixl_venv "$1")"/lib/python3*/site-packages/.nixl_cu12.mesonpy.libs
}

# Prints where `cargo build --release` leaves the plugin.
corelane_plugin() {
    printf '%s/release/libplugin_CORELANE.so' "$nixl_root"
}

# Prints the environment of a process that uses NIXL $1, as lines for a shell.
nixl_environment() {
    printf 'export %s=%q\n' \
        LD_LIBRARY_PATH "$(nixl_libraries "$1")${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}" \
        NIXL_PLUGIN_DIR "$(nixl_dir "$1")/mirror/libs/plugins" \
        CORELANE_PLUGIN "$(corelane_plugin)"
}

# with_nixl VERSION COMMAND...   runs a command, or a function, in that environment.
with_nixl() (
    eval "$(nixl_environment "$1")"
    shift
    "$@"
)
