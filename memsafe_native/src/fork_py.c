/* Knows CPython (limited API 3.11). A fork that keeps the GIL and never returns in the child. */
#include <Python.h>

#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "fork_internal.h"
#include "gauge.h"
#include "owned.h"
#include "python_types_internal.h"
#include "sentry.h"

/* What the supervising thread needs to know, written before any Python can run again in the parent: a KeyboardInterrupt
 * raised as the call returns must not lose a child. Read in Python by struct.unpack("=qqqQQ"). */
struct handover {
    int64_t pid;
    int64_t pidfd; /* -1: the child has ended and was reaped by somebody else */
    int64_t pause_ns;
    uint64_t device, inode; /* the pidfd's: until Python looks, its number may be a stranger's. 0: they were not told */
};

static int64_t monotonic_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

/* The caller's frames must never go on in the child, whatever is raised: so the child's main is called from here. */
static _Noreturn void run_child(PyObject *main, const struct ms_fork_child *child)
{
    struct ms_fork_steps steps;
    ms_fork_child_begin(child, &steps);
    PyGC_Disable(); /* a collection writes to every object's header, and so copies its page */
    PyOS_AfterFork_Child();
    PyObject *result = PyObject_CallFunction(main, "iiiii", steps.oom_score_adj, steps.guard, steps.descriptors,
                                             steps.nice, steps.idle_io);
    _exit(result ? 0 : 1);
}

static const char fork_doc[] =
    "fork(main, handover, wake_fd, parent_pidfd, report_fd, report_read_fd, oom_score_adj, nice, idle_io, keep_fds,"
    " sentry) -> None\n\n"
    "Fork, keeping the GIL. In the child main(oom_score_adj, guard, descriptors, nice, idle_io) is called with the "
    "errno"
    " of each step, or 0, then _exit.\n"
    "In the parent (pid, pidfd, pause_ns, device, inode) is put into *handover* and the eventfd *wake_fd* is set, then "
    "it returns.\n"
    "keep_fds: bytes of C ints. sentry: the address of an ms_sentry that is to watch over the child, or 0. Raises "
    "OSError when no child was made; *handover* is then as it was.";

static PyObject *supervised_fork(PyObject *Py_UNUSED(module), PyObject *args)
{
    PyObject *main;
    Py_buffer handover, keep;
    int wake_fd;
    unsigned long long sentry;
    struct ms_fork_child child;
    if (!PyArg_ParseTuple(args, "Ow*iiiiiipy*K:fork", &main, &handover, &wake_fd, &child.parent_pidfd, &child.report_fd,
                          &child.report_read_fd, &child.oom_score_adj, &child.nice, &child.idle_io, &keep, &sentry))
        return NULL;
    int error = 0;
    if (handover.len != (Py_ssize_t)sizeof(struct handover) || keep.len % (Py_ssize_t)sizeof(int)) {
        PyErr_SetString(PyExc_ValueError, "handover must be 40 bytes, keep_fds whole C ints");
        goto release;
    }
    child.keep_fds = keep.buf;
    child.keep_count = (size_t)keep.len / sizeof(int);
    child.parent_pid = getpid();
    child.parent_tid = (pid_t)syscall(SYS_gettid); /* glibc declares gettid() since 2.30 only */

    PyOS_BeforeFork();
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* no handler of the parent's may run in the child */
    int64_t begin_ns = monotonic_ns();
    pid_t pid = fork();
    if (pid == 0)
        run_child(main, &child);
    struct handover out = {.pid = pid, .pause_ns = monotonic_ns() - begin_ns};
    int pidfd = -1;
    error = pid < 0 ? errno : -ms_fork_adopt(pid, &pidfd);
    if (!error) {
        const uint64_t one = 1;
        if (sentry && pidfd >= 0) /* now: the job's thread may have to wait for the GIL */
            ms_sentry_watch((ms_sentry *)(uintptr_t)sentry, pidfd, out.pause_ns);
        out.pidfd = pidfd;
        ms_owned owned;
        if (ms_own(pidfd, &owned) == 0) {
            out.device = owned.device;
            out.inode = owned.inode;
        }
        memcpy(handover.buf, &out, sizeof out);
        ssize_t ignored = write(wake_fd, &one, sizeof one); /* an eventfd refuses only when it is set already */
        (void)ignored;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    PyOS_AfterFork_Parent();

release:
    PyBuffer_Release(&handover);
    PyBuffer_Release(&keep);
    if (error) {
        errno = error;
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    if (PyErr_Occurred())
        return NULL;
    Py_RETURN_NONE;
}

static const char end_doc[] = "fork_end(pidfd, patience_ms): kill a snapshot's child and take its memory back, while "
                              "every Python thread waits.\n\n"
                              "The GIL is kept on purpose: where memory runs out, threads that go on writing would "
                              "take the rest of it before the\n"
                              "child has given its own back, and the OOM killer, which does not wait for a process "
                              "that is ending, would take the\n"
                              "parent. Raises OSError where the child may not be signalled.";

static PyObject *end_with_gil(PyObject *Py_UNUSED(module), PyObject *args)
{
    int pidfd, patience_ms;
    if (!PyArg_ParseTuple(args, "ii:fork_end", &pidfd, &patience_ms))
        return NULL;
    int result = ms_fork_end(pidfd, patience_ms);
    if (result < 0) {
        errno = -result;
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    Py_RETURN_NONE;
}

int ms_fork_py_add(PyObject *dict)
{
    static PyMethodDef methods[] = {
        {"fork", supervised_fork, METH_VARARGS, fork_doc},
        {"fork_end", end_with_gil, METH_VARARGS, end_doc},
    };
    for (size_t i = 0; i < sizeof methods / sizeof *methods; i++) {
        PyObject *function = PyCFunction_New(&methods[i], NULL);
        if (!function)
            return -1;
        int failed = PyDict_SetItemString(dict, methods[i].ml_name, function);
        Py_DECREF(function);
        if (failed)
            return failed;
    }
    return 0;
}
