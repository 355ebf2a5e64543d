/* Which file a descriptor stood for: see owned.h. */
#include <sys/stat.h>

#include "owned.h"

int ms_own(int fd, ms_owned *owned)
{
    struct stat found;
    if (fstat(fd, &found) < 0)
        return -errno;
    *owned = (ms_owned){fd, found.st_dev, found.st_ino};
    return 0;
}

bool ms_is_ours(const ms_owned *owned)
{
    ms_owned now;
    return ms_own(owned->fd, &now) == 0 && now.device == owned->device && now.inode == owned->inode;
}
