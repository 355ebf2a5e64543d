/* Memory in a mapping of its own, charged to a budget page by page as it is committed. Sizes and offsets are in bytes
 * and multiples of the page size. Functions return 0 or -errno and need no GIL. Those that change a region may be
 * called by many threads at once, but for close: nobody may use a region that is being closed. */

typedef struct ms_region ms_region;

enum {
    MS_REGION_HUGE = 1,   /* ask for transparent huge pages; aligned to one */
    MS_REGION_GUARDS = 2, /* a page before it and one behind that nobody can touch */
    MS_REGION_LOCKED = 4, /* mlock(2) what is committed */
    MS_REGION_SHARED = 8, /* in a memfd that cannot be resized, else private */
    MS_REGION_WIPED = 16, /* zero what is given back, before */
};

/* What stood in the way, where a function failed. */
typedef struct {
    const char *call; /* of the kernel; NULL where the budget refused (-EDQUOT) or was closed (-ESHUTDOWN) */
    int level;        /* then: 0 is the region's budget, 1 its parent, and so on */
} ms_region_failure;

/* Reserve size bytes of address space for *region. Nothing is committed yet, nothing can be touched, nothing charged.
 */
int ms_region_open(ms_budget *budget, size_t size, int flags, ms_region **region, ms_region_failure *failure);

/* Make [offset, offset + size) usable, zeroed where it is not yet, and charge what is not yet. charged: bytes of it
 * that the caller has charged to the region's budget before, and gives up here whatever becomes of it; 0 for none. On
 * failure nothing else has changed. Returns 0 or MS_BUDGET_SOFT_PASSED. */
int ms_region_commit(ms_region *region, size_t offset, size_t size, int64_t charged, ms_region_failure *failure);

/* Give a range back to the kernel and to the budget: it cannot be touched until it is committed again. On failure a
 * part from the start is given back, and counted so. */
int ms_region_decommit(ms_region *region, size_t offset, size_t size, ms_region_failure *failure);

/* Give the pages of a committed range back to the kernel, but keep them committed: they read as zeros. */
int ms_region_discard(ms_region *region, size_t offset, size_t size, ms_region_failure *failure);

/* madvise(2) with one of MADV_*. What was said of the whole region also holds for what is committed later. pre: what is
 * said of forks is said of the whole region. */
int ms_region_advise(ms_region *region, size_t offset, size_t size, int advice, ms_region_failure *failure);

/* 0 in a child that was forked without it (MADV_DONTFORK): what is mapped there is somebody else's by now, and nothing
 * may be done with the region but to close it. Else 1. */
int ms_region_is_here(const ms_region *region);

/* Unmap it, give back what is charged, and free it. */
void ms_region_close(ms_region *region);

void *ms_region_address(const ms_region *region);
size_t ms_region_size(const ms_region *region);
int ms_region_fd(const ms_region *region); /* the region's own; -1 where it is private */

/* Committed bytes within a range. */
size_t ms_region_committed(const ms_region *region, size_t offset, size_t size);
