#!/usr/bin/env bash
# Makes the backend CORELANE visible to the NIXL of a Python environment, proves it by creating one, and can take it away
# again. It needs nothing but bash, coreutils and that Python, so it also works beside the plugin in a release archive.
set -euo pipefail

readonly plugin_name=libplugin_CORELANE.so
# What was made is written down next to it, so that --undo removes that and nothing else. NIXL ignores such names.
readonly record_name=.corelane-installed
readonly oldest_nixl=1.0.0
readonly verify_limit_seconds=120
readonly caller_dir=$PWD
script_dir=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
readonly script_dir

synopsis() {
    cat <<TEXT
Usage: plugin/install.sh [--python PATH] [--plugin FILE] [--copy] [--mirror DIR]
       plugin/install.sh --check [--python PATH] [--mirror DIR]
       plugin/install.sh --undo [--python PATH] [--mirror DIR]
       plugin/install.sh --help
TEXT
}

usage() {
    synopsis
    cat <<TEXT

Links $plugin_name into the plugin directory of a Python environment's NIXL, beside UCX and the others. Where that
directory cannot be written, or with --mirror, it prepares a mirror of it instead and prints the line to put into the
environment of your processes. Then it creates a backend CORELANE to see that it works. It can be run again at any time.

  --python PATH   the Python, or its virtual environment (default: the active one, else python3 on PATH)
  --plugin FILE   the plugin (default: beside this script, else target/release/$plugin_name)
  --copy          copy the plugin instead of linking it: for container images that do not keep the build
  --mirror DIR    leave the environment alone and mirror its plugin directory in DIR, for NIXL_PLUGIN_DIR
  --check         change nothing: say what is there, and whether a backend can be created
  --undo          remove what earlier runs made: in the environment and its default mirror, or in --mirror DIR
  -h, --help      this text

The exit status is 0 when all is well, 1 when the backend could not be created, 2 when nothing could be done.
TEXT
}

# Messages go to stderr; stdout is kept for the line that sets NIXL_PLUGIN_DIR.
say() {
    printf 'corelane: %s\n' "$*" >&2
}

give_up() {
    say "$@"
    exit 2
}

row() {
    printf '  %-8s  %s\n' "$1" "$2" >&2
}

# --- arguments

action=install
python=""
plugin=""
mirror=""
mode="link"

parse_arguments() {
    while (($# > 0)); do
        case $1 in
            --python | --plugin | --mirror)
                [[ -n ${2:-} && ${2:-} != --* ]] || misused "$1 needs a value"
                printf -v "${1#--}" '%s' "$2"
                shift
                ;;
            --python=* | --plugin=* | --mirror=*)
                set -- "${1%%=*}" "${1#*=}" "${@:2}"
                continue
                ;;
            --copy) mode=copy ;;
            --undo) set_action undo ;;
            --check) set_action check ;;
            -h | --help)
                usage
                exit 0
                ;;
            *) misused "unknown option '$1'" ;;
        esac
        shift
    done
    [[ $action == install || ( -z $plugin && $mode == link ) ]] || misused "--plugin and --copy are for installing"
    [[ -z $mirror ]] || mirror=$(absolute "$mirror")
}

set_action() {
    [[ $action == install ]] || misused "--undo and --check exclude each other"
    action=$1
}

misused() {
    say "$1"
    synopsis >&2
    exit 2
}

# Without following links: a path that the user chose is the path that is written down.
absolute() {
    if [[ $1 == /* ]]; then
        printf '%s' "$1"
    else
        printf '%s/%s' "$caller_dir" "$1"
    fi
}

# --- what is there

find_python() {
    local name=${python:-${VIRTUAL_ENV:-python3}}
    python=$name
    if [[ $name != */* && ! -d $name ]]; then
        python=$(type -P "$name") || give_up "there is no $name on PATH: name a Python with --python PATH"
    fi
    python=$(absolute "$python")
    [[ ! -d $python ]] || python=${python%/}/bin/python3
    [[ -x $python ]] || give_up "$python is not there or cannot be run: name a Python or its environment with --python PATH"
    python_version=$("$python" -c 'import platform; print(platform.python_version())' 2>/dev/null) ||
        give_up "$python does not run as a Python"
}

