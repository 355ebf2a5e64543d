#include <fcntl.h>

#include "ms.h"
#include "writeback.h"

int ms_writeback(int fd, int64_t offset, int64_t length, int wait)
{
    unsigned int flags = SYNC_FILE_RANGE_WRITE;
    if (wait)
        flags |= SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WAIT_AFTER;
    int result;
    do
        result = sync_file_range(fd, offset, length, flags);
    while (result && errno == EINTR);
    return result ? -errno : 0;
}
