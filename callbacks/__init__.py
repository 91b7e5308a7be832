"""What runs beside training: throughput, reports, rankings."""

from callbacks.throughput import Throughput

__all__ = ["Throughput"]
