import email
import ssl
import sys
import types

import pytest
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import AuthResult

from nervure._kit import CouldNotRun, UsageError
from nervure.feed import Digest
from nervure.feed.mail import Server, mail_address
from nervure.spec import Paper

PAPER = Paper(id="arxiv:1", source="", title="Pruning", link="https://arxiv.org/abs/2601.00001")
WORD = "correct horse"


class Box:
    def __init__(self):
        self.letters, self.logins, self.answer = [], [], "250 OK"

    async def handle_DATA(self, server, session, envelope):  # noqa: N802 - the server's name for it
        self.letters.append((session.ssl is not None, envelope))
        return self.answer

    def login(self, server, session, envelope, mechanism, data):
        self.logins.append((session.ssl is not None, data.login.decode(), data.password.decode()))
        return AuthResult(success=data.password.decode() == WORD, handled=False)


@pytest.fixture
def serve(keys):
    started = []

    def start(*, tls=None, login=False):
        box = Box()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*keys)
        options = {"hostname": "127.0.0.1", "port": 0, "server_hostname": "localhost"}
        if login:
            options |= {"authenticator": box.login, "auth_require_tls": tls == "starttls"}
        if tls == "starttls":
            options |= {"tls_context": context, "require_starttls": True}
        controller = Controller(box, **options, **({"ssl_context": context} if tls == "start" else {}))
        real = controller._trigger_server

        def trigger():  # which free port it took is known only now
            controller.port = controller.server.sockets[0].getsockname()[1]
            real()

        controller._trigger_server = trigger
        controller.start()
        started.append(controller)
        return box, controller.port

    yield start
    for controller in started:
        controller.stop()


@pytest.fixture
def trusted(keys, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(keys[0]))


def letter(to="ada@example.org"):
    return Digest((PAPER,), ()).message(sender="me@example.org", to=to)


def server(port, **more):
    return Server(**{"host": "127.0.0.1", "port": port, "sender": "me@example.org", **more})


def test_starttls_with_a_login(serve, trusted):
    box, port = serve(tls="starttls", login=True)
    server(port, user="me", password=WORD).send(letter())
    assert box.logins == [(True, "me", WORD)]
    ((secure, envelope),) = box.letters
    assert secure
    assert (envelope.mail_from, envelope.rcpt_tos) == ("me@example.org", ["ada@example.org"])
    assert email.message_from_bytes(envelope.content)["Subject"] == "nervure: 1 new paper"


def test_tls_from_the_start(serve, trusted, monkeypatch):
    box, port = serve(tls="start", login=True)
    monkeypatch.setattr("nervure.feed.mail._TLS_FROM_THE_START", port)
    server(port, user="me", password=WORD).send(letter())
    assert [login[1:] for login in box.logins] == [("me", WORD)]
    assert len(box.letters) == 1


@pytest.mark.parametrize("tls", ["start", "starttls"])
def test_a_certificate_nobody_signed_gets_neither_password_nor_letter(serve, monkeypatch, tls):
    box, port = serve(tls=tls)
    if tls == "start":
        monkeypatch.setattr("nervure.feed.mail._TLS_FROM_THE_START", port)
    with pytest.raises(CouldNotRun, match="certificate of 127.0.0.1 is not trusted"):
        server(port, user="me", password=WORD).send(letter())
    assert (box.letters, box.logins) == ([], [])


def test_a_certificate_of_another_name_is_refused(serve, trusted, monkeypatch):
    box, port = serve(tls="starttls")
    monkeypatch.setattr("socket.create_connection", _here(port))
    with pytest.raises(CouldNotRun, match="not trusted.*mismatch"):
        Server("mail.example.org", port, "me@example.org").send(letter())
    assert box.letters == []


def _here(port):
    import socket

    real = socket.create_connection
    return lambda address, *rest, **options: real(("127.0.0.1", port), *rest, **options)


def test_no_password_goes_to_a_server_without_tls(serve):
    box, port = serve(login=True)
    with pytest.raises(CouldNotRun, match="offers no TLS; nothing was sent"):
        server(port, user="me", password=WORD).send(letter())
    assert (box.letters, box.logins) == ([], [])


def test_without_a_password_and_tls_only_this_machine_is_trusted(serve, monkeypatch):
    box, port = serve()
    server(port).send(letter())
    assert len(box.letters) == 1
    monkeypatch.setattr("nervure.feed.mail._on_this_machine", lambda server: False)
    with pytest.raises(CouldNotRun, match="offers no TLS"):
        server(port).send(letter())
    assert len(box.letters) == 1


