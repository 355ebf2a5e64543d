/* What is kept of a path between two readings, and how it is read. */
enum ms_kept_how {
    MS_KEPT_READ = 0,  /* read whole each time */
    MS_KEPT_WATCH = 1, /* of procfs's mountinfo: read only when it is new, or poll says that the mounts changed */
    MS_KEPT_STAT = 2,  /* never opened: what it is, and whether it is still the same */
    MS_KEPT_AGAIN = 3  /* as MS_KEPT_READ: a second time, later than those before it */
};

typedef struct ms_kept {
    const char *path;
    int32_t how;
    int32_t fd;         /* in, out: kept open; -1: none */
    int32_t watched;    /* private */
    int32_t known;      /* private: MS_KEPT_STAT has answered once */
    uint64_t device;    /* private: of fd, or of what MS_KEPT_STAT found */
    uint64_t inode;     /* private */
    uint64_t mount;     /* private: of what MS_KEPT_STAT found; 0 where the kernel does not tell */
    int64_t found;      /* private: what MS_KEPT_STAT answered, or why the path could not be opened */
    int64_t believe_ns; /* private: until then (CLOCK_MONOTONIC) a failure stands without asking again */
} ms_kept;

/* Files that are read together. */
typedef struct ms_kept_set {
    ms_kept *files;
    int count;
    int64_t *answers; /* out, two for each file: its size, or -errno; and where in the buffer it begins */
    char *buffer;
    size_t capacity;
    int64_t believe_ns; /* how long a path that could not be opened is not tried again */
} ms_kept_set;

/* Read files whole into the buffer, one after the other, through descriptors that stay open. A warm call opens nothing,
 * and makes the kernel allocate nothing that is charged to the cgroup: in a full one, either could call the OOM killer,
 * and its victim could be this process.
 *
 * A descriptor whose file is gone (its cgroup was removed, its name unlinked) or was given to another file behind our
 * back is replaced by the path's; when mounts changed, or an MS_KEPT_STAT became another, all are. A file that does not
 * fit fails alone, with -ENOBUFS. Answers that are no sizes: -EAGAIN: as it was the last time; of an MS_KEPT_STAT
 * -EISDIR, 0 or -errno. pre: every path ends in NUL; at first all is zero but fd, which is -1.
 * Returns how often a path was opened or tried to be, or -EINVAL. Not thread-safe for the same set. Needs no GIL. */
int ms_kept_read(const ms_kept_set *set);

/* Close what is kept and still ours, and believe no failure any longer. Not thread-safe for the same set; in a forked
 * child it closes the child's own copies. Needs no GIL. */
void ms_kept_close(const ms_kept_set *set);

/* Whether MS_KEPT_STAT tells a directory in one mount namespace from the same one in another (since Linux 5.8).
 * Thread-safe. Needs no GIL. */
int ms_kept_tells_mounts(void);
