"""plugin/install.sh, on copies of the environment that runs these tests: the environment itself is never written to."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
INSTALLER = REPOSITORY / "plugin" / "install.sh"
PLUGIN_NAME = "libplugin_CORELANE.so"
LIMIT_S = 200


def find_plugin() -> Path:
    """The plugin that the other tests use too."""
    target = Path(os.environ.get("CARGO_TARGET_DIR", REPOSITORY / "target")).absolute()
    candidates = [
        os.environ.get("CORELANE_PLUGIN"),
        Path(os.environ["NIXL_PLUGIN_DIR"], PLUGIN_NAME) if "NIXL_PLUGIN_DIR" in os.environ else None,
        *nixl_packages().glob(f".nixl*.mesonpy.libs/plugins/{PLUGIN_NAME}"),
        target / "release" / PLUGIN_NAME,
    ]
    found = [Path(candidate) for candidate in candidates if candidate and Path(candidate).is_file()]
    assert found, f"{PLUGIN_NAME} is not built: cargo build --release"
    return found[0].resolve()


def nixl_packages() -> Path:
    """The directory of packages that has the NIXL of these tests."""
    return Path(importlib.metadata.distribution("nixl").locate_file(""))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Where a test keeps its things: under a path that every unquoted variable would split."""
    directory = tmp_path / "a place"
    directory.mkdir()
    return directory


@pytest.fixture
def plugin(place: Path) -> Path:
    """A plugin of the test's own, which it may move or delete."""
    return Path(shutil.copy(find_plugin(), place / "built.so"))


def make_venv(directory: Path) -> Path:
    """Makes an empty virtual environment; returns the directory of its packages."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", directory], check=True, timeout=LIMIT_S)
    where = {"base": str(directory), "platbase": str(directory)}
    return Path(sysconfig.get_path("purelib", vars=where))


@pytest.fixture
def environment(place: Path) -> Path:
    """A virtual environment with a copy of NIXL, without CORELANE; what NIXL needs is linked."""
    directory = place / "environment"
    packages = make_venv(directory)
    for entry in [*nixl_packages().iterdir(), *Path(sysconfig.get_path("purelib")).iterdir()]:
        target = packages / entry.name
        if target.exists():
            continue
        own = entry.name.startswith(".nixl") or entry.name.startswith("nixl") and entry.suffix != ".libs"
        if own and entry.is_dir():
            shutil.copytree(entry, target, ignore=shutil.ignore_patterns(PLUGIN_NAME, ".corelane*", "__pycache__"))
        elif entry.suffix != ".pth" and entry.name != "__pycache__":
            target.symlink_to(entry)
    return directory


@pytest.fixture
def plugins(environment: Path) -> Path:
    """Its directory of NIXL plugins."""
    (directory,) = environment.glob("lib/*/site-packages/.nixl*.mesonpy.libs/plugins")
    return directory


@pytest.fixture
def settings(place: Path) -> dict[str, str]:
    """Environment variables for the installer, with nothing of the user's that changes what it does."""
    dropped = {"NIXL_PLUGIN_DIR", "VIRTUAL_ENV", "CARGO_TARGET_DIR"}
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return {**kept, "XDG_DATA_HOME": str(place / "data"), "PYTHONDONTWRITEBYTECODE": "1"}


@pytest.fixture
def install(settings: dict[str, str]) -> Callable[..., subprocess.CompletedProcess]:
    """Runs the installer."""

    def install(
        *arguments: object, script: Path = INSTALLER, prefix: tuple[str, ...] = (), **more: str
    ) -> subprocess.CompletedProcess:
        command = [*prefix, str(script), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, env={**settings, **more})

    return install


def done(result: subprocess.CompletedProcess) -> subprocess.CompletedProcess:
    assert result.returncode == 0, result.stdout + result.stderr
    return result


def refused(result: subprocess.CompletedProcess, words: str) -> None:
    assert result.returncode == 2, result.stdout + result.stderr
    assert words in result.stderr


