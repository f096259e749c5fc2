"""The words of visibility and of grants, and what a caller is told who uses others."""

import re

from queryd.events import Invalid, parse_uuid

_ROLE = r"role:[a-z0-9][a-z0-9_-]*"
_VISIBILITY = re.compile(rf"private|org|public|{_ROLE}")


class InvalidRegistration(ValueError):
    """What was to be registered breaks a rule; the sentence says which and what would be right."""


def check_visibility(visibility: str) -> None:
    """`private`, `org`, `role:<slug>` or `public`; raises `InvalidRegistration`."""
    if not _VISIBILITY.fullmatch(visibility):
        raise InvalidRegistration("visibility must be private, org, public or role:<slug>")


def read_grantee(text: str, owner_org_id: str) -> str:
    """A grantee as it is stored: `user:<uuid>` or `role:<slug>` of the owner's org, or `org:<uuid>` of another.

    Raises `InvalidRegistration`.
    """
    kind, _, who = text.partition(":")
    if re.fullmatch(_ROLE, text):
        return text
    if kind not in ("user", "org"):
        raise InvalidRegistration("a grant goes to user:<uuid>, role:<slug> or org:<uuid>")
    try:
        who = parse_uuid(who, "what is granted to")
    except Invalid as error:
        raise InvalidRegistration(f"{error}: a grant goes to user:<uuid>, role:<slug> or org:<uuid>") from None
    if kind == "org" and who == owner_org_id:
        raise InvalidRegistration("the owner's own org needs no grant: --visibility org lets all of it read")
    return f"{kind}:{who}"
