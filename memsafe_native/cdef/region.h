/* Anonymous memory of its own mapping. Sizes are in bytes and multiples of the page size unless said otherwise. All
 * functions return 0 or -errno, need no GIL, and are thread-safe for disjoint ranges. */

enum {
    MS_REGION_HUGE = 1,      /* ask for transparent huge pages; align to one */
    MS_REGION_NORESERVE = 2, /* no commit charge: address space only, until made usable */
};

/* Map size readable and writable, zeroed bytes. On success *address is theirs; ms_region_unmap gives them back. */
int ms_region_map(size_t size, int flags, void **address);
int ms_region_unmap(void *address, size_t size);

/* Return the pages of [address, address + size) to the kernel; later reads see zeros. pre: both page-aligned. */
int ms_region_decommit(void *address, size_t size);

/* madvise(2) with one of MADV_*. pre: page-aligned. */
int ms_region_advise(void *address, size_t size, int advice);
