/* The sentry: see cdef/sentry.h. */
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#include "fork_internal.h"
#include "ms.h"
#include "gauge.h"
#include "generation.h"
#include "native_thread.h"
#include "owned.h"
#include "sentry.h"
#include "thread.h"

enum {
    DUTY = 400,         /* one part in so many of a core, */
    LOOKS_AHEAD = 500,  /* and so many looks before their time: half a second, however slow the machine is. */
    SPARSE = 2,         /* What was spent beyond is made up for by looks so much further apart, not by a pause. */
    TEARDOWN_FORKS = 4, /* to give the child's memory back takes a few times what it took to fork, on any machine */
    LATE_LOOKS = 2,     /* what has kept a look waiting will keep the child's end waiting too, */
    LATE_MOST_NS = 1000 * 1000 * 1000, /* unless that was a debugger, or Ctrl-Z */
    /* The kernel charges 64 pages a processor at a time, and a huge page at once: over less time, and without the last
     * huge page, a rate is noise. So what goes slowly is seen over longer than is looked ahead. */
    WINDOW_NS = 4 * 1000 * 1000,
    WINDOWS = 32,
    BATCH_BYTES = 64 * 4096,
    ALARM_NS = 1000 * 1000 * 1000,
    HUGE_PAGE_BYTES = 2 * 1024 * 1024,
    COUNTS_AHEAD = 10, /* of the looks before their time: the others are there to save the parent */
    COUNT_LEAST_NS = 2 * 1000 * 1000,
    PLAUSIBLE_NS = 4 * 1000, /* a fault of a thread that begins to write, and of all its memory, without a break */
    STAT_BYTES = 1024,       /* what precedes the faults is less: a name of 64 bytes and seven numbers */
    MINFLT = 10,             /* which field of /proc/<pid>/stat counts them (proc_pid_stat(5)) */
    AFTER_NAME = 3,          /* the one that follows the name */
    NS_PER_S = 1000000000
};

typedef struct point {
    int64_t at_ns; /* 0: none yet */
    int64_t left_bytes;
    int64_t held_bytes; /* -1: unknown */
} point;

/* In bytes a second: how fast less is left, and how fast processes take what is no cache, as far as less is left. */
typedef struct rates {
    double left, held;
} rates;

/* What was left before, a window apart or more; and when to look again. */
typedef struct trail {
    int64_t next_ns;
    int64_t latest_ns; /* when it can wait no longer, be it affordable or not */
    bool is_hasty;     /* at the last look the rate was too high */
    point alarm;       /* when it was so first, less than ALARM_NS ago; since then no more was left */
    unsigned newest;
    point past[WINDOWS];
} trail;

typedef struct lookout {
    ms_gauge gauge;
    ms_owned files[MS_GAUGE_TERMS]; /* what its terms read */
    trail seen;
} lookout;

/* Page faults of both processes, counted for somebody who waits until there have been so many. */
typedef struct tally {
    ms_owned stat;    /* of the child's */
    int64_t expected; /* INT64_MAX: nobody waits */
    int64_t not_before_ns, next_ns;
    int64_t counted, counted_at_ns; /* 0: not yet */
    double pace;                    /* in faults a nanosecond; it slows down by half from count to count at the most */
} tally;

struct ms_sentry {
    pthread_mutex_t lock; /* guards child, notice_ns, faults and is_closing; held while a child is being ended; never
                           * taken in a forked child */
    pthread_cond_t changed;
    pthread_t thread;
    unsigned generation; /* of the process whose it is */
    ms_owned child;      /* its pidfd; none: nothing to watch over */
    int64_t notice_ns;
    tally faults;
    bool is_closing;
    atomic_bool has_told; /* release: the report is complete */
    ms_sentry_report report;
    /* The thread's own from here on. */
    ms_sentry_orders orders;
    ms_owned wake;
    int64_t began_ns, cpu_began_ns, looks;
    lookout posts[];
};

static int64_t clock_ns(clockid_t clock)
{
    struct timespec now;
    clock_gettime(clock, &now);
    return (int64_t)now.tv_sec * NS_PER_S + now.tv_nsec;
}

static bool is_foreign(const ms_sentry *sentry)
{
    return sentry->generation != ms_generation();
}

