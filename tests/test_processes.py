"""What becomes of the extension at the end of an interpreter, in several of them, in forked children, and in a CPython
without the GIL. Each in a process of its own; what several threads may do is for `make tsan`."""

from __future__ import annotations

import importlib.util
import itertools
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

COMMON = """
import builtins, gc, os, sys, threading
from tests.plain_case import make_plain_case
import bottleneck_ext

case = make_plain_case()
processor = case.processor()
bound = case.bind(processor, num_threads=3)
expected = make_plain_case()
expected.rewrite(expected.bind(expected.processor()))
case.rewrite(bound)
assert case.bytes() == expected.bytes()
"""


def run(script: str, *arguments: str, common: str = COMMON) -> str:
    """Its output, of a process that ended well and had nothing to complain about."""
    result = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-W", "error", "-c", common + script, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )
    assert (result.returncode, result.stderr) == (0, ""), (result.returncode, result.stderr)
    return result.stdout


# ---- the end of an interpreter ---------------------------------------------------------------------------------------

ENDINGS = {
    "objects in globals, threads asleep": "",
    "a reference cycle": """
class Node: pass
node = Node()
node.self, node.bound, node.type = node, bound, type(bound.workspace)
del bound, processor
""",
    "kept beyond all modules": "builtins.kept = bound, bottleneck_ext.KVCache",
    "the module gone before its objects": """
for name in [name for name in sys.modules if name.startswith(("bottleneck", "tests"))]:
    del sys.modules[name]
del bottleneck_ext, make_plain_case
gc.collect()
""",
    "a rewrite while the interpreter exits": """
import atexit
def last():
    case.rewrite(bound)
    print("rewritten")
atexit.register(last)
""",
    "a rewrite while modules are taken apart": """
class Late:
    def __init__(self, case, bound): self.case, self.bound = case, bound
    def __del__(self, write=os.write):
        self.case.rewrite(self.bound)
        write(1, b"rewritten\\n")
builtins.late = Late(case, bound)
del case, bound, processor
""",
    "a refusal while modules are taken apart": """
class Late:
    def __init__(self, bound, events): self.bound, self.events = bound, events
    def __del__(self, write=os.write, error=bottleneck_ext.InvalidArgumentError):
        try: self.bound.rewrite(self.events)
        except error: write(1, b"refused\\n")
builtins.late = Late(bound, case.events * 2)
del case, bound, processor
""",
    "a daemon thread in the middle of rewrites": """
started = threading.Event()
def work():
    while True:
        case.rewrite(bound)
        started.set()
threading.Thread(target=work, daemon=True).start()
assert started.wait(60)
""",
    "a thread that goes on when the main one is done": """
def work():
    for _ in range(50): case.rewrite(bound)
    print("rewritten")
threading.Thread(target=work).start()
""",
    "an exception that holds frames": """
def refuse():
    inner = case.bind(processor, 2)
    inner.rewrite(case.events * 2)
try: refuse()
except ValueError as error: builtins.kept = error
""",
    "sys.exit in another thread": """
def work():
    case.rewrite(bound)
    sys.exit(3)
thread = threading.Thread(target=work)
thread.start()
thread.join()
""",
}
SAYS = {
    "a rewrite while the interpreter exits": "rewritten\n",
    "a rewrite while modules are taken apart": "rewritten\n",
    "a refusal while modules are taken apart": "refused\n",
    "a thread that goes on when the main one is done": "rewritten\n",
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_end_of_an_interpreter(ending: str) -> None:
    assert run(ENDINGS[ending]) == SAYS.get(ending, "")


def test_objects_go_in_any_order() -> None:
    """Processor, workspace, caches, the module and the tensors, in every order; what is left goes at exit."""
    names = ["processor", "workspace", "kv_cache", "query_cache", "bottleneck_ext", "case"]
    orders = list(itertools.permutations(range(len(names))))[::7]
    script = f"""
names = {names!r}
for order in {orders!r}:
    case = make_plain_case(1, 1)
    processor = case.processor().native
    workspace = bottleneck_ext.Workspace(2)
    kv_cache, query_cache = bottleneck_ext.KVCache(case.keys, case.values), bottleneck_ext.QueryCache(case.queries)
    event = case.events[0]
    processor.rewrite(kv_cache, query_cache, [(0, 0, event.step_begin, event.step_end)], case.block_table,
                      workspace=workspace)
    kept = sys.modules["bottleneck_ext"]
    for i in order:
        del globals()[names[i]]
    import bottleneck_ext
    assert bottleneck_ext is kept
gc.collect()
print(len({orders!r}))
"""
    assert run(script) == f"{len(orders)}\n"


# ---- forked children -------------------------------------------------------------------------------------------------

CHILD = """
from tests.forked import in_child
"""


def test_a_fork_after_the_import() -> None:
    """Nothing was used before it."""
    script = """
import os
import bottleneck_ext
from tests.plain_case import make_plain_case
def work():
    case = make_plain_case()
    case.rewrite(case.bind(case.processor(), 3))
    return case.bytes() == expected.bytes()
expected = make_plain_case()
in_the_child = in_child(lambda: expected.rewrite(expected.bind(expected.processor())) or work())
expected.rewrite(expected.bind(expected.processor()))
assert in_the_child and work()
"""
    run(script, common=CHILD)


def test_a_fork_while_others_compute() -> None:
    """The child has a workspace that says it is in use, which it is told, and can make another."""
    script = """
import warnings
warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads, since 3.12
stop = threading.Event()
def work():
    while not stop.is_set():
        case.rewrite(bound)
thread = threading.Thread(target=work)
thread.start()
def child():
    own = make_plain_case()
    try: own.rewrite(own.bind(processor, 3))
    except bottleneck_ext.InvalidArgumentError: return False
    if own.bytes() != expected.bytes(): return False
    inherited = case.bind(processor)
    inherited.workspace = bound.workspace
    try: case.rewrite(inherited)
    except bottleneck_ext.InvalidArgumentError as error: return "was in use when this process was forked" in str(error)
    return True
results = [in_child(child) for _ in range(20)]
stop.set()
thread.join()
assert all(results), results
"""
    run(script, common=COMMON + CHILD)


# ---- several interpreters --------------------------------------------------------------------------------------------

INTERPRETERS = """
import os, sys, threading
try:
    import _interpreters as interpreters
except ImportError:
    import _xxsubinterpreters as interpreters
with open("tests/interpreter_script.py") as file:
    source = file.read()
told = []
def run(script):
    interpreter = interpreters.create() if sys.version_info < (3, 13) else interpreters.create(
        "isolated" if sys.argv[1] == "own GIL" else "legacy")
    read, write = os.pipe()
    report = f"\\nimport os\\nos.write({write}, digest.encode())"
    problem = interpreters.run_string(interpreter, f"import sys\\nsys.path[:] = {sys.path!r}\\n" + script + report)
    os.close(write)
    told.append(os.read(read, 1000).decode() if problem is None else str(problem))
    os.close(read)
    interpreters.destroy(interpreter)
"""


def has_interpreters() -> bool:
    return any(importlib.util.find_spec(name) for name in ("_interpreters", "_xxsubinterpreters"))


@pytest.mark.skipif(not has_interpreters(), reason="this Python has no interpreters module")
@pytest.mark.parametrize("gil", ["one GIL", "own GIL"])
def test_several_interpreters(gil: str) -> None:
    """One after the other, at the same time, and beside the main one's: each has the module to itself."""
    if gil == "own GIL" and sys.version_info < (3, 13):
        pytest.skip("interpreters with a GIL of their own, in which ctypes can be imported, came with CPython 3.13")
    script = """
sys.path.insert(0, os.getcwd())
exec(source)
first = digest
for _ in range(3):
    run(source)
threads = [threading.Thread(target=run, args=(source,)) for _ in range(3)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert told == [first] * 6, (first, told)
assert rewrite() == first
print("alike")
"""
    assert run(script, gil, common=INTERPRETERS) == "alike\n"


# ---- a CPython without the GIL ---------------------------------------------------------------------------------------


def refusal(script: str) -> str:
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 1
    return result.stderr.splitlines()[-1]


def test_a_free_threaded_cpython_is_refused() -> None:
    """When the package is imported, before the compiled module is touched, and when it is built."""
    said = refusal(
        "import sys\nsys.abiflags = 't'\n"
        "try: import bottleneck_ext\nfinally: assert 'bottleneck_ext._core' not in sys.modules"
    )
    version = ".".join(map(str, sys.version_info[:3]))
    assert said == (
        f"ImportError: bottlenecked does not run on a free-threaded CPython ({version}t): use the build with the GIL"
    )
    said = refusal(
        "import sys, setuptools.command.build_ext\n"
        "sys.abiflags, sys.argv = 't', ['setup.py', '--version']\nexec(open('setup.py').read())"
    )
    assert said.startswith(
        "bottlenecked is built for CPython's stable ABI, which the free-threaded build does not have"
    )
