"""Options: defaults that are right without any, parameters, environment variables, and refusals that say why."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from harness.peers import Peer, take_notifications
from harness.remote import TESTS_DIRECTORY
from harness.sides import BACKEND, Side, assert_bytes

PAGE = 4096
OPTIONS = {
    "lanes",
    "spin_us",
    "assist",
    "transports",
    "strict_writes",
    "ptracer",
    "rdma_devices",
    "rdma_gid_index",
    "rdma_service_level",
    "rdma_traffic_class",
    "rdma_timeout",
    "rdma_retry_count",
    "rdma_bulk_queue_pairs",
    "rdma_stripe_bytes",
    "rdma_relaxed_ordering",
    "rdma_on_demand_paging",
    "gpu_multiprocessors",
    "gpu_copy_engine_bytes",
    "gpu_staging_bytes",
    "gpu_rdma",
    "listen",
    "interface",
    "port_range",
    "advertise",
    "streams",
    "chunk_bytes",
    "latency_bytes",
    "inline_bytes",
    "inline_copy_bytes",
    "liveness_ms",
    "operation_timeout_ms",
    "connect_timeout_ms",
    "reconnect_ms",
    "linger_ms",
    "deregister_timeout_ms",
    "stream_idle_ms",
    "log_level",
}


def works(side: Side, peer: Peer) -> None:
    """A read with a notification."""
    side.agent.add_remote_agent(peer.metadata)
    side.run("READ", [(0, PAGE)], peer.base, [(0, PAGE)], peer.name, b"works")
    assert_bytes(side.buffer[:PAGE], peer.original()[:PAGE])
    assert peer.call(take_notifications, 1) == [(side.name, b"works")]


def create(parameters: dict[str, str], **environment: str) -> subprocess.CompletedProcess:
    """Creates a backend in a process of its own; standard error is what the user reads."""
    program = f"""
