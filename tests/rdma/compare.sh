#!/usr/bin/env bash
# Measures corelane-bench beside perftest, in turns on the same devices, and prints both with their ratios in one table.
# `tests/rdma/rig.sh compare` runs it in the rig.
set -euo pipefail

here=${BASH_SOURCE[0]%/*}
readonly here
# shellcheck source=tests/rdma/perftest.sh
. "$here/perftest.sh"

readonly kv_blocks=256 kv_block_bytes=16384
bench=""
duration=400ms

usage() {
    cat <<'TEXT'
Usage: compare.sh [-r ROUNDS] [-n ITERATIONS] [-d DURATION] CORELANE_BENCH

  -r ROUNDS       of both, in turns, by default 5
  -n ITERATIONS   of each round of perftest, by default 1000
  -d DURATION     of each case in each round of corelane-bench, by default 400ms
A line for each case: the median of the rounds for both, how they spread (the least and the greatest), the ratio of the
medians, and what it is to be at most. Latencies in microseconds from post to completion, or one way; the batch in messages a
second, with the ratio of times. For WRITE perftest is ib_write_bw with one request at a time: ib_write_lat is half a round trip
of two WRITEs. A notification bound to a WRITE is compared with the WRITE and half a round trip of SENDs.
TEXT
}

parse_compare_options() {
    local option
    while getopts hr:n:d: option; do
        case $option in
            r) rounds=$OPTARG ;;
            n) iterations=$OPTARG ;;
            d) duration=$OPTARG ;;
            h)
                usage
                exit
                ;;
            *) exit 2 ;;
        esac
    done
    shift $((OPTIND - 1))
    if (($# != 1)); then
        usage >&2
        exit 2
    fi
    bench=$1
}

# add FILE VALUE...   keeps the values of a round, a line each, in a file of the case.
add() {
    printf '%s\n' "${@:2}" >>"$scratch/$1"
}

# Microseconds of one request at a time, from a rate.
serial_us() {
    awk -v rate="$1" 'BEGIN { printf "%.2f\n", 1000000 / rate }'
}

perftest_round() {
    local size read_us write_rate send_us tool
    for size in 64 4096; do
        read_us=$(next_round ib_read_lat "$size")
        write_rate=$(next_round ib_write_bw "$size" -t 1)
        add "perftest-read-$size" "$read_us"
        add "perftest-write-$size" "$(serial_us "$write_rate")"
    done
    send_us=$(next_round ib_send_lat 32)
    add perftest-notify "$send_us"
    add perftest-bound "$(awk -v write="$(tail -n 1 "$scratch/perftest-write-4096")" -v send="$send_us" \
        'BEGIN { printf "%.2f\n", write + send }')"
    for tool in read write; do
        add "perftest-$tool-batch" "$(next_round "ib_${tool}_bw" "$kv_block_bytes" -t "$kv_blocks")"
    done
}

next_round() {
    port=$((port + 1))
    run_round "$1" "$2" "$port" "${@:3}"
}

# The p50 of each case, from the table that corelane-bench prints.
bench_round() {
    local output=$scratch/bench
    if ! "$bench" loopback --transport rdma --rdma-devices "$client_device" --server-rdma-devices "$server_device" \
        --scenario sizes,kv,notify --sizes 64,4KiB --kv "${kv_blocks}x16KiB" --rounds 1 --duration "$duration" \
        --out-dir "$scratch/results" >"$output" 2>&1; then
        tail -n 20 -- "$output" >&2
        return 1
    fi
    add bench-read-64 "$(p50 'read/64B')"
    add bench-read-4096 "$(p50 'read/4KiB')"
    add bench-write-64 "$(p50 'write/64B')"
    add bench-write-4096 "$(p50 'write/4KiB')"
    add bench-notify "$(p50 'notify/32B/one-way')"
    add bench-bound "$(p50 'write+notify/4KiB/one-way')"
    add bench-read-batch "$(batch_rate "$(p50 "kv/read/${kv_blocks}x16KiB")")"
    add bench-write-batch "$(batch_rate "$(p50 "kv/write/${kv_blocks}x16KiB")")"
}

p50() {
    awk -v case="$1" '$1 == case { print $4; found = 1; exit } END { exit !found }' "$scratch/bench" || {
        printf 'corelane-bench says nothing of %s\n' "$1" >&2
        return 1
    }
}

batch_rate() {
    awk -v us="$1" -v blocks="$kv_blocks" 'BEGIN { printf "%d\n", blocks * 1000000 / us }'
}

# compare NAME FILE BOUND UNIT
compare() {
    local ours theirs
    ours=$(spread <"$scratch/bench-$2")
    theirs=$(spread <"$scratch/perftest-$2")
    printf '%s %s %s\n' "$ours" "$theirs" "$3" | awk -v name="$1" -v unit="$4" '{
        ratio = unit == "us" ? $2 / $5 : $5 / $2
        printf "%-22s %9s %9s..%-9s %9s %9s..%-9s %6.2f %6s  %s\n", name, $2, $1, $3, $5, $4, $6, ratio, $7, unit
    }'
}

main_compare() {
    local round port=19500
    parse_compare_options "$@"
    scratch=$(mktemp -d)
    trap 'rm -rf -- "$scratch"' EXIT
    for ((round = 1; round <= rounds; round++)); do
        printf 'round %d of %d\n' "$round" "$rounds" >&2
        perftest_round
        bench_round
    done
    printf '%-22s %9s %9s..%-9s %9s %9s..%-9s %6s %6s\n' case corelane least most perftest least most ratio asked
    compare 'READ 64 B' read-64 1.15 us
    compare 'READ 4 KiB' read-4096 1.15 us
    compare 'WRITE 64 B' write-64 1.15 us
    compare 'WRITE 4 KiB' write-4096 1.15 us
    compare 'READ 256 x 16 KiB' read-batch 1.15 messages/s
    compare 'WRITE 256 x 16 KiB' write-batch 1.15 messages/s
    compare 'notification 32 B' notify 1.5 us
    compare 'WRITE + notification' bound 1.3 us
}

main_compare "$@"
