/* Ends a snapshot's child where memory runs short: a native thread that needs no GIL, and so waits for no Python. */
typedef struct ms_sentry ms_sentry;

typedef struct ms_sentry_orders {
    const ms_gauge *gauges; /* copied; their descriptors must stay open until close. The child is ended when no more
                             * than give_bytes is left; or no more than tell_bytes, and the rest will be gone within
                             * notice_ns at the rate of the last 128 ms, of which 2 MiB are left out, if what is held
                             * grew as fast or a later look sees it go on */
    int32_t gauge_count;    /* at most MS_GAUGES, else -EINVAL */
    int64_t notice_ns;
    ms_gauge_pace pace; /* of two looks: least and most, and what could fill memory between them */
    int wake_fd;        /* an eventfd, set when the child was ended, and by ms_sentry_expect; -1: none */
} ms_sentry_orders;

typedef struct ms_sentry_report {
    uint64_t token;           /* of the gauge */
    int64_t left_bytes;       /* what was left there */
    int64_t rate_bytes_per_s; /* and how fast it went; 0 where give_bytes had been reached */
} ms_sentry_report;

/* Start the thread, named "memsafe-sentry", which does nothing yet. It takes a 400th of a core, and at the most five
 * hundred looks before their time, and those at a rate that is too high, or soon would be. These make others wait, but
 * for no longer than twice as usual, nor than twice pace.most_ns: where a look is dear, it takes more. Returns 0 and
 * sets *sentry, -EINVAL, -ENOMEM, -EBADF, or what pthread_create gave. Thread-safe. Needs no GIL. */
int ms_sentry_open(const ms_sentry_orders *orders, ms_sentry **sentry);

/* Watch over this child of the process's, whose fork took pause_ns, unless one was ended already. The pidfd must stay
 * open until ms_sentry_rest or ms_sentry_close. Where somebody else has closed it, or what a gauge reads, and the
 * number is another file's by now, nobody is ended; a pidfd is told from another of the process's children's since
 * Linux 6.9. Does nothing in a forked child. Thread-safe. Needs no GIL. */
void ms_sentry_watch(ms_sentry *sentry, int pidfd, int64_t pause_ns);

/* End no child any longer; when it returns, none is being ended. Does nothing in a forked child. Thread-safe. Needs no
 * GIL. */
void ms_sentry_rest(ms_sentry *sentry);

/* Set the eventfd once, when this process and the child have had so many minor faults together, but not before
 * not_before_ns (CLOCK_MONOTONIC): so that nobody who needs the GIL has to count them. Replaces what was expected
 * before; INT64_MAX: nothing is. Counts come when half of what is expected may have come, every 2 ms to 50
 * (pace.most_ns), in what the looks have left of the 400th and ten looks before their time. stat_fd: the child's
 * /proc/<pid>/stat, must stay open until ms_sentry_rest or ms_sentry_close; where it is another file's, nothing is
 * counted. Does nothing in a forked child. Thread-safe. Needs no GIL. */
void ms_sentry_expect(ms_sentry *sentry, int stat_fd, int64_t faults, int64_t not_before_ns);

/* Why the child was ended: set before it was, so whoever finds it dead finds the reason. One that had ended by itself
 * was not. Returns 1 and sets *report, or 0. Thread-safe. Needs no GIL. */
int ms_sentry_told(const ms_sentry *sentry, ms_sentry_report *report);

/* Stop the thread, join it, free everything; in a forked child only free it. pre: no other call on this sentry is
 * running or follows. Needs no GIL. */
void ms_sentry_close(ms_sentry *sentry);
