# shellcheck shell=bash
# Rust: finds a toolchain that is new enough or installs one into the user's home, and fetches the crates of Cargo.lock.

# What a machine without a usable Rust gets: the release that corelane is developed with.
readonly rust_to_install=1.95.0
readonly rustup_site=${RUSTUP_UPDATE_ROOT:-https://static.rust-lang.org/rustup}
rustup_home=${RUSTUP_HOME:-${HOME:-}/.rustup}
cargo_home=${CARGO_HOME:-${HOME:-}/.cargo}
readonly rustup_home cargo_home
readonly fetch_limit_seconds=1200

minimum_rust() {
    sed -n '/^rust-version = "/{s/.*"\([0-9.]*\)".*/\1/p;q}' "$repo_root/Cargo.toml"
}

# Prints the version of rustc or cargo as it is inside the repository; nothing where it does not run.
tool_version() {
    (cd -- "$repo_root" && RUSTUP_AUTO_INSTALL=0 "$1" --version 2>/dev/null) |
        sed -n "s/^$1 \([0-9]*\.[0-9]*\.[0-9]*\).*/\1/p"
}

# True where cargo and rustc run and are new enough; else `rust_problem` says what is wrong.
rust_is_usable() {
    local minimum tool version
    minimum=$(minimum_rust)
    for tool in rustc cargo; do
        version=$(tool_version "$tool") || true
        if [[ -z $version ]]; then
            rust_problem="Rust is missing ($tool does not run)"
            return 1
        elif ! version_at_least "$version" "$minimum"; then
            rust_problem="$tool $version is older than $minimum, which corelane needs"
            return 1
        fi
    done
}

# Looks at what PATH gives, then at what rustup keeps in the user's home, also when PATH does not name it.
find_rust() {
    local problem
    export PATH=$PATH:$cargo_home/bin
    rust_is_usable && return
    problem=$rust_problem
    use_toolchain "$rust_to_install" && return
    use_toolchain stable && return
    rust_problem=$problem
    return 1
}

# Puts an installed rustup toolchain first, for this run only: the user's default stays what it is.
use_toolchain() {
    local cargo
    cargo=$(rustup which --toolchain "$1" cargo 2>/dev/null) || return 1
    PATH=$(dirname -- "$cargo"):$PATH
    export RUSTUP_TOOLCHAIN=$1
    hash -r
    rust_is_usable
}

have_downloader() {
    have_command curl || have_command wget
}

# rustup's own installer is fetched with curl or wget; the distribution's package needs neither.
have_what_rust_needs() {
    [[ $rust_found == yes ]] || installing_forbidden || have_command rustup || have_downloader || distribution_has_rustup
}

distribution_has_rustup() {
    can_install_packages && update_package_lists && package_exists rustup
}

# Whatever is fetched by HTTPS is checked against these.
have_certificates() {
    [[ -n ${SSL_CERT_FILE:-} || -s /etc/ssl/certs/ca-certificates.crt || -s /etc/pki/tls/certs/ca-bundle.crt ||
        -s /etc/ssl/ca-bundle.pem ]] || [[ $rust_found == yes && $crates_found == yes ]]
}

# True where a program can be compiled and linked; takes clang where there is no cc.
can_link() {
    local compiler
    for compiler in cc gcc clang; do
        if printf 'int main(void) { return 0; }\n' | "$compiler" -x c -o "$scratch/linked" - 2>/dev/null; then
            [[ $compiler == cc ]] || linker=$compiler
            return 0
        fi
    done
    return 1
}

# rustc links with `cc`; tells it where another compiler has to do.
use_linker() {
    local host
    [[ -n ${linker:-} ]] || return 0
    host=$(host_triple | tr 'a-z-' 'A-Z_')
    export "CARGO_TARGET_${host}_LINKER=$linker" "CC=${CC:-$linker}"
}

host_triple() {
    rustc -vV | sed -n 's/^host: //p'
}

ensure_rust() {
    [[ $rust_found == no ]] || return 0
    if installing_forbidden; then
        give_up "$rust_problem, and CORELANE_NO_INSTALL forbids installing it: install Rust $(minimum_rust) or newer (https://rustup.rs), or unset CORELANE_NO_INSTALL"
    fi
    say "$rust_problem"
    say "installing Rust $rust_to_install with rustup into $cargo_home and $rustup_home (CORELANE_NO_INSTALL=1 forbids this)"
    have_command rustup || install_rustup_package || install_rustup_from_site
    install_toolchain
}

install_rustup_package() {
    distribution_has_rustup && apt_install rustup && hash -r && have_command rustup
}

install_rustup_from_site() {
    local url=$rustup_site/rustup-init.sh
    download "$url" "$scratch/rustup-init.sh" "$scratch/download.log" ||
        give_up "could not fetch rustup's installer, $url: $(tail -n 1 "$scratch/download.log")"
    # The user's shell start-up files are left alone; the next run finds what is installed without them.
    run_logged "rustup's installer" "$scratch/rustup.log" "$fetch_limit_seconds" \
        env RUSTUP_INIT_SKIP_PATH_CHECK=yes RUSTUP_INIT_SKIP_SUDO_CHECK=yes RUST_BACKTRACE=0 \
        sh "$scratch/rustup-init.sh" -y --no-modify-path --profile minimal --default-toolchain none
    give_up_on_failure "rustup, from $rustup_site" "$scratch/rustup.log"
    say "cargo is now in $cargo_home/bin; to use it by hand: . $cargo_home/env"
    hash -r
}

install_toolchain() {
    run_logged "installing Rust $rust_to_install" "$scratch/rustup.log" "$fetch_limit_seconds" \
        env RUST_BACKTRACE=0 rustup toolchain install "$rust_to_install" --profile minimal \
        --component rustfmt --component clippy --no-self-update
    give_up_on_failure "Rust $rust_to_install by rustup" "$scratch/rustup.log"
    # Only where nothing else is the default: cargo by hand then works too.
    rustup default >/dev/null 2>&1 || rustup default "$rust_to_install" >/dev/null 2>&1 || true
    use_toolchain "$rust_to_install" || give_up "the toolchain just installed does not do: $rust_problem"
    rust_found=yes
}

# After `run_logged`: a network out of reach is told in one line, anything else with the log.
give_up_on_failure() {
    local what=$1 log=$2
    ((job_status != 0)) || return 0
    if looks_like_no_network "$log"; then
        give_up "could not fetch $what: $(last_words "$log")"
    fi
    cat -- "$log" >&2
    give_up "could not fetch $what (exit status $job_status): see above"
}

download() {
    local url=$1 file=$2 log=$3
    if have_command curl; then
        curl --proto '=https' --fail --silent --show-error --location --retry 2 --connect-timeout 20 --max-time 300 \
            --output "$file" "$url" 2>"$log"
    else
        wget --no-verbose --tries=2 --timeout=20 --output-document="$file" "$url" 2>"$log"
    fi
}

# rustfmt and clippy come with what is installed above, but a toolchain that was there may lack them.
have_rustfmt() {
    cargo fmt --version >/dev/null 2>&1
}

have_clippy() {
    cargo clippy --version >/dev/null 2>&1
}

# True where code for the target $1 can be checked.
have_target() {
    [[ -d $(rustc --print target-libdir --target "$1") ]]
}

# rustup_add component|target NAME   adds it to the toolchain in use; says so where that cannot be done, and goes on.
rustup_add() {
    local kind=$1 name=$2 log=$scratch/rustup-add.log
    if installing_forbidden || ! have_command rustup || ! rustup show active-toolchain >/dev/null 2>&1; then
        return
    fi
    say "adding the $kind $name to the Rust toolchain with rustup (CORELANE_NO_INSTALL=1 forbids this)"
    run_logged "adding $name" "$log" "$fetch_limit_seconds" env RUST_BACKTRACE=0 rustup "$kind" add "$name"
    ((job_status == 0)) || say "could not add $name; going on without: $(last_words "$log")"
}

# The crates differ by the cfg flags that a build sets; who builds with others adds them here.
crate_flag_sets=("")

# Workspaces whose crates are needed; who builds another one adds it here.
crate_manifests=("$repo_root/Cargo.toml")

# Runs cargo fetch for every workspace and every set of flags.
cargo_fetch() {
    local flags manifest
    for manifest in "${crate_manifests[@]}"; do
        for flags in "${crate_flag_sets[@]}"; do
            RUSTFLAGS=$flags cargo fetch --locked --manifest-path "$manifest" --target "$(host_triple)" "$@" || return
        done
    done
}

# True where all crates are on this machine; then the network is not asked.
have_crates() {
    cargo_fetch --offline >/dev/null 2>&1
}

fetch_crates() {
    local log=$scratch/fetch.log
    if [[ $crates_found == yes ]] || have_crates; then
        return
    fi
    run_logged "fetching crates" "$log" "$fetch_limit_seconds" cargo_fetch
    ((job_status != 0)) || return 0
    if looks_like_no_network "$log"; then
        give_up "could not fetch the Rust crates of Cargo.lock (first: $(first_crate_in "$log")): $(last_words "$log")"
    fi
    grep -v '^ *Downloaded' "$log" >&2
    exit 1
}

# The crate that cargo's error in log $1 is about: 'failed to get `NAME` as ...' or a URL '.../crates/NAME/VERSION/download'.
first_crate_in() {
    local crate
    crate=$(sed -n -e '/^error: failed to get /{s/^error: failed to get .\([A-Za-z0-9_-]*\). as .*/\1/p;q}' \
        -e '/^error: .*\/crates\//{s|.*/crates/\([^/]*\)/\([^/]*\)/download.*|\1 \2|p;q}' "$1")
    printf '%s' "${crate:-the index}"
}
