"""Mini-batches: which come, and that leaving out a small last one ends its epoch only."""

from __future__ import annotations

import pytest

from trellis_clients.contract import bench, site_of

SCENARIO = """\
name: batches
data: {name: gaussians, examples: 20, test_examples: 4}
clients: 1
partition: {name: iid, test_fraction: 0.0}
trainer: {name: sgd, batch_size: 8, local_epochs: 3, drop_last: %s}
runtime: {grid: local}
"""


@pytest.mark.parametrize(("drop_last", "sizes"), [("false", [8, 8, 4] * 3), ("true", [8, 8] * 3)])
def test_every_epoch_has_its_batches(tmp_path, drop_last, sizes):
    file = tmp_path / "batches.yaml"
    file.write_text(SCENARIO % drop_last)
    trainer, _, _, turn = bench(file)
    split = site_of(file).federation.client(0).train
    batches = list(trainer.batches(split, turn))
    assert [len(batch) for batch in batches] == sizes
    first = [int(i) for batch in batches[: len(sizes) // 3] for i in batch.index]
    assert len(set(first)) == len(first), "an example came twice in one epoch"
    for batch in batches:
        assert batch.x.equal(split.fields["x"][split.rows[batch.index]])
