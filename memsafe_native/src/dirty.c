/* Counting written pages: see cdef/dirty.h. Sources: Documentation/admin-guide/mm/soft-dirty.rst, pagemap.rst and
 * userfaultfd.rst; fs/proc/task_mmu.c. */
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <stdbool.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "ms.h"
#include "dirty.h"

/* What the headers of older distributions lack (include/uapi/linux/fs.h, userfaultfd.h). */
#ifndef UFFD_USER_MODE_ONLY
#define UFFD_USER_MODE_ONLY 1
#endif
#define WP_ASYNC (UINT64_C(1) << 15) /* UFFD_FEATURE_WP_ASYNC */

struct scan_arg {
    uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
    uint64_t category_inverted, category_mask, category_anyof_mask, return_mask;
};
struct scan_region {
    uint64_t start, end, categories;
};
#define SCAN               _IOWR('f', 16, struct scan_arg) /* PAGEMAP_SCAN */
#define SCAN_WP_MATCHING   UINT64_C(1)
#define SCAN_CHECK_WPASYNC UINT64_C(2)

enum category { /* PAGE_IS_* */
                WRITTEN = 1 << 1,
                OF_FILE = 1 << 2,
                PRESENT = 1 << 3,
                SWAPPED = 1 << 4,
                ZERO_PAGE = 1 << 5,
                SOFT_DIRTY = 1 << 7,
};

/* /proc/pid/pagemap, one 64-bit word a page. */
#define MAP_PRESENT    (UINT64_C(1) << 63)
#define MAP_SWAPPED    (UINT64_C(1) << 62)
#define MAP_OF_FILE    (UINT64_C(1) << 61)
#define MAP_SOFT_DIRTY (UINT64_C(1) << 55)

enum { MAPS_BYTES = 16384, REGIONS = 128, WORDS = 2048 };

struct range {
    uint64_t start, end;
    bool of_file;
};

/* --- the process's private writable mappings, one after the other --------------------------------------------------*/

struct walk {
    int fd;
    size_t held;    /* bytes in buffer */
    size_t at;      /* where the next line begins */
    uint64_t after; /* mappings that merge meanwhile may come twice */
    bool skipping;  /* the rest of a line that was longer than the buffer */
    char buffer[MAPS_BYTES];
};

static bool take_hex(const char **text, uint64_t *value)
{
    const char *first = *text;
    uint64_t sum = 0;
    for (;; ++*text) {
        char c = **text;
        unsigned digit = c >= '0' && c <= '9'   ? (unsigned)(c - '0')
                         : c >= 'a' && c <= 'f' ? (unsigned)(c - 'a') + 10
                                                : 16;
        if (digit == 16)
            break;
        sum = sum << 4 | digit;
    }
    *value = sum;
    return *text > first;
}

/* "start-end perms offset major:minor inode path": whether the line is of a private writable mapping. */
static bool parse(const char *line, struct range *range)
{
    uint64_t offset, major, minor;
    if (!take_hex(&line, &range->start) || *line++ != '-' || !take_hex(&line, &range->end) || *line++ != ' ')
        return false;
    if (strnlen(line, 5) < 5 || line[1] != 'w' || line[3] != 'p')
        return false;
    line += 5;
    if (!take_hex(&line, &offset) || *line++ != ' ' || !take_hex(&line, &major) || *line++ != ':' ||
        !take_hex(&line, &minor) || *line++ != ' ')
        return false;
    range->of_file = *line != '0';
    return true;
}

/* Returns a line that ends in NUL where its newline was, NULL at the end or with *error set. */
static char *next_line(struct walk *walk, int *error)
{
    for (;;) {
        char *line = walk->buffer + walk->at;
        char *newline = memchr(line, '\n', walk->held - walk->at);
        if (newline) {
            bool whole = !walk->skipping;
            *newline = '\0';
            walk->at = (size_t)(newline + 1 - walk->buffer);
            walk->skipping = false;
            if (whole)
                return line;
            continue;
        }
        walk->held -= walk->at;
        memmove(walk->buffer, line, walk->held);
        walk->at = 0;
        if (walk->held == MAPS_BYTES) {
            /* Only a path is so long: what is wanted stands before it, and such a mapping is a file's. */
            walk->skipping = true;
            walk->held = 0;
        }
        ssize_t got = read(walk->fd, walk->buffer + walk->held, MAPS_BYTES - walk->held);
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0) {
            *error = got < 0 ? -errno : 0;
            return NULL;
        }
        walk->held += (size_t)got;
    }
}

