/* Reading many small files of the kernel again and again through kept descriptors: see cdef/kept.h. */
#include <fcntl.h>
#include <linux/magic.h>
#include <poll.h>
#include <stdbool.h>
#include <sys/stat.h>
#include <sys/vfs.h>
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
}

/* Whether mounts changed since the last call, or what stands at the path is not what stood there. */
static bool changed(ms_kept *file)
{
    struct stat now;
    if (file->how == MS_KEPT_STAT) {
        int64_t before = file->found;
        file->found = stat(file->path, &now) ? -errno : S_ISDIR(now.st_mode) ? -EISDIR : 0;
        bool there = file->found == 0 || file->found == -EISDIR;
        bool differs = file->known && (before != file->found || (there && !same_file(file, &now)));
        if (there)
            remember(file, &now);
        file->known = 1;
        return differs;
    }
    if (file->how != MS_KEPT_WATCH || !still_ours(file, &now))
        return false;
    struct pollfd mounts = {.fd = file->fd, .events = POLLPRI};
    return poll(&mounts, 1, 0) != 0;
}

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
static int open_anew(ms_kept *file)
{
    /* O_NONBLOCK: a FIFO laid in the way must not hang the reader; the kernel's own files ignore it. */
    int fd = open(file->path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0)
        return -errno;
    struct stat now;
    struct statfs system;
    if (fstat(fd, &now) || fstatfs(fd, &system)) {
        int error = -errno;
        close(fd);
        return error;
    }
    file->fd = fd;
    file->watched = file->how == MS_KEPT_WATCH && system.f_type == PROC_SUPER_MAGIC;
    remember(file, &now);
    return 0;
}

/* Returns the size of what was read, or -errno; *opened is raised by one for an open. */
static int64_t read_kept(ms_kept *file, char *buffer, size_t capacity, int *opened)
{
    struct stat now;
    if (still_ours(file, &now) && now.st_nlink > 0) {
        if (file->watched)
            return -EAGAIN;
        int64_t size = read_whole(file->fd, buffer, capacity);
        if (size >= 0 || size == -ENOBUFS)
            return size;
    }
    /* It is new, or its cgroup is gone (ENODEV) and may be back under the same name. */
    drop(file);
    int error = open_anew(file);
    if (error)
        return error;
    (*opened)++;
    int64_t size = read_whole(file->fd, buffer, capacity);
    if (size < 0 && size != -ENOBUFS)
        drop(file);
    return size;
}

int ms_kept_read(ms_kept *files, int count, int64_t *answers, char *buffer, size_t capacity)
{
    size_t used = 0;
    int opened = 0;
    bool all_anew = false;
    if (count < 0)
        return -EINVAL;
    for (int i = 0; i < count; i++)
        all_anew |= changed(&files[i]);
    if (all_anew)
        ms_kept_close(files, count);
    for (int i = 0; i < count; i++) {
        int64_t size = files[i].found;
        if (files[i].how != MS_KEPT_STAT)
            size = read_kept(&files[i], buffer + used, capacity - used, &opened);
        answers[2 * i] = size;
        answers[2 * i + 1] = (int64_t)used;
        if (size > 0)
            used += (size_t)size;
    }
    return opened;
}

void ms_kept_close(ms_kept *files, int count)
{
    for (int i = 0; i < count; i++)
        drop(&files[i]);
}
