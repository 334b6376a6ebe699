#!/usr/bin/env python3
"""Drive claude_lb.py with hostile vectors on loopback and judge what it does.

Four parts, each against a fresh proxy process in front of a scripted upstream that
lives in this process and reads every request head strictly:

    probe     Http11Probe's 189 malformed requests, scored as Http11Probe scores them
    replies   curl's 1,019 odd answers as upstream: always one well-formed answer,
              never a hang, never a second send of a request that may have been heard
    bodies    340 JSON texts and near misses, byte-exact at the upstream
    fuzz      mutations of valid requests over sockets, a third of which get through

*How the probe is mapped.*  A case says `Host: 127.0.0.1:18080`; the port becomes the
proxy's, which has five digits as well, so that no length changes.  `POST / ` becomes
`POST /v1/messages `: `/` takes no POST at the proxy, and a 405 would hide whether the
body's framing was understood; with the real route a good body comes back from the
upstream and a bad one has to be stopped on the way.  Everything else stays as it is.
The expected outcomes are in the vectors (status, closed or silent -> Pass, Warn,
Fail); where Http11Probe looks at fields or content as well, `PROBE_CHECKS` does.

*What replies allow.*  The proxy has many equal endpoints, so a second send is always
possible.  It is right only after an answer that says "not done" (401, 429, 500 ...)
or that nobody generated (a web page, a redirect), and wrong after garbage, silence
or a cut.  A cut answer to the client is right only
where the upstream's reply was cut.

Usage (needs the vectors in ../shared/vectors; without them it says so and exits 0):

    python3 .ci/vectors.py
    python3 .ci/vectors.py fuzz --seed 7 --mutations 20000
    python3 .ci/vectors.py probe --cmd 'python3 other_proxy.py {port} {upstream}'
"""

from __future__ import annotations

import argparse
import base64
import itertools
import json
import os
import random
import re
import shlex
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

# ============================================================================
# 1. CONSTANTS
# ============================================================================

ROOT = Path(__file__).resolve().parent.parent
VECTORS = ROOT.parent / "shared" / "vectors"

#: The host that the probe's cases were recorded with.
PROBE_HOST = b"127.0.0.1:18080"
#: Seconds that a probe case waits for an answer (Http11Probe's default).
PROBE_WAIT_S = 5.0
#: Scored cases that may fail: both expect 400 where a better code exists, 414 for
#: a method of 100,000 bytes and 413 for a Content-Length of 999,999,999.
PROBE_FAILS_MAX = 2

#: Seconds within which the client must have its whole answer (replies, bodies).
ANSWER_MAX_S = 5.0
#: Seconds that a scripted reply is held open in the variant that does not close.
REPLY_HOLD_S = 0.3
#: Equal endpoints of the replies part; each bad reply cools one or more of them.
REPLY_ENDPOINTS = 600
#: Replies per proxy process, so that the endpoints never run out.
REPLY_SLICE = 170
#: Share of the requests that may fail without having reached the upstream.
UNHEARD_MAX = 0.03
#: Most sends of one request, where the upstream's answer invites another.
SENDS_MAX = 4
#: Statuses after which the proxy may ask another endpoint.
REFUSALS = frozenset(
    {400, 401, 402, 403, 404, 429, 500, 502, 503, 521, 522, 523, 525, 526, 529}
)

#: Seconds after which no fuzzed connection may be without an answer or an end.
HANG_S = 12.0
#: Seconds of silence after which a mutation counts as incomplete and gets a FIN.
QUIET_S = 0.15
#: Share of the mutations that must reach the upstream for the run to mean anything.
REACH_MIN = 0.30
#: Share of the mutations that change values only, so that the request stays valid.
VALID_SHARE = 0.4
#: Seconds between two sends of one message, enough for the first to be read alone.
PAUSE_S = 0.002
#: Truncated heads that are left open, without FIN, to see the head deadline.
HELD_HEADS = 8
#: Kinds of failing cases printed per part.
SHOWN_MAX = 8

TOKEN = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+\Z")
FIELD_VALUE = re.compile(rb"[\t\x20-\x7e\x80-\xff]*\Z")
LENGTH = re.compile(rb"(0|[1-9][0-9]{0,18})\Z")
REQUEST_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+) (/[\x21-\x7e]*) HTTP/1\.1\Z")
STATUS_LINE = re.compile(rb"HTTP/1\.[01] ([1-5][0-9][0-9]) [\t\x20-\x7e\x80-\xff]*\Z")
FINAL_HEAD = re.compile(rb"(HTTP/1\.1 100 .*?\r\n\r\n)*HTTP/1\.[01] [2-5]", re.DOTALL)
VECTOR_ID = re.compile(rb"vector=([0-9]+)")

#: Request fields that must not pass the proxy.
KEPT_BACK = frozenset(
    {
        b"cookie",
        b"forwarded",
        b"origin",
        b"proxy-authorization",
        b"te",
        b"upgrade",
        b"x-forwarded-for",
    }
)

Fields = tuple[tuple[bytes, bytes], ...]

# ============================================================================
# 2. WIRE
# ============================================================================
#
# A strict HTTP/1.1 reader for both sides: what the upstream gets from the proxy
# and what the client gets from it.  It shares no code with either.


class MalformedError(Exception):
    """Bytes that are not HTTP/1.1."""


class CutError(Exception):
    """The connection ended inside a message."""


class EndedError(Exception):
    """The connection ended before the first byte of a message."""


