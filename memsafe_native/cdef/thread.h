/* A thread that has to act when memory and processors are short. */

/* Make the calling thread ready for that, once, at its beginning. What it cannot have it does without.
 *
 * The pages of its stack that it will need are begun now: beginning one in a full cgroup calls the OOM killer.
 *
 * It asks for short slices of time. It works for some microseconds at a time, and by EEVDF (with a slice of one's own:
 * Linux 6.12) who asks for less at a time is served sooner when it wakes up; its share is the same. Threads and
 * processes that it starts do not inherit that. Only with SCHED_OTHER and a nice value that is not negative: who has
 * chosen another policy knows better, and with a negative one its children would lose that. Not under seccomp.
 *
 * Thread-safe. Needs no GIL. */
void ms_thread_ready(void);
