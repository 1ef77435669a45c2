"""What the user gets to see."""

import statistics

from .model import BLOCK_BYTES, BLOCK_POSITIONS, HEADS, VOCABULARY, WIDTH, blocks_for


def print_start(options, pids, where):
    print(
        f"model    {options.layers} layers, {HEADS} heads, width {WIDTH}, vocabulary {VOCABULARY}; "
        f"{BLOCK_POSITIONS} positions a block, {BLOCK_BYTES} bytes a block and layer; {where}"
    )
    direction = "prefill WRITEs into decode" if options.push else "decode READs from prefill"
    print(f"running  prefill as process {pids[0]}, decode as process {pids[1]}; {direction} through {options.backend}")
    print(f"request  {options.prompt_tokens} prompt tokens, {options.decode_tokens} decoded tokens\n", flush=True)


def print_request(options, number, record):
    same = record["tokens"] == record["expected"]
    verdict = "tokens are equal" if same else "tokens DIFFER"
    if record["must_differ"]:
        verdict += f" (block {options.corrupt_block} was corrupted)"
    moved = ", ".join(f"{source}->{target}" for source, target in list(zip(record["from"], record["to"]))[:4])
    more = ", ..." if len(record["from"]) > 4 else ""
    print(f"request {number + 1} of {options.requests}: blocks {moved}{more}; {verdict}", flush=True)


def phases(options, times):
    """Name and duration of each phase in order. They add up to the time to first token, but for what is beside it."""
    read = not options.push
    # The reader can see a notification before the writer has asked whether its transfer is done.
    done_ns = times["done_ns"] if read else min(times["done_ns"], times["notified_ns"])
    moments = [
        ("router to prefill", times["started_ns"]),
        ("prefill compute", times["computed_ns"]),
        ("router to decode", times["received_ns"]),
        ("metadata, handshake", times["met_ns"]),
        ("transfer prepare", times["posted_ns"]),
        ("transfer", done_ns),
        *([] if read else [("notification", times["notified_ns"])]),
        ("first decode step", times["first_token_ns"]),
    ]
    rows, before_ns = [], times["arrived_ns"]
    for name, moment_ns in moments:
        rows.append((name, moment_ns - before_ns))
        before_ns = moment_ns
    rows.append(("time to first token", times["first_token_ns"] - times["arrived_ns"]))
    if read:
        rows.append(("beside it: notification", max(0, times["notified_ns"] - done_ns)))
    return rows


def print_end(options, records, summary):
    columns = [("first request", [records[0]])]
    if len(records) > 1:
        columns.append(("later, median", records[1:]))
    tables = [[dict(phases(options, record["times"])) for record in column] for _, column in columns]
    print(f"\n{'phase, in ms':25}" + "".join(f"{title:>16}" for title, _ in columns))
    for name in tables[0][0]:
        medians = [statistics.median(table[name] for table in column) for column in tables]
        print(f"{name:25}" + "".join(f"{median / 1e6:16.3f}" for median in medians))
    blocks = options.layers * len(records[0]["from"])
    size = blocks * BLOCK_BYTES
    rates = [size / statistics.median(table["transfer"] for table in column) for column in tables]
    print(f"{'GB/s in the transfer':25}" + "".join(f"{rate:16.3f}" for rate in rates))
    print(f"{'blocks moved':25}" + "".join(f"{blocks:16}" for _ in columns))
    print(f"{'bytes moved':25}" + "".join(f"{size:16}" for _ in columns))

    computed, free, count = summary["positions_computed"], summary["free_blocks"], summary["of"]
    print(f"\ndecode ran its model on {computed} positions: {options.decode_tokens} for each request")
    print(f"prefill has {free} of its {count} blocks free again")
    print("single process  " + " ".join(map(str, records[0]["expected"])))
    print("prefill/decode  " + " ".join(map(str, records[0]["tokens"])))
    return print_verdict(options, records, computed, free == count)


def print_verdict(options, records, computed, all_free):
    wrong = [
        f"request {number}"
        for number, record in enumerate(records, 1)
        if (record["tokens"] != record["expected"]) != record["must_differ"]
    ]
    if not all_free or computed != options.requests * options.decode_tokens:
        wrong.append("the count above")
    if wrong:
        print(f"NOT AS IT MUST BE: {', '.join(wrong)}")
        return 1
    if options.corrupt_block is None:
        print("the tokens are equal")
    else:
        others = "" if len(records) == 1 else "; those of the other requests are equal"
        print(f"the tokens differ, as they must: block {options.corrupt_block} was corrupted{others}")
    return 0
