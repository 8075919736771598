"""Where the command line starts: which command is loaded, what is said of all of them."""

import json
import subprocess
import sys
import threading
import types

import pytest

import lbpwht_jax
from lbpwht_jax.cli import main
from lbpwht_jax.cli.commands import COMMANDS


def test_help_has_a_line_for_each_command(capsys):
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [name for name in COMMANDS if not any(line.startswith(f"  {name} ") for line in lines)] == []
    assert main([]) == 2
    assert capsys.readouterr().err.splitlines() == lines


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_its_own_help(name, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([name, "--help"])
    assert capsys.readouterr().out.startswith(f"usage: lbpwht {name} ")


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"lbpwht {lbpwht_jax.__version__}\n"


def test_an_unknown_command(capsys):
    assert main(["modles"]) == 2
    assert capsys.readouterr().err == "lbpwht: there is no command 'modles'; did you mean models?\n"
    assert main(["xyz"]) == 2
    assert "the commands are finetune, evaluate" in capsys.readouterr().err


def test_mistaken_flags_leave_with_2():
    with pytest.raises(SystemExit, match="2"):
        main(["models", "--nonsense"])


@pytest.mark.parametrize(
    ("arguments", "unused"),
    [
        (["--help"], ["jax", "tyro"]),
        (["models", "vit_micro*"], ["matplotlib", "grain", "tensorflow_datasets", "sklearn"]),
        (["cost", "vit_micro_patch4_28"], ["matplotlib", "grain", "tensorflow_datasets", "sklearn"]),
    ],
)
def test_a_command_loads_what_it_needs(arguments, unused):
    code = "import json, sys; from lbpwht_jax.cli import main; code = main(sys.argv[1:]); print(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert not set(json.loads(done.stdout.splitlines()[-1])) & set(unused)


def test_python_m_does_the_same():
    done = subprocess.run([sys.executable, "-m", "lbpwht_jax.cli", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"lbpwht {lbpwht_jax.__version__}\n"


def test_no_traces_from_threads_that_are_not_python_s(monkeypatch, capsys):
    """tensorstore's callbacks of a write that failed: an error without an object, in a thread of its own."""
    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)
    assert main(["models", "vit_micro*"]) == 0

    class Unlucky:
        def __del__(self):
            raise RuntimeError("cannot go")

    capsys.readouterr()
    error = types.SimpleNamespace(exc_type=RuntimeError, exc_value=RuntimeError("closed"), exc_traceback=None, object=None)
    thread = threading.Thread(target=sys.unraisablehook, args=(error,))
    thread.start()
    thread.join()
    assert capsys.readouterr().err == ""
    thread = threading.Thread(target=Unlucky)
    thread.start()
    thread.join()
    assert "cannot go" in capsys.readouterr().err
