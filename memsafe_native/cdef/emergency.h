/* Memory that is held, every page of it, to be given back when there is none: by any thread, Python's or not. */
typedef struct ms_emergency ms_emergency;

/* Make one of size bytes that holds nothing yet; size is rounded up to whole pages. It has one reference.
 * Returns 0 and sets *emergency, -EINVAL (no bytes), or -ENOMEM. Thread-safe. Needs no GIL. */
int ms_emergency_open(size_t size, ms_emergency **emergency);

/* Share it, and drop a reference; the last one gives it back and frees it. Thread-safe. Needs no GIL. */
ms_emergency *ms_emergency_ref(ms_emergency *emergency);
void ms_emergency_unref(ms_emergency *emergency);

/* Take it, every page. Takes milliseconds; in a full cgroup, it calls the OOM killer.
 * Returns the bytes taken: all, or 0 where it is held already; -ESHUTDOWN after close, or what mmap(2) gave.
 * Thread-safe. Needs no GIL. */
int64_t ms_emergency_take(ms_emergency *emergency);

/* Give it back: the pages first, which needs no memory at all, then the mapping, and with it the promise that mode 2
 * counts. Waits for one that is being taken. Returns the bytes given: all, or 0 where it was not held.
 * Thread-safe. Needs no GIL. */
int64_t ms_emergency_give(ms_emergency *emergency);

/* Give it back for good. Returns as ms_emergency_give. Thread-safe. Needs no GIL. */
int64_t ms_emergency_close(ms_emergency *emergency);

/* What is held: all, or 0. A forked child holds nothing: the pages would stay there when the parent gives them back.
 * It may take its own. Thread-safe. Needs no GIL. */
size_t ms_emergency_held(const ms_emergency *emergency);
size_t ms_emergency_size(const ms_emergency *emergency);
