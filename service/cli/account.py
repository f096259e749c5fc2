"""Who gives a command."""

import getpass

from service.cli.output import complain


def account() -> str:
    """The name of the account that this process runs under; exits with 2 where it has none."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        complain("this account has no name: say who replays, --by NAME", 2)
