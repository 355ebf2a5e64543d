/* Claims: requests that stand in line for bytes of a budget. One line a tree, first come first served.
 *
 * Who gives bytes back looks along the line and charges them to whoever is first and fits, on that one's behalf, so
 * that nobody who comes later takes them away. A claim that a level refuses holds up those behind it whose path goes
 * through that level, and newcomers there (ms_budget_charge): a large request is not starved by small ones. Others
 * pass. A claim that can never fit, because a limit was set below it, fails.
 *
 * One lock for the lines of all trees, held for a look along one; it is taken only while somebody stands in line, when
 * a limit changes and when a budget ends, and never while memory is allocated or Python runs. A forked child starts
 * with empty lines. All functions may run on any thread and need no GIL; a claim belongs to one caller, others may
 * only nudge it. */

typedef struct ms_claim ms_claim;
typedef struct ms_mailbox ms_mailbox;

enum {
    MS_CLAIM_IN_LINE = 0,
    MS_CLAIM_GRANTED = 1, /* the bytes are charged */
};

/* An eventfd, and the claims that changed since they were taken: for an event loop with many of them. */
ms_mailbox *ms_mailbox_new(void);             /* NULL with errno */
void ms_mailbox_free(ms_mailbox *mailbox);    /* goes with the last claim that has it; NULL is allowed */
int ms_mailbox_fd(const ms_mailbox *mailbox); /* readable while something may be there to take */

/* Take one claim that changed: 1, and *token is that claim's; or 0, and fd is no longer readable. */
int ms_mailbox_take(ms_mailbox *mailbox, uint64_t *token);

/* Stand in line for n bytes of budget and every ancestor; they may be granted at once.
 * mailbox (or NULL) hears, with token, when the claim is granted, fails or is nudged. NULL: out of memory. */
ms_claim *ms_claim_new(ms_budget *budget, int64_t n, ms_mailbox *mailbox, uint64_t token);

/* MS_CLAIM_IN_LINE, MS_CLAIM_GRANTED, or why it failed: -ESHUTDOWN (closed), -ECANCELED (aborted, or this is a forked
 * child), -E2BIG (larger than a limit by now). */
int ms_claim_state(const ms_claim *claim);

/* Sleep until the claim is granted, fails or is nudged, at most timeout_ns (below 2**62). Returns 0, -ETIMEDOUT or
 * -EINTR. */
int ms_claim_wait(ms_claim *claim, int64_t timeout_ns);

/* Wake whoever waits for the claim: something happened that is worth a look. */
void ms_claim_nudge(ms_claim *claim);

/* Bytes that must be given back at the level which holds the claim up before its turn comes, those before it in line
 * counted; 0 where it is not in line. *level, where level is not NULL, says which: 0 is its budget, 1 the parent. */
int64_t ms_claim_shortfall(ms_claim *claim, int *level);

/* Leave the line and free the claim. Returns its last state. Where that is MS_CLAIM_GRANTED, the bytes are the
 * caller's from now on; *soft_passed, where not NULL, is set to whether some level passed its soft limit by them. */
int ms_claim_end(ms_claim *claim, int *soft_passed);
