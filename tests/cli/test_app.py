"""The frame around the commands: help, version, errors, exit codes, and what an import costs."""

import subprocess
import sys

import pytest

import clipadapt
from clipadapt.cli import app as app_module
from clipadapt.errors import ClipadaptError

HEAVY = ("torch", "transformers", "sklearn", "peft", "accelerate", "numpy", "PIL")


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_help_imports_nothing_heavy():
    done = python(
        "import sys, clipadapt.cli.app\n"
        "try: clipadapt.cli.app.app(['adapt', '--help'])\n"
        f"finally: print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)"
    )
    assert done.returncode == 0
    assert "--shots" in done.stdout
    assert done.stderr.strip() == "[]"


def test_the_entry_point_answers_an_error_with_one_line_and_exit_code_1(tmp_path):
    command = [sys.executable, "-m", "clipadapt.cli", "predict", str(tmp_path / "none"), "a.jpg"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == f"error: {tmp_path / 'none'} is not a saved model: it has no config.json.\n"


def test_version(run):
    assert run("--version").stdout == f"clipadapt {clipadapt.__version__}\n"


def test_help_names_every_command_and_the_exit_codes(run):
    text = run("--help").stdout
    for command in ("adapt", "predict", "evaluate", "methods", "demo", "convert", "pretrain"):
        assert f" {command} " in text
    assert "130" in text


def test_usage_errors_exit_with_2(run):
    assert "No such command" in run("adopt", code=2).stderr
    assert "--shots" in run("adapt", "x", "--shots", 0, code=2).stderr


@pytest.mark.parametrize("place", [0, 2])
def test_debug_may_stand_anywhere_and_shows_the_traceback(run, place):
    args = ["methods", "no-such-method"]
    result = run(*args[:place], "--debug", *args[place:], code=1)
    assert isinstance(result.exception, ClipadaptError)


@pytest.mark.parametrize(
    ("raised", "code", "line"),
    [
        (KeyboardInterrupt(), 130, "interrupted; features and training so far are kept"),
        (OSError(28, "No space left on device"), 1, "error: [Errno 28] No space left on device"),
        (FloatingPointError("The loss became nan."), 1, "error: The loss became nan."),
    ],
)
def test_what_ends_a_run_becomes_a_line_and_a_code(run, monkeypatch, raised, code, line):
    def interrupted(pattern):
        raise raised

    monkeypatch.setattr("clipadapt.methods.list_methods", interrupted)
    result = run("methods", code=code)
    assert result.stderr.startswith(line)
    assert result.stdout == ""


def test_a_bug_is_not_dressed_up_as_the_users_mistake(run, monkeypatch):
    monkeypatch.setattr("clipadapt.methods.list_methods", lambda pattern: 1 / 0)
    assert isinstance(run("methods", code=1).exception, ZeroDivisionError)
    assert ZeroDivisionError not in app_module._ANSWERABLE
