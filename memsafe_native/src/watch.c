/* Gauges between two looks: see watch.h. */
#include "ms.h"
#include "emergency.h"
#include "gauge.h"
#include "kept.h"
#include "waiter.h"
#include "watch.h"

int ms_watch_begin(ms_watch *watch, const ms_waiter_look *look, int64_t at_ns)
{
    if (look->gauge_count < 0 || look->gauge_count > MS_GAUGES)
        return -EINVAL;
    watch->timer_fd = look->timer_fd;
    watch->until_ns = at_ns + look->timer_ns;
    watch->has_told = false;
    watch->pace = look->pace;
    watch->count = look->gauge_count;
    for (int i = 0; i < watch->count; i++)
        watch->gauges[i] = look->gauges[i];
    watch->read_at_ns = at_ns;
    watch->next_at_ns = at_ns + watch->pace.least_ns;
    return 0;
}

ms_verdict ms_watch_read(ms_watch *watch, bool all, int64_t at_ns)
{
    ms_gauge_sight sight = ms_gauge_read(watch->gauges, watch->count, all, &watch->pace);
    ms_verdict verdict = {.is_news = sight.told > 0 && !watch->has_told,
                          .short_of = sight.short_of,
                          .left_bytes = sight.left_bytes,
                          .soonest_ns = sight.soonest_ns};
    watch->has_told |= verdict.is_news;
    watch->read_at_ns = at_ns;
    /* A time that has come fires no more, whoever reads then: the timer itself or a source that came with it. */
    if (!all || watch->next_at_ns <= at_ns || at_ns + sight.next_ns < watch->next_at_ns) {
        verdict.delay_ns = sight.next_ns;
        watch->next_at_ns = at_ns + sight.next_ns;
    }
    return verdict;
}

void ms_watch_gave(ms_watch *watch, const ms_verdict *verdict)
{
    watch->gave_for = watch->gauges[verdict->short_of].token;
    watch->gave_at_bytes = verdict->left_bytes;
}

void ms_watch_report(ms_watch *watch, ms_waiter_look *look)
{
    look->gave_for = watch->gave_for;
    look->gave_at_bytes = watch->gave_at_bytes;
    watch->gave_for = 0;
}
