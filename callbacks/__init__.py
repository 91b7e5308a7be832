"""What runs beside training: throughput, monitoring, evaluations, reports."""

from callbacks.extrapolation import ExtrapolationEvaluation
from callbacks.monitor import RouterMonitor
from callbacks.rankings import RankingWriter
from callbacks.report import BeforeAfterReport
from callbacks.samples import Samples
from callbacks.throughput import Throughput

__all__ = ["BeforeAfterReport", "ExtrapolationEvaluation", "RankingWriter", "RouterMonitor", "Samples", "Throughput"]
