// Starting threads of lorad's own.
#ifndef LORAD_BASE_THREAD_H
#define LORAD_BASE_THREAD_H

#include <pthread.h>

// pthread_create with every signal blocked in the new thread: signals go to the thread that expects
// them. 0, or the error number.
int thread_start(pthread_t *thread, void *(*function)(void *), void *argument);

#endif
