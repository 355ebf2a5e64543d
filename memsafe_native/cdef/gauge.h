/* What is left under a limit, from a few numbers in files of the kernel: microseconds to read, and no Python. */

enum { MS_GAUGE_TERMS = 3, MS_GAUGE_HELD = 2, MS_GAUGES = 32, MS_GAUGE_STILL = 100 };

typedef struct ms_gauge_term {
    int32_t fd;   /* stays the caller's; -1: no term */
    char key[20]; /* what the line begins with that the number stands on; empty: the file is one number */
    int64_t scale;
} ms_gauge_term;

/* left = base + the sum of scale times number. The terms that only add come last, behind the first: they are not read
 * where the others show already that enough is left, because memory.stat is what costs. Two terms of one file stand
 * next to each other: it is read once. */
typedef struct ms_gauge {
    uint64_t token; /* the caller's name for it, not 0 */
    int64_t base_bytes;
    int64_t tell_bytes;  /* somebody wants to know when no more is left than this */
    int64_t give_bytes;  /* and will give something back when no more is left than this; at most tell_bytes */
    int64_t added_bytes; /* what the terms that only add made the last time that they were read */
    int64_t seen_bytes;  /* private: what was left when it was read last; 0 at first */
    int32_t rests;       /* not 0: the kernel itself tells when it matters; read only with all of them */
    ms_gauge_term terms[MS_GAUGE_TERMS];
    ms_gauge_term held[MS_GAUGE_HELD]; /* what processes have and is no cache, where somebody wants to know: no part of
                                        * what is left, but then all terms are read each time */
    int64_t held_bytes;                /* out: the sum of held; -1: nobody wants to know, or it cannot be read */
} ms_gauge;

/* How often to read: again before what is left could fall to tell_bytes at this rate, within bounds. While less is
 * not left from one reading to the next, the least doubles, up to MS_GAUGE_STILL times as much: idling costs little. */
typedef struct ms_gauge_pace {
    int64_t fill_bytes_per_s;
    int64_t least_ns;
    int64_t most_ns;
    int64_t still_ns; /* private: the least now; 0 at first */
} ms_gauge_pace;

typedef struct ms_gauge_sight {
    int32_t told;       /* how many have no more left than is to be told */
    int32_t short_of;   /* the last that has no more left than asks for giving; -1: none */
    int64_t left_bytes; /* of that one */
    int64_t next_ns;    /* when to read again */
    int64_t soonest_ns; /* when what is left under one of them could be down to its next mark, growing at the rate: time
                         * that processors work, not time that passes */
} ms_gauge_sight;

/* Read the gauges, those that rest only with all. One that cannot be read tells nothing: its cgroup is gone, and who
 * finds that out is elsewhere. Opens nothing, allocates nothing. Not thread-safe for the same gauges. Needs no GIL. */
ms_gauge_sight ms_gauge_read(ms_gauge *gauges, int count, int all, ms_gauge_pace *pace);