# Fills the arrays of NIXL builds, usually one: the plugin directory of each, its version and the name of its package.
find_nixl() {
    local directory version package
    nixl_dirs=() nixl_versions=() nixl_packages=()
    while IFS=$'\t' read -r directory version package; do
        nixl_dirs+=("$directory") nixl_versions+=("$version") nixl_packages+=("$package")
    done < <(list_nixl)
    ((${#nixl_dirs[@]} > 0)) ||
        give_up "$python has no NIXL with a plugin directory: install it with '$python -m pip install nixl', or name another Python with --python"
}

# The wheel is asked for its own files: its name (nixl-cu12, nixl-cu13, ...) differs. Directories of the build system
# beside a package that has lost its metadata come last. The one that `import nixl` takes comes first.
list_nixl() {
    # Not from a file or the current directory: neither may shadow a module.
    "$python" - <<'PYTHON'
import contextlib, importlib.metadata, os, pathlib, re, subprocess, sys

sys.path[:] = [entry for entry in sys.path if entry not in ("", os.getcwd())]
found = {}
for distribution in importlib.metadata.distributions():
    name = re.sub("[-_.]+", "-", distribution.metadata["Name"] or "").lower()
    if not re.fullmatch("nixl(-.*)?", name):
        continue
    for file in distribution.files or []:
        if file.parent.name == "plugins" and file.match("libplugin_*.so"):
            directory = pathlib.Path(distribution.locate_file(file)).parent
            if directory.is_dir():
                found.setdefault(os.path.realpath(directory), (distribution.version, name))
for entry in sys.path:
    with contextlib.suppress(OSError):
        for directory in sorted(pathlib.Path(entry).glob(".nixl*.mesonpy.libs/plugins")):
            found.setdefault(os.path.realpath(directory), ("unknown", directory.parent.name.split(".")[1]))

where_nixl_is = """
import sys
sys.path[:] = [entry for entry in sys.path if entry]
import nixl._api
for line in open("/proc/self/maps"):
    path = line.split(maxsplit=5)[-1].strip()
    if path.endswith("/libnixl.so"):
        print("libnixl at", path)
"""
in_use = None
with contextlib.suppress(OSError, subprocess.TimeoutExpired):
    answer = subprocess.run([sys.executable, "-c", where_nixl_is], capture_output=True, text=True, timeout=120).stdout
    for path in re.findall("^libnixl at (.*)$", answer, re.MULTILINE):
        in_use = os.path.realpath(os.path.join(os.path.dirname(path), "plugins"))
for directory in sorted(found, key=lambda directory: directory != in_use):
    print(directory, *found[directory], sep="\t")
PYTHON
}

# Leaves the builds of NIXL that the plugin works with.
keep_supported_nixl() {
    local index kept=() refused=()
    for index in "${!nixl_dirs[@]}"; do
        if [[ ${nixl_versions[index]} == unknown ]] || version_at_least "${nixl_versions[index]}" "$oldest_nixl"; then
            kept+=("$index")
        else
            refused+=("${nixl_packages[index]} ${nixl_versions[index]}")
        fi
    done
    ((${#kept[@]} > 0)) ||
        give_up "${refused[0]} of $python is too old: corelane needs NIXL $oldest_nixl or newer ('$python -m pip install --upgrade nixl')"
    ((${#refused[@]} == 0)) || say "left alone, since older than $oldest_nixl: ${refused[*]}"
    supported=("${kept[@]}")
}

# True where version $1 is $2 or newer.
version_at_least() {
    printf '%s\n%s\n' "$2" "$1" | sort -V -C
}

find_plugin() {
    local repo=${script_dir%/*} target
    if [[ -n $plugin ]]; then
        plugin=$(absolute "$plugin")
        [[ -f $plugin ]] || give_up "there is no plugin $plugin"
    elif [[ -f $script_dir/$plugin_name ]]; then
        plugin=$script_dir/$plugin_name
    elif [[ -f $repo/Cargo.toml ]]; then
        target=$(absolute "${CARGO_TARGET_DIR:-$repo/target}")
        plugin=$target/release/$plugin_name
        [[ -f $plugin ]] ||
            give_up "$plugin is not built: run 'cargo build --release' in $repo, or name the plugin with --plugin FILE"
    else
        give_up "there is no $plugin_name beside this script: name it with --plugin FILE"
    fi
    [[ -r $plugin ]] || give_up "$plugin cannot be read"
}

# --- the plugin in a directory of NIXL plugins: an entry, and beside it a record of two lines (how, and from what)

# Says in `entry_state` what is in the directory $1: none, ours, ours-changed, foreign.
look_at_entry() {
    local entry=$1/$plugin_name record=$1/$record_name
    entry_state=none entry_how="" entry_source=""
    if [[ -f $record ]]; then
        { read -r entry_how && read -r entry_source; } <"$record" || true
    fi
    if [[ ! -e $entry && ! -L $entry ]]; then
        return
    elif [[ ! -f $record ]]; then
        entry_state=foreign
    elif [[ $entry_how == link && -L $entry && $(readlink -- "$entry") == "$entry_source" ]] ||
        [[ $entry_how == copy && ! -L $entry && $(digest "$entry") == "$entry_source" ]]; then
        entry_state=ours
    else
        entry_state=ours-changed
    fi
}

digest() {
    sha256sum -- "$1" | cut -d' ' -f1
}

# True where the directory $1 holds this plugin already, whoever put it there.
entry_is_current() {
    local entry=$1/$plugin_name
    look_at_entry "$1"
    case $entry_state in
        ours) [[ $mode == "$entry_how" ]] && entry_has_our_bytes "$entry" ;;
        foreign) entry_has_our_bytes "$entry" ;;
        *) false ;;
    esac
}

entry_has_our_bytes() {
    if [[ $mode == link ]]; then
        [[ -L $1 && $(readlink -- "$1") == "$plugin" ]]
    else
        [[ ! -L $1 ]] && cmp -s -- "$1" "$plugin"
    fi
}

put_entry() {
    local directory=$1 entry=$1/$plugin_name temporary=$1/$record_name.tmp
    if entry_is_current "$directory"; then
        done_there="was there already"
        return
    fi
    case $entry_state in
        foreign) give_up "$entry is there and was not made by this script: remove it first, if it is yours to remove" ;;
        ours-changed) give_up "$entry was changed after this script had made it: remove it first, if it is yours to remove" ;;
    esac
    rm -f -- "$temporary"
    if [[ $mode == link ]]; then
        ln -s -- "$plugin" "$temporary"
        printf 'link\n%s\n' "$plugin" >"$directory/$record_name"
    else
        cp -- "$plugin" "$temporary"
        chmod 755 "$temporary"
        printf 'copy\n%s\n' "$(digest "$temporary")" >"$directory/$record_name"
    fi
    # A process that loads the plugin right now sees the old one or the new one, never a half.
    mv -fT -- "$temporary" "$entry"
    done_there=$([[ $mode == link ]] && printf 'linked' || printf 'copied')
}

remove_entry() {
    local entry=$1/$plugin_name
    look_at_entry "$1"
    case $entry_state in
        ours)
            rm -f -- "$entry" "$1/$record_name"
            row removed "$entry"
            ;;
        ours-changed) give_up "$entry was changed after this script had made it: not removed" ;;
        foreign) row kept "$entry (not made by this script)" ;;
        none) rm -f -- "$1/$record_name" ;;
    esac
}

describe_entry() {
    local entry=$1/$plugin_name how
    look_at_entry "$1"
    how=$([[ -L $entry ]] && printf 'a link to %s' "$(readlink -- "$entry")" || printf 'a copy')
    [[ -e $entry ]] || how+=", which is not there"
    case $entry_state in
        none) row plugin "not installed in $1" ;;
        ours) row plugin "$entry: $how" ;;
        *) row plugin "$entry: $how, not made by this script" ;;
    esac
}

# --- a mirror: DIR/nixl/plugins with a link to each plugin, and around it links to what the plugins find by their own
# place (`..` and `../../NAME.libs`), since NIXL_PLUGIN_DIR replaces the plugin directory and takes one path only

default_mirror() {
    local key
    [[ -n ${XDG_DATA_HOME:-}${HOME:-} ]] || give_up "HOME is not set: say where the mirror goes with --mirror DIR"
    key=$(printf '%s' "$1" | sha256sum | cut -c1-12)
    printf '%s/corelane/nixl-%s' "${XDG_DATA_HOME:-$HOME/.local/share}" "$key"
}

make_mirror() {
    local base=$1 plugins=$2 libraries parent file
    libraries=$(dirname -- "$plugins")
    parent=$(dirname -- "$libraries")
    if [[ -e $base && ! -f $base/$record_name ]] && [[ ! -d $base || -n $(ls -A -- "$base") ]]; then
        give_up "$base is there and was not made by this script: name an empty or new directory with --mirror DIR"
    fi
    make_directory "$base/nixl/plugins" "$base"
    drop_dead_links "$base"
    for file in "$plugins"/*.so; do
        [[ ${file##*/} == "$plugin_name" ]] || mirror_link "$base" "nixl/plugins/${file##*/}" "$file"
    done
    for file in "$libraries"/*.so*; do
        mirror_link "$base" "nixl/${file##*/}" "$file"
    done
    for file in "$parent"/*.libs; do
        mirror_link "$base" "${file##*/}" "$file"
    done
    put_entry "$base/nixl/plugins"
}

# make_directory PATH BASE   with its parents; those that it made are written down in BASE, deepest last.
make_directory() {
    local path=$1 base=$2 missing=() made
    while [[ ! -d $path ]]; do
        missing=("$path" "${missing[@]}")
        path=$(dirname -- "$path")
    done
    ((${#missing[@]} > 0)) || return 0
    mkdir -p -- "$1" || give_up "cannot make the directory $1: name another one with --mirror DIR"
    for made in "${missing[@]}"; do
        printf 'directory\t%s\n' "$made" >>"$base/$record_name"
    done
}

mirror_link() {
    local base=$1 name=$2 target=$3
    [[ -e $target ]] || return 0
    if [[ ! -L $base/$name || $(readlink -- "$base/$name") != "$target" ]]; then
        printf 'link\t%s\n' "$name" >>"$base/$record_name"
        ln -sfn -- "$target" "$base/$name"
    fi
}

# After NIXL was updated or moved, links of an earlier run can point nowhere.
drop_dead_links() {
    local base=$1 kind name
    while IFS=$'\t' read -r kind name; do
        if [[ $kind == link && -L $base/$name && ! -e $base/$name ]]; then
            rm -f -- "$base/$name"
        fi
    done <"$base/$record_name"
}

remove_mirror() {
    local base=$1 kind name index directories=()
    if [[ ! -f $base/$record_name ]]; then
        [[ -z $mirror ]] || give_up "$base is no mirror made by this script"
        return
    fi
    remove_entry "$base/nixl/plugins"
    while IFS=$'\t' read -r kind name; do
        case $kind in
            link) [[ ! -L $base/$name ]] || rm -f -- "$base/$name" ;;
            directory) directories+=("$name") ;;
        esac
    done <"$base/$record_name"
    rm -f -- "$base/$record_name"
    for ((index = ${#directories[@]} - 1; index >= 0; index--)); do
        rmdir --ignore-fail-on-non-empty -- "${directories[index]}"
    done
    row removed "the mirror $base"
}

# --- proof

# Creates a backend with NIXL_PLUGIN_DIR=$1 ("" for none, "as-is" for the caller's); says in `verdict` what happened.
verify() {
    local setting=$1 output status=0 environment=(env)
    case $setting in
        as-is) ;;
        "") environment+=(-u NIXL_PLUGIN_DIR) ;;
        *) environment+=("NIXL_PLUGIN_DIR=$setting") ;;
    esac
    output=$(verify_program | timeout "$verify_limit_seconds" "${environment[@]}" "$python" - 2>&1) || status=$?
    verdict=$(sed -n 's/^VERIFIED //p' <<<"$output")
    [[ $status == 0 && -n $verdict ]] && return 0
    verdict="no backend CORELANE"
    say "creating a backend CORELANE failed (exit status $status):"
    grep -v '^VERIFIED' <<<"$output" | tail -n 12 >&2 || true
    return 1
}

# Ends without the destructors of libraries: some that UCX brings along crash there.
verify_program() {
    cat <<'PYTHON'
import os, sys

sys.path[:] = [entry for entry in sys.path if entry]
try:
    from nixl._api import nixl_agent, nixl_agent_config
except BaseException as error:
    print(f"NIXL itself cannot be imported: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    os._exit(1)
try:
    agent = nixl_agent("corelane-install", nixl_agent_config(backends=[]))
    plugins = agent.get_plugin_list()
    agent.create_backend("CORELANE")
    # Asking for its parameters loads the plugin: a name in the list says only that there is a file.
    ucx = "UCX" in plugins and bool(agent.get_plugin_params("UCX"))
except BaseException as error:
    print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    os._exit(1)
others = len(plugins) - 1 - ("UCX" in plugins)
print(f"VERIFIED CORELANE created, UCX {'loads' if ucx else 'DOES NOT LOAD'}, {others} other plugins visible", flush=True)
os._exit(0)
PYTHON
}

# --- what the user asked for

report_nixl() {
    local index
    row Python "$python ($python_version)"
    for index in "$@"; do
        row NIXL "${nixl_versions[index]} (${nixl_packages[index]}), plugins in ${nixl_dirs[index]}"
    done
}

install() {
    local index directory base setting="" notes=()
    find_python
    find_nixl
    keep_supported_nixl
    find_plugin
    for index in "${supported[@]}"; do
        directory=${nixl_dirs[index]}
        if [[ -z $mirror ]] && { [[ -w $directory ]] || entry_is_current "$directory"; }; then
            put_entry "$directory"
            notes+=("$done_there: $directory/$plugin_name")
        elif [[ -z $setting ]]; then
            # NIXL_PLUGIN_DIR can name one directory: that of the NIXL in use, which is the first.
            base=${mirror:-$(default_mirror "$directory")}
            make_mirror "$base" "$directory"
            setting=$base/nixl/plugins
            notes+=("$done_there: $setting/$plugin_name")
        fi
    done
    report_nixl "${supported[@]}"
    row plugin "$plugin"
    for index in "${!notes[@]}"; do
        row "$([[ $index == 0 ]] && printf 'did')" "${notes[index]}"
    done
    finish "$setting"
}

finish() {
    local setting=$1 verified=0
    verify "$setting" || verified=1
    row proof "$verdict"
    if [[ -n $setting ]]; then
        row 'to do' "the environment was left as it is: set this for your processes"
        printf 'export NIXL_PLUGIN_DIR=%q\n' "$setting"
    elif [[ -n ${NIXL_PLUGIN_DIR:-} ]]; then
        say "NIXL_PLUGIN_DIR is set ($NIXL_PLUGIN_DIR): NIXL looks there and not in its own directory; unset it, or use --mirror"
    fi
    ((verified == 0)) || say "the plugin stays where it was put; '$0 --undo $(undo_arguments)' takes it away"
    return "$verified"
}

undo_arguments() {
    if [[ -n $mirror ]]; then
        printf -- '--mirror %q' "$mirror"
    else
        printf -- '--python %q' "$python"
    fi
}

check() {
    local index base setting=as-is
    find_python
    find_nixl
    keep_supported_nixl
    report_nixl "${supported[@]}"
    for index in "${supported[@]}"; do
        describe_entry "${nixl_dirs[index]}"
        base=${mirror:-$(default_mirror "${nixl_dirs[index]}")}
        [[ ! -f $base/$record_name ]] || row mirror "$base/nixl/plugins"
    done
    if [[ -n $mirror ]]; then
        [[ -f $mirror/$record_name ]] || give_up "$mirror is no mirror made by this script"
        setting=$mirror/nixl/plugins
    elif [[ -n ${NIXL_PLUGIN_DIR:-} ]]; then
        row set "NIXL_PLUGIN_DIR=$NIXL_PLUGIN_DIR"
    fi
    verify "$setting" || return 1
    row proof "$verdict"
}

undo() {
    local directory base
    if [[ -n $mirror ]]; then
        remove_mirror "$mirror"
        return
    fi
    find_python
    find_nixl
    for directory in "${nixl_dirs[@]}"; do
        remove_entry "$directory"
        base=$(default_mirror "$directory")
        remove_mirror "$base"
    done
    row "done" "nothing of this script is left in the NIXL of $python"
}

main() {
    parse_arguments "$@"
    [[ $(uname -s) == Linux ]] || give_up "corelane needs Linux; this is $(uname -s)"
    "$action"
}

main "$@"
