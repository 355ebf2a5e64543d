/* One native thread that waits for the kernel's memory notifications and never needs the GIL. Sources are file
 * descriptors that stay the caller's; what happens on them is counted per source until it is taken. A burst of any
 * length is one wake-up and one record: memory is bounded by the capacity, and nothing is allocated after open. */
typedef struct ms_waiter ms_waiter;

/* How a source says that something happened, and what has to be done so that it can say so again. */
enum ms_waiter_how {
    MS_WAITER_KERNFS = 1,  /* POLLPRI; read at offset 0 before the first wait and after each event (memory.events) */
    MS_WAITER_TRIGGER = 2, /* POLLPRI; nothing to read (PSI) */
    MS_WAITER_COUNTER = 3, /* readable; one 8-byte read drains it (eventfd, timerfd) */
    MS_WAITER_STREAM = 4   /* readable; read until it is empty (FIFO, stream socket) */
};

typedef struct ms_waiter_report {
    uint64_t token;
    uint64_t count;     /* events since the last take; of a COUNTER, the sum of what was read */
    int64_t first_ns;   /* CLOCK_MONOTONIC when the thread saw the first of them */
    int32_t lost_errno; /* not 0: the source failed with this error and is no longer waited for */
} ms_waiter_report;

/* Start a waiter for at most capacity sources, 1 to 4096. Its thread is named "memsafe-waiter" and blocks all signals.
 * Returns 0 and sets *waiter, or -errno. Thread-safe. Needs no GIL. */
int ms_waiter_open(int capacity, ms_waiter **waiter);

/* Wait for fd as well, reporting it under token; effective at once. The fd stays the caller's and must stay open until
 * ms_waiter_remove or ms_waiter_close; a COUNTER or STREAM must be non-blocking.
 * Returns 0; -EEXIST (the token is in use), -ENOSPC (capacity), -EINVAL, -EPERM (the file cannot be waited for),
 * -ECHILD (the waiter belongs to the process that forked this one), or what the first read gave.
 * Thread-safe. Needs no GIL. */
int ms_waiter_add(ms_waiter *waiter, int fd, int how, uint64_t token);

/* Wait for a source no longer and forget what was not taken; afterwards its fd is not touched again.
 * Returns 0, -ENOENT, -ECHILD. Thread-safe. Needs no GIL. */
int ms_waiter_remove(ms_waiter *waiter, uint64_t token);

/* An eventfd, readable while something waits to be taken. Others may write to it to wake whoever waits there. It
 * belongs to the waiter. Returns the descriptor. Thread-safe. Needs no GIL. */
int ms_waiter_fileno(const ms_waiter *waiter);

/* Move what happened since the last take into reports, one for each source that has anything to say. What does not
 * fit stays, and ms_waiter_fileno stays readable.
 * Returns how many were written, -EINVAL, -ECHILD. Thread-safe. Needs no GIL. */
int ms_waiter_take(ms_waiter *waiter, ms_waiter_report *reports, int capacity);

/* What else ms_waiter_wait does: all that lies between two looks at the machine, because beside busy Python threads
 * each return from native code may wait a switch interval for the GIL. */
typedef struct ms_waiter_look {
    int64_t rest_ns;        /* first, let events gather for so long */
    int timer_fd;           /* of ms_timer_open, set to fire timer_ns after the call; -1: none */
    int64_t timer_ns;       /* less than 0: leave it, and the gauges, as they are set */
    const ms_gauge *gauges; /* copied, and read from now on without Python; when one has something to tell, it is */
    int32_t gauge_count;    /* reported as if the timer had fired, once. At most MS_GAUGES, else -EINVAL */
    ms_gauge_pace pace;
    const ms_kept_set *kept; /* read by ms_kept_read when there was something to take; NULL: none */
    uint64_t gave_for;       /* out: the gauge that the reserve was given back for since the last time; 0: none */
    int64_t gave_at_bytes;   /* out: what was left there */
    int alarm_fd;     /* of ms_timer_open: stopped while the call lasts, and set to fire alarm_ns after it, for */
    int64_t alarm_ns; /* whoever wants to know that the caller is long in coming back. 0: it is not touched */
} ms_waiter_look;

/* As ms_waiter_take, but first wait until ms_waiter_fileno is readable, and do what look says; look may be NULL.
 * Returns as ms_waiter_take, perhaps 0; or -EINTR, or what setting the timer gave; -EBADF where a descriptor of the
 * waiter's own was closed by somebody else, at the latest a second after the timer should have fired: all that is left
 * then is to close it. Needs no GIL. Thread-safe where no other call uses the same look or what it reads. */
int ms_waiter_wait(ms_waiter *waiter, ms_waiter_look *look, ms_waiter_report *reports, int capacity);

/* Give this back as soon as a gauge has no more left than its give_bytes: whoever holds the GIL may hold it for long.
 * Shared, and instead of the one before. Gauges are then read until it was given, also after they have told.
 * Returns 0, -ECHILD. Thread-safe. Needs no GIL. */
int ms_waiter_set_reserve(ms_waiter *waiter, ms_emergency *reserve);

/* Whether gauges are also read as the process's CPU time passes (see cpuwatch.h), so that they are read in time and an
 * idle process pays nothing. Else only as time passes: what begins to fill after stillness is seen later.
 * Returns 0, or -errno: why not. Thread-safe. Needs no GIL. */
int ms_waiter_follows_cpu(const ms_waiter *waiter);

/* Read no gauges any longer; afterwards their descriptors are not touched again.
 * Returns 0, -ECHILD. Thread-safe. Needs no GIL. */
int ms_waiter_drop_gauges(ms_waiter *waiter);

/* Stop the thread, join it, drop the reserve and free the waiter. In a forked child it only closes the child's
 * descriptors. Where one of its own was closed by somebody else, the thread is not waited for, and the waiter is not
 * freed: it may still run. pre: no other call on this waiter is running or follows. Needs no GIL. */
void ms_waiter_close(ms_waiter *waiter);
