// A model's chat template: how messages become a prompt. tokenizer_config.json's "chat_template", or
// chat_template.jinja beside it, in the part of Jinja2 that such templates use, with the settings that
// transformers gives them (trim_blocks, lstrip_blocks, loop controls, tojson as json.dumps writes it,
// raise_exception, strftime_now). What it does not know it refuses when the template is loaded, not
// when somebody asks. Immutable after load; usable from any thread at once.
#ifndef LORAD_SERVER_TEXT_CHAT_TEMPLATE_H
#define LORAD_SERVER_TEXT_CHAT_TEMPLATE_H

#include "base/error.h"

#include <jansson.h>
#include <stddef.h>

struct chat_template;

// Of a model's folder. STATUS_NOT_FOUND: the model has none.
MUST_CHECK enum status chat_template_load(const char *folder, struct chat_template **out,
                                          struct error *err);
// From its source; STATUS_INVALID names the line, STATUS_UNSUPPORTED what is not known.
MUST_CHECK enum status chat_template_create(const char *source, size_t bytes,
                                            struct chat_template **out, struct error *err);
void chat_template_destroy(struct chat_template *template);

// `variables`: an object (messages, add_generation_prompt, ...), which is not changed; bos_token and
// eos_token are the folder's where it has them. *text is malloc'd, NUL-terminated. STATUS_INVALID: the
// template refuses the messages (raise_exception) or cannot work with them; it is bounded in time and
// in size.
MUST_CHECK enum status chat_template_render(const struct chat_template *template,
                                            const json_t *variables, char **text, size_t *bytes,
                                            struct error *err);

#endif
