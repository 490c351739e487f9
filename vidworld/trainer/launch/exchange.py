"""Preflight where every host runs `vidworld launch` by itself: facts are exchanged at the rendezvous."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import Any

from vidworld.errors import ConfigError
from vidworld.trainer.launch.facts import Request, add_up, gather, leave_together
from vidworld.trainer.launch.hosts import Host
from vidworld.trainer.launch.preflight import Answer, Wanted, judge, judge_meeting, network, refuse, table


@dataclass(frozen=True)
class Place:
    """This host among those that start by themselves."""

    node: int
    nodes: int
    address: str
    port: int
    join_s: float
    """Seconds that the others may take to come."""


def exchange(
    place: Place,
    name: str,
    announce: Callable[[], dict[str, str]],
    request: Callable[[dict[str, str]], Request],
    wanted: Wanted,
    *,
    interface: str | None,
    limit_s: float,
    say: Callable[[str], object] = print,
) -> tuple[list[Host], dict[str, str], dict[str, str]]:
    """Meet the other hosts, compare facts and add up a number; every host comes to the same verdict.

    announce: called on the first host; what it gives is told to all.
    Returns the hosts, what was announced, and this host's network variables. Raises ConfigError when
    somebody is missing or at fault, on every host alike.
    """
    from torch import distributed

    where = f"{place.address}:{place.port}"
    try:
        store = distributed.TCPStore(
            place.address,
            place.port,
            place.nodes,
            is_master=place.node == 0,
            timeout=timedelta(seconds=place.join_s),
            wait_for_workers=False,
        )
    except (RuntimeError, OSError) as error:
        what = "cannot open the rendezvous" if place.node == 0 else "cannot reach the rendezvous"
        raise ConfigError(
            f"host {place.node} {what} {where}",
            got=" ".join(str(error).split())[:200],
            fix="check --master-addr, --master-port and the network between the hosts",
        ) from None
    if place.node == 0:
        store.set("announced", json.dumps(announce()))
    announced = json.loads(_get(store, "announced", "host 0", place))
    mine = gather(replace(request(announced), toward=place.address))
    store.set(f"facts/{place.node}", json.dumps({"name": name, **asdict(mine)}))
    answers = [_answer(_get(store, f"facts/{node}", f"host {node}", place)) for node in range(place.nodes)]
    faults = judge(answers, wanted)
    if faults:
        leave_together(store, "judged", place.node, place.nodes, limit_s)
    refuse(faults, answers)
    variables = network(interface or mine.interface)
    os.environ.update(variables)
    store.set(f"met/{place.node}", json.dumps(_meet(store, place, limit_s)))
    met = [json.loads(_get(store, f"met/{node}", f"host {node}", place)) for node in range(place.nodes)]
    leave_together(store, "left", place.node, place.nodes, limit_s)
    hosts = [answer.host for answer in answers]
    refuse(
        judge_meeting(
            [Answer(host, found) for host, found in zip(hosts, met, strict=True)], place.address, place.port
        ),
        answers,
    )
    if place.node == 0:
        say(table(answers))
    return hosts, announced, variables


def _meet(store: Any, place: Place, limit_s: float) -> dict[str, Any]:
    found: dict[str, Any] = {"store": True, "gloo": False, "nccl": None, "error": ""}
    try:
        add_up(store, place.node, place.nodes, limit_s, found)
    except (RuntimeError, ValueError, OSError) as error:
        found["error"] = " ".join(str(error).split())[:300]
    return found


def _get(store: Any, key: str, who: str, place: Place) -> str:
    from torch import distributed

    try:
        return store.get(key).decode()
    except (distributed.DistStoreError, RuntimeError):
        raise ConfigError(
            f"{who} of {place.nodes} did not come to the rendezvous {place.address}:{place.port}",
            got=f"nothing within {place.join_s:.0f} s",
            fix="see whether it runs, with the same --nodes, --master-addr and --master-port",
        ) from None


def _answer(line: str) -> Answer:
    content = json.loads(line)
    return Answer(Host(content.pop("name")), content)


def unique_names(hosts: Sequence[Host]) -> tuple[Host, ...]:
    """The hosts, with their number where several go by one name."""
    names = [host.name for host in hosts]
    return tuple(
        Host(f"{host.name}-{node}") if names.count(host.name) > 1 else host for node, host in enumerate(hosts)
    )
