# shellcheck shell=bash
# Debian and Ubuntu packages. A script says what it uses with `need` and `want`, then calls `install_packages` once.
# To add a package: one `need` or `want` line in the script that uses it.

missing_things=()     # what is missing, in words
required_packages=()  # nothing can be built without these
optional_packages=()  # one step or feature is lost without these
package_lists_updated=no
readonly package_limit_seconds=1800

# need "what it is" CHECK PACKAGE...   where the command CHECK fails, the packages are required.
need() {
    local thing=$1 check=$2
    shift 2
    if ! "$check"; then
        missing_things+=("$thing")
        required_packages+=("$@")
    fi
}

# want "what it is" CHECK PACKAGE...   as `need`, but the build goes on without.
want() {
    local thing=$1 check=$2
    shift 2
    if ! "$check"; then
        missing_things+=("$thing")
        optional_packages+=("$@")
    fi
}

# Runs a command as root without ever asking for a password; false where that is not allowed.
as_root() {
    if [[ $(id -u) == 0 ]]; then
        "$@"
    else
        sudo -n "$@"
    fi
}

can_be_root() {
    [[ $(id -u) == 0 ]] || { have_command sudo && sudo -n true 2>/dev/null; }
}

can_install_packages() {
    ! installing_forbidden && have_command apt-get && can_be_root
}

apt_get() {
    as_root env DEBIAN_FRONTEND=noninteractive LC_ALL=C apt-get -q -y \
        -o DPkg::Lock::Timeout=300 -o Acquire::Retries=1 -o Acquire::http::Timeout=30 "$@"
}

# A source that cannot be reached is not an error yet: what counts is whether the packages can be had.
update_package_lists() {
    if [[ $package_lists_updated == no ]]; then
        run_logged "updating the package lists" "$scratch/apt-update.log" "$package_limit_seconds" apt_get update
        package_lists_updated=yes
    fi
}

package_exists() {
    local policy
    policy=$(LC_ALL=C apt-cache policy "$1" 2>/dev/null) && [[ $policy =~ Candidate:\ [^\(] ]]
}

# The one line for a user who may not install packages.
package_command() {
    printf 'apt-get install -y --no-install-recommends %s' "$*"
}

# Installs the packages named; on failure `install_failure` says why, in words that end a sentence.
apt_install() {
    local log=$scratch/apt-install.log
    update_package_lists
    run_logged "installing $*" "$log" "$package_limit_seconds" \
        apt_get install --no-install-recommends --no-remove "$@"
    ((job_status != 0)) || return 0
    if looks_like_no_network "$log" || looks_like_no_network "$scratch/apt-update.log"; then
        install_failure="could not fetch the package(s) $*: no network"
    else
        install_failure="apt-get could not install $*: $(last_words "$log")"
    fi
    return 1
}

# Installs what `need` and `want` found missing, or says how to get it. Returns when the build can go on.
install_packages() {
    local packages=("${required_packages[@]}" "${optional_packages[@]}") why_not=""
    if ((${#packages[@]} == 0)); then
        return
    fi
    if installing_forbidden; then
        why_not="CORELANE_NO_INSTALL is set. Unset it, or run as root"
    elif ! have_command apt-get; then
        why_not="this system has no apt-get. Install what Debian calls ${packages[*]} by its own package manager"
    elif ! can_be_root; then
        why_not="you are neither root nor allowed to use sudo without a password. Ask your administrator to run"
    fi
    if [[ -n $why_not ]]; then
        missing_packages_message "$why_not" "${packages[@]}"
        return
    fi
    install_missing_packages "${packages[@]}"
}

missing_packages_message() {
    local message
    message="missing: $(join_words "${missing_things[@]}"), and $1"
    shift
    if have_command apt-get; then
        message+=": $(package_command "$@")"
    fi
    if ((${#required_packages[@]} > 0)); then
        give_up "$message"
    fi
    say "$message"
    say "going on without"
}

install_missing_packages() {
    say "installing the Debian package(s) $* (CORELANE_NO_INSTALL=1 forbids this)"
    if apt_install "$@"; then
        return
    fi
    # An optional package that cannot be had must not take the required ones with it.
    if ((${#required_packages[@]} > 0 && ${#optional_packages[@]} > 0)) && apt_install "${required_packages[@]}"; then
        say "going on without ${optional_packages[*]}: not to be had here"
    elif ((${#required_packages[@]} > 0)); then
        give_up "$install_failure"
    else
        say "$install_failure; going on without"
    fi
}

join_words() {
    local IFS=,
    local joined=$*
    printf '%s' "${joined//,/, }"
}