/* How fast it has gone since, in bytes a second, at least. */
static double rate_since(const point *before, const point *now, double gone_bytes)
{
    if (before->at_ns == 0 || now->at_ns - before->at_ns < WINDOW_NS)
        return 0;
    return (gone_bytes - HUGE_PAGE_BYTES) * NS_PER_S / (double)(now->at_ns - before->at_ns);
}

static double larger(double one, double other)
{
    return one > other ? one : other;
}

/* The highest since any look that is remembered; 0 at first. */
static rates note(trail *seen, const point *now)
{
    rates highest = {0, 0};
    for (int i = 0; i < WINDOWS; i++) {
        const point *before = &seen->past[i];
        double lost_bytes = (double)before->left_bytes - (double)now->left_bytes;
        double held_bytes = (double)now->held_bytes - (double)before->held_bytes;
        highest.left = larger(highest.left, rate_since(before, now, lost_bytes));
        if (before->held_bytes >= 0 && now->held_bytes >= 0)
            highest.held =
                larger(highest.held, rate_since(before, now, held_bytes < lost_bytes ? held_bytes : lost_bytes));
    }
    if (now->at_ns - seen->past[seen->newest].at_ns >= WINDOW_NS) {
        seen->newest = (seen->newest + 1) % WINDOWS;
        seen->past[seen->newest] = *now;
    }
    return highest;
}

/* How soon what is left must not be gone. Looks that are far apart because much is left are not late; those that have
 * to wait until they are affordable are. */
static int64_t notice(const ms_sentry *sentry, const trail *past, int64_t at_ns)
{
    int64_t late_ns = past->next_ns ? at_ns - past->next_ns : 0;
    return sentry->notice_ns + LATE_LOOKS * (late_ns < LATE_MOST_NS ? late_ns : LATE_MOST_NS);
}

/* When half of the time will be over until the rate would be too high for what is left. */
static int64_t halfway_to_haste(int64_t at_ns, double left_bytes, double rate, double notice_s)
{
    double half_s = rate > 0 ? (left_bytes / rate - notice_s) / 2 : 1;
    return half_s < 1 ? at_ns + (int64_t)(half_s * NS_PER_S) : INT64_MAX; /* in a second much else may be */
}

/* Whether since the alarm, which is raised now where it was not, so much more has gone that at this rate the rest would
 * be gone in time.
 *
 * The kernel takes a page off the cache before it takes it off the usage: while a writer that drops its cache is
 * interrupted in between, and a busy host may hold it there for long, the cache looks like memory that is gone. But
 * then nothing more goes, and in the end it is back. */
static bool goes_on(point *alarm, const point *now, double notice_s)
{
    if (alarm->at_ns == 0)
        *alarm = *now;
    double lost_bytes = (double)alarm->left_bytes - (double)now->left_bytes;
    double since_s = (double)(now->at_ns - alarm->at_ns) / NS_PER_S;
    return lost_bytes >= BATCH_BYTES && (double)now->left_bytes * since_s < lost_bytes * notice_s;
}

static void forget_alarm(point *alarm, const point *now)
{
    if (now->left_bytes > alarm->left_bytes || now->at_ns - alarm->at_ns > ALARM_NS)
        alarm->at_ns = 0;
}

/* Whether a gauge says that the child must end, as *report has it. Sets when to look at it again. */
static bool is_short(ms_sentry *sentry, lookout *post, int64_t at_ns, ms_sentry_report *report)
{
    ms_gauge_pace *pace = &sentry->orders.pace;
    ms_gauge *gauge = &post->gauge;
    trail *seen = &post->seen;
    int64_t notice_ns = notice(sentry, seen, at_ns);
    gauge->seen_bytes = INT64_MAX;
    ms_gauge_sight sight = ms_gauge_read(gauge, 1, 1, pace);
    seen->next_ns = at_ns + (sight.soonest_ns > pace->least_ns ? sight.soonest_ns : pace->least_ns);
    if (sight.short_of >= 0) {
        *report = (ms_sentry_report){.token = gauge->token, .left_bytes = sight.left_bytes};
        return true;
    }
    seen->is_hasty = false;
    seen->latest_ns = INT64_MAX;
    if (gauge->seen_bytes == INT64_MAX) /* it cannot be read */
        return false;
    const point now = {at_ns, gauge->seen_bytes, gauge->held_bytes};
    const rates rate = note(seen, &now);
    const double notice_s = (double)notice_ns / NS_PER_S, left_bytes = (double)now.left_bytes;
    seen->is_hasty = sight.told > 0 && left_bytes < rate.left * notice_s;
    bool is_sure = seen->is_hasty && (left_bytes < rate.held * notice_s || goes_on(&seen->alarm, &now, notice_s));
    forget_alarm(&seen->alarm, &now);
    seen->latest_ns = halfway_to_haste(at_ns, left_bytes, rate.left, notice_s);
    if (seen->is_hasty)
        seen->next_ns = at_ns + pace->least_ns;
    *report = (ms_sentry_report){gauge->token, now.left_bytes,
                                 rate.left < (double)INT64_MAX ? (int64_t)rate.left : INT64_MAX};
    return is_sure;
}

