"""Tests of claude_lb, in the order of its sections; then real sockets, real clients.

Contents
    1. SECTIONS   the pure sections, LOG and POOL, without a socket
    2. SOCKETS    forwarding, streaming, the fault matrix, access, stop
    3. CLIENTS    the official SDK and the Claude Code CLI
    4. PROGRAM    the command line, the launchd agent, the example
    5. SOURCE     the layout rules of the file itself

Tools beyond pytest (openssl, the SDK, the CLI) are optional: a test that needs one
is skipped where it is absent, and fails where CI=true.
"""

from __future__ import annotations

import ast
import asyncio
import base64
import collections
import contextlib
import copy
import errno
import gc
import gzip
import hashlib
import http.client
import http.server
import importlib
import importlib.util
import io
import itertools
import json
import math
import os
import plistlib
import pty
import random
import re
import resource
import select
import shlex
import shutil
import signal
import socket
import sqlite3
import ssl
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

import pytest

import claude_lb
from claude_lb import (
    Account,
    AccountBook,
    AccountError,
    AccountSettings,
    AttemptRecord,
    AuthType,
    Config,
    ConfigError,
    ExchangeRecord,
    Lane,
    Log,
    LogSettings,
    Outcome,
    Phase,
    ProviderError,
    Renewer,
    Secret,
    StorageSettings,
    Store,
    StoreError,
    Usage,
    Verdict,
    account_of,
    analytics,
    analytics_document,
    analytics_lines,
    analyze,
    analyze_lines,
    clear_history,
    endpoint_of_account,
    memory_database,
    new_login,
    open_database,
    parse_config,
    percentile_ms,
    read_pasted,
    read_token_reply,
    recent_requests,
    reset_statistics,
    statistics,
    stats_document,
    stats_lines,
    with_accounts,
    write_records,
)

# ============================================================================
# 1. SECTIONS
# ============================================================================

URL = "https://a.example"
TOKEN = "sk-ant-api03-R4nd0mTextOfAnEndpoint"
KEY = "Zq3vX8-kLw0RtY7uIoP2aSdFgHjKlMnB"  # 32 random characters
CRLF = b"\r\n"

# -- fakes -----------------------------------------------------------------


#: For what takes long and is the same on each: on the oldest and the newest Python.
at_both_ends = pytest.mark.skipif(
    (3, 9) < sys.version_info[:2] < (3, 13), reason="tried on Python 3.9 and 3.13"
)


class FakeTokenSource:
    """Imitates CLI's environment: variables, commands and proxy rules from dicts."""

    def __init__(
        self,
        variables: Mapping[str, str] | None = None,
        commands: Mapping[str, str] | None = None,
        proxies: Mapping[str, str] | None = None,
    ) -> None:
        self.variables = dict(variables or {})
        self.commands = dict(commands or {})
        self.proxies = dict(proxies or {})

    def variable(self, name: str) -> str | None:
        return self.variables.get(name)

    def command(self, line: str) -> str:
        if line not in self.commands:
            raise ValueError("the command printed no token (exit code 3)")
        return self.commands[line]

    def proxy_for(self, host: str) -> str | None:
        return self.proxies.get(host)


def load(raw: object, source: FakeTokenSource | None = None) -> claude_lb.Config:
    """Read a configuration given as text or as data."""
    text = raw if isinstance(raw, str) else json.dumps(raw)
    return claude_lb.parse_config(text, name="f.json", source=source or source_of())


def source_of() -> FakeTokenSource:
    return FakeTokenSource()


def faults_of(raw: object, source: FakeTokenSource | None = None) -> list[str]:
    """Return the faults of a configuration, without the file's name."""
    with pytest.raises(claude_lb.ConfigError) as caught:
        load(raw, source)
    assert all(line.startswith("f.json: ") for line in caught.value.faults)
    return [line[len("f.json: ") :] for line in caught.value.faults]


def item(**changes: object) -> dict[str, object]:
    """Return one endpoint's JSON; None takes a key away."""
    whole = {"baseURL": URL, "authToken": TOKEN, **changes}
    return {k: v for k, v in whole.items() if v is not None}


def only_endpoint(raw: Mapping[str, object], **source: Any) -> claude_lb.Endpoint:
    """Return the one endpoint that `raw` describes."""
    (endpoint,) = load([raw], FakeTokenSource(**source)).endpoints
    return endpoint


def endpoint_of(
    name: str = "one",
    auth_type: AuthType = AuthType.API_KEY,
    credential: str | None = TOKEN,
    **changes: Any,
) -> claude_lb.Endpoint:
    """Return an endpoint made by hand."""
    values: dict[str, Any] = {
        "base_url": f"https://{name}.example",
        "secure": True,
        "host": f"{name}.example",
        "port": 443,
        "prefix": "",
        **changes,
    }
    secret = None if credential is None else claude_lb.Secret(credential)
    return claude_lb.Endpoint(
        name=name, auth_type=auth_type, credential=secret, **values
    )


def request_of(*fields: str, start: str = "POST /v1/messages HTTP/1.1") -> bytes:
    """Return a request head with a Host field and `fields`."""
    lines = [start, "Host: 127.0.0.1:13255", *fields]
    return "".join(f"{line}\r\n" for line in lines).encode("latin-1") + CRLF


def answer_of(*fields: str, start: str = "HTTP/1.1 200 OK") -> bytes:
    """Return an answer head with `fields`."""
    return "".join(f"{x}\r\n" for x in (start, *fields)).encode("latin-1") + CRLF


def parsed(head: bytes) -> claude_lb.RequestHead:
    """Return what a good request head says."""
    return claude_lb.parse_request_head(head)[0]


def refusal_of(head: bytes) -> claude_lb.RefusedError:
    """Return the refusal of a bad request head."""
    with pytest.raises(claude_lb.RefusedError) as caught:
        claude_lb.parse_request_head(head)
    return caught.value


def sent_fields(
    head: bytes,
    endpoint: claude_lb.Endpoint | None = None,
    credentials: tuple[bytes, ...] = (),
) -> list[tuple[str, str]]:
    """Return the (name as sent, value) pairs that an upstream would see."""
    made = claude_lb.upstream_head(
        parsed(head), endpoint or endpoint_of(), "me", credentials
    )
    assert made.endswith(CRLF)
    pairs = [line.split(": ", 1) for line in made.decode("latin-1").split("\r\n")[1:-1]]
    return [(name, value) for name, value in pairs]


def values_of(fields: Iterable[tuple[str, str]], name: str) -> list[str]:
    """Return every value of the field `name`, in order."""
    return [value for n, value in fields if n.lower() == name]


def all_splits(data: bytes) -> Iterator[tuple[bytes, ...]]:
    """Yield `data` whole, cut in two at every place, and byte by byte."""
    yield (data,)
    for i in range(1, len(data)):
        yield data[:i], data[i:]
    yield tuple(data[i : i + 1] for i in range(len(data)))


def decode_chunks(data: bytes) -> bytes:
    """Decode a chunked body to its very end: a second opinion on ChunkedReader."""
    payload, rest = b"", data
    while True:
        line, rest = rest.split(CRLF, 1)
        size = int(re.fullmatch(rb"([0-9A-Fa-f]+)(;.*)?", line)[1], 16)  # type: ignore[index]
        if size == 0:
            assert rest == CRLF, "trailers or bytes after the last chunk"
            return payload
        assert rest[size : size + 2] == CRLF, "data without its CRLF"
        payload, rest = payload + rest[:size], rest[size + 2 :]


# -- 2. errors -------------------------------------------------------------


class TestErrorsEnvelope:
    @pytest.mark.parametrize(
        ("status", "kind"),
        [
            (400, "invalid_request_error"),
            (401, "authentication_error"),
            (403, "permission_error"),
            (404, "not_found_error"),
            (405, "invalid_request_error"),
            (408, "timeout_error"),
            (413, "request_too_large"),
            (414, "invalid_request_error"),
            (421, "invalid_request_error"),
            (429, "rate_limit_error"),
            (431, "invalid_request_error"),
            (500, "internal_error"),
            (502, "api_error"),
            (503, "overloaded_error"),
        ],
    )
    def test_a_status_has_the_type_that_its_users_know(
        self, status: int, kind: str
    ) -> None:
        assert claude_lb.error_document(status, "why", "lb_1") == {
            "type": "error",
            "error": {"type": kind, "message": "why"},
            "request_id": "lb_1",
        }

    @pytest.mark.parametrize(
        "text", ['"}{', "a\r\nb: c", "\x00\x1b[31m", "\u2028é\udc80"]
    )
    def test_a_hostile_message_stays_inside_its_json_text(self, text: str) -> None:
        body = json.dumps(claude_lb.error_document(502, text, "lb_1")).encode()
        assert body.isascii()
        assert not set(body) & set(range(0x20))
        assert json.loads(body)["error"]["message"] == text

    def test_every_status_of_our_own_has_a_reason_phrase(self) -> None:
        for status in [*claude_lb.ERROR_TYPES, 400, 405, 414, 417, 421, 431, 505]:
            if status != 429:  # passed on from upstreams, with their phrase
                assert claude_lb.REASONS[status]

    def test_a_config_error_shows_a_line_for_each_fault(self) -> None:
        error = claude_lb.ConfigError(["a: one", "b: two"])
        assert (str(error), error.faults) == ("a: one\nb: two", ("a: one", "b: two"))


class TestModelSecrets:
    @pytest.mark.parametrize("show", [str, repr, "{}".format, "%r".__mod__])
    def test_a_secret_is_not_shown(self, show: Callable[[object], str]) -> None:
        endpoint = only_endpoint(item())
        assert endpoint.credential is not None
        assert TOKEN not in show(endpoint.credential)
        assert TOKEN not in show(endpoint)
        assert TOKEN not in show(load([item()]))
        assert KEY not in show(
            load({"endpoints": [item()], "server": {"clientKeys": [KEY]}})
        )

    def test_a_secret_cannot_become_json(self) -> None:
        with pytest.raises(TypeError):
            json.dumps({"key": claude_lb.Secret(TOKEN)})

    @pytest.mark.parametrize(
        ("changes", "authority"),
        [
            ({}, "one.example"),
            ({"port": 8443}, "one.example:8443"),
            ({"port": 80}, "one.example:80"),
            ({"port": 80, "secure": False}, "one.example"),
            ({"port": 443, "secure": False}, "one.example:443"),
            ({"host": "::1", "port": 9000}, "[::1]:9000"),
            ({"host": "::1"}, "[::1]"),
        ],
    )
    def test_the_authority_leaves_out_the_usual_port_only(
        self, changes: dict[str, Any], authority: str
    ) -> None:
        assert endpoint_of(**changes).authority == authority


# -- 4. config -------------------------------------------------------------

TWO_IN_JS = r"""'use strict';
// Endpoints of the Node balancer: it's "code", read as data.
/* baseURL: 'https://comment.example',
   over two lines */
module.exports = [
  { baseURL: 'https://a.example', authToken: 'tok-it\'s-A1' }, // the first
  {
    'baseURL': "https://b.example/v1//x",
    authToken: "tok-/*b*/-B2", /* trailing comma follows */
  },
];
"""


def shape_of(config: claude_lb.Config) -> list[tuple[str, str]]:
    """Return (base URL, token) of each endpoint."""
    return [
        (e.base_url, e.credential.reveal() if e.credential else "")
        for e in config.endpoints
    ]


class TestConfigShapes:
    def test_a_bare_list_is_the_endpoints(self) -> None:
        config = load([item(), item(baseURL="https://b.example", authToken="tok-2")])
        assert shape_of(config) == [(URL, TOKEN), ("https://b.example", "tok-2")]
        assert config.server == claude_lb.ServerSettings()
        assert config.source == "f.json"

    def test_an_object_holds_every_section(self) -> None:
        config = load(
            {
                "endpoints": [item()],
                "server": {
                    "host": "127.0.0.2",
                    "port": 4000,
                    "clientKeys": [KEY],
                    "adminKey": KEY[::-1],
                    "corsOrigins": ["https://app.example:8080", "*"],
                    "allowedHosts": ["lb.example"],
                    "maxConnections": 7,
                    "maxBodyMiB": 1.5,
                    "drainSeconds": 3,
                },
                "timeouts": {"connect": 1, "firstByte": 2.5, "idle": 3},
                "log": {
                    "level": "debug",
                    "format": "json",
                    "color": "off",
                    "file": "x.log",
                    "lifecycle": True,
                },
            }
        )
        server = config.server
        assert [k.reveal() for k in server.client_keys] == [KEY]
        assert server.admin_key is not None
        assert server.admin_key.reveal() == KEY[::-1]
        assert (server.host, server.port) == ("127.0.0.2", 4000)
        assert server.cors_origins == ("https://app.example:8080", "*")
        assert server.allowed_hosts == ("lb.example",)
        limits = (server.max_connections, server.max_body_mib, server.drain_s)
        assert limits == (7, 1.5, 3.0)
        assert config.timeouts == claude_lb.TimeoutSettings(1.0, 2.5, 3.0)
        assert config.log == claude_lb.LogSettings(
            "debug", "json", "off", "x.log", lifecycle=True
        )

    def test_the_defaults_are_the_binding_ones(self) -> None:
        config = load([item()])
        server = config.server
        assert (server.host, server.port) == ("127.0.0.1", 13255)
        limits = (server.max_connections, server.max_body_mib, server.drain_s)
        assert limits == (2048, 64.0, 30.0)
        assert config.timeouts == claude_lb.TimeoutSettings(5.0, 600.0, 300.0)

    def test_a_node_module_is_read(self) -> None:
        assert shape_of(load(TWO_IN_JS)) == [
            ("https://a.example", "tok-it's-A1"),
            ("https://b.example/v1//x", "tok-/*b*/-B2"),
        ]

    @pytest.mark.parametrize(
        "text",
        [
            '[{"baseURL": "https://a.example", "authToken": "tok-1"}]',
            '\ufeff[{"baseURL": "https://a.example", "authToken": "tok-1"}]\n',
            "[{baseURL:'https://a.example',authToken:'tok-1'},]",
            "module.exports=[{baseURL:'https://a.example',authToken:'tok-1'}]",
            "module . exports = [{baseURL:'https://a.example',authToken:'tok-1'}];\n\n",
            "exports = [{baseURL:'https://a.example',authToken:'tok-1'}] // end",
            "export default [{baseURL:'https://a.example',authToken:'tok-1'}];",
            "module.exports = {endpoints:[{baseURL:'https://a.example',"
            "authToken:'tok-1',},],}",
            '// a comment\r\n[{"baseURL": "https://a.example", // why\r\n'
            '"authToken": "tok-1"}]',
            '"use strict"\nmodule.exports = [{\n\tbaseURL : "https://a.example" ,\n'
            '\tauthToken : "tok-1" }]',
        ],
        ids=[
            "json",
            "byte order mark",
            "bare",
            "tight module",
            "spaced module",
            "exports",
            "export default",
            "module of an object",
            "json with comments and CRLF",
            "double quotes",
        ],
    )
    def test_the_same_endpoint_in_every_dress(self, text: str) -> None:
        assert shape_of(load(text)) == [("https://a.example", "tok-1")]

    @pytest.mark.parametrize(
        ("inner", "want"),
        [
            (r"it\'s", "it's"),
            ('say "x"', 'say "x"'),
            (r"a\\b", "a\\b"),
            (r"\u0041\n", "A\n"),
            ("// no comment", "// no comment"),
            ("a, }", "a, }"),
            ("", ""),
        ],
    )
    def test_single_quotes_hold_what_javascript_says(
        self, inner: str, want: str
    ) -> None:
        assert json.loads(claude_lb.loose_to_json(f"['{inner}']")) == [want]

    def test_numbers_and_words_of_json_stand_in_a_module(self) -> None:
        text = "exports = {a: -1.5e3, $b: true, c_1: false, d: null, 'e f': [0, 12,],}"
        assert json.loads(claude_lb.loose_to_json(text)) == {
            "a": -1500.0,
            "$b": True,
            "c_1": False,
            "d": None,
            "e f": [0, 12],
        }

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("module.exports = [\n{baseURL: process.env.URL}]", "line 2: process"),
            ("\n\nmodule.exports = require('./x')", "line 3: require"),
            ("const e = [];\nmodule.exports = e", "line 1: const"),
            ("(function(){ return [] })()", "line 1"),
            ("module.exports = [`https://a.example`]", "line 1: unexpected '`'"),
            ("module.exports = [\n'a' + 'b']", "line 2: unexpected '+'"),
            ("module.exports = [{...base}]", "line 1: base"),
            ("module.exports = [undefined]", "line 1: undefined"),
        ],
    )
    def test_what_would_have_to_be_run_is_refused_by_line(
        self, text: str, said: str
    ) -> None:
        (fault,) = faults_of(text)
        assert fault.startswith(said)

    def test_a_module_cannot_act(self, tmp_path: Path) -> None:
        mark = tmp_path / "mark"
        attack = f"__import__('pathlib').Path({str(mark)!r}).touch()"
        for text in (attack, f"[{attack}]", f"module.exports = [{attack}]"):
            faults_of(text)
        assert not mark.exists()

    def test_a_broken_module_names_the_line_of_the_mistake(self) -> None:
        text = "module.exports = [\n  {baseURL: 'https://a.example'\n  authToken: 'x'}]"
        (fault,) = faults_of(text)
        assert re.search(r"\bline [23]\b", fault), fault


class TestConfigFaults:
    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("", "line 1, column 1"),
            ("[", "line 1, column 2"),
            ('[{"baseURL": }]', "line 1, column 14"),
            ('{"endpoints": [1}', "line 1, column 17"),
            ("3", "expected a list of endpoints or an object"),
            ('"text"', "expected a list of endpoints or an object"),
            ("[" * 100_000, "recursion"),
            ("[1" + "0" * 5000 + "]", ""),
        ],
    )
    def test_text_that_is_no_configuration_gets_one_line(
        self, text: str, said: str
    ) -> None:
        (fault,) = faults_of(text)
        assert said in fault
        assert "\n" not in fault
        assert len(fault) < 200

    @pytest.mark.parametrize(
        ("raw", "path"),
        [
            ([], "endpoints: "),
            ({}, "endpoints: "),
            ({"endpoints": {}}, "endpoints: "),
            ([1], "endpoints[0]: "),
            ([item(), "x"], "endpoints[1]: "),
            ([item(authToken=7)], "endpoints[0].authToken: "),
            ([item(authToken=" ")], "endpoints[0].authToken: "),
            ([item(enabled="yes")], "endpoints[0].enabled: "),
            ([item(default=1)], "endpoints[0].default: "),
            ([item(authType="bearer")], "endpoints[0].authType: "),
            ([item(name="")], "endpoints[0].name: "),
            ([item(name="a\nb")], "endpoints[0].name: "),
            ([item(name="n" * 65)], "endpoints[0].name: "),
            ([item(name="naïve")], "endpoints[0].name: "),
            ([item(caFile=[])], "endpoints[0].caFile: "),
            ([item(baseURL=None)], "endpoints[0]: baseURL is missing"),
            ([item(default=True), item(default=True)], "endpoints: only one"),
            ([item(enabled=False)], "endpoints: every endpoint is disabled"),
            ([item(name="x"), item(name="x")], "endpoints[1].name: "),
        ],
    )
    def test_a_fault_of_an_endpoint_names_its_path(
        self, raw: object, path: str
    ) -> None:
        assert any(fault.startswith(path) for fault in faults_of(raw))

    @pytest.mark.parametrize(
        ("section", "key", "value"),
        [
            ("server", "host", ""),
            ("server", "port", "80"),
            ("server", "port", 65536),
            ("server", "port", -1),
            ("server", "port", 80.5),
            ("server", "port", True),
            ("server", "clientKeys", KEY),
            ("server", "adminKey", 5),
            ("server", "corsOrigins", "*"),
            ("server", "allowedHosts", {}),
            ("server", "maxConnections", 0),
            ("server", "maxBodyMiB", 0),
            ("server", "maxBodyMiB", 257),
            ("server", "drainSeconds", -1),
            ("server", "drainSeconds", None),
            ("timeouts", "connect", 0),
            ("timeouts", "firstByte", "10"),
            ("timeouts", "idle", -5),
            ("log", "level", "loud"),
            ("log", "format", "xml"),
            ("log", "color", True),
            ("log", "file", ""),
            ("log", "lifecycle", 1),
            ("storage", "database", 5),
            ("storage", "history", "no"),
            ("storage", "retentionDays", 0),
            ("storage", "maxRows", 1.5),
            ("accounts", "names", "work"),
            ("accounts", "tokenURL", "ftp://127.0.0.1/"),
            ("accounts", "tickerMinutes", -1),
        ],
    )
    def test_a_fault_of_a_section_names_its_path(
        self, section: str, key: str, value: object
    ) -> None:
        (fault,) = faults_of({"endpoints": [item()], section: {key: value}})
        assert fault.startswith(f"{section}.{key}: expected")

    @pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
    def test_numbers_that_are_none_are_faults(self, number: str) -> None:
        text = json.dumps({"endpoints": [item()], "timeouts": {"idle": "@"}})
        (fault,) = faults_of(text.replace('"@"', number))
        assert fault.startswith("timeouts.idle: ")

    @pytest.mark.parametrize("section", ["server", "timeouts", "log"])
    @pytest.mark.parametrize("value", [None, [], "x", 1])
    def test_a_section_is_an_object(self, section: str, value: object) -> None:
        (fault,) = faults_of({"endpoints": [item()], section: value})
        assert fault.startswith(f"{section}: expected an object")

    @pytest.mark.parametrize(
        ("raw", "fault"),
        [
            (
                {"endpoint": [item()], "endpoints": [item()]},
                "endpoint: unknown key (did you mean endpoints?)",
            ),
            (
                [item(enabeld=True)],
                "endpoints[0].enabeld: unknown key (did you mean enabled?)",
            ),
            (
                [item(auth_token_env="X")],
                "endpoints[0].auth_token_env: unknown key (did you mean authTokenEnv?)",
            ),
            (
                {"endpoints": [item()], "server": {"clientkeys": [KEY]}},
                "server.clientkeys: unknown key (did you mean clientKeys?)",
            ),
            (
                {"endpoints": [item()], "timeouts": {"first_byte": 3}},
                "timeouts.first_byte: unknown key (did you mean firstByte?)",
            ),
            (
                {"endpoints": [item()], "log": {"colour": "off"}},
                "log.colour: unknown key (did you mean color?)",
            ),
            (
                {"endpoints": [item()], "log": {"level": "INFO"}},
                "log.level: expected one of debug, info, warn, warning, error"
                " (did you mean info?)",
            ),
            (
                [item(authType="apikey")],
                "endpoints[0].authType: expected one of api_key, auth_token,"
                " passthrough (did you mean api_key?)",
            ),
            ([item(zzz=1)], "endpoints[0].zzz: unknown key"),
        ],
    )
    def test_a_near_miss_gets_a_hint(self, raw: object, fault: str) -> None:
        assert faults_of(raw) == [fault]

    def test_a_misspelt_base_url_is_hinted_at(self) -> None:
        faults = faults_of([{"baseUrl": URL, "authToken": TOKEN}])
        assert "endpoints[0].baseUrl: unknown key (did you mean baseURL?)" in faults

    def test_all_faults_of_a_file_are_reported_together(self) -> None:
        faults = faults_of(
            {
                "endpoints": [
                    item(baseURL="ftp://a.example", authToken="your_auth_token_here_1"),
                    item(nmae="x", enabled=0),
                    item(authToken=None),
                ],
                "server": {"port": "x", "corsOrigins": ["https://a.example/"]},
                "timeouts": {"idle": 0},
                "log": {"level": "x"},
                "sever": {},
            }
        )
        paths = [fault.partition(": ")[0] for fault in faults]
        assert sorted(paths) == [
            "endpoints[0].authToken",
            "endpoints[0].baseURL",
            "endpoints[1].enabled",
            "endpoints[1].nmae",
            "endpoints[2]",
            "log.level",
            "server.corsOrigins[0]",
            "server.port",
            "sever",
            "timeouts.idle",
        ]

    @pytest.mark.parametrize(
        ("raw", "paths"),
        [
            (
                item(baseURL=None, authToken="your_auth_token_here_1"),
                {"endpoints[0]", "endpoints[0].authToken"},
            ),
            (
                item(proxy="socks5://x", authToken="your_auth_token_here_1"),
                {"endpoints[0].proxy", "endpoints[0].authToken"},
            ),
        ],
        ids=["missing URL and placeholder", "proxy and placeholder"],
    )
    def test_two_faults_of_one_endpoint_are_reported_together(
        self, raw: dict[str, object], paths: set[str]
    ) -> None:
        found = {fault.partition(": ")[0] for fault in faults_of([raw])}
        assert found == paths

    @pytest.mark.parametrize(
        "text",
        [
            '[{"baseURL": "https://a.example", "baseURL": "https://b.example"}]',
            "module.exports = [{baseURL: 'https://a.example', 'baseURL': 'x'}]",
            '{"endpoints": [], "endpoints": []}',
        ],
    )
    def test_a_key_that_stands_twice_is_a_fault(self, text: str) -> None:
        (fault,) = faults_of(text)
        assert re.fullmatch(r"the key (baseURL|endpoints) stands twice.*", fault)

    @pytest.mark.parametrize(
        "raw",
        [
            {"endpoints": {"authToken": TOKEN, "baseURL": URL}},
            [item(authToken=[TOKEN])],
            [item(authToken={"value": TOKEN})],
            [item(authToken=TOKEN + " two words")],
            [item(authToken=None, authTokenEnv=TOKEN)],
            [item(baseURL=f"https://user:{TOKEN}@a.example")],
            [item(baseURL=f"https://a.example:{TOKEN}")],
            [item(baseURL=f"https://a.example/?key={TOKEN}")],
            [item(proxy=f"https://u:{TOKEN}@p.example")],
            {"endpoints": [item()], "server": {"clientKeys": {"a": TOKEN}}},
            {"endpoints": [item()], "server": {"clientKeys": [TOKEN[:31]]}},
            {"endpoints": [item()], "server": {"adminKey": [TOKEN]}},
        ],
        ids=[
            "endpoints is one object",
            "token in a list",
            "token in an object",
            "token with spaces",
            "token in place of a variable's name",
            "userinfo",
            "port",
            "query",
            "proxy",
            "client keys as an object",
            "short client key",
            "admin key in a list",
        ],
    )
    def test_no_fault_shows_a_secret(self, raw: object) -> None:
        text = "\n".join(faults_of(raw))
        assert TOKEN[:20] not in text


class TestConfigPlans:
    def test_a_plan_gives_its_models_unless_the_endpoint_lists_some(self) -> None:
        raw = {
            "endpoints": [
                item(name="pro", plan="pro"),
                item(name="max", plan="max"),
                item(name="team", plan="team"),
                item(name="own", plan="team", models=["claude-haiku-*"]),
            ],
            "plans": {"team": ["*sonnet*", "!*-3-*"]},
        }
        models = {e.name: (e.plan, e.models) for e in load(raw).endpoints}
        assert models == {
            "pro": ("pro", ("!*opus*",)),
            "max": ("max", ()),
            "team": ("team", ("*sonnet*", "!*-3-*")),
            "own": ("team", ("claude-haiku-*",)),
        }

    def test_a_plan_that_nobody_knows_gets_a_hint(self) -> None:
        raw = [item(plan="consol")]
        fault = "endpoints[0].plan: there is no plan consol (did you mean console?)"
        assert faults_of(raw) == [fault]

    @pytest.mark.parametrize("plans", [[], "pro", {"pro": "x"}, {"pro": [1]}])
    def test_plans_that_are_none_are_faults(self, plans: object) -> None:
        raw = {"endpoints": [item()], "plans": plans}
        assert all(fault.startswith("plans") for fault in faults_of(raw))

    def test_accounts_alone_are_a_configuration(self) -> None:
        config = load({"accounts": {"names": ["work"]}, "storage": {"database": None}})
        assert config.endpoints == ()
        assert config.accounts is not None
        assert config.accounts.names == ("work",)
        assert config.storage.database is None
        assert load([item()]).accounts is None
        assert load([item()]).storage == claude_lb.StorageSettings()

    def test_an_account_can_be_named_by_a_route(self) -> None:
        routes = {"*opus*": [{"endpoint": "work"}]}
        assert load({"accounts": {}, "routes": routes}).routes
        assert faults_of({"endpoints": [item(name="a")], "routes": routes})


class TestConfigCredentials:
    @pytest.mark.parametrize(
        "token",
        [
            "your_auth_token_here_1",
            "your_auth_token_here_2",
            "YOUR-API-KEY",
            "your token",
            "<token>",
            "xxx",
            "...",
            "changeme",
            "CHANGE_ME",
            "placeholder",
            "api_key",
            "sk-ant-...",
            "sk-ant-xxxxxxxx",
            "put_token_here",
        ],
    )
    def test_a_placeholder_is_a_fault(self, token: str) -> None:
        assert faults_of([item(authToken=token)]) == [
            "endpoints[0].authToken: this is a placeholder:"
            " put the endpoint's own token here"
        ]

    @pytest.mark.parametrize(
        "token", [TOKEN, "sk-ant-oat01-aB3_xYz", "x", "demo-1", "Xxx1", "keyring-77"]
    )
    def test_a_token_that_only_looks_odd_is_taken(self, token: str) -> None:
        credential = only_endpoint(item(authToken=f" {token}\n")).credential
        assert credential is not None
        assert credential.reveal() == token

    @pytest.mark.parametrize(
        "token", ["a b", "a\r\nx-api-key: b", "tök", "a\tb", "\x7f"]
    )
    def test_a_token_that_cannot_stand_in_a_field_is_a_fault(self, token: str) -> None:
        (fault,) = faults_of([item(authToken=token)])
        assert fault.startswith("endpoints[0].authToken: ")
        assert token not in fault

    def test_a_variable_holds_the_token(self) -> None:
        raw = item(authToken=None, authTokenEnv="LB_TOKEN")
        endpoint = only_endpoint(raw, variables={"LB_TOKEN": f" {TOKEN}\n"})
        assert endpoint.credential is not None
        assert endpoint.credential.reveal() == TOKEN

    @pytest.mark.parametrize(
        "value", [None, "", " \n", "your_auth_token_here_1", "a b", "x\ny"]
    )
    def test_a_variable_without_a_good_token_is_a_fault(
        self, value: str | None
    ) -> None:
        source = FakeTokenSource({} if value is None else {"LB_TOKEN": value})
        raw = item(authToken=None, authTokenEnv="LB_TOKEN")
        (fault,) = faults_of([raw], source)
        assert fault.startswith("endpoints[0].authTokenEnv: ")

    def test_a_missing_variable_is_named(self) -> None:
        (fault,) = faults_of([item(authToken=None, authTokenEnv="LB_TOKEN")])
        assert "LB_TOKEN" in fault

    def test_a_command_prints_the_token(self) -> None:
        raw = item(authToken=None, authTokenCommand="pass show claude")
        commands = {"pass show claude": f"{TOKEN}\n"}
        endpoint = only_endpoint(raw, commands=commands)
        assert endpoint.credential is not None
        assert endpoint.credential.reveal() == TOKEN

    @pytest.mark.parametrize("printed", [None, "two\nlines", "changeme"])
    def test_a_command_that_prints_no_token_is_a_fault(
        self, printed: str | None
    ) -> None:
        source = FakeTokenSource(commands={} if printed is None else {"c": printed})
        (fault,) = faults_of([item(authToken=None, authTokenCommand="c")], source)
        assert fault.startswith("endpoints[0].authTokenCommand: ")

    @pytest.mark.parametrize(
        "keys",
        [
            {"authToken": None},
            {"authTokenEnv": "A"},
            {"authTokenEnv": "A", "authTokenCommand": "b"},
        ],
    )
    def test_exactly_one_source_of_a_token_is_wanted(
        self, keys: dict[str, object]
    ) -> None:
        assert faults_of([item(**keys)], FakeTokenSource({"A": TOKEN})) == [
            "endpoints[0]: expected one of authToken, authTokenEnv, authTokenCommand"
        ]

    @pytest.mark.parametrize(
        ("token", "given", "kind"),
        [
            ("sk-ant-api03-abc", None, AuthType.API_KEY),
            ("sk-ant-oat01-abc", None, AuthType.AUTH_TOKEN),
            ("anything-else-1", None, AuthType.API_KEY),
            ("sk-ant-oat01-abc", "api_key", AuthType.API_KEY),
            ("sk-ant-api03-abc", "auth_token", AuthType.AUTH_TOKEN),
        ],
    )
    def test_the_token_decides_the_auth_type_unless_it_is_given(
        self, token: str, given: str | None, kind: AuthType
    ) -> None:
        assert only_endpoint(item(authToken=token, authType=given)).auth_type is kind

    def test_an_oauth_token_is_seen_in_a_variable_as_well(self) -> None:
        raw = item(authToken=None, authTokenEnv="T")
        endpoint = only_endpoint(raw, variables={"T": "sk-ant-oat01-abc"})
        assert endpoint.auth_type is AuthType.AUTH_TOKEN

    def test_passthrough_needs_no_token(self) -> None:
        endpoint = only_endpoint(item(authToken=None, authType="passthrough"))
        assert endpoint.auth_type is AuthType.PASSTHROUGH
        assert endpoint.credential is None

    def test_passthrough_takes_no_token(self) -> None:
        (fault,) = faults_of([item(authType="passthrough")])
        assert fault.startswith("endpoints[0]: passthrough")

    def test_a_disabled_endpoint_asks_for_no_token(self) -> None:
        off = item(authToken=None, authTokenCommand="fails", enabled=False)
        config = load([off, item()])
        assert [e.enabled for e in config.endpoints] == [False, True]
        assert config.enabled == config.endpoints[1:]


class TestConfigNames:
    def test_a_name_comes_from_the_host_and_is_numbered_where_taken(self) -> None:
        raw = [
            item(),
            item(baseURL="https://b.example:8443/x"),
            item(),
            item(name="mine"),
            item(),
        ]
        assert [e.name for e in load(raw).endpoints] == [
            "a.example",
            "b.example",
            "a.example-2",
            "mine",
            "a.example-3",
        ]

    def test_a_numbered_name_steps_around_a_given_one(self) -> None:
        raw = [item(), item(name="a.example-2"), item()]
        names = [e.name for e in load(raw).endpoints]
        assert names == ["a.example", "a.example-2", "a.example-3"]

    def test_endpoints_keep_the_order_of_the_file(self) -> None:
        raw = [item(name=f"n{i}", default=i == 3) for i in range(6)]
        config = load(raw)
        assert [e.name for e in config.endpoints] == [f"n{i}" for i in range(6)]
        assert [e.default for e in config.endpoints].index(True) == 3


class TestConfigUrls:
    @pytest.mark.parametrize(
        ("url", "secure", "host", "port", "prefix"),
        [
            ("https://a.example", True, "a.example", 443, ""),
            ("HTTPS://A.Example", True, "a.example", 443, ""),
            ("https://a.example:8443/", True, "a.example", 8443, ""),
            ("https://a.example/v1", True, "a.example", 443, ""),
            ("https://a.example/proxy/v1/", True, "a.example", 443, "/proxy"),
            ("http://127.0.0.1:9000", False, "127.0.0.1", 9000, ""),
            ("http://localhost", False, "localhost", 80, ""),
            ("http://x.localhost:1", False, "x.localhost", 1, ""),
            ("http://[::1]:9000/a", False, "::1", 9000, "/a"),
            ("https://[2001:db8::1]", True, "2001:db8::1", 443, ""),
        ],
    )
    def test_a_base_url_is_taken_apart(
        self, url: str, secure: bool, host: str, port: int, prefix: str
    ) -> None:
        endpoint = only_endpoint(item(baseURL=url))
        got = (endpoint.secure, endpoint.host, endpoint.port, endpoint.prefix)
        assert got == (secure, host, port, prefix)
        assert endpoint.base_url == url

    @pytest.mark.parametrize(
        "url",
        [
            "a.example",
            "//a.example",
            "ftp://a.example",
            "file:///etc/passwd",
            "https://",
            "https:///v1",
            "https://:443",
            "https://u@a.example",
            "https://u:p@a.example",
            "https://@a.example",
            "https://a.example?x=1",
            "https://a.example/#f",
            "https://a b.example",
            "https://a.example/a b",
            "https://a.example\\x",
            "https://a.exämple",
            "https://[::1",
            "https://a.example:port",
            "https://a.example:70000",
            "https://a.example:0",
            "https://a\r\nHost: b.example",
            'https://a"b',
        ],
    )
    def test_what_is_no_base_url_is_a_fault(self, url: str) -> None:
        faults = faults_of([item(baseURL=url)])
        assert [f.partition(": ")[0] for f in faults] == ["endpoints[0].baseURL"]

    @pytest.mark.parametrize(
        "url", ["http://a.example", "http://10.0.0.1:80", "http://2130706433"]
    )
    def test_http_beyond_this_machine_must_be_allowed(self, url: str) -> None:
        (fault,) = faults_of([item(baseURL=url)])
        assert "allowHttp" in fault
        (fault,) = faults_of([item(baseURL=url, allowHttp=False)])
        assert "allowHttp" in fault
        assert not only_endpoint(item(baseURL=url, allowHttp=True)).secure

    @pytest.mark.parametrize("slash", ["", "/", "//"])
    @pytest.mark.parametrize("version", ["", "/v1"])
    @pytest.mark.parametrize("prefix", ["", "/anthropic", "/a/b"])
    @pytest.mark.parametrize("target", ["/v1/messages?beta=true", "/v1/models", "/v1"])
    def test_paths_are_joined_with_one_slash_and_one_v1(
        self, slash: str, version: str, prefix: str, target: str
    ) -> None:
        endpoint = only_endpoint(item(baseURL=f"{URL}{prefix}{version}{slash}"))
        head = parsed(request_of(start=f"GET {target} HTTP/1.1"))
        made = claude_lb.upstream_head(head, endpoint, "me", ())
        assert made.startswith(f"GET {prefix}{target} HTTP/1.1\r\n".encode())

    def test_a_path_that_only_begins_like_v1_is_kept(self) -> None:
        assert only_endpoint(item(baseURL=f"{URL}/v10")).prefix == "/v10"
        assert only_endpoint(item(baseURL=f"{URL}/xv1")).prefix == "/xv1"

    @pytest.mark.parametrize(
        ("host", "near"),
        [
            ("127.0.0.1", True),
            ("127.9.9.9", True),
            ("::1", True),
            ("localhost", True),
            ("LOCALHOST", True),
            ("a.localhost", True),
            ("0.0.0.0", False),
            ("::", False),
            ("", False),
            ("10.0.0.1", False),
            ("localhost.example", False),
            ("127.0.0.1.example", False),
            ("notlocalhost", False),
        ],
    )
    def test_loopback_is_known_by_name_and_address(self, host: str, near: bool) -> None:
        assert claude_lb.is_loopback(host) is near


class TestConfigProxies:
    def test_the_environment_names_the_proxy_of_a_far_https_endpoint(self) -> None:
        proxies = {"a.example": "http://p.example:3128", "127.0.0.1": "http://x"}
        assert only_endpoint(item(), proxies=proxies).proxy == "http://p.example:3128"
        near = item(baseURL="https://127.0.0.1:8443")
        assert only_endpoint(near, proxies=proxies).proxy is None
        plain = item(baseURL="http://a.example", allowHttp=True)
        assert only_endpoint(plain, proxies=proxies).proxy is None

    def test_an_endpoint_names_its_own_proxy(self) -> None:
        raw = item(proxy="http://user:pw@q.example:1")
        proxies = {"a.example": "http://p.example:3128"}
        assert only_endpoint(raw, proxies=proxies).proxy == "http://user:pw@q.example:1"

    @pytest.mark.parametrize(
        "url",
        [
            "q.example:3128",
            "socks5://q.example",
            "https://q.example",
            "http://",
            "http://[::1",
            "http://q.example:port",
            "http://q.example:99999",
        ],
    )
    def test_what_is_no_http_proxy_is_a_fault(self, url: str) -> None:
        (fault,) = faults_of([item(proxy=url)])
        assert fault.startswith("endpoints[0].proxy: ")

    @pytest.mark.parametrize(
        "url", ["socks5://q.example:1080", "http://q.example:99999", "http://[::1"]
    )
    def test_a_proxy_of_the_environment_is_checked_as_well(self, url: str) -> None:
        faults = faults_of([item()], FakeTokenSource(proxies={"a.example": url}))
        assert len(faults) == 1
        assert "proxy" in faults[0].lower()


class TestConfigKeys:
    @pytest.mark.parametrize(
        "key",
        [
            KEY[:31],
            "a" * 40,
            "abababababababababababababababab",
            "your_client_key_here_which_is_long_enough",
            "changeme",
            f"{KEY} x",
            f"{KEY}é",
            f"{KEY}\r\n{KEY}",
        ],
    )
    @pytest.mark.parametrize("name", ["clientKeys", "adminKey"])
    def test_a_weak_or_odd_key_is_refused(self, key: str, name: str) -> None:
        value = [KEY, key] if name == "clientKeys" else key
        where = "server.clientKeys[1]" if name == "clientKeys" else "server.adminKey"
        faults = faults_of({"endpoints": [item()], "server": {name: value}})
        assert [f.partition(": ")[0] for f in faults] == [where]
        assert key not in faults[0]

    def test_a_refused_key_tells_how_to_make_one(self) -> None:
        raw = {"endpoints": [item()], "server": {"clientKeys": ["short"]}}
        (fault,) = faults_of(raw)
        assert "secrets.token_urlsafe(32)" in fault

    @pytest.mark.parametrize(
        "origin",
        [
            "app.example",
            "https://app.example/",
            "https://app.example/x",
            "https://u@app.example",
            "ftp://app.example",
            "null",
            "https://a b",
        ],
    )
    def test_what_is_no_origin_is_a_fault(self, origin: str) -> None:
        raw = {"endpoints": [item()], "server": {"corsOrigins": [origin]}}
        (fault,) = faults_of(raw)
        assert fault.startswith("server.corsOrigins[0]: ")


def final_faults(server: dict[str, object], *urls: str) -> list[str]:
    """Return the last faults of a configuration with these endpoints."""
    raw = {"endpoints": [item(baseURL=u) for u in urls or (URL,)], "server": server}
    return claude_lb.final_faults(load(raw))


class TestConfigFinalFaults:
    @pytest.mark.parametrize(
        "host", ["0.0.0.0", "::", "192.168.1.5", "lb.example", "::ffff:10.0.0.1"]
    )
    def test_a_wide_bind_needs_client_keys(self, host: str) -> None:
        (fault,) = final_faults({"host": host})
        assert fault.startswith("server.host: ")
        assert "clientKeys" in fault
        assert final_faults({"host": host, "clientKeys": [KEY]}) == []

    def test_an_admin_key_does_not_open_a_wide_bind(self) -> None:
        assert len(final_faults({"host": "0.0.0.0", "adminKey": KEY})) == 1

    @pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.9", "::1", "localhost"])
    def test_a_loopback_bind_needs_none(self, host: str) -> None:
        assert final_faults({"host": host}) == []

    def test_every_web_origin_needs_client_keys(self) -> None:
        (fault,) = final_faults({"corsOrigins": ["*"]})
        assert fault.startswith("server.corsOrigins: ")
        assert final_faults({"corsOrigins": ["*"], "clientKeys": [KEY]}) == []
        assert final_faults({"corsOrigins": ["https://app.example"]}) == []

    @pytest.mark.parametrize(
        ("server", "url", "own"),
        [
            ({}, "http://127.0.0.1:13255", True),
            ({}, "http://localhost:13255/v1", True),
            ({}, "http://[::1]:13255", True),
            ({}, "http://127.0.0.1:13256", False),
            ({}, "https://a.example:13255", False),
            ({"port": 4000}, "http://127.0.0.1:4000", True),
            ({"port": 4000}, "http://127.0.0.1:13255", False),
            (
                {"host": "10.0.0.5", "port": 443, "clientKeys": [KEY]},
                "https://10.0.0.5",
                True,
            ),
        ],
    )
    def test_an_endpoint_that_is_ourselves_is_refused(
        self, server: dict[str, object], url: str, own: bool
    ) -> None:
        faults = final_faults(server, "https://b.example", url)
        assert len(faults) == own
        assert all(url in fault for fault in faults)

    def test_all_last_faults_are_reported_together(self) -> None:
        server = {"host": "0.0.0.0", "port": 443, "corsOrigins": ["*"]}
        assert len(final_faults(server, "https://127.0.0.1")) == 3


def with_sections(**sections: object) -> dict[str, object]:
    """Return a configuration of endpoints a and b with further sections."""
    return {"endpoints": [item(name="a"), item(name="b")], **sections}


class TestConfigBalancing:
    def test_the_defaults_are_the_binding_ones(self) -> None:
        config = load([item()])
        balancing, failover = config.balancing, config.failover
        assert (balancing.strategy, balancing.affinity) == ("round_robin", "off")
        assert (balancing.idle_s, balancing.switch_threshold_ms) == (300.0, 50.0)
        assert not balancing.dedupe
        assert (failover.attempts, failover.retries, failover.cooldown_s) == (
            4,
            1,
            None,
        )
        assert (failover.retry_delay_s, failover.retry_backoff) == (0.75, 2.0)
        assert (failover.total_s, failover.gate_s) == (600.0, 10.0)
        assert (failover.statuses, failover.error_types) == ({}, {})
        assert not failover.resend_ambiguous
        (one,) = config.endpoints
        assert (one.weight, one.priority, one.models, one.group) == (1, 0, (), "")
        assert config.routes == ()

    def test_every_key_is_read(self) -> None:
        config = load(
            with_sections(
                balancing={
                    "strategy": "fastest",
                    "affinity": "conversation",
                    "idleRecoverySeconds": 7,
                    "switchThresholdMs": 20,
                    "dedupe": True,
                },
                failover={
                    "attempts": 3,
                    "retries": 2,
                    "retryDelayMs": 1000,
                    "retryBackoff": 1.5,
                    "cooldown": 60,
                    "statuses": {"404": "failover", "529": "relay"},
                    "errorTypes": {"api_error": "relay"},
                    "totalSeconds": 100,
                    "gateSeconds": 0,
                    "resendAmbiguous": True,
                },
            )
        )
        balancing = claude_lb.BalancingSettings(
            "fastest", "conversation", 7.0, 20.0, dedupe=True
        )
        assert config.balancing == balancing
        failover = config.failover
        assert (failover.attempts, failover.retries, failover.cooldown_s) == (3, 2, 60)
        assert (failover.retry_delay_s, failover.retry_backoff) == (1.0, 1.5)
        assert failover.statuses == {404: "failover", 529: "relay"}
        assert failover.error_types == {"api_error": "relay"}
        assert (failover.total_s, failover.gate_s) == (100.0, 0.0)
        assert failover.resend_ambiguous

    @pytest.mark.parametrize("name", claude_lb.STRATEGY_NAMES)
    def test_every_strategy_can_be_chosen(self, name: str) -> None:
        config = load(with_sections(balancing={"strategy": name}))
        assert claude_lb.Pool(config).reserve(wish()) is not None
        assert set(claude_lb.STRATEGIES) == set(claude_lb.STRATEGY_NAMES)

    def test_an_endpoint_has_its_share_its_rank_and_its_models(self) -> None:
        one = only_endpoint(item(weight=5, priority=-2, models=["claude-*", "x"]))
        assert (one.weight, one.priority) == (5, -2)
        assert one.models == ("claude-*", "x")

    @pytest.mark.parametrize(
        ("changes", "fault"),
        [
            ({"weight": 0}, "weight: expected a whole number"),
            ({"weight": 1.5}, "weight: expected a whole number"),
            ({"priority": "1"}, "priority: expected a whole number"),
            ({"models": "x"}, "models: expected a list of texts"),
            ({"models": ["x", 3]}, "models[1]: expected a text"),
            ({"wieght": 3}, "wieght: unknown key (did you mean weight?)"),
        ],
    )
    def test_a_fault_of_an_endpoint_names_its_path(
        self, changes: dict[str, object], fault: str
    ) -> None:
        (found,) = faults_of([item(), item(**changes)])
        assert found.startswith(f"endpoints[1].{fault}")

    @pytest.mark.parametrize(
        ("section", "value", "fault"),
        [
            ("balancing", [], ": expected an object"),
            ("failover", 3, ": expected an object"),
            ("failovr", {}, ": unknown key (did you mean failover?)"),
            ("balancing", {"strategy": "fast"}, ".strategy: expected one of round_"),
            ("balancing", {"afinity": ""}, ".afinity: unknown key (did you mean af"),
            ("balancing", {"affinity": "x"}, ".affinity: expected one of off, last_"),
            ("failover", {"attempts": 0}, ".attempts: expected a whole number from 1"),
            ("failover", {"gateSeconds": -1}, ".gateSeconds: expected a number"),
            ("failover", {"resendAmbiguous": "no"}, ".resendAmbiguous: expected true"),
            ("failover", {"statuses": {"200": "failover"}}, ".statuses.200: expected"),
            ("failover", {"statuses": {"429": "x"}}, ".statuses.429: expected one of"),
            ("failover", {"errorTypes": ["x"]}, ".errorTypes: expected an object"),
        ],
    )
    def test_a_fault_of_a_section_names_its_path(
        self, section: str, value: object, fault: str
    ) -> None:
        (found,) = faults_of(with_sections(**{section: value}))
        assert found.startswith(section + fault)

    def test_a_near_miss_of_a_value_gets_a_hint(self) -> None:
        (fault,) = faults_of(with_sections(balancing={"strategy": "least-busy"}))
        assert fault.endswith("(did you mean least_busy?)")
        (fault,) = faults_of(with_sections(failover={"retry_delay_ms": 5}))
        assert fault.endswith("unknown key (did you mean retryDelayMs?)")


def group(*members: object, **facts: object) -> dict[str, object]:
    """Return the group g; None takes a key away."""
    whole = {"name": "g", "endpoints": list(members), **facts}
    return {k: v for k, v in whole.items() if v is not None}


class TestConfigGroups:
    def test_endpoints_of_a_group_share_its_credential_in_file_order(self) -> None:
        shared = {"name": "g", "authTokenEnv": "G_TOKEN"}
        raw = {
            "endpoints": [item(name="a")],
            "groups": [
                {
                    **shared,
                    "default": True,
                    "endpoints": [
                        {"name": "b", "url": "https://b.example"},
                        {"name": "c", "baseURL": URL, "authToken": "own-token-1"},
                    ],
                }
            ],
        }
        config = load(raw, FakeTokenSource({"G_TOKEN": "shared-token-1"}))
        assert [(e.name, e.group) for e in config.endpoints] == [
            ("a", ""),
            ("b", "g"),
            ("c", "g"),
        ]
        tokens = [t for _, t in shape_of(config)]
        assert tokens == [TOKEN, "shared-token-1", "own-token-1"]
        assert [e.default for e in config.endpoints] == [False, True, False]

    def test_a_file_may_hold_groups_alone(self) -> None:
        config = load({"groups": [group({"baseURL": URL}, authToken=TOKEN)]})
        assert [e.group for e in config.endpoints] == ["g"]

    @pytest.mark.parametrize(
        ("groups", "fault"),
        [
            ({}, ": expected a list of groups, got an object"),
            (["x"], "[0]: expected an object, got a text"),
            ([group(item(), name=None)], "[0].name: expected a text"),
            ([{"name": "g"}], "[0].endpoints: expected a list with at least"),
            ([group()], "[0].endpoints: expected a list with at least"),
            ([group(item(), authTokenEnw="X")], "[0].authTokenEnw: unknown key (did"),
            ([group(item(weigth=2))], "[0].endpoints[0].weigth: unknown key (did"),
            ([group({"baseURL": URL})], "[0].endpoints[0]: expected one of authToken"),
            ([group(item(), item(name="a"))], "[0].endpoints[1].name: the name a is"),
            ([group(item(), default="yes")], "[0].default: expected true or false"),
        ],
    )
    def test_a_fault_names_its_path(self, groups: object, fault: str) -> None:
        (found,) = faults_of({"endpoints": [item(name="a")], "groups": groups})
        assert found.startswith(f"groups{fault}")


class TestConfigRoutes:
    def test_a_route_lists_who_serves_and_under_which_name(self) -> None:
        steps = [
            {"endpoint": "a", "model": "other", "priority": 3},
            {"endpoint": "b", "model": "passthrough"},
            {"endpoint": "b", "enabled": False},
        ]
        config = load(with_sections(routes={"claude-*": steps}))
        assert config.routes == (
            claude_lb.Route(
                "claude-*",
                (
                    claude_lb.RouteStep("a", "", "other", 3),
                    claude_lb.RouteStep("b", "", None, None),
                ),
            ),
        )

    @pytest.mark.parametrize(
        ("routes", "fault"),
        [
            ([], ": expected an object"),
            ({"m": []}, '["m"]: expected a list with at least one'),
            ({"m": "a"}, '["m"]: expected a list with at least one'),
            ({"m": ["a"]}, '["m"][0]: expected an object, got a text'),
            ({"m": [{}]}, '["m"][0]: expected either an endpoint or a group'),
            ({"m": [{"endpoint": "a", "group": "g"}]}, '["m"][0]: expected either'),
            (
                {"m": [{"endpoint": "a"}, {"endpoint": "primry"}]},
                '["m"][1].endpoint: there is no endpoint primry (did you mean primary?',
            ),
            ({"m": [{"group": "g"}]}, '["m"][0].group: there is no group g'),
            ({"m": [{"endpoint": "a", "modl": ""}]}, '["m"][0].modl: unknown key (did'),
            (
                {"m": [{"endpoint": "a", "priority": 1.5}]},
                '["m"][0].priority: expected',
            ),
            ({"m": [{"endpoint": "a", "model": ""}]}, '["m"][0].model: expected a'),
        ],
    )
    def test_a_fault_names_its_path(self, routes: object, fault: str) -> None:
        endpoints = [item(name="a"), item(name="primary")]
        (found,) = faults_of({"endpoints": endpoints, "routes": routes})
        assert found.startswith(f"routes{fault}")


# -- 5. http ---------------------------------------------------------------

GOOD_HEADS: list[tuple[str, bytes, dict[str, object], int | None]] = [
    ("plain", request_of(), {"method": "POST", "path": "/v1/messages"}, None),
    ("length", request_of("Content-Length: 5"), {"chunked": False}, 5),
    ("length zero", request_of("content-length: 0"), {}, 0),
    ("length in mixed case", request_of("Content-length:7"), {}, 7),
    ("length with spaces", request_of("Content-Length: \t 12 \t"), {}, 12),
    ("length amid fields", request_of("A: 1", "Content-Length: 3", "B: 2"), {}, 3),
    ("chunked", request_of("Transfer-Encoding: chunked"), {"chunked": True}, None),
    (
        "chunked, capital",
        request_of("TRANSFER-ENCODING: Chunked"),
        {"chunked": True},
        None,
    ),
    (
        "query kept",
        request_of(start="GET /v1/models?limit=2&a=%2e%2e//b?c HTTP/1.1"),
        {"target": "/v1/models?limit=2&a=%2e%2e//b?c", "path": "/v1/models"},
        None,
    ),
    (
        "dots inside a name",
        request_of(start="GET /v1/models/claude-3.5..x HTTP/1.1"),
        {"path": "/v1/models/claude-3.5..x"},
        None,
    ),
    (
        "encoded letters",
        request_of(start="GET /v1/files/a%20b%C3%A9 HTTP/1.1"),
        {"path": "/v1/files/a%20b%C3%A9"},
        None,
    ),
    (
        "absolute form",
        request_of(start="GET http://127.0.0.1:13255/v1/models?a=1 HTTP/1.1"),
        {"target": "/v1/models?a=1", "path": "/v1/models", "host": "127.0.0.1:13255"},
        None,
    ),
    (
        "absolute form, no path",
        request_of(start="GET http://127.0.0.1:13255 HTTP/1.1"),
        {"target": "/"},
        None,
    ),
    (
        "absolute form, only a query",
        request_of(start="GET HTTP://127.0.0.1:13255?x HTTP/1.1"),
        {"target": "/?x", "path": "/"},
        None,
    ),
    (
        "absolute form in HTTP/1.0",
        b"GET http://127.0.0.1:13255/health HTTP/1.0\r\n\r\n",
        {"host": "127.0.0.1:13255", "modern": False},
        None,
    ),
    ("asterisk", request_of(start="OPTIONS * HTTP/1.1"), {"path": "*"}, None),
    (
        "HTTP/1.0",
        b"GET / HTTP/1.0\r\n\r\n",
        {"modern": False, "keep_alive": False},
        None,
    ),
    (
        "HTTP/1.0 kept",
        b"GET / HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n",
        {"keep_alive": True},
        None,
    ),
    ("kept", request_of(), {"keep_alive": True}, None),
    ("closed", request_of("Connection: x, Close"), {"keep_alive": False}, None),
    (
        "closed after a tab",
        request_of("Connection: x,\tclose"),
        {"keep_alive": False},
        None,
    ),
    ("expects", request_of("Expect: 100-Continue"), {"expects": True}, None),
    (
        "HTTP/1.0 expects nothing",
        b"POST / HTTP/1.0\r\nExpect: 100-continue\r\n\r\n",
        {"expects": False},
        None,
    ),
    (
        "IPv6 host",
        b"GET / HTTP/1.1\r\nHost: [::1]:13255\r\n\r\n",
        {"host": "[::1]:13255"},
        None,
    ),
    ("empty value", request_of("X-Empty:"), {}, None),
    ("high bytes in a value", request_of("X-Name: caf\xe9 \xff"), {}, None),
    ("odd but legal name", request_of("!#$%&'*+-.^_`|~: 1"), {}, None),
    ("look-alike of a key", request_of("x_api_key: 1"), {}, None),
    ("200 fields", request_of(*["A: 1"] * 199), {}, None),
]

BAD_HEADS: list[tuple[str, bytes, int]] = [
    # the request line
    ("no version", b"GET /\r\nHost: a\r\n\r\n", 400),
    ("only a method", b"GET\r\nHost: a\r\n\r\n", 400),
    ("empty line first", b"\r\n\r\n", 400),
    ("two spaces", b"GET  / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("space at the end", b"GET / HTTP/1.1 \r\nHost: a\r\n\r\n", 400),
    ("space at the start", b" GET / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("tab", b"GET\t/\tHTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("lower-case version", b"GET / http/1.1\r\nHost: a\r\n\r\n", 400),
    ("long version", b"GET / HTTP/1.10\r\nHost: a\r\n\r\n", 400),
    ("HTTP/2.0", b"GET / HTTP/2.0\r\nHost: a\r\n\r\n", 505),
    ("HTTP/0.9", b"GET / HTTP/0.9\r\nHost: a\r\n\r\n", 505),
    ("method with a bracket", b"G{T / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    ("unknown method", request_of(start="BREW /v1/messages HTTP/1.1"), 405),
    ("lower-case method", request_of(start="post /v1/messages HTTP/1.1"), 405),
    ("TRACE", request_of(start="TRACE /v1/messages HTTP/1.1"), 405),
    ("CONNECT", request_of(start="CONNECT a.example:443 HTTP/1.1"), 405),
    # the target
    ("authority form", request_of(start="GET a.example:443 HTTP/1.1"), 400),
    ("asterisk with GET", request_of(start="GET * HTTP/1.1"), 400),
    ("no slash", request_of(start="GET v1/messages HTTP/1.1"), 400),
    ("fragment", request_of(start="GET /v1/messages#x HTTP/1.1"), 400),
    ("fragment in a query", request_of(start="GET /v1/messages?a#x HTTP/1.1"), 400),
    ("two slashes", request_of(start="GET //evil.example/ HTTP/1.1"), 400),
    ("two slashes inside", request_of(start="GET /v1//messages HTTP/1.1"), 400),
    ("dot", request_of(start="GET /v1/./messages HTTP/1.1"), 400),
    ("dots", request_of(start="GET /v1/../admin HTTP/1.1"), 400),
    ("dots at the end", request_of(start="GET /v1/.. HTTP/1.1"), 400),
    ("encoded dots", request_of(start="GET /v1/%2E%2e/admin HTTP/1.1"), 400),
    ("encoded slash", request_of(start="GET /v1%2fmessages HTTP/1.1"), 400),
    ("encoded backslash", request_of(start="GET /v1%5Cmessages HTTP/1.1"), 400),
    ("backslash", request_of(start="GET /v1\\messages HTTP/1.1"), 400),
    ("encoded NUL", request_of(start="GET /v1/%00 HTTP/1.1"), 400),
    ("encoded line end", request_of(start="GET /v1/%0d%0aX:1 HTTP/1.1"), 400),
    ("broken escape", request_of(start="GET /v1/%zz HTTP/1.1"), 400),
    ("high byte", request_of(start="GET /v1/\xe9 HTTP/1.1"), 400),
    ("high byte in a query", request_of(start="GET /v1?\xe9 HTTP/1.1"), 400),
    ("other scheme", request_of(start="GET ftp://127.0.0.1:13255/ HTTP/1.1"), 400),
    ("userinfo", request_of(start="GET http://u@127.0.0.1:13255/ HTTP/1.1"), 400),
    ("another authority", request_of(start="GET http://evil.example/ HTTP/1.1"), 400),
    (
        "the cloud's metadata",
        request_of(start="GET http://169.254.169.254/latest HTTP/1.1"),
        400,
    ),
    (
        "devious absolute form",
        request_of(start="GET http://127.0.0.1:13255//x HTTP/1.1"),
        400,
    ),
    # lines
    ("bare LF after the line", b"GET / HTTP/1.1\nHost: a\r\n\r\n", 400),
    ("bare LF between fields", b"GET / HTTP/1.1\r\nHost: a\nA: 1\r\n\r\n", 400),
    ("bare CR in a value", request_of("A: 1\r2"), 400),
    ("CR before CRLF", request_of("A: 1\r"), 400),
    ("NUL in a value", request_of("A: 1\x002"), 400),
    ("escape in a value", request_of("A: \x1b[31m"), 400),
    ("delete in a value", request_of("A: \x7f"), 400),
    ("folded line", request_of("A: 1", " 2"), 400),
    ("folded with a tab", request_of("A: 1", "\t2"), 400),
    ("folded first field", b"GET / HTTP/1.1\r\n Host: a\r\nHost: a\r\n\r\n", 400),
    ("space before the colon", request_of("Content-Length : 5"), 400),
    ("tab before the colon", request_of("Transfer-Encoding\t: chunked"), 400),
    ("no colon", request_of("garbage"), 400),
    ("no name", request_of(": value"), 400),
    ("bracket in a name", request_of("A(b): 1"), 400),
    ("high byte in a name", request_of("Content-L\xe9ngth: 5"), 400),
    ("201 fields", request_of(*["A: 1"] * 200), 431),
    # Host
    ("no Host", b"GET / HTTP/1.1\r\nA: 1\r\n\r\n", 400),
    ("empty Host", b"GET / HTTP/1.1\r\nHost:\r\n\r\n", 400),
    ("two Hosts", b"GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n", 400),
    ("list in Host", b"GET / HTTP/1.1\r\nHost: a, b\r\n\r\n", 400),
    ("userinfo in Host", b"GET / HTTP/1.1\r\nHost: u@a\r\n\r\n", 400),
    ("path in Host", b"GET / HTTP/1.1\r\nHost: a/b\r\n\r\n", 400),
    ("scheme in Host", b"GET / HTTP/1.1\r\nHost: http://a\r\n\r\n", 400),
    ("text as port", b"GET / HTTP/1.1\r\nHost: a:b\r\n\r\n", 400),
    ("odd Host in HTTP/1.0", b"GET / HTTP/1.0\r\nHost: a b\r\n\r\n", 400),
    # length
    ("two lengths", request_of("Content-Length: 5", "Content-Length: 6"), 400),
    ("same length twice", request_of("Content-Length: 5", "content-length: 5"), 400),
    ("list of lengths", request_of("Content-Length: 5, 5"), 400),
    ("signed length", request_of("Content-Length: +5"), 400),
    ("negative length", request_of("Content-Length: -1"), 400),
    ("minus zero", request_of("Content-Length: -0"), 400),
    ("hexadecimal length", request_of("Content-Length: 0x5"), 400),
    ("underscore in a length", request_of("Content-Length: 1_0"), 400),
    ("superscript length", request_of("Content-Length: \xb2"), 400),
    ("two numbers", request_of("Content-Length: 5 5"), 400),
    ("fraction", request_of("Content-Length: 5.0"), 400),
    ("empty length", request_of("Content-Length:"), 400),
    ("huge length", request_of("Content-Length: 99999999999999999999"), 400),
    ("look-alike of a length", request_of("Content_Length: 5"), 400),
    # transfer coding
    (
        "both framings",
        request_of("Content-Length: 5", "Transfer-Encoding: chunked"),
        400,
    ),
    (
        "both, reversed",
        request_of("Transfer-Encoding: chunked", "Content-Length: 5"),
        400,
    ),
    ("chunked twice", request_of("Transfer-Encoding: chunked, chunked"), 400),
    (
        "two codings lines",
        request_of("Transfer-Encoding: chunked", "Transfer-Encoding: chunked"),
        400,
    ),
    (
        "identity and chunked",
        request_of("Transfer-Encoding: identity", "Transfer-Encoding: chunked"),
        400,
    ),
    ("gzip, chunked", request_of("Transfer-Encoding: gzip, chunked"), 400),
    ("chunked, gzip", request_of("Transfer-Encoding: chunked, gzip"), 400),
    ("xchunked", request_of("Transfer-Encoding: xchunked"), 400),
    ("chunked with a parameter", request_of("Transfer-Encoding: chunked;q=1"), 400),
    ("quoted chunked", request_of('Transfer-Encoding: "chunked"'), 400),
    ("vertical tab", request_of("Transfer-Encoding: \x0bchunked"), 400),
    ("empty coding", request_of("Transfer-Encoding:"), 400),
    ("comma and chunked", request_of("Transfer-Encoding: ,chunked"), 400),
    ("no-break space", request_of("Transfer-Encoding: chunked\xa0"), 400),
    ("look-alike of the coding", request_of("Transfer_Encoding: chunked"), 400),
    (
        "chunked in HTTP/1.0",
        b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n",
        400,
    ),
    # others
    ("another expectation", request_of("Expect: the-worst"), 417),
    ("two expectations", request_of("Expect: 100-continue", "Expect: x"), 400),
    ("two keys", request_of("x-api-key: a", "X-Api-Key: b"), 400),
    ("two authorizations", request_of("Authorization: a", "authorization: b"), 400),
    ("two origins", request_of("Origin: http://a", "Origin: http://b"), 400),
    ("two content types", request_of("Content-Type: a/b", "Content-Type: c/d"), 400),
]


class TestHttpRequestHeads:
    @pytest.mark.parametrize(
        ("head", "want", "length"),
        [(h, w, n) for _, h, w, n in GOOD_HEADS],
        ids=[label for label, *_ in GOOD_HEADS],
    )
    def test_a_good_head_says(
        self, head: bytes, want: dict[str, object], length: int | None
    ) -> None:
        got, stated = claude_lb.parse_request_head(head)
        assert {name: getattr(got, name) for name in want} == want
        assert stated == length

    @pytest.mark.parametrize(
        ("head", "status"),
        [(h, s) for _, h, s in BAD_HEADS],
        ids=[label for label, *_ in BAD_HEADS],
    )
    def test_a_bad_head_is_refused_and_ends_its_connection(
        self, head: bytes, status: int
    ) -> None:
        refusal = refusal_of(head)
        assert refusal.status == status
        assert refusal.close

    @pytest.mark.parametrize(
        "name", ["content-length", "CONTENT-LENGTH", "Content-LENGTH", "cOnTeNt-LeNgTh"]
    )
    def test_the_case_of_a_framing_field_makes_no_difference(self, name: str) -> None:
        assert claude_lb.parse_request_head(request_of(f"{name}: 7"))[1] == 7
        both = request_of(f"{name}: 7", f"{name.title()}: 8")
        assert refusal_of(both).status == 400

    @pytest.mark.parametrize(
        ("fields", "browser"),
        [
            ((), False),
            (("User-Agent: Mozilla/5.0",), False),
            (("Origin: null",), True),
            (("Sec-Fetch-Site: none",), True),
            (("SEC-FETCH-MODE: cors",), False),
        ],
    )
    def test_a_web_page_is_known_by_what_browsers_add(
        self, fields: tuple[str, ...], browser: bool
    ) -> None:
        assert parsed(request_of(*fields)).browser is browser

    def test_a_refused_method_names_those_that_are_served(self) -> None:
        refusal = refusal_of(request_of(start="TRACE / HTTP/1.1"))
        (allow,) = [value for name, value in refusal.fields if name == "Allow"]
        assert {"GET", "POST", "DELETE", "OPTIONS"} <= set(allow.split(", "))
        assert "TRACE" not in allow

    def test_every_control_byte_is_refused_everywhere(self) -> None:
        bad = set(range(0x20)) - {9} | {0x7F}
        for code, template in itertools.product(
            sorted(bad), ("A: x@y", "A@: x", "A:@x", "Transfer-Encoding: chunked@")
        ):
            head = request_of(template.replace("@", chr(code)))
            assert refusal_of(head).status == 400, (code, template)

    def test_a_repeated_field_is_joined_for_reading_and_kept_as_sent(self) -> None:
        head = parsed(request_of("X-A: 1", "x-b: 2", "x-a:3"))
        assert head.values[b"x-a"] == "1, 3"
        assert [line for name, line in head.lines if name == b"x-a"] == [
            b"X-A: 1",
            b"x-a:3",
        ]

    @pytest.mark.parametrize("pad", [0, 5000], ids=["short", "beyond the memo"])
    def test_a_memoised_head_equals_an_unmemoised_one(self, pad: int) -> None:
        for label, head, _, length in GOOD_HEADS:
            padded = head[:-2] + b"X-Pad: " + b"p" * pad + b"\r\n\r\n"
            if len(parsed(head).lines) >= 199:
                continue
            first, stated = claude_lb.parse_request_head(padded)
            again, stated_again = claude_lb.parse_request_head(bytes(padded))
            shape = padded
            if length is not None:
                cut = re.compile(rb"\r\ncontent-length:[^\r]*", re.I)
                shape = cut.sub(b"", padded)
            fresh = claude_lb._parse_shape(shape)
            assert vars(first) == vars(again) == vars(fresh), label
            assert stated == stated_again == length, label
            assert (first is again) == (pad == 0), label

    def test_requests_that_differ_in_length_alone_share_a_head(self) -> None:
        one, first = claude_lb.parse_request_head(
            request_of("A: 1", "Content-Length: 5")
        )
        two, second = claude_lb.parse_request_head(
            request_of("A: 1", "content-length: 123456")
        )
        assert one is two
        assert (first, second) == (5, 123_456)
        none, absent = claude_lb.parse_request_head(request_of("A: 1"))
        assert none is one
        assert absent is None

    @pytest.mark.parametrize(
        ("data", "bad"),
        [
            (b"", False),
            (b"GE", False),
            (b"GET / HTTP/1.1\r", False),
            (b"GET / HTTP/1.1\r\nHost: a\r", False),
            (b"GET / HTTP/1.1\r\nHost: a\r\n", False),
            (b"GET / HTTP/1.1\nHost: a", True),
            (b"GET / HTTP/1.1\r\nA: 1\r2", True),
            (b"GET /\r\n", True),
            (b"\x16\x03\x01\x02\x00", True),
            (b"PRI * HTTP/2.0\r\n\r\nSM\r\n", False),
        ],
    )
    def test_a_start_that_cannot_become_a_head_is_seen_early(
        self, data: bytes, bad: bool
    ) -> None:
        assert claude_lb.suspicious_start(data) is bad

    def test_no_start_of_a_good_head_is_suspicious(self) -> None:
        for label, head, *_ in GOOD_HEADS:
            for i in range(len(head)):
                assert not claude_lb.suspicious_start(head[:i]), (label, i)

    @pytest.mark.parametrize(
        ("host", "name"),
        [
            ("a", "a"),
            ("A.Example:80", "a.example"),
            ("[::1]:13255", "::1"),
            ("", ""),
            ("a:b", ""),
            ("a b", ""),
        ],
    )
    def test_a_host_has_a_name(self, host: str, name: str) -> None:
        assert claude_lb.host_name(host) == name

    @pytest.mark.parametrize(
        ("method", "path", "lane"),
        [
            ("POST", "/v1/messages", Lane.MESSAGES),
            ("POST", "/v1/messages/count_tokens", Lane.COUNT),
            ("GET", "/v1/messages", Lane.FIXED),
            ("POST", "/v1/messages/", Lane.FIXED),
            ("POST", "/v1/messages/batches", Lane.FIXED),
            ("GET", "/v1/models", Lane.FIXED),
            ("POST", "/v1/files", Lane.FIXED),
        ],
    )
    def test_a_path_has_a_lane(self, method: str, path: str, lane: Lane) -> None:
        assert claude_lb.lane_of(method, path) is lane


KEPT_FIELDS = (
    "User-Agent: claude-cli/2.0 (external, cli)",
    "anthropic-version: 2024-01-01",
    "anthropic-beta: one",
    "X-Stainless-Lang: js",
    "anthropic-beta: two",
    "content-type: application/json; charset=utf-8",
    "x-app:cli",
    "Accept: text/event-stream",
    'If-None-Match: "a"',
    "Range: bytes=0-1",
    "x_api_key: look-alike",
    "X-Name: caf\xe9",
)
TAKEN_FIELDS = (
    "Authorization: Bearer client-secret",
    "X-API-Key: client-secret",
    "Cookie: a=client-secret",
    "Origin: https://app.example",
    "Connection: keep-alive",
    "Keep-Alive: timeout=5",
    "Proxy-Connection: keep-alive",
    "Proxy-Authorization: Basic client-secret",
    "proxy-anything: 1",
    "TE: trailers",
    "Trailer: x",
    "Upgrade: h2c",
    "Forwarded: for=1.2.3.4",
    "X-Forwarded-For: 1.2.3.4",
    "x-forwarded-anything: 1",
    "Expect: 100-continue",
    "Transfer-Encoding: chunked",
    "X-Claude-LB-Endpoint: 1",
)


class TestHttpUpstreamHeads:
    def test_end_to_end_lines_pass_byte_for_byte_in_order(self) -> None:
        made = claude_lb.upstream_head(
            parsed(request_of(*KEPT_FIELDS)), endpoint_of(), "me", ()
        )
        block = "".join(f"{line}\r\n" for line in KEPT_FIELDS).encode("latin-1")
        assert block in made

    @pytest.mark.parametrize("field", TAKEN_FIELDS)
    def test_what_belongs_to_the_connection_or_the_client_is_taken(
        self, field: str
    ) -> None:
        name, _, value = field.partition(": ")
        for spelled in (name, name.lower(), name.upper()):
            fields = sent_fields(request_of(f"{spelled}: {value}", "x-other: stays"))
            if name.lower() == "x-api-key":
                assert values_of(fields, "x-api-key") == [TOKEN]
            else:
                assert values_of(fields, name.lower()) == []
            assert values_of(fields, "x-other") == ["stays"]

    def test_the_length_is_left_to_the_sender(self) -> None:
        fields = sent_fields(request_of("Content-Length: 5"))
        assert values_of(fields, "content-length") == []

    def test_the_host_is_the_upstreams(self) -> None:
        fields = sent_fields(request_of(), endpoint_of(port=8443))
        assert fields[0] == ("Host", "one.example:8443")
        assert len(values_of(fields, "host")) == 1

    def test_the_defaults_are_added_where_absent(self) -> None:
        fields = sent_fields(request_of())
        assert values_of(fields, "anthropic-version") == ["2023-06-01"]
        assert values_of(fields, "content-type") == ["application/json"]

    def test_a_value_that_was_sent_is_never_changed(self) -> None:
        given = ("Anthropic-Version: 1999-01-01", "Content-Type: text/plain")
        fields = sent_fields(request_of(*given))
        assert values_of(fields, "anthropic-version") == ["1999-01-01"]
        assert values_of(fields, "content-type") == ["text/plain"]

    @pytest.mark.parametrize("method", ["GET", "HEAD", "DELETE"])
    def test_a_method_without_a_body_gets_no_content_type(self, method: str) -> None:
        fields = sent_fields(request_of(start=f"{method} /v1/models HTTP/1.1"))
        assert values_of(fields, "content-type") == []
        assert values_of(fields, "anthropic-version") == ["2023-06-01"]

    @pytest.mark.parametrize(
        ("start", "want"),
        [
            ("POST /v1/messages HTTP/1.1", ["identity"]),
            ("POST /v1/messages?beta=true HTTP/1.1", ["identity"]),
            ("POST /v1/messages/count_tokens HTTP/1.1", ["identity"]),
            ("GET /v1/files/file_abc/content HTTP/1.1", ["gzip, br", "zstd"]),
            ("GET /v1/models HTTP/1.1", ["gzip, br", "zstd"]),
        ],
    )
    def test_messages_are_asked_for_unencoded(
        self, start: str, want: list[str]
    ) -> None:
        sent = ("Accept-Encoding: gzip, br", "accept-encoding: zstd")
        fields = sent_fields(request_of(*sent, start=start))
        assert values_of(fields, "accept-encoding") == want

    @pytest.mark.parametrize(
        ("kind", "name", "value"),
        [
            (AuthType.API_KEY, "x-api-key", TOKEN),
            (AuthType.AUTH_TOKEN, "authorization", f"Bearer {TOKEN}"),
        ],
    )
    def test_an_upstream_sees_its_own_credential_alone(
        self, kind: AuthType, name: str, value: str
    ) -> None:
        own = ("x-api-key: client-secret", "Authorization: Bearer client-secret")
        made = claude_lb.upstream_head(
            parsed(request_of(*own)), endpoint_of(auth_type=kind), "me", ()
        )
        fields = sent_fields(request_of(*own), endpoint_of(auth_type=kind))
        both = [f for f in fields if f[0].lower() in ("x-api-key", "authorization")]
        assert both == [(name, value)]
        assert b"client-secret" not in made

    def test_passthrough_sends_the_clients_own_lines_and_no_other(self) -> None:
        endpoint = endpoint_of(auth_type=AuthType.PASSTHROUGH, credential=None)
        own = ("x-api-key: mine", "Authorization: Bearer ours")
        fields = sent_fields(request_of(*own), endpoint, (b"x-api-key: mine",))
        both = [f for f in fields if f[0].lower() in ("x-api-key", "authorization")]
        assert both == [("x-api-key", "mine")]

    def test_the_clients_lines_never_reach_an_endpoint_with_a_credential(self) -> None:
        fields = sent_fields(request_of(), endpoint_of(), (b"x-api-key: mine",))
        assert values_of(fields, "x-api-key") == [TOKEN]

    def test_a_listed_field_goes_with_its_connection(self) -> None:
        head = request_of(
            "Connection: close, X-Hop", "X-Hop: 1", "x-hop: 2", "X-End: 3"
        )
        fields = sent_fields(head)
        assert values_of(fields, "x-hop") == []
        assert values_of(fields, "x-end") == ["3"]

    def test_options_of_a_connection_may_stand_after_a_tab(self) -> None:
        fields = sent_fields(request_of("Connection: close,\tx-hop", "X-Hop: 1"))
        assert values_of(fields, "x-hop") == []

    @pytest.mark.parametrize(
        "name", ["anthropic-version", "anthropic-beta", "content-type"]
    )
    def test_listing_a_field_of_meaning_does_not_strip_it(self, name: str) -> None:
        head = request_of(f"Connection: close, {name}", f"{name}: sent")
        assert values_of(sent_fields(head), name) == ["sent"]

    @pytest.mark.parametrize(
        "name", ["host", "content-length", "authorization", "x-api-key", "cookie"]
    )
    def test_listing_a_field_of_security_changes_nothing(self, name: str) -> None:
        plain = sent_fields(request_of())
        assert sent_fields(request_of(f"Connection: close, {name}")) == plain

    def test_a_mark_of_ours_is_added_to_those_already_there(self) -> None:
        assert values_of(sent_fields(request_of()), "x-claude-lb-via") == ["me"]
        head = request_of(
            "X-Claude-LB-Via: a",
            "x-claude-lb-via: b",
            "Connection: x-claude-lb-via",
        )
        assert values_of(sent_fields(head), "x-claude-lb-via") == ["a, b, me"]

    def test_a_memoised_head_equals_an_unmemoised_one(self) -> None:
        heads = [parsed(h) for _, h, *_ in GOOD_HEADS]
        endpoints = [
            endpoint_of("one"),
            endpoint_of("two", AuthType.AUTH_TOKEN, "other"),
            endpoint_of("three", AuthType.PASSTHROUGH, None),
        ]
        cases = [*itertools.product(heads, endpoints)] * 2
        for head, endpoint in cases:
            arguments = (head, endpoint, "me", (b"x-api-key: c",))
            made = claude_lb.upstream_head(*arguments)
            assert made == claude_lb.upstream_head.__wrapped__(*arguments)
            assert endpoint.authority.encode() in made

    def test_every_good_head_becomes_a_good_head(self) -> None:
        for label, head, *_ in GOOD_HEADS:
            if label == "200 fields":
                continue  # our own come on top
            made = claude_lb.upstream_head(parsed(head), endpoint_of(), "me", ())
            again, length = claude_lb.parse_request_head(made + CRLF)
            assert (again.target, length) == (parsed(head).target, None), label


class TestHttpAnswerHeads:
    @pytest.mark.parametrize(
        ("head", "method", "kind", "length"),
        [
            (answer_of("Content-Length: 5"), "POST", "LENGTH", 5),
            (answer_of("content-length:\t5 "), "POST", "LENGTH", 5),
            (answer_of("Content-Length: 0"), "GET", "LENGTH", 0),
            (answer_of("Transfer-Encoding: chunked"), "POST", "CHUNKED", 0),
            (answer_of("transfer-encoding: CHUNKED"), "POST", "CHUNKED", 0),
            (answer_of(), "POST", "CLOSE", 0),
            (answer_of(start="HTTP/1.0 200 OK"), "POST", "CLOSE", 0),
            (answer_of("Content-Length: 5"), "HEAD", "NONE", 5),
            (answer_of("Transfer-Encoding: chunked"), "HEAD", "NONE", 0),
            (answer_of(start="HTTP/1.1 204 No Content"), "POST", "NONE", 0),
            (
                answer_of("Content-Length: 5", start="HTTP/1.1 304 Not Modified"),
                "GET",
                "NONE",
                5,
            ),
        ],
    )
    def test_the_body_is_delimited_as_the_head_says(
        self, head: bytes, method: str, kind: str, length: int
    ) -> None:
        answer = claude_lb.parse_answer_head(head, method)
        assert answer.kind is claude_lb.BodyKind[kind]
        assert kind != "LENGTH" or answer.length == length

    @pytest.mark.parametrize(
        "head",
        [
            answer_of("Content-Length: 5", "Content-Length: 6"),
            answer_of("Content-Length: 5, 6"),
            answer_of("Content-Length: +5"),
            answer_of("Content-Length: -5"),
            answer_of("Content-Length: 0x5"),
            answer_of("Content-Length: 5_0"),
            answer_of("Content-Length: \xb2"),
            answer_of("Content-Length:"),
            answer_of("Content-Length: 1" + "0" * 20),
            answer_of("Content-Length: 5", "Transfer-Encoding: chunked"),
            answer_of("Transfer-Encoding: chunked", "Content-Length: 5"),
            answer_of("Transfer-Encoding: gzip, chunked"),
            answer_of("Transfer-Encoding: gzip"),
            answer_of("Transfer-Encoding: identity"),
            answer_of("Transfer-Encoding: chunked", "Transfer-Encoding: chunked"),
            answer_of("Transfer-Encoding: chunked, chunked"),
            answer_of("Transfer-Encoding: xchunked"),
            answer_of("Transfer-Encoding: chunked", start="HTTP/1.0 200 OK"),
            answer_of("Transfer-Encoding : chunked"),
            answer_of("A: 1", " folded"),
            answer_of("no colon"),
            answer_of("A: 1\x00"),
            answer_of("A: 1\rB: 2"),
            b"HTTP/1.1 200 OK\nA: 1\r\n\r\n",
            answer_of(start="HTTP/2 200 OK"),
            answer_of(start="HTTP/1.1 20 OK"),
            answer_of(start="HTTP/1.1 2000 OK"),
            answer_of(start="HTTP/1.1 099 OK"),
            answer_of(start="HTTP/1.1  200 OK"),
            answer_of(start="http/1.1 200 OK"),
            answer_of(start="ICY 200 OK"),
            answer_of(start="HTTP/1.1 200OK"),
            answer_of(start=""),
        ],
    )
    def test_an_answer_that_cannot_be_trusted_is_refused(self, head: bytes) -> None:
        with pytest.raises(ValueError, match=r"."):
            claude_lb.parse_answer_head(head, "POST")

    @pytest.mark.parametrize(
        ("one", "two"),
        [
            ("Content-Encoding: gzip", "content-encoding: br"),
            ("Date: Mon, 01 Jan 2024 00:00:00 GMT", "date: x"),
        ],
    )
    def test_duplicates_that_say_nothing_of_framing_pass(
        self, one: str, two: str
    ) -> None:
        answer = claude_lb.parse_answer_head(answer_of(one, two), "POST")
        assert answer.kept == f"{one}\r\n{two}\r\n".encode()

    def test_too_many_fields_are_refused(self) -> None:
        head = answer_of(*["A: 1"] * 201)
        with pytest.raises((ValueError, OverflowError)):
            claude_lb.parse_answer_head(head, "POST")

    def test_end_to_end_lines_pass_byte_for_byte(self) -> None:
        lines = (
            "request-id: req_1",
            "anthropic-ratelimit-requests-remaining: 3",
            "Retry-After:  7",
            "Vary: A",
            "vary:B",
            "X-Should-Retry: true",
            "Content-Type: text/event-stream; charset=utf-8",
            "Location: https://elsewhere.example/",
            "Content-Encoding: gzip",
            "cf-ray: caf\xe9",
        )
        answer = claude_lb.parse_answer_head(answer_of(*lines), "POST")
        want = "".join(f"{line}\r\n" for line in lines).encode("latin-1")
        assert answer.kept == want

    @pytest.mark.parametrize(
        "line",
        [
            "Set-Cookie: a=b",
            "Server: cloudflare",
            "Alt-Svc: h3",
            "Strict-Transport-Security: max-age=1",
            "Access-Control-Allow-Origin: *",
            "access-control-expose-headers: x",
            "X-Claude-LB-Endpoint: fake",
            "Connection: keep-alive",
            "Keep-Alive: timeout=5",
            "Proxy-Connection: close",
            "Proxy-Authenticate: Basic",
            "Trailer: x",
            "TE: trailers",
            "Upgrade: h2",
            "Transfer-Encoding: chunked",
        ],
    )
    def test_what_speaks_for_the_upstreams_own_host_is_taken(self, line: str) -> None:
        answer = claude_lb.parse_answer_head(answer_of("A: 1", line, "B: 2"), "POST")
        assert answer.kept == b"A: 1\r\nB: 2\r\n"

    def test_a_listed_field_goes_with_its_connection(self) -> None:
        lines = ("Connection: x-hop,\tx-tab", "X-Hop: 1", "x-tab: 2", "Content-Type: a")
        answer = claude_lb.parse_answer_head(answer_of(*lines), "POST")
        assert answer.kept == b"Content-Type: a\r\n"

    def test_a_length_is_passed_but_for_a_204(self) -> None:
        head = answer_of("Content-Length: 5")
        assert b"Content-Length: 5" in claude_lb.parse_answer_head(head, "HEAD").kept
        head = answer_of("Content-Length: 5", start="HTTP/1.1 204 No Content")
        assert claude_lb.parse_answer_head(head, "GET").kept == b""

    @pytest.mark.parametrize(
        ("head", "keep"),
        [
            (answer_of("Content-Length: 5"), True),
            (answer_of("Content-Length: 5", "Connection: close"), False),
            (answer_of("Content-Length: 5", "Connection: X, CLOSE"), False),
            (
                answer_of("Content-Length: 5", "Connection: x", "Connection: close"),
                False,
            ),
            (answer_of("Content-Length: 5", start="HTTP/1.0 200 OK"), False),
            (
                answer_of(
                    "Content-Length: 5",
                    "Connection: keep-alive",
                    start="HTTP/1.0 200 OK",
                ),
                True,
            ),
            (answer_of(), False),
        ],
    )
    def test_the_connection_is_kept_where_both_ends_can_tell_the_end(
        self, head: bytes, keep: bool
    ) -> None:
        assert claude_lb.parse_answer_head(head, "POST").keep_alive is keep

    def test_the_rest_of_the_head_is_read(self) -> None:
        head = answer_of(
            "Content-Type: Text/Event-Stream; Charset=UTF-8",
            "Date: x",
            "Content-Encoding: GZIP",
            start="HTTP/1.1 529 Site is overloaded \xe9",
        )
        answer = claude_lb.parse_answer_head(head, "POST")
        assert (answer.status, answer.reason) == (529, b"Site is overloaded \xe9")
        assert answer.content_type == b"text/event-stream; charset=utf-8"
        assert (answer.encoded, answer.dated) == (True, True)
        bare = claude_lb.parse_answer_head(answer_of(start="HTTP/1.1 200"), "POST")
        assert (bare.reason, bare.encoded, bare.dated) == (b"", False, False)

    @pytest.mark.parametrize(
        ("keep", "modern", "line"),
        [
            (True, True, b""),
            (True, False, b"Connection: keep-alive\r\n"),
            (False, True, b"Connection: close\r\n"),
            (False, False, b"Connection: close\r\n"),
        ],
    )
    def test_the_connection_line_is_stated_where_needed(
        self, keep: bool, modern: bool, line: bytes
    ) -> None:
        assert claude_lb.connection_line(keep=keep, modern=modern) == line


EPOCH = 1_700_000_000.0  # 2023-11-14T22:13:20Z
UNIFIED = "anthropic-ratelimit-unified"
REJECTED = f"{UNIFIED}-status: rejected"
REQUESTS = "Anthropic-RateLimit-Requests"
USED_UP, LEFT = f"{REQUESTS}-Remaining: 0", f"{REQUESTS}-Remaining: 7"


def kept_of(*fields: str) -> bytes:
    """Return the field lines that an answer keeps."""
    return b"".join(f"{f}\r\n".encode("latin-1") for f in ("x-a: 1", *fields))


class TestHttpLimits:
    @pytest.mark.parametrize(
        ("fields", "wait_s"),
        [
            ([], None),
            (["Retry-After: 20"], 20),
            (["retry-after: 0.5 "], 0.5),
            (["retry-after-ms: 1500", "retry-after: 20"], 1.5),
            (["retry-after-ms: soon", "retry-after: 20"], 20),
            (["retry-after-ms: 0", "retry-after: 20"], 20),
            (["retry-after: Tue, 14 Nov 2023 22:13:50 GMT"], 30),
            (["retry-after: Tue, 14 Nov 2023 22:13:10 GMT"], None),
            (["retry-after: 2023-11-14T22:13:50Z"], 30),
            (["retry-after: "], None),
            (["retry-after: soon"], None),
            (["retry-after: \xb2"], None),
            (["retry-after: Tue, 99 Foo 2023 99:99:99 GMT"], None),
            (["retry-after: 0"], None),
            (["retry-after: -5"], None),
            (["retry-after: 1e9"], None),
            (["retry-after: nan"], None),
            (["retry-after: inf"], None),
            (["x-retry-after: 20"], None),
            ([f"retry-after: {8 * 86_400}"], 8 * 86_400),
            ([f"retry-after: {8 * 86_400 + 1}"], None),
            ([REJECTED, f"{UNIFIED}-reset: 1700000600"], 600),
            ([f"{UNIFIED}-status: allowed", f"{UNIFIED}-reset: 1700000600"], None),
            ([f"{UNIFIED}-reset: 1700000600"], None),
            ([REJECTED, f"{UNIFIED}-reset: 1699999999"], None),
            ([REJECTED, f"{UNIFIED}-reset: never"], None),
            ([REJECTED], None),
            (["retry-after: 20", REJECTED, f"{UNIFIED}-reset: 1700000600"], 600),
            ([USED_UP, f"{REQUESTS}-Reset: 2023-11-14T22:14:20Z"], 60),
            ([LEFT, f"{REQUESTS}-Reset: 2023-11-14T22:14:20Z"], None),
            (
                [
                    "retry-after: x",
                    USED_UP,
                    f"{REQUESTS}-Reset: 2023-11-15T00:14:20+02:00",
                ],
                60,
            ),
            ([USED_UP, f"{REQUESTS}-Reset: garbage"], None),
            ([USED_UP], None),
        ],
    )
    def test_a_wait_counts_only_where_it_is_stated_and_can_be_true(
        self, fields: list[str], wait_s: float | None
    ) -> None:
        found = claude_lb.stated_wait_s(kept_of(*fields), EPOCH)
        assert found == (wait_s if wait_s is None else pytest.approx(wait_s))

    @pytest.mark.parametrize(
        ("fields", "room"),
        [
            ([], 1.0),
            ([f"{REQUESTS}-Limit: 50", f"{REQUESTS}-Remaining: 10"], 0.2),
            ([f"{REQUESTS}-Limit: 50", USED_UP], 0.0),
            ([f"{REQUESTS}-Limit: 0", USED_UP], 1.0),
            ([f"{REQUESTS}-Limit: x", LEFT], 1.0),
            ([LEFT], 1.0),
            ([f"{REQUESTS}-Limit: 5", f"{REQUESTS}-Remaining: 9"], 1.0),
            ([f"{UNIFIED}-5h-utilization: 0.25"], 0.75),
            (
                [f"{UNIFIED}-5h-utilization: 0.25", f"{UNIFIED}-7d-utilization: 0.9"],
                0.1,
            ),
            ([f"{UNIFIED}-5h-utilization: 1.3"], 0.0),
            ([f"{UNIFIED}-5h-utilization: nan"], 1.0),
            ([REJECTED, f"{UNIFIED}-5h-utilization: 0.1"], 0.0),
            ([f"{UNIFIED}-status: allowed", f"{UNIFIED}-5h-utilization: 0.5"], 0.5),
        ],
    )
    def test_room_is_that_of_the_tightest_limit(
        self, fields: list[str], room: float
    ) -> None:
        assert claude_lb.headroom_of(kept_of(*fields)) == pytest.approx(room)

    def test_limit_fields_lose_their_prefix_and_their_case(self) -> None:
        kept = kept_of(f"{REQUESTS}-Limit:  50 ", f"{UNIFIED}-status: allowed")
        fields = {"requests-limit": "50", "unified-status": "allowed"}
        assert claude_lb.limit_fields(kept) == fields


# -- 6. bodies -------------------------------------------------------------

CHUNKED_BODIES: list[tuple[str, bytes, bytes]] = [
    ("empty", b"0\r\n\r\n", b""),
    ("one chunk", b"5\r\nhello\r\n0\r\n\r\n", b"hello"),
    ("two chunks", b"5\r\nhello\r\n6\r\n world\r\n0\r\n\r\n", b"hello world"),
    ("line ends in the data", b"6\r\n\r\n0\r\n\r\r\n0\r\n\r\n", b"\r\n0\r\n\r"),
    ("last chunk in the data", b"5\r\n0\r\n\r\n\r\n0\r\n\r\n", b"0\r\n\r\n"),
    ("leading zeros", b"0005\r\nhello\r\n000\r\n\r\n", b"hello"),
    ("hexadecimal", b"0A\r\n0123456789\r\n1a\r\n" + b"x" * 26 + b"\r\n0\r\n\r\n",
     b"0123456789" + b"x" * 26),
    ("extensions", b'5;a=b;c="d e;\xff"\r\nhello\r\n0;z\r\n\r\n'.replace(b"\xff", b"f"),
     b"hello"),
    ("trailers", b"2\r\nhi\r\n0\r\nX-Sum: 1\r\nx-other: 2\r\n\r\n", b"hi"),
    ("events", b"7\r\ndata: 1\r\n2\r\n\n\n\r\n9\r\ndata: 2\n\n\r\n0\r\n\r\n",
     b"data: 1\n\ndata: 2\n\n"),
]  # fmt: skip

BROKEN_CHUNKS: list[tuple[str, bytes]] = [
    ("no size", b"\r\nhello\r\n0\r\n\r\n"),
    ("no number", b"x\r\nhello\r\n"),
    ("sign", b"+5\r\nhello\r\n"),
    ("minus", b"-5\r\nhello\r\n"),
    ("0x", b"0x5\r\nhello\r\n"),
    ("underscore", b"1_0\r\n0123456789abcdef\r\n"),
    ("space before", b" 5\r\nhello\r\n"),
    ("space after", b"5 \r\nhello\r\n"),
    ("too many digits", b"000000005\r\nhello\r\n"),
    ("more than memory", b"fffffffff\r\n"),
    ("bare LF after the size", b"5\nhello\r\n0\r\n\r\n"),
    ("bare CR after the size", b"5\rhello\r\n0\r\n\r\n"),
    ("CR CR LF after the size", b"5\r\r\nhello\r\n"),
    ("data too long", b"5\r\nhello!\r\n0\r\n\r\n"),
    ("data too short", b"6\r\nhello\r\n0\r\n\r\n"),
    ("bare LF after data", b"5\r\nhello\n0\r\n\r\n"),
    ("bare CR after data", b"5\r\nhello\r0\r\n\r\n"),
    ("no line end after data", b"5\r\nhello0\r\n\r\n"),
    ("NUL in an extension", b"5;a=\x00\r\nhello\r\n"),
    ("empty extension", b"5;\r\nhello\r\n"),
    ("LF in a quoted extension", b'5;a="\n"\r\nhello\r\n'),
    ("line end in a quoted extension", b'5;a="\r\n"\r\nhello\r\n'),
    ("endless extension", b"5;" + b"a" * 5000 + b"\r\nhello\r\n"),
    ("endless line", b"5;" + b"a" * 5000),
    ("bare LF in trailers", b"0\r\nA: 1\n\r\n"),
    ("bare LF at the end", b"0\r\n\n"),
    ("folded trailer", b"0\r\nA: 1\r\n b\r\n\r\n"),
    ("trailer without a colon", b"0\r\nA\r\n\r\n"),
    ("NUL in a trailer", b"0\r\nA: \x00\r\n\r\n"),
    ("length as a trailer", b"0\r\nContent-Length: 5\r\n\r\n"),
    ("coding as a trailer", b"0\r\ntransfer-encoding: chunked\r\n\r\n"),
    ("key as a trailer", b"0\r\nX-Api-Key: 1\r\n\r\n"),
    ("authorization as a trailer", b"0\r\nAuthorization: 1\r\n\r\n"),
    ("host as a trailer", b"0\r\nHost: a\r\n\r\n"),
    ("endless trailers", b"0\r\n" + b"A: 1234567\r\n" * 900),
    ("endless trailer", b"0\r\nA: " + b"1" * 9000),
]


def read_all(
    reader: claude_lb.BodyReader, parts: Iterable[bytes]
) -> tuple[bytes, bytes]:
    """Feed `parts`; return (bytes passed on, payload)."""
    passed, payload = b"", b""
    for part in parts:
        passed += reader.feed(part)
        payload += reader.payload
    return passed, payload


class TestBodiesChunked:
    @pytest.mark.parametrize(
        ("wire", "payload"),
        [(w, p) for _, w, p in CHUNKED_BODIES],
        ids=[label for label, *_ in CHUNKED_BODIES],
    )
    def test_a_body_reads_the_same_however_it_comes(
        self, wire: bytes, payload: bytes
    ) -> None:
        for parts in all_splits(wire):
            reader = claude_lb.ChunkedReader(keep_payload=True)
            passed, got = read_all(reader, parts)
            assert (got, reader.done, reader.excess) == (payload, True, b""), parts
            assert decode_chunks(passed + claude_lb.LAST_CHUNK) == payload, parts
            assert reader.close()

    @pytest.mark.parametrize(
        "wire",
        [w for _, w, _ in CHUNKED_BODIES],
        ids=[label for label, *_ in CHUNKED_BODIES],
    )
    def test_a_cut_is_never_passed_on_as_an_end(self, wire: bytes) -> None:
        whole = claude_lb.ChunkedReader(keep_payload=False)
        passed_whole = whole.feed(wire)
        for i in range(len(wire)):
            reader = claude_lb.ChunkedReader(keep_payload=False)
            passed = reader.feed(wire[:i])
            assert not reader.done
            assert not reader.close()
            assert passed_whole.startswith(passed)
            with pytest.raises((ValueError, AssertionError, TypeError)):
                decode_chunks(passed)

    @pytest.mark.parametrize(
        "wire", [w for _, w in BROKEN_CHUNKS], ids=[label for label, _ in BROKEN_CHUNKS]
    )
    def test_broken_framing_is_refused_however_it_comes(self, wire: bytes) -> None:
        cuts = [(wire,), *((wire[:i], wire[i:]) for i in range(1, min(len(wire), 60)))]
        for parts in [*cuts, tuple(wire[i : i + 1] for i in range(len(wire)))]:
            reader = claude_lb.ChunkedReader(keep_payload=True)
            with pytest.raises(ValueError, match=r"."):
                read_all(reader, parts)

    def test_bytes_after_the_end_are_kept_apart(self) -> None:
        wire, extra = b"2\r\nhi\r\n0\r\nA: 1\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n"
        for i in range(1, len(wire) + 1):
            reader = claude_lb.ChunkedReader(keep_payload=True)
            first = reader.feed(wire[:i]), reader.payload
            if i == len(wire):
                assert (reader.done, reader.excess) == (True, b"")
                continue
            passed = first[0] + reader.feed(wire[i:] + extra)
            assert (first[1] + reader.payload, reader.excess) == (b"hi", extra)
            assert passed == b"2\r\nhi\r\n"

    def test_data_is_passed_on_before_its_chunk_is_whole(self) -> None:
        reader = claude_lb.ChunkedReader(keep_payload=True)
        assert reader.feed(b"a\r\n012") == b"a\r\n012"
        assert reader.payload == b"012"
        assert not reader.at_rest()
        assert reader.feed(b"3456789") == b"3456789"
        assert not reader.at_rest()
        assert reader.feed(b"\r\n") == b"\r\n"
        assert reader.at_rest()

    def test_it_rests_between_chunks_only(self) -> None:
        wire = b"5\r\nhello\r\n6\r\n world\r\n0\r\n\r\n"
        reader = claude_lb.ChunkedReader(keep_payload=False)
        rests = [0] if reader.at_rest() else []
        for i in range(len(wire)):
            reader.feed(wire[i : i + 1])
            if reader.at_rest():
                rests.append(i + 1)
        assert rests == [0, 10, 21]

    def test_what_is_inserted_at_rest_is_a_chunk_of_its_own(self) -> None:
        wire = b"5\r\nhello\r\n6\r\n world\r\n0\r\n\r\n"
        for i in range(len(wire)):
            reader = claude_lb.ChunkedReader(keep_payload=False)
            passed = reader.feed(wire[:i])
            if reader.at_rest():
                passed += claude_lb.chunk(b"PING")
                passed += reader.feed(wire[i:]) + claude_lb.LAST_CHUNK
                assert decode_chunks(passed).replace(b"PING", b"") == b"hello world"

    def test_without_payload_it_passes_the_same_bytes(self) -> None:
        for _, wire, _ in CHUNKED_BODIES:
            keeps = claude_lb.ChunkedReader(keep_payload=True)
            drops = claude_lb.ChunkedReader(keep_payload=False)
            assert keeps.feed(wire) == drops.feed(wire)
            assert drops.payload == b""

    def test_random_bodies_in_random_pieces_read_the_same(self) -> None:
        dice = random.Random(20_240_607)
        for _ in range(300):
            payload = bytes(dice.choices(b"\r\n0;ab", k=dice.randrange(200)))
            wire, left = b"", payload
            while left:
                size = dice.randint(1, len(left))
                extension = dice.choice([b"", b";x", b';x="a b"'])
                form = dice.choice([b"%x", b"%X", b"00%x"]) % size
                wire += form + extension + CRLF + left[:size] + CRLF
                left = left[size:]
            wire += dice.choice([b"0", b"000", b"0;e=1"]) + CRLF
            wire += dice.choice([b"", b"X-T: 1\r\n"]) + CRLF
            cuts = sorted(dice.choices(range(len(wire)), k=dice.randrange(12)))
            parts = [wire[a:b] for a, b in zip([0, *cuts], [*cuts, len(wire)])]
            reader = claude_lb.ChunkedReader(keep_payload=True)
            passed, got = read_all(reader, [p for p in parts if p])
            assert reader.done
            assert got == payload
            assert decode_chunks(passed + claude_lb.LAST_CHUNK) == payload

    def test_a_mutated_body_is_read_as_it_would_be_whole_or_refused(self) -> None:
        dice = random.Random(7)
        wires = [w for _, w, _ in CHUNKED_BODIES]
        for _ in range(3000):
            wire = bytearray(dice.choice(wires))
            for _ in range(dice.randint(1, 3)):
                place = dice.randrange(len(wire))
                wire[place : place + dice.randint(0, 1)] = dice.choice(
                    [b"", b"\r", b"\n", b"0", b"5", b";", b" ", b"\x00", b"f"]
                )
                if not wire:
                    wire += b"0"
            whole, cut = self.outcome([bytes(wire)]), dice.randrange(len(wire) + 1)
            split = self.outcome([bytes(wire[:cut]), bytes(wire[cut:])])
            assert whole == split, (bytes(wire), cut)

    @staticmethod
    def outcome(parts: Sequence[bytes]) -> tuple[object, ...]:
        """Return how reading `parts` ends."""
        reader, payload = claude_lb.ChunkedReader(keep_payload=True), b""
        try:
            for part in parts:
                if part and not reader.done:
                    reader.feed(part)
                    payload += reader.payload
                elif reader.done:
                    reader.excess += part
        except ValueError:
            return ("refused",)
        return reader.done, payload, reader.excess


class TestBodiesPlain:
    def test_a_stated_length_ends_where_it_says(self) -> None:
        wire = b"hello" + b"excess"
        for parts in all_splits(wire):
            reader = claude_lb.LengthReader(5)
            passed, excess = b"", b""
            for part in parts:
                if reader.done:
                    excess += part
                    continue
                passed += reader.feed(part)
                excess += reader.excess
            assert (passed, excess, reader.done) == (b"hello", b"excess", True)

    def test_a_short_body_is_a_cut(self) -> None:
        reader = claude_lb.LengthReader(5)
        assert reader.feed(b"hell") == b"hell"
        assert not reader.done
        assert not reader.close()
        assert not reader.at_rest()
        assert reader.feed(b"o") == reader.payload == b"o"
        assert reader.close()

    def test_a_length_of_zero_has_ended(self) -> None:
        assert claude_lb.LengthReader(0).done

    def test_a_body_to_the_end_of_its_connection_ends_with_it(self) -> None:
        reader = claude_lb.CloseReader()
        assert reader.feed(b"0\r\n\r\n") == reader.payload == b"0\r\n\r\n"
        assert not reader.done
        assert reader.at_rest()
        assert reader.close()
        assert reader.done

    @pytest.mark.parametrize(
        ("payload", "wire"),
        [
            (b"", b""),
            (b"a", b"1\r\na\r\n"),
            (b"x" * 26, b"1a\r\n" + b"x" * 26 + b"\r\n"),
        ],
    )
    def test_a_payload_becomes_one_chunk(self, payload: bytes, wire: bytes) -> None:
        assert claude_lb.chunk(payload) == wire
        assert decode_chunks(wire + claude_lb.LAST_CHUNK) == payload

    @pytest.mark.parametrize(
        ("head", "kind"),
        [
            (answer_of("Transfer-Encoding: chunked"), claude_lb.ChunkedReader),
            (answer_of("Content-Length: 3"), claude_lb.LengthReader),
            (answer_of(), claude_lb.CloseReader),
            (answer_of(start="HTTP/1.1 204 No Content"), claude_lb.LengthReader),
        ],
    )
    def test_an_answer_has_its_reader(self, head: bytes, kind: type) -> None:
        answer = claude_lb.parse_answer_head(head, "POST")
        reader = claude_lb.body_reader(answer, keep_payload=True)
        assert isinstance(reader, kind)
        assert reader.done is (answer.kind is claude_lb.BodyKind.NONE)


# -- 7. access -------------------------------------------------------------

APP = "https://app.example"


def access_to(port: int = 13255, *, passes: bool = False, **settings: Any) -> Any:
    """Return what decides on access to a server with these settings."""
    made = claude_lb.ServerSettings(port=port, **settings)
    return claude_lb.Access(made, port=port, via="me", passes_credentials=passes)


def asked(
    *fields: str,
    start: str = "POST /v1/messages HTTP/1.1",
    host: str = "localhost:13255",
) -> claude_lb.RequestHead:
    """Return the head of a request to `host`."""
    lines = "".join(f"{line}\r\n" for line in (start, f"Host: {host}", *fields))
    return parsed(lines.encode("latin-1") + CRLF)


def status_of(access: Any, head: claude_lb.RequestHead) -> int:
    """Return the status of a refusal, 200 for none."""
    try:
        access.admit(head)
    except claude_lb.RefusedError as refusal:
        return refusal.status if refusal.close else 0
    return 200


class TestAccess:
    @pytest.mark.parametrize(
        ("host", "status"),
        [
            ("127.0.0.1:13255", 200),
            ("localhost:13255", 200),
            ("LocalHost:13255", 200),
            ("[::1]:13255", 200),
            ("lb.example", 200),
            ("LB.example:8443", 200),
            ("127.0.0.1", 421),
            ("127.0.0.1:80", 421),
            ("localhost:13256", 421),
            ("evil.example:13255", 421),
            ("localhost.evil.example:13255", 421),
            ("localhost.:13255", 421),
            ("10.0.0.1:13255", 421),
            ("lb.example.evil.example", 421),
        ],
    )
    @pytest.mark.parametrize("path", ["/v1/messages", "/health", "/"])
    def test_only_our_own_names_are_answered(
        self, host: str, status: int, path: str
    ) -> None:
        access = access_to(allowed_hosts=("lb.example",))
        head = asked(start=f"GET {path} HTTP/1.1", host=host)
        assert status_of(access, head) == status

    @pytest.mark.parametrize(
        ("fields", "origins", "path", "status"),
        [
            ((), (), "/v1/models", 200),
            ((f"Origin: {APP}",), (), "/v1/models", 403),
            ((f"Origin: {APP}",), (APP,), "/v1/models", 200),
            ((f"Origin: {APP}:444",), (APP,), "/v1/models", 403),
            (("Origin: http://app.example",), (APP,), "/v1/models", 403),
            ((f"Origin: {APP}",), (APP,), "/nowhere", 403),
            ((f"Origin: {APP}",), ("*",), "/v1/models", 200),
            (("Origin: null",), ("*",), "/v1/models", 403),
            (("Origin: null",), (), "/v1/models", 403),
            (("Origin: http://localhost:3000",), (), "/v1/models", 403),
            (("Origin: http://localhost:13255",), (), "/v1/models", 200),
            (("Sec-Fetch-Site: cross-site",), (APP,), "/v1/models", 403),
            (("Sec-Fetch-Site: same-site",), (), "/health", 403),
            (("Sec-Fetch-Site: cross-site",), (), "/", 200),
            (("Sec-Fetch-Site: same-origin",), (), "/v1/models", 200),
            (("Sec-Fetch-Site: none",), (), "/v1/models", 200),
        ],
    )
    def test_only_listed_web_pages_may_ask(
        self, fields: tuple[str, ...], origins: tuple[str, ...], path: str, status: int
    ) -> None:
        head = asked(*fields, start=f"GET {path} HTTP/1.1")
        assert status_of(access_to(cors_origins=origins), head) == status

    def test_a_listed_page_is_echoed_without_credentials(self) -> None:
        for origins in ((APP,), ("*",)):
            head = asked(f"Origin: {APP}", start="GET /v1/models HTTP/1.1")
            admission = access_to(cors_origins=origins).admit(head)
            lines = admission.answer_fields.decode().lower().split("\r\n")
            assert f"access-control-allow-origin: {APP}" in lines
            assert "vary: origin" in lines
            assert not any("allow-credentials" in line for line in lines)
            assert admission.foreign
        assert access_to(cors_origins=(APP,)).admit(asked()).answer_fields == b""

    @pytest.mark.parametrize(
        ("fields", "status"),
        [
            (("Content-Type: application/json", "Content-Length: 2"), 200),
            (("Content-Type: Application/JSON; charset=utf-8",), 200),
            (("Content-Type: text/plain", "Content-Length: 2"), 415),
            (("Content-Type: multipart/form-data", "Content-Length: 2"), 415),
            (("Content-Length: 2",), 415),
        ],
    )
    def test_a_web_pages_body_must_be_json(
        self, fields: tuple[str, ...], status: int
    ) -> None:
        access = access_to(cors_origins=(APP,))
        assert status_of(access, asked(f"Origin: {APP}", *fields)) == status
        assert status_of(access, asked("Sec-Fetch-Site: none", *fields)) == status
        assert status_of(access, asked(*fields)) == 200

    @pytest.mark.parametrize(
        ("fields", "status"),
        [
            ((), 401),
            ((f"x-api-key: {KEY}",), 200),
            ((f"Authorization: Bearer {KEY}",), 200),
            ((f"authorization: bearer  {KEY}",), 200),
            ((f"x-api-key: {KEY[::-1]}",), 200),
            ((f"x-api-key: {KEY[:-1]}",), 401),
            ((f"x-api-key: {KEY}x",), 401),
            (("x-api-key:",), 401),
            (("Authorization: Bearer",), 401),
            ((f"Authorization: Basic {KEY}",), 401),
            ((f"x-api-key: {KEY.lower()}",), 401),
            ((f"Cookie: x-api-key={KEY}",), 401),
            (("x-api-key: \xff\xfe",), 401),
            (("x-api-key: other", f"Authorization: Bearer {KEY}"), 200),
        ],
    )
    def test_with_client_keys_a_request_needs_one(
        self, fields: tuple[str, ...], status: int
    ) -> None:
        keys = (claude_lb.Secret(KEY), claude_lb.Secret(KEY[::-1]))
        access = access_to(client_keys=keys)
        for start in ("POST /v1/messages HTTP/1.1", "GET /v1/models HTTP/1.1"):
            assert status_of(access, asked(*fields, start=start)) == status
        assert status_of(access, asked(*fields, start="GET /health HTTP/1.1")) == 200

    def test_a_client_key_is_not_passed_through(self) -> None:
        keys = (claude_lb.Secret(KEY),)
        head = asked(f"x-api-key: {KEY}", "Authorization: Bearer mine")
        access = access_to(passes=True, client_keys=keys)
        assert access.admit(head).credentials == (b"Authorization: Bearer mine",)
        access = access_to(passes=False, client_keys=keys)
        assert access.admit(head).credentials == ()

    def test_a_request_that_comes_round_is_refused(self) -> None:
        assert status_of(access_to(), asked("x-claude-lb-via: a, me")) == 502
        assert status_of(access_to(), asked("x-claude-lb-via: other")) == 200


# -- 8. sse ----------------------------------------------------------------

SSE_START = b'event: message_start\ndata: {"type":"message_start"}\n\n'
DELTA = (
    b"event: content_block_delta\n"
    b'data: {"type":"content_block_delta","delta":{"text":"hi \xe2\x82\xac"}}\n\n'
)
SSE_STOP = b'event: message_stop\ndata: {"type":"message_stop"}\n\n'
ERROR = b'event: error\ndata: {"type":"error","error":{"type":"overloaded_error"}}\n\n'
LONG_ERROR = b'event: error\ndata: {"type":"error","m":"' + b"long " * 150 + b'"}\n\n'
LONG_DELTA = b'event: x\ndata: {"text":"' + b"filling " * 100 + b'"}\n\n'
QUOTED = (
    b"event: content_block_delta\n"
    b'data: {"text":"event: message_stop\\nevent: error\\ndata: {}\\n\\n'
    b'\\r\\nevent: message_stop\\r\\n"}\n\n'
)
CONTAINER = b'event: x\ndata: {"container":{"id":"container_011CNha8iCJc"}}\n\n'


def watched(parts: Iterable[bytes]) -> claude_lb.SseWatch:
    """Return a watch that has seen `parts`."""
    watch = claude_lb.SseWatch()
    for part in parts:
        watch.feed(part)
    return watch


class TestSseWatch:
    @pytest.mark.parametrize(
        ("stream", "complete", "failed"),
        [
            (SSE_START + DELTA + SSE_STOP, True, False),
            (SSE_START + DELTA, False, False),
            (SSE_START + ERROR, True, True),
            (ERROR, True, True),
            (SSE_START + QUOTED, False, False),
            (SSE_START + QUOTED + SSE_STOP, True, False),
            (SSE_START + LONG_DELTA + SSE_STOP, True, False),
            (SSE_START + LONG_ERROR, True, True),
            (SSE_START + LONG_DELTA + ERROR + LONG_DELTA, True, True),
            ((SSE_START + DELTA + SSE_STOP).replace(b"\n", b"\r\n"), True, False),
            ((SSE_START + ERROR).replace(b"\n", b"\r\n"), True, True),
            ((SSE_START + SSE_STOP).replace(b"\n", b"\r"), True, False),
            (SSE_STOP.replace(b"event: ", b"event:"), True, False),
            (ERROR.replace(b"event: ", b"event:"), True, True),
            (b": comment\n\n" + SSE_START + claude_lb.PING_EVENT, False, False),
            (b'event: error_like\ndata: {"type":"x"}\n\n', False, False),
            (b"xevent: error\n\n", False, False),
        ],
        ids=[
            "whole",
            "cut",
            "error",
            "error alone",
            "words in a text",
            "words in a text, whole",
            "long event, whole",
            "long error",
            "error amid long events",
            "CRLF",
            "CRLF error",
            "CR",
            "no space",
            "no space, error",
            "comment and ping",
            "another name",
            "another field",
        ],
    )
    def test_the_end_and_the_failure_are_seen_in_any_split(
        self, stream: bytes, complete: bool, failed: bool
    ) -> None:
        for parts in all_splits(stream):
            watch = watched(parts)
            cut = len(parts[0])
            assert (watch.complete(), watch.failed) == (complete, failed), cut

    def test_no_start_of_a_stream_is_complete(self) -> None:
        stream = SSE_START + DELTA + QUOTED + SSE_STOP
        stop = stream.index(b"event: message_stop\ndata") + len("event: message_stop")
        for i in range(stop):
            assert not watched([stream[:i]]).complete(), i
        assert watched([stream[: stop + 1]]).complete()

    @pytest.mark.parametrize(
        "more", [claude_lb.PING_EVENT, b"\n", b": comment\n\n", LONG_DELTA]
    )
    def test_what_follows_the_stop_does_not_undo_it(self, more: bytes) -> None:
        for parts in all_splits(SSE_START + SSE_STOP + more):
            assert watched(parts).complete(), len(parts[0])

    def test_it_rests_where_an_event_has_just_ended(self) -> None:
        for end in (b"\n", b"\r\n", b"\r"):
            events = [e.replace(b"\n", end) for e in (SSE_START, DELTA, SSE_STOP)]
            stream = b"".join(events)
            ends = {0, *itertools.accumulate(len(e) for e in events)}
            watch, rests = claude_lb.SseWatch(), {0}
            for i in range(len(stream)):
                watch.feed(stream[i : i + 1])
                if watch.at_rest():
                    rests.add(i + 1)
            assert rests == ends, end

    def test_it_rests_before_the_first_byte(self) -> None:
        watch = claude_lb.SseWatch()
        assert watch.at_rest()
        watch.feed(b"")
        assert watch.at_rest()
        assert not watch.complete()

    def test_containers_are_seen_in_any_split(self) -> None:
        stream = SSE_START + CONTAINER + LONG_DELTA
        for parts in all_splits(stream):
            found = watched(parts).ids()
            assert found == ("container_011CNha8iCJc",), len(parts[0])

    def test_its_memory_is_bounded(self) -> None:
        watch = watched([b"x" * 100_000, *[b"y" * 100] * 100])
        assert len(watch._tail) <= 1024


class TestSseGate:
    @pytest.mark.parametrize(
        ("stream", "content", "error"),
        [
            (SSE_START + DELTA + SSE_STOP, True, b""),
            (SSE_START + claude_lb.PING_EVENT, False, b""),
            (ERROR, False, b"overloaded_error"),
            (SSE_START + ERROR, False, b"overloaded_error"),
            (claude_lb.PING_EVENT + ERROR, False, b"overloaded_error"),
            (SSE_START + DELTA + ERROR, True, b""),
            (b": comment\n\n: another\n\n" + ERROR, False, b"overloaded_error"),
            (b": comment\n\n: another\n\n", False, b""),
            (b"\n\n" + ERROR, False, b"overloaded_error"),
            (b'data: {"x":1}\n\n', True, b""),
            (b"event: error\n\n", False, b"{}"),
            (b'event: error_like\ndata: {"x":1}\n\n', True, b""),
            (b'event:error\ndata:{"t":"overloaded_error"}\n\n', False, b"overloaded"),
            (b'data: {"t":"overloaded"}\nevent: error\n\n', False, b"overloaded"),
            (SSE_START[:-1], False, b""),
            (QUOTED, True, b""),
            (b"", False, b""),
        ],
        ids=[
            "content",
            "nothing yet",
            "error first",
            "error after the start",
            "error after a ping",
            "error after content",
            "comments and error",
            "comments",
            "blank lines and error",
            "data alone",
            "error without data",
            "another name",
            "no space",
            "data before the name",
            "unfinished event",
            "words in a text",
            "empty",
        ],
    )
    @pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"], ids=["LF", "CRLF", "CR"])
    def test_what_comes_first_is_known_in_any_split(
        self, stream: bytes, content: bool, error: bytes, end: bytes
    ) -> None:
        for parts in all_splits(stream.replace(b"\n", end)):
            gate, known = claude_lb.SseGate(), False
            for part in parts:
                known = known or gate.feed(part)
            assert (gate.content, error in gate.error) == (content, True), parts
            assert bool(gate.error) is bool(error), parts
            assert known is (content or bool(error)), parts

    def test_it_is_known_at_the_events_own_end(self) -> None:
        gate = claude_lb.SseGate()
        stream = SSE_START + DELTA
        assert not gate.feed(stream[:-1])
        assert gate.feed(stream[-1:])
        assert gate.feed(ERROR)
        assert (gate.content, gate.error) == (True, b"")


# -- 9. selection ----------------------------------------------------------

FILE_ID = "file_011CNha8iCJcU1wXNR6q4V8w"


class TestSelection:
    def test_the_fixed_endpoint_is_the_default_one_else_the_first(self) -> None:
        plain = [endpoint_of("a"), endpoint_of("b")]
        assert claude_lb.fixed_endpoint(plain) is plain[0]
        marked = [endpoint_of("a"), endpoint_of("b", default=True)]
        assert claude_lb.fixed_endpoint(marked) is marked[1]

    @pytest.mark.parametrize(
        ("start", "ids"),
        [
            (f"GET /v1/files/{FILE_ID}/content HTTP/1.1", (FILE_ID,)),
            (
                "GET /v1/messages/batches/msgbatch_01AbCdEf/results?x=1 HTTP/1.1",
                ("msgbatch_01AbCdEf",),
            ),
            (
                "DELETE /v1/skills/skill_01AbCdEf/versions/17 HTTP/1.1",
                ("skill_01AbCdEf",),
            ),
            ("GET /v1/models/claude-opus-5-5 HTTP/1.1", ()),
            ("GET /v1/models HTTP/1.1", ()),
            (f"GET /v1/files?after={FILE_ID} HTTP/1.1", ()),
        ],
    )
    def test_a_path_names_its_ids(self, start: str, ids: tuple[str, ...]) -> None:
        assert claude_lb.named_ids(parsed(request_of(start=start)), b"") == ids

    @pytest.mark.parametrize(
        ("body", "ids"),
        [
            (b"", ()),
            (b'{"model":"m","messages":[]}', ()),
            (
                b'{"source":{"type":"file","file_id":"%b"}}' % FILE_ID.encode(),
                (FILE_ID,),
            ),
            (b'{"container":"container_011CNha8"}', ("container_011CNha8",)),
            (
                b'{"container":{"id":"container_011CNha8","skills":'
                b'[{"skill_id":"skill_01AbCdEf"}]}}',
                ("container_011CNha8", "skill_01AbCdEf"),
            ),
            (b'{"text":"see file_011CNha8iCJcU1 there"}', ()),
        ],
    )
    def test_a_message_names_its_ids(self, body: bytes, ids: tuple[str, ...]) -> None:
        for kind in (bytes, bytearray):
            assert claude_lb.named_ids(parsed(request_of()), kind(body)) == ids

    @pytest.mark.parametrize("name", ["file_search", "file_writer", "file_reader"])
    def test_the_name_of_a_tool_is_no_id_of_a_file(self, name: str) -> None:
        body = json.dumps({"messages": [], "tools": [{"name": name}]}).encode()
        ids = claude_lb.named_ids(parsed(request_of()), body)
        pool = pool_of("ab")
        names = [take(pool, ids=ids).endpoint.name for _ in range(4)]
        assert names == ["a", "b", "a", "b"]

    @pytest.mark.parametrize(
        ("lane", "body", "ids"),
        [
            (
                Lane.FIXED,
                b'{"id": "%b", "x": {"id":"msgbatch_01AbCdEf"}, "n": {"id": 5}}'
                % FILE_ID.encode(),
                (FILE_ID, "msgbatch_01AbCdEf"),
            ),
            (Lane.FIXED, b'{"file_id": "%b"}' % FILE_ID.encode(), ()),
            (
                Lane.MESSAGES,
                b'{"id":"msg_01AbCdEf","container":{"id":"container_011CNha8"}}',
                ("container_011CNha8",),
            ),
            (Lane.MESSAGES, b'{"id":"msg_01AbCdEf"}', ()),
        ],
    )
    def test_an_answer_names_the_ids_that_it_made(
        self, lane: Lane, body: bytes, ids: tuple[str, ...]
    ) -> None:
        for parts in all_splits(body):
            watch = claude_lb.JsonWatch(lane)
            for part in parts:
                watch.feed(part)
            assert watch.ids() == ids, len(parts[0])


def lives_of(
    names: str, weights: Sequence[int] = (), **facts: Sequence[Any]
) -> list[claude_lb.Live]:
    """Return one candidate for each letter; `facts` go to them in that order."""
    weights = weights or [1] * len(names)
    made = [claude_lb.Live(endpoint_of(n, weight=w)) for n, w in zip(names, weights)]
    for index, live in enumerate(made):
        live.index = index
    for name, values in facts.items():
        for live, value in zip(made, values):
            setattr(live, name, value)
    return made


def turn_of(
    last: int = -1, chance: float = 0.0, threshold_ms: float = 50.0, now: float = 0.0
) -> claude_lb.Turn:
    return claude_lb.Turn(last, chance, threshold_ms, now)


class TestStrategies:
    def test_round_robin_goes_on_behind_the_last_and_begins_again(self) -> None:
        lives = lives_of("abc")
        for last, name in ((-1, "a"), (0, "b"), (1, "c"), (2, "a"), (99, "a")):
            chosen = claude_lb.round_robin(lives, turn_of(last))
            assert chosen.endpoint.name == name

    def test_round_robin_is_even_among_those_that_are_left(self) -> None:
        lives, last, names = lives_of("abcd"), -1, ""
        for _ in range(9):
            chosen = claude_lb.round_robin([lives[0], *lives[2:]], turn_of(last))
            last = chosen.index
            names += chosen.endpoint.name
        assert names == "acdacdacd"

    def test_priority_takes_turns_among_equals(self) -> None:
        lives = lives_of("abc")
        choose = claude_lb.STRATEGIES["priority"]
        assert choose(lives, turn_of(0)) is lives[1]

    @pytest.mark.parametrize(
        ("untils", "used", "chosen"),
        [
            ((-math.inf, 9000, 500), (9, 0, 0), "a"),  # not begun, however used it was
            ((900, 20_000, 18_000), (9, 1, 0), "a"),  # over
            ((19_000, 4600, 9000), (0, 9, 1), "b"),  # ends within the hour
            ((19_000, 4601, 9000), (0, 9, 1), "a"),  # does not quite
            ((19_000, 15_000, 9000), (3, 2, 5), "b"),  # the least used of the rest
            ((4000, 3000, 3500), (7, 8, 6), "c"),  # of those that end soon, too
        ],
    )
    def test_windows_are_begun_then_used_up(
        self, untils: Sequence[float], used: Sequence[int], chosen: str
    ) -> None:
        lives = lives_of("abc", window_until=untils, window_used=used)
        found = claude_lb.window(lives, turn_of(now=1000.0))
        assert found.endpoint.name == chosen

    def test_windows_that_are_alike_go_by_use_then_by_age(self) -> None:
        lives = lives_of("abc", used=[2, 1, 1], used_at=[0.0, 5.0, 4.0])
        assert claude_lb.window(lives, turn_of()).endpoint.name == "c"

    def test_random_follows_the_chance_given(self) -> None:
        lives = lives_of("abcd")
        for chance, name in ((0.0, "a"), (0.49, "b"), (0.5, "c"), (1.0, "d")):
            chosen = claude_lb.at_random(lives, turn_of(chance=chance))
            assert chosen.endpoint.name == name

    @pytest.mark.parametrize(
        ("facts", "name"),
        [
            ({"used": [3, 1, 2], "used_at": [1.0, 9.0, 2.0]}, "b"),
            ({"used": [2, 2, 2], "used_at": [5.0, 4.0, 6.0]}, "b"),
            ({"used": [0, 0, 0]}, "a"),
        ],
    )
    def test_least_used_then_not_used_for_longest(
        self, facts: dict[str, Any], name: str
    ) -> None:
        chosen = claude_lb.least_used(lives_of("abc", **facts), turn_of())
        assert chosen.endpoint.name == name

    def test_least_busy_and_equals_take_turns(self) -> None:
        lives = lives_of("abcd", in_flight=[2, 1, 1, 1])
        names = [
            claude_lb.least_busy(lives, turn_of(last)).endpoint.name
            for last in (-1, 1, 2, 3)
        ]
        assert names == ["b", "c", "d", "b"]

    def test_most_headroom_and_equals_take_turns(self) -> None:
        lives = lives_of("abc", headroom=[0.2, 0.9, 0.9])
        assert claude_lb.headroom(lives, turn_of(0)) is lives[1]
        assert claude_lb.headroom(lives, turn_of(1)) is lives[2]
        assert claude_lb.headroom(lives_of("a"), turn_of()).headroom == 1.0

    @pytest.mark.parametrize(
        ("latencies", "last", "name"),
        [
            ([100.0, 60.0, 90.0], -1, "b"),
            ([100.0, 60.0, 90.0], 0, "a"),  # 40 ms are too little to switch for
            ([110.0, 60.0, 90.0], 0, "b"),
            ([111.0, 60.0, 90.0], 2, "c"),
            ([100.0, None, 10.0], 2, "b"),
            ([100.0, 90.0, 80.0], 7, "c"),
        ],
    )
    def test_fastest_switches_for_the_threshold_and_measures_the_unknown(
        self, latencies: list[float | None], last: int, name: str
    ) -> None:
        lives = lives_of("abc", latency_ms=latencies)
        assert claude_lb.fastest(lives, turn_of(last)).endpoint.name == name


class TestRendezvous:
    KEYS = tuple(f"conversation-{i}" for i in range(10_000))

    def places(self, names: str, weights: Sequence[int] = ()) -> list[str]:
        lives = lives_of(names, weights)
        return [claude_lb.rendezvous(lives, k).endpoint.name for k in self.KEYS]

    def test_the_order_in_a_file_makes_no_difference(self) -> None:
        assert self.places("abc") == self.places("cba")

    def test_one_that_goes_moves_its_own_conversations_only(self) -> None:
        before, after = self.places("abcd"), self.places("abd")
        assert all(b == a for b, a in zip(before, after) if b != "c")
        moved = collections.Counter(a for b, a in zip(before, after) if b == "c")
        assert min(moved[n] for n in "abd") > sum(moved.values()) / 6

    def test_each_gets_its_share(self) -> None:
        counts = collections.Counter(self.places("abc", [5, 1, 4]))
        assert 4500 < counts["a"] < 5500
        assert 800 < counts["b"] < 1200
        assert 3500 < counts["c"] < 4500


def targets(config: claude_lb.Config, model: str | None) -> str:
    """Return who serves `model`: name, priority and the name to send."""
    found = claude_lb.targets_for(config, model)
    return " ".join(
        f"{t.endpoint.name}{t.priority}" + (f"={t.model}" if t.model else "")
        for t in found
    )


class TestRoutes:
    @pytest.mark.parametrize(
        ("pattern", "model", "matches"),
        [
            ("claude-x", "claude-x", True),
            ("claude-x", "CLAUDE-X", True),
            ("claude-x", "claude-x1", False),
            ("claude-*", "Claude-opus", True),
            ("claude-*", "my-claude-opus", False),
            ("*opus*", "claude-opus-4", True),
            ("*opus", "claude-opus-4", False),
            ("c*-4", "claude-opus-4", True),
            ("*", "", True),
            ("gpt-4.1", "gpt-4x1", False),
            ("a*", "a\nb", True),
            ("[ab]", "a", False),
        ],
    )
    def test_a_pattern_is_anchored_and_knows_no_case(
        self, pattern: str, model: str, matches: bool
    ) -> None:
        assert claude_lb.pattern_matches(pattern, model) is matches

    def test_an_exact_name_goes_before_wildcards_those_in_file_order(self) -> None:
        routes = {
            "*": [{"endpoint": "a"}],
            "claude-*": [{"endpoint": "b"}],
            "claude-x": [{"endpoint": "c", "model": "y", "priority": 2}],
        }
        config = config_of("abc", routes=routes)
        assert targets(config, "claude-x") == "c2=y"
        assert targets(config, "claude-z") == "a0"
        assert targets(config, None) == "a0 b0 c0"

    def test_a_group_stands_for_its_endpoints(self) -> None:
        members = [item(name=n, priority=3) for n in "bc"]
        raw = {
            "endpoints": [item(name="a")],
            "groups": [{"name": "g", "endpoints": members}],
            "routes": {"m": [{"group": "g"}], "n": [{"group": "g", "priority": 0}]},
        }
        assert targets(load(raw), "m") == "b3 c3"
        assert targets(load(raw), "n") == "b0 c0"

    def test_disabled_endpoints_and_steps_serve_nothing(self) -> None:
        steps = [{"endpoint": "X"}, {"endpoint": "a", "enabled": False}]
        routes = {"m": [*steps, {"endpoint": "b"}], "n": [{"endpoint": "X"}]}
        config = config_of("aXb", routes=routes)
        assert targets(config, "m") == "b0"
        assert targets(config, "n") == ""
        assert targets(config, "other") == "a0 b0"

    def test_without_a_route_the_endpoints_own_lists_decide(self) -> None:
        raw = [item(name="a", models=["claude-*", "X"]), item(name="b")]
        config = load(raw)
        assert targets(config, "CLAUDE-opus") == "a0 b0"
        assert targets(config, "x") == "a0 b0"
        assert targets(config, "gpt") == "b0"
        assert targets(config, None) == "b0"
        assert targets(load(raw[:1]), "gpt") == ""

    @pytest.mark.parametrize(
        ("patterns", "model", "served"),
        [
            ("", "x", True),
            ("", None, True),
            ("x", None, False),
            ("!*opus*", "claude-opus-5-5", False),
            ("!*opus*", "CLAUDE-OPUS-5-5", False),
            ("!*opus*", "claude-sonnet-5-5", True),
            ("!*opus*", "unheard-of", True),
            ("!*opus*", None, True),
            ("*5* !*opus*", "claude-opus-5-5", False),
            ("*5* !*opus*", "claude-haiku-5-5", True),
            ("*5* !*opus*", "claude-haiku-4", False),
            ("*5* !*opus*", None, False),
            ("!a !b", "b", False),
            ("!a !b", "c", True),
        ],
    )
    def test_patterns_with_a_mark_take_models_away(
        self, patterns: str, model: str | None, served: bool
    ) -> None:
        assert claude_lb.serves_model(patterns.split(), model) is served
        config = load([item(name="a", models=patterns.split())])
        assert bool(targets(config, model)) is served

    def test_what_is_served_is_told(self) -> None:
        raw = {
            "endpoints": [item(name="a", models=["x", "y"]), item(name="b")],
            "routes": {"x": [{"endpoint": "a"}]},
        }
        assert claude_lb.served_models(load(raw)) == ("x", "y", "*")

    def test_what_is_not_served_is_told(self) -> None:
        raw = [item(models=["!*opus*", "!z"]), item(models=["x", "!y"])]
        assert claude_lb.served_models(load(raw)) == ("all but *opus*, z", "x")


# -- 10. failover ----------------------------------------------------------


ROWS = {r.name: r for r in claude_lb.RULES}
DEFAULTS = claude_lb.FailoverSettings()


def failed(
    phase: Phase, lane: Lane = Lane.MESSAGES, method: str = "POST", **evidence: bool
) -> claude_lb.Finding:
    """Return what an attempt shows that ended in `phase` without an answer."""
    error = claude_lb.UpstreamError(phase, "why", **evidence)
    return claude_lb.finding_for(error, lane, method)


def answered(
    status: int, message: str = "", code: str = "", **facts: Any
) -> claude_lb.Finding:
    """Return what an error answer shows."""
    details = {"details": {"error_code": code}} if code else {}
    error = {"type": "x_error", "message": message, **details}
    body = json.dumps({"type": "error", "error": error}).encode()
    known = {"stated": False, "limits": {}, "model": "claude-x", **facts}
    return claude_lb.finding_of_answer(status, body, **known)


def claim(window: str) -> dict[str, str]:
    """Return the limit fields that name the window that counts."""
    return {"unified-representative-claim": window}


def length_word(cooling: claude_lb.Cooling) -> str:
    """Return a cooldown's length as EXPECTED writes it, "!" for attention."""
    mark = "!" if cooling.attention else ""
    if cooling.stated:
        return "stated" + mark
    if cooling.first_s >= 60:
        return "long" + mark
    if cooling.most_s > cooling.first_s:
        return f"{cooling.first_s:g}..{cooling.most_s:g}{mark}"
    return f"{cooling.first_s:g}{mark}"


# Written from the table in the design, row by row: what came -> verdict, whose
# cooldown, how long.  "short": what the design calls so, 15 s or less at first.
# fmt: off
EXPECTED: dict[str, tuple[claude_lb.Finding, str, str, str]] = {
    "own-fault": (failed(Phase.WAIT, local=True), "RELAY", "NONE", "0"),
    "no-network": (failed(Phase.CONNECT, network=True), "ANOTHER", "NONE", "0"),
    "certificate": (failed(Phase.CONNECT, certificate=True), "ANOTHER", "ENDPOINT",
                    "long!"),
    "unreachable": (failed(Phase.CONNECT), "ANOTHER", "ENDPOINT", "1..60"),
    "stale-send": (failed(Phase.SEND, reused=True), "FRESH", "NONE", "0"),
    "unsent": (failed(Phase.SEND), "ANOTHER", "ENDPOINT", "1..60"),
    "stale-wait": (failed(Phase.WAIT, Lane.COUNT, reused=True), "FRESH", "NONE", "0"),
    "silence": (failed(Phase.WAIT, timed_out=True), "AMBIGUOUS", "ENDPOINT", "short"),
    "page": (failed(Phase.WAIT, page=True), "ANOTHER", "ENDPOINT", "15..120"),
    "lost": (failed(Phase.WAIT), "AMBIGUOUS", "ENDPOINT", "short"),
    "spend-cap": (answered(429, code="enforced_spend_limit_reached"), "ANOTHER",
                  "ENDPOINT", "long!"),
    "limited-model": (answered(429, stated=True), "ANOTHER", "MODEL", "stated"),
    "limited": (answered(429, stated=True, limits={"unified-status": "rejected"}),
                "ANOTHER", "ENDPOINT", "stated"),
    "throttled": (answered(429), "ONE_MORE", "NONE", "0"),
    "credit": (answered(400, "Your credit balance is too low to use this"), "ANOTHER",
               "ENDPOINT", "long!"),
    "payment": (answered(402), "ANOTHER", "ENDPOINT", "long!"),
    "login": (answered(401, "OAuth authentication is currently not supported."),
              "RELAY", "NONE", "0"),
    "expired": (answered(401, renewable=True), "RENEW", "NONE", "0"),
    "credential": (answered(401), "ANOTHER", "ENDPOINT", "long!"),
    "forbidden": (answered(403), "ANOTHER", "MODEL", "long"),
    "no-model": (answered(404, "model: claude-x"), "ANOTHER", "MODEL", "long"),
    "overloaded": (answered(529), "RETRY", "MODEL", "10"),
    "server-error": (answered(500), "ANOTHER", "ENDPOINT", "15..120"),
    "working": (answered(504), "AMBIGUOUS", "ENDPOINT", "short"),
    "request": (answered(400, "max_tokens: required"), "RELAY", "NONE", "0"),
    "cut-early": (failed(Phase.GATE), "AMBIGUOUS", "ENDPOINT", "short"),
    "error-late": (claude_lb.Finding(Phase.RELAY, sign=claude_lb.Sign.EVENT), "RELAY",
                   "ENDPOINT", "15..120"),
    "cut-late": (claude_lb.Finding(Phase.RELAY, sign=claude_lb.Sign.CUT), "RELAY",
                 "ENDPOINT", "15..120"),
}
# fmt: on


def row_of(finding: claude_lb.Finding, **settings: Any) -> str:
    """Return the name of the row that fires."""
    return claude_lb.judge(finding, claude_lb.FailoverSettings(**settings)).name


class TestFailoverTable:
    @pytest.mark.parametrize("name", list(EXPECTED))
    def test_row(self, name: str) -> None:
        finding, verdict, scope, length = EXPECTED[name]
        rule = claude_lb.judge(finding, DEFAULTS)
        assert (rule.name, rule.verdict.name, rule.scope.name) == (name, verdict, scope)
        if length == "short":
            assert 0 < rule.cooling.first_s <= 15
        else:
            assert length_word(rule.cooling) == length

    def test_every_row_is_expected_and_named_once(self) -> None:
        assert [r.name for r in claude_lb.RULES] == list(EXPECTED)

    @pytest.mark.parametrize("rule", claude_lb.RULES, ids=lambda r: r.name)
    def test_a_row_is_sound(self, rule: claude_lb.Rule) -> None:
        assert rule.why
        cools = bool(rule.cooling.first_s or rule.cooling.stated)
        assert cools is (rule.scope is not claude_lb.Scope.NONE)
        first, most = rule.cooling.length(1), rule.cooling.length(99)
        assert first <= most == rule.cooling.most_s or rule.cooling.stated
        if rule.phase is Phase.RELAY:
            assert rule.verdict is Verdict.RELAY
        if rule.phase in (Phase.WAIT, Phase.GATE) and rule.name not in (
            "page",  # nobody generated it
            "stale-wait",  # asking twice is asking once
        ):
            assert rule.verdict is Verdict.AMBIGUOUS

    @pytest.mark.parametrize(
        ("row", "statuses"),
        [
            ("server-error", (500, 502, 503, 521, 522, 523, 525, 526)),
            ("working", (504, 520, 524)),
            ("request", (400, 404, 405, 408, 409, 413, 415, 422, 501, 505)),
        ],
    )
    def test_each_status_has_its_row(self, row: str, statuses: tuple[int, ...]) -> None:
        assert {row_of(answered(s)) for s in statuses} == {row}

    @pytest.mark.parametrize(
        ("finding", "row"),
        [
            (answered(429, code="contract_spend_limit_reached"), "spend-cap"),
            (answered(429, code="ramp_limit_exceeded", stated=True), "limited-model"),
            (answered(429, stated=True, model=""), "limited"),
            (
                answered(429, stated=True, limits=claim("seven_day_opus")),
                "limited-model",
            ),
            (answered(429, stated=True, limits=claim("five_hour")), "limited"),
            (
                answered(400, "You have reached your specified API usage limits."),
                "credit",
            ),
            (
                answered(400, "You have reached your workspace API usage limits"),
                "credit",
            ),
            (answered(400, "x: credit balance is too low"), "request"),
            (
                answered(401, "OAuth authentication is currently not supported."),
                "login",
            ),
            (answered(403, "Your credit balance is too low"), "credit"),
            (answered(400, "the word limit is too long"), "request"),
            (answered(404, "claude-x is not known"), "no-model"),
            (answered(404, "no such path"), "request"),
            (answered(404, "not found", model=""), "request"),
            (failed(Phase.CONNECT, timed_out=True), "unreachable"),
            (failed(Phase.SEND, timed_out=True), "unsent"),
            (failed(Phase.WAIT, reused=True), "lost"),
            (failed(Phase.WAIT, reused=True, timed_out=True), "silence"),
            (failed(Phase.WAIT, Lane.FIXED, "GET", reused=True), "stale-wait"),
            (failed(Phase.WAIT, Lane.FIXED, "HEAD", reused=True), "stale-wait"),
            (failed(Phase.WAIT, Lane.FIXED, "DELETE", reused=True), "lost"),
            (failed(Phase.WAIT, Lane.COUNT), "lost"),
            (failed(Phase.WAIT, Lane.COUNT, reused=True, page=True), "page"),
            (failed(Phase.WAIT, Lane.COUNT, reused=True, timed_out=True), "silence"),
            (failed(Phase.GATE, timed_out=True), "cut-early"),
            (failed(Phase.GATE, reused=True), "cut-early"),
        ],
    )
    def test_what_came_finds_its_row(
        self, finding: claude_lb.Finding, row: str
    ) -> None:
        assert row_of(finding) == row

    @pytest.mark.parametrize("phase", list(Phase))
    def test_a_fault_of_our_own_harms_no_endpoint(self, phase: Phase) -> None:
        for reused in (False, True):
            assert row_of(failed(phase, local=True, reused=reused)) == "own-fault"

    @pytest.mark.parametrize("lane", list(Lane))
    def test_a_reused_connection_that_takes_no_request_is_replaced(
        self, lane: Lane
    ) -> None:
        assert row_of(failed(Phase.SEND, lane, reused=True)) == "stale-send"

    @pytest.mark.parametrize(
        "body",
        [b"", b"{", b"[]", b"null", b'{"error":[]}', b'{"error":{"details":7}}'],
    )
    def test_a_body_of_any_kind_is_judged(self, body: bytes) -> None:
        for status in (400, 404, 429, 500):
            finding = claude_lb.finding_of_answer(
                status, body, stated=False, limits={}, model="m"
            )
            assert finding.status == status
            assert claude_lb.judge(finding, DEFAULTS).name in EXPECTED

    def test_an_error_event_stands_for_a_status(self) -> None:
        known = {"overloaded_error": 529, "rate_limit_error": 429, "api_error": 500}
        known.update({"authentication_error": 401, "timeout_error": 504, "odd": 500})
        assert {k: claude_lb.event_status(k) for k in known} == known

    def test_the_budget_counts_what_follows_a_5xx_only(self) -> None:
        counted = {"overloaded", "server-error"}
        not_counted = {"unreachable", "unsent", "credential", "limited", "throttled"}
        assert {n for n in counted | not_counted if ROWS[n].budgeted} == counted

    @pytest.mark.parametrize(
        ("body", "acts"),
        [
            (b'{"mcp_servers": [{"url": "x"}]}', True),
            (b'{"mcp_servers": []}', False),
            (b'{"tools": [{"type": "web_search_20250305"}]}', True),
            (b'{"tools": [{"type":"code_execution_20250522"}]}', True),
            (b'{"tools": [{"type": "custom"}]}', False),
            (b"", False),
        ],
    )
    def test_outside_effects_are_known(self, body: bytes, acts: bool) -> None:
        assert claude_lb.acts_outside(body) is acts


class TestFailoverSettings:
    def test_a_status_can_be_made_to_fail_over(self) -> None:
        settings = claude_lb.FailoverSettings(statuses={422: "failover"})
        rule = claude_lb.judge(answered(422), settings)
        assert (rule.name, rule.verdict) == ("configured", Verdict.ANOTHER)
        assert rule.scope is claude_lb.Scope.ENDPOINT
        assert claude_lb.judge(answered(400), settings).name == "request"

    def test_a_status_can_be_made_to_be_relayed(self) -> None:
        settings = claude_lb.FailoverSettings(statuses={529: "relay"})
        assert claude_lb.judge(answered(529), settings).verdict is Verdict.RELAY

    def test_an_error_type_goes_before_its_status(self) -> None:
        settings = claude_lb.FailoverSettings(
            statuses={422: "failover"}, error_types={"x_error": "relay"}
        )
        assert claude_lb.judge(answered(422), settings).verdict is Verdict.RELAY

    def test_a_row_that_fails_over_already_keeps_its_own_ways(self) -> None:
        settings = claude_lb.FailoverSettings(statuses={529: "failover"})
        assert claude_lb.judge(answered(529), settings) == ROWS["overloaded"]

    def test_no_wish_replays_what_the_client_has_seen(self) -> None:
        settings = claude_lb.FailoverSettings(error_types={"": "failover"})
        for name in ("cut-late", "error-late", "lost"):
            assert claude_lb.judge(EXPECTED[name][0], settings) == ROWS[name]

    def test_a_configured_5xx_counts_against_the_budget(self) -> None:
        settings = claude_lb.FailoverSettings(statuses={501: "failover"})
        assert claude_lb.judge(answered(501), settings).budgeted


class TestFailoverNextStep:
    @pytest.mark.parametrize(
        ("row", "chances", "step"),
        [
            ("request", (3, 1, True, 0), "RELAY"),
            ("server-error", (1, 0, False, 2), "ANOTHER"),
            ("server-error", (0, 1, True, 0), "RELAY"),
            ("overloaded", (1, 1, False, 0), "RETRY"),
            ("overloaded", (0, 1, False, 3), "RETRY"),
            ("overloaded", (1, 0, False, 0), "ANOTHER"),
            ("overloaded", (0, 0, False, 0), "RELAY"),
            ("lost", (3, 1, False, 0), "RELAY"),
            ("lost", (3, 1, True, 0), "ANOTHER"),
            ("working", (0, 1, True, 0), "RELAY"),
            ("throttled", (3, 1, False, 0), "ANOTHER"),
            ("throttled", (3, 1, False, 1), "RELAY"),
            ("throttled", (0, 1, False, 0), "RELAY"),
            ("stale-send", (0, 0, False, 3), "FRESH"),
            ("cut-late", (3, 3, True, 0), "RELAY"),
        ],
    )
    def test_what_is_done_is_what_may_be_done(
        self, row: str, chances: tuple[int, int, bool, int], step: str
    ) -> None:
        found = claude_lb.next_step(ROWS[row], claude_lb.Chances(*chances))
        assert found.name == step


class TestRetryBudget:
    @pytest.mark.parametrize(
        ("asked", "allowed"),
        [(0, 3), (10, 3), (15, 3), (16, 3), (19, 3), (20, 4), (100, 20)],
    )
    def test_a_fifth_but_three_at_least(self, asked: int, allowed: int) -> None:
        budget = claude_lb.RetryBudget()
        for i in range(asked):
            budget.count(1000.0 + 9 * i / asked)
        taken = sum(budget.take(1009.5) for _ in range(asked + 10))
        assert taken == allowed

    def test_the_window_slides(self) -> None:
        budget = claude_lb.RetryBudget()
        for _ in range(50):
            budget.count(1000.0)
        assert all(budget.take(1005.0) for _ in range(10))
        assert not budget.take(1009.9)
        assert not budget.take(1010.0)  # the requests have passed, the retries not
        assert [budget.take(1015.0) for _ in range(4)] == [True, True, True, False]
        assert budget.take(9_999_999.0)


class TestRepeats:
    def test_a_body_that_failed_is_known_for_a_minute(self) -> None:
        repeats = claude_lb.Repeats()
        assert not repeats.has(b"x", 0.0)
        repeats.remember(bytearray(b"body"), 100.0)
        assert repeats.has(b"body", 159.9)
        assert not repeats.has(b"body", 160.1)
        assert not repeats.has(b"other", 101.0)

    @pytest.mark.parametrize("place", [0, 199_999])
    def test_a_long_body_is_told_by_its_ends(self, place: int) -> None:
        repeats, body = claude_lb.Repeats(), bytearray(b"x" * 200_000)
        repeats.remember(body, 0.0)
        assert repeats.has(bytes(body), 1.0)
        body[place] = 121
        assert not repeats.has(body, 1.0)

    def test_the_oldest_are_forgotten(self) -> None:
        repeats = claude_lb.Repeats()
        for i in range(claude_lb.REPEATS + 1):
            repeats.remember(b"%d" % i, 0.0)
        assert not repeats.has(b"0", 1.0)
        assert repeats.has(b"1", 1.0)


class TestFailoverExhaustion:
    def refusal(self, *facts: Any) -> claude_lb.RefusedError:
        exhaustion = claude_lb.Exhaustion(*facts)
        return claude_lb.refusal_for_exhaustion("m-1", exhaustion, ("x", "y*"))

    @pytest.mark.parametrize(
        ("reset_s", "fields"),
        [
            (0.2, {"Retry-After": "1"}),
            (60.0, {"Retry-After": "60"}),
            (60.5, {"Retry-After": "61", "x-should-retry": "false"}),
        ],
    )
    def test_the_soonest_stated_reset_is_told(
        self, reset_s: float, fields: dict[str, str]
    ) -> None:
        refusal = self.refusal(reset_s, ("a: limited",), False)
        assert (refusal.status, dict(refusal.fields)) == (429, fields)
        assert "a: limited" in refusal.message
        assert not refusal.close

    def test_no_reset_is_invented(self) -> None:
        refusal = self.refusal(None, ("a: paused", "b: limited"), False)
        assert (refusal.status, refusal.fields) == (503, ())
        assert "a: paused; b: limited" in refusal.message

    def test_a_model_that_nobody_serves_is_named_with_what_is_served(self) -> None:
        refusal = self.refusal(None, (), True)
        assert (refusal.status, refusal.fields) == (403, ())
        assert "m-1" in refusal.message
        assert "x, y*" in refusal.message
        kind = claude_lb.error_document(403, refusal.message, "lb_1")["error"]
        assert isinstance(kind, dict)
        assert kind["type"] == "permission_error"

    def test_a_model_that_no_plan_has_is_told_as_users_of_accounts_know_it(
        self,
    ) -> None:
        raw = [item(name="a", plan="pro"), item(name="b", models=["x"])]
        nobody = claude_lb.Exhaustion(None, (), unserved=True)
        endpoints = load(raw).endpoints
        make = partial(claude_lb.refusal_for_exhaustion, endpoints=endpoints)
        refusal = make("claude-opus-5-5", nobody, ("all but *opus*",))
        assert refusal.status == 403
        assert refusal.message == (
            "No accounts support the requested model: claude-opus-5-5."
            " Opus requires Max plan accounts."
        )
        assert refusal.facts == {
            "requestedModel": "claude-opus-5-5",
            "availableAccounts": [
                {"name": "a", "plan": "pro", "models": ["!*opus*"]},
                {"name": "b", "plan": None, "models": ["x"]},
            ],
        }
        other = make("gpt", nobody, ()).message
        assert other == "No accounts support the requested model: gpt."
        document = json.loads(
            claude_lb.error_answer(refusal, request_id="lb_1").partition(b"\r\n\r\n")[2]
        )
        assert document["error"]["type"] == "permission_error"
        assert document["requestedModel"] == "claude-opus-5-5"


class TestFailoverRefusals:
    @pytest.mark.parametrize(
        ("phase", "evidence", "status", "fields"),
        [
            (Phase.CONNECT, {}, 502, {}),
            (Phase.CONNECT, {"timed_out": True}, 502, {}),
            (Phase.SEND, {}, 502, {}),
            (Phase.SEND, {"timed_out": True}, 502, {}),
            (Phase.WAIT, {}, 502, {"x-should-retry": "true"}),
            (Phase.WAIT, {"timed_out": True}, 408, {"x-should-retry": "true"}),
            (Phase.WAIT, {"page": True}, 502, {}),
            (Phase.GATE, {}, 502, {"x-should-retry": "true"}),
            (Phase.CONNECT, {"local": True}, 503, {"retry-after": "1"}),
        ],
        ids=[
            "nothing reachable",
            "connect timed out",
            "half sent",
            "send stalled",
            "no answer",
            "too slow",
            "a web page",
            "empty stream",
            "our own limits",
        ],
    )
    def test_the_client_learns_what_happened(
        self,
        phase: Phase,
        evidence: dict[str, bool],
        status: int,
        fields: dict[str, str],
    ) -> None:
        error = claude_lb.UpstreamError(phase, "one: why", **evidence)
        refusal = claude_lb.refusal_for(error, [endpoint_of("one")])
        assert refusal.status == status
        assert {name.lower(): value for name, value in refusal.fields} == fields
        assert not refusal.close

    def test_each_endpoint_tried_is_named_once(self) -> None:
        one, two = endpoint_of("one"), endpoint_of("two")
        error = claude_lb.UpstreamError(Phase.CONNECT, "why")
        message = claude_lb.refusal_for(error, [one, two, one]).message
        assert "(tried: one, two)" in message
        assert TOKEN not in message


# -- 11. log ---------------------------------------------------------------

AT = 1_700_000_000.25
RECORD = claude_lb.ExchangeRecord(
    request_id="lb_1",
    method="POST",
    path="/v1/messages",
    endpoint="one",
    status=200,
    attempts=2,
    first_byte_ms=12.4,
    total_ms=99.6,
    request_bytes=10,
    response_bytes=20,
    ended=Outcome.OK,
)
HOSTILE = "a\r\n\x1b]8;;x\x07\x9b31m\u202e\u2066\u200f\u2028\u061c\x00\x7fb"


def log_to(path: Path, *, color: bool = False, **settings: Any) -> claude_lb.Log:
    """Return a log that writes to `path` at a standing clock."""
    made = claude_lb.LogSettings(file=str(path), **settings)
    return claude_lb.Log(made, color=color, clock=lambda: AT)


class TestLogLines:
    def test_an_exchange_is_one_line_of_text(self, tmp_path: Path) -> None:
        log_to(tmp_path / "x.log").exchange(RECORD)
        assert (tmp_path / "x.log").read_text() == (
            "2023-11-14T22:13:20.250Z INFO  lb_1 POST /v1/messages -> one 200"
            " attempts=2 first=12ms total=100ms in=10 out=20 ok\n"
        )

    def test_an_exchange_without_an_answer_says_why(self, tmp_path: Path) -> None:
        record = RECORD._replace(
            endpoint="",
            status=502,
            first_byte_ms=None,
            ended=Outcome.UPSTREAM_ERROR,
            reason="no answer",
        )
        log_to(tmp_path / "x.log").exchange(record)
        line = (tmp_path / "x.log").read_text()
        assert " WARN " in line
        assert "-> - 502" in line
        assert "first=- " in line
        assert line.endswith("upstream_error (no answer)\n")

    def test_an_exchange_is_one_line_of_json(self, tmp_path: Path) -> None:
        log_to(tmp_path / "x.log", format="json").exchange(RECORD)
        (line,) = (tmp_path / "x.log").read_text().splitlines()
        assert json.loads(line) == {
            "time": "2023-11-14T22:13:20.250Z",
            "level": "info",
            "event": "exchange",
            **dict(list(RECORD._asdict().items())[:12]),
            "ended": "ok",
        }

    @pytest.mark.parametrize("form", ["text", "json"])
    @pytest.mark.parametrize("color", [False, True])
    def test_what_a_client_sends_cannot_act_on_a_terminal(
        self, tmp_path: Path, form: str, color: bool
    ) -> None:
        log = log_to(tmp_path / "x.log", format=form, color=color)
        log.exchange(RECORD._replace(path=HOSTILE, reason=HOSTILE, endpoint=HOSTILE))
        log.write("error", HOSTILE, fact=HOSTILE)
        text = (tmp_path / "x.log").read_bytes().decode("utf-8")
        marks = re.compile(r"\x1b\[\d+m(INFO|ERROR)\x1b\[0m")
        plain = marks.sub(r"\1", text) if color and form == "text" else text
        assert plain.count("\n") == 2
        left = [c for c in HOSTILE if c not in "ab]8;x31m" and c in plain]
        assert [c for c in left if c != "\n"] == []

    def test_a_lone_surrogate_costs_no_line(self, tmp_path: Path) -> None:
        log_to(tmp_path / "x.log").write("info", "a\udc80b")
        assert (tmp_path / "x.log").read_bytes().endswith(b"a\\udc80b\n")

    def test_people_keep_their_letters(self, tmp_path: Path) -> None:
        log_to(tmp_path / "x.log").write("info", "naïve Ünïcode")
        assert (tmp_path / "x.log").read_text("utf-8").endswith("naïve Ünïcode\n")

    def test_color_marks_the_level_alone(self, tmp_path: Path) -> None:
        log_to(tmp_path / "x.log", color=True).write("error", "bad")
        line = (tmp_path / "x.log").read_text()
        assert line == "2023-11-14T22:13:20.250Z \x1b[31mERROR\x1b[0m bad\n"

    def test_json_is_never_colored(self, tmp_path: Path) -> None:
        log_to(tmp_path / "x.log", color=True, format="json").write("error", "bad")
        assert "\x1b" not in (tmp_path / "x.log").read_text()

    @pytest.mark.parametrize(
        ("level", "shown"),
        [
            ("debug", ["debug", "info", "warn", "error"]),
            ("info", ["info", "warn", "error"]),
            ("warn", ["warn", "error"]),
            ("warning", ["warn", "error"]),
            ("error", ["error"]),
        ],
    )
    def test_lines_below_the_level_are_not_written(
        self, tmp_path: Path, level: str, shown: list[str]
    ) -> None:
        log = log_to(tmp_path / "x.log", level=level)
        for one in ("debug", "info", "warn", "error"):
            log.write(one, f"<{one}>")
        text = (tmp_path / "x.log").read_text()
        assert re.findall(r"<(\w+)>", text) == shown

    @pytest.mark.parametrize(
        ("ended", "at_warn"),
        [
            (Outcome.OK, False),
            (Outcome.CLIENT_CANCELLED, False),
            (Outcome.UPSTREAM_ERROR, True),
            (Outcome.TRUNCATED, True),
            (Outcome.REFUSED, True),
        ],
    )
    def test_what_ended_badly_is_a_warning(
        self, tmp_path: Path, ended: Outcome, at_warn: bool
    ) -> None:
        log = log_to(tmp_path / "x.log", level="warn")
        log.exchange(RECORD._replace(ended=ended))
        assert bool((tmp_path / "x.log").read_text()) is at_warn

    @pytest.mark.parametrize("form", ["text", "json"])
    def test_a_fault_is_one_line_with_its_traceback(
        self, tmp_path: Path, form: str
    ) -> None:
        log = log_to(tmp_path / "x.log", format=form)
        try:
            dict[str, str]()["the-cause"]
        except KeyError:
            log.fault("a fault")
        text = (tmp_path / "x.log").read_text()
        assert text.count("\n") == 1
        assert "the-cause" in text
        assert "Traceback" in text

    @pytest.mark.parametrize("form", ["text", "json"])
    def test_a_secret_that_is_logged_by_mistake_is_not_shown(
        self, tmp_path: Path, form: str
    ) -> None:
        log = log_to(tmp_path / "x.log", format=form)
        endpoint = endpoint_of()
        log.write("error", f"{endpoint} {endpoint.credential}", fact=str(endpoint))
        assert TOKEN not in (tmp_path / "x.log").read_text()

    def test_lifecycle_raises_the_details_to_info(self, tmp_path: Path) -> None:
        assert log_to(tmp_path / "x.log").detail == "debug"
        assert log_to(tmp_path / "x.log", lifecycle=True).detail == "info"

    def test_lines_of_many_threads_do_not_mix(self, tmp_path: Path) -> None:
        log = log_to(tmp_path / "x.log")

        def write_many(mark: str) -> None:
            for _ in range(100):
                log.write("info", mark * 50)

        with ThreadPoolExecutor(8) as threads:
            list(threads.map(write_many, [f"<{n}>" for n in range(8)]))
        lines = (tmp_path / "x.log").read_text().splitlines()
        assert len(lines) == 800
        assert all(re.search(r" (<\d>)\1{49}$", line) for line in lines)


class TestLogFile:
    def test_a_log_file_is_its_users_alone(self, tmp_path: Path) -> None:
        before = os.umask(0)
        try:
            log_to(tmp_path / "x.log")
        finally:
            os.umask(before)
        assert stat.S_IMODE((tmp_path / "x.log").stat().st_mode) == 0o600

    def test_a_log_file_is_appended_to(self, tmp_path: Path) -> None:
        log_to(tmp_path / "x.log").write("info", "one")
        log_to(tmp_path / "x.log").write("info", "two")
        assert len((tmp_path / "x.log").read_text().splitlines()) == 2

    def test_a_link_is_not_followed(self, tmp_path: Path) -> None:
        (tmp_path / "target").write_text("precious\n")
        (tmp_path / "x.log").symlink_to(tmp_path / "target")
        with pytest.raises(OSError, match=r".") as caught:
            log_to(tmp_path / "x.log")
        assert caught.value.errno in (errno.ELOOP, errno.EMLINK)
        assert (tmp_path / "target").read_text() == "precious\n"

    @pytest.mark.parametrize("how", ["moved", "deleted"])
    def test_a_file_that_went_away_is_begun_anew(
        self, tmp_path: Path, how: str
    ) -> None:
        path = tmp_path / "x.log"
        log = log_to(path)
        log.write("info", "one")
        if how == "moved":
            path.rename(tmp_path / "x.log.1")
        else:
            path.unlink()
        log.write("info", "two")
        log.reopen_if_moved()
        log.write("info", "three")
        assert path.read_text().endswith("three\n")
        assert path.read_text().count("\n") == 1
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        if how == "moved":
            assert (tmp_path / "x.log.1").read_text().count("\n") == 2

    def test_a_file_that_stays_is_kept_open(self, tmp_path: Path) -> None:
        log = log_to(tmp_path / "x.log")
        before = log._fd
        log.reopen_if_moved()
        assert log._fd == before

    def test_a_link_that_takes_the_files_place_gets_no_line(
        self, tmp_path: Path
    ) -> None:
        path = tmp_path / "x.log"
        log = log_to(path)
        path.rename(tmp_path / "x.log.1")
        (tmp_path / "target").write_text("")
        path.symlink_to(tmp_path / "target")
        log.reopen_if_moved()
        log.write("info", "one")
        assert (tmp_path / "target").read_text() == ""
        assert (tmp_path / "x.log.1").read_text().count("\n") == 1

    def test_a_full_disk_costs_lines_and_nothing_else(self, tmp_path: Path) -> None:
        log = log_to(tmp_path / "x.log")
        os.close(log._fd)
        log.write("info", "lost")
        log._fd = os.open(tmp_path / "y.log", os.O_CREAT | os.O_WRONLY)
        log.write("info", "found")
        assert (tmp_path / "y.log").read_text().endswith("found\n")


# -- 12. pool --------------------------------------------------------------


OPUS, HAIKU = "claude-opus-4-1", "claude-haiku-4-5"


class Clock:
    """Monotonic seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def go(self, seconds: float) -> None:
        self.now += seconds


def config_of(
    names: str, each: Mapping[str, Mapping[str, object]] | None = None, **sections: Any
) -> claude_lb.Config:
    """Return endpoints named by letters, upper case: disabled; `each`: their keys."""
    endpoints = [
        item(name=n, enabled=n.islower(), **(each or {}).get(n, {})) for n in names
    ]
    return load({"endpoints": endpoints, **sections})


def pool_of(names: str, **more: Any) -> claude_lb.Pool:
    """Return a pool of `config_of` those names, by a clock if one is given."""
    chance = random.Random(5).random
    clock = more.pop("clock", time.monotonic)
    return claude_lb.Pool(config_of(names, **more), clock=clock, chance=chance)


def wish(model: str | None = None, **wishes: Any) -> claude_lb.Ask:
    return claude_lb.Ask(wishes.pop("lane", Lane.MESSAGES), model, **wishes)


def take(pool: claude_lb.Pool, *tried: str, **wishes: Any) -> claude_lb.Lease:
    """Reserve an attempt that there must be; `tried` are endpoints' names."""
    known = [e.endpoint for e in pool.snapshot().endpoints]
    found = pool.reserve(wish(**wishes), [e for e in known if e.name in tried])
    assert found is not None
    return found


def turns(pool: claude_lb.Pool, count: int, lane: Lane = Lane.MESSAGES) -> str:
    """Return the choices of `count` requests, one after another."""
    names = ""
    for _ in range(count):
        lease = take(pool, lane=lane)
        names += lease.endpoint.name
        pool.settle(lease, None)
    return names


def fails(
    pool: claude_lb.Pool, lease: claude_lb.Lease, row: str = "server-error", **more: Any
) -> str:
    return pool.settle(lease, claude_lb.Evidence(ROWS[row], "why", **more))


def answers(pool: claude_lb.Pool, lease: claude_lb.Lease, ms: float = 10.0) -> None:
    pool.gain(lease, ms, b"")
    pool.settle(lease, None)


def knock_out(pool: claude_lb.Pool, names: str, **more: Any) -> None:
    """Let one forced attempt at each endpoint fail."""
    for name in names:
        fails(pool, take(pool, forced=name, model=more.get("key")), **more)


def left_of(pool: claude_lb.Pool, name: str, key: str = "") -> float:
    """Return the seconds left of a cooldown; -1: there is none."""
    (state,) = (s for s in pool.snapshot().endpoints if s.endpoint.name == name)
    return next((left for k, _, left in state.cooldowns if k == key), -1.0)


class TestPoolTurns:
    def test_messages_take_turns(self) -> None:
        assert turns(pool_of("abc"), 7) == "abcabca"

    def test_disabled_endpoints_get_nothing(self) -> None:
        pool = pool_of("aXb")
        assert turns(pool, 4) == "abab"
        assert pool.reserve(wish(), [take(pool).endpoint, take(pool).endpoint]) is None

    @pytest.mark.parametrize("lane", list(Lane))
    def test_no_wish_makes_a_disabled_endpoint_serve(self, lane: Lane) -> None:
        pool = pool_of("aX")
        disabled = pool.snapshot().endpoints[1].endpoint
        pool.pin([FILE_ID], disabled)
        for what in (wish(lane=lane, forced="X"), wish(lane=lane, ids=(FILE_ID,))):
            lease = pool.reserve(what)
            assert lease is None or lease.endpoint is not disabled, what
        pool.take_hold("X")
        lease = pool.reserve(wish(lane=lane))
        assert lease is None or lease.endpoint is not disabled

    def test_a_failover_goes_on_behind_the_first_and_asks_each_once(self) -> None:
        pool, tried = pool_of("abcd"), ""
        take(pool)
        for _ in range(4):
            tried += take(pool, *tried).endpoint.name
        assert tried == "bcda"
        endpoints = [e.endpoint for e in pool.snapshot().endpoints]
        assert pool.reserve(wish(), endpoints) is None

    @pytest.mark.parametrize("strategy", ["round_robin", "weighted"])
    def test_counting_takes_part_without_moving_the_turn(self, strategy: str) -> None:
        pool = pool_of("abc", balancing={"strategy": strategy})
        assert turns(pool, 1) == "a"
        assert turns(pool, 3, Lane.COUNT) == {"round_robin": "abc"}.get(strategy, "bbb")
        assert turns(pool, 2) == "bc"

    def test_other_paths_go_to_one_endpoint_and_move_no_turn(self) -> None:
        pool = pool_of("ab", each={"b": {"default": True}})
        assert turns(pool, 3, Lane.FIXED) == "bbb"
        fixed = take(pool, lane=Lane.FIXED).endpoint
        assert pool.reserve(wish(lane=Lane.FIXED), [fixed]) is None
        assert turns(pool, 2) == "ab"

    @pytest.mark.parametrize("names", ["ab", "abc", "abcdefg"])
    def test_the_turn_is_even_under_many_threads(self, names: str) -> None:
        pool, counts = pool_of(names), dict.fromkeys(names, 0)
        each, workers = len(names) * 60, 16
        start = threading.Barrier(workers)

        def work() -> str:
            start.wait()
            turns(pool, each // 3, Lane.COUNT)
            return turns(pool, each)

        with ThreadPoolExecutor(workers) as threads:
            jobs = [threads.submit(work) for _ in range(workers)]
            for job in jobs:
                for name in job.result():
                    counts[name] += 1
        assert set(counts.values()) == {each * workers // len(names)}
        assert sum(e.in_flight for e in pool.snapshot().endpoints) == 0

    def test_models_with_endpoints_of_their_own_are_even_side_by_side(self) -> None:
        opus, haiku = {"models": [OPUS]}, {"models": [HAIKU]}
        pool = pool_of("abcd", each={"a": opus, "b": opus, "c": haiku, "d": haiku})
        counts: collections.Counter[str] = collections.Counter()
        for _ in range(20):
            counts[take(pool, model=OPUS).endpoint.name] += 1
            counts[take(pool, model=HAIKU).endpoint.name] += 1
        assert counts == {"a": 10, "b": 10, "c": 10, "d": 10}

    def test_exchanges_and_attempts_are_counted_in_and_out(self) -> None:
        pool = pool_of("ab")
        pool.enter()
        first = take(pool)
        again = pool.again(first)
        second = take(pool)
        snapshot = pool.snapshot()
        assert [e.in_flight for e in snapshot.endpoints] == [2, 1]
        assert snapshot.in_flight == 1
        pool.settle(first, None)
        fails(pool, second)
        pool.release()
        snapshot = pool.snapshot()
        assert [e.in_flight for e in snapshot.endpoints] == [1, 0]
        assert [(e.used, e.failed) for e in snapshot.endpoints] == [(2, 0), (1, 1)]
        assert snapshot.in_flight == 0
        assert again is not None
        assert again.endpoint is first.endpoint

    def test_repeats_are_bounded_by_the_requests_that_entered(self) -> None:
        clock = Clock()
        pool = pool_of("a", clock=clock)
        for _ in range(25):
            pool.enter()
        assert [pool.may_repeat() for _ in range(6)] == [True] * 5 + [False]
        clock.go(20)
        assert pool.may_repeat()


class TestPoolStrategies:
    def test_weights_make_shares_without_runs(self) -> None:
        pool = pool_of(
            "abc", each={"a": {"weight": 5}}, balancing={"strategy": "weighted"}
        )
        assert turns(pool, 14) == "aabacaa" * 2

    def test_the_lowest_eligible_priority_serves(self) -> None:
        each = {"a": {"priority": 1}, "b": {"priority": 0}, "c": {"priority": 0}}
        pool = pool_of("abc", each=each, clock=Clock())
        assert turns(pool, 4) == "bcbc"
        assert take(pool, "b").endpoint.name == "c"
        assert take(pool, "b", "c").endpoint.name == "a"
        knock_out(pool, "bc")
        assert turns(pool, 2) == "aa"

    def test_the_next_turn_is_one_of_the_lowest_priority(self) -> None:
        pool = pool_of("ab", each={"b": {"priority": 1}})
        turns(pool, 1)
        assert pool.snapshot().next_index == 0

    def test_least_busy_goes_by_what_is_under_way(self) -> None:
        pool = pool_of("ab", balancing={"strategy": "least_busy"})
        busy = take(pool)
        assert turns(pool, 3) == "bbb"
        pool.settle(busy, None)
        assert turns(pool, 2) == "ab"

    def test_a_window_begins_with_the_first_attempt_and_lasts_five_hours(self) -> None:
        clock = Clock()
        pool = pool_of("ab", balancing={"strategy": "window"}, clock=clock)
        assert turns(pool, 4) == "abab"
        clock.now += 4.5 * 3600
        assert turns(pool, 2) == "ab"
        clock.now += 3600
        first = pool.snapshot().endpoints[0]
        assert (first.window_used, first.window_s) == (3, -1800.0)
        assert turns(pool, 1) == "a"
        first = pool.snapshot().endpoints[0]
        assert (first.window_used, first.window_s) == (1, claude_lb.WINDOW_S)

    def test_a_stated_window_goes_before_our_own_count(self) -> None:
        clock = Clock()
        pool = pool_of("ab", balancing={"strategy": "window"}, clock=clock)
        assert turns(pool, 2) == "ab"
        reset = f"anthropic-ratelimit-unified-5h-reset: {time.time() + 1000:.0f}\r\n"
        lease = take(pool, "a")
        assert lease.endpoint.name == "b"
        pool.gain(lease, 1.0, reset.encode())
        pool.settle(lease, None)
        assert turns(pool, 3) == "bbb"
        left = [e.window_s for e in pool.snapshot().endpoints]
        assert left == [pytest.approx(18_000.0), pytest.approx(1000.0, abs=2.0)]
        clock.now += 1001
        assert turns(pool, 1) == "b"  # over: it begins anew

    def test_a_window_from_before_the_start_is_taken_over(self) -> None:
        clock = Clock()
        pool = pool_of("ab", balancing={"strategy": "window"}, clock=clock)
        pool.recall("a", 9000.0, 7)
        pool.recall("nobody", 9000.0, 7)
        assert turns(pool, 2) == "bb"
        assert pool.snapshot().endpoints[0].window_used == 7

    def test_headroom_goes_by_fresh_readings_only(self) -> None:
        clock = Clock()
        pool = pool_of("ab", balancing={"strategy": "headroom"}, clock=clock)
        first = take(pool)
        pool.gain(first, 10.0, kept_of(f"{UNIFIED}-5h-utilization: 0.9"))
        assert turns(pool, 3) == "bbb"
        clock.go(claude_lb.LIMITS_S + 1)
        assert turns(pool, 2) == "ab"

    def test_fastest_measures_each_then_stays_with_the_quickest(self) -> None:
        pool = pool_of("abc", balancing={"strategy": "fastest"})
        for name, ms in (("a", 200.0), ("b", 80.0), ("c", 100.0)):
            lease = take(pool)
            assert lease.endpoint.name == name
            answers(pool, lease, ms)
        assert turns(pool, 2) == "cc"  # 20 ms are no reason to go on
        answers(pool, take(pool, forced="c"), 400.0)  # its average is 160 now
        assert turns(pool, 2) == "bb"

    def test_random_reaches_everyone(self) -> None:
        pool = pool_of("abc", balancing={"strategy": "random"})
        counts = collections.Counter(turns(pool, 300))
        assert min(counts[n] for n in "abc") > 60

    @pytest.mark.parametrize("strategy", claude_lb.STRATEGY_NAMES)
    def test_with_troubles_elsewhere_the_choice_is_the_same(
        self, strategy: str
    ) -> None:
        fast, slow = (
            pool_of(
                names,
                clock=Clock(),
                balancing={"strategy": strategy},
                each={"b": {"weight": 3}},
            )
            for names in ("abc", "abcz")
        )
        slow.pause("z", paused=True)
        latency = random.Random(7)
        for _ in range(60):
            one, other = take(fast), take(slow)
            assert one.endpoint.name == other.endpoint.name
            ms = latency.uniform(10, 200)
            answers(fast, one, ms)
            answers(slow, other, ms)


class TestPoolCooldowns:
    def test_a_cooldown_begins_and_ends(self) -> None:
        clock = Clock()
        pool = pool_of("abc", clock=clock)
        told = fails(pool, take(pool))
        assert told.startswith("a cools down, 15 s: server-error")
        assert turns(pool, 4) == "bcbc"
        clock.go(14.9)
        assert turns(pool, 2) == "bc"
        clock.go(0.2)
        assert turns(pool, 1) == "a"

    def test_one_probe_at_a_time_then_twice_as_many_then_free(self) -> None:
        clock, ramp = Clock(), []
        pool = pool_of("ab", clock=clock, each={"b": {"priority": 1}})
        knock_out(pool, "a")
        clock.go(15)
        for _ in range(5):
            leases = [take(pool) for _ in range(40)]
            probes = [x for x in leases if x.endpoint.name == "a"]
            ramp.append(len(probes))
            pool.gain(probes[0], 10.0, b"")
            for lease in leases:
                pool.settle(lease, None)
        assert ramp == [1, 2, 4, 8, 16]
        assert turns(pool, 40) == "a" * 40
        assert {take(pool).endpoint.name for _ in range(40)} == {"a"}
        assert left_of(pool, "a") == -1.0

    def test_a_probe_that_showed_nothing_makes_room_for_the_next(self) -> None:
        clock = Clock()
        pool = pool_of("ab", clock=clock, each={"b": {"priority": 1}})
        knock_out(pool, "a")
        clock.go(15)
        for _ in range(3):
            probe = take(pool)
            assert (probe.endpoint.name, turns(pool, 3)) == ("a", "bbb")
            pool.settle(probe, None)

    def test_an_attempt_from_before_lets_no_second_probe_begin(self) -> None:
        clock = Clock()
        pool = pool_of("ab", clock=clock, each={"b": {"priority": 1}})
        knock_out(pool, "a")
        clock.go(15)
        for _ in range(4):
            answers(pool, take(pool))
        old, last = take(pool), take(pool)  # both of the ramp's last step
        answers(pool, last)
        assert left_of(pool, "a") == -1.0
        knock_out(pool, "a")
        clock.go(15)
        probe = take(pool)
        pool.settle(old, None)
        assert (probe.endpoint.name, turns(pool, 2)) == ("a", "bb")

    def test_an_answer_to_a_bad_request_is_recovery_too(self) -> None:
        clock = Clock()
        pool = pool_of("ab", clock=clock)
        knock_out(pool, "a")
        clock.go(15)
        for _ in range(5):
            fails(pool, take(pool, forced="a"), "request")
        assert left_of(pool, "a") == -1.0

    def test_what_began_before_a_failure_is_no_recovery(self) -> None:
        clock = Clock()
        pool = pool_of("ab", clock=clock)
        early = take(pool, forced="a")
        clock.go(1)
        knock_out(pool, "a")
        pool.gain(early, 10.0, b"")
        assert left_of(pool, "a") == 15.0
        clock.go(15)
        answers(pool, take(pool, forced="a"))
        early, failing = take(pool, forced="a"), take(pool, forced="a")
        clock.go(1)
        fails(pool, failing)
        pool.gain(early, 10.0, b"")
        assert left_of(pool, "a") == 30.0

    @pytest.mark.parametrize(
        ("row", "lengths"),
        [
            ("server-error", [15, 30, 60, 120, 120]),
            ("unreachable", [1, 2, 4, 8, 16, 32, 60, 60]),
            ("overloaded", [10, 10, 10]),
        ],
    )
    def test_cooldowns_grow_while_it_fails(self, row: str, lengths: list[int]) -> None:
        clock = Clock()
        pool = pool_of("ab", clock=clock, each={"b": {"priority": 1}})
        found = []
        for _ in lengths:
            probe = take(pool)
            assert probe.endpoint.name == "a"
            fails(pool, probe, row)
            found.append(left_of(pool, "a"))
            clock.go(found[-1])
        assert found == lengths

    def test_growth_begins_anew_after_a_recovery(self) -> None:
        clock = Clock()
        pool = pool_of("a", clock=clock)
        for _ in range(2):
            fails(pool, take(pool))
            assert left_of(pool, "a") == 15.0
            clock.go(15)
            for _ in range(5):
                answers(pool, take(pool))

    def test_failures_at_the_same_time_count_as_one(self) -> None:
        clock = Clock()
        pool = pool_of("ab", clock=clock)
        leases = [take(pool, forced="a") for _ in range(50)]
        clock.go(0.5)
        for lease in leases:
            fails(pool, lease)
            clock.go(0.01)
        assert 14 < left_of(pool, "a") <= 15

    def test_errors_alone_never_eject_the_last_endpoint(self) -> None:
        clock = Clock()
        pool = pool_of("ab", clock=clock)
        knock_out(pool, "a")
        clock.go(5)
        knock_out(pool, "b", row="lost")
        assert turns(pool, 2) == "bb"  # it is 5 s against 10
        knock_out(pool, "b", row="credential")
        assert turns(pool, 2) == "aa"
        knock_out(pool, "a", row="credential")
        assert take(pool).endpoint.name in "ab"
        assert pool.reserve(wish(), [take(pool, forced="a").endpoint]) is None

    def test_a_stated_limit_ejects_even_the_last_endpoint(self) -> None:
        clock = Clock()
        pool = pool_of("a", clock=clock)
        fails(pool, take(pool), "limited", stated_s=30.0)
        assert pool.reserve(wish()) is None
        clock.go(30)
        assert take(pool).endpoint.name == "a"

    def test_a_stated_limit_lasts_as_long_as_stated_at_most_eight_days(self) -> None:
        pool = pool_of("ab", clock=Clock(), failover={"cooldown": 5})
        knock_out(pool, "a", row="limited", stated_s=3600.0)
        assert left_of(pool, "a") == 3600.0
        knock_out(pool, "b", row="limited", stated_s=1e9)
        assert left_of(pool, "b") == claude_lb.STATED_MOST_S

    @pytest.mark.parametrize(
        ("row", "stated_s"), [("server-error", None), ("limited", 20.0)]
    )
    def test_nothing_shortens_a_stated_limit(
        self, row: str, stated_s: float | None
    ) -> None:
        clock = Clock()
        pool = pool_of("ab", clock=clock)
        early = take(pool, forced="a")
        clock.go(1)
        knock_out(pool, "a", row="limited", stated_s=3600.0)
        clock.go(1)
        fails(pool, early, row, stated_s=stated_s)
        knock_out(pool, "a", row=row, stated_s=stated_s)
        assert left_of(pool, "a") == 3599.0

    @pytest.mark.parametrize(
        ("row", "stated_s", "cooldown", "left_s"),
        [
            ("server-error", None, None, 15.0),
            ("server-error", 40.0, None, 40.0),
            ("server-error", 4.0, None, 15.0),
            ("server-error", None, 5, 5.0),
            ("server-error", 40.0, 5, 40.0),
            ("payment", None, 5, 3600.0),
            ("credential", None, 5, 60.0),
        ],
    )
    def test_settings_and_statements_have_their_say(
        self, row: str, stated_s: float | None, cooldown: int | None, left_s: float
    ) -> None:
        failover = {} if cooldown is None else {"cooldown": cooldown}
        pool = pool_of("ab", clock=Clock(), failover=failover)
        knock_out(pool, "a", row=row, stated_s=stated_s)
        assert left_of(pool, "a") == left_s

    def test_a_models_cooldown_leaves_its_others_alone(self) -> None:
        clock = Clock()
        pool = pool_of("ab", clock=clock)
        assert not pool.needs_model()
        key = claude_lb.model_bucket(OPUS)
        knock_out(pool, "a", row="overloaded", key=key)
        assert pool.needs_model()
        assert {take(pool, model=OPUS).endpoint.name for _ in range(4)} == {"b"}
        for model in (HAIKU, None):
            names = {take(pool, model=model).endpoint.name for _ in range(4)}
            assert names == {"a", "b"}
        assert pool.snapshot().endpoints[0].state != "cooling"
        clock.go(10)
        assert take(pool, "b", model=OPUS).endpoint.name == "a"

    def test_what_harms_none_cools_none(self) -> None:
        pool = pool_of("ab", clock=Clock())
        for row in ("request", "throttled", "own-fault", "no-network", "stale-send"):
            assert fails(pool, take(pool, forced="a"), row) == ""
        assert turns(pool, 4) == "abab"

    @pytest.mark.parametrize("lane", [Lane.COUNT, Lane.FIXED])
    def test_a_lane_of_its_own_cools_none(self, lane: Lane) -> None:
        pool = pool_of("ab", clock=Clock())
        fails(pool, take(pool, forced="a", lane=lane))
        assert left_of(pool, "a") == -1.0

    @pytest.mark.parametrize(
        ("row", "cools"),
        [
            ("credential", False),
            ("payment", False),
            ("forbidden", False),
            ("credit", False),
            ("limited", False),
            ("configured", False),
            ("server-error", True),
            ("unreachable", True),
        ],
    )
    def test_a_clients_own_credential_harms_no_endpoint(
        self, row: str, cools: bool
    ) -> None:
        own = {"authType": "passthrough", "authToken": None}
        pool = pool_of("ab", clock=Clock(), each={"a": own})
        settings = claude_lb.FailoverSettings(statuses={422: "failover"})
        rule = ROWS.get(row) or claude_lb.judge(answered(422), settings)
        evidence = claude_lb.Evidence(rule, "why", stated_s=30.0)
        pool.settle(take(pool, forced="a"), evidence)
        assert (left_of(pool, "a") > 0) is cools

    def test_sleep_counts_as_time_passed(self) -> None:
        pool = pool_of("ab", clock=Clock())
        knock_out(pool, "a")
        knock_out(pool, "b", row="credential")
        pool.slept(20.0)
        assert (left_of(pool, "a"), left_of(pool, "b")) == (0.0, 40.0)
        assert take(pool).endpoint.name == "a"


class TestPoolAffinity:
    def test_the_last_good_one_stays_first_until_traffic_rests(self) -> None:
        clock = Clock()
        pool = pool_of(
            "ab",
            clock=clock,
            each={"b": {"priority": 1}},
            balancing={"affinity": "last_good", "idleRecoverySeconds": 300},
        )
        fails(pool, take(pool))
        answers(pool, take(pool, "a"))
        for _ in range(5):  # a has recovered meanwhile, b stays
            clock.go(299)
            lease = take(pool)
            assert lease.endpoint.name == "b"
            answers(pool, lease)
        clock.go(300)
        assert take(pool).endpoint.name == "a"  # R22

    def test_the_last_good_one_is_left_when_it_cannot_serve(self) -> None:
        pool = pool_of("ab", clock=Clock(), balancing={"affinity": "last_good"})
        answers(pool, take(pool))
        assert turns(pool, 3) == "aaa"
        pool.pause("a", paused=True)
        assert turns(pool, 2) == "bb"

    def test_a_conversation_stays_and_pools_agree_on_its_place(self) -> None:
        affinity = {"balancing": {"affinity": "conversation"}}
        pool, other = pool_of("abcd", **affinity), pool_of("dcba", **affinity)
        places = {}
        for key in map(str, range(50)):
            names = {
                take(p, conversation=key, ttl_s=300.0).endpoint.name
                for p in (pool, other, pool)
            }
            (places[key],) = names
        assert set(places.values()) == set("abcd")

    def test_a_conversation_stays_where_it_failed_over_to_while_warm(self) -> None:
        clock = Clock()
        pool = pool_of("ab", clock=clock, balancing={"affinity": "conversation"})
        talk: dict[str, Any] = {"conversation": "k", "ttl_s": 300.0}
        home = take(pool, **talk)
        fails(pool, home)
        away = take(pool, home.endpoint.name, **talk)
        assert away.endpoint is not home.endpoint
        answers(pool, away)
        for _ in range(3):  # each request keeps the cache warm
            clock.go(299)
            lease = take(pool, **talk)
            assert lease.endpoint is away.endpoint
            answers(pool, lease)
        clock.go(300)
        assert take(pool, **talk).endpoint is home.endpoint

    def test_conversations_move_no_turn(self) -> None:
        pool = pool_of("abc", balancing={"affinity": "conversation"})
        for key in "xyz":
            take(pool, conversation=key, ttl_s=300.0)
        assert turns(pool, 3) == "abc"

    def test_old_conversations_are_forgotten(self) -> None:
        pool = pool_of("ab", clock=Clock(), balancing={"affinity": "conversation"})
        home = take(pool, conversation="old", ttl_s=300.0).endpoint
        answers(pool, take(pool, home.name, conversation="old", ttl_s=300.0))
        assert take(pool, conversation="old").endpoint is not home
        for i in range(claude_lb.CONVERSATIONS):
            answers(pool, take(pool, conversation=str(i), ttl_s=300.0))
        assert take(pool, conversation="old").endpoint is home


class TestPoolByHand:
    @pytest.mark.parametrize("lane", list(Lane))
    def test_a_paused_endpoint_gets_no_attempt(self, lane: Lane) -> None:
        pool = pool_of("a")
        assert pool.pause("a", paused=True)
        assert pool.reserve(wish(lane=lane)) is None
        assert pool.snapshot().endpoints[0].state == "paused"
        assert pool.pause("a", paused=False)
        assert pool.reserve(wish(lane=lane)) is not None
        assert not pool.pause("z", paused=True)

    def test_everything_goes_to_the_one_held_and_nowhere_else(self) -> None:
        pool = pool_of("abc", clock=Clock())
        assert pool.take_hold("b")
        knock_out(pool, "b")
        assert turns(pool, 3) == "bbb"
        assert pool.reserve(wish(), [take(pool).endpoint]) is None
        assert (pool.snapshot().manual, pool.snapshot().next_index) == ("b", 1)
        assert not pool.take_hold("z")
        assert pool.take_hold("")
        assert turns(pool, 2) == "ac"

    def test_a_request_can_insist_on_an_endpoint(self) -> None:
        pool = pool_of("abc")
        lease = take(pool, forced="c")
        assert lease.endpoint.name == "c"
        assert pool.reserve(wish(forced="c"), [lease.endpoint]) is None
        assert turns(pool, 2) == "ab"

    @pytest.mark.parametrize("lane", list(Lane))
    def test_one_that_insists_on_an_unknown_endpoint_gets_none(
        self, lane: Lane
    ) -> None:
        assert pool_of("abc").reserve(wish(lane=lane, forced="z")) is None


class TestPoolRoutes:
    def test_a_mapped_model_is_told_with_the_lease(self) -> None:
        steps = [{"endpoint": "b", "model": "y"}, {"endpoint": "c", "priority": 1}]
        pool = pool_of("abc", routes={"x": steps})
        assert pool.needs_model()
        first = take(pool, model="x")
        assert (first.endpoint.name, first.model) == ("b", "y")
        again = pool.again(first)
        assert again is not None
        assert again.model == "y"
        second = take(pool, "b", model="x")
        assert (second.endpoint.name, second.model) == ("c", None)
        assert pool.reserve(wish("x"), [first.endpoint, second.endpoint]) is None


class TestPoolReload:
    def test_an_endpoint_that_stays_keeps_its_state(self) -> None:
        pool = pool_of("abc", clock=Clock())
        lease = take(pool)
        knock_out(pool, "a")
        pool.pause("b", paused=True)
        pool.configure(config_of("cba", each={"a": {"weight": 3, "priority": 1}}))
        c, b, a = pool.snapshot().endpoints
        assert (a.in_flight, a.state, a.used) == (1, "cooling", 2)
        assert (b.state, c.state) == ("paused", "unknown")
        assert turns(pool, 2) == "cc"
        pool.settle(lease, None)
        assert pool.snapshot().endpoints[2].in_flight == 0

    @pytest.mark.parametrize(
        "change", [{"authToken": "another-token-1"}, {"baseURL": "https://n.example"}]
    )
    def test_another_credential_or_address_is_another_service(
        self, change: dict[str, object]
    ) -> None:
        pool = pool_of("ab", clock=Clock())
        early = take(pool, forced="a")
        knock_out(pool, "a", row="credential")
        pool.configure(config_of("ab", each={"a": change}))
        assert left_of(pool, "a") == -1.0
        assert not pool.snapshot().endpoints[0].needs_attention
        fails(pool, early, "credential")  # it speaks of what was there before
        assert left_of(pool, "a") == -1.0
        assert pool.snapshot().endpoints[0].in_flight == 0

    def test_the_turn_stays_in_range(self) -> None:
        pool = pool_of("abcdef")
        turns(pool, 5)
        pool.configure(config_of("ab"))
        assert pool.snapshot().next_index == 0
        assert turns(pool, 4) == "abab"

    def test_leases_of_an_endpoint_that_is_gone_end_well(self) -> None:
        pool = pool_of("ab", clock=Clock(), balancing={"affinity": "last_good"})
        leases = [take(pool, forced="a") for _ in range(4)]
        pool.take_hold("a")
        pool.pin([FILE_ID], leases[0].endpoint)
        pool.configure(config_of("b", balancing={"affinity": "last_good"}))
        answers(pool, leases[0])
        fails(pool, leases[1])
        pool.settle(leases[2], None)
        assert pool.snapshot().manual == ""
        assert turns(pool, 3) == "bbb"
        assert take(pool, ids=(FILE_ID,)).endpoint.name == "b"
        pool.note(leases[3].endpoint, answering=True, why="it is gone")

    def test_conversations_stay_through_a_reload(self) -> None:
        affinity = {"affinity": "conversation"}
        pool = pool_of("abc", clock=Clock(), balancing=affinity)
        talk: dict[str, Any] = {"conversation": "k", "ttl_s": 300.0}
        lease = take(pool, take(pool, **talk).endpoint.name, **talk)
        answers(pool, lease)
        pool.configure(config_of("dcba", balancing=affinity))
        assert take(pool, **talk).endpoint.name == lease.endpoint.name

    def test_equal_endpoints_stay_the_same_objects(self) -> None:
        before, after = config_of("abc"), config_of("cab", each={"a": {"weight": 2}})
        merged = claude_lb.followed_by(before, after)
        c, a, b = merged.endpoints
        assert (b, c) == (before.endpoints[1], before.endpoints[2])
        assert a is after.endpoints[1]
        assert claude_lb.service_of(a) == claude_lb.service_of(before.endpoints[0])


class TestPoolExhaustion:
    def test_all_limited_tells_the_soonest_reset(self) -> None:
        clock = Clock()
        pool = pool_of("abX", clock=clock)
        knock_out(pool, "a", row="limited", stated_s=90.0)
        knock_out(pool, "b", row="limited", stated_s=30.0)
        clock.go(10)
        assert pool.reserve(wish()) is None
        found = pool.exhaustion(wish())
        assert (found.reset_s, found.unserved) == (20.0, False)
        assert [s[:15] for s in found.states] == ["a: cools down 8", "b: cools down 2"]

    def test_limited_beside_failing_states_no_reset(self) -> None:
        pool = pool_of("ab", clock=Clock())
        knock_out(pool, "a", row="limited", stated_s=90.0)
        knock_out(pool, "b")
        assert pool.exhaustion(wish()).reset_s is None

    def test_paused_ones_say_so(self) -> None:
        pool = pool_of("ab")
        for name in "ab":
            pool.pause(name, paused=True)
        found = pool.exhaustion(wish())
        assert found == claude_lb.Exhaustion(None, ("a: paused", "b: paused"), False)

    @pytest.mark.parametrize("row", ["server-error", "credential"])
    def test_a_reset_told_is_one_that_was_stated(self, row: str) -> None:
        pool, key = pool_of("a", clock=Clock()), claude_lb.model_bucket(OPUS)
        knock_out(pool, "a", row="limited-model", key=key, stated_s=5.0)
        knock_out(pool, "a", row=row)
        assert pool.exhaustion(wish(OPUS)).reset_s in (None, 5.0)

    def test_a_limit_of_one_model_is_none_of_its_others(self) -> None:
        pool, key = pool_of("a", clock=Clock()), claude_lb.model_bucket(OPUS)
        knock_out(pool, "a", row="limited-model", key=key, stated_s=90.0)
        assert pool.reserve(wish(OPUS)) is None
        assert pool.exhaustion(wish(OPUS)).reset_s == 90.0
        assert pool.reserve(wish(HAIKU)) is not None

    def test_a_model_that_nobody_serves(self) -> None:
        pool = pool_of("a", each={"a": {"models": [OPUS]}})
        assert pool.reserve(wish("gpt")) is None
        found = pool.exhaustion(wish("gpt"))
        assert found == claude_lb.Exhaustion(None, (), unserved=True)


@at_both_ends
class TestPoolWalk:
    ROWS = ("server-error", "limited", "overloaded", "credential", "request", "lost")
    SETS = ("abcd", "ab", "dcbaE", "bcde")

    @pytest.mark.parametrize("strategy", claude_lb.STRATEGY_NAMES)
    def test_the_books_balance_and_the_eligible_go_first(self, strategy: str) -> None:
        walk, clock = random.Random(strategy), Clock()
        balancing = {"strategy": strategy}
        ranked: dict[str, dict[str, object]]
        ranked = {"c": {"priority": 1}, "b": {"models": [OPUS, "x*"]}}
        pool = pool_of("abcd", clock=clock, balancing=balancing, each=ranked)
        leases: list[claude_lb.Lease] = []
        for _ in range(3000):
            step = walk.random()
            if step < 0.5:
                self.reserve(pool, walk, leases)
            elif step < 0.9 and leases:
                self.settle(pool, walk, leases)
            elif step < 0.96:
                clock.go(walk.choice([0.01, 1, 20, 400]))
            elif step < 0.98:
                pool.pause(walk.choice("abcd"), paused=walk.random() < 0.5)
            elif step < 0.99:
                names = walk.choice(self.SETS)
                config = config_of(names, each=ranked, balancing=balancing)
                pool.configure(claude_lb.followed_by(pool._config, config))
            self.check_books(pool, leases)
        for lease in leases:
            pool.settle(lease, None)
        self.check_books(pool, [])

    def check_books(
        self, pool: claude_lb.Pool, leases: Sequence[claude_lb.Lease]
    ) -> None:
        counts = collections.Counter(id(x.live) for x in leases)
        for live in [*pool._lives.values(), *(x.live for x in leases)]:
            assert live.in_flight == counts[id(live)]
            for key, trouble in live.troubles.items():
                holders = [x for x in leases if x.troubles.get(key) is trouble]
                assert trouble.in_flight == len(holders)

    def settle(
        self, pool: claude_lb.Pool, walk: random.Random, leases: list[claude_lb.Lease]
    ) -> None:
        lease = leases.pop(walk.randrange(len(leases)))
        if walk.random() < 0.6:
            pool.gain(lease, walk.uniform(1, 500), b"")
        evidence = None
        if walk.random() < 0.5:
            rule, key = ROWS[walk.choice(self.ROWS)], ""
            if rule.scope is claude_lb.Scope.MODEL and lease.ask.model:
                key = claude_lb.model_bucket(lease.ask.model)
            evidence = claude_lb.Evidence(rule, "why", key, walk.choice([5.0, 90.0]))
        pool.settle(lease, evidence)

    def reserve(
        self, pool: claude_lb.Pool, walk: random.Random, leases: list[claude_lb.Lease]
    ) -> None:
        model = walk.choice([None, OPUS, HAIKU, "x1"])
        lane = walk.choice([Lane.MESSAGES, Lane.MESSAGES, Lane.COUNT])
        snapshot = pool.snapshot()
        tried = [s.endpoint for s in snapshot.endpoints if walk.random() < 0.2]
        keys = claude_lb.trouble_keys(model)
        servers = [t.endpoint for t in claude_lb.targets_for(pool._config, model)]
        left = [
            s
            for s in snapshot.endpoints
            if s.endpoint in servers and s.endpoint not in tried and s.state != "paused"
        ]
        cooling = {
            s.endpoint
            for s in left
            if any(k in keys and left_s > 0 for k, _, left_s in s.cooldowns)
        }
        free = [
            s.endpoint for s in left if not any(k in keys for k, _, _ in s.cooldowns)
        ]
        lease = pool.reserve(wish(model, lane=lane), tried)
        if lease is None:
            assert not free
            return
        leases.append(lease)
        assert lease.endpoint in [s.endpoint for s in left]
        if free:
            assert lease.endpoint not in cooling
            assert lease.endpoint.priority <= min(e.priority for e in free)


class TestPoolPins:
    def test_a_pinned_id_goes_to_its_maker_alone(self) -> None:
        pool = pool_of("abc")
        maker = take(pool, forced="b").endpoint
        pool.pin(["msgbatch_1", FILE_ID], maker)
        for lane in Lane:
            what = wish(lane=lane, ids=("x_1", FILE_ID))
            lease = pool.reserve(what)
            assert lease is not None
            assert lease.endpoint is maker
            assert pool.reserve(what, [maker]) is None

    def test_a_pinned_request_moves_no_turn(self) -> None:
        pool = pool_of("abc")
        pool.pin([FILE_ID], pool.snapshot().endpoints[2].endpoint)
        assert take(pool, ids=(FILE_ID,)).endpoint.name == "c"
        assert turns(pool, 3) == "abc"

    def test_a_file_of_unknown_maker_goes_where_files_are_made(self) -> None:
        pool = pool_of("ab", each={"b": {"default": True}})
        assert take(pool, ids=(FILE_ID,)).endpoint.name == "b"

    def test_an_unknown_container_is_balanced(self) -> None:
        pool = pool_of("ab")
        first = take(pool, ids=("container_01AbCd",)).endpoint.name
        second = take(pool, first, ids=("container_01AbCd",)).endpoint.name
        assert first + second == "ab"

    def test_the_last_maker_counts(self) -> None:
        pool = pool_of("ab")
        a, b = (e.endpoint for e in pool.snapshot().endpoints)
        pool.pin(["x_1"], a)
        pool.pin(["x_1"], b)
        assert take(pool, lane=Lane.FIXED, ids=("x_1",)).endpoint is b

    def test_the_oldest_pins_are_forgotten(self) -> None:
        pool = pool_of("ab")
        b = pool.snapshot().endpoints[1].endpoint
        pool.pin([f"x_{i}" for i in range(claude_lb.PINS)], b)
        pool.pin(["x_0"], b)
        pool.pin(["y_1"], b)
        makers = [
            take(pool, lane=Lane.FIXED, ids=(i,)).endpoint.name
            for i in ("x_1", "x_0", "x_2")
        ]
        assert makers == ["a", "b", "b"]


class TestPoolSnapshots:
    @pytest.mark.parametrize(
        ("names", "evidence", "status"),
        [
            ("ab", {"a": True, "b": True}, "healthy"),
            ("ab", {"a": True, "b": False}, "degraded"),
            ("ab", {"a": True}, "degraded"),
            ("ab", {"a": False, "b": False}, "unhealthy"),
            ("a", {"a": False}, "unhealthy"),
            ("aX", {"a": True}, "healthy"),
            ("aX", {"a": True, "X": False}, "healthy"),
            ("aX", {"a": False}, "unhealthy"),
        ],
    )
    def test_the_status_is_by_evidence(
        self, names: str, evidence: dict[str, bool], status: str
    ) -> None:
        pool = pool_of(names)
        for state in pool.snapshot().endpoints:
            if state.endpoint.name in evidence:
                seen = evidence[state.endpoint.name]
                pool.note(state.endpoint, answering=seen, why="seen")
        assert pool.snapshot().status == status

    def test_a_paused_endpoint_does_not_count_as_answering(self) -> None:
        pool = pool_of("ab")
        for name in "ab":
            answers(pool, take(pool, forced=name))
        pool.pause("a", paused=True)
        assert pool.snapshot().status == "degraded"

    def test_an_attempt_that_showed_nothing_changes_no_evidence(self) -> None:
        pool = pool_of("a")
        fails(pool, take(pool), "no-network")
        pool.settle(take(pool), None)
        (state,) = pool.snapshot().endpoints
        assert (state.answering, state.why) == (False, "why")
        answers(pool, take(pool))
        assert pool.snapshot().status == "healthy"

    def test_a_state_tells_its_evidence(self) -> None:
        clock = Clock()
        pool = pool_of("abX", clock=clock)
        pool.gain(take(pool), 40.0, kept_of(f"{REQUESTS}-Limit: 5"))
        pool.gain(take(pool, forced="a"), 90.0, b"")
        knock_out(pool, "b", row="payment")
        clock.go(3600)
        a, b, disabled = pool.snapshot().endpoints
        assert (a.state, a.succeeded, a.limits) == ("ok", 2, {"requests-limit": "5"})
        assert a.latency_ms == pytest.approx(50.0)
        assert (b.state, b.needs_attention, b.failed) == ("recovering", True, 1)
        assert b.cooldowns == (("", "payment", 0.0),)
        assert disabled.state == "disabled"

    def test_the_next_index_counts_disabled_endpoints(self) -> None:
        pool = pool_of("aXb")
        found = []
        for _ in range(3):
            found.append(pool.snapshot().next_index)
            take(pool)
        assert found == [0, 2, 0]

    def test_a_snapshot_does_not_change(self) -> None:
        pool = pool_of("ab")
        before = pool.snapshot()
        take(pool)
        assert [e.in_flight for e in before.endpoints] == [0, 0]
        assert (before.next_index, before.in_flight) == (0, 0)


# ============================================================================
# 2. SOCKETS
# ============================================================================

# -- fakes -----------------------------------------------------------------

BOUND_S = 20.0  # until a wait counts as failed
PROMPT_S = 5.0  # the same where "at once" is meant: far below every limit set here
ENDINGS = {"ok", "client_cancelled", "upstream_error", "truncated", "refused"}
USER_ID = re.compile(rb'"user_id": "([0-9a-f]{32})"')
OK_BODY = b'{"type": "message", "content": []}'
CHUNKED_SSE = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)
T = TypeVar("T")


def sse(kind: str, **facts: object) -> bytes:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **facts})}\n\n".encode()


START = sse("message_start", message={"id": "msg_1", "usage": {"input_tokens": 1}})
STOP = sse("message_stop")
PING = b"event: ping"


def delta(text: object) -> bytes:
    part = {"type": "text_delta", "text": str(text)}
    return sse("content_block_delta", index=0, delta=part)


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def message(**extra: object) -> bytes:
    """Return the body of a messages request that no other request has."""
    facts = {"model": "claude-test", "max_tokens": 1, "messages": []}
    who = {"metadata": {"user_id": uuid.uuid4().hex}}
    return json.dumps({**facts, **who, **extra}).encode()


def eventually(check: Callable[[], T], what: str, within_s: float = BOUND_S) -> T:
    until, pause = time.monotonic() + within_s, threading.Event()
    while True:
        found = check()
        if found:
            return found
        assert time.monotonic() < until, f"never came: {what}"
        pause.wait(0.005)


def need(tool: str) -> str:
    """Return a tool's path; without it the test is skipped, or fails under CI."""
    found = shutil.which(tool)
    if found is None and os.environ.get("CI") == "true":
        pytest.fail(f"{tool} is missing on a CI machine")
    if found is None:
        pytest.skip(f"needs {tool}")
    return found


class CutError(Exception):
    """The connection ended in the middle of an answer."""


class HungUpError(Exception):
    """The proxy closed a connection where the script wanted to read."""


class Received(NamedTuple):
    """A request as the upstream got it."""

    method: str
    target: str
    lines: tuple[bytes, ...]
    body: bytes = b""

    def values(self, name: str) -> list[str]:
        pairs = (line.decode("latin-1").partition(":") for line in self.lines)
        return [v.strip() for n, _, v in pairs if n.lower() == name]


class Wire:
    """One connection of a ScriptedUpstream, in the hands of its script."""

    def __init__(self, sock: socket.socket, owner: ScriptedUpstream) -> None:
        self.sock, self._owner, self._buffer = sock, owner, b""
        self._last: Received | None = None

    def _fill(self) -> None:
        data = self.sock.recv(262144)
        if not data:
            raise HungUpError
        self._buffer += data

    def head(self) -> Received:
        """Read a request's head only."""
        while b"\r\n\r\n" not in self._buffer:
            self._fill()
        head, _, self._buffer = self._buffer.partition(b"\r\n\r\n")
        first, *lines = head.split(b"\r\n")
        for line in lines:
            assert re.fullmatch(rb"[!-9;-~]+:[\t\x20-\x7e\x80-\xff]*", line), line
        found = re.fullmatch(r"([A-Z]+) (\S+) HTTP/1\.[01]", first.decode("latin-1"))
        assert found, first
        return Received(found[1], found[2], tuple(lines))

    def read(self, size: int) -> bytes:
        parts, left = [self._buffer], size - len(self._buffer)
        while left > 0:
            self._buffer = b""
            self._fill()
            parts.append(self._buffer)
            left -= len(self._buffer)
        whole = b"".join(parts)
        self._buffer = whole[size:]
        return whole[:size]

    def request(self) -> Received:
        """Read a whole request and stamp it as generating."""
        head = self.head()
        lengths = head.values("content-length")
        assert len(lengths) <= 1, lengths
        assert not head.values("transfer-encoding")
        whole = head._replace(body=self.read(int(lengths[0])) if lengths else b"")
        self._owner.receive(whole)
        self._last = whole
        return whole

    def deny(self) -> None:
        """Say that nothing was generated for the last request: an honest error."""
        if self._last is not None:
            self._owner.receive(self._last, -1)
            self._last = None

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def answer(self, status: int, body: bytes = OK_BODY, *fields: str) -> None:
        if status >= 400 and status not in (504, 520, 524):  # ambiguous, those
            self.deny()
        lines = list(fields)
        if not any(f.lower().startswith("content-type:") for f in fields):
            lines.append("content-type: application/json")
        head = "\r\n".join((f"HTTP/1.1 {status} Said", *lines))
        self.send(f"{head}\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)

    def stream(self, *events: bytes, end: bool = True) -> None:
        self.send(CHUNKED_SSE + b"".join(map(chunk, events)))
        if end:
            self.send(b"0\r\n\r\n")

    def wait_closed(self) -> None:
        """Wait until the proxy closes this connection."""
        with contextlib.suppress(HungUpError, ConnectionError):
            while True:
                self._buffer = b""
                self._fill()

    def close(self, *, reset: bool = False) -> None:
        with contextlib.suppress(OSError):
            if reset:
                linger = struct.pack("ii", 1, 0)
                self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.sock.close()


Answering = Callable[[Wire, Received], None]
Script = Callable[[Wire], None]


def fine(wire: Wire, request: Received) -> None:
    wire.answer(200, b"" if request.method == "HEAD" else OK_BODY)


class ScriptedUpstream:
    """A TCP server whose connections are run by a script, whose requests are kept.

    `answering` is called for each whole request; `script` runs a connection raw.
    """

    def __init__(
        self,
        lab: Lab,
        answering: Answering = fine,
        *,
        script: Script | None = None,
        tls: ssl.SSLContext | None = None,
        host: str = "127.0.0.1",
    ) -> None:
        self._lab, self._tls, self._answering = lab, tls, answering
        self._script = script or self._each
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, 0), family=family, backlog=512)
        self.port = int(self._listener.getsockname()[1])
        shown = f"[{host}]" if ":" in host else host
        self.authority = f"{shown}:{self.port}"
        self.url = f"{'https' if tls else 'http'}://{self.authority}"
        self.token = f"canary-{uuid.uuid4().hex}"
        self.requests: list[Received] = []
        self._wires: list[Wire] = []
        self._closed = False
        lab.thread(self._accept)

    def receive(self, request: Received, stamps: int = 1) -> None:
        """Keep a whole request: from here on it is generated, and paid for.

        -1 takes that back.
        """
        if stamps > 0:
            self.requests.append(request)
        found = USER_ID.search(request.body)
        if found and request.target.partition("?")[0].endswith("/v1/messages"):
            self._lab.generating[found[1]] += stamps

    def _each(self, wire: Wire) -> None:
        while True:
            self._answering(wire, wire.request())

    def _accept(self) -> None:
        while not self._closed:
            with contextlib.suppress(OSError):
                sock, _ = self._listener.accept()
                sock.settimeout(3 * BOUND_S)
                self._lab.thread(partial(self._run, sock))

    def _run(self, sock: socket.socket) -> None:
        wire = Wire(sock, self)
        self._wires.append(wire)
        try:
            if self._tls is not None:
                wire.sock = self._tls.wrap_socket(sock, server_side=True)
            self._script(wire)
        except (HungUpError, OSError):
            pass
        except Exception as error:  # noqa: BLE001 - told by the lab
            self._lab.errors.append(error)
        wire.close()

    def close(self) -> None:
        self._closed = True
        with contextlib.suppress(OSError):
            socket.create_connection(self._listener.getsockname()[:2], 1.0).close()
        self._listener.close()
        for wire in self._wires:
            with contextlib.suppress(OSError):
                wire.sock.shutdown(socket.SHUT_RDWR)


class Answer(NamedTuple):
    """An answer's head, checked, and its body."""

    status: int
    fields: list[tuple[str, str]]
    body: bytes = b""

    def values(self, name: str) -> list[str]:
        return [v for n, v in self.fields if n.lower() == name]

    def field(self, name: str) -> str:
        found = self.values(name)
        assert len(found) <= 1, f"{name} stands twice"
        return found[0] if found else ""

    def json(self) -> Any:
        return json.loads(self.body)


class Client:
    """A raw client; reads answers strictly: whatever is doubtful is a failure."""

    def __init__(self, lab: Lab, port: int) -> None:
        self._lab, self._port, self._buffer = lab, port, b""
        self.sock = socket.create_connection(("127.0.0.1", port), BOUND_S)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._left: int | None = 0  # of the body; None: to the end; -1: in chunks
        self.raw_bytes = 0

    def send(self, data: bytes, *, counts: int = 1) -> Client:
        """Send bytes that hold `counts` requests which deserve a row."""
        self._lab.counted += counts
        with contextlib.suppress(ConnectionError):  # it may have answered already
            self.sock.sendall(data)
        return self

    def ask(
        self, method: str, target: str, body: bytes = b"", *fields: str, counts: int = 1
    ) -> Client:
        """Send a request with a Host and a length where none are given."""
        lines = list(fields)
        if not any(f.lower().startswith("host:") for f in fields):
            lines.insert(0, f"Host: 127.0.0.1:{self._port}")
        framed = any(
            f.lower().startswith(("content-length", "transfer-")) for f in lines
        )
        if (body or method in ("POST", "PUT", "PATCH")) and not framed:
            lines.append(f"Content-Length: {len(body)}")
        head = "\r\n".join((f"{method} {target} HTTP/1.1", *lines, "", ""))
        return self.send(head.encode("latin-1") + body, counts=counts)

    def post(self, body: bytes | None = None, *fields: str) -> Client:
        """Send a messages request."""
        body = message() if body is None else body
        return self.ask("POST", "/v1/messages", body, *fields)

    def _fill(self) -> bool:
        data = self.sock.recv(262144)
        self.raw_bytes += len(data)
        self._buffer += data
        return bool(data)

    def _line(self) -> bytes:
        while b"\r\n" not in self._buffer:
            if not self._fill():
                raise CutError(self._buffer[:200])
        line, _, self._buffer = self._buffer.partition(b"\r\n")
        return line

    def head(self, method: str = "GET") -> Answer:
        """Read the head of an answer, and prepare for its body."""
        first = self._line()
        found = re.fullmatch(rb"HTTP/1\.1 ([1-5]\d\d) [\t\x20-\x7e\x80-\xff]*", first)
        assert found, first
        fields = []
        for line in iter(self._line, b""):
            pair = re.fullmatch(
                rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):([\t\x20-\x7e\x80-\xff]*)", line
            )
            assert pair, line
            fields.append((pair[1].decode(), pair[2].decode("latin-1").strip()))
        answer = Answer(int(found[1]), fields)
        length, coding = (
            answer.field("content-length"),
            answer.values("transfer-encoding"),
        )
        assert coding in ([], ["chunked"]), coding
        assert not (length and coding)
        if method == "HEAD" or answer.status in (204, 304) or answer.status < 200:
            self._left = 0
        else:
            self._left = -1 if coding else int(length) if length else None
        return answer

    def more(self) -> bytes:
        """Return the next bytes of the body, b"" at its good end."""
        if self._left == 0:
            return b""
        if self._left == -1:
            line = self._line()
            assert re.fullmatch(rb"[0-9A-Fa-f]{1,8}", line), line
            data = self._exactly(int(line, 16))
            assert self._line() == b""
            self._left = -1 if data else 0
            return data
        if not self._buffer and not self._fill():
            if self._left is not None:
                raise CutError(f"{self._left} bytes short")
            self._left = 0
            return b""
        size = len(self._buffer) if self._left is None else self._left
        data, self._buffer = self._buffer[:size], self._buffer[size:]
        if self._left is not None:
            self._left -= len(data)
        return data

    def _exactly(self, size: int) -> bytes:
        parts, left = [self._buffer], size - len(self._buffer)
        while left > 0:
            self._buffer = b""
            if not self._fill():
                raise CutError(f"{left} bytes short")
            parts.append(self._buffer)
            left -= len(self._buffer)
        whole = b"".join(parts)
        self._buffer = whole[size:]
        return whole[:size]

    def until(self, marker: bytes) -> bytes:
        """Return the body's next bytes up to those that end in `marker`."""
        seen = b""
        while not seen.endswith(marker):
            piece = self.more()
            assert piece, f"the body ended before {marker!r}: {seen[-200:]!r}"
            seen += piece
        return seen

    def rest(self) -> bytes:
        return b"".join(iter(self.more, b""))

    def answer(self, method: str = "GET") -> Answer:
        head = self.head(method)
        return head._replace(body=self.rest())

    def unread(self) -> bytes:
        """Return, raw, what has come and was not read."""
        while select.select([self.sock], [], [], 0)[0] and self._fill():
            pass
        return self._buffer

    def ends(self) -> str:
        """Wait for the connection's end: "closed" or "reset"; no byte may come."""
        try:
            came = self._buffer or self.sock.recv(4096)
        except ConnectionResetError:
            return "reset"
        assert not came, came
        return "closed"

    def cut(self) -> str:
        """Read to the visible cut of an answer; return how the connection ended."""
        try:
            with pytest.raises(CutError):
                self.rest()
        except ConnectionResetError:
            return "reset"
        return "closed"

    def close(self, *, reset: bool = False) -> None:
        if reset:
            linger = struct.pack("ii", 1, 0)
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.sock.close()


class Source:
    """Lends CONFIG no environment, no commands, and one proxy for every host."""

    def __init__(self, proxy: str | None = None) -> None:
        self._proxy = proxy

    def variable(self, name: str) -> str | None:
        return None

    def command(self, line: str) -> str:
        raise ValueError(line)

    def proxy_for(self, host: str) -> str | None:
        return self._proxy


class Proxy:
    """A running Server with its log."""

    def __init__(self, lab: Lab, server: claude_lb.Server, log: Path) -> None:
        self._lab, self.server, self.port = lab, server, server.port
        self._log = log

    def client(self) -> Client:
        return self._lab.client(self.port)

    def ask(
        self, method: str, target: str, body: bytes = b"", *fields: str, counts: int = 1
    ) -> Answer:
        """Ask on a connection of its own."""
        client = self.client()
        answer = client.ask(method, target, body, *fields, counts=counts).answer(method)
        client.close()
        return answer

    def post(self, body: bytes | None = None, *fields: str) -> Answer:
        body = message() if body is None else body
        return self.ask("POST", "/v1/messages", body, *fields)

    def health(self) -> Any:
        return self.ask("GET", "/health", counts=0).json()

    def log(self) -> str:
        return self._log.read_text()

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log().splitlines()]

    def rows(self, count: int) -> list[dict[str, Any]]:
        """Wait for `count` exchange lines and return them in order."""

        def found() -> list[dict[str, Any]]:
            rows = [x for x in self.lines() if x["event"] == "exchange"]
            return rows if len(rows) >= count else []

        rows = eventually(found, f"{count} rows", PROMPT_S)
        assert len(rows) == count, rows
        return rows

    def row(self) -> dict[str, Any]:
        return self.rows(1)[0]


class Lab:
    """Makes upstreams, proxies, clients and gates; takes all of it down again."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._threads, self._files = self._standing()
        self._own: list[threading.Thread] = []
        self._gates: list[threading.Event] = []
        self._upstreams: list[ScriptedUpstream] = []
        self._clients: list[Client] = []
        self._proxies: list[Proxy] = []
        self._stopped: list[Proxy] = []
        self._sockets: list[socket.socket] = []
        self.processes: list[Process] = []
        self.generating: collections.Counter[bytes] = collections.Counter()
        self.errors: list[BaseException] = []
        self.counted = 0
        #: Tracebacks that the test provokes.
        self.faults = 0

    def _standing(self) -> tuple[int, int]:
        return threading.active_count(), len(os.listdir("/dev/fd"))

    def thread(self, run: Callable[[], None]) -> None:
        thread = threading.Thread(target=run, name="test", daemon=True)
        self._own.append(thread)
        thread.start()

    def gate(self) -> threading.Event:
        """Return an event that is set at the end whatever happens."""
        self._gates.append(threading.Event())
        return self._gates[-1]

    def upstream(self, answering: Answering = fine, **more: Any) -> ScriptedUpstream:
        self._upstreams.append(ScriptedUpstream(self, answering, **more))
        return self._upstreams[-1]

    def raw(self, script: Script, **more: Any) -> ScriptedUpstream:
        return self.upstream(script=script, **more)

    def client(self, port: int) -> Client:
        self._clients.append(Client(self, port))
        return self._clients[-1]

    def refusing(self) -> str:
        """Return a URL where nobody listens, and nobody else will."""
        sock = socket.socket()
        sock.bind(("127.0.0.1", 0))
        self._sockets.append(sock)
        return f"http://127.0.0.1:{sock.getsockname()[1]}"

    def blackhole(self) -> int:
        """Return a port whose queue is full, so that connecting hangs."""
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        self._sockets.append(listener)
        for _ in range(16):
            sock = socket.socket()
            sock.setblocking(False)
            self._sockets.append(sock)
            sock.connect_ex(listener.getsockname())
            if not select.select([], [sock], [], 0.1)[1]:
                return int(listener.getsockname()[1])
        pytest.skip("this system takes connections beyond its queue")

    def proxy(self, *endpoints: Any, source: Source | None = None, **sections: Any
    ) -> Proxy:  # fmt: skip
        """Start a proxy over upstreams, URLs or endpoint objects."""
        listed = []
        for number, one in enumerate(endpoints):
            entry = {"name": f"up{number}", "authToken": f"canary-{number}-of-the-lab"}
            if isinstance(one, ScriptedUpstream):
                entry.update(baseURL=one.url, authToken=one.token)
            else:
                entry.update({"baseURL": one} if isinstance(one, str) else one)
            if entry.get("authType") == "passthrough":
                del entry["authToken"]
            listed.append(entry)
        path = self._folder / f"log{len(self._proxies)}.json"
        server = {"port": 0, **sections.pop("server", {})}
        timeouts = {"connect": 60, "firstByte": 60, "idle": 60}
        timeouts.update(sections.pop("timeouts", {}))
        log = {"format": "json", "file": str(path), **sections.pop("log", {})}
        failover = {"gateSeconds": 0, **sections.pop("failover", {})}
        raw = {"endpoints": listed, "server": server, "timeouts": timeouts, "log": log}
        raw["failover"] = failover
        text = json.dumps({**raw, **sections})
        config = claude_lb.parse_config(text, name="lab", source=source or Source())
        running = claude_lb.Server(config, claude_lb.Log(config.log))
        running.start()
        self._proxies.append(Proxy(self, running, path))
        return self._proxies[-1]

    def stop(self) -> None:
        """Take everything down."""
        for gate in self._gates:
            gate.set()
        for client in self._clients:
            client.close()
        for sock in self._sockets:
            sock.close()
        for upstream in self._upstreams:
            upstream.close()
        for process in self.processes:
            process.close()
        for proxy in self._proxies:
            if proxy not in self._stopped:
                proxy.server.stop(grace_s=BOUND_S)

    def stopped(self, proxy: Proxy) -> None:
        """Take note that a test has stopped a proxy itself."""
        self._stopped.append(proxy)

    def check(self) -> None:
        """Assert the ledger invariant and that nothing is left over."""
        assert not self.errors, self.errors
        assert set(self.generating.values()) <= {0, 1}, "generated twice"
        lines = [line for proxy in self._proxies for line in proxy.lines()]
        rows = [line for line in lines if line["event"] == "exchange"]
        assert len(rows) == self.counted, rows
        assert {row["ended"] for row in rows} <= ENDINGS
        assert len({row["request_id"] for row in rows}) == len(rows)
        told = [line["traceback"] for line in lines if "traceback" in line]
        assert len(told) == self.faults, "\n".join(told)
        for thread in self._own:
            thread.join(BOUND_S)
        # A Server is made once in a process: its log and its spare stay open.
        threads, files = self._threads, self._files + 2 * len(self._proxies)
        self._proxies.clear()
        self._stopped.clear()

        def returned() -> bool:
            found = self._standing()
            if found[0] <= threads and found[1] <= files:
                return True
            gc.collect()  # a stopped Server is a circle
            return False

        eventually(returned, f"{threads} threads and {files} files as before", PROMPT_S)


@pytest.fixture(scope="session", autouse=True)
def _state_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep histories of tests out of the home of whoever runs them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(scope="session")
def _frozen() -> None:
    """Keep what pytest has loaded out of every collection: 140 ms each else."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def lab(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    _frozen: None,
) -> Iterator[Lab]:
    monkeypatch.setattr(claude_lb, "WORKER_IDLE_S", 0.1)  # so that threads return
    found, failed = Lab(tmp_path), request.session.testsfailed
    try:
        yield found
    finally:
        found.stop()
    if request.session.testsfailed == failed:  # else what failed has been told
        found.check()


def own_error(
    answer: Answer, status: int, kind: str, *, facts: Sequence[str] = ()
) -> str:
    """Check an error of the proxy's own; return its message."""
    assert answer.status == status, answer
    assert answer.field("content-type") == "application/json"
    document = answer.json()
    assert set(document) == {"type", "error", "request_id", *facts}
    assert document["type"] == "error"
    assert set(document["error"]) == {"type", "message"}
    assert document["error"]["type"] == kind
    assert document["request_id"] == answer.field("x-claude-lb-request-id")
    return str(document["error"]["message"])


# -- 1. forwarding ---------------------------------------------------------

REQUEST_DROPS = (
    "Keep-Alive: timeout=5",
    "Proxy-Connection: keep-alive",
    "TE: trailers",
    "Trailer: x-sum",
    "Upgrade: websocket",
    "Proxy-Authorization: Basic eDp5",
    "Proxy-Features: x",
    "Authorization: Bearer of-the-client",
    "x-api-key: of-the-client",
    "Cookie: a=b",
    "Forwarded: for=10.0.0.1",
    "X-Forwarded-For: 10.0.0.1",
    "X-Forwarded-Host: evil.example",
    "X-Forwarded-Proto: https",
    "X-Claude-LB-Endpoint: up0",
    "X-Named: by Connection",
)
ANSWER_DROPS = (
    "Keep-Alive: timeout=5",
    "Proxy-Authenticate: Basic",
    "Proxy-Connection: keep-alive",
    "Trailer: x-sum",
    "Upgrade: h2c",
    "Set-Cookie: a=b",
    "Set-Cookie: c=d",
    "Server: secret/1.0",
    "Alt-Svc: h3=:443",
    "Strict-Transport-Security: max-age=1",
    "Access-Control-Allow-Origin: *",
    "Access-Control-Allow-Credentials: true",
    "X-Claude-LB-Endpoint: spoofed",
    "X-Named: by Connection",
)
PASSING = (
    "anthropic-beta: one",
    "X-Stainless-Retry-Count: 0",
    "anthropic-beta:two",
    "User-Agent: claude-cli/2 (external)",
    "Cookies: no cookie",
    "x_api_key: a look-alike",
    "X-Forward: near",
    "Via: 1.1 office",
    "X-Bytes: caf\xe9",
    "X-Empty:",
    "Range: bytes=0-1",
)


def passed(lines: tuple[bytes, ...] | list[tuple[str, str]], own: str) -> list[str]:
    """Return the lower-case lines without those that the proxy adds."""
    texts = [
        x.decode("latin-1") if isinstance(x, bytes) else f"{x[0]}: {x[1]}"
        for x in lines
    ]
    return [t for t in texts if not re.match(own, t.lower())]


class TestForwardingFields:
    def test_r4_query_string_and_beta_field_reach_the_upstream(self, lab: Lab) -> None:
        up = lab.upstream()
        proxy = lab.proxy(up)
        target = "/v1/messages?beta=true&x=%20%2F&&y=[1]"
        assert proxy.ask("POST", target, message(), "anthropic-beta: a,b").status == 200
        assert up.requests[0].target == target
        assert up.requests[0].values("anthropic-beta") == ["a,b"]

    def test_end_to_end_request_fields_pass_with_order_and_duplicates(
        self, lab: Lab
    ) -> None:
        up = lab.upstream()
        lab.proxy(up).post(message(), *PASSING)
        own = "(host|content-(length|type)|accept-encoding|x-api-key|x-claude-lb-via)"
        own += ":|anthropic-version:"
        assert passed(up.requests[0].lines, own) == list(PASSING)

    def test_request_drop_list_is_exactly_the_agreed_one(self, lab: Lab) -> None:
        up = lab.upstream()
        proxy = lab.proxy(up)
        own = f"Origin: http://127.0.0.1:{proxy.port}"
        fields = (*REQUEST_DROPS, own, "Content-Type: application/json")
        answer = proxy.post(message(), "Connection: x-named, close", *fields)
        assert answer.status == 200
        names = {x.partition(b":")[0].lower() for x in up.requests[0].lines}
        added = {b"host", b"x-api-key", b"x-claude-lb-via", b"accept-encoding"}
        added |= {b"content-type", b"content-length", b"anthropic-version"}
        assert names == added
        assert up.requests[0].values("host") == [up.authority]
        assert up.requests[0].values("x-api-key") == [up.token]

    def test_connection_field_cannot_take_security_fields_along(self, lab: Lab) -> None:
        up = lab.upstream()
        named = "host, x-api-key, content-length, anthropic-version, anthropic-beta"
        fields = (f"Connection: {named}, content-type", "anthropic-beta: b")
        lab.proxy(up).post(message(), *fields, "content-type: application/json")
        got = up.requests[0]
        assert got.values("host")
        assert got.values("x-api-key") == [up.token]
        assert got.values("content-length")
        assert got.values("anthropic-beta") == ["b"]
        assert got.values("content-type") == ["application/json"]

    def test_end_to_end_answer_fields_pass_with_order_and_duplicates(
        self, lab: Lab
    ) -> None:
        lines = [
            "request-id: req_1",
            "anthropic-ratelimit-requests-remaining: 9",
            "X-Twice: 1",
            "Date: Thu, 01 Jan 2026 00:00:00 GMT",
            "x-twice: 2",
            "retry-after: 7",
            "ETag: caf\xe9",
            "Vary: Accept",
        ]

        def answering(wire: Wire, request: Received) -> None:
            head = "HTTP/1.1 200 Fine by me\r\n" + "\r\n".join(lines)
            wire.send(f"{head}\r\ncontent-length: 2\r\n\r\n{{}}".encode("latin-1"))

        answer = lab.proxy(lab.upstream(answering)).post()
        own = "(content-length|x-claude-lb-(endpoint|request-id)):"
        assert passed(answer.fields, own) == lines

    def test_answer_drop_list_is_exactly_the_agreed_one(self, lab: Lab) -> None:
        fields = ("Connection: x-named", *ANSWER_DROPS, "x-kept: 1")
        up = lab.upstream(lambda wire, _: wire.answer(200, b"{}", *fields))
        answer = lab.proxy(up).post()
        names = {name.lower() for name, _ in answer.fields}
        own = {"x-claude-lb-endpoint", "x-claude-lb-request-id", "date"}
        assert names == own | {"content-type", "content-length", "x-kept"}

    def test_answer_names_its_endpoint_and_the_rows_request_id(self, lab: Lab) -> None:
        proxy = lab.proxy({"baseURL": lab.upstream().url, "name": "first one"})
        answer = proxy.post()
        assert answer.field("x-claude-lb-endpoint") == "first one"
        row = proxy.row()
        assert answer.field("x-claude-lb-request-id") == row["request_id"]
        assert (row["endpoint"], row["status"], row["ended"]) == (
            "first one",
            200,
            "ok",
        )
        assert row["response_bytes"] >= len(OK_BODY)

    def test_missing_version_and_content_type_are_added(self, lab: Lab) -> None:
        up = lab.upstream()
        proxy = lab.proxy(up)
        proxy.post()
        assert up.requests[0].values("anthropic-version") == ["2023-06-01"]
        assert up.requests[0].values("content-type") == ["application/json"]

    def test_sent_version_and_content_type_are_never_changed(self, lab: Lab) -> None:
        up = lab.upstream()
        lab.proxy(up).post(b"--b", "Anthropic-Version: 2099-01-01", "Content-type: a/b")
        assert up.requests[0].values("anthropic-version") == ["2099-01-01"]
        assert up.requests[0].values("content-type") == ["a/b"]

    @pytest.mark.parametrize(
        ("target", "wanted"),
        [
            ("/v1/messages", ["identity"]),
            ("/v1/messages/count_tokens", ["identity"]),
            ("/v1/files/file_abc123/content", ["gzip, br"]),
        ],
    )
    def test_identity_is_asked_for_where_the_answer_is_read(
        self, lab: Lab, target: str, wanted: list[str]
    ) -> None:
        up, method = lab.upstream(), "GET" if "files" in target else "POST"
        lab.proxy(up).ask(method, target, b"", "Accept-Encoding: gzip, br")
        assert up.requests[0].values("accept-encoding") == wanted

    @pytest.mark.parametrize(
        ("prefix", "target"),
        [
            ("", "/v1/models"),
            ("/", "/v1/models"),
            ("/v1", "/v1/models"),
            ("/v1/", "/v1/models"),
            ("/api/claude/", "/api/claude/v1/models"),
            ("/api/claude/v1", "/api/claude/v1/models"),
        ],
    )
    def test_base_url_and_path_are_joined_with_one_slash_and_one_v1(
        self, lab: Lab, prefix: str, target: str
    ) -> None:
        up = lab.upstream()
        lab.proxy(up.url + prefix).ask("GET", "/v1/models")
        assert up.requests[0].target == target

    def test_request_that_comes_round_again_is_answered_502(self, lab: Lab) -> None:
        up = lab.upstream()
        proxy = lab.proxy(up)
        proxy.post()
        (mark,) = up.requests[0].values("x-claude-lb-via")
        answer = proxy.post(message(), f"x-claude-lb-via: other, {mark}")
        assert "circle" in own_error(answer, 502, "api_error")
        assert len(up.requests) == 1


class TestForwardingCredentials:
    THEIRS = ("x-api-key: of-the-client", "Authorization: Bearer of-the-client")

    @pytest.mark.parametrize(
        ("token", "kind", "wanted"),
        [
            ("sk-ant-api03-abc", None, ("sk-ant-api03-abc", "")),
            ("sk-ant-oat01-abc", None, ("", "Bearer sk-ant-oat01-abc")),
            ("sk-ant-oat01-abc", "api_key", ("sk-ant-oat01-abc", "")),
            ("other", "auth_token", ("", "Bearer other")),
        ],
    )
    def test_upstream_sees_only_its_own_credential(
        self, lab: Lab, token: str, kind: str | None, wanted: tuple[str, str]
    ) -> None:
        up = lab.upstream()
        extra = {"authType": kind} if kind else {}
        proxy = lab.proxy({"baseURL": up.url, "authToken": token, **extra})
        proxy.post(message(), *self.THEIRS)
        got = up.requests[0]
        seen = [got.values("x-api-key"), got.values("authorization")]
        assert seen == [[w] if w else [] for w in wanted]

    def test_passthrough_sends_the_clients_own_credential(self, lab: Lab) -> None:
        up = lab.upstream()
        proxy = lab.proxy({"baseURL": up.url, "authType": "passthrough"})
        proxy.post(message(), *self.THEIRS)
        got = up.requests[0]
        assert got.values("x-api-key") == ["of-the-client"]
        assert got.values("authorization") == ["Bearer of-the-client"]

    def test_passthrough_never_sends_the_key_for_this_proxy(self, lab: Lab) -> None:
        up = lab.upstream()
        key = uuid.uuid4().hex
        endpoint = {"baseURL": up.url, "authType": "passthrough"}
        proxy = lab.proxy(endpoint, server={"clientKeys": [key]})
        proxy.post(message(), f"x-api-key: {key}", "Authorization: Bearer my-own")
        assert up.requests[0].values("x-api-key") == []
        assert up.requests[0].values("authorization") == ["Bearer my-own"]

    def test_two_endpoints_never_see_each_others_credential(self, lab: Lab) -> None:
        ups = [lab.upstream(), lab.upstream()]
        passing = lab.upstream()
        proxy = lab.proxy(*ups, {"baseURL": passing.url, "authType": "passthrough"})
        for _ in range(6):
            proxy.post(message(), *self.THEIRS)
        for up in ups:
            heads = b"\n".join(line for r in up.requests for line in r.lines)
            assert heads.count(up.token.encode()) == 2
            assert heads.count(b"canary-") == 2
            assert b"of-the-client" not in heads
        heads = b"\n".join(line for r in passing.requests for line in r.lines)
        assert b"canary-" not in heads


BODIES = {
    "empty": b"",
    "every byte": bytes(range(256)) * 5,
    "gzip": gzip.compress(b"{}" * 99),
    "invalid UTF-8": b'{"a": "\xff\xfe\xc3"}',
    "CRLF and chunks inside": b"5\r\nhello\r\n0\r\n\r\nHTTP/1.1 200 OK\r\n\r\n",
    "300 KB": os.urandom(300_000),
    "2 MB": os.urandom(2_000_000),
}


class TestForwardingBodies:
    @pytest.mark.parametrize("label", BODIES)
    @pytest.mark.parametrize("framing", ["length", "chunked", "close"])
    def test_bodies_pass_byte_for_byte_both_ways(
        self, lab: Lab, label: str, framing: str
    ) -> None:
        body = BODIES[label]

        def answering(wire: Wire, request: Received) -> None:
            head = b"HTTP/1.1 200 OK\r\ncontent-type: a/b\r\n"
            if framing == "length":
                wire.send(head + b"content-length: %d\r\n\r\n" % len(body) + body)
            elif framing == "chunked":
                steps = [body[i : i + 70_001] for i in range(0, len(body), 70_001)]
                data = b"".join(map(chunk, steps))
                wire.send(
                    head + b"transfer-encoding: chunked\r\n\r\n" + data + b"0\r\n\r\n"
                )
            else:
                wire.send(head + b"\r\n" + body)
                wire.close()

        up = lab.upstream(answering)
        fields = ["content-encoding: gzip"] if label == "gzip" else []
        answer = lab.proxy(up).post(body, *fields)
        assert answer.status == 200
        assert answer.body == body
        assert up.requests[0].body == body
        assert up.requests[0].values("content-encoding") == [f[18:] for f in fields]

    @pytest.mark.parametrize("size", [1, 7, 4096])
    def test_chunked_request_bodies_are_decoded_and_sent_with_a_length(
        self, lab: Lab, size: int
    ) -> None:
        up = lab.upstream()
        body = message(padding="x" * 3000)
        steps = [body[i : i + size] for i in range(0, len(body), size)]
        framed = b"".join(b'%X;ext=1;q="a b"\r\n%b\r\n' % (len(s), s) for s in steps)
        client = lab.proxy(up).client()
        coding = "Transfer-Encoding: chunked"
        last = b"000;last\r\nX-Trailer: 1\r\n\r\n"
        client.ask("POST", "/v1/messages", framed + last, coding)
        assert client.answer().status == 200
        got = up.requests[0]
        assert got.body == body
        assert got.values("transfer-encoding") == []
        assert got.values("x-trailer") == []
        client.post()
        assert client.answer().status == 200

    @pytest.mark.parametrize(
        "body",
        [
            b"0x5\r\nhello\r\n0\r\n\r\n",
            b"1_0\r\n0123456789abcdef\r\n0\r\n\r\n",
            b"+5\r\nhello\r\n0\r\n\r\n",
            b"-1\r\n\r\n0\r\n\r\n",
            b"5 \r\nhello\r\n0\r\n\r\n",
            b"5\nhello\n0\n\n",
            b"5\r\nhelloXX0\r\n\r\n",
            b"\r\nhello\r\n0\r\n\r\n",
            b"fffffffffffffffff\r\n",
            b"5;a\rb\r\nhello\r\n0\r\n\r\n",
            b"5;" + b"x" * 9000,
            b"0\r\nContent-Length: 5\r\n\r\n",
            b"0\r\nbad trailer\r\n\r\n",
        ],
    )
    def test_broken_chunks_are_refused_and_reach_no_upstream(
        self, lab: Lab, body: bytes
    ) -> None:
        up = lab.upstream()
        proxy = lab.proxy(up)
        client = proxy.client()
        client.ask("POST", "/v1/messages", body, "Transfer-Encoding: chunked")
        answer = client.answer()
        own_error(answer, 400, "invalid_request_error")
        assert client.ends() in ("closed", "reset")
        assert up.requests == []
        assert proxy.row()["ended"] == "refused"

    def test_request_body_is_let_go_once_it_has_been_sent(self, lab: Lab) -> None:
        statm = Path("/proc/self/statm")
        if not statm.exists():
            pytest.skip("needs /proc")
        held = lab.gate()

        def script(wire: Wire) -> None:
            left = int(wire.head().values("content-length")[0])
            while left > 0:
                left -= len(wire.read(min(left, 65536)))
            wire.stream(START, end=False)
            assert held.wait(BOUND_S)
            wire.send(chunk(STOP) + b"0\r\n\r\n")

        proxy = lab.proxy(lab.raw(script))
        body = bytearray(60 * 1024 * 1024)
        client = proxy.client()
        page = resource.getpagesize()
        client.ask("POST", "/v1/messages", b"", f"Content-Length: {len(body)}")
        before = int(statm.read_text().split()[1]) * page
        client.sock.sendall(body)
        client.head()
        client.until(START)

        def grown() -> int:
            return int(statm.read_text().split()[1]) * page - before

        eventually(
            lambda: grown() < 40 * 1024 * 1024,
            "the memory of a 60 MiB body whose answer is streaming",
            PROMPT_S,
        )
        held.set()
        client.until(STOP)
        assert client.more() == b""


class TestForwardingPlaces:
    def test_round_robin_is_even_under_32_concurrent_clients(self, lab: Lab) -> None:
        ups = [lab.upstream() for _ in range(4)]
        proxy = lab.proxy(*ups)
        done: list[int] = []
        lock = threading.Lock()

        def run() -> None:
            client = Client(lab, proxy.port)
            for _ in range(5):
                with lock:
                    lab.counted += 1
                client.ask("POST", "/v1/messages", message(), counts=0)
                done.append(client.answer().status)
            client.close()

        for _ in range(32):
            lab.thread(run)
        eventually(lambda: len(done) == 160, "160 answers")
        assert set(done) == {200}
        assert [len(up.requests) for up in ups] == [40, 40, 40, 40]

    def test_count_tokens_takes_part_without_advancing_the_turn(self, lab: Lab) -> None:
        ups = [lab.upstream(), lab.upstream()]
        proxy = lab.proxy(*ups)
        seen = []
        for path in ("messages", "messages/count_tokens", "messages/count_tokens"):
            seen.append(proxy.ask("POST", f"/v1/{path}?beta=true", message()))
        seen.append(proxy.post())
        names = [answer.field("x-claude-lb-endpoint") for answer in seen]
        assert names == ["up0", "up0", "up1", "up1"]
        assert proxy.health()["currentEndpoint"] == 1

    @pytest.mark.parametrize("default", [False, True])
    def test_other_paths_go_to_the_default_endpoint_else_the_first_enabled(
        self, lab: Lab, default: bool
    ) -> None:
        off, first, second = lab.upstream(), lab.upstream(), lab.upstream()
        proxy = lab.proxy(
            {"baseURL": off.url, "enabled": False},
            {"baseURL": first.url},
            {"baseURL": second.url, "default": default},
        )
        for method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"):
            for path in ("files", "models", "messages/batches", "skills/x/y"):
                assert proxy.ask(method, f"/v1/{path}?a=1").status == 200
        fixed = second if default else first
        assert len(fixed.requests) == 24
        assert {r.method for r in fixed.requests} == {
            "GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"
        }  # fmt: skip
        assert off.requests == []

    def test_messages_that_name_a_file_go_to_its_maker(self, lab: Lab) -> None:
        def answering(wire: Wire, request: Received) -> None:
            made = request.target == "/v1/files"
            wire.answer(200, b'{"id": "file_abc123"}' if made else OK_BODY)

        ups = [lab.upstream(), lab.upstream(answering)]
        proxy = lab.proxy(ups[0], {"baseURL": ups[1].url, "default": True})
        proxy.ask("POST", "/v1/files", b"--x", "content-type: multipart/form-data")
        for _ in range(3):
            answer = proxy.post(message(file="file_abc123"))
            assert answer.field("x-claude-lb-endpoint") == "up1"
        assert proxy.ask("GET", "/v1/files/file_abc123").status == 200

    @pytest.mark.parametrize("streamed", [False, True])
    def test_messages_that_name_a_container_go_to_its_maker(
        self, lab: Lab, streamed: bool
    ) -> None:
        made = {"id": "container_011CQab", "expires_at": "2026-01-01"}

        def answering(wire: Wire, request: Received) -> None:
            if streamed:
                wire.stream(START, sse("message_delta", container=made), STOP)
            else:
                wire.answer(200, json.dumps({"container": made}).encode())

        ups = [lab.upstream(), lab.upstream(answering)]
        proxy = lab.proxy(*ups)
        proxy.post()
        assert proxy.post().field("x-claude-lb-endpoint") == "up1"
        proxy.rows(2)
        for _ in range(3):
            answer = proxy.post(message(container="container_011CQab"))
            assert answer.field("x-claude-lb-endpoint") == "up1"

    def test_messages_that_name_a_pinned_id_never_fail_over(self, lab: Lab) -> None:
        made = b'{"container": {"id": "container_011CQab"}}'
        maker = lab.upstream(
            lambda wire, _: wire.answer(200, made, "connection: close")
        )
        other = lab.upstream()
        proxy = lab.proxy(maker, other)
        proxy.post()
        proxy.rows(1)
        maker.close()
        answer = proxy.post(message(container="container_011CQab"))
        own_error(answer, 502, "api_error")
        assert other.requests == []

    @pytest.mark.parametrize("chunked", [False, True])
    def test_results_url_points_back_at_us_and_nothing_else_changes(
        self, lab: Lab, chunked: bool
    ) -> None:
        text = (
            '{ "id": "msgbatch_0123456", "results_url" :\t"%s/v1/messages/batches/'
            'msgbatch_0123456/results", "x": "https://a.example/v1/messages/batches/1"}'
        )
        theirs = (text % "https://api.anthropic.com").encode()

        def answering(wire: Wire, request: Received) -> None:
            if chunked:
                head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
                data = chunk(theirs[:9]) + chunk(theirs[9:]) + b"0\r\n\r\n"
                wire.send(head + b"transfer-encoding: chunked\r\n\r\n" + data)
            else:
                wire.answer(200, theirs)

        proxy = lab.proxy(lab.upstream(answering))
        for target in ("/v1/messages/batches", "/v1/messages/batches/msgbatch_0123456"):
            answer = proxy.ask("GET", target)
            ours = (text % f"http://127.0.0.1:{proxy.port}").encode()
            assert answer.body == ours

    def test_batch_answers_that_are_encoded_or_cut_pass_as_they_came(
        self, lab: Lab
    ) -> None:
        body = gzip.compress(b'{"results_url": "https://a/v1/messages/batches/b/r"}')

        def answering(wire: Wire, request: Received) -> None:
            if request.target.endswith("cut"):
                head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
                wire.send(head + b'content-length: 99\r\n\r\n{"results_url": "ht')
                wire.close()
            else:
                wire.answer(200, body, "content-encoding: gzip")

        proxy = lab.proxy(lab.upstream(answering))
        assert proxy.ask("GET", "/v1/messages/batches").body == body
        client = proxy.client().ask("GET", "/v1/messages/batches/cut")
        assert client.head().field("content-length") == "99"
        assert client.cut() == "closed"
        assert proxy.rows(2)[1]["ended"] == "truncated"

    def test_redirects_are_passed_on_and_never_followed(self, lab: Lab) -> None:
        trap = lab.upstream()
        where = f"location: {trap.url}/v1/messages"
        up = lab.upstream(lambda wire, _: wire.answer(307, b"moved", where))
        answer = lab.proxy(up).post()
        assert (answer.status, answer.body) == (307, b"moved")
        assert answer.field("location") == f"{trap.url}/v1/messages"
        assert trap.requests == []


class TestForwardingConnections:
    def test_head_requests_get_the_fields_and_no_body(self, lab: Lab) -> None:
        def answering(wire: Wire, request: Received) -> None:
            head = (
                "HTTP/1.1 200 OK\r\ncontent-type: a/b\r\ncontent-length: 1234\r\n\r\n"
            )
            wire.send(head.encode())

        client = lab.proxy(lab.upstream(answering)).client()
        for _ in range(2):
            answer = client.ask("HEAD", "/v1/models").answer("HEAD")
            assert answer.field("content-length") == "1234"
        assert client.unread() == b""

    @pytest.mark.parametrize("status", [204, 304])
    def test_answers_without_a_body_keep_the_connection(
        self, lab: Lab, status: int
    ) -> None:
        up = lab.upstream(
            lambda wire, _: wire.send(
                f"HTTP/1.1 {status} X\r\netag: x\r\n\r\n".encode()
            )
        )
        client = lab.proxy(up).client()
        for _ in range(3):
            answer = client.ask("GET", "/v1/models").answer()
            assert (answer.status, answer.body) == (status, b"")
            assert answer.values("transfer-encoding") == []
            if status == 204:
                assert answer.values("content-length") == []
        assert client.unread() == b""

    def test_expect_continue_is_answered_before_the_body_comes(self, lab: Lab) -> None:
        up = lab.upstream()
        client = lab.proxy(up).client()
        body = message()
        size = f"Content-Length: {len(body)}"
        client.ask("POST", "/v1/messages", b"", size, "Expect: 100-continue")
        assert client.head().status == 100
        client.send(body, counts=0)
        assert client.answer().status == 200
        assert up.requests[0].body == body
        assert up.requests[0].values("expect") == []

    def test_expect_continue_with_a_bad_key_gets_401_and_no_100(self, lab: Lab) -> None:
        proxy = lab.proxy(lab.upstream(), server={"clientKeys": [uuid.uuid4().hex]})
        client = proxy.client()
        size = "Content-Length: 1000"
        client.ask("POST", "/v1/messages", b"", size, "Expect: 100-continue")
        own_error(client.answer(), 401, "authentication_error")

    def test_expect_continue_with_too_long_a_body_gets_413_and_no_100(
        self, lab: Lab
    ) -> None:
        client = lab.proxy(lab.upstream()).client()
        size = f"Content-Length: {64 * 1024 * 1024 + 1}"
        client.ask("POST", "/v1/messages", b"", size, "Expect: 100-continue")
        own_error(client.answer(), 413, "request_too_large")

    def test_other_expectations_get_417(self, lab: Lab) -> None:
        client = lab.proxy(lab.upstream()).client()
        client.ask("POST", "/v1/messages", b"{}", "Expect: 200-ok")
        own_error(client.answer(), 417, "invalid_request_error")

    @pytest.mark.parametrize("framing", ["length", "chunked", "close"])
    def test_http_1_0_client_gets_plain_bytes_and_the_end(
        self, lab: Lab, framing: str
    ) -> None:
        def answering(wire: Wire, request: Received) -> None:
            if framing == "length":
                wire.answer(200, b"hello")
            elif framing == "chunked":
                head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
                wire.send(head + chunk(b"hel") + chunk(b"lo") + b"0\r\n\r\n")
            else:
                wire.send(b"HTTP/1.0 200 OK\r\n\r\nhello")
                wire.close()

        proxy = lab.proxy(lab.upstream(answering))
        client = proxy.client()
        host = f"Host: 127.0.0.1:{proxy.port}\r\n"
        expect = "Expect: 100-continue\r\nContent-Length: 2\r\n\r\n{}"
        client.send(f"POST /v1/messages HTTP/1.0\r\n{host}{expect}".encode())
        answer = client.answer()
        assert (answer.status, answer.body) == (200, b"hello")
        assert answer.values("transfer-encoding") == []
        assert client.ends() == "closed"

    def test_http_1_0_client_may_ask_to_keep_its_connection(self, lab: Lab) -> None:
        proxy = lab.proxy(lab.upstream())
        client = proxy.client()
        host = f"Host: 127.0.0.1:{proxy.port}\r\nConnection: keep-alive\r\n\r\n"
        for _ in range(2):
            client.send(f"GET /v1/models HTTP/1.0\r\n{host}".encode())
            assert client.answer().field("connection").lower() == "keep-alive"

    def test_200_pipelined_requests_are_answered_in_order(self, lab: Lab) -> None:
        up = lab.upstream(
            lambda wire, request: wire.answer(200, request.target.encode())
        )
        proxy = lab.proxy(up)
        client = proxy.client()
        host = f"Host: 127.0.0.1:{proxy.port}\r\nContent-Length: 2"
        heads = [
            f"POST /v1/files/{n} HTTP/1.1\r\n{host}\r\n\r\n{{}}" for n in range(200)
        ]
        client.send("".join(heads).encode(), counts=200)
        for n in range(200):
            assert client.answer().body == f"/v1/files/{n}".encode()
        assert len(proxy.rows(200)) == 200

    def test_absolute_form_targets_that_name_us_are_served(self, lab: Lab) -> None:
        up = lab.upstream()
        proxy = lab.proxy(up)
        here = f"127.0.0.1:{proxy.port}"
        assert proxy.ask("GET", f"http://{here}/v1/models?a=b").status == 200
        assert up.requests[0].target == "/v1/models?a=b"
        assert proxy.ask("GET", f"http://{here}/health", counts=0).status == 200

    def test_absolute_form_targets_of_others_are_refused(self, lab: Lab) -> None:
        up = lab.upstream()
        proxy = lab.proxy(up)
        answer = proxy.ask("GET", "http://169.254.169.254/v1/models")
        assert answer.status == 400
        both = ("GET", "http://evil.example/v1/models", b"", "Host: evil.example")
        assert proxy.ask(*both).status == 421
        assert up.requests == []

    def test_connection_close_is_honoured(self, lab: Lab) -> None:
        client = lab.proxy(lab.upstream()).client()
        client.post(message(), "Connection: close")
        assert client.answer().field("connection").lower() == "close"
        assert client.ends() == "closed"

    def test_connection_is_kept_by_default_in_http_1_1(self, lab: Lab) -> None:
        up = lab.upstream()
        client = lab.proxy(up).client()
        for _ in range(5):
            assert client.post().answer().values("connection") == []
        assert len(up.requests) == 5

    def test_upstream_connection_close_is_not_passed_on(self, lab: Lab) -> None:
        up = lab.upstream(lambda wire, _: wire.answer(200, b"{}", "Connection: close"))
        client = lab.proxy(up).client()
        for _ in range(3):
            assert client.post().answer().values("connection") == []

    def test_interim_answers_are_skipped(self, lab: Lab) -> None:
        interim = (
            b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 102 Processing\r\n\r\n"
            b"HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n"
        )

        def answering(wire: Wire, request: Received) -> None:
            wire.send(interim * 3)
            wire.answer(200)

        client = lab.proxy(lab.upstream(answering)).client()
        for _ in range(2):
            assert client.post().answer().body == OK_BODY

    @pytest.mark.parametrize(
        "interim",
        [b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 103 Early Hints\r\n\r\n"],
    )
    def test_interim_answer_before_the_body_is_whole_does_not_stop_the_body(
        self, lab: Lab, interim: bytes
    ) -> None:
        def script(wire: Wire) -> None:
            head = wire.head()
            wire.send(interim)
            wire.read(int(head.values("content-length")[0]))
            wire.answer(200)

        proxy = lab.proxy(lab.raw(script), timeouts={"firstByte": PROMPT_S})
        answer = proxy.post(message(padding="x" * 16_000_000))
        assert (answer.status, answer.body) == (200, OK_BODY)

    @pytest.mark.parametrize("split", [False, True])
    def test_one_empty_line_before_a_request_is_ignored(
        self, lab: Lab, split: bool
    ) -> None:
        proxy = lab.proxy(lab.upstream())
        rest = f"GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1:{proxy.port}\r\n\r\n"
        for _ in range(20):
            client = proxy.client()
            parts = ("\r", "\n", rest[:3], rest[3:]) if split else (f"\r\n{rest}",)
            for part in parts:
                client.send(part.encode(), counts=0)
                proxy.health()  # meanwhile the part has been read
            lab.counted += 1
            assert client.answer().status == 200
            client.close()


# -- 2. streaming ----------------------------------------------------------


class Pace:
    """Lets an upstream send its next event only when the client has the last."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self._turn = threading.Semaphore(0)

    def seen(self) -> None:
        self._turn.release()

    def wait(self) -> None:
        if not self._turn.acquire(timeout=BOUND_S):
            raise HungUpError


def hurry(monkeypatch: pytest.MonkeyPatch, **limits: float) -> None:
    """Lower limits of the proxy's, and sweep often enough for them."""
    for name, value in {"SWEEP_S": 0.02, **limits}.items():
        monkeypatch.setattr(claude_lb, name, value)


class TestStreaming:
    @pytest.mark.parametrize("framing", ["chunked", "close", "length"])
    @pytest.mark.parametrize("version", ["1.1", "1.0"])
    def test_next_event_is_sent_only_after_the_client_has_reported_the_last(
        self, lab: Lab, framing: str, version: str
    ) -> None:
        pace = Pace(lab)
        events = [START, *(delta(n) for n in range(50)), STOP]
        size = sum(map(len, events))

        def answering(wire: Wire, request: Received) -> None:
            field = {
                "chunked": "transfer-encoding: chunked\r\n",
                "close": "",
                "length": f"content-length: {size}\r\n",
            }[framing]
            head = f"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n{field}\r\n"
            wire.send(head.encode())
            for event in events:
                pace.wait()
                wire.send(chunk(event) if framing == "chunked" else event)
            if framing == "chunked":
                wire.send(b"0\r\n\r\n")
            elif framing == "close":
                wire.close()

        proxy = lab.proxy(lab.upstream(answering))
        client = proxy.client()
        body = message()
        head = f"POST /v1/messages HTTP/{version}\r\nHost: 127.0.0.1:{proxy.port}\r\n"
        client.send(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        client.head()
        for event in events:
            pace.seen()
            assert client.until(event) == event
        assert client.rest() == b""
        assert proxy.row()["ended"] == "ok"

    def test_r1_refusal_of_a_stream_passes_untouched_at_once(self, lab: Lab) -> None:
        error = b'{"type": "error", "error": {"type": "rate_limit_error"}}\n'
        fields = ("retry-after: 17", "anthropic-ratelimit-unified-status: rejected")
        up = lab.upstream(lambda wire, _: wire.answer(429, error, *fields))
        proxy = lab.proxy(up)
        answer = proxy.post(message(stream=True))
        assert (answer.status, answer.body) == (429, error)
        assert answer.field("retry-after") == "17"
        assert answer.field("anthropic-ratelimit-unified-status") == "rejected"
        assert proxy.row()["ended"] == "upstream_error"

    def test_r2_refused_connection_gives_502_in_the_envelope(self, lab: Lab) -> None:
        proxy = lab.proxy(lab.refusing())
        answer = proxy.post(message(stream=True))
        assert "refused" in own_error(answer, 502, "api_error")
        row = proxy.row()
        assert (row["ended"], row["status"]) == ("upstream_error", 502)

    @pytest.mark.parametrize("reset", [False, True])
    def test_r3_cut_stream_is_broken_without_a_last_chunk(
        self, lab: Lab, reset: bool
    ) -> None:
        seen = Pace(lab)

        def answering(wire: Wire, request: Received) -> None:
            wire.stream(START, delta(1), end=False)
            seen.wait()
            wire.close(reset=reset)

        proxy = lab.proxy(lab.upstream(answering), lab.upstream())
        client = proxy.client().post(message(stream=True))
        client.head()
        assert client.until(delta(1)) == START + delta(1)
        seen.seen()
        client.cut()
        row = proxy.row()
        assert (row["ended"], row["status"]) == ("truncated", 200)
        assert row["attempts"] == 1

    def test_r5_bad_json_gets_the_upstreams_400_in_its_shape(self, lab: Lab) -> None:
        error = b'{"type":"error","error":{"type":"invalid_request_error"}}'
        up = lab.upstream(lambda wire, _: wire.answer(400, error))
        proxy = lab.proxy(up)
        answer = proxy.post(b'{"model": ')
        assert (answer.status, answer.body) == (400, error)
        assert up.requests[0].body == b'{"model": '
        assert proxy.row()["ended"] == "ok"

    @pytest.mark.parametrize("framing", ["chunked", "close", "length"])
    @pytest.mark.parametrize("version", ["1.1", "1.0"])
    def test_stream_that_ends_well_without_message_stop_is_broken_too(
        self, lab: Lab, framing: str, version: str
    ) -> None:
        data = START + delta(1)

        def answering(wire: Wire, request: Received) -> None:
            if framing == "chunked":
                wire.stream(START, delta(1))
            elif framing == "close":
                wire.send(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n")
                wire.send(data)
                wire.close()
            else:
                wire.answer(200, data, "content-type: text/event-stream")

        proxy = lab.proxy(lab.upstream(answering))
        client = proxy.client()
        body = message()
        head = f"POST /v1/messages HTTP/{version}\r\nHost: 127.0.0.1:{proxy.port}\r\n"
        client.send(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        with contextlib.suppress(ConnectionResetError):
            client.head()
            how = client.cut()
            assert version == "1.1" or framing == "length" or how == "reset"
        assert proxy.row()["ended"] == "truncated"

    def test_http_1_0_client_sees_a_cut_stream_as_a_reset(self, lab: Lab) -> None:
        seen = Pace(lab)

        def answering(wire: Wire, request: Received) -> None:
            wire.stream(START, end=False)
            seen.wait()

        def script(wire: Wire) -> None:
            answering(wire, wire.request())

        proxy = lab.proxy(lab.raw(script))
        client = proxy.client()
        head = f"POST /v1/messages HTTP/1.0\r\nHost: 127.0.0.1:{proxy.port}\r\n\r\n"
        client.send(head.encode())
        client.head()
        client.until(START)
        seen.seen()
        assert client.ends() == "reset"

    def test_gzip_event_stream_passes_untouched(self, lab: Lab) -> None:
        data = gzip.compress(START + delta(1))  # and no message_stop is missed

        def answering(wire: Wire, request: Received) -> None:
            head = CHUNKED_SSE[:-2] + b"content-encoding: gzip\r\n\r\n"
            wire.send(head + chunk(data[:20]) + chunk(data[20:]) + b"0\r\n\r\n")

        proxy = lab.proxy(lab.upstream(answering))
        answer = proxy.post()
        assert answer.body == data
        assert answer.field("content-encoding") == "gzip"
        assert proxy.row()["ended"] == "ok"

    def test_byte_at_a_time_upstream_passes_byte_for_byte(self, lab: Lab) -> None:
        data = CHUNKED_SSE + b"".join(map(chunk, (START, delta(1), STOP)))

        def answering(wire: Wire, request: Received) -> None:
            wire.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for byte in data + b"0\r\n\r\n":
                wire.send(bytes([byte]))

        proxy = lab.proxy(lab.upstream(answering))
        client = proxy.client()
        for _ in range(3):
            assert client.post().answer().body == START + delta(1) + STOP
        assert {row["ended"] for row in proxy.rows(3)} == {"ok"}

    def test_events_of_a_megabyte_pass(self, lab: Lab) -> None:
        events = [START, *(delta("x" * 1_000_000) for _ in range(8)), STOP]
        up = lab.upstream(lambda wire, _: wire.stream(*events))
        assert lab.proxy(up).post().body == b"".join(events)

    def test_error_event_passes_and_the_row_says_upstream_error(self, lab: Lab) -> None:
        error = sse("error", error={"type": "overloaded_error", "message": "busy"})
        proxy = lab.proxy(lab.upstream(lambda wire, _: wire.stream(START, error)))
        assert proxy.post().body == START + error
        row = proxy.row()
        assert (row["ended"], row["status"]) == ("upstream_error", 200)

    def test_client_connection_serves_on_after_a_stream(self, lab: Lab) -> None:
        pace = Pace(lab)

        def answering(wire: Wire, request: Received) -> None:
            wire.stream(START, end=False)
            pace.wait()
            wire.send(chunk(STOP) + b"0\r\n\r\n")

        client = lab.proxy(lab.upstream(answering)).client()
        for _ in range(3):
            client.post()
            client.head()
            client.until(START)
            pace.seen()
            assert client.rest() == STOP


@at_both_ends
class TestStreamingLimits:
    def test_slow_client_makes_the_proxy_stop_reading_its_upstream(
        self, lab: Lab
    ) -> None:
        size, piece = 160 * 1024 * 1024, 65536
        digest, stuck, sent = hashlib.sha256(), threading.Event(), [0]

        def answering(wire: Wire, request: Received) -> None:
            head = b"HTTP/1.1 200 OK\r\ncontent-type: a/b\r\n"
            wire.send(head + b"content-length: %d\r\n\r\n" % size)
            for _ in range(size // piece):
                data = os.urandom(piece)
                digest.update(data)
                if not select.select([], [wire.sock], [], 0.5)[1]:
                    stuck.set()
                wire.send(data)
                sent[0] += piece

        proxy = lab.proxy(lab.upstream(answering))
        client = proxy.client()
        client.post().head()
        assert stuck.wait(BOUND_S), "160 MB went into a client that reads nothing"
        assert sent[0] < size // 2  # what the sockets' own buffers take
        got = hashlib.sha256()
        for data in iter(client.more, b""):
            got.update(data)
        assert got.digest() == digest.digest()
        assert proxy.row()["ended"] == "ok"

    def test_ping_breaks_a_silence_between_two_events(
        self, lab: Lab, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        hurry(monkeypatch, PING_S=0.05)
        held = lab.gate()

        def answering(wire: Wire, request: Received) -> None:
            wire.stream(START, end=False)
            assert held.wait(BOUND_S)
            wire.send(chunk(delta(1)) + chunk(STOP) + b"0\r\n\r\n")

        proxy = lab.proxy(lab.upstream(answering))
        client = proxy.client().post()
        client.head()
        client.until(START)
        for _ in range(3):
            assert client.until(b"\n\n").startswith(PING)
        held.set()
        rest = re.sub(rb"event: ping\ndata: [^\n]*\n\n", b"", client.rest())
        assert rest == delta(1) + STOP
        assert proxy.row()["ended"] == "ok"

    @pytest.mark.parametrize(
        "start",
        [
            CHUNKED_SSE + chunk(START) + chunk(delta(1)[:30]),
            CHUNKED_SSE + chunk(START) + chunk(delta(1))[:30],
            CHUNKED_SSE + chunk(START) + chunk(delta(1))[:-2],
            CHUNKED_SSE + chunk(START) + chunk(delta(1))[:-1],
            CHUNKED_SSE + chunk(START) + b"4",
            CHUNKED_SSE + chunk(START[:-1]),
            CHUNKED_SSE + chunk(START + b"event: ping\n"),
            CHUNKED_SSE[:-2] + b"content-encoding: gzip\r\n\r\n" + chunk(START),
            CHUNKED_SSE.replace(b"text/event-stream", b"text/plain") + chunk(START),
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
            b"content-length: 9999\r\n\r\n" + START,
        ],
    )
    def test_no_ping_goes_into_an_event_or_a_chunk_or_what_is_no_event_stream(
        self, lab: Lab, monkeypatch: pytest.MonkeyPatch, start: bytes
    ) -> None:
        hurry(monkeypatch, PING_S=0.05)
        held = lab.gate()

        def answering(wire: Wire, request: Received) -> None:
            quiet = b"quiet" in request.body
            wire.send(start if quiet else CHUNKED_SSE + chunk(START))
            assert held.wait(BOUND_S)

        proxy = lab.proxy(lab.upstream(answering))
        quiet = proxy.client().post(message(x="quiet"))
        quiet.head()
        seen = quiet.more()
        pinged = proxy.client().post()
        pinged.head()
        pinged.until(START)
        for _ in range(4):
            pinged.until(b"\n\n")  # the same sweeps went over the quiet one
        theirs = START + b"event: ping\n"
        assert PING not in (seen + quiet.unread()).replace(theirs, b"")
        for client in (quiet, pinged):
            client.close()
        proxy.rows(2)

    def test_idle_upstream_breaks_the_stream_and_pings_do_not_count(
        self, lab: Lab, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        hurry(monkeypatch, PING_S=0.05)
        gone = threading.Event()

        def script(wire: Wire) -> None:
            wire.request()
            wire.stream(START, end=False)
            wire.wait_closed()
            gone.set()

        proxy = lab.proxy(lab.raw(script), timeouts={"idle": 0.4})
        client = proxy.client().post()
        client.head()
        assert client.until(START) == START
        assert client.until(b"\n\n").startswith(PING)
        client.cut()
        assert gone.wait(PROMPT_S)
        row = proxy.row()
        assert (row["ended"], row["status"]) == ("truncated", 200)

    def test_slow_stream_is_not_idle_while_bytes_come(
        self, lab: Lab, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        hurry(monkeypatch)

        def answering(wire: Wire, request: Received) -> None:
            wire.stream(START, end=False)
            until, pause = time.monotonic() + 1.5, threading.Event()
            while time.monotonic() < until:
                wire.send(chunk(delta(1)))
                pause.wait(0.05)
            wire.send(chunk(STOP) + b"0\r\n\r\n")

        proxy = lab.proxy(lab.upstream(answering), timeouts={"idle": 1.0})
        assert proxy.post().body.endswith(STOP)
        assert proxy.row()["ended"] == "ok"

    def test_first_byte_too_late_is_answered_408_and_never_sent_again(
        self, lab: Lab
    ) -> None:
        gone = threading.Event()

        def script(wire: Wire) -> None:
            wire.request()
            wire.wait_closed()
            gone.set()

        up, other = lab.raw(script), lab.upstream()
        proxy = lab.proxy(up, other, timeouts={"firstByte": 0.2})
        answer = proxy.post()
        own_error(answer, 408, "timeout_error")
        assert answer.field("x-should-retry") == "true"
        assert gone.wait(PROMPT_S)
        assert other.requests == []
        row = proxy.row()
        assert (row["ended"], row["attempts"]) == ("upstream_error", 1)


@at_both_ends
class TestStreamingHangUps:
    """The client hangs up, and the upstream's connection is closed at once."""

    def test_hang_up_while_connecting(self, lab: Lab) -> None:
        proxy = lab.proxy(f"http://127.0.0.1:{lab.blackhole()}")
        client = proxy.client().post()
        eventually(lambda: proxy.health()["inFlight"] == 1, "the attempt")
        client.close()
        assert proxy.row()["ended"] == "client_cancelled"

    def test_hang_up_while_a_proxy_makes_the_tunnel(self, lab: Lab) -> None:
        asked, gone = threading.Event(), threading.Event()

        def script(wire: Wire) -> None:
            wire.sock.recv(1)
            asked.set()
            wire.wait_closed()
            gone.set()

        tunnel = f"http://{lab.raw(script).authority}"
        endpoint = {"baseURL": "https://up.example", "proxy": tunnel}
        proxy = lab.proxy(endpoint)
        client = proxy.client().post()
        eventually(lambda: proxy.health()["inFlight"] == 1, "the attempt")
        assert asked.wait(BOUND_S)
        client.close()
        assert proxy.row()["ended"] == "client_cancelled"
        assert gone.wait(PROMPT_S)

    def test_hang_up_while_tls_is_agreed(self, lab: Lab) -> None:
        proxy = lab.proxy(
            lab.raw(Wire.wait_closed).url.replace("http:", "https:"),
        )
        client = proxy.client().post()
        eventually(lambda: proxy.health()["inFlight"] == 1, "the attempt")
        client.close()
        assert proxy.row()["ended"] == "client_cancelled"

    def test_hang_up_while_the_body_comes_from_the_client(self, lab: Lab) -> None:
        up = lab.upstream()
        proxy = lab.proxy(up)
        client = proxy.client()
        client.ask("POST", "/v1/messages", b"half", "Content-Length: 100")
        client.close()
        assert proxy.row()["ended"] == "client_cancelled"
        assert up.requests == []

    @pytest.mark.parametrize("reset", [False, True])
    def test_hang_up_while_the_body_goes_to_the_upstream(
        self, lab: Lab, reset: bool
    ) -> None:
        begun, left, gone = threading.Event(), lab.gate(), threading.Event()

        def script(wire: Wire) -> None:
            wire.head()
            begun.set()
            assert left.wait(BOUND_S)
            wire.wait_closed()
            gone.set()

        up = lab.raw(script)
        proxy = lab.proxy(up)
        client = proxy.client().post(message(padding="x" * 30_000_000))
        assert begun.wait(BOUND_S)
        client.close(reset=reset)
        assert proxy.row()["ended"] == "client_cancelled"
        left.set()
        assert gone.wait(PROMPT_S)
        assert up.requests == []

    @pytest.mark.parametrize("how", ["close", "reset", "half"])
    @pytest.mark.parametrize("phase", ["before the head", "in the head", "mid-stream"])
    def test_hang_up_while_the_answer_is_awaited_or_streams(
        self, lab: Lab, how: str, phase: str
    ) -> None:
        begun, gone = threading.Event(), threading.Event()

        def script(wire: Wire) -> None:
            wire.request()
            if phase == "mid-stream":
                wire.stream(START, end=False)
            elif phase == "in the head":
                wire.send(b"HTTP/1.1 200 OK\r\ncontent-")
            begun.set()
            wire.wait_closed()
            gone.set()

        proxy = lab.proxy(lab.raw(script))
        client = proxy.client().post()
        assert begun.wait(BOUND_S)
        if phase == "mid-stream":
            client.head()
            client.until(START)
        if how == "half":  # in design.md section 6 a FIN is a hang-up, as in nginx
            client.sock.shutdown(socket.SHUT_WR)
        else:
            client.close(reset=how == "reset")
        assert gone.wait(PROMPT_S)
        row = proxy.row()
        assert row["ended"] == "client_cancelled"
        assert row["status"] == (200 if phase == "mid-stream" else 0)
        assert proxy.health()["inFlight"] == 0

    def test_hang_up_while_a_batch_answer_is_edited(self, lab: Lab) -> None:
        begun, gone = threading.Event(), threading.Event()

        def script(wire: Wire) -> None:
            wire.request()
            head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
            wire.send(head + b"content-length: 100\r\n\r\n{")
            begun.set()
            wire.wait_closed()
            gone.set()

        proxy = lab.proxy(lab.raw(script))
        client = proxy.client().ask("GET", "/v1/messages/batches")
        assert begun.wait(BOUND_S)
        client.close()
        assert gone.wait(PROMPT_S)
        assert proxy.row()["ended"] == "client_cancelled"

    def test_hang_up_while_the_client_reads_nothing(self, lab: Lab) -> None:
        stuck, gone = threading.Event(), threading.Event()

        def script(wire: Wire) -> None:
            wire.request()
            wire.send(CHUNKED_SSE)
            try:
                while True:
                    if not select.select([], [wire.sock], [], 0.2)[1]:
                        stuck.set()
                    wire.send(chunk(delta("x" * 100_000)))
            finally:
                gone.set()

        proxy = lab.proxy(lab.raw(script))
        client = proxy.client().post()
        client.head()
        assert stuck.wait(BOUND_S)
        client.close()
        assert gone.wait(PROMPT_S)
        assert proxy.row()["ended"] == "client_cancelled"


# -- 3. the fault matrix ---------------------------------------------------
#
# The number in a name is the row's.  The lab asserts the ledger invariant.


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a CA, and a certificate for each way to be wrong."""
    tool, folder = need("openssl"), tmp_path_factory.mktemp("certificates")

    def run(*arguments: str) -> None:
        done = subprocess.run(
            [tool, *arguments], cwd=folder, capture_output=True, check=False
        )
        assert done.returncode == 0, done.stderr.decode()

    (folder / "ca.cnf").write_text(
        "[ca]\ndefault_ca=d\n[d]\ndatabase=index\nserial=serial\nnew_certs_dir=.\n"
        "default_md=sha256\npolicy=p\nunique_subject=no\ncopy_extensions=copy\n"
        "x509_extensions=leaf\n[leaf]\nauthorityKeyIdentifier=keyid\n"
        "[p]\ncommonName=supplied\n"
        "[req]\ndistinguished_name=n\n[n]\n[v3]\nbasicConstraints=critical,CA:TRUE\n"
        # Python 3.13 looks for these (X509_V_FLAG_X509_STRICT)
        "keyUsage=critical,keyCertSign,cRLSign\nsubjectKeyIdentifier=hash\n"
    )
    (folder / "index").touch()
    (folder / "serial").write_text("1000\n")
    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    for name in ("ca", "stranger"):
        run(
            "req", "-x509", *key, "-days", "9", "-subj", f"/CN={name}", "-config",
            "ca.cnf", "-extensions", "v3", "-keyout", f"{name}.key", "-out",
            f"{name}.pem",
        )  # fmt: skip
    dates = {"expired": ("20200101", "20210101"), "early": ("20900101", "20910101")}
    for name in ("good", "expired", "early", "wrong", "unknown"):
        (folder / f"{name}.cnf").write_text(
            "[req]\ndistinguished_name=n\nreq_extensions=e\n[n]\n[e]\nsubjectAltName="
            + ("DNS:other.example" if name == "wrong" else "IP:127.0.0.1")
        )
        run(
            "req", "-new", *key, "-subj", "/CN=up", "-config", f"{name}.cnf",
            "-keyout", f"{name}.key", "-out", f"{name}.csr",
        )  # fmt: skip
        start, end = dates.get(name, ("20200101", "20900101"))
        ca = "stranger" if name == "unknown" else "ca"
        run(
            "ca", "-batch", "-config", "ca.cnf", "-cert", f"{ca}.pem", "-keyfile",
            f"{ca}.key", "-startdate", f"{start}000000Z", "-enddate",
            f"{end}000000Z", "-in", f"{name}.csr", "-out", f"{name}.pem", "-notext",
        )  # fmt: skip
    return folder


def tls_upstream(
    lab: Lab, folder: Path, answering: Answering = fine, name: str = "good"
) -> tuple[ScriptedUpstream, dict[str, Any]]:
    """Return an upstream with a certificate, and the endpoint that trusts its CA."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / f"{name}.pem", folder / f"{name}.key")
    up = lab.upstream(answering, tls=context)
    ca = str(folder / "ca.pem")
    return up, {"baseURL": up.url, "authToken": up.token, "caFile": ca}


def check_failed_over(proxy: Proxy) -> None:
    """One answer from the second endpoint, one row, two attempts."""
    answer = proxy.post()
    assert (answer.status, answer.body) == (200, OK_BODY)
    assert answer.field("x-claude-lb-endpoint") == "up1"
    row = proxy.row()
    assert (row["ended"], row["attempts"], row["endpoint"]) == ("ok", 2, "up1")


def check_broken(proxy: Proxy) -> None:
    """The commit has happened; the client sees a cut, and nothing is sent again."""
    client = proxy.client().post()
    assert client.head().status == 200
    client.cut()
    row = proxy.row()
    assert (row["ended"], row["attempts"]) == ("truncated", 1)


def check_502(proxy: Proxy, *, retry: bool | None = None) -> str:
    answer = proxy.post()
    told = own_error(answer, 502, "api_error")
    if retry is not None:
        assert answer.field("x-should-retry") == ("true" if retry else "")
    row = proxy.row()
    assert (row["ended"], row["status"]) == ("upstream_error", 502)
    return told


@at_both_ends
class TestFaultMatrixConnection:
    def test_row_1_refused_connection_goes_to_the_next_endpoint(self, lab: Lab) -> None:
        check_failed_over(lab.proxy(lab.refusing(), lab.upstream()))

    def test_row_2_blackholed_connect_ends_in_time_and_goes_on(self, lab: Lab) -> None:
        dead = f"http://127.0.0.1:{lab.blackhole()}"
        check_failed_over(lab.proxy(dead, lab.upstream(), timeouts={"connect": 0.3}))

    def test_row_3_reset_on_accept_is_never_sent_twice(self, lab: Lab) -> None:
        # Whether the request went out whole before the reset is a race: both
        # answers are right, a second generation never is.
        bad = lab.raw(lambda wire: wire.close(reset=True))
        proxy = lab.proxy(bad, lab.upstream())
        answer = proxy.post()
        assert answer.status in (200, 502)
        assert proxy.row()["ended"] in ("ok", "upstream_error")

    def test_row_4_crawling_network_completes_without_a_second_send(
        self, lab: Lab
    ) -> None:
        # Packet loss needs a network namespace; what it does to a socket is this.
        def script(wire: Wire) -> None:
            wire.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            for byte in wire.request().body[:0] or CHUNKED_SSE + chunk(START + STOP):
                wire.send(bytes([byte]))
            wire.send(b"0\r\n\r\n")

        up = lab.raw(script)
        proxy = lab.proxy(up, lab.upstream())
        assert proxy.post(message(padding="x" * 60_000)).body == START + STOP
        assert len(up.requests) == 1
        assert proxy.row()["attempts"] == 1

    @pytest.mark.parametrize(
        "last",
        [
            b"",
            b"reset",
            b"HTTP/1.1 200 EVIL\r\ncontent-length: 4\r\n\r\nEVIL",
            b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\n\r\n",
        ],
        ids=["row 6 FIN", "row 7 RST", "row 9 unasked answer", "row 10 a 408"],
    )
    def test_rows_6_7_9_10_pooled_connection_that_has_spoken_or_died_is_discarded(
        self, lab: Lab, last: bytes
    ) -> None:
        over = threading.Event()

        def script(wire: Wire) -> None:
            while True:
                wire.request()
                wire.answer(200)
                if len(up.requests) == 1:
                    break
            if last != b"reset":
                wire.send(last)
            if not last or last[9:12] == b"408" or last == b"reset":
                wire.close(reset=last == b"reset")
            over.set()
            wire.wait_closed()

        up = lab.raw(script)
        proxy = lab.proxy(up)
        assert proxy.post().status == 200
        assert over.wait(BOUND_S)
        answer = proxy.post()
        assert (answer.status, answer.body) == (200, OK_BODY)
        assert [row["attempts"] for row in proxy.rows(2)] == [1, 1]

    @pytest.mark.parametrize("reset", [False, True])
    @pytest.mark.parametrize("reused", [False, True])
    def test_row_8_connection_that_dies_unanswered_is_502_and_not_sent_again(
        self, lab: Lab, reset: bool, reused: bool
    ) -> None:
        def answering(wire: Wire, request: Received) -> None:
            if b"die" in request.body:
                wire.close(reset=reset)
            else:
                wire.answer(200)

        up, other = lab.upstream(answering), lab.upstream()
        proxy = lab.proxy(up, other)
        if reused:
            for _ in range(2):
                assert proxy.post().status == 200
        answer = proxy.post(message(x="die"))
        own_error(answer, 502, "api_error")
        assert answer.field("x-should-retry") == "true"
        assert len(other.requests) == int(reused)
        assert proxy.rows(1 + 2 * int(reused))[-1]["ended"] == "upstream_error"

    @pytest.mark.parametrize("method", ["GET", "POST"])
    def test_row_8_free_requests_are_sent_once_more_on_a_fresh_connection(
        self, lab: Lab, method: str
    ) -> None:
        def answering(wire: Wire, request: Received) -> None:
            if len(up.requests) == 2:
                wire.close()
            else:
                wire.answer(200)

        up = lab.upstream(answering)
        proxy = lab.proxy(up)
        path = "/v1/models" if method == "GET" else "/v1/messages/count_tokens"
        assert proxy.post().status == 200
        assert proxy.ask(method, path).status == 200
        assert len(up.requests) == 3

    def test_row_11_peer_that_vanishes_mid_stream_ends_it_at_the_idle_limit(
        self, lab: Lab, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # A silent peer: without a network namespace no packet can be lost.
        hurry(monkeypatch)
        held = lab.gate()

        def answering(wire: Wire, request: Received) -> None:
            wire.stream(START, end=False)
            assert held.wait(BOUND_S)

        check_broken(lab.proxy(lab.upstream(answering), timeouts={"idle": 0.3}))

    @pytest.mark.parametrize("wrong", ["expired", "early", "wrong", "unknown"])
    def test_row_14_bad_certificate_is_502_and_nothing_is_sent(
        self, lab: Lab, certificates: Path, wrong: str
    ) -> None:
        up, endpoint = tls_upstream(lab, certificates, name=wrong)
        proxy = lab.proxy(endpoint)
        assert "certificate" in check_502(proxy)
        assert up.requests == []
        assert proxy.health()["status"] == "unhealthy"
        assert "certificate" in json.dumps(proxy.health())

    def test_row_14_good_certificate_serves_and_is_reused(
        self, lab: Lab, certificates: Path
    ) -> None:
        up, endpoint = tls_upstream(lab, certificates)
        proxy = lab.proxy(endpoint)
        client = proxy.client()
        body = message(padding="x" * 3_000_000)
        for sent in (message(), body, message()):
            assert client.post(sent).answer().body == OK_BODY
        assert up.requests[1].body == body

    @pytest.mark.parametrize("framing", ["chunked", "close", "length"])
    def test_row_15_tls_cut_without_close_notify_is_truncated(
        self, lab: Lab, certificates: Path, framing: str
    ) -> None:
        def answering(wire: Wire, request: Received) -> None:
            head = b"HTTP/1.1 200 OK\r\ncontent-type: a/b\r\n"
            if framing == "chunked":
                wire.send(CHUNKED_SSE + chunk(START))
            elif framing == "close":
                wire.send(head + b"\r\nhello")
            else:
                wire.send(head + b"content-length: 10\r\n\r\nhello")
            wire.close()  # an SSLSocket's close says no goodbye

        _, endpoint = tls_upstream(lab, certificates, answering)
        check_broken(lab.proxy(endpoint))

    def test_row_15_tls_end_with_close_notify_is_a_good_end(
        self, lab: Lab, certificates: Path
    ) -> None:
        def answering(wire: Wire, request: Received) -> None:
            wire.send(b"HTTP/1.1 200 OK\r\ncontent-type: a/b\r\n\r\nhello")
            assert isinstance(wire.sock, ssl.SSLSocket)
            wire.sock.unwrap()

        _, endpoint = tls_upstream(lab, certificates, answering)
        assert lab.proxy(endpoint).post().body == b"hello"

    def test_row_16_stalled_tls_handshake_goes_to_the_next_endpoint(
        self, lab: Lab, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        hurry(monkeypatch, TLS_S=0.2)
        stalled = lab.raw(Wire.wait_closed).url.replace("http:", "https:")
        check_failed_over(lab.proxy(stalled, lab.upstream()))

    def test_row_20_dead_address_delays_by_250_ms_and_not_by_the_limit(
        self, lab: Lab, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # The resolver is the seam: it names a dead address before the live one.
        up, dead = lab.upstream(), lab.blackhole()
        resolve = socket.getaddrinfo

        def resolving(host: Any, *more: Any, **named: Any) -> Any:
            if host != "up.example":
                return resolve(host, *more, **named)
            kind = (socket.AF_INET, socket.SOCK_STREAM, 6, "")
            return [(*kind, ("127.0.0.1", port)) for port in (dead, up.port)]

        monkeypatch.setattr(socket, "getaddrinfo", resolving)
        url = {"baseURL": f"http://up.example:{up.port}", "allowHttp": True}
        proxy = lab.proxy(url)  # connecting may take 60 s: the test may not
        client = proxy.client()
        client.sock.settimeout(PROMPT_S)
        assert client.post().answer().status == 200

    def test_row_21_upstream_on_v6_loopback_gets_a_bracketed_host(
        self, lab: Lab
    ) -> None:
        try:
            up = lab.upstream(host="::1")
        except OSError:
            pytest.skip("this machine has no IPv6 loopback")
        assert lab.proxy(up).post().status == 200
        assert up.requests[0].values("host") == [f"[::1]:{up.port}"]

    @pytest.mark.parametrize("kind", ["dead", "407", "silent", "closing", "junk"])
    def test_row_22_connect_proxy_that_fails_is_502_and_sees_no_key(
        self, lab: Lab, kind: str
    ) -> None:
        heads = []

        def script(wire: Wire) -> None:
            heads.append(wire.head())
            said = {"407": b"HTTP/1.1 407 No\r\nContent-Length: 0\r\n\r\n"}
            if kind == "silent":
                wire.wait_closed()
            wire.send(said.get(kind, b"\x00\xff\r\n\r\n" if kind == "junk" else b""))

        url = lab.refusing() if kind == "dead" else lab.raw(script).url
        url = url.replace("http://", "http://user:canary-of-the-tunnel@")
        source = Source(url)
        proxy = lab.proxy(
            "https://up.example", source=source, timeouts={"connect": 0.5}
        )
        told = check_502(proxy)
        assert "canary" not in told + proxy.log()
        for head in heads:
            assert head.method == "CONNECT"
            assert head.target == "up.example:443"
            assert b"canary" not in b"\n".join(head.lines)

    def test_row_22_tunnel_carries_tls_to_the_endpoint(
        self, lab: Lab, certificates: Path
    ) -> None:
        up, endpoint = tls_upstream(lab, certificates)
        heads = []

        def script(wire: Wire) -> None:
            heads.append(wire.head())
            wire.send(b"HTTP/1.1 200 Connection established\r\n\r\n")
            with socket.create_connection(("127.0.0.1", up.port), BOUND_S) as far:
                pair = {wire.sock: far, far: wire.sock}
                while True:
                    for sock in select.select(list(pair), [], [])[0]:
                        data = sock.recv(65536)
                        if not data:
                            return
                        pair[sock].sendall(data)

        tunnel = f"http://user:pw@{lab.raw(script).authority}"
        assert lab.proxy({**endpoint, "proxy": tunnel}).post().status == 200
        assert heads[0].values("proxy-authorization") == ["Basic dXNlcjpwdw=="]

    def test_row_22_proxy_of_the_environment_is_never_used_for_loopback(
        self, lab: Lab, certificates: Path
    ) -> None:
        _, endpoint = tls_upstream(lab, certificates)
        proxy = lab.proxy(endpoint, lab.upstream(), source=Source(lab.refusing()))
        assert [proxy.post().status for _ in range(2)] == [200, 200]


BAD_ANSWER_HEADS = {
    "junk": b"\x00\x01\x02\x03\r\n\r\n",
    "HTTP/0.9": b"<p>hello</p>\r\n\r\n",
    "HTTP/2": b"HTTP/2.0 200 OK\r\n\r\n",
    "lower case": b"http/1.1 200 OK\r\n\r\n",
    "no status": b"HTTP/1.1 OK\r\n\r\n",
    "status 99": b"HTTP/1.1 99 X\r\n\r\n",
    "status 1000": b"HTTP/1.1 1000 X\r\n\r\n",
    "status +20": b"HTTP/1.1 +20 X\r\n\r\n",
    "NUL in reason": b"HTTP/1.1 200 O\x00K\r\n\r\n",
    "500 fields": b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 500 + b"\r\n",
    "70 KB field": b"HTTP/1.1 200 OK\r\nx: " + b"y" * 70_000 + b"\r\n\r\n",
    "200 KB head": b"HTTP/1.1 200 OK\r\n" + (b"x: %b\r\n" % (b"y" * 50_000)) * 4,
    "bare CR": b"HTTP/1.1 200 OK\r\nx: a\rset-cookie: b\r\n\r\n",
    "bare LF": b"HTTP/1.1 200 OK\nx: a\nset-cookie: b\n\n\r\n\r\n",
    "NUL": b"HTTP/1.1 200 OK\r\nx: a\x00b\r\n\r\n",
    "ESC": b"HTTP/1.1 200 OK\r\nx: a\x1b[2Jb\r\n\r\n",
    "obs-fold": b"HTTP/1.1 200 OK\r\nx: a\r\n b\r\n\r\n",
    "no colon": b"HTTP/1.1 200 OK\r\nnonsense\r\n\r\n",
    "no name": b"HTTP/1.1 200 OK\r\n: nonsense\r\n\r\n",
    "space before colon": b"HTTP/1.1 200 OK\r\ncontent-length : 5\r\n\r\n",
    "leading space": b"HTTP/1.1 200 OK\r\n x: y\r\n\r\n",
}
BAD_FRAMING = {
    "CL+TE": b"content-length: 5\r\ntransfer-encoding: chunked",
    "two CL": b"content-length: 5\r\ncontent-length: 6",
    "CL list": b"content-length: 5, 6",
    "CL +5": b"content-length: +5",
    "CL -1": b"content-length: -1",
    "CL 1_0": b"content-length: 1_0",
    "CL 0x5": b"content-length: 0x5",
    "CL empty": b"content-length:",
    "CL huge": b"content-length: " + b"9" * 40,
    "CL superscript": b"content-length: \xb2",
    "TE gzip": b"transfer-encoding: gzip, chunked",
    "TE twice": b"transfer-encoding: chunked\r\ntransfer-encoding: chunked",
    "TE xchunked": b"transfer-encoding: xchunked",
    "TE parameter": b"transfer-encoding: chunked;q=1",
}
BAD_CHUNKS = [b"0x5", b"1_0", b"-1", b"+5", b"5 5", b"", b"g", b"\xb2", b"f" * 17]


@at_both_ends
class TestFaultMatrixAnswer:
    @pytest.mark.parametrize(
        "tail",
        [
            b"5\r\nhel",
            b"5\r\nhello",
            b"5\r\nhello\r\n",
            b"5\r\nhello\r\n0",
            b"5\r\nhello\r\n0\r\n",
            b"5\r\nhello\r\n0\r\nx: y\r\n",
        ],
    )
    def test_row_29_end_in_the_middle_of_chunks_breaks_the_answer(
        self, lab: Lab, tail: bytes
    ) -> None:
        head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"

        def answering(wire: Wire, request: Received) -> None:
            wire.send(head + tail)
            wire.close()

        check_broken(lab.proxy(lab.upstream(answering), lab.upstream()))

    @pytest.mark.parametrize("kind", ["application/json", "text/event-stream", "a/b"])
    def test_row_30_short_content_length_breaks_the_answer(
        self, lab: Lab, kind: str
    ) -> None:
        def answering(wire: Wire, request: Received) -> None:
            head = f"HTTP/1.1 200 OK\r\ncontent-type: {kind}\r\ncontent-length: 99\r\n"
            wire.send(f"{head}\r\n{{}}".encode())
            wire.close()

        check_broken(lab.proxy(lab.upstream(answering), lab.upstream()))

    def test_row_31_reset_mid_stream_breaks_the_answer(self, lab: Lab) -> None:
        def answering(wire: Wire, request: Received) -> None:
            wire.stream(START, end=False)
            wire.close(reset=True)

        # A reset may overtake what was sent: then nothing was committed.
        proxy = lab.proxy(lab.upstream(answering))
        client = proxy.client().post()
        if client.head().status == 200:
            client.cut()
        assert proxy.row()["ended"] in ("truncated", "upstream_error")

    def test_row_32_silence_after_the_head_ends_at_the_idle_limit(
        self, lab: Lab, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        hurry(monkeypatch, PING_S=0.05)
        held = lab.gate()

        def answering(wire: Wire, request: Received) -> None:
            wire.send(CHUNKED_SSE)
            assert held.wait(BOUND_S)

        proxy = lab.proxy(lab.upstream(answering), timeouts={"idle": 0.4})
        client = proxy.client().post()
        client.head()
        assert client.until(b"\n\n").startswith(PING)
        client.cut()
        assert proxy.row()["ended"] == "truncated"

    def test_row_33_line_without_end_is_not_waited_for(self, lab: Lab) -> None:
        pace = Pace(lab)

        def answering(wire: Wire, request: Received) -> None:
            wire.send(CHUNKED_SSE)
            for byte in b"data: a line":
                pace.wait()
                wire.send(chunk(bytes([byte])))
            wire.send(chunk(b"\n\n" + STOP) + b"0\r\n\r\n")

        client = lab.proxy(lab.upstream(answering)).client().post()
        client.head()
        for byte in b"data: a line":
            pace.seen()
            assert client.more() == bytes([byte])
        assert client.rest() == b"\n\n" + STOP

    def test_row_34_event_of_100_mb_passes_in_bounded_memory(self, lab: Lab) -> None:
        statm = Path("/proc/self/statm")
        if not statm.exists():
            pytest.skip("needs /proc")
        piece = chunk(b"x" * 65_536)

        def answering(wire: Wire, request: Received) -> None:
            wire.send(CHUNKED_SSE + chunk(b"data: "))
            for _ in range(1600):
                wire.send(piece)
            wire.send(chunk(b"\n\n" + STOP) + b"0\r\n\r\n")

        proxy = lab.proxy(lab.upstream(answering))
        client = proxy.client().post()
        client.head()
        before, most, size = int(statm.read_text().split()[1]), 0, 0
        for data in iter(client.more, b""):
            size += len(data)
            if size % (1 << 22) < 65_536:
                most = max(most, int(statm.read_text().split()[1]) - before)
        assert size == 6 + 1600 * 65_536 + 2 + len(STOP)
        assert most * resource.getpagesize() < 32 * 1024 * 1024

    @pytest.mark.parametrize("label", BAD_FRAMING)
    def test_row_35_doubtful_framing_is_502_and_the_connection_is_dropped(
        self, lab: Lab, label: str
    ) -> None:
        dropped = threading.Event()

        def script(wire: Wire) -> None:
            wire.request()
            wire.send(b"HTTP/1.1 200 OK\r\n%b\r\n\r\nhello" % BAD_FRAMING[label])
            wire.wait_closed()
            dropped.set()

        check_502(lab.proxy(lab.raw(script), lab.upstream()))
        assert dropped.wait(PROMPT_S)

    @pytest.mark.parametrize("size", BAD_CHUNKS)
    def test_row_35_doubtful_chunk_size_breaks_the_answer(
        self, lab: Lab, size: bytes
    ) -> None:
        head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
        up = lab.upstream(
            lambda wire, _: wire.send(head + chunk(b"a") + size + b"\r\nhello\r\n")
        )
        check_broken(lab.proxy(up))

    def test_row_36_ten_interim_answers_are_skipped_and_no_more(self, lab: Lab) -> None:
        def answering(wire: Wire, request: Received) -> None:
            count = 11 if b"eleven" in request.body else 10
            wire.send(b"HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n" * count)
            wire.answer(200)

        proxy = lab.proxy(lab.upstream(answering))
        assert proxy.post().body == OK_BODY
        own_error(proxy.post(message(x="eleven")), 502, "api_error")

    def test_row_37_unasked_upgrade_is_502(self, lab: Lab) -> None:
        said = b"HTTP/1.1 101 Switching\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n"
        up = lab.upstream(lambda wire, _: wire.send(said))
        check_502(lab.proxy(up, lab.upstream()))

    @pytest.mark.parametrize("late", [False, True])
    @pytest.mark.parametrize("case", ["204", "304", "HEAD"])
    def test_row_38_body_where_none_belongs_is_dropped_with_its_connection(
        self, lab: Lab, case: str, late: bool
    ) -> None:
        go, sent = lab.gate(), threading.Event()
        evil = b"HTTP/1.1 200 EVIL\r\ncontent-length: 4\r\n\r\nEVIL"

        def answering(wire: Wire, request: Received) -> None:
            if len(up.requests) > 1:
                wire.answer(200)
                return
            status = "200" if case == "HEAD" else case
            head = (
                f"HTTP/1.1 {status} X\r\ncontent-length: {len(evil)}\r\n\r\n".encode()
            )
            wire.send(head if late else head + evil)
            if late:
                assert go.wait(BOUND_S)
                wire.send(evil)
            sent.set()

        up = lab.upstream(answering)
        client = lab.proxy(up).client()
        method = "HEAD" if case == "HEAD" else "GET"
        assert client.ask(method, "/v1/models").answer(method).body == b""
        go.set()
        assert sent.wait(BOUND_S)
        assert client.ask("GET", "/v1/models").answer().body == OK_BODY

    @pytest.mark.parametrize("label", BAD_ANSWER_HEADS)
    def test_rows_39_40_malformed_answer_head_is_502_in_the_envelope(
        self, lab: Lab, label: str
    ) -> None:
        def answering(wire: Wire, request: Received) -> None:
            wire.send(BAD_ANSWER_HEADS[label])
            wire.close()

        check_502(lab.proxy(lab.upstream(answering), lab.upstream()))

    def test_row_40_empty_answer_is_502(self, lab: Lab) -> None:
        up = lab.upstream(lambda wire, _: wire.close())
        check_502(lab.proxy(up, lab.upstream()), retry=True)

    @pytest.mark.parametrize("coding", ["gzip", "br", "zstd"])
    def test_row_41_encoded_body_passes_undecoded(self, lab: Lab, coding: str) -> None:
        bomb = gzip.compress(b"\0" * 20_000_000)
        up = lab.upstream(
            lambda wire, _: wire.answer(200, bomb, f"content-encoding: {coding}")
        )
        answer = lab.proxy(up).post()
        assert answer.body == bomb
        assert answer.field("content-encoding") == coding

    @pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
    def test_row_42_redirects_pass_and_the_key_goes_nowhere(
        self, lab: Lab, status: int
    ) -> None:
        trap = lab.upstream()
        up = lab.upstream(
            lambda wire, _: wire.answer(status, b"", f"location: {trap.url}/v1/x")
        )
        answer = lab.proxy(up).post()
        assert answer.status == status
        assert answer.field("location") == f"{trap.url}/v1/x"
        assert trap.requests == []

    @pytest.mark.parametrize("framing", ["length", "chunked", "close"])
    def test_row_43_web_page_where_a_message_belongs_is_502(
        self, lab: Lab, framing: str
    ) -> None:
        def answering(wire: Wire, request: Received) -> None:
            head = b"HTTP/1.1 200 OK\r\ncontent-type: text/html; charset=x\r\n"
            if framing == "length":
                wire.send(head + b"content-length: 7\r\n\r\n<html/>")
            elif framing == "chunked":
                head += b"transfer-encoding: chunked\r\n\r\n"
                wire.send(head + chunk(b"<html/>") + b"0\r\n\r\n")
            else:
                wire.send(head + b"\r\n<html/>")
                wire.close()

        proxy = lab.proxy(lab.upstream(answering))
        check_502(proxy)
        assert proxy.health()["status"] == "unhealthy"

    @pytest.mark.parametrize(
        "body",
        [
            b'{"id": "\xff\xfe"}',
            b'{"id": NaN, "x": Infinity}',
            b"[" * 200_000,
            b'{"a":' * 100_000,
            b'{"n": ' + b"9" * 10_000 + b"}",
            b"",
            b"null",
            b"\xef\xbb\xbf{}",
        ],
        ids=["utf-8", "nan", "deep", "deep objects", "int", "empty", "null", "bom"],
    )
    @pytest.mark.parametrize("target", ["/v1/messages", "/v1/messages/batches"])
    def test_row_44_odd_json_passes_byte_for_byte_both_ways(
        self, lab: Lab, body: bytes, target: str
    ) -> None:
        up = lab.upstream(lambda wire, _: wire.answer(200, body))
        proxy = lab.proxy(up)
        answer = proxy.ask("POST", target, body, "content-type: application/json")
        assert (answer.status, answer.body) == (200, body)
        assert up.requests[0].body == body

    @pytest.mark.parametrize("status", [401, 413, 429, 500])
    @pytest.mark.parametrize("reset", [False, True])
    def test_row_45_early_answer_during_the_upload_is_relayed(
        self, lab: Lab, status: int, reset: bool
    ) -> None:
        error = b'{"type": "error", "error": {"type": "x", "message": "y"}}'
        relayed = lab.gate()

        def script(wire: Wire) -> None:
            wire.head()
            wire.answer(status, error, "connection: close")
            if reset:
                assert relayed.wait(BOUND_S)
            wire.close(reset=reset)

        other = lab.upstream()
        proxy = lab.proxy(lab.raw(script), other)
        client = proxy.client().post(message(padding="x" * 30_000_000))
        answer = client.head()
        assert answer.status == status
        assert client.rest() == error
        relayed.set()
        assert other.requests == []
        proxy.rows(1)


@at_both_ends
class TestFaultMatrixClient:
    def test_row_46_twenty_clients_vanish_while_the_upstream_is_silent(
        self, lab: Lab
    ) -> None:
        begun, gone = threading.Semaphore(0), threading.Semaphore(0)

        def script(wire: Wire) -> None:
            wire.request()
            begun.release()
            wire.wait_closed()
            gone.release()

        proxy = lab.proxy(lab.raw(script))
        clients = [proxy.client().post() for _ in range(20)]
        assert all(begun.acquire(timeout=BOUND_S) for _ in clients)
        for client in clients:
            client.close()
        assert all(gone.acquire(timeout=PROMPT_S) for _ in clients)
        assert {r["ended"] for r in proxy.rows(20)} == {"client_cancelled"}

    def test_row_47_half_close_while_we_work_is_a_hang_up(self, lab: Lab) -> None:
        # design.md section 6 is binding over the matrix here: as in nginx.
        begun, gone = threading.Event(), threading.Event()

        def script(wire: Wire) -> None:
            wire.request()
            begun.set()
            wire.wait_closed()
            gone.set()

        proxy = lab.proxy(lab.raw(script))
        client = proxy.client().post()
        assert begun.wait(BOUND_S)
        client.sock.shutdown(socket.SHUT_WR)
        assert gone.wait(PROMPT_S)
        assert proxy.row()["ended"] == "client_cancelled"

    def test_row_48_client_that_stops_reading_is_closed_with_its_upstream(
        self, lab: Lab, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        hurry(monkeypatch, CLIENT_STALL_S=0.3)
        gone = threading.Event()

        def script(wire: Wire) -> None:
            wire.request()
            wire.send(CHUNKED_SSE)
            try:
                while True:
                    wire.send(chunk(delta("x" * 100_000)))
            finally:
                gone.set()

        proxy = lab.proxy(lab.raw(script))
        proxy.client().post().head()
        assert gone.wait(BOUND_S)
        assert proxy.row()["ended"] == "client_cancelled"

    @pytest.mark.parametrize("drip", [False, True])
    def test_row_49_slow_heads_are_cut_and_others_are_served(
        self, lab: Lab, monkeypatch: pytest.MonkeyPatch, drip: bool
    ) -> None:
        hurry(monkeypatch, HEAD_S=0.4)
        proxy = lab.proxy(lab.upstream())
        slow = [proxy.client().send(b"POST /v1/messages HT") for _ in range(20)]
        assert proxy.post().status == 200
        until = time.monotonic() + BOUND_S
        while drip and not select.select([slow[0].sock], [], [], 0.02)[0]:
            slow[0].send(b"T", counts=0)  # a limit between two bytes never fires
            assert time.monotonic() < until
        for client in slow:
            own_error(client.answer(), 408, "timeout_error")
            assert client.ends() in ("closed", "reset")
        assert proxy.post().status == 200

    def test_row_49_stalled_bodies_are_cut_and_reach_no_upstream(
        self, lab: Lab, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        hurry(monkeypatch, BODY_STALL_S=0.2)
        up = lab.upstream()
        proxy = lab.proxy(up)
        for framing in ("Content-Length: 100", "Transfer-Encoding: chunked"):
            client = proxy.client().ask("POST", "/v1/messages", b"9\r\nhalf", framing)
            own_error(client.answer(), 408, "timeout_error")
        assert up.requests == []
        assert {row["ended"] for row in proxy.rows(2)} == {"refused"}

    def test_row_49_idle_clients_are_closed_after_the_keep_alive_limit(
        self, lab: Lab, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        hurry(monkeypatch, KEEP_ALIVE_S=0.2)
        proxy = lab.proxy(lab.upstream())
        new, used = proxy.client(), proxy.client()
        assert used.post().answer().status == 200
        assert new.ends() == "closed"
        assert used.ends() == "closed"

    def test_row_50_four_gigabytes_are_refused_from_the_head_alone(
        self, lab: Lab
    ) -> None:
        proxy = lab.proxy(lab.upstream())
        for size in (4 * 1024**3, 10**14, 64 * 1024**2 + 1):
            client = proxy.client()
            client.ask("POST", "/v1/messages", b"{}", f"Content-Length: {size}")
            own_error(client.answer(), 413, "request_too_large")

    def test_row_51_endless_chunks_are_refused_at_the_limit(self, lab: Lab) -> None:
        up = lab.upstream()
        proxy = lab.proxy(up, server={"maxBodyMiB": 1})
        client = proxy.client()
        client.ask("POST", "/v1/messages", b"", "Transfer-Encoding: chunked")
        piece = chunk(b"x" * 60_000)
        for _ in range(30):
            client.send(piece, counts=0)
        own_error(client.answer(), 413, "request_too_large")
        assert up.requests == []

    @pytest.mark.parametrize("framing", ["length", "chunked"])
    def test_row_52_bodies_beyond_the_budget_get_503_and_others_are_served(
        self, lab: Lab, monkeypatch: pytest.MonkeyPatch, framing: str
    ) -> None:
        # 24 MiB in place of 256: the limit, not the machine, is under test.
        limit, big = 24 * 1024 * 1024, 16 * 1024 * 1024
        monkeypatch.setattr(claude_lb, "BODIES_BYTES", limit)
        starts = claude_lb.BodyBudget.__init__
        monkeypatch.setattr(starts, "__defaults__", (limit,))
        begun, go = threading.Event(), lab.gate()

        def script(wire: Wire) -> None:
            while True:
                head = wire.head()
                size = int(head.values("content-length")[0])
                if size == big and not begun.is_set():
                    begun.set()  # the proxy has the whole body, and keeps holding it
                    assert go.wait(BOUND_S)
                wire.read(size)
                wire.answer(200)

        proxy = lab.proxy(lab.raw(script))
        first = proxy.client().ask("POST", "/v1/messages", b"x" * big)
        assert begun.wait(BOUND_S)
        second = proxy.client()
        if framing == "length":
            second.ask("POST", "/v1/messages", b"x" * big)
        else:
            data = chunk(b"x" * big) + b"0\r\n\r\n"
            second.ask("POST", "/v1/messages", data, "Transfer-Encoding: chunked")
        answer = second.answer()
        own_error(answer, 503, "overloaded_error")
        assert int(answer.field("retry-after")) >= 1
        assert proxy.post().status == 200
        go.set()
        assert first.answer().status == 200
        third = proxy.client().ask("POST", "/v1/messages", b"x" * big)
        assert third.answer().status == 200  # what was held has been given back

    def test_row_53_a_thousand_pipelined_requests_are_served_in_order(
        self, lab: Lab
    ) -> None:
        up = lab.upstream(
            lambda wire, request: wire.answer(200, request.target.encode())
        )
        proxy = lab.proxy(up)
        client = proxy.client()
        host = f"Host: 127.0.0.1:{proxy.port}"
        heads = [f"GET /v1/models/{n} HTTP/1.1\r\n{host}\r\n\r\n" for n in range(1000)]
        data = "".join(heads).encode()
        lab.thread(lambda: client.sock.sendall(data))
        lab.counted += 1000
        for n in range(1000):
            assert client.answer().body == f"/v1/models/{n}".encode()
        proxy.rows(1000)

    def test_row_54_expectation_with_a_bad_key_is_401_before_any_100(
        self, lab: Lab
    ) -> None:
        up = lab.upstream()
        proxy = lab.proxy(up, server={"clientKeys": [uuid.uuid4().hex]})
        client = proxy.client()
        fields = ("Content-Length: 9", "Expect: 100-continue", "x-api-key: wrong")
        client.ask("POST", "/v1/messages", b"", *fields)
        own_error(client.answer(), 401, "authentication_error")
        assert client.ends() in ("closed", "reset")
        assert up.requests == []

    def test_row_55_flood_beyond_the_cap_gets_503_at_once_and_passes(
        self, lab: Lab
    ) -> None:
        proxy = lab.proxy(lab.upstream(), server={"maxConnections": 20})
        for _ in range(4):
            # Only when the proxy has seen the ends of the last is there room again.
            held = eventually(lambda: self._fill(proxy), "20 free places", PROMPT_S)
            for _ in range(80):
                extra = proxy.client()
                answer = extra.answer()
                assert answer.status == 503
                assert answer.json()["error"]["type"] == "overloaded_error"
                assert int(answer.field("retry-after")) >= 1
                assert extra.ends() in ("closed", "reset")
                extra.close()
            for client in held:
                client.close()

    @staticmethod
    def _fill(proxy: Proxy) -> list[Client]:
        """Return 20 clients that are served, or none."""
        clients = [proxy.client() for _ in range(20)]
        with contextlib.suppress(CutError, ConnectionError):
            asked = [client.ask("HEAD", "/", counts=0) for client in clients]
            if {client.head("HEAD").status for client in asked} == {200}:
                return clients
        for client in clients:
            client.close()
        return []

    def test_row_56_burst_of_300_connects_loses_none(self, lab: Lab) -> None:
        proxy = lab.proxy(lab.upstream())
        clients = [proxy.client() for _ in range(300)]
        for client in clients:
            client.post()
        assert {client.answer().status for client in clients} == {200}
        proxy.rows(300)

    @pytest.mark.parametrize(
        ("request_line", "fields", "status"),
        [
            (b"GET /v1/models", b"", 400),  # HTTP/0.9
            (b"GET /v1/models HTTP/1.1 x", b"", 400),
            (b"GET  /v1/models HTTP/1.1", b"", 400),
            (b"GET /v1/models HTTP/2.0", b"", 505),
            (b"GET /v1/models HTTP/1.2", b"", 505),
            (b"G@T /v1/models HTTP/1.1", b"", 400),
            (b"GET /v1/mod\x01els HTTP/1.1", b"", 400),
            (b"GET /v1/models#x HTTP/1.1", b"", 400),
            (b"GET v1/models HTTP/1.1", b"", 400),
            (b"GET //evil.example/v1/models HTTP/1.1", b"", 400),
            (b"GET /v1/../admin HTTP/1.1", b"", 400),
            (b"GET /v1/./models HTTP/1.1", b"", 400),
            (b"GET /v1/%2e%2e/admin HTTP/1.1", b"", 400),
            (b"GET /v1%2f..%2fadmin HTTP/1.1", b"", 400),
            (b"GET /v1/\\..\\admin HTTP/1.1", b"", 400),
            (b"GET /v1/x%00 HTTP/1.1", b"", 400),
            (b"GET /v1/x%0d%0ay HTTP/1.1", b"", 400),
            (b"GET /v1/models HTTP/1.1", b"Content-Length: +5", 400),
            (b"GET /v1/models HTTP/1.1", b"Content-Length: 1_0", 400),
            (b"GET /v1/models HTTP/1.1", b"Content-Length: \xb2", 400),
            (b"GET /v1/models HTTP/1.1", b"Content-Length: -1", 400),
            (b"GET /v1/models HTTP/1.1", b"Content-Length : 5", 400),
            (
                b"GET /v1/models HTTP/1.1",
                b"Content-Length: 5\r\nContent-Length: 6",
                400,
            ),
            (
                b"POST /v1/messages HTTP/1.1",
                b"Content-Length: 5\r\nTransfer-Encoding: chunked",
                400,
            ),
            (b"POST /v1/messages HTTP/1.1", b"Transfer-Encoding: gzip, chunked", 400),
            (b"POST /v1/messages HTTP/1.1", b"Transfer-Encoding: xchunked", 400),
            (b"POST /v1/messages HTTP/1.1", b"Transfer-Encoding : chunked", 400),
            (b"POST /v1/messages HTTP/1.1", b"Transfer_Encoding: chunked", 400),
            (b"POST /v1/messages HTTP/1.0", b"Transfer-Encoding: chunked", 400),
            (b"GET /v1/models HTTP/1.1", b"x: a\r\n b", 400),
            (b"GET /v1/models HTTP/1.1", b" x: y", 400),
            (b"GET /v1/models HTTP/1.1", b"nonsense", 400),
            (b"GET /v1/models HTTP/1.1", b": nonsense", 400),
            (b"GET /v1/models HTTP/1.1", b"x: a\rb: c", 400),
            (b"GET /v1/models HTTP/1.1", b"x: a\nb: c", 400),
            (b"GET /v1/models HTTP/1.1", b"x: a\x00b", 400),
            (b"GET /v1/models HTTP/1.1", b"Host: other.example", 400),
            (b"GET /v1/models HTTP/1.1", b"x-api-key: a\r\nx-api-key: b", 400),
            (b"CONNECT up.example:443 HTTP/1.1", b"", 405),
            (b"TRACE /v1/models HTTP/1.1", b"", 405),
            (b"GET /v1/" + b"x" * 17_000 + b" HTTP/1.1", b"", 414),
            (b"GET /v1/models HTTP/1.1", b"x: y\r\n" * 250 + b"z: 1", 431),
            (b"GET /v1/models HTTP/1.1", b"x: " + b"y" * 140_000, 431),
        ],
    )
    def test_row_57_malformed_requests_are_refused_and_reach_no_upstream(
        self, lab: Lab, request_line: bytes, fields: bytes, status: int
    ) -> None:
        up = lab.upstream()
        proxy = lab.proxy(up)
        client = proxy.client()
        host = b"\r\nHost: 127.0.0.1:%d\r\n" % proxy.port
        fields = fields + b"\r\n" if fields else b""
        client.send(request_line + host + fields + b"\r\nGET /v1/smuggled HTTP/1.1\r\n")
        answer = client.answer()
        assert answer.status == status, answer
        kind = answer.json()["error"]["type"]
        own_error(answer, status, kind)
        assert kind.endswith("_error")
        if status == 405:
            assert "GET" in answer.field("allow")
        assert client.ends() in ("closed", "reset")
        assert up.requests == []
        assert proxy.row()["ended"] == "refused"


class TestFaultMatrixProcess:
    def test_row_58_running_out_of_descriptors_is_survived(self, lab: Lab) -> None:
        up = lab.upstream()
        process = Process(lab, up, files=48)
        clients = [lab.client(process.port) for _ in range(80)]
        answers = [
            c for c in clients if select.select([c.sock], [], [], 0)[0]
        ]  # the first 503s may be here or still to come
        late = lab.client(process.port)
        late.sock.settimeout(PROMPT_S)
        answer = late.answer()
        assert answer.status == 503
        assert answer.json()["error"]["type"] == "overloaded_error"
        begun, used = time.monotonic(), process.cpu_s()
        threading.Event().wait(0.5)
        share = (process.cpu_s() - used) / (time.monotonic() - begun)
        assert share < 0.5, f"{share:.0%} of a processor while out of descriptors"
        for client in (*clients, late):
            client.close()
        assert len(answers) < len(clients)

        def serves() -> bool:
            client = lab.client(process.port)
            try:
                return client.ask("GET", "/health", counts=0).answer().status == 200
            except (CutError, ConnectionError):
                return False
            finally:
                client.close()

        eventually(serves, "an answer after the shortage", PROMPT_S)
        text = process.end()
        assert text.count("cannot accept") in (1, 2), text
        assert "Traceback" not in text

    def test_row_59_no_descriptor_for_the_upstream_is_503_and_harms_no_endpoint(
        self, lab: Lab, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        up = lab.upstream(lambda wire, _: wire.answer(200, b"{}", "connection: close"))
        proxy = lab.proxy(up)
        client = proxy.client()
        eventually(lambda: proxy.health()["status"] == "healthy", "the greeting")
        for _ in range(3):  # the greeting's connection is used up
            assert proxy.post().status == 200
        before = lab.counted
        assert client.post().answer().status == 200
        # The seam: the real limit is in row 58; here other tests' descriptors count.
        none_left = OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        with monkeypatch.context() as patch:
            patch.setattr(claude_lb, "_start_connect", lambda _: (None, none_left))
            answer = client.post().answer()
        own_error(answer, 503, "overloaded_error")
        assert int(answer.field("retry-after")) >= 1
        assert client.post().answer().status == 200
        assert proxy.health()["status"] == "healthy"
        assert len(proxy.rows(before + 3)) == before + 3

    def test_row_60_faults_of_accept_do_not_end_the_accepting(
        self, lab: Lab, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        numbers = (errno.ECONNABORTED, errno.EINTR, errno.ENOBUFS, errno.ENOMEM)
        proxy = lab.proxy(lab.upstream())
        faults = [OSError(number, os.strerror(number)) for number in numbers]
        accept = socket.socket.accept

        def failing(sock: socket.socket) -> Any:
            if faults and sock.getsockname()[1] == proxy.port:
                raise faults.pop()
            return accept(sock)

        with monkeypatch.context() as patch:
            patch.setattr(socket.socket, "accept", failing)
            for _ in range(6):
                with contextlib.suppress(CutError, ConnectionError):
                    proxy.ask("GET", "/health", counts=0)
        assert faults == []
        assert proxy.post().status == 200

    def test_row_61_no_thread_to_be_had_is_503_and_not_silence(
        self, lab: Lab, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        proxy = lab.proxy(lab.upstream())
        start = threading.Thread.start

        def failing(thread: threading.Thread) -> None:
            if threading.current_thread().name not in ("MainThread", "test"):
                raise RuntimeError("can't start new thread")
            start(thread)

        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", failing)
            answer = proxy.ask("GET", "/health", counts=0)
        assert answer.status == 503
        assert answer.json()["error"]["type"] == "overloaded_error"
        assert int(answer.field("retry-after")) >= 1
        assert proxy.post().status == 200

    @pytest.mark.parametrize(
        ("fault", "status"), [(MemoryError(), 503), (RuntimeError("canary"), 500)]
    )
    def test_rows_62_81_fault_in_one_request_costs_that_request_alone(
        self,
        lab: Lab,
        monkeypatch: pytest.MonkeyPatch,
        fault: BaseException,
        status: int,
    ) -> None:
        parse = claude_lb.parse_request_head

        def failing(head: bytes) -> Any:
            if b"/v1/explode" in head:
                raise fault
            return parse(head)

        monkeypatch.setattr(claude_lb, "parse_request_head", failing)
        proxy = lab.proxy(lab.upstream())
        answer = proxy.ask("GET", "/v1/explode")
        kind = "internal_error" if status == 500 else "overloaded_error"
        assert "canary" not in own_error(answer, status, kind)
        assert proxy.post().status == 200
        assert proxy.rows(2)[0]["ended"] == "refused"
        lab.faults = int(status == 500)

    def test_row_81_fault_in_one_streams_sweep_harms_no_other(
        self, lab: Lab, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        hurry(monkeypatch, PING_S=0.05)
        held, at_rest = lab.gate(), claude_lb.SseWatch.at_rest
        broken: list[claude_lb.SseWatch] = []

        def failing(watch: claude_lb.SseWatch) -> bool:
            if not broken:
                broken.append(watch)
            if watch is broken[0]:
                raise RuntimeError("canary")
            return at_rest(watch)

        def answering(wire: Wire, request: Received) -> None:
            wire.stream(START, end=False)
            assert held.wait(BOUND_S)
            wire.send(chunk(STOP) + b"0\r\n\r\n")

        proxy = lab.proxy(lab.upstream(answering))
        clients = []
        with monkeypatch.context() as patch:
            patch.setattr(claude_lb.SseWatch, "at_rest", failing)
            for _ in range(8):
                clients.append(proxy.client().post())
                clients[-1].head()
                clients[-1].until(START)
            bad = proxy.rows(1)[0]
            assert bad["ended"] != "ok"
            done = 0
            for client in clients:
                with contextlib.suppress(CutError, ConnectionError):
                    assert client.until(b"\n\n").startswith(PING)
                    done += 1
            assert done == 7
        held.set()
        assert len(proxy.rows(8)) == 8
        lab.faults = 1

    def test_row_81_fault_in_a_pipelined_request_leaves_no_client_hanging(
        self, lab: Lab, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        parse = claude_lb.parse_request_head

        def failing(head: bytes) -> Any:
            if b"/v1/explode" in head:
                raise RuntimeError("canary")
            return parse(head)

        monkeypatch.setattr(claude_lb, "parse_request_head", failing)
        proxy = lab.proxy(lab.upstream())
        client = proxy.client()
        client.sock.settimeout(PROMPT_S)
        host = f"Host: 127.0.0.1:{proxy.port}\r\n\r\n"
        texts = [f"GET /v1/{name} HTTP/1.1\r\n{host}" for name in ("good", "explode")]
        client.send("".join(texts).encode(), counts=2)
        assert client.answer().status == 200
        own_error(client.answer(), 500, "internal_error")
        proxy.rows(2)
        lab.faults = 1

    @pytest.mark.parametrize("phase", ["attempt", "first bytes", "later bytes"])
    def test_row_81_fault_of_ours_in_any_phase_ends_its_exchange_once(
        self, lab: Lab, monkeypatch: pytest.MonkeyPatch, phase: str
    ) -> None:
        def explode(*_: object) -> NoReturn:
            raise RuntimeError("canary")

        feed, pace = claude_lb.SseWatch.feed, Pace(lab)

        def feeding(watch: claude_lb.SseWatch, payload: bytes) -> None:
            if b"explode" in payload:
                explode()
            feed(watch, payload)

        hurry(monkeypatch, PING_S=0.05)  # what is left over shows itself
        patch = pytest.MonkeyPatch()
        patch.setattr(claude_lb.SseWatch, "feed", feeding)
        gone = threading.Event()

        def script(wire: Wire) -> None:
            while True:
                request = wire.request()
                if b"good" in request.body:
                    wire.stream(START, STOP)
                    continue
                first = b"explode\n\n" if phase == "first bytes" else START
                wire.stream(first, end=False)
                pace.wait()
                wire.send(chunk(b"explode\n\n"))
                wire.wait_closed()
                gone.set()
                raise HungUpError

        proxy = lab.proxy(lab.raw(script))
        if phase == "attempt":
            patch.setattr(claude_lb, "parse_answer_head", explode)
        client = proxy.client().post()
        try:
            self._check_explosion(client, pace, gone, phase)
        finally:
            patch.undo()
        eventually(lambda: proxy.health()["inFlight"] == 0, "it is let go", PROMPT_S)
        proxy.rows(1)
        assert proxy.post(message(x="good")).body == START + STOP
        lab.faults = 1

    @staticmethod
    def _check_explosion(
        client: Client, pace: Pace, gone: threading.Event, phase: str
    ) -> None:
        answer = client.head()
        if phase == "later bytes":
            client.until(START)
            pace.seen()
            client.cut()
        else:
            answer = answer._replace(body=client.rest())
            assert "canary" not in own_error(answer, 500, "internal_error")
            pace.seen()
        assert gone.wait(PROMPT_S), "the upstream's connection stays open"

    def test_row_80_log_that_is_moved_away_begins_anew(
        self, lab: Lab, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        hurry(monkeypatch)
        proxy = lab.proxy(lab.upstream())
        path = tmp_path / "log0.json"
        proxy.post()
        proxy.rows(1)
        path.rename(tmp_path / "moved")
        eventually(path.exists, "a new log", PROMPT_S)
        proxy.post()
        assert len(proxy.rows(1)) == 1
        assert path.stat().st_mode & 0o777 == 0o600
        lab.counted -= 1  # the other row is in the old file

    def test_row_80_log_is_never_written_through_a_link(
        self, lab: Lab, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        hurry(monkeypatch)
        proxy = lab.proxy(lab.upstream())
        path, target = tmp_path / "log0.json", tmp_path / "target"
        target.touch()
        proxy.post()
        proxy.rows(1)
        path.rename(tmp_path / "moved")
        path.symlink_to(target)
        proxy.post()
        client = proxy.client()
        for _ in range(5):
            client.ask("GET", "/health", counts=0).answer()
        path.unlink()
        eventually(path.exists, "a new log", PROMPT_S)
        assert target.read_bytes() == b""
        lab.counted -= 2

    def test_row_82_events_pass_while_a_body_of_32_mb_comes_in(self, lab: Lab) -> None:
        pace = Pace(lab)

        def answering(wire: Wire, request: Received) -> None:
            if len(request.body) > 1_000_000:
                wire.answer(200)
                return
            wire.send(CHUNKED_SSE)
            for n in range(64):
                pace.wait()
                wire.send(chunk(delta(n)))
            wire.send(chunk(STOP) + b"0\r\n\r\n")

        proxy = lab.proxy(lab.upstream(answering))
        stream, upload = proxy.client().post(), proxy.client()
        stream.head()
        body = message(messages=[{"content": "x" * 32_000_000}])
        upload.ask("POST", "/v1/messages", b"", f"Content-Length: {len(body)}")
        step = len(body) // 64 + 1
        for n in range(64):
            upload.send(body[n * step : (n + 1) * step], counts=0)
            pace.seen()
            assert stream.until(delta(n)) == delta(n)
        assert stream.rest() == STOP
        assert upload.answer().status == 200


# -- 4. access, and answers of our own -------------------------------------

JSON = "Content-Type: application/json"


class TestAccessOverSockets:
    @pytest.mark.parametrize(
        ("host", "status"),
        [
            ("127.0.0.1:{port}", 200),
            ("localhost:{port}", 200),
            ("LOCALHOST:{port}", 200),
            ("[::1]:{port}", 200),
            ("proxy.example", 200),
            ("proxy.example:8443", 200),
            ("evil.example:{port}", 421),
            ("127.0.0.1", 421),
            ("localhost:1", 421),
            ("127.0.0.2:{port}", 421),
            ("127.0.0.1.evil.example:{port}", 421),
            ("notproxy.example", 421),
            ("169.254.169.254", 421),
        ],
    )
    def test_host_must_be_one_of_ours(self, lab: Lab, host: str, status: int) -> None:
        up = lab.upstream()
        proxy = lab.proxy(up, server={"allowedHosts": ["proxy.example"]})
        field = f"Host: {host.format(port=proxy.port)}"
        answer = proxy.ask("POST", "/v1/messages", message(), field)
        assert answer.status == status
        assert len(up.requests) == int(status == 200)
        counts = int(status != 200)
        health = proxy.ask("GET", "/health", b"", field, counts=counts)
        assert health.status == status
        if status == 421:
            own_error(health, 421, "invalid_request_error")

    def test_host_that_is_empty_or_missing_or_twofold_is_refused(
        self, lab: Lab
    ) -> None:
        proxy = lab.proxy(lab.upstream())
        host = f"Host: 127.0.0.1:{proxy.port}\r\n"
        for version, fields in (
            ("1.1", ""), ("1.0", ""), ("1.1", "Host:\r\n"), ("1.1", host + host),
            ("1.1", "Host: a b\r\n"), ("1.1", "Host: user@127.0.0.1\r\n"),
        ):  # fmt: skip
            client = proxy.client()
            client.send(f"GET /health HTTP/{version}\r\n{fields}\r\n".encode())
            own_error(client.answer(), 400, "invalid_request_error")

    @pytest.mark.parametrize(
        ("fields", "status"),
        [
            (("Origin: http://127.0.0.1:{port}", JSON), 200),
            (("Origin: http://localhost:{port}", JSON), 403),
            (("Origin: https://app.example", JSON), 200),
            (("Origin: https://app.example:444", JSON), 403),
            (("Origin: http://app.example", JSON), 403),
            (("Origin: https://evil.example", JSON), 403),
            (("Origin: https://app.example.evil.example", JSON), 403),
            (("Origin: null", JSON), 403),
            (("Origin: https://app.example", "Content-Type: text/plain"), 415),
            (("Origin: https://app.example",), 415),
            (("Sec-Fetch-Site: cross-site", JSON), 403),
            (("Sec-Fetch-Site: same-site", JSON), 403),
            (("Sec-Fetch-Site: same-origin", JSON), 200),
            (("Sec-Fetch-Site: none", JSON), 200),
            (("Sec-Fetch-Site: none", "Content-Type: text/plain"), 415),
            (("Content-Type: text/plain",), 200),
        ],
    )
    def test_web_pages_need_to_be_listed_and_to_send_json(
        self, lab: Lab, fields: tuple[str, ...], status: int
    ) -> None:
        up = lab.upstream()
        proxy = lab.proxy(up, server={"corsOrigins": ["https://app.example"]})
        fields = tuple(f.format(port=proxy.port) for f in fields)
        answer = proxy.post(message(), *fields)
        assert answer.status == status
        assert len(up.requests) == int(status == 200)
        allowed = answer.field("access-control-allow-origin")
        listed = "Origin: https://app.example" in fields and status == 200
        assert allowed == ("https://app.example" if listed else "") or status == 415
        if listed:
            assert "origin" in answer.field("vary").lower()
        assert answer.values("access-control-allow-credentials") == []

    @pytest.mark.parametrize("status", [401, 413, 415, 502])
    def test_errors_of_ours_can_be_read_by_a_listed_origin(
        self, lab: Lab, status: int
    ) -> None:
        key = uuid.uuid4().hex
        server = {"corsOrigins": ["https://app.example"], "clientKeys": [key]}
        proxy = lab.proxy(lab.refusing(), server={**server, "maxBodyMiB": 0.01})
        fields = ["Origin: https://app.example", JSON if status != 415 else "x: y"]
        fields += [f"x-api-key: {key}"] if status != 401 else []
        answer = proxy.post(b"x" * (20_000 if status == 413 else 2), *fields)
        assert answer.status == status
        assert answer.field("access-control-allow-origin") == "https://app.example"

    def test_preflight_of_a_listed_origin_gets_204(self, lab: Lab) -> None:
        up = lab.upstream()
        proxy = lab.proxy(
            up,
            server={
                "corsOrigins": ["https://app.example"],
                "clientKeys": [uuid.uuid4().hex],
            },
        )
        fields = (
            "Origin: https://app.example",
            "Access-Control-Request-Method: POST",
            "Access-Control-Request-Headers: content-type, x-api-key",
            "Access-Control-Request-Private-Network: true",
        )
        answer = proxy.ask("OPTIONS", "/v1/messages", b"", *fields, counts=0)
        assert (answer.status, answer.body) == (204, b"")
        assert answer.field("access-control-allow-origin") == "https://app.example"
        assert "POST" in answer.field("access-control-allow-methods")
        assert "x-api-key" in answer.field("access-control-allow-headers")
        assert answer.field("access-control-allow-private-network") == "true"
        assert answer.values("access-control-allow-credentials") == []
        assert up.requests == []

    @pytest.mark.parametrize("path", ["/v1/messages", "/health", "/", "/api/hello"])
    def test_preflight_of_an_unlisted_origin_is_allowed_nothing(
        self, lab: Lab, path: str
    ) -> None:
        proxy = lab.proxy(lab.upstream())
        fields = (
            "Origin: https://evil.example",
            "Access-Control-Request-Method: POST",
            "Access-Control-Request-Private-Network: true",
        )
        client = proxy.client().ask("OPTIONS", path, b"", *fields, counts=0)
        answer = client.answer()
        lab.counted += int(answer.status == 403)
        names = {name.lower() for name, _ in answer.fields}
        assert not [n for n in names if n.startswith("access-control-")], answer

    def test_any_origin_with_keys_is_echoed_and_needs_a_key(self, lab: Lab) -> None:
        key = uuid.uuid4().hex
        server = {"corsOrigins": ["*"], "clientKeys": [key]}
        proxy = lab.proxy(lab.upstream(), server=server)
        origin = "Origin: https://some.example"
        answer = proxy.post(message(), origin, JSON, f"x-api-key: {key}")
        assert answer.status == 200
        assert answer.field("access-control-allow-origin") == "https://some.example"
        assert "origin" in answer.field("vary").lower()
        assert answer.values("access-control-allow-credentials") == []
        assert proxy.post(message(), origin, JSON).status == 401
        null = proxy.post(message(), "Origin: null", JSON, f"x-api-key: {key}")
        assert null.status == 403

    @pytest.mark.parametrize("method", ["GET", "POST", "DELETE", "HEAD"])
    def test_client_key_is_taken_from_both_places_and_asked_for_everywhere(
        self, lab: Lab, method: str
    ) -> None:
        up = lab.upstream()
        keys = [uuid.uuid4().hex, uuid.uuid4().hex]
        proxy = lab.proxy(up, server={"clientKeys": keys})
        good = [f"x-api-key: {keys[0]}", f"Authorization: Bearer {keys[1]}"]
        good.append(f"authorization: bearer {keys[0]}")
        wrong = uuid.uuid4().hex
        bad = ["x: y", f"x-api-key: {wrong}", f"x-api-key: {keys[0]}x"]
        bad += [f"x-api-key: {keys[0][:-1]}", f"Authorization: Basic {keys[0]}"]
        bad += ["x-api-key:", "Authorization: Bearer", f"x_api_key: {keys[0]}"]
        for field in good:
            assert proxy.ask(method, "/v1/models", b"", field).status == 200
        for field in bad:
            client = proxy.client().ask(method, "/v1/models", b"", field)
            assert client.head(method).status == 401, field
        heads = b"".join(line for r in up.requests for line in r.lines)
        assert not [key for key in keys if key.encode() in heads]
        assert len(up.requests) == len(good)

    def test_eight_browser_attacks_are_refused(self, lab: Lab) -> None:
        up = lab.upstream()
        proxy = lab.proxy(up)
        evil, cross = "Origin: https://evil.example", "Sec-Fetch-Site: cross-site"
        plain = "Content-Type: text/plain"
        attacks: list[tuple[str, str, tuple[str, ...], set[int]]] = [
            ("GET", "/v1/models", (evil, cross), {403}),  # read across origins
            ("POST", "/v1/messages", (evil, cross), {403}),  # POST without preflight
            ("POST", "/v1/messages", (evil, cross, plain), {403}),  # text/plain JSON
            ("OPTIONS", "/v1/messages", (
                evil, "Access-Control-Request-Method: POST",
                "Access-Control-Request-Headers: x-api-key",
            ), {403}),  # a custom field
            ("POST", "/v1/messages", (
                "Origin: null", "Content-Type: application/x-www-form-urlencoded",
            ), {403}),  # a form
            ("GET", "/v1/models", (cross, "Sec-Fetch-Mode: no-cors"), {403}),  # img
            ("POST", "/v1/messages", (evil, plain, "Sec-Fetch-Mode: no-cors"), {403}),
            ("GET", "/v1/models", (f"Host: evil.example:{proxy.port}",), {421}),
        ]  # fmt: skip
        for method, path, fields, wanted in attacks:
            answer = proxy.ask(
                method, path, b"{}" if method == "POST" else b"", *fields
            )
            assert answer.status in wanted, (method, fields)
            assert answer.values("access-control-allow-origin") == []
        assert up.requests == []

    def test_foreign_origin_sees_the_status_of_health_alone(self, lab: Lab) -> None:
        proxy = lab.proxy(lab.upstream())
        eventually(lambda: proxy.health()["status"] == "healthy", "the greeting")
        fields = ("Origin: https://evil.example",)
        answer = proxy.ask("GET", "/health", b"", *fields, counts=0)
        assert answer.json() == {"status": "healthy"}


class TestAccessOwnAnswers:
    def test_health_has_the_agreed_shape(self, lab: Lab) -> None:
        up = lab.upstream()
        proxy = lab.proxy(
            up,
            {"baseURL": "http://127.0.0.1:9", "enabled": False},
            {"baseURL": lab.upstream().url, "authType": "passthrough"},
        )
        eventually(lambda: proxy.health()["status"] == "healthy", "the greeting")
        answer = proxy.ask("GET", "/health", counts=0)
        assert answer.field("content-type") == "application/json"
        health = answer.json()
        keys = ["status", "timestamp", "endpoints", "currentEndpoint"]
        assert list(health)[:4] == keys
        assert {"version", "uptimeSeconds", "inFlight"} <= set(health)
        assert health["endpoints"][0] == {
            "index": 1,
            "baseURL": up.url,
            "hasToken": True,
        }
        assert [e["hasToken"] for e in health["endpoints"]] == [True, False, False]
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:]{8}\.\d{3}Z", health["timestamp"])
        assert (health["currentEndpoint"], health["inFlight"]) == (1, 0)
        proxy.post()
        assert proxy.health()["currentEndpoint"] == 3
        proxy.post()
        assert proxy.health()["currentEndpoint"] == 1
        assert up.token not in json.dumps(health)

    def test_health_follows_the_evidence(self, lab: Lab) -> None:
        bad = threading.Event()

        def answering(wire: Wire, request: Received) -> None:
            wire.answer(500 if bad.is_set() else 200)

        failover = {"cooldown": 0, "attempts": 1}
        proxy = lab.proxy(lab.upstream(answering), lab.upstream(), failover=failover)
        eventually(lambda: proxy.health()["status"] == "healthy", "the greeting")
        bad.set()
        for n, status in enumerate(("degraded", "degraded", "degraded"), 1):
            proxy.post()
            proxy.rows(n)
            assert proxy.health()["status"] == status
        bad.clear()
        proxy.post()
        proxy.post()
        proxy.rows(5)
        assert proxy.health()["status"] == "healthy"

    def test_health_says_unhealthy_with_503(self, lab: Lab) -> None:
        proxy = lab.proxy(lab.refusing())
        proxy.post()
        answer = proxy.ask("GET", "/health", counts=0)
        assert (answer.status, answer.json()["status"]) == (503, "unhealthy")
        assert answer.json()["endpoints"][0]["hasToken"] is True

    def test_health_counts_what_is_in_flight(self, lab: Lab) -> None:
        held = lab.gate()

        def answering(wire: Wire, request: Received) -> None:
            wire.stream(START, end=False)
            assert held.wait(BOUND_S)
            wire.send(chunk(STOP) + b"0\r\n\r\n")

        proxy = lab.proxy(lab.upstream(answering))
        clients = [proxy.client().post() for _ in range(3)]
        for client in clients:
            client.head()
        assert proxy.health()["inFlight"] == 3
        held.set()
        for client in clients:
            client.rest()
        proxy.rows(3)
        assert proxy.health()["inFlight"] == 0

    def test_root_and_hello_answer_at_once_without_a_credential(self, lab: Lab) -> None:
        proxy = lab.proxy(lab.refusing(), server={"clientKeys": [uuid.uuid4().hex]})
        eventually(lambda: proxy.health()["status"] == "unhealthy", "the greeting")
        client = proxy.client()
        for path in ("/", "/api/hello", "/health"):
            answer = client.ask("HEAD", path, counts=0).answer("HEAD")
            assert answer.status == (503 if path == "/health" else 200)
            assert answer.body == b""
        root = client.ask("GET", "/", counts=0).answer().json()
        assert list(root) == ["proxy_name", "version", "status", "timestamp"]
        assert root["proxy_name"] == "claude_lb"
        assert client.unread() == b""

    @pytest.mark.parametrize(
        ("method", "path", "status", "kind"),
        [
            ("GET", "/nowhere", 404, "not_found_error"),
            ("GET", "/v1x/models", 404, "not_found_error"),
            ("POST", "/health", 405, "invalid_request_error"),
            ("DELETE", "/", 405, "invalid_request_error"),
            ("PUT", "/api/hello", 405, "invalid_request_error"),
        ],
    )
    def test_unknown_path_and_wrong_method_get_our_envelope(
        self, lab: Lab, method: str, path: str, status: int, kind: str
    ) -> None:
        answer = lab.proxy(lab.upstream()).ask(method, path)
        own_error(answer, status, kind)
        allowed = answer.field("allow").split(", ")
        assert ("GET" in allowed and method not in allowed) == (status == 405)

    def test_secrets_are_in_no_sink(self, lab: Lab, certificates: Path) -> None:
        key, admin = f"canary{uuid.uuid4().hex}", f"canary{uuid.uuid4().hex}"
        up = lab.upstream(lambda wire, _: wire.answer(401, b"{}"))
        _, strange = tls_upstream(lab, certificates, name="unknown")
        server = {"clientKeys": [key], "adminKey": admin}
        log = {"level": "debug", "lifecycle": True}
        endpoints = (up, lab.refusing(), strange)
        proxy = lab.proxy(*endpoints, server=server, log=log)
        mine = (
            f"x-api-key: {key}",
            "Authorization: Bearer canary-second",
            "Cookie: canary=1",
        )
        answers = [proxy.post(message(text="canary-body"), *mine) for _ in range(4)]
        answers += [
            proxy.post(message(), "x-api-key: canary-wrong"),
            proxy.ask("GET", "/v1/models?canary-query", b"", *mine),
            proxy.ask("GET", "/nowhere", b"", *mine),
            proxy.ask("GET", "/health", b"", *mine, counts=0),
            proxy.ask("GET", "/", b"", *mine, counts=0),
            proxy.ask("POST", "/v1/messages", b"canary", "x-api-key: canary\x01"),
            proxy.ask("GET", "/v1/models HTTP/1.1\r\nHost: canary@x\r\n", b"", *mine),
        ]
        proxy.rows(len(answers) - 2)
        told = proxy.log() + repr(proxy.server.config) + repr(answers)
        found = re.search(r".{60}canary.{60}", told.replace("canary-query", ""))
        assert found is None, found
        assert "canary-query" not in proxy.log()

    def test_log_escapes_what_a_terminal_would_obey(self, lab: Lab) -> None:
        proxy = lab.proxy(lab.upstream())
        proxy.ask("GET", "/nowhere/\xe2\x80\xae%1b[2J", counts=1)
        proxy.ask("GET", "/x\x9b2J", counts=1)
        proxy.rows(2)
        assert proxy.log().isascii()
        assert "\x1b" not in proxy.log()


# -- 5. stop ---------------------------------------------------------------


class Process:
    """The real program, as a user starts it."""

    def __init__(
        self,
        lab: Lab,
        *upstreams: ScriptedUpstream,
        files: int = 0,
        drain_s: float = 30,
    ) -> None:
        folder = lab._folder
        listed = [{"baseURL": u.url, "authToken": u.token} for u in upstreams]
        raw = {"endpoints": listed, "server": {"drainSeconds": drain_s}}
        more = {"log": {"format": "json"}, "failover": {"gateSeconds": 0}}
        path = folder / "endpoints.json"
        path.write_text(json.dumps({**raw, **more}))
        path.chmod(0o600)
        self._errors = (folder / "stderr").open("wb")
        self._said = folder / "stderr"
        command = [sys.executable, claude_lb.__file__, "-c", str(path), "--port", "0"]
        if files:
            limit = f"resource.setrlimit(resource.RLIMIT_NOFILE, ({files}, {files}))"
            code = f"import os, resource, sys; {limit}; os.execv(sys.argv[1], "
            code += "sys.argv[1:])"
            command = [sys.executable, "-c", code, *command]
        environ = {
            k: v for k, v in os.environ.items() if k not in ("PORT", "LOG_LEVEL")
        }
        self.popen = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=self._errors, env=environ, text=True
        )
        lab.processes.append(self)
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            found = re.fullmatch(
                r"export ANTHROPIC_BASE_URL=http://127.0.0.1:(\d+)\n", line
            )
            if found:
                self.port = int(found[1])
                return
        pytest.fail(f"it did not start: {self._said.read_text()}")

    def cpu_s(self) -> float:
        """Return the processor time it has used."""
        path = Path(f"/proc/{self.popen.pid}/stat")
        if not path.exists():
            pytest.skip("needs /proc")
        fields = path.read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def signal(self, number: int) -> None:
        self.popen.send_signal(number)

    def exit_code(self) -> int:
        return self.popen.wait(BOUND_S)

    def end(self) -> str:
        """End it if it still runs; return what it wrote to its log."""
        if self.popen.poll() is None:
            self.signal(signal.SIGTERM)
            self.exit_code()
        self.close()
        return self._said.read_text()

    def rows(self) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in self._said.read_text().splitlines()]
        return [line for line in lines if line["event"] == "exchange"]

    def close(self) -> None:
        if self.popen.poll() is None:
            self.popen.kill()
            self.popen.wait(BOUND_S)
        if self.popen.stdout is not None:
            self.popen.stdout.close()
        self._errors.close()


def reachable(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), BOUND_S).close()
    except ConnectionError:
        return False
    return True


def running_stream(lab: Lab) -> tuple[ScriptedUpstream, threading.Event]:
    """Return an upstream that begins a stream and ends it when told."""
    finish = lab.gate()

    def answering(wire: Wire, request: Received) -> None:
        if b"headless" in request.body:
            assert finish.wait(BOUND_S)
        wire.stream(START, end=False)
        assert finish.wait(BOUND_S)
        wire.send(chunk(delta(1)) + chunk(STOP) + b"0\r\n\r\n")

    return lab.upstream(answering), finish


class TestStop:
    def test_drain_finishes_what_runs_and_takes_nothing_new(self, lab: Lab) -> None:
        up, finish = running_stream(lab)
        proxy = lab.proxy(up)
        streaming, waiting, idle = proxy.client(), proxy.client(), proxy.client()
        streaming.post().head()
        streaming.until(START)
        waiting.post(message(x="headless"))
        eventually(lambda: len(up.requests) == 2, "both requests")
        assert idle.ask("HEAD", "/", counts=0).answer("HEAD").status == 200
        stopped = threading.Event()

        def stop() -> None:
            proxy.server.stop(grace_s=BOUND_S)
            stopped.set()

        lab.thread(stop)
        assert idle.ends() == "closed"
        eventually(lambda: not reachable(proxy.port), "an end of accepting", PROMPT_S)
        assert not stopped.is_set()
        finish.set()
        assert streaming.rest() == delta(1) + STOP
        assert streaming.ends() == "closed"
        answer = waiting.head()
        assert answer.field("connection").lower() == "close"
        assert waiting.rest() == START + delta(1) + STOP
        assert waiting.ends() == "closed"
        assert stopped.wait(PROMPT_S)
        assert {row["ended"] for row in proxy.rows(2)} == {"ok"}
        lab.stopped(proxy)

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_signal_finishes_what_runs_and_exits_0(self, lab: Lab, number: int) -> None:
        up, finish = running_stream(lab)
        process = Process(lab, up)
        client = lab.client(process.port).post()
        lab.counted -= 1  # its row is on the process's standard error
        client.head()
        client.until(START)
        process.signal(number)
        finish.set()
        assert client.rest() == delta(1) + STOP
        assert process.exit_code() == 0
        assert [row["ended"] for row in process.rows()] == ["ok"]
        assert "Traceback" not in process.end()

    def test_second_signal_ends_at_once(self, lab: Lab) -> None:
        up, _ = running_stream(lab)
        process = Process(lab, up)
        client = lab.client(process.port).post()
        lab.counted -= 1
        client.head()
        client.until(START)
        process.signal(signal.SIGTERM)
        eventually(lambda: not reachable(process.port), "the first signal")
        process.signal(signal.SIGTERM)
        assert process.popen.wait(PROMPT_S) == 0
        client.cut()

    @pytest.mark.parametrize("phase", ["streaming", "waiting for the head"])
    def test_what_outlives_the_grace_is_cut_and_has_its_row(
        self, lab: Lab, phase: str
    ) -> None:
        up, _ = running_stream(lab)
        process = Process(lab, up, drain_s=0.1)
        client = lab.client(process.port)
        client.post(message(x="headless" if phase != "streaming" else ""))
        lab.counted -= 1
        if phase == "streaming":
            client.head()
            client.until(START)
        eventually(lambda: up.requests, "the request")
        process.signal(signal.SIGTERM)
        assert process.popen.wait(PROMPT_S) == 0
        if phase == "streaming":
            client.cut()
        assert [row["ended"] for row in process.rows()] in (
            ["truncated"], ["upstream_error"], ["refused"],
        )  # fmt: skip

    def test_sigpipe_is_ignored(self, lab: Lab) -> None:
        process = Process(lab, lab.upstream())
        process.signal(signal.SIGPIPE)
        client = lab.client(process.port).ask("GET", "/health", counts=0)
        assert client.answer().status in (200, 503)
        process.signal(signal.SIGTERM)
        assert process.exit_code() == 0


# -- what the node balancer gets wrong -------------------------------------


class TestFailuresReproducedElsewhere:
    """R1 to R5: what users of the balancer before this one met."""

    def test_r1_a_limited_stream_is_told_so_at_once(self, lab: Lab) -> None:
        error = {"type": "rate_limit_error", "message": "slow down"}
        body = json.dumps({"type": "error", "error": error}).encode()
        up = lab.upstream(lambda wire, _: wire.answer(429, body, "retry-after: 7"))
        answer = lab.proxy(up).post(message(stream=True))
        assert (answer.status, answer.body) == (429, body)
        assert answer.field("retry-after") == "7"

    def test_r2_a_stream_to_a_closed_port_is_502_and_no_hang(self, lab: Lab) -> None:
        client = lab.proxy(lab.refusing()).client()
        client.sock.settimeout(PROMPT_S)
        own_error(client.post(message(stream=True)).answer(), 502, "api_error")

    def test_r3_a_cut_stream_is_broken_and_not_ended_well(self, lab: Lab) -> None:
        def answering(wire: Wire, _: Received) -> None:
            wire.stream(START, end=False)
            raise HungUpError

        client = lab.proxy(lab.upstream(answering)).client().post(message(stream=True))
        client.head()
        assert client.until(START) == START
        client.cut()
        assert client.raw_bytes
        assert b"event: error" not in client.unread()

    def test_r4_query_and_betas_reach_the_upstream(self, lab: Lab) -> None:
        up = lab.upstream()
        beta = "anthropic-beta: a-2025-01-01,b-2026-02-02"
        lab.proxy(up).ask("POST", "/v1/messages?beta=true", message(), beta)
        assert up.requests[0].target == "/v1/messages?beta=true"
        assert up.requests[0].values("anthropic-beta") == ["a-2025-01-01,b-2026-02-02"]

    def test_r5_bad_json_is_answered_by_the_upstream_in_its_own_words(
        self, lab: Lab
    ) -> None:
        error = {"type": "invalid_request_error", "message": "not JSON"}
        body = json.dumps({"type": "error", "error": error}).encode()
        up = lab.upstream(lambda wire, _: wire.answer(400, body))
        answer = lab.proxy(up).post(b'{"model": ')
        assert (answer.status, answer.body) == (400, body)
        assert up.requests[0].body == b'{"model": '


# -- what a hostile reading found ------------------------------------------


class TestHardCases:
    def test_a_standard_error_that_nobody_reads_stops_nothing(self, lab: Lab) -> None:
        command = [sys.executable, claude_lb.__file__, "--demo", "--port", "0"]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        try:
            assert process.stdout is not None
            said = next(line for line in process.stdout if line.startswith("export"))
            client = lab.client(int(said.rpartition(":")[2]))
            client.sock.settimeout(PROMPT_S)
            for number in range(60):
                target = f"/v1/{number}{'x' * 12_000}"
                answer = client.ask("GET", target, counts=0).answer()
                assert answer.status == 404
        finally:
            process.kill()
            process.communicate()

    def test_a_results_url_without_end_costs_no_other_client_its_time(
        self, lab: Lab
    ) -> None:
        body = b'{"results_url":"http://' + b"a" * 200_000 + b'"}'
        proxy = lab.proxy(lab.upstream(lambda wire, _: wire.answer(200, body)))
        client = proxy.client()
        client.sock.settimeout(PROMPT_S)
        path = "/v1/messages/batches/msgbatch_1"
        assert client.ask("GET", path).answer().body == body

    def test_a_stop_waits_for_a_body_that_is_on_its_way(self, lab: Lab) -> None:
        proxy, body = lab.proxy(lab.upstream()), message(text="x" * 300_000)
        client = proxy.client()
        client.ask("POST", "/v1/messages", body[:1000], f"Content-Length: {len(body)}")
        moving = proxy.server.relay.is_moving
        eventually(moving, "the upload begins", PROMPT_S)
        lab.thread(lambda: proxy.server.stop(grace_s=BOUND_S))
        eventually(proxy.server.draining, "the stop begins", PROMPT_S)
        client.send(body[1000:], counts=0)
        assert client.answer().status == 200

    def test_those_beyond_the_cap_can_read_why(self, lab: Lab) -> None:
        proxy = lab.proxy(lab.upstream(), server={"maxConnections": 1})
        held = proxy.client()
        assert held.ask("HEAD", "/", counts=0).answer("HEAD").status == 200
        for _ in range(30):
            answer = proxy.ask("POST", "/v1/messages", message(), counts=0)
            assert answer.status == 503

    def test_large_heads_are_not_kept(self, lab: Lab) -> None:
        proxy = lab.proxy(lab.upstream())
        kept = claude_lb.upstream_head.cache_info().currsize
        for number in range(3):
            field = f"x-large: {number}{'y' * 60_000}"
            assert proxy.post(message(), field).status == 200
        assert claude_lb.upstream_head.cache_info().currsize == kept
        assert proxy.server.access._admit_memo.cache_info().currsize == 0

    def test_a_client_that_has_sent_much_ahead_is_seen_to_hang_up(
        self, lab: Lab
    ) -> None:
        gone = threading.Event()

        def script(wire: Wire) -> None:
            wire.request()
            wire.wait_closed()
            gone.set()
            raise HungUpError

        client = lab.proxy(lab.raw(script)).client().post()
        client.send(b"POST /v1/messages HTTP/1.1\r\n" + b"x" * 150_000, counts=0)
        client.close()
        assert gone.wait(PROMPT_S), "the upstream goes on for nobody"

    def test_announced_bodies_take_no_room_from_others(
        self, lab: Lab, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        starts = claude_lb.BodyBudget.__init__
        monkeypatch.setattr(starts, "__defaults__", (1024 * 1024,))
        proxy = lab.proxy(lab.upstream())
        for _ in range(8):
            client = proxy.client()
            client.ask("POST", "/v1/messages", b"x", "Content-Length: 1000000")
        moving = proxy.server.relay._moving
        eventually(lambda: len(moving) == 8, "the uploads begin", PROMPT_S)
        assert proxy.post(message(text="x" * 200_000)).status == 200

    def test_an_empty_line_after_a_request_is_no_request(self, lab: Lab) -> None:
        proxy = lab.proxy(lab.upstream())
        client = proxy.client()
        for _ in range(3):
            client.post()
            client.send(b"\r\n", counts=0)
            assert client.answer().status == 200
        assert len(proxy.rows(3)) == 3

    def test_an_early_answer_over_tls_reaches_a_long_upload(
        self, lab: Lab, certificates: Path
    ) -> None:
        def script(wire: Wire) -> None:
            head = b""
            while b"\r\n\r\n" not in head:
                head += wire.sock.recv(4096)
            wire.answer(413, b"{}", "connection: close")
            wire.wait_closed()
            raise HungUpError

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificates / "good.pem", certificates / "good.key")
        up = lab.raw(script, tls=context)
        ca = str(certificates / "ca.pem")
        proxy = lab.proxy({"baseURL": up.url, "authToken": up.token, "caFile": ca})
        for _ in range(5):
            assert proxy.post(b"x" * 4_000_000).status == 413


# ============================================================================
# 3. CLIENTS
# ============================================================================

MODEL = "claude-sonnet-5-5"
HELLO: list[dict[str, Any]] = [{"role": "user", "content": "say hi"}]
WEATHER_TOOL: dict[str, Any] = {
    "name": "get_weather",
    "description": "Return the weather at a place.",
    "input_schema": {"type": "object", "properties": {"place": {"type": "string"}}},
}
START_S = 20.0  # for the program to serve; 0.3 s when nothing else runs
STOP_S = 15.0  # for it to end with only idle connections open

# Statuses that say nothing about an endpoint: both stay in service.
REQUEST_FAULTS = [
    (400, "invalid_request_error", "BadRequestError"),
    (404, "not_found_error", "NotFoundError"),
    (409, "conflict_error", "ConflictError"),
    (413, "request_too_large", "APIStatusError"),
]
# Statuses that cool an endpoint down: each needs a program of its own.
ENDPOINT_FAULTS = [
    (401, "authentication_error", "AuthenticationError"),
    (402, "billing_error", "APIStatusError"),
    (403, "permission_error", "PermissionDeniedError"),
    (429, "rate_limit_error", "RateLimitError"),
    (500, "api_error", "InternalServerError"),
    (503, "", "InternalServerError"),
    (504, "timeout_error", "InternalServerError"),
    (529, "overloaded_error", "OverloadedError"),
]


# Fakes and fixtures


def need_tool(tool: str, available: bool) -> None:
    """Skip the test where `tool` is absent; in CI, which has to have it, fail."""
    if available:
        return
    if os.environ.get("CI") == "true":
        pytest.fail(f"{tool} is absent, and CI=true")
    pytest.skip(f"{tool} is not installed")


class Demo(NamedTuple):
    """A running `claude_lb.py --demo`."""

    url: str
    process: subprocess.Popen[bytes]


def serves(url: str) -> bool:
    """Tell whether `url` answers 200; proxies of the environment are not asked."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=2) as answer:
            status: int = answer.status
            return status == 200
    except OSError:
        return False


def stop(process: subprocess.Popen[bytes]) -> bool:
    """End `process` and tell whether it obeyed SIGTERM."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return False
    return True


def wait_until_it_serves(process: subprocess.Popen[bytes], home: Path) -> str:
    """Return the URL that a starting demo prints, once it answers there."""
    deadline = time.monotonic() + START_S
    while True:
        url = re.search(r"listens on (http://\S+)", (home / "stdout").read_text())
        if url and serves(url[1] + "/health"):
            return url[1]
        said = (home / "stderr").read_text()
        assert process.poll() is None, f"the demo ended: {said}"
        assert time.monotonic() < deadline, f"the demo does not serve: {said}"
        time.sleep(0.05)


@contextlib.contextmanager
def running_demo() -> Iterator[Demo]:
    """Run the demo on a port that it takes, in an empty home; it must end in peace."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        env = {key: os.environ[key] for key in ("PATH", "LANG") if key in os.environ}
        # A port found beforehand might be taken by the demo's own upstreams.
        command = [sys.executable, str(PROGRAM), "--demo", "--port", "0"]
        with (home / "stdout").open("wb") as out, (home / "stderr").open("wb") as err:
            process = subprocess.Popen(
                command,
                cwd=home,
                env={**env, "HOME": folder, "PYTHONDONTWRITEBYTECODE": "1"},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
            )
        try:
            yield Demo(wait_until_it_serves(process, home), process)
            assert process.poll() is None, "the demo ended during the test"
        finally:
            stopped = stop(process)
        said = (home / "stderr").read_text(errors="replace")
        assert "Traceback" not in said, said
        assert stopped, f"the demo ignores SIGTERM for {STOP_S} s: {said}"


@pytest.fixture(scope="class")
def demo() -> Iterator[Demo]:
    """One program for the tests of a class; they must leave its endpoints well."""
    with running_demo() as running:
        yield running


@pytest.fixture
def fresh_demo() -> Iterator[Demo]:
    """A program for one test, which may spoil its endpoints."""
    with running_demo() as running:
        yield running


@pytest.fixture
def sdk(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The `anthropic` package, with nothing of the environment in its way."""
    need_tool("anthropic", importlib.util.find_spec("anthropic") is not None)
    for name in list(os.environ):
        if name.startswith("ANTHROPIC_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return importlib.import_module("anthropic")


@pytest.fixture
def client(sdk: Any, demo: Demo) -> Iterator[Any]:
    """The SDK's client, pointed at the shared demo, without retries of its own."""
    with sdk.Anthropic(base_url=demo.url, api_key="sk-x", max_retries=0) as client:
        yield client


@pytest.fixture
def fresh_client(sdk: Any, fresh_demo: Demo) -> Iterator[Any]:
    """The same, pointed at a demo of its own."""
    url = fresh_demo.url
    with sdk.Anthropic(base_url=url, api_key="sk-x", max_retries=0) as client:
        yield client


def ask(client: Any, **changes: Any) -> Any:
    """Send the simplest request that `changes` allow and return its answer."""
    request = {"model": MODEL, "max_tokens": 2048, "messages": HELLO, **changes}
    return client.messages.create(**request)


def streamed(client: Any, **changes: Any) -> tuple[list[Any], Any]:
    """Stream an answer; return its raw events and the message the SDK made of them."""
    request = {"model": MODEL, "max_tokens": 2048, "messages": HELLO, **changes}
    with client.messages.stream(**request) as stream:
        events = list(stream)
        return events, stream.get_final_message()


def block_types(message: Any) -> list[str]:
    """Return the types of a message's content blocks, in order."""
    return [block.type for block in message.content]


@at_both_ends
class TestAnthropicSdk:
    """The official Python SDK sees a plain Messages API."""

    def test_a_plain_request_is_answered(self, client: Any) -> None:
        message = ask(client)
        assert (message.type, message.role) == ("message", "assistant")
        assert block_types(message) == ["text"]
        assert message.content[0].text
        assert message.stop_reason == "end_turn"
        assert message.model == MODEL
        assert message.usage.input_tokens > 0
        assert message.usage.output_tokens > 0

    def test_the_request_id_reaches_the_sdk(self, client: Any) -> None:
        assert ask(client)._request_id

    def test_a_token_serves_as_well_as_a_key(self, sdk: Any, demo: Demo) -> None:
        options = {"base_url": demo.url, "max_retries": 0}
        with sdk.Anthropic(auth_token="x", **options) as client:
            assert ask(client).stop_reason == "end_turn"

    def test_a_slash_after_the_base_url_does_no_harm(
        self, sdk: Any, demo: Demo
    ) -> None:
        url = demo.url + "/"
        with sdk.Anthropic(base_url=url, api_key="sk-x", max_retries=0) as client:
            assert ask(client).stop_reason == "end_turn"

    def test_a_stream_arrives_whole_and_in_order(self, client: Any) -> None:
        events, message = streamed(client)
        # The helper adds its own events ("text" and such) to those of the wire.
        types = [event.type for event in events]
        assert types[0] == "message_start"
        assert types[-1] == "message_stop"
        assert types.count("message_start") == types.count("message_stop") == 1
        assert message.stop_reason == "end_turn"
        assert message.usage.output_tokens > 0
        said = [event.text for event in events if event.type == "text"]
        assert "".join(said) == message.content[0].text != ""

    def test_a_raw_stream_arrives_whole_and_in_order(self, client: Any) -> None:
        with ask(client, stream=True) as stream:
            types = [event.type for event in stream]
        assert [t for t in types if t != "content_block_delta"] == [
            "message_start",
            "content_block_start",
            "content_block_stop",
            "message_delta",
            "message_stop",
        ]

    def test_a_stream_given_up_leaves_the_client_usable(self, client: Any) -> None:
        with ask(client, stream=True) as stream:
            assert next(iter(stream)).type == "message_start"
        assert ask(client).stop_reason == "end_turn"

    @pytest.mark.parametrize("stream", [False, True])
    def test_a_tool_is_called_and_its_result_taken(
        self, client: Any, stream: bool
    ) -> None:
        def turn(messages: list[Any]) -> Any:
            request = {"messages": messages, "tools": [WEATHER_TOOL]}
            if stream:
                return streamed(client, **request)[1]
            return ask(client, **request)

        first = turn(HELLO)
        assert first.stop_reason == "tool_use"
        call = first.content[-1]
        assert (call.type, call.name) == ("tool_use", "get_weather")
        assert isinstance(call.input, dict)
        result = {"type": "tool_result", "tool_use_id": call.id, "content": "sunny"}
        # The SDK's own types go back as they came.
        second = turn(
            [
                *HELLO,
                {"role": "assistant", "content": first.content},
                {"role": "user", "content": [result]},
            ]
        )
        assert second.stop_reason == "end_turn"
        assert block_types(second)[-1] == "text"

    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize(
        "thinking",
        [{"type": "enabled", "budget_tokens": 1024}, {"type": "adaptive"}],
        ids=["enabled", "adaptive"],
    )
    def test_thinking_comes_first_and_signed(
        self, client: Any, thinking: dict[str, Any], stream: bool
    ) -> None:
        if stream:
            events, message = streamed(client, thinking=thinking)
            assert [e for e in events if e.type == "signature"]
        else:
            message = ask(client, thinking=thinking)
        assert block_types(message) == ["thinking", "text"]
        assert message.content[0].thinking
        assert message.content[0].signature

    def test_thinking_that_is_disabled_does_not_come(self, client: Any) -> None:
        message = ask(client, thinking={"type": "disabled"})
        assert block_types(message) == ["text"]

    def test_a_large_request_passes(self, client: Any) -> None:
        text = "word " * 400_000
        message = ask(client, messages=[{"role": "user", "content": text}])
        assert message.stop_reason == "end_turn"

    def test_the_beta_namespace_passes(self, client: Any) -> None:
        message = client.beta.messages.create(
            model=MODEL,
            max_tokens=16,
            messages=HELLO,
            system=[{"type": "text", "text": "Be brief."}],
            betas=["context-1m-2025-08-07", "interleaved-thinking-2025-05-14"],
        )
        assert message.stop_reason == "end_turn"

    def test_tokens_are_counted(self, client: Any) -> None:
        def count(text: str) -> int:
            messages = [{"role": "user", "content": text}]
            answer = client.messages.count_tokens(model=MODEL, messages=messages)
            tokens: int = answer.input_tokens
            return tokens

        assert 0 < count("hi") < count("A rather longer sentence. " * 50)

    def test_models_are_listed_and_looked_up(self, client: Any) -> None:
        models = list(client.models.list(limit=1000))
        assert models
        assert all(model.id and model.display_name for model in models)
        assert client.models.retrieve(models[0].id).id == models[0].id

    def test_many_streams_at_once_stay_apart(self, sdk: Any, demo: Demo) -> None:
        async def one(client: Any) -> Any:
            request = {"model": MODEL, "max_tokens": 64, "messages": HELLO}
            async with client.messages.stream(**request) as stream:
                return await stream.get_final_message()

        async def all_of_them() -> list[Any]:
            options = {"base_url": demo.url, "api_key": "sk-x", "max_retries": 0}
            async with sdk.AsyncAnthropic(**options) as client:
                return list(await asyncio.gather(*(one(client) for _ in range(20))))

        messages = asyncio.run(all_of_them())
        assert {message.stop_reason for message in messages} == {"end_turn"}
        assert len({message.id for message in messages}) == 20

    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize(("status", "kind", "name"), REQUEST_FAULTS)
    def test_a_fault_of_the_request_is_typed_and_harms_nothing(
        self, sdk: Any, client: Any, status: int, kind: str, name: str, stream: bool
    ) -> None:
        error = failure(sdk, client, status, stream)
        assert_typed(sdk, error, status, kind, name)
        assert ask(client).stop_reason == "end_turn"

    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize(("status", "kind", "name"), ENDPOINT_FAULTS)
    def test_a_fault_of_every_endpoint_is_typed(
        self,
        sdk: Any,
        fresh_client: Any,
        status: int,
        kind: str,
        name: str,
        stream: bool,
    ) -> None:
        error = failure(sdk, fresh_client, status, stream)
        assert_typed(sdk, error, status, kind, name)

    def test_a_limit_says_when_to_come_back(self, sdk: Any, fresh_client: Any) -> None:
        error = failure(sdk, fresh_client, 429, stream=False)
        assert 0 < float(error.response.headers["retry-after"]) <= 2

    def test_the_sdk_waits_a_limit_out(self, sdk: Any, fresh_client: Any) -> None:
        failure(sdk, fresh_client, 429, stream=False)
        patient = fresh_client.with_options(max_retries=4)
        assert ask(patient).stop_reason == "end_turn"


def failure(sdk: Any, client: Any, status: int, stream: bool) -> Any:
    """Ask for an error of `status`; return what the SDK raises."""
    with pytest.raises(sdk.APIStatusError) as caught:
        ask(client, model=f"demo-error-{status}", stream=stream)
    return caught.value


def assert_typed(sdk: Any, error: Any, status: int, kind: str, name: str) -> None:
    """Check that an error of the SDK is what `status` and its envelope stand for."""
    assert error.status_code == status
    assert isinstance(error, getattr(sdk, name)), type(error)
    assert error.body["type"] == "error"
    assert error.body["error"]["message"]
    if kind:
        assert error.body["error"]["type"] == kind


class Claude:
    """The real CLI, in an empty home, with the proxy as its API."""

    def __init__(self, program: str, home: Path, url: str) -> None:
        self.program = program
        self.home = home
        self.url = url

    def run(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        """Run `claude` with `arguments`; `env` adds to what it finds."""
        self.home.mkdir(exist_ok=True)
        quiet = {
            "DISABLE_TELEMETRY": "1",
            "DISABLE_ERROR_REPORTING": "1",
            "DISABLE_AUTOUPDATER": "1",
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
            "CLAUDE_CODE_MAX_RETRIES": "1",
        }
        api = {"ANTHROPIC_BASE_URL": self.url, "ANTHROPIC_AUTH_TOKEN": "x"}
        home = {"PATH": os.environ["PATH"], "HOME": str(self.home)}
        return subprocess.run(
            [self.program, *arguments],
            cwd=self.home,
            env={**home, **quiet, **api, **env},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )


@pytest.fixture
def claude_program() -> str:
    """The path of the real CLI."""
    program = os.environ.get("CLAUDE_BIN") or shutil.which("claude")
    need_tool("claude", program is not None)
    assert program is not None
    return program


@pytest.fixture
def claude(claude_program: str, demo: Demo, tmp_path: Path) -> Claude:
    """The CLI, pointed at the shared demo."""
    return Claude(claude_program, tmp_path / "home", demo.url)


@pytest.fixture
def fresh_claude(claude_program: str, fresh_demo: Demo, tmp_path: Path) -> Claude:
    """The CLI, pointed at a demo of its own."""
    return Claude(claude_program, tmp_path / "home", fresh_demo.url)


def outcome(run: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """Return the result that a run with `--output-format json` printed."""
    assert run.stdout.strip(), run.stderr
    result: dict[str, Any] = json.loads(run.stdout)
    assert result["type"] == "result"
    return result


def assert_answered(run: subprocess.CompletedProcess[str]) -> None:
    """Check that a run with `--output-format json` ended with an answer."""
    result = outcome(run)
    assert (run.returncode, result["is_error"]) == (0, False), run.stdout + run.stderr
    assert result["result"].strip()
    assert result["usage"]["output_tokens"] > 0


class TestClaudeCodeCli:
    """The real Claude Code CLI works through the proxy without knowing it."""

    def test_a_prompt_is_answered(self, claude: Claude) -> None:
        assert_answered(claude.run("-p", "say hi", "--output-format", "json"))

    def test_an_api_key_serves_as_well_as_a_token(self, claude: Claude) -> None:
        simple = ("-p", "say hi", "--output-format", "json")
        run = claude.run(*simple, ANTHROPIC_AUTH_TOKEN="", ANTHROPIC_API_KEY="sk-x")
        assert_answered(run)

    def test_a_bash_call_runs_and_its_output_goes_back(self, claude: Claude) -> None:
        # Without ENABLE_TOOL_SEARCH=false a placeholder stands before Bash.
        run = claude.run(
            *("-p", "run echo", "--tools", "Bash", "--allowedTools", "Bash(echo:*)"),
            *("--output-format", "stream-json", "--verbose"),
            ENABLE_TOOL_SEARCH="false",
        )
        lines = [json.loads(line) for line in run.stdout.splitlines()]
        blocks = [
            block
            for line in lines
            if line["type"] in ("assistant", "user")
            for block in line["message"]["content"]
        ]
        calls = [block for block in blocks if block["type"] == "tool_use"]
        results = [block for block in blocks if block["type"] == "tool_result"]
        assert [call["name"] for call in calls] == ["Bash"], run.stdout + run.stderr
        assert calls[0]["input"]["command"] == "echo hi"
        assert [(r["is_error"], r["content"]) for r in results] == [(False, "hi")]
        assert (lines[-1]["type"], lines[-1]["is_error"]) == ("result", False)
        assert lines[-1]["result"].strip()
        assert run.returncode == 0

    def test_a_session_goes_on(self, claude: Claude) -> None:
        first = claude.run("-p", "say hi", "--output-format", "json")
        assert_answered(first)
        session = outcome(first)["session_id"]
        again = ("-p", "again", "--resume", session, "--output-format", "json")
        assert_answered(claude.run(*again))

    def test_several_at_once_are_answered(
        self, claude_program: str, demo: Demo, tmp_path: Path
    ) -> None:
        def run(name: str) -> subprocess.CompletedProcess[str]:
            claude = Claude(claude_program, tmp_path / name, demo.url)
            return claude.run("-p", "say hi", "--output-format", "json")

        with ThreadPoolExecutor(3) as threads:
            for done in threads.map(run, "abc"):
                assert_answered(done)

    @pytest.mark.parametrize("status", [400, 401, 403, 429, 500, 529])
    def test_an_error_is_told_with_its_status(
        self, fresh_claude: Claude, status: int
    ) -> None:
        model = f"demo-error-{status}"
        run = fresh_claude.run(
            *("-p", "say hi", "--model", model, "--output-format", "json")
        )
        result = outcome(run)
        assert (run.returncode, result["is_error"]) == (1, True), run.stdout
        # CLIs before 2.1 do not tell the status apart from the text.
        assert result.get("api_error_status", status) == status, result["result"]


# ============================================================================
# 4. PROGRAM
# ============================================================================

PROGRAM = Path(claude_lb.__file__).resolve()
TOP = PROGRAM.parent
SOURCE = PROGRAM.read_text(encoding="utf-8")
TREE = ast.parse(SOURCE)
LINES = SOURCE.splitlines()

CLI_TOKEN = "sk-ant-api03-R4nd0mTextOfAnEndpoint"
CLI_KEY = "Zq3vX8-kLw0RtY7uIoP2aSdFgHjKlMnB"  # 32 random characters
LIMIT_S = 20.0  # until a process has said or done what it should: never reached

# -- fakes -----------------------------------------------------------------


class Run(NamedTuple):
    """How a run of the program ended."""

    code: int
    out: str
    err: str


def environment(home: Path, **more: str) -> dict[str, str]:
    """Return an environment in which nothing of the tester's own is found."""
    clean = {
        "HOME": str(home),
        "XDG_CONFIG_HOME": str(home / "xdg"),
        "PATH": os.environ.get("PATH", "/usr/bin:/bin"),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
        "LC_ALL": "C.UTF-8",
    }
    if "PYTHONWARNINGS" in os.environ:
        clean["PYTHONWARNINGS"] = os.environ["PYTHONWARNINGS"]
    return {**clean, **more}


class Program:
    """Runs the real file in a folder of its own with a clean environment."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run(self, *arguments: str, python: Sequence[str] = (), **variables: str) -> Run:
        """Run to the end; nothing here may serve."""
        done = subprocess.run(
            [sys.executable, *python, str(PROGRAM), *arguments],
            cwd=self.folder,
            env=environment(self.folder, **variables),
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
        return Run(done.returncode, done.stdout, done.stderr)

    def write(self, name: str, content: object, mode: int = 0o600) -> Path:
        """Write a file, as JSON unless it is text."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = content if isinstance(content, str) else json.dumps(content)
        path.write_text(text, encoding="utf-8")
        path.chmod(mode)
        return path

    @contextlib.contextmanager
    def serve(self, *arguments: str, **variables: str) -> Iterator[Serving]:
        """Serve until the block ends; kill what is left."""
        process = subprocess.Popen(
            [sys.executable, str(PROGRAM), *arguments],
            cwd=self.folder,
            env=environment(self.folder, **variables),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        dog = threading.Timer(LIMIT_S, process.kill)
        dog.start()
        try:
            yield Serving(process)
        finally:
            process.kill()
            process.communicate()
            dog.cancel()


class Serving:
    """A program that serves; its start output is read first."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line.rstrip("\n"))
            if line.startswith("export "):
                break
        else:
            _, err = process.communicate()
            raise AssertionError(f"it did not start: {lines} {err}")
        self.lines = lines
        found = re.search(r"http://[^\s/]+:(\d+)", lines[-1])
        assert found is not None
        self.url, self.port = found[0], int(found[1])

    def stop(self, number: signal.Signals = signal.SIGTERM) -> Run:
        """Ask it to stop and wait for the end."""
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=LIMIT_S)
        return Run(self.process.returncode, out, err)

    def get(self, path: str) -> tuple[int, Any]:
        """Return (status, JSON) of a GET."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=LIMIT_S)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        finally:
            connection.close()


class SilentUpstream:
    """Imitates an upstream that begins an event stream and then holds it open."""

    HEAD = (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n"
    )
    EVENT = b'event: message_start\ndata: {"type": "message_start"}\n\n'

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.listener.getsockname()[1]
        self._open: list[socket.socket] = []
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                sock, _ = self.listener.accept()
            except OSError:
                return
            self._open.append(sock)
            threading.Thread(target=self._answer, args=(sock,), daemon=True).start()

    def _answer(self, sock: socket.socket) -> None:
        received = b""
        with contextlib.suppress(OSError):
            while b"\r\n\r\n" not in received:
                more = sock.recv(4096)
                if not more:
                    return
                received += more
            chunk = b"%x\r\n%b\r\n" % (len(self.EVENT), self.EVENT)
            sock.sendall(self.HEAD + chunk)

    def close(self) -> None:
        """Close every socket."""
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self._thread.join()
        for sock in self._open:
            sock.close()


@pytest.fixture
def program(tmp_path: Path) -> Program:
    return Program(tmp_path)


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port on which nothing listens, held so that nobody else takes it."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


@pytest.fixture
def held_stream() -> Iterator[SilentUpstream]:
    upstream = SilentUpstream()
    yield upstream
    upstream.close()


def near(port: int, **more: object) -> dict[str, object]:
    """Return the JSON of an endpoint on this machine."""
    return {"baseURL": f"http://127.0.0.1:{port}", "authToken": CLI_TOKEN, **more}


def far(**more: object) -> dict[str, object]:
    """Return the JSON of an endpoint that is only ever checked."""
    return {"baseURL": "https://a.example", "authToken": CLI_TOKEN, **more}


def listening_on(run: Run) -> str:
    """Return where a checked configuration would listen."""
    assert run.code == 0, run
    found = re.search(r"(?m)^listen: (\S+)$", run.out)
    assert found is not None
    return found[1]


# -- 19. cli ---------------------------------------------------------------


@at_both_ends
class TestCliOptions:
    def test_the_version_is_told(self, program: Program) -> None:
        run = program.run("--version")
        assert run == Run(0, f"claude_lb {claude_lb.VERSION}\n", "")

    def test_it_runs_isolated_and_without_site_packages(self, program: Program) -> None:
        run = program.run("--version", python=("-I", "-S"))
        assert run == Run(0, f"claude_lb {claude_lb.VERSION}\n", "")

    def test_it_checks_isolated_and_with_warnings_as_errors(
        self, program: Program
    ) -> None:
        program.write("c.json", [far()])
        python = ("-I", "-S", "-W", "error")
        run = program.run("-c", "c.json", "--check", python=python)
        assert (run.code, run.err) == (0, "")

    def test_the_help_lists_every_option_and_variable(self, program: Program) -> None:
        run = program.run("--help")
        assert (run.code, run.err) == (0, "")
        for word in (
            "-c",
            "--config",
            "--host",
            "--port",
            "--log-level",
            "--demo",
            "--check",
            "--version",
            "PORT",
            "LOG_LEVEL",
            "LOG_COLOR",
            "NO_COLOR",
            "HTTPS_PROXY",
            "NO_PROXY",
        ):
            assert word in run.out

    @pytest.mark.parametrize(
        "arguments",
        [
            ("--frobnicate",),
            ("--conf", "x"),
            ("--port", "x"),
            ("--port", ""),
            ("--port", "65536"),
            ("--port", "-1"),
            ("--port",),
            ("-c",),
            ("--log-level", "loud"),
            ("stray",),
            ("--demo", "-c", "x"),
        ],
    )
    def test_a_bad_flag_gets_one_line(
        self, program: Program, arguments: tuple[str, ...]
    ) -> None:
        program.write("endpoints.json", [far()])
        run = program.run(*arguments)
        assert (run.code, run.out) == (2, "")
        assert run.err.count("\n") == 1
        assert run.err.startswith("claude_lb")

    def test_a_fault_of_a_flag_names_the_flag(self, program: Program) -> None:
        program.write("c.json", [far()])
        assert "--port" in program.run("-c", "c.json", "--port", "65536").err

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("PORT", "x"),
            ("PORT", "65536"),
            ("PORT", "²"),
            ("LOG_LEVEL", "loud"),
        ],
    )
    def test_a_bad_variable_gets_one_line_with_its_name(
        self, program: Program, name: str, value: str
    ) -> None:
        program.write("c.json", [far()])
        run = program.run("-c", "c.json", "--check", **{name: value})
        assert (run.code, run.out) == (2, "")
        assert run.err.count("\n") == 1
        assert name in run.err


@at_both_ends
class TestCliCheck:
    def test_a_good_file_is_shown_without_its_secrets(self, program: Program) -> None:
        program.write(
            "c.json",
            {
                "endpoints": [
                    far(name="first"),
                    far(baseURL="https://b.example/v1", enabled=False),
                    {"baseURL": "https://c.example", "authType": "passthrough"},
                    far(proxy=f"http://user:{CLI_KEY}@p.example:1"),
                ],
                "server": {
                    "clientKeys": [CLI_KEY],
                    "adminKey": CLI_KEY[::-1],
                    "port": 4711,
                },
            },
        )
        run = program.run("-c", "c.json", "--check")
        assert (run.code, run.err) == (0, "")
        for word in (
            "c.json",
            "127.0.0.1:4711",
            "first",
            "https://a.example",
            "https://b.example/v1",
            "disabled",
            "passthrough",
        ):
            assert word in run.out
        for secret in (CLI_TOKEN, CLI_KEY, CLI_KEY[::-1]):
            assert secret[:12] not in run.out

    def test_a_faulty_file_gets_a_line_for_each_fault(self, program: Program) -> None:
        program.write(
            "c.json",
            {
                "endpoints": [
                    far(authToken="your_auth_token_here_1"),
                    far(baseUrl="https://x.example", baseURL="ftp://x.example"),
                ],
                "server": {"port": "80"},
                "severs": {},
            },
        )
        run = program.run("-c", "c.json", "--check")
        assert (run.code, run.out) == (2, "")
        paths = [line.split(": ")[2] for line in run.err.splitlines()]
        assert sorted(paths) == [
            "endpoints[0].authToken",
            "endpoints[1].baseURL",
            "endpoints[1].baseUrl",
            "server.port",
            "severs",
        ]
        assert all(x.startswith("claude_lb: c.json: ") for x in run.err.splitlines())

    def test_faults_of_the_whole_are_reported_together(self, program: Program) -> None:
        raw = {"endpoints": [near(4711)], "server": {"corsOrigins": ["*"]}}
        program.write("c.json", raw)
        flags = ("--host", "0.0.0.0", "--port", "4711")
        run = program.run("-c", "c.json", "--check", *flags)
        assert run.code == 2
        assert "server.host" in run.err
        assert "server.corsOrigins" in run.err
        assert "own address" in run.err

    @pytest.mark.parametrize(
        "raw",
        [
            {"endpoints": {"authToken": CLI_TOKEN}},
            [{"baseURL": "https://a.example", "authTokenEnv": CLI_TOKEN}],
            [far(nmae=CLI_TOKEN)],
            "module.exports = [{authToken: '" + CLI_TOKEN + "', baseURL: f()}]",
            '[{"authToken": "' + CLI_TOKEN + '" "baseURL": 1}]',
        ],
    )
    def test_a_refused_file_shows_no_secret(
        self, program: Program, raw: object
    ) -> None:
        program.write("c.json", raw)
        run = program.run("-c", "c.json", "--check")
        assert run.code == 2
        assert CLI_TOKEN[:20] not in run.out + run.err

    @pytest.mark.parametrize("kind", ["absent", "a folder", "bytes"])
    def test_a_file_that_cannot_be_read_gets_one_line(
        self, program: Program, kind: str
    ) -> None:
        path = program.folder / "c.json"
        if kind == "a folder":
            path.mkdir()
        if kind == "bytes":
            path.write_bytes(b"\xff\xfe[\x00]\x00")
        run = program.run("-c", "c.json")
        assert (run.code, run.out) == (2, "")
        assert run.err.count("\n") == 1
        assert "cannot read c.json: " in run.err

    @pytest.mark.parametrize(
        "key", ["authTokenEnv", "authTokenCommand", "name", "baseURL", "authToken"]
    )
    def test_odd_unicode_gets_a_line_and_no_traceback(
        self, program: Program, key: str
    ) -> None:
        raw = {"baseURL": "https://a.example", key: "a\ud800b"}
        if not key.startswith("authToken"):
            raw["authToken"] = CLI_TOKEN
        program.write("c.json", json.dumps([raw]))
        run = program.run("-c", "c.json", "--check")
        assert (run.code, run.out) == (2, "")
        assert "Traceback" not in run.err
        assert f"endpoints[0].{key}" in run.err

    def test_certificates_that_cannot_be_read_are_a_fault(
        self, program: Program
    ) -> None:
        program.write("empty.pem", "")
        raw = [far(caFile="absent.pem"), far(caFile="empty.pem")]
        program.write("c.json", raw)
        run = program.run("-c", "c.json", "--check")
        assert run.code == 2
        assert "absent.pem" in run.err
        assert "Traceback" not in run.err

    def test_a_command_prints_the_token(self, program: Program) -> None:
        program.write("token", f"{CLI_TOKEN}\n")
        raw = {"baseURL": "https://a.example", "authTokenCommand": "cat token"}
        program.write("c.json", [raw])
        run = program.run("-c", "c.json", "--check")
        assert run.code == 0
        assert CLI_TOKEN not in run.out + run.err

    def test_a_command_without_a_token_is_a_fault(self, program: Program) -> None:
        commands = ["exit 3", "true", "no-such-command-here", "printf 'a b'"]
        raw = [
            {"baseURL": "https://a.example", "authTokenCommand": command}
            for command in commands
        ]
        program.write("c.json", raw)
        run = program.run("-c", "c.json", "--check")
        assert (run.code, run.out) == (2, "")
        paths = re.findall(r"(?m)^claude_lb: c\.json: (\S+): ", run.err)
        assert paths == [f"endpoints[{i}].authTokenCommand" for i in range(4)]
        assert run.err.count("\n") == 4

    def test_what_a_failing_command_says_is_not_shown(self, program: Program) -> None:
        command = f"echo {CLI_TOKEN} >&2; echo {CLI_TOKEN}; exit 1"
        raw = {"baseURL": "https://a.example", "authTokenCommand": command}
        program.write("c.json", [raw])
        run = program.run("-c", "c.json", "--check")
        assert run.code == 2
        assert CLI_TOKEN not in run.out + run.err


PLACES = (
    "endpoints.json",
    "config/endpoints.json",
    "config/endpoints.js",
    "xdg/claude-lb/endpoints.json",
)


@at_both_ends
class TestCliPlaces:
    @pytest.mark.parametrize("count", [4, 3, 2, 1])
    def test_the_first_place_that_holds_a_file_is_taken(
        self, program: Program, count: int
    ) -> None:
        for place in PLACES[-count:]:
            program.write(place, [far(name=place.replace("/", "-"))])
        run = program.run("--check", ANTHROPIC_API_KEY=CLI_TOKEN)
        assert run.code == 0, run
        assert f"endpoint {PLACES[-count].replace('/', '-')}: " in run.out
        assert run.out.count("endpoint ") == 1

    def test_the_home_folder_is_the_default_of_xdg(self, program: Program) -> None:
        program.write(".config/claude-lb/endpoints.json", [far(name="home")])
        run = program.run("--check", XDG_CONFIG_HOME="")
        assert (run.code, "endpoint home: " in run.out) == (0, True)

    def test_the_last_place_is_the_services(self) -> None:
        assert claude_lb.CONFIG_PLACES[-1] == "/usr/local/etc/claude/loadbalancer.conf"
        assert len(claude_lb.CONFIG_PLACES) == 5

    def test_a_named_file_goes_before_every_place(self, program: Program) -> None:
        program.write("endpoints.json", [far(name="place")])
        program.write("other.json", [far(name="named")])
        run = program.run("--check", "--config", "other.json")
        assert "endpoint named: " in run.out

    def test_a_faulty_file_is_not_passed_over(self, program: Program) -> None:
        program.write("endpoints.json", "[")
        program.write("config/endpoints.json", [far()])
        assert program.run("--check").code == 2

    def test_a_node_module_is_found_and_read(self, program: Program) -> None:
        text = (
            "// two\nmodule.exports = [\n"
            f"  {{ baseURL: 'https://a.example', authToken: '{CLI_TOKEN}', }},\n];\n"
        )
        program.write("config/endpoints.js", text)
        run = program.run("--check")
        assert (run.code, "https://a.example" in run.out) == (0, True)

    @pytest.mark.parametrize(
        ("variable", "token", "kind"),
        [
            ("ANTHROPIC_API_KEY", "sk-ant-api03-abc", "api_key"),
            ("ANTHROPIC_AUTH_TOKEN", "sk-ant-api03-abc", "auth_token"),
            ("ANTHROPIC_AUTH_TOKEN", "sk-ant-oat01-abc", "auth_token"),
        ],
    )
    def test_without_a_file_the_environments_key_serves(
        self, program: Program, variable: str, token: str, kind: str
    ) -> None:
        run = program.run("--check", **{variable: token})
        assert run.code == 0, run
        assert f"https://api.anthropic.com {kind}" in run.out
        assert token not in run.out + run.err

    def test_a_placeholder_in_the_environment_is_refused(
        self, program: Program
    ) -> None:
        run = program.run("--check", ANTHROPIC_API_KEY="your-api-key")
        assert run.code == 2
        assert "ANTHROPIC_API_KEY" in run.err

    def test_without_anything_one_message_tells_what_to_do(
        self, program: Program
    ) -> None:
        run = program.run()
        assert (run.code, run.out) == (2, "")
        for word in (
            *PLACES[:3],
            str(program.folder / "xdg/claude-lb/endpoints.json"),
            "/usr/local/etc/claude/loadbalancer.conf",
            "ANTHROPIC_API_KEY",
            "ANTHROPIC_AUTH_TOKEN",
            "baseURL",
            "authToken",
            "--demo",
        ):
            assert word in run.err
        assert run.err.count("claude_lb: ") == 1
        assert "Traceback" not in run.err


@at_both_ends
class TestCliPrecedence:
    @pytest.mark.parametrize(
        ("file", "variable", "flag", "port"),
        [
            (None, None, None, 13255),
            (4001, None, None, 4001),
            (4001, "4002", None, 4002),
            (4001, "4002", "4003", 4003),
            (None, None, "4003", 4003),
            (None, "4002", None, 4002),
            (4001, "", None, 4001),
            (4001, "4002", "0", 0),
        ],
    )
    def test_a_port_is_the_flags_then_the_environments_then_the_files(
        self,
        monkeypatch: pytest.MonkeyPatch,
        file: int | None,
        variable: str | None,
        flag: str | None,
        port: int,
    ) -> None:
        for name in ("PORT", "LOG_LEVEL"):
            monkeypatch.delenv(name, raising=False)
        if variable is not None:
            monkeypatch.setenv("PORT", variable)
        settings = claude_lb.ServerSettings()
        if file is not None:
            settings = claude_lb.ServerSettings(port=file)
        flags = [] if flag is None else ["--port", flag]
        arguments = claude_lb.build_parser().parse_args(flags)
        config = claude_lb.Config((), server=settings)
        assert claude_lb.apply_overrides(config, arguments).server.port == port

    def test_the_real_environment_goes_between_file_and_flag(
        self, program: Program
    ) -> None:
        program.write("c.json", {"endpoints": [far()], "server": {"port": 4001}})
        run = program.run("-c", "c.json", "--check", PORT="4002")
        assert listening_on(run) == "127.0.0.1:4002"
        run = program.run("-c", "c.json", "--check", "--port", "4003", PORT="4002")
        assert listening_on(run) == "127.0.0.1:4003"

    def test_a_host_is_the_flags_then_the_files(self, program: Program) -> None:
        raw = {"endpoints": [far()], "server": {"host": "127.0.0.2", "port": 4001}}
        program.write("c.json", raw)
        run = program.run("-c", "c.json", "--check")
        assert listening_on(run) == "127.0.0.2:4001"
        run = program.run("-c", "c.json", "--check", "--host", "127.0.0.3")
        assert listening_on(run) == "127.0.0.3:4001"

    @pytest.mark.parametrize(
        ("file", "variable", "flag", "level"),
        [
            (None, None, None, "info"),
            ("error", None, None, "error"),
            ("error", "DEBUG", None, "debug"),
            ("error", "debug", "warn", "warn"),
            ("error", "", None, "error"),
        ],
    )
    def test_a_level_is_the_flags_then_the_environments_then_the_files(
        self,
        monkeypatch: pytest.MonkeyPatch,
        file: str | None,
        variable: str | None,
        flag: str | None,
        level: str,
    ) -> None:
        for name in ("PORT", "LOG_LEVEL"):
            monkeypatch.delenv(name, raising=False)
        if variable is not None:
            monkeypatch.setenv("LOG_LEVEL", variable)
        log = claude_lb.LogSettings() if file is None else claude_lb.LogSettings(file)
        flags = [] if flag is None else ["--log-level", flag]
        arguments = claude_lb.build_parser().parse_args(flags)
        merged = claude_lb.apply_overrides(claude_lb.Config((), log=log), arguments)
        assert merged.log.level == level

    @pytest.mark.parametrize(
        ("setting", "variables", "terminal", "colored"),
        [
            ("auto", {}, True, True),
            ("auto", {}, False, False),
            ("on", {}, False, True),
            ("off", {}, True, False),
            ("auto", {"NO_COLOR": "1"}, True, False),
            ("auto", {"NO_COLOR": ""}, True, True),
            ("off", {"LOG_COLOR": "on"}, False, True),
            ("on", {"LOG_COLOR": "off"}, True, False),
            ("on", {"LOG_COLOR": "auto"}, False, False),
            ("auto", {"LOG_COLOR": "on", "NO_COLOR": "1"}, False, True),
        ],
    )
    def test_color_is_the_environments_then_the_files_then_the_terminals(
        self,
        monkeypatch: pytest.MonkeyPatch,
        setting: str,
        variables: Mapping[str, str],
        terminal: bool,
        colored: bool,
    ) -> None:
        for name in ("LOG_COLOR", "NO_COLOR"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        primary, secondary = os.openpty() if terminal else os.pipe()
        with open(primary, "rb", buffering=0), open(secondary, "w") as stream:
            settings = claude_lb.LogSettings(color=setting)
            assert claude_lb.wants_color(settings, stream) is colored

    @pytest.mark.parametrize("host", ["0.0.0.0", "[::]", "lb.example"])
    def test_a_wide_bind_without_keys_is_refused_with_an_explanation(
        self, program: Program, host: str
    ) -> None:
        program.write("c.json", [far()])
        run = program.run("-c", "c.json", "--host", host)
        assert (run.code, run.out) == (2, "")
        assert run.err.count("\n") == 1
        assert "clientKeys" in run.err

    def test_a_wide_bind_with_keys_is_good(self, program: Program) -> None:
        raw = {"endpoints": [far()], "server": {"clientKeys": [CLI_KEY]}}
        program.write("c.json", raw)
        run = program.run("-c", "c.json", "--check", "--host", "0.0.0.0")
        assert run.code == 0
        assert listening_on(run) == "0.0.0.0:13255"

    def test_an_endpoint_that_is_ourselves_is_refused_after_the_flags(
        self, program: Program
    ) -> None:
        program.write("c.json", [near(4711)])
        assert program.run("-c", "c.json", "--check").code == 0
        run = program.run("-c", "c.json", "--check", PORT="4711")
        assert (run.code, "circle" in run.err) == (2, True)


@at_both_ends
class TestCliStart:
    def test_the_start_tells_the_address_the_endpoints_and_the_next_step(
        self, program: Program, closed_port: int
    ) -> None:
        raw = [near(closed_port, name="one"), near(closed_port, name="two")]
        program.write("c.json", raw)
        with program.serve("-c", "c.json", "--port", "0") as serving:
            said = "\n".join(serving.lines)
            assert serving.url == f"http://127.0.0.1:{serving.port}"
            assert serving.port != 0
            assert f"listens on {serving.url}" in serving.lines[0]
            assert f"one: http://127.0.0.1:{closed_port}" in said
            assert f"two: http://127.0.0.1:{closed_port}" in said
            assert serving.lines[-1] == f"export ANTHROPIC_BASE_URL={serving.url}"
            status, health = serving.get("/health")
            assert status in (200, 503)  # by evidence: nothing listens there
            assert [e["hasToken"] for e in health["endpoints"]] == [True, True]
            run = serving.stop()
        assert CLI_TOKEN not in said + run.out + run.err + json.dumps(health)

    @pytest.mark.parametrize(
        ("text", "mode"),
        [
            ('[{"baseURL": "http://127.0.0.1:1", "authToken": "t-1"}]', 0o644),
            ('[{"baseURL": "http://127.0.0.1:1", "authToken": "t-1"}]', 0o640),
            ('[{"baseURL": "http://127.0.0.1:1", "authToken": "t-1"}]', 0o604),
            ('[{"baseURL": "http://127.0.0.1:1", "authToken" : "t-1"}]', 0o644),
            ("exports = [{'baseURL': 'http://[::1]:1', 'authToken': 't-1'}]", 0o644),
            ("exports = [{baseURL: 'http://[::1]:1', authToken: 't-1'}]", 0o644),
        ],
        ids=["all", "group", "others", "spaced", "single quotes", "bare keys"],
    )
    def test_a_file_with_tokens_that_others_can_read_is_warned_of(
        self, program: Program, text: str, mode: int
    ) -> None:
        program.write("c.js", text, mode)
        run = program.run("-c", "c.js", "--check")
        assert run.code == 0
        (warning,) = [x for x in run.out.splitlines() if x.startswith("warning: ")]
        assert "chmod 600 c.js" in warning

    def test_other_secrets_in_a_file_that_others_can_read_are_warned_of(
        self, program: Program
    ) -> None:
        endpoint = {"baseURL": "https://a.example", "authType": "passthrough"}
        raw = {"endpoints": [endpoint], "server": {"clientKeys": [CLI_KEY]}}
        program.write("c.json", raw, 0o644)
        assert "chmod 600 c.json" in program.run("-c", "c.json", "--check").out

    @pytest.mark.parametrize(
        ("raw", "mode"),
        [
            ([far()], 0o600),
            ([{"baseURL": "https://a.example", "authTokenEnv": "T"}], 0o644),
            ([{"baseURL": "https://a.example", "authType": "passthrough"}], 0o644),
        ],
        ids=["private", "token elsewhere", "no token"],
    )
    def test_a_file_that_gives_nothing_away_is_not_warned_of(
        self, program: Program, raw: object, mode: int
    ) -> None:
        program.write("c.json", raw, mode)
        run = program.run("-c", "c.json", "--check", T=CLI_TOKEN)
        assert (run.code, "warning" in run.out + run.err) == (0, False)

    def test_a_warning_is_shown_at_the_start(
        self, program: Program, closed_port: int
    ) -> None:
        program.write("c.json", [near(closed_port)], 0o644)
        with program.serve("-c", "c.json", "--port", "0") as serving:
            assert any("chmod 600 c.json" in line for line in serving.lines)

    def test_a_taken_port_names_its_owner(self, program: Program) -> None:
        program.write("c.json", [far()])
        with socket.create_server(("127.0.0.1", 0)) as holder:
            port = str(holder.getsockname()[1])
            run = program.run("-c", "c.json", "--port", port)
        assert (run.code, run.out) == (2, "")
        assert run.err.count("\n") == 1
        assert f"127.0.0.1:{port}" in run.err
        assert str(os.getpid()) in run.err

    def test_an_address_of_another_machine_gets_one_line(
        self, program: Program
    ) -> None:
        raw = {"endpoints": [far()], "server": {"clientKeys": [CLI_KEY], "port": 0}}
        program.write("c.json", raw)
        run = program.run("-c", "c.json", "--host", "192.0.2.1")
        assert (run.code, run.out) == (2, "")
        assert run.err.count("\n") == 1
        assert "192.0.2.1" in run.err

    @pytest.mark.parametrize("kind", ["a folder", "in no folder", "a link"])
    def test_a_log_file_that_cannot_be_written_gets_one_line(
        self, program: Program, kind: str
    ) -> None:
        path = program.folder / "x.log"
        if kind == "a folder":
            path.mkdir()
        if kind == "in no folder":
            path = program.folder / "absent" / "x.log"
        if kind == "a link":
            path.symlink_to(program.folder / "elsewhere")
        raw = {"endpoints": [far()], "server": {"port": 0}, "log": {"file": str(path)}}
        program.write("c.json", raw)
        run = program.run("-c", "c.json")
        assert (run.code, run.out) == (2, "")
        assert run.err.count("\n") == 1
        assert str(path) in run.err

    def test_the_log_goes_to_its_file(self, program: Program, closed_port: int) -> None:
        log = {"file": "x.log", "format": "json", "level": "info"}
        program.write("c.json", {"endpoints": [near(closed_port)], "log": log})
        with program.serve("-c", "c.json", "--port", "0") as serving:
            assert serving.get("/nowhere")[0] == 404
            run = serving.stop()
        lines = (program.folder / "x.log").read_text().splitlines()
        facts = [json.loads(line) for line in lines]
        (line,) = [f for f in facts if f["event"] == "exchange"]
        assert (line["path"], line["status"], line["ended"]) == (
            "/nowhere",
            404,
            "refused",
        )
        assert run.err == ""

    def test_the_demo_needs_nothing(self, program: Program) -> None:
        with program.serve("--demo", "--port", "0") as serving:
            status, health = serving.get("/health")
            assert (status, len(health["endpoints"])) == (200, 2)
            status, models = serving.get("/v1/models")
            assert (status, bool(models["data"])) == (200, True)
            assert serving.stop().code == 0


@at_both_ends
class TestCliStop:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_a_signal_ends_it_well(
        self, program: Program, closed_port: int, number: signal.Signals
    ) -> None:
        program.write("c.json", [near(closed_port)])
        with program.serve("-c", "c.json", "--port", "0") as serving:
            run = serving.stop(number)
            assert run.code == 0
            assert "Traceback" not in run.err
            with pytest.raises(OSError, match=r"."):
                socket.create_connection(("127.0.0.1", serving.port), LIMIT_S)

    def begin_stream(self, serving: Serving) -> tuple[socket.socket, bytes]:
        """Return a client's socket with what it has read, an open stream behind it."""
        client = socket.create_connection(("127.0.0.1", serving.port), LIMIT_S)
        body = b"{}"
        client.sendall(
            b"POST /v1/messages HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (serving.port, len(body), body)
        )
        received = b""
        while b"message_start" not in received.partition(b"\r\n\r\n")[2]:
            more = client.recv(4096)
            assert more, received
            received += more
        return client, received

    @pytest.mark.parametrize("again", range(4))
    def test_a_second_signal_ends_it_at_once(
        self, program: Program, held_stream: SilentUpstream, again: int
    ) -> None:
        del again  # the moment between two signals is never the same
        raw = {
            "endpoints": [near(held_stream.port)],
            "server": {"drainSeconds": 3600},
            "failover": {"gateSeconds": 0},
        }
        program.write("c.json", raw)
        with program.serve("-c", "c.json", "--port", "0") as serving:
            client, received = self.begin_stream(serving)
            with client:
                serving.process.send_signal(signal.SIGTERM)
                assert serving.process.stderr is not None
                while "finishing" not in serving.process.stderr.readline():
                    assert serving.process.poll() is None
                assert serving.stop().code == 0
                with contextlib.suppress(ConnectionResetError):
                    while True:
                        more = client.recv(4096)
                        if not more:
                            break
                        received += more
        assert not received.endswith(claude_lb.LAST_CHUNK)

    def test_the_drain_ends_when_its_time_is_over(
        self, program: Program, held_stream: SilentUpstream
    ) -> None:
        raw = {
            "endpoints": [near(held_stream.port)],
            "server": {"drainSeconds": 0},
            "failover": {"gateSeconds": 0},
        }
        program.write("c.json", raw)
        with program.serve("-c", "c.json", "--port", "0") as serving:
            client, received = self.begin_stream(serving)
            with client:
                run = serving.stop()
                assert run.code == 0
                with contextlib.suppress(ConnectionResetError):
                    while True:
                        more = client.recv(4096)
                        if not more:
                            break
                        received += more
        assert not received.endswith(claude_lb.LAST_CHUNK)
        assert "Traceback" not in run.err


# -- files beside the program ----------------------------------------------


class TestLaunchd:
    PATH = TOP / "launchd" / "com.claude-lb.plist"

    @pytest.fixture
    def job(self) -> dict[str, Any]:
        loaded: dict[str, Any] = plistlib.loads(self.PATH.read_bytes())
        return loaded

    def test_the_folder_holds_the_plist_alone(self) -> None:
        names = [p.name for p in self.PATH.parent.iterdir() if p.name[0] != "."]
        assert names == ["com.claude-lb.plist"]

    def test_the_label_is_the_files_name(self, job: dict[str, Any]) -> None:
        assert f"{job['Label']}.plist" == self.PATH.name

    def test_an_interpreter_starts_the_program_with_the_services_file(
        self, job: dict[str, Any]
    ) -> None:
        python, script, flag, config = job["ProgramArguments"]
        assert re.fullmatch(r"python3(\.\d+)?", Path(python).name)
        assert Path(script).name == PROGRAM.name
        assert flag == "-c"
        assert config == claude_lb.CONFIG_PLACES[-1]
        claude_lb.build_parser().parse_args([flag, config])

    def test_every_path_is_absolute_and_plain(self, job: dict[str, Any]) -> None:
        python, script, _, config = job["ProgramArguments"]
        paths = [python, script, config, job["WorkingDirectory"]]
        paths += [job["StandardOutPath"], job["StandardErrorPath"]]
        paths += job["EnvironmentVariables"]["PATH"].split(":")
        for path in paths:
            assert path.startswith("/"), path
            assert not set(path) & set("~$*{}"), path

    def test_the_two_logs_are_two_files(self, job: dict[str, Any]) -> None:
        assert job["StandardOutPath"] != job["StandardErrorPath"]

    def test_it_starts_at_login_and_again_after_a_crash(
        self, job: dict[str, Any]
    ) -> None:
        assert job["RunAtLoad"] is True
        assert job["KeepAlive"] in (True, {"SuccessfulExit": False})
        assert job["ThrottleInterval"] >= 10

    def test_the_environment_is_one_that_the_program_reads(
        self, job: dict[str, Any], program: Program
    ) -> None:
        variables = dict(job["EnvironmentVariables"])
        assert set(variables) == {"PATH", "PORT", "LOG_LEVEL"}
        variables.pop("PATH")
        program.write("c.json", [far()])
        run = program.run("-c", "c.json", "--check", **variables)
        assert listening_on(run) == f"127.0.0.1:{claude_lb.DEFAULT_PORT}"

    def test_a_stop_leaves_time_to_drain(self, job: dict[str, Any]) -> None:
        assert job["ExitTimeOut"] > claude_lb.ServerSettings().drain_s

    def test_there_are_descriptors_for_every_connection(
        self, job: dict[str, Any]
    ) -> None:
        needed = 2 * claude_lb.ServerSettings().max_connections
        assert job["SoftResourceLimits"]["NumberOfFiles"] > needed
        soft = job["SoftResourceLimits"]["NumberOfFiles"]
        assert job["HardResourceLimits"]["NumberOfFiles"] >= soft

    def test_what_it_writes_is_its_users_alone(self, job: dict[str, Any]) -> None:
        assert job["Umask"] == 0o077

    def test_it_holds_no_secret(self) -> None:
        text = self.PATH.read_text(encoding="utf-8")
        assert not re.search(r"(?i)sk-ant|auth_?token|api_?key", text)

    def test_one_documented_line_is_to_be_edited(self, job: dict[str, Any]) -> None:
        lines = self.PATH.read_text(encoding="utf-8").splitlines()
        marks = [i for i, line in enumerate(lines) if "<!-- EDIT" in line]
        assert len(marks) == 1
        script = job["ProgramArguments"][1]
        assert lines[marks[0] + 1].strip() == f"<string>{script}</string>"
        assert sum(script in line for line in lines) == 1

    def test_its_comment_tells_how_to_install_it(self, job: dict[str, Any]) -> None:
        text = self.PATH.read_text(encoding="utf-8")
        assert f"cp launchd/{self.PATH.name} ~/Library/LaunchAgents/" in text
        place = f"~/Library/LaunchAgents/{self.PATH.name}"
        assert f"launchctl bootstrap gui/$(id -u) {place}" in text
        assert f"launchctl bootout gui/$(id -u)/{job['Label']}" in text

    def test_a_file_of_settings_is_there_at_the_edited_path(
        self, job: dict[str, Any], program: Program
    ) -> None:
        arguments = job["ProgramArguments"]
        program.write("loadbalancer.conf", [far()])
        argv = [sys.executable, str(PROGRAM), arguments[2], "loadbalancer.conf"]
        done = subprocess.run(
            [*argv, "--check"],
            cwd=program.folder,
            env=environment(program.folder),
            capture_output=True,
            timeout=LIMIT_S,
            check=False,
        )
        assert done.returncode == 0


class TestExample:
    PATH = TOP / "endpoints.example.json"

    def test_it_is_a_list_of_two_pairs(self) -> None:
        pairs = json.loads(self.PATH.read_text(encoding="utf-8"))
        assert [set(pair) for pair in pairs] == [{"baseURL", "authToken"}] * 2
        assert len({pair["authToken"] for pair in pairs}) == 2

    def test_its_placeholders_are_refused_with_a_clear_message(
        self, program: Program
    ) -> None:
        text = self.PATH.read_text(encoding="utf-8")
        program.write("endpoints.json", text)
        run = program.run("--check")
        assert (run.code, run.out) == (2, "")
        assert len(run.err.splitlines()) == 2
        for i, line in enumerate(run.err.splitlines()):
            assert f"endpoints[{i}].authToken: " in line
            assert "placeholder" in line

    def test_it_loads_once_real_tokens_are_put_in(self, program: Program) -> None:
        pairs = json.loads(self.PATH.read_text(encoding="utf-8"))
        text = self.PATH.read_text(encoding="utf-8")
        for i, pair in enumerate(pairs):
            text = text.replace(pair["authToken"], f"{CLI_TOKEN}{i}")
        program.write("endpoints.json", text)
        run = program.run("--check")
        assert run.code == 0, run
        names = re.findall(r"(?m)^endpoint (\S+): (\S+) api_key", run.out)
        assert len({name for name, _ in names}) == 2
        assert [url for _, url in names] == [pair["baseURL"] for pair in pairs]

    def test_both_pairs_reach_the_same_messages_path(self) -> None:
        pairs = json.loads(self.PATH.read_text(encoding="utf-8"))
        for pair in pairs:
            pair["authToken"] = CLI_TOKEN
        source = claude_lb._Environment()
        config = claude_lb.parse_config(json.dumps(pairs), name="f", source=source)
        assert {e.prefix for e in config.endpoints} == {""}


# -- source layout ---------------------------------------------------------


# ============================================================================
# 5. SOURCE
# ============================================================================


BANNER = re.compile(r"^# =+\n# (\d+)\. ([A-Z][A-Z /&-]*?)(?: \((pure)\))?\n# =+$", re.M)
IMPURE_MODULES = frozenset(
    [
        "time",
        "socket",
        "http",
        "threading",
        "os",
        "random",
        "secrets",
        "subprocess",
        "select",
        "selectors",
        "ssl",
        "signal",
        "queue",
        "sys",
        "shutil",
        "resource",
        "socketserver",
        "curses",
        "sqlite3",
        "logging",
        "tempfile",
        "multiprocessing",
        "asyncio",
    ]
)
IMPURE_NAMES = frozenset({"print", "open", "input", "exec", "eval", "formatdate"})
LOCK_OWNERS = {
    "BodyBudget",
    "Log",
    "Pool",
    "Renewer",
    "Workers",
    "_AccountTable",
    "_Place",
}
MAX_FUNCTION_LINES = 60
MAX_CLASS_LINES = 300
LONG_BY_NATURE = {"build_parser"}
VISIBLE = {
    "LICENSE",
    "README.md",
    "claude_lb.py",
    "endpoints.example.json",
    "launchd",
    "test_claude_lb.py",
}
# What the file may import on Python 3.9, which has no sys.stdlib_module_names.
STDLIB_3_9 = frozenset(
    [
        "__future__",
        "abc",
        "argparse",
        "ast",
        "base64",
        "binascii",
        "bisect",
        "collections",
        "contextlib",
        "copy",
        "csv",
        "curses",
        "dataclasses",
        "datetime",
        "difflib",
        "email",
        "enum",
        "errno",
        "fcntl",
        "fnmatch",
        "functools",
        "getpass",
        "glob",
        "gzip",
        "hashlib",
        "heapq",
        "hmac",
        "html",
        "http",
        "importlib",
        "inspect",
        "io",
        "ipaddress",
        "itertools",
        "json",
        "locale",
        "math",
        "mimetypes",
        "operator",
        "os",
        "pathlib",
        "platform",
        "plistlib",
        "pwd",
        "queue",
        "random",
        "re",
        "resource",
        "sched",
        "secrets",
        "select",
        "selectors",
        "shlex",
        "shutil",
        "signal",
        "socket",
        "socketserver",
        "sqlite3",
        "ssl",
        "stat",
        "statistics",
        "string",
        "struct",
        "subprocess",
        "sys",
        "sysconfig",
        "tempfile",
        "termios",
        "textwrap",
        "threading",
        "time",
        "traceback",
        "types",
        "typing",
        "unicodedata",
        "urllib",
        "uuid",
        "warnings",
        "weakref",
        "zlib",
    ]
)


class Section(NamedTuple):
    """A banner of the file."""

    number: int
    title: str
    pure: bool
    line: int


SECTIONS = [
    Section(int(m[1]), m[2], bool(m[3]), SOURCE.count("\n", 0, m.start()) + 1)
    for m in BANNER.finditer(SOURCE)
]


def text_of(node: ast.stmt) -> str:
    """Return the lines of a top-level statement."""
    return "\n".join(LINES[node.lineno - 1 : node.end_lineno])


def section_of(line: int) -> int:
    """Return the number of the section that holds `line`; 0 is the header."""
    return max((s.number for s in SECTIONS if s.line <= line), default=0)


def annotations_in(node: ast.AST) -> set[int]:
    """Return the identities of the nodes below `node` that are only type hints."""
    hints: list[ast.AST | None] = []
    for sub in ast.walk(node):
        if isinstance(sub, (ast.FunctionDef, ast.AsyncFunctionDef)):
            every = [*sub.args.posonlyargs, *sub.args.args, *sub.args.kwonlyargs]
            every += [a for a in (sub.args.vararg, sub.args.kwarg) if a is not None]
            hints += [sub.returns, *(a.annotation for a in every)]
        elif isinstance(sub, ast.AnnAssign):
            hints.append(sub.annotation)
    return {id(x) for hint in hints if hint is not None for x in ast.walk(hint)}


def names_read(node: ast.AST) -> set[str]:
    """Return every bare name that `node` reads, annotations left out."""
    hints = annotations_in(node)
    return {
        sub.id
        for sub in ast.walk(node)
        if isinstance(sub, ast.Name)
        and isinstance(sub.ctx, ast.Load)
        and id(sub) not in hints
    }


def names_made(node: ast.AST) -> set[str]:
    """Return the names that a top-level statement defines."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return {node.name}
    targets: list[ast.expr] = []
    if isinstance(node, ast.Assign):
        targets = node.targets
    elif isinstance(node, ast.AnnAssign):
        targets = [node.target]
    return {sub.id for t in targets for sub in ast.walk(t) if isinstance(sub, ast.Name)}


DEFINED: dict[str, int] = {}
for _node in TREE.body:
    for _name in names_made(_node):
        DEFINED.setdefault(_name, section_of(_node.lineno))


def imported_modules() -> set[str]:
    """Return the top-level names of every module that the file imports anywhere."""
    found = set()
    for node in ast.walk(TREE):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            found.add((node.module or "").partition(".")[0])
    return found


def visible_top_level() -> set[str]:
    """Return what a clone shows with `ls`."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(
            command, cwd=TOP, capture_output=True, text=True, check=True
        )
        names = {line.partition("/")[0] for line in done.stdout.splitlines()}
        names = {name for name in names if (TOP / name).exists()}
    except (OSError, subprocess.CalledProcessError):
        names = {path.name for path in TOP.iterdir()} - {"__pycache__"}
    return {name for name in names if not name.startswith(".")}


class TestSourceLayout:
    def test_the_contents_match_the_banners(self) -> None:
        listed = re.findall(
            r"^ {4}(\d+)\. ([A-Z][A-Z /&-]*?)  ", claude_lb.__doc__ or "", re.M
        )
        assert [(str(s.number), s.title) for s in SECTIONS] == listed
        assert [s.number for s in SECTIONS] == list(range(1, len(SECTIONS) + 1))
        assert len(SECTIONS) > 10

    def test_no_banner_escapes_the_pattern(self) -> None:
        rulers = re.findall(r"^# =+$", SOURCE, re.M)
        assert len(rulers) == 2 * len(SECTIONS)

    def test_a_section_uses_only_sections_above_it(self) -> None:
        wrong = [
            (name, node.lineno)
            for node in TREE.body
            for name in sorted(names_read(node) & DEFINED.keys())
            if DEFINED[name] > section_of(node.lineno)
        ]
        assert wrong == []

    def test_no_name_is_defined_in_two_sections(self) -> None:
        twice = [
            (name, node.lineno)
            for node in TREE.body
            for name in names_made(node)
            if DEFINED[name] != section_of(node.lineno)
        ]
        assert twice == []

    def test_underscore_names_stay_in_their_section(self) -> None:
        wrong = [
            (name, node.lineno)
            for node in TREE.body
            for name in sorted(names_read(node) & DEFINED.keys())
            if name.startswith("_") and DEFINED[name] != section_of(node.lineno)
        ]
        assert wrong == []

    def test_underscore_names_are_used(self) -> None:
        read = {name for node in TREE.body for name in names_read(node)}
        hinted = {
            sub.id
            for node in TREE.body
            for sub in ast.walk(node)
            if isinstance(sub, ast.Name)
        }
        private = {name for name in DEFINED if name.startswith("_")}
        assert private <= read | hinted

    def test_pure_sections_touch_no_clock_socket_lock_file_or_log(self) -> None:
        pure = {s.number for s in SECTIONS if s.pure}
        assert len(pure) >= 8
        impure = IMPURE_MODULES | IMPURE_NAMES | {"Log", "Pool"}
        wrong = [
            (name, node.lineno)
            for node in TREE.body
            if section_of(node.lineno) in pure
            for name in sorted(names_read(node) & impure)
        ]
        assert wrong == []

    def test_pure_sections_ask_no_clock_of_datetime(self) -> None:
        pure = {s.number for s in SECTIONS if s.pure}
        clocks = {"now", "utcnow", "today", "monotonic", "time", "getenv", "environ"}
        wrong = [
            (sub.attr, sub.lineno)
            for node in TREE.body
            if section_of(node.lineno) in pure
            for sub in ast.walk(node)
            if isinstance(sub, ast.Attribute) and sub.attr in clocks
        ]
        assert wrong == []

    def test_pure_sections_import_nothing_of_their_own(self) -> None:
        pure = {s.number for s in SECTIONS if s.pure}
        wrong = [
            node.lineno
            for node in ast.walk(TREE)
            if isinstance(node, (ast.Import, ast.ImportFrom))
            and section_of(node.lineno) in pure
        ]
        assert wrong == []

    def test_locks_live_in_their_owners_only(self) -> None:
        kinds = re.compile(r"\bthreading\.(R?Lock|Condition|(Bounded)?Semaphore)\b")
        owners = {
            getattr(node, "name", f"line {node.lineno}")
            for node in TREE.body
            if kinds.search(text_of(node))
        }
        assert owners == LOCK_OWNERS

    def test_every_lock_says_what_it_guards(self) -> None:
        made = [x for x in LINES if "= threading.Lock()" in x]
        assert len(made) == len(LOCK_OWNERS)
        assert all("# guards " in line for line in made)

    def test_functions_fit_on_a_screen(self) -> None:
        long = [
            (node.name, (node.end_lineno or 0) - node.lineno + 1)
            for node in ast.walk(TREE)
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
            and node.name not in LONG_BY_NATURE
            and (node.end_lineno or 0) - node.lineno + 1 > MAX_FUNCTION_LINES
        ]
        assert long == []

    def test_classes_fit_in_a_sitting(self) -> None:
        long = [
            (node.name, (node.end_lineno or 0) - node.lineno + 1)
            for node in ast.walk(TREE)
            if isinstance(node, ast.ClassDef)
            and (node.end_lineno or 0) - node.lineno + 1 > MAX_CLASS_LINES
        ]
        assert long == []

    def test_it_imports_the_standard_library_alone(self) -> None:
        known = getattr(sys, "stdlib_module_names", STDLIB_3_9)
        assert imported_modules() - known == set()

    def test_every_import_is_used(self) -> None:
        read = {sub.id for sub in ast.walk(TREE) if isinstance(sub, ast.Name)}
        unused = [
            alias.asname or alias.name
            for node in TREE.body
            if isinstance(node, (ast.Import, ast.ImportFrom))
            and getattr(node, "module", "") != "__future__"
            for alias in node.names
            if (alias.asname or alias.name).partition(".")[0] not in read
        ]
        assert unused == []

    def test_nothing_is_done_at_import(self) -> None:
        plain = (
            ast.Import,
            ast.ImportFrom,
            ast.FunctionDef,
            ast.ClassDef,
            ast.Assign,
            ast.AnnAssign,
        )
        first, *rest, last = TREE.body
        assert isinstance(first, ast.Expr), "the docstring"
        assert isinstance(last, ast.If)
        assert ast.unparse(last.test) == "__name__ == '__main__'"
        assert [n.lineno for n in rest if not isinstance(n, plain)] == []

    def test_constants_are_made_without_effects(self) -> None:
        harmless = {"os", "socket", "select", "signal"}
        effects = (IMPURE_MODULES - harmless) | IMPURE_NAMES
        wrong = [
            (ast.unparse(sub.func), sub.lineno)
            for node in TREE.body
            if isinstance(node, (ast.Assign, ast.AnnAssign))
            for sub in ast.walk(node)
            if isinstance(sub, ast.Call)
            and ast.unparse(sub.func).partition(".")[0] in effects
        ]
        assert wrong == []

    def test_importing_it_says_and_starts_nothing(self, tmp_path: Path) -> None:
        code = (
            "import threading, sys; n = threading.active_count();"
            f"sys.path.insert(0, {str(TOP)!r}); import claude_lb;"
            "assert threading.active_count() == n"
        )
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", code],
            cwd=tmp_path,
            env=environment(tmp_path),
            capture_output=True,
            timeout=LIMIT_S,
            check=False,
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
        assert list(tmp_path.iterdir()) == []

    def test_only_the_command_line_prints_or_ends_the_process(self) -> None:
        cli = SECTIONS[-1]
        assert cli.title == "CLI"
        ends = {"print", "input", "SystemExit", "exit", "quit"}
        reaches = {"sys.argv", "sys.exit", "os._exit", "os.environ", "os.getenv"}
        wrong = [
            (ast.unparse(sub), sub.lineno)
            for node in TREE.body
            if section_of(node.lineno) < cli.number
            for sub in ast.walk(node)
            if (isinstance(sub, ast.Name) and sub.id in ends)
            or (isinstance(sub, ast.Attribute) and ast.unparse(sub) in reaches)
        ]
        assert wrong == []

    def test_every_public_name_is_documented(self) -> None:
        bodies = [
            TREE.body,
            *(n.body for n in TREE.body if isinstance(n, ast.ClassDef)),
        ]
        bare = [
            node.name
            for body in bodies
            for node in body
            if isinstance(node, (ast.FunctionDef, ast.ClassDef))
            and not node.name.startswith("_")
            and ast.get_docstring(node) is None
        ]
        assert bare == []

    def test_no_line_is_longer_than_88_columns(self) -> None:
        long = [i for i, x in enumerate(LINES, 1) if len(x) > 88]
        assert long == []

    def test_lines_end_plainly(self) -> None:
        assert "\r" not in SOURCE
        assert "\t" not in SOURCE
        assert SOURCE.endswith("\n")
        assert [x for x in LINES if x != x.rstrip()] == []

    def test_no_path_of_a_machine_stands_in_a_file(self) -> None:
        machine = re.compile(r"/(home|root|Users|work|private)/")
        for name in visible_top_level():
            paths = (TOP / name).rglob("*") if (TOP / name).is_dir() else [TOP / name]
            for path in paths:
                if path.is_file() and path.name != "test_claude_lb.py":
                    text = path.read_text(encoding="utf-8")
                    found = [m[0] for m in machine.finditer(text)]
                    assert found == [], path.name

    def test_the_program_can_be_executed(self) -> None:
        assert SOURCE.startswith("#!/usr/bin/env python3\n")
        assert os.access(PROGRAM, os.X_OK)

    def test_the_top_level_shows_the_six_agreed_names(self) -> None:
        assert visible_top_level() == VISIBLE


# ============================================================================
# FOREIGN
# ============================================================================

SECRET = "sk-ant-SECRET"
Check = Callable[[Any], bool]
Reader = Callable[[Any], claude_lb.Translation]

# C as its first example file has it, with what the table of its keys adds.
PROVIDERS_1: dict[str, Any] = {
    "providers": [
        {
            "name": "yourapi",
            "type": "anthropic",
            "base_url": "https://yourapi.example/v1",
            "auth_type": "auth_token",
            "auth_value": SECRET,
            "enabled": True,
        },
        {
            "name": "official",
            "type": "anthropic",
            "base_url": "https://api.anthropic.com",
            "auth_type": "api_key",
            "auth_value": "passthrough",
            "proxy": "http://127.0.0.1:10808",
        },
        {
            "name": "openrouter",
            "type": "openai",
            "base_url": "https://openrouter.example/api/v1",
            "auth_type": "api_key",
            "auth_value": SECRET,
            "enabled": True,
        },
        {
            "name": "zed",
            "type": "zed",
            "base_url": "https://zed.example",
            "auth_type": "api_key",
            "auth_value": SECRET,
            "zed_config": {"default_mode": "normal", "thread_ttl": 3600},
        },
    ],
    "model_routes": {
        "claude-3-5-sonnet-20241022": [
            {"provider": "yourapi", "model": "claude-3-5-sonnet", "priority": 1},
            {"provider": "official", "model": "passthrough", "priority": 2},
            {"provider": "openrouter", "model": "anthropic/sonnet", "priority": 3},
        ],
        "*haiku*": [
            {"provider": "official", "model": "passthrough", "priority": 1},
            {"provider": "zed", "model": "m", "priority": 2, "enabled": False},
        ],
    },
    "settings": {
        "selection_strategy": "priority",
        "failure_cooldown": 90,
        "request_timeout": 30,
        "idle_recovery_interval": 200,
        "failover_http_codes": [404, 529],
        "failover_error_types": ["overloaded_error", "connect_timeout"],
        "streaming_timeout": 120,
        "streaming_activity_timeout": 60,
        "deduplication": {"include_max_tokens_in_signature": True},
        "log_level": "DEBUG",
        "log_color": True,
        "host": "127.0.0.1",
        "port": 8080,
        "app_name": "Claude Code Provider Balancer",
        "app_version": "0.3.0",
    },
}

PROVIDERS_2: dict[str, Any] = {
    "providers": [
        {
            "name": "Claude Code Official",
            "type": "anthropic",
            "base_url": "https://api.anthropic.com",
            "auth_type": "auth_token",
            "auth_value": "oauth",
            "account_email": "me@example.com",
            "proxy": "http://127.0.0.1:10808",
            "enabled": False,
        },
        {
            "name": "GAC",
            "type": "anthropic",
            "base_url": "https://gac.example/claudecode",
            "auth_type": "api_key",
            "auth_value": SECRET,
            "streaming_mode": "auto",
        },
    ],
    "model_routes": {
        "*opus*": [
            {"provider": "GAC", "model": "passthrough", "priority": 1},
            {
                "provider": "Claude Code Official",
                "model": "passthrough",
                "priority": 2,
                "account_email": "me@example.com",
            },
        ]
    },
    "settings": {
        "selection_strategy": "round_robin",
        "failure_cooldown": 300,
        "unhealthy_threshold": 2,
        "unhealthy_reset_on_success": True,
        "unhealthy_reset_timeout": 300,
        "reload": True,
        "reload_includes": ["*.py", "config.yaml"],
        "timeouts": {
            "non_streaming": {
                "connect_timeout": 30,
                "read_timeout": 60,
                "pool_timeout": 30,
            },
            "streaming": {
                "connect_timeout": 20,
                "read_timeout": 120,
                "pool_timeout": 30,
            },
            "caching": {"deduplication_timeout": 180},
        },
        "sticky_provider_duration": 240,
        "token_counting": {"always_use_local": False},
        "unhealthy_exception_patterns": ["connection", "timeout"],
        "unhealthy_response_body_patterns": ['"type"\\s*:\\s*"error"'],
        "unhealthy_http_codes": [402, 404, 500],
        "log_level": "INFO",
        "log_file_path": "logs/logs.jsonl",
        "host": "127.0.0.1",
        "port": 9090,
        "auth": {"enabled": True, "api_key": SECRET, "exempt_paths": ["/health"]},
        "oauth": {"enable_persistence": True, "proxy": "http://127.0.0.1:1"},
        "deduplication": {
            "enabled": True,
            "include_max_tokens_in_signature": False,
            "sse_error_cleanup_delay": 3,
        },
        "testing": {"simulate_delay": False, "delay_seconds": 10},
    },
}

# D as its documents show it, then with everything that later versions added.
GROUPS_1: dict[str, Any] = {
    "server": {
        "port": 8080,
        "switch_threshold_ms": 60,
        "graceful_switch_timeout_ms": 30000,
    },
    "groups": [
        {
            "name": "primary-provider",
            "auth_token_env": "AUTH_TOKEN_MAIN",
            "default": True,
            "endpoints": [
                {"url": "https://api.provider-a.example", "name": "Provider-A-1"},
                {"url": "https://api2.provider-a.example", "name": "Provider-A-2"},
            ],
        }
    ],
    "health_check": {
        "interval_seconds": 120,
        "timeout_seconds": 15,
        "auth_token": SECRET,
        "claude_binary_path": "/path/to/claude/binary",
    },
}
GROUPS_2: dict[str, Any] = {
    "server": {"port": 8081},
    "ui": {"language": "zh"},
    "endpoint_groups": [
        {
            "name": "early",
            "auth_token": SECRET,
            "endpoints": [
                {"url": "https://cn.example", "name": "CN1", "flag": "x"},
                {"url": "https://hk.example", "name": "HK", "default": True},
            ],
            "health_check": {"interval_seconds": 5},
        }
    ],
    "health_check": {
        "interval_seconds": 60,
        "min_interval_seconds": 30,
        "max_interval_seconds": 3600,
        "timeout_seconds": 15,
        "dynamic_scaling": True,
        "claude_binary_path": "claude",
        "switch_threshold_ms": 50,
    },
    "retry": {
        "enabled": True,
        "max_attempts": 4,
        "base_delay_ms": 500,
        "backoff_multiplier": 1.5,
    },
    "logging": {
        "output_level": "warn",
        "proxy_detail": "detailed",
        "console_enabled": True,
        "file_enabled": True,
        "file_path": "logs/zephyr.log",
        "max_file_size": 104857600,
        "max_files": 10,
        "json_format": True,
    },
}
PROVIDER_FILES = [PROVIDERS_1, PROVIDERS_2]
GROUP_FILES = [GROUPS_1, GROUPS_2]
EXAMPLES = [(claude_lb.from_providers, f) for f in PROVIDER_FILES] + [
    (claude_lb.from_groups_file, f) for f in GROUP_FILES
]

# -- our raw configuration, as the checker behind the readers will want it -----


def number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def flag(value: object) -> bool:
    return isinstance(value, bool)


def whole(value: object) -> bool:
    return isinstance(value, int) and not flag(value)


def one_of(*names: str) -> Callable[[object], bool]:
    return lambda value: value in names


STRATEGY = one_of("round_robin", "priority", "random", "fastest")
CREDENTIAL = {
    "authToken": text,
    "authTokenEnv": text,
    "authType": one_of("api_key", "auth_token", "passthrough"),
}
ENDPOINT = {
    **CREDENTIAL,
    "name": text,
    "baseURL": text,
    "enabled": flag,
    "proxy": text,
    "allowHttp": flag,
}
MEMBER = {"name": text, "baseURL": text, "allowHttp": flag, "default": flag}
GROUP = {**CREDENTIAL, "name": text, "default": flag}
OPTION = {"endpoint": text, "model": text, "priority": whole, "enabled": flag}
FOREIGN_SECTIONS: dict[str, dict[str, Check]] = {
    "server": {
        "host": text,
        "port": whole,
        "clientKeys": lambda v: bool(v) and all(text(k) for k in v),
    },
    "timeouts": dict.fromkeys(("connect", "firstByte", "idle"), number),
    "log": {
        "level": one_of("debug", "info", "warn", "error"),
        "format": one_of("text", "json"),
        "color": one_of("auto", "on", "off"),
        "file": text,
        "lifecycle": flag,
    },
    "balancing": {
        "strategy": STRATEGY,
        "affinity": one_of("off", "last_good", "conversation"),
        "idleRecoverySeconds": number,
        "switchThresholdMs": number,
        "dedupe": flag,
    },
    "failover": {
        "attempts": lambda v: whole(v) and 1 <= v <= 100,
        "retries": lambda v: whole(v) and 0 <= v <= 10,
        "retryDelayMs": number,
        "retryBackoff": number,
        "cooldown": number,
        "statuses": lambda v: all(
            k.isdigit() and 400 <= int(k) <= 599 and a == "failover"
            for k, a in v.items()
        ),
        "errorTypes": lambda v: set(v.values()) <= {"failover"},
        "resendAmbiguous": flag,
    },
    "health": {
        "method": one_of("cli"),
        "intervalSeconds": number,
        "minIntervalSeconds": number,
        "maxIntervalSeconds": number,
        "timeoutSeconds": number,
        "dynamicScaling": flag,
        "claudeBinaryPath": text,
        "gracefulSwitchTimeoutMs": number,
    },
}


def assert_fits(raw: dict[str, Any], keys: Mapping[str, Check]) -> None:
    for key, value in raw.items():
        assert key in keys, key
        assert keys[key](value), (key, value)


def assert_ours(raw: dict[str, Any]) -> None:
    """Check a raw configuration against our schema."""
    names = set()
    for endpoint in raw.get("endpoints", []):
        assert_fits(endpoint, ENDPOINT)
        names.add(endpoint["name"])
    assert len(names) == len(raw.get("endpoints", []))
    for group in raw.get("groups", []):
        assert_fits({k: v for k, v in group.items() if k != "endpoints"}, GROUP)
        for member in group["endpoints"]:
            assert_fits(member, MEMBER)
    for options in raw.get("routes", {}).values():
        assert options
        for option in options:
            assert_fits(option, OPTION)
            assert option["endpoint"] in names
    for name, section in raw.items():
        if name not in ("endpoints", "groups", "routes", "accounts"):
            assert_fits(section, FOREIGN_SECTIONS[name])


def translated(file: dict[str, Any]) -> claude_lb.Translation:
    """Translate a file that has no faults."""
    read = (
        claude_lb.from_providers if "providers" in file else claude_lb.from_groups_file
    )
    result = read(file)
    assert result.faults == ()
    assert_ours(result.raw)
    return result


def provider(**changes: object) -> dict[str, Any]:
    """Return one provider of C; None takes a key away."""
    whole = {
        "name": "a",
        "type": "anthropic",
        "base_url": "https://a.example",
        "auth_type": "api_key",
        "auth_value": SECRET,
        **changes,
    }
    return {k: v for k, v in whole.items() if v is not None}


def providers(*entries: dict[str, Any], **rest: object) -> dict[str, Any]:
    """Return a file of C."""
    return {"providers": list(entries) or [provider()], **rest}


def settings(**given: object) -> claude_lb.Translation:
    """Translate a file of C with these settings."""
    return translated(providers(settings=given))


def groups(**rest: object) -> dict[str, Any]:
    """Return a file of D with one group."""
    return {
        "groups": [
            {
                "name": "g",
                "auth_token_env": "TOKEN_G",
                "endpoints": [{"name": "e", "url": "https://e.example"}],
            }
        ],
        "server": {"port": 8080},
        **rest,
    }


def said(result: claude_lb.Translation, *words: str) -> bool:
    """Tell whether one note holds all the words."""
    return any(all(word in note for word in words) for note in result.notes)


class TestForeignKind:
    @pytest.mark.parametrize(
        "raw",
        [
            [],
            None,
            "text",
            {},
            {"endpoints": []},
            {"endpoints": [], "providers": []},
            {"groups": [{"name": "g", "authTokenEnv": "T", "endpoints": []}]},
            {"groups": [{"name": "g", "endpoints": [{"name": "e", "url": "u"}]}]},
            {"groups": [], "server": {"port": 1}, "log": {}},
            {"groups": "text", "server": []},
        ],
    )
    def test_is_ours(self, raw: object) -> None:
        assert claude_lb.foreign_kind(raw) == ""

    @pytest.mark.parametrize(
        "raw", [*PROVIDER_FILES, {"model_routes": {}}, {"providers": None}]
    )
    def test_is_a_providers_file(self, raw: object) -> None:
        assert claude_lb.foreign_kind(raw) == "providers"

    @pytest.mark.parametrize(
        "raw",
        [
            *GROUP_FILES,
            groups(),
            {"groups": [], "server": {"switch_threshold_ms": 50}},
            {"groups": [], "health_check": {}},
        ],
    )
    def test_is_a_groups_file(self, raw: object) -> None:
        assert claude_lb.foreign_kind(raw) == "zephyr"


class TestExamples:
    def test_first_providers_file(self) -> None:
        raw = translated(PROVIDERS_1).raw
        assert raw["endpoints"] == [
            {
                "name": "yourapi",
                "baseURL": "https://yourapi.example/v1",
                "authType": "auth_token",
                "authToken": SECRET,
                "enabled": True,
            },
            {
                "name": "official",
                "baseURL": "https://api.anthropic.com",
                "authType": "passthrough",
                "proxy": "http://127.0.0.1:10808",
                "enabled": True,
            },
            {
                "name": "openrouter",
                "baseURL": "https://openrouter.example/api/v1",
                "authType": "api_key",
                "authToken": SECRET,
                "enabled": False,
            },
            {
                "name": "zed",
                "baseURL": "https://zed.example",
                "authType": "api_key",
                "authToken": SECRET,
                "enabled": False,
            },
        ]
        assert raw["routes"] == {
            "claude-3-5-sonnet-20241022": [
                {"endpoint": "yourapi", "model": "claude-3-5-sonnet", "priority": 1},
                {"endpoint": "official", "model": "passthrough", "priority": 2},
            ],
            "*haiku*": [
                {"endpoint": "official", "model": "passthrough", "priority": 1}
            ],
        }
        assert raw["server"] == {"host": "127.0.0.1", "port": 8080}
        assert raw["log"] == {"level": "debug", "color": "auto"}
        assert raw["timeouts"] == {"firstByte": 30, "idle": 60}
        assert raw["balancing"] == {
            "strategy": "priority",
            "affinity": "last_good",
            "idleRecoverySeconds": 200,
            "dedupe": True,
        }
        assert raw["failover"] == {
            "attempts": 2,
            "cooldown": 90,
            "statuses": {"404": "failover", "529": "failover"},
            "errorTypes": {"overloaded_error": "failover"},
            "resendAmbiguous": True,
        }

    def test_second_providers_file(self) -> None:
        raw = translated(PROVIDERS_2).raw
        assert [e["enabled"] for e in raw["endpoints"]] == [False, True]
        assert "authToken" not in raw["endpoints"][0]
        assert [o["endpoint"] for o in raw["routes"]["*opus*"]] == ["GAC"]
        assert raw["server"] == {
            "host": "127.0.0.1",
            "port": 9090,
            "clientKeys": [SECRET],
        }
        assert raw["timeouts"] == {"connect": 30, "firstByte": 120, "idle": 120}
        assert raw["log"] == {
            "level": "info",
            "file": "logs/logs.jsonl",
            "format": "json",
        }
        assert raw["balancing"]["idleRecoverySeconds"] == 240
        assert set(raw["failover"]["statuses"]) == {"402", "404", "500"}

    def test_first_groups_file(self) -> None:
        raw = translated(GROUPS_1).raw
        assert raw == {
            "groups": [
                {
                    "name": "primary-provider",
                    "authTokenEnv": "AUTH_TOKEN_MAIN",
                    "authType": "auth_token",
                    "default": True,
                    "endpoints": [
                        {
                            "name": "Provider-A-1",
                            "baseURL": "https://api.provider-a.example",
                        },
                        {
                            "name": "Provider-A-2",
                            "baseURL": "https://api2.provider-a.example",
                        },
                    ],
                }
            ],
            "server": {"host": "127.0.0.1", "port": 8080},
            "balancing": {"strategy": "fastest", "switchThresholdMs": 60},
            "failover": {"attempts": 2, "resendAmbiguous": True},
        }

    def test_second_groups_file(self) -> None:
        raw = translated(GROUPS_2).raw
        (group,) = raw["groups"]
        assert group["authToken"] == SECRET
        assert "default" not in group
        assert group["endpoints"] == [
            {"name": "CN1", "baseURL": "https://cn.example"},
            {"name": "HK", "baseURL": "https://hk.example", "default": True},
        ]
        assert raw["server"]["port"] == 8081
        assert raw["log"] == {
            "level": "warn",
            "lifecycle": True,
            "format": "json",
            "file": "logs/zephyr.log",
        }
        assert raw["failover"] == {
            "attempts": 2,
            "retries": 3,
            "retryDelayMs": 500,
            "retryBackoff": 1.5,
            "resendAmbiguous": True,
        }

    @pytest.mark.parametrize(("read", "file"), EXAMPLES)
    def test_every_setting_has_a_note(self, read: Reader, file: dict[str, Any]) -> None:
        notes = "\n".join(read(file).notes)
        entries = ("providers", "model_routes", "groups", "endpoint_groups")
        for section, keys in file.items():
            if section not in entries:
                for key in keys:
                    silent = (
                        key == "failover_error_types"  # one note for each entry
                        or f"{section}.{key}" in ("retry.enabled",)
                        or key == "file_enabled"  # said with file_path
                    )
                    assert silent or f"{section}.{key}" in notes

    @pytest.mark.parametrize(("read", "file"), EXAMPLES)
    def test_leaves_the_file_as_it_is(self, read: Reader, file: dict[str, Any]) -> None:
        before = json.dumps(file)
        read(file)
        assert json.dumps(file) == before

    @pytest.mark.parametrize(("read", "file"), EXAMPLES)
    def test_secrets_stay_out_of_notes(
        self, read: Reader, file: dict[str, Any]
    ) -> None:
        result = read(file)
        assert SECRET in json.dumps(result.raw) or "health_check" in file
        assert not any("SECRET" in note for note in result.notes)


class TestProviders:
    @pytest.mark.parametrize("auth", ["api_key", "auth_token"])
    def test_keeps_how_the_credential_is_sent(self, auth: str) -> None:
        (endpoint,) = translated(providers(provider(auth_type=auth))).raw["endpoints"]
        assert (endpoint["authType"], endpoint["authToken"]) == (auth, SECRET)

    @pytest.mark.parametrize(
        "given",
        [
            {"auth_value": "passthrough"},
            {"auth_value": "passthrough", "auth_type": "auth_token"},
            {"auth_type": "passthrough"},
        ],
    )
    def test_passthrough_has_no_token(self, given: dict[str, Any]) -> None:
        (endpoint,) = translated(providers(provider(**given))).raw["endpoints"]
        assert endpoint["authType"] == "passthrough"
        assert "authToken" not in endpoint

    @pytest.mark.parametrize(
        ("given", "word"),
        [
            ({"type": "openai"}, "OpenAI"),
            ({"type": "zed", "zed_config": {}}, "Zed"),
            ({"auth_type": "oauth"}, "OAuth"),
            ({"auth_value": "oauth"}, "OAuth"),
        ],
    )
    def test_what_is_not_served_is_disabled(
        self, given: dict[str, Any], word: str
    ) -> None:
        file = providers(provider(), provider(name="b", **given))
        file["model_routes"] = {"*": [{"provider": "b", "model": "m", "priority": 1}]}
        result = translated(file)
        assert result.raw["endpoints"][1]["enabled"] is False
        assert "routes" not in result.raw
        assert said(result, "providers[1]", "disabled", word)
        assert ("accounts" in result.raw) is (word == "OAuth")
        assert said(result, "model_routes.*[0]", "left out")

    def test_a_disabled_one_needs_no_credential(self) -> None:
        (endpoint,) = translated(providers(provider(enabled=False, auth_value=""))).raw[
            "endpoints"
        ]
        assert endpoint["enabled"] is False

    @pytest.mark.parametrize("missing", ["name", "type", "base_url", "auth_value"])
    @pytest.mark.parametrize("gone", [None, ""])
    def test_tells_what_is_missing(self, missing: str, gone: object) -> None:
        entry = {**provider(), missing: gone}
        faults = claude_lb.from_providers(providers(entry)).faults
        assert f"providers[0]: {missing} is missing" in faults

    @pytest.mark.parametrize(
        "url", ["http://a.example", "http://a.example:8080/v1", "http://192.0.2.1"]
    )
    def test_http_beyond_this_machine_is_allowed_aloud(self, url: str) -> None:
        result = translated(providers(provider(base_url=url)))
        assert result.raw["endpoints"][0]["allowHttp"] is True
        assert said(result, "providers[0]", "in the clear")

    @pytest.mark.parametrize(
        "url",
        ["https://a.example", "http://127.0.0.1:9", "http://localhost", "http://["],
    )
    def test_other_urls_are_not(self, url: str) -> None:
        (endpoint,) = translated(providers(provider(base_url=url))).raw["endpoints"]
        assert "allowHttp" not in endpoint

    def test_a_name_beyond_ascii_becomes_a_plain_one(self) -> None:
        file = providers(provider(name="官方"))
        file["model_routes"] = {"*": [{"provider": "官方", "model": "m"}]}
        result = translated(file)
        assert result.raw["endpoints"][0]["name"] == "provider-1"
        assert result.raw["routes"]["*"][0]["endpoint"] == "provider-1"
        assert said(result, "providers[0].name", "provider-1")

    def test_of_one_name_the_first_enabled_counts(self) -> None:
        result = translated(
            providers(
                provider(enabled=False),
                provider(base_url="https://b.example"),
                provider(base_url="https://c.example"),
            )
        )
        (endpoint,) = result.raw["endpoints"]
        assert endpoint["baseURL"] == "https://b.example"
        assert said(result, "providers[2]", "left out")

    def test_each_enabled_one_may_be_tried(self) -> None:
        off = provider(name="off", enabled=False)
        file = providers(off, *(provider(name=f"n{i}") for i in range(7)))
        assert translated(file).raw["failover"]["attempts"] == 7

    def test_no_providers_is_a_fault(self) -> None:
        assert claude_lb.from_providers({}).faults == (
            "the file: providers is missing",
        )


class TestForeignRoutes:
    def routed(self, pattern: str) -> claude_lb.Translation:
        return translated(
            providers(model_routes={pattern: [{"provider": "a", "model": "m"}]})
        )

    @pytest.mark.parametrize("pattern", ["*", "*sonnet*", "claude-3.5-x", "*a*b-c*"])
    def test_patterns_that_match_the_same(self, pattern: str) -> None:
        assert not said(self.routed(pattern), "longer names")

    @pytest.mark.parametrize("pattern", ["claude-*", "*haiku", "a*b", "*3.5*"])
    def test_patterns_that_match_otherwise(self, pattern: str) -> None:
        assert said(self.routed(pattern), f"model_routes.{pattern}:", "longer names")

    def test_keep_the_order_of_the_file(self) -> None:
        option = {"provider": "a", "model": "m", "priority": 1}
        file = providers(model_routes={n: [option] for n in ("z", "*b*", "a")})
        assert list(translated(file).raw["routes"]) == ["z", "*b*", "a"]

    def test_a_disabled_option_stays_disabled(self) -> None:
        option = {"provider": "a", "model": "m", "priority": 1, "enabled": False}
        raw = translated(providers(model_routes={"x": [option]})).raw
        assert raw["routes"]["x"][0]["enabled"] is False

    def test_a_disabled_provider_is_skipped_aloud(self) -> None:
        file = providers(provider(), provider(name="b", enabled=False))
        options = [{"provider": n, "model": "m"} for n in ("b", "a")]
        result = translated({**file, "model_routes": {"x": options}})
        assert [o["endpoint"] for o in result.raw["routes"]["x"]] == ["a"]
        assert said(result, "model_routes.x[0]", "disabled")

    def test_an_unknown_provider_is_a_fault(self) -> None:
        file = providers(provider(name="anthropic"))
        file["model_routes"] = {"x": [{"provider": "antropic", "model": "m"}]}
        assert claude_lb.from_providers(file).faults == (
            "model_routes.x[0].provider: no provider of that name"
            " (did you mean anthropic?)",
        )

    @pytest.mark.parametrize("missing", ["provider", "model"])
    def test_tell_what_is_missing(self, missing: str) -> None:
        option = {"provider": "a", "model": "m"}
        del option[missing]
        file = providers(model_routes={"x": [option]})
        faults = claude_lb.from_providers(file).faults
        assert faults == (f"model_routes.x[0]: {missing} is missing",)


class TestSettings:
    def test_what_is_not_said_is_as_it_was_there(self) -> None:
        result = translated(providers())
        assert result.raw["server"] == {"port": 8080}
        assert result.raw["balancing"]["strategy"] == "priority"
        assert result.raw["balancing"]["affinity"] == "last_good"
        assert result.raw["failover"] == {
            "attempts": 1,
            "cooldown": 60,
            "resendAmbiguous": True,
        }
        assert said(result, "server.port = 8080")

    @pytest.mark.parametrize("name", ["priority", "round_robin", "random"])
    def test_strategies(self, name: str) -> None:
        result = settings(selection_strategy=name)
        assert result.raw["balancing"]["strategy"] == name
        assert said(result, "best three") == (name == "random")

    def test_says_that_more_fails_over_here(self) -> None:
        assert said(translated(providers()), "401, 403, 429, 529 and 5xx")

    @pytest.mark.parametrize(
        ("theirs", "ours"),
        [
            ("DEBUG", "debug"),
            ("INFO", "info"),
            ("WARNING", "warn"),
            ("ERROR", "error"),
            ("CRITICAL", "error"),
        ],
    )
    def test_levels(self, theirs: str, ours: str) -> None:
        assert settings(log_level=theirs).raw["log"]["level"] == ours

    @pytest.mark.parametrize(("theirs", "ours"), [(True, "auto"), (False, "off")])
    def test_color(self, theirs: bool, ours: str) -> None:
        assert settings(log_color=theirs).raw["log"]["color"] == ours

    @pytest.mark.parametrize(
        ("name", "status"),
        [
            ("rate_limit_exceeded", "429"),
            ("too_many_requests", "429"),
            ("internal_server_error", "500"),
            ("bad_gateway", "502"),
            ("service_unavailable", "503"),
            ("gateway_timeout", "504"),
        ],
    )
    def test_error_names_that_are_statuses(self, name: str, status: str) -> None:
        failover = settings(failover_error_types=[name]).raw["failover"]
        assert failover["statuses"] == {status: "failover"}
        assert failover["resendAmbiguous"] is True

    @pytest.mark.parametrize("name", ["overloaded_error", "invalid_request_error"])
    def test_error_names_of_the_api(self, name: str) -> None:
        failover = settings(failover_error_types=[name]).raw["failover"]
        assert failover["errorTypes"] == {name: "failover"}

    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("connection_error", "always"),
            ("ssl_error", "always"),
            ("read_timeout", "failover.resendAmbiguous = true"),
            ("timeout_error", "failover.resendAmbiguous = true"),
            ("unknown_error", "messages are not searched"),
            ("没有可用token", "messages are not searched"),
        ],
    )
    def test_error_names_without_a_row_of_their_own(
        self, name: str, words: str
    ) -> None:
        result = settings(failover_error_types=[name])
        assert "errorTypes" not in result.raw["failover"]
        assert said(result, "settings.failover_error_types[0]", words)

    def test_empty_lists_say_nothing(self) -> None:
        raw = settings(failover_error_types=[], failover_http_codes=[]).raw
        assert "statuses" not in raw["failover"]

    def test_a_switched_off_key_is_not_taken(self) -> None:
        for auth in ({"api_key": SECRET}, {"api_key": SECRET, "enabled": False}):
            result = settings(auth=auth)
            assert "clientKeys" not in result.raw["server"]
            assert said(result, "settings.auth.api_key", "if auth.enabled")

    def test_a_lock_without_a_key_does_not_open_the_door(self) -> None:
        file = providers(settings={"auth": {"enabled": True, "api_key": ""}})
        faults = claude_lb.from_providers(file).faults
        assert faults == ("settings.auth: api_key is missing",)

    def test_deduplication_can_be_off(self) -> None:
        raw = settings(deduplication={"enabled": False}).raw
        assert raw["balancing"]["dedupe"] is False

    def test_the_longest_of_several_limits_counts(self) -> None:
        limits = {"streaming": {"read_timeout": 20}}
        raw = settings(request_timeout=50, timeouts=limits).raw
        assert raw["timeouts"] == {"firstByte": 50, "idle": 20}

    def test_null_is_as_if_not_given(self) -> None:
        given = {"settings": None, "model_routes": None}
        assert translated(providers(**given)) == translated(providers())


class TestGroups:
    def test_a_token_in_the_file(self) -> None:
        file = groups()
        group = file["groups"][0]
        group["auth_token"] = group.pop("auth_token_env")
        (made,) = translated({"endpoint_groups": [group]}).raw["groups"]
        assert made["authToken"] == "TOKEN_G"
        assert made["authType"] == "auth_token"

    @pytest.mark.parametrize("missing", ["name", "auth_token_env", "endpoints"])
    def test_tell_what_is_missing(self, missing: str) -> None:
        file = groups()
        del file["groups"][0][missing]
        faults = claude_lb.from_groups_file(file).faults
        assert faults == (f"groups[0]: {missing} is missing",)

    @pytest.mark.parametrize("missing", ["name", "url"])
    def test_tell_what_an_endpoint_misses(self, missing: str) -> None:
        file = groups()
        del file["groups"][0]["endpoints"][0][missing]
        faults = claude_lb.from_groups_file(file).faults
        assert faults == (f"groups[0].endpoints[0]: {missing} is missing",)

    def test_an_empty_group_is_a_fault(self) -> None:
        file = groups()
        file["groups"][0]["endpoints"] = []
        faults = claude_lb.from_groups_file(file).faults
        assert faults == ("groups[0]: endpoints is missing",)

    @pytest.mark.parametrize("given", [{}, {"groups": []}, {"health_check": {}}])
    def test_no_groups_is_a_fault(self, given: dict[str, Any]) -> None:
        faults = claude_lb.from_groups_file(given).faults
        assert faults == ("the file: groups is missing",)

    def test_http_and_names_as_they_could_be(self) -> None:
        file = groups()
        file["groups"][0]["endpoints"] = [{"name": "美国", "url": "http://e.example"}]
        result = translated(file)
        (endpoint,) = result.raw["groups"][0]["endpoints"]
        assert endpoint == {
            "name": "group-1-1",
            "baseURL": "http://e.example",
            "allowHttp": True,
        }
        assert said(result, "groups[0].endpoints[0]", "in the clear")

    def test_what_is_not_said_is_as_it_was_there(self) -> None:
        raw = translated(groups(server={})).raw
        assert raw["server"] == {"host": "127.0.0.1", "port": 8080}
        assert raw["balancing"] == {"strategy": "fastest", "switchThresholdMs": 50}
        assert raw["failover"] == {"attempts": 1, "resendAmbiguous": True}

    @pytest.mark.parametrize(
        ("given", "retries"),
        [
            ({}, 2),
            ({"max_attempts": 1}, 0),
            ({"max_attempts": 0}, 0),
            ({"max_attempts": 11}, 10),
            ({"enabled": False, "max_attempts": 5}, 0),
        ],
    )
    def test_retries(self, given: dict[str, Any], retries: int) -> None:
        failover = translated(groups(retry=given)).raw["failover"]
        assert failover["retries"] == retries
        assert failover["retryDelayMs"] == 1000
        assert failover["retryBackoff"] == 2.0

    def test_more_retries_than_we_do_are_cut_aloud(self) -> None:
        result = translated(groups(retry={"max_attempts": 12}))
        assert result.raw["failover"]["retries"] == 10
        assert said(result, "retry.max_attempts", "10")

    @pytest.mark.parametrize(
        ("theirs", "ours"), [("trace", "debug"), ("warn", "warn"), ("error", "error")]
    )
    @pytest.mark.parametrize("key", ["output_level", "level"])
    def test_levels(self, key: str, theirs: str, ours: str) -> None:
        raw = translated(groups(logging={key: theirs})).raw
        assert raw["log"]["level"] == ours

    @pytest.mark.parametrize(
        ("detail", "shown"),
        [("basic", False), ("standard", False), ("detailed", True), ("debug", True)],
    )
    def test_detail(self, detail: str, shown: bool) -> None:
        raw = translated(groups(logging={"proxy_detail": detail})).raw
        assert raw["log"] == {"lifecycle": shown}

    def test_the_log_file_needs_its_switch(self) -> None:
        off = translated(groups(logging={"file_path": "x.log"}))
        on = translated(groups(logging={"file_enabled": True}))
        assert "log" not in off.raw
        assert said(off, "logging.file_path", "if file_enabled")
        assert on.raw["log"] == {"file": "logs/claude-zephyr.log"}

    def test_health_waits_for_its_section(self) -> None:
        result = translated(GROUPS_1)
        assert "health" not in result.raw
        assert said(result, "health_check.interval_seconds", "not in this version")
        assert said(result, "graceful_switch_timeout_ms", "not in this version")

    def test_a_threshold_in_the_wrong_place_is_named(self) -> None:
        result = translated(GROUPS_2)
        assert result.raw["balancing"]["switchThresholdMs"] == 50
        assert said(result, "health_check.switch_threshold_ms", "[server]")


class TestFaults:
    @pytest.mark.parametrize(
        ("file", "fault"),
        [
            ({"seting": {}}, "seting: unknown key"),
            (
                {"settings": {"failure_coldown": 1}},
                "settings.failure_coldown: unknown key"
                " (did you mean failure_cooldown?)",
            ),
            (
                {"settings": {"timeouts": {"streaming": {"read_timout": 1}}}},
                "settings.timeouts.streaming.read_timout: unknown key"
                " (did you mean read_timeout?)",
            ),
            ({"settings": []}, "settings: expected an object"),
            ({"settings": {"timeouts": 3}}, "settings.timeouts: expected an object"),
            ({"settings": {"port": "80"}}, "settings.port: expected a whole number"),
            ({"settings": {"port": True}}, "settings.port: expected a whole number"),
            (
                {"settings": {"failure_cooldown": math.nan}},
                "settings.failure_cooldown: expected a number",
            ),
            (
                {"settings": {"selection_strategy": "prioritys"}},
                "settings.selection_strategy: expected one of priority, round_robin,"
                " random (did you mean priority?)",
            ),
            (
                {"settings": {"failover_http_codes": [429, "500"]}},
                "settings.failover_http_codes[1]: expected a status from 400 to 599",
            ),
            (
                {"settings": {"failover_error_types": [1]}},
                "settings.failover_error_types[0]: expected a text",
            ),
            ({"model_routes": []}, "model_routes: expected an object"),
            ({"model_routes": {"x": {}}}, "model_routes.x: expected a list"),
            ({"model_routes": {"x": [1]}}, "model_routes.x[0]: expected an object"),
        ],
    )
    def test_of_a_providers_file(self, file: dict[str, Any], fault: str) -> None:
        (found,) = claude_lb.from_providers(providers(**file)).faults
        assert found.startswith(fault)

    @pytest.mark.parametrize(
        ("entry", "fault"),
        [
            ("text", "providers[0]: expected an object"),
            (provider(auth_value=[SECRET]), "providers[0].auth_value: expected a text"),
            (provider(auth_value=17), "providers[0].auth_value: expected a text"),
            (
                provider(auth_vaule=SECRET),
                "providers[0].auth_vaule: unknown key (did you mean auth_value?)",
            ),
            (
                provider(auth_type="apikey"),
                "providers[0].auth_type: expected one of api_key, auth_token,"
                " passthrough, oauth (did you mean api_key?)",
            ),
        ],
    )
    def test_of_a_provider(self, entry: Any, fault: str) -> None:
        assert claude_lb.from_providers({"providers": [entry]}).faults == (fault,)

    @pytest.mark.parametrize(
        ("file", "fault"),
        [
            ({"helth_check": {}}, "helth_check: unknown key (did you mean"),
            (
                {"health_check": {"intervall_seconds": 1}},
                "health_check.intervall_seconds: unknown key (did you mean",
            ),
            ({"server": {"port": "80"}}, "server.port: expected a whole number"),
            ({"groups": {}}, "groups: expected a list"),
            ({"groups": ["g"]}, "groups[0]: expected an object"),
            (
                {"logging": {"output_level": "inf"}},
                "logging.output_level: expected one of",
            ),
        ],
    )
    def test_of_a_groups_file(self, file: dict[str, Any], fault: str) -> None:
        (found,) = claude_lb.from_groups_file(groups(**file)).faults
        assert found.startswith(fault)


WEIRD: list[Any] = [
    None,
    True,
    0,
    -1,
    2.5,
    math.nan,
    math.inf,
    10**400,
    "",
    " ",
    "a.b[0]",
    "\ud800",
    [],
    [[]],
    [None],
    [{}],
    {},
    {"": {"": None}},
    {"_": 1},
]


def mutants(document: Any) -> Iterator[Any]:
    """Yield the document with each value in turn replaced by each weird one."""
    yield from WEIRD
    if isinstance(document, dict):
        for key, value in document.items():
            yield {k: v for k, v in document.items() if k != key}
            yield {**document, f"{key}x": value}
            for inner in mutants(value):
                yield {**document, key: inner}
    if isinstance(document, list):
        for index, value in enumerate(document):
            yield [*document, value]
            for inner in mutants(value):
                yield [*document[:index], inner, *document[index + 1 :]]


def any_document(chance: random.Random, names: list[str], depth: int) -> Any:
    """Return a random document whose keys are often those that readers know."""
    if depth == 0 or chance.random() < 0.2:
        return chance.choice(WEIRD)
    size = chance.randrange(4)
    inner = [any_document(chance, names, depth - 1) for _ in range(size)]
    if chance.random() < 0.3:
        return inner
    return {chance.choice(names): value for value in inner}


class TestAnyDocument:
    def check(self, read: Reader, raw: Any) -> None:
        result = read(raw)
        json.dumps(result.raw)
        said = [*result.notes, *result.faults]
        assert not any("SECRET" in line for line in said)
        if not result.faults:
            assert_ours(result.raw)

    @pytest.mark.parametrize(("read", "file"), EXAMPLES)
    def test_an_example_with_one_thing_wrong(
        self, read: Reader, file: dict[str, Any]
    ) -> None:
        for raw in mutants(file):
            self.check(read, raw)
            assert claude_lb.foreign_kind(raw) in ("", "providers", "zephyr")

    def test_nonsense(self) -> None:
        chance = random.Random(3141)
        dotted = [*claude_lb._PROVIDERS_FILE, *claude_lb._GROUPS_FILE]
        names = [part for name in dotted for part in name.split(".")]
        names += [
            *claude_lb._PROVIDER,
            *claude_lb._ROUTE,
            *claude_lb._GROUP,
            "*",
            "a.b",
        ]
        for _ in range(1500):
            raw = any_document(chance, names, 5)
            self.check(claude_lb.from_providers, raw)
            self.check(claude_lb.from_groups_file, raw)
            assert claude_lb.foreign_kind(raw) in ("", "providers", "zephyr")


class TestTables:
    def test_rules_are_of_known_kinds(self) -> None:
        tables = [
            claude_lb._PROVIDER,
            claude_lb._ROUTE,
            claude_lb._PROVIDERS_FILE,
            claude_lb._ERRORS,
            claude_lb._GROUP,
            claude_lb._MEMBER,
            claude_lb._GROUPS_FILE,
        ]
        for name, rule in (i for t in tables for i in claude_lb._settings(t).items()):
            assert (rule.wants in claude_lb._WANTS) != (
                rule.wants in claude_lb._CHOICES
            )
            assert rule.into or rule.note, name

    def test_a_name_is_a_setting_or_a_section_never_both(self) -> None:
        for table in (claude_lb._PROVIDERS_FILE, claude_lb._GROUPS_FILE):
            names = claude_lb._settings(table)
            for name in names:
                assert not any(other.startswith(f"{name}.") for other in names)

    def test_whatever_a_setting_becomes_is_ours(self) -> None:
        for table in (claude_lb._PROVIDERS_FILE, claude_lb._GROUPS_FILE):
            for rule in claude_lb._settings(table).values():
                for into in filter(None, rule.into.split("+")):
                    section, key = into.split(".")
                    assert section == "_" or key in FOREIGN_SECTIONS[section]


class TestText:
    def test_toml(self) -> None:
        pytest.importorskip("tomllib")
        raw = claude_lb.load_toml(
            '[server]\nport = 8080\n[[groups]]\nname = "g"\nauth_token_env = "T"\n'
            'endpoints = [{ url = "https://e.example", name = "e" }]\n'
        )
        assert claude_lb.foreign_kind(raw) == "zephyr"
        assert translated(raw).raw["groups"][0]["endpoints"][0]["name"] == "e"

    def test_toml_dates_are_faults(self) -> None:
        pytest.importorskip("tomllib")
        raw = claude_lb.load_toml("[server]\nport = 1979-05-27\n[health_check]\n")
        assert claude_lb.from_groups_file(raw).faults == (
            "server.port: expected a whole number",
        )

    def test_bad_toml_is_a_value_error(self) -> None:
        pytest.importorskip("tomllib")
        with pytest.raises(ValueError, match="declaration"):
            claude_lb.load_toml("[server")

    def test_a_python_without_toml_says_so(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "tomllib", None)
        with pytest.raises(ValueError, match=r"needs Python 3\.11 or newer"):
            claude_lb.load_toml("")

    @pytest.mark.parametrize(
        ("path", "target"),
        [("providers.yaml", "providers.json"), ("my config/c.YML", "my config/c.json")],
    )
    def test_yaml_gets_a_command(self, path: str, target: str) -> None:
        command = claude_lb.yaml_hint(path).split(": ", 1)[1]
        python, dash_c, code, *files = shlex.split(command)
        assert (python, dash_c, files) == ("python3", "-c", [path, target])
        compile(code, "hint", "exec")


# ============================================================================
# SELFTEST
# ============================================================================


def try_faults(*names: str) -> list[str]:
    return claude_lb.run_selftest(lambda _: None, names)


def broken_table(name: str, verdict: claude_lb.Verdict) -> tuple[claude_lb.Rule, ...]:
    """Return the table with another verdict in one row."""
    return tuple(
        r._replace(verdict=verdict) if r.name == name else r for r in claude_lb.RULES
    )


@at_both_ends
class TestSelftest:
    @at_both_ends
    def test_all_is_well(self) -> None:
        lines: list[str] = []
        assert claude_lb.run_selftest(lines.append) == []
        assert "MISS" not in "\n".join(lines)
        assert " 0 misses, " in lines[-1]

    def test_every_phase_has_faults(self) -> None:
        assert {f.phase for f in claude_lb.FAULTS} == set(claude_lb.Phase)

    def test_names_are_unique_in_their_phase(self) -> None:
        names = [(f.phase, f.name) for f in claude_lb.FAULTS]
        assert len(set(names)) == len(names)

    def test_code_says_how_it_went(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for misses, code in (([], 0), (["one"], 1)):
            monkeypatch.setattr(claude_lb, "run_selftest", lambda _, m=misses: m)
            assert claude_lb.cmd_selftest() == code


@at_both_ends
class TestWhatItFinds:
    def test_error_relayed_though_the_table_fails_over(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        relay = claude_lb.Verdict.RELAY
        monkeypatch.setattr(claude_lb.Course, "step", lambda *_: relay)
        misses = try_faults("500")
        assert any("status 500, expected 200" in m for m in misses)
        assert any("attempts (1, 0, 0), expected (1, 1, 0)" in m for m in misses)

    def test_table_that_pays_twice(self, monkeypatch: pytest.MonkeyPatch) -> None:
        rules = broken_table("lost", claude_lb.Verdict.ANOTHER)
        monkeypatch.setattr(claude_lb, "RULES", rules)
        misses = try_faults("closes in the head")
        assert any("resend off" in m and "served 2 times" in m for m in misses)
        assert any("resend off" in m and "served 3 times" in m for m in misses)

    def test_proxy_that_pays_twice(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def always(rule: claude_lb.Rule, chances: claude_lb.Chances) -> object:
            return selftest_next(rule, chances._replace(resend=True))

        selftest_next = claude_lb.next_step
        expecting = claude_lb.foreseen
        want = {c: expecting(c) for c in claude_lb.all_cells(["closes in the head"])}
        monkeypatch.setattr(claude_lb, "foreseen", want.__getitem__)
        monkeypatch.setattr(claude_lb, "next_step", always)
        misses = try_faults("closes in the head")
        assert any("served 2 times, the table says 1" in m for m in misses)

    def test_cooldown_that_is_forgotten(self, monkeypatch: pytest.MonkeyPatch) -> None:
        settle = claude_lb.Pool.settle

        def forget(
            pool: claude_lb.Pool, lease: claude_lb.Lease, _: object, *more: object
        ) -> object:
            return settle(pool, lease, None, *more)

        monkeypatch.setattr(claude_lb.Pool, "settle", forget)
        misses = try_faults("401")
        assert any("cooldowns ((), (), ()), expected" in m for m in misses)

    def test_cut_that_looks_like_a_good_end(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(claude_lb.SseWatch, "complete", lambda _: True)
        misses = try_faults("ends without message_stop")
        assert any("whole True, expected False" in m for m in misses)

    def test_hang(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(claude_lb, "_HANG_S", 0.5)
        monkeypatch.setattr(claude_lb.Exchange, "_give_up", lambda *_: None)
        assert any("it hangs" in m for m in try_faults("402"))

    def test_leak(self, monkeypatch: pytest.MonkeyPatch) -> None:
        kept: list[int] = []
        start = claude_lb.Exchange.start

        def leak(exchange: claude_lb.Exchange) -> None:
            kept.append(os.open(os.devnull, os.O_RDONLY))
            start(exchange)

        monkeypatch.setattr(claude_lb, "_SETTLE_S", 0.2)
        monkeypatch.setattr(claude_lb.Exchange, "start", leak)
        try:
            assert any("descriptors" in m for m in try_faults("a message"))
        finally:
            for descriptor in kept:
                os.close(descriptor)

    def test_row_without_a_fault(self, monkeypatch: pytest.MonkeyPatch) -> None:
        lonely = claude_lb.RULES[0]._replace(name="lonely")
        monkeypatch.setattr(claude_lb, "RULES", (*claude_lb.RULES, lonely))
        assert claude_lb._untried_rows() == ["row lonely: no fault tries it"]


# ============================================================================
# FAILOVER OVER SOCKETS
# ============================================================================

KINDS = {400: "invalid_request_error", 401: "authentication_error"}
KINDS.update({402: "billing_error", 403: "permission_error", 404: "not_found_error"})
KINDS.update({429: "rate_limit_error", 529: "overloaded_error"})
BAD = (500, 502, 503, 521, 522, 523, 525, 526)
AMBIGUOUS = (504, 520, 524)
NO_CREDIT = "Your credit balance is too low to access the API"
CAP = {"error_code": "enforced_spend_limit_reached"}
OUTSIDE = [
    {"mcp_servers": [{"type": "url", "url": "https://x.example", "name": "x"}]},
    {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
    {"tools": [{"type": "code_execution_20250825", "name": "code_execution"}]},
]
COUNT_TOKENS = "/v1/messages/count_tokens"
OVER_SECTIONS = ("balancing", "routes", "server", "timeouts")


def error_body(status: int, text: str = "no", **details: object) -> bytes:
    kind = KINDS.get(status, "api_error")
    error = {"type": kind, "message": text, "details": details}
    return json.dumps({"type": "error", "error": error, "request_id": "req_1"}).encode()


def says(status: int, body: bytes = b"", *fields: str) -> Answering:
    """Return what answers each request with an error."""
    return lambda wire, _: wire.answer(status, body or error_body(status), *fields)


def limited(seconds: object) -> Answering:
    return says(429, error_body(429), f"retry-after: {seconds}")


def hangs_up(wire: Wire, _: Received) -> None:
    raise HungUpError


def streams(*events: bytes) -> Answering:
    return lambda wire, _: wire.stream(*events)


def by_turns(turns: Sequence[threading.Event], *first: bytes) -> Answering:
    """Return what streams `first`, then an event after each turn, then the end."""

    def answering(wire: Wire, _: Received) -> None:
        wire.stream(*first, end=False)
        for number, turn in enumerate(turns):
            assert turn.wait(3 * BOUND_S)
            wire.send(chunk(delta(number)))
        wire.send(chunk(STOP) + b"0\r\n\r\n")

    return answering


def in_turn(*steps: Answering) -> Answering:
    """Return what does each step once, and the last one for ever."""
    left = list(steps)

    def answering(wire: Wire, request: Received) -> None:
        (left.pop(0) if len(left) > 1 else left[0])(wire, request)

    return answering


def over(lab: Lab, *answers: Any, **own: Any) -> Any:
    """Return a proxy with failover settings `own`, and what it stands over."""
    ups = [lab.upstream(a) if callable(a) else a for a in answers]
    sections = {name: own.pop(name) for name in OVER_SECTIONS if name in own}
    failover = {"retryDelayMs": 1, **own}
    return (lab.proxy(*ups, failover=failover, **sections), *ups)


def states(proxy: Proxy) -> dict[str, claude_lb.EndpointSnapshot]:
    found = proxy.server.services.pool.snapshot().endpoints
    return {e.endpoint.name: e for e in found}


def rules(proxy: Proxy, name: str = "up0") -> list[str]:
    """Return the rows of the table that keep attempts from an endpoint."""
    return [rule for _, rule, _ in states(proxy)[name].cooldowns]


def later(proxy: Proxy, seconds: float) -> None:
    """Let the pool's clock run ahead."""
    pool = proxy.server.services.pool
    clock = pool._clock
    pool._clock = lambda: clock() + seconds


def calls(*upstreams: ScriptedUpstream) -> list[int]:
    return [len(up.requests) for up in upstreams]


def served(proxy: Proxy, count: int, *fields: str) -> list[str]:
    """Return who answers so many messages."""
    return [served_by(proxy.post(None, *fields)) for _ in range(count)]


def served_by(answer: Answer) -> str:
    assert answer.status == 200, answer
    return answer.field("x-claude-lb-endpoint")


def trail(answer: Answer) -> str:
    return answer.field("x-claude-lb-attempts")


def check_relayed(answer: Answer, status: int, body: bytes = b"") -> None:
    """An upstream's own error, as it came."""
    assert (answer.status, answer.body) == (status, body or error_body(status)), answer


@at_both_ends
class TestFailover:
    @pytest.mark.parametrize(
        ("status", "text", "details", "fields", "rule"),
        [
            (401, "no", {}, (), "credential"),
            (402, "no", {}, (), "payment"),
            (403, "no", {}, (), "forbidden"),
            (403, "You have reached your specified API usage limits", {}, (), "credit"),
            (404, "model: claude-test", {}, (), "no-model"),
            (400, NO_CREDIT, {}, (), "credit"),
            (429, "no", {}, ("retry-after: 30",), "limited-model"),
            (429, "no", CAP, (), "spend-cap"),
            *((status, "no", {}, (), "server-error") for status in BAD),
        ],
    )
    def test_what_another_endpoint_can_mend(
        self, lab: Lab, status: int, text: str, details: Any, fields: Any, rule: str
    ) -> None:
        failing = says(status, error_body(status, text, **details), *fields)
        proxy, a, b = over(lab, failing, fine)
        answer = proxy.post()
        assert (served_by(answer), answer.body) == ("up1", OK_BODY)
        assert trail(answer) == f"up0 {status}, up1 200"
        row = proxy.row()
        assert (row["ended"], row["attempts"], row["endpoint"]) == ("ok", 2, "up1")
        assert rules(proxy) == [rule]
        assert [trail(proxy.post()) for _ in "ab"] == ["", ""]
        assert calls(a, b) == [1, 3]

    @pytest.mark.parametrize("times", [1, 2])
    def test_529_is_tried_once_more_in_place(self, lab: Lab, times: int) -> None:
        proxy, a, b = over(lab, in_turn(*[says(529)] * times, fine), fine)
        tried = ["up0 529, up0 200", "up0 529, up0 529, up1 200"][times - 1]
        assert trail(proxy.post()) == tried
        assert calls(a, b) == [2, times - 1]
        assert rules(proxy) == ["overloaded"][: times - 1]

    @pytest.mark.parametrize("bare", [1, 2])
    def test_a_bare_429_is_tried_at_one_other(self, lab: Lab, bare: int) -> None:
        proxy, *ups = over(lab, *[says(429)] * bare, *[fine] * (3 - bare))
        answer = proxy.post()
        if bare == 1:
            assert answer.status == 200
        else:
            check_relayed(answer, 429)
            assert answer.values("retry-after") == []
        assert calls(*ups) == [1, 1, 0]
        assert [rules(proxy, name) for name in states(proxy)] == [[], [], []]

    @pytest.mark.parametrize("status", [400, 404, 405, 409, 413, 418, 422])
    def test_the_clients_own_mistakes_are_relayed(self, lab: Lab, status: int) -> None:
        body = b'{"type":"error",  "error":{"type":"x","message":"\xe2\x80\xa8"}}\n'
        proxy, *ups = over(lab, says(status, body, "request-id: req_7"), fine)
        answer = proxy.post()
        check_relayed(answer, status, body)
        assert answer.field("request-id") == "req_7"
        assert trail(answer) == ""
        assert (calls(*ups), rules(proxy)) == ([1, 0], [])

    @pytest.mark.parametrize("status", AMBIGUOUS)
    def test_an_ambiguous_status(self, lab: Lab, status: int) -> None:
        proxy, *ups = over(lab, says(status), fine)
        answer = proxy.post()
        check_relayed(answer, status)
        assert answer.field("x-should-retry") == "true"
        assert (calls(*ups), rules(proxy)) == ([1, 0], ["working"])
        proxy, *_ = over(lab, *ups, resendAmbiguous=True)
        assert trail(proxy.post()) == f"up0 {status}, up1 200"
        lab.generating.clear()  # that was asked for

    @pytest.mark.parametrize("outside", OUTSIDE)
    @pytest.mark.parametrize(
        ("answering", "status"), [(says(504), 504), (hangs_up, 502)]
    )
    def test_what_acts_outside_is_never_sent_again(
        self, lab: Lab, outside: Any, answering: Answering, status: int
    ) -> None:
        proxy, *ups = over(lab, answering, fine, resendAmbiguous=True)
        assert proxy.post(message(**outside)).status == status
        assert calls(*ups) == [1, 0]

    @pytest.mark.parametrize("resend", [False, True])
    @pytest.mark.parametrize("how", ["closed", "reset", "in the head", "silence"])
    def test_no_answer_at_all(self, lab: Lab, how: str, resend: bool) -> None:
        def answering(wire: Wire, _: Received) -> None:
            if how == "in the head":
                wire.send(b"HTTP/1.1 200 OK\r\ncontent-")
            if how == "silence":
                wire.wait_closed()
            wire.close(reset=how == "reset")

        limits = {"firstByte": 0.2} if how == "silence" else {}
        own = {"resendAmbiguous": resend, "timeouts": limits}
        proxy, *ups = over(lab, answering, fine, **own)
        answer, silent = proxy.post(), how == "silence"
        assert calls(*ups) == [1, resend]
        if resend:
            assert served_by(answer) == "up1"
            lab.generating.clear()  # that was asked for
            return
        own_error(answer, *((408, "timeout_error") if silent else (502, "api_error")))
        assert answer.field("x-should-retry") == "true"
        assert rules(proxy) == ["silence" if silent else "lost"]

    @pytest.mark.parametrize("last", [True, False])
    def test_the_last_upstream_error_is_relayed(self, lab: Lab, last: bool) -> None:
        body = error_body(503, "of the last")
        b = says(503, body, "request-id: req_b", "x-should-retry: true")
        proxy, *_ = over(lab, *([says(500), b] if last else [b, lab.refusing()]))
        answer = proxy.post()
        check_relayed(answer, 503, body)
        assert answer.field("request-id") == "req_b"
        assert answer.field("x-should-retry") == "true"
        assert answer.field("x-claude-lb-endpoint") == f"up{last:d}"
        tried = "up0 500, up1 503" if last else "up0 503, up1 unreachable"
        assert trail(answer) == tried
        row = proxy.row()
        assert (row["ended"], row["attempts"]) == ("upstream_error", 2)

    @pytest.mark.parametrize("pair", [False, True])
    @pytest.mark.parametrize("how", ["long", "chunked", "to the end", "endless"])
    def test_error_bodies_of_any_shape(self, lab: Lab, how: str, pair: bool) -> None:
        data, closed = os.urandom(200_000), lab.gate()
        framing = {"long": b"content-length: 200000\r\n", "to the end": b""}

        def answering(wire: Wire, _: Received) -> None:
            wire.deny()
            start = b"HTTP/1.1 500 No\r\nX-Odd: 1\r\n"
            start += framing.get(how, b"transfer-encoding: chunked\r\n") + b"\r\n"
            try:
                wire.send(start + (data if how in framing else chunk(data)))
                while how == "endless":
                    wire.send(chunk(data))
                wire.send(b"0\r\n\r\n" if how == "chunked" else b"")
            finally:
                closed.set()
            if how == "to the end":
                raise HungUpError

        proxy, *_ = over(lab, answering, *[fine] * pair)
        client = proxy.client().post()
        head, got = client.head(), b""
        assert head.status == (200 if pair else 500)
        assert head.field("x-odd") == ("" if pair else "1")
        while not pair and len(got) < len(data):
            got += client.more()
        assert got[: len(data)] == data[: len(got)]
        if pair or how != "endless":
            assert client.rest() == (OK_BODY if pair else b"")
        client.close()
        assert closed.wait(PROMPT_S)

    @pytest.mark.parametrize("pair", [False, True])
    def test_an_error_body_that_stalls(self, lab: Lab, pair: bool) -> None:
        go = lab.gate()

        def answering(wire: Wire, _: Received) -> None:
            wire.deny()
            wire.send(b"HTTP/1.1 500 No\r\ncontent-length: 10\r\n\r\n01234")
            assert go.wait(BOUND_S)
            wire.send(b"56789")

        client = over(lab, answering, *[fine] * pair)[0].client().post()
        client.sock.settimeout(PROMPT_S)
        assert client.head().status == (200 if pair else 500)
        assert pair or client.until(b"4") == b"01234"
        go.set()
        assert client.rest() == (OK_BODY if pair else b"56789")

    def test_the_connection_of_a_whole_error_is_used_again(self, lab: Lab) -> None:
        wires: list[Wire] = []

        def answering(wire: Wire, _: Received) -> None:
            wires.append(wire)
            wire.answer(403, error_body(403))

        proxy, *_ = over(lab, answering, fine)
        assert proxy.post().status == 200
        assert proxy.post(None, "x-claude-lb-endpoint: up0").status == 403
        assert len(wires) == 2
        assert wires[0] is wires[1]

    def test_an_error_that_closes_speaks_for_itself_alone(self, lab: Lab) -> None:
        def answering(wire: Wire, request: Received) -> None:
            says(529, error_body(529), "connection: close")(wire, request)
            raise HungUpError

        proxy, *ups = over(lab, answering, fine, retryDelayMs=100)
        assert trail(proxy.post()) == "up0 529, up0 529, up1 200"
        assert calls(*ups) == [2, 1]

    @pytest.mark.parametrize("coding", ["identity", "gzip"])
    def test_the_rest_of_an_error_body_is_ignored(self, lab: Lab, coding: str) -> None:
        asked, sent = lab.gate(), lab.gate()

        def long(wire: Wire, _: Received) -> None:
            wire.deny()
            head = f"HTTP/1.1 500 No\r\ncontent-encoding: {coding}\r\n"
            wire.send(f"{head}content-length: 200000\r\n\r\n".encode() + b"x" * 99_999)
            assert asked.wait(BOUND_S)
            wire.send(b"x" * 100_001)
            sent.set()

        def slow(wire: Wire, _: Received) -> None:
            asked.set()
            assert sent.wait(BOUND_S)
            wire.stream(START, STOP)

        proxy, *ups = over(lab, long, slow)
        assert proxy.post().body == START + STOP
        assert (calls(*ups), rules(proxy, "up1")) == ([1, 1], [])

    @pytest.mark.parametrize("number", [errno.ENETUNREACH, errno.EADDRNOTAVAIL])
    def test_rows_5_and_13_a_network_that_is_gone_cools_nobody_down(
        self, lab: Lab, monkeypatch: pytest.MonkeyPatch, number: int
    ) -> None:
        # No network namespace here: the error comes from the nearest call.
        gone = OSError(number, os.strerror(number))
        monkeypatch.setattr(claude_lb, "_start_connect", lambda _: (None, gone))
        proxy, *_ = over(lab, lab.refusing(), lab.refusing())
        own_error(proxy.post(), 502, "api_error")
        assert [rules(proxy, name) for name in states(proxy)] == [[], []]

    def test_rows_17_to_19_addresses_outlive_the_name_server(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        now, limits = [1000.0], []
        answers: list[Any] = [["first"], ["second"], OSError("gone"), TimeoutError()]

        def resolving(host: str, port: int, until: float, _: object) -> Any:
            limits.append(until)
            found = answers.pop(0)
            if isinstance(found, Exception):
                raise found
            return found

        monkeypatch.setattr(claude_lb, "resolve", resolving)
        book = claude_lb.Addresses(clock=lambda: now[0])

        def look_up() -> Any:
            return book.of("x.example", 443, now[0] + 4.0, None)

        assert [look_up(), look_up()] == [["first"], ["second"]]  # it may change
        assert [look_up(), look_up()] == [["second"], ["second"]]  # not found, hangs
        # One that hangs leaves time to connect by what is known
        assert limits == [1004.0, 1002.0, 1002.0, 1002.0]
        now[0] += claude_lb.ADDRESSES_S
        answers.append(OSError("gone"))
        with pytest.raises(OSError, match="gone"):
            look_up()

    def test_row_17_a_name_that_is_not_found_goes_to_the_next_endpoint(
        self, lab: Lab, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real = socket.getaddrinfo

        def resolving(host: Any, *rest: Any, **more: Any) -> Any:
            if host == "gone.example":
                raise socket.gaierror(socket.EAI_NONAME, "not known")
            return real(host, *rest, **more)

        monkeypatch.setattr(socket, "getaddrinfo", resolving)
        endpoint = {"baseURL": "http://gone.example", "allowHttp": True}
        proxy, *_ = over(lab, endpoint, fine)
        assert served(proxy, 1) == ["up1"]
        assert rules(proxy) == ["unreachable"]


# -- 8. the gate -----------------------------------------------------------

PING_EVENT = sse("ping")
GOOD = START + delta(1) + STOP


def gated(lab: Lab, *answers: Any, **own: Any) -> Any:
    return over(lab, *answers, **{"gateSeconds": 30, **own})


def error_event(kind: str) -> bytes:
    return sse("error", error={"type": kind, "message": "of the \u2028 stream"})


def spoils(whole: bytes, size: int) -> Answering:
    """Return what streams an early error in pieces of `size`."""
    pieces = [whole[at : at + size] for at in range(0, len(whole), size)]

    def answering(wire: Wire, _: Received) -> None:
        wire.deny()
        wire.send(CHUNKED_SSE)
        for piece in pieces:
            wire.send(chunk(piece))
        wire.send(b"0\r\n\r\n")

    return answering


@at_both_ends
class TestGate:
    @pytest.mark.parametrize("size", [1, 10_000])
    @pytest.mark.parametrize("prefix", [b"", START + PING_EVENT, b": hello\n\n"])
    @pytest.mark.parametrize(
        ("kind", "status"),
        [
            ("overloaded_error", 529),
            ("rate_limit_error", 429),
            ("api_error", 500),
            ("of_tomorrow_error", 500),
        ],
    )
    def test_row_27_an_early_error_fails_over_unseen(
        self, lab: Lab, kind: str, status: int, prefix: bytes, size: int
    ) -> None:
        event = error_event(kind)
        proxy, a, _ = gated(lab, spoils(prefix + event, size), streams(GOOD))
        answer = proxy.post(message(stream=True))
        assert (served_by(answer), answer.body) == ("up1", GOOD)
        tried = "up0 529, " * (status == 529) + f"up0 {status}, up1 200"
        assert trail(answer) == tried
        answer = gated(lab, a)[0].post(message(stream=True))
        check_relayed(answer, status, event.partition(b"data: ")[2].strip())
        assert answer.field("content-type") == "application/json"

    @pytest.mark.parametrize("resend", [False, True])
    @pytest.mark.parametrize("events", [b"", START + PING_EVENT, b"event: messa"])
    @pytest.mark.parametrize("end", ["ended", "cut", "reset"])
    def test_a_stream_without_content_is_an_honest_502(
        self, lab: Lab, events: bytes, end: str, resend: bool
    ) -> None:
        def answering(wire: Wire, _: Received) -> None:
            wire.stream(*([events] if events else []), end=end == "ended")
            wire.close(reset=end == "reset")

        own = {"resendAmbiguous": resend}
        proxy, *ups = gated(lab, answering, streams(GOOD), **own)
        answer = proxy.post()
        assert (calls(*ups), rules(proxy)) == ([1, resend], ["cut-early"])
        if resend:
            assert answer.body == GOOD
            lab.generating.clear()  # that was asked for
        else:
            own_error(answer, 502, "api_error")
            assert answer.field("x-should-retry") == "true"

    @pytest.mark.parametrize("late", [False, True])
    @pytest.mark.parametrize("end", ["error", "cut"])
    def test_row_28_nothing_is_replayed(self, lab: Lab, end: str, late: bool) -> None:
        event, go = error_event("overloaded_error"), lab.gate()
        first = START if late else START + delta(1)

        def answering(wire: Wire, _: Received) -> None:
            wire.stream(first, end=False)
            assert go.wait(BOUND_S)
            if end == "cut":
                raise HungUpError
            wire.send(chunk(event) + b"0\r\n\r\n")

        proxy, *ups = gated(lab, answering, fine, gateSeconds=0.05 if late else 30)
        client = proxy.client().post()
        assert client.head().status == 200
        assert client.until(first) == first
        go.set()
        if end == "cut":
            client.cut()
        else:
            assert client.rest() == event
        row = proxy.row()
        told = {"error": "upstream_error", "cut": "truncated"}[end]
        assert (row["ended"], row["attempts"]) == (told, 1)
        assert (calls(*ups), rules(proxy)) == ([1, 0], [f"{end}-late"])

    @pytest.mark.parametrize("why", ["late", "long", "encoded", "not messages"])
    def test_what_is_not_held_back_any_longer(self, lab: Lab, why: str) -> None:
        go, first = lab.gate(), START
        if why == "long":
            first += PING_EVENT * (300_000 // len(PING_EVENT))
        head = CHUNKED_SSE
        if why == "encoded":
            first = gzip.compress(START)[:12]
            head = head[:-2] + b"content-encoding: gzip\r\n\r\n"

        def answering(wire: Wire, _: Received) -> None:
            wire.send(head + chunk(first))
            assert go.wait(BOUND_S)
            wire.send(chunk(delta(1)) + chunk(STOP) + b"0\r\n\r\n")

        proxy, _ = gated(lab, answering, gateSeconds=0.05 if why == "late" else 600)
        path = "/v1/complete" if why == "not messages" else "/v1/messages"
        client = proxy.client().ask("POST", path, message())
        client.sock.settimeout(PROMPT_S)
        assert client.head().status == 200
        seen = b""
        while len(seen) < len(first):
            seen += client.more()
        go.set()
        assert seen + client.rest() == first + delta(1) + STOP

    def test_bytes_pass_the_gate_exactly(self, lab: Lab) -> None:
        odd = b": c\r\n\r\n" + START.replace(b"\n", b"\r\n") + PING_EVENT + b"\n\n"
        odd += delta("\u2028\x85 event: error\n") + b"data: [DONE]\n\n" + STOP

        def answering(wire: Wire, request: Received) -> None:
            pick, at = random.Random(request.body), 0
            wire.send(CHUNKED_SSE.replace(b"\r\n\r\n", b"\r\nrequest-id: r\r\n\r\n"))
            while at < len(odd):
                size = pick.choice((1, 2, 3, 7, 50))
                wire.send(chunk(odd[at : at + size]))
                at += size
            wire.send(b"0\r\n\r\n")

        proxy, _ = gated(lab, answering)
        for _ in range(20):
            answer = proxy.post()
            assert answer.body == odd
            assert answer.field("request-id") == "r"
            assert answer.field("content-type").startswith("text/event-stream")

    @pytest.mark.parametrize("how", ["close", "reset", "half"])
    def test_a_hang_up_closes_the_upstream(self, lab: Lab, how: str) -> None:
        begun, gone = lab.gate(), threading.Event()

        def answering(wire: Wire, _: Received) -> None:
            wire.stream(START, end=False)
            begun.set()
            wire.wait_closed()
            gone.set()

        proxy, *ups = gated(lab, answering, fine)
        client = proxy.client().post()
        assert begun.wait(BOUND_S)
        if how == "half":
            client.sock.shutdown(socket.SHUT_WR)
        else:
            client.close(reset=how == "reset")
        assert gone.wait(PROMPT_S)
        assert proxy.row()["ended"] == "client_cancelled"
        assert (calls(*ups), rules(proxy)) == ([1, 0], [])


# -- 9. cooldowns and recovery ---------------------------------------------


@at_both_ends
class TestCooldowns:
    def test_a_cooled_endpoint_gets_nothing_then_probes(self, lab: Lab) -> None:
        go = [lab.gate(), lab.gate()]

        def waits(number: int, wire: Wire, request: Received) -> None:
            assert go[number].wait(BOUND_S)
            fine(wire, request)

        steps = (says(500), partial(waits, 0), partial(waits, 1))
        proxy, a, b = over(lab, in_turn(*steps), fine)
        assert served(proxy, 5) == ["up1"] * 5
        assert calls(a, b) == [1, 5]
        later(proxy, 16)
        for number, asked in enumerate((2, 4)):  # after one probe two
            left = calls(b)[0] + 8 - (number + 1)
            clients = [proxy.client().post() for _ in range(8)]
            wanted = [asked, left]
            eventually(lambda w=wanted: calls(a, b) >= w, "the probes")  # type: ignore[misc]
            eventually(lambda w=left: calls(b)[0] >= w, "the others")  # type: ignore[misc]
            go[number].set()
            assert {c.answer().status for c in clients} == {200}
            assert calls(a, b) == [asked, left]

    def test_a_failed_probe_cools_down_for_longer(self, lab: Lab) -> None:
        proxy, a, _ = over(lab, says(500), fine)
        lengths = []
        for _ in range(5):
            assert served(proxy, 2) == ["up1", "up1"]
            lengths.append(round(states(proxy)["up0"].cooldowns[0][2]))
            later(proxy, lengths[-1] + 1)
        assert lengths == [15, 30, 60, 120, 120]
        assert calls(a) == [5]

    @pytest.mark.parametrize(("seconds", "told"), [(50, ""), (3600, "false")])
    def test_all_limited_is_429(self, lab: Lab, seconds: int, told: str) -> None:
        answers = [limited(seconds + more) for more in (20, 0, 40)]
        proxy, *ups = over(lab, *answers)
        first = proxy.post()
        check_relayed(first, 429)
        assert first.field("retry-after") == str(seconds)
        answer = proxy.post()
        own_error(answer, 429, "rate_limit_error")
        assert seconds - 5 <= int(answer.field("retry-after")) <= seconds
        assert answer.field("x-should-retry") == told
        assert calls(*ups) == [1, 1, 1]
        assert proxy.rows(2)[1]["ended"] == "refused"

    def test_a_long_limit_is_told_at_once(self, lab: Lab) -> None:
        answer = over(lab, limited(3600), limited(7200))[0].post()
        assert answer.field("retry-after") == "3600"
        assert answer.field("x-should-retry") == "false"

    @pytest.mark.parametrize("value", ["garbage", "0", "-5", "1e9", "nan", "inf", ""])
    def test_row_23_an_impossible_reset_is_none(self, lab: Lab, value: str) -> None:
        proxy, *_ = over(lab, limited(value), fine)
        assert (served(proxy, 1), rules(proxy)) == (["up1"], [])

    @pytest.mark.parametrize("limited_before", [False, True])
    def test_the_sdks_own_retry_succeeds(
        self, lab: Lab, sdk: Any, limited_before: bool
    ) -> None:
        body: dict[str, Any] = {
            "id": "msg_1",
            "type": "message",
            "role": "assistant",
            "model": MODEL,
        }
        body.update(content=[{"type": "text", "text": "well"}], stop_reason="end_turn")
        good = json.dumps({**body, "usage": {"input_tokens": 1, "output_tokens": 1}})
        serving = [in_turn(limited(1), says(200, good.encode())) for _ in "ab"]
        proxy, *_ = over(lab, *serving)
        if limited_before:
            assert proxy.post(message(model=MODEL)).status == 429
        url = f"http://127.0.0.1:{proxy.port}"
        with sdk.Anthropic(base_url=url, api_key="sk-x", max_retries=1) as client:
            assert ask(client).content[0].text == "well"
        lab.counted += 2

    def test_row_24_a_full_outage_is_not_made_worse(self, lab: Lab) -> None:
        proxy, *ups = over(lab, *[says(529)] * 3)
        for _ in range(60):
            check_relayed(proxy.post(), 529)
        assert 60 <= sum(calls(*ups)) <= 1.2 * 60 + 3

    @pytest.mark.parametrize("sign", ["none", "body", "field"])
    def test_a_clients_own_retry_gets_one_more(self, lab: Lab, sign: str) -> None:
        proxy, *ups = over(lab, *[says(500)] * 4)
        body, fields = message(), ["x-stainless-retry-count: 1"]
        if sign == "body":
            assert proxy.post(body).status == 500
            later(proxy, 3600)  # past cooldowns and budget
        before = sum(calls(*ups))
        assert proxy.post(body, *fields * (sign == "field")).status == 500
        assert sum(calls(*ups)) - before == (4 if sign == "none" else 2)

    @pytest.mark.parametrize("status", [401, 402, 403, 404, 429, 500, 529])
    def test_counting_tokens_cools_nothing(self, lab: Lab, status: int) -> None:
        error = error_body(status, "model: claude-test")
        counts = says(status, error, "retry-after: 30")

        def answering(wire: Wire, request: Received) -> None:
            (counts if "count" in request.target else fine)(wire, request)

        proxy, *_ = over(lab, answering, answering)
        for _ in range(3):
            answer = proxy.ask("POST", COUNT_TOKENS, message())
            assert answer.status == (200 if status == 404 else status)  # an estimate
        assert [rules(proxy, name) for name in states(proxy)] == [[], []]
        assert served(proxy, 4) == ["up0", "up1", "up0", "up1"]

    @pytest.mark.parametrize("reset", [False, True])
    def test_a_hang_up_during_the_pause_ends_it(self, lab: Lab, reset: bool) -> None:
        proxy, *ups = over(lab, says(529), fine, retryDelayMs=60_000)
        client = proxy.client().post()
        eventually(lambda: proxy.server.relay._due, "the pause")
        client.close(reset=reset)
        assert proxy.row()["ended"] == "client_cancelled"
        assert calls(*ups) == [1, 0]
        assert {s.in_flight for s in states(proxy).values()} == {0}

    @pytest.mark.parametrize("grace_s", [0.0, BOUND_S])
    def test_a_stop_during_the_pause(self, lab: Lab, grace_s: float) -> None:
        pause_ms = 300 if grace_s else 60_000
        proxy, up = over(lab, in_turn(says(529), fine), retryDelayMs=pause_ms)
        client = proxy.client().post()
        eventually(lambda: proxy.server.relay._due, "the pause")
        proxy.server.stop(grace_s=grace_s)
        lab.stopped(proxy)
        assert client.answer().status == (200 if grace_s else 503)
        assert client.ends() in ("closed", "reset")
        assert proxy.row()["ended"] == ("ok" if grace_s else "refused")
        assert calls(up) == [2 if grace_s else 1]

    def test_row_12_cooldowns_pass_while_the_machine_sleeps(
        self, lab: Lab, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        proxy, *_ = over(lab, says(500), fine)
        assert served(proxy, 1) == ["up1"]
        awake = claude_lb._clock_drift_s
        monkeypatch.setattr(claude_lb, "_clock_drift_s", lambda: awake() + 600.0)
        eventually(lambda: states(proxy)["up0"].state == "recovering", "the morning")


# -- 10. routes, groups, affinity ------------------------------------------

DECOY = """{ "messages": [{"role":"user","content":"\\"model\\": \u00e9 \u2028"}],
 "metadata":{"model":"decoy","user_id": "%s"},"max_tokens":1e0,
 "model" :  "claude-\\u006fpus-9" , "top_k": 5,"x":[{"model":"decoy"}] }"""
BY_CONVERSATION = {"affinity": "conversation"}


def session(number: object) -> str:
    return f"x-claude-code-session-id: conversation-{number}"


class TestOverRoutes:
    @pytest.mark.parametrize("path", ["/v1/messages", COUNT_TOKENS])
    def test_a_mapped_model_is_spliced_in(self, lab: Lab, path: str) -> None:
        names = ("big-\u2028\u00e9", "other")
        steps = [{"endpoint": f"up{i}", "model": n} for i, n in enumerate(names)]
        proxy, *ups = over(lab, says(500), fine, routes={"Claude-Opus*": steps})
        body = (DECOY % os.urandom(16).hex()).encode()
        assert proxy.ask("POST", path, body).status == 200
        start, end = body.split(b'"claude-\\u006fpus-9"')
        for up, name in zip(ups, names):
            got = up.requests[0].body
            assert json.loads(got)["model"] == name
            assert got.startswith(start)
            assert got.endswith(end)

    def test_exact_names_wildcards_and_passthrough(self, lab: Lab) -> None:
        off = {"endpoint": "up2", "enabled": False}
        exact = [off, {"endpoint": "up1", "model": "passthrough"}]
        routes = {"claude-*": [{"endpoint": "up0"}], "claude-haiku": exact}
        proxy, *ups = over(lab, fine, fine, fine, routes=routes)
        for name in ("claude-haiku", "claude-haiku-4", "CLAUDE-X", "claude-haiku"):
            body = message(model=name)
            assert proxy.post(body).status == 200
            assert body in [r.body for up in ups for r in up.requests]
        assert calls(*ups) == [2, 2, 0]

    @pytest.mark.parametrize("path", ["/v1/messages", COUNT_TOKENS])
    def test_a_model_that_nobody_serves_is_403(self, lab: Lab, path: str) -> None:
        up = lab.upstream()
        endpoint = {"baseURL": up.url, "models": ["claude-opus-*", "claude-haiku"]}
        proxy = lab.proxy(endpoint, routes={"fast": [{"endpoint": "up0"}]})
        answer = proxy.ask("POST", path, message(model="gpt-7"))
        facts = ("requestedModel", "availableAccounts")
        told = own_error(answer, 403, "permission_error", facts=facts)
        names = ("gpt-7", "claude-opus-*", "claude-haiku", "fast")
        assert [name in told for name in names] == [True] * 4
        assert proxy.post(message(model="claude-opus-4")).status == 200
        assert calls(up) == [1]

    def test_a_forced_endpoint_serves_alone(self, lab: Lab) -> None:
        proxy, *ups = over(lab, fine, fine, says(500))
        assert served(proxy, 3, "X-Claude-LB-Endpoint: up1") == ["up1"] * 3
        assert ups[1].requests[0].values("x-claude-lb-endpoint") == []
        assert proxy.post(None, "x-claude-lb-endpoint: up2").status == 500
        assert calls(*ups) == [0, 3, 1]

    @pytest.mark.parametrize("name", ["nobody", "UP0", "off"])
    def test_a_forced_endpoint_that_cannot_serve(self, lab: Lab, name: str) -> None:
        up = lab.upstream()
        proxy = lab.proxy(up, {"baseURL": up.url, "name": "off", "enabled": False})
        answer = proxy.post(None, f"x-claude-lb-endpoint: {name}")
        assert answer.status in (400, 404)
        assert name in answer.json()["error"]["message"]
        assert calls(up) == [0]

    def test_groups_share_a_credential_and_can_be_routed_to(self, lab: Lab) -> None:
        a, b, c = lab.upstream(), lab.upstream(says(401)), lab.upstream()
        urls = [{"baseURL": u.url, "name": n} for u, n in ((b, "b"), (c, "c"))]
        group = {"name": "team", "authToken": "canary-of-the-team", "endpoints": urls}
        routes = {"claude-test": [{"group": "team"}]}
        proxy = lab.proxy(a, groups=[group], routes=routes)
        assert served(proxy, 2) == ["c", "c"]
        assert calls(a, b, c) == [0, 1, 2]
        assert "canary-of-the-team" in str(c.requests[0].lines)
        listed = proxy.ask("GET", "/providers", counts=0).json()["providers"]
        assert [p["group"] for p in listed] == [None, "team", "team"]


class TestAffinity:
    def test_a_conversation_stays_and_two_proxies_agree(self, lab: Lab) -> None:
        one, *ups = over(lab, fine, fine, fine, balancing=BY_CONVERSATION)
        two, *_ = over(lab, *ups, balancing=BY_CONVERSATION)
        places = [
            {*served(one, 2, session(i)), *served(two, 2, session(i))}
            for i in range(24)
        ]
        assert {len(seen) for seen in places} == {1}
        assert set.union(*places) == {"up0", "up1", "up2"}

    def test_a_conversation_stays_where_it_failed_over_to(self, lab: Lab) -> None:
        shared = in_turn(fine, says(500), fine)  # home serves, then fails once
        proxy, *_ = over(lab, shared, shared, balancing=BY_CONVERSATION)
        places = []
        for pause_s in (0, 0, 250, 250, 301):
            later(proxy, pause_s)
            places += served(proxy, 1, session(1))
        home = places[0]
        assert [place == home for place in places] == [True, False, False, False, True]


# -- 11. control and reports -----------------------------------------------

JSON_TYPE = "content-type: application/json"
ADMIN = KEY[::-1]
CHANGES = [
    ("/api/endpoints/up0/pause", b""),
    ("/api/endpoints/up0/resume", b""),
    ("/api/mode", b'{"mode": "auto"}'),
    ("/providers/reload", b""),
]
SHAPES = {
    "/providers": "total_providers healthy_providers selection_strategy"
    " total_model_routes providers",
    "/providers provider": "name type base_url enabled healthy failure_count proxy"
    " last_failure_time",
    "/status": "current_endpoint total_active_connections endpoint_connections"
    " endpoints timestamp config",
    "/status endpoint": "endpoint latency available error last_check latency_history",
    "/status config": "port switch_threshold_ms health_check_interval_seconds",
}


def change(proxy: Proxy, path: str, body: bytes = b"", *fields: str) -> Answer:
    """POST to a path of the proxy's own."""
    if body and not any("content-type" in f.lower() for f in fields):
        fields = (JSON_TYPE, *fields)
    answer = proxy.ask("POST", path, body, *fields, counts=0)
    own = answer.status >= 400 and b'"faults"' not in answer.body
    proxy._lab.counted += own  # a refusal has its row
    return answer


def report(proxy: Proxy, path: str, *fields: str) -> Any:
    return proxy.ask("GET", path, b"", *fields, counts=0).json()


class TestControl:
    def test_pause_and_resume(self, lab: Lab) -> None:
        proxy, *_ = over(lab, fine, fine)
        answer = change(proxy, "/api/endpoints/up0/pause")
        assert (answer.status, answer.json()["paused"]) == (200, True)
        assert served(proxy, 3) == ["up1"] * 3
        assert states(proxy)["up0"].state == "paused"
        assert change(proxy, "/api/endpoints/up1/pause").status == 200
        assert "paused" in own_error(proxy.post(), 503, "overloaded_error")
        assert change(proxy, "/api/endpoints/up0/resume").status == 200
        assert served(proxy, 2) == ["up0"] * 2
        own_error(change(proxy, "/api/endpoints/nobody/pause"), 404, "not_found_error")

    def test_modes(self, lab: Lab) -> None:
        proxy, _, b = over(lab, fine, fine)
        hold = b'{"mode": "manual", "endpoint": "%b"}'
        assert change(proxy, "/api/mode", hold % b"up1").status == 200
        assert served(proxy, 3) == ["up1"] * 3
        status = report(proxy, "/status")
        assert (status["mode"], status["manual_endpoint"]) == ("manual", "up1")
        assert status["current_endpoint"] == b.url
        assert change(proxy, "/api/mode", b'{"mode": "auto"}').status == 200
        assert set(served(proxy, 2)) == {"up0", "up1"}
        assert change(proxy, "/api/mode", hold % b"nobody").status == 404
        assert change(proxy, "/providers/reload").status == 400  # there is no file
        for bad in (b"", b"{", b"[]", b'{"mode": "manual"}', b'{"mode": 1}', b"\xff"):
            assert change(proxy, "/api/mode", bad, JSON_TYPE).status == 400, bad

    @pytest.mark.parametrize(
        ("field", "status"),
        [
            ("Origin: https://evil.example", 403),
            ("Origin: null", 403),
            ("Sec-Fetch-Site: cross-site", 403),
            ("Sec-Fetch-Site: same-site", 403),
            ("Host: rebound.example", 421),
            ("content-type: text/plain", 415),
            ("content-type: application/x-www-form-urlencoded", 415),
        ],
    )
    def test_web_pages_change_nothing(self, lab: Lab, field: str, status: int) -> None:
        proxy, *_ = over(lab, fine)
        for path, body in CHANGES:
            assert change(proxy, path, body or b"{}", field).status == status
        assert states(proxy)["up0"].state != "paused"

    def test_an_admin_key_is_asked_for_where_it_is_set(self, lab: Lab) -> None:
        proxy, *_ = over(lab, fine, server={"adminKey": ADMIN, "clientKeys": [KEY]})
        for path, body in CHANGES[:3]:
            for fields in ([], [f"x-api-key: {KEY}"], [f"x-api-key: {ADMIN[:-1]}"]):
                assert change(proxy, path, body, *fields).status == 401
            for field in (f"x-api-key: {ADMIN}", f"Authorization: Bearer {ADMIN}"):
                assert change(proxy, path, body, field).status == 200

    def test_reports_tell_the_state_and_no_secret(self, lab: Lab) -> None:
        server = {"clientKeys": [KEY], "adminKey": ADMIN}
        proxy, *ups = over(lab, limited(30), fine, server=server)
        key = f"x-api-key: {KEY}"
        assert served(proxy, 1, key) == ["up1"]
        for path in ("/status", "/providers"):
            own_error(proxy.ask("GET", path), 401, "authentication_error")
        status, providers = (report(proxy, p, key) for p in ("/status", "/providers"))
        urls = [u.url for u in ups]
        assert list(status["endpoints"]) == urls
        assert status["current_endpoint"] in urls
        assert status["endpoint_connections"] == dict.fromkeys(urls, 0)
        assert status["total_active_connections"] == 0
        assert providers["total_providers"] == len(providers["providers"]) == 2
        assert providers["selection_strategy"] == "round_robin"
        cooldown = providers["providers"][0]["cooldowns"][0]
        assert cooldown["rule"] == "limited-model"
        assert 20 < cooldown["seconds"] <= 30
        texts = [str(report(proxy, path, key)) for path in ("/health", "/")]
        for text in (str(status), str(providers), *texts, proxy.log()):
            assert not any(s in text for s in (KEY, ADMIN, *(u.token for u in ups)))

    @pytest.mark.parametrize("shape", SHAPES)
    def test_reports_have_the_originals_fields(self, lab: Lab, shape: str) -> None:
        proxy, *_ = over(lab, fine)
        path, _, part = shape.partition(" ")
        found = report(proxy, path)
        if part == "provider":
            found = found["providers"][0]
        elif part == "endpoint":
            (found,) = found["endpoints"].values()
        elif part:
            found = found[part]
            assert found["port"] == proxy.port
        assert set(SHAPES[shape].split()) - set(found) == set()


# -- 12. reload ------------------------------------------------------------


class OnFile(Proxy):
    """A proxy over a configuration file; endpoints are named after their ports."""

    def __init__(self, lab: Lab, *upstreams: ScriptedUpstream, **sections: Any) -> None:
        log = lab._folder / "file-log.json"
        self.path = lab._folder / "endpoints.json"
        self._sections = {
            "server": {"port": 0},
            "failover": {"gateSeconds": 0},
            "log": {"format": "json", "file": str(log)},
            **sections,
        }
        self.write(*upstreams)
        config = self._read()
        reading: Any = {"read": self._read, "path": str(self.path)}
        server = claude_lb.Server(config, claude_lb.Log(config.log), **reading)
        super().__init__(lab, server, Path(log))
        server.start()
        lab._proxies.append(self)

    def _read(self) -> claude_lb.Config:
        text = self.path.read_text()
        return claude_lb.parse_config(text, name="file", source=Source())

    def write(self, *ups: ScriptedUpstream, more: Sequence[Any] = ()) -> None:
        entries = [
            {"name": f"at{u.port}", "baseURL": u.url, "authToken": u.token} for u in ups
        ]
        whole = {"endpoints": [*entries, *more], **self._sections}
        self.path.write_text(json.dumps(whole))

    def reload(self) -> Answer:
        return change(self, "/providers/reload")


@at_both_ends
class TestReload:
    def test_what_stays_keeps_its_state_and_its_connections(self, lab: Lab) -> None:
        wires: list[Wire] = []

        def answering(wire: Wire, request: Received) -> None:
            wires.append(wire)
            fine(wire, request)

        a, b, c = (lab.upstream(f) for f in (says(500), answering, fine))
        proxy = OnFile(lab, a, b)
        assert served(proxy, 1) == [f"at{b.port}"]
        assert change(proxy, f"/api/endpoints/at{b.port}/pause").status == 200
        proxy.write(a, b, c)
        answer = proxy.reload()
        assert (answer.status, answer.json()["status"]) == (200, "ok")
        assert rules(proxy, f"at{a.port}") == ["server-error"]
        assert served(proxy, 3) == [f"at{c.port}"] * 3
        assert change(proxy, f"/api/endpoints/at{b.port}/resume").status == 200
        assert f"at{b.port}" in served(proxy, 2)
        assert wires[0] is wires[1]

    def test_row_68_a_removed_endpoint_drains(self, lab: Lab) -> None:
        go, closed = lab.gate(), lab.gate()

        def answering(wire: Wire, request: Received) -> None:
            by_turns([go], START)(wire, request)
            wire.wait_closed()
            closed.set()

        a, b = lab.upstream(answering), lab.upstream()
        proxy = OnFile(lab, a, b)
        client = proxy.client().post()
        client.head()
        client.until(START)
        proxy.write(b)
        assert proxy.reload().status == 200
        assert served(proxy, 4) == [f"at{b.port}"] * 4
        go.set()
        assert client.rest() == delta(0) + STOP
        assert closed.wait(PROMPT_S)  # its connection is not kept
        assert calls(a, b) == [1, 4]

    def test_a_removed_endpoint_gets_no_retry(self, lab: Lab) -> None:
        a, b = lab.upstream(says(529)), lab.upstream()
        proxy = OnFile(lab, a, b, failover={"retryDelayMs": 1000})
        client = proxy.client().post()
        eventually(lambda: proxy.server.relay._due, "the pause")
        proxy.write(b)
        assert proxy.reload().status == 200
        assert client.answer().status == 200
        assert calls(a, b) == [1, 1]

    @pytest.mark.parametrize(
        ("text", "told"),
        [
            ("{", "line 1, column 2"),
            ("[]", "endpoint"),
            ('{"endpoints": [{"baseURL": "x"}], "servr": {}}', "servr"),
        ],
    )
    def test_row_66_a_faulty_file_counts_not(
        self, lab: Lab, text: str, told: str
    ) -> None:
        a = lab.upstream()
        proxy = OnFile(lab, a)
        proxy.path.write_text(text)
        answer = proxy.reload()
        document = answer.json()
        assert (answer.status, document["status"]) == (400, "error")
        assert told in " ".join(document["faults"])
        assert report(proxy, "/providers")["reload_faults"] == document["faults"]
        assert told in proxy.log()
        assert served(proxy, 1) == [f"at{a.port}"]
        proxy.write(a)
        assert proxy.reload().status == 200
        assert report(proxy, "/providers")["reload_faults"] == []

    def test_a_changed_credential_ends_a_401(self, lab: Lab) -> None:
        def answering(wire: Wire, request: Received) -> None:
            (fine if "good" in str(request.lines) else says(401))(wire, request)

        a, b = lab.upstream(answering), lab.upstream()
        proxy = OnFile(lab, a, b)
        assert served(proxy, 3) == [f"at{b.port}"] * 3
        assert states(proxy)[f"at{a.port}"].needs_attention
        a.token = "a-good-canary"
        proxy.write(a, b)
        assert proxy.reload().status == 200
        assert rules(proxy, f"at{a.port}") == []
        assert set(served(proxy, 2)) == {f"at{a.port}", f"at{b.port}"}

    def test_the_watcher_notices_a_change_and_a_fault(
        self, lab: Lab, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(claude_lb, "WATCH_S", 0.05)
        a, b = lab.upstream(), lab.upstream()
        proxy = OnFile(lab, a)
        proxy.path.write_text("{")
        eventually(lambda: "has faults" in proxy.log(), "the fault in the log")
        proxy.write(b)
        eventually(lambda: f"at{b.port}" in states(proxy), "the change")
        assert served(proxy, 1) == [f"at{b.port}"]

    def test_a_dead_new_endpoint_holds_no_reload_up(self, lab: Lab) -> None:
        a = lab.upstream()
        proxy = OnFile(lab, a, timeouts={"connect": 60})
        dead = f"http://127.0.0.1:{lab.blackhole()}"
        proxy.write(a, more=[{"baseURL": dead, "authToken": "canary"}])
        client = proxy.client()
        client.sock.settimeout(PROMPT_S)
        client.ask("POST", "/providers/reload", counts=0)
        assert client.answer().status == 200

    def test_a_stop_ends_the_watcher(self, lab: Lab) -> None:
        proxy = OnFile(lab, lab.upstream())
        watcher = [t for t in threading.enumerate() if t.name == "reload"][-1]
        proxy.server.stop(grace_s=0.0)
        lab.stopped(proxy)
        eventually(lambda: not watcher.is_alive(), "its end", PROMPT_S)

    def test_row_67_200_live_streams_outlive_20_reloads(self, lab: Lab) -> None:
        rounds = [lab.gate() for _ in range(20)]
        lasting = by_turns(rounds, START)

        def answering(wire: Wire, request: Received) -> None:
            (fine if b"short" in request.body else lasting)(wire, request)

        a, b, gone, new = (lab.upstream(answering) for _ in range(4))
        proxy = OnFile(lab, a, b, gone, balancing=BY_CONVERSATION)
        clients = [proxy.client().post(None, session(i)) for i in range(200)]
        homes = [served_by(c.head()) for c in clients]
        for client in clients:
            client.until(START)
        stay = [i for i, home in enumerate(homes) if home != f"at{gone.port}"]
        assert len(stay) < 200
        for number, turn in enumerate(rounds):
            proxy.write(a, b, gone if number < 9 else new)
            if number % 4 == 3:
                proxy.path.write_text("{" * number)
            assert proxy.reload().status == (400 if number % 4 == 3 else 200)
            asked = calls(gone)
            for i in stay[number::20]:
                answer = proxy.post(message(x="short"), session(i))
                assert served_by(answer) == homes[i]
            for i in range(10):
                proxy.post(message(x="short"), session(f"{number}-{i}"))
            assert number < 9 or calls(gone) == asked
            turn.set()
            for client in clients:
                assert client.until(delta(number)) == delta(number)
        assert {client.rest() for client in clients} == {STOP}
        assert new.requests


# -- 13. failures reproduced elsewhere, continued --------------------------


class TestMoreFailuresReproducedElsewhere:
    """R6 to R26: what users of the other balancers met."""

    def test_r6_a_limited_account_leaves_the_work_to_the_other(self, lab: Lab) -> None:
        proxy, *ups = over(lab, limited(300), fine)
        assert served(proxy, 3) == ["up1"] * 3
        assert calls(*ups) == [1, 3]

    @pytest.mark.parametrize("status", [401, 529])
    def test_r12_the_next_account_serves(self, lab: Lab, status: int) -> None:
        assert served(over(lab, says(status), fine)[0], 1) == ["up1"]

    def test_r13_all_limited_is_429_and_nothing_goes_out(self, lab: Lab) -> None:
        proxy, *ups = over(lab, limited(40), limited(50))
        own = "Authorization: Bearer of-the-client"
        answers = [proxy.post(None, own) for _ in "abc"]
        assert [a.status for a in answers] == [429] * 3
        assert all(0 < int(a.field("retry-after")) <= 40 for a in answers)
        assert calls(*ups) == [1, 1]
        assert "of-the-client" not in str([u.requests for u in ups])

    def test_r16_only_our_credential_reaches_the_account(self, lab: Lab) -> None:
        up, ours = lab.upstream(), {"authToken": "canary-ours"}
        kinds = ("auth_token", "api_key")
        listed = [{"baseURL": up.url, "authType": kind, **ours} for kind in kinds]
        proxy = lab.proxy(*listed)
        for _ in kinds:
            proxy.post(None, "x-api-key: theirs", "Authorization: Bearer theirs")
        names = ("authorization", "x-api-key")
        sent = [r.values(name) for r, name in itertools.product(up.requests, names)]
        assert sent == [["Bearer canary-ours"], [], [], ["canary-ours"]]

    def test_r18_unknown_parameters_pass_and_so_does_a_repeat(self, lab: Lab) -> None:
        proxy, up = over(lab, fine)
        body = json.dumps({"model": "m", "top_k": 5, "of_tomorrow": [1]}).encode()
        assert [proxy.post(body).status for _ in "ab"] == [200, 200]
        assert [r.body for r in up.requests] == [body, body]

    def test_r19_529_fails_over_without_any_setting(self, lab: Lab) -> None:
        proxy = lab.proxy(lab.upstream(says(529)), lab.upstream())
        assert served(proxy, 1) == ["up1"]

    def test_r20_each_event_comes_when_it_is_sent(self, lab: Lab) -> None:
        turns = [lab.gate() for _ in range(6)]
        proxy, _ = gated(lab, by_turns(turns, START, delta("first")))
        client = proxy.client().post()
        client.head()
        client.until(delta("first"))
        for number, turn in enumerate(turns):
            turn.set()
            assert client.until(delta(number)) == delta(number)
        assert client.rest() == STOP

    def test_r21_line_separators_in_a_text_are_no_line_ends(self, lab: Lab) -> None:
        raw = b'event: content_block_delta\ndata: {"t":"\xe2\x80\xa8\xc2\x85"}\n\n'
        proxy, _ = gated(lab, streams(START, raw, STOP))
        assert proxy.post().body == START + raw + STOP

    def test_r22_the_preferred_one_returns_after_idleness(self, lab: Lab) -> None:
        urls = [lab.upstream(in_turn(says(500), fine)).url, lab.upstream().url]
        balancing = {"affinity": "last_good", "idleRecoverySeconds": 300}
        listed = [{"baseURL": u, "priority": i} for i, u in enumerate(urls)]
        proxy, *_ = over(lab, *listed, balancing=balancing)
        seen = []
        for pause_s in (0, 200, 200, 301, 0):
            later(proxy, pause_s)
            seen += served(proxy, 1)
        assert seen == ["up1", "up1", "up1", "up0", "up0"]

    def test_r23_every_error_of_ours_has_the_full_shape(self, lab: Lab) -> None:
        proxy, _ = over(lab, lab.refusing())
        own_error(proxy.post(), 502, "api_error")
        own_error(proxy.ask("GET", "/nothing"), 404, "not_found_error")
        assert change(proxy, "/api/endpoints/up0/pause").status == 200
        own_error(proxy.post(), 503, "overloaded_error")

    def test_r24_and_r25_blocks_pass_byte_for_byte(self, lab: Lab) -> None:
        cached = {"type": "ephemeral", "ttl": "1h"}
        thought = {"type": "thinking", "thinking": "\u2028", "signature": "EqQB=="}
        body = message(
            thinking={"type": "enabled", "budget_tokens": 1024},
            service_tier="auto",
            system=[{"type": "text", "text": "s", "cache_control": cached}],
            tools=[{"name": "t", "input_schema": {}, "cache_control": cached}],
            messages=[{"role": "assistant", "content": [thought]}],
        )
        proxy, *ups = over(lab, says(500), fine, balancing=BY_CONVERSATION)
        assert proxy.post(body).status == 200
        assert {r.body for up in ups for r in up.requests} == {body}

    def test_r26_the_mapped_model_is_what_is_sent(self, lab: Lab) -> None:
        routes = {"*sonnet*": [{"endpoint": "up0", "model": "mapped"}]}
        proxy, up = over(lab, fine, routes=routes)
        assert proxy.post(message(model="claude-sonnet-4")).status == 200
        assert json.loads(up.requests[0].body)["model"] == "mapped"


# ============================================================================
# SHARING, JSON, COMMANDS, THE LONG RUN
# ============================================================================

SHARED_WHOLE = START + delta(0) + STOP
BLANK_BODY = b'{"model": "claude-test", "messages": []}'  # not in the ledger
DIFFERENCES = ["?beta=false", "?", " ", "x-api-key: two", "authorization: Bearer two"]
DIFFERENCES += ["anthropic-version: 2", "anthropic-beta: b", "anthropic-beta: b, a"]
DIFFERENCES += ["anthropic-beta: a\r\nanthropic-beta: b"]
USUAL_FIELDS = ("x-api-key: one", "anthropic-version: 1", "anthropic-beta: a")


def sharing(lab: Lab, *answers: Any, **own: Any) -> Any:
    """Return a proxy that shares answers, and what it stands over."""
    return over(lab, *answers, balancing={"dedupe": True}, **own)


def after(gate: threading.Event, answering: Answering) -> Answering:
    def waits(wire: Wire, request: Received) -> None:
        assert gate.wait(3 * BOUND_S)
        answering(wire, request)

    return waits


def under_way(proxy: Proxy, count: int) -> None:
    pool = proxy.server.services.pool
    eventually(lambda: pool.snapshot().in_flight == count, f"{count} under way")


def ask_alike(proxy: Proxy, count: int, body: bytes, *, to: bytes = b"") -> Any:
    """Return clients that ask for the same, the leader first; read them up to `to`."""
    clients = []
    for number in range(count):
        clients.append(proxy.client().post(body))
        under_way(proxy, number + 1)
    for client in clients if to else ():
        assert client.head().status == 200
        client.until(to)
    return clients


def check_calm(proxy: Proxy, **endings: int) -> None:
    """Assert how the exchanges ended, and that nothing is held any longer."""
    under_way(proxy, 0)
    services = proxy.server.services
    assert {e.in_flight for e in services.pool.snapshot().endpoints} == {0}
    assert services.budget._left == claude_lb.BODIES_BYTES
    assert services.shares == {}
    rows = proxy.rows(sum(endings.values())) if endings else []
    assert collections.Counter(row["ended"] for row in rows) == endings


class TestSharing:
    @pytest.mark.parametrize("streamed", [False, True])
    def test_identical_requests_share_one_call(self, lab: Lab, streamed: bool) -> None:
        go = lab.gate()
        said = streams(START, delta(0), STOP) if streamed else says(200, SHARED_WHOLE)
        proxy, *ups = sharing(lab, says(500), after(go, said))
        body = message(x="y" * 100_000)
        clients = ask_alike(proxy, 4, body)
        clients.append(proxy.client().post(body, "Connection: close", "User-Agent: x"))
        under_way(proxy, 5)
        go.set()
        answers = [client.answer() for client in clients]
        assert {(a.status, a.body) for a in answers} == {(200, SHARED_WHOLE)}
        assert {a.field("x-claude-lb-endpoint") for a in answers} == {"up1"}
        assert [a.field("connection") for a in answers] == [""] * 4 + ["close"]
        assert clients[-1].ends() == "closed"
        assert calls(*ups) == [1, 1]
        ids = {a.field("x-claude-lb-request-id") for a in answers}
        assert ids == {row["request_id"] for row in proxy.rows(5)}
        check_calm(proxy, ok=5)

    @pytest.mark.parametrize("kept", [True, False])
    def test_a_late_one_gets_the_history_then_live_bytes(
        self, lab: Lab, monkeypatch: pytest.MonkeyPatch, kept: bool
    ) -> None:
        if not kept:  # then it has to ask for itself
            monkeypatch.setattr(claude_lb, "SHARED_BYTES", 1000)
        turns, first = [lab.gate(), lab.gate()], delta("x" * 2000)
        proxy, up = sharing(lab, by_turns(turns, first))
        (one,) = ask_alike(proxy, 1, BLANK_BODY, to=first)
        turns[0].set()
        one.until(delta(0))
        two = proxy.client().post(BLANK_BODY)
        assert two.head().status == 200
        assert two.until(delta(0)) == first + delta(0)
        turns[1].set()
        assert one.rest() == two.rest() == delta(1) + STOP
        assert calls(up) == [1 if kept else 2]
        check_calm(proxy, ok=2)

    @pytest.mark.parametrize("change", DIFFERENCES)
    def test_what_differs_is_asked_for_itself(self, lab: Lab, change: str) -> None:
        go = lab.gate()
        proxy, up = sharing(lab, after(go, fine))
        name = change.partition(":")[0]
        fields = [f for f in USUAL_FIELDS if not f.startswith(name)]
        fields += [change] * (":" in change)
        where = "/v1/messages" + (change if "?" in change else "?beta=true")
        body = BLANK_BODY + (b" " if change == " " else b"")
        own = ("POST", "/v1/messages?beta=true", BLANK_BODY, *USUAL_FIELDS)
        one = proxy.client().ask(*own)
        eventually(lambda: calls(up) == [1], "the first call")
        two = proxy.client().ask("POST", where, body, *fields)
        eventually(lambda: calls(up) == [2], "a call of its own")
        three = proxy.client().ask(*own)
        under_way(proxy, 3)
        go.set()
        assert [c.answer().status for c in (one, two, three)] == [200] * 3
        assert calls(up) == [2]
        check_calm(proxy, ok=3)

    @pytest.mark.parametrize("reset", [False, True])
    @pytest.mark.parametrize("begun", [False, True])
    def test_who_hangs_up_harms_no_one(
        self, lab: Lab, begun: bool, reset: bool
    ) -> None:
        go, *turns = lab.gate(), lab.gate(), lab.gate()
        answering = by_turns(turns, START)
        proxy, up = sharing(lab, answering if begun else after(go, answering))
        clients = ask_alike(proxy, 3, message(), to=START if begun else b"")
        clients.pop(1).close(reset=reset)
        under_way(proxy, 2)
        (share,) = proxy.server.services.shares.values()
        go.set()
        turns[0].set()
        for client in clients:
            assert begun or client.head().status == 200
            assert client.until(delta(0)).endswith(delta(0))
        assert not any(f._backlog for f in share._followers)  # nor for who has gone
        turns[1].set()
        assert {client.rest() for client in clients} == {delta(1) + STOP}
        assert calls(up) == [1]
        check_calm(proxy, ok=2, client_cancelled=1)

    def test_a_leader_that_hangs_up_early_is_replaced(self, lab: Lab) -> None:
        def given_up(wire: Wire, _: Received) -> None:
            wire.wait_closed()
            wire.deny()

        go = lab.gate()
        proxy, up = sharing(lab, in_turn(given_up, after(go, fine)))
        leader, *others = ask_alike(proxy, 4, message())
        eventually(lambda: calls(up) == [1], "the first call")
        leader.close()
        eventually(lambda: calls(up) == [2], "the second call")
        go.set()
        assert [client.answer().status for client in others] == [200] * 3
        assert calls(up) == [2]
        check_calm(proxy, ok=3, client_cancelled=1)

    @pytest.mark.parametrize("leader_goes", [True, False])
    def test_a_late_end_cuts_all(self, lab: Lab, leader_goes: bool) -> None:
        turn = lab.gate()

        def cut(wire: Wire, _: Received) -> None:
            wire.stream(START, end=False)
            assert turn.wait(3 * BOUND_S)
            wire.close()

        proxy, up = sharing(lab, cut)
        clients = ask_alike(proxy, 3, message(), to=START)
        if leader_goes:
            clients.pop(0).close()
            under_way(proxy, 0)
        turn.set()
        assert {client.cut() for client in clients} == {"closed"}
        assert calls(up) == [1]
        gone = {"client_cancelled": 1} if leader_goes else {}
        check_calm(proxy, truncated=len(clients), **gone)

    @pytest.mark.parametrize("status", [400, 401, 429, 500, 502, 529])
    def test_the_leaders_failure_is_everyones(self, lab: Lab, status: int) -> None:
        go = lab.gate()
        early = streams(error_event("overloaded_error"))
        answering = {502: hangs_up, 529: early, 429: limited(30)}
        failing = after(go, answering.get(status) or says(status))
        proxy, up = sharing(lab, failing, retries=0, gateSeconds=10)
        clients = ask_alike(proxy, 3, BLANK_BODY)
        go.set()
        answers = [client.answer() for client in clients]
        assert [a.status for a in answers] == [status] * 3
        assert len({a.json()["error"]["message"] for a in answers}) == 1
        assert len({a.field("x-claude-lb-request-id") for a in answers}) == 3
        if status == 502:
            assert {a.field("x-should-retry") for a in answers} == {"true"}
            assert len({own_error(a, 502, "api_error") for a in answers}) == 1
        assert calls(up) == [1]
        assert len(proxy.rows(3)) == 3
        check_calm(proxy)

    def test_a_slow_one_slows_nobody(self, lab: Lab) -> None:
        turn, big = lab.gate(), [delta("x" * 200_000)] * 16
        proxy, _ = sharing(lab, after(turn, streams(START, *big, STOP)))
        fast, slow = ask_alike(proxy, 2, message())
        turn.set()
        whole = START + b"".join(big) + STOP
        assert fast.answer().body == whole
        assert fast.post().answer().body == whole  # its first exchange is over
        assert slow.answer().body == whole
        check_calm(proxy, ok=3)

    @pytest.mark.parametrize("versions", ["01", "10", "00", "11"])
    def test_old_clients_share_nothing_nor_do_others_unasked(
        self, lab: Lab, versions: str
    ) -> None:
        go, make = lab.gate(), over if versions == "11" else sharing
        proxy, up = make(lab, after(go, streams(START, delta(0), STOP)))
        tail = f"Host: 127.0.0.1:{proxy.port}\r\nContent-Length: {len(BLANK_BODY)}"
        clients = []
        for version in versions:
            head = f"POST /v1/messages HTTP/1.{version}\r\n{tail}\r\n\r\n"
            clients.append(proxy.client().send(head.encode() + BLANK_BODY))
            eventually(lambda: calls(up) == [len(clients)], "its call")
        go.set()
        assert {client.answer().body for client in clients} == {SHARED_WHOLE}
        check_calm(proxy, ok=2)

    def test_connections_go_on(self, lab: Lab) -> None:
        go = lab.gate()
        proxy, up = sharing(lab, after(go, streams(START, delta(0), STOP)))
        clients = ask_alike(proxy, 3, message())
        for client in clients:
            client.post()  # sent ahead
        go.set()
        for client in clients:
            assert client.answer().body == client.answer().body == SHARED_WHOLE
            assert client.post(BLANK_BODY).answer().body == SHARED_WHOLE
        assert calls(up) == [1 + 3 + 3]  # one after the other is not shared
        check_calm(proxy, ok=9)

    @pytest.mark.parametrize("begun", [False, True])
    def test_a_stop_ends_all(self, lab: Lab, begun: bool) -> None:
        go = lab.gate()
        proxy, up = sharing(lab, by_turns([go], START) if begun else after(go, fine))
        body = message(x="y" * 100_000)
        clients = ask_alike(proxy, 4, body, to=START if begun else b"")
        eventually(lambda: calls(up) == [1], "the call")
        proxy.server.stop(grace_s=0.0)
        lab.stopped(proxy)
        for client in clients:
            if begun:
                client.cut()
            else:
                own_error(client.answer(), 503, "overloaded_error")
        assert calls(up) == [1]
        assert len(proxy.rows(4)) == 4
        check_calm(proxy)


# -- 8. json ---------------------------------------------------------------

VECTOR_FILE = TOP.parent / "shared" / "vectors" / "json_bodies.jsonl"
SESSION_ID = "4f6b2c1a-0d3e-4b5f-8a7c-9e1d2f3a4b5c"
OLD_USER = f"user_{'0a' * 32}_account_{uuid.UUID(int=5)}_session_{{}}"
MEMBERS = r"""{} | {"a" :1 } | {"a":1,"a":2} | {"mod\u0065l":"m"} | {"a":"\\","b":"\""}
    | {"a":{"model":"x"},"b":["model"]} | {"é":" "} | [1] | {"a":1,} | {"a":1}}
    | {"a":1} x | {,} | {"a" 1} | {"a":1 "b":2} | {"a":1] | {'a':1} | {"a":01} | {"""
MODELS = r"""{"model":"claude-opus-4-1"} claude-opus-4-1
    | {"model":"\u0063laude"} claude
    | {"a":{"model":"x"},"model":"y"} y | {"model":"x","model":"y"} y | {"model":""} -
    | {"model":5} - | {"model":null} - | {"model":["x"]} - | {"model":"a\nb"} -
    | {"model":"\ud800"} - | {"messages":[{"model":"x"}]} - | [{"model":"x"}] -
    | {"model":"x" -"""
LIMIT_CLASSES = """claude-opus-4-1-20250805 opus-4 opus | claude-opus-5 opus-5 opus
    | Claude-Sonnet-4-5 sonnet-4 sonnet | claude-3-5-sonnet-20241022 sonnet-3 sonnet
    | claude-3-haiku-20240307 haiku-3 haiku | claude-3-7-sonnet-latest sonnet-3 sonnet
    | us.anthropic.claude-haiku-4-5-20251001-v1:0 haiku-4 haiku | GPT-7 gpt-7
    | anthropic/claude-sonnet-5-5[1m] sonnet-5 sonnet"""
ODD_BODIES = [
    *(b"", b"{", b"null", b'{"model"', b'{"model":', b'{"model":}', b'{"\xff":1}'),
    b'{"metadata":{"user_id":"\\ud800_session_%b"}}' % SESSION_ID.encode(),
    b'{"metadata":{"user_id":"{\\"session_id\\": \\"\\ud800\\"}"}}',
    b'{"metadata":{"user_id":"{\\"session_id\\": [1]}"}}',
    b'{"model":"\xff","messages":[{"role":"user","content":"\xfe"}]}',
    b'{"model":%b,"metadata":{"user_id":%b}}' % (b"9" * 10_000, b"1" * 9_999),
    b'{"model":1e999,"system":NaN,"messages":{},"metadata":[]}',
    b'{"messages":' + b"[" * 90_000,
    b'{"messages":%b%b}' % (b"[" * 90_000, b"]" * 90_000),
    b'{"metadata":%b1%b}' % (b'{"user_id":' * 90_000, b"}" * 90_000),
    b'{"metadata":{"user_id":"{%b"}}' % (b"[" * 90_000),
    b'{"messages":["x",null,{"role":"user","content":null}],"system":[[]]}',
    *('{"model":"m"}'.encode("utf-16"), b'\xef\xbb\xbf{"model":"m"}'),
    b'{"%b":1}' % (b"\\" * 100_001),
]


def check_members(body: bytes) -> bool:
    """Compare with json.loads; return whether that finds an object."""
    found = claude_lb.top_level(body)
    assert claude_lb.top_level(bytearray(body)) == found
    try:
        whole = json.loads(body.decode())
    except (ValueError, RecursionError):
        whole = None
    if isinstance(whole, dict):
        read = {k: json.loads(body[m.start : m.end]) for k, m in found.items()}
        assert repr(read) == repr(whole), body
        return True
    lenient = "" in found or body != body.decode("utf-8", "ignore").encode()
    assert found == {} or lenient, body  # of bad keys and bad bytes
    return False


def key_of(body: object) -> str:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    members = claude_lb.top_level(raw)
    key = claude_lb.conversation_key(raw, members)
    assert claude_lb.conversation_key(bytearray(raw), members) == key
    return key


def talk(turns: int, **more: object) -> dict[str, Any]:
    """Return a conversation of so many turns."""
    said: list[dict[str, Any]] = []
    for turn in range(turns):
        said.append({"role": "user", "content": [{"type": "text", "text": f"q{turn}"}]})
        said.append({"role": "assistant", "content": f"a{turn}"})
    system = [{"type": "text", "text": "be brief"}, {"type": "text", "text": "or not"}]
    tools = [{"name": "Bash", "input_schema": {"type": "object"}}]
    whole = {"model": "claude-opus-4-1", "max_tokens": 9, "system": system}
    return {**whole, "tools": tools, "messages": said[:-1], **more}


def any_body(chance: random.Random) -> bytes:
    """Return an object as some client may write it; now and then damaged."""
    names = ["model", "messages", "\\", '"', "\u2028\x85", "", "{[,]}", '"model":"y"']
    document = {n: any_document(chance, names, 3) for n in ("model", "x", "y")}
    separators = chance.choice([(",", ":"), (", ", ": "), (" ,\n", "\t:\r\n ")])
    plain, indent = chance.random() < 0.5, chance.choice([None, None, 1])
    style: Any = {"indent": indent, "ensure_ascii": plain, "separators": separators}
    text = json.dumps(document, **style)
    body = bytearray(b" \n" * chance.randrange(2) + text.encode("utf-8", "replace"))
    for _ in range(chance.choice([0, 0, 1, 3])):
        at = chance.randrange(len(body))
        damage = chance.choice(b'"{},:\\\0 0\x85]')
        body[at : at + chance.randrange(2)] = bytes([damage])
    return bytes(body)


def new_user(session: object) -> str:
    return json.dumps({"device_id": "d", "account_uuid": "", "session_id": session})


class TestJsonMembers:
    def test_named_cases(self) -> None:
        cases = [text.strip().encode() for text in MEMBERS.split(" | ")]
        assert [check_members(case) for case in cases] == [True] * 7 + [False] * 11

    def test_vectors(self) -> None:
        if not VECTOR_FILE.is_file():
            pytest.skip("needs the vectors beside the repository")
        lines = VECTOR_FILE.read_text(encoding="utf-8").splitlines()
        bodies = [base64.b64decode(json.loads(line)["b64"]) for line in lines]
        assert len(bodies) == 340
        for body in bodies:
            check_members(body)
            check_members(b'{"model": "m", "x": %b}' % body)
            check_members(b'{"x":[{"y":%b}],"model":"m"}' % body)
            key_of(b'{"metadata":%b,"messages":[%b]}' % (body, body))

    def test_any_body(self) -> None:
        chance = random.Random(20)
        bodies = [any_body(chance) for _ in range(3000)]
        assert 1000 < sum(map(check_members, bodies)) < 2900
        for body in bodies:
            key_of(body)

    @pytest.mark.parametrize("body", ODD_BODIES, ids=range(len(ODD_BODIES)))
    def test_odd_bodies_never_raise(self, body: bytes) -> None:
        members = claude_lb.top_level(body)
        claude_lb.model_of(body, members)
        claude_lb.cache_ttl_s(body)
        key_of(body)

    def test_the_model(self) -> None:
        cases = [case.strip().rsplit(" ", 1) for case in MODELS.split(" | ")]
        for size in (256, 257):
            name = "m" * size
            cases.append([f'{{"model":"{name}"}}', name if size == 256 else "-"])
        for text, name in cases:
            for body in (text.encode(), bytearray(text.encode())):
                found = claude_lb.model_of(body, claude_lb.top_level(body))
                assert (found[0] if found else "-") == name, text

    @pytest.mark.parametrize("text", ["m", "", 'a"b\\', "\u00e9\u2028", "\U0001f600"])
    def test_a_value_is_spliced_in(self, text: str) -> None:
        start = ' {"a" : {"model": "\u00e9"}, "model" :\t'
        body = f'{start}"x\\u0079" ,"z":1e0}}\n'.encode()
        member = claude_lb.top_level(body)["model"]
        for kind in (bytes, bytearray):
            made = claude_lb.with_value(kind(body), member, text)
            assert json.loads(made)["model"] == text
            assert made.startswith(start.encode())
            assert made.endswith(b' ,"z":1e0}\n')

    def test_the_cache_asked_for(self) -> None:
        hour = b'{"a":[{"cache_control":{"ttl" : "1h","type":"ephemeral"}}]}'
        quoted = rb'{"text":"\"ttl\":\"1h\"","x":"1h"}'
        for kind in (bytes, bytearray):
            bodies = [hour, hour.replace(b"1h", b"5m"), b"{}", quoted]
            found = [claude_lb.cache_ttl_s(kind(body)) for body in bodies]
            assert found == [3600, 300, 300, 300]

    def test_models_that_share_limits(self) -> None:
        for case in [*LIMIT_CLASSES.split(" | "), f"{'x' * 99} {'x' * 64}"]:
            model, bucket, family = [*case.split(), ""][:3]
            assert claude_lb.model_bucket(model) == bucket
            assert claude_lb.model_family(model) == family


class TestJsonConversations:
    @pytest.mark.parametrize("ttl", [{}, {"ttl": "1h"}])
    @pytest.mark.parametrize("first", [False, True])
    @pytest.mark.parametrize("indent", [None, 2])
    def test_later_turns_keep_the_key(
        self, ttl: dict[str, str], first: bool, indent: int | None
    ) -> None:
        def mark(block: dict[str, Any]) -> None:
            own = {"cache_control": {"type": "ephemeral", **ttl}}
            whole = {**own, **block} if first else {**block, **own}
            block.clear()
            block.update(whole)

        plain = key_of(json.dumps(talk(1), indent=indent).encode())
        for turns in (1, 2, 5):
            for places in ("system", "tools", "messages", "system tools messages"):
                body = talk(turns, max_tokens=turns)
                if turns > 1:
                    mark(body["messages"][-1]["content"][0])
                for place in places.split():
                    block = body[place][0]
                    mark(block["content"][0] if place == "messages" else block)
                assert key_of(json.dumps(body, indent=indent).encode()) == plain

    def test_other_conversations_have_other_keys(self) -> None:
        said = [{"role": "user", "content": "q"}]
        changes = {"model": "m", "system": "be long", "tools": [], "messages": said}
        keys = {key_of(talk(1, **{k: v})) for k, v in changes.items()}
        assert len({*keys, key_of(talk(1))}) == 5
        roles = [["user"], ["assistant", "user"], ["assistant", "user", "assistant"]]
        speech = [[{"role": r, "content": r * len(rs)} for r in rs] for rs in roles]
        speech[2][1]["content"] = speech[1][1]["content"]
        one, two, three = (key_of({"messages": messages}) for messages in speech)
        assert one != two == three
        assert key_of({"messages": [{"role": "assistant", "content": "a"}]}) == ""

    @pytest.mark.parametrize("user", [OLD_USER.format, new_user])
    def test_a_session_in_user_id(self, user: Callable[[str], str]) -> None:
        one, other = ({"user_id": user(s)} for s in (SESSION_ID, SESSION_ID[::-1]))
        assert key_of(talk(1, metadata=one)) == key_of(talk(2, metadata=one, model="m"))
        assert key_of(talk(1, metadata=one)) == key_of({"metadata": one})
        keys = [key_of(talk(1, metadata=who)) for who in (one, other, {})]
        assert len(set(keys)) == 3

    @pytest.mark.parametrize(
        "user", [5, None, "", "me", "{", "{}", "[]", new_user(""), new_user(None), []]
    )
    def test_a_user_without_a_session(self, user: object) -> None:
        who = {"metadata": {"user_id": user}}
        assert key_of(talk(1, **who)) == key_of(talk(2, **who)) == key_of(talk(1))
        assert key_of(talk(1, **who)) != key_of(talk(1, model="m", **who))

    def test_claude_codes_session_and_agent(self) -> None:
        names = (b"x-claude-code-session-id", b"x-claude-code-agent-id")
        pairs = [("s", ""), ("t", ""), ("s", "a"), ("s", "b"), ("sa", "")]
        keys = [claude_lb.session_key(dict(zip(names, pair))) for pair in pairs]
        assert len({*keys, ""}) == 6
        assert claude_lb.session_key({names[0]: "s"}) == keys[0]
        assert claude_lb.session_key({names[1]: "a"}) == claude_lb.session_key({}) == ""


# -- explain ---------------------------------------------------------------

CAP_BODY = error_body(429, error_code="enforced_spend_limit_reached").decode()
MODEL_BODY = error_body(404, "model: claude-opus-9").decode()
CREDIT_BODY = error_body(400, NO_CREDIT).decode()
CLAIM = "anthropic-ratelimit-unified-representative-claim: five_hour"
ANSWERS = [
    ("limited-model", "20 s, as stated", "429", "--header", "Retry-After:20"),
    ("limited", "7 s", "429", "--header", CLAIM, "--header", "retry-after: 7"),
    ("throttled", "one other endpoint", "429"),
    ("spend-cap", "attention", "429", "--body", CAP_BODY),
    ("overloaded", "retry budget", "529"),
    ("server-error", "retry budget", "503"),
    ("working", "resendAmbiguous", "504"),
    ("credential", "attention", "401"),
    ("credit", "3600 s", "400", "--body", CREDIT_BODY),
    ("no-model", "600 s", "404", "--body", MODEL_BODY),
    ("request", "relay", "400", "--body", "{", "--header", "x"),
    ("request", "relay", "418", "--body", "\u00e9", "--header", "\u20ac: 1"),
]


def explained(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    assert claude_lb.main(["explain", *arguments]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out.splitlines()


@at_both_ends
class TestExplain:
    def test_the_table_has_every_row(self, capsys: pytest.CaptureFixture[str]) -> None:
        title, *lines = explained(capsys)
        assert title.split()[:3] == ["row", "phase", "status"]
        for rule, line in zip(claude_lb.RULES, lines):
            cells = re.split(r" {2,}", line)
            statuses = " ".join(map(str, rule.statuses)) or "-"
            assert cells[:3] == [rule.name, rule.phase.value, statuses]
            assert cells[3:5] == [rule.sign.value, rule.verdict.value]
            assert cells[5:] == [str(rule.cooling), rule.scope.value]
        assert len(lines) == len(claude_lb.RULES)

    def test_answers(self, capsys: pytest.CaptureFixture[str]) -> None:
        for row, told, *arguments in ANSWERS:
            title, found, *rest = explained(capsys, "--status", *arguments)
            assert (title.split()[0], found.split()[0]) == ("row", row)
            why = next(r.why for r in claude_lb.RULES if r.name == row)
            assert f"why: {why}" in rest
            assert told in "\n".join([found, *rest])

    def test_a_file_has_its_say(self, program: Program, closed_port: int) -> None:
        wish = {"failover": {"statuses": {"418": "failover"}}}
        program.write("c.json", {"endpoints": [near(closed_port)], **wish})
        run = program.run("-c", "c.json", "explain", "--status", "418")
        assert (run.code, "configured" in run.out) == (0, True)
        assert program.run("-c", "none.json", "explain", "--status", "418").code == 2

    def test_the_program_runs_it(self, program: Program) -> None:
        run = program.run("explain", "--status", "529")
        assert (run.code, run.err) == (0, "")
        assert "overloaded" in run.out
        for wrong in (["--status", "x"], ["--nope"], ["--header"]):
            run = program.run("explain", *wrong)
            assert (run.code, run.out, run.err.count("\n")) == (2, "", 1)


# -- 30. cli, continued ----------------------------------------------------


def replace(program: Program, content: object) -> None:
    """Put a configuration in the place of c.json in one step."""
    program.write("new.json", content).replace(program.folder / "c.json")


def awaited(serving: Any, *names: str, faulty: bool = False) -> str:
    """Wait until these endpoints are served; return what is wrong with the file."""

    def shows() -> Any:
        told = serving.get("/providers")[1]
        same = [p["name"] for p in told["providers"]] == list(names)
        return told if same and bool(told["reload_faults"]) == faulty else None

    return str(eventually(shows, f"{names}, faulty: {faulty}")["reload_faults"])


@at_both_ends
class TestCliReload:
    def test_sighup_reads_the_file_again(
        self, program: Program, closed_port: int
    ) -> None:
        program.write("c.json", [near(closed_port, name="one")])
        with program.serve("-c", "c.json", "--port", "0") as serving:
            replace(program, [near(closed_port, name="two"), far(name="three")])
            serving.process.send_signal(signal.SIGHUP)
            awaited(serving, "two", "three")
            replace(program, {"endpoints": [near(closed_port, name="x")], "servr": 1})
            serving.process.send_signal(signal.SIGHUP)
            assert "servr" in awaited(serving, "two", "three", faulty=True)
            replace(program, [near(closed_port, name="four")])
            serving.process.send_signal(signal.SIGHUP)
            awaited(serving, "four")
            run = serving.stop()
        assert run.code == 0
        words = ["reloaded: asked to", "stays as it was", "servr", "reloaded: asked to"]
        assert re.search(".*".join(words), run.err, re.S)

    def test_a_change_is_noticed(self, program: Program, closed_port: int) -> None:
        program.write("c.json", [near(closed_port, name="one")])
        flags = ("-c", "c.json", "--port", "0", "--log-level", "error")
        with program.serve(*flags) as serving:
            raw = {"endpoints": [far(name="two")], "log": {"level": "debug"}}
            replace(program, raw)
            awaited(serving, "two")
            (program.folder / "c.json").unlink()
            serving.process.send_signal(signal.SIGHUP)
            assert "c.json" in awaited(serving, "two", faulty=True)
            run = serving.stop()
        assert run.code == 0
        assert run.err.count("\n") == 1  # what a flag says outlives a reload
        assert "cannot read c.json" in run.err


GROUPS_TOML = """[server]
port = 8080
switch_threshold_ms = 60
[[groups]]
name = "main"
auth_token_env = "TEAM_TOKEN"
endpoints = [{ url = "https://e.example", name = "East" }]
[health_check]
interval_seconds = 120
claude_binary_path = "claude"
"""


@at_both_ends
class TestCliForeignFiles:
    def test_a_providers_file_is_explained(self, program: Program) -> None:
        program.write("providers.json", PROVIDERS_1)
        run = program.run("-c", "providers.json", "--check")
        assert (run.code, run.err) == (0, "")
        notes = "\n".join(x for x in run.out.splitlines() if x.startswith("note: "))
        assert [key for key in PROVIDERS_1["settings"] if key not in notes] == []
        assert "the configuration is good" in run.out
        assert "endpoint yourapi:" in run.out
        assert SECRET not in run.out

    def test_a_toml_file_is_explained(self, program: Program) -> None:
        program.write("config.toml", GROUPS_TOML)
        run = program.run("-c", "config.toml", "--check", TEAM_TOKEN=CLI_TOKEN)
        good = sys.version_info >= (3, 11)
        assert run.code == (0 if good else 2)
        assert ("needs Python 3.11" in run.err) is not good
        notes = "\n".join(x for x in run.out.splitlines() if x.startswith("note: "))
        keys = ("switch_threshold_ms", "interval_seconds", "claude_binary_path")
        assert [key in notes for key in keys] == [good] * 3
        assert ("endpoint East:" in run.out) is good
        assert CLI_TOKEN not in run.out

    @pytest.mark.parametrize("flags", [(), ("--check",)])
    def test_what_cannot_be_read_cannot_start(
        self, program: Program, flags: tuple[str, ...]
    ) -> None:
        for name in ("providers.yaml", "my config.yml"):
            program.write(name, "providers:\n  - name: x\n    type: anthropic\n")
            run = program.run("-c", name, *flags)
            assert (run.code, run.out, run.err.count("\n")) == (2, "", 1)
            assert run.err.startswith("claude_lb: ")
            words = shlex.split(run.err[run.err.index("python3 -c ") :])
            assert [*words[:2], words[3]] == ["python3", "-c", name]
        raw = {"providers": [{"name": "x"}], "settings": {"port": "y"}}
        program.write("providers.json", raw)
        run = program.run("-c", "providers.json", *flags)
        assert (run.code, run.out) == (2, "")
        assert run.err.startswith("claude_lb: providers.json: ")
        assert [word in run.err for word in ("base_url", "port")] == [True] * 2


# -- the long run ----------------------------------------------------------

LONG_RUN = 10_000 if sys.version_info >= (3, 13) else 1_500
CALLERS = 16
STATED_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)\r\n", re.I)
MARKED_DELTA = re.compile(rb'"text": "([0-9a-f]{32}) (\d)"')


def marked_answer(token: str, streamed: bool) -> list[bytes]:
    """Return the parts of an answer that tell whose it is."""
    if not streamed:
        body = json.dumps({"type": "message", "id": token, "content": [token] * 9})
        return [body[:50].encode(), body[50:].encode()]
    first = sse("message_start", message={"id": token, "usage": {}})
    return [first, *(delta(f"{token} {i}") for i in range(4)), STOP]


def misbehaves(chance: random.Random) -> Answering:
    """Return what fails in each of seven ways four times in a hundred."""

    def answering(wire: Wire, request: Received) -> None:
        found = USER_ID.search(request.body)
        assert found
        streamed = b'"stream": true' in request.body
        parts = marked_answer(found[1].decode(), streamed)
        fate = int(chance.random() / 0.04)
        if fate < 4:
            status = (429, 429, 529, 500)[fate]
            wire.answer(status, error_body(status), *["retry-after: 1"][fate:])
        elif fate == 4 and streamed:
            wire.deny()
            wire.stream(error_event("overloaded_error"))
        elif fate in (5, 6):
            if fate == 6 and streamed:
                wire.stream(*parts[:3], end=False)
            elif fate == 6:
                size = b"content-length: %d\r\n\r\n" % len(b"".join(parts))
                wire.send(b"HTTP/1.1 200 OK\r\n" + size + parts[0])
            wire.close(reset=fate == 5)
            raise HungUpError
        elif streamed:
            wire.stream(*parts)
        else:
            wire.answer(200, b"".join(parts))

    return answering


class Caller:
    """A cheap client that keeps its connection, and judges every answer."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._sock: socket.socket | None = None
        self._start = f"POST /v1/messages HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"

    def ask(self, *, streamed: bool) -> str:
        """Ask once; return how the answer ended."""
        token = uuid.uuid4().hex
        body = message(stream=streamed, metadata={"user_id": token})
        if self._sock is None:
            self._sock = socket.create_connection(("127.0.0.1", self._port), BOUND_S)
        length = f"content-length: {len(body)}\r\n\r\n"
        self._sock.sendall((self._start + length).encode() + body)
        head, came, whole = self._receive(self._sock)
        if not whole or b"\r\nconnection: close" in head.lower():
            self.close()
        if int(head[9:12]) != 200:
            assert (whole, json.loads(came)["type"]) == (True, "error"), came
            return head[9:12].decode()
        parts = marked_answer(token, streamed)
        if whole:
            payload = decode_chunks(came) if streamed else came
            assert payload == b"".join(parts), came
        elif streamed:
            seen = MARKED_DELTA.findall(came)
            assert seen == [(token.encode(), b"%d" % i) for i in range(len(seen))]
            assert STOP not in came
        else:
            assert b"".join(parts).startswith(came), came
        return "right" if whole else "cut"

    @staticmethod
    def _receive(sock: socket.socket) -> tuple[bytes, bytes, bool]:
        """Return an answer's head, its body as it came, and whether it is whole."""
        came = b""
        while True:
            head, blank, rest = came.partition(b"\r\n\r\n")
            length = STATED_LENGTH.search(head + b"\r\n") if blank else None
            ends = rest.endswith(b"\r\n0\r\n\r\n") and not length
            if ends or (length and len(rest) >= int(length[1])):
                return head, rest, True
            try:
                data = sock.recv(65536)
            except ConnectionResetError:
                data = b""
            if not data:
                assert blank, f"an end without an answer: {came!r}"
                return head, rest, False
            came += data

    def close(self) -> None:
        if self._sock is not None:
            self._sock.close()
            self._sock = None


def call_many(proxy: Proxy, count: int) -> collections.Counter[str]:
    """Ask so many times from several threads; return how the answers ended."""

    def some(number: int) -> collections.Counter[str]:
        caller = Caller(proxy.port)
        own = range(number, count, CALLERS)
        ended = collections.Counter(caller.ask(streamed=i % 3 > 0) for i in own)
        caller.close()
        return ended

    with ThreadPoolExecutor(CALLERS) as threads:
        return sum(threads.map(some, range(CALLERS)), collections.Counter())


@at_both_ends
class TestLongRun:
    def test_faulty_upstreams(self, lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
        hurry(monkeypatch, POOL_IDLE_S=0.3)  # so that idle connections go
        ups = [lab.upstream(misbehaves(random.Random(i))) for i in range(4)]
        gate_s = claude_lb.FailoverSettings().gate_s
        failover = {"retryDelayMs": 1, "gateSeconds": gate_s}
        proxy = lab.proxy(*ups, failover=failover)
        services, workers = proxy.server.services, proxy.server.workers
        pool, upstreams = services.pool, services.upstreams
        clock, since = pool._clock, pool._clock()
        # 15 s of cooldown in 0.15 s: else one endpoint has to do it all
        pool._clock = lambda: since + (clock() - since) * 100

        def at_rest() -> tuple[int, int]:
            check_calm(proxy)
            connections = proxy.server.connections
            eventually(lambda: not connections, "no client")
            eventually(lambda: not any(upstreams._idle.values()), "no idle connection")
            eventually(lambda: not workers._idle + workers.busy, "no worker")
            wires = [thread for thread in lab._own if thread.is_alive()][len(ups) :]
            eventually(lambda: not any(w.is_alive() for w in wires), "no wire")
            return lab._standing()

        warm_up = call_many(proxy, 200)
        before = at_rest()
        ended = call_many(proxy, LONG_RUN)
        assert at_rest() == before
        lab.counted += LONG_RUN + 200
        assert sum(ended.values()) == LONG_RUN
        assert set(ended) <= {"right", "cut", "429", "500", "502", "503", "529"}
        assert ended["right"] > LONG_RUN // 2, ended
        assert min(ended["cut"], ended["502"]) > 0, ended
        for up in ups:
            lines = b"\n".join(b"\n".join(r.lines) for r in up.requests)
            found = collections.Counter(re.findall(rb"canary-[0-9a-f]+", lines))
            assert found == {up.token.encode(): len(up.requests)}
        told = collections.Counter(r["ended"] for r in proxy.rows(LONG_RUN + 200))
        total = warm_up + ended
        assert (told["ok"], told["truncated"]) == (total["right"], total["cut"])


# ============================================================================
# USAGE AND PRICES
# ============================================================================

OCTOBER_7 = 1_791_331_200  # 2026-10-07 00:00 UTC
DATED_MODEL = "claude-sonnet-5-5-20261001"


def event(name: str, data: dict[str, Any]) -> bytes:
    body = json.dumps({"type": name, **data}, separators=(",", ":"))
    return f"event: {name}\ndata: {body}\n\n".encode()


def started(usage: object, model: object = DATED_MODEL) -> bytes:
    message = {"id": "msg_1", "model": model, "content": [], "usage": usage}
    return event("message_start", {"message": message})


def changed(usage: object) -> bytes:
    return event("message_delta", {"delta": {"stop_reason": "end"}, "usage": usage})


def taken_in(parts: Iterable[bytes]) -> claude_lb.SseWatch:
    watch = claude_lb.SseWatch()
    for part in parts:
        watch.feed(part)
    return watch


TEXT = event("content_block_delta", {"delta": {"text": "hi"}})
STOP_EVENT = event("message_stop", {})
FIRST = {
    "input_tokens": 9,
    "cache_creation_input_tokens": 30,
    "cache_read_input_tokens": 5,
    "cache_creation": {
        "ephemeral_5m_input_tokens": 10,
        "ephemeral_1h_input_tokens": 20,
    },
    "output_tokens": 1,
    "service_tier": "standard",
    "inference_geo": "us",
}
LAST = {
    "input_tokens": None,
    "output_tokens": 77,
    "cache_read_input_tokens": 6,
    "server_tool_use": {"web_search_requests": 2, "web_fetch_requests": 4},
    "speed": "fast",
}
STREAM = (
    started(FIRST) + TEXT + changed({"output_tokens": 50}) + changed(LAST) + STOP_EVENT
)
WHOLE = Usage(9, 77, 6, 10, 20, 2, "standard", "fast", "us")


class TestUsageOfStreams:
    @pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"], ids=["LF", "CRLF", "CR"])
    @pytest.mark.parametrize("blank", [b": ", b":"], ids=["blank", "no blank"])
    def test_the_last_value_of_each_field_counts_in_any_split(
        self, end: bytes, blank: bytes
    ) -> None:
        stream = STREAM.replace(b"data: ", b"data" + blank)
        stream = stream.replace(b"event: ", b"event" + blank).replace(b"\n", end)
        for parts in all_splits(stream):
            watch = taken_in(parts)
            assert (watch.usage(), watch.model()) == (WHOLE, DATED_MODEL), len(parts[0])
            assert watch.complete()

    def test_events_without_names_are_understood_in_any_split(self) -> None:
        lines = [x for x in STREAM.split(b"\n") if not x.startswith(b"event")]
        for parts in all_splits(b"\n".join(lines)):
            watch = taken_in(parts)
            assert (watch.usage(), watch.model()) == (WHOLE, DATED_MODEL), len(parts[0])

    def test_what_came_before_a_cut_is_known(self) -> None:
        first = Usage(9, None, 5, 10, 20, None, "standard", "", "us")
        assert taken_in([started(FIRST) + TEXT + changed(LAST)[:-2]]).usage() == first
        assert taken_in([started(FIRST)[:-2]]).usage() is None
        assert taken_in([TEXT + STOP_EVENT]).usage() is None
        assert taken_in([]).usage() is None
        assert taken_in([TEXT]).model() == ""

    @pytest.mark.parametrize(
        ("says", "writes"),
        [
            ([{"cache_creation_input_tokens": 30}], (30, None)),
            ([{"cache_creation_input_tokens": 0}], (0, None)),
            ([FIRST, {"cache_creation_input_tokens": 99}], (79, 20)),
            ([FIRST, {"cache_creation_input_tokens": 30}], (10, 20)),
            ([{"cache_creation_input_tokens": 9}, FIRST], (10, 20)),
            ([{"cache_creation_input_tokens": 9, "cache_creation": None}], (9, None)),
            ([{"cache_creation_input_tokens": 9, "cache_creation": [5]}], (9, None)),
            ([{"cache_creation": {"ephemeral_1h_input_tokens": 7}}], (None, 7)),
            (
                [
                    {"cache_creation_input_tokens": 1},
                    {"cache_creation_input_tokens": 2},
                ],
                (2, None),
            ),
            ([{"input_tokens": 1, "ephemeral_1h_input_tokens": 7}], (None, None)),
        ],
    )
    def test_writes_are_split_as_said_else_they_are_for_5_minutes(
        self, says: list[dict[str, Any]], writes: tuple[int | None, int | None]
    ) -> None:
        usage = taken_in([changed(said) for said in says]).usage()
        assert usage is not None
        assert (usage.cache_write_5m_tokens, usage.cache_write_1h_tokens) == writes

    @pytest.mark.parametrize(
        "value",
        ["5", -1, True, False, 1.0, 1e3, 10**10, 10**30, [], [1], {}, {"a": 1}, None],
        ids=str,
    )
    def test_a_count_that_is_none_was_not_said(self, value: object) -> None:
        bad = {k: value for k in FIRST if k.endswith("tokens")}
        bad["cache_creation"] = {"ephemeral_5m_input_tokens": value}
        bad["server_tool_use"] = {"web_search_requests": value}
        assert taken_in([started(bad)]).usage() is None
        assert taken_in([STREAM, changed(bad)]).usage() == WHOLE

    @pytest.mark.parametrize(
        "value", ["", "a b", "x" * 33, "\n", "\u00e9", 5, True, ["us"], {"a": "us"}]
    )
    def test_a_text_that_is_not_short_and_plain_was_not_said(
        self, value: object
    ) -> None:
        bad = {"service_tier": value, "speed": value, "inference_geo": value}
        assert taken_in([started(bad)]).usage() is None
        assert taken_in([STREAM, changed(bad)]).usage() == WHOLE

    @pytest.mark.parametrize(
        "data",
        [
            b"{",
            b"[]",
            b"5",
            b'"message_start"',
            b'{"type":"message_start"}',
            b'{"type":"message_start","message":[]}',
            b'{"type":"message_start","message":{"usage":[],"model":5}}',
            b'{"type":"message_delta","usage":"x"}',
            b'{"type":["message_delta"],"usage":{"input_tokens":5}}',
            b'{"type":"ping","usage":{"input_tokens":5},"x":"message_delta"}',
            b'{"type":"message_delta","usage":{"input_tokens":NaN}}',
            b'{"type":"message_delta","usage":' + b"[" * 20_000,
            b'{"type":"message_delta","usage":{"input_tokens":"\xff\xfe"}}',
        ],
    )
    def test_nonsense_says_nothing(self, data: bytes) -> None:
        nonsense = b"event: message_delta\ndata: %b\n\n" % data
        watch = taken_in([nonsense])
        assert (watch.usage(), watch.model()) == (None, "")
        watch = taken_in([STREAM, nonsense])
        assert (watch.usage(), watch.model()) == (WHOLE, DATED_MODEL)

    def test_what_the_model_writes_is_not_usage(self) -> None:
        fake = changed({"input_tokens": 666}).decode()
        inside = {"usage": {"input_tokens": 5}, "type": "message_delta", "text": fake}
        quoted = event("content_block_delta", {"delta": inside, "message_start": 1})
        for parts in all_splits(started(FIRST) + quoted + changed(LAST)):
            assert taken_in(parts).usage() == Usage(
                9, 77, 6, 10, 20, 2, "standard", "fast", "us"
            ), len(parts[0])

    def test_a_model_that_is_no_short_text_is_not_named(self) -> None:
        for model in (None, 5, "x" * 257, "a\nb", ["x"], ""):
            assert taken_in([started(FIRST, model)]).model() == "", model

    @pytest.mark.parametrize("size", [1, 100, 4096, 70_000])
    def test_what_is_held_is_bounded(self, size: int) -> None:
        data = b'event: message_start\ndata: {"type":"message_start","x":"'
        data += b"message_ " * 30_000
        watch, most = claude_lb.SseWatch(), 0
        for i in range(0, len(data), size):
            watch.feed(data[i : i + size])
            most = max(most, len(watch._held))
        assert 0 < most <= 64 * 1024 or size > 64 * 1024
        watch.feed(b'"}\n\n' + STREAM)
        assert (watch.usage(), len(watch._held)) == (WHOLE, 0)

    def test_an_event_may_be_long_while_it_comes(self) -> None:
        padding = {"text": "x" * 60_000}
        stream = event("message_delta", {"delta": padding, "usage": LAST})
        for size in (1, 1000, len(stream)):
            parts = [stream[i : i + size] for i in range(0, len(stream), size)]
            usage = taken_in(parts).usage()
            assert usage is not None
            assert usage.output_tokens == 77


def body_of(members: Iterable[tuple[str, Any]]) -> bytes:
    return json.dumps(dict(members), separators=(",", ":")).encode()


def answer(content: object, **more: object) -> bytes:
    said = {**FIRST, **{k: v for k, v in LAST.items() if v is not None}}
    start = {
        "model": DATED_MODEL,
        "id": "msg_1",
        "content": content,
        "stop_reason": "x",
    }
    return body_of([*start.items(), ("usage", said), *more.items()])


def read(parts: Iterable[bytes], lane: Lane = Lane.MESSAGES) -> claude_lb.JsonWatch:
    watch = claude_lb.JsonWatch(lane)
    for part in parts:
        watch.feed(part)
    return watch


FAKE = {"usage": {"input_tokens": 666}, "model": "fake"}
FAKES = [
    {"type": "text", "text": '"usage": {"input_tokens": 666}, "model": "fake"}'},
    {"type": "text", "text": ',"usage":{"input_tokens":666}}'},
    {"type": "text", "text": '{"usage":{"input_tokens":666}}\\'},
    {"type": "tool_use", "input": FAKE},
    {"type": "tool_use", "input": {"a": [FAKE], 'b"usage': {"input_tokens": 666}}},
]


class TestUsageOfAnswers:
    def test_usage_and_model_are_found_in_any_split(self) -> None:
        for body in (answer([]), answer(FAKES), answer(FAKES, stop=None, n=5)):
            for parts in all_splits(body):
                watch = read(parts)
                assert (watch.usage(), watch.model()) == (WHOLE, DATED_MODEL), len(
                    parts[0]
                )

    def test_blanks_change_nothing(self) -> None:
        for indent in (0, 1, 4):
            body = json.dumps(json.loads(answer(FAKES)), indent=indent).encode()
            assert read([b"\n " + body + b"\r\n"]).usage() == WHOLE
            assert read([body]).model() == DATED_MODEL

    @pytest.mark.parametrize("size", [1, 1000, 65_536, 1_000_000])
    def test_a_long_answer_is_known_by_its_two_ends(self, size: int) -> None:
        body = answer([*FAKES, {"type": "text", "text": "x" * 150_000}])
        watch = read(body[i : i + size] for i in range(0, len(body), size))
        assert (watch.usage(), watch.model()) == (WHOLE, DATED_MODEL)
        assert len(watch._seen) == 64 * 1024
        assert len(watch._ending) == 4096

    @pytest.mark.parametrize("fake", FAKES)
    def test_what_stands_in_the_content_does_not_fool_it(self, fake: object) -> None:
        for filling in ("", "x" * 150_000):
            content = [{"text": filling}, fake]
            for members in (
                [("content", content)],
                [("content", content), ("stop_reason", "x")],
                [("stop", "usage"), ("content", content)],
            ):
                watch = read([body_of(members)])
                assert (watch.usage(), watch.model()) == (None, ""), members

    def test_nested_usage_behind_it_does_not_hide_it(self) -> None:
        body = answer([], context={"usage": {"input_tokens": 666}})
        for parts in all_splits(body):
            assert read(parts).usage() == WHOLE

    def test_behind_something_nested_it_is_known_only_of_a_body_held_whole(
        self,
    ) -> None:
        nested: dict[str, list[int]] = {"applied_edits": []}
        assert read([answer([], context=nested)]).usage() == WHOLE
        long = ["x" * 70_000]
        assert read([answer(long, context=nested)]).usage() is None

    def test_members_may_stand_in_any_order(self) -> None:
        members = [("usage", FIRST), ("content", FAKES), ("model", "m")]
        watch = read([body_of(members)])
        first = Usage(9, 1, 5, 10, 20, None, "standard", "", "us")
        assert (watch.usage(), watch.model()) == (first, "m")
        members[1:1] = [("x", ["x" * 70_000])]
        watch = read([body_of(members)])
        assert (watch.usage(), watch.model()) == (None, "")

    def test_what_is_cut_or_no_object_says_nothing(self) -> None:
        body = answer(FAKES[:3])
        for end in range(len(body)):
            assert read([body[:end]]).usage() is None, end
        for other in (b"", b"[]", b"5", b'{"usage":5}', b'{"usage":{}}', b"[" * 9000):
            watch = read([other])
            assert (watch.usage(), watch.model()) == (None, "")
        assert read([b"[" + body + b"]"]).usage() is None

    def test_only_messages_have_usage(self) -> None:
        for lane in (Lane.COUNT, Lane.FIXED):
            watch = read([answer([])], lane)
            assert (watch.usage(), watch.model()) == (None, "")

    def test_watches_are_made_for_what_can_be_read(self) -> None:
        for kind in (b"text/event-stream", b"application/json"):
            head = b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\n\r\n" % kind
            watch = claude_lb.watch_for(
                claude_lb.parse_answer_head(head, "POST"), Lane.MESSAGES
            )
            assert watch is not None
            watch.feed(STREAM if b"event" in kind else answer(FAKES))
            assert (watch.usage(), watch.model()) == (WHOLE, DATED_MODEL)


class TestAskedModel:
    @pytest.mark.parametrize(
        ("body", "model"),
        [
            (b'{"model":"m","messages":[]}', "m"),
            (b' {"max_tokens" : 5 ,\n "model" : "m" , "messages":[]} ', "m"),
            (b'{"messages":[{"model":"fake"}],"model":"m"}', "m"),
            (b'{"system":"\\",\\"model\\":\\"fake","model":"m"}', "m"),
            (b'{"messages":[],"model":"a","model":"b"}', "b"),
            (b'{"model":"caf\\u00e9"}', "caf\u00e9"),
            ('{"model":"caf\u00e9"}'.encode(), "caf\u00e9"),
            (b'{"model":null}', None),
            (b'{"model":5}', None),
            (b'{"model":""}', None),
            (b'{"model":"a\\nb"}', None),
            (b'{"model":"%b"}' % (b"x" * 257), None),
            (b'{"messages":[{"model":"fake"}]}', None),
            (b'{"model":"m"', None),
            (b'["model","m"]', None),
            (b"", None),
            (b'{"model":"\xff"}', None),
        ],
    )
    def test_a_short_body_is_read_exactly(self, body: bytes, model: str | None) -> None:
        assert claude_lb.asked_model(body) == model
        assert claude_lb.asked_model(bytearray(body)) == model

    @pytest.mark.parametrize(
        ("start", "model"),
        [
            (b'{"model":"m",', "m"),
            (
                b' {\n "max_tokens": 5, "stream" :true, "x":"\\"{[", "model" : "m" ,',
                "m",
            ),
            (b'{"a":null,"b":-1.5e3,"model":"m",', "m"),
            (b'{"a":["model","x"],"model":"m",', None),
            (b'{"a":{"model":"fake"},"model":"m",', None),
            (b'{"a":"\\",\\"model\\":\\"fake\\",",', None),
            (b'{"a":"model","model":["m"],', None),
            (b'{"a":"model","model":"m",', "m"),
            (b'{"model":5,', None),
            (b'{"model":"m\\"x",', None),
            (b'["model":"m",', None),
            (b'{"a":"%b","model":"m",' % (b"x" * 5000), None),
            (b"{" + b'"n":5,' * 2000 + b'"model":"m",', None),
        ],
    )
    def test_of_a_long_body_only_the_start_is_read(
        self, start: bytes, model: str | None
    ) -> None:
        body = start + b'"messages":[%b0],"model":"late"}' % (b"0," * 4000)
        assert claude_lb.asked_model(body) == model
        assert claude_lb.asked_model(bytearray(body)) == model


# USD for 100,000 tokens: input, output, 5 m write, 1 h write, read
COSTS = {
    "claude-fable-5-1": (1.0, 5.0, 1.25, 2.0, 0.025),
    "claude-mythos-5-1": (1.0, 5.0, 1.25, 2.0, 0.025),
    "claude-fable-5": (1.0, 5.0, 1.25, 2.0, 0.1),
    "claude-mythos-5": (1.0, 5.0, 1.25, 2.0, 0.1),
    "claude-opus-5-5": (0.4, 2.0, 0.5, 0.8, 0.02),
    "claude-opus-5": (0.5, 2.5, 0.625, 1.0, 0.05),
    "claude-opus-4-8": (0.5, 2.5, 0.625, 1.0, 0.05),
    "claude-opus-4-7": (0.5, 2.5, 0.625, 1.0, 0.05),
    "claude-opus-4-6": (0.5, 2.5, 0.625, 1.0, 0.05),
    "claude-opus-4-5-20251101": (0.5, 2.5, 0.625, 1.0, 0.05),
    "claude-opus-4-1-20250805": (1.5, 7.5, 1.875, 3.0, 0.15),
    "claude-opus-4-20250514": (1.5, 7.5, 1.875, 3.0, 0.15),
    "claude-sonnet-5-5": (0.2, 1.0, 0.25, 0.4, 0.01),
    "claude-sonnet-5": (0.2, 1.0, 0.25, 0.4, 0.02),
    "claude-sonnet-4-6": (0.3, 1.5, 0.375, 0.6, 0.03),
    "claude-sonnet-4-5-20250929": (0.3, 1.5, 0.375, 0.6, 0.03),
    "claude-haiku-5-5": (0.01, 0.05, 0.0125, 0.02, 0.001),
    "claude-haiku-4-5-20251001": (0.1, 0.5, 0.125, 0.2, 0.01),
}
# USD for the mixed answer
MIXED = Usage(1000, 2000, 30_000, 4000, 500)
MIXED_COSTS = {
    "claude-fable-5-1": 0.1775,
    "claude-mythos-5-1": 0.1775,
    "claude-fable-5": 0.2,
    "claude-mythos-5": 0.2,
    "claude-opus-5-5": 0.074,
    "claude-opus-5": 0.1,
    "claude-opus-4-8": 0.1,
    "claude-opus-4-7": 0.1,
    "claude-opus-4-6": 0.1,
    "claude-opus-4-5": 0.1,
    "claude-opus-4-1": 0.3,
    "claude-opus-4": 0.3,
    "claude-sonnet-5-5": 0.037,
    "claude-sonnet-5": 0.04,
    "claude-sonnet-4-6": 0.06,
    "claude-sonnet-4-5": 0.06,
    "claude-haiku-5-5": 0.002,
    "claude-haiku-4-5": 0.02,
}


def cost(model: str, usage: Usage, at_s: float = OCTOBER_7) -> float | None:
    return claude_lb.cost_usd(model, usage, at_s)


def about(usd: float) -> Any:
    return pytest.approx(usd, abs=1e-9, rel=0)


class TestCost:
    @pytest.mark.parametrize("model", COSTS)
    def test_each_part_has_its_price(self, model: str) -> None:
        parts = (
            Usage(input_tokens=100_000),
            Usage(output_tokens=100_000),
            Usage(cache_write_5m_tokens=100_000),
            Usage(cache_write_1h_tokens=100_000),
            Usage(cache_read_tokens=100_000),
        )
        for usage, usd in zip(parts, COSTS[model]):
            assert cost(model, usage) == about(usd), usage

    @pytest.mark.parametrize("model", MIXED_COSTS)
    def test_an_answer_costs_the_sum_of_its_parts(self, model: str) -> None:
        assert cost(model, MIXED) == about(MIXED_COSTS[model])

    def test_every_model_of_the_table_is_tried_here(self) -> None:
        assert {p.model for p in claude_lb.PRICES} == set(MIXED_COSTS)

    def test_newest_and_shortest_come_first(self) -> None:
        rows = list(claude_lb.PRICES)
        for before, row in zip(rows, rows[1:]):
            if before.model == row.model:
                assert (before.since, -before.most_prompt) > (
                    row.since,
                    -row.most_prompt,
                )

    @pytest.mark.parametrize(
        ("usage", "usd"),
        [
            (Usage(input_tokens=100_000, output_tokens=1000), 0.0105),
            (Usage(input_tokens=100_001, output_tokens=1000), 0.0525005),
            (Usage(60_000, 0, 30_000, 10_000, 0), 0.00755),
            (Usage(60_000, 0, 30_000, 10_000, 1), None),
            (Usage(60_000, 0, 40_001, 0, 0), None),
            (Usage(10, 200_000, 0, 0, 0), 0.100001),
            (Usage(200_000, 100, 0, 0, 0), 0.10025),
        ],
    )
    def test_haiku_55_costs_more_for_long_prompts(
        self, usage: Usage, usd: float | None
    ) -> None:
        want = None if usd is None else about(usd)
        assert cost("claude-haiku-5-5", usage) == want

    def test_sonnet_55_reads_cost_half_from_october_7_on(self) -> None:
        usage = Usage(1000, 1000, 1_000_000)
        for at_s, usd in (
            (OCTOBER_7 - 86_400, 0.212),
            (OCTOBER_7 - 0.001, 0.212),
            (OCTOBER_7, 0.112),
            (OCTOBER_7 + 0.001, 0.112),
            (OCTOBER_7 + 9e8, 0.112),
        ):
            assert cost("claude-sonnet-5-5", usage, at_s) == about(usd), at_s
        assert cost("claude-sonnet-5-5", usage, math.nan) is None

    @pytest.mark.parametrize(
        "name",
        [
            "claude-sonnet-4-5",
            "claude-sonnet-4-5-20250929",
            "claude-sonnet-4-5@20250929",
            "claude-sonnet-4-5@default",
            "anthropic/claude-sonnet-4-5",
            "openrouter/anthropic/claude-sonnet-4-5",
            "vertex_ai/claude-sonnet-4-5@20250929",
            "publishers/anthropic/models/claude-sonnet-4-5@20250929",
            "anthropic.claude-sonnet-4-5-20250929-v1:0",
            "us.anthropic.claude-sonnet-4-5-20250929-v1:0",
            "us-gov.anthropic.claude-sonnet-4-5-20250929-v1:0",
            "global.anthropic.claude-sonnet-4-5-20250929-v1:0",
            "apac.anthropic.claude-sonnet-4-5-v1",
            "bedrock/eu.anthropic.claude-sonnet-4-5-20250929-v1:0",
            "arn:aws:bedrock:us-east-1:123456789012:inference-profile/"
            "us.anthropic.claude-sonnet-4-5-20250929-v1:0",
        ],
    )
    def test_one_model_has_many_names(self, name: str) -> None:
        assert cost(name, MIXED) == about(0.06)

    @pytest.mark.parametrize(
        "name",
        [
            "",
            "claude",
            "gpt-5",
            "claude-opus-5-5-foo",
            "claude-opus-5-5-20261001-foo",
            "claude-opus-5-50",
            "claude-opus-6",
            "claude-opus-5-5-5",
            "claude-opus-5-5-2026",
            "claude-opus-5-5 ",
            "claude-opus-5-5\n",
            "CLAUDE-OPUS-5-5",
            "my-claude-opus-5-5",
            "other/claude-opus-5-5",
            "notanthropic/claude-opus-5-5",
            "us.claude-opus-5-5",
            "claude-fable-5-2",
            "claude-mythos-5-2",
            "claude-sonnet-4-20250514",
            "claude-3-5-haiku-20241022",
            "/" * 5000,
            "claude-opus-\u0665",
        ],
    )
    def test_an_unknown_model_has_no_cost(self, name: str) -> None:
        assert cost(name, MIXED) is None

    @pytest.mark.parametrize(
        ("model", "usage", "usd"),
        [
            ("claude-opus-5", MIXED._replace(service_tier="standard"), 0.1),
            ("claude-opus-5", MIXED._replace(service_tier="batch"), 0.05),
            ("claude-opus-5", MIXED._replace(service_tier="priority"), None),
            ("claude-opus-5", MIXED._replace(service_tier="new"), None),
            ("claude-opus-5", MIXED._replace(inference_geo="us"), 0.11),
            ("claude-opus-5", MIXED._replace(inference_geo="global"), 0.1),
            ("claude-opus-5", MIXED._replace(inference_geo="not_available"), 0.1),
            ("claude-opus-5", MIXED._replace(inference_geo="moon"), None),
            ("claude-opus-4-6", MIXED._replace(inference_geo="us"), 0.11),
            ("claude-sonnet-4-6", MIXED._replace(inference_geo="us"), 0.066),
            ("claude-opus-4-5", MIXED._replace(inference_geo="us"), 0.1),
            ("claude-sonnet-4-5", MIXED._replace(inference_geo="us"), 0.06),
            ("claude-haiku-4-5", MIXED._replace(inference_geo="us"), 0.02),
            (
                "claude-opus-5",
                MIXED._replace(service_tier="batch", inference_geo="us"),
                0.055,
            ),
            ("claude-opus-5", MIXED._replace(speed="standard"), 0.1),
            ("claude-opus-5", MIXED._replace(speed="fast"), None),
            ("claude-opus-5", Usage(1000, 2000, speed="fast"), 0.11),
            ("claude-opus-4-8", Usage(1000, 2000, 0, 0, 0, speed="fast"), 0.11),
            ("claude-opus-5", Usage(1000, 2000, 1, speed="fast"), None),
            ("claude-opus-5", Usage(1000, speed="fast", service_tier="batch"), None),
            ("claude-opus-5-5", Usage(1000, 2000, speed="fast"), None),
            ("claude-opus-5", Usage(1000, 2000, speed="slow"), None),
            ("claude-opus-5", MIXED._replace(web_searches=3), 0.13),
            ("claude-opus-5", MIXED._replace(web_searches=0), 0.1),
            (
                "claude-opus-5",
                MIXED._replace(web_searches=1000, service_tier="batch"),
                10.05,
            ),
            ("claude-opus-5", Usage(0, 0), 0.0),
            ("claude-opus-5", Usage(), None),
            ("claude-opus-5", Usage(web_searches=5, service_tier="batch"), None),
        ],
    )
    def test_modifiers_count_where_the_usage_says_them(
        self, model: str, usage: Usage, usd: float | None
    ) -> None:
        assert cost(model, usage) == (None if usd is None else about(usd))

    def test_a_stream_s_cost_is_that_of_its_last_counts(self) -> None:
        said = {"input_tokens": 1000, "output_tokens": 3, "speed": "standard"}
        watch = taken_in(
            [started(said), TEXT, changed({"output_tokens": 2000}), STOP_EVENT]
        )
        usage = watch.usage()
        assert usage is not None
        assert cost(watch.model(), usage) == about(0.022)


# ============================================================================
# ACCOUNTS
# ============================================================================

CANARY = "canary"  # stands in every token that the provider makes


class Provider(http.server.ThreadingHTTPServer):
    """A scripted OAuth provider: single-use refresh tokens, families, odd answers."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), ProviderHandler)
        self.lock = threading.Lock()
        self.codes: dict[str, dict[str, str]] = {}
        self.live: dict[str, int] = {}  # refresh token -> family
        self.used: dict[str, int] = {}
        self.revoked: set[int] = set()
        self.made = 0
        self.asked: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.script: list[str] = []  # odd answers to the next requests
        self.scope: str | None = None
        self.slow = threading.Event()  # set: slow answers may go
        self.waiting = threading.Event()  # a slow answer is due

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def settings(self) -> AccountSettings:
        return (
            parse_config(
                json.dumps(self.config("unused.db")),
                name="x",
                source=claude_lb._Environment(),
            ).accounts
            or AccountSettings()
        )

    def config(self, database: str | None) -> dict[str, Any]:
        return {
            "accounts": {
                "baseURL": self.url,
                "authorizeURL": f"{self.url}/authorize",
                "consoleAuthorizeURL": f"{self.url}/console",
                "tokenURL": f"{self.url}/token",
                "redirectURL": f"{self.url}/shown",
                "apiKeyURL": f"{self.url}/key",
            },
            "storage": {"database": database},
        }

    def allow(self, address: str) -> tuple[str, str, str]:
        """Do what the login page does; return (code, state, redirect URI)."""
        query = dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(address).query))
        with self.lock:
            self.made += 1
            code = f"code-{CANARY}-{self.made}"
            self.codes[code] = query
            self.scope = query["scope"]
        return code, query["state"], query["redirect_uri"]

    def tokens(self, family: int | None = None, **more: Any) -> dict[str, Any]:
        with self.lock:
            self.made += 1
            family = self.made if family is None else family
            refresh = f"sk-ant-ort01-{CANARY}-{self.made}"
            self.live[refresh] = family
            return {
                "access_token": f"sk-ant-oat01-{CANARY}-{self.made}",
                "refresh_token": refresh,
                "expires_in": 28_800,
                "token_type": "Bearer",
                "scope": self.scope or "user:profile user:inference",
                **more,
            }

    def count(self, grant: str = "refresh_token") -> int:
        return sum(body.get("grant_type") == grant for _, _, body in self.asked)


class ProviderHandler(http.server.BaseHTTPRequestHandler):
    server: Provider

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, status: int, document: Any, **fields: str) -> None:
        data = (
            document if isinstance(document, bytes) else json.dumps(document).encode()
        )
        self.send_response(status)
        for name, value in fields.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(data)

    def do_GET(self) -> None:
        self.server.asked.append((self.path, dict(self.headers), {}))
        self.answer(200, self.server.tokens())  # where a redirect would lead

    def do_POST(self) -> None:
        server = self.server
        raw = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = json.loads(raw) if raw else {}
        server.asked.append((self.path, dict(self.headers), body))
        odd = server.script.pop(0) if server.script else ""
        if odd == "500":
            self.answer(500, {"error": "server_error", "echo": body})
        elif odd == "invalid_grant":
            text = f"{body.get('refresh_token')} is not valid"
            self.answer(400, {"error": "invalid_grant", "error_description": text})
        elif odd == "garbage":
            self.answer(200, b"<html>" + raw)
        elif odd == "long":
            self.answer(200, b" " * 70_000 + b"{}")
        elif odd == "redirect":
            self.answer(307, {}, Location=f"{server.url}/elsewhere")
        elif odd == "hang up":
            self.connection.close()
        elif self.path == "/key":
            self.answer(200, {"raw_key": f"sk-ant-api03-{CANARY}"})
        else:
            if odd == "slow":
                server.waiting.set()
                server.slow.wait(10)
            more = {"refresh_token": None} if odd == "no refresh token" else {}
            self.grant(body, more)

    def grant(self, body: dict[str, Any], more: dict[str, Any]) -> None:
        server = self.server
        if body["grant_type"] == "authorization_code":
            login = server.codes.pop(body["code"], {})
            digest = hashlib.sha256(body["code_verifier"].encode()).digest()
            challenge = base64.urlsafe_b64encode(digest).decode().rstrip("=")
            if challenge == login.get("code_challenge") and all(
                login[n] == body[n] for n in ("state", "redirect_uri", "client_id")
            ):
                self.answer(200, server.tokens(**more))
            else:
                self.answer(401, {"error": {"type": "authentication_error"}})
            return
        token = body["refresh_token"]
        with server.lock:
            family = server.live.pop(token, None)
            if family is None and token in server.used:  # used twice: all are revoked
                server.revoked.add(server.used[token])
            else:
                server.used[token] = family or 0
        if family is None or family in server.revoked:
            self.answer(400, {"error": "invalid_grant"})
        else:
            self.answer(200, server.tokens(family, **more))


@pytest.fixture
def idp() -> Iterator[Provider]:
    server = Provider()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.slow.set()
    server.shutdown()
    server.server_close()


class Lines(Log):
    """A log that keeps its lines."""

    def __init__(self) -> None:
        super().__init__(LogSettings(level="debug"))
        self.lines: list[str] = []

    def _write(self, line: str) -> None:
        self.lines.append(line)

    def __contains__(self, text: str) -> bool:
        return any(text in line for line in self.lines)


class Desk:
    """A book, a renewer and a provider in one folder."""

    def __init__(self, idp: Provider, folder: Path) -> None:
        self.provider = idp
        self.folder = folder
        self.path = str(folder / "state" / "lb.db")
        self.log = Lines()
        self.epoch = time.time()
        self.book = AccountBook(
            self.path, idp.settings(), self.log, clock=lambda: self.epoch
        )
        self.renewer = Renewer(self.book, self.log, lambda job: job())

    def account(self, name: str = "work", **more: Any) -> Account:
        """Store an account whose token has just expired."""
        tokens = self.provider.tokens()
        made = Account(
            os.urandom(16).hex(),
            name,
            "max",
            refresh_token=Secret(tokens["refresh_token"]),
            access_token=Secret(tokens["access_token"]),
            expires_at=self.epoch - 1,
            created_at=self.epoch,
        )._replace(**more)
        self.book.add(made)
        self.book.poll()
        return self.book.account(made.id)

    def renew(self, account: Account) -> tuple[Secret | None, str]:
        came: list[tuple[Secret | None, str]] = []
        self.renewer.renew(
            account.id, account.access_token, lambda *ended: came.append(ended)
        )
        assert len(came) == 1
        return came[0]

    def later(self) -> None:
        """Let the pauses between two refreshes pass."""
        self.epoch += 3600
        self.renewer._not_before.clear()

    def row(self, account: Account) -> dict[str, Any]:
        with contextlib.closing(sqlite3.connect(self.path)) as db:
            db.row_factory = sqlite3.Row
            select = "SELECT * FROM accounts WHERE id=?"
            return dict(db.execute(select, (account.id,)).fetchone() or {})


@pytest.fixture
def desk(idp: Provider, tmp_path: Path) -> Desk:
    return Desk(idp, tmp_path)


def login(mode: str = "max", **more: Any) -> claude_lb.Login:
    options = {"noise": bytes(range(64)), "key": False, "redirect": "", **more}
    return new_login(AccountSettings(), mode, **options)


class TestLogin:
    def test_the_address_has_the_query_in_the_documented_order(self) -> None:
        parts = urllib.parse.urlsplit(claude_lb.login_url(login()))
        query = urllib.parse.parse_qsl(parts.query)
        assert [name for name, _ in query] == [
            *("code", "client_id", "response_type", "redirect_uri", "scope"),
            *("code_challenge", "code_challenge_method", "state"),
        ]
        found = dict(query)
        verifier = login().verifier.reveal()
        digest = hashlib.sha256(verifier.encode()).digest()
        whole = base64.urlsafe_b64decode(found["code_challenge"] + "=")
        assert whole == digest
        assert base64.urlsafe_b64decode(verifier + "=") == bytes(range(32))
        assert found["code_challenge_method"] == "S256"
        assert found["scope"] == "user:profile user:inference"

    def test_the_challenge_is_that_of_the_rfc(self) -> None:
        verifier = "dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk"  # RFC 7636, B
        known = login()._replace(verifier=Secret(verifier))
        assert (
            "code_challenge=E9Melhoa2OwvFrEMTJguCHaoeK1t8URWbuGJSstw-cM&"
            in claude_lb.login_url(known)
        )

    def test_the_state_is_not_the_verifier(self) -> None:
        assert login().state != login().verifier

    def test_modes_have_pages_and_scopes_of_their_own(self) -> None:
        assert login("console").address != login("max").address
        assert login("console").scopes == ("org:create_api_key", "user:profile")

    def test_an_api_key_needs_the_right_to_make_one(self) -> None:
        assert "org:create_api_key" in login(key=True).scopes

    def test_what_was_pasted_gives_its_code(self) -> None:
        state = Secret("s1")
        assert read_pasted("  c1#s1 \n", state) == "c1"
        assert read_pasted("https://x/callback?code=c1&state=s1", state) == "c1"

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "c1",
            "c1#",
            "#s1",
            "c1#s2",
            "c1#s1x",
            "c 1#s1",
            "c1#\xe9",
            "https://x/#s1",
            "https://x/cb?code=c1",
            "https://x/cb?code=c1&state=s2",
            "https://[/?code=c",
        ],
    )
    def test_another_login_s_answer_is_refused(self, text: str) -> None:
        with pytest.raises(AccountError):
            read_pasted(text, Secret("s1"))


class TestTokenReply:
    def read(self, **reply: Any) -> claude_lb.Tokens:
        return read_token_reply(json.dumps(reply).encode(), 1000.0)

    def test_a_whole_reply(self) -> None:
        got = self.read(access_token="a", refresh_token="r", expires_in=60, scope="x y")
        assert got == (Secret("a"), Secret("r"), 1060.0, ("x", "y"))

    def test_the_refresh_token_may_be_absent(self) -> None:
        assert self.read(access_token="a", expires_in=60).refresh is None

    @pytest.mark.parametrize("odd", [None, 0, -5, True, "60", [], float("nan")])
    def test_an_odd_life_is_an_unknown_one(self, odd: object) -> None:
        assert self.read(access_token="a", expires_in=odd).expires_at == 0.0

    @pytest.mark.parametrize("long", [1e300, float("inf"), 10**400])
    def test_a_life_has_a_limit(self, long: float) -> None:
        at = self.read(access_token="a", expires_in=long).expires_at
        assert at == 1000.0 + 400 * 86_400

    @pytest.mark.parametrize(
        "body",
        [
            b"",
            b"[]",
            b"<p>",
            b"{}",
            b'{"access_token": 5}',
            b"[" * 100_000,
            b'{"access_token": "a\\r\\nX: y"}',
            b'{"access_token": "\\ud800"}',
        ],
    )
    def test_garbage_is_an_error_in_words(self, body: bytes) -> None:
        with pytest.raises(ProviderError, match="holds no access token"):
            read_token_reply(body, 0.0)


class TestEndpoint:
    def made(self, **more: Any) -> claude_lb.Endpoint:
        known = {"refresh_token": Secret("r"), **more}
        plans = {"pro": ("!*opus*",), "max": ()}
        account = Account("id1", "work", "max")._replace(**known)
        return endpoint_of_account(account, AccountSettings(), plans)

    def test_an_oauth_account_lends_its_token_later(self) -> None:
        endpoint = self.made()
        assert endpoint.auth_type is AuthType.OAUTH
        assert endpoint.credential is None
        assert (endpoint.account, endpoint.group) == ("id1", "accounts")
        assert endpoint.enabled
        assert not endpoint.hint
        assert (endpoint.host, endpoint.port) == ("api.anthropic.com", 443)

    def test_an_api_key_is_the_credential(self) -> None:
        endpoint = self.made(api_key=Secret("k"))
        assert endpoint.auth_type is AuthType.API_KEY
        assert endpoint.credential == Secret("k")

    def test_own_patterns_go_before_the_plan_s(self) -> None:
        assert self.made(plan="pro").models == ("!*opus*",)
        assert self.made(plan="pro", models=("*",)).models == ("*",)
        assert self.made(plan="unheard").models == ()

    def test_who_cannot_serve_says_what_to_do(self) -> None:
        endpoint = self.made(needs_login="gone")
        assert not endpoint.enabled
        assert endpoint.hint == "needs login: claude_lb.py accounts add work"
        assert "resume work" in self.made(paused=True).hint
        assert not self.made(refresh_token=None).enabled

    def test_accounts_join_the_endpoints(self) -> None:
        accounts = [Account(n, n, "max", refresh_token=Secret(n)) for n in "ab"]
        config = Config((), accounts=AccountSettings(names=("b", "c")))
        joined = with_accounts(config, accounts)
        assert [e.name for e in joined.endpoints] == ["b"]
        assert joined.warnings == ("accounts.names: no account is named c",)
        assert with_accounts(Config(()), accounts).endpoints == ()
        both = with_accounts(Config((), accounts=AccountSettings()), accounts)
        again = with_accounts(both, accounts)
        assert again.endpoints == both.endpoints
        assert "account a is left out, an endpoint has its name" in again.warnings[0]

    def test_odd_names_of_another_program_are_left_out(self) -> None:
        accounts = [Account(str(i), n, "max") for i, n in enumerate(["a", "a", "b c"])]
        joined = with_accounts(Config((), accounts=AccountSettings()), accounts)
        assert [e.account for e in joined.endpoints] == ["0"]
        assert len(joined.warnings) == 2

    def test_lists_that_b_wrote_become_the_plan_s(self) -> None:
        row = {"id": "i", "name": "n", "plan_type": "console"}
        for names in claude_lb.B_MODEL_LISTS:
            listed = {**row, "supported_models": ", ".join(sorted(names, reverse=True))}
            assert account_of(listed).models == ()
        assert account_of({**row, "supported_models": "x,*y*"}).models == ("x", "*y*")


class TestAccountSettings:
    @pytest.mark.parametrize(
        "url", ["http://example.com/token", "ftp://x", "https://a:b@c", "//x", 5]
    )
    def test_tokens_go_over_https_or_stay_here(self, url: object) -> None:
        text = json.dumps({"accounts": {"tokenURL": url}})
        with pytest.raises(ConfigError, match=r"accounts\.tokenURL"):
            parse_config(text, name="x", source=claude_lb._Environment())

    def test_plans_are_added_to_the_usual_ones(self) -> None:
        text = json.dumps({"accounts": {}, "plans": {"team": ["*sonnet*"]}})
        config = parse_config(text, name="x", source=claude_lb._Environment())
        assert config.plans["team"] == ("*sonnet*",)
        assert config.plans["pro"] == ("!*opus*",)
        assert config.accounts == AccountSettings(proxy=config.accounts.proxy)  # type: ignore[union-attr]

    def test_null_keeps_everything_in_memory(self) -> None:
        text = json.dumps({"accounts": {}, "storage": {"database": None}})
        config = parse_config(text, name="x", source=claude_lb._Environment())
        assert config.storage.database is None


class TestBook:
    def test_reading_makes_no_file(self, desk: Desk) -> None:
        assert desk.book.all() == ()
        assert not desk.book.poll()
        assert list(desk.folder.iterdir()) == []

    def test_rows_come_back_as_they_were(self, desk: Desk) -> None:
        account = desk.account(models=("a", "b"), weight=7, mode="console")
        assert desk.book.find("work") == account
        assert account.models == ("a", "b")
        assert account.weight == 7
        assert account.expires_at == pytest.approx(desk.epoch - 1, abs=0.01)

    def test_names_are_taken_once(self, desk: Desk) -> None:
        account = desk.account()
        with pytest.raises(AccountError, match="already exists"):
            desk.book.add(account._replace(id="other"))
        desk.account("home")
        with pytest.raises(AccountError, match="already exists"):
            desk.book.rename("home", "work")
        for name in ("", "a b", "a'b", "x" * 65, "-c", "\xe9"):
            with pytest.raises(AccountError, match="visible ASCII"):
                desk.book.rename("home", name)

    def test_poll_tells_what_others_changed(self, desk: Desk) -> None:
        account = desk.account()
        other = AccountBook(desk.path, desk.book.settings, desk.log)
        assert other.poll()
        assert not other.poll()
        desk.renew(account)
        assert not other.poll()  # tokens change quietly
        assert other.token(account.id) == desk.book.token(account.id)
        changes: tuple[Callable[[], None], ...] = (
            lambda: desk.book.rename("work", "home"),
            lambda: desk.book.set_paused("home", paused=True),
            lambda: desk.book.remove("home"),
        )
        for change in changes:
            change()
            assert other.poll()
            assert not other.poll()
        assert other.token(account.id) is None

    def test_a_poll_does_not_bring_an_old_token_back(
        self, desk: Desk, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        account = desk.account()
        before = desk.book.all()

        def late() -> tuple[Account, ...]:
            """Stand in for a read that a refresh overtakes."""
            monkeypatch.undo()
            assert desk.renew(account)[0]
            return before

        monkeypatch.setattr(desk.book, "all", late)
        desk.book.poll()
        assert desk.book.token(account.id) == desk.book.all()[0].access_token
        assert desk.book.token(account.id) != account.access_token

    def test_a_rescued_database_gets_the_accounts(self, desk: Desk) -> None:
        account = desk.account()
        fresh = claude_lb.open_database(str(desk.folder / "fresh.db"))
        desk.book.restore(fresh)
        desk.book.restore(fresh)
        assert fresh.execute("SELECT id FROM accounts").fetchall() == [(account.id,)]
        fresh.close()

    def test_no_repr_shows_a_token(self, desk: Desk) -> None:
        account = desk.account(api_key=Secret(CANARY))
        assert CANARY not in repr(account)
        assert CANARY not in repr(login()._replace(state=Secret(CANARY)))
        assert CANARY not in repr(claude_lb.Tokens(Secret(CANARY), None, 0.0, None))

    def test_files_are_the_owner_s_alone(self, desk: Desk) -> None:
        before = os.umask(0)
        try:
            desk.renew(desk.account())
            db = claude_lb.open_database(desk.path)  # with -wal and -shm
        finally:
            os.umask(before)
        state = Path(desk.path).parent
        modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in state.iterdir()}
        db.close()
        assert stat.S_IMODE(state.stat().st_mode) == 0o700
        assert {"lb.db", "lb.db.accounts.json"} < set(modes)
        assert any(name.endswith(".lock") for name in modes)
        assert set(modes.values()) == {0o600}

    def test_a_lost_database_gets_its_accounts_back(self, desk: Desk) -> None:
        account = desk.account(models=("m",), api_key=Secret("k"))
        for file in Path(desk.path).parent.glob("lb.db*"):
            if not file.name.endswith(".json"):
                file.unlink()
        fresh = AccountBook(desk.path, desk.book.settings, desk.log)
        assert fresh.all() == (account,)
        assert "1 accounts were restored" in desk.log

    def test_a_removed_account_stays_away(self, desk: Desk) -> None:
        account = desk.account()
        desk.renew(account)
        desk.book.remove("work")
        assert desk.book.all() == ()
        for file in Path(desk.path).parent.iterdir():
            assert CANARY.encode() not in file.read_bytes(), file
            assert not file.name.endswith(".lock")

    @pytest.mark.parametrize("text", ["", "{}", "[]", '{"accounts": [5]}', "\0"])
    def test_a_damaged_backup_is_no_fault(self, desk: Desk, text: str) -> None:
        desk.account()
        desk.book.remove("work")
        Path(f"{desk.path}.accounts.json").write_text(text)
        assert desk.book.all() == ()
        assert "it is damaged" in desk.log

    @pytest.mark.parametrize("plant", ["link", "dangling", "fifo", "folder"])
    def test_planted_files_are_not_followed(self, desk: Desk, plant: str) -> None:
        account = desk.account()
        victim = desk.folder / "victim"
        victim.write_text("mine")
        names = (f"{account.id}.lock", "accounts.json", "accounts.json.new")
        for place in (Path(f"{desk.path}.{name}") for name in names):
            place.unlink() if place.exists() else None
            if plant == "fifo":
                os.mkfifo(place)
            elif plant == "folder":
                place.mkdir()
            else:
                place.symlink_to(victim if plant == "link" else desk.folder / "none")
        token, why = desk.renew(account)
        assert token is None
        assert "cannot be locked" in why
        desk.book.set_paused("work", paused=True)
        assert victim.read_text() == "mine"
        assert not (desk.folder / "none").exists()
        assert desk.provider.count() == 0


class TestRefresh:
    def test_a_new_pair_is_stored_and_used(self, desk: Desk) -> None:
        account = desk.account()
        assert [a.id for a in desk.renewer.due(desk.epoch)] == [account.id]
        token, why = desk.renew(account)
        stored = desk.book.account(account.id)
        assert (token, why) == (stored.access_token, "")
        assert token not in (None, account.access_token)
        assert stored.refresh_token not in (None, account.refresh_token)
        assert desk.book.token(account.id) == token
        assert desk.row(account)["refresh_begun_at"] is None
        assert desk.renewer.due(desk.epoch) == ()

    def test_the_grant_is_plain_and_says_who_we_are(self, desk: Desk) -> None:
        account = desk.account()
        desk.renew(account)
        path, fields, body = desk.provider.asked[0]
        assert path == "/token"
        assert fields["User-Agent"] == f"claude_lb/{claude_lb.VERSION}"
        assert fields["Content-Type"] == "application/json"
        assert sorted(body) == ["client_id", "grant_type", "refresh_token"]

    def test_without_a_new_refresh_token_the_old_one_stays(self, desk: Desk) -> None:
        account = desk.account()
        desk.provider.script.append("no refresh token")
        assert desk.renew(account)[0]
        assert desk.book.account(account.id).refresh_token == account.refresh_token

    def test_a_peer_s_token_is_adopted(self, desk: Desk) -> None:
        account = desk.account()
        peer = Desk(desk.provider, desk.folder)
        token, _ = peer.renew(account)
        assert desk.renew(account) == (token, "")
        assert desk.book.token(account.id) == token
        assert desk.provider.count() == 1

    def test_two_refreshes_have_ten_seconds_between_them(self, desk: Desk) -> None:
        account = desk.account()
        desk.renew(account)
        newest = desk.book.account(account.id)
        assert "may begin in" in desk.renew(newest)[1]
        other = Desk(desk.provider, desk.folder)
        other.epoch = desk.epoch
        assert "less than 10 s ago" in other.renew(newest)[1]
        assert desk.provider.count() == 1

    @pytest.mark.parametrize("odd", ["500", "garbage", "long", "redirect", "hang up"])
    def test_a_failure_marks_nothing(self, desk: Desk, odd: str) -> None:
        account = desk.account()
        desk.provider.script.append(odd)
        token, why = desk.renew(account)
        assert token is None
        assert why
        assert desk.book.account(account.id) == account
        assert [path for path, _, _ in desk.provider.asked] == ["/token"]
        wait = desk.renewer._not_before[account.id] - time.monotonic()
        assert 50 < wait <= 60
        assert desk.renewer.due(desk.epoch) == ()
        assert CANARY not in why
        desk.later()
        assert desk.renew(account)[0]

    def test_pauses_grow_with_failures(self, desk: Desk) -> None:
        account = desk.account()
        waits = []
        for _ in range(6):
            desk.provider.script.append("500")
            desk.renew(account)
            waits.append(desk.renewer._not_before[account.id] - time.monotonic())
            desk.later()
        assert [round(w / 60) for w in waits] == [1, 2, 4, 8, 15, 15]

    def test_no_network_marks_nothing(self, desk: Desk) -> None:
        account = desk.account()
        desk.provider.shutdown()
        desk.provider.server_close()
        token, why = desk.renew(account)
        assert token is None
        assert "cannot be asked: Connection refused" in why
        assert desk.book.account(account.id) == account

    def test_silence_ends(self, desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(claude_lb, "ASK_S", 0.2)
        account = desk.account()
        desk.provider.script.append("slow")
        assert "no answer within" in desk.renew(account)[1]
        assert not desk.book.account(account.id).needs_login

    def test_a_lost_login_is_one_account_s_affair(self, desk: Desk) -> None:
        account, other = desk.account(), desk.account("home")
        desk.provider.script.append("invalid_grant")
        token, why = desk.renew(account)
        lost = desk.book.account(account.id)
        assert token is None
        assert "never came to its end" not in why
        assert lost.needs_login
        assert lost.refresh_token == account.refresh_token  # nothing is cleared
        assert desk.book.account(other.id) == other
        assert desk.book.poll()
        assert [a.id for a in desk.renewer.due(desk.epoch)] == [other.id]
        desk.later()
        assert "needs login" in desk.renew(lost)[1]
        assert desk.provider.count() == 1

    def test_a_newer_login_saves_a_lost_one(self, desk: Desk) -> None:
        account = desk.account()
        fresh = desk.provider.tokens()
        desk.provider.script += ["slow"]
        desk.provider.revoked.update(desk.provider.live.values())
        ended: list[tuple[Secret | None, str]] = []
        renewing = threading.Thread(target=lambda: ended.append(desk.renew(account)))
        renewing.start()
        assert desk.provider.waiting.wait(10)
        newer = account._replace(
            refresh_token=Secret(fresh["refresh_token"]),
            access_token=Secret(fresh["access_token"]),
        )
        desk.book.log_in_again(account.id, newer)
        desk.provider.slow.set()
        renewing.join()
        assert ended == [(newer.access_token, "")]
        assert not desk.book.account(account.id).needs_login

    def test_a_newer_login_is_neither_marked_nor_replaced(self, desk: Desk) -> None:
        account = desk.account()
        newer = account._replace(
            refresh_token=Secret("newer-r"), access_token=Secret("newer-a")
        )
        desk.book.log_in_again(account.id, newer)
        desk.book.mark_needs_login(account, "over")
        late = claude_lb.Tokens(Secret("late-a"), Secret("late-r"), 0.0, None)
        assert desk.book.store_tokens(account, late) == newer.access_token
        assert desk.book.account(account.id) == newer

    def test_only_distant_services_are_asked_through_a_proxy(
        self, desk: Desk, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with socket.create_server(("127.0.0.1", 0)) as closed:
            nobody = f"http://127.0.0.1:{closed.getsockname()[1]}"
        for name in ("http_proxy", "https_proxy"):
            monkeypatch.setenv(name, nobody)
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        assert desk.renew(desk.account())[0]
        with pytest.raises(ProviderError, match="cannot be asked: Connection refused"):
            claude_lb.ask_provider("https://idp.invalid/token", {})

    def test_a_clock_that_jumps_ends_no_token(self, desk: Desk) -> None:
        account = desk.account(expires_at=desk.epoch + 3600)
        assert desk.renewer.due(desk.epoch) == ()
        assert len(desk.renewer.due(desk.epoch + 30 * 86_400)) == 1
        assert desk.book.token(account.id) == account.access_token

    def test_callers_that_hold_the_newest_token_are_told(self, desk: Desk) -> None:
        account = desk.account()
        desk.provider.script.append("slow")
        came: list[tuple[Secret | None, str]] = []
        jobs: list[Callable[[], None]] = []
        renewer = Renewer(desk.book, desk.log, jobs.append)
        renewer.renew(account.id, account.access_token, lambda *e: came.append(e))
        renewer.renew(account.id, None, lambda *e: came.append(e))
        renewer.renew(account.id, account.access_token, lambda *_: 1 / 0)  # type: ignore[arg-type]
        assert len(jobs) == 1
        desk.provider.slow.set()
        jobs[0]()
        assert len(came) == 2
        assert came[0] == came[1]
        assert "a fault of the proxy" in desk.log

    def test_no_thread_is_told(self, desk: Desk) -> None:
        account = desk.account()

        def none(_: object) -> None:
            raise RuntimeError("no more threads")

        renewer = Renewer(desk.book, desk.log, none)
        came: list[tuple[Secret | None, str]] = []
        renewer.renew(account.id, None, lambda *e: came.append(e))
        assert came == [(None, "no more threads")]

    @pytest.mark.parametrize("change", ["rename", "remove"])
    def test_changes_while_it_runs(self, desk: Desk, change: str) -> None:
        account = desk.account()
        desk.provider.script.append("slow")
        ended: list[tuple[Secret | None, str]] = []
        renewing = threading.Thread(target=lambda: ended.append(desk.renew(account)))
        renewing.start()
        assert desk.provider.waiting.wait(10)
        if change == "rename":
            desk.book.rename("work", "home")
        else:
            desk.book.remove("work")
        desk.provider.slow.set()
        renewing.join()
        if change == "rename":
            stored = desk.book.find("home")
            assert (stored.access_token, "") == ended[0]
            assert desk.book.poll()
        else:
            assert desk.book.all() == ()
            desk.book.poll()
            assert desk.book.token(account.id) is None

    def test_a_full_disk_begins_no_refresh(
        self, desk: Desk, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        account = desk.account()
        real = claude_lb.open_database

        def full(path: str) -> sqlite3.Connection:
            db = real(path)
            db.set_authorizer(refuse_updates)
            return db

        monkeypatch.setattr(claude_lb, "open_database", full)
        token, why = desk.renew(account)
        assert token is None
        assert "cannot be written" in why
        assert desk.provider.count() == 0

    def test_a_disk_that_fills_meanwhile_loses_nothing(
        self, desk: Desk, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        account = desk.account()
        real = claude_lb.open_database
        calls: list[str] = []

        def full(path: str) -> sqlite3.Connection:
            db = real(path)
            calls.append(path)
            if desk.provider.count():
                db.set_authorizer(refuse_updates)
            return db

        monkeypatch.setattr(claude_lb, "open_database", full)
        token, why = desk.renew(account)
        assert token is not None
        assert why == ""
        assert desk.book.token(account.id) == token
        assert not desk.book.save_again()
        assert not desk.book.poll()
        assert desk.book.token(account.id) == token  # not the stored, older one
        assert desk.row(account)["access_token"] == account.access_token.reveal()  # type: ignore[union-attr]
        assert "in memory only" in desk.log
        monkeypatch.setattr(claude_lb, "open_database", real)
        monkeypatch.setattr(claude_lb, "RENEW_LOCK_S", 0.1)
        other = Desk(desk.provider, desk.folder)
        other.later()
        assert "another process" in other.renew(account)[1]  # its token is used up
        desk.book.poll()
        assert desk.row(account)["access_token"] == token.reveal()
        assert desk.book.save_again()
        assert other.renew(account) == (token, "")


def refuse_updates(action: int, *_: object) -> int:
    """Stand in for a disk that takes nothing."""
    return sqlite3.SQLITE_DENY if action == sqlite3.SQLITE_UPDATE else sqlite3.SQLITE_OK


CHILD = """
import json, os, signal, sys, threading
sys.path.insert(0, sys.argv[1])
import claude_lb as lb
log = lb.Log(lb.LogSettings(level="error"))
path, account_id, url, how = sys.argv[2:6]
settings = lb.AccountSettings(token_url=url + "/token")
book = lb.AccountBook(path, settings, log)
book.poll()
stale = book.token(account_id)
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
if how == "adopt":
    lb.AccountBook.adopt = die
if how == "_save":
    lb.AccountBook._save = die
threads = int(how) if how.isdigit() else 1
came, lock, done = [], threading.Lock(), threading.Semaphore(0)
def then(token, why):
    with lock:
        came.append(token.reveal() if token else why)
    done.release()
renewer = lb.Renewer(book, log, lb.Workers().submit)
start = threading.Barrier(threads)
def run():
    start.wait()
    renewer.renew(account_id, stale, then)
print("ready", flush=True)
sys.stdin.readline()
for _ in range(threads):
    threading.Thread(target=run, daemon=True).start()
for _ in range(threads):
    done.acquire()
print(json.dumps(came))
"""


def child(desk: Desk, account: Account, how: str) -> subprocess.Popen[str]:
    arguments = [
        str(PROGRAM.parent),
        desk.path,
        account.id,
        desk.provider.url,
        how,
    ]
    started = subprocess.Popen(
        [sys.executable, "-c", CHILD, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert started.stdout is not None
    assert started.stdout.readline() == "ready\n"
    return started


@at_both_ends
class TestProcesses:
    def test_many_threads_and_processes_make_one_refresh(self, desk: Desk) -> None:
        account = desk.account()
        children = [child(desk, account, "50") for _ in range(4)]
        for started in children:
            assert started.stdin is not None
            started.stdin.write("go\n")
            started.stdin.flush()
        came = [json.loads(started.communicate()[0]) for started in children]
        token = desk.book.account(account.id).access_token
        assert token is not None
        assert came == [[token.reveal()] * 50] * 4
        assert desk.provider.count() == 1
        assert not desk.provider.revoked

    def test_a_kill_after_the_receipt_loses_nothing(self, desk: Desk) -> None:
        account = desk.account()
        killed = child(desk, account, "adopt")
        killed.communicate("go\n")
        assert killed.returncode == -signal.SIGKILL
        stored = desk.book.account(account.id)
        assert stored.access_token != account.access_token
        desk.later()
        assert desk.renew(stored)[0]
        assert not desk.provider.revoked

    def test_a_kill_before_it_is_stored_is_told(self, desk: Desk) -> None:
        account = desk.account()
        killed = child(desk, account, "_save")
        killed.communicate("go\n")
        assert desk.row(account)["refresh_begun_at"] is not None
        desk.later()
        token, why = desk.renew(account)
        assert token is None
        assert "never came to its end" in why
        assert "may have been lost" in desk.book.account(account.id).needs_login


class Commands:
    """Runs `claude_lb.py accounts ...` with a provider's addresses."""

    def __init__(self, idp: Provider, folder: Path) -> None:
        self.provider = idp
        self.file = folder / "lb.json"
        self.database = folder / "state" / "lb.db"
        self.configure(str(self.database))
        self.said = ""

    def configure(self, database: str | None, **more: Any) -> None:
        self.file.write_text(json.dumps({**self.provider.config(database), **more}))

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        # As a module, so that it is compiled once for all
        command = [
            sys.executable,
            "-m",
            PROGRAM.stem,
            "-c",
            str(self.file),
            "accounts",
        ]
        return subprocess.Popen(
            [*command, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=self.file.parent,
            env={**os.environ, "PYTHONPATH": str(PROGRAM.parent)},
        )

    def run(self, *arguments: str, typed: str = "") -> tuple[int, str]:
        """Run a command in this process: starting one takes longer than all it does."""
        said, before = io.StringIO(), sys.stdin
        sys.stdin = io.StringIO(typed)
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                whole = ["-c", str(self.file), "accounts", *arguments]
                status = claude_lb.main(whole)
        finally:
            sys.stdin = before
        self.said += said.getvalue()
        return status, said.getvalue()

    def really_run(self, *arguments: str) -> tuple[int, str]:
        running = self.start(*arguments)
        out, _ = running.communicate(timeout=20)
        self.said += out
        return running.returncode, out

    def address(self, running: subprocess.Popen[str]) -> str:
        """Read until the login's address."""
        assert running.stdout is not None
        for line in running.stdout:
            self.said += line
            if line.startswith(self.provider.url):
                return line.strip()
        raise AssertionError(self.said)

    def add(self, name: str, *options: str, spoil: str = "") -> tuple[int, str]:
        running = self.start("add", name, "--yes", *options)
        code, state, _ = self.provider.allow(self.address(running))
        out, _ = running.communicate(f"{code}#{state}{spoil}\n", timeout=20)
        self.said += out
        return running.returncode, out

    def rows(self) -> list[dict[str, Any]]:
        with contextlib.closing(sqlite3.connect(self.database)) as db:
            db.row_factory = sqlite3.Row
            return [dict(row) for row in db.execute("SELECT * FROM accounts")]


@pytest.fixture
def commands(idp: Provider, tmp_path: Path) -> Commands:
    return Commands(idp, tmp_path)


@at_both_ends
class TestCommands:
    def test_a_life_of_an_account(self, commands: Commands) -> None:
        assert commands.run("list") == (
            0,
            "No accounts found. Add one with: claude_lb.py accounts add <name>\n",
        )
        assert not commands.database.exists()
        status, out = commands.add("work", "--mode", "max")
        assert status == 0
        assert "Plan: MAX (Opus enabled)" in out
        assert "with the provider's own clients only" in commands.said
        commands.said, said = "", commands.said
        assert commands.run("add", "work", "--mode", "max") == (
            1,
            'claude_lb: Account with name "work" already exists\n',
        )
        assert "own clients only" not in commands.said
        assert commands.run("rename", "work", "home")[0] == 0
        assert commands.run("pause", "home")[0] == 0
        assert "home (paused)" in commands.run("list")[1]
        assert commands.run("resume", "home")[0] == 0
        before = commands.rows()[0]["access_token"]
        assert commands.really_run("refresh", "home") == (
            0,
            'Account "home" was renewed.\n',
        )
        assert commands.rows()[0]["access_token"] != before
        status, out = commands.run("refresh", "home")
        assert status == 1
        assert "less than 10 s ago" in out
        shown = commands.run("list")[1]
        assert "Token: valid until 20" in shown
        assert "Last Used: Never" in shown
        assert commands.run("reset-stats")[0] == 0
        assert commands.run("clear-history") == (0, "No request history to clear\n")
        assert commands.run("remove", "home")[0] == 0
        assert commands.run("list")[1].startswith("No accounts found")
        said = said + commands.said
        assert CANARY not in said

    @pytest.mark.parametrize(
        "arguments",
        [
            ("remove", "x"),
            ("pause", "x"),
            ("resume", "x"),
            ("refresh", "x"),
            ("rename", "x", "y"),
        ],
        ids=lambda a: a[0],
    )
    def test_unknown_names(self, commands: Commands, arguments: list[str]) -> None:
        assert commands.run(*arguments) == (
            1,
            'claude_lb: Account "x" not found\n',
        )
        assert not commands.database.exists()

    def test_a_missing_name_shows_the_usage(self, commands: Commands) -> None:
        status, out = commands.run("remove")
        assert status == 1
        assert out.startswith("usage: ")
        for arguments in ((), ("help",)):
            status, out = commands.run(*arguments)
            assert status == 0
            assert "clear-history" in out

    def test_the_console_makes_an_api_key(self, commands: Commands) -> None:
        assert commands.add("work")[0] == 0
        row = commands.rows()[0]
        assert (row["plan_type"], row["mode"]) == ("console", "console")
        assert row["api_key"] == f"sk-ant-api03-{CANARY}"
        fields = commands.provider.asked[-1][1]
        assert fields["Authorization"] == f"Bearer {row['access_token']}"
        assert "Token: API key" in commands.run("list")[1]
        assert CANARY not in commands.said

    def test_an_api_key_can_be_wished_for(self, commands: Commands) -> None:
        options = ("--mode", "max", "--api-key", "--plan", "pro", "--weight", "3")
        status, out = commands.add("work", *options, "--models", "*haiku*, x")
        assert status == 0
        assert "PRO (no Opus)" in out
        row = commands.rows()[0]
        assert row["api_key"]
        assert (row["plan_type"], row["weight"]) == ("pro", 3)
        assert row["supported_models"] == "*haiku*,x"

    def test_an_end_of_input_adds_nothing(self, commands: Commands) -> None:
        status, out = commands.run("add", "work")
        assert (status, out.endswith("[y/N] \nNothing was added.\n")) == (0, True)
        status, out = commands.run("add", "work", "--yes")
        assert (status, out.endswith("code: \nNothing was added.\n")) == (0, True)
        assert "[y/N]" not in out
        assert commands.run("add", "work", typed="n\n")[1].endswith("was added.\n")
        assert commands.provider.asked == []
        assert not commands.database.exists()

    @pytest.mark.parametrize("spoil", ["x", "#", " y"])
    def test_a_forged_state_is_refused(self, commands: Commands, spoil: str) -> None:
        status, out = commands.add("work", spoil=spoil)
        assert status == 1
        assert "another login" in out
        assert commands.provider.asked == []

    def test_two_logins_at_once_are_kept_apart(self, commands: Commands) -> None:
        first, second = (
            commands.start("add", name, "--yes", "--mode", "max") for name in "ab"
        )
        codes = [commands.provider.allow(commands.address(r)) for r in (first, second)]
        code, state, _ = codes[1]
        out, _ = first.communicate(f"{code}#{state}\n", timeout=20)
        assert first.returncode == 1
        assert "another login" in out
        # Another's code under one's own state: the verifier does not fit
        out, _ = second.communicate(f"{codes[0][0]}#{state}\n", timeout=20)
        assert second.returncode == 1
        assert "status 401" in out
        assert CANARY not in out

    def test_a_code_serves_once(self, commands: Commands) -> None:
        running = commands.start("add", "work", "--yes")
        code, state, _ = commands.provider.allow(commands.address(running))
        commands.provider.codes.clear()
        out, _ = running.communicate(f"{code}#{state}\n", timeout=20)
        assert running.returncode == 1
        assert "status 401 (authentication_error)" in out

    def test_a_lost_login_is_made_again(self, commands: Commands) -> None:
        commands.add("work", "--mode", "max")
        commands.provider.script.append("invalid_grant")
        status, out = commands.really_run("refresh", "work")
        assert status == 1
        assert "needs login" in out
        assert "needs login" in commands.run("list")[1]
        before = commands.rows()[0]
        assert commands.add("work", "--mode", "max")[0] == 0
        after = commands.rows()
        assert [row["id"] for row in after] == [before["id"]]
        assert after[0]["needs_login"] is None
        assert after[0]["refresh_token"] != before["refresh_token"]
        assert CANARY not in commands.said

    def test_the_browser_brings_the_code_itself(self, commands: Commands) -> None:
        running = commands.start("add", "work", "--yes", "--local", "--mode", "max")
        code, state, back = commands.provider.allow(commands.address(running))
        parts = urllib.parse.urlsplit(back)
        assert (parts.hostname, parts.path) == ("localhost", "/callback")
        good = f"/callback?code={code}&state={state}"
        for path, host, status in (
            (f"/callback?code={code}", parts.netloc, 400),
            (f"/callback?code={code}&state=forged", parts.netloc, 400),
            (f"/callback?state={state}", parts.netloc, 400),
            (f"/other?code={code}&state={state}", parts.netloc, 404),
            (good, f"evil.example:{parts.port}", 421),
            (good, parts.netloc, 200),
        ):
            browser = http.client.HTTPConnection("127.0.0.1", parts.port, timeout=10)
            browser.request("GET", path, headers={"Host": host})
            answer = browser.getresponse()
            assert answer.status == status
            assert CANARY.encode() not in answer.read()
            browser.close()
        out, _ = running.communicate(timeout=20)
        assert running.returncode == 0, out
        assert CANARY not in out
        assert commands.rows()[0]["name"] == "work"

    def test_a_terminal_does_not_echo_the_code(self, commands: Commands) -> None:
        fd, there = pty.openpty()
        # Whoever leads a session and opens a terminal has it as its own: /dev/tty
        lead = "import os, sys, claude_lb; os.open(os.ttyname(0), os.O_RDWR);"
        command = [sys.executable, "-c", f"{lead} sys.exit(claude_lb.main())"]
        options = ["-c", str(commands.file), "accounts", "add", "w", "--mode=max"]
        running = subprocess.Popen(
            [*command, *options],
            stdin=there,
            stdout=there,
            stderr=there,
            start_new_session=True,
            cwd=PROGRAM.parent,
        )
        os.close(there)
        said = read_until(fd, "[y/N] ")
        os.write(fd, b"y\n")
        said += read_until(fd, "code: ")
        address = re.search(rf"{commands.provider.url}\S+", said)
        assert address is not None
        code, state, _ = commands.provider.allow(address[0])
        os.write(fd, f"{code}#{state}\n".encode())
        said += read_until(fd, "Models: all")
        assert running.wait(20) == 0
        os.close(fd)
        assert CANARY not in said
        assert len(commands.rows()) == 1

    def test_without_a_database_there_are_no_accounts(self, commands: Commands) -> None:
        commands.configure(None)
        status, out = commands.run("list")
        assert status == 2
        assert "nowhere to keep accounts" in out

    def test_a_database_that_takes_nothing_costs_no_code(
        self, commands: Commands, tmp_path: Path
    ) -> None:
        (tmp_path / "file").write_text("")
        commands.configure(str(tmp_path / "file" / "lb.db"))
        status, out = commands.add("work")
        assert status == 1
        assert "cannot be written" in out
        assert commands.provider.asked == []

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (("a b",), "visible ASCII"),
            (("w", "--plan", "x"), 'no plan "x"'),
            (("w", "--weight", "0"), "1 to 1000"),
        ],
    )
    def test_wrong_options(
        self, commands: Commands, options: tuple[str, ...], words: str
    ) -> None:
        status, out = commands.run("add", *options)
        assert status == 1
        assert words in out

    def test_nothing_stands_in_ps(self, commands: Commands) -> None:
        running = commands.start("add", "work", "--yes")
        code, state, _ = commands.provider.allow(commands.address(running))
        commands.provider.script.append("slow")
        assert running.stdin is not None
        running.stdin.write(f"{code}#{state}\n")
        running.stdin.flush()
        assert commands.provider.waiting.wait(10)
        if Path("/proc").is_dir():
            for name in ("cmdline", "environ"):
                told = Path(f"/proc/{running.pid}/{name}").read_bytes()
                assert CANARY.encode() not in told
        commands.provider.slow.set()
        running.communicate(timeout=20)
        assert running.returncode == 0


def read_until(fd: int, mark: str) -> str:
    said, end = "", time.monotonic() + 20
    while mark not in said and time.monotonic() < end:
        if select.select([fd], [], [], 0.1)[0]:
            try:
                said += os.read(fd, 65_536).decode()
            except OSError:
                break
    assert mark in said, said
    return said


B_SCHEMA = """
CREATE TABLE accounts(id TEXT PRIMARY KEY, name TEXT NOT NULL, refresh_token TEXT NOT
NULL, access_token TEXT, expires_at INTEGER, created_at INTEGER NOT NULL, last_used
INTEGER, request_count INTEGER DEFAULT 0, plan_type TEXT DEFAULT 'console',
supported_models TEXT DEFAULT 'claude-3-5-sonnet-20241022,claude-3-haiku-20240307',
usage_window_start INTEGER, usage_window_requests INTEGER DEFAULT 0,
input_tokens_window INTEGER DEFAULT 0, output_tokens_window INTEGER DEFAULT 0,
estimated_quota_remaining REAL DEFAULT 1.0, detected_tier TEXT,
last_tier_detection INTEGER);
INSERT INTO accounts(id, name, refresh_token, access_token, expires_at, created_at,
last_used, request_count, plan_type) VALUES
('11111111-2222-4333-8444-555555555555', 'work', 'r-canary-1', 'a-canary-1',
1700000000000, 1690000000000, 1695000000000, 42, 'max'),
('22222222-2222-4333-8444-555555555555', 'work', 'r-canary-2', NULL, NULL,
1690000000001, NULL, 0, 'console'),
('../../evil', 'my account', 'r-canary-3', NULL, NULL, 1690000000002, NULL, 0, 'max');
UPDATE accounts SET supported_models='claude-x,claude-y' WHERE id='../../evil';
"""
B3_SCHEMA = """
PRAGMA journal_mode=WAL;
CREATE TABLE accounts(id TEXT PRIMARY KEY, name TEXT NOT NULL, provider TEXT DEFAULT
'anthropic', api_key TEXT, refresh_token TEXT NOT NULL, access_token TEXT, expires_at
INTEGER, created_at INTEGER NOT NULL, last_used INTEGER, request_count INTEGER DEFAULT
0, total_requests INTEGER DEFAULT 0, account_tier INTEGER DEFAULT 1,
rate_limited_until INTEGER, session_start INTEGER, session_request_count INTEGER
DEFAULT 0, paused INTEGER DEFAULT 0, rate_limit_reset INTEGER, rate_limit_status TEXT,
rate_limit_remaining INTEGER);
INSERT INTO accounts(id, name, provider, api_key, refresh_token, created_at,
account_tier, paused) VALUES
('a', 'big', 'anthropic', NULL, 'r-canary-1', 1690000000000, 20, 1),
('b', 'key', 'anthropic', 'k-canary-1', '', 1690000000000, 1, 0),
('c', 'zai', 'zai', 'k-canary-2', '', 1690000000000, 1, 0),
('d', 'none', 'anthropic', NULL, '', 1690000000000, 1, 0);
"""


@at_both_ends
class TestImport:
    def made(self, tmp_path: Path, schema: str) -> str:
        path = tmp_path / "claude-accounts.db"
        with contextlib.closing(sqlite3.connect(path)) as db:
            db.executescript(schema)
        return str(path)

    def test_b_s_accounts(self, commands: Commands, tmp_path: Path) -> None:
        path = self.made(tmp_path, B_SCHEMA)
        status, out = commands.really_run("import", path)
        assert status == 0
        assert '"work" was imported as "work-2"' in out
        assert "Stop the other program" in out
        first, second, third = commands.rows()
        assert (first["name"], first["plan_type"]) == ("work", "max")
        assert first["mode"] == "max"
        assert (first["access_token"], first["expires_at"]) == (
            "a-canary-1",
            1_700_000_000_000,
        )
        assert (first["request_count"], first["last_used"]) == (42, 1_695_000_000_000)
        assert first["supported_models"] == ""
        assert second["mode"] == "console"
        assert (third["name"], third["supported_models"]) == (
            "my-account",
            "claude-x,claude-y",
        )
        assert "/" not in third["id"]
        status, again = commands.run("import", path)
        assert again.count("it is here already") == 3
        assert len(commands.rows()) == 3
        assert CANARY not in commands.said

    def test_b3_s_accounts(self, commands: Commands, tmp_path: Path) -> None:
        status, out = commands.run("import", self.made(tmp_path, B3_SCHEMA))
        assert status == 0
        assert '"zai": zai is not served here' in out
        assert '"none": it holds no credential' in out
        big, key = commands.rows()
        assert (big["plan_type"], big["weight"], big["paused"]) == ("max", 20, 1)
        assert big["refresh_token"] == "r-canary-1"
        assert (key["api_key"], key["refresh_token"]) == ("k-canary-1", "")
        assert (key["plan_type"], key["mode"]) == ("pro", "console")
        assert CANARY not in out

    def test_what_holds_no_accounts(self, commands: Commands, tmp_path: Path) -> None:
        (tmp_path / "text").write_text("no database at all " * 100)
        for path in ("text", "absent"):
            status, out = commands.run("import", str(tmp_path / path))
            assert status == 1
            assert "no accounts that can be read" in out
        assert not (tmp_path / "absent").exists()

    def test_b_s_own_file_serves_in_place(self, desk: Desk, tmp_path: Path) -> None:
        Path(desk.path).parent.mkdir(mode=0o700)
        os.rename(self.made(tmp_path, B_SCHEMA), desk.path)
        assert len(desk.book.all()) == 3
        evil = desk.book.find("my account")
        desk.book.rename("my account", "mine")
        desk.provider.live["r-canary-3"] = 1
        assert desk.renew(evil)[0]
        names = [p.name for p in tmp_path.rglob("*") if p.name.endswith(".lock")]
        assert len(names) == 1
        assert names[0].startswith("lb.db.")


# ============================================================================
# STORE
# ============================================================================

AT_S = 1_790_000_000  # 2026-09-21
STORE_LIMIT_S = 15.0


def exchange(number: int = 0, **changes: Any) -> ExchangeRecord:
    """Return an exchange that went well, but for `changes`."""
    plain = ExchangeRecord(
        request_id=f"lb_{number:06x}",
        method="POST",
        path="/v1/messages",
        endpoint="one",
        status=200,
        attempts=1,
        first_byte_ms=400.0,
        total_ms=2000.0,
        request_bytes=900,
        response_bytes=4000,
        ended=Outcome.OK,
        at_ms=AT_S * 1000 + number,
        model_asked="claude-a",
        model_used="claude-a-1",
        stream=True,
        conversation="c0ffee",
        usage=Usage(10, 20, 30, 4, 5),
    )
    return plain._replace(**changes)


def failed_exchange(number: int = 0, **changes: Any) -> ExchangeRecord:
    """Return an exchange that two endpoints failed."""
    tried = (
        AttemptRecord("one", 529, "overloaded", 12.0),
        AttemptRecord("two", 0, "refused", 3.0),
    )
    facts = {"status": 503, "attempts": 2, "ended": Outcome.UPSTREAM_ERROR}
    named = {"endpoint": "two", "usage": None, "tried": tried, "first_byte_ms": None}
    return exchange(number, **{**facts, **named, **changes})


def until(condition: Callable[[], object]) -> None:
    """Wait until `condition` holds."""
    end = time.monotonic() + STORE_LIMIT_S
    while not condition():
        assert time.monotonic() < end, "it never came to be"
        time.sleep(0.005)


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def ids_in(path: Path) -> list[str]:
    """Return the ids another program sees, in the order they were written."""
    with closing(sqlite3.connect(path)) as db:
        return [i for (i,) in db.execute("SELECT id FROM requests ORDER BY rowid")]


def add_account(db: sqlite3.Connection, name: str, **more: Any) -> None:
    db.execute(
        "INSERT INTO accounts(id, name, refresh_token, access_token, created_at,"
        " request_count, usage_window_start, usage_window_requests)"
        " VALUES (?, ?, 'fresh-token', 'token', 1, ?, ?, ?)",
        (
            f"id-{name}",
            name,
            more.get("count", 0),
            more.get("start"),
            more.get("window", 0),
        ),
    )


class StoreLines:
    """The lines that a store logs."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.log = Log(LogSettings(file=str(path)))

    def saying(self, word: str) -> list[str]:
        return [x for x in self._path.read_text("utf-8").splitlines() if word in x]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "history.db"


@pytest.fixture
def lines(tmp_path: Path) -> StoreLines:
    return StoreLines(tmp_path / "log")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claude_lb, "HISTORY_GATHER_S", 0.01)
    monkeypatch.setattr(claude_lb, "HISTORY_RETRY_S", 0.02)


Make = Callable[..., Store]


@pytest.fixture
def make(path: Path, lines: StoreLines) -> Iterator[Make]:
    """Make stores that run until the test is over."""
    made: list[Store] = []

    def make_store(**options: Any) -> Store:
        settings = {"database": str(path), **options.pop("settings", {})}
        store = Store(StorageSettings(**settings), lines.log, **options)
        store.start()
        made.append(store)
        return store

    yield make_store
    for store in made:
        store.stop()


def rows_of(store: Store) -> list[dict[str, Any]]:
    return store.read(lambda db: recent_requests(db, 1000))


class TestRecording:
    def test_a_row_is_there_within_a_second(
        self, make: Make, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.undo()
        store = make()
        begun = time.monotonic()
        store.record(exchange(1))
        until(
            lambda: path.exists() and store.read(claude_lb.analyze)["rows"]["requests"]
        )
        assert time.monotonic() - begun < 1.0

    def test_the_row_says_all_that_is_known(self, make: Make) -> None:
        store = make()
        store.record(exchange(7))
        assert store.flush()
        (row,) = rows_of(store)
        assert row == {
            "id": "lb_000007",
            "timestamp": AT_S * 1000 + 7,
            "method": "POST",
            "path": "/v1/messages",
            "account_used": "one",
            "status_code": 200,
            "success": 1,
            "error_message": None,
            "response_time_ms": 2000,
            "failover_attempts": 0,
            "model_asked": "claude-a",
            "model_used": "claude-a-1",
            "ended": "ok",
            "first_byte_ms": 400.0,
            "request_bytes": 900,
            "response_bytes": 4000,
            "stream": 1,
            "conversation": "c0ffee",
            "input_tokens": 10,
            "output_tokens": 20,
            "cache_read_input_tokens": 30,
            "cache_write_5m_tokens": 4,
            "cache_write_1h_tokens": 5,
            "cost_usd": None,
            "attempts": [{"endpoint": "one", "status": 200, "reason": "", "ms": 2000}],
        }

    def test_a_failure_tells_its_attempts_as_the_other_balancer_did(
        self, make: Make
    ) -> None:
        store = make()
        store.record(failed_exchange())
        assert store.flush()
        (row,) = rows_of(store)
        assert json.loads(row["error_message"]) == [
            {
                "account": "one",
                "error": "HTTP 529: overloaded",
                "retries": 1,
                "model": "claude-a-1",
            },
            {
                "account": "two",
                "error": "refused",
                "retries": 1,
                "model": "claude-a-1",
            },
        ]
        assert (row["success"], row["failover_attempts"]) == (0, 1)
        assert [a["endpoint"] for a in row["attempts"]] == ["one", "two"]
        assert [a["ms"] for a in row["attempts"]] == [12.0, 3.0]

    def test_one_that_reached_nobody_names_nobody(self, make: Make) -> None:
        store = make()
        store.record(
            exchange(ended=Outcome.REFUSED, endpoint="", status=0, reason="too large")
        )
        assert store.flush()
        (row,) = rows_of(store)
        assert (row["account_used"], row["status_code"], row["attempts"]) == (
            None,
            None,
            [],
        )
        assert json.loads(row["error_message"])[0]["error"] == "too large"

    def test_the_newest_is_the_one_written_last_whatever_the_clock_says(
        self, make: Make
    ) -> None:
        store = make()
        store.record(exchange(1))
        store.record(exchange(2, at_ms=(AT_S - 7200) * 1000))
        store.record(exchange(3, at_ms=(AT_S + 30 * 86400) * 1000))
        store.record(exchange(4))
        assert store.flush()
        newest_first = [row["id"] for row in rows_of(store)]
        assert newest_first == ["lb_000004", "lb_000003", "lb_000002", "lb_000001"]

    def test_all_rows_of_many_threads_arrive_once(self, make: Make) -> None:
        store = make()

        def work(first: int) -> None:
            for i in range(first, first + 500):
                store.record(exchange(i))

        threads = [threading.Thread(target=work, args=(n * 500,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert store.flush()
        assert sorted(
            r["id"] for r in store.read(lambda db: recent_requests(db, 9999))
        ) == [f"lb_{i:06x}" for i in range(2000)]

    def test_an_id_counts_once(self, make: Make) -> None:
        store = make()
        for record in (exchange(1), exchange(1), exchange(2)):
            store.record(record)
        assert store.flush()
        told = store.read(lambda db: statistics(db, AT_S))
        assert len(rows_of(store)) == 2
        assert sum(t.sums.requests for t in told.tallies) == 2

    def test_hostile_names_are_kept_short_and_harmless(self, make: Make) -> None:
        names = [
            "\ud800",
            "a\x00b",
            "'; DROP TABLE requests --",
            "\x1b[2J",
            "\u202e",
            "",
        ]
        names += ["x" * 100_000, "other"]
        store = make()
        for i, name in enumerate(names):
            store.record(exchange(i, model_used=name, model_asked=name))
        store.record(exchange(99, path="/" + "p" * 100_000))
        assert store.flush()
        rows = rows_of(store)
        assert len(rows) == len(names) + 1
        assert len(rows[0]["path"]) == claude_lb.HISTORY_PATH
        shown = "\n".join(stats_lines(stats_document(store.read(every))))
        assert all(c.isprintable() or c == "\n" for c in shown)
        assert max(len(r["model_used"] or "") for r in rows) == claude_lb.HISTORY_NAME

    def test_counts_beyond_reason_are_not_known(self, make: Make) -> None:
        store = make()
        store.record(exchange(1, usage=Usage(10**30, 5)))
        store.record(exchange(2, usage=Usage(-1, 5)))
        store.record(exchange(3))
        assert store.flush()
        assert [r["output_tokens"] for r in rows_of(store)] == [20, None, None]

    def test_nothing_is_made_before_the_first_row(self, make: Make, path: Path) -> None:
        store = make()
        assert store.flush()
        assert rows_of(store) == []
        assert not path.parent.exists()

    def test_history_can_be_off(self, make: Make, path: Path) -> None:
        store = make(settings={"history": False})
        store.record(exchange())
        assert store.flush()
        assert not path.exists()
        assert store.health()["state"] == "off"

    def test_without_a_file_all_is_in_memory(self, make: Make, tmp_path: Path) -> None:
        store = make(settings={"database": None})
        store.record(exchange(1))
        assert store.flush()
        assert [r["id"] for r in rows_of(store)] == ["lb_000001"]
        assert store.change(clear_history) == 1
        assert store.health()["database"] is None
        assert [p.name for p in tmp_path.iterdir()] == ["log"]

    def test_what_waits_is_written_at_the_end(self, make: Make, path: Path) -> None:
        store = make()
        for i in range(500):
            store.record(exchange(i))
        store.stop()
        assert len(ids_in(path)) == 500

    def test_one_told_to_stop_at_once_writes_all_the_same(
        self, path: Path, lines: StoreLines
    ) -> None:
        store = Store(StorageSettings(database=str(path)), lines.log)
        store.record(exchange(1))
        store.stop()
        store.start()
        store.stop()
        assert ids_in(path) == ["lb_000001"]

    def test_a_long_path_takes_no_room_while_it_waits(
        self, path: Path, lines: StoreLines
    ) -> None:
        store = Store(StorageSettings(database=str(path)), lines.log)
        store.record(exchange(1, path="/" + "p" * 16_000))
        assert len(store._waiting[0].path) == claude_lb.HISTORY_PATH


def every(db: sqlite3.Connection) -> claude_lb.Statistics:
    return statistics(db, AT_S)


def stats_of(db: sqlite3.Connection) -> Any:
    """Return what a client reads in /api/stats."""
    return json.loads(json.dumps(stats_document(every(db))))


def analytics_of(db: sqlite3.Connection, *asked: Any, **narrowed: Any) -> Any:
    """Return what a client reads in /api/analytics."""
    return json.loads(json.dumps(analytics_document(analytics(db, *asked, **narrowed))))


class TestFiles:
    def test_they_are_for_their_owner_alone(self, make: Make, path: Path) -> None:
        before = os.umask(0)
        try:
            store = make()
            store.record(exchange())
            assert store.flush()
        finally:
            os.umask(before)
        assert mode_of(path.parent) == 0o700
        names = sorted(p.name for p in path.parent.iterdir())
        assert names == ["history.db", "history.db-shm", "history.db-wal"]
        assert {mode_of(p) for p in path.parent.iterdir()} == {0o600}

    def test_others_lose_their_rights_to_an_old_file(self, path: Path) -> None:
        path.parent.mkdir()
        sqlite3.connect(path).close()
        path.touch(0o644)
        path.chmod(0o644)
        open_database(str(path)).close()
        assert mode_of(path) == 0o600

    def test_a_link_is_not_followed(self, path: Path, tmp_path: Path) -> None:
        path.parent.mkdir()
        path.symlink_to(tmp_path / "elsewhere.db")
        with pytest.raises(OSError, match="not a plain file") as caught:
            open_database(str(path))
        assert caught.value.errno == errno.ELOOP
        assert not (tmp_path / "elsewhere.db").exists()

    def test_opening_it_again_leaves_the_writers_lock(self, path: Path) -> None:
        with closing(open_database(str(path))) as db:
            db.execute("BEGIN IMMEDIATE")
            open_database(str(path)).close()
            code = (
                "import sqlite3, sys; db = sqlite3.connect(sys.argv[1], timeout=0);"
                "db.execute('BEGIN IMMEDIATE')"
            )
            done = subprocess.run(
                [sys.executable, "-c", code, str(path)],
                capture_output=True,
                text=True,
                check=False,
            )
            assert "database is locked" in done.stderr

    def test_it_is_a_wal_with_few_syncs(self, path: Path) -> None:
        with closing(open_database(str(path))) as db:
            told = [
                db.execute(f"PRAGMA {name}").fetchone()[0]
                for name in ("journal_mode", "synchronous", "busy_timeout")
            ]
        assert told == ["wal", 1, 5000]


B_ACCOUNTS = """CREATE TABLE accounts(id TEXT PRIMARY KEY, name TEXT NOT NULL,
    refresh_token TEXT NOT NULL, access_token TEXT, expires_at INTEGER,
    created_at INTEGER NOT NULL, last_used INTEGER, request_count INTEGER DEFAULT 0,
    plan_type TEXT DEFAULT 'console', supported_models TEXT DEFAULT 'x,y',
    usage_window_start INTEGER, usage_window_requests INTEGER DEFAULT 0,
    input_tokens_window INTEGER DEFAULT 0, output_tokens_window INTEGER DEFAULT 0,
    estimated_quota_remaining REAL DEFAULT 1.0, detected_tier TEXT,
    last_tier_detection INTEGER)"""
B_REQUESTS = """CREATE TABLE requests(id TEXT PRIMARY KEY, timestamp INTEGER NOT NULL,
    method TEXT NOT NULL, path TEXT NOT NULL, account_used TEXT, status_code INTEGER,
    success BOOLEAN, error_message TEXT, response_time_ms INTEGER,
    failover_attempts INTEGER DEFAULT 0 {more})"""
B3_ACCOUNTS = """CREATE TABLE accounts(id TEXT PRIMARY KEY, name TEXT NOT NULL,
    provider TEXT DEFAULT 'anthropic', api_key TEXT, refresh_token TEXT NOT NULL,
    access_token TEXT, expires_at INTEGER, created_at INTEGER NOT NULL,
    last_used INTEGER, request_count INTEGER DEFAULT 0,
    total_requests INTEGER DEFAULT 0, account_tier INTEGER DEFAULT 1,
    rate_limited_until INTEGER, session_start INTEGER,
    session_request_count INTEGER DEFAULT 0, paused INTEGER DEFAULT 0,
    rate_limit_reset INTEGER, rate_limit_status TEXT, rate_limit_remaining INTEGER)"""
B3_MORE = """, model TEXT, prompt_tokens INTEGER, completion_tokens INTEGER,
    total_tokens INTEGER, cost_usd REAL, output_tokens_per_second REAL,
    input_tokens INTEGER, cache_read_input_tokens INTEGER,
    cache_creation_input_tokens INTEGER, output_tokens INTEGER, agent_used TEXT"""


def old_file(path: Path, statements: list[str]) -> None:
    path.parent.mkdir()
    with closing(sqlite3.connect(path)) as db:
        for statement in statements:
            db.execute(statement)
        db.execute(
            "INSERT INTO accounts(id, name, refresh_token, created_at, request_count)"
            " VALUES ('1', 'one', 'r', 5, 41)"
        )
        for i in range(100):
            db.execute(
                "INSERT INTO requests(id, timestamp, method, path, account_used,"
                " status_code, success, response_time_ms)"
                " VALUES (?, ?, 'POST', '/v1/messages', 'one', 200, ?, 50)",
                (f"old-{i}", AT_S * 1000 + i * 60_000, i % 4 > 0),
            )
        db.commit()


class TestUpgrades:
    def check(self, path: Path) -> sqlite3.Connection:
        db = open_database(str(path))
        assert db.execute("PRAGMA user_version").fetchone()[0] == len(
            claude_lb.MIGRATIONS
        )
        rows = recent_requests(db, 1000)
        assert [r["id"] for r in rows] == [f"old-{i}" for i in reversed(range(100))]
        told = [t.sums for t in every(db).tallies]
        assert sum(s.requests for s in told) == 100
        assert sum(s.succeeded for s in told) == 75
        assert db.execute("SELECT name, request_count FROM accounts").fetchall() == [
            ("one", 41)
        ]
        write_records(db, [exchange(1)])
        assert sum(t.sums.requests for t in every(db).tallies) == 101
        return db

    def test_from_the_balancers_first_file(self, path: Path) -> None:
        old_file(path, [B_ACCOUNTS, B_REQUESTS.format(more="")])
        self.check(path).close()

    def test_from_its_later_columns(self, path: Path) -> None:
        more = ", input_tokens INTEGER, output_tokens INTEGER, model_used TEXT"
        config = "CREATE TABLE config(key TEXT PRIMARY KEY, value TEXT NOT NULL)"
        old_file(path, [B_ACCOUNTS, B_REQUESTS.format(more=more), config])
        with closing(sqlite3.connect(path)) as db:
            db.execute("UPDATE requests SET model_used = 'm', input_tokens = 7")
            db.commit()
        db = self.check(path)
        assert every(db).tallies[0].model in ("m", "claude-a-1")
        assert sum(t.sums.input_tokens for t in every(db).tallies) == 710
        assert db.execute("SELECT count(*) FROM config").fetchone() == (0,)
        db.close()

    def test_from_its_successor(self, path: Path) -> None:
        old_file(path, [B3_ACCOUNTS, B_REQUESTS.format(more=B3_MORE)])
        with closing(sqlite3.connect(path)) as db:
            db.execute(
                "UPDATE requests SET model = 'm', cost_usd = 0.5, output_tokens = 2,"
                " cache_creation_input_tokens = 3, agent_used = 'kept'"
            )
            db.commit()
        db = self.check(path)
        of_m = [t.sums for t in every(db).tallies if t.model == "m"]
        assert sum(s.cost_usd for s in of_m) == 50.0
        assert sum(s.cache_write_5m_tokens for s in of_m) == 300
        assert db.execute(
            "SELECT count(*) FROM requests WHERE agent_used = 'kept'"
        ).fetchone() == (100,)
        db.close()

    @pytest.mark.parametrize("version", [1, 2])
    def test_from_our_own_steps(self, path: Path, version: int) -> None:
        def steps(db: sqlite3.Connection) -> list[str]:
            for step in claude_lb.MIGRATIONS[:version]:
                step(db)
            found = db.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL")
            return [sql for (sql,) in found] + [f"PRAGMA user_version = {version}"]

        with closing(sqlite3.connect(":memory:")) as db:
            statements = steps(db)
        old_file(path, statements)
        self.check(path).close()

    def test_minutes_long_past_are_not_made(self, path: Path) -> None:
        old_file(path, [B_ACCOUNTS, B_REQUESTS.format(more="")])
        with closing(sqlite3.connect(path)) as db:
            db.execute("UPDATE requests SET timestamp = 0 WHERE id < 'old-5'")
            db.commit()
        with closing(open_database(str(path))) as db:
            spans = "SELECT sum(requests) FROM totals WHERE span_s = ?"
            by_minute, by_hour = (
                db.execute(spans, (s,)).fetchone() for s in (60, 3600)
            )
        assert by_hour == (100,)
        assert by_minute == (55,)

    def test_values_of_any_type_do_not_stop_it(self, path: Path) -> None:
        old_file(path, [B_ACCOUNTS, B_REQUESTS.format(more="")])
        with closing(sqlite3.connect(path)) as db:
            db.execute("UPDATE requests SET response_time_ms = 'soon', success = 'yes'")
            db.execute("UPDATE requests SET success = id >= 'old-25'")
            db.commit()
        with closing(open_database(str(path))) as upgraded:
            assert sum(t.sums.requests for t in every(upgraded).tallies) == 100

    def test_two_at_once_take_each_step_once(self, path: Path) -> None:
        old_file(path, [B_ACCOUNTS, B_REQUESTS.format(more="")])
        faults: list[Exception] = []

        def upgrade() -> None:
            try:
                open_database(str(path)).close()
            except Exception as error:  # noqa: BLE001
                faults.append(error)

        threads = [threading.Thread(target=upgrade) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert faults == []
        self.check(path).close()

    def test_a_step_that_fails_leaves_the_file_as_it_was(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fails(db: sqlite3.Connection) -> None:
            db.execute("DELETE FROM requests")
            raise sqlite3.OperationalError("disk I/O error")

        old_file(path, [B_ACCOUNTS, B_REQUESTS.format(more="")])
        with monkeypatch.context() as patch:
            patch.setattr(claude_lb, "MIGRATIONS", (*claude_lb.MIGRATIONS[:2], fails))
            with pytest.raises(sqlite3.OperationalError):
                open_database(str(path))
        self.check(path).close()

    def test_a_later_versions_file_is_not_touched(
        self, path: Path, make: Make, lines: StoreLines
    ) -> None:
        path.parent.mkdir()
        with closing(sqlite3.connect(path)) as db:
            db.execute("CREATE TABLE requests(later)")
            db.execute("PRAGMA user_version = 99")
        before = path.read_bytes()
        store = make()
        store.record(exchange(1))
        assert store.flush()
        assert [r["id"] for r in rows_of(store)] == ["lb_000001"]
        assert path.read_bytes() == before
        assert [p.name for p in path.parent.iterdir()] == [path.name]
        assert "later version" in str(store.health()["why"])
        assert len(lines.saying("later version")) == 1


def fill_up(db: sqlite3.Connection) -> None:
    """Let the database have no more pages than it has."""
    pages = db.execute("PRAGMA page_count").fetchone()[0]
    db.execute(f"PRAGMA max_page_count = {pages}")


class TestStoreFaults:
    def test_a_full_disk_costs_no_row_that_fits_in_memory(
        self, make: Make, path: Path, lines: StoreLines
    ) -> None:
        full = threading.Event()
        full.set()

        def connect(name: str) -> sqlite3.Connection:
            db = open_database(name)
            if full.is_set():
                fill_up(db)
            return db

        store = make(connect=connect)
        for i in range(1000):
            store.record(exchange(i))
        until(lambda: store.health()["state"] == "failing")
        assert "full" in str(store.health()["why"])
        assert store.health()["waiting"] == 1000
        assert rows_of(store) == []
        assert not store.flush(0.1)
        full.clear()
        until(lambda: store.flush(1.0))
        assert ids_in(path) == [f"lb_{i:06x}" for i in range(1000)]
        assert store.health() == {
            "database": str(path),
            "state": "ok",
            "why": None,
            "waiting": 0,
            "dropped": 0,
        }
        assert len(lines.saying("cannot be written")) == 1
        assert len(lines.saying("written again")) == 1

    def test_rows_in_hand_count_against_the_bound(
        self, make: Make, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(claude_lb, "HISTORY_WAITING", 100)
        tried, go = threading.Event(), threading.Event()

        def connect(name: str) -> sqlite3.Connection:
            if not tried.is_set():
                tried.set()
                go.wait(STORE_LIMIT_S)
                raise OSError(errno.EMFILE, "Too many open files")
            return open_database(name)

        store = make(connect=connect)
        store.record(exchange(0))
        assert tried.wait(STORE_LIMIT_S)
        for i in range(1, 131):
            store.record(exchange(i))
        assert store.health()["waiting"] == 101  # with the one in hand
        go.set()
        until(lambda: store.flush(1.0))
        assert ids_in(path) == [f"lb_{i:06x}" for i in range(31, 131)]
        assert store.health()["dropped"] == 31

    def test_a_write_that_fails_leaves_nothing_behind(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        db = memory_database()
        with monkeypatch.context() as patch:
            patch.setattr(claude_lb, "_count_use", lambda *_: 1 // 0)
            with pytest.raises(ZeroDivisionError):
                write_records(db, [exchange(1)])
        assert recent_requests(db, 9) == []
        assert every(db).tallies == []
        write_records(db, [exchange(1)])
        assert len(recent_requests(db, 9)) == 1

    def test_beyond_its_bound_the_oldest_rows_go_and_are_counted(
        self, make: Make, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(claude_lb, "HISTORY_WAITING", 100)
        broken = threading.Event()
        broken.set()

        def connect(name: str) -> sqlite3.Connection:
            if broken.is_set():
                raise OSError(errno.EMFILE, "Too many open files")
            return open_database(name)

        store = make(connect=connect)
        for i in range(350):
            store.record(exchange(i))
        until(lambda: store.health()["waiting"] == 100)
        until(lambda: "Too many open files" in str(store.health()["why"]))
        broken.clear()
        until(lambda: store.flush(1.0))
        assert store.health()["dropped"] == 250
        assert ids_in(path) == [f"lb_{i:06x}" for i in range(250, 350)]

    def test_rows_wait_while_another_process_locks_the_file(
        self, make: Make, path: Path, lines: StoreLines
    ) -> None:
        def connect(name: str) -> sqlite3.Connection:
            db = open_database(name)
            db.execute("PRAGMA busy_timeout = 20")
            return db

        store = make(connect=connect)
        store.record(exchange(1))
        assert store.flush()
        code = (
            "import sqlite3, sys; db = sqlite3.connect(sys.argv[1]);"
            "db.execute('BEGIN EXCLUSIVE'); print('locked', flush=True); input()"
        )
        with subprocess.Popen(
            [sys.executable, "-c", code, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as other:
            assert other.stdout is not None
            assert other.stdout.readline() == "locked\n"
            store.record(exchange(2))
            until(lambda: "locked" in str(store.health()["why"]))
            assert [r["id"] for r in rows_of(store)] == ["lb_000001"]
            other.communicate("\n")
        until(lambda: store.flush(1.0))
        assert ids_in(path) == ["lb_000001", "lb_000002"]
        assert store.health()["state"] == "ok"
        assert len(lines.saying("cannot be written")) == 1

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
    def test_a_folder_that_cannot_be_written(self, make: Make, path: Path) -> None:
        path.parent.mkdir(0o500)
        store = make()
        store.record(exchange(1))
        until(lambda: "Permission denied" in str(store.health()["why"]))
        path.parent.chmod(0o700)
        until(lambda: store.flush(1.0))
        assert ids_in(path) == ["lb_000001"]

    def test_a_folder_that_cannot_be_made(self, make: Make, path: Path) -> None:
        path.parent.write_text("in the way")
        store = make()
        store.record(exchange(1))
        until(lambda: store.health()["state"] == "failing")
        assert store.health()["waiting"] == 1
        path.parent.unlink()
        until(lambda: store.flush(1.0))
        assert ids_in(path) == ["lb_000001"]

    def test_a_deleted_file_is_begun_anew(self, make: Make, path: Path) -> None:
        rescued: list[int] = []
        store = make(rescued=lambda db: rescued.append(1))
        store.record(exchange(1))
        assert store.flush()
        for file in path.parent.iterdir():
            file.unlink()
        store.record(exchange(2))
        assert store.flush()
        assert ids_in(path) == ["lb_000002"]
        assert rescued == [1]

    def test_a_file_put_in_its_place_gets_the_rows(
        self, make: Make, path: Path, tmp_path: Path
    ) -> None:
        rescued: list[int] = []
        store = make(rescued=lambda db: rescued.append(1))
        store.record(exchange(1))
        assert store.flush()
        other = tmp_path / "other.db"
        with closing(open_database(str(other))) as db:
            write_records(db, [exchange(9)])
        for file in path.parent.iterdir():
            file.unlink()
        other.rename(path)
        store.record(exchange(2))
        assert store.flush()
        assert ids_in(path) == ["lb_000009", "lb_000002"]
        assert rescued == []

    def test_a_deleted_journal_loses_no_row(self, make: Make, path: Path) -> None:
        store = make()
        store.record(exchange(1))
        assert store.flush()
        Path(f"{path}-wal").unlink()
        store.record(exchange(2))
        assert store.flush()
        assert ids_in(path) == ["lb_000001", "lb_000002"]
        assert [r["id"] for r in rows_of(store)] == ["lb_000002", "lb_000001"]

    def test_an_exception_in_the_thread_costs_no_row(
        self, make: Make, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls: list[int] = []
        really = claude_lb.write_records

        def fails_twice(db: sqlite3.Connection, records: Any, *more: Any) -> None:
            calls.append(len(records))
            if len(calls) < 3:
                raise RuntimeError("a bug")
            really(db, records, *more)

        monkeypatch.setattr(claude_lb, "write_records", fails_twice)
        store = make()
        for i in range(20):
            store.record(exchange(i))
        until(lambda: store.flush(1.0))
        assert len(calls) > 2
        assert ids_in(path) == [f"lb_{i:06x}" for i in range(20)]

    def test_a_row_that_cannot_be_written_holds_up_no_other(
        self, make: Make, path: Path
    ) -> None:
        store = make()
        for i in range(200):
            store.record(exchange(i, request_bytes=10**40 if i == 77 else 1))
        until(lambda: store.flush(1.0))
        assert ids_in(path) == [f"lb_{i:06x}" for i in range(200) if i != 77]
        assert store.health()["dropped"] == 1

    def test_a_fault_of_our_own_ends_with_its_cause(
        self, make: Make, path: Path, lines: StoreLines, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store = make()
        store.record(exchange(1))
        assert store.flush()
        with monkeypatch.context() as patch:
            patch.setattr(claude_lb, "HISTORY_CHORE_S", 0.0)
            patch.setattr(claude_lb, "drop_rows", lambda *_: 1 // 0)
            store.record(exchange(2))
            until(lambda: "fault of the proxy" in str(store.health()["why"]))
            assert "ZeroDivisionError" in lines.saying("traceback")[0]
        store.record(exchange(3))
        until(lambda: store.flush(1.0))
        assert ids_in(path) == ["lb_000001", "lb_000002", "lb_000003"]
        assert store.health()["state"] == "ok"

    def test_reading_what_cannot_be_read_says_so(self, make: Make, path: Path) -> None:
        path.parent.mkdir()
        path.mkdir()
        store = make()
        with pytest.raises(StoreError, match="the database cannot be used"):
            rows_of(store)

    def test_readers_cannot_change_it(self, make: Make) -> None:
        store = make()
        store.record(exchange(1))
        assert store.flush()
        with pytest.raises(StoreError, match="readonly"):
            store.read(clear_history)
        assert store.change(clear_history) == 1
        assert rows_of(store) == []


def spoil(path: Path, how: str) -> None:
    """Damage a database that nobody has open."""
    data = bytearray(path.read_bytes())
    if how == "header":
        data[:100] = random.Random(1).randbytes(100)
    else:
        for page in range(4096, len(data), 4096):
            data[page : page + 64] = b"\xff" * 64
    path.write_bytes(data)


class TestDamage:
    def made_with_account(self, path: Path) -> None:
        with closing(open_database(str(path))) as db:
            add_account(db, "kept")
            write_records(db, [exchange(i) for i in range(50)])

    @pytest.mark.parametrize("how", ["header", "pages"])
    def test_the_file_is_set_aside_and_a_new_one_begun(
        self, path: Path, make: Make, lines: StoreLines, how: str
    ) -> None:
        self.made_with_account(path)
        spoil(path, how)
        Path(f"{path}-wal").touch(0o644)
        rescued: list[tuple[int, ...]] = []
        store = make(
            rescued=lambda db: rescued.append(
                db.execute("SELECT count(*) FROM requests").fetchone()
            ),
            clock=lambda: float(AT_S),
        )
        store.record(exchange(100))
        assert store.flush()
        assert ids_in(path) == ["lb_000064"]
        assert rescued == [(0,)]
        aside = "history.db.corrupt-20260921T141320"
        moved = {p.name: mode_of(p) for p in path.parent.glob("*.corrupt-*")}
        assert moved[aside] == 0o600
        assert set(moved.values()) == {0o600}
        assert store.health()["state"] == "ok"
        assert store.health()["dropped"] == 0
        assert len(lines.saying("is damaged")) == 1

    def test_accounts_that_can_be_read_come_along(self, path: Path, make: Make) -> None:
        self.made_with_account(path)
        with closing(sqlite3.connect(path)) as db:
            found = db.execute(
                "SELECT rootpage FROM sqlite_master WHERE name NOT LIKE '%accounts%'"
            ).fetchall()
        data = bytearray(path.read_bytes())
        for (page,) in found:
            data[(page - 1) * 4096 : page * 4096] = b"\xff" * 4096
        path.write_bytes(data)
        store = make()
        store.record(exchange(1))
        assert store.flush()
        told = store.read(
            lambda db: db.execute("SELECT name, refresh_token FROM accounts").fetchall()
        )
        assert told == [("kept", "fresh-token")]
        assert ids_in(path) == ["lb_000001"]

    @pytest.mark.parametrize("how", ["header", "pages"])
    def test_damage_that_a_reader_meets_is_mended(
        self, path: Path, make: Make, how: str
    ) -> None:
        self.made_with_account(path)
        spoil(path, how)
        store = make()
        with pytest.raises(StoreError, match=r"not a database|malformed"):
            rows_of(store)
        until(lambda: list(path.parent.glob("*.corrupt-*")))
        until(lambda: rows_of(store) == [])

    def test_an_empty_file_is_taken_as_a_new_one(self, path: Path, make: Make) -> None:
        path.parent.mkdir()
        path.touch()
        store = make()
        store.record(exchange(1))
        assert store.flush()
        assert ids_in(path) == ["lb_000001"]
        assert not list(path.parent.glob("*.corrupt-*"))


STORE_CHILD = """
import sys, time
sys.path.insert(0, sys.argv[2])
import claude_lb as lb
log = lb.Log(lb.LogSettings())
store = lb.Store(lb.StorageSettings(database=sys.argv[1]), log)
store.start()
first, i = int(sys.argv[3]), 0
def exchange(number):
    usage = lb.Usage(10, 20, 30, 40, 50)
    facts = ("POST", "/v1/messages", "one", 200, 1, 12.5, 100.0, 1000, 2000)
    told = (lb.Outcome.OK, "", int(time.time() * 1000), "m", "m", (), True, "", usage)
    return lb.ExchangeRecord(f"lb_{number:06x}", *facts, *told)
while True:
    i += 1
    store.record(exchange(first + i))
    print(first + i, time.monotonic(), flush=True)
    time.sleep(0.001)
"""


def killed_round(path: Path, number: int, seconds: float) -> tuple[set[str], set[str]]:
    """Let a child record, kill it; return the ids older than 1 s and those shown."""
    first = number * 100_000
    here = str(Path(__file__).parent)
    with subprocess.Popen(
        [sys.executable, "-c", STORE_CHILD, str(path), here, str(first)],
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdout is not None
        recorded: list[tuple[int, float]] = []
        shown: set[str] = set()
        end = None
        for line in child.stdout:
            name, at = line.split()
            recorded.append((int(name), float(at)))
            end = end or float(at) + seconds
            if len(recorded) % 200 == 0 and path.exists():
                with closing(open_database(str(path))) as db:
                    shown |= {r["id"] for r in recent_requests(db, 1000)}
            if float(at) > end:
                break
        killed_at = time.monotonic()
        child.send_signal(signal.SIGKILL)
        child.stdout.close()
    old = {f"lb_{n:06x}" for n, at in recorded if at < killed_at - 1.0}
    return old, {i for i in shown if i >= f"lb_{first:06x}"}


@at_both_ends
class TestKilled:
    def test_no_row_is_lost_that_was_shown_or_is_a_second_old(self, path: Path) -> None:
        for number in range(1, 4):
            old, shown = killed_round(path, number, 1.2)
            with closing(open_database(str(path))) as db:
                told = db.execute("PRAGMA integrity_check").fetchone()[0]
                there = {r["id"] for r in recent_requests(db, 100_000)}
            assert told == "ok"
            assert len(old) > 20
            assert old - there == set()
            assert shown - there == set()


def mixed(count: int) -> list[ExchangeRecord]:
    """Return exchanges of all kinds over some hours, the same each time."""
    chance = random.Random(5)
    records = []
    for i in range(count):
        at_ms = (AT_S - chance.randrange(5 * 3600)) * 1000
        facts: dict[str, Any] = {
            "endpoint": chance.choice(["one", "two", ""]),
            "model_used": chance.choice(["claude-a", "claude-b", None]),
            "total_ms": float(chance.randrange(10_000)),
            "first_byte_ms": chance.choice([None, chance.lognormvariate(6, 1)]),
            "at_ms": at_ms,
            "usage": chance.choice(
                [None, Usage(chance.randrange(99), chance.randrange(99), 5, 6, 7)]
            ),
        }
        kinds: list[dict[str, Any]] = [
            {},
            {},
            {},
            {"status": 400},
            {"ended": Outcome.CLIENT_CANCELLED},
        ]
        records.append(exchange(i, **{**facts, **chance.choice(kinds)}))
    return records


class TestRollUps:
    def test_they_equal_the_sums_of_the_rows(self) -> None:
        db = memory_database()
        records = mixed(3000)
        for start in range(0, len(records), 700):
            write_records(db, records[start : start + 700])
        by_rows = db.execute(
            "SELECT timestamp / ? / 1000 * ?, ifnull(account_used, ''),"
            " coalesce(model_used, model_asked), count(*), sum(success),"
            " sum(ended = 'client_cancelled'), sum(stream), sum(response_time_ms),"
            " total(input_tokens), total(output_tokens),"
            " total(cache_read_input_tokens), total(cache_write_5m_tokens),"
            " total(cache_write_1h_tokens), sum(output_tokens IS NOT NULL)"
            " FROM requests GROUP BY 1, 2, 3 ORDER BY 1, 2, 3",
            (3600, 3600),
        ).fetchall()
        by_totals = db.execute(
            "SELECT at, endpoint, model, requests, succeeded, cancelled, streams,"
            " response_ms, input_tokens, output_tokens, cache_read_input_tokens,"
            " cache_write_5m_tokens, cache_write_1h_tokens, unpriced FROM totals"
            " WHERE span_s = 3600 ORDER BY at, endpoint, model"
        ).fetchall()
        assert by_totals == by_rows
        per_minute = db.execute(
            "SELECT at - at % 3600, endpoint, model, sum(requests), sum(succeeded)"
            " FROM totals WHERE span_s = 60 GROUP BY 1, 2, 3 ORDER BY 1, 2, 3"
        ).fetchall()
        assert per_minute == [row[:5] for row in by_rows]
        timed = db.execute("SELECT count(first_byte_ms) FROM requests").fetchone()
        for span in (60, 3600):
            assert (
                timed
                == db.execute(
                    "SELECT sum(requests) FROM first_bytes WHERE span_s = ?", (span,)
                ).fetchone()
            )

    def test_an_upgrade_sums_up_as_writing_does(self, path: Path) -> None:
        with closing(open_database(str(path))) as db:
            write_records(db, mixed(2000))
            tables = "totals", "first_bytes"
            wanted = [db.execute(f"SELECT * FROM {t}").fetchall() for t in tables]
            for table in tables:
                db.execute(f"DROP TABLE {table}")
            db.execute("DROP INDEX requests_failed")
            db.execute("PRAGMA user_version = 2")
        with closing(open_database(str(path))) as db:
            assert wanted == [
                db.execute(f"SELECT * FROM {t}").fetchall() for t in tables
            ]

    def test_cost_is_summed_where_it_is_known(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def cost(model: str, usage: Usage, at_s: float) -> float | None:
            assert at_s == pytest.approx(AT_S, abs=10)
            return None if model == "new" else 0.25 * (usage.output_tokens or 0)

        monkeypatch.setattr(claude_lb, "cost_usd", cost)
        db = memory_database()
        records = [exchange(1), exchange(2), exchange(3, model_used="new")]
        write_records(db, [*records, exchange(4, usage=None)])
        document = stats_of(db)
        assert document["totalCostUsd"] == 10.0
        assert document["unpriced"] == 1
        assert [r["cost_usd"] for r in recent_requests(db, 4)] == [None, None, 5.0, 5.0]
        only_new = analytics_of(db, "1h", AT_S, model="new")
        assert only_new["totals"]["totalCostUsd"] is None

    def test_invented_models_do_not_fill_the_disk(self) -> None:
        db = memory_database()
        models = [*(f"m{i}" for i in range(250)), *["real"] * 5]
        write_records(db, [exchange(i, model_used=m) for i, m in enumerate(models)])
        for start in range(0, 750, 125):
            numbers = range(1000 + start, 1125 + start)
            write_records(db, [exchange(i, model_used=f"m{i}") for i in numbers])
        write_records(db, [exchange(9999, model_used="real")])
        for span in (60, 3600):
            told = dict(
                db.execute(
                    "SELECT model, sum(requests) FROM totals WHERE span_s = ?"
                    " GROUP BY 1",
                    (span,),
                )
            )
            assert len(told) <= claude_lb.ROLLUP_PAIRS + 1
            assert sum(told.values()) == 1006
            assert told["real"] == 6
            assert told["other"] == 1000 - (claude_lb.ROLLUP_PAIRS - 1)
        assert len({r["model_used"] for r in recent_requests(db, 2000)}) == 1001

    def test_percentiles_are_within_a_tenth(self) -> None:
        chance = random.Random(3)
        db = memory_database()
        times = [chance.lognormvariate(6.5, 0.8) for _ in range(4000)]
        write_records(db, [exchange(i, first_byte_ms=ms) for i, ms in enumerate(times)])
        document = analytics_of(db, "1h", AT_S)
        times.sort()
        for share, name in ((0.5, "firstByteP50Ms"), (0.95, "firstByteP95Ms")):
            exact = times[int(share * len(times)) - 1]
            for told in (
                document["totals"],
                document["accountPerformance"][0],
                document["modelPerformance"][0],
            ):
                assert told[name] == pytest.approx(exact, rel=0.1)

    def test_percentiles_of_few(self) -> None:
        assert percentile_ms([], 0.5) is None
        assert percentile_ms([(0.0, 3)], 0.5) == 0.5
        assert percentile_ms([(100.0, 1)], 0.95) == pytest.approx(109.05, abs=0.06)
        assert percentile_ms([(1.0, 1), (64.0, 9)], 0.1) == pytest.approx(1.1)
        assert percentile_ms([(1.0, 1), (64.0, 9)], 0.11) == pytest.approx(69.8)


class TestAccountCounters:
    def counters(self, db: sqlite3.Connection, name: str = "one") -> tuple[Any, ...]:
        found: tuple[Any, ...] = db.execute(
            "SELECT request_count, last_used, usage_window_start,"
            " usage_window_requests FROM accounts WHERE name = ?",
            (name,),
        ).fetchone()
        return found

    def test_what_is_served_is_counted_once(self) -> None:
        db = memory_database()
        add_account(db, "one", count=5)
        add_account(db, "two")
        write_records(db, [exchange(1), exchange(2), failed_exchange(3)])
        first, last = AT_S * 1000 + 1, AT_S * 1000 + 2
        assert self.counters(db) == (7, last, first, 2)
        assert self.counters(db, "two") == (0, None, None, 0)

    @pytest.mark.parametrize(
        ("hours", "wanted"), [(-4.99, 9), (-5.0, 1), (-6.0, 1), (0.5, 9), (99.0, 1)]
    )
    def test_a_window_lasts_five_hours(self, hours: float, wanted: int) -> None:
        db = memory_database()
        start = AT_S * 1000 + int(hours * 3_600_000)
        add_account(db, "one", start=start, window=8)
        write_records(db, [exchange(0)])
        assert self.counters(db)[3] == wanted
        assert self.counters(db)[2] == (start if wanted == 9 else AT_S * 1000)

    def test_reset_sets_the_counters_to_none_and_keeps_the_history(self) -> None:
        db = memory_database()
        add_account(db, "one", count=5)
        write_records(db, [exchange(1)])
        reset_statistics(db)
        assert self.counters(db)[:2] == (0, None)
        assert len(recent_requests(db, 10)) == 1


class TestRetention:
    def pruned(self, make: Make, monkeypatch: pytest.MonkeyPatch, **kept: Any) -> Store:
        monkeypatch.setattr(claude_lb, "HISTORY_CHORE_S", 0.01)
        return make(settings=kept, clock=lambda: float(AT_S))

    def test_old_rows_go_in_small_steps_without_a_pause(
        self, make: Make, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        steps: list[int] = []
        really = claude_lb.drop_rows

        def step(db: sqlite3.Connection, before_ms: int, surplus: int) -> int:
            steps.append(really(db, before_ms, surplus))
            return steps[-1]

        monkeypatch.setattr(claude_lb, "HISTORY_STEP", 10)
        monkeypatch.setattr(claude_lb, "drop_rows", step)
        old_ms = (AT_S - 3 * 86400) * 1000
        times = [old_ms if i % 3 else AT_S * 1000 for i in range(300)]
        with closing(open_database(str(path))) as db:
            write_records(db, [exchange(i, at_ms=at) for i, at in enumerate(times)])
        store = make(settings={"retention_days": 2.0}, clock=lambda: float(AT_S))
        store.record(exchange(999))
        until(lambda: len(rows_of(store)) == 101)
        assert {r["timestamp"] for r in rows_of(store)[1:]} == {AT_S * 1000}
        assert max(steps) == 10
        assert sum(steps) == 200

    def test_the_first_rows_go_where_they_are_too_many(
        self, make: Make, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(claude_lb, "HISTORY_STEP", 7)
        store = self.pruned(make, monkeypatch, max_rows=50)
        for i in range(120):
            store.record(exchange(i))
        store.flush()
        until(lambda: len(rows_of(store)) <= 50)
        for _ in range(3):
            assert store.flush()
        assert [r["id"] for r in rows_of(store)] == [
            f"lb_{i:06x}" for i in reversed(range(70, 120))
        ]

    def test_the_bound_of_a_running_store_can_change(
        self, make: Make, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store = self.pruned(make, monkeypatch)
        for i in range(30):
            store.record(exchange(i))
        assert store.flush()
        store.configure(StorageSettings(database=str(path), max_rows=10))
        until(lambda: store.flush(1.0) and len(rows_of(store)) == 10)

    def test_in_memory_there_is_room_for_fewer(
        self, make: Make, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(claude_lb, "MEMORY_ROWS", 20)
        store = self.pruned(make, monkeypatch, database=None)
        for i in range(50):
            store.record(exchange(i))
        until(lambda: store.flush(1.0) and len(rows_of(store)) == 20)
        assert rows_of(store)[0]["id"] == "lb_000031"

    def test_roll_ups_go_when_their_time_is_over(
        self, make: Make, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store = self.pruned(make, monkeypatch, retention_days=2.0)
        hours_ago = [0, 1, 6, 8, 20, 47, 50, 80]
        for i, hours in enumerate(hours_ago):
            store.record(exchange(i, at_ms=(AT_S - hours * 3600) * 1000))
            store.flush()

        def spans(span: int) -> set[int]:
            def ages(db: sqlite3.Connection) -> set[int]:
                found = db.execute("SELECT at FROM totals WHERE span_s = ?", (span,))
                return {round((AT_S - at) / 3600 - 0.5) for (at,) in found}

            return store.read(ages)

        until(lambda: store.flush(1.0) and max(spans(3600)) < 50)
        until(lambda: store.flush(1.0) and max(spans(60)) < 8)
        assert spans(3600) == {0, 1, 6, 8, 20, 47}
        assert spans(60) == {0, 1, 6}

    def test_clearing_takes_rows_and_roll_ups(self) -> None:
        db = memory_database()
        write_records(db, mixed(100))
        assert clear_history(db) == 100
        assert clear_history(db) == 0
        counts = analyze(db)["rows"]
        assert counts == {"accounts": 0, "requests": 0, "totals": 0, "first_bytes": 0}
        write_records(db, [exchange(1)])
        assert sum(t.sums.requests for t in every(db).tallies) == 1


class TestReports:
    def filled(self) -> sqlite3.Connection:
        db = memory_database()
        add_account(db, "one")
        add_account(db, "idle")
        write_records(db, [exchange(i) for i in range(7)])
        write_records(db, [failed_exchange(10), failed_exchange(11)])
        refused = {"endpoint": "", "status": 413, "model_used": None}
        none = {"model_asked": None, "usage": None, "first_byte_ms": None}
        write_records(db, [exchange(20, ended=Outcome.REFUSED, **{**refused, **none})])
        return db

    def test_stats_has_the_fields_scripts_read(self) -> None:
        document = stats_of(self.filled())
        assert document["totalRequests"] == 10
        assert document["successRate"] == 70
        assert document["activeAccounts"] == 1
        assert document["avgResponseTime"] == 2000
        assert document["totalTokens"] == 7 * 69
        assert document["totalCostUsd"] is None
        assert document["unpriced"] == 7
        assert document["avgTokensPerSecond"] == 10.0
        assert document["cacheHitRate"] == 61.2  # 30 of 49
        assert document["topModels"] == [
            {"model": "claude-a-1", "count": 9, "percentage": 100}
        ]
        named = {a["name"]: a for a in document["accounts"]}
        assert list(named) == ["one", "two", "no_account"]
        assert named["one"]["requestCount"] == named["one"]["totalRequests"] == 7
        assert named["two"]["successRate"] == 0
        errors = document["recentErrors"]
        assert len(errors) == 3
        assert errors[0].endswith("no_account: HTTP 413")
        assert errors[1].endswith("one: HTTP 529: overloaded; two: refused")

    def test_an_empty_database_is_all_zero(self) -> None:
        db = memory_database()
        document = stats_of(db)
        assert document["totalRequests"] == document["successRate"] == 0
        assert document["activeAccounts"] == document["avgResponseTime"] == 0
        assert document["totalTokens"] == document["totalCostUsd"] == 0
        assert document["avgTokensPerSecond"] is None
        assert document["topModels"] == document["accounts"] == []
        assert document["recentErrors"] == []
        for name, (_, _, buckets) in claude_lb.RANGES.items():
            told = analytics_of(db, name, AT_S)
            assert len(told["timeSeries"]) == buckets
            assert told["totals"]["successRate"] == 0
            assert analytics_lines(told)
        assert stats_lines(document)

    @pytest.mark.parametrize(
        ("name", "bucket", "width_s"),
        [
            ("1h", "1m", 60),
            ("6h", "5m", 300),
            ("24h", "1h", 3600),
            ("7d", "1h", 3600),
            ("30d", "1d", 86400),
        ],
    )
    def test_a_range_has_all_its_buckets(
        self, name: str, bucket: str, width_s: int
    ) -> None:
        db = memory_database()
        before, within = AT_S - 2 * width_s, AT_S
        write_records(db, [exchange(1, at_ms=before * 1000), exchange(2)])
        document = analytics_of(db, name, within)
        assert document["meta"]["range"] == name
        assert document["meta"]["bucket"] == bucket
        series = document["timeSeries"]
        starts = [entry["ts"] for entry in series]
        assert starts[-1] == AT_S // width_s * width_s * 1000
        assert {b - a for a, b in zip(starts, starts[1:])} == {width_s * 1000}
        assert [e["requests"] for e in series[-3:]] == [1, 0, 1]
        assert document["totals"]["requests"] == 2
        assert series[-1]["firstByteP50Ms"] == pytest.approx(400, rel=0.1)
        assert series[-2]["firstByteP50Ms"] is None

    def test_what_is_outside_a_range_does_not_count(self) -> None:
        db = memory_database()
        times = [AT_S - 3600, AT_S - 3500, AT_S, AT_S + 86400]
        write_records(db, [exchange(i, at_ms=at * 1000) for i, at in enumerate(times)])
        assert analytics_of(db, "1h", AT_S)["totals"]["requests"] == 2

    def test_it_can_be_narrowed_to_an_endpoint_or_a_model(self) -> None:
        db = self.filled()
        one = analytics_of(db, "1h", AT_S, endpoint="one")
        assert one["totals"]["requests"] == 7
        assert list(one["byEndpoint"]) == ["one"]
        model = analytics_of(db, "1h", AT_S, model="claude-a-1")
        assert model["totals"]["requests"] == 9
        none = analytics_of(db, "1h", AT_S, model="'; --")
        assert none["totals"]["requests"] == 0

    def test_series_of_endpoints_and_models_sum_up_to_the_whole(self) -> None:
        db = memory_database()
        write_records(db, mixed(500))
        document = analytics_of(db, "6h", AT_S)
        whole = [e for e in document["timeSeries"] if e["requests"]]
        for entry in whole:
            parts = [
                e["requests"]
                for series in document["byEndpoint"].values()
                for e in series
                if e["ts"] == entry["ts"]
            ]
            assert sum(parts) == entry["requests"]
        assert set(document["byModel"]) == {"claude-a", "claude-b"}
        assert sum(m["count"] for m in document["modelDistribution"]) == 500
        assert len(document["costByModel"]) == 2

    def test_text_is_aligned(self) -> None:
        db = self.filled()
        lines = stats_lines(stats_of(db))
        top = next(i for i, line in enumerate(lines) if line.startswith("account"))
        assert len({len(line) for line in lines[top : top + 4]}) == 1
        assert any("claude-a-1" in line for line in lines)
        shown = analytics_lines(analytics_of(db, "1h", AT_S))
        assert any(line.startswith("2026-09-21T14:13Z") for line in shown)

    @pytest.mark.parametrize("filled", [False, True])
    def test_analyze_tells_plans_and_sizes(self, path: Path, *, filled: bool) -> None:
        with closing(open_database(str(path))) as db:
            if filled:
                write_records(db, mixed(100))
            document = analyze(db)
        assert document["rows"]["requests"] == (100 if filled else 0)
        assert document["bytes"] == document["pages"] * document["pageBytes"] > 0
        assert document["schema"] == 3
        plans = document["plans"]
        assert len(plans) >= 5
        assert all(plans.values())
        scans = [s for steps in plans.values() for s in steps if s.startswith("SCAN")]
        assert all("requests" in s for s in scans)  # by rowid, up to a limit
        assert "requests_failed" in " ".join(plans["GET /api/stats, failures"])
        assert "idx_requests_timestamp" in " ".join(plans["retention, by age"])
        assert any("requests" in line for line in analyze_lines(document))

    def test_analyze_works_where_there_is_no_file_yet(self, make: Make) -> None:
        assert make().read(analyze)["rows"]["requests"] == 0


class TestOneLiners:
    def test_what_people_typed_still_works(self, path: Path) -> None:
        with closing(open_database(str(path))) as db:
            add_account(db, "one")
            write_records(db, [exchange(1), failed_exchange(2)])
        with closing(sqlite3.connect(path)) as db:

            def ask(sql: str) -> list[Any]:
                return db.execute(sql).fetchall()

            assert ask("SELECT name, request_count, plan_type FROM accounts") == [
                ("one", 1, "console")
            ]
            assert ask(
                "SELECT account_used, status_code, success, response_time_ms,"
                " failover_attempts FROM requests ORDER BY timestamp DESC LIMIT 10"
            ) == [("two", 503, 0, 2000, 1), ("one", 200, 1, 2000, 0)]
            assert ask(
                "SELECT account_used, COUNT(*), AVG(response_time_ms) FROM requests"
                " WHERE success = 1 GROUP BY account_used"
            ) == [("one", 1, 2000.0)]
            assert ask(
                "SELECT datetime(timestamp / 1000, 'unixepoch') FROM requests"
                " WHERE error_message IS NOT NULL"
            ) == [("2026-09-21 14:13:20",)]
            db.execute("UPDATE accounts SET request_count = 0, last_used = NULL")
            assert db.execute("DELETE FROM requests").rowcount == 2


# ============================================================================
# ACCOUNTS, HISTORY AND MONEY OVER SOCKETS
# ============================================================================

# -- fakes -----------------------------------------------------------------


class Issuer(Provider):
    """A provider that knows the newest access token of each login."""

    def __init__(self) -> None:
        super().__init__()
        self.newest: dict[int, str] = {}

    def tokens(self, family: int | None = None, **more: Any) -> dict[str, Any]:
        if family is None:
            with self.lock:
                self.made += 1
                family = self.made
        made = super().tokens(family, **more)
        self.newest[family] = made["access_token"]
        return made

    def expire(self) -> None:
        """Have no token taken that was given so far."""
        self.newest.clear()

    def takes(self, request: Received) -> bool:
        good = [[f"Bearer {token}"] for token in list(self.newest.values())]
        return request.values("authorization") in good

    def account(self, name: str, left_s: float = 3600, **more: Any) -> Account:
        """Return an account whose token is good for `left_s` more seconds."""
        tokens, epoch = self.tokens(), time.time()
        return Account(
            os.urandom(16).hex(),
            name,
            "max",
            refresh_token=Secret(tokens["refresh_token"]),
            access_token=Secret(tokens["access_token"]),
            expires_at=epoch + left_s,
            created_at=epoch,
        )._replace(**more)


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    server = Issuer()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.slow.set()
    server.shutdown()
    server.server_close()


class KeepingServer(claude_lb.Server):
    """A server that takes its store down with itself."""

    def stop(self, *, grace_s: float) -> None:
        super().stop(grace_s=grace_s)
        assert self.store is not None
        self.store.stop()


class Kept(Proxy):
    """A proxy with a history, over accounts and endpoints; see `keeping`."""

    def __init__(self, lab: Lab, raw: dict[str, Any], **store: Any) -> None:
        self.path = Path(raw["storage"]["database"])
        self._raw = raw
        base = self._read()
        log = Log(base.log)
        self.book = claude_lb.book_of(base, log)
        rescued = None if self.book is None else self.book.restore
        self.store = claude_lb.Store(base.storage, log, rescued=rescued, **store)
        self.store.start()
        claude_lb._mend(self.store, base)
        config = claude_lb.with_stored(base, self.book)
        server = KeepingServer(
            config, log, read=self._whole, store=self.store, book=self.book
        )
        super().__init__(lab, server, Path(raw["log"]["file"]))
        server.start()
        lab._proxies.append(self)

    def _read(self) -> Config:
        return parse_config(json.dumps(self._raw), name="kept", source=Source())

    def _whole(self) -> Config:
        return claude_lb.with_stored(self._read(), self.book)

    def stop(self) -> None:
        self.server.stop(grace_s=BOUND_S)
        self._lab.stopped(self)

    def get(self, path: str, *fields: str) -> Any:
        answer = self.ask("GET", path, b"", *fields, counts=0)
        assert answer.status == 200, answer
        return answer.json()

    def refused(self, method: str, path: str, *fields: str, body: bytes = b"") -> int:
        """Ask for what is refused; return the status."""
        if body and not any("content-type" in f.lower() for f in fields):
            fields = (JSON_TYPE, *fields)
        answer = self.ask(method, path, body, *fields)
        assert answer.status >= 400, answer
        assert answer.json()["type"] == "error"
        return answer.status

    def history(self, *fields: str) -> Any:
        """Return the rows, oldest first."""
        return self.get("/api/requests?limit=1000", *fields)[::-1]

    def last(self) -> Any:
        return self.get("/api/requests?limit=1")[0]

    def account(self, name: str = "work") -> Any:
        found = [a for a in self.get("/api/accounts") if a["name"] == name]
        return found[0] if found else None

    def stored(self, name: str = "work") -> dict[str, Any]:
        """Return an account's row as it is in the database."""
        with contextlib.closing(sqlite3.connect(self.path)) as db:
            db.row_factory = sqlite3.Row
            (row,) = db.execute("SELECT * FROM accounts WHERE name=?", (name,))
            return dict(row)


def keeping(
    lab: Lab,
    *ups: ScriptedUpstream,
    issuer: Issuer | None = None,
    accounts: Sequence[Account] = (),
    answering: Answering = fine,
    store: Mapping[str, Any] | None = None,
    **sections: Any,
) -> Any:
    """Return a Kept over endpoints `ups`, named up0.., and over stored `accounts`.

    The accounts' upstream, returned second, answers who shows the newest token.
    """
    database = str(lab._folder / "state" / "lb.db")
    raw: dict[str, Any] = {"storage": {"database": database}}
    served = None
    if issuer is not None:

        def checked(wire: Wire, request: Received) -> None:
            able = issuer.takes(request)
            (answering if able else says(401))(wire, request)

        served = lab.upstream(checked)
        raw = issuer.config(database)
        raw["accounts"]["baseURL"] = served.url
        book = AccountBook(database, issuer.settings(), Lines())
        for account in accounts:
            book.add(account)
    raw["endpoints"] = [
        {"name": f"up{n}", "baseURL": up.url, "authToken": up.token}
        for n, up in enumerate(ups)
    ]
    log = {"format": "json", "file": str(lab._folder / f"kept{len(lab._proxies)}.log")}
    raw["server"] = {"port": 0, **sections.pop("server", {})}
    raw["failover"] = {"gateSeconds": 0, **sections.pop("failover", {})}
    raw["log"] = {**log, **sections.pop("log", {})}
    kept = Kept(lab, {**raw, **sections}, **(store or {}))
    return kept if issuer is None else (kept, served)


def told(body: object, *fields: str) -> Answering:
    """Return what answers each request with a whole message."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return lambda wire, _: wire.answer(200, data, *fields)


def saying(usage: object, model: str = DATED_MODEL) -> bytes:
    facts = {"id": "msg_1", "type": "message", "role": "assistant", "content": []}
    return json.dumps({**facts, "model": model, "usage": usage}).encode()


def counts_of(row: Mapping[str, Any]) -> tuple[int | None, ...]:
    """Return a row's tokens: in, out, read, written for 5 minutes and for 1 hour."""
    names = ("input_tokens", "output_tokens", "cache_read_input_tokens")
    more = ("cache_write_5m_tokens", "cache_write_1h_tokens")
    return tuple(row[name] for name in (*names, *more))


def hang_up_after(kept: Kept, marker: bytes) -> None:
    """Ask for a stream, and close the connection in its middle."""
    client = kept.client().post()
    client.head()
    client.until(marker)
    client.close()


def is_over(kept: Kept) -> bool:
    return kept.server.services.pool.snapshot().in_flight == 0


# -- serving by accounts ---------------------------------------------------


class TestServingByAccounts:
    def test_only_our_credentials_go_up(self, lab: Lab, issuer: Issuer) -> None:
        work = issuer.account("work")
        kept, served = keeping(lab, issuer=issuer, accounts=[work])
        theirs = ("x-api-key: sk-of-the-client", "Authorization: Bearer of-the-client")
        betas = ("anthropic-beta: one-2025", "anthropic-beta: two-2025,three-2025")
        answer = kept.post(None, *theirs, *betas)
        assert served_by(answer) == "work"
        (request,) = served.requests
        assert work.access_token is not None
        token = work.access_token.reveal()
        assert request.values("authorization") == [f"Bearer {token}"]
        assert request.values("x-api-key") == []
        assert b"of-the-client" not in b"\n".join(request.lines)
        sent = ",".join(request.values("anthropic-beta")).replace(" ", "").split(",")
        assert sorted(sent) == [
            *("oauth-2025-04-20", "one-2025", "three-2025", "two-2025"),
        ]

    def test_the_beta_stands_once(self, lab: Lab, issuer: Issuer) -> None:
        kept, served = keeping(lab, issuer=issuer, accounts=[issuer.account("work")])
        kept.post()
        kept.post(None, "anthropic-beta: oauth-2025-04-20")
        for request in served.requests:
            assert request.values("anthropic-beta") == ["oauth-2025-04-20"]

    def test_an_api_key_account_sends_its_key(self, lab: Lab, issuer: Issuer) -> None:
        made = issuer.account("key", api_key=Secret("sk-ant-api03-of-ours"))
        kept, served = keeping(lab, issuer=issuer, accounts=[made])
        assert kept.post().status == 401  # the upstream takes tokens only
        (request,) = served.requests
        assert request.values("x-api-key") == ["sk-ant-api03-of-ours"]
        assert request.values("authorization") == []
        assert issuer.count() == 0

    def test_a_401_brings_a_fresh_token(
        self, lab: Lab, issuer: Issuer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(claude_lb, "RENEW_FLOOR_S", 0.0)
        work = issuer.account("work")
        kept, served = keeping(lab, issuer=issuer, accounts=[work])
        before = kept.stored()
        for turn in (1, 2):  # the second works by the rotated refresh token
            issuer.expire()
            answer = kept.post()
            assert served_by(answer) == "work"
            assert trail(answer) == "work 401, work 200"
            assert issuer.count() == turn
            now = kept.stored()
            assert now["refresh_token"] in issuer.live
            assert now["access_token"] in issuer.newest.values()
            assert now["refresh_token"] != before["refresh_token"]
            assert now["expires_at"] > time.time() * 1000
            before = now
        assert issuer.revoked == set()
        first, second, *_ = served.requests
        assert first.body == second.body
        assert rules(kept, "work") == []
        assert [len(r["attempts"]) for r in kept.history()] == [2, 2]

    @pytest.mark.parametrize(
        ("method", "path"),
        [
            ("POST", COUNT_TOKENS),
            ("GET", "/v1/models"),
            ("DELETE", "/v1/files/file_1"),
            ("POST", "/v1/messages/batches"),
        ],
    )
    def test_so_does_one_on_another_path(
        self, lab: Lab, issuer: Issuer, method: str, path: str
    ) -> None:
        work = issuer.account("work")
        kept, served = keeping(lab, issuer=issuer, accounts=[work])
        issuer.expire()
        body = message() if method == "POST" else b""
        answer = kept.ask(method, path, body)
        assert (answer.status, issuer.count()) == (200, 1)
        assert [r.method for r in served.requests] == [method] * 2
        assert kept.last()["path"] == path

    def test_what_another_process_renewed_is_used(
        self, lab: Lab, issuer: Issuer
    ) -> None:
        work = issuer.account("work")
        first, _ = keeping(lab, issuer=issuer, accounts=[work])
        second, _ = keeping(lab, issuer=issuer)
        issuer.expire()
        clients = [kept.client().post() for kept in (first, second) for _ in range(5)]
        assert [client.answer().status for client in clients] == [200] * 10
        assert issuer.count() == 1
        assert issuer.revoked == set()
        for kept in (first, second):
            eventually(lambda kept=kept: len(kept.history()) == 10, "rows")  # type: ignore[misc]

    def test_a_hang_up_during_a_refresh(self, lab: Lab, issuer: Issuer) -> None:
        work = issuer.account("work")
        kept, _ = keeping(lab, issuer=issuer, accounts=[work])
        issuer.expire()
        issuer.script.append("slow")
        client = kept.client().post()
        assert issuer.waiting.wait(BOUND_S)
        client.close()
        eventually(kept.history, "its row", PROMPT_S)
        issuer.slow.set()
        assert served_by(kept.post()) == "work"
        assert issuer.count() == 1
        assert [r["ended"] for r in kept.history()] == ["client_cancelled", "ok"]
        assert kept.stored()["refresh_token"] in issuer.live

    def test_fifty_in_flight_refresh_once(self, lab: Lab, issuer: Issuer) -> None:
        gate, old = lab.gate(), []

        def expires(wire: Wire, request: Received) -> None:
            if gate.is_set():
                fine(wire, request)
                return
            old.append(request)
            if len(old) == 50:
                issuer.expire()
                gate.set()
            assert gate.wait(BOUND_S)
            wire.answer(401, error_body(401))

        kept, _ = keeping(
            lab, issuer=issuer, accounts=[issuer.account("work")], answering=expires
        )
        clients = [kept.client().post() for _ in range(50)]
        answers = [client.answer() for client in clients]
        assert [a.status for a in answers] == [200] * 50
        assert {trail(a) for a in answers} == {"work 401, work 200"}
        assert issuer.count() == 1
        assert issuer.revoked == set()
        assert len(kept.history()) == 50

    @pytest.mark.parametrize("fault", ["500", "invalid_grant"])
    def test_a_failed_refresh_fails_over(
        self, lab: Lab, issuer: Issuer, fault: str
    ) -> None:
        spare = lab.upstream()
        work = issuer.account("work")
        kept, _ = keeping(lab, spare, issuer=issuer, accounts=[work])
        issuer.expire()
        issuer.script += [fault] * 3
        assert [served_by(kept.post()) for _ in range(3)] == ["up0"] * 3
        assert issuer.count() == 1
        assert rules(kept, "work") == ["login-fails"]
        ended = [r for r in kept.history() if r["failover_attempts"]]
        assert [a["endpoint"] for a in ended[0]["attempts"]] == ["work", "up0"]
        lost = kept.account()["needs_login"]
        assert bool(lost) == (fault == "invalid_grant")
        assert not lost or "invalid_grant" in lost
        assert kept.stored()["refresh_token"]

    @pytest.mark.parametrize("fault", ["500", "invalid_grant"])
    def test_a_client_is_told_of_the_only_one_s_failure(
        self, lab: Lab, issuer: Issuer, fault: str
    ) -> None:
        work = issuer.account("work")
        kept, _ = keeping(lab, issuer=issuer, accounts=[work])
        issuer.expire()
        issuer.script += [fault] * 3
        said = own_error(kept.post(), 502, "api_error")  # no 401: it has no login
        assert "work: its login failed" in said
        assert ("needs login" in said) == (fault == "invalid_grant")
        assert kept.post().status in (502, 503)
        assert issuer.count() == 1
        row = kept.history()[0]
        assert (row["status_code"], row["account_used"]) == (502, "work")
        assert row["attempts"][0]["status"] == 401

    def test_a_second_401_is_the_end(self, lab: Lab, issuer: Issuer) -> None:
        kept, served = keeping(
            lab,
            issuer=issuer,
            accounts=[issuer.account("work")],
            answering=says(401),
        )
        check_relayed(kept.post(), 401)
        assert (issuer.count(), calls(served)) == (1, [2])
        assert rules(kept, "work") == ["credential"]

    def test_it_is_renewed_before_it_expires(
        self, lab: Lab, issuer: Issuer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        hurry(monkeypatch)
        soon, late = issuer.account("soon", 200), issuer.account("late", 20_000)
        kept, served = keeping(lab, issuer=issuer, accounts=[soon, late])
        eventually(lambda: kept.account("soon")["token_valid"], "a token")
        eventually(lambda: issuer.count() == 1, "a refresh")
        hours = 7 * 3_600_000
        later_ms = time.time() * 1000 + hours
        eventually(lambda: kept.stored("soon")["expires_at"] > later_ms, "new tokens")
        assert served.requests == []
        assert {served_by(kept.post()) for _ in range(4)} == {"soon", "late"}
        assert issuer.count() == 1


class TestAccountsChange:
    @pytest.fixture
    def quick(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(claude_lb, "WATCH_S", 0.05)
        hurry(monkeypatch)

    def test_by_the_commands(
        self, lab: Lab, issuer: Issuer, tmp_path: Path, quick: None
    ) -> None:
        kept, _ = keeping(lab, issuer=issuer, accounts=[issuer.account("first")])
        commands = Commands(issuer, tmp_path)
        assert served(kept, 2) == ["first"] * 2
        assert commands.add("second", "--mode", "max")[0] == 0
        eventually(lambda: "second" in states(kept), "the second")
        assert set(served(kept, 4)) == {"first", "second"}
        assert commands.run("pause", "first")[0] == 0
        eventually(lambda: not states(kept)["first"].endpoint.enabled, "a pause")
        assert served(kept, 3) == ["second"] * 3
        assert kept.account("first")["paused"] is True
        assert commands.run("resume", "first")[0] == 0
        eventually(lambda: states(kept)["first"].endpoint.enabled, "its end")
        assert set(served(kept, 4)) == {"first", "second"}
        assert commands.run("rename", "second", "other")[0] == 0
        eventually(lambda: "other" in states(kept), "another name")
        assert set(served(kept, 4)) == {"first", "other"}
        assert commands.run("remove", "first")[0] == 0
        eventually(lambda: "first" not in states(kept), "its leave")
        assert served(kept, 3) == ["other"] * 3
        assert kept.account("first") is None

    def test_a_stream_of_a_removed_one_finishes(
        self, lab: Lab, issuer: Issuer, quick: None
    ) -> None:
        turn = lab.gate()
        kept, _ = keeping(
            lab,
            issuer=issuer,
            accounts=[issuer.account("first"), issuer.account("second")],
            answering=by_turns([turn], START),
        )
        client = kept.client().post()
        name = client.head().field("x-claude-lb-endpoint")
        client.until(START)
        kept.book.remove(name)
        eventually(lambda: name not in states(kept), "its leave")
        turn.set()
        assert client.rest() == delta(0) + STOP
        assert kept.last()["account_used"] == name
        other = ({"first", "second"} - {name}).pop()
        assert served(kept, 2) == [other] * 2

    @pytest.mark.parametrize("verb", ["pause", "remove"])
    def test_the_only_one_serves_no_more(
        self, lab: Lab, issuer: Issuer, tmp_path: Path, quick: None, verb: str
    ) -> None:
        work = issuer.account("work")
        kept, served = keeping(lab, issuer=issuer, accounts=[work])
        assert served_by(kept.post()) == "work"
        assert Commands(issuer, tmp_path).run(verb, "work")[0] == 0
        eventually(lambda: kept.post().status == 503, "an end", PROMPT_S)
        calls_before = len(served.requests)
        assert kept.post().status == 503
        assert len(served.requests) == calls_before

    def test_the_only_one_is_paused_by_hand(self, lab: Lab, issuer: Issuer) -> None:
        kept, served = keeping(lab, issuer=issuer, accounts=[issuer.account("solo")])
        assert change(kept, "/api/accounts/solo/pause").status == 200
        assert kept.post().status == 503
        assert change(kept, "/api/accounts/solo/resume").status == 200
        assert served_by(kept.post()) == "solo"
        assert len(served.requests) == 1

    def test_a_new_login_ends_the_trouble(
        self, lab: Lab, issuer: Issuer, tmp_path: Path, quick: None
    ) -> None:
        kept, _ = keeping(lab, issuer=issuer, accounts=[issuer.account("work")])
        commands = Commands(issuer, tmp_path)
        issuer.expire()
        issuer.script.append("invalid_grant")
        own_error(kept.post(), 502, "api_error")
        assert "needs login" in commands.run("list")[1]
        assert commands.add("work", "--mode", "max")[0] == 0
        eventually(lambda: kept.post().status == 200, "a good answer", PROMPT_S)
        assert kept.account()["needs_login"] is None


OPUS = "claude-opus-4-5"


class TestPlansOverSockets:
    def test_opus_needs_max(self, lab: Lab, issuer: Issuer) -> None:
        small = issuer.account("small", plan="pro")
        kept, served = keeping(lab, issuer=issuer, accounts=[small])
        answer = kept.post(message(model=OPUS))
        facts = ("requestedModel", "availableAccounts")
        said = own_error(answer, 403, "permission_error", facts=facts)
        assert said == (
            f"No accounts support the requested model: {OPUS}."
            " Opus requires Max plan accounts."
        )
        document = answer.json()
        assert document["requestedModel"] == OPUS
        (known,) = document["availableAccounts"]
        assert (known["name"], known["plan"]) == ("small", "pro")
        assert known["models"]
        assert served.requests == []
        assert served_by(kept.post(message(model="claude-sonnet-5-5"))) == "small"
        row = kept.history()[0]
        assert (row["status_code"], row["ended"], row["success"]) == (403, "refused", 0)
        assert row["model_asked"] == OPUS

    def test_it_goes_to_who_has_it(self, lab: Lab, issuer: Issuer) -> None:
        plans = {"small": "console", "large": "max", "other": "pro"}
        accounts = [issuer.account(name, plan=p) for name, p in plans.items()]
        kept, _ = keeping(lab, issuer=issuer, accounts=accounts)
        asked = [kept.post(message(model=OPUS)) for _ in range(3)]
        assert [served_by(a) for a in asked] == ["large"] * 3
        others = [kept.post(message(model="claude-haiku-4-5")) for _ in range(3)]
        assert {served_by(a) for a in others} == set(plans)

    def test_least_used(self, lab: Lab, issuer: Issuer) -> None:
        kept, _ = keeping(
            lab,
            issuer=issuer,
            accounts=[issuer.account("a"), issuer.account("b")],
            balancing={"strategy": "least_used"},
        )
        assert collections.Counter(served(kept, 6)) == {"a": 3, "b": 3}
        stats = {a["name"]: a["request_count"] for a in kept.get("/api/accounts")}
        assert stats == {"a": 3, "b": 3}

    def test_the_ticker_begins_windows_where_it_is_wished(
        self, lab: Lab, issuer: Issuer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        hurry(monkeypatch, TICKER_FIRST_S=0.0)
        config, keys = issuer.config, {"clientKeys": [KEY]}
        ticking = {"tickerMinutes": 1, "tickerModel": "claude-haiku-4-5"}
        names = ("one", "two")

        def wished(database: str | None) -> dict[str, Any]:
            raw = config(database)
            raw["accounts"].update(ticking)
            return raw

        monkeypatch.setattr(issuer, "config", wished)
        accounts = [issuer.account(name) for name in names]
        kept, served = keeping(lab, issuer=issuer, accounts=accounts, server=keys)
        lab.counted += 2
        eventually(lambda: len(served.requests) == 2, "two messages")
        assert {json.loads(r.body)["model"] for r in served.requests} == {
            "claude-haiku-4-5"
        }
        key = f"x-api-key: {KEY}"
        eventually(lambda: len(kept.history(key)) == 2, "two rows")
        assert {row["account_used"] for row in kept.history(key)} == set(names)
        assert all(a["windowActive"] for a in kept.get("/api/accounts", key))
        assert len(served.requests) == 2

    def test_windows(self, lab: Lab, issuer: Issuer) -> None:
        """Unstarted first, then near its reset; what was counted outlives a stop."""
        names = ("young", "old", "new")
        accounts = [issuer.account(name) for name in names]
        again = partial(keeping, lab, issuer=issuer, balancing={"strategy": "window"})
        kept, _ = again(accounts=accounts)
        kept.stop()
        with contextlib.closing(sqlite3.connect(kept.path)) as db, db:
            for name, hours in (("young", 1), ("old", 4.5)):
                begun = int((time.time() - hours * 3600) * 1000)
                db.execute(
                    "UPDATE accounts SET usage_window_start=?,"
                    " usage_window_requests=3 WHERE name=?",
                    (begun, name),
                )
        kept, _ = again()
        assert served(kept, 3) == ["new", "old", "old"]
        shown = {a["name"]: a for a in kept.get("/api/accounts")}
        assert [shown[n]["requestsInWindow"] for n in names] == [3, 5, 1]
        assert all(shown[n]["windowActive"] for n in names)
        assert shown["old"]["timeUntilReset"] <= 1_800_000


# -- history ---------------------------------------------------------------


class TestHistory:
    def test_a_whole_answer(self, lab: Lab) -> None:
        usage = {"input_tokens": 1000, "output_tokens": 200}
        kept = keeping(lab, lab.upstream(told(saying(usage))))
        body = message(model="claude-sonnet-5-5", metadata={"user_id": "canary-u"})
        answer = kept.post(body, session(1))
        row = kept.last()
        assert row["id"] == answer.field("x-claude-lb-request-id")
        assert (row["method"], row["path"]) == ("POST", "/v1/messages")
        assert (row["account_used"], row["status_code"]) == ("up0", 200)
        assert (row["success"], row["ended"], row["stream"]) == (1, "ok", 0)
        assert counts_of(row)[:2] == (1000, 200)
        assert row["model_used"] == DATED_MODEL
        assert row["model_asked"] == "claude-sonnet-5-5"
        found = Usage(1000, 200)
        at_s = row["timestamp"] / 1000
        assert row["cost_usd"] == about(cost(DATED_MODEL, found, at_s) or 0.0)
        assert row["request_bytes"] == len(body)
        assert row["response_bytes"] >= len(answer.body)
        assert 0 <= row["first_byte_ms"] <= row["response_time_ms"] + 1
        assert abs(row["timestamp"] / 1000 - time.time()) < BOUND_S
        assert row["failover_attempts"] == 0
        assert [a["endpoint"] for a in row["attempts"]] == ["up0"]
        assert re.fullmatch("[0-9a-f]{16,64}", row["conversation"])
        assert "canary-u" not in str(row)
        assert "conversation-1" not in str(row)

    def test_a_stream_s_usage_is_the_last_value(self, lab: Lab) -> None:
        parts = [started(FIRST), TEXT, changed({"output_tokens": 50}), changed(LAST)]
        kept = keeping(lab, lab.upstream(streams(*parts, STOP_EVENT)))
        kept.post(message(stream=True))
        row = kept.last()
        assert counts_of(row) == (9, 77, 6, 10, 20)
        assert (row["ended"], row["stream"]) == ("ok", 1)
        assert row["model_used"] == DATED_MODEL

    def test_each_ending_is_one_row(self, lab: Lab) -> None:
        gate = lab.gate()
        usage = {"input_tokens": 7, "output_tokens": 3}

        def stuck(wire: Wire, _: Received) -> None:
            wire.stream(started(usage), TEXT, end=False)
            assert gate.wait(BOUND_S)

        def cut(wire: Wire, _: Received) -> None:
            wire.stream(started(usage), TEXT, end=False)
            raise HungUpError

        steps = in_turn(told(saying(usage)), says(500), cut, stuck)
        kept = keeping(lab, lab.upstream(steps))
        assert kept.post().status == 200
        assert kept.post().status == 500
        later(kept, 3600)
        client = kept.client().post()
        client.head()
        client.cut()
        later(kept, 3600)
        hang_up_after(kept, TEXT)
        eventually(lambda: len(kept.history()) == 4, "the fourth row", PROMPT_S)
        assert change(kept, "/api/endpoints/up0/pause").status == 200
        own_error(kept.post(), 503, "overloaded_error")
        rows = kept.history()
        wanted = ["ok", "upstream_error", "truncated", "client_cancelled", "refused"]
        assert [row["ended"] for row in rows] == wanted
        assert [row["success"] for row in rows] == [1, 0, 0, 0, 0]
        assert [counts_of(row)[0] for row in rows] == [7, None, 7, 7, None]
        assert [row["stream"] for row in rows] == [0, 0, 1, 1, 0]
        assert [row["account_used"] for row in rows] == ["up0"] * 4 + [None]
        assert all(row["error_message"] for row in rows[1:])
        assert rows[1]["first_byte_ms"] is not None
        assert rows[4]["first_byte_ms"] is None
        assert rows[4]["attempts"] == []
        assert [row["id"] for row in rows] == [
            line["request_id"] for line in kept.rows(5)
        ]
        totals = kept.get("/api/analytics?range=1h")["totals"]
        assert (totals["requests"], totals["cancelled"], totals["errors"]) == (5, 1, 3)

    def test_attempts_after_a_failover(self, lab: Lab) -> None:
        ups = lab.upstream(says(503)), lab.upstream(limited(30)), lab.upstream()
        kept = keeping(lab, *ups)
        assert served_by(kept.post()) == "up2"
        row = kept.last()
        tried = [(a["endpoint"], a["status"], a["reason"]) for a in row["attempts"]]
        names = ["up0", "up1", "up2"]
        assert [t[:2] for t in tried] == list(zip(names, (503, 429, 200)))
        assert tried[0][2] == "server-error"
        assert all(a["ms"] >= 0 for a in row["attempts"])
        assert (row["failover_attempts"], row["account_used"]) == (2, "up2")
        totals = kept.get("/api/analytics?range=1h")["totals"]
        assert (totals["requests"], totals["failovers"]) == (1, 2)

    def test_a_row_is_there_at_once(self, lab: Lab) -> None:
        kept = keeping(lab, lab.upstream())
        for number in range(10):
            answer = kept.post()
            rows = kept.history()
            assert len(rows) == number + 1
            assert rows[-1]["id"] == answer.field("x-claude-lb-request-id")

    @pytest.mark.parametrize("stream", [False, True])
    def test_a_compressed_answer_is_untouched(self, lab: Lab, stream: bool) -> None:
        usage = {"input_tokens": 7, "output_tokens": 3}
        whole = STREAM if stream else saying(usage)
        data = gzip.compress(whole)
        kind = "text/event-stream" if stream else "application/json"
        fields = ("content-encoding: gzip", f"content-type: {kind}")
        kept = keeping(lab, lab.upstream(told(data, *fields)))
        answer = kept.post(None, "accept-encoding: gzip")
        assert (answer.status, answer.body) == (200, data)
        assert answer.field("content-encoding") == "gzip"
        assert answer.field("content-length") == str(len(data))
        row = kept.last()
        assert counts_of(row) == (None,) * 5
        assert (row["cost_usd"], row["ended"]) == (None, "ok")
        assert row["stream"] == stream

    def test_the_sums_are_the_upstream_s(self, lab: Lab) -> None:
        chance, sums, costs = random.Random(4), [0] * 5, [0.0]

        def answers(wire: Wire, _: Received) -> None:
            counts = [chance.randrange(10_000) for _ in range(5)]
            usage = {
                "input_tokens": counts[0],
                "output_tokens": counts[1],
                "cache_read_input_tokens": counts[2],
                "cache_creation_input_tokens": counts[3] + counts[4],
                "cache_creation": {
                    "ephemeral_5m_input_tokens": counts[3],
                    "ephemeral_1h_input_tokens": counts[4],
                },
            }
            first = {**usage, "output_tokens": 1}
            if chance.random() < 0.2:
                # What it has made is not known, so its cost is not either
                sums[:] = map(sum, zip(sums, [counts[0], 0, *counts[2:]]))
                wire.stream(started(first), TEXT, end=False)
                raise HungUpError
            sums[:] = map(sum, zip(sums, counts))
            found = Usage(counts[0], counts[1], counts[2], counts[3], counts[4])
            costs[0] += cost(DATED_MODEL, found, time.time()) or 0.0
            if chance.random() < 0.5:
                wire.answer(200, saying(usage))
            else:
                wire.stream(started(first), TEXT, changed(usage), STOP_EVENT)

        kept = keeping(lab, lab.upstream(answers))
        for _ in range(40):
            later(kept, 600)
            with contextlib.suppress(CutError, ConnectionResetError):
                assert kept.post().status == 200
        rows = kept.history()
        assert len(rows) == 40
        assert {row["ended"] for row in rows} == {"ok", "truncated"}
        found = [counts_of(row) for row in rows]
        assert [sum(filter(None, column)) for column in zip(*found)] == sums
        breakdown = kept.get("/api/stats")["tokenBreakdown"]
        names = ("inputTokens", "outputTokens", "cacheReadInputTokens")
        more = ("cacheCreation5mInputTokens", "cacheCreation1hInputTokens")
        assert [breakdown[name] for name in (*names, *more)] == sums
        cut = [row for row in rows if row["ended"] == "truncated"]
        assert {row["cost_usd"] for row in cut} == {None}
        whole = sum(row["cost_usd"] for row in rows if row not in cut)
        assert whole == pytest.approx(costs[0], abs=1e-9)
        assert kept.get("/api/stats")["totalCostUsd"] == pytest.approx(whole, abs=1e-6)


# -- API -------------------------------------------------------------------

DAYS = {"1h": 60, "6h": 72, "24h": 24, "7d": 168, "30d": 30}


class TestApi:
    def test_stats(self, lab: Lab) -> None:
        usage = {"input_tokens": 10, "output_tokens": 5}
        ups = lab.upstream(told(saying(usage))), lab.upstream(says(400))
        kept = keeping(lab, *ups)
        empty = kept.get("/api/stats")
        assert (empty["totalRequests"], empty["successRate"]) == (0, 0)
        assert sorted(kept.post().status for _ in range(4)) == [200, 200, 400, 400]
        stats = kept.get("/api/stats")
        wanted = "totalRequests successRate activeAccounts avgResponseTime totalTokens"
        wanted += " totalCostUsd topModels avgTokensPerSecond accounts recentErrors"
        assert not set(wanted.split()) - set(stats)
        assert (stats["totalRequests"], stats["successRate"]) == (4, 50)
        assert stats["totalTokens"] == 30
        names = {a["name"]: a["requestCount"] for a in stats["accounts"]}
        assert names == {"up0": 2, "up1": 2}
        assert len(stats["recentErrors"]) == 2
        assert stats["topModels"][0]["count"] == 2
        assert change(kept, "/api/stats/reset").json()["success"] is True
        assert kept.get("/api/stats")["totalRequests"] == 0
        assert kept.get("/api/requests") == []
        assert kept.post().status in (200, 400)
        assert kept.get("/api/stats")["totalRequests"] == 1

    def test_accounts(self, lab: Lab, issuer: Issuer) -> None:
        accounts = [issuer.account("work"), issuer.account("idle", paused=True)]
        kept, _ = keeping(lab, issuer=issuer, accounts=accounts)
        kept.post()
        work, idle = kept.get("/api/accounts")
        wanted = "name request_count last_used usage_window_start"
        wanted += " usage_window_requests plan_type token_valid windowActive"
        wanted += " windowStarted windowEnds requestsInWindow timeUntilReset"
        wanted += " supported_models id created paused tokenStatus tokenExpiresAt"
        assert not set(wanted.split()) - set(work)
        assert (work["name"], work["request_count"], work["paused"]) == (
            *("work", 1),
            False,
        )
        assert (work["windowActive"], work["requestsInWindow"]) == (True, 1)
        assert (work["token_valid"], work["tokenStatus"]) == (1, "valid")
        assert (idle["paused"], idle["request_count"]) == (True, 0)
        assert (idle["last_used"], idle["timeUntilReset"]) == (None, None)
        assert CANARY not in json.dumps([work, idle])

    def test_requests_limit(self, lab: Lab) -> None:
        kept = keeping(lab, lab.upstream())
        for _ in range(3):
            kept.post()
        assert len(kept.get("/api/requests")) == 3
        assert len(kept.get("/api/requests?limit=1")) == 1
        assert len(kept.get("/api/requests?limit=2")) == 2
        assert len(kept.get("/api/requests?limit=1000")) == 3
        odd = ("0", "1001", "abc", "-1", "", "1.5", "%31%20", "1e3", "9" * 400)
        found = {text: kept.ask("GET", f"/api/requests?limit={text}") for text in odd}
        kept._lab.counted -= sum(a.status == 200 for a in found.values())
        assert {t: a.status for t, a in found.items()} == dict.fromkeys(odd, 400)
        assert kept.post().status == 200  # it is alive

    def test_analytics_ranges(self, lab: Lab) -> None:
        usage = {"input_tokens": 10, "output_tokens": 5, "cache_read_input_tokens": 30}
        kept = keeping(lab, lab.upstream(told(saying(usage))))
        kept.post()
        assert kept.get("/api/analytics")["meta"]["range"] == "24h"
        for span, buckets in DAYS.items():
            document = kept.get(f"/api/analytics?range={span}")
            assert document["meta"]["range"] == span
            series = document["timeSeries"]
            assert len(series) == buckets
            assert series[-1]["requests"] + series[-2]["requests"] == 1
            assert sum(entry["tokens"] for entry in series) == 45
            assert document["totals"]["requests"] == 1
            assert document["totals"]["cacheHitRate"] == 75.0
            assert document["totals"]["firstByteP50Ms"] is not None
            assert [a["name"] for a in document["accountPerformance"]] == ["up0"]
            assert list(document["byModel"]) == [DATED_MODEL]
            (priced,) = document["costByModel"]
            assert priced["costUsd"] > 0
        only = kept.get("/api/analytics?range=1h&endpoint=nobody")
        assert only["totals"]["requests"] == 0
        for bad in ("2h", "", "24H", "1h;drop"):
            answer = kept.ask("GET", f"/api/analytics?range={bad}")
            kept._lab.counted -= answer.status == 200
            assert answer.status == 400, bad

    def test_configuration(self, lab: Lab) -> None:
        kept = keeping(lab, lab.upstream(), lab.upstream())
        before = kept.get("/api/config")
        assert before["load_balance_strategy"] == before["lb_strategy"]
        assert before["port"] == kept.port
        assert before["sessionDurationMs"] == 18_000_000
        body = {"key": "load_balance_strategy", "value": "least_used"}
        answer = change(kept, "/api/config", json.dumps(body).encode())
        assert (answer.status, answer.json()) == (200, {"success": True, **body})
        assert kept.get("/api/config/strategy")["strategy"] == "least_used"
        answer = change(kept, "/api/config/strategy", b'{"strategy": "priority"}')
        assert answer.json() == {"success": True, "strategy": "priority"}
        assert kept.get("/api/config")["lb_strategy"] == "priority"
        assert kept.server.config.balancing.strategy == "priority"
        for bad in (b"", b"{", b"[]", b'{"key": "port", "value": 1}', b'{"key": 1}'):
            assert change(kept, "/api/config", bad, JSON_TYPE).status == 400
        for bad in (b"", b"{}", b'{"strategy": "x"}', b'{"strategy": [1]}'):
            path = "/api/config/strategy"
            assert change(kept, path, bad, JSON_TYPE).status == 400
        assert set(served(kept, 2)) <= {"up0", "up1"}

    def test_accounts_change_by_hand(self, lab: Lab, issuer: Issuer) -> None:
        accounts = [issuer.account(name) for name in "abc"]
        kept, _ = keeping(lab, issuer=issuer, accounts=accounts)
        body = b'{"oldName": "a", "newName": "x"}'
        answer = change(kept, "/api/rename-account", body)
        assert (answer.status, answer.json()["newName"]) == (200, "x")
        assert change(kept, "/api/accounts/b/rename", b'{"name": "y"}').status == 200
        assert set(served(kept, 3)) == {"x", "y", "c"}
        assert change(kept, "/api/accounts/x/pause").json()["success"] is True
        assert set(served(kept, 4)) == {"y", "c"}
        assert kept.account("x")["paused"] is True
        assert change(kept, "/api/accounts/x/resume").status == 200
        assert set(served(kept, 3)) == {"x", "y", "c"}
        gone = "/api/accounts/y"
        for bad in (b"", b"{}", b'{"confirm": "x"}', b'{"confirm": true}'):
            answer = kept.ask("DELETE", gone, bad, JSON_TYPE)
            assert answer.status == 400, bad
            if bad[1:2] not in (b"", b""):
                assert "confirm" in answer.json()["error"]["message"]
        assert kept.account("y") is not None
        answer = kept.ask("DELETE", gone, b'{"confirm": "y"}', JSON_TYPE, counts=0)
        assert (answer.status, answer.json()["success"]) == (200, True)
        assert set(served(kept, 4)) == {"x", "c"}
        assert [a["name"] for a in kept.get("/api/accounts")].count("y") == 0

    def test_unknown_and_unfit_names(self, lab: Lab, issuer: Issuer) -> None:
        accounts = [issuer.account(name) for name in "ab"]
        kept, _ = keeping(lab, issuer=issuer, accounts=accounts)
        for verb in ("pause", "resume"):
            assert change(kept, f"/api/accounts/nobody/{verb}").status == 404
        path = "/api/accounts/nobody/rename"
        assert change(kept, path, b'{"name": "z"}').status == 404
        path = "/api/accounts/nobody"
        assert kept.refused("DELETE", path, body=b'{"confirm": "nobody"}') == 404
        path = "/api/rename-account"
        unknown = b'{"oldName": "nobody", "newName": "z"}'
        assert change(kept, path, unknown).status == 404
        for new in ('"b"', '""', '"a b"', '"-x"', "1", "null"):
            body = b'{"oldName": "a", "newName": %b}' % new.encode()
            assert change(kept, path, body).status == 400, new
        assert {a["name"] for a in kept.get("/api/accounts")} == {"a", "b"}

    @pytest.mark.parametrize(
        ("method", "path", "allow"),
        [
            ("POST", "/api/stats", "GET, HEAD, OPTIONS"),
            ("DELETE", "/api/requests", "GET, HEAD, OPTIONS"),
            ("POST", "/api/requests/stream", "GET, HEAD, OPTIONS"),
            ("PUT", "/api/config", "POST, GET, HEAD, OPTIONS"),
            ("GET", "/api/stats/reset", "POST, OPTIONS"),
            ("GET", "/api/accounts/a/pause", "POST, DELETE, OPTIONS"),
            ("GET", "/api/accounts/a", "DELETE, OPTIONS"),
            ("GET", "/api/rename-account", "POST, OPTIONS"),
        ],
    )
    def test_other_methods(self, lab: Lab, method: str, path: str, allow: str) -> None:
        kept = keeping(lab, lab.upstream())
        answer = kept.ask(method, path)
        assert answer.status == 405
        shown = set(answer.field("allow").split(", "))
        assert shown == set(allow.split(", ")) or shown == set(
            allow.replace("DELETE, ", "").split(", ")
        )

    def test_a_proxy_without_accounts(self, lab: Lab) -> None:
        kept = keeping(lab, lab.upstream())
        assert kept.get("/api/accounts") == []
        assert change(kept, "/api/accounts/a/pause").status == 404
        assert (
            kept.refused("DELETE", "/api/accounts/a", body=b'{"confirm": "a"}') == 404
        )

    def test_reading_needs_a_client_key(self, lab: Lab) -> None:
        kept = keeping(lab, lab.upstream(), server={"clientKeys": [KEY]})
        key = f"x-api-key: {KEY}"
        for path in GET_PATHS:
            assert kept.refused("GET", path) == 401, path
        client = kept.client().ask("GET", "/api/requests/stream")
        assert client.head().status == 401
        for path in GET_PATHS:
            kept.get(path, key)
        assert kept.refused("GET", "/api/stats", "Host: rebound.example") == 421
        assert (
            kept.refused("GET", "/api/stats", key, "Origin: https://x.example") == 403
        )
        client = kept.client().ask("GET", "/api/requests/stream", b"", key, counts=0)
        assert client.head().status == 200

    def test_changing_needs_more(self, lab: Lab, issuer: Issuer) -> None:
        accounts = [issuer.account(name) for name in "ab"]
        kept, _ = keeping(
            lab,
            issuer=issuer,
            accounts=accounts,
            server={"clientKeys": [KEY], "adminKey": ADMIN},
        )
        for method, path, body in KEPT_CHANGES:
            for fields in ([], [f"x-api-key: {KEY}"], [f"x-api-key: {ADMIN[1:]}"]):
                assert kept.refused(method, path, *fields, body=body) == 401, path
            for field in WEB_PAGES:
                admin = f"x-api-key: {ADMIN}"
                assert kept.refused(method, path, admin, field, body=body) == 403
        admin = f"x-api-key: {ADMIN}"
        assert [
            a["paused"] for a in kept.get("/api/accounts", f"x-api-key: {KEY}")
        ] == [*(False, False)]
        assert change(kept, "/api/accounts/a/pause", b"", admin).status == 200

    def test_without_an_admin_key_this_machine_changes(self, lab: Lab) -> None:
        kept = keeping(lab, lab.upstream(), server={"clientKeys": [KEY]})
        key, far_away = f"x-api-key: {KEY}", "X-Forwarded-For: 10.0.0.1"
        body = b'{"strategy": "priority"}'
        path = "/api/config/strategy"
        assert kept.refused("POST", path, body=body) == 401
        assert kept.refused("POST", path, key, far_away, body=body) == 403
        assert (
            kept.refused("POST", path, key, "content-type: text/plain", body=body)
            == 415
        )
        assert change(kept, path, body, key).status == 200
        for field in WEB_PAGES:
            assert kept.refused("POST", path, key, field, body=body) == 403


GET_PATHS = (
    *("/status", "/providers", "/api/stats", "/api/accounts", "/api/requests"),
    *("/api/analytics", "/api/config", "/api/config/strategy"),
)
WEB_PAGES = (
    *("Origin: https://evil.example", "Origin: null", "Sec-Fetch-Site: cross-site"),
)
KEPT_CHANGES = (
    ("POST", "/api/config", b'{"key": "lb_strategy", "value": "priority"}'),
    ("POST", "/api/config/strategy", b'{"strategy": "priority"}'),
    ("POST", "/api/stats/reset", b""),
    ("POST", "/api/accounts/a/pause", b""),
    ("POST", "/api/accounts/a/resume", b""),
    ("POST", "/api/accounts/a/rename", b'{"name": "z"}'),
    ("POST", "/api/rename-account", b'{"oldName": "a", "newName": "z"}'),
    ("DELETE", "/api/accounts/a", b'{"confirm": "a"}'),
)


def listener(kept: Kept) -> Client:
    """Return who listens to /api/requests/stream, after its first event."""
    client = kept.client().ask("GET", "/api/requests/stream", counts=0)
    head = client.head()
    assert (head.status, head.field("content-type")) == (200, "text/event-stream")
    assert client.until(b"\n\n") == b"event: connected\ndata: {}\n\n"
    return client


def heard(client: Client) -> tuple[str, Any]:
    """Return the next event's name and its data."""
    text = client.until(b"\n\n").decode()
    found = re.fullmatch(r"event: (\w+)\ndata: (.*)\n\n", text)
    assert found, text
    data = json.loads(found[2])
    assert data["type"] == found[1]
    return found[1], data


class TestRequestStream:
    def test_start_and_end(self, lab: Lab) -> None:
        usage = {"input_tokens": 3, "output_tokens": 2}
        kept = keeping(lab, lab.upstream(told(saying(usage))))
        first, second = listener(kept), listener(kept)
        answer = kept.post(message(model="claude-sonnet-5-5"))
        for client in (first, second):
            name, start = heard(client)
            assert (name, start["method"], start["path"]) == (
                *("start", "POST"),
                "/v1/messages",
            )
            assert start["model"] == "claude-sonnet-5-5"
            name, end = heard(client)
            assert (name, end["id"]) == ("end", start["id"])
            assert start["id"] == answer.field("x-claude-lb-request-id")
            row = kept.last()
            assert {k: end[k] for k in row} == row
        first.close()
        kept.post()
        assert [heard(second)[0] for _ in range(2)] == ["start", "end"]

    def test_each_exchange_in_its_order(self, lab: Lab) -> None:
        kept = keeping(lab, lab.upstream(), lab.upstream(says(500)))
        client = listener(kept)
        with ThreadPoolExecutor(8) as crowd:
            asked = [crowd.submit(kept.post) for _ in range(40)]
            ids = {a.result().field("x-claude-lb-request-id") for a in asked}
        began: set[str] = set()
        ended: list[str] = []
        while len(ended) < 40:
            name, data = heard(client)
            assert (data["id"] in began) == (name == "end")
            began.add(data["id"])
            if name == "end":
                ended.append(data["id"])
        assert set(ended) == began == ids

    def test_the_ninth_is_refused(self, lab: Lab) -> None:
        kept = keeping(lab, lab.upstream())
        clients = [listener(kept) for _ in range(8)]
        ninth = kept.client().ask("GET", "/api/requests/stream", counts=0)
        assert ninth.head().status == 503
        assert "8" in json.loads(ninth.rest())["error"]["message"]
        assert kept.post().status == 200
        assert {heard(client)[0] for client in clients} == {"start"}
        clients[0].close()
        eventually(
            lambda: not all(x.is_there() for x in kept.server.chronicle._listeners),
            "its leave",
        )
        clients.append(listener(kept))

    def test_a_slow_one_is_dropped(
        self, lab: Lab, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(claude_lb, "SHARED_BYTES", 200_000)
        kept = keeping(lab, lab.upstream())
        chronicle, relay = kept.server.chronicle, kept.server.relay
        slow, quick = listener(kept), listener(kept)
        facts = {"text": "x" * 50_000}
        for _ in range(2000):
            relay.tell(partial(chronicle._say, "start", facts))
            assert heard(quick)[0] == "start"
            if sum(x.is_there() for x in chronicle._listeners) == 1:
                break
        else:
            pytest.fail("the slow one is still there")
        assert kept.post().status == 200
        assert [heard(quick)[0] for _ in range(2)] == ["start", "end"]
        with pytest.raises((CutError, ConnectionResetError)):
            slow.rest()

    def test_a_stop_ends_it(self, lab: Lab) -> None:
        kept = keeping(lab, lab.upstream())
        clients = [listener(kept) for _ in range(3)]
        lab.thread(lambda: kept.server.stop(grace_s=10 * BOUND_S))
        lab.stopped(kept)
        for client in clients:
            assert client.rest() == b""
            assert client.ends() == "closed"

    def test_a_quiet_one_is_kept_open(
        self, lab: Lab, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        hurry(monkeypatch, PING_S=0.05)
        client = listener(keeping(lab, lab.upstream()))
        assert client.until(b"\n\n") == b": ping\n\n"


# -- the program -----------------------------------------------------------


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def ask_program(port: int, *fields: tuple[str, str], body: bytes = b"") -> int:
    """Post a message to a program of its own; return the status."""
    line = http.client.HTTPConnection("127.0.0.1", port, timeout=LIMIT_S)
    try:
        line.request("POST", "/v1/messages", body or message(), dict(fields))
        answer = line.getresponse()
        answer.read()
        return answer.status
    finally:
        line.close()


@at_both_ends
class TestProgramHistory:
    def test_a_new_database(self, program: Program) -> None:
        runs = [program.run(*line) for line in (["stats"], ["analyze"])]
        assert [run.code for run in runs] == [0, 0], runs
        assert runs[0].out.startswith("total")
        assert "idx_requests_timestamp" in runs[1].out
        run = program.run("stats", "--range", "24h", "--json")
        assert json.loads(run.out)["totals"]["requests"] == 0
        assert all(run.err == "" for run in runs)
        assert not (program.folder / ".local").exists()
        for bad in (["stats", "--range", "2h"], ["stats", "extra"], ["analyse"]):
            with pytest.raises(SystemExit) as ended:
                claude_lb.main(bad)
            assert ended.value.code == 2

    def test_what_served_is_told(self, program: Program, lab: Lab) -> None:
        usage = {"input_tokens": 3, "output_tokens": 2}
        up = lab.upstream(told(saying(usage)))
        program.write("endpoints.json", {"endpoints": [near(up.port, name="up")]})
        port = free_port()
        with program.serve(PORT=str(port)) as serving:
            assert serving.port == port
            assert [ask_program(port) for _ in range(2)] == [200, 200]
            shown = serving.get("/api/requests")[1]
            run = program.run("stats", "--json")  # beside the running one
            assert json.loads(run.out)["totalRequests"] == 2
            assert serving.stop().code == 0
        run = program.run("stats", "--range", "24h", "--json")
        assert run.code == 0
        document = json.loads(run.out)
        assert (document["totals"]["requests"], document["totals"]["tokens"]) == (2, 10)
        table = program.run("stats", "--range", "24h").out
        assert re.search(r"(?m)^up +2 ", table)
        assert DATED_MODEL in table
        found = json.loads(program.run("analyze", "--json").out)
        assert found["rows"]["requests"] == len(shown) == 2
        path = program.folder / ".local/state/claude-lb/claude_lb.db"
        assert found["file"] == str(path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700

    def test_the_accounts_are_the_pool(self, program: Program, issuer: Issuer) -> None:
        path = program.folder / "xdg-state/claude-lb/claude_lb.db"
        book = AccountBook(str(path), issuer.settings(), Lines())
        state = {"XDG_STATE_HOME": str(program.folder / "xdg-state")}
        run = program.run("--check", **state)
        assert run.code == 2
        book.add(issuer.account("work"))
        book.add(issuer.account("home", plan="pro"))
        run = program.run("--check", **state)
        assert run.code == 0, run
        assert "balancing: least_used" in run.out
        assert re.search(r"endpoint work: \S+ oauth \*\*\* plan max", run.out)
        assert re.search(r"endpoint home: \S+ oauth \*\*\* plan pro", run.out)
        assert CANARY not in run.out + run.err
        with program.serve("--port", "0", **state) as serving:
            status, found = serving.get("/api/accounts")
            assert (status, {a["name"] for a in found}) == (200, {"work", "home"})
            assert serving.get("/api/config")[1]["lb_strategy"] == "least_used"
            assert serving.stop().code == 0

    def test_a_history_in_memory(self, program: Program, lab: Lab) -> None:
        listed = {"endpoints": [near(lab.upstream().port)]}
        program.write("endpoints.json", {**listed, "storage": {"database": None}})
        run = program.run("--check")
        assert "history: in memory" in run.out
        for command in (["stats"], ["accounts", "list"]):
            run = program.run(*command)
            assert (run.code, run.out) == (2, ""), command
            assert "storage.database is null" in run.err
        with program.serve("--port", "0") as serving:
            assert ask_program(serving.port) == 200
            assert serving.get("/api/stats")[1]["totalRequests"] == 1
        assert not list(program.folder.rglob("*.db"))

    def test_a_damaged_database_is_told(self, program: Program) -> None:
        text = "no database at all " * 500
        program.write(".local/state/claude-lb/claude_lb.db", text)
        for command in (["analyze"], ["accounts", "list"]):
            run = program.run(*command)
            assert (run.code, run.out) == (1, ""), command
            assert "Traceback" not in run.err


# -- faults of the store ---------------------------------------------------


def history_health(kept: Kept) -> Any:
    return kept.ask("GET", "/health", counts=0).json()["history"]


class Full:
    """Opens databases that can be told to grow no more."""

    def __init__(self) -> None:
        self.full = False

    def __call__(self, path: str) -> sqlite3.Connection:
        db = claude_lb.open_database(path)
        if self.full:
            (pages,) = db.execute("PRAGMA page_count").fetchone()
            db.execute(f"PRAGMA max_page_count = {pages}")
        return db


class TestStoreFaultsOverSockets:
    @pytest.fixture(autouse=True)
    def quick(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(claude_lb, "HISTORY_RETRY_S", 0.05)
        monkeypatch.setattr(claude_lb, "FLUSH_S", 0.2)

    def test_a_folder_that_cannot_be_written(self, lab: Lab) -> None:
        (lab._folder / "state").write_text("a file where the folder should be")
        kept = keeping(lab, lab.upstream())
        assert [kept.post().status for _ in range(3)] == [200] * 3
        found = eventually(
            lambda: (h := history_health(kept))["state"] == "failing" and h, "a word"
        )
        assert found["why"]
        assert (found["waiting"], found["dropped"]) == (3, 0)
        assert kept.get("/api/requests") == []  # none is there yet
        (lab._folder / "state").unlink()
        eventually(lambda: history_health(kept)["state"] == "ok", "its end")
        assert len(kept.history()) == 3
        said = [x for x in kept.lines() if "rows cannot be written" in str(x)]
        assert len(said) == 1

    def test_a_read_only_folder(self, lab: Lab) -> None:
        folder = lab._folder / "state"
        folder.mkdir()
        folder.chmod(0o500)
        if os.access(folder, os.W_OK):
            folder.chmod(0o700)
            pytest.skip("this user may write everywhere")
        kept = keeping(lab, lab.upstream())
        assert [kept.post().status for _ in range(3)] == [200] * 3
        eventually(lambda: history_health(kept)["state"] == "failing", "a word")
        folder.chmod(0o700)
        eventually(lambda: history_health(kept)["state"] == "ok", "its end")
        assert len(kept.history()) == 3

    def test_deleted_while_it_runs(self, lab: Lab, issuer: Issuer) -> None:
        kept, _ = keeping(lab, issuer=issuer, accounts=[issuer.account("work")])
        kept.post()
        assert len(kept.history()) == 1
        for path in kept.path.parent.glob("lb.db*"):
            if path.suffix in ("", ".db") or path.name.endswith(("-wal", "-shm")):
                path.unlink()
        for _ in range(3):
            assert served_by(kept.post()) == "work"
        eventually(lambda: kept.history()[-1]["account_used"] == "work", "rows")
        assert kept.stored()["refresh_token"] in issuer.live
        assert kept.account()["token_valid"] == 1
        assert history_health(kept)["state"] == "ok"
        assert len(kept.history()) == 3
        assert stat.S_IMODE(kept.path.stat().st_mode) == 0o600

    @pytest.mark.parametrize("spoil", ["header", "page", "empty"])
    def test_corrupt_at_the_start(self, lab: Lab, issuer: Issuer, spoil: str) -> None:
        kept, _ = keeping(lab, issuer=issuer, accounts=[issuer.account("work")])
        kept.post()
        kept.stop()
        data = bytearray(kept.path.read_bytes())
        if spoil == "header":
            data[:100] = b"garbage " * 12 + b"...."
        elif spoil == "page":
            data[4096:] = os.urandom(len(data) - 4096)
        kept.path.write_bytes(b"" if spoil == "empty" else data)
        kept, _ = keeping(lab, issuer=issuer)
        assert served_by(kept.post()) == "work"
        assert kept.last()["account_used"] == "work"
        assert history_health(kept)["state"] == "ok"
        aside = [p for p in kept.path.parent.iterdir() if "corrupt" in p.name]
        assert bool(aside) == (spoil != "empty")
        assert all(stat.S_IMODE(p.stat().st_mode) == 0o600 for p in aside)
        told_of = "damaged" in kept.log() or "restored" in kept.log()
        assert told_of

    def test_a_later_version_s_file_is_left_alone(self, lab: Lab) -> None:
        path = lab._folder / "state" / "lb.db"
        path.parent.mkdir()
        with contextlib.closing(sqlite3.connect(path)) as db:
            db.execute("PRAGMA user_version = 99")
        before = path.read_bytes()
        kept = keeping(lab, lab.upstream())
        assert [kept.post().status for _ in range(3)] == [200] * 3
        assert len(kept.history()) == 3  # in memory
        found = history_health(kept)
        assert found["state"] == "failing"
        assert "in memory" in found["why"]
        assert path.read_bytes() == before

    def test_a_locked_file(self, lab: Lab) -> None:
        kept = keeping(lab, lab.upstream())
        kept.post()
        assert len(kept.history()) == 1
        with contextlib.closing(sqlite3.connect(kept.path)) as db:
            db.execute("BEGIN EXCLUSIVE")
            assert [kept.post().status for _ in range(20)] == [200] * 20
            assert len(kept.history()) == 1
            assert history_health(kept)["dropped"] == 0
            db.rollback()
        eventually(lambda: len(kept.history()) == 21, "the rows")
        assert history_health(kept)["state"] == "ok"

    def test_a_full_disk(self, lab: Lab, issuer: Issuer) -> None:
        disk = Full()
        kept, _ = keeping(
            lab,
            issuer=issuer,
            accounts=[issuer.account("work")],
            store={"connect": disk},
        )
        kept.post()
        kept.history()
        disk.full = True
        kept.server.relay.tell(kept.store._place.leave)
        eventually(lambda: kept.store._place._db is None, "a new connection")
        asked = 0
        while history_health(kept)["state"] == "ok":
            assert kept.post(message(), session("x" * 200)).status == 200
            asked += 1
            assert asked < 2000
            kept.store.flush(0.2)
        assert [kept.post().status for _ in range(5)] == [200] * 5
        found = history_health(kept)
        assert "full" in found["why"]
        assert found["dropped"] == 0
        eventually(lambda: history_health(kept)["waiting"] >= 5, "rows that wait")
        assert kept.get("/api/accounts")[0]["name"] == "work"
        disk.full = False
        eventually(lambda: history_health(kept)["state"] == "ok", "room")
        assert len(kept.history()) == min(1000, asked + 6)
        assert history_health(kept)["waiting"] == 0


@at_both_ends
class TestKill:
    def test_rows_that_were_shown_outlive_a_kill(
        self, lab: Lab, program: Program
    ) -> None:
        up = lab.upstream(told(saying({"input_tokens": 3, "output_tokens": 2})))
        program.write("endpoints.json", {"endpoints": [near(up.port, name="up")]})
        path = program.folder / ".local/state/claude-lb/claude_lb.db"
        shown: set[str] = set()
        for _ in range(3):
            with program.serve("--port", "0") as serving:
                stop = lab.gate()

                def load(port: int = serving.port, end: Any = stop) -> None:
                    while not end.is_set():
                        with contextlib.suppress(OSError, http.client.HTTPException):
                            ask_program(port)

                with ThreadPoolExecutor(4) as crowd:
                    for _ in range(4):
                        crowd.submit(load)
                    before = len(shown)
                    while len(shown) < before + 40:
                        rows = serving.get("/api/requests?limit=1000")[1]
                        shown |= {row["id"] for row in rows}
                    serving.process.kill()
                    serving.process.wait(LIMIT_S)
                    stop.set()
            with contextlib.closing(sqlite3.connect(path)) as db:
                assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
                rows = {row for (row,) in db.execute("SELECT id FROM requests")}
                (summed,) = db.execute(
                    "SELECT sum(requests) FROM totals WHERE span_s = 3600"
                ).fetchone()
            assert shown <= rows
            assert summed == len(rows)


# -- secrets ---------------------------------------------------------------

SLOTS = ("ENDPOINT", "CLIENT", "ADMIN", "PROXY", "APIKEY")


def secret(slot: str) -> str:
    return f"canary-{slot.lower()}-Zq3vX8kLw0RtY7uIoP2aSd"


def tables_without_tokens(path: Path) -> str:
    """Return all that a database says, but for the accounts' token columns."""
    said = []
    with contextlib.closing(sqlite3.connect(path)) as db:
        tables = db.execute("SELECT name FROM sqlite_master WHERE type='table'")
        for (table,) in tables.fetchall():
            found = db.execute(f"SELECT * FROM {table}")
            names = [column[0] for column in found.description]
            hidden = {"access_token", "refresh_token", "api_key"}
            for row in found:
                shown = hidden if table == "accounts" else set()
                said.append(str([p for p in zip(names, row) if p[0] not in shown]))
    return "\n".join(said)


@at_both_ends
class TestCanary:
    def config(self, issuer: Issuer, up: ScriptedUpstream, dead: str) -> Any:
        raw = issuer.config(None)
        del raw["storage"]
        raw["accounts"]["baseURL"] = up.url
        gone = dead.replace("http://", f"http://user:{secret('proxy')}@")
        raw["endpoints"] = [
            near(up.port, name="up", authToken=secret("endpoint")),
            {
                "name": "far",
                "baseURL": "https://claude.invalid",
                "authToken": secret("endpoint"),
                "proxy": gone,
            },
        ]
        keys = {"clientKeys": [secret("client")], "adminKey": secret("admin")}
        log = {"level": "debug", "format": "json", "file": "lb.log"}
        return {**raw, "server": {"port": 0, **keys}, "log": log}

    def test_no_secret_leaves(self, lab: Lab, issuer: Issuer, program: Program) -> None:
        turns = iter(range(1000))

        def answers(wire: Wire, request: Received) -> None:
            turn, seen = next(turns), b"\n".join(request.lines)
            if not issuer.takes(request) and b"Bearer" in seen:
                wire.answer(401, error_body(401, seen.decode()))
            elif turn % 3 == 0:
                wire.answer(500, error_body(500, seen.decode()))
            elif turn % 3 == 1:
                wire.stream(started({"input_tokens": 1}), TEXT, STOP_EVENT)
            else:
                fine(wire, request)

        up = lab.upstream(answers)
        path = program.write("lb.json", self.config(issuer, up, lab.refusing()))
        state = program.folder / ".local/state/claude-lb"
        book = AccountBook(str(state / "claude_lb.db"), issuer.settings(), Lines())
        book.add(issuer.account("solo"))
        book.add(issuer.account("key", api_key=Secret(secret("apikey"))))
        issuer.expire()
        said = [self.log_in(program, issuer, path)]
        with program.serve("-c", str(path)) as serving:
            said += serving.lines
            said += self.session(serving, path)
            proc = Path(f"/proc/{serving.process.pid}")
            if proc.is_dir():
                for name in ("cmdline", "environ"):
                    said.append((proc / name).read_bytes().decode("latin-1"))
            run = serving.stop()
            said += [run.out, run.err]
        for line in (["--check"], ["accounts", "list"], ["stats"]):
            run = program.run("-c", str(path), *line)
            said += [run.out, run.err]
        said.append((program.folder / "lb.log").read_text())
        said.append(tables_without_tokens(state / "claude_lb.db"))
        whole = "\n".join(said)
        assert issuer.count() >= 1
        statuses = {text[:4] for text in said}
        assert {"200 ", "400 ", "401 ", "404 ", "500 "} <= statuses
        assert '"endpoint": "far", "status": 0' in whole  # through the proxy
        found = re.findall(r".{0,60}canary.{0,40}", whole)
        assert not found, found[:5]
        self.check_files(program.folder, state, path)

    def log_in(self, program: Program, issuer: Issuer, path: Path) -> str:
        """Log an account in by the program; return what it said."""
        line = ["-c", str(path), "accounts", "add", "new", "--yes", "--mode", "max"]
        running = subprocess.Popen(
            [sys.executable, str(PROGRAM), *line],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=program.folder,
            env=environment(program.folder),
        )
        assert running.stdout is not None
        said = ""
        for text in running.stdout:
            said += text
            if text.startswith(issuer.url):
                break
        code, given, _ = issuer.allow(said.split()[-1])
        out, _ = running.communicate(f"{code}#{given}\n", timeout=LIMIT_S)
        assert running.returncode == 0, out
        return said + out

    def session(self, serving: Serving, path: Path) -> list[str]:
        """Serve, fail, reload, change, be asked everything; return the answers."""
        said: list[str] = []
        line = http.client.HTTPConnection("127.0.0.1", serving.port, timeout=LIMIT_S)

        def ask(method: str, target: str, key: str, body: bytes = b"") -> int:
            fields = {"x-api-key": key, "content-type": "application/json"}
            line.request(method, target, body or None, fields)
            answer = line.getresponse()
            text = answer.read().decode()
            direct = target.startswith("/v1/") and answer.status in (401, 500)
            said.append(f"{answer.status} {answer.getheaders()}")
            if not direct:  # an upstream's own error is passed on as it is
                said.append(text)
            return answer.status

        client, admin = secret("client"), secret("admin")
        for _ in range(12):
            ask("POST", "/v1/messages", client, message())
        ask("POST", "/v1/messages", secret("endpoint"), message())  # no key of ours
        ask("POST", "/v1/messages", client, b'{"model": 1')
        ask("GET", "/v1/nowhere", client)
        views = (*GET_PATHS, "/", "/health", "/api/hello", "/nowhere")
        for target in views:
            ask("GET", target, client)
            ask("GET", target, f"wrong-{client}")
        ask("GET", f"/api/requests?limit={client}", client)
        assert ask("POST", "/api/accounts/solo/pause", admin) == 200
        assert ask("POST", "/api/accounts/solo/resume", admin) == 200
        assert ask("POST", "/api/accounts/solo/pause", client) == 401
        good = path.read_text()
        path.write_text(good.replace('"port": 0', '"port": "x"'))
        assert ask("POST", "/providers/reload", admin) == 400
        path.write_text(good)
        assert ask("POST", "/providers/reload", admin) == 200
        line.close()
        return said

    def check_files(self, folder: Path, state: Path, config: Path) -> None:
        """Secrets of the file stay there; tokens in the database and its backup."""
        holders = {"claude_lb.db", "claude_lb.db-wal", "claude_lb.db.accounts.json"}
        for path in (p for p in folder.rglob("*") if p.is_file()):
            data = path.read_bytes()
            if path != config and path.name not in holders:
                assert b"canary" not in data, path
            if path != config:
                kept = ("endpoint", "client", "admin", "proxy")
                assert not any(secret(s).encode() in data for s in kept), path
        for path in state.iterdir():
            assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
        assert stat.S_IMODE(state.stat().st_mode) == 0o700


# ============================================================================
# TOKENS
# ============================================================================

OLD, NEW = "claude-sonnet-4-5", "claude-opus-5-5"


def png(width: int, height: int) -> bytes:
    head = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR"
    return head + struct.pack(">II", width, height) + b"\x08\x02\0\0\0" + b"\0" * 20


def gif(width: int, height: int) -> bytes:
    return b"GIF89a" + struct.pack("<HH", width, height) + b"\0" * 20


def jpeg(width: int, height: int, before: bytes = b"") -> bytes:
    frame = struct.pack(">BHHB", 8, height, width, 3)
    return (
        b"\xff\xd8" + before + b"\xff\xc2" + struct.pack(">H", 17) + frame + b"\1" * 9
    )


def segment(mark: int, content: bytes) -> bytes:
    return bytes((0xFF, mark)) + struct.pack(">H", len(content) + 2) + content


def riff(kind: bytes, content: bytes) -> bytes:
    return b"RIFF\x99\0\0\0WEBP" + kind + b"\x99\0\0\0" + content + b"\0" * 20


def webp_lossy(width: int, height: int) -> bytes:
    return riff(b"VP8 ", b"\0\0\0\x9d\x01\x2a" + struct.pack("<HH", width, height))


def webp_lossless(width: int, height: int) -> bytes:
    bits = (width - 1) | (height - 1) << 14
    return riff(b"VP8L", b"\x2f" + struct.pack("<I", bits))


def webp_extended(width: int, height: int) -> bytes:
    sizes = [(n - 1).to_bytes(3, "little") for n in (width, height)]
    return riff(b"VP8X", b"\0" * 4 + b"".join(sizes))


FORMATS: list[Callable[[int, int], bytes]] = [
    png,
    gif,
    jpeg,
    webp_lossy,
    webp_lossless,
    webp_extended,
]
CHECKS = [
    (200, 200, 64, 64),
    (1000, 1000, 1296, 1296),
    (1092, 1092, 1521, 1521),
    (1920, 1080, 1560, 2691),
    (3840, 2160, 1560, 4784),
]


def body(content: Any, model: str = OLD, **more: Any) -> bytes:
    messages = [{"role": "user", "content": content}]
    request = {"model": model, "max_tokens": 9, "messages": messages, **more}
    return json.dumps(request).encode()


def encoded(data: bytes) -> dict[str, str]:
    text = base64.b64encode(data).decode()
    return {"type": "base64", "media_type": "image/png", "data": text}


def image(data: bytes) -> dict[str, Any]:
    return {"type": "image", "source": encoded(data)}


FRAME = claude_lb.estimate_tokens(body([]))  # base and one message


class TestImages:
    @pytest.mark.parametrize(("width", "height", "old", "new"), CHECKS)
    def test_published_checks(
        self, width: int, height: int, old: int, new: int
    ) -> None:
        for w, h in ((width, height), (height, width)):
            assert claude_lb.image_tokens(w, h, fine=False) == old
            assert claude_lb.image_tokens(w, h, fine=True) == new

    @pytest.mark.parametrize("make", FORMATS)
    @pytest.mark.parametrize(("width", "height", "old", "new"), CHECKS)
    def test_whole_request(
        self, make: Any, width: int, height: int, old: int, new: int
    ) -> None:
        block = [image(make(width, height))]
        assert claude_lb.estimate_tokens(body(block)) - FRAME == old
        assert claude_lb.estimate_tokens(body(block, NEW)) - FRAME == new

    @pytest.mark.parametrize("make", FORMATS)
    def test_size_in_header(self, make: Any) -> None:
        assert claude_lb.image_size(make(1, 16383)) == (1, 16383)
        assert claude_lb.image_size(make(640, 481)) == (640, 481)

    @pytest.mark.parametrize("make", FORMATS)
    def test_every_cut_of_a_header(self, make: Any) -> None:
        whole = make(640, 480)
        for end in range(len(whole)):
            assert claude_lb.image_size(whole[:end]) in (None, (640, 480))

    def test_noise_is_no_image(self) -> None:
        noise = random.Random(7)
        for start in (b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF1234WEBPVP8X"):
            for _ in range(200):
                claude_lb.image_size(start + noise.randbytes(noise.randrange(64)))

    def test_jpeg_with_much_before_the_frame(self) -> None:
        exif = segment(0xE1, b"Exif" + b"\xff\xc0" * 30_000)
        tables = segment(0xC4, b"1" * 30) + b"\xff" * 5 + segment(0xDB, b"2" * 65)
        made = jpeg(1000, 1000, exif * 5 + tables + b"\xff\x01\xff\xd0")
        assert claude_lb.image_size(made) == (1000, 1000)
        assert claude_lb.estimate_tokens(body([image(made)])) - FRAME == 1296

    def test_limits_hold_for_all_shapes(self) -> None:
        shapes = random.Random(3)
        for _ in range(3000):
            w, h = shapes.randrange(1, 9000), shapes.randrange(1, 9000)
            old, new = (
                claude_lb.image_tokens(w, h, False),
                claude_lb.image_tokens(w, h, True),
            )
            assert 1 <= old <= 1568
            assert old <= new <= 4784
            assert old == claude_lb.image_tokens(h, w, False)

    def test_far_ends(self) -> None:
        assert claude_lb.image_tokens(1, 1, False) == 1
        assert claude_lb.image_tokens(2**32 - 1, 1, True) == 92
        assert claude_lb.image_size(png(0, 5)) is None

    @pytest.mark.parametrize(
        "source",
        [
            {"type": "url", "url": "https://a.example/a.png"},
            {"type": "file", "file_id": "file_1"},
            {"type": "base64", "data": "not base64 \u00e9"},
            {"type": "base64", "data": "AAAA" * 100},
            {"type": "base64", "data": 5},
            None,
        ],
    )
    def test_unseen_image_counts_as_a_large_one(self, source: Any) -> None:
        block = [{"type": "image", "source": source}]
        assert claude_lb.estimate_tokens(body(block)) - FRAME == 1568

    def test_in_a_result_and_with_line_ends(self) -> None:
        block = image(png(1000, 1000))
        data = block["source"]["data"]
        block["source"]["data"] = "\n".join(data[i : i + 9] for i in range(0, 80, 9))
        result = {"type": "tool_result", "tool_use_id": "t", "content": [block]}
        assert claude_lb.estimate_tokens(body([result])) - FRAME == 1296


PROSE = "The harbour was quiet that morning, and nobody had seen the boats leave. "
CODE = """    def read(self, path: str) -> dict[str, int]:
        with open(path, "rb") as file:
            return {name: len(rows[0]) for name, rows in self.parse(file)}

"""
DATA = '{"id": 4711, "name": "widget", "tags": ["a", "b"], "ok": true, "at": 12.5}, '
MARKDOWN = """## Set up

Run `make all` in **each** folder before the first start, then look at the
[notes](notes.md) for what differs between systems.

* The server needs a port that is free, 8080 by default.
* Logs go to `logs/`, one file a day.

"""
KOREAN = "오늘 아침 항구는 조용했고 배가 떠나는 것을 본 사람은 없었다. "


class TestTokenText:
    @pytest.mark.parametrize(
        ("text", "each"),
        [
            ("abc defG\n\t", 4.2),
            ('{"1,2}', 2.5),
            ("한", 1.45),
            ("漢かカ", 1.25),
            ("éя€", 2),
        ],
    )
    def test_pure_classes(self, text: str, each: float) -> None:
        whole = text * 1000
        assert claude_lb.text_tokens(whole) == pytest.approx(len(whole) / each)

    @pytest.mark.parametrize(
        ("text", "each"),
        [(PROSE, 4.2), (MARKDOWN, 3.5), (CODE, 3.1), (DATA, 2.5), (KOREAN, 1.6)],
    )
    def test_kinds_of_text_within_15_percent(self, text: str, each: float) -> None:
        whole = text * 50
        assert claude_lb.text_tokens(whole) == pytest.approx(
            len(whole) / each, rel=0.15
        )

    def test_one_letter(self) -> None:
        assert claude_lb.estimate_tokens(body("a")) in range(8, 13)

    def test_newer_tokenizer(self) -> None:
        old = claude_lb.estimate_tokens(body("word " * 10_000))
        for name in (NEW, "claude-opus-4-7", "anthropic/claude-opus-4.8"):
            new = claude_lb.estimate_tokens(body("word " * 10_000, name))
            assert new == pytest.approx(old * 1.3, rel=0.01)

    @pytest.mark.parametrize(
        "name",
        [
            "claude-opus-4-20250514",
            "claude-3-5-sonnet-20241022",
            "claude-haiku-4-5@20251001",
            "us.anthropic.claude-sonnet-4-6-v1:0",
            "gpt-5",
            "",
        ],
    )
    def test_older_tokenizer(self, name: str) -> None:
        text = "word " * 1000
        assert claude_lb.estimate_tokens(body(text, name)) == claude_lb.estimate_tokens(
            body(text)
        )

    def test_lone_surrogate(self) -> None:
        assert claude_lb.estimate_tokens(body("\ud83d")) > 0


class TestRequests:
    def test_all_text_counts(self) -> None:
        word = "x" * 420
        forms: list[Any] = [
            word,
            [{"type": "text", "text": word, "cache_control": {"type": "ephemeral"}}],
            [{"type": "tool_result", "tool_use_id": "t", "content": word}],
            [{"type": "tool_result", "content": [{"type": "text", "text": word}]}],
            [{"type": "document", "source": {"type": "text", "data": word}}],
            [{"type": "document", "source": {"type": "content", "content": word}}],
            [{"type": "thinking", "thinking": word, "signature": "S" * 900}],
        ]
        for form in forms:
            assert claude_lb.estimate_tokens(body(form)) - FRAME == 100
        assert claude_lb.estimate_tokens(body([], system=word)) - FRAME == 100
        system = [{"type": "text", "text": word}]
        assert claude_lb.estimate_tokens(body([], system=system)) - FRAME == 100

    def test_calls_and_unknown_blocks_count_as_json(self) -> None:
        call = {
            "type": "tool_use",
            "id": "t",
            "name": "Read",
            "input": {"p": "a" * 420},
        }
        assert 100 < claude_lb.estimate_tokens(body([call])) - FRAME < 112
        # An input that looks like a block is none
        call["input"] = {"type": "image", "source": {"type": "base64"}}
        assert claude_lb.estimate_tokens(body([call])) - FRAME < 60
        found = {"type": "search_result", "title": "a" * 420}
        assert 100 < claude_lb.estimate_tokens(body([found])) - FRAME < 120
        hidden = {"type": "redacted_thinking", "data": "Z" * 4000}
        assert claude_lb.estimate_tokens(body([hidden])) == FRAME

    def test_each_message_adds_four(self) -> None:
        messages = [{"role": "user", "content": ""}] * 10
        request = json.dumps({"model": OLD, "messages": messages}).encode()
        assert claude_lb.estimate_tokens(request) == 7 + 40

    @pytest.mark.parametrize(
        ("model", "free", "forced"),
        [
            ("claude-opus-5-5", 286, 406),
            ("claude-opus-5", 286, 406),
            ("claude-opus-4-8", 290, 410),
            ("claude-opus-4-7", 675, 804),
            ("claude-opus-4-6", 497, 589),
            ("claude-sonnet-4-6", 497, 589),
            ("claude-opus-4-5", 496, 588),
            ("claude-haiku-4-5-20251001", 496, 588),
            ("claude-sonnet-5", 354, 474),
            ("claude-opus-4-1", 313, 315),
            ("claude-sonnet-4-20250514", 313, 315),
        ],
    )
    def test_prompt_for_tools(self, model: str, free: int, forced: int) -> None:
        tools = [{"name": "t"}]
        definition = claude_lb.text_tokens('[{"name":"t"}]')
        definition *= (
            1.3 if claude_lb.estimate_tokens(body("a " * 99, model)) > 65 else 1.0
        )
        given = {"auto": free, "none": free, "any": forced, "tool": forced, "": free}
        for choice, tokens in given.items():
            more = {"tool_choice": {"type": choice}} if choice else {}
            got = (
                claude_lb.estimate_tokens(body([], model, tools=tools, **more)) - FRAME
            )
            assert got == round(tokens + definition)
        assert claude_lb.estimate_tokens(body([], model, tools=[])) == FRAME

    def test_definitions_of_tools_count(self) -> None:
        one = [{"name": "t", "description": "d" * 420, "input_schema": {}}]
        less = [{"name": "t", "description": "", "input_schema": {}}]
        more = claude_lb.estimate_tokens(body([], tools=one))
        assert more - claude_lb.estimate_tokens(body([], tools=less)) in range(98, 103)

    def test_pdf_by_pages(self) -> None:
        pages = b"<</Type /Pages /Count 3>>" + b"<</Type/Page /Parent 1 0 R>>" * 3
        block = {"type": "document", "source": encoded(b"%PDF-1.7\n" + pages)}
        assert claude_lb.estimate_tokens(body([block])) - FRAME == 3 * 2333

    def test_pdf_by_length_where_pages_are_packed(self) -> None:
        for size, pages in ((1000, 1), (500_000, 10), (6_000_000, 122)):
            block = {"type": "document", "source": encoded(b"%PDF" + b"\0" * size)}
            assert claude_lb.estimate_tokens(body([block])) - FRAME == pages * 2333

    def test_document_elsewhere_is_a_page(self) -> None:
        block = {"type": "document", "source": {"type": "url", "url": "https://a"}}
        assert claude_lb.estimate_tokens(body([block])) - FRAME == 2333

    def test_thinking_of_earlier_turns(self) -> None:
        thought = {"type": "thinking", "thinking": "t" * 4200, "signature": "s"}
        call = {"type": "tool_use", "id": "t", "name": "R", "input": {}}
        result = {"type": "tool_result", "tool_use_id": "t", "content": "r"}
        earlier: Any = [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": [thought, {"type": "text", "text": "b"}]},
            {"role": "user", "content": "c"},
        ]
        now: Any = [
            *earlier[::2],
            {"role": "assistant", "content": [thought, call]},
            {"role": "user", "content": [result]},
        ]

        def count(model: str, messages: list[dict[str, Any]]) -> int:
            request = {"model": model, "messages": messages}
            return claude_lb.estimate_tokens(json.dumps(request).encode())

        assert count("claude-sonnet-4-5", earlier) < 100
        assert count("claude-opus-4-5", earlier) > 1000
        assert count("claude-sonnet-4-6", earlier) > 1000
        assert count("claude-sonnet-4-5", now) > 1000

    @pytest.mark.parametrize(
        "bad",
        [
            b"",
            b"\xff\xfe",
            b"[]",
            b"5",
            b"{}",
            b'{"messages": {}}',
            b'{"messages": [5]}',
            b'{"messages": [{"role": "user"}]}',
            b'{"messages": [{"role": "user", "content": 5}]}',
            b'{"messages": ' + b"[" * 100_000,
        ],
    )
    def test_what_cannot_be_estimated_is_refused(self, bad: bytes) -> None:
        with pytest.raises(claude_lb.RefusedError) as refused:
            claude_lb.estimate_tokens(bad)
        assert refused.value.status == 400
        assert not refused.value.close

    def test_fault_names_its_place(self) -> None:
        bad = b'{"messages": [{"role": "user", "content": ""}, {"role": "user"}]}'
        with pytest.raises(claude_lb.RefusedError, match=r"^messages\.1\.content: "):
            claude_lb.estimate_tokens(bad)

    def test_odd_blocks_are_no_fault(self) -> None:
        odd: Any
        for odd in ([5, None, {}, [], {"type": 7}, {"type": ["a"]}], [[["a"]]], ["a"]):
            assert claude_lb.estimate_tokens(body(odd)) >= FRAME
        for odd in ("x", 5, [5], {"a": 1}):
            assert claude_lb.estimate_tokens(body("a", tools=odd, system=odd)) >= FRAME

    def test_deep_nesting(self) -> None:
        block: Any = "a" * 42
        for _ in range(300):
            block = [{"type": "tool_result", "content": block}]
        assert claude_lb.estimate_tokens(body(block)) == FRAME + 10


class TestPrompts:
    def test_newest_prompt(self) -> None:
        result = {"role": "user", "content": [{"type": "tool_result", "content": "r"}]}
        asked, answered = (
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
        )
        assert claude_lb.newest_prompt([]) == -1
        assert claude_lb.newest_prompt([answered, result]) == -1
        assert claude_lb.newest_prompt([asked, answered, result, answered]) == 0
        assert claude_lb.newest_prompt([asked, answered, asked, answered, result]) == 2


class TestEstimatesOverSockets:
    """R29: a machine without a network gets an estimate, not an error."""

    BODY = message(model="claude-sonnet-5-5")

    def count(self, proxy: Proxy, body: bytes | None = None) -> Answer:
        return proxy.ask("POST", COUNT_TOKENS, self.BODY if body is None else body)

    def test_r29_nobody_can_be_reached(self, lab: Lab) -> None:
        answer = self.count(lab.proxy(lab.refusing(), lab.refusing()))
        assert answer.status == 200
        assert answer.field("x-claude-lb-estimate") == "1"
        expected = claude_lb.estimate_tokens(self.BODY)
        assert answer.json() == {"input_tokens": expected}

    @pytest.mark.parametrize("status", [404, 405, 501])
    def test_an_endpoint_that_does_not_count(self, lab: Lab, status: int) -> None:
        proxy, *_ = over(lab, says(status))
        answer = self.count(proxy)
        assert (answer.status, answer.field("x-claude-lb-estimate")) == (200, "1")

    def test_who_counts_is_asked(self, lab: Lab) -> None:
        counted = says(200, b'{"input_tokens": 7}')
        proxy, up = over(lab, counted)
        answer = self.count(proxy)
        assert answer.json() == {"input_tokens": 7}
        assert answer.values("x-claude-lb-estimate") == []
        assert calls(up) == [1]

    @pytest.mark.parametrize("status", [400, 401, 403, 413])
    def test_an_error_of_the_request_s_is_passed_on(
        self, lab: Lab, status: int
    ) -> None:
        proxy, *_ = over(lab, says(status))
        assert self.count(proxy).status == status

    def test_what_is_no_request_gets_the_error(self, lab: Lab) -> None:
        proxy = lab.proxy(lab.refusing())
        own_error(self.count(proxy, b'{"model": "m"}'), 502, "api_error")

    def test_messages_are_never_answered_by_us(self, lab: Lab) -> None:
        answer = lab.proxy(lab.refusing()).post()
        assert answer.status == 502
        assert answer.values("x-claude-lb-estimate") == []


class TestLoginsInTrouble:
    def test_a_provider_that_hangs_holds_up_nobody_who_can_go_elsewhere(
        self, lab: Lab, issuer: Issuer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(claude_lb, "RENEW_PATIENCE_S", 0.05)
        other = lab.upstream()
        work = issuer.account("work")
        kept, served = keeping(lab, other, issuer=issuer, accounts=[work])
        issuer.expire()
        issuer.script = ["slow"]
        answers = [kept.post() for _ in range(4)]
        assert [a.status for a in answers] == [200] * 4
        assert {served_by(a) for a in answers} == {"up0"}
        assert calls(served) == [1]  # then it is left alone for a moment
        issuer.slow.set()

    def test_a_fresh_token_ends_its_cooldown(
        self, lab: Lab, issuer: Issuer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(claude_lb, "RENEW_FLOOR_S", 0.0)
        monkeypatch.setattr(claude_lb, "RENEW_PAUSE_S", 0.0)
        work = issuer.account("work")
        kept, _ = keeping(lab, issuer=issuer, accounts=[work])
        issuer.expire()
        issuer.script = ["500"]
        assert kept.post().status == 502
        (state,) = kept.server.services.pool.snapshot().endpoints
        assert [rule for _, rule, _ in state.cooldowns] == ["login-fails"]
        came: list[object] = []
        token = kept.server.book.token(work.id)
        kept.server.renewer.renew(work.id, token, lambda *told: came.append(told))
        eventually(lambda: came, "the renewal")
        (state,) = kept.server.services.pool.snapshot().endpoints
        assert state.cooldowns == ()
        assert kept.post().status == 200

    def test_no_account_that_may_serve_is_said(self, lab: Lab, issuer: Issuer) -> None:
        work = issuer.account("solo")
        kept, served = keeping(lab, issuer=issuer, accounts=[work])
        assert kept.post().status == 200
        changed = kept.ask("POST", "/api/accounts/solo/pause", counts=0)
        assert changed.status == 200
        told = own_error(kept.post(), 503, "overloaded_error")
        assert "accounts resume solo" in told
        health = kept.ask("GET", "/health", counts=0)
        assert (health.status, health.json()["status"]) == (503, "unhealthy")
        assert calls(served) == [1]


class TestBackupOfAccounts:
    def test_new_tokens_that_only_the_backup_has_are_used(self, desk: Desk) -> None:
        account = desk.account()
        spent = account.refresh_token
        tokens = desk.provider.tokens()
        desk.book._save(
            account.id,
            claude_lb._Unsaved(
                read_token_reply(json.dumps(tokens).encode(), desk.epoch), spent
            ),
        )
        with (
            closing(sqlite3.connect(desk.path)) as db,
            db,
        ):  # the COMMIT that never came
            change = "UPDATE accounts SET refresh_token=?, access_token=?, expires_at=?"
            old = (spent.reveal() if spent else "", "sk-ant-oat01-old", 1)
            db.execute(change, old)
        desk.book.poll()
        asked = desk.provider.count()
        fresh, why = desk.renew(desk.book.account(account.id))
        assert fresh is not None, why
        assert fresh.reveal() == tokens["access_token"]
        assert desk.provider.count() == asked
        assert desk.row(account)["refresh_token"] == tokens["refresh_token"]

    def test_one_that_cannot_be_written_brings_nobody_back(self, desk: Desk) -> None:
        desk.account("gone")
        Path(f"{desk.path}.accounts.json.new").mkdir()
        desk.book.remove("gone")
        assert "there is no backup" in desk.log
        assert desk.book.all() == ()

    def test_an_idle_look_does_not_open_the_database(
        self, desk: Desk, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        desk.account()
        desk.book.poll()
        monkeypatch.setattr(claude_lb, "open_database", None)
        assert desk.book.poll() is False
        monkeypatch.undo()
        other = AccountBook(desk.path, desk.provider.settings(), desk.log)
        other.set_paused("work", paused=True)
        assert desk.book.poll() is True


class TestTwoStores:
    def test_they_do_not_prune_twice(self, path: Path) -> None:
        with closing(open_database(str(path))) as db:
            write_records(db, [exchange(i) for i in range(40)])
            for _ in range(3):  # as two processes that counted before would
                claude_lb.drop_rows(db, 0, 30)
            assert len(recent_requests(db, 100)) == 30

    def test_a_later_schema_is_told_to_who_asks_for_accounts(self, desk: Desk) -> None:
        desk.account()
        with closing(sqlite3.connect(desk.path)) as db:
            db.execute("PRAGMA user_version = 99")
        with pytest.raises(AccountError, match="later version"):
            desk.book.all()
        assert desk.book.poll() is False


MESSAGE = {"id": "msg_1", "type": "message", "role": "assistant", "model": "m"}


def halves(data: bytes) -> Iterator[list[bytes]]:
    """Yield `data` in every split into two, then byte by byte."""
    yield from ([data[:at], data[at:]] for at in range(len(data) + 1))
    yield [data[at : at + 1] for at in range(len(data))]


def cut_at_random(data: bytes, rng: random.Random) -> list[bytes]:
    """Return `data` in pieces, some of them empty."""
    ends = sorted(rng.randrange(len(data) + 1) for _ in range(rng.randrange(1, 40)))
    return [data[a:b] for a, b in zip([0, *ends], [*ends, len(data)])]


BOM = b"\xef\xbb\xbf"


class TestLineReader:
    @pytest.mark.parametrize(
        ("stream", "lines", "rest"),
        [
            (b"", [], b""),
            (b"a", [], b"a"),
            (b"a\nb\n", [b"a", b"b"], b""),
            (b"a\r\nb\r\n", [b"a", b"b"], b""),
            (b"a\rb\r", [b"a", b"b"], b""),
            (b"\n\r\n\rx", [b"", b"", b""], b"x"),
            (b"a\r\r\nb\n\rc", [b"a", b"", b"b", b""], b"c"),
            (BOM + b"a\n" + BOM + b"b\n", [b"a", BOM + b"b"], b""),
            (BOM + BOM + b"a\n", [BOM + b"a"], b""),
            (BOM + b"a", [], b"a"),
            (BOM, [], b""),
            (b"\xef\xbb\n", [b"\xef\xbb"], b""),
            (
                "a\u2028b\x0b\x0c\x85c\nd".encode(),
                ["a\u2028b\x0b\x0c\x85c".encode()],
                b"d",
            ),
            ("é你🙂\r\n🙂".encode(), ["é你🙂".encode()], "🙂".encode()),
        ],
    )
    def test_lines_in_every_split(
        self, stream: bytes, lines: list[bytes], rest: bytes
    ) -> None:
        for pieces in halves(stream):
            reader, found = claude_lb.LineReader(), list[bytes]()
            for piece in pieces:
                found += reader.feed(piece)
            assert (found, reader.rest()) == (lines, rest)

    def test_nothing_between_cr_and_lf_does_not_part_them(self) -> None:
        reader = claude_lb.LineReader()
        fed = [reader.feed(piece) for piece in (b"a\r", b"", b"\nb", b"\r", b"\n")]
        assert fed == [[b"a"], [], [], [b"b"], []]

    def test_a_line_without_end_is_an_error(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(claude_lb, "LINE_BYTES", 100)
        reader = claude_lb.LineReader()
        assert reader.feed(b"x" * 100) == []
        with pytest.raises(ValueError, match="without end"):
            reader.feed(b"x")


class TestDataReader:
    @pytest.mark.parametrize(
        ("stream", "data", "rest"),
        [
            (b"data: a\n\n", [b"a"], b""),
            (b"data:a\n\n", [b"a"], b""),
            (b"data:  two spaces\n\n", [b" two spaces"], b""),
            (b"data: a\rdata: b\r\r", [b"a\nb"], b""),
            (b"data: a\r\n\r\ndata: b\r\n\r\n", [b"a", b"b"], b""),
            (BOM + b"data: a\n\n", [b"a"], b""),
            (b"data\n\ndata:\n\n", [b"", b""], b""),
            (b"data\ndata: a\n\n", [b"\na"], b""),
            (b"database: a\n\nData: b\n\n", [], b""),
            (b": one\n\n:\n\n: two\n", [], b""),
            (b"event: x\nid: 1\nretry: 5\n\n", [], b""),
            (b": c\nevent: x\ndata: a\nid: 1\n\n", [b"a"], b""),
            (b"data: a\n\ndata: b\n", [b"a"], b"b"),
            (b"data: a\ndata: b", [], b"a\nb"),
            (b"data: a\n\ndat", [b"a"], b""),
            (b"event: x", [], b""),
            ('data: {"t":"\u2028"}\n\n'.encode(), ['{"t":"\u2028"}'.encode()], b""),
            ("data: 🙂\n\n".encode(), ["🙂".encode()], b""),
        ],
    )
    def test_events_in_every_split(
        self, stream: bytes, data: list[bytes], rest: bytes
    ) -> None:
        for pieces in halves(stream):
            reader, found = claude_lb.DataReader(), list[bytes]()
            for piece in pieces:
                found += reader.feed(piece)
            assert (found, reader.rest()) == (data, rest)

    def test_a_long_line_in_many_pieces(self) -> None:
        reader, piece = claude_lb.DataReader(), b"x" * 16_384
        reader.feed(b"data: ")
        assert [reader.feed(piece) for _ in range(512)] == [[]] * 512
        assert reader.feed(b"\n\n") == [piece * 512]

    def test_an_event_without_end_is_an_error(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(claude_lb, "LINE_BYTES", 100)
        reader = claude_lb.DataReader()
        assert reader.feed(b"data: 1\n\n" * 100) == [b"1"] * 100
        with pytest.raises(ValueError, match="without end"):
            reader.feed(b"data: 1\n" * 20)


def events_in(stream: bytes) -> list[tuple[str, dict[str, Any]]]:
    """Return (name, document) of each event of a stream with one line of data each."""
    events = []
    for text in stream.decode().removesuffix("\n\n").split("\n\n"):
        name, data = text.split("\n")
        document = json.loads(data.removeprefix("data: "))
        assert name == f"event: {document['type']}"
        events.append((document["type"], document))
    return events


class TestEvents:
    @pytest.mark.parametrize(
        ("value", "packed"),
        [
            ({"a": [1, None, True]}, b'{"a":[1,null,true]}'),
            ("é\u2028\n", b'"\xc3\xa9\xe2\x80\xa8\\n"'),
            ("\ud83d", b'"\\ud83d"'),  # half a pair: UTF-8 has none
            ("\\\udc00", b'"\\\\\\udc00"'),
        ],
    )
    def test_packed_is_json_in_utf_8(self, value: object, packed: bytes) -> None:
        assert claude_lb.packed(value) == packed
        assert json.loads(packed.decode()) == value

    def test_an_event_has_its_type_as_name(self) -> None:
        event = claude_lb.event_bytes({"type": "ping", "a": "b\nc"})
        assert event == b'event: ping\ndata: {"type":"ping","a":"b\\nc"}\n\n'

    def test_an_error(self) -> None:
        error = {"type": "overloaded_error", "message": "full"}
        expected = [("error", {"type": "error", "error": error})]
        assert events_in(claude_lb.error_event("overloaded_error", "full")) == expected

    def test_the_events_of_a_message(self) -> None:
        message = {
            **MESSAGE,
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "c2ln"},
                {"type": "text", "text": "é"},
                {"type": "tool_use", "id": "t", "name": "n", "input": {"q": "é"}},
                {"type": "web_search_tool_result", "content": []},
            ],
            "stop_reason": "refusal",
            "stop_sequence": None,
            "stop_details": {"type": "refusal"},
            "usage": {"output_tokens": 5},
        }
        events = events_in(claude_lb.events_of(message))
        block = ["content_block_start", "content_block_delta", "content_block_stop"]
        assert [name for name, _ in events] == [
            "message_start",
            *(block[0], block[1], block[1], block[2]),
            *block,
            *block,
            *(block[0], block[2]),
            *("message_delta", "message_stop"),
        ]
        begun = events[0][1]["message"]
        assert (begun["content"], begun["stop_reason"]) == ([], None)
        assert begun["stop_details"] is None
        assert [e["delta"] for _, e in events if e["type"] == block[1]] == [
            {"type": "thinking_delta", "thinking": "hm"},
            {"type": "signature_delta", "signature": "c2ln"},
            {"type": "text_delta", "text": "é"},
            {"type": "input_json_delta", "partial_json": '{"q":"é"}'},
        ]
        starts = [e["content_block"] for _, e in events if e["type"] == block[0]]
        assert starts[0] == {"type": "thinking", "thinking": "", "signature": ""}
        assert starts[2]["input"] == {}
        assert events[-2][1] == {
            "type": "message_delta",
            "delta": {
                "stop_reason": "refusal",
                "stop_sequence": None,
                "stop_details": {"type": "refusal"},
            },
            "usage": {"output_tokens": 5},
        }


LETTERS = 'ab \n\r\t"\\/{}[]:,é\u2028\x85你🙂\x00\x7f'


def some_text(rng: random.Random, most: int = 20) -> str:
    return "".join(rng.choice(LETTERS) for _ in range(rng.randrange(most)))


def some_value(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.randrange(7 if depth < 3 else 5)
    if kind == 5:
        return [some_value(rng, depth + 1) for _ in range(rng.randrange(3))]
    if kind == 6:
        return some_object(rng, depth + 1)
    return (some_text(rng), rng.randrange(-9, 9), 0.5, None, True)[kind]


def some_object(rng: random.Random, depth: int = 0) -> dict[str, Any]:
    return {some_text(rng): some_value(rng, depth) for _ in range(rng.randrange(4))}


def some_block(rng: random.Random) -> dict[str, Any]:
    text, signature = some_text(rng), rng.choice(["", "c2ln", claude_lb.UNSIGNED])
    return rng.choice(
        [
            {"type": "text", "text": text},
            {"type": "text", "text": text, "citations": None},
            {"type": "text", "text": text, "citations": [some_object(rng)]},
            {"type": "thinking", "thinking": text, "signature": signature},
            {"type": "thinking", "thinking": text},
            {"type": "redacted_thinking", "data": "c2ln"},
            {"type": "tool_use", "id": "t", "name": "n", "input": some_object(rng)},
            {"type": "tool_use", "id": "t", "input": {}, "caller": {"type": "direct"}},
            {"type": "server_tool_use", "id": "s", "input": some_object(rng)},
            {"type": "web_search_tool_result", "content": [some_object(rng)]},
            {"type": "compaction", "content": text},
            {"type": "later", "text": text, "facts": some_object(rng)},
        ]
    )


def some_message(rng: random.Random) -> dict[str, Any]:
    usage: dict[str, Any] = {"input_tokens": 9, "output_tokens": rng.randrange(99)}
    usage.update(
        rng.choice(
            [{}, {"cache_read_input_tokens": None}, {"server_tool_use": {"a": 1}}]
        )
    )
    return {
        **MESSAGE,
        "content": [some_block(rng) for _ in range(rng.randrange(5))],
        "stop_reason": rng.choice(["end_turn", "tool_use", "stop_sequence", None]),
        "stop_sequence": rng.choice([None, some_text(rng)]),
        "usage": usage,
        **rng.choice([{}, {"container": {"id": "c"}}, {"stop_details": None}]),
    }


def reader_fed(pieces: Sequence[bytes]) -> claude_lb.MessageReader:
    reader = claude_lb.MessageReader()
    for piece in pieces:
        reader.feed(piece)
    return reader


def reader_told(*documents: dict[str, Any]) -> claude_lb.MessageReader:
    return reader_fed([claude_lb.event_bytes(document) for document in documents])


def message_starts(**facts: Any) -> dict[str, Any]:
    return {"type": "message_start", "message": {"id": "msg_1", "content": [], **facts}}


def block_begins(index: int, **block: Any) -> dict[str, Any]:
    return {"type": "content_block_start", "index": index, "content_block": block}


def block_goes_on(index: int, kind: str, **delta: Any) -> dict[str, Any]:
    delta = {"type": kind, **delta}
    return {"type": "content_block_delta", "index": index, "delta": delta}


class TestMessageReader:
    @pytest.mark.parametrize("seed", range(60))
    def test_puts_together_what_events_of_takes_apart(self, seed: int) -> None:
        rng = random.Random(seed)
        message = some_message(rng)
        stream = claude_lb.events_of(message)
        splits = [cut_at_random(stream, rng) for _ in range(5)]
        for pieces in splits if seed % 10 else halves(stream):
            reader = reader_fed(pieces)
            assert reader.message() == message
            assert (reader.complete, reader.error) == (True, None)

    @pytest.mark.parametrize("seed", range(20))
    def test_reads_what_the_demo_writes(self, seed: int) -> None:
        rng = random.Random(seed)
        body = {
            "model": "m",
            "max_tokens": 9,
            "messages": [{"content": some_text(rng)}],
        }
        message = claude_lb.demo_message(body, "d")
        reader = reader_fed(list(claude_lb.demo_events(message)))
        assert reader.message() == message

    @pytest.mark.parametrize(
        ("begun", "pieces", "value"),
        [
            ({}, [], {}),
            (None, [""], {}),
            ({}, ["", " "], {}),
            ({}, ["", '{"a', '":1', "}"], {"a": 1}),
            ({"given": 1}, [], {"given": 1}),
            ({}, ['{"a":'], {"arguments": '{"a":'}),
            ({}, ["[1]"], {"arguments": "[1]"}),
            ({}, ["plain ", "words"], {"arguments": "plain words"}),
        ],
    )
    def test_the_input_of_a_tool(
        self, begun: object, pieces: list[str], value: object
    ) -> None:
        deltas = [block_goes_on(0, "input_json_delta", partial_json=p) for p in pieces]
        block = block_begins(0, type="tool_use", id="t", name="n", input=begun)
        (found,) = reader_told(message_starts(), block, *deltas).message()["content"]
        assert found == {"type": "tool_use", "id": "t", "name": "n", "input": value}

    def test_a_tool_of_the_servers_gets_its_input_from_deltas_too(self) -> None:
        block = block_begins(
            0, type="server_tool_use", id="s", name="web_search", input={}
        )
        delta = block_goes_on(0, "input_json_delta", partial_json='{"query":"x"}')
        (found,) = reader_told(message_starts(), block, delta).message()["content"]
        assert found["input"] == {"query": "x"}

    def test_thinking_with_its_signature(self) -> None:
        reader = reader_told(
            message_starts(),
            block_begins(0, type="thinking", thinking="", signature=""),
            block_goes_on(0, "thinking_delta", thinking="a", estimated_tokens=1),
            block_goes_on(0, "thinking_delta", thinking="b"),
            block_goes_on(0, "signature_delta", signature="c2ln"),
            block_begins(1, type="redacted_thinking", data="c2ln"),
        )
        assert reader.message()["content"] == [
            {"type": "thinking", "thinking": "ab", "signature": "c2ln"},
            {"type": "redacted_thinking", "data": "c2ln"},
        ]

    @pytest.mark.parametrize("given", [{}, {"citations": None}, {"citations": []}])
    def test_citations(self, given: dict[str, Any]) -> None:
        reader = reader_told(
            message_starts(),
            block_begins(0, type="text", text="", **given),
            block_goes_on(0, "citations_delta", citation={"n": 1}),
            block_goes_on(0, "text_delta", text="a"),
            block_goes_on(0, "citations_delta", citation={"n": 2}),
        )
        (found,) = reader.message()["content"]
        assert found == {"type": "text", "text": "a", "citations": [{"n": 1}, {"n": 2}]}

    def test_a_compaction(self) -> None:
        delta = block_goes_on(0, "compaction_delta", content="a", encrypted_content="b")
        block = block_begins(0, type="compaction", content=None)
        (found,) = reader_told(message_starts(), block, delta).message()["content"]
        assert found == {"type": "compaction", "content": "a", "encrypted_content": "b"}

    def test_unknown_events_and_deltas_are_passed_over(self) -> None:
        reader = reader_told(
            {"type": "ping"},
            message_starts(),
            block_begins(0, type="text", text=""),
            block_goes_on(0, "later_delta", text="x"),
            block_goes_on(0, "text_delta", text="a"),
            block_goes_on(0, "text_delta", text=7),
            block_goes_on(0, "text_delta"),
            {"type": "later", "delta": {"text": "x"}},
            {"type": "content_block_stop", "index": 0},
        )
        assert reader.message()["content"] == [{"type": "text", "text": "a"}]
        assert not reader.complete

    def test_of_each_count_the_last_that_is_said(self) -> None:
        cache = {"ephemeral_1h_input_tokens": 4}
        begun = {"input_tokens": 1, "output_tokens": 1, "cache_creation": cache}
        reader = reader_told(
            message_starts(usage={**begun, "speed": None}),
            {"type": "message_delta", "delta": {}, "usage": {"output_tokens": 5}},
            {
                "type": "message_delta",
                "delta": {},
                "usage": {"output_tokens": 7, "input_tokens": None, "later": None},
            },
            {"type": "message_delta", "delta": {}, "usage": None},
        )
        counts = {**begun, "output_tokens": 7, "speed": None, "later": None}
        assert reader.message()["usage"] == counts

    def test_no_usage_is_none(self) -> None:
        end = {"type": "message_delta", "delta": {"stop_reason": "end_turn"}}
        assert "usage" not in reader_told(message_starts(), end).message()

    def test_what_is_said_of_the_whole_message(self) -> None:
        reader = reader_told(
            message_starts(stop_reason=None, container=None),
            {
                "type": "message_delta",
                "delta": {
                    "stop_reason": "refusal",
                    "container": {"id": "c"},
                    "x": None,
                },
                "context_management": {"applied_edits": []},
            },
            {"type": "message_delta", "delta": {"stop_reason": None, "late": 1}},
        )
        assert reader.message() == {
            "id": "msg_1",
            "content": [],
            "stop_reason": "refusal",
            "container": {"id": "c"},
            "x": None,
            "late": 1,
            "context_management": {"applied_edits": []},
        }

    def test_an_error_is_kept_as_it_is(self) -> None:
        error = {"type": "overloaded_error", "message": "full"}
        document = {"type": "error", "error": error, "request_id": "req_1"}
        reader = reader_told(message_starts(), document)
        assert (reader.error, reader.complete) == (document, False)
        assert reader_told(document).message() == {}

    def test_blocks_that_overlap_stay_apart(self) -> None:
        reader = reader_told(
            message_starts(),
            block_begins(0, type="text", text=""),
            block_begins(1, type="text", text=""),
            block_goes_on(0, "text_delta", text="a"),
            block_goes_on(1, "text_delta", text="b"),
            block_goes_on(0, "text_delta", text="c"),
        )
        assert [b["text"] for b in reader.message()["content"]] == ["ac", "b"]

    def test_asking_twice_changes_nothing(self) -> None:
        reader = reader_told(
            message_starts(),
            block_begins(0, type="tool_use", input={}),
            block_goes_on(0, "input_json_delta", partial_json='{"a":1}'),
        )
        first = reader.message()
        first["content"].clear()
        assert reader.message()["content"] == [{"type": "tool_use", "input": {"a": 1}}]

    @pytest.mark.parametrize(
        "stream",
        [
            b"data: {broken\n\n",
            b"data: [1]\n\n",
            b'data: {"type":["odd"]}\n\ndata: x\n\n',
            claude_lb.event_bytes(block_goes_on(0, "text_delta", text="a")),
        ],
    )
    def test_what_cannot_be_told_is_an_error(self, stream: bytes) -> None:
        with pytest.raises(ValueError, match=r"an event|a part"):
            reader_fed([claude_lb.event_bytes(message_starts()), stream])

    def test_what_other_servers_add_is_harmless(self) -> None:
        stream = claude_lb.events_of({"id": "m", "content": []})
        reader = reader_fed([b": hi\n\n", stream, b"data: [DONE]\n\ndata:\n\n"])
        assert reader.complete

    def test_broken_utf_8_is_replaced(self) -> None:
        stream = claude_lb.event_bytes(message_starts(model="x")).replace(
            b'"x"', b'"\xff"'
        )
        assert reader_fed([stream]).message()["model"] == "\ufffd"

    def test_a_message_without_end_is_an_error(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(claude_lb, "DRAFT_BYTES", 1000)
        with pytest.raises(ValueError, match="without end"):
            reader_told(*[{"type": "ping"}] * 100)


SIGNED = base64.b64encode(bytes(range(64))).decode()
MARK = json.dumps(claude_lb.UNSIGNED).encode()
OURS = {"type": "thinking", "thinking": "é,]}", "signature": claude_lb.UNSIGNED}
THEIRS = {"type": "thinking", "thinking": "x", "signature": SIGNED}
WORDS = {"type": "text", "text": f'a "thinking", {claude_lb.UNSIGNED} }} ] ,'}
CALL = {"type": "tool_use", "id": "t", "name": "n", "input": OURS}


def turn(*blocks: object, role: str = "assistant") -> dict[str, Any]:
    return {"role": role, "content": list(blocks)}


def asking(*messages: object, **facts: Any) -> dict[str, Any]:
    return {"model": "m", "messages": list(messages), "max_tokens": 9, **facts}


STYLES: tuple[dict[str, Any], ...] = (
    {},
    {"separators": (",", ":")},
    {"indent": 2},
    {"indent": "\r\t", "separators": (" ,", " :"), "ensure_ascii": False},
)


def without_ours(value: Any) -> Any:
    """Return messages without our thinking, by taking the documents apart."""
    messages = []
    for message in value:
        content = message["content"]
        if isinstance(content, list):
            content = [b for b in content if b != OURS]
        if content or not message["content"]:
            messages.append({**message, "content": content})
    return messages


class TestUnsigned:
    @pytest.mark.parametrize("style", STYLES)
    @pytest.mark.parametrize(
        "messages",
        [
            [turn(OURS)],
            [turn(OURS, WORDS)],
            [turn(WORDS, OURS)],
            [turn(WORDS, OURS, CALL)],
            [turn(OURS, OURS, WORDS)],
            [turn(OURS, WORDS, OURS)],
            [turn(WORDS, OURS, OURS)],
            [turn(THEIRS, OURS, WORDS, OURS, CALL, OURS, OURS)],
            [turn(WORDS), turn(OURS)],
            [turn(OURS), turn(WORDS)],
            [turn(WORDS), turn(OURS), turn(CALL)],
            [turn(OURS), turn(OURS, WORDS), turn(OURS), turn(OURS)],
            [turn(OURS), turn(OURS)],
            [turn(), turn(OURS, WORDS), {"role": "user", "content": ""}],
            [{"role": "user", "content": claude_lb.UNSIGNED}, turn(WORDS, OURS)],
        ],
    )
    def test_goes_and_every_other_byte_stays(
        self, messages: list[Any], style: dict[str, Any]
    ) -> None:
        body = json.dumps(asking(*messages, x=[OURS]), **style).encode()
        for given in (body, bytearray(body)):
            found = bytes(claude_lb.without_unsigned(given))
            left = without_ours(messages)
            assert json.loads(found) == asking(*left, x=[OURS])
            if "indent" not in style:
                again = json.dumps(asking(*left, x=[OURS]), **style).encode()
                assert found == again
            # All that is left was there before, in this order
            rest = iter(body)
            assert all(byte in rest for byte in found)

    @pytest.mark.parametrize("seed", range(40))
    def test_any_mix_of_blocks(self, seed: int) -> None:
        rng = random.Random(seed)
        blocks = (OURS, OURS, THEIRS, WORDS, CALL)
        messages = [
            turn(*rng.choices(blocks, k=rng.randrange(5)))
            for _ in range(rng.randrange(6))
        ]
        style = STYLES[seed % 2]
        body = json.dumps(asking(*messages), **style).encode()
        left = json.dumps(asking(*without_ours(messages)), **style).encode()
        assert claude_lb.without_unsigned(body) == left

    def test_signatures_that_begin_so_go_as_well(self) -> None:
        marked = {**OURS, "signature": claude_lb.UNSIGNED + ":more"}
        hidden = {"type": "redacted_thinking", "data": claude_lb.UNSIGNED}
        body = json.dumps(asking(turn(marked, WORDS, hidden))).encode()
        left = json.dumps(asking(turn(WORDS))).encode()
        assert claude_lb.without_unsigned(body) == left

    @pytest.mark.parametrize(
        "body",
        [
            json.dumps(asking(turn(THEIRS, WORDS))).encode(),
            json.dumps(asking(turn(WORDS, CALL))).encode(),
            json.dumps(asking(turn([OURS], "x", 1, None))).encode(),
            json.dumps(asking({"content": OURS}, {"content": None}, [OURS])).encode(),
            json.dumps({"messages": OURS}).encode(),
            json.dumps([asking(turn(OURS))]).encode(),
            json.dumps(asking(turn(OURS))).encode()[:-1],
            json.dumps(asking(turn(OURS))).encode() + b"x",
            json.dumps(asking(turn(OURS))).encode("utf-16"),
            b'{"messages":[{"content":[' + MARK,
            b'{"messages":' + b"[" * 5000 + b"]" * 5000 + b"," + MARK + b":1}",
            MARK,
            b"",
        ],
    )
    def test_what_has_none_or_cannot_be_read_stays(self, body: bytes) -> None:
        assert claude_lb.without_unsigned(body) is body

    def test_of_a_name_written_twice_the_last_counts(self) -> None:
        one, two = json.dumps([OURS]), json.dumps([OURS, WORDS])
        body = '{"messages":[{"content":%s,"content":%s}]}'
        found = claude_lb.without_unsigned((body % (one, two)).encode())
        assert found == (body % (one, json.dumps([WORDS]))).encode()


def seal_error(message: str) -> bytes:
    error = {"type": "invalid_request_error", "message": message}
    return json.dumps({"type": "error", "error": error, "request_id": "r"}).encode()


class TestForeign:
    @pytest.mark.parametrize(
        ("foreign", "block"),
        [
            (True, {"type": "thinking", "thinking": "x"}),
            (True, {"type": "thinking", "thinking": "x", "signature": None}),
            (True, {"type": "thinking", "thinking": "x", "signature": ""}),
            (True, OURS),
            (True, {"type": "thinking", "thinking": "x", "signature": "no base64"}),
            (True, {"type": "thinking", "thinking": "x", "signature": "é" * 60}),
            (
                True,
                {"type": "thinking", "thinking": "x", "signature": "claude#" + SIGNED},
            ),
            (True, {"type": "thinking", "thinking": "x", "signature": "A" * 41}),
            (
                True,
                {"type": "thinking", "signature": base64.b64encode(b"x" * 31).decode()},
            ),
            (
                False,
                {"type": "thinking", "signature": base64.b64encode(b"x" * 32).decode()},
            ),
            (False, {"type": "thinking", "signature": SIGNED.rstrip("=")}),
            (False, THEIRS),
            (True, {"type": "redacted_thinking"}),
            (True, {"type": "redacted_thinking", "data": "no base64!"}),
            (False, {"type": "redacted_thinking", "data": "c2ln"}),
            (False, WORDS),
            (False, {"type": "tool_use", "name": "thinking", "input": OURS}),
            (False, {"type": ["thinking"], "x": "thinking"}),
        ],
    )
    def test_what_the_api_cannot_have_signed_goes(
        self, foreign: bool, block: dict[str, Any]
    ) -> None:
        body = json.dumps(asking(turn(WORDS, block, CALL))).encode()
        left = json.dumps(asking(turn(WORDS, CALL))).encode()
        found = claude_lb.without_foreign(body, "Invalid `signature`")
        assert found == (left if foreign else None)

    def test_the_block_that_the_error_names_goes(self) -> None:
        messages = [turn(WORDS, role="user"), turn(THEIRS, THEIRS, CALL)]
        body = json.dumps(asking(*messages)).encode()
        left = json.dumps(asking(messages[0], turn(THEIRS, CALL))).encode()
        words = "messages.1.content.1: Invalid `signature` in `thinking` block"
        assert claude_lb.without_foreign(body, words) == left
        words = words.replace(": ", ".thinking.signature: ", 1)
        assert claude_lb.without_foreign(bytearray(body), words) == left

    @pytest.mark.parametrize(
        "words",
        [
            "",
            "messages.0.content.0: Invalid `signature` in `thinking` block",  # a text
            "messages.1.content.2: Invalid `signature` in `thinking` block",  # a call
            "messages.7.content.0: Invalid `signature` in `thinking` block",
            "see messages.1.content.0: Invalid `signature` in `thinking` block",
            f"messages.1.content.{'1' * 5000}: Invalid",
        ],
    )
    def test_nothing_to_take_out_is_none(self, words: str) -> None:
        messages = [turn(WORDS, role="user"), turn(THEIRS, THEIRS, CALL)]
        body = json.dumps(asking(*messages)).encode()
        assert claude_lb.without_foreign(body, words) is None
        assert claude_lb.without_foreign(body[:-1], words) is None

    def test_a_turn_that_had_only_such_thinking_goes(self) -> None:
        asked = turn(WORDS, role="user")
        body = json.dumps(asking(asked, turn(OURS, OURS), asked)).encode()
        left = json.dumps(asking(asked, asked)).encode()
        assert claude_lb.without_foreign(body, "") == left


class TestSignatureError:
    @pytest.mark.parametrize(
        "message",
        [
            "messages.1.content.0: Invalid `signature` in `thinking` block",
            "messages.12.content.34: Invalid signature in thinking block",
            "Invalid signature in thinking block",
            "Invalid `signature` in thinking block",
            "messages.1.content.0: Invalid `signature` in `thinking` block. Odd",
            "messages.1.content.0: Invalid `data` in `redacted_thinking` block",
            "messages.1.content.0.thinking.signature: Invalid `signature` in `thinking`"
            " block",
            "messages.1.content.0.thinking.signature: Field required",
        ],
    )
    def test_is_one(self, message: str) -> None:
        assert claude_lb.is_signature_error(400, seal_error(message))
        assert not claude_lb.is_signature_error(500, seal_error(message))

    @pytest.mark.parametrize(
        "body",
        [
            seal_error("x: Invalid `signature` in `thinking` block"),
            seal_error("your text 'Invalid signature in thinking block' is too long"),
            seal_error("messages.1.content.0.text: Field required"),
            seal_error("messages.1.content.0: Invalid `signature` in `text` block"),
            seal_error("`thinking` blocks in the latest message cannot be modified"),
            b'{"error":"Invalid signature in thinking block"}',
            b'{"error":{"message":["Invalid signature in thinking block"]}}',
            b"Invalid signature in thinking block",
            b"",
        ],
    )
    def test_is_none(self, body: bytes) -> None:
        assert not claude_lb.is_signature_error(400, body)


UNKNOWN_TIME = "1970-01-01T00:00:00Z"


def model_entry(name: str, **facts: object) -> dict[str, Any]:
    shown = {"display_name": name, "created_at": UNKNOWN_TIME, **facts}
    return {"type": "model", "id": name, **shown}


class TestListedModels:
    def test_the_apis_own_list_is_kept_with_all_fields(self) -> None:
        models = [
            model_entry("a", max_tokens=5, later={"x": 1}),
            {"type": "model", "id": "b"},
        ]
        page = {"data": models, "has_more": True, "first_id": "a", "last_id": "b"}
        for dialect in ("anthropic", "openai"):
            body = json.dumps(page).encode()
            assert claude_lb.listed_models(body, dialect) == models

    @pytest.mark.parametrize(
        ("item", "expected"),
        [
            (
                {"id": "a", "object": "model", "created": 1687882411, "owned_by": "o"},
                model_entry("a", created_at="2023-06-27T16:13:31Z"),
            ),
            (
                {"id": "a/b", "name": "Label: B"},
                model_entry("a/b", display_name="Label: B"),
            ),
            ({"id": "a", "created": 0.5}, model_entry("a")),
            ({"id": "a", "created": -1}, model_entry("a")),
            ({"id": "a", "created": True}, model_entry("a")),
            ({"id": "a", "created": "2023"}, model_entry("a")),
            ({"id": "a", "created": 10**400}, model_entry("a")),
            (
                {"name": "llama3:8b", "model": "llama3:8b", "modified_at": "x"},
                model_entry("llama3:8b"),
            ),
            ({"id": "", "name": "n"}, model_entry("n")),
        ],
    )
    def test_other_lists_are_turned_into_it(
        self, item: dict[str, Any], expected: dict[str, Any]
    ) -> None:
        for name in ("data", "models"):
            body = json.dumps({"object": "list", name: [item]}).encode()
            assert claude_lb.listed_models(body, "openai") == [expected]

    def test_of_zeds_list_what_we_can_ask_for(self) -> None:
        models = [
            {"provider": "anthropic", "id": "claude-x", "display_name": "Claude X"},
            {"provider": "open_ai", "id": "gpt-x", "display_name": "GPT X"},
            {"id": "claude-y"},
        ]
        body = json.dumps({"models": models, "default_model": "gpt-x"}).encode()
        expected = [
            model_entry("claude-x", display_name="Claude X"),
            model_entry("claude-y"),
        ]
        assert claude_lb.listed_models(body, "zed") == expected

    @pytest.mark.parametrize(
        "body",
        [
            b"",
            b"<html>",
            b"[]",
            b'{"data":{}}',
            b'{"data":"x","models":7}',
            b'{"data":[1,null,"a",[],{},{"id":5},{"id":"a\\nb"},{"type":"model"}]}',
            b'{"data":[{"type":"model","id":["a"]},{"type":"model","id":""}]}',
            json.dumps({"data": [{"id": "a" * 257}]}).encode(),
        ],
    )
    def test_nonsense_lists_nothing(self, body: bytes) -> None:
        assert claude_lb.listed_models(body, "openai") == []


class TestMergedModels:
    def test_each_once_as_listed_then_as_named(self) -> None:
        listed = [
            ("one", [model_entry("b"), model_entry("a")]),
            ("two", [model_entry("c"), model_entry("a"), model_entry("b")]),
        ]
        named = ["z", "a", "claude-*", "gpt-?", "!bad", "*", "y", "z"]
        found = claude_lb.merged_models(listed, named, lambda _: True)
        assert [m["id"] for m in found] == ["b", "a", "c", "z", "y"]
        assert found[-1] == model_entry("y")

    def test_who_says_more_of_a_model_counts(self) -> None:
        rich = model_entry("a", max_tokens=5)
        dated = model_entry("a", created_at="2026-01-01T00:00:00Z")
        other = model_entry("a", created_at="2025-01-01T00:00:00Z")
        for first, second, expected in (
            (model_entry("a"), rich, rich),
            (rich, dated, rich),
            (model_entry("a"), dated, dated),
            (dated, other, dated),
        ):
            listed = [("one", [first]), ("two", [second])]
            assert claude_lb.merged_models(listed, ["a"], lambda _: True) == [expected]

    def test_only_what_can_be_used(self) -> None:
        listed = [("one", [model_entry("a"), model_entry("b")])]
        found = claude_lb.merged_models(listed, ["c", "d"], {"b", "c"}.__contains__)
        assert [m["id"] for m in found] == ["b", "c"]

    def test_nothing_is_nothing(self) -> None:
        assert claude_lb.merged_models([], [], lambda _: True) == []


class TestModelsPage:
    @pytest.mark.parametrize(
        ("query", "first", "last", "more"),
        [
            ("", 0, 19, True),
            ("limit=3", 0, 2, True),
            ("limit=30&beta=true", 0, 29, False),
            ("limit=1000", 0, 29, False),
            ("after_id=m4", 5, 24, True),
            ("limit=2&after_id=m4", 5, 6, True),
            ("limit=5&after_id=m24", 25, 29, False),
            ("after_id=m28", 29, 29, False),
            ("before_id=m5", 0, 4, False),
            ("limit=2&before_id=m5", 3, 4, True),
            ("before_id=m25", 5, 24, True),
            ("limit=3&before_id=m3", 0, 2, False),
        ],
    )
    def test_pages(self, query: str, first: int, last: int, more: bool) -> None:
        models = [model_entry(f"m{n}") for n in range(30)]
        assert claude_lb.models_page(models, query) == {
            "data": models[first : last + 1],
            "has_more": more,
            "first_id": f"m{first}",
            "last_id": f"m{last}",
        }

    @pytest.mark.parametrize("query", ["after_id=b", "before_id=a"])
    def test_an_empty_page(self, query: str) -> None:
        page = {"data": [], "has_more": False, "first_id": None, "last_id": None}
        assert (
            claude_lb.models_page([model_entry("a"), model_entry("b")], query) == page
        )
        assert claude_lb.models_page([], "") == page

    def test_pages_in_turn_show_each_model_once(self) -> None:
        models = [model_entry(f"m{n}") for n in range(50)]
        for cursor, end in (("after_id", "last_id"), ("before_id", "first_id")):
            query, seen = "limit=7", list[str]()
            if cursor == "before_id":
                query, seen = "limit=7&before_id=m49", ["m49"]
            for _ in range(8):
                page = claude_lb.models_page(models, query)
                ids = [m["id"] for m in page["data"]]
                seen = seen + ids if cursor == "after_id" else ids + seen
                query = f"limit=7&{cursor}={page[end]}"
                if not page["has_more"]:
                    break
            assert seen == [m["id"] for m in models]

    @pytest.mark.parametrize(
        ("query", "words"),
        [
            ("limit=0", "limit: expected"),
            ("limit=1001", "limit: expected"),
            ("limit=", "limit: expected"),
            ("limit=x", "limit: expected"),
            ("limit=-1", "limit: expected"),
            ("limit=1.5", "limit: expected"),
            ("limit=%D9%A1", "limit: expected"),
            ("limit=" + "9" * 5000, "limit: expected"),
            ("after_id=x", "after_id: no model"),
            ("before_id=", "before_id: no model"),
            ("after_id=a&before_id=a", "after_id: cannot be combined"),
            ("a&" * 20, "too many parts"),
        ],
    )
    def test_nonsense_is_refused(self, query: str, words: str) -> None:
        with pytest.raises(claude_lb.RefusedError, match=words) as caught:
            claude_lb.models_page([model_entry("a")], query)
        assert (caught.value.status, caught.value.close) == (400, False)


class TestModelShapes:
    def test_one_by_its_id(self) -> None:
        models = [model_entry("a"), model_entry("b")]
        assert claude_lb.model_named(models, "b") == models[1]
        with pytest.raises(claude_lb.RefusedError, match="model: c is") as caught:
            claude_lb.model_named(models, "c")
        assert (caught.value.status, caught.value.close) == (404, False)

    @pytest.mark.parametrize(
        ("created_at", "created"),
        [
            ("2023-06-27T16:13:31Z", 1687882411),
            ("2023-06-27T18:13:31+02:00", 1687882411),
            (UNKNOWN_TIME, 0),
            ("2023-06-27", 0),
            ("soon", 0),
            (None, 0),
        ],
    )
    def test_for_clients_of_openai(self, created_at: object, created: int) -> None:
        shown = claude_lb.openai_models([model_entry("a", created_at=created_at)])
        facts = {"object": "model", "created": created, "owned_by": "claude_lb"}
        assert shown == {"object": "list", "data": [{"id": "a", **facts}]}

    def test_which_shape_a_client_wants(self) -> None:
        for field in (b"anthropic-version", b"x-api-key"):
            assert claude_lb.wants_anthropic({b"host": "x", field: ""})
        assert not claude_lb.wants_anthropic(
            {b"host": "x", b"authorization": "Bearer x"}
        )


class TestCalibration:
    @pytest.mark.parametrize("factor", [0.6, 1.0, 1.7])
    @pytest.mark.parametrize("seed", range(10))
    def test_finds_a_hidden_factor(self, factor: float, seed: int) -> None:
        rng, calibration = random.Random(seed), claude_lb.Calibration()
        for _ in range(20):
            words = " ".join(["some words"] * int(10 ** rng.uniform(0, 4)))
            request = {"model": "m", "messages": [{"content": words}]}
            estimated = claude_lb.estimate_of(request)
            real = round(estimated * factor * rng.uniform(0.9, 1.1))
            read_tokens = rng.randrange(real)
            said = claude_lb.Usage(real - read_tokens, 9, read_tokens)
            calibration.learn("m", estimated, said)
        for estimated in (100, 5_000, 180_000):
            found = calibration.apply("m", estimated)
            assert abs(found / (estimated * factor) - 1) < 0.1

    def test_follows_a_factor_that_changes(self) -> None:
        calibration = claude_lb.Calibration()
        for real in (1000, 1000, 2000):
            for _ in range(20):
                calibration.learn("m", 1000, claude_lb.Usage(real))
        assert calibration.apply("m", 500) == pytest.approx(1000, rel=0.02)

    def test_says_when_it_cannot_know(self) -> None:
        calibration = claude_lb.Calibration()
        for seen in range(3):
            assert (calibration.seen("m"), calibration.factor("m")) == (seen, None)
            assert calibration.apply("m", 77) == 77
            calibration.learn("m", 100, claude_lb.Usage(200))
        assert (calibration.seen("m"), calibration.factor("m")) == (3, 2.0)
        assert (calibration.apply("m", 77), calibration.apply("m", 0)) == (154, 1)
        assert calibration.factor("n") is None

    def test_the_first_answers_count_alike(self) -> None:
        calibration = claude_lb.Calibration()
        for real in (100, 200, 300, 400, 500):
            calibration.learn("m", 100, claude_lb.Usage(real))
        assert calibration.factor("m") == pytest.approx(3.0)
        calibration.learn("m", 100, claude_lb.Usage(400))
        assert calibration.factor("m") == pytest.approx(3.2)

    def test_all_of_the_input_counts(self) -> None:
        calibration = claude_lb.Calibration()
        for _ in range(3):
            calibration.learn("m", 100, claude_lb.Usage(10, 999, 20, 30, 40))
        assert calibration.factor("m") == pytest.approx(1.0)

    @pytest.mark.parametrize(
        ("estimated", "usage"),
        [
            (0, claude_lb.Usage(100)),
            (-5, claude_lb.Usage(100)),
            (100, claude_lb.Usage()),
            (100, claude_lb.Usage(None, 5, 100, 100)),
            (100, claude_lb.Usage(0)),
            (100, claude_lb.Usage(-100)),
            (100, claude_lb.Usage(10**10)),
            (100, claude_lb.Usage(200, cache_read_tokens=-100)),
            (100, claude_lb.Usage(100, web_searches=1)),
        ],
    )
    def test_what_tells_nothing(self, estimated: int, usage: claude_lb.Usage) -> None:
        calibration = claude_lb.Calibration()
        calibration.learn("m", estimated, usage)
        assert calibration.seen("m") == 0

    def test_an_odd_answer_moves_it_only_so_far(self) -> None:
        calibration = claude_lb.Calibration()
        for real in (10**9, 10**9, 10**9):
            calibration.learn("high", 1, claude_lb.Usage(real))
            calibration.learn("low", real, claude_lb.Usage(1))
        assert calibration.factor("high") == pytest.approx(5.0)
        assert calibration.factor("low") == pytest.approx(0.2)

    def test_who_was_learnt_of_least_lately_goes(self) -> None:
        calibration = claude_lb.Calibration()
        for number in range(256):
            calibration.learn(f"m{number}", 100, claude_lb.Usage(100))
        calibration.learn("m0", 100, claude_lb.Usage(100))
        calibration.learn("new", 100, claude_lb.Usage(100))
        seen = [calibration.seen(name) for name in ("m0", "m1", "m2", "m255", "new")]
        assert seen == [2, 0, 1, 1, 1]


README_DIALECTS = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
OA_PNG = "iVBORw0KGgo="
OA_ASK = {"model": "claude-x", "max_tokens": 9, "messages": []}
OA_TOOL = {
    "name": "look",
    "description": "looks",
    "input_schema": {"type": "object", "properties": {"q": {"type": "string"}}},
}
OA_OTHERS = {"temperature": 0.5, "top_p": 0.9, "top_k": 40}


def oa_sent(
    fields: Mapping[str, Any], model: str | None = None, **settings: Any
) -> dict[str, Any]:
    """Return the body that a request becomes; the request must stay as it is."""
    request = {**OA_ASK, **fields}
    before = copy.deepcopy(request)
    made = claude_lb.OpenAISettings(**settings)
    call = claude_lb.openai_request(request, made, model)
    assert request == before
    sent: dict[str, Any] = json.loads(call.body)
    return sent


def oa_messages(*messages: Any, **settings: Any) -> list[dict[str, Any]]:
    """Return what messages become."""
    sent: list[dict[str, Any]] = oa_sent({"messages": list(messages)}, **settings)[
        "messages"
    ]
    return sent


def oa_user(*blocks: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(blocks)}


def oa_assistant(*blocks: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": list(blocks)}


def oa_text(text: str, **more: Any) -> dict[str, Any]:
    return {"type": "text", "text": text, **more}


def oa_use(id_: str, name: str = "look", **arguments: Any) -> dict[str, Any]:
    return {"type": "tool_use", "id": id_, "name": name, "input": arguments}


def oa_result(id_: str, content: Any = None, **more: Any) -> dict[str, Any]:
    made = {"type": "tool_result", "tool_use_id": id_, **more}
    return made if content is None else {**made, "content": content}


def oa_image(**source: str) -> dict[str, Any]:
    made = source or {"type": "base64", "media_type": "image/png", "data": OA_PNG}
    return {"type": "image", "source": made}


OA_IMAGE_PART = {
    "type": "image_url",
    "image_url": {"url": f"data:image/png;base64,{OA_PNG}"},
}
OA_PDF = {
    "type": "document",
    "title": "Report",
    "source": {"type": "base64", "media_type": "application/pdf", "data": "JVBE"},
}


def oa_called(id_: str, arguments: str, name: str = "look") -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"id": id_, "type": "function", "function": function}


def oa_refused(fields: Mapping[str, Any], **settings: Any) -> str:
    """Return why a request is refused."""
    with pytest.raises(claude_lb.RefusedError) as caught:
        oa_sent(fields, **settings)
    assert (caught.value.status, caught.value.close) == (400, False)
    return caught.value.message


class TestOpenAIRequest:
    """What a request becomes, row by row."""

    def test_golden_bytes(self) -> None:
        request = {
            "model": "claude-x",
            "max_tokens": 100,
            "stream": True,
            "system": "be brief",
            "messages": [{"role": "user", "content": "grüße 😀"}],
        }
        call = claude_lb.openai_request(request, claude_lb.OpenAISettings(), "gpt-oss")
        assert call == claude_lb.OpenAICall(
            '{"model":"gpt-oss","messages":[{"role":"system","content":"be brief"},'
            '{"role":"user","content":"grüße 😀"}],"max_tokens":100,"stream":true,'
            '"stream_options":{"include_usage":true}}'.encode(),
            stream=True,
            model="claude-x",
            names={},
            stops=(),
        )

    def test_model(self) -> None:
        assert oa_sent({})["model"] == "claude-x"
        assert oa_sent({}, "other/model")["model"] == "other/model"
        assert oa_refused({"model": 3}) == "model: a text is needed"

    @pytest.mark.parametrize(
        ("system", "messages"),
        [
            (None, []),
            ("", []),
            ([], []),
            ("a", [{"role": "system", "content": "a"}]),
            (
                [oa_text("a", cache_control={"type": "ephemeral"}), oa_text("b")],
                [{"role": "system", "content": "a\nb"}],
            ),
            ([oa_text(""), oa_text("b")], [{"role": "system", "content": "b"}]),
        ],
    )
    def test_system(self, system: Any, messages: list[Any]) -> None:
        assert oa_sent({"system": system})["messages"] == messages

    def test_system_refused(self) -> None:
        why = oa_refused({"system": [oa_text("a"), oa_image()]})
        assert why == "system.1: this endpoint's upstream knows no image blocks"

    def test_system_in_the_middle(self) -> None:
        assert oa_messages(
            {"role": "user", "content": "a"},
            {"role": "system", "content": [oa_text("now")]},
            {"role": "assistant", "content": "b"},
        ) == [
            {"role": "user", "content": "a"},
            {"role": "system", "content": "now"},
            {"role": "assistant", "content": "b"},
        ]

    @pytest.mark.parametrize(
        ("blocks", "content"),
        [
            ([oa_text("a")], "a"),
            ([oa_text("a"), oa_text(""), oa_text("b")], "a\nb"),
            ([oa_image()], [OA_IMAGE_PART]),
            (
                [oa_text("a"), oa_image(), oa_text("b")],
                [oa_text("a"), OA_IMAGE_PART, oa_text("b")],
            ),
            (
                [oa_image(type="url", url="https://h/p.png")],
                [{"type": "image_url", "image_url": {"url": "https://h/p.png"}}],
            ),
            (
                [
                    {
                        "type": "document",
                        "title": "T",
                        "context": "C",
                        "source": {
                            "type": "text",
                            "media_type": "text/plain",
                            "data": "words",
                        },
                        "citations": {"enabled": True},
                    }
                ],
                "[document]\ntitle: T\ncontext: C\n\nwords",
            ),
            (
                [
                    {
                        "type": "document",
                        "source": {"type": "content", "content": "words"},
                    }
                ],
                "[document]\nwords",
            ),
            (
                [
                    {
                        "type": "document",
                        "source": {
                            "type": "content",
                            "content": [oa_text("a"), oa_image()],
                        },
                    }
                ],
                [oa_text("[document]"), oa_text("a"), OA_IMAGE_PART],
            ),
            (
                [
                    {
                        "type": "search_result",
                        "title": "T",
                        "source": "https://h",
                        "content": [oa_text("a"), oa_text("b")],
                    }
                ],
                "[search result]\ntitle: T\nsource: https://h\na\nb",
            ),
        ],
    )
    def test_user_blocks(self, blocks: list[Any], content: Any) -> None:
        assert oa_messages(oa_user(*blocks)) == [{"role": "user", "content": content}]

    def test_pdf_as_file(self) -> None:
        data = {"file_data": "data:application/pdf;base64,JVBE"}
        file = {"type": "file", "file": {"filename": "Report", **data}}
        assert oa_messages(oa_user(OA_PDF), files=True)[0]["content"] == [file]
        plain = {**OA_PDF, "title": None, "context": "C"}
        assert oa_messages(oa_user(plain), files=True)[0]["content"] == [
            oa_text("[document]\ncontext: C"),
            {"type": "file", "file": {"filename": "document.pdf", **data}},
        ]

    @pytest.mark.parametrize(
        ("block", "why"),
        [
            (
                OA_PDF,
                "messages.0.content.0.source: this endpoint takes no documents but"
                " text",
            ),
            (
                {**OA_PDF, "source": {"type": "url", "url": "https://h/p.pdf"}},
                "messages.0.content.0.source: a url source can't be read here: send"
                " the document",
            ),
            (
                {**OA_PDF, "source": {"type": "file", "file_id": "f"}},
                "messages.0.content.0.source: a file source can't be read here: send"
                " the document",
            ),
            (
                oa_image(type="file", file_id="f"),
                "messages.0.content.0.source: a file source can't be read here: send"
                " the image",
            ),
            (
                {"type": "container_upload", "file_id": "f"},
                "messages.0.content.0: this endpoint's upstream knows no"
                " container_upload blocks",
            ),
            ({"type": 5}, "messages.0.content.0.type: a text is needed"),
            ({}, "messages.0.content.0.type: a text is needed"),
            ("x", "messages.0.content.0: an object is needed"),
            ({"type": "text"}, "messages.0.content.0.text: a text is needed"),
            ({"type": "image"}, "messages.0.content.0.source: an object is needed"),
            (
                {"type": "tool_result"},
                "messages.0.content.0.tool_use_id: a text is needed",
            ),
            (
                oa_result("t", [{"type": "video"}]),
                "messages.0.content.0.content.0: this endpoint's upstream knows no"
                " video blocks",
            ),
        ],
    )
    def test_user_blocks_refused(self, block: Any, why: str) -> None:
        assert oa_refused({"messages": [oa_user(block)]}) == why

    @pytest.mark.parametrize(
        ("messages", "why"),
        [
            (None, "messages: a list is needed"),
            ("x", "messages: a list is needed"),
            ([3], "messages.0: an object is needed"),
            (
                [{"role": "tool", "content": ""}],
                "messages.0.role: user, assistant or system is needed",
            ),
            ([{"role": "user"}], "messages.0.content: a list is needed"),
            (
                [oa_assistant({"type": "server_tool_use", "id": "s"})],
                "messages.0.content.0: this endpoint's upstream knows no"
                " server_tool_use blocks",
            ),
            (
                [oa_assistant({"type": "tool_use", "id": "t", "name": "n"})],
                "messages.0.content.0.input: an object is needed",
            ),
        ],
    )
    def test_messages_refused(self, messages: Any, why: str) -> None:
        assert oa_refused({"messages": messages}) == why

    def test_empty_turns(self) -> None:
        dropped = [oa_user(oa_text("")), oa_assistant(oa_text("")), oa_assistant()]
        assert oa_messages(*dropped) == []

    def test_same_role_in_a_row(self) -> None:
        assert oa_messages(
            {"role": "user", "content": "a"},
            oa_user(oa_text("b")),
            oa_assistant(oa_text("c")),
            oa_assistant(oa_use("t1", q="d")),
        ) == [
            {"role": "user", "content": "a\nb"},
            {
                "role": "assistant",
                "content": "c",
                "tool_calls": [oa_called("t1", '{"q":"d"}')],
            },
        ]

    def test_r28_tools_and_results(self) -> None:
        """Parallel calls are one message; results come before the user's words."""
        assert oa_messages(
            {"role": "user", "content": "go"},
            oa_assistant(
                oa_text("I look"), oa_use("t1", q="ä"), oa_use("t2", q="b", n=[1, 2])
            ),
            oa_user(
                oa_text("and then"),
                oa_result("t2", [oa_text("x"), oa_text("y")]),
                oa_result("t1", "no such thing", is_error=True),
                oa_result("unknown"),
                oa_text("go on"),
            ),
        ) == [
            {"role": "user", "content": "go"},
            {
                "role": "assistant",
                "content": "I look",
                "tool_calls": [
                    oa_called("t1", '{"q":"ä"}'),
                    oa_called("t2", '{"q":"b","n":[1,2]}'),
                ],
            },
            {"role": "tool", "tool_call_id": "t2", "content": "x\ny"},
            {"role": "tool", "tool_call_id": "t1", "content": "[error] no such thing"},
            {"role": "tool", "tool_call_id": "unknown", "content": ""},
            {"role": "user", "content": "and then\ngo on"},
        ]

    def test_results_over_two_messages(self) -> None:
        roles = oa_messages(
            oa_assistant(oa_use("a"), oa_use("b")),
            oa_user(oa_result("a", "1"), oa_text("x")),
            oa_user(oa_result("b", "2")),
        )
        assert [m["role"] for m in roles] == ["assistant", "tool", "tool", "user"]

    def test_only_calls_have_null_content(self) -> None:
        assert oa_messages(oa_assistant(oa_use("t1"))) == [
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [oa_called("t1", "{}")],
            }
        ]

    def test_images_and_files_in_results(self) -> None:
        assert oa_messages(
            oa_user(
                oa_result("t1", [oa_text("a"), oa_image()], is_error=True),
                oa_result("t2", [OA_PDF]),
                oa_text("what is it?"),
            ),
            files=True,
        ) == [
            {
                "role": "tool",
                "tool_call_id": "t1",
                "content": "[error] a\n[image: see the next user message]",
            },
            {
                "role": "tool",
                "tool_call_id": "t2",
                "content": "[file: see the next user message]",
            },
            {
                "role": "user",
                "content": [
                    oa_text("[result of tool call t1]"),
                    OA_IMAGE_PART,
                    oa_text("[result of tool call t2]"),
                    {
                        "type": "file",
                        "file": {
                            "filename": "Report",
                            "file_data": "data:application/pdf;base64,JVBE",
                        },
                    },
                    oa_text("what is it?"),
                ],
            },
        ]

    def test_tool_reference(self) -> None:
        block = {"type": "tool_reference", "tool_name": "look"}
        sent = oa_messages(oa_user(oa_result("t", [block])))
        assert sent[0]["content"] == "[tool: look]"

    def test_r24_thinking_in_history(self) -> None:
        turn = oa_assistant(
            {"type": "thinking", "thinking": "hm", "signature": "s"},
            {"type": "redacted_thinking", "data": "d"},
            {"type": "fallback"},
            oa_text("so"),
            {"type": "thinking", "thinking": "", "signature": "s"},
        )
        plain = {"role": "assistant", "content": "so"}
        assert oa_messages(turn) == [{**plain, "reasoning_content": "hm"}]
        assert oa_messages(turn, reasoning=False) == [plain]
        alone = oa_assistant({"type": "thinking", "thinking": "hm"})
        assert oa_messages(alone) == [
            {"role": "assistant", "content": "", "reasoning_content": "hm"}
        ]
        assert oa_messages(alone, reasoning=False) == []

    @pytest.mark.parametrize(
        ("fields", "effort"),
        [
            ({}, None),
            ({"thinking": {"type": "adaptive", "display": "omitted"}}, None),
            ({"thinking": {"type": "between_tools"}}, None),
            ({"thinking": {"type": "disabled"}}, None),
            (
                {"thinking": {"type": "disabled"}, "output_config": {"effort": "high"}},
                None,
            ),
            ({"thinking": {"type": "enabled", "budget_tokens": 2047}}, "low"),
            ({"thinking": {"type": "enabled", "budget_tokens": 2048}}, "medium"),
            ({"thinking": {"type": "enabled", "budget_tokens": 8191}}, "medium"),
            ({"thinking": {"type": "enabled", "budget_tokens": 8192}}, "high"),
            (
                {
                    "thinking": {"type": "enabled", "budget_tokens": 9000},
                    "output_config": {"effort": "low"},
                },
                "low",
            ),
            ({"output_config": {"effort": "low"}}, "low"),
            (
                {"thinking": {"type": "adaptive"}, "output_config": {"effort": "max"}},
                "high",
            ),
            ({"output_config": {"effort": "xhigh"}}, "high"),
            ({"output_config": {"effort": None}}, None),
        ],
    )
    def test_effort(self, fields: dict[str, Any], effort: str | None) -> None:
        assert oa_sent(fields).get("reasoning_effort") == effort
        assert "reasoning_effort" not in oa_sent(fields, reasoning=False)

    @pytest.mark.parametrize(
        ("choice", "fields"),
        [
            (None, {}),
            ({"type": "auto"}, {"tool_choice": "auto"}),
            ({"type": "any"}, {"tool_choice": "required"}),
            ({"type": "none"}, {"tool_choice": "none"}),
            (
                {"type": "tool", "name": "look"},
                {"tool_choice": {"type": "function", "function": {"name": "look"}}},
            ),
            (
                {"type": "auto", "disable_parallel_tool_use": True},
                {"tool_choice": "auto", "parallel_tool_calls": False},
            ),
            (
                {"type": "any", "disable_parallel_tool_use": False},
                {"tool_choice": "required"},
            ),
        ],
    )
    def test_tool_choice(self, choice: Any, fields: dict[str, Any]) -> None:
        sent = oa_sent({"tools": [OA_TOOL], "tool_choice": choice})
        function = {
            "name": "look",
            "description": "looks",
            "parameters": OA_TOOL["input_schema"],
        }
        assert sent.pop("tools") == [{"type": "function", "function": function}]
        rest = {"model": "claude-x", "messages": [], "max_tokens": 9}
        assert sent == {**rest, **fields}

    def test_tools(self) -> None:
        tool = {
            "type": "custom",
            "name": "n",
            "input_schema": {"type": "object"},
            "strict": True,
            "defer_loading": True,
            "input_examples": [{}],
            "cache_control": {"type": "ephemeral"},
        }
        function = {"name": "n", "parameters": {"type": "object"}, "strict": True}
        made = [{"type": "function", "function": function}]
        assert oa_sent({"tools": [tool]})["tools"] == made
        assert "tool_choice" not in oa_sent({"tool_choice": {"type": "auto"}})

    def test_tool_names(self) -> None:
        """Odd names are changed, and stay apart; the answer's are changed back."""
        long = "m" * 70
        names = ["a.b", "a_b", "a b", f"{long}1", f"{long}2", "", "ok"]
        request = {
            **OA_ASK,
            "tools": [{"name": n, "input_schema": {}} for n in names],
            "tool_choice": {"type": "tool", "name": "a b"},
            "messages": [oa_assistant(oa_use("t", "a b"), oa_use("u", "gone.tool"))],
        }
        call = claude_lb.openai_request(request, claude_lb.OpenAISettings(), None)
        sent = json.loads(call.body)
        made = [tool["function"]["name"] for tool in sent["tools"]]
        assert made[:3] == ["a_b", "a_b_2", "a_b_3"]
        assert made[3:] == ["m" * 64, "m" * 62 + "_2", "tool", "ok"]
        assert sent["tool_choice"]["function"]["name"] == "a_b_3"
        used = [c["function"]["name"] for c in sent["messages"][0]["tool_calls"]]
        assert used == ["a_b_3", "gone_tool"]
        back = [call.names.get(name, name) for name in [*made, "gone_tool"]]
        assert back == [*names, "gone.tool"]
        assert "ok" not in call.names

    @pytest.mark.parametrize(
        ("fields", "sent"),
        [
            (OA_OTHERS, OA_OTHERS),
            ({"stop_sequences": ["a", "b", "c", "d"]}, {"stop": ["a", "b", "c", "d"]}),
            ({"stop_sequences": []}, {}),
            ({"metadata": {"user_id": "u" * 64}}, {"user": "u" * 64}),
            (
                {"metadata": {"user_id": "u" * 65}},
                {"user": hashlib.sha256(b"u" * 65).hexdigest()},
            ),
            ({"metadata": {"user_id": None}}, {}),
            ({"metadata": {}}, {}),
            ({"service_tier": "auto"}, {"service_tier": "auto"}),
            ({"service_tier": "standard_only"}, {"service_tier": "default"}),
            (
                {
                    "output_config": {
                        "format": {"type": "json_schema", "schema": {"type": "object"}}
                    }
                },
                {
                    "response_format": {
                        "type": "json_schema",
                        "json_schema": {
                            "name": "output",
                            "schema": {"type": "object"},
                            "strict": True,
                        },
                    }
                },
            ),
            (
                {"stream": True},
                {"stream": True, "stream_options": {"include_usage": True}},
            ),
            ({"stream": False}, {}),
            (
                {
                    "cache_control": {"type": "ephemeral"},
                    "context_management": {"edits": []},
                    "diagnostics": {},
                    "speed": "fast",
                    "fallbacks": [],
                    "container": None,
                    "mcp_servers": [],
                    "thread": None,
                    "inference_geo": "global",
                    "anything_new": None,
                },
                {},
            ),
        ],
    )
    def test_fields(self, fields: dict[str, Any], sent: dict[str, Any]) -> None:
        made = oa_sent(fields)
        assert made == {"model": "claude-x", "messages": [], "max_tokens": 9, **sent}

    def test_settings(self) -> None:
        made = oa_sent({"stream": True}, stream_usage=False)
        assert "stream_options" not in made
        made = oa_sent({}, max_tokens_field="max_completion_tokens")
        assert (made["max_completion_tokens"], "max_tokens" in made) == (9, False)
        extra = {"seed": 7, "model": "mine", "provider": {"only": ["x"]}}
        made = oa_sent({}, "other", extra_body=extra)
        assert made == {"messages": [], "max_tokens": 9, **extra}

    def test_format_of_the_beta(self) -> None:
        wish = {"type": "json_schema", "schema": {}}
        assert "response_format" in oa_sent({"output_format": wish})

    @pytest.mark.parametrize(
        ("fields", "why"),
        [
            ({"max_tokens": 0}, "max_tokens: this endpoint's upstream has no cache"),
            ({"max_tokens": "9"}, "max_tokens: a number is needed"),
            ({"max_tokens": True}, "max_tokens: a number is needed"),
            ({"stop_sequences": list("abcde")}, "stop_sequences: this endpoint's"),
            ({"stop_sequences": [1]}, "stop_sequences.0: a text is needed"),
            ({"thinking": {"type": "new"}}, "thinking.type: new is not known here"),
            ({"thinking": "on"}, "thinking: an object is needed"),
            ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens: a number"),
            ({"output_config": {"effort": "huge"}}, "output_config.effort: one of low"),
            ({"output_config": {"effort": ["low"]}}, "output_config.effort: one of"),
            (
                {"output_config": {"format": {"type": "grammar"}}},
                "output_config.format.type: json_schema is needed",
            ),
            (
                {"output_format": {"type": "json_schema"}},
                "output_format.schema: an object is needed",
            ),
            ({"service_tier": "priority"}, "service_tier: one of auto, standard_only"),
            ({"service_tier": ["x"]}, "service_tier: one of auto, standard_only"),
            ({"tool_choice": {"type": "any"}}, "tool_choice: there are no tools"),
            ({"tool_choice": {"type": "some"}}, "tool_choice.type: one of auto, any"),
            ({"tool_choice": {"type": []}}, "tool_choice.type: one of auto, any"),
            (
                {"tools": [OA_TOOL], "tool_choice": {"type": "tool"}},
                "tool_choice.name: a text is needed",
            ),
            ({"tool_choice": "auto"}, "tool_choice: an object is needed"),
            (
                {"tools": [OA_TOOL, {"type": "web_search_20250305", "name": "w"}]},
                "tools.1.type: web_search_20250305 is known to Anthropic's",
            ),
            ({"tools": [{"name": "n"}]}, "tools.0.input_schema: an object is needed"),
            ({"tools": {}, "messages": 1}, "messages: a list is needed"),
            ({"metadata": {"user_id": 1}}, "metadata.user_id: a text is needed"),
            ({"container": "c"}, "container: containers live on"),
            ({"mcp_servers": [{}]}, "mcp_servers: only Anthropic's"),
            ({"thread": {"type": "create"}}, "thread: threads are kept by"),
            ({"inference_geo": "us"}, "inference_geo: nobody knows where"),
            ({"anything_new": 1}, "anything_new: this endpoint's upstream can't"),
            ({"seed": 1}, "seed: this endpoint's upstream can't be told (see extra"),
        ],
    )
    def test_refused(self, fields: dict[str, Any], why: str) -> None:
        assert oa_refused(fields).startswith(why)

    def test_lone_surrogates_survive(self) -> None:
        text = json.loads('"\\ud83d"')
        turns = [oa_user(oa_text(text)), oa_assistant(oa_use("t", q=text))]
        call = claude_lb.openai_request(
            {**OA_ASK, "messages": turns}, claude_lb.OpenAISettings(), None
        )
        assert call.body.startswith(b'{"model"')

    def test_deep_input(self) -> None:
        deep: Any = {}
        for _ in range(100_000):
            deep = {"d": deep}
        turns = [oa_assistant({**oa_use("t"), "input": deep})]
        with pytest.raises(
            claude_lb.RefusedError, match=r"messages: .*nested too deeply"
        ):
            claude_lb.openai_request(
                {**OA_ASK, "messages": turns}, claude_lb.OpenAISettings(), None
            )
        while deep:  # one by one: the interpreter frees nested ones by recursion
            deep = deep.pop("d")

    def test_dropped_fields_stand_in_the_table(self) -> None:
        for name in (*claude_lb.OPENAI_DROPS, "cache_control"):
            assert f"`{name}`" in README_DIALECTS
            oa_sent({name: {"x": 1}})

    def test_random_conversations_lose_no_text(self) -> None:
        """Each text, image and call of a conversation is there, once and in order."""
        rng = random.Random(5)
        for _ in range(200):
            turns, marks = oa_conversation(rng)
            sent = json.dumps(oa_messages(*turns))
            assert all(sent.count(mark) == 1 for mark in marks)
            roles = [m["role"] for m in oa_messages(*turns)]
            for before, after in zip(roles, roles[1:]):
                assert after != "tool" or before in ("assistant", "tool")


def oa_conversation(rng: random.Random) -> tuple[list[Any], list[str]]:
    """Return the messages of a conversation, and marks that must be in it once."""
    turns: list[Any] = []
    marks: list[str] = []

    def mark() -> str:
        marks.append(f"<{len(marks)}>")
        return marks[-1]

    for _ in range(rng.randint(1, 6)):
        asked = [oa_text(mark()) for _ in range(rng.randint(1, 3))]
        if rng.random() < 0.3:
            asked.append(oa_image(type="url", url=f"https://h/{mark()}"))
        calls = [f"id{len(turns)}_{n}" for n in range(rng.randint(0, 3))]
        uses = [oa_use(c, q=mark()) for c in calls]
        if not uses or rng.random() < 0.5:
            uses = [oa_text(mark()), *uses]
        turns += [oa_user(*asked), oa_assistant(*uses)]
        results = [oa_result(c, [oa_text(mark()), oa_text(mark())]) for c in calls]
        rng.shuffle(results)
        if results:
            turns.append(oa_user(*results))
    return turns, marks


def oa_call(**more: Any) -> Any:
    return claude_lb.OpenAICall(b"", stream=True, model="claude-x", **more)


def oa_message(
    message: Mapping[str, Any],
    finish: Any = "stop",
    usage: Any = None,
    call: Any = None,
    **more: Any,
) -> dict[str, Any]:
    """Return what a completion with one choice becomes."""
    document = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "choices": [{"index": 0, "message": message, "finish_reason": finish, **more}],
        "usage": usage,
    }
    body = json.dumps(document).encode()
    made: dict[str, Any] = claude_lb.openai_message(body, call or oa_call(), "msg_fb")
    return made


OA_COMPLETION = """{"id":"chatcmpl-9","object":"chat.completion","created":1,
"model":"gpt","choices":[{"index":0,"message":{"role":"assistant",
"content":"grüße","reasoning_content":"hm","tool_calls":[
{"id":"call_1","type":"function","function":{"name":"look","arguments":"{\\"q\\":1}"}},
{"id":"call_2","type":"function","function":{"name":"a_b","arguments":""}}]},
"logprobs":null,"finish_reason":"tool_calls"}],
"usage":{"prompt_tokens":100,"completion_tokens":7,"total_tokens":107,
"prompt_tokens_details":{"cached_tokens":60,"cache_write_tokens":30}}}""".encode()


class TestOpenAIMessage:
    """What a whole answer becomes."""

    def test_golden(self) -> None:
        call = oa_call(names={"a_b": "a.b"})
        assert claude_lb.openai_message(OA_COMPLETION, call, "msg_fb") == {
            "id": "msg_chatcmpl-9",
            "type": "message",
            "role": "assistant",
            "model": "claude-x",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": claude_lb.UNSIGNED},
                {"type": "text", "text": "grüße"},
                {"type": "tool_use", "id": "call_1", "name": "look", "input": {"q": 1}},
                {"type": "tool_use", "id": "call_2", "name": "a.b", "input": {}},
            ],
            "stop_reason": "tool_use",
            "stop_sequence": None,
            "usage": {
                "input_tokens": 10,
                "cache_read_input_tokens": 60,
                "cache_creation_input_tokens": 30,
                "output_tokens": 7,
            },
        }

    @pytest.mark.parametrize(
        ("message", "finish", "reason"),
        [
            ({"content": "a"}, "stop", "end_turn"),
            ({"content": "a"}, "length", "max_tokens"),
            ({"content": "a"}, "content_filter", "refusal"),
            ({"content": "a"}, None, "end_turn"),
            ({"content": "a"}, "eos", "end_turn"),
            ({"content": "a"}, ["odd"], "end_turn"),
            ({"content": "a"}, "tool_calls", "end_turn"),
            ({"tool_calls": [oa_called("c", "{}")]}, "tool_calls", "tool_use"),
            ({"tool_calls": [oa_called("c", "{}")]}, "stop", "tool_use"),
            ({"tool_calls": [oa_called("c", "{}")]}, None, "tool_use"),
            ({"tool_calls": [oa_called("c", "{}")]}, "length", "max_tokens"),
            ({"function_call": {"name": "n"}}, "function_call", "tool_use"),
            ({"content": None, "refusal": "no"}, "stop", "refusal"),
        ],
    )
    def test_finish(self, message: Any, finish: Any, reason: str) -> None:
        made = oa_message(message, finish)
        assert (made["stop_reason"], made["stop_sequence"]) == (reason, None)

    def test_stop_sequence_where_told(self) -> None:
        call = oa_call(stops=("###",))
        made = oa_message({"content": "a"}, call=call, stop_reason="###")
        told = (made["stop_reason"], made["stop_sequence"])
        assert told == ("stop_sequence", "###")
        made = oa_message({"content": "a"}, call=call, stop_reason=2)
        assert made["stop_reason"] == "end_turn"

    @pytest.mark.parametrize(
        ("message", "content"),
        [
            ({"content": None}, []),
            ({"content": ""}, []),
            ({"content": "a"}, [oa_text("a")]),
            (
                {"content": [oa_text("a"), {"type": "x"}, 3, oa_text("b")]},
                [oa_text("a"), oa_text("b")],
            ),
            ({"refusal": "no"}, [oa_text("no")]),
            (
                {"content": "a", "reasoning": "r"},
                [
                    {
                        "type": "thinking",
                        "thinking": "r",
                        "signature": claude_lb.UNSIGNED,
                    },
                    oa_text("a"),
                ],
            ),
            (
                {
                    "content": [
                        {"type": "thinking", "thinking": [oa_text("t")]},
                        oa_text("a"),
                    ]
                },
                [
                    {
                        "type": "thinking",
                        "thinking": "t",
                        "signature": claude_lb.UNSIGNED,
                    },
                    oa_text("a"),
                ],
            ),
            ({"tool_calls": [{}, {"function": None}], "content": "a"}, [oa_text("a")]),
        ],
    )
    def test_content(self, message: Any, content: list[Any]) -> None:
        assert oa_message(message)["content"] == content

    @pytest.mark.parametrize(
        ("arguments", "given"),
        [
            ("", {}),
            (" ", {}),
            (None, {}),
            ("{}", {}),
            ('{"a": "é"} ', {"a": "é"}),
            ({"a": 1}, {"a": 1}),
            ('{"a": ', {"arguments": '{"a": '}),
            ("[1]", {"arguments": "[1]"}),
            ([1], {"arguments": "[1]"}),
            ("7", {"arguments": "7"}),
            ("hello", {"arguments": "hello"}),
        ],
    )
    def test_arguments(self, arguments: Any, given: Any) -> None:
        made = oa_message({"tool_calls": [oa_called("c", arguments)]})
        assert made["content"][0]["input"] == given

    def test_tool_ids(self) -> None:
        calls = [
            oa_called("", "{}"),
            oa_called("functions.look:0", "{}"),
            oa_called("x", "{}"),
            oa_called("x", "{}"),
        ]
        made = oa_message({"tool_calls": calls})
        ids = [block["id"] for block in made["content"]]
        assert ids == ["toolu_msg_fb_0", "functions_look_0", "x", "x_3"]

    def test_ids(self) -> None:
        body = b'{"choices":[{"message":{"content":"a"}}]}'
        assert claude_lb.openai_message(body, oa_call(), "msg_fb")["id"] == "msg_fb"
        body = b'{"id":"gen:1/2","choices":[{"message":{"content":"a"}}]}'
        made = claude_lb.openai_message(body, oa_call(), "msg_fb")
        assert made["id"] == "msg_gen_1_2"

    @pytest.mark.parametrize(
        ("usage", "told"),
        [
            (None, (0, 0, None, 0)),
            ({"prompt_tokens": 5, "completion_tokens": 2}, (5, 0, None, 2)),
            (
                {
                    "prompt_tokens": 5,
                    "completion_tokens": 2,
                    "prompt_tokens_details": None,
                },
                (5, 0, None, 2),
            ),
            (
                {"prompt_tokens": 5, "prompt_tokens_details": {"cached_tokens": 9}},
                (0, 9, None, 0),
            ),
            (
                {
                    "prompt_tokens": 9,
                    "prompt_tokens_details": {"cache_write_tokens": 4},
                },
                (5, 0, 4, 0),
            ),
            ({"prompt_tokens": 9, "prompt_cache_hit_tokens": 4}, (5, 4, None, 0)),
            ({"prompt_tokens": "9", "completion_tokens": -3}, (0, 0, None, 0)),
            ({"prompt_tokens": 9.0, "completion_tokens": 1e300}, (9, 0, None, 0)),
        ],
    )
    def test_usage(self, usage: Any, told: tuple[Any, ...]) -> None:
        made = oa_message({"content": "a"}, usage=usage)["usage"]
        names = ("input", "cache_read_input", "cache_creation_input", "output")
        assert tuple(made.get(f"{name}_tokens") for name in names) == told

    @pytest.mark.parametrize(
        ("body", "why"),
        [
            (b"", "Expecting value"),
            (b"<html>", "Expecting value"),
            (b"[]", "no completion"),
            (b"{}", "no completion"),
            (b'{"choices":[]}', "no completion"),
            (b'{"choices":[{"index":0}]}', "no completion"),
            (b'{"choices":[{"index":0,"message":"x"}]}', "no completion"),
            (b'{"error":{"message":"provider is down","code":502}}', "is down"),
            (b'{"choices":[{"error":{"message":"cut"},"message":{}}]}', "cut"),
            (b'{"choices":[{"finish_reason":"error","message":{}}]}', "failed"),
            pytest.param(b"[" * 100_000, "nested too deeply", id="deep"),
        ],
    )
    def test_no_completion(self, body: bytes, why: str) -> None:
        with pytest.raises(ValueError, match=why):
            claude_lb.openai_message(body, oa_call(), "msg_fb")

    def test_other_choices_are_ignored(self) -> None:
        body = (
            b'{"choices":[{"index":1,"message":{"content":"no"}},'
            b'{"index":0,"message":{"content":"yes"}}]}'
        )
        made = claude_lb.openai_message(body, oa_call(), "msg_fb")
        assert made["content"] == [oa_text("yes")]


def oa_events(stream: bytes) -> list[dict[str, Any]]:
    """Return the events of a stream of the Messages API, whose form is checked."""
    assert stream == b"" or stream.endswith(b"\n\n")
    events = []
    for event in stream.split(b"\n\n")[:-1]:
        name, data = event.split(b"\n")
        document = json.loads(data[6:])
        assert name == b"event: " + document["type"].encode()
        assert data[:6] == b"data: "
        events.append(document)
    return events


def oa_block(start: dict[str, Any], deltas: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the block that a start and its deltas make."""
    kinds = [delta["type"] for delta in deltas]
    block = dict(start)
    if block["type"] == "text":
        assert set(kinds) == {"text_delta"}
        block["text"] += "".join(d["text"] for d in deltas)
    elif block["type"] == "thinking":
        assert kinds.count("signature_delta") == 1
        assert kinds[-1] == "signature_delta"
        block["thinking"] = "".join(d["thinking"] for d in deltas[:-1])
        block["signature"] = deltas[-1]["signature"]
    else:
        assert block["type"] == "tool_use"
        assert set(kinds) == {"input_json_delta"}
        assert (block["input"], bool(block["id"])) == ({}, True)
        block["json"] = "".join(d["partial_json"] for d in deltas)
    return block


def oa_walked(stream: bytes) -> dict[str, Any]:
    """Return the message that a stream tells of; its grammar is checked."""
    events = oa_events(stream)
    assert [e["type"] for e in events].count("message_start") == 1
    assert [e["type"] for e in events[-2:]] == ["message_delta", "message_stop"]
    message = dict(events[0]["message"])
    assert (message["content"], message["stop_reason"]) == ([], None)
    start: dict[str, Any] | None = None
    deltas: list[dict[str, Any]] = []
    blocks: list[dict[str, Any]] = []
    for event in events[1:-2]:
        assert event["index"] == len(blocks)
        if event["type"] == "content_block_start":
            assert start is None
            start, deltas = event["content_block"], []
        elif event["type"] == "content_block_delta":
            assert start is not None
            deltas.append(event["delta"])
        else:
            assert event["type"] == "content_block_stop"
            assert start is not None
            blocks.append(oa_block(start, deltas))
            start = None
    assert start is None
    for block in blocks:
        if block["type"] == "tool_use" and message:
            written = block.pop("json")
            cut = events[-2]["delta"]["stop_reason"] == "max_tokens"
            block["input"] = written if cut else json.loads(written)
    return {
        **message,
        **events[-2]["delta"],
        "content": blocks,
        "usage": {**message["usage"], **events[-2]["usage"]},
    }


def oa_stream(*payloads: bytes, call: Any = None) -> bytes:
    """Return what a stream's pieces become."""
    stream = claude_lb.OpenAIStream(call or oa_call(), "msg_fb", 42)
    made = b"".join(map(stream.feed, payloads)) + stream.close()
    assert stream.feed(b"data: {}\n\n") + stream.close() == b""
    return made


def oa_all_splits(payload: bytes, call: Any = None) -> bytes:
    """Return what a stream becomes, which is the same for each way to cut it."""
    whole = oa_stream(payload, call=call)
    for at in range(len(payload)):
        assert oa_stream(payload[:at], payload[at:], call=call) == whole
    each = (payload[i : i + 1] for i in range(len(payload)))
    assert oa_stream(*each, call=call) == whole
    return whole


def oa_chunk(
    delta: Mapping[str, Any] | None = None, finish: Any = None, **more: Any
) -> bytes:
    """Return one event of an upstream."""
    choice = {"index": 0, "delta": delta or {}, "finish_reason": finish}
    return oa_data({"id": "c1", "choices": [choice], **more})


def oa_data(document: Any) -> bytes:
    return b"data: %b\n\n" % json.dumps(document).encode()


def oa_fragment(
    index: int | None = 0,
    id_: str | None = None,
    name: str | None = None,
    arguments: Any = None,
) -> bytes:
    """Return a piece of a tool call."""
    function = {"name": name, "arguments": arguments}
    told = {key: value for key, value in function.items() if value is not None}
    call = {"index": index, "id": id_, "function": told}
    known = {key: value for key, value in call.items() if value is not None}
    return oa_chunk({"tool_calls": [known]})


def oa_tools(
    *payloads: bytes, finish: Any = "tool_calls"
) -> list[tuple[str, str, Any]]:
    """Return (id, name, input) of the calls of a stream, in all splits the same."""
    payload = b"".join(payloads) + oa_chunk({}, finish) + OA_DONE
    blocks = oa_walked(oa_all_splits(payload))["content"]
    uses = [b for b in blocks if b["type"] == "tool_use"]
    return [(b["id"], b["name"], b["input"]) for b in uses]


OA_DONE = b"data: [DONE]\n\n"
OA_USAGE = {"prompt_tokens": 30, "completion_tokens": 5}
OA_GOLDEN_IN = (
    'data: {"id":"c1","choices":[{"index":0,"delta":{"role":"assistant","content":""},'
    '"finish_reason":null}]}\n\n'
    'data: {"id":"c1","choices":[{"index":0,"delta":{"reasoning_content":"hm"}}]}\n\n'
    'data: {"id":"c1","choices":[{"index":0,"delta":{"content":"grüße"}}]}\n\n'
    'data: {"id":"c1","choices":[{"index":0,"delta":{"tool_calls":[{"index":0,'
    '"id":"t1","type":"function","function":{"name":"look","arguments":""}}]}}]}\n\n'
    'data: {"id":"c1","choices":[{"index":0,"delta":{"tool_calls":[{"index":0,'
    '"function":{"arguments":"{\\"q\\":"}}]}}]}\n\n'
    'data: {"id":"c1","choices":[{"index":0,"delta":{"tool_calls":[{"index":0,'
    '"function":{"arguments":"1}"}}]}}]}\n\n'
    'data: {"id":"c1","choices":[{"index":0,"delta":{},'
    '"finish_reason":"tool_calls"}]}\n\n'
    'data: {"id":"c1","choices":[],"usage":{"prompt_tokens":30,"completion_tokens":5,'
    '"prompt_tokens_details":{"cached_tokens":20}}}\n\n'
    "data: [DONE]\n\n"
).encode()
OA_GOLDEN_OUT = (
    (
        'event: message_start\ndata: {"type":"message_start","message":{"id":"msg_c1",'
        '"type":"message","role":"assistant","model":"claude-x","content":[],'
        '"stop_reason":null,"stop_sequence":null,"usage":{"input_tokens":42,'
        '"output_tokens":0}}}\n\n'
        'event: content_block_start\ndata: {"type":"content_block_start","index":0,'
        '"content_block":{"type":"thinking","thinking":"","signature":""}}\n\n'
        'event: content_block_delta\ndata: {"type":"content_block_delta","index":0,'
        '"delta":{"type":"thinking_delta","thinking":"hm"}}\n\n'
        'event: content_block_delta\ndata: {"type":"content_block_delta","index":0,'
        '"delta":{"type":"signature_delta","signature":"UNSIGNED"}}\n\n'
        'event: content_block_stop\ndata: {"type":"content_block_stop","index":0}\n\n'
        'event: content_block_start\ndata: {"type":"content_block_start","index":1,'
        '"content_block":{"type":"text","text":""}}\n\n'
        'event: content_block_delta\ndata: {"type":"content_block_delta","index":1,'
        '"delta":{"type":"text_delta","text":"grüße"}}\n\n'
        'event: content_block_stop\ndata: {"type":"content_block_stop","index":1}\n\n'
        'event: content_block_start\ndata: {"type":"content_block_start","index":2,'
        '"content_block":{"type":"tool_use","id":"t1","name":"look","input":{}}}\n\n'
        'event: content_block_delta\ndata: {"type":"content_block_delta","index":2,'
        '"delta":{"type":"input_json_delta","partial_json":"{\\"q\\":"}}\n\n'
        'event: content_block_delta\ndata: {"type":"content_block_delta","index":2,'
        '"delta":{"type":"input_json_delta","partial_json":"1}"}}\n\n'
        'event: content_block_stop\ndata: {"type":"content_block_stop","index":2}\n\n'
        'event: message_delta\ndata: {"type":"message_delta","delta":{'
        '"stop_reason":"tool_use","stop_sequence":null},"usage":{"input_tokens":10,'
        '"cache_read_input_tokens":20,"output_tokens":5}}\n\n'
        'event: message_stop\ndata: {"type":"message_stop"}\n\n'
    )
    .replace("UNSIGNED", claude_lb.UNSIGNED)
    .encode()
)


class TestOpenAIStream:
    """What a stream becomes, whatever pieces it comes in."""

    def test_r27_golden(self) -> None:
        assert oa_all_splits(OA_GOLDEN_IN) == OA_GOLDEN_OUT

    def test_line_ends(self) -> None:
        odd = OA_GOLDEN_IN.replace(b"\n", b"\r\n")
        assert oa_all_splits(odd) == OA_GOLDEN_OUT
        assert oa_stream(OA_GOLDEN_IN.replace(b"\n", b"\r")) == OA_GOLDEN_OUT
        odd = OA_GOLDEN_IN.replace(b"data: ", b": OPENROUTER PROCESSING\n\ndata:")
        assert oa_all_splits(odd) == OA_GOLDEN_OUT
        assert oa_stream(OA_GOLDEN_IN[:-1]) == OA_GOLDEN_OUT
        assert oa_stream(OA_GOLDEN_IN[:-2]) == OA_GOLDEN_OUT

    def test_stream_and_answer_are_the_same(self) -> None:
        tools = [oa_called("a", '{"q":1}'), oa_called("b", "", "a_b")]
        message = {"reasoning": "hm", "content": "grüße", "tool_calls": tools}
        call = oa_call(names={"a_b": "a.b"})
        whole = oa_message(message, "tool_calls", OA_USAGE, call)
        calls = [{"index": i, **c} for i, c in enumerate(tools)]
        payload = oa_chunk({"reasoning": "hm"}, id="chatcmpl-1")
        payload += oa_chunk({"content": "grüße"})
        payload += oa_chunk({"tool_calls": calls}, "tool_calls", usage=OA_USAGE)
        assert oa_walked(oa_all_splits(payload + OA_DONE, call)) == whole

    def test_each_event_at_once(self) -> None:
        stream = claude_lb.OpenAIStream(oa_call(), "msg_fb", 42)
        assert stream.feed(b": hello\n\n") == b""
        first = stream.feed(oa_chunk({"role": "assistant", "content": ""}))
        assert [e["type"] for e in oa_events(first)] == ["message_start"]
        for word in ("a", "b"):
            made = oa_events(stream.feed(oa_chunk({"content": word})))
            assert made[-1]["delta"] == {"type": "text_delta", "text": word}
        stream.feed(oa_fragment(0, "t", "look", "{"))
        for word in ('"q"', ":", "1"):
            made = oa_events(stream.feed(oa_fragment(0, arguments=word)))
            given = {"type": "input_json_delta", "partial_json": word}
            assert [e["delta"] for e in made] == [given]
        made = oa_events(stream.feed(oa_fragment(0, arguments="}")))
        assert len(made) == 1
        made = oa_events(stream.feed(oa_fragment(1, "u", "look", "{")))
        kinds = [e["type"][14:] for e in made]
        assert kinds == ["stop", "start", "delta"]  # the first one is whole

    @pytest.mark.parametrize(
        "chunk",
        [
            {"id": "", "choices": [], "prompt_filter_results": []},
            {"choices": [{"index": 1, "delta": {"content": "no"}}]},
            {"choices": None, "usage": None},
            {"choices": [{"delta": None}]},
            {"choices": [{"delta": {"content": None, "tool_calls": None}}]},
        ],
    )
    def test_chunks_that_say_nothing(self, chunk: Any) -> None:
        made = oa_stream(oa_data(chunk))
        kinds = [e["type"] for e in oa_events(made)]
        assert kinds == ["message_start", "error"]

    @pytest.mark.parametrize(
        ("delta", "block"),
        [
            ({"content": "a"}, oa_text("a")),
            ({"content": [oa_text("a"), oa_text("b")]}, oa_text("ab")),
            ({"refusal": "no"}, oa_text("no")),
            (
                {"reasoning": "r"},
                {"type": "thinking", "thinking": "r", "signature": claude_lb.UNSIGNED},
            ),
        ],
    )
    def test_deltas(self, delta: Any, block: Any) -> None:
        payload = oa_chunk(delta) + oa_chunk({}, "stop") + OA_DONE
        made = oa_walked(oa_all_splits(payload))
        assert made["content"] == [block]
        reason = "refusal" if "refusal" in delta else "end_turn"
        assert made["stop_reason"] == reason

    def test_thinking_between_texts(self) -> None:
        words = [("content", "a"), ("reasoning", "b"), ("content", "c")]
        payload = b"".join(oa_chunk({key: word}) for key, word in words) + OA_DONE
        blocks = oa_walked(oa_all_splits(payload))["content"]
        assert [b["type"] for b in blocks] == ["text", "thinking", "text"]

    @pytest.mark.parametrize(
        "fragments",
        [
            # id and name first, arguments in pieces
            [(0, "t", "look", ""), (0, None, None, '{"q"'), (0, None, None, ":1}")],
            # all at once
            [(0, "t", "look", '{"q":1}')],
            # arguments as an object
            [(0, "t", "look", {"q": 1})],
            # a late id
            [(0, None, "look", '{"q"'), (0, "t", None, ":1"), (0, None, None, "}")],
            # a late name
            [(0, "t", None, '{"q"'), (0, None, "look", ":1}")],
            # both late
            [(0, None, None, '{"q":1'), (0, None, "look", "}"), (0, "t", None, None)],
            # a name in pieces
            [(0, "t", "lo", ""), (0, None, "ok", ""), (0, None, None, '{"q":1}')],
            # a name that grows
            [(0, "t", "lo", ""), (0, "t", "look", ""), (0, None, None, '{"q":1}')],
            # an id in pieces
            [(0, None, "look", None), (0, "t", None, None), (0, "", "", '{"q":1}')],
            # id and name again and again
            [(0, "t", "look", '{"q"'), (0, "t", "look", ":1"), (0, "t", "look", "}")],
            # without an index
            [(None, "t", "look", '{"q"'), (None, None, None, ":1}")],
            [(None, "t", "look", '{"q"'), (None, "t", "look", ":1}")],
            # the index comes once
            [(0, "t", "look", '{"q"'), (None, None, None, ":1}")],
            # an index that counts from somewhere else
            [(3, "t", "look", '{"q"'), (3, None, None, ":1}")],
            # blanks
            [(0, "t", "look", " "), (0, None, None, '{"q":1}'), (0, None, None, "\n")],
        ],
    )
    def test_one_call_in_any_pieces(self, fragments: Sequence[Any]) -> None:
        made = oa_tools(*(oa_fragment(*f) for f in fragments))
        assert made == [("t", "look", {"q": 1})]

    def test_id_in_pieces(self) -> None:
        made = oa_tools(
            oa_fragment(0, "call"),
            oa_fragment(0, "_7"),
            oa_fragment(0, None, "look", "{}"),
        )
        assert made == [("call_7", "look", {})]

    @pytest.mark.parametrize(
        "fragments",
        [
            # one after the other
            [
                (0, "t", "look", '{"q"'),
                (0, None, None, ":1}"),
                (1, "u", "see", '{"r":'),
                (1, None, None, "2}"),
            ],
            # both heads first
            [
                (0, "t", "look", ""),
                (1, "u", "see", ""),
                (0, None, None, '{"q":1}'),
                (1, None, None, '{"r":2}'),
            ],
            # in turns
            [
                (0, "t", "look", '{"q"'),
                (1, "u", "see", '{"r"'),
                (0, None, None, ":1"),
                (1, None, None, ":2"),
                (1, None, None, "}"),
                (0, None, None, "}"),
            ],
            # the second is whole before the first
            [
                (0, "t", "look", '{"q"'),
                (1, "u", "see", '{"r":2}'),
                (0, None, None, ":1}"),
            ],
            # the index is always 0, ids differ
            [(0, "t", "look", '{"q":1}'), (0, "u", "see", '{"r":2}')],
            [
                (0, "t", "look", ""),
                (0, None, None, '{"q":1}'),
                (0, "u", "see", ""),
                (0, None, None, '{"r":2}'),
            ],
            # no index
            [(None, "t", "look", '{"q":1}'), (None, "u", "see", '{"r":2}')],
            # blanks after the end
            [
                (0, "t", "look", '{"q":1}'),
                (1, "u", "see", '{"r":'),
                (0, None, None, " \n"),
                (1, None, None, "2}"),
            ],
        ],
    )
    def test_two_calls(self, fragments: Sequence[Any]) -> None:
        made = oa_tools(*(oa_fragment(*f) for f in fragments))
        assert made == [("t", "look", {"q": 1}), ("u", "see", {"r": 2})]

    def test_calls_without_ids(self) -> None:
        made = oa_tools(
            oa_fragment(None, None, "look", '{"q":1}'),
            oa_fragment(None, None, "look", '{"q":2}'),
            oa_fragment(None, None, "see", "{}"),
        )
        assert made == [
            ("toolu_msg_fb_0", "look", {"q": 1}),
            ("toolu_msg_fb_1", "look", {"q": 2}),
            ("toolu_msg_fb_2", "see", {}),
        ]

    def test_the_same_id_twice(self) -> None:
        made = oa_tools(
            oa_fragment(0, "t", "look", "{}"), oa_fragment(1, "t", "look", "{}")
        )
        assert [id_ for id_, *_ in made] == ["t", "t_1"]

    def test_many_calls_in_random_order(self) -> None:
        """Pieces of calls, shuffled but each call's own in order."""
        rng = random.Random(7)
        for _ in range(100):
            count = rng.randint(1, 5)
            queues = []
            for index in range(count):
                text = json.dumps({"n": index, "s": "é}" * rng.randint(0, 9)})
                cuts = sorted(rng.sample(range(1, len(text)), rng.randint(1, 5)))
                cut = zip([0, *cuts], [*cuts, len(text)])
                pieces = [oa_fragment(index, arguments=text[a:b]) for a, b in cut]
                queues.append([oa_fragment(index, f"t{index}", "look"), *pieces])
            payload = b"".join(queue.pop(0) for queue in queues)
            while any(queues):
                payload += rng.choice([q for q in queues if q]).pop(0)
            made = oa_walked(oa_stream(payload + oa_chunk({}, "stop") + OA_DONE))
            assert [b["input"]["n"] for b in made["content"]] == list(range(count))
            assert made["stop_reason"] == "tool_use"

    @pytest.mark.parametrize("text", ["[1]", "7", '"x"', "hello", " hello {}"])
    def test_arguments_that_are_no_object(self, text: str) -> None:
        made = oa_tools(
            oa_fragment(0, "t", "look", text[:1]),
            oa_fragment(0, arguments=text[1:]),
            oa_fragment(1, "u", "see", ""),
        )
        assert made == [("t", "look", {"arguments": text}), ("u", "see", {})]

    def test_cut_arguments_stay_as_they_are(self) -> None:
        made = oa_tools(oa_fragment(0, "t", "look", '{"q":"a'), finish="length")
        assert made == [("t", "look", '{"q":"a')]

    def test_empty_calls_are_none(self) -> None:
        empty = oa_chunk({"tool_calls": [{}]}) + oa_chunk({"tool_calls": []}, "stop")
        made = oa_walked(oa_all_splits(oa_chunk({"content": "a"}) + empty + OA_DONE))
        assert (made["content"], made["stop_reason"]) == ([oa_text("a")], "end_turn")

    def test_legacy_function_call(self) -> None:
        payload = oa_chunk({"function_call": {"name": "look", "arguments": ""}})
        payload += oa_chunk({"function_call": {"arguments": '{"q":1}'}})
        assert oa_tools(payload, finish="function_call") == [
            ("toolu_msg_fb_0", "look", {"q": 1})
        ]

    def test_tool_names_are_changed_back(self) -> None:
        call = oa_call(names={"a_b": "a.b"})
        payload = oa_fragment(0, "t", "a_b", "{}") + OA_DONE
        block = oa_walked(oa_all_splits(payload, call))["content"][0]
        assert block["name"] == "a.b"

    def test_text_after_whole_calls(self) -> None:
        payload = oa_fragment(0, "t", "look", "{}") + oa_chunk({"content": "a"})
        stream = claude_lb.OpenAIStream(oa_call(), "msg_fb", 42)
        assert b'"text":"a"' in stream.feed(payload)
        made = oa_walked(oa_all_splits(payload + OA_DONE))
        assert [b["type"] for b in made["content"]] == ["tool_use", "text"]

    def test_text_among_calls_waits(self) -> None:
        made = oa_walked(
            oa_all_splits(
                oa_chunk({"content": "a"})
                + oa_fragment(0, "t", "look", '{"q"')
                + oa_chunk({"content": "b"})
                + oa_fragment(0, arguments=":1}")
                + oa_chunk({"content": "c"})
                + oa_fragment(1, "u", "look", "{}")
                + oa_chunk({"reasoning": "d"})
                + oa_chunk({}, "tool_calls")
                + OA_DONE
            )
        )
        told = [b.get("text") or b.get("thinking") or b["id"] for b in made["content"]]
        assert told == ["a", "t", "u", "bc", "d"]

    def test_a_closed_call_that_goes_on(self) -> None:
        made = oa_stream(
            oa_fragment(0, "t", "look", "{}"),
            oa_fragment(1, "u", "look", "{}"),
            oa_fragment(0, arguments='"x"'),
        )
        last = oa_events(made)[-1]
        assert last["error"]["message"].endswith("went on after its end")

    @pytest.mark.parametrize(
        ("payload", "told"),
        [
            (
                oa_chunk({}, "stop") + oa_data({"choices": [], "usage": OA_USAGE}),
                (30, 5),
            ),
            (oa_chunk({}, "stop", usage=OA_USAGE) + OA_DONE, (30, 5)),
            (
                oa_chunk({}, None, usage={"prompt_tokens": 30, "completion_tokens": 1})
                + oa_chunk({}, "stop", usage=OA_USAGE)
                + OA_DONE,
                (30, 5),
            ),
            (
                oa_chunk({}, "stop", usage={"prompt_tokens": 1})
                + oa_data({"choices": [], "usage": OA_USAGE})
                + OA_DONE,
                (30, 5),
            ),
            (oa_chunk({}, "stop", usage=None) + OA_DONE, (42, 0)),
            (
                oa_data(
                    {
                        "choices": [
                            {"delta": {}, "finish_reason": "stop", "usage": OA_USAGE}
                        ]
                    }
                ),
                (30, 5),
            ),
        ],
    )
    def test_usage(self, payload: bytes, told: tuple[int, int]) -> None:
        made = oa_walked(oa_all_splits(oa_chunk({"content": "a"}) + payload))["usage"]
        assert (made["input_tokens"], made["output_tokens"]) == told

    def test_message_delta_waits_for_usage(self) -> None:
        stream = claude_lb.OpenAIStream(oa_call(), "msg_fb", 42)
        stream.feed(oa_chunk({"content": "a"}))
        made = oa_events(stream.feed(oa_chunk({}, "stop")))
        assert [e["type"] for e in made] == ["content_block_stop"]
        made = oa_events(stream.feed(oa_data({"choices": [], "usage": OA_USAGE})))
        assert [e["type"] for e in made] == ["message_delta", "message_stop"]
        assert stream.feed(OA_DONE) + stream.close() == b""

    @pytest.mark.parametrize(
        ("finish", "reason"),
        [
            ("stop", "end_turn"),
            ("length", "max_tokens"),
            ("content_filter", "refusal"),
            ("something", "end_turn"),
        ],
    )
    def test_finish(self, finish: str, reason: str) -> None:
        payload = oa_chunk({"content": "a"}) + oa_chunk({}, finish)
        assert oa_walked(oa_all_splits(payload + OA_DONE))["stop_reason"] == reason
        assert oa_walked(oa_all_splits(payload))["stop_reason"] == reason

    def test_no_finish_reason(self) -> None:
        done = oa_chunk({"content": "a"}) + OA_DONE
        assert oa_walked(oa_all_splits(done))["stop_reason"] == "end_turn"
        done = oa_fragment(0, "t", "look", "{}") + OA_DONE
        assert oa_walked(oa_all_splits(done))["stop_reason"] == "tool_use"

    def test_stop_with_calls_is_tool_use(self) -> None:
        payload = oa_fragment(0, "t", "look", "{}") + oa_chunk({}, "stop") + OA_DONE
        assert oa_walked(oa_all_splits(payload))["stop_reason"] == "tool_use"

    def test_stop_sequence(self) -> None:
        choice = {"delta": {}, "finish_reason": "stop", "stop_reason": "##"}
        payload = oa_data({"choices": [choice]}) + OA_DONE
        made = oa_walked(oa_all_splits(payload, oa_call(stops=("##",))))
        told = (made["stop_reason"], made["stop_sequence"])
        assert told == ("stop_sequence", "##")

    @pytest.mark.parametrize(
        "payload",
        [
            b"",
            b": nothing\n\n",
            oa_chunk({"content": "a"}),
            oa_chunk({"content": "a"}) + b'data: {"choices": [{"del',
            oa_fragment(0, "t", "look", '{"q'),
            oa_chunk({"content": "a"}) + oa_data({"choices": [], "usage": OA_USAGE}),
        ],
    )
    def test_a_cut_is_an_error(self, payload: bytes) -> None:
        events = oa_events(oa_all_splits(payload))
        told = {"type": "api_error", "message": "the upstream's answer was cut off"}
        assert events[-1] == {"type": "error", "error": told}
        assert "message_stop" not in [e["type"] for e in events]

    @pytest.mark.parametrize(
        ("data", "kind", "message"),
        [
            (
                {"error": {"message": "slow down", "code": 429}},
                "rate_limit_error",
                "slow down",
            ),
            (
                {"error": {"message": "m", "code": "rate_limit_exceeded"}},
                "rate_limit_error",
                "m",
            ),
            (
                {"error": {"message": "m", "type": "overloaded_error"}},
                "overloaded_error",
                "m",
            ),
            ({"error": {"message": "m", "type": "server_error"}}, "api_error", "m"),
            ({"error": "plain words"}, "api_error", "plain words"),
            (
                {"object": "error", "message": "m", "code": 400},
                "api_error",
                "m",
            ),
            (
                {
                    "choices": [
                        {
                            "delta": {},
                            "finish_reason": "error",
                            "error": {"code": 502, "message": "m"},
                        }
                    ]
                },
                "api_error",
                "m",
            ),
            (
                {"choices": [{"delta": {}, "finish_reason": "error"}]},
                "api_error",
                "the upstream says that its answer failed, not why",
            ),
            (
                {"error": {"code": "insufficient_quota", "message": "m"}},
                "rate_limit_error",
                "m",
            ),
        ],
    )
    def test_errors_in_the_stream(self, data: Any, kind: str, message: str) -> None:
        payload = oa_chunk({"content": "a"}) + oa_data(data) + OA_DONE
        events = oa_events(oa_all_splits(payload))
        told = {"type": kind, "message": message}
        assert events[-1] == {"type": "error", "error": told}
        first = oa_events(oa_stream(oa_data(data)))
        assert [e["type"] for e in first] == ["error"]

    @pytest.mark.parametrize(
        "data",
        [
            b"data: {nonsense",
            b"data: [1]",
            pytest.param(b"data: " + b"[" * 100_000, id="deep"),
        ],
    )
    def test_nonsense_is_an_error(self, data: bytes) -> None:
        made = oa_events(oa_stream(oa_chunk({"content": "a"}), data + b"\n\n"))
        assert made[-1]["error"]["type"] == "api_error"
        assert "no JSON object" in made[-1]["error"]["message"]

    def test_done_alone_is_an_error(self) -> None:
        made = oa_events(oa_all_splits(OA_DONE))
        assert [e["type"] for e in made] == ["error"]

    def test_bytes_that_are_no_utf8(self) -> None:
        data = b'data: {"choices":[{"delta":{"content":"a\xff"}}]}\n\n' + OA_DONE
        assert oa_walked(oa_stream(data))["content"] == [oa_text("a\ufffd")]

    def test_unicode_line_ends_in_text(self) -> None:
        text = "a\u2028b\u0085c"
        data = f'data: {{"choices":[{{"delta":{{"content":"{text}"}}}}]}}\n\n'.encode()
        assert oa_walked(oa_all_splits(data + OA_DONE))["content"] == [oa_text(text)]

    def test_endless_line_is_an_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(claude_lb, "LINE_BYTES", 1000)
        made = oa_events(oa_stream(b"data: " + b"x" * 2000, b"x" * 2000))
        assert [e["type"] for e in made] == ["error"]


class TestOpenAIConverterBugs:
    """What other converters got wrong (protocol.md, 5.6)."""

    def test_block_index_is_not_the_tool_index(self) -> None:
        payload = oa_chunk({"content": "a"})
        payload += oa_fragment(0, "t", "look", "{}") + oa_fragment(1, "u", "look", "{}")
        events = oa_events(oa_all_splits(payload + OA_DONE))
        starts = [e["index"] for e in events if e["type"] == "content_block_start"]
        assert starts == [0, 1, 2]

    def test_cached_tokens_are_told(self) -> None:
        usage = {**OA_USAGE, "prompt_tokens_details": {"cached_tokens": 21}}
        payload = oa_chunk({"content": "a"}, "stop", usage=usage) + OA_DONE
        events = oa_events(oa_all_splits(payload))
        told = {
            "input_tokens": 9,
            "cache_read_input_tokens": 21,
            "output_tokens": 5,
        }
        assert events[0]["message"]["usage"] == told
        assert events[-2]["usage"] == told
        assert oa_message({"content": "a"}, usage=usage)["usage"] == told

    def test_message_start_has_the_estimate(self) -> None:
        events = oa_events(oa_stream(oa_chunk({"content": "a"})))
        usage = events[0]["message"]["usage"]
        assert usage == {"input_tokens": 42, "output_tokens": 0}

    def test_role_and_empty_content_make_no_block(self) -> None:
        head = oa_chunk({"role": "assistant", "content": ""})
        payload = head + oa_fragment(0, "t", "look", "{}") + head + OA_DONE
        made = oa_walked(oa_all_splits(payload))
        assert [b["type"] for b in made["content"]] == ["tool_use"]


def oa_error(status: int, body: Any) -> dict[str, Any]:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    envelope = json.loads(claude_lb.openai_error(status, raw))
    assert envelope["type"] == "error"
    error: dict[str, Any] = envelope["error"]
    return error


class TestOpenAIError:
    """What an upstream's error becomes."""

    @pytest.mark.parametrize(
        ("status", "kind"),
        [
            (400, "invalid_request_error"),
            (401, "authentication_error"),
            (402, "billing_error"),
            (403, "permission_error"),
            (404, "not_found_error"),
            (408, "timeout_error"),
            (409, "conflict_error"),
            (413, "request_too_large"),
            (418, "invalid_request_error"),
            (422, "invalid_request_error"),
            (429, "rate_limit_error"),
            (500, "api_error"),
            (502, "api_error"),
            (503, "overloaded_error"),
            (504, "timeout_error"),
            (520, "api_error"),
            (529, "overloaded_error"),
        ],
    )
    def test_types(self, status: int, kind: str) -> None:
        told = oa_error(status, {"error": {"message": "words"}})
        assert told == {"type": kind, "message": "words"}

    @pytest.mark.parametrize(
        ("body", "message"),
        [
            ({"error": "words"}, "words"),
            ({"error": {"message": "words", "param": None, "code": 401}}, "words"),
            ({"message": "words"}, "words"),
            ({"detail": "words"}, "words"),
            (
                {"detail": [{"loc": ["body", "stop", 0], "msg": "bad"}, {"msg": "no"}]},
                "body.stop.0: bad; no",
            ),
            ({"object": "error", "message": "words", "code": 400}, "words"),
            ([{"error": {"message": "words", "code": 400}}], "words"),
            (
                {"error": {"message": "Provider error", "metadata": {"raw": "words"}}},
                "Provider error: words",
            ),
            (b"plain words\n", "plain words"),
            (b"p" * 3000, "p" * 2000),
            (b"", "the upstream answered 401 without a word"),
            ({}, "the upstream answered 401 without a word"),
            (
                b"<!doctype html><html>502",
                "the upstream answered 401 with a web page",
            ),
            (b"w\xff", "w\ufffd"),
            pytest.param(b"[" * 100_000, "[" * 2000, id="deep"),
        ],
    )
    def test_words(self, body: Any, message: str) -> None:
        assert oa_error(401, body)["message"] == message

    def test_code(self) -> None:
        body = {"error": {"message": "pay first", "code": "insufficient_quota"}}
        assert oa_error(429, body) == {
            "type": "rate_limit_error",
            "message": "pay first",
            "details": {"error_code": "insufficient_quota"},
        }

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (
                "This model's maximum context length is 16384 tokens. However, you"
                " requested 122946 tokens (112946 in the messages, 10000 in the"
                " completion).",
                "prompt is too long: 112946 tokens > 16384 maximum (",
            ),
            (
                "This model's maximum context length is 4097 tokens. However, you"
                " requested 4203 tokens (3703 in the messages, 500 in the completion).",
                "input length and `max_tokens` exceed context limit: 3703 + 500 > 4097"
                " (",
            ),
            (
                "'max_tokens' or 'max_completion_tokens' is too large: 64000. This"
                " model's maximum context length is 64001 tokens and your request has"
                " 24235 input tokens (64000 > 64001 - 24235).",
                "input length and `max_tokens` exceed context limit: 24235 + 64000 >"
                " 64001 (",
            ),
            (
                "This endpoint's maximum context length is 40960 tokens. However, you"
                " requested about 50016 tokens (12016 of text input, 6000 of tool"
                " input, 32000 in the output).",
                "input length and `max_tokens` exceed context limit: 18016 + 32000 >"
                " 40960 (",
            ),
            (
                "The input (345516 tokens) is longer than the model's context length"
                " (262144 tokens).",
                "prompt is too long: 345516 tokens > 262144 maximum (",
            ),
            (
                "This model's maximum context length is 196608 tokens. However, your"
                " messages resulted in 199906 tokens.",
                "prompt is too long: 199906 tokens > 196608 maximum (",
            ),
            (
                "request (9000 tokens) exceeds the available context size (8192"
                " tokens), try increasing it",
                "prompt is too long: 9000 tokens > 8192 maximum (",
            ),
            (
                "the request exceeds the available context size.",
                "prompt is too long: the request exceeds",
            ),
        ],
    )
    def test_full_context(self, words: str, message: str) -> None:
        told = oa_error(400, {"error": {"message": words, "code": 400}})
        assert told["message"].startswith(message)
        assert words in told["message"]
        events = oa_events(oa_stream(oa_data({"error": {"message": words}})))
        assert events[0]["error"]["message"] == told["message"]

    def test_full_context_by_its_code(self) -> None:
        error = {"message": "too much", "code": "context_length_exceeded"}
        told = oa_error(400, {"error": error})
        assert told["message"] == "prompt is too long: too much"
        assert oa_error(429, {"error": error})["message"] == "too much"


class TestOpenAINonsense:
    """Values of wrong types are refused or passed over; nothing breaks."""

    VALUES: tuple[Any, ...] = (
        None,
        True,
        0,
        -1,
        2.5,
        "",
        "x",
        [],
        ["x"],
        [[]],
        [{}],
        {},
        {"type": "x"},
    )

    def spoilt(self, rng: random.Random, value: Any) -> Any:
        """Return a copy with some values replaced."""
        if rng.random() < 0.08:
            return rng.choice(self.VALUES)
        if isinstance(value, dict):
            return {k: self.spoilt(rng, v) for k, v in value.items()}
        if isinstance(value, list):
            return [self.spoilt(rng, v) for v in value]
        return value

    def test_requests(self) -> None:
        rng = random.Random(1)
        request = {
            **OA_ASK,
            "system": [oa_text("s")],
            "tools": [OA_TOOL],
            "tool_choice": {"type": "tool", "name": "look"},
            "thinking": {"type": "enabled", "budget_tokens": 2000},
            "output_config": {"effort": "low", "format": {"type": "json_schema"}},
            "stop_sequences": ["a"],
            "metadata": {"user_id": "u"},
            "messages": [
                oa_user(oa_text("a"), oa_image(), OA_PDF),
                oa_assistant(oa_text("b"), oa_use("t", q=1)),
                oa_user(oa_result("t", [oa_text("c")], is_error=True)),
            ],
        }
        settings = claude_lb.OpenAISettings(files=True)
        for _ in range(3000):
            why = "path: "
            try:
                spoilt = {k: self.spoilt(rng, v) for k, v in request.items()}
                claude_lb.openai_request(spoilt, settings, None)
            except claude_lb.RefusedError as refusal:
                why = refusal.message
            assert re.match(r"[a-z_.0-9]+: ", why)

    def test_answers(self) -> None:
        rng = random.Random(2)
        answer = json.loads(OA_COMPLETION)
        for _ in range(3000):
            body = json.dumps(self.spoilt(rng, answer)).encode()
            with contextlib.suppress(ValueError):
                json.dumps(claude_lb.openai_message(body, oa_call(), "msg_fb"))

    def test_streams(self) -> None:
        rng = random.Random(3)
        chunks = [json.loads(d[6:]) for d in OA_GOLDEN_IN.split(b"\n\n")[:-2]]
        for _ in range(3000):
            spoilt = (oa_data(self.spoilt(rng, chunk)) for chunk in chunks)
            events = oa_events(oa_stream(*spoilt, OA_DONE))
            assert events[-1]["type"] in ("message_stop", "error")

    def test_errors(self) -> None:
        rng = random.Random(4)
        error = {"message": "m", "code": "c", "metadata": {"raw": "r"}, "loc": ["a"]}
        for _ in range(1000):
            oa_error(400, self.spoilt(rng, {"error": error, "detail": [error]}))
