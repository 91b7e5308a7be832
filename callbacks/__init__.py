"""What runs beside training: throughput, reports, rankings."""

from callbacks.report import BeforeAfterReport
from callbacks.throughput import Throughput

__all__ = ["BeforeAfterReport", "Throughput"]
