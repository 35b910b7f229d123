"""The command `whit`: one file per verb, loaded when the verb is used.

Verbs are imported on demand because transformers and torch take seconds to load and most verbs need neither.
This is the one place where errors become messages and exit statuses: 0 done, 1 a check failed, 2 a problem that
the user can solve, 130 interrupted.
"""

from __future__ import annotations

import io
import os
import signal
import sys
from importlib import import_module
from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from whit.errors import WhitError

INTERRUPTED = 130

# How often a thread of torch's or llama.cpp's pool looks for work before it sleeps; libgomp's own number is sixty times
# as much. Beside other programs that longer wait takes their time and ours, at rest it gains nothing (docs/log.md).
SPINS = "5000"

# verb -> (module, one line for the overview)
VERBS = {
    "demo": ("whit.cli.demo", "Quantize a real model, measure what was lost, and run it."),
    "quantize": ("whit.cli.quantize", "Make a model smaller, for llama.cpp, vLLM or transformers."),
    "plan": ("whit.cli.plan", "Sizes, memory and exceptions from headers; or losses."),
    "frontier": ("whit.cli.frontier", "Write and measure files of several sizes."),
    "distil": ("whit.cli.distil", "Improve the scales and norms of a quantized file."),
    "tune": ("whit.cli.tune", "Train a quantized file further, with quantization in the loop."),
    "convert": ("whit.cli.convert", "Write another file format, exactly where grids agree."),
    "lint": ("whit.cli.lint", "Say which runtimes load a file, and what stops the others."),
    "imatrix": ("whit.cli.imatrix", "Write the importance matrix of a model."),
    "eval": ("whit.cli.eval", "Measure what a file lost against the original."),
    "verify": ("whit.cli.verify", "Give a verdict on a written file, and name what is to blame."),
    "report": ("whit.cli.report", "Write a page on what files lost, with advice and pictures."),
    "release": ("whit.cli.release", "A publishable set of files, measured, with a model card."),
    "run": ("whit.cli.run", "Let a model answer a prompt."),
    "chat": ("whit.cli.chat", "Talk with a model in the terminal."),
    "serve": ("whit.cli.serve", "Serve a model with OpenAI's HTTP interface."),
    "web": ("whit.cli.web", "Write a page that runs a GGUF file in the visitor's browser."),
    "memory": ("whit.cli.memory", "Bytes to store, run and train a model, before doing it."),
    "inspect": ("whit.cli.inspect", "List the metadata and tensors of a file or folder."),
    "explain": ("whit.cli.explain", "Draw how number formats hold a number."),
}


class LazyVerbs(TyperGroup):
    """A command group that imports a verb's module only when it is called.

    Contexts and formatters are of classes that typer keeps to itself.
    """

    def list_commands(self, ctx: Any) -> list[str]:
        """The verbs, in the order of a first visit."""
        return list(VERBS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The verb's command, or None."""
        if cmd_name not in VERBS:
            return None
        home, summary = VERBS[cmd_name]
        module = import_module(home)
        app = typer.Typer(add_completion=False)
        settings = getattr(module, "CONTEXT_SETTINGS", None)  # explain takes negative numbers for arguments
        app.command(name=cmd_name, short_help=summary, context_settings=settings)(module.command)
        return typer.main.get_command(app)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """The overview, from the table alone."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in VERBS.items()])


app = typer.Typer(
    cls=LazyVerbs, add_completion=False, no_args_is_help=True, rich_markup_mode=None, help="Lose not a whit."
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"whit {version('whit')}")
        raise typer.Exit()


@app.callback()
def main_options(
    show_version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Make language models small and fast, and show what was lost."""


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the command."""
    if not os.environ.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}:
        os.environ["GOMP_SPINCOUNT"] = SPINS  # read when torch is loaded, which no verb has done yet
    for stream in (sys.stdout, sys.stderr):  # what a terminal cannot show is written by its number
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    for name in ("SIGTERM", "SIGHUP"):  # a closed terminal cleans up as Ctrl-C does
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), _stop)
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def _stop(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def run(arguments: list[str]) -> int:
    """Run one command line; returns the exit status."""
    try:
        status = typer.main.get_command(app).main(arguments or ["--help"], prog_name="whit", standalone_mode=False)
        sys.stdout.flush()  # what cannot be written is an error of this command, not of the interpreter's end
    except WhitError as error:
        print(f"whit: {error}", file=sys.stderr)
        return error.exit_status
    except typer.TyperException as error:
        verb = f" {arguments[0]}" if arguments and arguments[0] in VERBS else ""
        print(f"whit: {error.format_message()} See whit{verb} --help.", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, typer.Abort):
        status = INTERRUPTED
    except (BrokenPipeError, SystemExit) as error:
        if isinstance(error, SystemExit) and not isinstance(error.__context__, BrokenPipeError):
            raise
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  so that flushing at exit is quiet
        return 0  # the reader, `head` for example, has seen enough; rich makes an exit of that
    except OSError as error:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  there may be more in it that cannot be written
        place = f"{error.filename}: " if error.filename else ""
        print(f"whit: {place}cannot be read or written ({error.strerror or error}).", file=sys.stderr)
        return 2
    if status == INTERRUPTED:  # typer turns Ctrl-C into this status by itself
        print("whit: interrupted; nothing half-written was left behind.", file=sys.stderr)
    return status if isinstance(status, int) else 0
