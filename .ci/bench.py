#!/usr/bin/env python3
"""Measure what claude_lb.py costs, beside nginx doing the same work.

    python3 .ci/bench.py                        # all tests, under five minutes
    python3 .ci/bench.py --quick                # a look, under forty seconds
    python3 .ci/bench.py --only short32,s500x20 --rounds 5 --json figures.json
    python3 .ci/bench.py --cmd 'other=./other --listen {port} --to {up1} --to {up2}'

Two mock upstreams, the proxy under test, nginx (where it is installed) and a load
client run as processes of their own on the loopback interface.  The rounds of the
targets are interleaved, and each ratio compares two runs of the same round.

Trust the CPU time per request and per event: it is the time of the proxy's whole
process tree, to the nanosecond, and hardly depends on what else the machine does.
Latencies, above all p99, carry the noise of the machine.  CPU and memory figures
need Linux; elsewhere those columns stay empty.

Tests, in the order of the default run:

    short1, short32   1 KB requests and answers on 1 and on 32 connections
    large8            200 KB requests, 1 KB answers, on 8 connections
    s100x20           100 streams of 20 events a second, one chunk of 190 B each
    s1000x5           1,000 streams of 5 events a second
    tls-NAME          the same with TLS to the upstreams
    memory            idle, per idle keep-alive connection, per open stream
    start             from exec to the first answer
    choosing          what choosing an endpoint costs inside the proxy
    recording         what an exchange costs until its row is committed
    translating       an event, and a request of 400 KB, into other dialects and back
    failover          what an endpoint at fault adds to the time to the first byte

shortN, largeN and sNxR take any numbers.  Each stream must bring every event, in
order, and end with message_stop.  The four last tests are of claude_lb alone: they
set their figures beside the goals.  The exit status is 1 when an answer or an event
is missing or wrong, never because something is slow.
"""

from __future__ import annotations

import argparse
import atexit
import heapq
import importlib.util
import itertools
import json
import os
import platform
import random
import re
import resource
import selectors
import shlex
import shutil
import signal
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, NamedTuple

# ============================================================================
# 1. WIRE
# ============================================================================
#
# What travels: request bodies shaped as Claude Code sends them, and the answers
# of the mock.  A request's body tells the mock what to do, because a proxy may
# drop header fields it does not know.

READ_BYTES = 262_144
OPEN_FILES = 20_000
MODEL = "claude-sonnet-4-5-20250929"

REQUEST_FIELDS = """\
accept: application/json
x-stainless-retry-count: 0
x-stainless-timeout: 600
x-stainless-lang: js
x-stainless-package-version: 0.60.0
x-stainless-os: Linux
x-stainless-arch: x64
x-stainless-runtime: node
x-stainless-runtime-version: v20.20.2
anthropic-dangerous-direct-browser-access: true
anthropic-version: 2023-06-01
x-api-key: sk-ant-bench-client
x-app: cli
user-agent: claude-cli/2.0.50 (external, cli)
content-type: application/json
anthropic-beta: claude-code-20250219,interleaved-thinking-2025-05-14
accept-language: *
accept-encoding: identity
"""

ANSWER_FIELDS = """\
date: Thu, 20 Nov 2025 08:00:00 GMT
cache-control: no-cache
anthropic-ratelimit-requests-limit: 4000
anthropic-ratelimit-requests-remaining: 3999
anthropic-ratelimit-requests-reset: 2025-11-20T08:00:00Z
anthropic-ratelimit-input-tokens-limit: 2000000
anthropic-ratelimit-input-tokens-remaining: 1999000
anthropic-ratelimit-output-tokens-limit: 400000
anthropic-ratelimit-output-tokens-remaining: 400000
request-id: req_011CVJgQ2m8Xo3s9QmYkWbTe
strict-transport-security: max-age=31536000; includeSubDomains; preload
anthropic-organization-id: 00000000-1111-2222-3333-444444444444
via: 1.1 google
cf-cache-status: DYNAMIC
x-robots-tag: none
server: cloudflare
cf-ray: 8c0d1e2f3a4b5c6d-SJC
"""

WORDS = ("the", "stream", "token", "model", "request", '"edit"', "return", "import")

#: What a stream request carries in its user id: events, milliseconds between them.
STREAM_PLAN = re.compile(rb'bench_e(\d+)_d(\d+)_.*"stream":true', re.S)
#: The mark of an event: monotonic nanoseconds when sent, sequence number.
EVENT_MARK = re.compile(rb"@([0-9a-f]{16}),([0-9]{6})")
EVENT_MARK_BYTES = 24
STREAM_END = b'"message_stop"}\n\n'

_MESSAGE = (
    '{"id":"msg_01XFDUDYJgAACzvnptvVoYEL","type":"message","role":"assistant",'
    '"model":"claude-sonnet-4-5-20250929","content":[%s],"stop_reason":%s,'
    '"stop_sequence":null,"usage":{"input_tokens":25,"output_tokens":%d}}'
)


