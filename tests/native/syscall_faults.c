/* Run a program and make its system calls fail, the n-th on demand: raw ones too, those of its threads and children.
 *
 * usage: syscall_faults PROGRAM [ARGUMENT...]
 *
 * The program asks by prctl(ASK, where, n, what, how), which goes no further than here:
 *
 *   where  whose calls count: that of the thread that asks, of the other threads of its process, of the first thread of
 *          its children, of their other threads, or of the other threads of its process from their first waitid on
 *   n      the first call to fail, counted from 1; 0 ends it, and returns what was done: 0, or the number of the first
 *          call that failed, plus 1
 *   what   the errno, or KILL: the call's whole process is killed instead
 *   how    the n-th alone; it, and everywhere all later ones of the same name; it and all later ones that are counted,
 *          but those without which nothing can be taken away (see NEEDED)
 *
 * Where it is a child of the program's that asks, the program itself is left alone.
 *
 * It ends when the last process has, with the program's exit status. x86-64 only. */
#include <errno.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <unistd.h>

#ifndef __x86_64__
#error "the registers of other processors are not known here"
#endif

#define ASK  0x4d534641
#define KILL 1000

enum where { CALLER, BESIDE, CHILD, BESIDE_CHILD, BESIDE_AT_END };
enum how { ONCE, SAME, ALL };

static const int NEVER[] = {
    /* They cannot fail as they are called here. */
    SYS_getpid,
    SYS_gettid,
    SYS_getuid,
    SYS_geteuid,
    SYS_rt_sigaction,
    SYS_rt_sigprocmask,
    SYS_sigaltstack,
    SYS_clock_gettime,
    SYS_getrusage,
    SYS_sched_yield,
    /* They do not return, or nobody hears what they do. */
    SYS_exit,
    SYS_exit_group,
    SYS_rt_sigreturn,
    SYS_restart_syscall,
    SYS_set_robust_list,
    SYS_rseq,
    SYS_set_tid_address,
    /* CPython and the C library end the process, or ignore it, where these fail: locks, memory that they give back or
       already hold. Getting memory, by mmap, may fail. */
    SYS_futex,
    SYS_brk,
    SYS_munmap,
    SYS_mremap,
    SYS_madvise,
    SYS_mprotect,
};
/* To reap, to remove a name, and to tell whose a descriptor is before it is closed (kept.c). */
static const int NEEDED[] = {SYS_waitid, SYS_wait4, SYS_unlinkat, SYS_fstat, SYS_newfstatat};

#define NEVER_COUNT (sizeof NEVER / sizeof NEVER[0])

static struct {
    enum where where;
    enum how how;
    long n; /* 0: no faults are asked for */
    long seen;
    int waited;
    int error;
    long failed; /* the number of the first call that failed, or -1 */
} plan;

static pid_t program;        /* the first process: it may wait for the one that asks */
static pid_t asker;          /* the process that asks */
static pid_t caller;         /* its thread that does */
static int pending[1 << 22]; /* by thread: the errno to put in place of the result of the call that is under way */

static void die(const char *what)
{
    perror(what);
    exit(125);
}

static void allow_only_watched(void)
{
    struct sock_filter filter[NEVER_COUNT + 3];
    filter[0] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr));
    for (size_t i = 0; i < NEVER_COUNT; i++)
        filter[i + 1] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (unsigned)NEVER[i],
                                                     (unsigned char)(NEVER_COUNT - i), 0);
    filter[NEVER_COUNT + 1] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_TRACE);
    filter[NEVER_COUNT + 2] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
    struct sock_fprog compiled = {.len = NEVER_COUNT + 3, .filter = filter};
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &compiled))
        die("seccomp");
}

static pid_t process_of(pid_t thread)
{
    char path[64], line[256];
    int process = thread;
    snprintf(path, sizeof path, "/proc/%d/status", thread);
    FILE *file = fopen(path, "re");
    while (file && fgets(line, sizeof line, file))
        if (sscanf(line, "Tgid: %d", &process) == 1)
            break;
    if (file)
        fclose(file);
    return process;
}

static enum where where_is(pid_t thread)
{
    if (thread == caller)
        return CALLER;
    pid_t process = process_of(thread);
    if (process == asker)
        return plan.where == BESIDE_AT_END && plan.waited ? BESIDE_AT_END : BESIDE;
    return thread == process ? CHILD : BESIDE_CHILD;
}

static int is_needed(long number)
{
    for (size_t i = 0; i < sizeof NEEDED / sizeof NEEDED[0]; i++)
        if (NEEDED[i] == number)
            return 1;
    return 0;
}

