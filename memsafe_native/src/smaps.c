/* Adding up smaps for fork: see cdef/smaps.h. Formats: proc(5); fs/proc/task_mmu.c, show_smap(). */
#include <fcntl.h>
#include <stdbool.h>
#include <string.h>
#include <unistd.h>

#include "ms.h"
#include "smaps.h"

/* More than any line whose end matters: a name may take 16 KiB with its escapes, but stands at the end of its line. */
enum { BUFFER_BYTES = 32768 };

enum field { SIZE, RSS, ANONYMOUS, SWAP, FIELDS };

static const char *const labels[FIELDS] = {"Size:", "Rss:", "Anonymous:", "Swap:"};

struct mapping {
    uint64_t start, end;
    uint64_t bytes[FIELDS];
    bool has[FIELDS];
    bool is_private;
    bool has_flags, accounted, dont_fork, wipe_on_fork, writable;
};

struct scan {
    uint64_t page_bytes;
    ms_smaps sums;
    struct mapping mapping;
    bool in_mapping;
};

static bool is_blank(char c)
{
    return c == ' ' || c == '\t' || c == '\r' || c == '\v' || c == '\f';
}

/* Take 1 to 16 hexadecimal digits off *text. */
static bool take_hex(const char **text, const char *end, uint64_t *value)
{
    const char *at = *text;
    uint64_t sum = 0;
    for (; at < end && at - *text < 16; at++) {
        unsigned digit = (unsigned char)*at;
        if (digit - '0' < 10u)
            digit -= '0';
        else if (digit - 'a' < 6u)
            digit -= 'a' - 10;
        else
            break;
        sum = sum << 4 | digit;
    }
    bool found = at > *text;
    *text = at;
    *value = sum;
    return found;
}

/* "start-end perms ": every other line begins with a capital's label. */
static bool take_head(const char *text, const char *end, struct mapping *mapping)
{
    uint64_t first, last;
    if (!take_hex(&text, end, &first) || text == end || *text++ != '-' || !take_hex(&text, end, &last))
        return false;
    if (end - text < 6 || text[0] != ' ' || text[5] != ' ')
        return false;
    const char *perms = text + 1;
    if ((perms[0] != 'r' && perms[0] != '-') || (perms[1] != 'w' && perms[1] != '-') ||
        (perms[2] != 'x' && perms[2] != '-') || (perms[3] != 's' && perms[3] != 'p'))
        return false;
    *mapping = (struct mapping){.start = first, .end = last, .is_private = perms[3] == 'p'};
    return true;
}

/* "  123 kB": at most 15 digits, so that bytes and sums of them fit. */
static int take_size(const char *text, const char *end, uint64_t *bytes)
{
    uint64_t kilobytes = 0;
    while (text < end && is_blank(*text))
        text++;
    while (text < end && is_blank(end[-1]))
        end--;
    const char *digits = text;
    for (; text < end && *text >= '0' && *text <= '9'; text++) {
        if (text - digits == 15)
            return -EBADMSG;
        kilobytes = kilobytes * 10 + (uint64_t)(*text - '0');
    }
    if (text == digits || text == end || *text != ' ')
        return -EBADMSG;
    while (text < end && is_blank(*text))
        text++;
    if (end - text != 2 || memcmp(text, "kB", 2) != 0)
        return -EBADMSG;
    *bytes = kilobytes * 1024;
    return 0;
}

static void take_flags(const char *text, const char *end, struct mapping *mapping)
{
    mapping->has_flags = true;
    while (text < end) {
        while (text < end && is_blank(*text))
            text++;
        const char *word = text;
        while (text < end && !is_blank(*text))
            text++;
        if (text - word != 2)
            continue;
        mapping->accounted |= memcmp(word, "ac", 2) == 0;
        mapping->dont_fork |= memcmp(word, "dc", 2) == 0;
        mapping->wipe_on_fork |= memcmp(word, "wf", 2) == 0;
        mapping->writable |= memcmp(word, "wr", 2) == 0;
    }
}

static uint64_t least(uint64_t a, uint64_t b)
{
    return a < b ? a : b;
}

/* The most last-level tables that the pages of a mapping can need: one a page, one a slot. */
static uint64_t tables(const struct mapping *mapping, uint64_t page_bytes)
{
    uint64_t span = page_bytes * (page_bytes / 8);
    uint64_t slots = (mapping->end - 1) / span - mapping->start / span + 1;
    return least(slots, (mapping->bytes[RSS] + mapping->bytes[SWAP]) / page_bytes);
}

