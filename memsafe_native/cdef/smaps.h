/* What fork() would ask of the kernel, added up over all mappings of a process. */
typedef struct ms_smaps {
    uint64_t mappings;
    uint64_t charge_bytes;         /* Size of those that are accounted (ac) and copied (not dc) */
    uint64_t largest_charge_bytes; /* of one of them */
    uint64_t table_pages;          /* last-level page tables that the child gets, at most */
    uint64_t copyable_bytes;       /* private, writable, in RAM or swapped, and neither dc nor wf */
} ms_smaps;

/* Read the smaps file at path and add it up, in one pass through a fixed buffer: nothing is allocated, however many
 * mappings there are. page_bytes is the machine's page size, a power of two from 4096.
 * Returns 0; -EBADMSG: line *line makes no sense; -ENODATA: the mapping that ends before it has no Size or VmFlags; or
 * -errno. On failure *sums is untouched; *line is set by the first two only, and 0 where there is no mapping at all.
 * Thread-safe. Needs no GIL. */
int ms_smaps_read(const char *path, uint64_t page_bytes, ms_smaps *sums, uint64_t *line);
