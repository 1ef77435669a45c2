"""plugin/examples/disaggregated_decode.py: as a user runs it, and its processes one by one with the test as the router."""

from __future__ import annotations

import os
import re
import secrets
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "plugin" / "examples"
BACKEND = os.environ.get("CORELANE_TEST_BACKEND", "CORELANE")
sys.path.insert(0, str(EXAMPLES))

from harness import pretended_torch  # noqa: E402

from disaggregated import Failure, arrays, model, report  # noqa: E402
from disaggregated.router import Process, single_process_run  # noqa: E402

PROGRAM = [sys.executable, str(EXAMPLES / "disaggregated_decode.py")]
# For any one step on a busy machine; only a failure takes so long.
PATIENCE_S = 60
LAYERS, SEED, PROMPT_TOKENS, DECODE_TOKENS = 4, 1, 160, 32


def run(*arguments: str, backend: str = BACKEND, **keywords) -> subprocess.CompletedProcess:
    command = [*PROGRAM, "--backend", backend, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=3 * PATIENCE_S, **keywords)


def printed_tokens(output: str) -> tuple[list[str], list[str]]:
    single, moved = (
        re.search(rf"^{title} +([\d ]+)$", output, re.MULTILINE) for title in ("single process", "prefill/decode")
    )
    assert single and moved, output
    return single[1].split(), moved[1].split()


# --- as a user runs it


@pytest.mark.parametrize("direction", [[], ["--push"]], ids=["read", "push"])
def test_tokens_are_those_of_a_single_process(direction: list[str]) -> None:
    result = run("--requests", "3", *direction)
    assert result.returncode == 0, result.stdout + result.stderr
    single, moved = printed_tokens(result.stdout)
    assert single == moved and len(moved) == DECODE_TOKENS
    assert len(set(moved)) > 4, "a sequence of equal tokens would hide a wrong cache"
    assert result.stdout.count("; tokens are equal\n") == 3
    assert result.stdout.endswith("\nthe tokens are equal\n")
    assert result.stderr == ""


def test_the_time_to_first_token_is_split_into_phases_that_add_up() -> None:
    result = run()
    assert result.returncode == 0, result.stdout + result.stderr
    rows = dict(re.findall(r"^([a-z][^\d\n]*?) {2,}(\d+\.\d{3})$", result.stdout, re.MULTILINE))
    phases = [
        "router to prefill", "prefill compute", "router to decode", "metadata, handshake",
        "transfer prepare", "transfer", "first decode step",
    ]  # fmt: skip
    total = sum(float(rows[phase]) for phase in phases)
    assert total == pytest.approx(float(rows["time to first token"]), abs=0.001 * len(phases))
    assert "beside it: notification" in rows
    blocks = LAYERS * model.blocks_for(PROMPT_TOKENS - 1)
    assert re.search(rf"^blocks moved +{blocks}$", result.stdout, re.MULTILINE)
    assert re.search(rf"^bytes moved +{blocks * 8192}$", result.stdout, re.MULTILINE)


@pytest.mark.parametrize("direction", [[], ["--push"]], ids=["read", "push"])
@pytest.mark.parametrize("block", [0, 17, 39], ids=["first", "middle", "last"])
def test_a_corrupted_block_changes_the_tokens(block: int, direction: list[str]) -> None:
    result = run("--corrupt-block", str(block), "--requests", "2", *direction)
    assert result.returncode == 0, result.stdout + result.stderr
    single, moved = printed_tokens(result.stdout)
    assert single != moved
    assert f"tokens DIFFER (block {block} was corrupted)" in result.stdout
    assert "request 2 of 2" in result.stdout and result.stdout.count("; tokens are equal\n") == 1
    assert f"the tokens differ, as they must: block {block} was corrupted" in result.stdout


@pytest.mark.parametrize(
    ("tokens", "must_differ", "status"),
    [([1, 2], False, 0), ([1, 3], False, 1), ([1, 3], True, 0), ([1, 2], True, 1)],
)
def test_the_exit_status_says_whether_the_tokens_are_as_they_must_be(
    tokens: list[int], must_differ: bool, status: int, capsys: pytest.CaptureFixture
) -> None:
    record = {"tokens": tokens, "expected": [1, 2], "must_differ": must_differ}
    options = Namespace(requests=1, decode_tokens=2, corrupt_block=5 if must_differ else None)
    assert report.print_verdict(options, [record], 2, True) == status
    assert ("NOT AS IT MUST BE: request 1" in capsys.readouterr().out) == (status == 1)


