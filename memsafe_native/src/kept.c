/* Reading many small files of the kernel again and again through kept descriptors: see cdef/kept.h. */
#include <fcntl.h>
#include <linux/magic.h>
#include <poll.h>
#include <stdbool.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <time.h>
#include <unistd.h>

#include "ms.h"
#include "kept.h"

enum { FIRST_BYTES = 4096 };

static bool same_file(const ms_kept *file, const struct stat *now)
{
    return file->device == (uint64_t)now->st_dev && file->inode == (uint64_t)now->st_ino;
}

static void remember(ms_kept *file, const struct stat *now)
{
    file->device = (uint64_t)now->st_dev;
    file->inode = (uint64_t)now->st_ino;
}

/* A program that makes itself a daemon closes every descriptor, ours too, and their numbers become other files'. */
static bool still_ours(const ms_kept *file, struct stat *now)
{
    return file->fd >= 0 && fstat(file->fd, now) == 0 && same_file(file, now);
}

static void drop(ms_kept *file)
{
    struct stat now;
    if (still_ours(file, &now))
        close(file->fd);
    file->fd = -1;
    file->believe_ns = 0;
}

/* Remember why a path could not be had. What may pass by itself is not believed for a moment. Returns -error. */
static int64_t fail(ms_kept *file, int error, int64_t believe_ns)
{
    bool passing = error == EMFILE || error == ENFILE || error == ENOMEM || error == EINTR;
    file->found = -error;
    file->believe_ns = passing ? 0 : believe_ns;
    return -error;
}

/* --- whether what is kept is still true --------------------------------------------------------------------------- */

/* Returns the number of the mount at the path, or 0 where the kernel does not tell, or a filter forbids to ask. */
static uint64_t mount_at(const char *path)
{
    struct statx now;
    if (statx(AT_FDCWD, path, 0, STATX_MNT_ID, &now) || !(now.stx_mask & STATX_MNT_ID))
        return 0;
    return now.stx_mnt_id;
}

int ms_kept_tells_mounts(void)
{
    return mount_at("/") != 0;
}

/* By the mount, too: in another mount namespace every mount is another, and what was opened in the old one keeps the
 * old one's from being used again. (A stat of /proc/self/ns/mnt would make an inode each time, which is charged.) */
static bool place_changed(ms_kept *file, int64_t now_ns, int64_t believe_ns)
{
    struct stat now;
    if (file->known && now_ns < file->believe_ns)
        return false;
    ms_kept before = *file;
    file->known = 1;
    if (stat(file->path, &now)) {
        fail(file, errno, now_ns + believe_ns);
        return before.known && before.found != file->found;
    }
    file->found = S_ISDIR(now.st_mode) ? -EISDIR : 0;
    file->believe_ns = 0;
    file->mount = mount_at(file->path);
    remember(file, &now);
    return before.known && (before.found != file->found || !same_file(&before, &now) || before.mount != file->mount);
}

static bool mounts_changed(const ms_kept *file)
{
    struct stat now;
    if (!still_ours(file, &now))
        return false;
    struct pollfd mounts = {.fd = file->fd, .events = POLLPRI};
    return poll(&mounts, 1, 0) != 0;
}

static bool changed(ms_kept *file, int64_t now_ns, int64_t believe_ns)
{
    switch (file->how) {
    case MS_KEPT_STAT:
        return place_changed(file, now_ns, believe_ns);
    case MS_KEPT_WATCH:
        return mounts_changed(file);
    default:
        return false;
    }
}

/* --- reading ------------------------------------------------------------------------------------------------------ */

/* Returns the size of what was read, or -errno. */
static int64_t read_whole(int fd, char *buffer, size_t capacity)
{
    size_t size = 0;
    for (;;) {
        /* A buffer that is full to the last byte may have cut the file: only a read of 0 says that it ends. */
        if (size == capacity)
            return -ENOBUFS;
        /* A sysctl allocates as much as it is asked for, a seq file a page at least. */
        size_t ask = size > FIRST_BYTES ? size : FIRST_BYTES;
        if (ask > capacity - size)
            ask = capacity - size;
        ssize_t got = pread(fd, buffer + size, ask, (off_t)size);
        if (got == 0)
            return (int64_t)size;
        if (got < 0 && errno != EINTR)
            return -errno;
        if (got > 0)
            size += (size_t)got;
    }
}

/* Returns 0, or -errno. */
static int64_t open_anew(ms_kept *file, int64_t believe_ns)
{
    /* O_NONBLOCK: a FIFO laid in the way must not hang the reader; the kernel's own files ignore it. */
    int fd = open(file->path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0)
        return fail(file, errno, believe_ns);
    struct stat now;
    struct statfs system;
    if (fstat(fd, &now) || fstatfs(fd, &system)) {
        int64_t error = fail(file, errno, believe_ns);
        close(fd);
        return error;
    }
    file->fd = fd;
    file->watched = file->how == MS_KEPT_WATCH && system.f_type == PROC_SUPER_MAGIC;
    remember(file, &now);
    return 0;
}

/* Whether the descriptor can tell nothing any more, but its path perhaps can: the cgroup or the process is gone. */
static bool is_dead(int64_t answer)
{
    return answer == -ENODEV || answer == -ESRCH;
}

/* Whether a file that was not there still is not. An open would be charged even for that, a stat is not. */
static bool still_absent(ms_kept *file, int64_t believe_ns)
{
    struct stat now;
    if (file->found != -ENOENT || stat(file->path, &now) == 0)
        return false;
    fail(file, errno, believe_ns);
    return true;
}

/* Returns the size of what was read, or -errno; *opened is raised by one for an open. */
static int64_t read_kept(ms_kept *file, char *buffer, size_t capacity, int64_t now_ns, int64_t believe_ns, int *opened)
{
    struct stat now;
    if (file->fd < 0 && (now_ns < file->believe_ns || still_absent(file, now_ns + believe_ns)))
        return file->found;
    if (still_ours(file, &now) && now.st_nlink > 0) {
        if (file->watched)
            return -EAGAIN;
        int64_t size = read_whole(file->fd, buffer, capacity);
        if (!is_dead(size))
            return size;
    }
    /* It is new, or its cgroup is gone and may be back under the same name. */
    drop(file);
    (*opened)++;
    int64_t error = open_anew(file, now_ns + believe_ns);
    if (error)
        return error;
    int64_t size = read_whole(file->fd, buffer, capacity);
    /* What is watched would not be read again into a larger buffer. */
    if (is_dead(size) || (file->watched && size < 0))
        drop(file);
    return size;
}

int ms_kept_read(const ms_kept_set *set)
{
    struct timespec time;
    size_t used = 0;
    int opened = 0;
    bool all_anew = false;
    if (set->count < 0)
        return -EINVAL;
    clock_gettime(CLOCK_MONOTONIC, &time);
    int64_t now_ns = (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
    for (int i = 0; i < set->count; i++)
        all_anew |= changed(&set->files[i], now_ns, set->believe_ns);
    if (all_anew)
        ms_kept_close(set);
    for (int i = 0; i < set->count; i++) {
        ms_kept *file = &set->files[i];
        int64_t size = file->found;
        if (file->how != MS_KEPT_STAT)
            size = read_kept(file, set->buffer + used, set->capacity - used, now_ns, set->believe_ns, &opened);
        set->answers[2 * i] = size;
        set->answers[2 * i + 1] = (int64_t)used;
        if (size > 0)
            used += (size_t)size;
    }
    return opened;
}

void ms_kept_close(const ms_kept_set *set)
{
    for (int i = 0; i < set->count; i++)
        drop(&set->files[i]);
}
