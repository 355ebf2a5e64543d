"""What INFO and CLIENT LIST say: redis-server's fields, for its clients, and memsafe's own."""

from __future__ import annotations

import os
import platform
import resource
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, TypeAlias

from memsafe import MemsafeError, memory_status

if TYPE_CHECKING:
    from examples.memkv.connection import Connection
    from examples.memkv.server import Server

REDIS_VERSION: Final = "7.0.15"
"""The server whose replies these are: clients look at it to know what they may ask."""

Fields: TypeAlias = dict[str, object]


def render(server: Server, sections: list[str]) -> str:
    """Return the INFO text of *sections*; none, or "default", "all", "everything": every section."""
    wanted = set(sections)
    if not wanted or wanted & {"default", "all", "everything"}:
        wanted = set(_SECTIONS)
    texts = []
    for name, fields in _SECTIONS.items():
        if name in wanted:
            lines = [f"{field}:{_text(value)}\r\n" for field, value in fields(server).items()]
            texts.append(f"# {name.capitalize()}\r\n{''.join(lines)}")
    return "\r\n".join(texts)


def _text(value: object) -> str:
    if isinstance(value, bool):
        return str(int(value))
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _server(server: Server) -> Fields:
    uptime_s = int(time.time() - server.started_s)
    return {
        "redis_version": REDIS_VERSION,
        "redis_mode": "standalone",
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "arch_bits": 64,
        "server_name": "memkv",
        "python_version": platform.python_version(),
        "process_id": os.getpid(),
        "tcp_port": server.config.port,
        "server_time_usec": time.time_ns() // 1000,
        "uptime_in_seconds": uptime_s,
        "uptime_in_days": uptime_s // 86400,
        "hz": 10,
        "executable": sys.executable,
        "config_file": "",
    }


def _clients(server: Server) -> Fields:
    connections = server.connections.values()
    return {
        "connected_clients": len(connections),
        "maxclients": server.config.clients_max,
        "client_recent_max_input_buffer": max((client.pending_bytes for client in connections), default=0),
        "client_recent_max_output_buffer": max((client.output_bytes for client in connections), default=0),
        "blocked_clients": 0,
    }


def _memory(server: Server) -> Fields:
    budget, config = server.budget, server.config
    status = memory_status()
    rss_bytes = status.process.rss_bytes or 0
    used, peak = budget.used_bytes, budget.peak_bytes
    physical = [constraint.limit_bytes for constraint in status.constraints if constraint.kind == "physical"]
    return {
        "used_memory": used,
        "used_memory_human": _human(used),
        "used_memory_rss": rss_bytes,
        "used_memory_rss_human": _human(rss_bytes),
        "used_memory_peak": peak,
        "used_memory_peak_human": _human(peak),
        "used_memory_peak_perc": f"{100 * used / peak if peak else 0:.2f}%",
        "used_memory_dataset": server.data_budget.used_bytes,
        "mem_clients_normal": server.clients_budget.used_bytes,
        "total_system_memory": physical[0] if physical else 0,
        "maxmemory": config.limit_bytes or 0,
        "maxmemory_human": _human(config.limit_bytes or 0),
        "maxmemory_policy": config.policy,
        "mem_fragmentation_ratio": rss_bytes / used if used else 0.0,
        "mem_allocator": "libc",
    }


def _persistence(server: Server) -> Fields:
    saving = server.persistence
    job = saving.job
    progress = job.progress if job else None
    return {
        "loading": 0,
        "async_loading": 0,
        "current_cow_peak": job.peak_copy_bytes if job else 0,
        "current_cow_size": job.copy_bytes if job else 0,
        "current_fork_perc": 100 * progress.ratio if progress else 0.0,
        "current_save_keys_processed": progress.done if progress else 0,
        "current_save_keys_total": progress.total if progress else 0,
        "rdb_changes_since_last_save": saving.changes,
        "rdb_bgsave_in_progress": int(job is not None),
        "rdb_last_save_time": saving.last_save_s,
        "rdb_last_bgsave_status": "ok" if saving.last_error is None else "err",
        "rdb_last_bgsave_time_sec": int(saving.last_duration_s),
        "rdb_current_bgsave_time_sec": -1 if saving.job_age_s is None else int(saving.job_age_s),
        "rdb_saves": saving.saves,
        "rdb_last_cow_size": saving.last_copy_bytes,
        "rdb_last_load_keys_expired": saving.loaded_expired,
        "rdb_last_load_keys_loaded": saving.loaded,
        "aof_enabled": 0,
        "aof_rewrite_in_progress": 0,
        "aof_rewrite_scheduled": 0,
        "aof_last_bgrewrite_status": "ok",
        "aof_last_write_status": "ok",
    }


def _stats(server: Server) -> Fields:
    stats, store = server.stats, server.store
    return {
        "total_connections_received": stats.connections,
        "total_commands_processed": stats.commands,
        "instantaneous_ops_per_sec": round(stats.operations_per_s),
        "total_net_input_bytes": stats.bytes_in,
        "total_net_output_bytes": stats.bytes_out,
        "rejected_connections": stats.rejected,
        "expired_keys": store.expired,
        "evicted_keys": store.evicted,
        "keyspace_hits": store.hits,
        "keyspace_misses": store.misses,
        "latest_fork_usec": round(server.persistence.last_pause_s * 1e6),
        "total_forks": server.persistence.forks,
        "total_error_replies": stats.errors,
    }


