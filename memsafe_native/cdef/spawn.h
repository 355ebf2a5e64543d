/* What the child does before it runs its program, in this order. */
enum ms_spawn_step {
    MS_SPAWN_START, /* in the parent: memory for the lists, clone3(), clone() */
    MS_SPAWN_WRITE,
    MS_SPAWN_KEEP,
    MS_SPAWN_STDIO,
    MS_SPAWN_CHDIR,
    MS_SPAWN_SIGNALS,
    MS_SPAWN_SESSION,
    MS_SPAWN_GROUP,
    MS_SPAWN_CLOSE,
    MS_SPAWN_RLIMIT,
    MS_SPAWN_NICE,
    MS_SPAWN_IDS,
    MS_SPAWN_EXEC,
};

/* Strings one after another, each ended by NUL. */
struct ms_spawn_strings {
    const char *packed;
    size_t size_bytes;
};

/* A file that the child opens and writes, as itself: "0" to cgroup.procs, a number to /proc/self/oom_score_adj. */
struct ms_spawn_write {
    const char *path;
    const char *text;
};

struct ms_spawn_rlimit {
    int resource;
    uint64_t soft;
    uint64_t hard;
};

/* A child to be started. Everything is borrowed for the call. */
struct ms_spawn {
    struct ms_spawn_strings paths; /* at least one; tried in turn, as a shell tries PATH */
    struct ms_spawn_strings args;
    struct ms_spawn_strings env;
    const char *cwd;     /* NULL: the parent's */
    int stdio[3];        /* what becomes 0, 1 and 2; -1: the parent's */
    int close_fds;       /* close all above 2 but keep_fds */
    const int *keep_fds; /* ascending; made inheritable */
    size_t keep_fds_count;
    int restore_signals; /* SIGPIPE and SIGXFSZ, which Python ignores, back to their defaults */
    int new_session;
    int process_group; /* -1: the parent's; 0: its own */
    int umask;         /* -1: the parent's */
    int64_t uid;       /* -1: the parent's; so are gid and groups */
    int64_t gid;
    const uint32_t *groups;
    int64_t groups_count;
    const char *birthplace; /* NULL, or the folder of the cgroup v2 that the first of writes joins: born there, the
                             * child leaves that one out */
    const struct ms_spawn_write *writes;
    size_t writes_count;
    const struct ms_spawn_rlimit *rlimits;
    size_t rlimits_count;
    int nice; /* added to the parent's */
};

/* pid: set on success. The others: set on failure only; the index counts within writes and rlimits. */
struct ms_spawn_result {
    int pid;
    int failed_step;
    int failed_index;
};

/* Start a child without copying this process, by clone3() or clone() with CLONE_VM and CLONE_VFORK. No atfork handler
 * runs. Returns once the program runs or cannot: 0, or -errno, and then there is no child and no zombie.
 * Any thread, any number at once; the calling thread is suspended, the others run. Needs no GIL. */
int ms_spawn(const struct ms_spawn *spawn, struct ms_spawn_result *out);
