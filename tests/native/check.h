/* How a program says that a promise was broken: a line that says where, and a status that is not 0. */
#ifndef CHECK_H
#define CHECK_H
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

#define CHECK(condition)                                                                                               \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);                                            \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)

/* End a forked child. In _exit() ThreadSanitizer would take threads of the parent's that had ended, and that nobody had
 * joined yet, for leaks of the child's. */
static inline void leave(int status)
{
    syscall(SYS_exit_group, status);
}

#endif
