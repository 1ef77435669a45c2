"""docs/nixl.md: its tables say what the plugin says, and its Python runs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
GUIDE = (REPOSITORY / "docs" / "nixl.md").read_text()
LIMIT_S = 120

ASK_FOR_OPTIONS = """
import json, os
from nixl._api import nixl_agent, nixl_agent_config
agent = nixl_agent("options", nixl_agent_config(backends=[]))
print("OPTIONS", json.dumps(agent.get_plugin_params("CORELANE")), flush=True)
os._exit(0)
"""


def section(title: str) -> str:
    return re.split(r"^## ", GUIDE.partition(f"\n## {title}\n")[2], flags=re.MULTILINE)[0]


def rows(text: str) -> list[list[str]]:
    """The cells of a table, without its head."""
    table = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in table[2:]]


def run_python(program: str) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("CORELANE_")}
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_the_table_of_options_is_the_plugins() -> None:
    output = run_python(ASK_FOR_OPTIONS)
    options = json.loads(re.search("^OPTIONS (.*)$", output, re.MULTILINE)[1])
    documented = {name.strip("`"): default.strip("`") for name, _, default, _ in rows(section("Options"))}
    assert documented == options


def test_the_environment_variables_are_named_after_the_options() -> None:
    for name, variable, _, meaning in rows(section("Options")):
        assert variable == f"`CORELANE_{name.strip('`').upper()}`"
        assert meaning


def test_the_python_program_runs() -> None:
    programs = re.findall(r"^```python\n(.*?)^```$", section("Python"), re.MULTILINE | re.DOTALL)
    assert len(programs) == 2
    assert "{'decode': [b'request-1:1']}" in run_python(programs[0])
    assert "operation_timeout_ms" in run_python("from nixl._api import *\n" + programs[1])


def test_every_option_of_the_installer_is_explained() -> None:
    command = [REPOSITORY / "plugin" / "install.sh", "--help"]
    usage = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=True).stdout
    options = re.findall(r"^  (--[a-z]+)", usage, re.MULTILINE)
    assert len(options) >= 6
    explained = {re.match("`(--[a-z]+)", cells[0])[1] for cells in rows(section("Build and install"))}
    assert explained == set(options)


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", GUIDE):
        assert (REPOSITORY / "docs" / target).exists(), target
