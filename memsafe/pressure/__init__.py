"""Low-memory callbacks: every source of warnings that this process may use, as three levels."""

from __future__ import annotations

from memsafe.pressure.emergency import EmergencyReserve
from memsafe.pressure.levels import PressureEvent, PressureLevel, Thresholds
from memsafe.pressure.monitor import PressureMonitor
from memsafe.pressure.sources import SourceStatus

__all__ = ["EmergencyReserve", "PressureEvent", "PressureLevel", "PressureMonitor", "SourceStatus", "Thresholds"]
