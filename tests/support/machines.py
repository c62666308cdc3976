"""Machines of one network, simulated by namespaces of this one's; each can be cut off, so that nothing arrives."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

STORE = "10.181.0.1"
FILES = Path("/etc/netns")
"""Where ``ip netns exec`` finds, by name, what a machine has as its files in ``/etc``."""


def _ip(*args: str) -> None:
    subprocess.run(["ip", *args], check=True, capture_output=True, text=True)


class Network:
    """Some machines, and one more that stays: at :data:`STORE`. All is undone at the end of the ``with`` block.

    Where this process may not make namespaces, the test is skipped.
    """

    def __init__(self, num_machines: int) -> None:
        self._hub = f"ld{os.getpid()}"
        self.machines = [f"{self._hub}-{index}" for index in range(num_machines)]

    def __enter__(self) -> Network:
        if shutil.which("ip") is None:
            pytest.skip("there is no command ip, of iproute2")
        try:
            self._make()
        except (subprocess.CalledProcessError, OSError) as error:
            self.__exit__()
            pytest.skip(f"network namespaces are not permitted: {error}")
        return self

    def _make(self) -> None:
        names = {STORE: "store"} | {f"10.181.0.{10 + index}": f"m{index}" for index in range(len(self.machines))}
        hosts = "".join(
            f"{address} {name}\n" for address, name in {"127.0.0.1": "localhost", "::1": "localhost", **names}.items()
        )
        for name in (self._hub, *self.machines):
            _ip("netns", "add", name)
            (own := FILES / name).mkdir(parents=True)  # torch asks for the names of all that connect
            (own / "hosts").write_text(hosts + f"127.0.0.1 {socket.gethostname()}\n")
            (own / "resolv.conf").write_text("nameserver 127.0.0.1\noptions timeout:1 attempts:1\n")
            _ip("-n", name, "link", "set", "lo", "up")
        _ip("-n", self._hub, "link", "add", "hub", "type", "bridge")
        _ip("-n", self._hub, "addr", "add", f"{STORE}/24", "dev", "hub")
        _ip("-n", self._hub, "link", "set", "hub", "up")
        for index, name in enumerate(self.machines):
            there = f"m{index}"
            _ip("link", "add", "eth0", "netns", name, "type", "veth", "peer", "name", there, "netns", self._hub)
            _ip("-n", name, "addr", "add", f"10.181.0.{10 + index}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "up")
            _ip("-n", self._hub, "link", "set", there, "master", "hub", "up")

    def __exit__(self, *_: object) -> None:
        for name in (*self.machines, self._hub):
            with suppress(subprocess.CalledProcessError):
                _ip("netns", "del", name)
            shutil.rmtree(FILES / name, ignore_errors=True)

    def at_store(self) -> list[str]:
        """What a command begins with that runs on the machine that stays."""
        return ["ip", "netns", "exec", self._hub]

    def on(self, machine: int) -> list[str]:
        """What a command begins with that runs on a machine."""
        return ["ip", "netns", "exec", self.machines[machine]]

    def cut(self, machine: int) -> None:
        """Its cable is out of the switch: nothing is refused, nothing arrives."""
        _ip("-n", self._hub, "link", "set", f"m{machine}", "down")

    def join(self, machine: int) -> None:
        """The cable is back."""
        _ip("-n", self._hub, "link", "set", f"m{machine}", "up")