def contents(directory: Path) -> dict[str, object]:
    """Every path with what it is: nothing may differ after an undo."""
    found: dict[str, object] = {}
    for folder, folders, files in os.walk(directory):
        for name in folders + files:
            path = Path(folder, name)
            relative = str(path.relative_to(directory))
            if "__pycache__" in relative:
                continue
            mode = path.lstat().st_mode
            found[relative] = os.readlink(path) if stat.S_ISLNK(mode) else (mode, path.is_file() and path.read_bytes())
    return found


BACKENDS = """
import os
from nixl._api import nixl_agent, nixl_agent_config
agent = nixl_agent("test", nixl_agent_config(backends=[]))
agent.create_backend("CORELANE")
print("plugins:", *agent.get_plugin_list(), flush=True)
print("ucx:", len(agent.get_plugin_params("UCX")), flush=True)
os._exit(0)
"""


def assert_corelane_and_ucx(environment: Path, settings: dict[str, str], plugin_dir: str | None = None) -> None:
    """What a program of the user sees."""
    more = {"NIXL_PLUGIN_DIR": plugin_dir} if plugin_dir else {}
    command = [environment / "bin" / "python3", "-c", BACKENDS]
    result = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, env={**settings, **more})
    assert result.returncode == 0, result.stderr
    visible = re.search("^plugins: (.*)$", result.stdout, re.MULTILINE)[1].split()
    assert {"CORELANE", "UCX", "POSIX"} <= set(visible)
    assert int(re.search(r"^ucx: (\d+)$", result.stdout, re.MULTILINE)[1]) > 0


# --- in the environment


def test_a_link_makes_corelane_visible_beside_ucx_and_undo_removes_it(
    install, environment: Path, plugins: Path, plugin: Path, settings: dict[str, str]
) -> None:
    before = contents(environment)
    first = done(install("--python", environment, "--plugin", plugin))
    assert first.stdout == "" and "linked: " in first.stderr
    assert re.search(r"^  proof +CORELANE created, UCX loads, \d+ other plugins visible$", first.stderr, re.MULTILINE)
    assert os.readlink(plugins / PLUGIN_NAME) == str(plugin)
    assert_corelane_and_ucx(environment, settings)

    installed = contents(environment)
    again = done(install("--python", environment / "bin" / "python3", "--plugin", plugin))
    assert "was there already: " in again.stderr
    assert contents(environment) == installed

    undone = done(install("--python", environment, "--undo"))
    assert f"removed   {plugins / PLUGIN_NAME}" in undone.stderr
    assert contents(environment) == before
    done(install("--python", environment, "--undo"))
    assert contents(environment) == before


def test_a_copy_needs_the_built_plugin_no_more(
    install, environment: Path, plugins: Path, plugin: Path, settings: dict[str, str]
) -> None:
    before = contents(environment)
    done(install("--python", environment, "--plugin", plugin))
    assert "copied: " in done(install("--python", environment, "--plugin", plugin, "--copy")).stderr
    plugin.unlink()
    assert not (plugins / PLUGIN_NAME).is_symlink()
    assert_corelane_and_ucx(environment, settings)
    done(install("--python", environment, "--undo"))
    assert contents(environment) == before


def test_an_installed_plugin_is_replaced_by_another(install, environment: Path, plugins: Path, plugin: Path) -> None:
    done(install("--python", environment, "--plugin", plugin))
    other = Path(shutil.move(plugin, plugin.with_name("moved.so")))
    assert "which is not there" in install("--python", environment, "--check").stderr
    done(install("--python", environment, "--plugin", other))
    assert os.readlink(plugins / PLUGIN_NAME) == str(other)


@pytest.mark.parametrize("mode", [[], ["--copy"]], ids=["link", "copy"])
def test_what_others_have_put_there_stays(install, environment: Path, plugins: Path, plugin: Path, mode) -> None:
    (plugins / PLUGIN_NAME).write_bytes(b"of somebody else")
    before = contents(environment)
    refused(install("--python", environment, "--plugin", plugin, *mode), "was not made by this script")
    done(install("--python", environment, "--undo"))
    assert contents(environment) == before


