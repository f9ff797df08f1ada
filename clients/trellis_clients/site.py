"""One live trainer and model per process, and what a message asks them to do.

A worker walks through many clients. It keeps one model and copies parameters in place; nothing is built
per client. Everything a turn could leave behind in the model is put back before the next turn.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from numpy.typing import NDArray
from torch import Tensor, nn

from trellis import memory, records, registry, scenario, seeding
from trellis.data.base import DataSet, Federation, Split
from trellis.errors import DataError, PluginError, TrellisError
from trellis.scenario import Component, Scenario
from trellis_clients import batchnorm
from trellis_clients.trainer import Metrics, State, Task, Trainer, Turn, in_order

KEPT = "trellis.kept"
"""Key of a client's state that holds its own part of the model, e.g. batch-norm layers (``Trainer.kept``)."""
FROZEN = "trellis.frozen"
"""Key of a client's state that holds the shared arrays it is no longer sent."""


@dataclass(frozen=True)
class Cell:
    """One run of one scenario under one seed: all that a worker needs to know to be any of its clients.

    ``parts`` and ``test_parts`` are the partition as the driver dealt it; without them the worker deals again.
    """

    scenario: Mapping[str, Any]
    seed: int
    parts: Sequence[NDArray[np.int64]] | None = None
    test_parts: Sequence[NDArray[np.int64]] | None = None


