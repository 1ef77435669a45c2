"""With a NIXL of another plugin ABI nothing crashes: the plugin says why it does not load, and UCX still works."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from harness.remote import TESTS_DIRECTORY

pytestmark = pytest.mark.too_old


def run(program: str) -> subprocess.CompletedProcess:
    """In a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=TESTS_DIRECTORY,
        env=dict(os.environ),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_plugin_refuses_and_says_why():
    result = run(
        """
import os
from nixl._api import nixl_agent, nixl_agent_config
agent = nixl_agent("old", nixl_agent_config(backends=[]))
try:
    agent.create_backend("CORELANE", {})
except Exception as error:
    print("refused:", type(error).__name__, flush=True)
    os._exit(0)
os._exit(1)
"""
    )
    assert result.returncode == 0, result.stderr
    assert "refused: nixl" in result.stdout
    ours = [line for line in result.stderr.splitlines() if "corelane" in line]
    assert len(ours) >= 1, result.stderr
    assert "1.0.0" in ours[0] and "NIXL" in ours[0], ours


def test_other_backends_are_not_harmed():
    result = run(
        """
import os
from nixl._api import nixl_agent, nixl_agent_config
agent = nixl_agent("old", nixl_agent_config(backends=["UCX"]))
agent.send_notif("old", b"hello")
found = False
while not found:
    found = agent.check_remote_xfer_done("old", b"hello")
os._exit(0)
"""
    )
    assert result.returncode == 0, result.stderr