class Wire:
    """One socket with the bytes that are read but not used yet; for one thread."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.buffer = b""
        self.deadline = 0.0

    def within(self, seconds: float) -> Wire:
        """Set the deadline of the reads that follow and return the wire."""
        self.deadline = time.monotonic() + seconds
        return self

    def fill(self) -> bool:
        """Read once into the buffer; False at the end of the stream.

        Raises: socket.timeout at the deadline.
        """
        left_s = self.deadline - time.monotonic()
        if left_s <= 0:
            raise socket.timeout
        self.sock.settimeout(left_s)
        try:
            got = self.sock.recv(262_144)
        except (ConnectionError, BrokenPipeError):
            return False
        self.buffer += got
        return bool(got)

    def until(self, mark: bytes, limit_bytes: int) -> bytes:
        """Take the bytes before `mark`, and drop the mark itself."""
        while mark not in self.buffer:
            if len(self.buffer) > limit_bytes:
                raise MalformedError(f"no {mark!r} in {limit_bytes} bytes")
            if not self.fill():
                raise CutError if self.buffer else EndedError
        taken, _, self.buffer = self.buffer.partition(mark)
        return taken

    def exactly(self, count_bytes: int) -> bytes:
        """Take `count_bytes` bytes."""
        while len(self.buffer) < count_bytes:
            if not self.fill():
                raise CutError
        taken, self.buffer = self.buffer[:count_bytes], self.buffer[count_bytes:]
        return taken

    def rest(self) -> bytes:
        """Take everything up to the end of the stream."""
        while self.fill():
            pass
        taken, self.buffer = self.buffer, b""
        return taken

    def close(self) -> None:
        """Close the socket."""
        self.sock.close()


def dial(port: int) -> Wire:
    """Connect to `port` on loopback."""
    sock = socket.create_connection(("127.0.0.1", port), timeout=HANG_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return Wire(sock)


def parse_fields(lines: list[bytes]) -> Fields:
    """Return the fields of a head, names in lower case.

    Raises: MalformedError for a bad name or value, CR and LF included.
    """
    fields = []
    for line in lines:
        name, colon, value = line.partition(b":")
        if not colon or not TOKEN.match(name):
            raise MalformedError(f"field name in {line[:80]!r}")
        if not FIELD_VALUE.match(value):
            raise MalformedError(f"field value in {line[:80]!r}")
        fields.append((name.lower(), value.strip(b" \t")))
    return tuple(fields)


def values(fields: Fields, name: bytes) -> list[bytes]:
    """Return the values of every field called `name`."""
    return [value for key, value in fields if key == name]


def body_length(fields: Fields) -> int | None:
    """Return the length in bytes, -1 for chunked, None if neither is stated.

    Raises: MalformedError unless at most one framing field with a sane value is there.
    """
    lengths = values(fields, b"content-length")
    codings = values(fields, b"transfer-encoding")
    if len(lengths) + len(codings) > 1:
        raise MalformedError(f"{len(lengths)} lengths, {len(codings)} codings")
    if codings and codings[0].lower() != b"chunked":
        raise MalformedError(f"transfer-encoding {codings[0]!r}")
    if lengths and not LENGTH.match(lengths[0]):
        raise MalformedError(f"content-length {lengths[0]!r}")
    if codings:
        return -1
    return int(lengths[0]) if lengths else None


def read_chunks(wire: Wire) -> bytes:
    """Read a chunked body up to and with its trailer section."""
    parts = []
    while True:
        size, _, _ = wire_line(wire).partition(b";")
        if not re.match(rb"[0-9A-Fa-f]{1,16}\Z", size):
            raise MalformedError(f"chunk size {size[:40]!r}")
        if int(size, 16) == 0:
            break
        parts.append(wire.exactly(int(size, 16)))
        if wire.exactly(2) != b"\r\n":
            raise MalformedError("chunk without CRLF")
    while True:
        line = wire_line(wire)
        if not line:
            return b"".join(parts)
        parse_fields([line])


def wire_line(wire: Wire) -> bytes:
    """Read one line inside a body; an end of the stream there is a cut."""
    try:
        return wire.until(b"\r\n", 65_536)
    except EndedError as error:
        raise CutError from error


@dataclass(frozen=True)
class Answer:
    """One final answer as the client got it.

    `whole` is False where the connection ended inside the body; `ends` tells that
    the connection cannot carry another request.
    """

    status: int
    fields: Fields
    body: bytes
    whole: bool
    ends: bool


def read_answer(wire: Wire, method: str) -> Answer:
    """Read interim answers and one final answer to a request with `method`.

    Raises: MalformedError, EndedError (no byte came), CutError (inside the head),
    socket.timeout at the wire's deadline.
    """
    while True:
        lines = wire.until(b"\r\n\r\n", 1_048_576).split(b"\r\n")
        match = STATUS_LINE.match(lines[0])
        if match is None:
            raise MalformedError(f"status line {lines[0][:80]!r}")
        status, fields = int(match[1]), parse_fields(lines[1:])
        if status == 101:
            raise MalformedError("101 that nobody asked for")
        if status >= 200:
            break
    length = body_length(fields)
    connection = b",".join(values(fields, b"connection")).lower()
    ends = b"close" in connection or length is None or b"HTTP/1.0" in lines[0]
    if method == "HEAD" or status in {204, 304}:
        return Answer(status, fields, b"", whole=True, ends=b"close" in connection)
    try:
        if length is None:
            body = wire.rest()
        else:
            body = read_chunks(wire) if length < 0 else wire.exactly(length)
    except CutError:
        return Answer(status, fields, wire.buffer, whole=False, ends=True)
    return Answer(status, fields, body, whole=True, ends=ends)


# ============================================================================
# 3. UPSTREAM
# ============================================================================


@dataclass(frozen=True)
class Seen:
    """One request as the upstream read it; `vector` is its number, -1 if none."""

    method: str
    target: bytes
    fields: Fields
    body: bytes
    vector: int


class Reply(NamedTuple):
    """What to answer: the bytes, and seconds until the close; None keeps alive.

    With `split` the answer comes in two sends, the first of that many bytes.
    """

    payload: bytes
    close_after_s: float | None = None
    split: int = 0


def ok_reply(seen: Seen) -> Reply:
    """Answer 200 with a small message that repeats the request's body."""
    echo = seen.body[:4096].decode("latin-1")
    message = {
        "id": "msg_vectors",
        "type": "message",
        "role": "assistant",
        "model": "claude-vectors",
        "content": [{"type": "text", "text": echo}],
        "stop_reason": "end_turn",
        "usage": {"input_tokens": 1, "output_tokens": 1},
    }
    body = json.dumps(message).encode()
    head = (
        b"HTTP/1.1 200 OK\r\nDate: Sun, 06 Nov 1994 08:49:37 GMT\r\n"
        b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
    )
    return Reply(head if seen.method == "HEAD" else head + body)


def check_head(method: str, fields: Fields) -> None:
    """Raise MalformedError if a proxy must not send such a request head."""
    if len(values(fields, b"host")) != 1:
        raise MalformedError(f"{len(values(fields, b'host'))} Host fields")
    if body_length(fields) is None and method == "POST":
        raise MalformedError("POST without a framing field")
    leaked = KEPT_BACK.intersection(name for name, _ in fields)
    if leaked:
        raise MalformedError(f"fields that end at the proxy: {sorted(leaked)}")


BAD_REQUEST = b"HTTP/1.1 400 Bad\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class Upstream:
    """A scripted server on loopback that reads strictly and keeps account.

    `script` turns a request into a reply and runs in the connection's thread.
    `problems` are the malformed requests, `counts` the requests per vector number.
    """

    def __init__(self, script: Callable[[Seen], Reply] = ok_reply) -> None:
        self.script = script
        self.problems: list[str] = []
        self.counts: Counter[int] = Counter()
        self.total = 0
        self._lock = threading.Lock()  # guards problems, counts, total
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        wire = Wire(sock)
        try:
            while self._serve_one(wire):
                pass
        except (CutError, EndedError, OSError):
            pass
        finally:
            wire.close()

    def _serve_one(self, wire: Wire) -> bool:
        """Serve one request; False where the connection is to be closed."""
        head = wire.within(300).until(b"\r\n\r\n", 1_048_576)
        try:
            seen = self._read(wire, head)
        except MalformedError as error:
            with self._lock:
                self.problems.append(f"{error}; head {head[:600]!r}")
            wire.sock.sendall(BAD_REQUEST)
            return False
        with self._lock:
            self.total += 1
            self.counts[seen.vector] += 1
        reply = self.script(seen)
        if reply.split:
            wire.sock.sendall(reply.payload[: reply.split])
            time.sleep(PAUSE_S)
        wire.sock.sendall(reply.payload[reply.split :])
        if reply.close_after_s is not None:
            time.sleep(reply.close_after_s)
        return reply.close_after_s is None

    def _read(self, wire: Wire, head: bytes) -> Seen:
        lines = head.split(b"\r\n")
        match = REQUEST_LINE.match(lines[0])
        if match is None:
            raise MalformedError("request line")
        method, fields = match[1].decode(), parse_fields(lines[1:])
        check_head(method, fields)
        length = body_length(fields) or 0
        body = read_chunks(wire) if length < 0 else wire.exactly(length)
        if wire.buffer:
            raise MalformedError(f"bytes after the request: {wire.buffer[:80]!r}")
        number = VECTOR_ID.search(match[2])
        return Seen(method, match[2], fields, body, int(number[1]) if number else -1)

    def close(self) -> None:
        """Stop taking connections; running ones end with the process."""
        self._listener.close()


# ============================================================================
# 4. PROXY
# ============================================================================


@dataclass(frozen=True)
class Options:
    """The command line: `seed` of the fuzzer, its size, another proxy's command."""

    seed: int
    mutations: int
    command: str


