/* Timers for a waiter, as MS_WAITER_COUNTER: descriptors, CLOCK_MONOTONIC, non-blocking. */

/* Returns a descriptor, or -errno. Thread-safe. Needs no GIL. */
int ms_timer_open(void);

/* Let the timer fire once, delay_ns from now, instead of whatever it was set to; at least 1 ns.
 * Returns 0, or -errno. Thread-safe. Needs no GIL. */
int ms_timer_set(int fd, int64_t delay_ns);

/* Let it not fire. Returns 0, or -errno. Thread-safe. Needs no GIL. */
int ms_timer_stop(int fd);