def test_other_sizes() -> None:
    """A prompt that ends with a block, one of a single position, one layer, one token."""
    for prompt_tokens, decode_tokens, layers in ((33, 1, 1), (2, 20, 2)):
        sizes = ["--prompt-tokens", str(prompt_tokens), "--decode-tokens", str(decode_tokens), "--layers", str(layers)]
        result = run(*sizes, "--requests", "2", "--seed", "9")
        assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--corrupt-block", "40"], "a request moves 40 blocks, 0 to 39"),
        (["--corrupt-block", "-1"], "-1 is less than 0"),
        (["--prompt-tokens", "1"], "1 is less than 2"),
        (["--layers", "many"], "many"),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_bad_options_give_the_usage(arguments: list[str], complaint: str) -> None:
    result = run(*arguments)
    assert result.returncode == 2
    assert result.stderr.startswith("usage:") and complaint in result.stderr
    assert result.stdout == ""


def test_a_nixl_without_corelane_is_told_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "libplugin_OTHER.so").touch()
    result = run(backend="CORELANE", env={**os.environ, "NIXL_PLUGIN_DIR": str(tmp_path)})
    assert result.returncode == 1
    sentences = [line for line in result.stderr.splitlines() if line.startswith(("prefill:", "decode:"))]
    assert len(sentences) == 1
    assert "has no backend CORELANE: run plugin/install.sh for this Python" in sentences[0]
    assert "Traceback" not in result.stderr


# --- process by process


@pytest.fixture
def start() -> Iterator[Callable[..., Process]]:
    started: list[Process] = []

    def start(role: str, *arguments: str) -> Process:
        started.append(Process(role, ["--backend", BACKEND, "--seed", str(SEED), "--timeout", "20", *arguments]))
        started[-1].receive("ready", PATIENCE_S)
        return started[-1]

    yield start
    for process in started:
        process.child.kill()
        process.child.wait()


def computed(prefill: Process, prompt: list[int], request: str = "r") -> dict:
    prefill.send(request=request, prompt=prompt)
    return prefill.receive("ticket", PATIENCE_S)["ticket"]


def decoded(decode: Process, ticket: dict) -> list[int]:
    decode.send(ticket=ticket, tokens=DECODE_TOKENS)
    return decode.receive("tokens", PATIENCE_S)["tokens"]


def serve_one(prefill: Process, decode: Process) -> None:
    """One request from end to end; both know each other afterwards, and nothing is in progress."""
    decoded(decode, computed(prefill, random_prompt(), "r0"))
    prefill.receive("freed", PATIENCE_S)


def random_prompt() -> list[int]:
    return [secrets.randbelow(model.VOCABULARY) for _ in range(PROMPT_TOKENS)]


def error_of(process: Process) -> str:
    """What a process that ends by itself says last; fails where it does not end, or not as a failure."""
    assert process.child.wait(PATIENCE_S) == 1
    deadline = time.monotonic() + PATIENCE_S
    while process.error is None:
        assert time.monotonic() < deadline, "it ended without a word"
        time.sleep(0.01)
    return process.error


@pytest.mark.parametrize("direction", [[], ["--push"]], ids=["read", "push"])
def test_decode_is_told_no_token_of_the_prompt_but_the_last(start, direction: list[str]) -> None:
    prefill, decode = start("prefill", *direction), start("decode", *direction)
    for number in range(3):
        # Nobody but this test and the prefill process knows this prompt.
        prompt = random_prompt()
        ticket = computed(prefill, prompt, f"r{number}")
        assert sorted(ticket) == ["blocks", "last_token", "length", "request", "side_channel"]
        assert ticket["last_token"] == prompt[-1] and ticket["length"] == len(prompt) - 1
        assert len(ticket["blocks"]) == model.blocks_for(len(prompt) - 1)
        tokens = decoded(decode, ticket)
        options = Namespace(layers=LAYERS, seed=SEED, decode_tokens=DECODE_TOKENS, device="auto")
        assert tokens == single_process_run(options, prompt)
        assert prefill.receive("freed", PATIENCE_S)["freed"] == f"r{number}"
    decode.child.stdin.close()
    assert decode.receive("positions_computed", PATIENCE_S)["positions_computed"] == 3 * DECODE_TOKENS
    prefill.child.stdin.close()
    end = prefill.receive("free_blocks", PATIENCE_S)
    assert end["free_blocks"] == end["of"]
    assert [prefill.child.wait(PATIENCE_S), decode.child.wait(PATIENCE_S)] == [0, 0]