def free_port() -> int:
    """Return a free port with five digits."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port: int = probe.getsockname()[1]
        if port >= 10_000:
            return port


def config_text(upstream_port: int, endpoints: int) -> str:
    """Return a configuration with `endpoints` equal endpoints at one upstream."""
    base = f"http://127.0.0.1:{upstream_port}"
    listed = [
        {
            "name": f"up{index}",
            "baseURL": base if endpoints == 1 else f"{base}/e{index}",
            "authToken": f"sk-ant-vectors-{index:022}",
        }
        for index in range(endpoints)
    ]
    config = {
        "endpoints": listed,
        "log": {"format": "json", "level": "info"},
        "timeouts": {"connect": 2, "firstByte": 3, "idle": 3},
    }
    return json.dumps(config)


class Proxy:
    """The proxy under test as a process; a context manager that starts and stops it."""

    def __init__(self, options: Options, upstream: Upstream, endpoints: int = 1):
        self.port = free_port()
        self._folder = tempfile.TemporaryDirectory(prefix="vectors-")
        home = Path(self._folder.name)
        config = home / "endpoints.json"
        config.write_text(config_text(upstream.port, endpoints), encoding="utf-8")
        config.chmod(0o600)
        command = options.command.format(
            port=self.port, upstream=upstream.port, config=config
        )
        self._log = home / "stderr"
        homes = ("HOME", "XDG_STATE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME")
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                shlex.split(command),
                stdout=log,
                stderr=log,
                cwd=ROOT,
                env={**os.environ, **dict.fromkeys(homes, str(home))},
            )

    def __enter__(self) -> Proxy:
        """Wait until the proxy serves."""
        until = time.monotonic() + 15
        while self.health() is None:
            if time.monotonic() > until or self._process.poll() is not None:
                text = self.log()[-2000:]
                self.__exit__()
                raise SystemExit(f"the proxy does not serve:\n{text}")
            time.sleep(0.05)
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the proxy: politely, after 5 s by force."""
        self._process.terminate()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._folder.cleanup()

    def health(self) -> int | None:
        """Return the status of GET /health, None without a well-formed answer."""
        try:
            wire = dial(self.port).within(ANSWER_MAX_S)
        except OSError:
            return None
        head = f"GET /health HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\n\r\n"
        try:
            wire.sock.sendall(head.encode())
            return read_answer(wire, "GET").status
        except (MalformedError, CutError, EndedError, OSError):
            return None
        finally:
            wire.close()

    def log(self) -> str:
        """Return what the proxy has written so far."""
        return self._log.read_text(encoding="utf-8", errors="replace")

    def problems(self) -> list[Problem]:
        """Return what is wrong with the process after a part."""
        found = []
        text = self.log()
        count = text.count("Traceback")
        if count:
            first = text[text.find("Traceback") :][:6000].replace("\\n", "\n")
            last = re.split(r'"}|\n{', first)[0][-900:]
            got = f"{count}, the first ends with\n{last}"
            found.append(Problem("log", b"", "no traceback", got))
        broken = [line for line in text.splitlines() if is_broken_json(line)]
        if broken:
            found.append(Problem("log", b"", "a JSON object per line", broken[0][:300]))
        status = self._process.poll()
        if status is not None:
            found.append(Problem("process", b"", "alive", f"exit {status}"))
        elif self.health() is None:
            found.append(Problem("GET /health", b"", "an answer", "none"))
        return found


def is_broken_json(line: str) -> bool:
    """Tell whether a line begins as a JSON object and is none."""
    if not line.startswith("{"):
        return False
    try:
        json.loads(line)
    except ValueError:
        return True
    return False


@dataclass(frozen=True)
class Problem:
    """A failed case: its name, the bytes sent, what should have come and what came."""

    name: str
    sent: bytes
    expected: str
    got: str

    def __str__(self) -> str:
        """Return the lines that tell it."""
        sent = repr(self.sent[:300])[1:]
        if len(self.sent) > 300:
            sent += f" ... ({len(self.sent)} bytes)"
        tell = f"  {self.name}\n    expected {self.expected}\n    got      {self.got}"
        return f"{tell}\n    sent     {sent}" if self.sent else tell


def show(problems: list[Problem]) -> None:
    """Print the first problem of each kind, with how many more of it there are."""
    kinds: dict[str, list[Problem]] = {}
    for problem in problems:
        kind = re.sub(r"[0-9]+|'.*", "", problem.got.splitlines()[0])[:40]
        kinds.setdefault(kind, []).append(problem)
    for found in list(kinds.values())[:SHOWN_MAX]:
        print(found[0])
        if len(found) > 1:
            print(f"    and {len(found) - 1} more of this kind")
    if len(kinds) > SHOWN_MAX:
        print(f"  ... and {len(kinds) - SHOWN_MAX} more kinds")


