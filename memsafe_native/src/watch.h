/* What a waiter reads between two looks of Python, in its own thread and in the one that follows the CPU time: gauges,
 * until there is something to tell. Not thread-safe: the waiter's lock guards it. Needs no GIL. Include waiter.h
 * before.
 */
#ifndef MS_WATCH_H
#define MS_WATCH_H

#include <stdbool.h>

#include "ms.h"

typedef struct ms_watch {
    int timer_fd;      /* of Python's next look; -1: none was set yet */
    int64_t until_ns;  /* when that timer was to fire; 0: none */
    int count;         /* 0: there is nothing to read until Python has looked */
    bool has_told;     /* since that look was set */
    uint64_t gave_for; /* a gauge's token; 0: nothing was given since it was asked for */
    int64_t gave_at_bytes;
    int64_t read_at_ns;
    int64_t next_at_ns; /* when to read again */
    ms_gauge_pace pace;
    ms_gauge gauges[MS_GAUGES];
} ms_watch;

typedef struct ms_verdict {
    bool is_news;       /* there is something to tell, for the first time */
    int32_t short_of;   /* the gauge for which something is to be given; -1: none */
    int64_t left_bytes; /* of that one */
    int64_t delay_ns;   /* after how long to read again; 0: when it was to be already */
    int64_t soonest_ns; /* after how much CPU time there could be something more to tell */
} ms_verdict;

/* Begin with a look's timer and gauges. Returns 0, or -EINVAL: more gauges than MS_GAUGES. */
int ms_watch_begin(ms_watch *watch, const ms_waiter_look *look, int64_t at_ns);

/* Read the gauges, all or those that do not rest. pre: there are some. */
ms_verdict ms_watch_read(ms_watch *watch, bool all, int64_t at_ns);

/* Note that something was given for what a verdict was short of. */
void ms_watch_gave(ms_watch *watch, const ms_verdict *verdict);

/* Put what was given since the last time into the look. */
void ms_watch_report(ms_watch *watch, ms_waiter_look *look);

#endif
