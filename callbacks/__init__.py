"""What runs beside training: throughput, reports, rankings."""

from callbacks.rankings import RankingWriter
from callbacks.report import BeforeAfterReport
from callbacks.throughput import Throughput

__all__ = ["BeforeAfterReport", "RankingWriter", "Throughput"]