def test_a_wrong_password_is_said_to_be_wrong_and_not_shown(serve, trusted):
    box, port = serve(tls="starttls", login=True)
    with pytest.raises(CouldNotRun, match="refuses the user or the password") as error:
        server(port, user="me", password="wrong battery").send(letter())
    assert "battery" not in str(error.value)
    assert "battery" not in repr(server(port, user="me", password="wrong battery"))
    assert box.letters == []


def test_what_the_server_says_cannot_play_with_the_terminal(serve):
    box, port = serve()
    box.answer = "554 no \x1b[31mthanks\x07"
    with pytest.raises(CouldNotRun, match="did not take the letter") as error:
        server(port).send(letter())
    assert str(error.value).isprintable()
    assert "thanks" in str(error.value)


def test_nobody_listens():
    with pytest.raises(CouldNotRun, match="did not take the letter.*refused"):
        server(1).send(letter())


NOT_ADDRESSES = [
    "",
    "ada",
    "@example.org",
    "ada@",
    "ada@example.org\nBcc: eve@example.org",
    "ada@example.org\r\n",
    "ada@example.org,eve@example.org",
    "ada@example.org eve@example.org",
    "Ada <ada@example.org>",
    "ada@example.org>",
    '"a b"@example.org',
    "ada@exam\u0440le.org",
    "ada\x00@example.org",
    ".ada@example.org",
    "ada@example..org",
    "a" * 65 + "@example.org",
    "ada@" + "a" * 64 + ".org",
]


@pytest.mark.parametrize("text", NOT_ADDRESSES, ids=ascii)
def test_what_is_no_address(text):
    with pytest.raises(UsageError, match="is no mail address"):
        mail_address(text)


def test_addresses():
    for text in ("ada@example.org", "a.b+c@mail.example.org", "root@localhost"):
        assert mail_address(text) == text


FULL = {
    "NERVURE_SMTP_HOST": "mail.example.org",
    "NERVURE_SMTP_USER": "me@example.org",
    "NERVURE_SMTP_PASSWORD": WORD,
}


def test_the_environment_names_the_server():
    assert Server.of(FULL) == Server("mail.example.org", 587, "me@example.org", "me@example.org", WORD)
    other = Server.of(FULL | {"NERVURE_SMTP_PORT": "465", "NERVURE_SMTP_FROM": "bot@example.org"})
    assert (other.port, other.sender) == (465, "bot@example.org")
    bare = Server.of({"NERVURE_SMTP_HOST": "localhost", "NERVURE_SMTP_FROM": "bot@example.org"})
    assert (bare.user, bare.password) == ("", "")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"NERVURE_SMTP_HOST": ""}, "NERVURE_SMTP_HOST"),
        ({"NERVURE_SMTP_HOST": "mail.example.org\r\nX"}, "NERVURE_SMTP_HOST"),
        ({"NERVURE_SMTP_PORT": "0"}, "no port"),
        ({"NERVURE_SMTP_PORT": "smtp"}, "no port"),
        ({"NERVURE_SMTP_PORT": "70000"}, "no port"),
        ({"NERVURE_SMTP_USER": "me"}, "NERVURE_SMTP_FROM is no mail address"),
        ({"NERVURE_SMTP_FROM": "a@example.org\nBcc: b@example.org"}, "NERVURE_SMTP_FROM is no mail address"),
        ({"NERVURE_SMTP_USER": "", "NERVURE_SMTP_FROM": "a@example.org"}, "no user"),
    ],
)
def test_what_the_environment_lacks(change, why):
    with pytest.raises(UsageError, match=why) as error:
        Server.of(FULL | change)
    assert WORD not in str(error.value)


def test_a_password_of_the_keyring(monkeypatch):
    without = {name: value for name, value in FULL.items() if name != "NERVURE_SMTP_PASSWORD"}
    fake = types.ModuleType("keyring")
    fake.__spec__ = types.SimpleNamespace()
    fake.errors = types.SimpleNamespace(KeyringError=type("KeyringError", (Exception,), {}))
    fake.get_password = lambda service, user: {("nervure", "me@example.org"): WORD}.get((service, user))
    monkeypatch.setitem(sys.modules, "keyring", fake)
    assert Server.of(without).password == WORD
    with pytest.raises(UsageError, match=r"no password.*keyring set nervure other@"):
        Server.of(without | {"NERVURE_SMTP_USER": "other@example.org"})

    def locked(service, user):
        raise fake.errors.KeyringError("locked")

    fake.get_password = locked
    with pytest.raises(CouldNotRun, match="cannot be read.*locked"):
        Server.of(without)
    monkeypatch.delitem(sys.modules, "keyring")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="no password"):
        Server.of(without)
