"""The server of `dreamer play`: its messages, and whom it does not let in."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientSession, WSMsgType, WSServerHandshakeError
from aiohttp.test_utils import TestClient, TestServer
from browser import free_port
from tiny_runs import tiny_config

from dreamer.cli import main
from dreamer.play import door as doors
from dreamer.play.door import Door, Pace
from dreamer.play.game import Game, Request, play
from dreamer.play.server import FILES, PAGE, make_app
from dreamer.presets import ConfigError, run_config
from dreamer.run.training import train

TestServer.__test__ = TestClient.__test__ = False  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def game(tmp_path_factory) -> Game:
    folder = tmp_path_factory.mktemp("catch")
    quiet = {"run__train_ratio": 1e-6, "run__eval_every": None, "run__final_eval": False}
    assert train(tiny_config(logdir=str(folder), run__agent_steps=60, **quiet)) == 0
    game = Game(run_config(folder), "auto", 0, tmp_path_factory.mktemp("out") / "played")
    cont = game.dreams.params["world_model"]["cont"]["out"]
    cont["bias"] = cont["bias"] + 50.0  # its dreams do not end by themselves
    game.warm_up()
    return game


@contextlib.asynccontextmanager
async def served(game: Game, host: str = "127.0.0.1") -> AsyncIterator[tuple[Door, TestClient]]:
    port = free_port()
    door = Door(host, port)
    async with TestClient(TestServer(make_app(door, game.session), host="127.0.0.1", port=port)) as client:
        yield door, client


def run(scene: Callable[[Door, TestClient], Awaitable[None]], game: Game) -> None:
    async def play() -> None:
        async with served(game) as (door, client):
            await asyncio.wait_for(scene(door, client), 60)

    asyncio.run(play())


def address(door: Door) -> str:
    return sorted(name for name in door.hosts if name.startswith("127"))[0]


@contextlib.asynccontextmanager
async def tab(door: Door, client: TestClient, **headers: str) -> AsyncIterator[Any]:
    headers = {"Origin": f"http://{address(door)}"} | headers
    async with client.ws_connect(f"/play?token={door.token}", headers=headers) as socket:
        yield socket


async def frame(socket: Any) -> tuple[dict[str, Any], bytes]:
    """The next frame; texts before it are left out."""
    while True:
        message = await socket.receive(timeout=30)
        assert message.type in (WSMsgType.BINARY, WSMsgType.TEXT), message
        if message.type == WSMsgType.BINARY:
            length = int.from_bytes(message.data[:4], "little")
            return json.loads(message.data[4 : 4 + length]), message.data[4 + length :]


async def until(socket: Any, ready: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    while True:
        told, _ = await frame(socket)
        if ready(told):
            return told


# --- The game ----------------------------------------------------------------------------------


def test_a_tab_is_greeted_plays_and_rewinds(game):
    async def scene(door: Door, client: TestClient) -> None:
        async with tab(door, client) as socket:
            hello = json.loads((await socket.receive()).data)
            assert hello["hello"] == "toy_catch" and hello["real"] and hello["actors"][:2] == ["person", "policy"]
            assert [key["label"] for key in hello["keyboard"]["keys"]] == ["left", "right"]
            told, first = await frame(socket)
            assert told["at"] == 0 and told["pictures"] == [["dream", 16, 16], ["real", 16, 16]]
            assert len(first) == 2 * 16 * 16 * 3
            await socket.send_json({"do": "speed", "fps": 60})
            await socket.send_json({"do": "act", "action": {"action": 0}, "tap": True})
            await socket.send_json({"do": "play", "on": True})
            told = await until(socket, lambda told: told["at"] >= 10)
            assert told["playing"] and told["action"] == {"action": [0]}
            await socket.send_json({"do": "play", "on": False})
            await until(socket, lambda told: not told["playing"])
            await socket.send_json({"do": "seek", "at": 0})
            while True:
                told, again = await frame(socket)
                if told["at"] == 0:
                    break
            assert again == first and told["last"] >= 10

    run(scene, game)


def test_tabs_play_apart_and_their_mistakes_are_told(game):
    async def scene(door: Door, client: TestClient) -> None:
        async with tab(door, client) as one, tab(door, client) as other:
            await one.send_str("what?")
            await one.send_json({"do": "step"})
            assert (await until(one, lambda told: told["at"] == 1))["last"] == 1
            await other.send_json({"do": "seek", "at": 0})
            assert [(await frame(other))[0]["last"] for _ in range(2)] == [0, 0]
            await one.send_str("what?")
            texts = []
            while len(texts) < 1:
                message = await one.receive(timeout=30)
                texts += [json.loads(message.data)] if message.type == WSMsgType.TEXT else []
            assert "expected a command in JSON" in texts[0]["error"]
            assert door.tabs == 2
        for _ in range(100):
            if door.tabs == 0:
                return
            await asyncio.sleep(0.05)
        raise AssertionError("tabs that left are not counted")

    run(scene, game)


# --- Who is let in -----------------------------------------------------------------------------


def refusals(door: Door) -> dict[str, tuple[str, dict[str, str]]]:
    """What a connection asks for, and its headers, by what is wrong with it."""
    here, path = f"http://{address(door)}", f"/play?token={door.token}"
    port = address(door).rpartition(":")[2]
    return {
        "no token": ("/play", {"Origin": here}),
        "a wrong token": ("/play?token=" + "x" * len(door.token), {"Origin": here}),
        "half a token": (f"/play?token={door.token[:-1]}", {"Origin": here}),
        "no origin": (path, {}),
        "another origin": (path, {"Origin": "http://evil.example"}),
        "an origin on another port": (path, {"Origin": "http://127.0.0.1:1"}),
        "an origin by TLS": (path, {"Origin": here.replace("http:", "https:")}),
        "an opaque origin": (path, {"Origin": "null"}),
        "an origin that begins alike": (path, {"Origin": f"{here}.evil.example"}),
        "another host": (path, {"Origin": here, "Host": "evil.example"}),
        "a rebound name": (path, {"Origin": f"http://evil.example:{port}", "Host": f"evil.example:{port}"}),
        "a host on another port": (path, {"Origin": here, "Host": "127.0.0.1:1"}),
    }


def test_connections_that_are_not_the_pages_own_are_refused(game):
    async def scene(door: Door, client: TestClient) -> None:
        for what, (path, headers) in refusals(door).items():
            with pytest.raises(WSServerHandshakeError) as error:
                await client.ws_connect(path, headers=headers)
            assert error.value.status == 403, what
        assert door.tabs == 0

    run(scene, game)


def test_the_page_needs_the_token_and_the_name(game):
    async def scene(door: Door, client: TestClient) -> None:
        good = await client.get(f"/?token={door.token}")
        assert good.status == 200 and "Inside the dream" in await good.text()
        for answer in (good, await client.get("/page/page.js"), await client.get("/"), await client.get("/none")):
            assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
            assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert (await client.get("/")).status == 403
        assert (await client.get(f"/?token={door.token}x")).status == 403
        assert (await client.get(f"/?token={door.token}", headers={"Host": "evil.example"})).status == 403
        assert (await client.get("/page/page.js", headers={"Host": "evil.example"})).status == 403
        assert (await client.post(f"/?token={door.token}")).status == 405

    run(scene, game)


def test_only_the_pages_own_files_are_served(game):
    async def scene(door: Door, client: TestClient) -> None:
        for name in ("style.css", "page.js"):
            assert (await client.get(f"/page/{name}")).status == 200
        raw = client.make_url("/").with_path
        for path in ("/page/", "/page/index.html", "/page/none.js", "/page/..%2Fserver.py", "/page/%2e%2e%2fdoor.py",
                     "/server.py", "/page//etc/passwd", "/page/....//server.py"):  # fmt: skip
            answer = await client.session.get(raw("/").join(client.make_url(path)), allow_redirects=False)
            assert answer.status == 404, path

    run(scene, game)
    assert {path.name for path in PAGE.iterdir()} == set(FILES)
    # Nothing comes from elsewhere, and nothing needs a build.
    for name in FILES:
        text = (PAGE / name).read_text()
        assert not re.search(r"https?://|@import|url\(|innerHTML|eval\(|<script>| on\w+=\"|style=\"", text), name


def test_messages_are_bounded_in_size_kind_and_number(game, monkeypatch):
    async def closed(door: Door, client: TestClient, send: Callable[[Any], Awaitable[None]]) -> int:
        async with tab(door, client) as socket:
            await send(socket)
            while True:
                message = await socket.receive(timeout=30)
                if message.type in (WSMsgType.CLOSE, WSMsgType.CLOSED, WSMsgType.CLOSING):
                    return int(socket.close_code)

    async def scene(door: Door, client: TestClient) -> None:
        async def flood(socket: Any) -> None:
            with contextlib.suppress(ConnectionError):
                for _ in range(2000):
                    await socket.send_str('{"do": "seek", "at": 0}')

        assert await closed(door, client, lambda socket: socket.send_str("x" * 5000)) == 1009
        assert await closed(door, client, lambda socket: socket.send_bytes(b"x")) == 1003
        assert await closed(door, client, flood) == 1008

    run(scene, game)

    monkeypatch.setattr("dreamer.play.server.TABS", 1)

    async def crowd(door: Door, client: TestClient) -> None:
        async with tab(door, client):
            with pytest.raises(WSServerHandshakeError) as error:
                async with tab(door, client):
                    pass
            assert error.value.status == 503

    run(crowd, game)


def test_the_pace_is_per_second_with_a_burst(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(doors.time, "monotonic", lambda: now[0])
    pace = Pace()
    assert sum(pace.allows() for _ in range(1000)) == doors.BURST
    now[0] += 1000
    assert sum(pace.allows() for _ in range(1000)) == doors.BURST
    pace, allowed = Pace(), 0
    for _ in range(2000):
        now[0] += 1 / doors.PER_SECOND
        allowed += pace.allows()
    assert allowed == 2000


def test_names_of_a_server():
    local = Door("127.0.0.1", 80).hosts
    assert {"127.0.0.1:80", "localhost:80", "localhost", "[::1]:80"} <= local and not any("0.0.0.0" in h for h in local)
    assert Door("10.1.2.3", 9).hosts == {"10.1.2.3:9"}
    assert {"localhost:9", "127.0.0.1:9"} <= Door("0.0.0.0", 9).hosts
    assert Door("127.0.0.1", 1).token != Door("127.0.0.1", 1).token and len(Door("127.0.0.1", 1).token) >= 32


# --- The command -------------------------------------------------------------------------------


def test_the_command_says_what_is_wrong(tmp_path, capsys, game, monkeypatch):
    assert main(["play", str(tmp_path)]) == 2
    assert "expected the folder of a run" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="expected an address that is free, got 256.0.0.1 port 0"):
        play(Request(game.config.logdir, host="256.0.0.1", port=0, out=tmp_path / "out"))
    monkeypatch.setitem(__import__("sys").modules, "aiohttp", None)
    assert main(["play", game.config.logdir]) == 2
    assert "pip install 'dreamer[play]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert not list(Path(game.config.logdir).glob("played"))


def test_it_serves_until_it_is_interrupted(tmp_path, game):
    """The command itself, in a process of its own: the address that it prints works."""
    import signal
    import subprocess
    import sys

    command = [sys.executable, "-m", "dreamer", "play", game.config.logdir, "--port", "0", "--real", "no"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(2)]
        found = re.search(r"http://127\.0\.0\.1:\d+/\?token=\S+", "".join(lines))
        assert found, lines + [process.stderr.read() if process.poll() is not None and process.stderr else ""]

        async def visit() -> None:
            async with ClientSession() as client:
                assert (await client.get(found[0])).status == 200
                assert (await client.get(found[0] + "x")).status == 403

        asyncio.run(visit())
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