@pytest.mark.parametrize("mode", [[], ["--copy"]], ids=["link", "copy"])
def test_what_others_have_changed_since_stays(install, environment: Path, plugins: Path, plugin: Path, mode) -> None:
    done(install("--python", environment, "--plugin", plugin, *mode))
    (plugins / PLUGIN_NAME).unlink()
    (plugins / PLUGIN_NAME).write_bytes(b"of somebody else")
    before = contents(environment)
    refused(install("--python", environment, "--undo"), "was changed after this script had made it")
    refused(install("--python", environment, "--plugin", plugin), "was changed after this script had made it")
    assert contents(environment) == before


def test_check_changes_nothing_and_says_what_is_there(install, environment: Path, plugins: Path, plugin: Path) -> None:
    before = contents(environment)
    absent = install("--python", environment, "--check")
    assert absent.returncode == 1
    assert f"not installed in {plugins}" in absent.stderr and "nixl-cu" in absent.stderr
    assert contents(environment) == before
    done(install("--python", environment, "--plugin", plugin))
    before = contents(environment)
    present = done(install("--python", environment, "--check"))
    assert f"a link to {plugin}" in present.stderr and "CORELANE created" in present.stderr
    assert contents(environment) == before


def test_the_active_environment_is_the_default(install, environment: Path, plugins: Path, plugin: Path) -> None:
    done(install("--plugin", plugin, VIRTUAL_ENV=str(environment)))
    assert (plugins / PLUGIN_NAME).is_symlink()
    path = f"{environment / 'bin'}:{os.environ['PATH']}"
    assert "was there already" in done(install("--plugin", plugin, PATH=path)).stderr


def test_a_setting_that_hides_the_installed_plugin_is_told(install, environment: Path, plugin: Path, place: Path) -> None:
    result = done(install("--python", environment, "--plugin", plugin, NIXL_PLUGIN_DIR=str(place)))
    assert f"NIXL_PLUGIN_DIR is set ({place})" in result.stderr


def test_beside_the_plugin_the_script_needs_no_repository(install, environment: Path, plugins: Path, place: Path) -> None:
    archive = place / "release"
    archive.mkdir()
    shutil.copy(find_plugin(), archive / PLUGIN_NAME)
    script = Path(shutil.copy(INSTALLER, archive))
    done(install("--python", environment, script=script))
    assert os.readlink(plugins / PLUGIN_NAME) == str(archive / PLUGIN_NAME)


# --- beside the environment


@pytest.mark.parametrize("mode", [[], ["--copy"]], ids=["link", "copy"])
def test_a_mirror_leaves_the_environment_alone_and_keeps_ucx(
    install, environment: Path, plugin: Path, place: Path, settings: dict[str, str], mode
) -> None:
    everything = contents(place)
    before = contents(environment)
    mirror = place / "new" / "mirror"
    result = done(install("--python", environment, "--plugin", plugin, "--mirror", mirror, *mode))
    # Nothing but the line to be evaluated is on stdout.
    name, _, value = result.stdout.removeprefix("export ").rstrip("\n").partition("=")
    assert (name, shlex.split(value)) == ("NIXL_PLUGIN_DIR", [str(mirror / "nixl" / "plugins")])
    assert contents(environment) == before
    assert_corelane_and_ucx(environment, settings, *shlex.split(value))

    made = contents(mirror)
    again = done(install("--python", environment, "--plugin", plugin, "--mirror", mirror, *mode))
    assert again.stdout == result.stdout and contents(mirror) == made
    assert "CORELANE created" in done(install("--python", environment, "--check", "--mirror", mirror)).stderr

    done(install("--undo", "--mirror", mirror))
    assert contents(place) == everything


