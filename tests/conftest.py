"""Settings of every test run: eight CPU devices, strict dtype and rank promotion, warnings as errors.

Tests spend most of their time compiling programs that run once. So XLA leaves out LLVM's optimisations and emits code in the
ways that compile fastest, unless XLA_FLAGS says otherwise: ``XLA_FLAGS=--xla_backend_optimization_level=3 pytest tests/ops``.
In the rooms of whole runs, what took longer to compile is kept while the process lives: a run, and the run that goes on from
it, compile the same program. Elsewhere a program is seldom met again, and writing it would take longer than it saves.
"""

import gc
import math
import os
import tempfile
import zlib

import hypothesis
import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

DEVICES = 8

OPTIMISATION = "--xla_backend_optimization_level"
COMPILES_FAST = f"{OPTIMISATION}=0 --xla_cpu_parallel_codegen_split_count=1"
if jax.__version_info__ < (0, 11):  # later versions do not know the flag
    COMPILES_FAST += " --xla_cpu_use_fusion_emitters=false"
if OPTIMISATION not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {COMPILES_FAST}"
gc.set_threshold(100_000, 20, 100)  # an eighth of the time went to looking for cycles in what tracing leaves behind
PROGRAMS = tempfile.TemporaryDirectory(prefix="programs", ignore_cleanup_errors=True)

hypothesis.settings.register_profile("suite", deadline=None, derandomize=True)
# five times as many cases, others each time: --hypothesis-profile=hostile, with --hypothesis-seed to see them again
hypothesis.settings.register_profile("hostile", deadline=None, max_examples=500, print_blob=True, database=None)
hypothesis.settings.load_profile("suite")

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", DEVICES)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", PROGRAMS.name)

ROOMS_OF_RUNS = ("cli", "train")


@pytest.fixture(scope="module", autouse=True)
def _kept_programs(request):
    """Keeps what took 0.2 s to compile where it is met again."""
    seconds = 0.2 if request.path.parent.name in ROOMS_OF_RUNS else math.inf
    jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)


# Files that take longest, in the order in which workers should take them: with the short ones last, no worker waits long for
# another at the end.
LONGEST = (
    "test_finetune",
    "test_accelerator",
    "test_notebooks",
    "test_residuals",
    "test_transfer",
    "test_processes",
    "test_efficientformer",
    "test_freeze",
    "test_damage",
    "test_adapt",
    "test_docs",
    "test_report",
    "test_checkpoint",
    "test_swin_v2",
    "test_create",
    "test_lora",
)


def pytest_addoption(parser):
    parser.addoption("--one-in", type=int, default=1, metavar="N", help="run one test in N, drawn by their names")


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "error")
    # JAX 0.11 and later warn so of every kernel for GPUs that is lowered
    config.addinivalue_line("filterwarnings", "ignore:The Pallas Triton backend is deprecated:DeprecationWarning")


def pytest_collection_modifyitems(config, items):
    """Leaves out what ``--one-in`` does not draw, and puts the longest files first.

    pytest-xdist hands files out in this order (``--no-loadscope-reorder``).
    """
    drawn = {True: [], False: []}
    for item in items:
        drawn[zlib.crc32(item.nodeid.encode()) % config.getoption("--one-in") == 0].append(item)
    config.hook.pytest_deselected(items=drawn[False])
    items[:] = drawn[True]
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


@pytest.fixture
def absent_gpu():
    """A GPU to lower kernels for: JAX 0.11 and later must be told which, where none is there."""
    device = AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        yield


@pytest.fixture(scope="session", autouse=True)
def _devices():
    if jax.device_count() != DEVICES:
        pytest.exit(f"the tests need {DEVICES} CPU devices, found {jax.device_count()}", returncode=3)
