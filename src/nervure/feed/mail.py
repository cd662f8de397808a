"""Send a letter through the user's own mail server: over TLS, with a certificate that is checked."""

from __future__ import annotations

import importlib.util
import ipaddress
import os
import re
import smtplib
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.message import EmailMessage

from nervure._kit import CouldNotRun, UsageError, require

TIMEOUT = 30.0
_SUBMISSION, _TLS_FROM_THE_START = 587, 465
_ADDRESS = re.compile(
    r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-][A-Za-z0-9.!#$%&'*+/=?^_`{|}~-]{0,63}@([A-Za-z0-9-]{1,63}\.)*[A-Za-z0-9-]{1,63}"
)


def mail_address(text: str, *, name: str = "the address") -> str:
    """Return a mail address if it is one and nothing more: no second one, no name, no line that starts a header.

    Args:
        text: What the user typed.
        name: What to call it.

    Returns:
        The address.

    Raises:
        UsageError: If it is none.

    Examples:
        >>> mail_address("ada@example.org")
        'ada@example.org'
    """
    if not _ADDRESS.fullmatch(text):
        raise UsageError(f"{name} is no mail address", expected="one such as ada@example.org", found=repr(text[:200]))
    return text


@dataclass(frozen=True)
class Server:
    """Know the user's mail server.

    Args:
        host: Its name.
        port: 465 for TLS from the start; on any other, TLS begins by STARTTLS.
        sender: Address the letters come from.
        user: Name to log in with; empty to send without.
        password: The password.
    """

    host: str
    port: int
    sender: str
    user: str = ""
    password: str = field(default="", repr=False)

    @classmethod
    def of(cls, environment: Mapping[str, str] = os.environ) -> Server:
        """Return the server that the environment names.

        Args:
            environment: ``NERVURE_SMTP_HOST``, ``_PORT`` (587), ``_USER``, ``_PASSWORD`` and ``_FROM`` (the user, if
                that is an address). Without a password, the keyring's for the service ``nervure`` and the user.

        Returns:
            The server.

        Raises:
            UsageError: If something is missing or not what it should be.
        """
        host, user = environment.get("NERVURE_SMTP_HOST", ""), environment.get("NERVURE_SMTP_USER", "")
        if not re.fullmatch(r"[A-Za-z0-9.:_-]{1,253}", host):
            raise UsageError(
                "no mail server is named", expected="NERVURE_SMTP_HOST", try_="--dry-run to see the digest without one"
            )
        port = environment.get("NERVURE_SMTP_PORT", str(_SUBMISSION))
        if not re.fullmatch(r"[0-9]{1,5}", port) or not 0 < int(port) < 65536:
            raise UsageError("NERVURE_SMTP_PORT is no port", expected="587 or 465", found=repr(port[:40]))
        sender = mail_address(environment.get("NERVURE_SMTP_FROM") or user, name="NERVURE_SMTP_FROM")
        password = environment.get("NERVURE_SMTP_PASSWORD", "")
        if password and not user:
            raise UsageError("there is a password for the mail server and no user", expected="NERVURE_SMTP_USER")
        if user and not password:
            password = _from_keyring(user)
        return cls(host, int(port), sender, user, password)

    def send(self, message: EmailMessage) -> None:
        """Send a letter.

        Args:
            message: The letter.

        Raises:
            CouldNotRun: If it is not certain that the server took it.
        """
        context = ssl.create_default_context()
        # The name we greet with: the machine's own would tell strangers of it, and may ask the network for it.
        greeting = "[127.0.0.1]"
        try:
            if self.port == _TLS_FROM_THE_START:
                with smtplib.SMTP_SSL(self.host, self.port, greeting, timeout=TIMEOUT, context=context) as server:
                    self._deliver(server, message)
            else:
                with smtplib.SMTP(self.host, self.port, greeting, timeout=TIMEOUT) as server:
                    self._secure(server, context)
                    self._deliver(server, message)
        except ssl.SSLCertVerificationError as error:
            found = error.verify_message
            raise CouldNotRun(
                f"the certificate of {self.host} is not trusted; nothing was sent", found=found
            ) from error
        except smtplib.SMTPAuthenticationError as error:
            advice = "NERVURE_SMTP_USER and NERVURE_SMTP_PASSWORD"
            raise CouldNotRun(f"{self.host} refuses the user or the password", try_=advice) from error
        except (smtplib.SMTPException, OSError) as error:
            found = " ".join(ascii(str(error)).strip("'\"").split())[:300] or type(error).__name__
            raise CouldNotRun(f"{self.host} did not take the letter", found=found, try_="again later") from error

    def _secure(self, server: smtplib.SMTP, context: ssl.SSLContext) -> None:
        server.ehlo()
        if server.has_extn("starttls"):
            server.starttls(context=context)
        elif self.user or not _on_this_machine(server):
            raise CouldNotRun(
                f"{self.host} offers no TLS; nothing was sent",
                expected="STARTTLS, or port 465",
                try_="NERVURE_SMTP_PORT=465",
            )

    def _deliver(self, server: smtplib.SMTP, message: EmailMessage) -> None:
        if self.user:
            server.login(self.user, self.password)
        server.send_message(message)


def _on_this_machine(server: smtplib.SMTP) -> bool:
    """Return whether the connection never leaves the machine, so that nobody can listen."""
    if server.sock is None:
        return False
    return ipaddress.ip_address(str(server.sock.getpeername()[0]).partition("%")[0]).is_loopback


def _from_keyring(user: str) -> str:
    password = None
    if importlib.util.find_spec("keyring") is not None:
        keyring = require("keyring", extra="feed")
        try:
            password = keyring.get_password("nervure", user)
        except keyring.errors.KeyringError as error:
            raise CouldNotRun("the keyring cannot be read", found=error, try_="NERVURE_SMTP_PASSWORD") from error
    if not password:
        raise UsageError(
            f"there is no password for {user}",
            expected="NERVURE_SMTP_PASSWORD, or one in the keyring",
            try_=f"keyring set nervure {user}",
        )
    return str(password)
