/* Which pages of this process were written since a moment: what a fork that began then would have copied.
 *
 * Only one meter of a process can be right at a time: soft-dirty bits are the process's, and a mapping takes one
 * userfaultfd. All functions act on the calling process, need no GIL, and are not thread-safe for one meter. */

enum ms_dirty_method {
    /* /proc/self/clear_refs write-protects every page once, its first write afterwards sets a bit of the page table.
     * Huge pages count whole. Wants CONFIG_MEM_SOFT_DIRTY. */
    MS_DIRTY_SOFT = 1,
    /* The same by userfaultfd's asynchronous write-protection and PAGEMAP_SCAN (Linux 6.7), of anonymous memory alone:
     * exact to the page, at the price of dividing each huge page that is written. */
    MS_DIRTY_SCAN = 2
};

typedef struct ms_dirty {
    int32_t method;
    int32_t userfault_fd; /* of MS_DIRTY_SCAN: closing it ends the protection; else -1 */
    int32_t pagemap_fd;
    int32_t maps_fd;
    int32_t clear_refs_fd; /* of MS_DIRTY_SOFT; else -1 */
} ms_dirty;

/* Begin to count writes, with one of the methods.
 * Returns 0; -EOPNOTSUPP where this kernel has not got it; or -errno: EPERM and ENOSYS where userfaultfd is forbidden
 * (seccomp), EACCES where the process is not dumpable. On failure nothing is left behind. */
int ms_dirty_open(int method, ms_dirty *meter);

/* Add up the private writable pages, in RAM or swapped, that were written since; memory mapped since counts whole, and
 * so does what the method cannot see (of MS_DIRTY_SCAN, pages copied from private file mappings).
 * Returns 0 and sets *dirty_bytes, or -errno. */
int ms_dirty_count(const ms_dirty *meter, uint64_t *dirty_bytes);

/* Close what is open; in a forked child too, where the inherited userfaultfd would act on the parent's memory. */
void ms_dirty_close(ms_dirty *meter);
