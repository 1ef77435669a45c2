"""Tensors on GPUs through `nixl._api`, as vLLM registers its KV cache. Skipped where there is no torch, or no GPU."""

from __future__ import annotations

import pytest

from harness.remote import Remote
from harness.sides import BACKEND
from harness.waiting import wait_until

torch = pytest.importorskip("torch", reason="torch is not installed")
# Something else may have put a module of that name in place.
if not hasattr(torch, "cuda") or not torch.cuda.is_available():
    pytest.skip("no GPU: tensors stay in host memory", allow_module_level=True)

GPUS = torch.cuda.device_count()
WORDS = 4 << 20
"""Of 8 bytes."""

BLOCK = 2048
"""Words of a block."""


def open_agent(state, name: str, gpu: int, first: int) -> tuple[bytes, int]:
    """An agent with one registered tensor that counts from `first` on."""
    from nixl._api import nixl_agent, nixl_agent_config

    torch.cuda.set_device(gpu)
    state.tensor = torch.arange(first, first + WORDS, dtype=torch.int64, device=f"cuda:{gpu}")
    torch.cuda.synchronize()
    state.agent = nixl_agent(name, nixl_agent_config(backends=[BACKEND]))
    state.agent.register_memory(state.tensor)
    return state.agent.get_agent_metadata(), state.tensor.data_ptr()


def sum_at_notification(state, blocks: list[int]) -> list[int]:
    """Waits for a notification and launches a kernel for each block at once: what they saw."""
    wait_until(lambda: bool(state.agent.get_new_notifs()), "a notification")
    sums = [state.tensor[at : at + BLOCK].sum() for at in blocks]
    return [int(one) for one in sums]


def sum_of(first: int) -> int:
    return sum(range(first, first + BLOCK))


def descriptors(agent, base: int, gpu: int, blocks: list[int]):
    return agent.get_xfer_descs([(base + at * 8, BLOCK * 8, gpu) for at in blocks], "VRAM")


@pytest.fixture
def near(unique):
    import types

    state = types.SimpleNamespace()
    state.name = unique("decode")
    _, state.base = open_agent(state, state.name, 0, 0)
    return state


def run(agent, handle) -> None:
    state = agent.transfer(handle)
    assert state in ("DONE", "PROC")
    wait_until(lambda: agent.check_xfer_state(handle) == "DONE", "the end of a transfer")


@pytest.mark.parametrize("gpu", range(min(GPUS, 2)))
def test_scattered_blocks_are_read_into_their_places(near, unique, make_process, gpu):
    peer: Remote = make_process()
    metadata, base = peer.call(open_agent, unique("prefill"), gpu, 1 << 40)
    name = near.agent.add_remote_agent(metadata)
    own = [at * 2 * BLOCK for at in range(1000)]
    far = [(999 - at) * 2 * BLOCK + BLOCK for at in range(1000)]
    handle = near.agent.initialize_xfer(
        "READ", descriptors(near.agent, near.base, 0, own), descriptors(near.agent, base, gpu, far), name, b""
    )
    for _ in range(3):
        near.tensor.copy_(torch.arange(WORDS, dtype=torch.int64))
        torch.cuda.synchronize()
        expected = near.tensor.clone()
        for here, there in zip(own, far):
            expected[here : here + BLOCK] = torch.arange(
                (1 << 40) + there, (1 << 40) + there + BLOCK, dtype=torch.int64, device="cuda:0"
            )
        run(near.agent, handle)
        assert torch.equal(near.tensor, expected)
    near.agent.release_xfer_handle(handle)


@pytest.mark.parametrize("gpu", range(min(GPUS, 2)))
def test_a_kernel_that_is_launched_at_the_notification_sees_the_data(near, unique, make_process, gpu):
    peer: Remote = make_process()
    metadata, base = peer.call(open_agent, unique("decode"), gpu, 1 << 40)
    name = near.agent.add_remote_agent(metadata)
    blocks = [at * 3 * BLOCK for at in range(500)]
    for round_ in range(20):
        near.tensor.copy_(torch.arange(round_ * WORDS, (round_ + 1) * WORDS, dtype=torch.int64))
        torch.cuda.synchronize()
        handle = near.agent.initialize_xfer(
            "WRITE",
            descriptors(near.agent, near.base, 0, blocks),
            descriptors(near.agent, base, gpu, blocks),
            name,
            b"written",
        )
        peer.begin(sum_at_notification, blocks)
        run(near.agent, handle)
        assert peer.finish() == [sum_of(round_ * WORDS + at) for at in blocks]
        near.agent.release_xfer_handle(handle)


