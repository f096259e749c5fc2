"""The words of visibility: `private`, `org`, `role:<slug>`, `public`."""

import re

_VISIBILITY = re.compile(r"private|org|public|role:[a-z0-9][a-z0-9_-]*")


class InvalidRegistration(ValueError):
    """What was to be registered breaks a rule; the sentence says which and what would be right."""


def check_visibility(visibility: str, user_id: str | None) -> None:
    """Raises `InvalidRegistration`."""
    if not _VISIBILITY.fullmatch(visibility):
        raise InvalidRegistration("visibility must be private, org, public or role:<slug>")
    if visibility == "private" and user_id is None:
        raise InvalidRegistration("a private entry needs its user: give --user")