def test_blocks_land_under_other_numbers(start) -> None:
    prefill, decode = start("prefill"), start("decode")
    ticket = computed(prefill, random_prompt())
    decode.send(ticket=ticket, tokens=DECODE_TOKENS)
    landed = decode.receive("tokens", PATIENCE_S)["blocks"]
    assert len(landed) == len(ticket["blocks"])
    assert not set(landed) & set(ticket["blocks"])
    assert sorted(ticket["blocks"]) != ticket["blocks"], "scattered, not in one piece"


def test_prefill_keeps_the_blocks_until_they_have_been_fetched(start) -> None:
    prefill, decode = start("prefill"), start("decode")
    tickets = [computed(prefill, random_prompt(), f"r{number}") for number in range(2)]
    assert not set(tickets[0]["blocks"]) & set(tickets[1]["blocks"])
    for number in (1, 0):
        decoded(decode, tickets[number])
        assert prefill.receive("freed", PATIENCE_S)["freed"] == f"r{number}"


def test_a_prefill_killed_before_the_handshake(start) -> None:
    prefill, decode = start("prefill"), start("decode")
    ticket = computed(prefill, random_prompt())
    prefill.child.kill()
    prefill.child.wait()
    decode.send(ticket=ticket, tokens=DECODE_TOKENS)
    assert "the prefill process does not answer at 127.0.0.1:" in error_of(decode)


def test_a_prefill_killed_between_requests(start) -> None:
    prefill, decode = start("prefill"), start("decode")
    serve_one(prefill, decode)
    prefill.child.kill()
    assert error_of(decode) == f"prefill-{prefill.child.pid} has gone: it has closed its side channel"


def stop(process: Process) -> None:
    """Stops it, and waits until that has happened."""
    process.child.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, process.child.pid, os.WSTOPPED | os.WNOWAIT)


@pytest.mark.parametrize("ending", ["killed", "only stopped"])
def test_a_prefill_that_ends_in_the_middle_of_a_transfer(monkeypatch, start, ending: str) -> None:
    # On one host decode would fetch the blocks by itself.
    monkeypatch.setenv("CORELANE_TRANSPORTS", "tcp")
    prefill, decode = start("prefill"), start("decode")
    serve_one(prefill, decode)
    ticket = computed(prefill, random_prompt(), "r1")
    # A stopped process serves nothing: the READ is in progress until the kill, or for ever.
    stop(prefill)
    decode.send(ticket=ticket, tokens=DECODE_TOKENS)
    time.sleep(0.3)
    assert decode.child.poll() is None
    if ending == "killed":
        prefill.child.kill()
    error = error_of(decode)
    assert error.startswith(f"the READ of r1 with prefill-{prefill.child.pid} ")
    if BACKEND == "CORELANE":
        assert "NIXL_ERR_REMOTE_DISCONNECT" in error


def test_a_writing_prefill_killed_while_decode_waits(start) -> None:
    prefill, decode = start("prefill", "--push"), start("decode", "--push")
    serve_one(prefill, decode)
    ticket = computed(prefill, random_prompt(), "r1")
    stop(prefill)
    decode.send(ticket=ticket, tokens=DECODE_TOKENS)
    time.sleep(0.3)
    prefill.child.kill()
    error = error_of(decode)
    assert f"prefill-{prefill.child.pid}" in error or "REMOTE_DISCONNECT" in error


def test_a_decode_killed_with_blocks_waiting_for_it(start) -> None:
    prefill, decode = start("prefill"), start("decode")
    serve_one(prefill, decode)
    computed(prefill, random_prompt(), "r1")
    decode.child.kill()
    assert error_of(prefill) == f"decode-{decode.child.pid} has gone before it has fetched r1"


# --- the whole program, disturbed


