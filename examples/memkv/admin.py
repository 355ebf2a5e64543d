"""Commands on the connection and on the server itself."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from examples.memkv import info, resp
from examples.memkv.commands import SYNTAX, Command, CommandError, Family, glob, integer_argument, run_subcommand
from examples.memkv.config import SettingError
from examples.memkv.persistence import SaveError
from examples.memkv.requests import Request
from examples.memkv.resp import Encodable, Set, Status
from examples.memkv.transactions import forget
from memsafe import PressureLevel, trim

if TYPE_CHECKING:
    from examples.memkv.connection import Connection

CONNECTION: Final = Family("connection")
SERVER: Final = Family("server")
_connection = CONNECTION.command
_server = SERVER.command

_NO_PASSWORD: Final = (
    "ERR AUTH <password> called without any password configured for the default user. "
    "Are you sure your configuration is correct?"
)
_WRONG_PASSWORD: Final = "WRONGPASS invalid username-password pair or user is disabled."
_PROTOCOLS: Final = (2, 3)


# ---- the connection


@_connection("ping", -1, "fast ping", "Answer PONG, or with the message")
def ping(client: Connection, request: Request) -> bytes:
    if len(request) > 2:
        raise CommandError("ERR wrong number of arguments for 'ping' command")
    return resp.bulk(request[1]) if len(request) == 2 else b"+PONG\r\n"


@_connection("echo", 2, "fast", "Answer with the message")
def echo(client: Connection, request: Request) -> bytes:
    return resp.bulk(request[1])


@_connection("select", 2, "fast", "Choose the database: there is number 0 only")
def select(client: Connection, request: Request) -> bytes:
    number = integer_argument(request[1])
    if not -(2**31) <= number < 2**31:
        raise CommandError("ERR value is out of range, value must between -2147483648 and 2147483647")
    if number != 0:
        raise CommandError("ERR DB index is out of range")
    return resp.OK


@_connection("auth", -2, "fast", "Authenticate; nobody has to")
def auth(client: Connection, request: Request) -> bytes:
    if len(request) > 3:
        raise CommandError(SYNTAX)
    if len(request) == 2:
        raise CommandError(_NO_PASSWORD)
    if request[1] != b"default":
        raise CommandError(_WRONG_PASSWORD)
    return resp.OK


@_connection("hello", -1, "fast", "Agree on the protocol, and introduce oneself")
def hello(client: Connection, request: Request) -> bytes:
    if len(request) > 1:
        protocol = integer_argument(request[1], "ERR Protocol version is not an integer or out of range")
        if protocol not in _PROTOCOLS:
            raise CommandError("NOPROTO unsupported protocol version")
        name = _hello_options(request)
        if name is not None:
            client.name = name
        client.speak(protocol)
    greeting: dict[str, Encodable] = {
        "server": "redis",
        "version": info.REDIS_VERSION,
        "proto": client.protocol,
        "id": client.id,
        "mode": "standalone",
        "role": "master",
        "modules": [],
    }
    return resp.encode(greeting, client.protocol)


def _hello_options(request: Request) -> bytes | None:
    name = None
    at = 2
    while at < len(request):
        option, left = request[at].upper(), len(request) - at - 1
        if option == b"AUTH" and left >= 2:
            if request[at + 1] != b"default":
                raise CommandError(_WRONG_PASSWORD)
            at += 3
        elif option == b"SETNAME" and left >= 1:
            name = _checked_name(request[at + 1])
            at += 2
        else:
            raise CommandError(f"ERR Syntax error in HELLO option '{request[at].decode('latin-1')}'")
    return name


@_connection("quit", -1, "fast", "Close the connection")
def quit_(client: Connection, request: Request) -> bytes:
    client.closing = True
    return resp.OK


@_connection("reset", 1, "fast", "Forget what the connection was told")
def reset(client: Connection, request: Request) -> bytes:
    client.name = b""
    client.speak(2)
    forget(client)
    return b"+RESET\r\n"


@_connection("client", -2, "", "Ask about connections, or name one's own")
def client_(client: Connection, request: Request) -> bytes:
    return run_subcommand(CONNECTION.commands[b"client"], client, request)


@_connection("client id", 2, "fast", "Return the connection's number")
def client_id(client: Connection, request: Request) -> bytes:
    return resp.integer(client.id)


@_connection("client getname", 2, "fast", "Return the connection's name")
def client_getname(client: Connection, request: Request) -> bytes:
    return resp.bulk_or_nil(client.name or None)


@_connection("client setname", 3, "fast", "Name the connection")
def client_setname(client: Connection, request: Request) -> bytes:
    client.name = _checked_name(request[2])
    return resp.OK


@_connection("client setinfo", 4, "fast", "Tell which library this is")
def client_setinfo(client: Connection, request: Request) -> bytes:
    attribute = request[2].upper()
    if attribute == b"LIB-NAME":
        client.lib_name = _checked_name(request[3], "lib-name")
    elif attribute == b"LIB-VER":
        client.lib_ver = _checked_name(request[3], "lib-ver")
    else:
        raise CommandError(f"ERR Unrecognized option '{request[2].decode('latin-1')}'")
    return resp.OK


def _checked_name(name: bytes, what: str = "Client names") -> bytes:
    if any(not 0x21 <= code <= 0x7E for code in name):
        verb = "" if what == "Client names" else " value"
        raise CommandError(f"ERR {what}{verb} cannot contain spaces, newlines or special characters.")
    return name


@_connection("client info", 2, "", "Describe this connection")
def client_info(client: Connection, request: Request) -> bytes:
    return resp.text(info.client_line(client) + "\n", client.protocol)


@_connection("client list", -2, "", "Describe all connections")
def client_list(client: Connection, request: Request) -> bytes:
    clients = list(client.server.connections.values())
    if len(request) > 2:
        option = request[2].upper()
        if option == b"TYPE" and len(request) == 4:
            kind = request[3].lower()
            if kind not in (b"normal", b"master", b"replica", b"slave", b"pubsub"):
                raise CommandError(f"ERR Unknown client type '{request[3].decode('latin-1')}'")
            clients = clients if kind == b"normal" else []
        elif option == b"ID" and len(request) > 3:
            ids = {integer_argument(word, "ERR Invalid client ID") for word in request[3:]}
            clients = [other for other in clients if other.id in ids]
        else:
            raise CommandError(SYNTAX)
    return resp.text("".join(info.client_line(other) + "\n" for other in clients), client.protocol)


@_connection("client kill", -3, "", "Close connections")
def client_kill(client: Connection, request: Request) -> bytes:
    connections = client.server.connections
    if len(request) == 3:
        found = [other for other in connections.values() if other.address == request[2].decode("latin-1")]
        if not found:
            raise CommandError("ERR No such client")
        reply = resp.OK
    elif len(request) == 4 and request[2].upper() == b"ID":
        other = connections.get(integer_argument(request[3], "ERR client-id should be greater than 0"))
        found = [other] if other is not None and other is not client else []
        reply = resp.integer(len(found))
    elif len(request) == 4 and request[2].upper() == b"ADDR":
        address = request[3].decode("latin-1")
        found = [other for other in connections.values() if other.address == address and other is not client]
        reply = resp.integer(len(found))
    else:
        raise CommandError(SYNTAX)
    for other in found:
        if other is client:
            client.closing = True
        else:
            other.close()
    return reply


def _on_or_off(client: Connection, request: Request) -> bytes:
    if request[2].lower() not in (b"on", b"off"):
        raise CommandError(SYNTAX)
    return resp.OK


_connection("client no-evict", 3, "", "Accepted: no connection is ever closed to make room")(_on_or_off)
_connection("client no-touch", 3, "fast", "Accepted, without effect")(_on_or_off)


# ---- what there is


@_server("command", -1, "", "Describe the commands")
def command_(client: Connection, request: Request) -> bytes:
    if len(request) > 1:
        return run_subcommand(SERVER.commands[b"command"], client, request)
    return resp.encode([_described(command) for command in client.server.commands.values()], client.protocol)


@_server("command count", 2, "", "Return how many commands there are")
def command_count(client: Connection, request: Request) -> bytes:
    return resp.integer(len(client.server.commands))


@_server("command list", -2, "", "Return the names of the commands")
def command_list(client: Connection, request: Request) -> bytes:
    if len(request) > 2:
        raise CommandError(SYNTAX)
    return resp.bulks(list(client.server.commands))


@_server("command info", -2, "", "Describe some commands")
def command_info(client: Connection, request: Request) -> bytes:
    commands = client.server.commands
    names = [name.lower() for name in request[2:]] or list(commands)
    described: list[Encodable] = [_described(commands[name]) if name in commands else None for name in names]
    return resp.encode(described, client.protocol)


@_server("command docs", -2, "", "Say what commands do")
def command_docs(client: Connection, request: Request) -> bytes:
    commands = client.server.commands
    names = [name.lower() for name in request[2:]] or list(commands)
    documented: dict[str, Encodable] = {
        commands[name].name: _documented(commands[name]) for name in names if name in commands
    }
    return resp.encode(documented, client.protocol)


@_server("command getkeys", -4, "", "Return which words of a command are keys")
def command_getkeys(client: Connection, request: Request) -> bytes:
    words = request[2:]
    command = client.server.commands.get(words[0].lower())
    if command is None:
        raise CommandError("ERR Invalid command specified")
    first, last, step = command.keys
    if not first:
        raise CommandError("ERR The command has no key arguments")
    if not command.accepts(len(words)):
        raise CommandError("ERR Invalid number of arguments specified for command")
    return resp.bulks(words[first : last + 1 if last >= 0 else len(words) + last + 1 : step])


def _described(command: Command) -> list[Encodable]:
    flags = Set([Status(flag) for flag in command.flags if flag != "ping"])
    categories = [command.group] + [flag for flag in ("fast", "write") if flag in command.flags]
    if "readonly" in command.flags:
        categories.append("read")
    if "fast" not in command.flags:
        categories.append("slow")
    return [
        command.name,
        command.arity,
        flags,
        *command.keys,
        Set([Status(f"@{category}") for category in categories]),
        [],
        [],
        [_described(subcommand) for subcommand in command.subcommands.values()],
    ]


def _documented(command: Command) -> dict[str, Encodable]:
    text: dict[str, Encodable] = {"summary": command.summary, "since": "1.0.0", "group": command.group}
    if command.subcommands:
        text["subcommands"] = {below.name: _documented(below) for below in command.subcommands.values()}
    return text


@_server("info", -1, "", "Tell how the server is")
def info_(client: Connection, request: Request) -> bytes:
    sections = [word.decode("latin-1").lower() for word in request[1:]]
    return resp.text(info.render(client.server, sections), client.protocol)


@_server("time", 1, "fast", "Return the time: seconds and microseconds")
def time_(client: Connection, request: Request) -> bytes:
    now_us = time.time_ns() // 1000
    return resp.bulks([b"%d" % part for part in divmod(now_us, 1_000_000)])


@_server("role", 1, "fast", "Return the role: master, without replicas")
def role(client: Connection, request: Request) -> bytes:
    return resp.encode(["master", 0, []], client.protocol)


@_server("memory", -2, "", "Tell of memory, or give it back")
def memory(client: Connection, request: Request) -> bytes:
    return run_subcommand(SERVER.commands[b"memory"], client, request)


@_server("memory usage", -3, "readonly", "Return what a key and its value are charged, in bytes", keys=(2, 2, 1))
def memory_usage(client: Connection, request: Request) -> bytes:
    if len(request) > 3:
        if len(request) != 5 or request[3].upper() != b"SAMPLES":
            raise CommandError(SYNTAX)
        if integer_argument(request[4]) < 0:
            raise CommandError(SYNTAX)
    used = client.store.memory_usage(request[2])
    return resp.NIL if used is None else resp.integer(used)


@_server("memory doctor", 2, "", "Tell who holds how much")
def memory_doctor(client: Connection, request: Request) -> bytes:
    return resp.text(str(client.server.budget.report()), client.protocol)


@_server("memory purge", 2, "", "Give free memory back to the kernel")
def memory_purge(client: Connection, request: Request) -> bytes:
    client.store.compact()
    trim()
    return resp.OK


@_server("debug", -2, "", "Hold a drill: DEBUG PRESSURE normal|low|critical")
def debug(client: Connection, request: Request) -> bytes:
    return run_subcommand(SERVER.commands[b"debug"], client, request)


@_server("debug pressure", 3, "", "Go to a level of memory pressure as if it were so")
def debug_pressure(client: Connection, request: Request) -> bytes:
    names = {level.name.encode(): level for level in PressureLevel}
    level = names.get(request[2].upper())
    if level is None:
        raise CommandError("ERR the level must be one of the following: normal, low, critical")
    # Not waited for: what the level changes here is done on this very loop.
    client.server.drill(level)
    return resp.OK


# ---- configuration


@_server("config", -2, "", "Ask for settings, or change them")
def config(client: Connection, request: Request) -> bytes:
    return run_subcommand(SERVER.commands[b"config"], client, request)


@_server("config get", -3, "", "Return the settings that match the patterns")
def config_get(client: Connection, request: Request) -> bytes:
    settings = client.server.settings
    accepts = [glob(pattern.lower()) for pattern in request[2:]]
    found: dict[str, Encodable] = {
        name: settings.show(name) for name in settings.names() if any(accept(name.encode()) for accept in accepts)
    }
    return resp.encode(found, client.protocol)


@_server("config set", -4, "", "Change settings, all or none")
def config_set(client: Connection, request: Request) -> bytes:
    if len(request) % 2:
        raise CommandError("ERR wrong number of arguments for 'config|set' command")
    server = client.server
    changes: dict[str, object] = {}
    seen: set[str] = set()
    for word, value in zip(request[2::2], request[3::2], strict=True):
        name = word.decode("latin-1").lower()
        shown = word.decode("latin-1")
        if name in seen:
            raise CommandError(f"ERR CONFIG SET failed (possibly related to argument '{shown}') - duplicate parameter")
        seen.add(name)
        try:
            change = server.settings.read(name, value.decode("latin-1"))
        except KeyError:
            raise CommandError(f"ERR Unknown option or number of arguments for CONFIG SET - '{shown}'") from None
        except SettingError as error:
            raise CommandError(f"ERR CONFIG SET failed (possibly related to argument '{shown}') - {error}") from None
        if change is not None:
            changes[change[0]] = change[1]
    server.configure(changes)
    return resp.OK


@_server("config resetstat", 2, "", "Count from zero again")
def config_resetstat(client: Connection, request: Request) -> bytes:
    client.server.reset_stats()
    return resp.OK


@_server("config rewrite", 2, "", "Refused: there is no configuration file")
def config_rewrite(client: Connection, request: Request) -> bytes:
    raise CommandError("ERR The server is running without a config file")


# ---- saving


@_server("save", 1, "", "Save now, while everybody waits")
def save(client: Connection, request: Request) -> bytes:
    try:
        client.server.persistence.save()
    except SaveError as error:
        raise CommandError(f"ERR {error}") from None
    return resp.OK


@_server("bgsave", -1, "", "Save in a forked child, if that is safe")
def bgsave(client: Connection, request: Request) -> bytes:
    if len(request) > 2 or (len(request) == 2 and request[1].upper() != b"SCHEDULE"):
        raise CommandError(SYNTAX)
    try:
        client.server.persistence.start()
    except SaveError as error:
        raise CommandError(f"ERR {error}") from None
    return b"+Background saving started\r\n"


@_server("lastsave", 1, "fast", "Return when the data was last saved, in seconds since 1970")
def lastsave(client: Connection, request: Request) -> bytes:
    return resp.integer(client.server.persistence.last_save_s)


@_server("shutdown", -1, "", "End the server, saved or not")
def shutdown(client: Connection, request: Request) -> bytes:
    words = [word.upper() for word in request[1:]]
    known = {b"SAVE", b"NOSAVE", b"NOW", b"FORCE", b"ABORT"}
    if not known.issuperset(words) or {b"SAVE", b"NOSAVE"}.issubset(words) or (b"ABORT" in words and len(words) > 1):
        raise CommandError(SYNTAX)
    if words == [b"ABORT"]:
        raise CommandError("ERR No shutdown in progress.")
    server = client.server
    wants = b"SAVE" in words or (bool(server.config.save_points) and b"NOSAVE" not in words)
    try:
        server.shut_down(save=wants)
    except SaveError:
        if b"FORCE" not in words:
            raise CommandError("ERR Errors trying to SHUTDOWN. Check logs.") from None
        server.stop()
    client.closing = True
    return b""
