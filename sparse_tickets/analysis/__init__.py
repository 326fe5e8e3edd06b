"""From the results of a sweep to claims: statistics, contributions, tables and figures.

``figures`` is imported by its own name, so that a table on a terminal needs no plotting library.
"""

from .contributions import CONTRIBUTIONS, contributions
from .frame import CONDITIONS, METRICS
from .statistics import (
    Contrast,
    bootstrap_interval,
    degradation_level,
    holm,
    iqm,
    normalised_return,
    restricted_mean,
)
from .table import compare, degradation, markdown_table, summary, summary_table

__all__ = [
    "CONDITIONS",
    "CONTRIBUTIONS",
    "METRICS",
    "Contrast",
    "bootstrap_interval",
    "compare",
    "contributions",
    "degradation",
    "degradation_level",
    "holm",
    "iqm",
    "markdown_table",
    "normalised_return",
    "restricted_mean",
    "summary",
    "summary_table",
]
