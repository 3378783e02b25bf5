"""The command line; `clipadapt --help` says what it does. Nothing here imports torch before a command needs it."""


def main() -> None:
    """Run the command line on the process's arguments and exit."""
    from clipadapt.cli.app import app

    app()
