/* One file of many to read together. */
typedef struct ms_file {
    const char *path;
    int64_t result;  /* out: its size, or -errno; -EISDIR for a directory, -ENOBUFS where the buffer was full */
    uint64_t offset; /* out: where in the buffer it begins */
} ms_file;

/* Read files whole into buffer, one after the other: one return from native code instead of three a file, each of which
 * may wait a switch interval for the GIL beside busy threads. A file that does not fit fails alone.
 * pre: every path ends in NUL. Returns how many could be read, or -EINVAL. Thread-safe. Needs no GIL. */
int ms_files_read(ms_file *files, int count, char *buffer, size_t capacity);
