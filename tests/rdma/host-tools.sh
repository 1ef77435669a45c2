# shellcheck shell=bash
# Runs programs out of a tree of unpacked packages, with the tree's own loader and libraries: they need not fit this machine.

# use_tools TREE   The loader is not the one that programs name, in lib64: that may be a link to the loader of this machine.
use_tools() {
    local libraries=$1/usr/lib/x86_64-linux-gnu
    tools=$1
    loader=("$libraries/ld-linux-x86-64.so.2" --library-path "$libraries")
}

# run_tool NAME [ARGUMENT]...
run_tool() {
    "${loader[@]}" "$tools/usr/bin/$1" "${@:2}"
}

# run_kmod depmod|modprobe [ARGUMENT]...   one program, which goes by the name that it is called by.
run_kmod() {
    "${loader[@]}" --argv0 "$1" "$tools/usr/bin/kmod" "${@:2}"
}