def test_memory_of_the_other_kind_is_refused(near):
    host = torch.zeros(4096, dtype=torch.uint8)
    for descriptor, kind in [((host.data_ptr(), 4096, 0, ""), "VRAM"), ((near.base, 4096, 0, ""), "DRAM")]:
        with pytest.raises(Exception):
            near.agent.register_memory([descriptor], kind, backends=[BACKEND])


def end_of(agent, handle) -> str:
    """How a transfer ends."""
    try:
        state = agent.transfer(handle)
        while state == "PROC":
            state = agent.check_xfer_state(handle)
    except Exception as error:
        return type(error).__name__
    return state


def exchange(near, peer: Remote, unique, gpu: int) -> None:
    """A READ and a WRITE of all that the tensors have but a block."""
    metadata, base = peer.call(open_agent, unique("prefill"), gpu, 1 << 40)
    name = near.agent.add_remote_agent(metadata)
    words = WORDS - BLOCK

    def whole(base: int, gpu: int, at: int):
        return near.agent.get_xfer_descs([(base + at * 8, words * 8, gpu)], "VRAM")

    handle = near.agent.initialize_xfer("READ", whole(near.base, 0, BLOCK), whole(base, gpu, 0), name, b"")
    assert end_of(near.agent, handle) == "DONE"
    expected = torch.arange(1 << 40, (1 << 40) + words, dtype=torch.int64, device="cuda:0")
    assert torch.equal(near.tensor[BLOCK:], expected)
    assert torch.equal(near.tensor[:BLOCK], torch.arange(BLOCK, dtype=torch.int64, device="cuda:0"))
    handle = near.agent.initialize_xfer("WRITE", whole(near.base, 0, 0), whole(base, gpu, 0), name, b"written")
    peer.begin(sum_at_notification, [0, BLOCK, words - BLOCK])
    run(near.agent, handle)
    assert peer.finish() == [sum_of(0), sum_of(1 << 40), sum_of((1 << 40) + words - 2 * BLOCK)]


def test_memory_that_cannot_be_exported_goes_through_host_memory(near, unique, make_process):
    exchange(near, make_process({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}), unique, 0)


def test_gpu_memory_goes_over_tcp(near, unique, make_process):
    exchange(near, make_process({"CORELANE_TRANSPORTS": "tcp"}), unique, GPUS - 1)


@pytest.mark.skipif(GPUS < 2, reason=f"needs two GPUs, and there are {GPUS}")
def test_a_gpu_that_only_the_peer_sees_is_reached(near, unique, make_process):
    # It is GPU 0 there, and not visible in a process that sees the first one only; this one sees both.
    peer: Remote = make_process({"CUDA_VISIBLE_DEVICES": "1"})
    metadata, base = peer.call(open_agent, unique("prefill"), 0, 1 << 40)
    name = near.agent.add_remote_agent(metadata)
    handle = near.agent.initialize_xfer(
        "READ", descriptors(near.agent, near.base, 0, [0]), descriptors(near.agent, base, 0, [BLOCK]), name, b""
    )
    assert end_of(near.agent, handle) == "DONE"
    assert int(near.tensor[0]) == (1 << 40) + BLOCK


def read_from_another(state, metadata: bytes, base: int) -> tuple[str, int]:
    name = state.agent.add_remote_agent(metadata)
    own = descriptors(state.agent, state.tensor.data_ptr(), 0, [0])
    handle = state.agent.initialize_xfer("READ", own, descriptors(state.agent, base, 0, [BLOCK]), name, b"")
    return end_of(state.agent, handle), int(state.tensor[0])


@pytest.mark.skipif(GPUS < 2, reason=f"needs two GPUs, and there are {GPUS}")
def test_processes_that_see_one_gpu_each_reach_each_other(unique, make_process):
    prefill: Remote = make_process({"CUDA_VISIBLE_DEVICES": "1"})
    decode: Remote = make_process({"CUDA_VISIBLE_DEVICES": "0"})
    metadata, base = prefill.call(open_agent, unique("prefill"), 0, 1 << 40)
    decode.call(open_agent, unique("decode"), 0, 0)
    assert decode.call(read_from_another, metadata, base) == ("DONE", (1 << 40) + BLOCK)
