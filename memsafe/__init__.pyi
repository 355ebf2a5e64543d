from memsafe import numpy as numpy, oom as oom, testing as testing
from memsafe.budget import (
    Budget as Budget,
    BudgetReport as BudgetReport,
    BudgetStats as BudgetStats,
    Consumer as Consumer,
    Drift as Drift,
    ProcessBudget as ProcessBudget,
    Reservation as Reservation,
    Waiter as Waiter,
    current_budget as current_budget,
)
from memsafe.commit import ForkAssessment as ForkAssessment, assess_fork as assess_fork
from memsafe.errors import (
    BudgetAbortedError as BudgetAbortedError,
    BudgetClosedError as BudgetClosedError,
    BudgetExceededError as BudgetExceededError,
    KernelError as KernelError,
    MemsafeError as MemsafeError,
    OOMKilledError as OOMKilledError,
    ReservationClosedError as ReservationClosedError,
    SnapshotCancelledError as SnapshotCancelledError,
    SnapshotFailedError as SnapshotFailedError,
    SnapshotInProgressError as SnapshotInProgressError,
    SnapshotOverrunError as SnapshotOverrunError,
    SnapshotRefusedError as SnapshotRefusedError,
    UnsupportedError as UnsupportedError,
)
from memsafe.forecast import (
    DirtyMeter as DirtyMeter,
    DirtyRate as DirtyRate,
    measure_dirty_rate as measure_dirty_rate,
)
from memsafe.heap import HeapGuard as HeapGuard, guard_python_heap as guard_python_heap
from memsafe.limits import ProcessLimit as ProcessLimit, limit_process as limit_process
from memsafe.pressure import (
    EmergencyReserve as EmergencyReserve,
    PressureEvent as PressureEvent,
    PressureLevel as PressureLevel,
    PressureMonitor as PressureMonitor,
    SourceStatus as SourceStatus,
    Thresholds as Thresholds,
)
from memsafe.region import Region as Region
from memsafe.sizes import format_size as format_size, parse_size as parse_size
from memsafe.snapshot import (
    SnapshotForecast as SnapshotForecast,
    SnapshotJob as SnapshotJob,
    SnapshotProgress as SnapshotProgress,
    SnapshotResult as SnapshotResult,
    SnapshotSchedule as SnapshotSchedule,
    SnapshotState as SnapshotState,
    fork_snapshot as fork_snapshot,
)
from memsafe.spawn import (
    ChildOOMKilledError as ChildOOMKilledError,
    CompletedProcess as CompletedProcess,
    Popen as Popen,
    run as run,
)
from memsafe.spawn.coroutine import run_async as run_async
from memsafe.status import (
    CommitStatus as CommitStatus,
    Constraint as Constraint,
    MemoryStatus as MemoryStatus,
    Pressure as Pressure,
    ProcessMemory as ProcessMemory,
    Stall as Stall,
    SwapLimit as SwapLimit,
    SwapStatus as SwapStatus,
    memory_status as memory_status,
)
from memsafe.trimming import trim as trim

__version__: str
