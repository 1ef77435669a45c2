#!/usr/bin/env bash
# Runs the test programs that the file $1 names, a line for each: name, path and filter with tabs between them; the other
# words are options for each. suite.sh starts this where the RDMA devices are, which is mostly in the rig.
set -uo pipefail

readonly program_limit_seconds=400

plan=$1
shift
failed=0
while IFS=$'\t' read -r -u 3 name program filter; do
    printf '=== %s\n' "$name"
    started=$SECONDS
    status=0
    timeout -s KILL "$program_limit_seconds" "$program" "$filter" --include-ignored "$@" </dev/null || status=$?
    printf -- '--- %s: exit status %d after %d s\n' "$name" "$status" $((SECONDS - started))
    ((status == 0)) || failed=1
done 3<"$plan"
exit "$failed"
