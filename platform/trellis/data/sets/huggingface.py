"""Data sets of the Hugging Face Hub, or local files in the formats it reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from trellis.data.base import DataSet
from trellis.data.sets._base import Source, held_out, numbered, split, standardized, tensor
from trellis.data.sets._images import pixels, unit
from trellis.errors import DataError, listed, nearest
from trellis.registry import register
from trellis.scenario import Strict

_BUILDERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv", ".arrow": "arrow"}


@register("datasets", "huggingface", summary="a data set of the Hugging Face Hub, or local parquet, JSON, CSV, images")
class HuggingFace(Source):
    """A labelled data set by its name on the Hub, or a local file or folder.

    ``datasets.load_dataset`` reads it, which is also what ``flwr_datasets.FederatedDataset`` calls; the latter
    reports its use over the network, so it is left out. Code that comes with a data set is never run. A name
    that exists as a file or folder beside the scenario is local and needs no network.

    The column of examples holds images, or numbers of one shape. It may be called ``image_column`` although its
    ``kind`` is another.
    """

    class Config(Strict):
        dataset: str = Field(description="name on the Hub, or a local file or folder")
        subset: str | None = Field(None, description="the data set's configuration, where it has several")
        train_split: str = "train"
        test_split: str | None = Field("test", description="null holds out test_fraction of the training split")
        test_fraction: float = Field(0.2, ge=0, lt=1, description="held out where test_split is null")
        image_column: str = "image"
        label_column: str = "label"
        id_column: str | None = Field(None, description="the user or site an example came from")
        kind: Literal["image", "series", "tokens"] = "image"
        size: int | None = Field(None, ge=1, le=1024, description="pixels a side; null leaves images as they are")
        channels: Literal[1, 3] = 3
        standardize: bool = Field(True, description="mean 0 and deviation 1, of images per channel; not of integers")
        cache_dir: str | None = Field(
            None, description="where downloads and tables are kept; the library's own if null"
        )

    config: Config

    def load(self, seed: int) -> DataSet:
        del seed  # real data; the held-out part must not move with the seed
        config, tables = self.config, self._tables()
        train = self._split(tables, "train_split", config.train_split)
        x, labels, ids = self._examples(train), self._column(train, "label_column", config.label_column)[:], None
        if config.id_column is not None:
            ids = [str(value) for value in self._column(train, "id_column", config.id_column)[:]]
        names = getattr(train.features[config.label_column], "names", None)
        if config.test_split is None:
            y, classes = numbered(labels, names, config.dataset)
            kept, out = (torch.from_numpy(rows) for rows in held_out(y.numpy(), config.test_fraction))
            ids = None if ids is None else [ids[row] for row in kept.tolist()]
            parts = [(x[kept], y[kept]), (x[out], y[out])]
        else:
            test = self._split(tables, "test_split", config.test_split)
            test_labels = self._column(test, "label_column", config.label_column)[:]
            # Both at once, so that text gets the same numbers in both.
            y, classes = numbered([*labels, *test_labels], names, config.dataset)
            parts = [(x, y[: len(labels)]), (self._examples(test), y[len(labels) :])]
        train_x, test_x = parts[0][0], parts[1][0]
        facts: dict[str, Any] = {}
        if train_x.is_floating_point():
            (train_x, test_x), facts = standardized(
                train_x, [test_x], on=config.standardize, by_channel=config.kind == "image"
            )
        return DataSet(
            kind=config.kind,
            train=split(train_x, parts[0][1], len(classes), f"{config.dataset}, training"),
            test=split(test_x, parts[1][1], len(classes), f"{config.dataset}, test"),
            classes=classes,
            natural_id=None if ids is None else tuple(ids),
            facts=facts,
        )

    def _tables(self) -> Mapping[str, Any]:
        """Return the splits by name."""
        from datasets import load_dataset

        config, local = self.config, self.folder / self.config.dataset
        where: dict[str, Any] = {"path": config.dataset}
        if local.is_dir():
            where = {"path": str(local)}
        elif local.is_file():
            if local.suffix.lower() not in _BUILDERS:
                raise DataError("data-format", f"data.dataset: {local}; allowed endings: {listed(_BUILDERS)}")
            where = {"path": _BUILDERS[local.suffix.lower()], "data_files": str(local)}
        elif Path(config.dataset).is_absolute() or config.dataset.startswith("."):
            raise DataError("data-missing", f"data.dataset: nothing is at {local}")
        cache = None if config.cache_dir is None else str(self.folder / config.cache_dir)
        try:
            tables: Mapping[str, Any] = load_dataset(name=config.subset, cache_dir=cache, **where)
        except Exception as error:  # the library raises its own, pyarrow's, the network's and plain ones
            reason = (str(error) or "no reason given").splitlines()[0]
            raise DataError(
                "data-unreachable",
                f"data.dataset: {config.dataset!r} is no local file or folder that could be read, and could not be"
                f" had from the Hub: {type(error).__name__}: {reason}",
            ) from error
        assert isinstance(tables, dict), type(tables)  # no single split was asked for
        return tables

    def _split(self, tables: Mapping[str, Any], key: str, name: str) -> Any:
        if name not in tables:
            hint = " Null holds out data.test_fraction instead." if key == "test_split" else ""
            raise DataError(
                "data-split",
                f"data.{key}: {self.config.dataset!r} has no split {name!r}; it has {listed(tables)}.{hint}",
            )
        return tables[name]

    def _column(self, table: Any, key: str, name: str) -> Any:
        if name not in table.column_names:
            raise DataError(
                "data-column",
                f"data.{key}: {self.config.dataset!r} has no column {name!r}.{nearest(name, table.column_names)}"
                f" It has: {listed(table.column_names)}",
            )
        return table[name]

    def _examples(self, table: Any) -> Tensor:
        """Return a split's examples; images as float32 in [0, 1] of shape ``(n, channels, height, width)``."""
        from datasets import Image

        config = self.config
        column = self._column(table, "image_column", config.image_column)
        source = f"{config.dataset}, {config.image_column}"
        try:
            if isinstance(table.features[config.image_column], Image):
                return unit(np.stack([pixels(image, config.size, config.channels) for image in column]))
            array = np.asarray(column[:])
        except (OSError, SyntaxError, ValueError, AttributeError) as error:
            raise DataError(
                "data-shape", f"{source}: not readable as examples of one shape (set data.size for images): {error}"
            ) from None
        if array.dtype.kind not in "iubf":
            raise DataError("data-type", f"{source}: values of type {array.dtype}; expected images or numbers")
        return tensor(array) if config.kind == "tokens" else tensor(array).float()
