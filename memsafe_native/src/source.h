/* The descriptors that a waiter waits for, by how they signal (enum ms_waiter_how). Needs no GIL. */
#ifndef MS_SOURCE_H
#define MS_SOURCE_H

#include "ms.h"

/* Whether fd is open and may be waited for in this way. Returns 0, -EINVAL, or -errno. Thread-safe. */
int ms_source_check(int fd, int how);

/* What has to be done before the first wait. Returns 0, or what the read gave. Thread-safe. */
int ms_source_begin(int fd, int how);

/* What epoll is to wait for. */
uint32_t ms_source_events(int how);

/* Read it, so that it can fire again; ready is what epoll told. *events is set to how often it fired, and left where it
 * did not. Returns 0, or -errno: it is lost. Blocks never. Thread-safe. */
int ms_source_drain(int fd, int how, uint32_t ready, uint64_t *events);

#endif
