/* What budget.c (the counters) and claim.c (the line of those who wait) know of a budget. No Python. */
#ifndef MS_BUDGET_INTERNAL_H
#define MS_BUDGET_INTERNAL_H
#include <stdatomic.h>
#include <stdint.h>

#include "ms.h"
#include "budget.h"
#include "claim.h"

/* The top bit of `used` says closed. It shares the word with the count so that one atomic operation both closes and
 * learns what is left: every byte is then given back to the ancestors exactly once, by the closing or by its owner. */
#define CLOSED      (UINT64_C(1) << 63)
#define COUNT(word) ((int64_t)((word) & ~CLOSED))

/* A gate that only charges of nothing pass. */
#define SHUT INT64_C(-1)

/* What charges touch comes first. Together with the size of the whole that keeps two budgets out of one cache line
 * wherever malloc, which aligns to 16, puts them; aligning each to 64 would cost 80 bytes a budget. */
struct ms_budget {
    _Atomic uint64_t used;
    _Atomic int64_t gate; /* what a charge is measured by: the limit, or SHUT while somebody waits or after an abort */
    _Atomic int64_t peak;
    _Atomic int64_t soft_above; /* passing it is told; INT64_MAX while disarmed */
    _Atomic int64_t soft_rearm; /* falling to it arms again; -1 while armed */
    union {
        ptrdiff_t parent;        /* bytes from here to the parent; where depth is not 0 */
        _Atomic int64_t in_line; /* at the root: claims that stand in line; written under its lock */
    };
    _Atomic uint32_t waiting; /* claims that are held up here; written under the lock of the line */
    uint8_t depth : 7;        /* 0 at the root */
    uint8_t batched : 1;      /* it is a struct batched_budget */
    _Atomic uint8_t aborted;
    _Atomic uint8_t soft_passed; /* 1 until somebody takes it */

    _Atomic int64_t limit; /* written under the lock of the line, as gate is */
    _Atomic int64_t soft_limit;
    _Atomic int64_t charged; /* without a reservation, this level only */
    _Atomic uint32_t references;
    uint32_t turn;   /* the last look along the line that found this level full; under the lock of the line */
    ms_claim *first; /* of the line, at the root only; under its lock */
};

/* A budget that draws more from its parent than it uses, to ask it less often. */
struct batched_budget {
    struct ms_budget base;
    int64_t quantum;
    _Atomic int64_t slack; /* charged to every level above and not used here */
};

_Static_assert(offsetof(struct ms_budget, limit) <= 56 && sizeof(struct ms_budget) > 88,
               "two budgets could share a cache line");

static inline ms_budget *parent_of(const ms_budget *budget)
{
    return budget->depth ? (ms_budget *)((uintptr_t)budget + (uintptr_t)budget->parent) : NULL;
}

/* What a charge is measured by. */
enum charge_mode {
    CHARGE_ASKING,    /* the gates: limits, and behind those who wait */
    CHARGE_IN_TURN,   /* the limits alone: for a claim whose turn it is */
    CHARGE_OVERDRAFT, /* a little beyond the limits: for a reclaimer */
    CHARGE_EXISTING   /* nothing: the bytes are there */
};

/* As ms_budget_charge. In turn, an undone charge is not announced to the line: the caller is looking along it. */
int ms_budget_charge_by(ms_budget *budget, int64_t n, ms_budget *stop, enum charge_mode mode, int *level);

/* Bytes were given back at a level where somebody waits. Takes the lock of the line. */
void ms_line_serve(ms_budget *budget);

/* The budget was closed: fail the claims that wait for it. Takes the lock of the line. */
void ms_line_weed(ms_budget *budget);

#endif
