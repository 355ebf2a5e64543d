/* Regions while the kernel refuses: every call fails, the n-th for n = 1, 2, 3 ... until all goes well, once and for
 * good. Nothing may be charged that is not committed, nothing mapped may be lost, and what is wiped is zero before it
 * goes. The kernel's functions are replaced by name. */
#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static int calls, fail_at, for_good, error_number;
static int wiped;        /* what is unmapped or mapped over must be zero */
static size_t mapped;    /* bytes that are mapped, by the calls that are seen here */
static int descriptors;  /* that are open */
static char *body;       /* where the region is that is looked at */
static size_t committed; /* from its start on */

static int fails(void)
{
    int nth = ++calls;
    if (!fail_at || (for_good ? nth < fail_at : nth != fail_at))
        return 0;
    errno = error_number;
    return 1;
}

static void look(char *address, size_t size)
{
    for (size_t i = 0; wiped && body && i < size; i++)
        if (address + i >= body && address + i < body + committed)
            assert(address[i] == 0);
}

static void *seen_mmap(void *address, size_t size, int protection, int flags, int fd, off_t offset)
{
    if (fails())
        return MAP_FAILED;
    if (flags & MAP_FIXED)
        look(address, size);
    else
        mapped += size;
    return mmap(address, size, protection, flags, fd, offset);
}

static int seen_munmap(void *address, size_t size)
{
    look(address, size);
    mapped -= size;
    return munmap(address, size);
}

static int seen_mprotect(void *address, size_t size, int protection)
{
    return fails() ? -1 : mprotect(address, size, protection);
}

static int seen_madvise(void *address, size_t size, int advice)
{
    if (advice == MADV_DONTNEED)
        look(address, size);
    return fails() ? -1 : madvise(address, size, advice);
}

/* No memory is locked: the machine may allow none. */
static int seen_mlock(const void *address, size_t size)
{
    (void)address, (void)size;
    return fails() ? -1 : 0;
}

static int seen_memfd_create(const char *name, unsigned flags)
{
    if (fails())
        return -1;
    descriptors++;
    return memfd_create(name, flags);
}

static int seen_ftruncate(int fd, off_t size)
{
    return fails() ? -1 : ftruncate(fd, size);
}

static int seen_fcntl(int fd, int command, int seals)
{
    return fails() ? -1 : fcntl(fd, command, seals);
}

static int seen_close(int fd)
{
    descriptors--;
    return close(fd);
}

#define mmap         seen_mmap
#define munmap       seen_munmap
#define mprotect     seen_mprotect
#define madvise      seen_madvise
#define mlock        seen_mlock
#define munlock      seen_mlock
#define memfd_create seen_memfd_create
#define ftruncate    seen_ftruncate
#define fcntl        seen_fcntl
#define close        seen_close
#include "../../memsafe_native/src/region.c"

static int64_t used(const ms_budget *budget)
{
    ms_budget_stats stats;
    ms_budget_read(budget, &stats);
    return stats.used_bytes;
}

/* What is charged is what is committed, and that can be written; returns result. */
static int check(const ms_budget *budget, ms_region *region, int result)
{
    size_t size = ms_region_size(region), usable = ms_region_committed(region, 0, size);
    assert(used(budget) == (int64_t)usable);
    size_t run;
    for (size_t at = 0; (run = next_run(region, &at, size, 1)); at += run)
        memset((char *)ms_region_address(region) + at, 'x', run);
    size_t start = 0;
    run = next_run(region, &start, size, 1);
    committed = start ? 0 : run;
    return result;
}

/* Returns 0 where all went well. */
static int scenario(int flags)
{
    ms_budget *budget = ms_budget_new(NULL, INT64_MAX);
    ms_region_failure failure = {0};
    ms_region *region = NULL;
    size_t page = (size_t)sysconf(_SC_PAGESIZE), size = flags & MS_REGION_HUGE ? HUGE_PAGE : 8 * page;
    int result = ms_region_open(budget, size, flags, &region, &failure);
    if (!result) {
        body = ms_region_address(region);
        committed = 0;
        for (int turn = 0; turn < 2 && !result; turn++) {
            result = check(budget, region, ms_region_commit(region, page, 2 * page, 0, &failure));
            if (!result) {
                assert(ms_budget_charge(budget, 9 * (int64_t)page, NULL, NULL) == 0); /* more than is missing */
                result = check(budget, region, ms_region_commit(region, 0, 8 * page, 9 * (int64_t)page, &failure));
            }
            if (!result)
                result = check(budget, region, ms_region_discard(region, 2 * page, page, &failure));
            if (!result)
                result = check(budget, region, ms_region_decommit(region, 3 * page, 4 * page, &failure));
        }
        check(budget, region, 0);
        ms_region_close(region);
        body = NULL;
    } else
        assert(region == NULL);
    assert(!result || (result == -error_number && failure.call));
    assert(used(budget) == 0 && mapped == 0 && descriptors == 0);
    ms_budget_unref(budget);
    return result;
}

static void refusals_by_the_budget(void)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    ms_budget *parent = ms_budget_new(NULL, 3 * (int64_t)page), *budget = ms_budget_new(parent, INT64_MAX);
    ms_region_failure failure;
    ms_region *region;
    assert(ms_region_open(budget, 8 * page, 0, &region, &failure) == 0);
    assert(ms_region_commit(region, 0, 2 * page, 0, &failure) == 0);
    assert(ms_region_commit(region, page, 3 * page, 0, &failure) == -EDQUOT);
    assert(!failure.call && failure.level == 1 && used(parent) == 2 * (int64_t)page);
    assert(ms_budget_charge(budget, (int64_t)page, NULL, NULL) == 0);
    assert(ms_region_commit(region, page, 3 * page, (int64_t)page, &failure) ==
           -EDQUOT); /* what was handed over goes */
    assert(used(parent) == 2 * (int64_t)page);
    assert(ms_region_commit(region, page, 2 * page, 0, &failure) == 0); /* exactly at the limit */
    assert(ms_budget_close(budget) == 3 * (int64_t)page);
    assert(ms_region_commit(region, 4 * page, page, 0, &failure) == -ESHUTDOWN && !failure.call);
    assert(ms_region_decommit(region, 0, page, &failure) == 0);
    ms_region_close(region);
    assert(used(parent) == 0 && mapped == 0);
    ms_budget_unref(budget);
    ms_budget_unref(parent);
}

int main(void)
{
    static const int kinds[] = {
        0,
        MS_REGION_GUARDS,
        MS_REGION_HUGE | MS_REGION_GUARDS,
        MS_REGION_LOCKED,
        MS_REGION_SHARED | MS_REGION_GUARDS,
        MS_REGION_SHARED | MS_REGION_LOCKED | MS_REGION_HUGE,
        MS_REGION_WIPED | MS_REGION_LOCKED | MS_REGION_GUARDS,
    };
    static const int errors[] = {ENOMEM, EAGAIN, EPERM};
    for (size_t kind = 0; kind < sizeof kinds / sizeof *kinds; kind++)
        for (size_t e = 0; e < sizeof errors / sizeof *errors; e++)
            for (for_good = 0; for_good < 2; for_good++) {
                wiped = kinds[kind] & MS_REGION_WIPED;
                error_number = errors[e];
                fail_at = 0, calls = 0;
                assert(scenario(kinds[kind]) == 0);
                int all = calls;
                for (fail_at = 1; fail_at <= all; fail_at++) {
                    calls = 0;
                    scenario(kinds[kind]);
                }
            }
    fail_at = 0;
    wiped = 0;
    refusals_by_the_budget();
    return 0;
}
