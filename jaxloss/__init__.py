"""Cross-entropy for JAX: exact at every confidence, one pass, every differentiation mode."""

from importlib.metadata import version as _version

from jaxloss._cross_entropy import TokenStats as TokenStats
from jaxloss._cross_entropy import cross_entropy as cross_entropy
from jaxloss._cross_entropy import log_softmax as log_softmax
from jaxloss._cross_entropy import nll_loss as nll_loss
from jaxloss._divergence import kl_divergence as kl_divergence
from jaxloss._divergence import linear_kl_divergence as linear_kl_divergence
from jaxloss._labels import TopKLabels as TopKLabels
from jaxloss._linear_cross_entropy import linear_cross_entropy as linear_cross_entropy
from jaxloss._linear_cross_entropy import linear_loss as linear_loss
from jaxloss._targets import check_labels as check_labels
from jaxloss._targets import total_weight as total_weight

__version__ = _version("jaxloss")
__all__ = [
    "TokenStats",
    "TopKLabels",
    "check_labels",
    "cross_entropy",
    "kl_divergence",
    "linear_cross_entropy",
    "linear_kl_divergence",
    "linear_loss",
    "log_softmax",
    "nll_loss",
    "total_weight",
]
