// The HTTP side of lorad: one libuv loop on one thread, which is the caller's. It turns HTTP into
// requests for the engine and events into answers, and owns neither engine nor registry.
#ifndef LORAD_API_API_H
#define LORAD_API_API_H

#include "server/engine.h"
#include "server/options.h"
#include "server/store.h"

struct api_setup {
    const struct options *options;
    const struct model_config *config;
    const struct tokenizer *tokenizer; // NULL: prompts are token ids
    const struct chat_template *chat_template; // NULL: there are no chats
    struct registry *registry;
    struct store *store; // NULL: loads and unloads are not remembered
    const char *base_id;
    int context_max;
    bool dummy; // "dummy:" adapter sources may be loaded at run time
};

struct api;
// Binds and listens; STATUS_IO: err says why not. Borrows everything in `setup` until destroy.
MUST_CHECK enum status api_create(const struct api_setup *setup, struct api **out,
                                  struct error *err);
// engine_options.wake: any thread; context is the api.
void api_wake(void *api);
void api_set_engine(struct api *api, struct engine *engine, struct metrics *metrics); // before run
// Loads again what the store remembers, before run. One that cannot be loaded, or is not what it
// was, is logged and left out, and stays in the store. Reads files. STATUS_IO: the store's failure.
MUST_CHECK enum status api_restore(struct api *api, struct error *err);
int api_port(const struct api *api);
// Serves until SIGTERM or SIGINT has drained the engine; 0, or 1 when the device failed.
int api_run(struct api *api);
void api_destroy(struct api *api);

#endif