def _memsafe(server: Server) -> Fields:
    """The budget, the pressure and the snapshots, in memsafe's words; sizes in bytes."""
    budget, saving, event = server.budget, server.persistence, server.pressure
    budget_stats = budget.stats()
    result = saving.last_result
    fields: Fields = {
        "memsafe_used_bytes": budget.used_bytes,
        "memsafe_peak_bytes": budget.peak_bytes,
        "memsafe_limit_bytes": server.config.limit_bytes or 0,
        "memsafe_headroom_bytes": _known(budget.headroom_bytes),
        "memsafe_refusals": sum(report.refusals for report in (budget_stats, server.data_budget.stats())),
        "memsafe_data_bytes": server.data_budget.used_bytes,
        "memsafe_clients_bytes": server.clients_budget.used_bytes,
        "memsafe_pressure_level": server.monitor.level.name.lower(),
        "memsafe_pressure_changes": server.pressure_changes,
        "memsafe_pressure_detail": _line(event.detail) if event else "",
        "memsafe_pressure_sources": ",".join(source.name for source in server.monitor.sources if source.used),
        "memsafe_ceiling_bytes": server.data_budget.limit_bytes or 0,
        "memsafe_shed_bytes": server.shed_bytes,
        "memsafe_last_save_time": saving.last_save_s,
        "memsafe_last_save_error": _line(saving.last_error or ""),
        "memsafe_last_fork_pause_us": round(saving.last_pause_s * 1e6),
        "memsafe_last_copy_bytes": saving.last_copy_bytes,
        "memsafe_copy_peak_bytes": saving.copy_peak_bytes,
        "memsafe_last_save_bytes": result.size_bytes if result else 0,
        "memsafe_snapshot_max_copy": server.settings.show("snapshot-max-copy"),
    }
    return fields | _binding()


def _binding() -> Fields:
    """What the kernel leaves to this process."""
    try:
        status = memory_status()
    except MemsafeError as error:
        return {"memsafe_binding": _line(str(error))}
    binding = status.binding
    return {
        "memsafe_binding": binding.kind if binding else "",
        "memsafe_binding_path": (binding.path or "") if binding else "",
        "memsafe_binding_limit_bytes": binding.limit_bytes if binding else 0,
        "memsafe_available_bytes": _known(status.available_bytes),
        "memsafe_rss_anonymous_bytes": _known(status.process.anonymous_bytes),
    }


def _replication(server: Server) -> Fields:
    return {"role": "master", "connected_slaves": 0, "master_repl_offset": 0}


def _cpu(server: Server) -> Fields:
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "used_cpu_sys": f"{own.ru_stime:.6f}",
        "used_cpu_user": f"{own.ru_utime:.6f}",
        "used_cpu_sys_children": f"{children.ru_stime:.6f}",
        "used_cpu_user_children": f"{children.ru_utime:.6f}",
    }


def _cluster(server: Server) -> Fields:
    return {"cluster_enabled": 0}


def _keyspace(server: Server) -> Fields:
    store = server.store
    return {"db0": f"keys={len(store)},expires={store.expiring},avg_ttl=0"} if len(store) else {}


_SECTIONS: Final[dict[str, Callable[[Server], Fields]]] = {
    "server": _server,
    "clients": _clients,
    "memory": _memory,
    "persistence": _persistence,
    "stats": _stats,
    "memsafe": _memsafe,
    "replication": _replication,
    "cpu": _cpu,
    "cluster": _cluster,
    "keyspace": _keyspace,
}


def client_line(client: Connection) -> str:
    """Return the line that CLIENT LIST has for *client*."""
    now_s = time.monotonic()
    fields: Fields = {
        "id": client.id,
        "addr": client.address,
        "laddr": client.local_address,
        "fd": client.fileno,
        "name": client.name.decode("latin-1"),
        "age": int(now_s - client.created_s),
        "idle": int(now_s - client.active_at_s),
        "flags": "N",
        "db": 0,
        "sub": 0,
        "psub": 0,
        "ssub": 0,
        "multi": -1 if client.transaction is None else len(client.transaction.requests),
        "qbuf": client.pending_bytes,
        "qbuf-free": 0,
        "argv-mem": 0,
        "multi-mem": 0,
        "obl": 0,
        "oll": 0,
        "omem": client.output_bytes,
        "tot-mem": client.charged_bytes,
        "events": "r",
        "cmd": client.last_command.decode("latin-1"),
        "user": "default",
        "redir": -1,
        "resp": client.protocol,
        "lib-name": client.lib_name.decode("latin-1"),
        "lib-ver": client.lib_ver.decode("latin-1"),
    }
    return " ".join(f"{name}={value}" for name, value in fields.items())


def _human(size_bytes: int) -> str:
    """Return a size as redis-server writes it for people: 1.50M."""
    if size_bytes < 1024:
        return f"{size_bytes}B"
    power = min((size_bytes.bit_length() - 1) // 10, 5)
    return f"{size_bytes / 1024**power:.2f}{'BKMGTP'[power]}"


def _known(number: int | None) -> int:
    return -1 if number is None else number


def _line(text: str) -> str:
    return " ".join(text.split())