typedef int visit(const ms_dirty *meter, const struct range *range, uint64_t *sum);

/* Call do_visit for each mapping until one fails. Returns 0 or -errno. */
static int for_each(const ms_dirty *meter, visit *do_visit, uint64_t *sum)
{
    struct walk walk = {.fd = meter->maps_fd};
    int error = lseek(walk.fd, 0, SEEK_SET) < 0 ? -errno : 0;
    const char *line;
    while (!error && (line = next_line(&walk, &error))) {
        struct range range;
        if (!parse(line, &range))
            continue;
        if (range.start < walk.after)
            range.start = walk.after;
        if (range.start >= range.end)
            continue;
        walk.after = range.end;
        error = do_visit(meter, &range, sum);
    }
    return error;
}

/* --- scanning one mapping ------------------------------------------------------------------------------------------*/

struct wanted {
    uint64_t flags;
    uint64_t all;  /* categories that a page must have, */
    uint64_t none; /* and must not have */
};

/* Add up the pages of a range that are there and wanted; of a mapping that is gone there are none. Returns 0 or -errno.
 */
static int scan(int pagemap_fd, const struct range *range, struct wanted wanted, uint64_t *sum)
{
    struct scan_region regions[REGIONS];
    struct scan_arg arg = {
        .size = sizeof arg,
        .flags = wanted.flags,
        .end = range->end,
        .vec = (uint64_t)(uintptr_t)regions,
        .vec_len = REGIONS,
        .category_inverted = wanted.none,
        .category_mask = wanted.all | wanted.none,
        .category_anyof_mask = PRESENT | SWAPPED,
        .return_mask = PRESENT | SWAPPED,
    };
    for (uint64_t at = range->start; at < range->end; at = arg.walk_end) {
        arg.start = at;
        int found = ioctl(pagemap_fd, SCAN, &arg);
        if (found < 0 && errno != EINTR)
            return -errno;
        for (int i = 0; i < found; i++)
            *sum += regions[i].end - regions[i].start;
        if (arg.walk_end <= at)
            break; /* nothing more is to be had from it */
    }
    return 0;
}

/* The same for kernels without PAGEMAP_SCAN. */
static int read_soft_dirty(int pagemap_fd, const struct range *range, uint64_t *sum)
{
    uint64_t words[WORDS], page_bytes = (uint64_t)sysconf(_SC_PAGESIZE);
    uint64_t at = range->start / page_bytes, end = range->end / page_bytes;
    while (at < end) {
        size_t wanted = end - at < WORDS ? (size_t)(end - at) : WORDS;
        ssize_t got = pread(pagemap_fd, words, wanted * sizeof *words, (off_t)(at * sizeof *words));
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0)
            return got < 0 ? -errno : 0;
        size_t count = (size_t)got / sizeof *words;
        for (size_t i = 0; i < count; i++)
            if (words[i] & MAP_SOFT_DIRTY && words[i] & (MAP_PRESENT | MAP_SWAPPED) && !(words[i] & MAP_OF_FILE))
                *sum += page_bytes;
        at += count;
    }
    return 0;
}

static int count_soft(const ms_dirty *meter, const struct range *range, uint64_t *sum)
{
    uint64_t found = 0;
    int error = scan(meter->pagemap_fd, range, (struct wanted){.all = SOFT_DIRTY, .none = OF_FILE | ZERO_PAGE}, &found);
    if (error == -ENOTTY || error == -EINVAL) /* before 6.7 */
        error = read_soft_dirty(meter->pagemap_fd, range, sum);
    else
        *sum += found;
    return error;
}

static int count_written(const ms_dirty *meter, const struct range *range, uint64_t *sum)
{
    uint64_t found = 0;
    int error = scan(meter->pagemap_fd, range,
                     (struct wanted){.flags = SCAN_CHECK_WPASYNC, .all = WRITTEN, .none = OF_FILE | ZERO_PAGE}, &found);
    if (error == -EPERM) { /* not protected: mapped since, or a file's */
        found = 0;
        error = scan(meter->pagemap_fd, range, (struct wanted){.none = OF_FILE | ZERO_PAGE}, &found);
    }
    *sum += found;
    return error;
}

/* --- beginning -----------------------------------------------------------------------------------------------------*/

