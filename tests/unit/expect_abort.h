// Whether a call aborts, as a broken invariant must: it runs in a child process whose stderr is
// closed, so that the expected assertion does not look like a failure in the log.
#ifndef LORAD_TESTS_EXPECT_ABORT_H
#define LORAD_TESTS_EXPECT_ABORT_H

#include <fcntl.h>
#include <signal.h>
#include <stdbool.h>
#include <sys/wait.h>
#include <unistd.h>

static bool aborts(void (*call)(void *), void *argument) {
    pid_t child = fork();
    if (child == 0) {
        signal(SIGABRT, SIG_DFL);
        int null = open("/dev/null", O_WRONLY);
        if (null >= 0) dup2(null, 2);
        call(argument);
        _exit(0);
    }
    int how = 0;
    return child > 0 && waitpid(child, &how, 0) == child && WIFSIGNALED(how) &&
           WTERMSIG(how) == SIGABRT;
}

#endif
