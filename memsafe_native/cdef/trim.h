enum {
    MS_TRIM_GLIBC = 1,
    MS_TRIM_JEMALLOC = 2,
    MS_TRIM_MIMALLOC = 4,
};

/* Have every malloc that is loaded give its free memory back to the kernel: glibc's malloc_trim, jemalloc's purge of
 * all arenas, mimalloc's collect (of the calling thread's heap and what ended threads left). Returns the set of those
 * that were asked, 0 where none of them is loaded. Thread-safe, needs no GIL, takes milliseconds. */
int ms_trim(void);
