"""FOA: evolve prompt tokens of a frozen transformer, and shift its last activation towards the source."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from trellis.errors import DataError
from trellis_clients.edge.adapters._base import Adapter, Double, Options, Reader, State, entropy
from trellis_clients.edge.adapters._evolution import Evolution
from trellis_clients.edge.predictor import Array, Prediction

SEARCH = "search."


class FoaOptions(Options):
    """Options of FOA. Defaults are the paper's; ``lambda`` is 0.2 there on ImageNet-R."""

    prompts: int = Field(3, ge=0, description="P, tokens that are evolved; 0: shift only")
    discrepancy: float = Field(0.4, ge=0, description="lambda, weight of the distance to the source's statistics")
    population: int | None = Field(
        None, ge=4, description="points per batch beside the carried one; null: 4 + floor(3 ln(P D)), 27 for 3 x 768"
    )
    sigma: float = Field(1.0, gt=0, description="first step size of the search")
    shift: float = Field(1.0, ge=0, description="share of the distance to the source's mean; 0: no shift")
    shift_rate: float = Field(0.1, gt=0, le=1, description="rate of the running mean of features")


class Foa(Adapter):
    """Niu et al., "Test-Time Model Adaptation with Only Forward Passes", ICML 2024, sections 3.1 and 3.2, algorithm 1.

    Each batch is one generation of CMA-ES over P prompt tokens: its points and the prompt that answered the batch
    before are tried, and the one of lowest fitness answers. Fitness of a batch of n (equation 5, as in the official
    code)::

        sum of entropies + lambda * n/64 * (|mean - source mean|^2 + |std - source std|^2)

    with mean and standard deviation of the class token at every layer, ``L * D`` numbers each. The answer is the
    head's on ``feature + shift * (source mean - running mean)`` (equations 7 and 8), the running mean being that of the
    batches before, over all points tried; there is no shift in the first. With ``prompts: 0`` only the shift is left,
    for one forward a batch; that works for any model with features and a linear head.

    Where it fails: it needs a transformer, and population + 1 forwards for each batch (28 for three prompts of width
    768), which a small device may not have. Small batches make the fitness noise: with one example the mean is that
    example and there is no deviation to match. Batches of one class look like a shift and are pulled back. After a
    change of domain the prompts are the old one's until the search has moved: call ``reset`` where the change is known.
    On corrupted digits with a small transformer the shift alone gave all but one of FOA's 12 points
    (``benchmarks/claims/forward_only_tta.py``).

    Different from the official code: prompts start at zero, the search's mean; the search uses cumulative step-size
    adaptation at every width, and starts anew when its distribution degenerates; with one example the term of the
    deviations, equal for all points, is left out (there, it is not a number).
    """

    class Config(FoaOptions):
        """With the seed."""

        seed: int = Field(0, ge=0, description="of the search's draws; they depend on it and the batch's number only")

    name = "foa"
    config: Config

    def check(self) -> None:
        """Raise where prompts are asked of a model that takes none."""
        if self.config.prompts and self.predictor.prompt_width is None:
            raise DataError(
                "adapter-prompts",
                "adapter 'foa' evolves prompt tokens, and this model takes none (it is no transformer, or was exported "
                "without); prompts=0 only shifts its features",
            )
        self._source: dict[str, Double] = {}

    @property
    def needs_source(self) -> bool:
        """Whether the source's statistics are missing."""
        return not self._source

    def reset(self) -> None:
        """Forget search, carried prompt and running mean; the source's statistics stay."""
        c = self.config
        self._running: Double | None = None
        self._batches = 0
        self._fitness = self._carried_fitness = 0.0
        self._evolution: Evolution | None = None
        if c.prompts:
            assert self.predictor.prompt_width is not None
            self._evolution = Evolution(c.prompts * self.predictor.prompt_width, c.sigma, c.population, c.seed)
            self._carried = self._evolution.mean

    def weights_changed(self) -> None:
        """Drop everything, the source's statistics too: features moved."""
        self._source = {}
        self.reset()

    def prepare(self, x: NDArray[Any]) -> None:
        """Measure the source's statistics, without prompts, on at least two clean examples; 32 do in the paper."""
        if len(x) < 2:
            raise DataError(
                "adapter-source", f"adapter 'foa' needs at least 2 clean examples for a deviation, got {len(x)}"
            )
        prediction = self.forward(x)
        source = {"feature": prediction.features.mean(0, dtype=np.float64)}
        if self.config.prompts:
            source |= _moments(prediction)
        self._source = source

    def predict(self, x: NDArray[Any]) -> Array:
        """Answer a batch with the best of the generation, and go on from all of it."""
        if not self._source:
            raise DataError(
                "adapter-source", "adapter 'foa' answers nothing before it has seen clean examples: prepare(x)"
            )
        shift = None
        if self._running is not None and self.config.shift:
            shift = (self.config.shift * (self._source["feature"] - self._running)).astype(np.float32)
        if self._evolution is None:
            prediction = self.forward(x, shift=shift)
            answer, features = prediction.logits, prediction.features.mean(0, dtype=np.float64)
        else:
            answer, features = self._generation(self._evolution, x, shift)
        rate = self.config.shift_rate
        self._running = features if self._running is None else (1 - rate) * self._running + rate * features
        self._batches += 1
        return answer

    def _generation(self, evolution: Evolution, x: NDArray[Any], shift: Array | None) -> tuple[Array, Double]:
        """Try a generation and the carried prompt; return the best one's logits and the mean feature over all."""
        points = [*evolution.ask(), self._carried]
        tried = [self.forward(x, prompts=self._tokens(point), shift=shift) for point in points]
        values = [self.fitness(prediction) for prediction in tried]
        best = int(np.argmin(values))
        evolution.tell(points, values)
        self._carried = points[best]
        self._fitness, self._carried_fitness = values[best], values[-1]
        features = np.mean([prediction.features.mean(0, dtype=np.float64) for prediction in tried], 0)
        return tried[best].logits, features

    def fitness(self, prediction: Prediction) -> float:
        """Return what the search minimises, of features without the shift."""
        weight, bias = self.predictor.head
        uncertainty = float(entropy(prediction.features @ weight.T + bias).sum())
        if not self.config.discrepancy:
            return uncertainty
        found = _moments(prediction)
        if found["mean"].shape != self._source["mean"].shape:
            raise DataError("adapter-state", "the source statistics that adapter 'foa' was given are another model's")
        distance = sum(float(np.square(values - self._source[name]).sum()) for name, values in found.items())
        return uncertainty + self.config.discrepancy * len(prediction.features) / 64 * distance

    def _tokens(self, point: Double) -> Array:
        return point.reshape(self.config.prompts, -1).astype(np.float32)

    # -- what is kept ---------------------------------------------------------------------------------

    def kept(self) -> State:
        """Return the source's statistics, the running mean, the carried prompt and the search."""
        state: State = {"batches": self._batches}
        state |= {f"source.{name}": values.copy() for name, values in self._source.items()}
        if self._running is not None:
            state["running"] = self._running.copy()
        if self._evolution is not None:
            state["carried"] = self._carried.copy()
            state |= {SEARCH + name: value for name, value in self._evolution.state().items()}
        return state

    def restore(self, reader: Reader) -> None:
        """Take back all of it."""
        c, width = self.config, self.predictor.head[0].shape[1]
        batches, source = reader.count("batches"), {}
        if "source.feature" in reader:
            source["feature"] = reader.array("source.feature", (width,))
            if c.prompts:
                source["mean"] = reader.array("source.mean", (None,))
                if not len(source["mean"]) or len(source["mean"]) % width:
                    reader.fail(f"'source.mean' has {len(source['mean'])} numbers, no multiple of the width {width}")
                source |= {"std": reader.array("source.std", source["mean"].shape)}
        running = reader.array("running", (width,)) if "running" in reader else None
        evolution, carried = None, None
        if c.prompts:
            assert self.predictor.prompt_width is not None
            size = c.prompts * self.predictor.prompt_width
            carried = reader.array("carried", (size,))
            search = Reader(self.name, {n.removeprefix(SEARCH): reader.values.pop(n) for n in _of_search(reader)})
            evolution = Evolution(size, c.sigma, c.population, c.seed)
            evolution.load_state(search)
            search.done()
        reader.done()
        self._batches, self._source, self._running = batches, source, running
        if evolution is not None and carried is not None:
            self._evolution, self._carried = evolution, carried

    def metrics(self) -> dict[str, float]:
        """Return the fitness of the answer, that of the carried prompt, and the search's step size."""
        if self._evolution is None:
            return {"batches": float(self._batches)}
        return {
            "batches": float(self._batches),
            "fitness": self._fitness,
            "carried-fitness": self._carried_fitness,
            "sigma": self._evolution.step,
        }


def _moments(prediction: Prediction) -> dict[str, Double]:
    """Return mean and, of two examples and more, standard deviation of every layer's class token, ``(L * D,)`` each."""
    assert prediction.activations is not None, "a model that takes prompts gives its layers' activations"
    flat = prediction.activations.reshape(len(prediction.activations), -1).astype(np.float64)
    return {"mean": flat.mean(0)} | ({"std": flat.std(0, ddof=1)} if len(flat) > 1 else {})


def _of_search(reader: Reader) -> list[str]:
    return [name for name in reader.values if name.startswith(SEARCH)]