class Site:
    """The live objects of a cell: data, trainer and one model."""

    def __init__(self, cell: Cell) -> None:
        self.scenario = Scenario.model_validate(cell.scenario)
        self.seed = cell.seed
        self.device = pick_device(self.scenario.runtime.device)
        if self.scenario.runtime.deterministic:
            torch.use_deterministic_algorithms(True, warn_only=True)
        self.federation = self._federation(cell)
        self.trainer = self._trainer()
        with seeding.scoped(self.seed, "build"):
            self.model = self._built().to(self.device)
        shared = self._shared(self.model)
        self.names = list(shared)
        self.large = sum(tensor.nbytes for tensor in shared.values()) >= memory.LARGE
        self._resting: list[tuple[torch.UntypedStorage, int]] = []
        self.client_mods = client_mods(self.scenario)
        self.pristine = self._snapshot()

    def _federation(self, cell: Cell) -> Federation:
        from trellis.data.loading import load_data, load_federation

        if cell.parts is None or cell.test_parts is None:
            federation = load_federation(self.scenario, self.seed)
            return replace(federation, data=federation.data.to(self.device))
        data: DataSet = load_data(self.scenario, self.seed)
        return Federation(data.to(self.device), cell.parts, cell.test_parts)

    def _trainer(self) -> Trainer:
        data = self.federation.data
        model_cls, model_config = scenario.config_of(self.scenario, "models")
        cls, config = scenario.config_of(self.scenario, "trainers")
        takes = registry.info_of(cls).facts.get("takes")
        if takes is not None and data.kind not in takes:
            raise DataError(
                "scenario-data-kind",
                f"trainer {self.scenario.trainer.name!r} takes {', '.join(takes)} data; these are {data.kind!r}",
            )
        task = Task(
            kind=data.kind,
            shape=data.example_shape,
            classes=data.classes,
            facts=data.facts,
            model=lambda: model_cls(model_config).build(data.example_shape, data.num_classes, data.facts),
            seed=self.seed,
            device=self.device,
            splits=data.splits,
        )
        trainer = cls(config, task)
        if not isinstance(trainer, Trainer):
            raise PluginError("plugin-contract", f"trainer {self.scenario.trainer.name!r} is not a Trainer subclass")
        return trainer

    def _built(self) -> nn.Module:
        model = self.trainer.build()
        if not isinstance(model, nn.Module):
            raise PluginError(
                "plugin-contract",
                f"trainer {self.scenario.trainer.name!r}: build() returned {type(model).__name__}, not an nn.Module",
            )
        return model

    def _shared(self, model: nn.Module) -> dict[str, Tensor]:
        shared = self.trainer.shared(model)
        if not isinstance(shared, dict) or not all(isinstance(v, Tensor) for v in shared.values()):
            raise PluginError(
                "plugin-contract",
                f"trainer {self.scenario.trainer.name!r}: shared() must return a dict of names and tensors",
            )
        return shared

    def _snapshot(self) -> dict[str, Tensor]:
        """Copy whatever a turn may change and the cloud does not send: private trained tensors and buffers."""
        frozen = {name for name, parameter in self.model.named_parameters() if not parameter.requires_grad}
        return {
            name: tensor.clone()
            for name, tensor in self.model.state_dict().items()
            if name not in self.names and name not in frozen
        }

    # -- a turn ---------------------------------------------------------------------------------------

    def initial(self) -> ArrayRecord:
        """Return the arrays every run of this cell starts from, whatever the live model has become since."""
        with seeding.scoped(self.seed, "build"):
            model = self._built()
        return records.array_record({name: _numpy(tensor) for name, tensor in self._shared(model).items()})

    def turn(self, message: Message, client: int, phase: str) -> Turn:
        """Return the turn that a message stands for."""
        config = dict(records.config_record(message.content, records.CONFIG))
        number = int(config.get("server-round", 0))  # type: ignore[arg-type]
        return Turn(
            round=number,
            num_rounds=int(config.get("num-rounds", self.scenario.rounds.count)),  # type: ignore[arg-type]
            client=client,
            num_clients=self.federation.num_clients,
            generator=seeding.torch_generator(self.seed, phase, number, client),
            config=config,
            received={name: self._tensors(record) for name, record in records.array_records(message.content).items()},
        )

    def _tensors(self, record: ArrayRecord) -> dict[str, Tensor]:
        """Return received values as tensors; on the CPU they share their memory, which nobody may write to."""
        if self.device.type == "cpu":
            return {name: _seen(array) for name, array in record.items()}
        return {name: _tensor(records.view(array)).to(self.device) for name, array in record.items()}

    def load(self, arrays: Mapping[str, Tensor], state: State) -> None:
        """Put the model into the state of one client at the start of its turn."""
        if self.large:
            self._wake()
            memory.trim()  # what the turn before has freed
        if self.pristine:
            with torch.no_grad():
                live = self.model.state_dict()
                for name, values in {**self.pristine, **state.get(KEPT, {})}.items():
                    live[name].copy_(values)
        self.trainer.load_shared(self.model, {**state.get(FROZEN, {}), **arrays})

    def rest(self) -> None:
        """Give back the memory of a large model until ``load`` fills it again: of what is sent, and sent anew.

        For a process that only evaluates now and then, while others train.
        """
        if not self.large or self._resting or self.device.type != "cpu":
            return
        held: dict[int, tuple[torch.UntypedStorage, dict[int, int]]] = {}
        for tensor in self._shared(self.model).values():
            storage = tensor.untyped_storage()
            held.setdefault(storage.data_ptr(), (storage, {}))[1][int(tensor.storage_offset())] = tensor.nbytes
        for storage, parts in held.values():
            if sum(parts.values()) == storage.nbytes():  # else something beside is in it that nobody sends
                self._resting.append((storage, storage.nbytes()))
                storage.resize_(0)

    def _wake(self) -> None:
        for storage, size in self._resting:
            storage.resize_(size)
        self._resting = []

    def train(self, turn: Turn, state: State) -> RecordDict:
        """Train one client; return the reply's records and leave what the client keeps in ``state``."""
        data, partial = self.federation.client(turn.client), bool(turn.config.get(records.PARTIAL))
        held = {**state.get(FROZEN, {}), **turn.received[records.ARRAYS]}
        if partial and (missing := sorted(set(self.names) - held.keys())):
            raise DataError("partial-missing", f"the client was not sent {missing[0]!r} and does not keep it")
        self.load(turn.received[records.ARRAYS], state)
        metrics = self.trainer.fit(self.model, data, state, turn)
        if kept := self.trainer.kept(self.model):
            live = self.model.state_dict()
            state[KEPT] = {name: live[name].clone() for name in sorted(kept)}
        self.model.zero_grad(set_to_none=True)  # a model's worth of memory, and of no use to the next client
        shared = self._shared(self.model)
        if partial:
            prefixes = tuple(self.trainer.frozen(turn.round))
            state[FROZEN] = {name: values.clone() for name, values in shared.items() if name.startswith(prefixes)}
            shared = {name: values for name, values in shared.items() if name not in state[FROZEN]}
        return _reply(metrics, self._count(data.train), {records.ARRAYS: shared, **turn.reply})

    def evaluate(self, turn: Turn, state: State) -> RecordDict:
        """Evaluate the received model on one client's own test split."""
        data = self.federation.client(turn.client)
        if not self._count(data.test):
            raise DataError("client-no-test", f"client {turn.client} holds no test examples")
        self.load(turn.received[records.ARRAYS], state)
        if self.scenario.trainer.params.get("batch_norm") == "recalibrate":
            size = self.scenario.evaluation.batch_size
            batchnorm.recalibrate(self.model, (batch.x for batch in in_order(data.train, size)))
        turn.data = data
        metrics = self.trainer.evaluate(self.model, data.test, turn, self.scenario.evaluation.batch_size)
        return _reply(metrics, self._count(data.test), {})

    def _count(self, split: Split) -> int:
        """Return how much a split counts; without data every client counts as one."""
        return 1 if self.federation.data.kind == "none" else len(split)

    def evaluate_centrally(self, arrays: ArrayRecord, number: int) -> Metrics | None:
        """Evaluate a global model on the held-out set; None where the data set holds none out."""
        test = self.federation.data.test
        if not self._count(test):
            return None
        with seeding.scoped(self.seed, "central", number):
            turn = Turn(
                round=number,
                num_rounds=self.scenario.rounds.count,
                client=-1,
                num_clients=self.federation.num_clients,
                generator=seeding.torch_generator(self.seed, "central", number),
                received={records.ARRAYS: self._tensors(arrays)},
            )
            self.load(turn.received[records.ARRAYS], {})
            size = self.scenario.evaluation.batch_size
            if self.scenario.trainer.params.get("batch_norm", "average") == "average":
                return self.trainer.evaluate(self.model, test, turn, size)
            # The clients keep the statistics, so the cloud has none to normalise with but the batch's own. Stored
            # class by class, as folders of images are, a batch would be of one class.
            order = torch.randperm(len(test), generator=seeding.torch_generator(self.seed, "central order"))
            mixed = test.subset(order.to(test.rows.device))
            with batchnorm.batch_statistics(self.model):
                return self.trainer.evaluate(self.model, mixed, turn, size)

    def answer(self, action: str, turn: Turn, state: State) -> RecordDict:
        """Answer a question of the strategy. The client may keep something of it in ``state``."""
        data = self.federation.client(turn.client)
        if turn.received.get(records.ARRAYS):
            self.load(turn.received[records.ARRAYS], state)
        metrics = self.trainer.answer(action, self.model, data, state, turn)
        return _reply(metrics, max(len(data.train), 1), turn.reply)

    def bare(self, turn: Turn, state: State) -> RecordDict:
        """Time the bare steps of a turn: forward, backward, update, and nothing else.

        Same weights, same batches, already gathered; the result is thrown away. What the turn would have
        kept is not kept. This is the denominator of the framework's overhead.
        """
        data = self.federation.client(turn.client)
        self.load(turn.received[records.ARRAYS], state)
        trainer, model = self.trainer, self.model
        batches = list(trainer.batches(data.train, turn))
        optimizer = trainer.optimizer(model, turn)
        model.train()
        self.synchronise()
        wall, cpu = time.perf_counter(), time.process_time()
        for batch in batches:
            optimizer.zero_grad(set_to_none=True)
            trainer.backward(model, batch, turn)
            optimizer.step()
        self.synchronise()
        seconds = {"bare_s": time.perf_counter() - wall, "bare_cpu_s": time.process_time() - cpu}
        return _reply(seconds, max(len(data.train), 1), {})

    def synchronise(self) -> None:
        """Wait for the device, so that a clock read next to it means something."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def client_mods(scenario: Scenario) -> tuple[str, ...]:
    """Return the client-side mods that the scenario's strategy, and those it wraps, declare; outermost first."""
    mods: list[str] = []
    component: Component | None = scenario.strategy
    while component is not None:
        strategy = registry.load("strategies", component.name, base=scenario.folder)
        mods.extend(registry.info_of(strategy).facts.get("client_mods", ()))
        base = component.params.get("base")
        component = Component.model_validate(base) if base else None
    return tuple(mods)


