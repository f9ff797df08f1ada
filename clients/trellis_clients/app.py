"""The edge side as a plain Flower ``ClientApp``: it runs on any grid of ours and under ``flwr run``."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import adaptiveclipping_mod, fixedclipping_mod

from trellis import flower_app, records, scenario, seeding
from trellis_clients import client_state
from trellis_clients.site import Cell, Site
from trellis_clients.trainer import State, Turn

Call = Callable[[Message, Context], Message]
Mod = Callable[[Message, Context, Call], Message]

MODS = {"fixedclipping": fixedclipping_mod, "adaptiveclipping": adaptiveclipping_mod}
"""Client-side mods that a strategy may ask for (fact ``client_mods``)."""

REGISTERED = ("query.bare", "query.partition")
"""Questions that the app answers itself; all others go to the trainer."""

ROLL = ("partition-id", "num-partitions")
"""Keys of Flower's node config that say which client a node is, and of how many."""

CELL = "cell"
"""Key of a message's config that says which cell of an experiment it belongs to."""


class Sites:
    """The sites of this process. Only the latest is kept: one model per worker."""

    def __init__(self, cells: Mapping[str, Cell]) -> None:
        self.cells = dict(cells)
        self.live: OrderedDict[str, Site] = OrderedDict()

    def get(self, name: str) -> Site:
        """Return the live site of a cell, building it if another cell was live before."""
        if name not in self.live:
            self.live.clear()
            self.live[name] = Site(self.cells[name])
        return self.live[name]


def make_app(cells: Mapping[str, Cell] | None = None, sites: Sites | None = None) -> ClientApp:
    """Return the client app for the cells of an experiment.

    Args:
        cells: by name; without any, the one that Flower's run config describes when a message arrives.
        sites: live sites to share with a central evaluation in the same process.
    """
    known = sites or Sites(cells or {})
    app = App(known)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return _serve(known, message, context, "train", Site.train, keeps=True)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return _serve(known, message, context, "evaluate", Site.evaluate)

    @app.query("bare")
    def bare(message: Message, context: Context) -> Message:
        return _serve(known, message, context, "train", Site.bare)

    @app.query("partition")
    def partition(message: Message, context: Context) -> Message:
        held = {key: context.node_config[key] for key in ROLL if key in context.node_config}
        return Message(RecordDict({records.CONFIG: ConfigRecord({**held})}), reply_to=message)

    return app


@dataclass(frozen=True)
class AppFactory:
    """Makes the client app of an experiment inside a worker process."""

    cells: Mapping[str, Cell]

    def __call__(self) -> ClientApp:
        return make_app(self.cells)


def _serve(
    sites: Sites,
    message: Message,
    context: Context,
    phase: str,
    work: Callable[[Site, Turn, State], RecordDict],
    keeps: bool = False,
) -> Message:
    """Do one turn under its own random state, with the client's private state at hand."""
    wall, cpu = time.perf_counter(), time.process_time()
    site = _site(sites, message, context)
    client = int(context.node_config["partition-id"])
    state = client_state.unpack(context.state, site.device)
    turn = site.turn(message, client, phase)
    with seeding.scoped(site.seed, phase, turn.round, client, "global"):
        content = work(site, turn, state)
    if keeps:
        kept = client_state.pack(state)
        for name in (client_state.ARRAYS, client_state.VALUES):
            context.state.pop(name, None)
        for name, record in kept.items():
            context.state[name] = record
    content[records.TIMING] = ConfigRecord(
        {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
    )
    return Message(content, reply_to=message)


def _site(sites: Sites, message: Message, context: Context) -> Site:
    config = records.config_record(message.content, records.CONFIG)
    name = str(config.get(CELL, ""))
    if not sites.cells:
        sites = _sites_of(tuple((key, context.run_config.get(key, "")) for key in flower_app.KEYS))
    return sites.get(name if name in sites.cells else next(iter(sites.cells)))


@lru_cache(maxsize=1)
def _sites_of(run_config: tuple[tuple[str, Any], ...]) -> Sites:
    """Return the sites of this process for the cell that Flower's run config describes.

    Flower's simulation unpickles the app anew for every message, so nothing that the app itself holds would
    last; the module does.
    """
    each = flower_app.read({key: value for key, value in run_config if value != ""})
    # The process is Flower's, and so would be its number of threads, on which the last bits depend.
    torch.set_num_threads(each.runtime.threads)
    return Sites({CELL: Cell(scenario.plain(each), each.seeds[0])})


class App(ClientApp):
    """Gives the trainer every ``query.<action>`` and ``train.<action>`` that no function is registered for.

    Flower routes by names that are registered beforehand, and before any mod sees the message; which questions
    there are is the trainer's to say.
    """

    def __init__(self, sites: Sites) -> None:
        super().__init__(mods=[_strategy_mods(sites)])
        self.sites = sites

    def __call__(self, message: Message, context: Context) -> Message:
        _, _, action = message.metadata.message_type.partition(".")
        if not action or message.metadata.message_type in REGISTERED:
            return super().__call__(message, context)

        def work(site: Site, turn: Turn, state: State) -> RecordDict:
            return site.answer(action, turn, state)

        return _serve(self.sites, message, context, action, work, keeps=True)


def _strategy_mods(sites: Sites) -> Mod:
    """Return a mod that runs the mods the scenario's strategy declares, e.g. client-side clipping."""

    def apply(message: Message, context: Context, call_next: Call) -> Message:
        if message.metadata.message_type == "query.partition":  # a roll call is no reason to load data
            return call_next(message, context)
        call = call_next
        for name in reversed(_site(sites, message, context).client_mods):
            call = _bind(MODS[name], call)
        return call(message, context)

    return apply


def _bind(mod: Mod, call: Call) -> Call:
    return lambda message, context: mod(message, context, call)


class Evaluator:
    """The cloud's use of a trainer: initial arrays and central evaluation, by the same code as the clients'."""

    def __init__(self, sites: Sites, name: str) -> None:
        self.site = sites.get(name)

    @property
    def metric(self) -> tuple[str, str]:
        """The trainer's own: the metric that says how good the model is, and which way is better."""
        return self.site.trainer.metric

    def initial(self) -> Any:
        return self.site.initial()

    def __call__(self, number: int, arrays: Any) -> dict[str, float] | None:
        return self.site.evaluate_centrally(arrays, number)

    def rest(self) -> None:
        """Give back a large model's memory until the next evaluation."""
        self.site.rest()


app = make_app()
"""The app that ``flwr run`` loads; it reads its scenario from the run config."""
