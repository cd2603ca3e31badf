"""Fleets and workloads in virtual time, driven by the very scheduler that the gateway runs. No I/O, no clock."""

from img_serving.simulation.capacity import load_of
from img_serving.simulation.early import EARLY_RULES, EarlyRule, simulate_early
from img_serving.simulation.faults import Fault, FaultKind
from img_serving.simulation.fleet import SimulatedEndpoint, Terms, routes_of
from img_serving.simulation.report import Report, Status, jain_index, percentile
from img_serving.simulation.simulator import simulate
from img_serving.simulation.workload import (
    Arrival,
    Client,
    Kind,
    Noise,
    Sender,
    TooMuch,
    Workload,
    burst,
    poisson,
    trace,
)

__all__ = [
    "EARLY_RULES",
    "Arrival",
    "Client",
    "EarlyRule",
    "Fault",
    "FaultKind",
    "Kind",
    "Noise",
    "Report",
    "Sender",
    "SimulatedEndpoint",
    "Status",
    "Terms",
    "TooMuch",
    "Workload",
    "burst",
    "jain_index",
    "load_of",
    "percentile",
    "poisson",
    "routes_of",
    "simulate",
    "simulate_early",
    "trace",
]