def test_undoing_a_mirror_leaves_what_others_have_put_there(install, environment: Path, plugin: Path, place: Path) -> None:
    mirror = place / "mirror"
    mirror.mkdir()
    done(install("--python", environment, "--plugin", plugin, "--mirror", mirror))
    (mirror / "nixl" / "plugins" / "libplugin_MINE.so").write_bytes(b"mine")
    done(install("--undo", "--mirror", mirror))
    files = [path for path in mirror.rglob("*") if not path.is_dir()]
    assert files == [mirror / "nixl" / "plugins" / "libplugin_MINE.so"]


def test_a_directory_in_use_becomes_no_mirror(install, environment: Path, plugin: Path, place: Path) -> None:
    (place / "data.txt").write_bytes(b"mine")
    before = contents(place)
    arguments = ["--python", environment, "--plugin", plugin, "--mirror", place]
    refused(install(*arguments), "name an empty or new directory")
    refused(install("--undo", "--mirror", place), "is no mirror made by this script")
    assert contents(place) == before


def test_a_read_only_environment_gets_a_mirror_by_itself(
    install, environment: Path, plugin: Path, place: Path, settings: dict[str, str]
) -> None:
    everything = contents(place)
    if os.geteuid() == 0:
        if subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode != 0:
            pytest.skip("root writes anywhere, and may make no read-only mount here (a container, a chroot)")
        # Root may write to any directory that is not mounted read-only.
        remount = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && exec "$@"'
        prefix = ("unshare", "--mount", "sh", "-c", remount, str(environment))
    else:
        prefix = ()
        folders = [environment, *(path for path in environment.rglob("*") if path.is_dir() and not path.is_symlink())]
        for path in folders:
            path.chmod(0o555)
        everything = contents(place)
    result = done(install("--python", environment, "--plugin", plugin, prefix=prefix))
    (value,) = shlex.split(result.stdout.removeprefix("export NIXL_PLUGIN_DIR="))
    assert Path(value).is_relative_to(place / "data" / "corelane")
    assert_corelane_and_ucx(environment, settings, value)
    # The environment is asked, not its mirror: --undo finds the default one by itself.
    done(install("--python", environment, "--undo", prefix=prefix))
    assert contents(place) == everything
    if os.geteuid() != 0:
        for path in folders:
            path.chmod(0o755)


# --- what it finds or misses


def make_nixl(directory: Path, name: str, version: str | None) -> Path:
    """An environment with the outer shape of a NIXL wheel: its files are there, but it cannot be imported."""
    packages = make_venv(directory)
    return add_nixl(packages, name, version)


def add_nixl(packages: Path, name: str, version: str | None) -> Path:
    """Another such wheel among the packages of an environment."""
    module = name.replace("-", "_")
    plugins = packages / f".{module}.mesonpy.libs" / "plugins"
    plugins.mkdir(parents=True)
    (plugins / "libplugin_UCX.so").touch()
    if version:
        metadata = packages / f"{module}-{version}.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {name}\nVersion: {version}\n")
        (metadata / "RECORD").write_text(f".{module}.mesonpy.libs/plugins/libplugin_UCX.so,,\n")
    return plugins


@pytest.mark.parametrize("version", ["0.9.9", "0.10.1"])
def test_an_old_nixl_is_refused(install, place: Path, plugin: Path, version: str) -> None:
    plugins = make_nixl(place / "old", "nixl-cu12", version)
    refused(
        install("--python", place / "old", "--plugin", plugin),
        f"nixl-cu12 {version} of {place / 'old' / 'bin' / 'python3'} is too old: corelane needs NIXL 1.0.0 or newer",
    )
    assert sorted(path.name for path in plugins.iterdir()) == ["libplugin_UCX.so"]