def load(name: str) -> list[dict[str, Any]]:
    """Return the records of one vector file."""
    text = (VECTORS / f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


# ============================================================================
# 5. PROBE
# ============================================================================
#
# Http11Probe's own way of looking: read until a head is complete, take what follows
# within a moment, then see whether the connection is closed.


@dataclass(frozen=True)
class Observed:
    """What came back: the bytes, and the state Open, ClosedByServer or TimedOut."""

    raw: bytes
    state: str

    def statuses(self) -> list[int]:
        """Return the code of every status line, whatever the framing."""
        return [int(s) for s in re.findall(rb"HTTP/1\.[01] ([0-9]{3})[ \r]", self.raw)]

    def status(self, *, interim: bool = False) -> int | None:
        """Return the first code; 100 Continue is passed over unless `interim`."""
        found = [s for s in self.statuses() if interim or s != 100]
        return found[0] if found else None

    def field(self, name: str) -> str | None:
        """Return the value of a field in the first head."""
        head = self.raw.split(b"\r\n\r\n")[0].decode("latin-1")
        match = re.search(rf"(?im)^{name}:[ \t]*(.*?)[ \t]*\r?$", head)
        return match[1] if match else None

    def body(self) -> bytes:
        """Return what follows the first head."""
        return self.raw.partition(b"\r\n\r\n")[2]


class ProbeResult(NamedTuple):
    """One case with its verdict and, for the table, what came."""

    case: dict[str, Any]
    verdict: str
    got: str
    sent: bytes


def observe(wire: Wire, payload: bytes) -> Observed:
    """Send `payload` and look at the answer."""
    try:
        wire.sock.settimeout(PROBE_WAIT_S)
        wire.sock.sendall(payload)
    except OSError:
        pass  # refused early; the answer is on its way all the same
    wire.within(PROBE_WAIT_S)
    state = "Open"
    try:
        while b"\r\n\r\n" not in wire.buffer and wire.fill():
            pass
        wire.within(PROBE_WAIT_S if b"\r\n\r\n" not in wire.buffer else 0.4)
        while wire.fill():
            pass
        state = "ClosedByServer"
    except socket.timeout:
        state = "Open" if wire.buffer else "TimedOut"
    raw, wire.buffer = wire.buffer, b""
    return Observed(raw, state)


def is_success(status: int | None) -> bool:
    """Tell a 2xx."""
    return status is not None and 200 <= status < 300


def needs_echo(text: str) -> Callable[[Observed], str | None]:
    """Return a check for 2xx with the upstream's copy of the body."""

    def check(seen: Observed) -> str | None:
        if not is_success(seen.status()):
            return None
        return "Pass" if f'"{text}"'.encode() in seen.body() else "Fail"

    return check


def needs_field(name: str, otherwise: str) -> Callable[[Observed], str | None]:
    """Return a check for 2xx with a field, `otherwise` without it."""

    def check(seen: Observed) -> str | None:
        if not is_success(seen.status()):
            return None
        return "Pass" if seen.field(name) else otherwise

    return check


def needs_close(otherwise: str) -> Callable[[Observed], str | None]:
    """Return a check for 2xx and a closed connection."""

    def check(seen: Observed) -> str | None:
        if not is_success(seen.status()):
            return None
        return "Pass" if seen.state == "ClosedByServer" else otherwise

    return check


def check_allow(seen: Observed) -> str | None:
    """Judge a 405 by its Allow field."""
    if seen.status() != 405:
        return None
    return "Pass" if seen.field("allow") else "Fail"


def check_bare_204(seen: Observed) -> str | None:
    """Judge a 204, which has no Content-Length."""
    return "Fail" if seen.status() == 204 and seen.field("content-length") else None


def check_head_body(seen: Observed) -> str | None:
    """Judge an answer to HEAD, which has no content."""
    return "Fail" if is_success(seen.status()) and seen.body() else None


def check_no_interim(seen: Observed) -> str | None:
    """Judge an answer to HTTP/1.0, which has no 1xx before it."""
    status = seen.status(interim=True)
    return "Fail" if status is not None and status < 200 else None


def check_date(seen: Observed) -> str | None:
    """Judge the form of Date (IMF-fixdate)."""
    if not is_success(seen.status()):
        return None
    form = r"[A-Z][a-z]{2}, \d\d [A-Z][a-z]{2} \d{4} \d\d:\d\d:\d\d GMT"
    return "Pass" if re.fullmatch(form, seen.field("date") or "") else "Warn"


#: Where Http11Probe looks at more than the status; None falls back to the vectors.
PROBE_CHECKS: dict[str, Callable[[Observed], str | None]] = {
    "COMP-POST-CL-BODY": needs_echo("hello"),
    "COMP-CHUNKED-BODY": needs_echo("hello"),
    "COMP-CHUNKED-MULTI": needs_echo("hello world"),
    "COMP-CHUNKED-EXTENSION": needs_echo("hello"),
    "COMP-CHUNKED-TRAILER-VALID": needs_echo("hello"),
    "COMP-CHUNKED-HEX-UPPERCASE": needs_echo("helloworld"),
    "COMP-CONNECTION-CLOSE": needs_close("Fail"),
    "COMP-HTTP10-DEFAULT-CLOSE": needs_close("Warn"),
    "COMP-405-ALLOW": check_allow,
    "COMP-DATE-HEADER": needs_field("date", "Fail"),
    "COMP-DATE-FORMAT": check_date,
    "COMP-NO-CL-IN-204": check_bare_204,
    "COMP-OPTIONS-ALLOW": needs_field("allow", "Warn"),
    "COMP-CONTENT-TYPE": needs_field("content-type", "Warn"),
    "COMP-HEAD-NO-BODY": check_head_body,
    "COMP-NO-1XX-HTTP10": check_no_interim,
}


def adapt(encoded: str, port: int) -> bytes:
    """Return a case's bytes for the proxy at `port`; see the module's docstring."""
    payload = base64.b64decode(encoded).replace(PROBE_HOST, b"127.0.0.1:%d" % port)
    return re.sub(rb"\APOST / ", b"POST /v1/messages ", payload)


def judge_single(case: dict[str, Any], seen: Observed) -> str:
    """Return the verdict of a case with one request."""
    check = PROBE_CHECKS.get(case["id"])
    verdict = check(seen) if check else None
    if verdict:
        return verdict
    outcomes: dict[str, str] = case["outcomes"]
    status = seen.status()
    if status is None:
        return outcomes.get(seen.state, "Fail")
    # A code that the vectors do not list counts as the commonest of its class.
    common = {1: "100", 2: "200", 3: "304", 4: "403", 5: "502"}
    return outcomes.get(str(status)) or outcomes[common.get(status // 100, "502")]


def judge_steps(case: dict[str, Any], seen: list[Observed]) -> str:
    """Return the verdict of a case with one or two requests on one connection.

    The vectors know 200, 400 and no answer for the first, those and 501 for the
    second.  Another first code counts as 200, which every desync case takes for
    "accepted", the stricter reading.  Two answers to one poisoned request are the
    smuggling itself and fail always.
    """
    first = seen[0]
    if "SMUGGLED" in case["id"] and len([s for s in first.statuses() if s != 100]) > 1:
        return "Fail"
    outcomes: dict[str, str] = case["outcomes"]
    start = step_name(first.status(), "200")
    if first.state == "ClosedByServer":
        return outcomes[f"{start}|ClosedByServer|-"]
    last = step_name(seen[1].status(), "501") if len(seen) > 1 else "null"
    return outcomes[f"{start}|Open|{last}"]


def step_name(status: int | None, other: str) -> str:
    """Return how the vectors call a step's code, `other` for one they do not list."""
    if is_success(status):
        return "200"
    return {None: "null", 400: "400"}.get(status, other)


def run_probe_case(case: dict[str, Any], port: int) -> ProbeResult:
    """Play one case on a connection of its own."""
    wire = dial(port)
    single = [[{"b64": case["b64"]}]] if "b64" in case else case["steps"]
    sent = b""
    seen: list[Observed] = []
    try:
        for step in single:
            payload = b"".join(adapt(part["b64"], port) for part in step)
            sent += payload
            seen.append(observe(wire, payload))
            if seen[-1].state == "ClosedByServer":
                break
    finally:
        wire.close()
    verdict = judge_single(case, seen[0]) if "b64" in case else judge_steps(case, seen)
    got = ", ".join(f"{one.statuses() or 'nothing'} {one.state}" for one in seen)
    return ProbeResult(case, verdict, got, sent)


def run_probe(options: Options) -> bool:
    """Play Http11Probe's cases; True if at most PROBE_FAILS_MAX scored ones fail."""
    upstream = Upstream()
    cases = load("http11probe")
    with Proxy(options, upstream) as proxy, ThreadPoolExecutor(16) as threads:
        results = list(threads.map(lambda c: run_probe_case(c, proxy.port), cases))
        problems = proxy.problems()
    upstream.close()
    problems += [Problem("upstream", b"", "strict heads", p) for p in upstream.problems]
    for scored in (True, False):
        counts = Counter(r.verdict for r in results if r.case["scored"] is scored)
        label = "scored" if scored else "unscored"
        print(f"  {label}: " + ", ".join(f"{n} {v}" for v, n in counts.most_common()))
    fails = [r for r in results if r.verdict == "Fail" and r.case["scored"]]
    for result in fails:
        outcomes = result.case["outcomes"]
        passing = " ".join(key for key in outcomes if outcomes[key] == "Pass")
        print(Problem(result.case["id"], result.sent, passing, result.got))
    for result in results:
        if result.verdict == "Fail" and not result.case["scored"]:
            print(f"  unscored {result.case['id']}: {result.got}")
    show(problems)
    print(f"probe: {len(results)} cases, {len(fails)} scored fails")
    return len(fails) <= PROBE_FAILS_MAX and not problems


# ============================================================================
# 6. REPLIES
# ============================================================================


@dataclass(frozen=True)
class Script:
    """One scripted reply: its number, the request's method and how the reply ends."""

    number: int
    name: str
    reply: bytes
    method: str
    hold_s: float


class Sketch(NamedTuple):
    """A forgiving view of a reply.

    `status` is the final one, 0 if there is none.  `whole` is True for a reply that
    every reader finds complete, False for one that is cut, and None where a strict
    reader may stop and a forgiving one go on: broken chunks.  `body` is what a whole
    reply that is not chunked brings.
    """

    status: int
    whole: bool | None
    body: bytes | None = None


def sketch(reply: bytes) -> Sketch:
    """Return what a forgiving reader makes of `reply`."""
    status = 0
    while True:
        parts = re.split(rb"\r?\n\r?\n", reply, maxsplit=1)
        match = re.match(rb"HTTP/[0-9.]+ +([0-9]{3})(?![0-9])", reply)
        status = int(match[1]) if match else 0
        if len(parts) < 2:
            return Sketch(status, whole=False)
        if not 100 <= status < 200 or status == 101:
            break
        reply = parts[1]
    head, body = parts
    if status in {204, 304}:
        return Sketch(status, whole=True, body=b"")
    if re.search(rb"(?im)^transfer-encoding:.*chunked", head):
        return Sketch(status, whole=judge_chunks(body))
    lengths = set(re.findall(rb"(?im)^content-length:[ \t]*([^\r\n]*)", head))
    if not all(re.fullmatch(rb"[0-9]+", length) for length in lengths):
        return Sketch(status, whole=False)
    longest = max(map(int, lengths), default=0)
    if len(body) < longest:
        return Sketch(status, whole=False)
    return Sketch(status, whole=True, body=body[:longest] if lengths else body)


def judge_chunks(body: bytes) -> bool | None:
    """Return whether a chunked body is whole, None if only with good will."""
    strict = rb"(?s)([0-9A-Fa-f]+)(?:;[^\r\n]*)?\r\n"
    loose = rb"(?s)([0-9A-Fa-f]+)[^\n]*\n"
    if chunks_end(body, strict, b"\r\n", rb"([^\r\n:]+:[^\r\n]*\r\n)*\r\n"):
        return True
    return None if chunks_end(body, loose, b"", rb"(.*\n)?\r?\n") else False


def chunks_end(body: bytes, line: bytes, after: bytes, trailer: bytes) -> bool:
    """Tell whether a chunked body gets to its end.

    `line` matches a chunk line with the size as its group, `trailer` what follows
    the last one, `after` follows every chunk; empty: any line end, or none.
    """
    while True:
        match = re.match(line, body)
        if match is None:
            return False
        size, body = int(match[1], 16), body[match.end() :]
        if size == 0:
            return bool(re.match(b"(?s)" + trailer, body))
        body = body[size:]
        if after and not body.startswith(after):
            return False
        body = body[len(after) :] if after else body.lstrip(b"\r\n")


def mend(reply: bytes) -> bytes:
    """Return `reply` with CRLF in its first head and text/html called text/json.

    Many replies fail at the first bare LF, and a web page is refused unread; mended
    they test what comes after that.
    """
    parts = re.split(rb"(?<=\n)\r?\n", reply, maxsplit=1)
    if len(parts) < 2:
        return reply
    head = re.sub(rb"\r?\n", b"\r\n", parts[0]).replace(b"text/html", b"text/json")
    return head + b"\r\n" + parts[1]


def reply_scripts() -> list[Script]:
    """Return every reply after a POST, every fifth after a GET, and the mended ones.

    Every third is held open for a moment.
    """
    replies = [(r["name"], base64.b64decode(r["b64"])) for r in load("curl_replies")]
    rows = [(name, reply, "POST") for name, reply in replies]
    rows += [(name, reply, "GET") for name, reply in replies[::5]]
    for name, reply in replies:
        mended = mend(reply)
        if mended != reply:
            rows.append((f"{name}, mended", mended, "POST"))
    return [
        Script(number, *row, REPLY_HOLD_S if number % 3 == 2 else 0.0)
        for number, row in enumerate(rows)
    ]


def request_for(script: Script, port: int) -> bytes:
    """Return the request that draws a scripted reply."""
    path = "/v1/messages" if script.method == "POST" else "/v1/skills"
    head = (
        f"{script.method} {path}?vector={script.number} HTTP/1.1\r\n"
        f"Host: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
    )
    if script.method == "GET":
        return f"{head}\r\n".encode()
    body = json.dumps(
        {
            "model": "claude-vectors",
            "max_tokens": 1,
            "messages": [{"role": "user", "content": script.name}],
        }
    )
    return f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode()


def judge_reply(script: Script, answer: Answer) -> str:
    """Return what is wrong with the answer to a scripted reply, or nothing."""
    status, whole, body = sketch(script.reply)
    if not answer.whole and whole is True:
        return f"{answer.status}, cut, though the reply is whole"
    if answer.whole and whole is False and answer.status < 500:
        return f"{answer.status}, ended cleanly, though the reply is cut"
    if answer.status in {500, 504} and status != answer.status:
        return f"{answer.status} of the proxy's own"
    relayed = is_success(status) and status == answer.status
    if relayed and answer.whole and body is not None and answer.body != body:
        return f"{status}, other bytes: {answer.body[:80]!r}"
    return ""


class ReplyClient:
    """One client thread's connection to the proxy, kept alive where it may be."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._wire: Wire | None = None

    def play(self, script: Script) -> Problem | None:
        """Send the request of `script` and judge the answer."""
        payload = request_for(script, self._port)
        wire = self._wire or dial(self._port)
        self._wire = None
        try:
            wire.sock.sendall(payload)
            answer = read_answer(wire.within(ANSWER_MAX_S), script.method)
            wrong = judge_reply(script, answer)
            if wire.buffer and answer.whole and not wrong:
                wrong = f"bytes after the answer: {wire.buffer[:80]!r}"
        except socket.timeout:
            answer, wrong = None, f"no answer in {ANSWER_MAX_S} s"
        except EndedError:
            answer, wrong = None, "closed without an answer"
        except (MalformedError, CutError) as error:
            answer, wrong = None, f"{type(error).__name__} {error}"
        except OSError as error:
            answer, wrong = None, f"{error}"
        if answer is None or answer.ends or wrong:
            wire.close()
        else:
            self._wire = wire
        if not wrong:
            return None
        name = f"{script.name} after {script.method}, {script.hold_s} s open"
        return Problem(name, script.reply, "one well-formed answer", wrong)

    def close(self) -> None:
        """Close the connection that is kept."""
        if self._wire is not None:
            self._wire.close()


def judge_sends(scripts: list[Script], counts: Counter[int]) -> list[Problem]:
    """Judge how often the upstream got each request.

    Here and there one may be lost on a pooled connection that the upstream is
    closing at that moment: the proxy must not send it again, so it fails.
    """
    problems = []
    for script in scripts:
        sends = counts[script.number]
        status, head = sketch(script.reply).status, script.reply.lower()[:4096]
        page = b"text/html" in head or 300 <= (status or 0) < 400
        allowed = SENDS_MAX if page or status in REFUSALS else 1
        if sends > allowed:
            name = f"{script.name} after {script.method}"
            wanted = f"{allowed} sends at most"
            problems.append(Problem(name, script.reply, wanted, f"{sends} sends"))
    unheard = len([script for script in scripts if not counts[script.number]])
    if unheard > len(scripts) * UNHEARD_MAX:
        wanted = f"{UNHEARD_MAX:.0%} at most not sent"
        problems.append(Problem("sends", b"", wanted, f"{unheard} not sent"))
    return problems


def play_replies(options: Options, scripts: list[Script]) -> list[Problem]:
    """Play `scripts` against one proxy process with many clients."""
    table = {script.number: script for script in scripts}

    def answer(seen: Seen) -> Reply:
        script = table.get(seen.vector)
        return Reply(script.reply, script.hold_s) if script else ok_reply(seen)

    upstream = Upstream(answer)
    threads = 32
    with Proxy(options, upstream, REPLY_ENDPOINTS) as proxy:

        def work(first: int) -> list[Problem | None]:
            client = ReplyClient(proxy.port)
            try:
                return [client.play(script) for script in scripts[first::threads]]
            finally:
                client.close()

        with ThreadPoolExecutor(threads) as pool:
            found = list(itertools.chain(*pool.map(work, range(threads))))
        problems = proxy.problems()
    upstream.close()
    problems += judge_sends(scripts, upstream.counts)
    problems += [Problem("upstream", b"", "strict heads", p) for p in upstream.problems]
    return problems + [problem for problem in found if problem]


def run_replies(options: Options) -> bool:
    """Play curl's replies as upstream; True if nothing is wrong."""
    start = time.monotonic()
    scripts = reply_scripts()
    problems: list[Problem] = []
    for first in range(0, len(scripts), REPLY_SLICE):
        problems += play_replies(options, scripts[first : first + REPLY_SLICE])
    show(problems)
    took_s = time.monotonic() - start
    print(
        f"replies: {len(load('curl_replies'))} replies, {len(scripts)} exchanges, "
        f"{len(problems)} problems, {took_s:.0f} s"
    )
    return not problems


# ============================================================================
# 7. BODIES
# ============================================================================


def body_request(number: int, body: bytes, port: int, *, chunked: bool) -> bytes:
    """Return a POST of `body`, in one piece or in chunks of at most 1,000 bytes."""
    head = b"POST /v1/messages?vector=%d HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n" % (
        number,
        port,
    )
    head += b"Content-Type: application/json\r\n"
    if not chunked:
        return head + b"Content-Length: %d\r\n\r\n" % len(body) + body
    pieces = [body[at : at + 1000] for at in range(0, len(body), 1000)]
    framed = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)
    return head + b"Transfer-Encoding: chunked\r\n\r\n" + framed + b"0\r\n\r\n"


def run_bodies(options: Options) -> bool:
    """Send the JSON bodies in both framings; True if all arrive byte for byte."""
    records = load("json_bodies")
    bodies = [base64.b64decode(record["b64"]) for record in records]
    arrived: dict[int, bytes] = {}

    def answer(seen: Seen) -> Reply:
        arrived[seen.vector] = seen.body
        return ok_reply(seen)

    def play(number: int) -> str:
        body = bodies[number // 2]
        wire = dial(proxy.port)
        try:
            wire.sock.sendall(
                body_request(number, body, proxy.port, chunked=number % 2 == 1)
            )
            status = read_answer(wire.within(ANSWER_MAX_S), "POST").status
        except (MalformedError, CutError, EndedError, OSError) as error:
            return f"{type(error).__name__} {error}"
        finally:
            wire.close()
        if arrived.get(number) != body:
            return f"{status}, other bytes: {arrived.get(number, b'none')[:80]!r}"
        return "" if status == 200 else f"{status}"

    upstream = Upstream(answer)
    with Proxy(options, upstream) as proxy, ThreadPoolExecutor(8) as threads:
        wrong = list(threads.map(play, range(2 * len(bodies))))
        problems = proxy.problems()
    upstream.close()
    problems += [Problem("upstream", b"", "strict heads", p) for p in upstream.problems]
    problems += [
        Problem(
            f"{records[number // 2]['name']}, {'chunked' if number % 2 else 'length'}",
            bodies[number // 2],
            "200, byte-exact",
            text,
        )
        for number, text in enumerate(wrong)
        if text
    ]
    show(problems)
    print(f"bodies: {len(bodies)} bodies in 2 framings, {len(problems)} problems")
    return not problems


# ============================================================================
# 8. FUZZ
# ============================================================================
#
# Every case comes from its own generator, seeded with the run's seed and its number.
# A soft case changes values only and stays valid; a hard one changes bytes anywhere.


@dataclass(frozen=True)
class Draft:
    """A valid request before it is mutated.

    `sizes` are chunk sizes; without any, the length is stated.  `framing` turns the
    name of that field, `gap` stands before and after its value.
    """

    method: bytes
    target: bytes
    fields: Fields
    body: bytes = b""
    sizes: tuple[int, ...] = ()
    trailer: bytes = b""
    framing: Callable[[bytes], bytes] = bytes.title
    gap: tuple[bytes, bytes] = (b" ", b"")

    def render(self) -> bytes:
        """Return the request's bytes."""
        lines = [b"%s %s HTTP/1.1" % (self.method, self.target)]
        lines += [name + b":" + value for name, value in self.fields]
        if not self.sizes:
            if self.method == b"POST":
                lines.append(self._frame(b"content-length", b"%d" % len(self.body)))
            return b"\r\n".join(lines) + b"\r\n\r\n" + self.body
        lines.append(self._frame(b"transfer-encoding", b"chunked"))
        pieces = []
        left = self.body
        for size in (*self.sizes, len(self.body)):
            piece, left = left[:size], left[size:]
            if piece:
                pieces.append(b"%x\r\n%s\r\n" % (len(piece), piece))
        framed = b"".join(pieces) + b"0\r\n" + self.trailer
        return b"\r\n".join(lines) + b"\r\n\r\n" + framed + b"\r\n"

    def _frame(self, name: bytes, value: bytes) -> bytes:
        return self.framing(name) + b":" + value.join(self.gap)


@dataclass(frozen=True)
class Case:
    """One fuzz case: the pieces to send, the methods in them, whether it is valid."""

    number: int
    pieces: tuple[bytes, ...]
    methods: tuple[str, ...]
    valid: bool

    def sent(self) -> bytes:
        """Return all bytes."""
        return b"".join(self.pieces)


MESSAGE = (
    b'{"model":"claude-vectors","max_tokens":16,"stream":false,'
    b'"messages":[{"role":"user","content":"hello from a mutation"}]}'
)
TOKEN_BYTES = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_."
VALUE_BYTES = bytes(range(0x20, 0x7F)) + bytes(range(0x80, 0x100)) + b"\t"

#: Single bytes that parsers trip over.
ODD_BYTES = [b"%c" % byte for byte in b'\r\n\0 \t\x0b\x0c:;,/%\\#?\x7f\x80\xff0-+="']
ODD_BYTES += [b"\r\n", b"\r\n ", b"\r\n\r\n", b"\n\n", b"\xc2\x85", b"A" * 99]

#: Lines that quarrel with what a request already says.
ODD_LINES = [
    b"Transfer-Encoding: chunked",
    b"Transfer-Encoding: identity",
    b"Transfer-Encoding: gzip, chunked",
    b"Transfer-Encoding : chunked",
    b"Transfer_Encoding: chunked",
    b"Content-Length: 0",
    b"Content-Length: 5",
    b"Content-Length: +5",
    b"Content-Length: 1_0",
    b"Content-Length: 18446744073709551617",
    b"Content-Length: 5, 5",
    b"Content_Length: 5",
    b"Host: evil.example",
    b"Host:",
    b"Connection: close",
    b"Connection: content-length, host",
    b"Connection: keep-alive, upgrade",
    b"Expect: 100-continue",
    b"Expect: 200-ok",
    b"Upgrade: h2c",
    b"TE: trailers",
    b"Trailer: content-length",
    b"X-Forwarded-For: 1.2.3.4",
    b"Origin: http://evil.example",
    b"Authorization: Bearer canary",
    b" folded: value",
    b"no colon here",
    b": no name",
    b"X-Nul: a\0b",
    b"X-Cr: a\rb",
    b"X-Long: " + b"v" * 70_000,
]

#: Pieces of a valid request and what to put there.
SWAPS: list[tuple[bytes, list[bytes]]] = [
    (b"HTTP/1.1", [b"HTTP/1.0", b"HTTP/2.0", b"HTTP/1.2", b"http/1.1", b"HTTP/1.11"]),
    (b"chunked", [b"Chunked", b"chunked, chunked", b"xchunked", b"chunked;a=b", b""]),
    (b"Content-Length: ", [b"Content-Length: -", b"Content-Length: 0", b"Length: "]),
    (b"Content-Length: ", [b"Content-Length: 0x", b"Content-Length: 9", b"length:"]),
    (b"POST ", [b"GET ", b"HEAD ", b"PUT ", b"DELETE ", b"OPTIONS ", b"POST  "]),
    (b"GET ", [b"POST ", b"TRACE ", b"CONNECT ", b"FOO ", b"GET\t", b"", b"\x16\x03"]),
    (b"T ", [b"T /", b"t ", b"T\r\n", b"TT ", b"T\x0b", b"T\0 "]),
    (b" /v1/", [b" //v1/", b" /../v1/", b" /v1/%2e%2e/", b" /v1/../", b" v1/"]),
    (b" /v1/", [b" /v1\\", b" /v1/./", b" /v1;a/", b" /V1/", b" /%76%31/", b" "]),
    (b" /v1/", [b" http://evil.example/v1/", b" https://127.0.0.1/v1/", b" /%00/v1/"]),
    (b" /v1/", [b" /v1/%0d%0aX: y/", b" /v1/#", b" /v1/\xc3\xa9", b" *", b" /v1/ "]),
    (b"\r\n", [b"\n", b"\r", b"\r\r\n", b"\n\r", b"", b"\r\n\t", b"\x85"]),
    (b"100-continue", [b"100-Continue", b"100", b"", b"100-continue, 100-continue"]),
    (b"127.0.0.1:", [b"user@127.0.0.1:", b"127.0.0.1:1", b"evil.example:", b"[::1]:"]),
    (b": ", [b":", b" : ", b":  ", b":\t", b"", b"=", b":\r\n "]),
    (b"\r\n0\r\n", [b"\r\n0;a=b\r\n", b"\r\n00\r\n", b"\r\n0x0\r\n", b"\r\n-0\r\n"]),
]


def drafts(kind: int, number: int, port: int) -> list[Draft]:
    """Return the valid requests of one case: one, or three to be pipelined."""
    mark = b"vector=%d" % number
    base: Fields = (
        (b"Host", b" 127.0.0.1:%d" % port),
        (b"User-Agent", b" vectors/1"),
        (b"Accept", b" */*"),
    )
    typed = (*base, (b"Content-Type", b" application/json"))
    get = Draft(b"GET", b"/v1/skills?" + mark, base)
    post = Draft(b"POST", b"/v1/messages?" + mark, typed, MESSAGE)
    if kind == 0:
        return [get]
    if kind == 1:
        return [post]
    if kind == 2:
        return [replace(post, sizes=(40, 7), trailer=b"X-Checksum: abc\r\n")]
    if kind == 3:
        return [replace(post, fields=(*typed, (b"Expect", b" 100-continue")))]
    if kind == 4:
        return [get, post, get]
    hop: Fields = (
        (b"Connection", b" keep-alive, X-Hop"),
        (b"X-Hop", b" one hop"),
        (b"Cookie", b" a=b"),
        (b"TE", b" trailers"),
        (b"Authorization", b" Bearer sk-ant-canary"),
        (b"Anthropic-Version", b" 2023-06-01"),
    )
    counted = b"/v1/messages/count_tokens?" + mark
    return [replace(post, target=counted, fields=(*typed, *hop))]


def random_bytes(rng: random.Random, alphabet: bytes, most: int) -> bytes:
    """Return 1 to `most` bytes of `alphabet`."""
    return bytes(rng.choice(alphabet) for _ in range(rng.randint(1, most)))


def insert_byte(rng: random.Random, draft: Draft) -> Draft:
    """Put one byte of any value into the body, if there is one."""
    at = rng.randrange(len(draft.body) + 1)
    if not draft.body:
        return draft
    return replace(draft, body=draft.body[:at] + rng.randbytes(1) + draft.body[at:])


def grow_body(rng: random.Random, draft: Draft) -> Draft:
    """Repeat the beginning of the body."""
    at = rng.randrange(len(draft.body) + 1)
    return replace(draft, body=draft.body[:at] * rng.randint(1, 40) + draft.body[at:])


def resize_chunks(rng: random.Random, draft: Draft) -> Draft:
    """Cut a chunked body elsewhere."""
    sizes = tuple(rng.randint(1, 60) for _ in range(rng.randint(1, 9)))
    return replace(draft, sizes=sizes if draft.sizes else ())


def extend_target(rng: random.Random, draft: Draft) -> Draft:
    """Add a query parameter, with escapes."""
    more = b"&" + random_bytes(rng, TOKEN_BYTES, 20) + b"=%20%41"
    return replace(draft, target=draft.target + more)


def turn_case(rng: random.Random, draft: Draft) -> Draft:
    """Turn the case of the letters of field names by chance."""
    cased = tuple(
        (b"".join(rng.choice((c.upper(), c.lower())) for c in split_bytes(name)), value)
        for name, value in draft.fields
    )
    framing = rng.choice((bytes.upper, bytes.lower, bytes.swapcase, bytes.capitalize))
    return replace(draft, fields=cased, framing=framing)


def pad_values(rng: random.Random, draft: Draft) -> Draft:
    """Put other white space around the values, or none."""
    pads = (b"", b" ", b"\t", b"  ", b" \t ")
    padded = tuple(
        (name, rng.choice(pads) + value.strip(b" \t") + rng.choice(pads))
        for name, value in draft.fields
    )
    return replace(draft, fields=padded, gap=(rng.choice(pads), rng.choice(pads)))


def split_bytes(data: bytes) -> list[bytes]:
    """Return the bytes of `data`, each as bytes."""
    return [data[at : at + 1] for at in range(len(data))]


def shuffle_fields(rng: random.Random, draft: Draft) -> Draft:
    """Put the fields into another order."""
    return replace(draft, fields=tuple(rng.sample(draft.fields, len(draft.fields))))


def add_field(rng: random.Random, draft: Draft) -> Draft:
    """Add a field with every byte that a value may have."""
    name = b"X-" + random_bytes(rng, TOKEN_BYTES, 12)
    value = random_bytes(rng, VALUE_BYTES, 60)
    return replace(draft, fields=(*draft.fields, (name, value)))


#: Changes after which a request is as valid as before.
SOFT: list[Callable[[random.Random, Draft], Draft]] = [
    insert_byte,
    grow_body,
    resize_chunks,
    extend_target,
    turn_case,
    pad_values,
    shuffle_fields,
    add_field,
]


def flip_bit(rng: random.Random, data: bytes) -> bytes:
    """Flip one bit."""
    if not data:
        return data
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]


def insert_odd(rng: random.Random, data: bytes) -> bytes:
    """Insert bytes that parsers trip over."""
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.choice(ODD_BYTES) + data[at:]


def delete_span(rng: random.Random, data: bytes) -> bytes:
    """Delete up to 8 bytes."""
    at = rng.randrange(len(data) + 1)
    return data[:at] + data[at + rng.randint(1, 8) :]


def repeat_span(rng: random.Random, data: bytes) -> bytes:
    """Say up to 40 bytes twice."""
    at = rng.randrange(len(data) + 1)
    return data[:at] + data[at : at + rng.randint(1, 40)] + data[at:]


def truncate(rng: random.Random, data: bytes) -> bytes:
    """Drop the end."""
    return data[: rng.randrange(len(data) + 1)]


def repeat_line(rng: random.Random, data: bytes) -> bytes:
    """Say one line of the first head twice."""
    head, mark, rest = data.partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    lines.insert(rng.randint(1, len(lines)), rng.choice(lines))
    return b"\r\n".join(lines) + mark + rest


def insert_line(rng: random.Random, data: bytes) -> bytes:
    """Put a quarrelsome field in front of the others."""
    line, _, rest = data.partition(b"\r\n")
    return line + b"\r\n" + rng.choice(ODD_LINES) + b"\r\n" + rest


def swap_token(rng: random.Random, data: bytes) -> bytes:
    """Exchange one piece of syntax."""
    rows = [row for row in SWAPS if row[0] in data]
    if not rows:
        return data
    old, choices = rng.choice(rows)
    at = rng.choice([match.start() for match in re.finditer(re.escape(old), data)])
    return data[:at] + rng.choice(choices) + data[at + len(old) :]


#: Changes that may make a request invalid.
HARD: list[Callable[[random.Random, bytes], bytes]] = [
    flip_bit,
    insert_odd,
    delete_span,
    repeat_span,
    truncate,
    repeat_line,
    insert_line,
    swap_token,
    swap_token,
]


def make_case(seed: int, number: int, port: int) -> Case:
    """Return case `number` of the run with `seed`."""
    # A weak generator is wanted: a failing case must come back.
    rng = random.Random(seed * 1_000_003 + number)
    requests = drafts(rng.randrange(6), number, port)
    for _ in range(rng.randint(1, 3)):
        which = rng.randrange(len(requests))
        requests[which] = rng.choice(SOFT)(rng, requests[which])
    data = b"".join(request.render() for request in requests)
    valid = rng.random() < VALID_SHARE
    if not valid:
        for _ in range(rng.randint(1, 3)):
            data = rng.choice(HARD)(rng, data)
    cuts = [rng.randint(0, len(data)) for _ in range(rng.choice((0, 0, 0, 1, 3)))]
    edges = [0, *sorted(cuts), len(data)]
    pieces = tuple(data[a:b] for a, b in zip(edges, edges[1:]))
    methods = tuple(request.method.decode() for request in requests)
    if not valid and b"HEAD " in data:
        methods = ("HEAD",)
    return Case(number, pieces, methods, valid)


class Fuzzer:
    """One client thread of the fuzzer; keeps a connection while cases are valid."""

    def __init__(self, options: Options, port: int) -> None:
        self._seed = options.seed
        self._port = port
        self._wire: Wire | None = None
        self.statuses: Counter[str] = Counter()
        self.problems: list[Problem] = []

    def run(self, numbers: Iterator[int]) -> None:
        """Play the cases with `numbers`."""
        for number in numbers:
            case = make_case(self._seed, number, self._port)
            wrong = self._play(case)
            if wrong:
                name = f"case {number}, {'valid' if case.valid else 'broken'}"
                wanted = "200" if case.valid else "an answer or an end, never 500"
                self.problems.append(Problem(name, case.sent(), wanted, wrong))
        if self._wire is not None:
            self._wire.close()

    def _play(self, case: Case) -> str:
        """Play one case and return what was wrong, or nothing."""
        wire = self._wire or dial(self._port)
        self._wire = None
        keep = False
        try:
            send_pieces(wire, case.pieces)
            keep = self._read(wire, case)
        except MalformedError as error:
            return f"malformed: {error}"
        except socket.timeout:
            return f"no answer and no end in {HANG_S} s"
        except (EndedError, CutError, ConnectionError):
            self.statuses["end"] += 1
            if case.valid:
                return "closed without a whole answer"
        finally:
            if keep:
                self._wire = wire
            else:
                wire.close()
        return ""

    def _read(self, wire: Wire, case: Case) -> bool:
        """Read the case's answers; True if the connection can go on."""
        answer = None
        for method in case.methods:
            answer = self._read_one(wire, method, patient=case.valid)
            self.statuses[str(answer.status)] += 1
            if answer.status == 500:
                raise MalformedError(f"500 {answer.body[:200]!r}")
            if case.valid and (answer.status, answer.whole) != (200, True):
                ended = "whole" if answer.whole else "cut"
                raise MalformedError(f"{answer.status}, {ended}, to a valid request")
            if answer.ends:
                return False
        if case.valid and wire.buffer:
            raise MalformedError(f"bytes after the last answer: {wire.buffer[:80]!r}")
        return case.valid

    def _read_one(self, wire: Wire, method: str, *, patient: bool) -> Answer:
        """Read one answer; an impatient client says FIN after a short silence."""
        try:
            while not (patient or FINAL_HEAD.match(wire.buffer)):
                if not wire.within(QUIET_S).fill():
                    break
        except socket.timeout:
            self.statuses["fin"] += 1
            wire.sock.shutdown(socket.SHUT_WR)
        return read_answer(wire.within(HANG_S), method)


def send_pieces(wire: Wire, pieces: tuple[bytes, ...]) -> None:
    """Send the pieces with short pauses; a peer that left is no error here."""
    wire.sock.settimeout(HANG_S)
    try:
        for index, piece in enumerate(pieces):
            if index:
                time.sleep(PAUSE_S)
            wire.sock.sendall(piece)
    except ConnectionError:
        return


def hold_heads(port: int) -> list[Problem]:
    """Leave truncated heads open and see that the proxy ends every one of them."""
    head = b"GET /v1/skills?held HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nX-Slow: 1\r\n" % port
    start = time.monotonic()
    wires = [dial(port) for _ in range(HELD_HEADS)]
    problems = []
    for index, wire in enumerate(wires):
        sent = head[: len(head) * index // HELD_HEADS + 1]
        wire.sock.sendall(sent)
        wire.deadline = start + HANG_S
    for index, wire in enumerate(wires):
        try:
            wire.rest()
        except socket.timeout:
            sent = head[: len(head) * index // HELD_HEADS + 1]
            problems.append(Problem("held head", sent, f"an end in {HANG_S} s", "none"))
        wire.close()
    return problems


def shaped_reply(seen: Seen) -> Reply:
    """Answer in one send, in two, or chunked in two, by the case's number."""
    plain = ok_reply(seen)
    head, _, body = plain.payload.partition(b"\r\n\r\n")
    if seen.vector % 3 == 0 or not body:
        return plain
    if seen.vector % 3 == 1:
        return plain._replace(split=len(plain.payload) - len(body) // 2)
    head = head.rpartition(b"\r\n")[0] + b"\r\nTransfer-Encoding: chunked\r\n\r\n"
    half = len(body) // 2
    chunks = [b"%x\r\n%s\r\n" % (len(b), b) for b in (body[:half], body[half:])]
    payload = head + chunks[0] + chunks[1] + b"0\r\n\r\n"
    return Reply(payload, split=len(head) + len(chunks[0]) - seen.vector % 5)


def run_fuzz(options: Options) -> bool:
    """Fuzz the proxy; True if nothing broke and enough got through."""
    threads = 32
    print(f"  seed {options.seed}")
    start = time.monotonic()
    upstream = Upstream(shaped_reply)
    numbers = iter(range(options.mutations))  # next() on it is atomic
    with Proxy(options, upstream) as proxy, ThreadPoolExecutor(threads + 1) as pool:
        fuzzers = [Fuzzer(options, proxy.port) for _ in range(threads)]
        held = pool.submit(hold_heads, proxy.port)
        for job in [pool.submit(fuzzer.run, numbers) for fuzzer in fuzzers]:
            job.result()
        problems = held.result() + proxy.problems()
    upstream.close()
    statuses: Counter[str] = Counter()
    for fuzzer in fuzzers:
        statuses += fuzzer.statuses
        problems += fuzzer.problems
    problems += [Problem("upstream", b"", "strict heads", p) for p in upstream.problems]
    reached = len(upstream.counts.keys() & range(options.mutations))
    share = reached / max(options.mutations, 1)
    if share < REACH_MIN:
        wanted = f"{REACH_MIN:.0%} at the upstream"
        problems.append(Problem("reach", b"", wanted, f"{share:.0%}"))
    show(problems)
    took_s = time.monotonic() - start
    seen = ", ".join(f"{name} {count}" for name, count in statuses.most_common(14))
    print(f"  answers: {seen}")
    print(f"  upstream: {upstream.total} requests of {reached} cases ({share:.0%})")
    print(
        f"fuzz: {options.mutations} mutations, {len(problems)} problems, "
        f"{took_s:.0f} s, seed {options.seed}"
    )
    return not problems


# ============================================================================
# 9. CLI
# ============================================================================

PARTS: dict[str, Callable[[Options], bool]] = {
    "probe": run_probe,
    "replies": run_replies,
    "bodies": run_bodies,
    "fuzz": run_fuzz,
}


def main() -> int:
    """Run the parts asked for; 1 if one fails."""
    parser = argparse.ArgumentParser(
        description="Drive the proxy with hostile vectors."
    )
    parser.add_argument("part", nargs="?", choices=sorted(PARTS), help="default: all")
    parser.add_argument("--seed", type=int, help="of the fuzzer; default: by chance")
    parser.add_argument("--mutations", type=int, default=20_000, help="of the fuzzer")
    parser.add_argument("--cmd", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not VECTORS.is_dir():
        print("vectors: skipped, ../shared/vectors is not there")
        return 0
    own = f"{sys.executable} {ROOT / 'claude_lb.py'} -c {{config}} --port {{port}}"
    seed = arguments.seed
    if seed is None:
        seed = random.SystemRandom().randrange(1_000_000)
    options = Options(seed, arguments.mutations, arguments.cmd or own)
    names = [arguments.part] if arguments.part else list(PARTS)
    passed = [PARTS[name](options) for name in names]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
