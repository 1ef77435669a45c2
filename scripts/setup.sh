# shellcheck shell=bash
# The set-up that bench/run.sh and tests/run.sh share. Source this file, name what else is used with `need` and `want`
# (packages.sh), then call `prepare_machine`. It changes nothing on a machine that has everything.

# shellcheck source=scripts/common.sh
. "${BASH_SOURCE[0]%/*}/common.sh"
# shellcheck source=scripts/progress.sh
. "$repo_root/scripts/progress.sh"
# shellcheck source=scripts/packages.sh
. "$repo_root/scripts/packages.sh"
# shellcheck source=scripts/rust.sh
. "$repo_root/scripts/rust.sh"

# True where a C++20 program can be compiled and linked; takes clang++ where there is no c++. For `need`: the NIXL plugin is
# partly C++.
can_compile_cxx() {
    local compiler
    for compiler in ${CXX:+"$CXX"} c++ g++ clang++; do
        if printf '#include <string>\nint main() { return static_cast<int>(std::string().size()); }\n' |
            "$compiler" -std=c++20 -x c++ -o "$scratch/linked" - 2>/dev/null; then
            [[ $compiler == c++ ]] || export CXX=$compiler
            return 0
        fi
    done
    return 1
}

# Crates with generated bindings take libclang, with the headers that belong to it.
have_libclang() {
    local place
    for place in "${LIBCLANG_PATH:-}" /usr/lib/llvm-*/lib /usr/lib64 /usr/lib /usr/local/lib; do
        if [[ -n $place ]] && [[ -n $(compgen -G "$place/libclang.so*" || compgen -G "$place/libclang-[0-9]*.so*") ]] &&
            compgen -G "${place%64}/clang/*/include/stddef.h" >/dev/null; then
            return 0
        fi
    done
    return 1
}

rust_found=no    # a Rust that is new enough
crates_found=no  # every crate of Cargo.lock

prepare_machine() {
    find_rust && rust_found=yes
    [[ $rust_found == yes ]] && have_crates && crates_found=yes
    need "a C compiler that links" can_link gcc libc6-dev
    need "certificates for HTTPS" have_certificates ca-certificates
    need "curl" have_what_rust_needs curl
    install_packages
    can_link || give_up "still no C compiler that links a program after installing gcc and libc6-dev: try 'cc hello.c'"
    ensure_rust
    use_linker
    fetch_crates
}
