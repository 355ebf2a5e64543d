#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "ms.h"
#include "budget.h"
#include "generation.h"
#include "region.h"

/* x86-64's and, with 4 KiB pages, arm64's; a wrong guess costs some address space and no correctness. */
#define HUGE_PAGE ((size_t)2 << 20)

/* Advice that a mapping keeps, and what it is about; of each, the last given for the whole region is remembered. */
enum { ABOUT_FORK, ABOUT_DUMP, ABOUT_HUGE, ABOUT_MERGE, ABOUT_ACCESS, ABOUT_COUNT };

static const struct {
    int advice, about;
} lasting[] = {
    {MADV_DONTFORK, ABOUT_FORK},   {MADV_DOFORK, ABOUT_FORK},       {MADV_DONTDUMP, ABOUT_DUMP},
    {MADV_DODUMP, ABOUT_DUMP},     {MADV_HUGEPAGE, ABOUT_HUGE},     {MADV_NOHUGEPAGE, ABOUT_HUGE},
    {MADV_MERGEABLE, ABOUT_MERGE}, {MADV_UNMERGEABLE, ABOUT_MERGE}, {MADV_NORMAL, ABOUT_ACCESS},
    {MADV_RANDOM, ABOUT_ACCESS},   {MADV_SEQUENTIAL, ABOUT_ACCESS},
};

struct ms_region {
    char *address;
    size_t size;
    char *span; /* what is mapped: the region and its guards */
    size_t span_size;
    size_t page;
    ms_budget *budget; /* a reference */
    int flags;
    int fd;
    unsigned generation;     /* whose it is alone, after MADV_DONTFORK: a forked child does not have it */
    int advice[ABOUT_COUNT]; /* MADV_NORMAL, which is 0, where none was given */
    uint64_t committed[];    /* a bit a page */
};

/* One for all regions: the kernel does one change of a process's mappings at a time anyway. Held over a fork, so that
 * the child finds no region half changed and the lock free. */
static pthread_mutex_t changing = PTHREAD_MUTEX_INITIALIZER;

static void hold(void)
{
    pthread_mutex_lock(&changing);
}

static void let_go(void)
{
    pthread_mutex_unlock(&changing);
}

static void follow_forks(void)
{
    pthread_atfork(hold, let_go, let_go);
}

static int failed(ms_region_failure *failure, const char *call)
{
    *failure = (ms_region_failure){.call = call};
    return -errno;
}

static void mark(ms_region *region, size_t offset, size_t size, int committed)
{
    for (size_t page = offset / region->page, end = page + size / region->page; page < end; page++) {
        uint64_t bit = UINT64_C(1) << page % 64;
        region->committed[page / 64] =
            committed ? region->committed[page / 64] | bit : region->committed[page / 64] & ~bit;
    }
}

/* The first page from offset on that is not as committed says; end where all are. */
static size_t skip(const ms_region *region, size_t offset, size_t end, int committed)
{
    for (size_t page = offset / region->page; page < end / region->page; page = (page | 63) + 1) {
        uint64_t word = region->committed[page / 64];
        uint64_t other = (committed ? ~word : word) >> page % 64;
        if (other) {
            size_t found = (page + (size_t)__builtin_ctzll(other)) * region->page;
            return found < end ? found : end;
        }
    }
    return end;
}

/* The next run of pages in [*offset, end) that are committed, or that are not: its size, and its start in *offset. */
static size_t next_run(const ms_region *region, size_t *offset, size_t end, int committed)
{
    *offset = skip(region, *offset, end, !committed);
    return skip(region, *offset, end, committed) - *offset;
}

static size_t count(const ms_region *region, size_t offset, size_t size, int committed)
{
    size_t total = 0, run;
    for (size_t at = offset; (run = next_run(region, &at, offset + size, committed)); at += run)
        total += run;
    return total;
}

static int map_untouchable(ms_region *region, char *address, size_t size)
{
    int shared = region->fd >= 0;
    int flags = (shared ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS) | MAP_FIXED;
    off_t offset = shared ? address - region->address : 0;
    return mmap(address, size, PROT_NONE, flags, region->fd, offset) == MAP_FAILED ? -errno : 0;
}