@pytest.mark.parametrize(
    ("name", "version"), [("nixl-cu13", "1.0.0"), ("nixl-cu12", "1.10.0"), ("nixl_rocm", "2.0"), ("nixl-cu12", None)]
)
def test_a_nixl_that_does_not_run_is_found_by_its_files_and_fails_the_proof(
    install, place: Path, plugin: Path, name: str, version: str | None
) -> None:
    plugins = make_nixl(place / "broken", name, version)
    result = install("--python", place / "broken", "--plugin", plugin)
    assert result.returncode == 1
    assert "creating a backend CORELANE failed" in result.stderr and "ModuleNotFoundError" in result.stderr
    assert "NIXL itself cannot be imported" in result.stderr
    undo = shlex.split(re.search("'([^']+)' takes it away", result.stderr)[1])
    assert undo[1:] == ["--undo", "--python", str(place / "broken" / "bin" / "python3")]
    assert (plugins / PLUGIN_NAME).is_symlink()
    done(install("--python", place / "broken", "--undo"))
    assert sorted(path.name for path in plugins.iterdir()) == ["libplugin_UCX.so"]


def test_every_nixl_of_an_environment_that_is_new_enough_gets_the_plugin(install, place: Path, plugin: Path) -> None:
    first = make_nixl(place / "several", "nixl-cu12", "1.5.1")
    packages = first.parents[1]
    second, old = add_nixl(packages, "nixl-cu13", "1.0.0"), add_nixl(packages, "nixl", "0.8.0")
    result = install("--python", place / "several", "--plugin", plugin)
    assert "left alone, since older than 1.0.0: nixl 0.8.0" in result.stderr
    assert [(plugins / PLUGIN_NAME).is_symlink() for plugins in (first, second, old)] == [True, True, False]
    done(install("--python", place / "several", "--undo"))
    assert not any((plugins / PLUGIN_NAME).is_symlink() for plugins in (first, second, old))


def test_a_file_that_is_no_plugin_fails_the_proof(install, environment: Path, plugin: Path) -> None:
    plugin.write_bytes(b"no shared object")
    result = install("--python", environment, "--plugin", plugin)
    assert result.returncode == 1
    assert "creating a backend CORELANE failed" in result.stderr


def test_an_environment_without_nixl(install, place: Path, plugin: Path) -> None:
    make_venv(place / "empty")
    refused(install("--python", place / "empty", "--plugin", plugin), "pip install nixl")


def test_a_python_that_is_none(install, place: Path, plugin: Path) -> None:
    refused(install("--python", place / "nowhere", "--plugin", plugin), "is not there or cannot be run")
    refused(install("--python", "no-such-python", "--plugin", plugin), "there is no no-such-python on PATH")
    refused(install("--python", "/bin/false", "--plugin", plugin), "does not run as a Python")


def test_a_plugin_that_is_missing(install, environment: Path, place: Path) -> None:
    refused(install("--python", environment, "--plugin", place / "none.so"), f"there is no plugin {place}/none.so")
    refused(install("--python", environment, CARGO_TARGET_DIR=str(place)), f"{place}/release/{PLUGIN_NAME} is not built")
    refused(install("--python", environment, CARGO_TARGET_DIR=str(place)), f"'cargo build --release' in {REPOSITORY}")


def test_the_build_directory_of_cargo_is_the_default(install, environment: Path, plugins: Path, place: Path) -> None:
    built = place / "target" / "release" / PLUGIN_NAME
    built.parent.mkdir(parents=True)
    shutil.copy(find_plugin(), built)
    done(install("--python", environment, CARGO_TARGET_DIR=str(place / "target")))
    assert os.readlink(plugins / PLUGIN_NAME) == str(built)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--pyhton", "x"], "unknown option '--pyhton'"),
        (["x"], "unknown option 'x'"),
        (["--python"], "--python needs a value"),
        (["--mirror", "--copy"], "--mirror needs a value"),
        (["--plugin="], "--plugin needs a value"),
        (["--undo", "--check"], "exclude each other"),
        (["--undo", "--copy"], "are for installing"),
    ],
)
def test_mistyped_options_give_the_usage(install, arguments: list[str], complaint: str) -> None:
    result = install(*arguments)
    refused(result, complaint)
    assert "Usage: plugin/install.sh" in result.stderr and result.stdout == ""


def test_help_names_every_option(install) -> None:
    text = done(install("--help")).stdout
    for option in ("--python PATH", "--plugin FILE", "--copy", "--mirror DIR", "--check", "--undo"):
        assert f"  {option}" in text
