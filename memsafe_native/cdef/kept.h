/* What is kept of a path between two readings, and how it is read. */
enum ms_kept_how {
    MS_KEPT_READ = 0,  /* read whole each time */
    MS_KEPT_WATCH = 1, /* of procfs's mountinfo: read only when it is new, or poll says that the mounts changed */
    MS_KEPT_STAT = 2   /* never opened: what it is, and whether it is still the same */
};

typedef struct ms_kept {
    const char *path;
    int32_t how;
    int32_t fd;      /* in, out: kept open; -1: none */
    int32_t watched; /* private */
    int32_t known;   /* private: MS_KEPT_STAT has answered once */
    uint64_t device; /* private: of fd, or of what MS_KEPT_STAT found */
    uint64_t inode;  /* private */
    int64_t found;   /* private: what MS_KEPT_STAT answered */
} ms_kept;

/* Read files whole into buffer, one after the other, through descriptors that stay open: a warm call opens nothing that
 * exists. A descriptor whose file is gone (its cgroup was removed, its name unlinked) or was given to another file
 * behind our back is replaced by the path's; when mounts changed, or an MS_KEPT_STAT became another, all are. A file
 * that does not fit fails alone, with -ENOBUFS. answers has two places for each file: its size, or -errno (-EAGAIN: as
 * it was the last time; of an MS_KEPT_STAT -EISDIR, 0 or -errno), and where in the buffer it begins. pre: every path
 * ends in NUL; at first all is zero but fd, which is -1. Returns how many files were opened, or -EINVAL. Not
 * thread-safe for the same files. Needs no GIL. */
int ms_kept_read(ms_kept *files, int count, int64_t *answers, char *buffer, size_t capacity);

/* Close what is kept and still ours. Not thread-safe for the same files; in a forked child it closes the child's own
 * copies. Needs no GIL. */
void ms_kept_close(ms_kept *files, int count);
