/* What every C file here shares. Conventions: 0 or a count is success, -errno is failure; outputs are untouched on
 * failure; no logging, no abort, no Python (the files that must know CPython say so in their first line). */
#ifndef MS_H
#define MS_H

#include <errno.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

/* Our own code is held to more than the code that cffi writes. -Werror does not reach what a pragma has set. */
#ifdef MS_WERROR
#pragma GCC diagnostic error "-Wconversion"
#pragma GCC diagnostic error "-Wstrict-prototypes"
#pragma GCC diagnostic error "-Wmissing-prototypes"
#else
#pragma GCC diagnostic warning "-Wconversion"
#pragma GCC diagnostic warning "-Wstrict-prototypes"
#pragma GCC diagnostic warning "-Wmissing-prototypes"
#endif

#define MS_LIKELY(x)   __builtin_expect(!!(x), 1)
#define MS_UNLIKELY(x) __builtin_expect(!!(x), 0)

#endif
