"""The command ``fixpoint``, and the names that it knows.

It stands beside the package ``fixpoint``, because that imports PyTorch: so a typo is refused before the seconds that
this takes.
"""


def main() -> None:
    """Run the command line."""
    from fixpoint_cli.command import app  # which needs typer; the names do not
    from fixpoint_cli.running import run_app

    raise SystemExit(run_app(app))