def request_body(
    size: int, session: int, events: int = 0, delay_ms: int = 0, model: str = MODEL
) -> bytes:
    """Return a Messages request of about `size` bytes for conversation `session`.

    With `events` it asks for a stream of so many deltas, `delay_ms` apart.
    """
    source = random.Random(7)
    turns: list[dict[str, Any]] = []
    length = 0
    while not turns or length < size - 450:
        count = max(1, min(300, (size - 450 - length) // 8))
        text = " ".join(source.choice(WORDS) for _ in range(count)) + "\n"
        role = "assistant" if len(turns) % 2 else "user"
        turns.append({"role": role, "content": [{"type": "text", "text": text}]})
        length += len(text) + 80
    body = {
        "model": model,
        "max_tokens": 32_000,
        "messages": turns,
        "metadata": {"user_id": f"bench_e{events}_d{delay_ms}_session_{session}"},
        "stream": events > 0,
    }
    return json.dumps(body, separators=(",", ":")).encode()


def request_bytes(port: int, body: bytes) -> bytes:
    """Return the whole request that posts `body` to the proxy on `port`."""
    lines = ["POST /v1/messages HTTP/1.1", f"host: 127.0.0.1:{port}"]
    lines += REQUEST_FIELDS.splitlines()
    lines += [f"content-length: {len(body)}", "", ""]
    return "\r\n".join(lines).encode() + body


def answer_head(*fields: str) -> bytes:
    """Return the head of a mock answer with `fields` added."""
    lines = ["HTTP/1.1 200 OK", *fields, *ANSWER_FIELDS.splitlines(), "", ""]
    return "\r\n".join(lines).encode()


def json_answer() -> bytes:
    """Return a whole 1 KB answer."""
    text = '{"type":"text","text":"%s"}' % ("bench " * 128)
    body = (_MESSAGE % (text, '"end_turn"', 150)).encode()
    head = answer_head("content-type: application/json", f"content-length: {len(body)}")
    return head + body


def overloaded_answer() -> bytes:
    """Return the answer of an API without capacity, a 529."""
    error = (
        '{"type":"error","error":{"type":"overloaded_error","message":"Overloaded"}}'
    )
    length = f"content-length: {len(error)}"
    head = answer_head("content-type: application/json", length)
    return head.replace(b"200 OK", b"529 Overloaded", 1) + error.encode()


def sse_chunk(name: str, data: str) -> bytes:
    """Return one event as one HTTP chunk."""
    event = f"event: {name}\ndata: {data}\n\n".encode()
    return b"%x\r\n%s\r\n" % (len(event), event)


def stream_opening() -> bytes:
    """Return the head of a stream and the events before its first delta."""
    start = '{"type":"message_start","message":%s}' % (_MESSAGE % ("", "null", 1))
    block = (
        '{"type":"content_block_start","index":0,'
        '"content_block":{"type":"text","text":""}}'
    )
    return (
        answer_head(
            "content-type: text/event-stream; charset=utf-8",
            "transfer-encoding: chunked",
        )
        + sse_chunk("message_start", start)
        + sse_chunk("content_block_start", block)
        + sse_chunk("ping", '{"type": "ping"}')
    )


def stream_delta() -> tuple[bytes, bytes]:
    """Return the bytes before and after the mark of a delta's chunk, about 190 B."""
    data = (
        '{"type":"content_block_delta","index":0,"delta":{"type":"text_delta",'
        '"text":"@0123456789abcdef,000000 the quick brown fox jumps over it"}}   '
    )
    before, _, after = sse_chunk("content_block_delta", data).partition(
        b"@0123456789abcdef,000000"
    )
    return before, after


def stream_closing() -> bytes:
    """Return the events after the last delta, and the last chunk."""
    delta = (
        '{"type":"message_delta","delta":{"stop_reason":"end_turn",'
        '"stop_sequence":null},"usage":{"output_tokens":150}}'
    )
    return (
        sse_chunk("content_block_stop", '{"type":"content_block_stop","index":0}')
        + sse_chunk("message_delta", delta)
        + sse_chunk("message_stop", '{"type":"message_stop"}')
        + b"0\r\n\r\n"
    )


def raise_file_limit() -> None:
    """Let this process and its children open OPEN_FILES files, if it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    want = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft == resource.RLIM_INFINITY or soft >= want:
        return
    # Some systems allow less than they say; then the run goes on with that.
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (want, hard))


# ============================================================================
# 2. UPSTREAM
# ============================================================================
#
# The mock of the API: one thread, one selector, one heap of due events.  It runs
# in a process of its own and ends when its standard input does.

_JSON_ANSWER = json_answer()
_OVERLOADED = overloaded_answer()
#: Requests that begin so get the 529.
OVERLOADED_PATH = "/overloaded"
_OVERLOADED_START = b"POST " + OVERLOADED_PATH.encode()
_OPENING = stream_opening()
_BEFORE_MARK, _AFTER_MARK = stream_delta()
_CLOSING = stream_closing()
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.I)
_READ = selectors.EVENT_READ
_WRITE = selectors.EVENT_WRITE
_TRY_AGAIN = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


class UpstreamConnection:
    """One connection that a proxy opened to the mock."""

    def __init__(self, mock: Upstream, sock: socket.socket) -> None:
        self.mock = mock
        self.sock = sock
        self.inbox = bytearray()
        self.outbox = bytearray()
        self.need = 0  # bytes of the request now coming in; 0 before its head
        self.shaking = isinstance(sock, ssl.SSLSocket)
        self.left = -1  # deltas still to send; -1 when no stream runs
        self.sequence = 0
        self.delay_s = 0.0
        self.due = 0.0
        self.closed = False
        mock.selector.register(sock, _READ, self.on_ready)

    def on_ready(self, mask: int) -> None:
        """Go on with the handshake, what waits to go out, and what came in."""
        if self.shaking and not self._shake():
            return
        if mask & _WRITE:
            self.send(b"")
        if mask & _READ:
            self._read()

    def _shake(self) -> bool:
        assert isinstance(self.sock, ssl.SSLSocket)
        try:
            self.sock.do_handshake()
        except ssl.SSLWantReadError:
            return False
        except OSError:
            self.close()
            return False
        self.shaking = False
        return True

    def _read(self) -> None:
        secure = isinstance(self.sock, ssl.SSLSocket)
        while not self.closed:
            try:
                data = self.sock.recv(READ_BYTES)
            except _TRY_AGAIN:
                break
            except OSError:
                data = b""
            if not data:
                self.close()
                return
            self.inbox += data
            if not secure and len(data) < READ_BYTES:
                break
        self._serve()

    def _serve(self) -> None:
        while self.inbox and self.left < 0 and not self.closed:
            if not self.need:
                end = self.inbox.find(b"\r\n\r\n")
                if end < 0:
                    return
                length = _LENGTH.search(self.inbox, 0, end + 2)
                self.need = end + 4 + (int(length[1]) if length else 0)
            if len(self.inbox) < self.need:
                return
            is_head = self.inbox.startswith(b"HEAD ")
            is_faulty = self.inbox.startswith(_OVERLOADED_START)
            tail = bytes(self.inbox[max(0, self.need - 256) : self.need])
            plan = STREAM_PLAN.search(tail)
            del self.inbox[: self.need]
            self.need = 0
            if is_faulty:
                self.send(_OVERLOADED)
            elif plan:
                self._begin(int(plan[1]), int(plan[2]) / 1000)
            elif is_head:
                self.send(_JSON_ANSWER[: _JSON_ANSWER.index(b"\r\n\r\n") + 4])
            else:
                self.send(_JSON_ANSWER)

    def _begin(self, events: int, delay_s: float) -> None:
        self.left = events
        self.sequence = 0
        self.delay_s = delay_s
        self.send(_OPENING)
        self.due = time.monotonic() + delay_s
        self.mock.plan(self)

    def step(self) -> None:
        """Send the next delta, and after the last one the end of the stream."""
        mark = b"@%016x,%06d" % (time.monotonic_ns(), self.sequence)
        data = _BEFORE_MARK + mark + _AFTER_MARK
        self.sequence += 1
        self.left -= 1
        if self.left > 0:
            self.send(data)
            self.due += self.delay_s
            self.mock.plan(self)
        else:
            self.left = -1
            self.send(data + _CLOSING)
            self._serve()

    def send(self, data: bytes) -> None:
        """Send `data` after all that already waits; keep what does not fit."""
        if self.closed:
            return
        waited = bool(self.outbox)
        if waited:
            self.outbox += data
            data = bytes(self.outbox)
        try:
            sent = self.sock.send(data)
        except _TRY_AGAIN:
            sent = 0
        except OSError:
            self.close()
            return
        self.outbox[:] = data[sent:]
        if waited != bool(self.outbox):
            mask = _READ | _WRITE if self.outbox else _READ
            self.mock.selector.modify(self.sock, mask, self.on_ready)

    def close(self) -> None:
        """Forget the connection; what is still due for it is skipped."""
        if not self.closed:
            self.closed = True
            self.mock.selector.unregister(self.sock)
            self.sock.close()


class Upstream:
    """The mock: accepts, answers, and keeps the pace of its streams."""

    def __init__(self, certificate: str = "") -> None:
        self.selector = selectors.DefaultSelector()
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
        self.listener.setblocking(False)
        self.running = True
        self._timers: list[tuple[float, int, UpstreamConnection]] = []
        self._planned = 0
        self._tls: ssl.SSLContext | None = None
        if certificate:
            self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._tls.load_cert_chain(certificate)

    def plan(self, connection: UpstreamConnection) -> None:
        """Call `connection.step` at its due time."""
        self._planned += 1
        heapq.heappush(self._timers, (connection.due, self._planned, connection))

    def run(self) -> None:
        """Print the port, then serve until standard input ends."""
        print(self.listener.getsockname()[1], flush=True)
        self.selector.register(self.listener, _READ, self._accept)
        self.selector.register(sys.stdin, _READ, self._stop)
        while self.running:
            wait: float | None = None
            if self._timers:
                wait = max(0.0, self._timers[0][0] - time.monotonic())
            for key, mask in self.selector.select(wait):
                key.data(mask)
            self._send_due()

    def _send_due(self) -> None:
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            connection = heapq.heappop(self._timers)[2]
            if not connection.closed:
                connection.step()

    def _accept(self, _mask: int) -> None:
        for _ in range(256):
            try:
                sock, _peer = self.listener.accept()
            except OSError:
                return
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._tls:
                sock = self._tls.wrap_socket(
                    sock, server_side=True, do_handshake_on_connect=False
                )
            UpstreamConnection(self, sock)

    def _stop(self, _mask: int) -> None:
        self.running = bool(os.read(sys.stdin.fileno(), 4096))


# ============================================================================
# 3. LOAD
# ============================================================================
#
# The client: one thread, one selector, in a process of its own.  It prints JSON
# lines: {"phase": "open"} when all its connections have their first byte or are
# idle, {"phase": "closing"} when the first stream ends, and the result.


@dataclass(frozen=True)
class Load:
    """What one run of the client does; it crosses to the client as JSON."""

    kind: str  # "requests": closed loop; "streams": one each; "idle": ask, then hold
    port: int
    connections: int
    seconds: float = 0.0  # how long a "requests" run asks
    body_bytes: int = 1024
    events: int = 0
    delay_ms: int = 0
    faulty: int = 0  # every so many-th connection meets an endpoint at fault first
    ramp_s: float = 0.0  # the connections are opened evenly over this time
    deadline_s: float = 30.0  # the run ends here whatever is missing


class Answer:
    """One HTTP answer as it comes in: bytes to payload, and when it ended."""

    def __init__(self) -> None:
        self.status = 0
        self.failed_over = False  # more than one attempt was made for it
        self.done = False
        self.reusable = True
        self._buffer = b""
        self._left = -1  # bytes to come; -1 when only the end of data tells
        self._chunked = False

    def feed(self, data: bytes) -> bytes:
        """Return the payload in `data`.

        Raises:
            ValueError: `data` is not what HTTP allows here.
        """
        if not self.status:
            data = self._buffer + data
            end = data.find(b"\r\n\r\n")
            if end < 0:
                self._buffer = data
                return b""
            self._read_head(data[: end + 2])
            self._buffer = b""
            data = data[end + 4 :]
        if self._chunked:
            return self._dechunk(data)
        if self._left >= 0:
            self._left -= len(data)
            self.done = self._left <= 0
            if self._left < 0:
                raise ValueError("bytes after the answer")
        return data

    def _read_head(self, head: bytes) -> None:
        low = head.lower()
        if not low.startswith(b"http/1."):
            raise ValueError("not HTTP")
        self.status = int(head[9:12])
        self.reusable = b"\r\nconnection: close" not in low
        self.failed_over = b"\r\nx-claude-lb-attempts:" in low
        self._chunked = b"\r\ntransfer-encoding: chunked" in low
        length = _LENGTH.search(low)
        if length and not self._chunked:
            self._left = int(length[1])
        elif not self._chunked:
            self.reusable = False

    def _dechunk(self, data: bytes) -> bytes:
        if self._buffer:
            data = self._buffer + data
        out: list[bytes] = []
        position = 0
        while True:
            line = data.find(b"\r\n", position)
            if line < 0:
                break
            size = int(data[position:line], 16)
            end = line + 2 + size + 2
            if len(data) < end:
                break
            if data[end - 2 : end] != b"\r\n":
                raise ValueError("a chunk without its end")
            position = end
            if not size:
                self.done = True
                break
            out.append(data[line + 2 : end - 2])
        self._buffer = data[position:]
        if self.done and self._buffer:
            raise ValueError("bytes after the last chunk")
        return b"".join(out)


class ClientConnection:
    """One connection of the client, with the request it has under way."""

    def __init__(self, client: LoadClient, request: bytes) -> None:
        self.client = client
        self.request = request
        self.unsent = memoryview(b"")
        self.answer = Answer()
        self.started_ns = self.first_ns = 0
        self.sequence = 0
        self.tail = b""
        self.fresh = True
        self.began = False  # the first byte of this answer is here
        self.sock = self._connect()

    def _connect(self) -> socket.socket:
        sock = socket.create_connection(("127.0.0.1", self.client.load.port), 10)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setblocking(False)
        self.client.selector.register(sock, _READ, self.on_ready)
        return sock

    def ask(self) -> None:
        """Send the request, or as much of it as fits."""
        self.answer = Answer()
        self.sequence = 0
        self.tail = b""
        self.began = False
        self.unsent = memoryview(self.request)
        self.started_ns = time.monotonic_ns()
        self._push()

    def _push(self) -> None:
        try:
            self.unsent = self.unsent[self.sock.send(self.unsent) :]
        except BlockingIOError:
            pass
        except OSError as error:
            self.client.failed(self, f"send: {error}")
            return
        if self.unsent:
            self.client.selector.modify(self.sock, _READ | _WRITE, self.on_ready)

    def on_ready(self, mask: int) -> None:
        """Send on, and take what came."""
        if mask & _WRITE and self.unsent:
            self._push()
            if not self.unsent:
                self.client.selector.modify(self.sock, _READ, self.on_ready)
        if mask & _READ:
            self._read()

    def _read(self) -> None:
        try:
            data = self.sock.recv(READ_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            self.client.failed(self, f"receive: {error}")
            return
        if not data:
            self._ended()
            return
        if not self.began:
            self.began = True
            self.client.first_byte(self)
        try:
            payload = self.answer.feed(data)
        except ValueError as error:
            self.client.failed(self, f"bad answer: {error}")
            return
        if self.client.load.events:
            self._watch(payload)
        else:
            self.tail = (self.tail + payload)[-64:]
        if self.answer.done:
            self.client.finished(self)

    def _watch(self, payload: bytes) -> None:
        """Check the sequence of the events in `payload` and note their delay."""
        data = self.tail + payload
        now = time.monotonic_ns()
        end = 0
        for mark in EVENT_MARK.finditer(data):
            self.client.event_ns.append(now - int(mark[1], 16))
            if int(mark[2]) != self.sequence:
                self.client.note(f"event {int(mark[2])} after {self.sequence - 1}")
            self.sequence = int(mark[2]) + 1
            end = mark.end()
        self.tail = data[max(end, len(data) - EVENT_MARK_BYTES + 1) :]

    def _ended(self) -> None:
        if self.began or self.fresh:
            self.client.failed(self, "the connection ended before the answer did")
        else:  # A keep-alive connection may end between two requests.
            self.client.reconnects += 1
            self.close()
            if self.client.load.kind != "idle":
                self.reopen()

    def reopen(self) -> None:
        """Ask once more on another connection."""
        self.fresh = True
        try:
            self.sock = self._connect()
        except OSError as error:
            self.client.note(f"connect: {error}")
            self.client.active -= 1
            return
        self.ask()

    def close(self) -> None:
        """Close the socket."""
        self.client.selector.unregister(self.sock)
        self.sock.close()

    def problem(self) -> str:
        """Return what is wrong with the answer that has just ended, or nothing."""
        if self.answer.status != 200:
            return f"status {self.answer.status}"
        if not self.client.load.events:
            return "" if self.tail.endswith(b"}}") else "not the mock's answer"
        if self.sequence != self.client.load.events:
            return f"{self.sequence} of {self.client.load.events} events"
        return "" if self.tail.endswith(STREAM_END) else "no message_stop at the end"


class LoadClient:
    """Runs one `Load` and reports it."""

    def __init__(self, load: Load) -> None:
        self.load = load
        self.selector = selectors.DefaultSelector()
        self.problems: Counter[str] = Counter()
        self.answer_ns: list[int] = []
        self.first_ns: list[int] = []
        self.failover_ns: list[int] = []  # of `first_ns` those that failed over
        self.event_ns: list[int] = []
        self.reconnects = 0
        self.done = 0
        self.active = 0  # connections that have or will have a request under way
        self.peak = 0
        self._begun = 0  # streams that have had their first byte and not their end
        self._opened = 0
        self._open_told = False
        self._closing_told = False
        self._end = 0.0

    def run(self) -> None:
        """Do the load, then print the result."""
        load = self.load
        start = time.monotonic()
        self._end = start + load.seconds
        while True:
            now = time.monotonic()
            if now > start + load.deadline_s:
                missing = self.active + load.connections - self._opened
                self.problems["unfinished at the deadline"] += missing
                break
            ramp = (now - start) / load.ramp_s if load.ramp_s else 1.0
            self._open(min(load.connections, int(ramp * load.connections) + 1))
            if self._opened == load.connections and not self.active:
                break
            wait = 0.001 if self._opened < load.connections else 0.5
            for key, mask in self.selector.select(wait):
                key.data(mask)
        if load.kind == "idle":
            self._tell("open")
            self._hold(start + load.deadline_s)
        print(json.dumps(self._result(time.monotonic() - start)), flush=True)

    def _open(self, target: int) -> None:
        while self._opened < target:
            load = self.load
            faulty = load.faulty and self._opened % load.faulty == 0
            model = f"faulty-{self._opened}" if faulty else MODEL
            body = request_body(
                load.body_bytes, self._opened, load.events, load.delay_ms, model
            )
            self._opened += 1
            try:
                connection = ClientConnection(self, request_bytes(load.port, body))
            except OSError as error:
                self.note(f"connect: {error}")
                continue
            self.active += 1
            connection.ask()

    def _hold(self, until: float) -> None:
        """Keep the idle connections until standard input ends."""
        self.selector.register(sys.stdin, _READ, None)
        while time.monotonic() < until:
            for key, mask in self.selector.select(0.5):
                if key.data is None:
                    return
                key.data(mask)

    def first_byte(self, connection: ClientConnection) -> None:
        """Note the time to the first byte, and tell when all streams are open."""
        connection.first_ns = time.monotonic_ns() - connection.started_ns
        self.first_ns.append(connection.first_ns)
        if self.load.kind == "streams":
            self._begun += 1
            self.peak = max(self.peak, self._begun)
            if len(self.first_ns) == self.load.connections:
                self._tell("open")

    def finished(self, connection: ClientConnection) -> None:
        """Count the answer that ended; ask again if the run is of that kind."""
        self.answer_ns.append(time.monotonic_ns() - connection.started_ns)
        self.done += 1
        if connection.answer.failed_over:
            self.failover_ns.append(connection.first_ns)
        problem = connection.problem()
        if problem:
            self.note(problem)
        connection.fresh = False
        if self.load.kind == "streams":
            self._begun -= 1
            self._tell("closing")
        elif self.load.kind == "idle":
            self.active -= 1
            connection.began = False
            return
        elif time.monotonic() < self._end:
            if connection.answer.reusable:
                connection.ask()
            else:
                connection.close()
                connection.reopen()
            return
        self.active -= 1
        connection.close()

    def failed(self, connection: ClientConnection, problem: str) -> None:
        """Count a request that did not get its answer, and give it up."""
        self.note(problem)
        self._begun -= connection.began and self.load.kind == "streams"
        self.active -= 1
        connection.close()

    def note(self, problem: str) -> None:
        """Count a problem."""
        self.problems[problem] += 1

    def _tell(self, phase: str) -> None:
        told = self._open_told if phase == "open" else self._closing_told
        if told:
            return
        if phase == "open":
            self._open_told = True
        else:
            self._closing_told = True
        line = {"phase": phase, "events": len(self.event_ns)}
        print(json.dumps(line), flush=True)

    def _result(self, elapsed_s: float) -> dict[str, Any]:
        return {
            "done": self.done,
            "events": len(self.event_ns),
            "elapsed_s": elapsed_s,
            "peak": self.peak,
            "failed_over": len(self.failover_ns),
            "failover_ms": _quantiles(self.failover_ns),
            "reconnects": self.reconnects,
            "answer_ms": _quantiles(self.answer_ns),
            "first_ms": _quantiles(self.first_ns),
            "event_ms": _quantiles(self.event_ns),
            "problems": dict(self.problems.most_common(5)),
        }


def _quantiles(values_ns: list[int]) -> dict[str, float]:
    """Return p50, p99 and the greatest of `values_ns`, in milliseconds."""
    if not values_ns:
        return {"p50": 0.0, "p99": 0.0, "max": 0.0}
    ordered = sorted(values_ns)
    last = len(ordered) - 1
    points = {"p50": 0.5, "p99": 0.99, "max": 1.0}
    return {name: ordered[round(at * last)] / 1e6 for name, at in points.items()}


# ============================================================================
# 4. PROCESSES
# ============================================================================
#
# Every child is in `_CHILDREN` until it is gone, in a session of its own, so that
# the exit of this program, whatever its cause, ends its whole tree.

_CHILDREN: list[subprocess.Popen[str]] = []
ON_LINUX = sys.platform == "linux"


def spawn(command: list[str], **options: Any) -> subprocess.Popen[str]:
    """Start `command` as a child that will not outlive this process."""
    child: subprocess.Popen[str] = subprocess.Popen(
        command, text=True, start_new_session=True, **options
    )
    _CHILDREN.append(child)
    return child


def end(child: subprocess.Popen[str]) -> None:
    """End `child` and its group: ask, wait two seconds at most, then kill."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, number)
        with suppress(subprocess.TimeoutExpired):
            child.wait(2.0)
    if child in _CHILDREN:
        _CHILDREN.remove(child)
    for pipe in (child.stdin, child.stdout):
        if pipe:
            pipe.close()


def end_all() -> None:
    """End every child."""
    while _CHILDREN:
        end(_CHILDREN[-1])


def spawn_role(*arguments: str) -> subprocess.Popen[str]:
    """Start this file as a mock upstream or a load client."""
    command = [sys.executable, "-I", "-S", str(Path(__file__).resolve())]
    return spawn(
        [*command, "--role", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )


def _parent_of(pid: int) -> tuple[int, bool]:
    """Return the parent of `pid` and whether `pid` still runs."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0, False
    fields = text[text.rindex(")") + 2 :].split()
    return int(fields[1]), fields[0] != "Z"


def process_tree(pid: int) -> list[int]:
    """Return `pid` and its descendants that still run; empty without /proc."""
    if not ON_LINUX:
        return []
    children: dict[int, list[int]] = {}
    alive: set[int] = set()
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            parent, runs = _parent_of(int(entry))
            children.setdefault(parent, []).append(int(entry))
            if runs:
                alive.add(int(entry))
    found = [pid]
    for member in found:
        found += children.get(member, [])
    return [member for member in found if member in alive]


def cpu_seconds(pids: list[int]) -> float:
    """Return the CPU time, user and system, that `pids` have used so far.

    Reads the CPU clock of each process, which counts the same as the fields utime
    and stime of /proc/PID/stat, but in nanoseconds instead of ticks of 10 ms.

    Source: clock_getcpuclockid(3); the id is made as in the C library.
    """
    total = 0.0
    for pid in pids:
        with suppress(OSError):
            total += time.clock_gettime((~pid << 3) | 2)
    return total


def memory_of(pids: list[int]) -> tuple[float, int]:
    """Return the resident memory of `pids` in KB, and their threads."""
    kilobytes = threads = 0
    for pid in pids:
        try:
            text = Path(f"/proc/{pid}/status").read_text()
        except OSError:
            continue
        for line in text.splitlines():
            name, _, value = line.partition(":")
            if name == "VmRSS":
                kilobytes += int(value.split()[0])
            elif name == "Threads":
                threads += int(value)
    return float(kilobytes), threads


def free_port() -> int:
    """Return a port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(port: int) -> bool:
    """Tell whether a request to `port` gets a 200."""
    request = request_bytes(port, request_body(1024, 0))
    try:
        with socket.create_connection(("127.0.0.1", port), 5) as sock:
            sock.sendall(request)
            return sock.recv(64).startswith(b"HTTP/1.1 200")
    except OSError:
        return False


# ============================================================================
# 5. TARGETS
# ============================================================================
#
# What is measured: nothing between (direct), nginx, claude_lb, and what --cmd adds.

NGINX_CONF = """\
worker_processes 1; daemon off; pid @RUN@/pid; error_log @RUN@/error.log warn;
worker_rlimit_nofile 20000;
events { worker_connections 9000; }
http {
  access_log @LOG@; client_max_body_size 32m; client_body_buffer_size 1m;
  client_body_temp_path @RUN@/body; proxy_temp_path @RUN@/proxy;
  fastcgi_temp_path @RUN@/f; uwsgi_temp_path @RUN@/u; scgi_temp_path @RUN@/s;
  keepalive_requests 1000000;
  upstream mock {
    server 127.0.0.1:@UP1@; server 127.0.0.1:@UP2@;
    keepalive 256; keepalive_requests 1000000;
  }
  server {
    listen 127.0.0.1:@PORT@ backlog=4096;
    location / {
      proxy_pass @SCHEME@://mock; proxy_http_version 1.1;
      proxy_set_header Connection ""; proxy_set_header x-api-key sk-ant-bench;
      proxy_buffering off; proxy_read_timeout 600s; tcp_nodelay on;
    }
  }
}
"""

CERTIFICATE_CONF = """\
[req]
prompt = no
distinguished_name = name
x509_extensions = extensions
[name]
CN = localhost
[extensions]
basicConstraints = critical,CA:TRUE
keyUsage = critical,digitalSignature,keyCertSign
extendedKeyUsage = serverAuth
subjectKeyIdentifier = hash
subjectAltName = IP:127.0.0.1,DNS:localhost
"""

START_DEADLINE_S = 15.0


def make_certificate(folder: Path) -> Path | None:
    """Write a self-signed certificate with its key; None if `openssl` cannot."""
    settings, pem = folder / "certificate.conf", folder / "certificate.pem"
    key, certificate = folder / "key.pem", folder / "only.pem"
    settings.write_text(CERTIFICATE_CONF)
    command = ["openssl", "req", "-x509", "-nodes", "-days", "2"]
    command += ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
    command += ["-config", str(settings), "-keyout", str(key), "-out", str(certificate)]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    pem.write_text(certificate.read_text() + key.read_text())
    return pem


@dataclass
class Upstreams:
    """The two mocks of one scheme."""

    certificate: Path | None = None
    ports: list[int] = field(default_factory=list)

    def start(self) -> None:
        """Start both and learn their ports."""
        for _ in range(2):
            certificate = [str(self.certificate)] if self.certificate else []
            child = spawn_role("upstream", *certificate)
            assert child.stdout is not None
            self.ports.append(int(child.stdout.readline()))

    @property
    def scheme(self) -> str:
        """The scheme of their URLs."""
        return "https" if self.certificate else "http"


@dataclass(frozen=True)
class Recipe:
    """How to start one target; placeholders stand in `command`."""

    name: str
    command: str  # empty: no proxy, the client talks to the first upstream

    def suits(self, scheme: str) -> bool:
        """Tell whether the target can be measured with upstreams of `scheme`."""
        own = "{config}" in self.command or "{nginx}" in self.command
        return scheme == "http" or own


class Target:
    """A running proxy, or the way without one."""

    #: What claude_lb's configuration file holds besides the usual.
    settings: dict[str, Any] = {}  # noqa: RUF012 - replaced, never changed

    def __init__(self, recipe: Recipe, upstreams: Upstreams, log: bool) -> None:
        self.name = recipe.name
        self.start_s = 0.0
        self._recipe = recipe
        self._upstreams = upstreams
        self._log = log
        self._folder = Path(tempfile.mkdtemp(prefix=f"bench-{recipe.name}-"))
        self._folder.chmod(0o755)  # nginx gives up its rights and must still get in
        self._child: subprocess.Popen[str] | None = None
        self.port = free_port() if recipe.command else upstreams.ports[0]

    def start(self) -> None:
        """Start the proxy and time it until its first answer.

        Raises:
            RuntimeError: it ended, or did not answer in START_DEADLINE_S.
        """
        if not self._recipe.command:
            return
        command = shlex.split(self._command())
        places = ("HOME", "XDG_STATE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME")
        environment = {**os.environ, **dict.fromkeys(places, str(self._folder))}
        began = time.monotonic()
        with open(self._folder / "output", "w") as output:
            self._child = spawn(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        while not answers(self.port):
            if self._child.poll() is not None:
                raise RuntimeError(f"{self.name} ended: {self._last_words()}")
            if time.monotonic() - began > START_DEADLINE_S:
                raise RuntimeError(f"{self.name} gives no 200: {self._last_words()}")
            time.sleep(0.002)
        self.start_s = time.monotonic() - began

    def _command(self) -> str:
        """Write the configuration the command names; return the command."""
        first, second = self._upstreams.ports
        command = self._recipe.command.replace("{port}", str(self.port))
        command = command.replace("{up1}", str(first)).replace("{up2}", str(second))
        if "{config}" in command:
            path = self._write_endpoints()
            command = command.replace("{config}", shlex.quote(str(path)))
        if "{nginx}" in command:
            path = self._write_nginx_conf()
            command = command.replace("{nginx}", shlex.quote(str(path)))
        return command

    def _write_endpoints(self) -> Path:
        endpoints = []
        for name, port in zip("ab", self._upstreams.ports):
            endpoint = {
                "name": name,
                "baseURL": f"{self._upstreams.scheme}://127.0.0.1:{port}",
                "authToken": f"sk-ant-bench-{name}-0123456789abcdef",
            }
            if self._upstreams.certificate:
                endpoint["caFile"] = str(self._upstreams.certificate)
            endpoints.append(endpoint)
        level = "info" if self._log else "warning"
        document = {"endpoints": endpoints, "log": {"level": level}, **self.settings}
        path = self._folder / "endpoints.json"
        path.write_text(json.dumps(document))
        path.chmod(0o600)
        return path

    def _write_nginx_conf(self) -> Path:
        text = NGINX_CONF
        values = {
            "RUN": self._folder,
            "LOG": self._folder / "access.log" if self._log else "off",
            "PORT": self.port,
            "UP1": self._upstreams.ports[0],
            "UP2": self._upstreams.ports[1],
            "SCHEME": self._upstreams.scheme,
        }
        for name, value in values.items():
            text = text.replace(f"@{name}@", str(value))
        path = self._folder / "nginx.conf"
        path.write_text(text)
        return path

    def _last_words(self) -> str:
        text = (self._folder / "output").read_text(errors="replace")
        return " ".join(text[-400:].split()) or "(no output)"

    def pids(self) -> list[int]:
        """Return the processes of the proxy."""
        return process_tree(self._child.pid) if self._child else []

    def stop(self) -> None:
        """End the proxy and remove its files."""
        if self._child:
            end(self._child)
            self._child = None
        shutil.rmtree(self._folder, ignore_errors=True)


# ============================================================================
# 6. TESTS
# ============================================================================
#
# A test is a name; `parse_test` gives its load.  `measure` runs one load against
# one target and gives the figures of that run.

DEFAULT_TESTS = (
    "short1,short32,large8,s100x20,s1000x5,"
    "tls-short1,tls-short32,tls-s100x20,memory,start,choosing,recording,translating,"
    "failover"
)
QUICK_TESTS = (
    "short1,short32,large8,s100x20,tls-short32,memory,start,choosing,recording,"
    "translating,failover"
)
OWN_TESTS = "choosing|recording|translating|failover"  # of claude_lb alone
TEST_NAME = re.compile(
    rf"(tls-)?(?:(short|large)(\d+)|s(\d+)x(\d+)|memory|start)|{OWN_TESTS}"
)
LARGE_BYTES = 200_000


@dataclass(frozen=True)
class Scale:
    """How much work the tests do."""

    rounds: int = 3
    request_s: float = 1.5
    stream_s: float = 6.0
    direct_stream_s: float = 3.0  # for latency only
    idle_connections: int = 500
    held_streams: int = 2000
    starts: int = 5
    repetitions: int = 12  # of each way to choose
    failover_s: float = 3.0


QUICK = Scale(1, 0.7, 2.5, 1.5, 200, 500, 2, 3, 1.0)


class Test(NamedTuple):
    """A test by its parts."""

    name: str
    scheme: str
    kind: str  # "short", "large", "streams", or its name
    connections: int = 0
    rate: int = 0


def parse_test(name: str) -> Test:
    """Return the test called `name`.

    Raises:
        ValueError: there is none.
    """
    found = TEST_NAME.fullmatch(name)
    if not found:
        raise ValueError(f"no test is called {name!r}; see --help")
    scheme = "https" if found[1] else "http"
    if found[2]:
        return Test(name, scheme, found[2], min(int(found[3]), 5000))
    if found[4]:
        rate = max(1, min(int(found[5]), 1000))
        return Test(name, scheme, "streams", min(int(found[4]), 5000), rate)
    return Test(name, scheme, name.replace("tls-", ""))


def load_of(test: Test, target: Target, scale: Scale) -> Load:
    """Return the load that `test` puts on `target`."""
    if test.kind == "streams":
        seconds = scale.stream_s if target.pids() else scale.direct_stream_s
        return Load(
            "streams",
            target.port,
            test.connections,
            events=max(2, int(seconds * test.rate)),
            delay_ms=max(1, 1000 // test.rate),
            ramp_s=1.0,
            deadline_s=seconds * 3 + 10,
        )
    size = LARGE_BYTES if test.kind == "large" else 1024
    return Load(
        "requests", target.port, test.connections, scale.request_s, size, deadline_s=20
    )


def run_load(load: Load, on_phase: Callable[[str, int], None]) -> dict[str, Any]:
    """Run the load client; call `on_phase` with each phase and its events so far."""
    child = spawn_role("load", json.dumps(asdict(load)))
    assert child.stdout is not None
    guard = threading.Timer(load.deadline_s + 15, child.kill)
    guard.start()
    result: dict[str, Any] = {}
    try:
        for line in child.stdout:
            message: dict[str, Any] = json.loads(line)
            if "phase" in message:
                on_phase(message["phase"], message["events"])
                if load.kind == "idle" and child.stdin:
                    child.stdin.close()
            else:
                result = message
    finally:
        guard.cancel()
        end(child)
    return result or {"problems": {"the load client failed": 1}}


def measure(test: Test, target: Target, scale: Scale) -> dict[str, Any]:
    """Return the figures of one run of `test` against `target`.

    The CPU time of a stream test is split: `cpu_us` per event while all streams
    run, and `setup_us` per stream for what is left (opening and ending it).
    """
    load = load_of(test, target, scale)
    pids = target.pids()
    marks: dict[str, tuple[float, int]] = {}

    def on_phase(phase: str, events: int) -> None:
        marks[phase] = (cpu_seconds(pids), events)

    before = cpu_seconds(pids)
    row = run_load(load, on_phase)
    spent = cpu_seconds(pids) - before
    row.update(test=test.name, target=target.name, cpu_s=spent)
    streams = test.kind == "streams"
    row["latency_ms"] = row.get("event_ms" if streams else "answer_ms")
    if not pids or not row.get("done"):
        return row
    row["cpu_us"] = spent / row["done"] * 1e6
    if streams:
        row["cpu_us"] = spent / max(1, row["events"]) * 1e6
        row["cpu_us_whole"] = row["cpu_us"]
        (cpu_1, events_1) = marks.get("open", (0.0, 0))
        (cpu_2, events_2) = marks.get("closing", (0.0, 0))
        if events_2 - events_1 > row["events"] / 4:
            row["cpu_us"] = (cpu_2 - cpu_1) / (events_2 - events_1) * 1e6
            rest = spent - row["cpu_us"] * row["events"] / 1e6
            row["setup_us"] = rest / row["done"] * 1e6
    return row


def measure_memory(start: Callable[[], Target], scale: Scale) -> dict[str, Any]:
    """Return the memory figures of a target; `start` gives a fresh one each time."""
    row: dict[str, Any] = {"problems": {}}
    for kind in ("idle", "streams"):
        target = start()
        try:
            time.sleep(0.3)
            if kind == "idle":
                row["idle_rss_mb"] = memory_of(target.pids())[0] / 1024
            _warm_up(target)
            figures = _measure_held(target, _holding_load(kind, target.port, scale))
        finally:
            target.stop()
        row["problems"].update(figures.pop("problems"))
        row.update({f"{kind}_{name}": value for name, value in figures.items()})
    return row


def _measure_held(target: Target, load: Load) -> dict[str, Any]:
    """Return what the connections of `load` cost `target` once all are open."""
    before, _ = memory_of(target.pids())
    seen: list[tuple[float, int]] = []

    def on_phase(phase: str, _events: int) -> None:
        if phase == "open":
            time.sleep(0.3)
            seen.append(memory_of(target.pids()))

    result = run_load(load, on_phase)
    figures: dict[str, Any] = {"problems": result["problems"]}
    figures["held"] = result.get("peak") or load.connections
    for kilobytes, threads in seen:
        figures["kb_each"] = (kilobytes - before) / load.connections
        figures["threads"] = threads
    return figures


def _holding_load(kind: str, port: int, scale: Scale) -> Load:
    if kind == "idle":
        return Load("idle", port, scale.idle_connections, ramp_s=0.5, deadline_s=20)
    ramp_s = max(1.0, scale.held_streams / 800)
    return Load(
        "streams",
        port,
        scale.held_streams,
        events=int(ramp_s) + 3,
        delay_ms=1000,
        ramp_s=ramp_s,
        deadline_s=40,
    )


def _warm_up(target: Target) -> None:
    """Let the target grow its pools and fill its caches."""
    load = Load("requests", target.port, 16, 0.3, deadline_s=10)
    run_load(load, lambda _phase, _events: None)


# ============================================================================
# 7. CHOOSING AND FAILOVER
# ============================================================================
#
# In this process, without a network: what a request costs from `make_ask` to
# `Pool.release`.  Added is what goes beyond one endpoint and round-robin.

#: Endpoints -> microseconds that choosing may add to a request.
CHOOSING_GOALS_US = {10: 10.0, 1000: 60.0}


class Choice(NamedTuple):
    """One way to choose, and what is asked."""

    settings: dict[str, Any]
    session: str = ""  # in the head: "known", or "new" with each request
    body_bytes: int = 1024
    cooling: str = ""  # the row by which one endpoint cools down
    limits: bytes = b""  # what the answers state


def choices() -> dict[str, Choice]:
    """Return all choices by name; the first is the usual one."""
    names = "round_robin weighted random least_used least_busy headroom fastest"
    by_head = {"balancing": {"affinity": "conversation"}}
    routes = {"*haiku*": [{"endpoint": "e0"}], "*": [{"group": "all"}]}
    stated = ANSWER_FIELDS.replace("\n", "\r\n").encode()
    return {
        **{n: Choice({"balancing": {"strategy": n}}) for n in names.split()},
        "answers state limits": Choice({}, limits=stated),
        "one endpoint cools down": Choice({}, cooling="server-error"),
        "one model does, 50 KB": Choice({}, "", 50_000, "overloaded"),
        "last_good": Choice({"balancing": {"affinity": "last_good"}}),
        "conversation, known": Choice(by_head, "known"),
        "conversation, new": Choice(by_head, "new"),
        "conversation by body, 50 KB": Choice(by_head, "", 50_000),
        "routes, 50 KB": Choice({"routes": routes}, "", 50_000),
    }


class Chooser:
    """The proxy's module, set up for one choice."""

    def __init__(self, lb: Any, choice: Choice, endpoints: int) -> None:
        self._lb, self._choice, self._asked = lb, choice, 0
        each = [{"name": f"e{i}", "baseURL": "http://[::1]"} for i in range(endpoints)]
        group = {"name": "all", "authToken": "sk-ant-bench", "endpoints": each}
        text = json.dumps({"groups": [group], **choice.settings})
        source = SimpleNamespace(proxy_for=lambda _host: None)
        config = lb.parse_config(text, name="bench.json", source=source)
        self._pool = lb.Pool(config)
        self._services = SimpleNamespace(pool=self._pool, config=config)
        self._body = request_body(choice.body_bytes, 0)
        for rule in (r for r in lb.RULES if r.name == choice.cooling):
            key = lb.model_bucket(MODEL) if rule.scope is lb.Scope.MODEL else ""
            lease = self._pool.reserve(lb.Ask(lb.Lane.MESSAGES, MODEL))
            self._pool.settle(lease, lb.Evidence(rule, "bench", key, 3600.0))
        self._once = self._request()
        self.count = max(5, min(1000, int(0.1e6 / self.run(20))))  # 0.1 s at most
        self.run(2 * self.count)  # so that every endpoint has its measures

    def _request(self) -> Any:
        self._asked += 1
        head = request_bytes(9, self._body)[: -len(self._body) - 2]
        if self._choice.session:
            head += b"x-claude-code-session-id: %036d\r\n" % self._asked
        read, _length = self._lb.parse_request_head(head + b"\r\n")
        return self._lb.ClientRequest("bench", read, self._body, 0.0)

    def run(self, count: int) -> float:
        """Choose `count` times; return the CPU microseconds of one."""
        requests = [self._once] * count
        if self._choice.session == "new":
            requests = [self._request() for _ in range(count)]
        pool, services, limits = self._pool, self._services, self._choice.limits
        make_ask, contents = self._lb.make_ask, self._lb.Contents
        began = time.thread_time()
        for request in requests:
            pool.enter()
            lease = pool.reserve(make_ask(request, contents(request), services))
            pool.gain(lease, 120.0, limits)
            pool.settle(lease, None)
            pool.release()
        return (time.thread_time() - began) / count * 1e6


def load_module(path: Path) -> Any:
    """Return the module at `path`."""
    spec = importlib.util.spec_from_file_location("claude_lb", path)
    lb = sys.modules["claude_lb"] = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(lb)  # type: ignore[union-attr]
    return lb


def choose(path: Path, repetitions: int) -> Iterator[dict[str, Any]]:
    """Yield what the module at `path` costs: the best of interleaved repetitions."""
    lb = load_module(path)
    for endpoints, goal_us in CHOOSING_GOALS_US.items():
        wanted = choices()
        choosers = [Chooser(lb, next(iter(wanted.values())), 1)]
        choosers += [Chooser(lb, choice, endpoints) for choice in wanted.values()]
        runs = [[c.run(c.count) for c in choosers] for _ in range(repetitions)]
        least, *others = map(min, zip(*runs))
        for name, us in zip(wanted, others):
            row = {"choice_us": us, "added_us": us - least, "goal_us": goal_us}
            yield {**row, "name": f"{name}, {endpoints:,}", "problems": {}}


# What an exchange costs from its record to the commit of its row: in the relay's thread
# and in the store's, with what the answer said of its usage still to be read.

RECORDING_GOAL_US = 15.0
RECORDED = 1000  # at a time: what comes within the store's quarter of a second


class Recorder:
    """The proxy's store on a file of its own, and answers to be recorded."""

    def __init__(self, lb: Any, folder: Path, answer: bytes, *, stream: bool) -> None:
        self._lb, self._answer, self._stream = lb, answer, stream
        self._ids = itertools.count()
        settings = lb.StorageSettings(database=str(folder / "bench.db"))
        self._store = lb.Store(settings, lb.Log(lb.LogSettings(level="error")))
        self._store.start()

    def run(self) -> float:
        """Record RECORDED exchanges; return the CPU microseconds of one."""
        lb, body = self._lb, request_body(1024, 0)[: self._lb.SMALL_BYTES]
        watches = []
        for _ in range(RECORDED):
            make = (
                lb.SseWatch
                if self._stream
                else partial(lb.JsonWatch, self._lb.Lane.MESSAGES)
            )
            watches.append(make())
            watches[-1].feed(self._answer)
        began = time.process_time()
        for watch in watches:
            facts = ("POST", "/v1/messages", "e0", 200, 1, 1.5, 2.5, 1024, 1024)
            kept = ("", int(time.time() * 1000), None, None, (), self._stream, "", None)
            name = f"lb_{next(self._ids):014x}"
            told = lb.ExchangeRecord(name, *facts, lb.Outcome.OK, *kept, body, watch)
            self._store.record(told)
        self._store.flush(60)
        return (time.process_time() - began) / RECORDED * 1e6

    def close(self) -> None:
        """End the store's thread."""
        self._store.stop()


def record(path: Path, repetitions: int) -> Iterator[dict[str, Any]]:
    """Yield what recording costs: the best of interleaved repetitions."""
    lb = load_module(path)
    usage = b'{"input_tokens":25,"cache_read_input_tokens":9000,"output_tokens":%d}'
    message = b'{"id":"msg_1","type":"message","model":"claude-sonnet-5-5","usage":%b}'
    start = b'event: message_start\ndata: {"type":"message_start","message":%b}\n\n'
    end = b'event: message_delta\ndata: {"type":"message_delta","usage":%b}\n\n'
    text = b'event: content_block_delta\ndata: {"delta":{"text":"%b"}}\n\n' % (
        b"x" * 120
    )
    stop = b'event: message_stop\ndata: {"type":"message_stop"}\n\n'
    whole = message % (usage % 50)
    events = start % (message % (usage % 1)) + text * 20 + end % (usage % 50) + stop
    with tempfile.TemporaryDirectory() as folder:
        kinds = {"an answer": (whole, False), "a stream": (events, True)}
        recorders = []
        for place, (answer, stream) in enumerate(kinds.values()):
            own = Path(folder, str(place))
            own.mkdir(mode=0o700)
            recorders.append(Recorder(lb, own, answer, stream=stream))
        runs = [[r.run() for r in recorders] for _ in range(2 * repetitions)]
        for recorder in recorders:
            recorder.close()
    for name, us in zip(kinds, map(min, zip(*runs))):
        row = {"choice_us": us, "added_us": us, "goal_us": RECORDING_GOAL_US}
        yield {**row, "name": name, "problems": {}}


# What dialects cost, in one process: an event as it goes through a translator, each in
# a piece of its own, and a conversation of 400 KB on its way to an endpoint.

EVENT_GOAL_US, REQUEST_GOAL_US = 40.0, 15_000.0
EVENTS = 2000


def _chunk(delta: dict[str, Any]) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": None}
    facts = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    return b"data: %b\n\n" % json.dumps({**facts, "choices": [choice]}).encode()


def dialect_streams(lb: Any) -> dict[str, tuple[Callable[[], Any], list[bytes]]]:
    """Return what makes each translator, and the events that it gets."""
    text = {"type": "text_delta", "text": "x" * 40}
    delta = {"type": "content_block_delta", "index": 0, "delta": text}
    start = {"type": "content_block_start", "index": 0}
    message = {"id": "msg_1", "type": "message", "model": "m", "usage": {}}
    started = lb.event_bytes({"type": "message_start", "message": message})
    begun = lb.event_bytes({**start, "content_block": {"type": "text", "text": ""}})
    event = lb.event_bytes(delta)
    call = lb.OpenAICall(b"", True, "m", {})
    chat = lb.ChatCall(b"", True, True, "m", {})
    pieces = [{"index": 0, "function": {"arguments": '"x' + "y" * 20}}]
    opening = [
        {**pieces[0], "id": "c1", "function": {"name": "look", "arguments": "{"}}
    ]
    tools = [_chunk({"tool_calls": opening})] + [
        _chunk({"tool_calls": pieces})
    ] * EVENTS
    line = b'{"event":%b}\n' % json.dumps(delta).encode()
    openai = partial(lb.OpenAIStream, call, "spare", 1)
    return {
        "a text event of openai's": (openai, [_chunk({"content": "x" * 40})] * EVENTS),
        "a tool event of openai's": (openai, tools),
        "an event for an openai client": (
            partial(lb.ChatStream, chat, 1),
            [started + begun] + [event] * EVENTS,
        ),
        "an event of zed's": (lb.ZedStream, [line] * EVENTS),
    }


def dialect_requests(lb: Any) -> dict[str, Callable[[], object]]:
    """Return what is done with a request of 400 KB."""
    turns: list[dict[str, Any]] = []
    for number in range(200):
        use = {"type": "tool_use", "id": f"t{number}", "name": "look"}
        result = {"type": "tool_result", "tool_use_id": f"t{number}"}
        said = {"type": "text", "text": "word " * 40}
        turns += [
            {
                "role": "assistant",
                "content": [said, {**use, "input": {"q": "x" * 600}}],
            },
            {"role": "user", "content": [{**result, "content": "line\n" * 170}]},
        ]
    first = {"role": "user", "content": "hello"}
    request = {"model": "claude-x", "max_tokens": 9, "messages": [first, *turns]}
    body, settings = json.dumps(request).encode(), lb.OpenAISettings()
    chat = lb.openai_request(request, settings, None).body

    def to_openai() -> object:
        return lb.openai_request(json.loads(body), settings, None)

    return {
        "400 KB to openai": to_openai,
        "400 KB of an openai client": partial(lb.chat_request, chat),
        "400 KB, its tokens estimated": partial(lb.read_request, body),
        "400 KB without foreign thinking": partial(lb.without_unsigned, body),
    }


def translate(path: Path, repetitions: int) -> Iterator[dict[str, Any]]:
    """Yield what dialects cost: the best of interleaved repetitions."""
    lb = load_module(path)
    streams, requests = dialect_streams(lb), dialect_requests(lb)
    found: dict[str, list[float]] = {name: [] for name in (*streams, *requests)}
    for _ in range(2 * repetitions):
        for name, (make, events) in streams.items():
            translator = make()
            began = time.process_time()
            for event in events:
                translator.feed(event)
            found[name].append((time.process_time() - began) / len(events) * 1e6)
        for name, run in requests.items():
            began = time.process_time()
            run()
            found[name].append((time.process_time() - began) * 1e6)
    for name, us in found.items():
        goal = EVENT_GOAL_US if name in streams else REQUEST_GOAL_US
        row = {"choice_us": min(us), "added_us": min(us), "goal_us": goal}
        yield {**row, "name": name, "problems": {}}


#: Tests of the module itself.
IN_PROCESS = {"choosing": choose, "recording": record, "translating": translate}

# 50 clients stream without a pause, far below what the proxy can carry: short requests
# in closed loops would show their own queue.  Each that is to meet the fault names a
# model of its own, routed to an endpoint at fault and then to the healthy one; so each
# request meets it, though an endpoint that recovers gets one attempt at a time.

FAILOVER_CLIENTS = 50


class Fault(NamedTuple):
    """What an endpoint does, and how the proxy is to take it."""

    name: str
    settings: dict[str, Any]
    every: int  # so many-th client meets it: 529 is repeated for a fifth of all at most
    pause_ms: float
    goal_ms: float


FAULTS = (
    Fault("refused", {}, 1, 0.0, 5.0),
    Fault("529", {"retries": 0}, 10, 0.0, 50.0),
    Fault("529, retried", {"retryDelayMs": 100}, 10, 100.0, 50.0),
)


def failover_settings(fault: Fault, upstreams: Upstreams) -> dict[str, Any]:
    """Return what the configuration file holds for `fault`."""
    good, bad = (f"http://127.0.0.1:{port}" for port in upstreams.ports)
    bad += OVERLOADED_PATH
    if fault.name == "refused":
        bad = f"http://127.0.0.1:{free_port()}"
    names = [f"faulty-{i}" for i in range(FAILOVER_CLIENTS)]
    urls = {"good": good, **dict.fromkeys(names, bad)}
    own, then = {"authToken": "sk-ant-bench"}, {"endpoint": "good", "priority": 2}
    routes = {name: [{"endpoint": name, "priority": 1}, then] for name in names}
    return {
        "endpoints": [{"name": n, "baseURL": url, **own} for n, url in urls.items()],
        "routes": {"*": [then], **routes},
        "failover": {"cooldown": 0, **fault.settings},
    }


def measure_failover(fault: Fault, target: Target, seconds: float) -> dict[str, Any]:
    """Return what `fault` adds to the same load on the healthy endpoint alone."""
    load = Load("requests", target.port, FAILOVER_CLIENTS, seconds, events=2)
    load = replace(load, delay_ms=50, ramp_s=0.4)
    healthy = run_load(load, lambda _phase, _events: None)
    row = run_load(replace(load, faulty=fault.every), lambda _phase, _events: None)
    row["goal_ms"] = fault.goal_ms
    if not row.get("failed_over") or not healthy.get("done"):
        row["problems"] = row["problems"] or {"no figures": 1}
        return row
    for point in ("p50", "p99"):
        row[f"healthy_{point}"] = usual = healthy["first_ms"][point]
        row[f"failover_{point}"] = row["failover_ms"][point] - usual - fault.pause_ms
    return row


# ============================================================================
# 8. RUN
# ============================================================================


class Bench:
    """All targets and upstreams of one run, and what was measured."""

    def __init__(self, recipes: list[Recipe], scale: Scale, log: bool) -> None:
        self.rows: list[dict[str, Any]] = []
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.proxy = Path()  # the module that chooses
        self._recipes = recipes
        self._scale = scale
        self._log = log
        self._folder = Path(tempfile.mkdtemp(prefix="bench-"))
        self._upstreams: dict[str, Upstreams] = {}
        self._targets: dict[str, list[Target]] = {}

    def run(self, tests: list[Test]) -> None:
        """Run `tests` in order."""
        for test in tests:
            if test.scheme not in self._upstreams and not self._prepare(test.scheme):
                continue
            if test.kind == "memory":
                self._run_memory(test)
            elif test.kind == "start":
                self._run_start(test)
            elif test.kind in IN_PROCESS:
                for row in IN_PROCESS[test.kind](self.proxy, self._scale.repetitions):
                    self._keep(row, test, row["name"], 0)
            elif test.kind == "failover":
                for fault in FAULTS:
                    self._run_failover(test, fault)
            else:
                self._run_rounds(test)

    def close(self) -> None:
        """End all that runs and remove the files."""
        for targets in self._targets.values():
            for target in targets:
                target.stop()
        end_all()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _prepare(self, scheme: str) -> bool:
        """Start the upstreams of `scheme`; tell whether there are any."""
        certificate = None
        if scheme == "https":
            certificate = make_certificate(self._folder)
            if certificate is None:
                self.notes.append("no TLS tests: the openssl command is missing")
                return False
        self._upstreams[scheme] = Upstreams(certificate)
        self._upstreams[scheme].start()
        return True

    def _recipes_for(self, scheme: str) -> Iterator[Recipe]:
        for recipe in self._recipes:
            if recipe.suits(scheme) and (recipe.command or scheme == "http"):
                yield recipe

    def _start(self, recipe: Recipe, scheme: str) -> Target:
        target = Target(recipe, self._upstreams[scheme], self._log)
        try:
            target.start()
        except (RuntimeError, OSError):
            target.stop()
            raise
        return target

    def _running(self, scheme: str) -> list[Target]:
        """Return the targets that stay up for all rounds; start them once."""
        if scheme not in self._targets:
            self._targets[scheme] = []
            for recipe in self._recipes_for(scheme):
                try:
                    target = self._start(recipe, scheme)
                except (RuntimeError, OSError) as error:
                    self.problems.append(str(error))
                    continue
                self._targets[scheme].append(target)
                _warm_up(target)
        return self._targets[scheme]

    def _run_rounds(self, test: Test) -> None:
        targets = self._running(test.scheme)
        for number in range(self._scale.rounds):
            shift = number % max(1, len(targets))
            for target in targets[shift:] + targets[:shift]:
                row = measure(test, target, self._scale)
                self._keep(row, test, target.name, number)

    def _run_memory(self, test: Test) -> None:
        for recipe in self._recipes_for(test.scheme):
            if not recipe.command or not ON_LINUX:
                continue

            def start(recipe: Recipe = recipe) -> Target:
                return self._start(recipe, test.scheme)

            try:
                row = measure_memory(start, self._scale)
            except (RuntimeError, OSError) as error:
                self.problems.append(str(error))
                continue
            self._keep(row, test, recipe.name, 0)

    def _run_start(self, test: Test) -> None:
        for number in range(self._scale.starts):
            for recipe in self._recipes_for(test.scheme):
                if not recipe.command:
                    continue
                try:
                    target = self._start(recipe, test.scheme)
                except (RuntimeError, OSError) as error:
                    self.problems.append(str(error))
                    return
                row = {"start_ms": target.start_s * 1000, "problems": {}}
                target.stop()
                self._keep(row, test, recipe.name, number)

    def _run_failover(self, test: Test, fault: Fault) -> None:
        upstreams = self._upstreams[test.scheme]
        for recipe in (r for r in self._recipes if r.name == "claude_lb"):
            target = Target(recipe, upstreams, self._log)
            target.settings = failover_settings(fault, upstreams)
            try:
                target.start()
                _warm_up(target)
                for number in range(self._scale.rounds):
                    row = measure_failover(fault, target, self._scale.failover_s)
                    self._keep(row, test, fault.name, number)
            except (RuntimeError, OSError) as error:
                self.problems.append(str(error))
            finally:
                target.stop()

    def _keep(self, row: dict[str, Any], test: Test, name: str, number: int) -> None:
        row.update(test=test.name, target=name, round=number + 1)
        self.rows.append(row)
        for problem, count in row["problems"].items():
            self.problems.append(f"{test.name}, {name}: {problem} ({count} times)")
        names = ("cpu_us", "start_ms", "idle_rss_mb", "choice_us", "failover_p50")
        figure = next((row[key] for key in names if row.get(key)), None)
        words = f"{figure:.1f}" if figure else "-"
        print(f"{test.name} {name} {number + 1}: {words}", file=sys.stderr)


# ============================================================================
# 9. REPORT
# ============================================================================


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one summary for each test and target, medians over the rounds.

    `ratio` compares the CPU time with nginx's of the same round, `added_ms` the
    latency with that of the way without a proxy.
    """
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["test"], row["target"]), []).append(row)
    summaries = []
    for (test, name), group in groups.items():
        nginx = {row["round"]: row for row in groups.get((test, "nginx"), [])}
        direct = {row["round"]: row for row in groups.get((test, "direct"), [])}
        summary: dict[str, Any] = {"test": test, "target": name, "runs": len(group)}
        for key in sorted({key for row in group for key in row}):
            values = [row[key] for row in group if _is_figure(row.get(key))]
            if values and key != "round":
                summary[key] = _spread(values)
        ratios = [
            row["cpu_us"] / nginx[row["round"]]["cpu_us"]
            for row in group
            if row.get("cpu_us") and nginx.get(row["round"], {}).get("cpu_us")
        ]
        if ratios:
            summary["ratio"] = _spread(ratios)
        for point in ("p50", "p99"):
            values = [r["latency_ms"][point] for r in group if r.get("latency_ms")]
            if values:
                summary[f"{point}_ms"] = _spread(values)
            values = [
                r["latency_ms"][point] - direct[r["round"]]["latency_ms"][point]
                for r in group
                if r.get("latency_ms") and direct.get(r["round"], {}).get("latency_ms")
            ]
            if values and name != "direct":
                summary[f"added_{point}_ms"] = _spread(values)
        summaries.append(summary)
    return summaries


def _is_figure(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _spread(values: list[float]) -> dict[str, float]:
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
    }


def _cell(summary: dict[str, Any], key: str, digits: int, spread: bool = False) -> str:
    """Return the median of a figure as text, with its spread if wanted."""
    value = summary.get(key)
    if not value:
        return "-"
    text = f"{value['median']:.{digits}f}"
    if spread and summary["runs"] > 1:
        text += f" ({value['min']:.{digits}f}..{value['max']:.{digits}f})"
    return text


def render(summaries: list[dict[str, Any]]) -> str:
    """Return the markdown tables."""
    work = [s for s in summaries if "latency_ms" in s or "p50_ms" in s]
    lines = [
        "| test | target | CPU us each | x nginx | set-up us | p50 ms | p99 ms "
        "| added p50 | added p99 | each/s |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for item in work:
        count = item["events"] if item["events"]["median"] else item["done"]
        pace = count["median"] / max(0.001, item["elapsed_s"]["median"])
        cells = [
            item["test"],
            item["target"],
            _cell(item, "cpu_us", 1, spread=True),
            _cell(item, "ratio", 2, spread=True),
            _cell(item, "setup_us", 0),
            *(_cell(item, key, 2) for key in ("p50_ms", "p99_ms")),
            *(_cell(item, key, 2) for key in ("added_p50_ms", "added_p99_ms")),
            f"{pace:,.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    text = "\n".join(lines) + "\n" if work else ""
    return text + _render_footprint(summaries) + _render_goals(summaries)


def _render_footprint(summaries: list[dict[str, Any]]) -> str:
    merged: dict[str, dict[str, Any]] = {}
    for item in summaries:
        if "idle_rss_mb" in item or "start_ms" in item:
            merged.setdefault(item["target"], {}).update(item)
    if not merged:
        return ""
    lines = [
        "",
        "| target | start ms | idle RSS MB | KB per idle connection "
        "| KB per stream | streams held | threads then |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name, item in merged.items():
        cells = [
            name,
            _cell(item, "start_ms", 0, spread=True),
            _cell(item, "idle_rss_mb", 1),
            _cell(item, "idle_kb_each", 1),
            _cell(item, "streams_kb_each", 1),
            _cell(item, "streams_held", 0),
            _cell(item, "streams_threads", 0),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _render_goals(summaries: list[dict[str, Any]]) -> str:
    """Return what choosing (us) and failing over (ms) add, beside their goals."""
    title = "| test | in all, or p50 and p99 of the healthy | added | p99 | goal |"
    lines = ["", title, "|---|--:|--:|--:|--:|"]
    for item in summaries:
        cells = [_cell(item, key, 1) for key in ("choice_us", "added_us")] + ["-"]
        if "failover_p50" in item:
            cells = [_cell(item, f"healthy_{p}", 1) for p in ("p50", "p99")]
            cells = [" and ".join(cells)]
            cells += [_cell(item, f"failover_{p}", 1) for p in ("p50", "p99")]
        goal = item.get("goal_us") or item.get("goal_ms")
        if goal:
            missed = " missed" if float(cells[1]) > goal["median"] else ""
            cells.append(f"{goal['median']:.0f}{missed}")
            lines.append(f"| {item['test']} {item['target']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n" if len(lines) > 3 else ""


def machine() -> dict[str, Any]:
    """Return what the figures depend on."""
    model = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "load_average": os.getloadavg(),
    }


# ============================================================================
# 10. CLI
# ============================================================================


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    script = Path(__file__).resolve().parent.parent / "claude_lb.py"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="one short round of fewer tests")
    add("--only", metavar="NAME,...", help="the tests to run")
    add("--rounds", type=int, help="rounds of each test (default 3; at most 20)")
    add("--targets", metavar="NAME,...", help="only these of the targets")
    add(
        "--cmd",
        action="append",
        default=[],
        metavar="NAME=COMMAND",
        help="another target; {port}, {up1} and {up2} stand for ports, {config} for "
        "the path of an endpoints file",
    )
    add("--info-log", action="store_true", help="leave logs on, also nginx's")
    add("--json", type=Path, metavar="FILE", help="write all figures there")
    add("--python", default=sys.executable, help="the Python that runs the proxy")
    add("--proxy", type=Path, default=script, help="the claude_lb.py to measure")
    return parser


def make_recipes(options: argparse.Namespace) -> list[Recipe]:
    """Return the targets that `options` ask for."""
    recipes = [Recipe("direct", "")]
    nginx = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/sbin")
    if nginx:
        command = f"{shlex.quote(nginx)} -e stderr -c {{nginx}}"
        recipes.append(Recipe("nginx", command))
    words = [options.python, str(options.proxy.resolve()), "-c"]
    command = " ".join(map(shlex.quote, words)) + " {config} --port {port}"
    recipes.append(Recipe("claude_lb", command))
    for item in options.cmd:
        name, _, command = item.partition("=")
        recipes.append(Recipe(name, command))
    if options.targets:
        names = options.targets.split(",")
        recipes = [recipe for recipe in recipes if recipe.name in names]
    return recipes


def run_role(arguments: list[str]) -> int:
    """Be a mock upstream or a load client until it is done."""
    raise_file_limit()
    if arguments[0] == "upstream":
        Upstream(*arguments[1:]).run()
    else:
        LoadClient(Load(**json.loads(arguments[1]))).run()
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    words = sys.argv[1:] if arguments is None else arguments
    if words[:1] == ["--role"]:
        return run_role(words[1:])
    parser = build_parser()
    options = parser.parse_args(words)
    scale = QUICK if options.quick else Scale()
    if options.rounds:
        rounds = max(1, min(options.rounds, 20))
        scale = Scale(**{**asdict(scale), "rounds": rounds})
    names = options.only or (QUICK_TESTS if options.quick else DEFAULT_TESTS)
    try:
        tests = [parse_test(name) for name in names.split(",")]
    except ValueError as error:
        parser.error(str(error))
    raise_file_limit()
    atexit.register(end_all)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    bench = Bench(make_recipes(options), scale, options.info_log)
    bench.proxy = options.proxy.resolve()
    try:
        bench.run(tests)
    finally:
        bench.close()
    summaries = summarise(bench.rows)
    print(render(summaries))
    for line in [*bench.notes, *(f"wrong: {p}" for p in bench.problems)]:
        print(line)
    if options.json:
        figures = {"machine": machine(), "summary": summaries, "rows": bench.rows}
        options.json.write_text(json.dumps({**figures, "problems": bench.problems}))
    return 1 if bench.problems else 0


if __name__ == "__main__":
    sys.exit(main())