/* Whether a number was read from another file than was meant. */
static bool is_misled(const lookout *post)
{
    for (int i = 0; i < MS_GAUGE_TERMS && post->files[i].fd >= 0; i++)
        if (!ms_is_ours(&post->files[i]))
            return true;
    return false;
}

/* Returns when there will have been time enough for what was spent but for so many looks, waking up included; and no
 * later than two of the longest waits from now: what looks cost is more than they take where a host takes the processor
 * away, and nobody may be blind for that. */
static int64_t affordable_ns(const ms_sentry *sentry, int64_t at_ns, int64_t ahead)
{
    int64_t spent_ns = clock_ns(CLOCK_THREAD_CPUTIME_ID) - sentry->cpu_began_ns;
    int64_t looks = sentry->looks, most_ns = sentry->orders.pace.most_ns;
    if (looks <= ahead)
        return 0;
    int64_t space_ns = spent_ns / looks * DUTY;
    int64_t due_ns = sentry->began_ns + space_ns * (looks - ahead);
    int64_t latest_ns = at_ns + SPARSE * (space_ns < most_ns ? space_ns : most_ns);
    return due_ns < latest_ns ? due_ns : latest_ns;
}

static void wake(const ms_sentry *sentry)
{
    if (ms_is_ours(&sentry->wake)) {
        const uint64_t one = 1;
        (void)!write(sentry->wake.fd, &one, sizeof one); /* it refuses only when it is set already */
    }
}

/* Returns the minor faults of the process whose stat it is; -1 where it tells none, or is another file by now. */
static int64_t faults_of(const ms_owned *stat)
{
    char text[STAT_BYTES];
    ssize_t size = ms_is_ours(stat) ? pread(stat->fd, text, sizeof text - 1, 0) : -1;
    if (size <= 0)
        return -1;
    text[size] = '\0';
    const char *field = strrchr(text, ')'); /* the name may hold anything */
    for (int i = AFTER_NAME; field && i <= MINFLT; i++) {
        field = strchr(field, ' ');
        if (field)
            field++;
    }
    return field && *field >= '0' && *field <= '9' ? strtoll(field, NULL, 10) : -1;
}

/* Returns how soon half of the faults that are still expected may have come, should a thread begin right now. */
static int64_t until_half_ns(tally *faults, int64_t at_ns, int64_t counted)
{
    int64_t passed_ns = at_ns - faults->counted_at_ns;
    double rate = faults->counted_at_ns && passed_ns > 0 ? (double)(counted - faults->counted) / (double)passed_ns : 0;
    faults->pace = rate > faults->pace / 2 ? rate : faults->pace / 2;
    faults->counted = counted;
    faults->counted_at_ns = at_ns;
    double half = (double)(faults->expected - counted) / 2;
    double fastest = faults->pace > 1.0 / PLAUSIBLE_NS ? faults->pace : 1.0 / PLAUSIBLE_NS;
    return half < fastest * NS_PER_S ? (int64_t)(half / fastest) : NS_PER_S;
}

/* Count, and wake who waits. Sets its next_ns. pre: the lock is held. */
static void count_faults(ms_sentry *sentry, int64_t at_ns)
{
    struct rusage own;
    tally *faults = &sentry->faults;
    int64_t childs = faults_of(&faults->stat);
    faults->next_ns = at_ns + sentry->orders.pace.most_ns;
    if (childs < 0 || getrusage(RUSAGE_SELF, &own) < 0) /* it has ended; who polls its pidfd knows */
        return;
    int64_t counted = own.ru_minflt + childs;
    if (counted >= faults->expected) {
        faults->expected = INT64_MAX;
        wake(sentry);
        return;
    }
    int64_t soon_ns = until_half_ns(faults, at_ns, counted);
    if (soon_ns < sentry->orders.pace.most_ns)
        faults->next_ns = at_ns + (soon_ns > COUNT_LEAST_NS ? soon_ns : COUNT_LEAST_NS);
}

