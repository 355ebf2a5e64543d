/* Give free memory of the C library's heap back to the kernel (glibc's malloc_trim). Returns 1 when some was given,
 * 0 when there was none, -ENOSYS where the C library cannot. Thread-safe, needs no GIL, takes milliseconds. */
int ms_heap_trim(void);
