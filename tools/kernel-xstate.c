/* Lets Debian's User-Mode Linux, preloaded with this, run on a CPU with AMX.

   Its kernel keeps the first 2696 bytes of a process's extended state, all that there was before
   AMX, and sets them by PTRACE_SETREGSET, for which the host takes all of the state or nothing
   (arch/x86/kernel/fpu/regset.c, xstateregs_set()). The rest is zero: nobody in the guest can ask
   for AMX. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <elf.h>
#include <stdarg.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/types.h>
#include <sys/uio.h>

long ptrace(enum __ptrace_request request, ...)
{
    static long (*next)(enum __ptrace_request, pid_t, void *, void *);
    static unsigned char state[1 << 16];
    static size_t size;

    va_list arguments;
    va_start(arguments, request);
    pid_t pid = va_arg(arguments, pid_t);
    void *address = va_arg(arguments, void *);
    void *data = va_arg(arguments, void *);
    va_end(arguments);

    if (!next)
        *(void **)&next = dlsym(RTLD_NEXT, "ptrace");
    if (request != PTRACE_SETREGSET || (long)address != NT_X86_XSTATE)
        return next(request, pid, address, data);

    struct iovec all = {state, sizeof state}, *given = data;
    if (!size) {
        if (next(PTRACE_GETREGSET, pid, address, &all) < 0)
            return -1;
        size = all.iov_len;
        memset(state, 0, sizeof state);
    }
    memcpy(state, given->iov_base, given->iov_len);
    all.iov_len = size;
    return next(request, pid, address, &all);
}