/* Returns when faults are to be counted again; INT64_MAX: nobody waits. pre: the lock is held. */
static int64_t next_count_ns(const tally *faults)
{
    if (faults->expected == INT64_MAX)
        return INT64_MAX;
    return faults->next_ns > faults->not_before_ns ? faults->next_ns : faults->not_before_ns;
}

/* Count if it is time, and return when to wake up for it again, which is when that is affordable: who is awake for
 * another reason counts for little more. pre: the lock is held. */
static int64_t see_to_faults(ms_sentry *sentry, int64_t at_ns)
{
    if (next_count_ns(&sentry->faults) <= at_ns)
        count_faults(sentry, at_ns);
    int64_t next_ns = next_count_ns(&sentry->faults);
    int64_t affordable_at_ns = affordable_ns(sentry, at_ns, COUNTS_AHEAD);
    return next_ns > affordable_at_ns ? next_ns : affordable_at_ns;
}

/* pre: the lock is held. Returns when to look again; 0: the child must end, as *report says. */
static int64_t look(ms_sentry *sentry, ms_sentry_report *report)
{
    int64_t at_ns = clock_ns(CLOCK_MONOTONIC);
    int64_t next_ns = at_ns + sentry->orders.pace.most_ns, latest_ns = INT64_MAX;
    bool is_hasty = false;
    for (int i = 0; i < sentry->orders.gauge_count; i++) {
        lookout *post = &sentry->posts[i];
        if (post->seen.next_ns <= at_ns && is_short(sentry, post, at_ns, report) && !is_misled(post))
            return 0;
        if (post->seen.next_ns < next_ns)
            next_ns = post->seen.next_ns;
        if (post->seen.latest_ns < latest_ns)
            latest_ns = post->seen.latest_ns;
        is_hasty |= post->seen.is_hasty;
    }
    sentry->looks++;
    int64_t affordable_at_ns = affordable_ns(sentry, at_ns, LOOKS_AHEAD);
    if (affordable_at_ns > latest_ns)
        affordable_at_ns = latest_ns;
    if (!is_hasty && next_ns < affordable_at_ns)
        next_ns = affordable_at_ns;
    int64_t count_at_ns = see_to_faults(sentry, at_ns);
    return next_ns < count_at_ns ? next_ns : count_at_ns;
}

/* pre: the lock is held. */
static void wait_until(ms_sentry *sentry, int64_t until_ns)
{
    struct timespec until = {.tv_sec = until_ns / NS_PER_S, .tv_nsec = until_ns % NS_PER_S};
    if (until_ns == 0)
        pthread_cond_wait(&sentry->changed, &sentry->lock);
    else
        pthread_cond_timedwait(&sentry->changed, &sentry->lock, &until);
}

/* End the child, if it is one that lives: another's end is not to be told as ours. Watch over nothing from then on.
 * pre: the lock is held. */
static void end_child(ms_sentry *sentry, const ms_sentry_report *report)
{
    ms_owned child = sentry->child;
    sentry->child.fd = -1;
    if (!ms_is_ours(&child) || !ms_fork_lives(child.fd))
        return;
    sentry->report = *report;
    atomic_store_explicit(&sentry->has_told, true, memory_order_release);
    ms_fork_kill(child.fd);
    wake(sentry);
    ms_fork_reap_memory(child.fd);
}

static void *run(void *argument)
{
    ms_sentry *sentry = argument;
    pthread_setname_np(pthread_self(), "memsafe-sentry");
    ms_thread_ready();
    pthread_mutex_lock(&sentry->lock);
    sentry->cpu_began_ns = clock_ns(CLOCK_THREAD_CPUTIME_ID);
    while (!sentry->is_closing) {
        ms_sentry_report report;
        int64_t next_ns = 0;
        if (sentry->child.fd >= 0 && (next_ns = look(sentry, &report)) == 0)
            end_child(sentry, &report);
        else
            wait_until(sentry, next_ns);
    }
    pthread_mutex_unlock(&sentry->lock);
    return NULL;
}