/* Source: kernel/fork.c, dup_mmap(): MADV_DONTFORK skips a mapping whole; MADV_WIPEONFORK is charged but starts empty;
 * page tables are copied only where anonymous pages are (vma_needs_copy()). */
static int add_up(struct scan *scan)
{
    const struct mapping *mapping = &scan->mapping;
    ms_smaps *sums = &scan->sums;
    if (!scan->in_mapping)
        return 0;
    if (!mapping->has[SIZE] || !mapping->has_flags)
        return -ENODATA;
    sums->mappings++;
    if (mapping->dont_fork)
        return 0;
    if (mapping->accounted) {
        uint64_t size = mapping->bytes[SIZE];
        if (__builtin_add_overflow(sums->charge_bytes, size, &sums->charge_bytes))
            return -EBADMSG;
        if (size > sums->largest_charge_bytes)
            sums->largest_charge_bytes = size;
    }
    uint64_t own = mapping->bytes[ANONYMOUS] + mapping->bytes[SWAP];
    if (!mapping->is_private || mapping->wipe_on_fork || own == 0)
        return 0;
    sums->table_pages += tables(mapping, scan->page_bytes);
    if (mapping->writable && __builtin_add_overflow(sums->copyable_bytes, own, &sums->copyable_bytes))
        return -EBADMSG;
    return 0;
}

/* The first line of each label counts. */
static int take_field(const char *text, const char *end, struct mapping *mapping)
{
    size_t length = (size_t)(end - text);
    for (int field = 0; field < FIELDS; field++) {
        size_t label = strlen(labels[field]);
        if (length < label || memcmp(text, labels[field], label) != 0 || mapping->has[field])
            continue;
        mapping->has[field] = true;
        return take_size(text + label, end, &mapping->bytes[field]);
    }
    if (length >= 8 && memcmp(text, "VmFlags:", 8) == 0 && !mapping->has_flags)
        take_flags(text + 8, end, mapping);
    return 0;
}

static int take_line(const char *text, const char *end, struct scan *scan)
{
    if (text == end)
        return 0;
    struct mapping next;
    if (*text < 'A' || *text > 'Z') {
        if (!take_head(text, end, &next))
            return 0;
        int error = add_up(scan);
        if (!error && next.start >= next.end)
            error = -EBADMSG;
        scan->mapping = next;
        scan->in_mapping = true;
        return error;
    }
    return scan->in_mapping ? take_field(text, end, &scan->mapping) : 0;
}

/* Returns 0, or -errno with the line that it is about. */
static int scan_file(int fd, struct scan *scan, uint64_t *line)
{
    char buffer[BUFFER_BYTES];
    size_t held = 0;
    bool tail = false; /* of a line that was longer than the buffer, and has been looked at */
    for (*line = 0;;) {
        ssize_t got = read(fd, buffer + held, sizeof buffer - held);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0)
            return -errno;
        held += (size_t)got;
        const char *text = buffer, *const end = buffer + held;
        while (text < end) {
            const char *newline = memchr(text, '\n', (size_t)(end - text));
            bool whole = text == buffer && held == sizeof buffer;
            if (!newline && got > 0 && !whole)
                break;
            *line += !tail;
            int error = tail ? 0 : take_line(text, newline ? newline : end, scan);
            if (error)
                return error;
            tail = !newline;
            text = newline ? newline + 1 : end;
        }
        if (got == 0)
            return add_up(scan);
        held = (size_t)(end - text);
        memmove(buffer, text, held);
    }
}

int ms_smaps_read(const char *path, uint64_t page_bytes, ms_smaps *sums, uint64_t *line)
{
    struct scan scan = {.page_bytes = page_bytes};
    if (page_bytes < 4096 || (page_bytes & (page_bytes - 1)))
        return -EINVAL;
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0)
        return -errno;
    uint64_t at = 0;
    int error = scan_file(fd, &scan, &at);
    close(fd);
    if (!error && !scan.in_mapping) {
        error = -EBADMSG;
        at = 0;
    }
    if (error == -EBADMSG || error == -ENODATA)
        *line = at;
    if (!error)
        *sums = scan.sums;
    return error;
}
