"""The command ``babelray``: thin and quick to answer; work is imported when it is asked for."""

from __future__ import annotations

import errno
import sys
from typing import Any

import click

from cluster import allocator
from cluster.commands.attention import attention
from cluster.commands.attention_bench import attention_bench
from cluster.commands.dashboard import dashboard
from cluster.commands.data import data
from cluster.commands.doctor import doctor
from cluster.commands.evaluate import evaluate
from cluster.commands.export import export
from cluster.commands.heads import heads
from cluster.commands.launch import launch, resume
from cluster.commands.logs import logs
from cluster.commands.plan import plan
from cluster.commands.profile import profile
from cluster.commands.report import report
from cluster.commands.serve import serve
from cluster.commands.status import status
from cluster.commands.stop import stop
from cluster.commands.table1 import table1
from cluster.commands.table2 import table2
from cluster.commands.table3 import table3
from cluster.commands.train import train
from cluster.commands.translate import translate
from data_shards.errors import UserError

_INTERRUPTED = 130


class _Failure(click.ClickException):
    """An error of the user's, as one message on stderr."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        setattr(self, "exit_code", exit_code)  # noqa: B010  (click declares it for the class)

    def show(self, file: Any = None) -> None:
        click.echo(f"babelray: error: {self.format_message()}", file=file, err=file is None)


class _Commands(click.Group):
    """A group whose commands end in a message and an exit status, never in a traceback, where the
    user can mend what went wrong.
    """

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            raise _Failure(str(error), error.exit_status) from None
        except OSError as error:
            if error.errno == errno.EPIPE or error.filename is None:
                raise
            raise _Failure(f"{error.filename}: {error.strerror}", 2) from None
        except KeyboardInterrupt:
            click.echo("babelray: interrupted", err=True)
            raise click.exceptions.Exit(_INTERRUPTED) from None


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="babelray", message="%(prog)s %(version)s")
def cli() -> None:
    """Train Transformers for translation, on one laptop or on many GPU machines.

    \b
    A first run, start to end:
      babelray train --config configs/tiny.yaml --name demo --workers 2
      babelray evaluate demo
      echo "the old man sleeps" | babelray translate demo

    Every command explains itself: babelray COMMAND --help. Exit status: 0 done, 1 the run failed,
    2 wrong input, 130 interrupted.
    """


for _command in (
    data,
    train,
    launch,
    evaluate,
    translate,
    export,
    report,
    attention,
    heads,
    serve,
    status,
    logs,
    dashboard,
    stop,
    resume,
    doctor,
    plan,
    profile,
    attention_bench,
    table1,
    table2,
    table3,
):
    cli.add_command(_command)


def main() -> None:
    """The console script."""
    # The only command whose hours pass in this very process: a fifth more sentences a second.
    if sys.argv[1:2] == ["translate"] and not {"-h", "--help"} & set(sys.argv):
        allocator.begin_again(allocator.glibc_environment())
    sys.exit(cli(prog_name="babelray"))


if __name__ == "__main__":
    main()
