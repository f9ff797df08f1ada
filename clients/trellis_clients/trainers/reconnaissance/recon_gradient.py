"""Fine-tuning on every mission and averaging the weights: the lower bound, which forgets."""

from __future__ import annotations

from trellis.data.base import Split
from trellis.registry import register
from trellis_clients.trainer import Metrics, Turn
from trellis_clients.trainers.reconnaissance._recon import Recon, ReconConfig, ReconModel


@register(
    "trainers",
    "recon-gradient",
    paper="Hendryx et al., Federated Reconnaissance: Efficient, Distributed, Class-Incremental Learning, 2021",
    takes=("image", "vector"),
    sends="missions",
    payload="weights, prototypes",
    replies=("evidence",),
    strategies=("reconnaissance",),
)
class ReconGradient(Recon):
    """SGD on each mission's images, over the logits of all classes known to the client; the cloud averages the weights.

    The paper's code averages what clients' heads have in common and appends the rows of new classes; here every head
    has a row for every class from the start and all weights are averaged by example counts, as in federated averaging.
    """

    class Config(ReconConfig):
        pass

    uploads = ("arrays",)

    def learn(self, model: ReconModel, seen: Split, turn: Turn) -> Metrics:
        known = model.known
        known[seen.fields["y"][seen.rows]] = True
        optimizer = self.optimizer(model, turn)
        metrics = self.supervised(model, seen, turn, optimizer, known, self.config.local_epochs)
        turn.reply["arrays"] = self.shared(model)
        return metrics
