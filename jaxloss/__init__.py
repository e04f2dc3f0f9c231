"""Cross-entropy for JAX: exact at every confidence, one pass, every differentiation mode."""

from importlib.metadata import version as _version

from jaxloss._contrastive import contrastive_loss as contrastive_loss
from jaxloss._contrastive import sigmoid_contrastive_loss as sigmoid_contrastive_loss
from jaxloss._cross_entropy import cross_entropy as cross_entropy
from jaxloss._cross_entropy import log_softmax as log_softmax
from jaxloss._cross_entropy import nll_loss as nll_loss
from jaxloss._divergence import kl_divergence as kl_divergence
from jaxloss._divergence import linear_kl_divergence as linear_kl_divergence
from jaxloss._focal import focal_loss as focal_loss
from jaxloss._labels import check_labels as check_labels
from jaxloss._labels import total_weight as total_weight
from jaxloss._linear_cross_entropy import linear_cross_entropy as linear_cross_entropy
from jaxloss._linear_cross_entropy import linear_token_stats as linear_token_stats
from jaxloss._linear_loss import linear_loss as linear_loss
from jaxloss._linear_stats_loss import linear_stats_loss as linear_stats_loss
from jaxloss._log_probs import linear_log_probs_at as linear_log_probs_at
from jaxloss._log_probs import linear_sample as linear_sample
from jaxloss._log_probs import linear_top_k as linear_top_k
from jaxloss._log_probs import log_probs_at as log_probs_at
from jaxloss._metrics import MetricSums as MetricSums
from jaxloss._metrics import metric_sums as metric_sums
from jaxloss._metrics import metrics as metrics
from jaxloss._sequences import next_token_labels as next_token_labels
from jaxloss._sequences import sequence_weight as sequence_weight
from jaxloss._sigmoid import sigmoid_cross_entropy as sigmoid_cross_entropy
from jaxloss._sigmoid import sigmoid_focal_loss as sigmoid_focal_loss
from jaxloss._token_stats import token_stats as token_stats
from jaxloss._types import LowRankKernel as LowRankKernel
from jaxloss._types import QuantizedKernel as QuantizedKernel
from jaxloss._types import Reference as Reference
from jaxloss._types import ReferenceStats as ReferenceStats
from jaxloss._types import TokenStats as TokenStats
from jaxloss._types import TopKLabels as TopKLabels

__version__ = _version("jaxloss")
__docformat__ = "google"
__all__ = [
    "LowRankKernel",
    "MetricSums",
    "QuantizedKernel",
    "Reference",
    "ReferenceStats",
    "TokenStats",
    "TopKLabels",
    "check_labels",
    "contrastive_loss",
    "cross_entropy",
    "focal_loss",
    "kl_divergence",
    "linear_cross_entropy",
    "linear_kl_divergence",
    "linear_log_probs_at",
    "linear_loss",
    "linear_sample",
    "linear_stats_loss",
    "linear_token_stats",
    "linear_top_k",
    "log_probs_at",
    "log_softmax",
    "metric_sums",
    "metrics",
    "next_token_labels",
    "nll_loss",
    "sequence_weight",
    "sigmoid_contrastive_loss",
    "sigmoid_cross_entropy",
    "sigmoid_focal_loss",
    "token_stats",
    "total_weight",
]
