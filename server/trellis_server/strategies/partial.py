"""FedAvg that stops sending what has stopped changing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from trellis import flower, records
from trellis.registry import register
from trellis_server import folding
from trellis_server.strategies._build import BuildContext, Sampling, sampling


class Partial(FedAvg):
    """FedAvg where arrays that the trainer calls frozen go to a client once, and never come back.

    Which ones are frozen in a round is the trainer's to say (``Trainer.frozen``): a backbone after its phase, for
    example. A client whose reply counted keeps them in its state; one that has not replied yet gets them (again). The
    result is FedAvg's to the last bit, as the average of equal arrays is that array.

    Attributes:
        holders: clients that keep the frozen arrays.
    """

    def __init__(self, **sampling: Any) -> None:
        super().__init__(**sampling)
        self.trainer: Any = None
        self.sent = ArrayRecord()
        self.fixed: list[str] = []
        self.holders: set[int] = set()

    def attach(self, bench: Any) -> None:
        """Take the trainer that says what is frozen; before that, nothing is."""
        self.trainer = bench.site.trainer

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        messages = list(super().configure_train(server_round, arrays, config, grid))
        prefixes = tuple(self.trainer.frozen(server_round)) if self.trainer is not None else ()
        fixed = [name for name in arrays if name.startswith(prefixes)] if prefixes else []
        if fixed != self.fixed:
            self.fixed, self.holders = fixed, set()
        self.sent = arrays
        if not fixed:
            return messages
        config = ConfigRecord({**config, records.PARTIAL: True})
        moving = ArrayRecord({name: array for name, array in arrays.items() if name not in fixed})
        whole, part = (
            RecordDict({self.arrayrecord_key: record, self.configrecord_key: config}) for record in (arrays, moving)
        )
        return [
            Message(
                part if flower.client_of(m.metadata.dst_node_id) in self.holders else whole,
                m.metadata.dst_node_id,
                "train",
            )
            for m in messages
        ]

    def expected_reply(self, message: Message) -> Mapping[str, Mapping[str, tuple[tuple[int | None, ...], str]]] | None:
        """Tell the gate that a reply holds what still moves."""
        config = message.content.get(self.configrecord_key)
        if (
            message.metadata.message_type != "train"
            or not isinstance(config, ConfigRecord)
            or not config.get(records.PARTIAL)
        ):
            return None
        moving = {name: array for name, array in self.sent.items() if name not in self.fixed}
        return {self.arrayrecord_key: {name: (tuple(array.shape), array.dtype) for name, array in moving.items()}}

    def fold(self, replies: Iterable[Message]) -> list[Message]:
        """Average replies one at a time, and note who replied."""
        return folding.fold(self._noted(replies), self.weighted_by_key)

    def _noted(self, replies: Iterable[Message]) -> Iterator[Message]:
        for reply in replies:
            client = flower.client_of(reply.metadata.src_node_id)
            if reply.has_error():
                self.holders.discard(client)
            elif self.fixed:
                self.holders.add(client)
            yield reply

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        arrays, metrics = super().aggregate_train(server_round, replies)
        if arrays is None:
            return None, metrics
        return ArrayRecord({name: arrays.get(name, array) for name, array in self.sent.items()}), metrics

    def state_dict(self) -> dict[str, Any]:
        """Return what the next round needs: what is frozen, and who has it."""
        return {"fixed": list(self.fixed), "holders": sorted(self.holders)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.fixed, self.holders = list(state["fixed"]), set(state["holders"])


@register("strategies", "partial", summary="FedAvg that sends what the trainer calls frozen once, not every round")
class PartialPlugin:
    """FedAvg for trainers with phases: what has stopped changing stops travelling."""

    class Config(Sampling):
        pass

    def __init__(self, config: Config) -> None:
        self.config = config

    def build(self, context: BuildContext) -> Partial:
        return Partial(**sampling(self.config, context))