/* Returns 0, or -errno where a descriptor is none. */
static int take_over(lookout *post, const ms_gauge *gauge)
{
    int result = 0;
    post->gauge = *gauge;
    for (int i = 0; i < MS_GAUGE_TERMS; i++)
        post->files[i].fd = -1;
    for (int i = 0; i < MS_GAUGE_TERMS && gauge->terms[i].fd >= 0 && result == 0; i++)
        result = ms_own(gauge->terms[i].fd, &post->files[i]);
    return result;
}

static int take_orders(ms_sentry *sentry, const ms_sentry_orders *orders)
{
    int result = 0;
    sentry->orders = *orders;
    sentry->orders.gauges = NULL; /* the caller's */
    sentry->child.fd = sentry->wake.fd = -1;
    if (orders->wake_fd >= 0)
        result = ms_own(orders->wake_fd, &sentry->wake);
    for (int i = 0; i < orders->gauge_count && result == 0; i++)
        result = take_over(&sentry->posts[i], &orders->gauges[i]);
    return result;
}

static void prepare(ms_sentry *sentry)
{
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_mutex_init(&sentry->lock, NULL);
    pthread_cond_init(&sentry->changed, &monotonic);
    pthread_condattr_destroy(&monotonic);
    sentry->generation = ms_generation();
    sentry->faults.expected = INT64_MAX;
    sentry->began_ns = clock_ns(CLOCK_MONOTONIC);
}

/* pre: there is no thread. */
static void dispose(ms_sentry *sentry)
{
    pthread_cond_destroy(&sentry->changed);
    pthread_mutex_destroy(&sentry->lock);
    free(sentry);
}

int ms_sentry_open(const ms_sentry_orders *orders, ms_sentry **sentry)
{
    if (orders->gauge_count < 0 || orders->gauge_count > MS_GAUGES)
        return -EINVAL;
    ms_sentry *made = calloc(1, sizeof *made + (size_t)orders->gauge_count * sizeof made->posts[0]);
    if (!made)
        return -ENOMEM;
    prepare(made);
    int result = take_orders(made, orders);
    if (result == 0)
        result = ms_native_thread(&made->thread, run, made);
    if (result < 0) {
        dispose(made);
        return result;
    }
    *sentry = made;
    return 0;
}

/* One child is ended at the most: the report that others may be reading stays as it is. */
void ms_sentry_watch(ms_sentry *sentry, int pidfd, int64_t pause_ns)
{
    ms_owned child;
    if (is_foreign(sentry))
        return;
    if (pidfd < 0 || ms_own(pidfd, &child) < 0)
        child.fd = -1;
    pthread_mutex_lock(&sentry->lock);
    if (!atomic_load_explicit(&sentry->has_told, memory_order_relaxed))
        sentry->child = child;
    sentry->notice_ns = sentry->orders.notice_ns + TEARDOWN_FORKS * pause_ns;
    sentry->faults.expected = INT64_MAX;
    pthread_cond_signal(&sentry->changed);
    pthread_mutex_unlock(&sentry->lock);
}

void ms_sentry_rest(ms_sentry *sentry)
{
    ms_sentry_watch(sentry, -1, 0);
}

void ms_sentry_expect(ms_sentry *sentry, int stat_fd, int64_t faults, int64_t not_before_ns)
{
    ms_owned stat;
    if (is_foreign(sentry) || ms_own(stat_fd, &stat) < 0)
        return;
    pthread_mutex_lock(&sentry->lock);
    sentry->faults.stat = stat;
    sentry->faults.expected = faults;
    sentry->faults.not_before_ns = not_before_ns;
    sentry->faults.next_ns = 0;
    pthread_mutex_unlock(&sentry->lock);
    pthread_cond_signal(&sentry->changed); /* not before: what it wakes must not have to wait for this thread's turn */
}

int ms_sentry_told(const ms_sentry *sentry, ms_sentry_report *report)
{
    if (!atomic_load_explicit(&sentry->has_told, memory_order_acquire))
        return 0;
    *report = sentry->report;
    return 1;
}

void ms_sentry_close(ms_sentry *sentry)
{
    /* A forked child has no such thread, and its copy of the lock may be held for ever. */
    if (is_foreign(sentry)) {
        free(sentry);
        return;
    }
    pthread_mutex_lock(&sentry->lock);
    sentry->is_closing = true;
    pthread_cond_signal(&sentry->changed);
    pthread_mutex_unlock(&sentry->lock);
    pthread_join(sentry->thread, NULL);
    dispose(sentry);
}
