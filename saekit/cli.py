"""The command line: ``saekit train``, ``sweep``, ``cache``, ``eval``, ``convert``, ``info`` and ``push``."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, NoReturn

import typer

from saekit.commands.cache import cache_app
from saekit.commands.dictionary import convert, info
from saekit.commands.evaluate import evaluate
from saekit.commands.help import explain
from saekit.commands.once import once
from saekit.commands.push import push
from saekit.commands.sweep import sweep_app
from saekit.commands.train import train
from saekit.errors import SaekitError, first_line

app = typer.Typer(add_completion=True, pretty_exceptions_enable=False)
app.command()(train)
app.add_typer(cache_app, name="cache")
app.command("eval")(evaluate)
app.command()(convert)
app.command()(info)
app.command()(push)
app.add_typer(sweep_app, name="sweep")

_DEBUG = "--debug"
_FOR_MANY = ("train", "cache", "eval")  # commands whose work several processes share
_LONGEST = 2000  # characters of the line about a mistake
_CLOSED_PIPE = 141  # what a shell says of a program that SIGPIPE ended
_UsageError: Any = typer.BadParameter.__base__  # click's, which typer may carry inside itself


def _print_version(asked: bool) -> None:
    if asked:
        from saekit.version import __version__

        print(f"saekit {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", is_eager=True, callback=_print_version, help="say the version"),
) -> None:
    """Train, load and judge sparse autoencoders of language-model activations."""


def main() -> None:
    """Run the command line; what goes wrong is one line on standard error.

    The exit code is 2 for what the user can mend (a mistake, a file, too little memory) and 1 for anything unexpected.
    """
    arguments = [argument for argument in sys.argv[1:] if argument != _DEBUG] or ["--help"]
    debug = _DEBUG in sys.argv
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        with _with_others(arguments):
            code = once(explain(typer.main.get_command(app))).main(arguments, prog_name="saekit", standalone_mode=False)
        print(end="", flush=True)  # a closed pipe is met here rather than while Python shuts down
        sys.exit(code)
    except (KeyboardInterrupt, typer.Abort) as error:
        print("saekit: interrupted", file=sys.stderr)
        sys.exit(getattr(error, "code", 130))
    except BrokenPipeError:
        _end_quietly()
    except SystemExit as stop:
        if isinstance(stop.__context__, BrokenPipeError):  # typer and rich turn it into exit code 1
            _end_quietly()
        raise
    except Exception as error:
        if debug:
            raise
        message, code = _explained(error)
        if type(error).__name__ == "ToldError" and os.environ.get("RANK", "0") != "0":
            sys.exit(code)  # the first process tells it
        line = ("saekit: " + " ".join(message.split()))[:_LONGEST]
        print(line.encode("utf-8", "backslashreplace").decode(), file=sys.stderr)
        try:
            print(end="", flush=True)
        except OSError:
            _drop_output()
        sys.exit(code)


@contextlib.contextmanager
def _with_others(arguments: list[str]) -> Iterator[None]:
    """Join the other processes that torchrun launched, if it did; the first of them alone speaks.

    Raises:
        SaekitError: they do not find each other, or the command is one for a single process.
    """
    launched = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
    if not launched or int(os.environ["WORLD_SIZE"]) == 1:
        yield
        return
    from saekit.ranks import ToldError, together

    if arguments[0] not in _FOR_MANY and not {"--help", "--version"} & {*arguments}:
        many = ", ".join(_FOR_MANY)
        raise ToldError(f"'saekit {arguments[0]}' runs on one process; torchrun is for saekit {many}")
    with contextlib.ExitStack() as stack:
        if stack.enter_context(together()).rank:
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        yield


def _explained(error: Exception) -> tuple[str, int]:
    """What to say of an error, and the exit code."""
    text = first_line(error)
    if isinstance(error, SaekitError):
        return str(error), 2
    if isinstance(error, _UsageError):
        return error.format_message(), 2
    if isinstance(error, OSError):
        file = "" if error.filename is None else f"cannot use '{error.filename}': "
        return file + (error.strerror or text), 2
    if isinstance(error, MemoryError) or _is_torchs_memory_error(error):
        return f"not enough memory: {text[:200]}; a smaller --width or --batch-size needs less", 2
    return f"unexpected {type(error).__name__}: {text} ({_DEBUG} shows where)", 1


def _is_torchs_memory_error(error: Exception) -> bool:
    """Whether torch ran out of memory; on the CPU it has no class of its own for that."""
    known = ("can't allocate memory", "out of memory")
    return isinstance(error, RuntimeError) and any(words in str(error) for words in known)


def _end_quietly() -> NoReturn:
    """End as other programs do whose reader has gone."""
    _drop_output()
    sys.exit(_CLOSED_PIPE)


def _drop_output() -> None:
    """Leave Python nothing to write, and to complain of, at shutdown."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
