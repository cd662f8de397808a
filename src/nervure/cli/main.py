"""The commands' names and what becomes of errors. Each command's code is imported when it is called."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import cyclopts

from nervure import __version__
from nervure._kit import NervureError

USAGE, COULD_NOT_RUN = 2, 3

app = cyclopts.App(
    name="nervure",
    version=__version__,
    help="The methods of 294 neural-network papers on any PyTorch network: run, compare, find.\n\n"
    "Exit codes: 0 the claim holds or the work is done, 1 the claim was not shown to hold, "
    "2 wrong usage, 3 it could not be run.",
    result_action="return_value",
)
# The help texts stand here too: reading them off the functions would import the functions.
for _name, _where, _help in (
    ("find", "finding:find", "Find papers and methods by words of their title, summary and tags."),
    ("list", "finding:list_", "List the papers of the catalogue."),
    ("show", "finding:show", "Show one paper's card: what it says and what it claims."),
    ("run", "running:run", "Check a paper's claim here: holds, does not hold, or inconclusive."),
    ("audit", "auditing:audit", "Examine your network: what is its state, and which methods would help?"),
    ("landscape", "landscapes:landscape", "Draw the loss around your network, between networks, or along a run."),
    ("prune", "pruning:prune", "Make your network smaller: prune, fine-tune, verify, report, write."),
    ("export", "running:export", "Write a verdict or leaderboard as files or to a tracker, or all pages as a site."),
    ("web", "serving:web", "Serve the pages: papers, runs, leaderboards, networks."),
    ("data", "running:data", "Bring a data set into the cache and say what it holds."),
):
    app.command(f"nervure.cli.{_where}", name=_name, help=_help)
compare = cyclopts.App(name="compare", help="Compare the methods of a family, at equal budget.")
compare.command("nervure.cli.running:compare_prune", name="prune", help="Compare pruning methods.")
for _name, _help in (
    ("curvature", "Compare estimators of eigenvalues, trace and density with the exact spectrum."),
    ("delayed-generalisation", "Compare optimizers and regularisers by the time until a network generalises."),
    ("generalisation-measures", "Compare numbers taken on the training data by how well they foretell the test gap."),
    ("shortcut-fixes", "Compare remedies against shortcuts by their worst group, at equal gradient evaluations."),
    ("similarity", "Compare measures of similarity on representations whose order is known."),
):
    compare.command(f"nervure.cli.contests:{_name.replace('-', '_')}", name=_name, help=_help)
app.command(compare)
store = cyclopts.App(name="store", help="Look after stores: in a file, or in PostgreSQL for a team.")
for _name, _help in (
    ("copy", "Copy a store into another, such as a file into PostgreSQL; again adds what is new."),
    ("check", "Look a store through and name what is wrong."),
    ("prune", "Remove what nobody reads any more, or say what that would be."),
):
    store.command(f"nervure.cli.upkeep:{_name}", name=_name, help=_help)
app.command(store)
feed = cyclopts.App(name="feed", help="Follow public feeds of new papers.")
for _name, _where, _help in (
    ("pull", "pull", "Read the feeds; store what is new, placed in families and ranked."),
    ("list", "list_", "List the papers that feeds told of, the best first."),
    ("digest", "digest", "Mail the new papers that match a subscription, or the best ones."),
    ("subscribe", "subscribe", "Ask to be told of papers that have all these words."),
    ("unsubscribe", "unsubscribe", "Take a subscription back."),
    ("subscriptions", "subscriptions", "List your subscriptions."),
):
    feed.command(f"nervure.cli.feeding:{_where}", name=_name, help=_help)
app.command(feed)


def main(words: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its code.

    Args:
        words: The arguments; those of the process when None.
    """
    code = run(sys.argv[1:] if words is None else list(words))
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader (head, less) has gone
    sys.exit(code)


def run(words: Sequence[str]) -> int:
    """Run the command line.

    Args:
        words: The arguments.

    Returns:
        The exit code.
    """
    try:
        code = app(words, exit_on_error=False, print_error=True)
    except cyclopts.CycloptsError:
        return USAGE
    except NervureError as error:
        print(f"nervure: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt as error:
        print(f"nervure: {error or 'interrupted'}", file=sys.stderr)
        return int(getattr(error, "exit_code", 130))
    return code if isinstance(code, int) else 0
