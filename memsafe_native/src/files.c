/* Reading many small files of the kernel in one call: see cdef/files.h. */
#include <fcntl.h>
#include <unistd.h>

#include "ms.h"
#include "files.h"

/* Returns the size of what was read, or -errno. */
static int64_t read_whole(int fd, char *buffer, size_t capacity)
{
    size_t size = 0;
    for (;;) {
        /* A buffer that is full to the last byte may have cut the file: only a read of 0 says that it ends. */
        if (size == capacity)
            return -ENOBUFS;
        ssize_t got = read(fd, buffer + size, capacity - size);
        if (got == 0)
            return (int64_t)size;
        if (got < 0 && errno != EINTR)
            return -errno;
        if (got > 0)
            size += (size_t)got;
    }
}

static int64_t read_file(const char *path, char *buffer, size_t capacity)
{
    /* O_NONBLOCK: a FIFO laid in the way must not hang the reader; the kernel's own files ignore it. */
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0)
        return -errno;
    int64_t result = read_whole(fd, buffer, capacity);
    close(fd);
    return result;
}

int ms_files_read(ms_file *files, int count, char *buffer, size_t capacity)
{
    size_t used = 0;
    int done = 0;
    if (count < 0)
        return -EINVAL;
    for (int i = 0; i < count; i++) {
        files[i].offset = used;
        files[i].result = read_file(files[i].path, buffer + used, capacity - used);
        if (files[i].result >= 0) {
            used += (size_t)files[i].result;
            done++;
        }
    }
    return done;
}
