"""Test set-up: eight virtual CPU devices, Hypothesis without chance, and marks for tests that need an accelerator.

Tests run on the CPU wherever they are. To run those for an accelerator, name it:
`JAX_PLATFORMS=cuda python -m pytest -m gpu`, `JAX_PLATFORMS=tpu python -m pytest -m tpu`.
"""

import collections
import gc
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Generator
from pathlib import Path

import pytest

import tests.checked  # noqa: F401 -- in pyproject.toml by its name

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # for the programs that tests start
# Images of containers often turn bytecode off. Here it would be made again by each worker and each program.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

COMPILED = pytest.StashKey[str]()


def _only_starts_others(config: pytest.Config) -> bool:
    """With -n: the process that starts the workers, which wait for it and need none of what it would import."""
    return bool(config.getoption("numprocesses", None)) and not hasattr(config, "workerinput")


def pytest_configure(config: pytest.Config) -> None:
    # Begun in the background by a shell, a process ignores Ctrl-C, and so do its children, of which some are sent it.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if not _only_starts_others(config):
        _set_up(config)


def _set_up(config: pytest.Config) -> None:
    import hypothesis
    import jax

    jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])
    jax.config.update("jax_num_cpu_devices", 8)
    # The same examples in every run: a failure in CI is the same failure here. No deadline: the first example compiles.
    hypothesis.settings.register_profile("ci", derandomize=True, deadline=None, max_examples=25, database=None)
    hypothesis.settings.register_profile("search", deadline=None, max_examples=500)
    hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
    # Compiling takes most of the suite's time. On the CPU it is halved by leaving out LLVM's optimisations (XLA's own
    # stay); JAX_DISABLE_MOST_OPTIMIZATIONS=0 brings them back. Programs that tests start are compiled as users' are.
    if os.environ["JAX_PLATFORMS"] == "cpu" and "JAX_DISABLE_MOST_OPTIMIZATIONS" not in os.environ:
        jax.config.update("jax_disable_most_optimizations", True)
    # Tests compile the same programs again and again, in every run. They are kept in .pytest_cache;
    # `pytest --cache-clear` forgets them.
    if hasattr(config, "cache"):
        jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir("jax")))
        # The smallest too: what the other worker has compiled is read in a quarter of the time, and writing takes none.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    # Programs that tests start compile the same again and again too. Their folder is of this session and worker alone:
    # what a killed one has torn is never written again, and all that come later complain of it.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = config.stash[COMPILED] = tempfile.mkdtemp(prefix="sepjax_compiled_")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(config.stash.get(COMPILED, ""), ignore_errors=True)


# Files that take ten seconds and more, about the longest first: begun last, one would keep one worker busy while the
# others have nothing left. How long they take: `--durations=20` of a run from nothing.
FIRST = [
    "generation/test_slots.py",
    "hub/test_lora.py",
    "test_train.py",
    "test_meshes.py",
    "attention/test_tpu.py",
    "attention/test_op.py",
    "attention/test_examples.py",
    "test_docs.py",
    "training/test_step.py",
    "reliability/test_kill.py",
    "hub/test_folder.py",
    "test_generate.py",
    "hub/test_parity.py",
    "model/test_gate.py",
    "model/test_transformer.py",
    "cache/test_growing_pass.py",
    "cache/test_bounded_pass.py",
    "keeping/test_distill.py",
    "reliability/test_numbers.py",
    "reliability/test_torn.py",
    "generation/test_engine.py",
    "programs/test_generate.py",
    "cache/test_decode_kernel.py",
    "cache/test_run_kernel.py",
    "generation/test_stream.py",
    "cache/test_bounded.py",
    "attention/test_tpu_compile.py",
    "attention/test_decode.py",
    "attention/test_mosaic_gpu_interpret.py",
    "serve/test_page.py",
    "serve/test_operations.py",
    "serve/test_conversations.py",
    "serve/test_fronts.py",
    "serve/test_answers.py",
    "evaluation/test_tasks.py",
    "evaluation/test_compare.py",
    "hub/test_post_training.py",
    "data/test_pipeline.py",
    "reliability/test_fuzz.py",
    "programs/test_terminal.py",
    "attention/test_context_parallel.py",
    "attention/test_mosaic_gpu_compile.py",
    "keeping/test_table.py",
    "keeping/test_layers.py",
    "test_wheel.py",
]


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Every second worker imports the tests from the last one: each finds the bytecode of half of them written."""
    report = yield
    if os.environ.get("PYTEST_XDIST_WORKER", "gw0")[-1] in "13579" and isinstance(collector, pytest.Directory):
        report.result.reverse()
    return report


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import jax

    places = {name: place for place, name in enumerate(FIRST)}

    def place(item: pytest.Item) -> tuple[int, str]:
        path = item.path.as_posix()
        return next((places[x] for x in FIRST if path.endswith(x)), len(FIRST)), path

    items.sort(key=place)
    platform = jax.default_backend()
    for item in items:
        for mark in ("gpu", "tpu"):
            if item.get_closest_marker(mark) and platform != mark:
                item.add_marker(pytest.mark.skip(reason=f"needs a {mark.upper()}, runs on {platform}; see conftest.py"))


def pytest_collection_finish() -> None:
    # Tracing makes and drops objects by the million, and each full collection walks over all modules and tests besides.
    # What is there now stays; looking through the rest less often saves a twentieth of the suite's time.
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@pytest.fixture(scope="session", autouse=True)
def patient_logs() -> None:
    """No lines of progress on stderr, however slow the machine is; tests of them set their own patience."""
    from sepjax import progress  # not before modules are imported with their checks

    progress.LOG_PATIENCE = float("inf")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Where `--durations` tells the slowest tests, the slowest files too: a hundred quick tests are one of them."""
    if terminalreporter.config.option.durations is None:
        return
    seconds: collections.Counter[str] = collections.Counter()
    for report in (x for reports in terminalreporter.stats.values() for x in reports):
        if isinstance(report, pytest.TestReport):
            seconds[report.nodeid.partition("::")[0]] += report.duration
    terminalreporter.section(f"slowest 20 files of {len(seconds)}, {sum(seconds.values()):.0f}s of tests in all")
    for file, spent in seconds.most_common(20):
        terminalreporter.write_line(f"{spent:6.1f}s {file}")


_MAPS, _LIMIT, _MOST = Path("/proc/self/maps"), 65_000, 40_000
_MADE = 4_500  # mappings that a test makes at most
_unseen = [0]  # how many tests may end before they are counted again


def pytest_runtest_teardown() -> None:
    """Compiled programs are mappings of memory, of which Linux gives a process 65,530; beyond, XLA crashes.

    What is forgotten is traced and compiled again by whichever test comes next, so not before it must be.
    """
    _unseen[0] -= 1
    if _unseen[0] > 0:
        return
    if _mappings() > _MOST:
        import jax

        gc.collect()
        if _mappings() > _MOST:
            jax.clear_caches()
            gc.collect()
    _unseen[0] = (_LIMIT - _mappings()) // _MADE


def _mappings() -> int:
    return _MAPS.read_bytes().count(b"\n") if _MAPS.exists() else 0
