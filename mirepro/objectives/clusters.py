"""Close neighbours C_i: rows that share a k-means cluster with row i in any of several clusterings (LA)."""

from collections.abc import Mapping
from dataclasses import dataclass

from mirepro import kmeans
from mirepro.banks import Bank
from mirepro.objectives.regions import Region


@dataclass
class Clustered(Region):
    """Keeps `labels[modality]` `(C, n)` of the rows that this process holds, refreshed every epoch.

    They start as the rows' numbers, so that C_i = {i}.

    Attributes:
        n_clusterings: Runs of k-means whose clusters are united [code: 10].
        n_clusters: Clusters of each [code: 30,000 for 1.28 million rows; scaled with the bank here].
        iterations: Of each k-means [unverified].
    """

    n_clusterings: int = 3
    n_clusters: int = 200
    iterations: int = 5

    def validate(self) -> None:
        """See `Objective.validate`."""
        super().validate()
        for key in ("n_clusterings", "n_clusters", "iterations"):
            self._require(getattr(self, key) >= 1, key, "1 or more")

    def refresh(self, banks: Mapping[str, Bank], epoch: int, seed: int) -> None:
        """Clusters the banks anew; before the first epoch they hold noise, and every row stays its own cluster."""
        if epoch == 0:
            self.labels = {name: bank.numbers()[None] for name, bank in banks.items()}
            return
        self.labels = kmeans.clusterings(
            banks,
            count=self.n_clusterings,
            clusters=self.n_clusters,
            epoch=epoch,
            seed=seed,
            iterations=self.iterations,
        )