static int protect(const ms_dirty *meter, const struct range *range, uint64_t *unused)
{
    (void)unused;
    struct uffdio_register want = {.range = {range->start, range->end - range->start}, .mode = UFFDIO_REGISTER_MODE_WP};
    struct scan_arg arg = {
        .size = sizeof arg,
        .flags = SCAN_WP_MATCHING | SCAN_CHECK_WPASYNC,
        .start = range->start,
        .end = range->end,
        .category_mask = WRITTEN,
        .category_anyof_mask = PRESENT | SWAPPED,
    };
    /* EBUSY: somebody else's userfaultfd; EINVAL: of a kind that cannot be; ENOMEM: gone. All count whole. */
    if (range->of_file || ioctl(meter->userfault_fd, UFFDIO_REGISTER, &want))
        return 0;
    while (ioctl(meter->pagemap_fd, SCAN, &arg) < 0)
        if (errno != EINTR)
            return errno == EPERM || errno == ENOMEM ? 0 : -errno;
    return 0;
}

static int open_userfault(void)
{
    long fd = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
    if (fd < 0)
        return errno == EINVAL ? -EOPNOTSUPP : -errno; /* UFFD_USER_MODE_ONLY came with 5.11 */
    struct uffdio_api api = {.api = UFFD_API, .features = WP_ASYNC};
    if (ioctl((int)fd, UFFDIO_API, &api)) {
        int error = errno == EINVAL ? -EOPNOTSUPP : -errno;
        close((int)fd);
        return error;
    }
    return (int)fd;
}

static int open_file(const char *path, int flags, int32_t *fd)
{
    *fd = open(path, flags | O_CLOEXEC);
    return *fd < 0 ? -errno : 0;
}

static int clear_soft(const ms_dirty *meter)
{
    return pwrite(meter->clear_refs_fd, "4", 1, 0) == 1 ? 0 : -errno;
}

/* A kernel without soft-dirty bits takes the order to clear them all the same: only a page that was written tells. */
static int probe_soft(const ms_dirty *meter)
{
    size_t size = (size_t)sysconf(_SC_PAGESIZE);
    volatile char *page = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (page == MAP_FAILED)
        return -errno;
    struct range range = {.start = (uintptr_t)page, .end = (uintptr_t)page + size};
    uint64_t before = 0, after = 0;
    page[0] = 1;
    int error = clear_soft(meter);
    if (!error)
        error = count_soft(meter, &range, &before);
    page[0] = 2;
    if (!error)
        error = count_soft(meter, &range, &after);
    munmap((void *)page, size);
    return error ? error : before == 0 && after == size ? 0 : -EOPNOTSUPP;
}

int ms_dirty_open(int method, ms_dirty *meter)
{
    ms_dirty made = {.method = method, .userfault_fd = -1, .pagemap_fd = -1, .maps_fd = -1, .clear_refs_fd = -1};
    if (method != MS_DIRTY_SOFT && method != MS_DIRTY_SCAN)
        return -EINVAL;
    int error = open_file("/proc/self/pagemap", O_RDONLY, &made.pagemap_fd);
    if (!error)
        error = open_file("/proc/self/maps", O_RDONLY, &made.maps_fd);
    if (!error && method == MS_DIRTY_SOFT) {
        error = open_file("/proc/self/clear_refs", O_WRONLY, &made.clear_refs_fd);
        if (!error)
            error = probe_soft(&made);
    }
    if (!error && method == MS_DIRTY_SCAN) {
        made.userfault_fd = open_userfault();
        error = made.userfault_fd < 0 ? made.userfault_fd : 0;
    }
    if (!error)
        error = method == MS_DIRTY_SOFT ? clear_soft(&made) : for_each(&made, protect, NULL);
    if (error)
        ms_dirty_close(&made);
    else
        *meter = made;
    return error;
}

int ms_dirty_count(const ms_dirty *meter, uint64_t *dirty_bytes)
{
    uint64_t sum = 0;
    int error = for_each(meter, meter->method == MS_DIRTY_SOFT ? count_soft : count_written, &sum);
    if (!error)
        *dirty_bytes = sum;
    return error;
}

void ms_dirty_close(ms_dirty *meter)
{
    int32_t *fds[] = {&meter->userfault_fd, &meter->pagemap_fd, &meter->maps_fd, &meter->clear_refs_fd};
    for (size_t i = 0; i < sizeof fds / sizeof *fds; i++) {
        if (*fds[i] >= 0)
            close(*fds[i]);
        *fds[i] = -1;
    }
}
