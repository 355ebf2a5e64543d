/* Descriptors that may be closed behind our back, by os.closerange() say, and whose numbers may be other files' since:
 * of such a number nothing may be read, written or closed. Told by device and inode: eventfds, timers and epoll sets
 * share one and are not told from each other, nor are pidfds before Linux 6.9. */
#ifndef MS_OWNED_H
#define MS_OWNED_H

#include <stdbool.h>

#include "ms.h"

typedef struct ms_owned {
    int fd; /* less than 0: none */
    dev_t device;
    ino_t inode;
} ms_owned;

/* Note which file fd stands for. Returns 0 and sets *owned, or -errno. Thread-safe. */
int ms_own(int fd, ms_owned *owned);

/* Whether the number still stands for that file. Thread-safe. */
bool ms_is_ours(const ms_owned *owned);

#endif
