"""What the core needs and what it loads, seen from processes of their own; ``.ci/core`` sees it in a fresh environment."""

import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import lbpwht_jax
from lbpwht_jax.cli.commands import COMMANDS
from lbpwht_jax.cli.entry import NEEDED

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]
ROOMS = ("ops", "layers", "models", "adaptation", "weights", "cost", "data", "train", "runs", "bench", "cli")


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def own_requirements(extras):
    """Those of the working tree, which may be newer than the metadata of the installed package."""
    return PROJECT["project"]["dependencies"] + [text for extra in extras for text in EXTRAS.get(extra, ())]


def everything_they_need(requirements):
    """Normal names of all installed distributions that these bring, directly or not."""
    found, waiting = set(), [Requirement(text) for text in requirements]
    while waiting:
        requirement = waiting.pop()
        name, extras = normal(requirement.name), sorted(requirement.extras) or [""]
        if (name, *extras) in found:
            continue
        try:
            needs = own_requirements(extras) if name == "lbpwht-jax" else importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # optional on this platform
        found.add((name, *extras))
        parsed = map(Requirement, needs)
        waiting += [r for r in parsed if r.marker is None or any(r.marker.evaluate({"extra": extra}) for extra in extras)]
    return {name for name, *_ in found}


def modules_of(distributions):
    """Names by which only these distributions are imported."""
    by_module = importlib.metadata.packages_distributions()
    return {
        name
        for name, owners in by_module.items()
        if name.isidentifier() and set(map(normal, owners)) <= distributions and name not in sys.stdlib_module_names
    }


CORE = everything_they_need(PROJECT["project"]["dependencies"])
NOT_CORE = sorted(modules_of(everything_they_need([*EXTRAS["train"], *EXTRAS["test"]]) - CORE - {"lbpwht-jax"}))


def run(code, *arguments):
    """Runs code in a process that finds this working tree and nothing that only the extras bring."""
    block = f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.modules.update(dict.fromkeys({NOT_CORE!r}))\n"
    command = [sys.executable, "-c", block + code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_extras_bring_more_than_the_core():
    assert {"pydantic", "tyro", "grain", "matplotlib", "PIL", "tensorflow_datasets", "sklearn", "pytest"} <= set(NOT_CORE)
    assert not {"jax", "flax", "optax", "numpy", "safetensors"} & set(NOT_CORE)


@pytest.mark.heavy
def test_the_core_alone_trains():
    done = run(f"import runpy; runpy.run_path({str(ROOT / 'tests' / 'core_alone.py')!r}, run_name='__main__')")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], [], ["nonsense"], *([name] for name in COMMANDS)])
def test_the_command_line_without_its_packages_says_how_to_get_them(arguments):
    done = run("from lbpwht_jax.cli import main; sys.exit(main())", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert "pip install 'lbpwht_jax[train]', or in a clone pip install -e '.[train]'" in line


def test_the_packages_that_the_command_line_looks_for_are_those_of_the_extra():
    wanted = {normal(Requirement(text).name) for text in EXTRAS["train"]}
    by_module = importlib.metadata.packages_distributions()
    assert {normal(owner) for module in NEEDED for owner in by_module[module]} >= wanted
    assert all({normal(owner) for owner in by_module[module]} & wanted for module in NEEDED)
    contract = next(c for c in PROJECT["tool"]["importlinter"]["contracts"] if "extra train" in c["name"])
    assert sorted(contract["forbidden_modules"]) == sorted(NEEDED)


def loaded(code):
    """Top-level modules in a process that ran some code."""
    tail = "; import json, sys; print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    path = f"import sys; sys.path.insert(0, {str(ROOT)!r}); "
    return set(json.loads(subprocess.check_output([sys.executable, "-c", path + code + tail], text=True)))


@pytest.mark.heavy
def test_importing_loads_little():
    core = loaded("import jax, jax.experimental.pallas.tpu, jax.experimental.pallas.triton, numpy")
    assert loaded("import lbpwht_jax.ops") - core - sys.stdlib_module_names == {"lbpwht_jax"}
    assert not loaded("import lbpwht_jax") & {"jax", "flax", "numpy", "optax", "safetensors"}
    names = "import lbpwht_jax; [getattr(lbpwht_jax, name) for name in lbpwht_jax.__all__]"
    expected = loaded("import jax, flax.linen, flax.nnx, numpy, optax, safetensors.numpy")
    assert loaded(names) - expected - sys.stdlib_module_names == {"lbpwht_jax"}


def test_the_root_loads_its_names_from_their_rooms():
    assert set(lbpwht_jax.__all__) <= set(dir(lbpwht_jax))
    for name in lbpwht_jax.__all__:
        assert getattr(lbpwht_jax, name) is not None
    with pytest.raises(AttributeError, match="module 'lbpwht_jax' has no attribute 'nothing'"):
        lbpwht_jax.nothing  # noqa: B018


def test_the_root_is_small():
    modules = [path for path in (ROOT / "lbpwht_jax").glob("*.py") if path.name != "__init__.py"]
    assert len(modules) <= 8
    assert all((ROOT / "lbpwht_jax" / room / "__init__.py").exists() for room in ROOMS)