static int is_due(pid_t thread, long number)
{
    if (!plan.n || (program != asker && process_of(thread) == program))
        return 0;
    if (plan.how == SAME && plan.failed >= 0)
        return number == plan.failed;
    if (number == SYS_waitid)
        plan.waited |= where_is(thread) == BESIDE;
    if (where_is(thread) != plan.where)
        return 0;
    plan.seen++;
    if (plan.seen <= plan.n)
        return plan.seen == plan.n;
    return plan.how == ALL && !is_needed(number);
}

/* Make the call return at once; what it was asked for is not done. */
static void answer(pid_t thread, struct user_regs_struct *registers, long result)
{
    registers->orig_rax = (unsigned long long)-1;
    registers->rax = (unsigned long long)result;
    ptrace(PTRACE_SETREGS, thread, NULL, registers);
}

static long ask(pid_t thread, const struct user_regs_struct *registers)
{
    long failed = plan.failed;
    caller = thread;
    asker = process_of(thread);
    plan.where = (enum where)registers->rsi;
    plan.n = (long)registers->rdx;
    plan.error = (int)registers->r10;
    plan.how = (enum how)registers->r8;
    plan.seen = 0;
    plan.waited = 0;
    plan.failed = -1;
    return plan.n ? 0 : failed + 1;
}

/* Returns how to go on: to the next watched call, or, where the result is to be replaced, to this one's end. */
static enum __ptrace_request at_call(pid_t thread)
{
    struct user_regs_struct registers;
    if (ptrace(PTRACE_GETREGS, thread, NULL, &registers)) /* it was killed meanwhile */
        return PTRACE_CONT;
    long number = (long)registers.orig_rax;
    if (number == SYS_prctl && registers.rdi == ASK) {
        answer(thread, &registers, ask(thread, &registers));
        return PTRACE_CONT;
    }
    if (!is_due(thread, number))
        return PTRACE_CONT;
    if (plan.failed < 0)
        plan.failed = number;
    if (plan.error == KILL) {
        kill(process_of(thread), SIGKILL);
        return PTRACE_CONT;
    }
    if (number == SYS_close) { /* Linux closes, whatever it says */
        pending[thread] = plan.error;
        return PTRACE_SYSCALL;
    }
    answer(thread, &registers, -plan.error);
    return PTRACE_CONT;
}

static void at_end_of_call(pid_t thread)
{
    struct user_regs_struct registers;
    if (!pending[thread] || ptrace(PTRACE_GETREGS, thread, NULL, &registers))
        return;
    registers.rax = (unsigned long long)-pending[thread];
    pending[thread] = 0;
    ptrace(PTRACE_SETREGS, thread, NULL, &registers);
}

static void go_on(pid_t thread, int status)
{
    enum __ptrace_request how = PTRACE_CONT;
    int event = status >> 16, signo = WSTOPSIG(status), deliver = 0;
    if (event == PTRACE_EVENT_SECCOMP)
        how = at_call(thread);
    else if (event == PTRACE_EVENT_STOP && signo != SIGTRAP)
        how = PTRACE_LISTEN; /* it was stopped by a signal, and stays so */
    else if (signo == (SIGTRAP | 0x80))
        at_end_of_call(thread);
    else if (!event)
        deliver = signo;
    ptrace(how, thread, NULL, (void *)(long)deliver);
}

static pid_t start(char **arguments)
{
    int seized[2];
    if (pipe(seized))
        die("pipe");
    pid_t pid = fork();
    if (pid < 0)
        die("fork");
    if (pid == 0) {
        char byte;
        close(seized[1]);
        if (read(seized[0], &byte, 1) != 1)
            _exit(125);
        close(seized[0]);
        allow_only_watched();
        execvp(arguments[0], arguments);
        die(arguments[0]);
    }
    long options = PTRACE_O_TRACESYSGOOD | PTRACE_O_TRACESECCOMP | PTRACE_O_TRACEFORK | PTRACE_O_TRACEVFORK |
                   PTRACE_O_TRACECLONE | PTRACE_O_EXITKILL;
    if (ptrace(PTRACE_SEIZE, pid, NULL, (void *)options))
        die("ptrace");
    if (write(seized[1], "!", 1) != 1)
        die("write");
    close(seized[0]);
    close(seized[1]);
    return pid;
}

int main(int count, char **arguments)
{
    int status, result = 125;
    pid_t thread;
    if (count < 2)
        return 125;
    plan.failed = -1;
    program = start(arguments + 1);
    while ((thread = waitpid(-1, &status, __WALL)) > 0) {
        if (WIFSTOPPED(status))
            go_on(thread, status);
        else if (thread == program)
            result = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
    }
    return result;
}
