/* Counters of a tree of budgets. They know no Python, so that allocator hooks and native threads can charge them.
 *
 * A charge goes root-first and is undone where it got to when a level refuses; an uncharge goes leaf-first. All
 * functions may run on any thread, need no GIL, and never allocate but in ms_budget_new. Charging and uncharging are
 * lock-free, but where somebody waits in line (claim.h): then an uncharge hands out what it gave back. A parent is
 * found by its distance, not its address, so a tree may live in memory that is mapped elsewhere in each process. */

typedef struct ms_budget ms_budget;

enum {
    MS_BUDGET_DEPTH_MAX = 64,  /* levels, the root counted */
    MS_BUDGET_SOFT_PASSED = 1, /* the charge stands, and some level passed its soft limit by it */
};

typedef struct {
    int64_t used_bytes;
    int64_t peak_bytes;
    int64_t limit_bytes;      /* INT64_MAX where unlimited */
    int64_t soft_limit_bytes; /* INT64_MAX where there is none */
    int64_t charged_bytes;    /* the part of used_bytes that no reservation holds, this level only */
    int64_t slack_bytes;      /* charged to the ancestors for later use, not in used_bytes */
    uint32_t waiting;         /* claims that this level holds up */
    int aborted, closed;
} ms_budget_stats;

/* Make a budget below parent (NULL: a root), with one reference. limit in bytes, at least 0, INT64_MAX for none.
 * Returns NULL with errno: ENOMEM, EINVAL (deeper than MS_BUDGET_DEPTH_MAX). */
ms_budget *ms_budget_new(ms_budget *parent, int64_t limit);

/* As ms_budget_new; the budget draws from its ancestors in multiples of quantum (bytes, 0: exactly) and keeps what it
 * does not use, below two quanta, so that its charges seldom touch them. Its own count and limit stay exact. They see
 * the slack as used. None is kept while somebody stands in line. */
ms_budget *ms_budget_new_batched(ms_budget *parent, int64_t limit, int64_t quantum);

/* Give the slack back to the ancestors. */
void ms_budget_return_slack(ms_budget *budget);

/* Take or drop a reference; a child holds one on its parent. The last one frees. */
void ms_budget_ref(ms_budget *budget);
void ms_budget_unref(ms_budget *budget);

/* Charge n bytes (n >= 0) to budget and every ancestor below stop (NULL: all), or change nothing.
 * Returns 0, MS_BUDGET_SOFT_PASSED, or -ENOMEM (refused) or -ESHUTDOWN (closed); on failure *level, where level is
 * not NULL, says who refused: 0 is budget, 1 its parent, and so on. Exactly at a limit is allowed. A level where
 * others wait in line refuses whoever comes later, whatever is free; not charges of 0. */
int ms_budget_charge(ms_budget *budget, int64_t n, const ms_budget *stop, int *level);

/* As ms_budget_charge up to the root, for code that is about to free more: a bounded part beyond each limit, which all
 * such charges share (see overdraft_of), and past those who wait. */
int ms_budget_charge_overdraft(ms_budget *budget, int64_t n, int *level);

/* Charge n bytes that exist already: limits are not asked. Returns 0, MS_BUDGET_SOFT_PASSED, -ESHUTDOWN, or
 * -EOVERFLOW where a counter would pass INT64_MAX; then nothing was changed. */
int ms_budget_charge_existing(ms_budget *budget, int64_t n, int *level);

/* Give back n bytes that were charged, up to but without stop. A level that was closed is where it ends: its closing
 * gave back everything above. pre: the caller holds n charged bytes. */
void ms_budget_uncharge(ms_budget *budget, int64_t n, const ms_budget *stop);

/* Give back n bytes that ms_budget_charge_existing charged. Returns 0, or -ERANGE where so many are not charged. */
int ms_budget_uncharge_existing(ms_budget *budget, int64_t n);

/* Move n charged bytes from one budget to another; common ancestors are not asked again, nor counted twice.
 * Returns as ms_budget_charge; level counts from to. */
int ms_budget_move(ms_budget *from, ms_budget *to, int64_t n, int *level);

/* Close: later charges, and claims that wait, fail with -ESHUTDOWN. Returns the bytes that were still charged, which
 * the ancestors have got back; 0 when it was closed before. Close a tree from the top down: then nobody who waits in it
 * is served by what its closing gives back. */
int64_t ms_budget_close(ms_budget *budget);

/* 1 where this level or one above was closed, else 0. */
int ms_budget_is_closed(const ms_budget *budget);

/* 1 where nobody could notice if bytes of this budget were given back a little later: nobody stands in line anywhere in
 * its tree (who is held up elsewhere may come to wait here next), and at no level is a charge refused for now, because
 * it was closed or aborted, is at or over its limit, nor a soft limit to be armed again; else 0. */
int ms_budget_may_lag(const ms_budget *budget);

/* Set a limit: takes effect for the next charge, whatever is used; who waits in line and fits now is served, who is
 * larger than it fails. */
void ms_budget_set_limit(ms_budget *budget, int64_t limit);

/* Refuse every later charge here and below, also of 0 bytes, and fail the claims that wait there: -ECANCELED. Bytes
 * that exist may still be charged, and everything given back. There is no way back. */
void ms_budget_abort(ms_budget *budget);

/* Set a soft limit. Hysteresis: it is armed again at 9/10 of it. */
void ms_budget_set_soft_limit(ms_budget *budget, int64_t soft_limit);

/* 1 once after this level passed its soft limit, else 0: the caller who gets the 1 does the telling. */
int ms_budget_take_soft_passed(ms_budget *budget);

/* A charge that passed a soft limit does not stand after all, and nobody was told: arm what it disarmed. */
void ms_budget_rearm_untold(ms_budget *budget);

/* Bytes until this level or an ancestor refuses: INT64_MAX where unlimited, 0 where over. */
int64_t ms_budget_headroom(const ms_budget *budget);

void ms_budget_read(const ms_budget *budget, ms_budget_stats *stats);