@pytest.fixture
def running() -> Iterator[subprocess.Popen]:
    """The program in the middle of an endless number of requests, in a process group of its own."""
    command = [*PROGRAM, "--backend", BACKEND, "--requests", "1000000", "--timeout", "20"]
    # A test run in the background of a shell ignores SIGINT, and so would the program then.
    program = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        while "request 3 of" not in (line := program.stdout.readline()):
            assert line, program.stderr.read()
        yield program
    finally:
        try:
            os.killpg(program.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        program.wait()


def children(program: subprocess.Popen) -> dict[str, int]:
    """The workers by their role."""
    found = {}
    # Not every kernel lists the children of a process, but each process names its parent.
    for process in Path("/proc").glob("[0-9]*"):
        pid = process.name
        try:
            parent = (process / "stat").read_text().rpartition(")")[2].split()[1]
            arguments = (process / "cmdline").read_text().split("\0")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(parent) == program.pid and "--role" in arguments:
            found[arguments[arguments.index("--role") + 1]] = int(pid)
    assert sorted(found) == ["decode", "prefill"]
    return found


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("victim", ["prefill", "decode"])
def test_the_program_ends_when_one_of_its_processes_is_killed(running: subprocess.Popen, victim: str) -> None:
    workers = children(running)
    os.kill(workers[victim], signal.SIGKILL)
    errors = running.communicate(timeout=3 * PATIENCE_S)[1]
    assert running.returncode == 1
    assert f"{victim}: killed by SIGKILL" in errors
    assert "Traceback" not in errors
    assert not any(is_running(pid) for pid in workers.values())


def test_an_interrupt_ends_all_processes(running: subprocess.Popen) -> None:
    workers = children(running)
    os.killpg(running.pid, signal.SIGINT)
    errors = running.communicate(timeout=3 * PATIENCE_S)[1]
    assert running.returncode == 1
    assert "interrupted" in errors and "Traceback" not in errors
    assert not any(is_running(pid) for pid in workers.values())


def test_the_processes_end_with_a_killed_router(running: subprocess.Popen) -> None:
    workers = children(running)
    running.kill()
    deadline = time.monotonic() + 2 * PATIENCE_S
    while any(is_running(pid) for pid in workers.values()):
        assert time.monotonic() < deadline
        time.sleep(0.05)


# --- the model


def test_a_model_in_torch_generates_what_one_in_numpy_does(monkeypatch) -> None:
    prompt = random_prompt()
    options = Namespace(layers=LAYERS, seed=SEED, decode_tokens=DECODE_TOKENS, device="cpu")
    expected = single_process_run(options, prompt)
    monkeypatch.setitem(sys.modules, "torch", pretended_torch.make())
    options.device = "gpu"
    assert single_process_run(options, prompt) == expected
    cache = model.PagedCache(1, range(2), 0, arrays.choose("auto", 3))
    assert (cache.arrays.kind, cache.arrays.device) == ("VRAM", 1)
    assert cache.descriptors()[:, 2].tolist() == [1, 1]
    cache.corrupt(0, 1)
    assert set(cache.memory.values.view("uint8")[0, 1].ravel()) == {0xFF}
    assert not cache.memory.values[0, 0].any()


@pytest.mark.parametrize("torch", [None, ModuleType("torch")], ids=["absent", "broken"])
def test_a_gpu_is_used_where_torch_sees_one(monkeypatch, torch) -> None:
    monkeypatch.setitem(sys.modules, "torch", torch)
    assert arrays.choose("auto").kind == "DRAM"
    with pytest.raises(Failure, match="--device gpu: torch cannot be used"):
        arrays.choose("gpu")
    blind = pretended_torch.make()
    blind.cuda.is_available = lambda: False
    monkeypatch.setitem(sys.modules, "torch", blind)
    assert arrays.choose("auto").kind == "DRAM"
    with pytest.raises(Failure, match="--device gpu: torch sees no GPU"):
        arrays.choose("gpu")



def test_a_cache_with_nothing_free_says_so() -> None:
    cache = model.PagedCache(1, range(2), 0)
    taken = cache.take(2)
    with pytest.raises(Failure, match="1 blocks are needed and 0 are free"):
        cache.take(1)
    cache.give_back(taken)
    assert sorted(cache.take(2)) == [0, 1]