/* Advice: a kernel that cannot follow it answers EINVAL. */
static void repeat_advice(ms_region *region, char *address, size_t size)
{
    for (int about = 0; about < ABOUT_COUNT; about++)
        if (region->advice[about] != MADV_NORMAL)
            madvise(address, size, region->advice[about]);
}

/* Mapped anew, rather than advised and protected: the kernel then gives back the commit charge too, and locks go. */
static int withdraw(ms_region *region, size_t offset, size_t size, ms_region_failure *failure)
{
    char *address = region->address + offset;
    if (region->fd >= 0 && madvise(address, size, MADV_REMOVE))
        return failed(failure, "madvise(remove)");
    if (map_untouchable(region, address, size))
        return failed(failure, "mmap");
    repeat_advice(region, address, size);
    return 0;
}

/* Pages that hold only zeros are left as they are: most were never touched, and writing would allocate them. */
static void wipe(const ms_region *region, size_t offset, size_t size)
{
    for (char *page = region->address + offset, *end = page + size; page < end; page += region->page)
        if (*page || memcmp(page, page + 1, region->page - 1) != 0)
            memset(page, 0, region->page);
}

/* Reserve the address space: the region, aligned, between its guards. The caller unmaps the span on failure. */
static int reserve(ms_region *region, ms_region_failure *failure)
{
    size_t guard = region->flags & MS_REGION_GUARDS ? region->page : 0;
    size_t align = region->flags & MS_REGION_HUGE ? HUGE_PAGE : region->page;
    size_t wanted = region->size + 2 * guard, slack = align - region->page;
    char *start = mmap(NULL, wanted + slack, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (start == MAP_FAILED)
        return failed(failure, "mmap");
    region->address = (char *)(((uintptr_t)start + guard + align - 1) & ~(uintptr_t)(align - 1));
    region->span = region->address - guard;
    region->span_size = wanted;
    size_t before = (size_t)(region->span - start), behind = slack - before;
    if (before)
        munmap(start, before);
    if (behind)
        munmap(region->span + wanted, behind);
    return 0;
}

static int make_file(ms_region *region, ms_region_failure *failure)
{
    region->fd = memfd_create("memsafe", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (region->fd < 0)
        return failed(failure, "memfd_create");
    if (ftruncate(region->fd, (off_t)region->size))
        return failed(failure, "ftruncate");
    /* Whoever is given the descriptor could else cut the file short, and touching what is gone is a SIGBUS. */
    if (fcntl(region->fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW))
        return failed(failure, "fcntl(add_seals)");
    return map_untouchable(region, region->address, region->size) ? failed(failure, "mmap") : 0;
}

int ms_region_is_here(const ms_region *region)
{
    return region->advice[ABOUT_FORK] != MADV_DONTFORK || region->generation == ms_generation();
}

static void destroy(ms_region *region)
{
    if (region->span && ms_region_is_here(region))
        munmap(region->span, region->span_size);
    if (region->fd >= 0)
        close(region->fd);
    ms_budget_unref(region->budget);
    free(region);
}

int ms_region_open(ms_budget *budget, size_t size, int flags, ms_region **region, ms_region_failure *failure)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, follow_forks);
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    ms_region *made = NULL;
    if (size <= PTRDIFF_MAX - 2 * HUGE_PAGE)
        made = calloc(1, sizeof *made + (size / page + 63) / 64 * sizeof *made->committed);
    if (!made) {
        errno = ENOMEM;
        return failed(failure, "mmap");
    }
    ms_budget_ref(budget);
    made->size = size;
    made->page = page;
    made->budget = budget;
    made->flags = flags;
    made->fd = -1;
    int result = reserve(made, failure);
    if (!result && flags & MS_REGION_SHARED)
        result = make_file(made, failure);
    if (result) {
        destroy(made);
        return result;
    }
    if (flags & MS_REGION_HUGE) {
        ms_region_failure no_matter;
        ms_region_advise(made, 0, size, MADV_HUGEPAGE, &no_matter);
    }
    *region = made;
    return 0;
}

/* Charge missing bytes, of which so many are charged; more than that are given back. */
static int charge_rest(ms_budget *budget, int64_t missing, int64_t charged, ms_region_failure *failure)
{
    int level, result = 0;
    if (missing > charged)
        result = ms_budget_charge(budget, missing - charged, NULL, &level);
    if (result < 0) {
        *failure = (ms_region_failure){.level = level};
        ms_budget_uncharge(budget, charged, NULL);
        return result == -ENOMEM ? -EDQUOT : result;
    }
    if (missing < charged)
        ms_budget_uncharge(budget, charged - missing, NULL);
    return result;
}

