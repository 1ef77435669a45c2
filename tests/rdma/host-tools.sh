# shellcheck shell=bash
# Runs programs out of a tree of unpacked packages, with the tree's own loader and libraries: they need not fit this machine.

# use_tools TREE
use_tools() {
    tools=$1
}

# Prints the words before the path of a program of the tree.
tool_loader() {
    printf '%s\n' "$tools/usr/lib64/ld-linux-x86-64.so.2" --library-path "$tools/usr/lib/x86_64-linux-gnu"
}

# run_tool NAME [ARGUMENT]...
run_tool() {
    local loader
    mapfile -t loader < <(tool_loader)
    "${loader[@]}" "$tools/usr/bin/$1" "${@:2}"
}

# run_kmod depmod|modprobe [ARGUMENT]...   one program, which goes by the name that it is called by.
run_kmod() {
    local loader
    mapfile -t loader < <(tool_loader)
    "${loader[@]}" --argv0 "$1" "$tools/usr/bin/kmod" "${@:2}"
}