def pick_device(name: str) -> torch.device:
    """Return the device a scenario asks for; ``auto`` is CUDA where this process sees one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise TrellisError("no-cuda", "runtime.device is 'cuda', but torch sees no CUDA device in this process")
    return torch.device(name)


def _seen(array: Array) -> Tensor:
    """Return an array as a tensor; a live one shares its memory, and all clients of a round share the tensor."""
    return array.seen_as(_tensor) if type(array) is records.LiveArray else _tensor(records.view(array))


def _tensor(values: NDArray[Any]) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(values)


def _numpy(tensor: Tensor) -> NDArray[Any]:
    """Copy a live tensor out of the model."""
    tensor = tensor.detach()
    values: NDArray[Any] = (tensor if tensor.device.type == "cpu" else tensor.cpu()).numpy().copy()
    return values


def _reply(metrics: Metrics, num_examples: int, arrays: Mapping[str, Mapping[str, Tensor]]) -> RecordDict:
    if not isinstance(metrics, dict) or not all(isinstance(v, int | float) for v in metrics.values()):
        raise PluginError("plugin-contract", f"a trainer must return metrics as a dict of numbers, not {metrics!r:.80}")
    content = RecordDict()
    for name, tensors in arrays.items():
        content[name] = records.array_record({key: _numpy(tensor) for key, tensor in tensors.items()})
    content[records.METRICS] = MetricRecord({"num-examples": num_examples, **metrics})
    return content
