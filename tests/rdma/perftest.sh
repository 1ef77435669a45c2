#!/usr/bin/env bash
# Measures the RDMA devices by perftest, from one to the other on one machine: a yardstick for corelane-bench in the same
# boot. `tests/rdma/rig.sh perftest` runs it in the rig.
set -euo pipefail

readonly gid_index=1 # RoCE v2 over IPv4, for rxe
readonly limit_seconds=60

client_device=rxe0
server_device=rxe1
server_address=10.9.0.2
rounds=5
iterations=1000
sizes="64 4096 16384"
tools="ib_read_lat ib_write_lat ib_send_lat ib_read_bw ib_write_bw"

usage() {
    cat <<'TEXT'
Usage: perftest.sh [OPTION]...

  -r ROUNDS       by default 5
  -n ITERATIONS   of each round, by default 1000
  -s "SIZE..."    in bytes, by default "64 4096 16384"
  -t "TOOL..."    by default "ib_read_lat ib_write_lat ib_send_lat ib_read_bw ib_write_bw"
A line for each tool and size: the least, the median and the greatest of the rounds' values. The value of a round is its
typical (median) latency in microseconds; for writes and sends perftest halves the round trip. For bandwidth it is the average
in messages a second.
TEXT
}

parse_options() {
    local option
    while getopts hr:n:s:t: option; do
        case $option in
            r) rounds=$OPTARG ;;
            n) iterations=$OPTARG ;;
            s) sizes=$OPTARG ;;
            t) tools=$OPTARG ;;
            h)
                usage
                exit
                ;;
            *) exit 2 ;;
        esac
    done
}

# run_round TOOL SIZE PORT [OPTION]...   prints the value of one round.
run_round() {
    local tool=$1 size=$2 port=$3 words log=$scratch/client
    words=(-x "$gid_index" -s "$size" -n "$iterations" -p "$port" -F "${@:4}")
    timeout "$limit_seconds" "$tool" -d "$server_device" "${words[@]}" >"$scratch/server" 2>&1 &
    wait_for_server "$port"
    if ! timeout "$limit_seconds" "$tool" -d "$client_device" "${words[@]}" "$server_address" >"$log" 2>&1; then
        cat -- "$log" "$scratch/server" >&2
        return 1
    fi
    wait
    read_value "$tool" "$size" <"$log"
}

# Until it listens: there is no word of it that says so.
wait_for_server() {
    local hexadecimal
    printf -v hexadecimal ':%04X 00' "$1"
    for _ in {1..200}; do
        ! grep -qE "$hexadecimal.* 0A " /proc/net/tcp /proc/net/tcp6 || return 0
        sleep 0.05
    done
}

# Latency: bytes, iterations, t_min, t_max, t_typical, ... Bandwidth: bytes, iterations, peak, average, messages in millions.
read_value() {
    case $1 in
        *_lat) awk -v size="$2" '$1 == size && NF >= 6 { print $5 }' ;;
        *_bw) awk -v size="$2" '$1 == size && NF >= 5 { printf "%d\n", $5 * 1000000 }' ;;
    esac
}

# Prints the least, the median and the greatest of the numbers that come in.
spread() {
    sort -g | awk '{ value[NR] = $1 } END { print value[1], value[int((NR + 1) / 2)], value[NR] }'
}

unit() {
    case $1 in
        *_lat) printf 'us' ;;
        *_bw) printf 'messages/s' ;;
    esac
}

main() {
    local tool size round port=18500 values least median greatest
    parse_options "$@"
    scratch=$(mktemp -d)
    trap 'rm -rf -- "$scratch"' EXIT
    printf '%-14s %8s %10s %10s %10s\n' perftest bytes least median greatest
    for tool in $tools; do
        for size in $sizes; do
            values=""
            for ((round = 0; round < rounds; round++)); do
                port=$((port + 1))
                values+=$(run_round "$tool" "$size" "$port")$'\n'
            done
            read -r least median greatest < <(printf '%s' "$values" | spread)
            printf '%-14s %8s %10s %10s %10s  %s\n' "$tool" "$size" "$least" "$median" "$greatest" "$(unit "$tool")"
        done
    done
}

# compare.sh uses the parts.
if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
    main "$@"
fi
