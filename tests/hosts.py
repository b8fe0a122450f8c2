"""Two hosts on one machine: network namespaces with their own addresses, joined by a cable that can be pulled."""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import subprocess
import time
from collections.abc import Iterator


class Host:
    """A network namespace with one address.

    Args:
        name: of the namespace.
        interface: its end of the cable.
        address: its IPv4 address.
    """

    def __init__(self, name: str, interface: str, address: str) -> None:
        self.name, self.interface, self.address = name, interface, address

    def start(self, command: list[str], log: pathlib.Path, cwd: pathlib.Path, **environment: str) -> subprocess.Popen:
        with open(log, "wb") as output:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.name, *command],
                cwd=cwd,
                env={**os.environ, "GLOO_SOCKET_IFNAME": self.interface, **environment},
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def pull_cable(self) -> None:
        """From here on its packets reach nobody: no connection is closed, as when a machine loses power."""
        _ip("-n", self.name, "link", "set", self.interface, "down")

    def plug_cable(self) -> None:
        _ip("-n", self.name, "link", "set", self.interface, "up")

    def kill_processes(self) -> None:
        """SIGKILL everything that runs on this host."""
        for _ in range(50):
            pids = _ip("netns", "pids", self.name).split()
            if not pids:
                return
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            time.sleep(0.05)


def why_not() -> str | None:
    """Why two hosts cannot be made here, if so."""
    try:
        with two_hosts():
            return None
    except FileNotFoundError:
        return "iproute2 is not installed"
    except subprocess.CalledProcessError as error:
        return f"network namespaces are not permitted: {error.stderr.strip()}"


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Make them and take them away, with everything that still runs there."""
    tag = os.getpid()
    hosts = tuple(Host(f"pt{tag}{end}", f"pt{tag}{end}", f"10.213.7.{n}") for n, end in ((1, "a"), (2, "b")))
    try:
        for host in hosts:
            _ip("netns", "add", host.name)
            _ip("-n", host.name, "link", "set", "lo", "up")
        one, two = hosts
        _ip("-n", one.name, "link", "add", one.interface, "type", "veth", "peer", two.interface, "netns", two.name)
        for host in hosts:
            _ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", host.interface)
            _ip("-n", host.name, "link", "set", host.interface, "up")
        yield one, two
    finally:
        for host in hosts:
            if pathlib.Path("/run/netns", host.name).exists():
                host.kill_processes()
                _ip("netns", "delete", host.name)


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout
