/* Gauges: see cdef/gauge.h. */
#include <stdbool.h>
#include <string.h>
#include <unistd.h>

#include "ms.h"
#include "gauge.h"

enum {
    FILE_BYTES = 8192, /* memory.stat has some 2 KiB; the keys that are looked for stand in its first half */
    MOVED_DIVISOR = 64,
    READINGS = 3,           /* of which two that follow one another agree, */
    TORN_BYTES = 64 * 4096, /* but for what the kernel charges a processor at a time */
    NS_PER_S = 1000000000
};

/* The file that was read last: its numbers often stand together. */
typedef struct text {
    int fd;
    char bytes[FILE_BYTES];
} text;

static bool load(text *file, int fd)
{
    if (file->fd == fd)
        return true;
    file->fd = -1;
    ssize_t size = pread(fd, file->bytes, sizeof file->bytes - 1, 0);
    if (size <= 0)
        return false;
    file->bytes[size] = '\0';
    file->fd = fd;
    return true;
}

/* Returns where the number begins, or NULL. */
static const char *find(const char *bytes, const char *key)
{
    size_t size = strlen(key);
    while (bytes && strncmp(bytes, key, size) != 0) {
        bytes = strchr(bytes, '\n');
        if (bytes)
            bytes++;
    }
    return bytes ? bytes + size : NULL;
}

static bool read_term(text *file, const ms_gauge_term *term, int64_t *value)
{
    if (!load(file, term->fd))
        return false;
    const char *digit = find(file->bytes, term->key);
    while (digit && (*digit == ' ' || *digit == '\t' || *digit == ':'))
        digit++;
    if (!digit || *digit < '0' || *digit > '9')
        return false;
    int64_t number = 0;
    for (; *digit >= '0' && *digit <= '9'; digit++)
        if (__builtin_mul_overflow(number, 10, &number) || __builtin_add_overflow(number, *digit - '0', &number))
            return false;
    return !__builtin_mul_overflow(number, term->scale, value);
}

/* What it is to be watched for next, when so much is left; all of it, when there is nothing more. */
static int64_t next_mark(const ms_gauge *gauge, int64_t left_bytes)
{
    if (left_bytes > gauge->tell_bytes)
        return gauge->tell_bytes;
    return left_bytes > gauge->give_bytes ? gauge->give_bytes : INT64_MIN;
}

/* After how long what is left could be down to the next mark. */
static int64_t delay_ns(int64_t left_bytes, int64_t mark_bytes, const ms_gauge_pace *pace)
{
    double delay = ((double)left_bytes - (double)mark_bytes) * (NS_PER_S / (double)pace->fill_bytes_per_s);
    if (delay >= (double)pace->most_ns)
        return pace->most_ns;
    return delay < 1 ? 1 : (int64_t)delay;
}

/* Whether what only adds need not be read: without it more is left than is to be told, and with as much of it as there
 * was the last time, the next reading would not even come half as soon. */
static bool is_enough(const ms_gauge *gauge, int64_t left_bytes)
{
    int64_t spare_bytes = left_bytes - gauge->tell_bytes;
    return spare_bytes > 0 && gauge->added_bytes <= spare_bytes;
}

static bool add_terms(text *file, const ms_gauge_term *term, const ms_gauge_term *end, int64_t *sum)
{
    for (int64_t value; term < end && term->fd >= 0; term++)
        if (!read_term(file, term, &value) || __builtin_add_overflow(*sum, value, sum))
            return false;
    return true;
}

static bool wants_held(const ms_gauge *gauge)
{
    return gauge->held[0].fd >= 0;
}

static void read_held(text *file, ms_gauge *gauge)
{
    int64_t held = 0;
    if (wants_held(gauge) && add_terms(file, gauge->held, gauge->held + MS_GAUGE_HELD, &held))
        gauge->held_bytes = held;
}

/* Returns the first of the terms that only add; *end* where there is none. */
static const ms_gauge_term *adding_terms(const ms_gauge *gauge, const ms_gauge_term *end)
{
    const ms_gauge_term *term = gauge->terms + 1;
    while (term < end && term->fd >= 0 && term->scale < 0)
        term++;
    return term < end && term->fd >= 0 ? term : end;
}

/* Read what only adds, in a file of its own, between two readings of all else: cache that was dropped meanwhile would
 * be missing from the one and still be counted as used by the other. In doubt the less is left. */
static bool read_whole(text *file, ms_gauge *gauge, const ms_gauge_term *adding, int64_t *left)
{
    const ms_gauge_term *end = gauge->terms + MS_GAUGE_TERMS;
    for (int reading = 1;; reading++) {
        int64_t before = *left, after = gauge->base_bytes, added = 0;
        if (!add_terms(file, adding, end, &added))
            return false;
        gauge->added_bytes = added;
        read_held(file, gauge);
        if (!add_terms(file, gauge->terms, adding, &after))
            return false;
        double moved_bytes = (double)before - (double)after;
        bool agree = moved_bytes <= TORN_BYTES && moved_bytes >= -TORN_BYTES;
        *left = agree || reading < READINGS || after < before ? after : before;
        if (agree || reading == READINGS)
            return !__builtin_add_overflow(*left, added, left);
    }
}

/* Returns false where it cannot be read. */
static bool read_left(text *file, ms_gauge *gauge, int64_t *left_bytes)
{
    const ms_gauge_term *end = gauge->terms + MS_GAUGE_TERMS, *adding = adding_terms(gauge, end);
    bool is_apart = adding < end && adding->fd != gauge->terms->fd;
    int64_t left = gauge->base_bytes;
    gauge->held_bytes = -1;
    if (!add_terms(file, gauge->terms, is_apart ? adding : end, &left))
        return false;
    if (!is_apart)
        read_held(file, gauge);
    else if ((wants_held(gauge) || !is_enough(gauge, left)) && !read_whole(file, gauge, adding, &left))
        return false;
    *left_bytes = left;
    return true;
}

/* Whether it lost a share of what may be lost since it was read last. */
static bool moved(const ms_gauge *gauge, int64_t left_bytes, int64_t mark_bytes)
{
    return gauge->seen_bytes == 0 || gauge->seen_bytes - left_bytes > (left_bytes - mark_bytes) / MOVED_DIVISOR;
}

/* Returns the least delay now: what begins to fill while nothing moved is seen after MS_GAUGE_STILL times the least. */
static int64_t slow_down(ms_gauge_pace *pace, bool any_moved)
{
    if (any_moved || pace->still_ns < pace->least_ns)
        pace->still_ns = pace->least_ns;
    else if ((pace->still_ns *= 2) > pace->least_ns * MS_GAUGE_STILL)
        pace->still_ns = pace->least_ns * MS_GAUGE_STILL;
    return pace->still_ns < pace->most_ns ? pace->still_ns : pace->most_ns;
}

ms_gauge_sight ms_gauge_read(ms_gauge *gauges, int count, int all, ms_gauge_pace *pace)
{
    ms_gauge_sight sight = {.short_of = -1, .soonest_ns = pace->most_ns};
    text file = {.fd = -1};
    bool any_moved = false;
    for (int i = 0; i < count; i++) {
        int64_t left_bytes;
        file.fd = -1; /* between two gauges time passes: it is read anew */
        if ((gauges[i].rests && !all) || !read_left(&file, &gauges[i], &left_bytes))
            continue;
        int64_t mark_bytes = next_mark(&gauges[i], left_bytes);
        sight.told += left_bytes <= gauges[i].tell_bytes;
        if (mark_bytes == INT64_MIN) {
            sight.short_of = i;
            sight.left_bytes = left_bytes;
            continue;
        }
        int64_t one_ns = delay_ns(left_bytes, mark_bytes, pace);
        if (one_ns < sight.soonest_ns)
            sight.soonest_ns = one_ns;
        any_moved |= moved(&gauges[i], left_bytes, mark_bytes);
        gauges[i].seen_bytes = left_bytes;
    }
    int64_t least_ns = slow_down(pace, any_moved);
    sight.next_ns = sight.soonest_ns > least_ns ? sight.soonest_ns : least_ns;
    return sight;
}
