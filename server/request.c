// A request's birth and death. api/ calls both; the engine only borrows the request in between.
#include "server/request.h"

#include "base/memory.h"
#include "base/verify.h"

#include <stdlib.h>

struct request *request_create(void) {
    struct request *request = mem_zalloc(1, sizeof *request);
    request->sampling = (struct sampling){
        .temperature = 1, .top_p = 1, .repetition_penalty = 1, .logprobs = -1};
    atomic_init(&request->cancelled, false);
    return request;
}

void request_destroy(struct request *request) {
    if (!request) return;
    VERIFY(request->sequence == NULL);
    VERIFY_OP(request->adapter_count, <=, REQUEST_ADAPTERS_MAX);
    VERIFY_OP(request->stop_count, <=, STOP_STRINGS_MAX);
    for (int i = 0; i < request->adapter_count; i++) {
        adapter_unref(request->adapters[i]);
        adapter_unref(request->twins[i]);
    }
    for (int i = 0; i < request->stop_count; i++) free(request->stop[i]);
    free((void *)request->sampling.bias_ids);
    free((void *)request->sampling.bias_values);
    free(request->prompt);
    free(request->cache_salt);
    free(request);
}
