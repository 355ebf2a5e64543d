#include <sys/mman.h>

#include "ms.h"
#include "region.h"

/* x86-64's and, with 4 KiB pages, arm64's; a wrong guess costs some address space and no correctness. */
#define HUGE_PAGE ((size_t)2 << 20)

int ms_region_unmap(void *address, size_t size)
{
    return munmap(address, size) ? -errno : 0;
}

int ms_region_advise(void *address, size_t size, int advice)
{
    return madvise(address, size, advice) ? -errno : 0;
}

int ms_region_decommit(void *address, size_t size)
{
    return ms_region_advise(address, size, MADV_DONTNEED);
}

int ms_region_map(size_t size, int flags, void **address)
{
    int map_flags = MAP_PRIVATE | MAP_ANONYMOUS | (flags & MS_REGION_NORESERVE ? MAP_NORESERVE : 0);
    size_t slack = flags & MS_REGION_HUGE ? HUGE_PAGE : 0;
    if (size > SIZE_MAX - slack)
        return -ENOMEM;
    char *start = mmap(NULL, size + slack, PROT_READ | PROT_WRITE, map_flags, -1, 0);
    if (start == MAP_FAILED)
        return -errno;
    if (slack) {
        /* Huge pages are given to aligned ranges only: map one too many, keep the aligned part. */
        size_t before = (HUGE_PAGE - (uintptr_t)start % HUGE_PAGE) % HUGE_PAGE;
        if (before)
            munmap(start, before);
        if (slack > before)
            munmap(start + before + size, slack - before);
        start += before;
        /* Advice: a kernel without huge pages answers EINVAL, and small ones do. */
        madvise(start, size, MADV_HUGEPAGE);
    }
    *address = start;
    return 0;
}
