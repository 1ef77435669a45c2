// For valgrind 3.19, which takes io_uring_enter for a call that never blocks: it keeps its one lock meanwhile, and no other thread
// of the program runs again. Loaded by LD_PRELOAD, this waits by poll instead, which valgrind knows.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <linux/io_uring.h>
#include <linux/time_types.h>
#include <poll.h>
#include <stdint.h>
#include <stdarg.h>
#include <sys/syscall.h>

typedef long (*syscall_fn)(long, ...);

long syscall(long number, ...) {
    static syscall_fn next;
    long a[6];
    va_list args;
    va_start(args, number);
    for (int i = 0; i < 6; i++) {
        a[i] = va_arg(args, long);
    }
    va_end(args);
    if (!next) {
        next = (syscall_fn)dlsym(RTLD_NEXT, "syscall");
    }
    unsigned wanted = (unsigned)a[2], flags = (unsigned)a[3];
    if (number != SYS_io_uring_enter || wanted == 0 || !(flags & IORING_ENTER_GETEVENTS)) {
        return next(number, a[0], a[1], a[2], a[3], a[4], a[5]);
    }
    long submitted = next(number, a[0], a[1], 0L, a[3], a[4], a[5]);
    if (submitted < 0) {
        return submitted;
    }
    long long left_us = -1;
    if (flags & IORING_ENTER_EXT_ARG) {
        const struct io_uring_getevents_arg *more = (void *)a[4];
        const struct __kernel_timespec *ts = (void *)(uintptr_t)more->ts;
        left_us = ts ? ts->tv_sec * 1000000LL + ts->tv_nsec / 1000 : -1;
    }
    // A ring with IORING_SETUP_DEFER_TASKRUN has nothing to show before it is entered: so it is, each millisecond.
    struct pollfd ring = {.fd = (int)a[0], .events = POLLIN};
    for (;;) {
        if (poll(&ring, 1, 1) > 0) {
            return submitted;
        }
        next(SYS_io_uring_enter, a[0], 0L, 0L, (long)IORING_ENTER_GETEVENTS, 0L, 0L);
        if (poll(&ring, 1, 0) > 0) {
            return submitted;
        }
        if (left_us >= 0 && (left_us -= 1000) < 0) {
            errno = ETIME;
            return submitted ? submitted : -1;
        }
    }
}