static int commit(ms_region *region, size_t offset, size_t size, int64_t charged, ms_region_failure *failure)
{
    char *address = region->address + offset;
    int64_t missing = (int64_t)count(region, offset, size, 0);
    int charge = charge_rest(region->budget, missing, charged, failure);
    if (charge < 0)
        return charge;
    int result = mprotect(address, size, PROT_READ | PROT_WRITE) ? failed(failure, "mprotect") : 0;
    if (!result && region->flags & MS_REGION_LOCKED && mlock(address, size))
        result = failed(failure, "mlock");
    if (!result) {
        mark(region, offset, size, 1);
        return charge;
    }
    ms_region_failure no_matter; /* what cannot be withdrawn is left untouched, and nobody knows of it */
    size_t run;
    for (size_t at = offset; (run = next_run(region, &at, offset + size, 0)); at += run)
        withdraw(region, at, run, &no_matter);
    ms_budget_uncharge(region->budget, missing, NULL);
    return result;
}

int ms_region_commit(ms_region *region, size_t offset, size_t size, int64_t charged, ms_region_failure *failure)
{
    hold();
    int result = commit(region, offset, size, charged, failure);
    let_go();
    return result;
}

int ms_region_decommit(ms_region *region, size_t offset, size_t size, ms_region_failure *failure)
{
    int result = 0;
    size_t run;
    hold();
    for (size_t at = offset; !result && (run = next_run(region, &at, offset + size, 1)); at += run) {
        if (region->flags & MS_REGION_WIPED)
            wipe(region, at, run);
        result = withdraw(region, at, run, failure);
        if (!result) {
            mark(region, at, run, 0);
            ms_budget_uncharge(region->budget, (int64_t)run, NULL);
        }
    }
    let_go();
    return result;
}

int ms_region_discard(ms_region *region, size_t offset, size_t size, ms_region_failure *failure)
{
    char *address = region->address + offset;
    int locked = region->flags & MS_REGION_LOCKED, result = 0;
    hold();
    if (region->flags & MS_REGION_WIPED)
        wipe(region, offset, size);
    if (locked && munlock(address, size)) /* locked pages are not given back */
        result = failed(failure, "munlock");
    if (!result && madvise(address, size, region->fd >= 0 ? MADV_REMOVE : MADV_DONTNEED))
        result = failed(failure, region->fd >= 0 ? "madvise(remove)" : "madvise(dontneed)");
    if (locked && mlock(address, size) && !result)
        result = failed(failure, "mlock");
    let_go();
    return result;
}

int ms_region_advise(ms_region *region, size_t offset, size_t size, int advice, ms_region_failure *failure)
{
    int result = 0;
    hold();
    if (madvise(region->address + offset, size, advice))
        result = failed(failure, "madvise");
    else if (advice == MADV_DONTFORK)
        region->generation = ms_generation();
    for (size_t i = 0; !result && size == region->size && i < sizeof lasting / sizeof *lasting; i++)
        if (lasting[i].advice == advice)
            region->advice[lasting[i].about] = advice;
    let_go();
    return result;
}

void ms_region_close(ms_region *region)
{
    ms_budget *budget = region->budget;
    size_t run, charged = 0;
    int wiped = region->flags & MS_REGION_WIPED && ms_region_is_here(region);
    hold();
    for (size_t at = 0; (run = next_run(region, &at, region->size, 1)); at += run) {
        charged += run;
        if (wiped)
            wipe(region, at, run);
    }
    ms_budget_ref(budget);
    destroy(region);
    let_go();
    ms_budget_uncharge(budget, (int64_t)charged, NULL);
    ms_budget_unref(budget);
}

void *ms_region_address(const ms_region *region)
{
    return region->address;
}

size_t ms_region_size(const ms_region *region)
{
    return region->size;
}

int ms_region_fd(const ms_region *region)
{
    return region->fd;
}

size_t ms_region_committed(const ms_region *region, size_t offset, size_t size)
{
    hold();
    size_t total = count(region, offset, size, 1);
    let_go();
    return total;
}