from nixl._api import nixl_agent, nixl_agent_config
agent = nixl_agent("options", nixl_agent_config(backends=[]))
agent.create_backend({BACKEND!r}, {parameters!r})
"""
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=TESTS_DIRECTORY,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.versions
def test_every_option_is_listed_with_its_default(make_side):
    side = make_side()
    listed = side.agent.get_plugin_params(BACKEND)
    assert OPTIONS <= set(listed)
    assert listed["lanes"] == "auto"
    assert listed["transports"] == "local,rdma,tcp"
    assert (listed["strict_writes"], listed["ptracer"]) == ("false", "unchanged")


def test_the_listed_defaults_are_values_that_are_taken(make_side, make_peer):
    defaults = make_side().agent.get_plugin_params(BACKEND)
    works(make_side("explicit", PAGE, options=defaults), make_peer("remote", PAGE, seed=1))


@pytest.mark.versions
def test_nothing_given_is_right(make_side, make_any_peer):
    works(make_side("local", PAGE), make_any_peer("remote", PAGE, seed=2))
    works(make_side("local", PAGE, options={}), make_any_peer("remote", PAGE, seed=2, options={}))


@pytest.mark.parametrize(
    "options",
    [
        {"lanes": "unpinned"},
        {"lanes": "unpinned:2"},
        {"lanes": "auto:1", "spin_us": "0"},
        {"assist": "never"},
        {"assist": "always", "spin_us": "1000"},
        {"transports": "tcp"},
        {"transports": "local"},
        {"transports": "local,tcp", "strict_writes": "true"},
        {"transports": "local", "ptracer": "any"},
        {"listen": "127.0.0.1"},
        {"interface": "lo"},
        {"streams": "2", "chunk_bytes": "64K", "latency_bytes": "4K", "inline_bytes": "0"},
        {"reconnect_ms": "100", "stream_idle_ms": "100", "connect_timeout_ms": "5000", "deregister_timeout_ms": "5000"},
        {"liveness_ms": "500", "operation_timeout_ms": "20000", "linger_ms": "100", "log_level": "debug"},
    ],
    ids=lambda options: ",".join(options),
)
def test_parameters_are_taken(make_side, make_peer, options):
    works(make_side("local", PAGE, options=options), make_peer("remote", PAGE, seed=3, options=options))


def test_environment_variables_are_taken(make_process, unique):
    """A listener in the port range that the environment names is what shows it."""
    first = 21_000 + os.getpid() % 1_900 * 4
    environment = {"CORELANE_PORT_RANGE": f"{first}-{first + 3}", "CORELANE_LISTEN": "127.0.0.1"}
    process = make_process(environment)
    Peer(process).open(unique("listening"))
    assert any(address == "127.0.0.1" and first <= port <= first + 3 for address, port in process.call(listening))


def test_a_parameter_wins_over_the_environment(make_process, unique):
    first = 13_000 + os.getpid() % 1_900 * 4
    process = make_process({"CORELANE_PORT_RANGE": "1-2", "CORELANE_LISTEN": "127.0.0.1", "CORELANE_LANES": "rubbish"})
    Peer(process).open(unique("listening"), options={"port_range": f"{first}-{first + 3}", "lanes": "unpinned"})
    assert any(first <= port <= first + 3 for _, port in process.call(listening))


def test_an_empty_parameter_leaves_it_to_the_environment(make_process, unique):
    process = make_process({"CORELANE_LISTEN": "127.0.0.1"})
    Peer(process).open(unique("listening"), options={"listen": "", "lanes": ""})
    assert {address for address, _ in process.call(listening)} == {"127.0.0.1"}


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("lanes", "many"),
        ("lanes", "auto:0"),
        ("lanes", "99999"),
        ("spin_us", "-1"),
        ("assist", "perhaps"),
        ("transports", "tcp,pigeon"),
        ("strict_writes", "maybe"),
        ("ptracer", "everyone"),
        ("listen", "not an address"),
        ("interface", "nonesuch0"),
        ("port_range", "9-8"),
        ("port_range", "70000"),
        ("advertise", "nowhere"),
        ("chunk_bytes", "1X"),
        ("liveness_ms", "soon"),
        ("log_level", "loud"),
    ],
)
def test_a_malformed_value_is_refused_with_its_reason(option, value):
    for result in (create({option: value}), create({}, **{f"CORELANE_{option.upper()}": value})):
        assert result.returncode == 1, result.stderr
        assert "NIXL_ERR_" in result.stderr
        told = [line for line in result.stderr.splitlines() if "corelane" in line and "WARN" in line]
        assert len(told) == 1 and (option in told[0].lower() or value in told[0]), result.stderr


@pytest.mark.versions
def test_an_unknown_option_is_refused_with_the_list_of_all():
    result = create({"lains": "auto"})
    assert result.returncode == 1, result.stderr
    ours = [line for line in result.stderr.splitlines() if "corelane" in line and "lains" in line]
    assert ours, result.stderr
    assert all(option in "".join(ours) for option in OPTIONS)


def test_an_agent_survives_a_refused_backend(make_peer):
    """The reason is logged; with good options the same agent works."""
    from nixl._api import nixl_agent, nixl_agent_config

    agent = nixl_agent("refused", nixl_agent_config(backends=[]))
    for _ in range(10):
        with pytest.raises(Exception, match="NIXL_ERR_"):
            agent.create_backend(BACKEND, {"lanes": "many"})
    agent.create_backend(BACKEND, {"lanes": "unpinned"})
    peer = make_peer("remote", PAGE)
    agent.add_remote_agent(peer.metadata)
    agent.send_notif(peer.name, b"works")
    assert peer.call(take_notifications, 1) == [("refused", b"works")]


@pytest.mark.versions
def test_the_start_is_told_in_one_line():
    result = create({})
    assert result.returncode == 0, result.stderr
    told = [line for line in result.stderr.splitlines() if "corelane" in line and "lanes=" in line and "tcp" in line.lower()]
    assert len(told) == 1, result.stderr


def test_silence_can_be_asked_for():
    result = create({"log_level": "off"})
    assert result.returncode == 0, result.stderr
    assert "corelane" not in result.stderr


# --- what runs in other processes


def listening(state) -> list[tuple[str, int]]:
    """The IPv4 addresses and ports that this process listens on."""
    ours = set()
    for number in os.listdir("/proc/self/fd"):
        try:
            ours.add(os.readlink(f"/proc/self/fd/{number}"))
        except OSError:
            continue
    found = []
    with open("/proc/net/tcp", encoding="ascii") as table:
        for line in list(table)[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in ours:
                address, port = fields[1].split(":")
                found.append((".".join(str(byte) for byte in reversed(bytes.fromhex(address))), int(port, 16)))
    return found
