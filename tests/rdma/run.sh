#!/usr/bin/env bash
# Boots the rig that build.sh made, runs one command inside, and brings back its output and exit status.
set -euo pipefail

here=$(dirname -- "$(realpath -- "${BASH_SOURCE[0]}")")
readonly here
# shellcheck source=tests/rdma/host-tools.sh
. "$here/host-tools.sh"

readonly rig_failed=125 out_of_time=124

limit_seconds=600
memory_mb=1536
accelerator=""
interactive=no
working_directory=/
shares=()
environment=(CORELANE_RDMA_RIG=1)

usage() {
    cat <<'TEXT'
Usage: tests/rdma/run.sh [OPTION]... RIG RESULTS COMMAND [ARGUMENT]...

Boots the rig in the directory RIG (see build.sh), and runs the command inside, as root, with its output shown here.
  -s DIRECTORY    a directory of this machine that is seen inside at the same path, read-only; may be repeated
  -C DIRECTORY    where the command runs
  -e NAME=VALUE   an environment variable; may be repeated
  -t SECONDS      the limit on all of it, by default 600
  -m MEGABYTES    memory, by default 1536
  -a kvm|tcg      how the processor is had, by default kvm where it works
  -i              the command talks to this terminal
RESULTS is a directory of this machine that both sides write to, seen at the same path inside. In the end it has the files
output, status, console.log (the kernel's words) and qemu.log.
Inside are two processors, the devices rxe0 (10.9.0.1) and rxe1 (10.9.0.2) with a cable between them, va to vb, the tools
ip, tc, rdma, ibv_* and ib_*, busybox for everything else, and CORELANE_RDMA_RIG=1.
The exit status is the command's, 124 when time is up, 125 when the rig does not work.
TEXT
}

parse_options() {
    local option
    while getopts hs:C:e:t:m:a:i option; do
        case $option in
            s) shares+=("$(realpath -- "$OPTARG")") ;;
            C) working_directory=$OPTARG ;;
            e) environment+=("$OPTARG") ;;
            t) limit_seconds=$OPTARG ;;
            m) memory_mb=$OPTARG ;;
            a) accelerator=$OPTARG ;;
            i) interactive=yes ;;
            h)
                usage
                exit
                ;;
            *) exit "$rig_failed" ;;
        esac
    done
    shift $((OPTIND - 1))
    if (($# < 3)); then
        usage >&2
        exit "$rig_failed"
    fi
    rig=$(realpath -- "$1")
    mkdir -p -- "$2"
    results=$(realpath -- "$2")
    command=("${@:3}")
}

fail() {
    printf 'the RDMA rig failed: %s\n' "$*" >&2
    exit "$rig_failed"
}

# What init reads inside.
write_job() {
    rm -f -- "$results"/{output,status,problem,console.log,qemu.log}
    : >"$results/output"
    declare -p results shares environment working_directory interactive command >"$results/job"
}

# The words of the emulator's command line, in `machine`.
describe_machine() {
    local index
    machine=(-nodefaults -no-user-config -display none -no-reboot
        -L "$tools/usr/share/qemu" -L "$tools/usr/share/seabios"
        -machine pc -smp 2 -m "$memory_mb" -kernel "$rig/vmlinuz" -initrd "$rig/initramfs"
        -append "console=ttyS0 quiet panic=-1 mitigations=off nokaslr no_timer_check tsc=reliable"
        -serial "file:$results/console.log")
    if [[ ${accelerator:=$(choose_accelerator)} == kvm ]]; then
        machine+=(-accel kvm -cpu host)
    else
        # Page tables of five levels are slower to emulate, and of no use.
        machine+=(-accel "tcg,thread=multi" -cpu "max,-la57")
    fi
    share_with_machine results "$results" ""
    for index in "${!shares[@]}"; do
        share_with_machine "share$index" "${shares[index]}" ,readonly=on
    done
    if [[ $interactive == yes ]]; then
        machine+=(-chardev "stdio,id=terminal,signal=off" -serial chardev:terminal)
    fi
}

# A comma in a path is written twice.
share_with_machine() {
    local tag=$1 directory=$2 options=$3
    machine+=(-virtfs "local,path=${directory//,/,,},mount_tag=$tag,security_model=none,multidevs=remap$options")
}

# The device can be there without being of use: so a machine is started, and asked to end before it runs anything.
choose_accelerator() {
    if [[ -r /dev/kvm && -w /dev/kvm ]] &&
        printf 'quit\n' | emulator -nodefaults -no-user-config -display none -L "$tools/usr/share/seabios" \
            -machine pc -accel kvm -cpu host -S -monitor stdio >/dev/null 2>&1; then
        printf 'kvm'
    else
        printf 'tcg'
    fi
}

emulator() {
    QEMU_MODULE_DIR=$tools/usr/lib/x86_64-linux-gnu/qemu \
        timeout --foreground --kill-after=5 "$limit_seconds" "${loader[@]}" "$tools/usr/bin/qemu-system-x86_64" "$@"
}

# Shows the output while the machine runs; `emulator_status` is how that ended.
boot() {
    local emulator_pid tail_pid
    emulator_status=0
    if [[ $interactive == yes ]]; then
        emulator "${machine[@]}" 2>"$results/qemu.log" || emulator_status=$?
        return
    fi
    emulator "${machine[@]}" >"$results/qemu.log" 2>&1 </dev/null &
    emulator_pid=$!
    tail -n +1 -s 0.5 -f --pid="$emulator_pid" "$results/output" &
    tail_pid=$!
    wait "$emulator_pid" || emulator_status=$?
    wait "$tail_pid" || true
}

report() {
    if [[ -s $results/status ]]; then
        exit "$(<"$results/status")"
    elif [[ -s $results/problem ]]; then
        fail "$(<"$results/problem"); the kernel's words are in $results/console.log"
    elif ((emulator_status == out_of_time)); then
        printf 'stopped after %d s; the output so far is in %s\n' "$limit_seconds" "$results/output" >&2
        exit "$out_of_time"
    fi
    tail -n 20 -- "$results/qemu.log" "$results/console.log" >&2 || true
    fail "it ended before the command did (status $emulator_status); see above, and $results"
}

main() {
    parse_options "$@"
    [[ -e $rig/made ]] || fail "there is none in $rig: tests/rdma/build.sh $rig makes one"
    use_tools "$rig/host"
    write_job
    describe_machine
    boot
    report
}

main "$@"
