/* Triton's `tensorrtllm` backend without a model, for benchmarks: it repeats the prompt's tokens, one in each response.

   With ENGINE_TOKEN_SECONDS it is paced like an engine with in-flight batching: each request that is running gets one
   token in each such step. Without, it generates without a pause. It logs what was stopped. engine_in_c.py compiles it and starts Triton
   with it. The declarations below are those of Triton's backend API 1.x (core include/triton/core/tritonbackend.h and
   tritonserver.h), as far as they are used here. */

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef void Error, Instance, Request, Input, Response, Output, Factory;
enum { CPU = 0, BOOL = 1, INT32 = 8, FINAL = 1, RELEASE_ALL = 1 };

Error *TRITONBACKEND_RequestId(Request *, const char **);
Error *TRITONBACKEND_RequestInput(Request *, const char *, Input **);
Error *TRITONBACKEND_InputBuffer(Input *, uint32_t, const void **, uint64_t *, int *, int64_t *);
Error *TRITONBACKEND_RequestRelease(Request *, uint32_t);
Error *TRITONBACKEND_ResponseFactoryNew(Factory **, Request *);
Error *TRITONBACKEND_ResponseFactoryDelete(Factory *);
Error *TRITONBACKEND_ResponseFactoryIsCancelled(Factory *, bool *);
Error *TRITONBACKEND_ResponseFactorySendFlags(Factory *, uint32_t);
Error *TRITONBACKEND_ResponseNewFromFactory(Response **, Factory *);
Error *TRITONBACKEND_ResponseOutput(Response *, Output **, const char *, int, const int64_t *, uint32_t);
Error *TRITONBACKEND_OutputBuffer(Output *, void **, uint64_t, int *, int64_t *);
Error *TRITONBACKEND_ResponseSend(Response *, uint32_t, Error *);
void TRITONSERVER_ErrorDelete(Error *);

typedef struct Running {
    struct Running *next;
    Factory *factory;
    char id[128];
    int32_t *prompt, prompt_length, wanted, done;
    bool streaming, stopped;
} Running;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t arrived = PTHREAD_COND_INITIALIZER;
static Running *newcomers, *stops; /* stops: only their ids count */
static double token_seconds;

static void check(Error *error) {
    if (error) TRITONSERVER_ErrorDelete(error);
}

/* The content of an input tensor and its size in bytes; NULL if the request has no such input. */
static const void *input(Request *request, const char *name, uint64_t *bytes) {
    Input *found = NULL;
    const void *content = NULL;
    int kind = CPU;
    int64_t device = 0;
    Error *error = TRITONBACKEND_RequestInput(request, name, &found);
    if (!error) error = TRITONBACKEND_InputBuffer(found, 0, &content, bytes, &kind, &device);
    check(error);
    return error ? NULL : content;
}

static bool flag(Request *request, const char *name) {
    uint64_t bytes = 0;
    const bool *value = input(request, name, &bytes);
    return value && bytes && *value;
}

static void put(Response *response, const char *name, const int32_t *values, int count, uint32_t dimensions) {
    Output *output;
    void *content;
    int kind = CPU;
    int64_t device = 0, shape[3] = {1, 1, 1};
    shape[dimensions - 1] = count;
    check(TRITONBACKEND_ResponseOutput(response, &output, name, INT32, shape, dimensions));
    check(TRITONBACKEND_OutputBuffer(output, &content, 4 * (uint64_t)count, &kind, &device));
    memcpy(content, values, 4 * (size_t)count);
}

static void answer(Running *one, const int32_t *ids, int32_t count, uint32_t flags) {
    Response *response;
    check(TRITONBACKEND_ResponseNewFromFactory(&response, one->factory));
    put(response, "output_ids", ids, count, 3);
    put(response, "sequence_length", &count, 1, 2);
    check(TRITONBACKEND_ResponseSend(response, flags, NULL));
}

/* Generates the next token. Whether the answer is complete; the last token comes with the final flag, as in 1.2.1. */
static bool step(Running *one) {
    bool cancelled = one->stopped;
    if (!cancelled) check(TRITONBACKEND_ResponseFactoryIsCancelled(one->factory, &cancelled));
    if (cancelled) {
        printf("stopped after %d tokens\n", one->done);
        fflush(stdout);
        check(TRITONBACKEND_ResponseFactorySendFlags(one->factory, FINAL));
        return true;
    }
    bool last = ++one->done >= one->wanted;
    if (one->streaming) {
        answer(one, &one->prompt[(one->done - 1) % one->prompt_length], 1, last ? FINAL : 0);
    } else if (last) {
        int32_t *all = malloc(4 * (size_t)one->wanted);
        for (int i = 0; i < one->wanted; i++) all[i] = one->prompt[i % one->prompt_length];
        answer(one, all, one->wanted, FINAL);
        free(all);
    }
    return last;
}

static void mark_stopped(Running *running) {
    while (stops) {
        Running *stop = stops;
        for (Running *one = running; one; one = one->next)
            if (!strcmp(one->id, stop->id)) one->stopped = true;
        stops = stop->next;
        free(stop);
    }
}

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

/* Sleeps until the step's time, and returns that of the next. */
static double pace(double next) {
    double wait = next - now();
    if (wait > 0) {
        struct timespec time = {(time_t)wait, (long)(1e9 * (wait - (double)(time_t)wait))};
        nanosleep(&time, NULL);
        return next + token_seconds;
    }
    return now() + token_seconds;
}

static void *generate(void *unused) {
    Running *running = NULL;
    double next = 0;
    for (;;) {
        pthread_mutex_lock(&lock);
        while (!running && !newcomers) pthread_cond_wait(&arrived, &lock);
        while (newcomers) {
            Running *one = newcomers;
            newcomers = one->next;
            one->next = running;
            running = one;
        }
        mark_stopped(running);
        pthread_mutex_unlock(&lock);
        if (token_seconds > 0) next = pace(next);
        for (Running **at = &running; *at;) {
            Running *one = *at;
            if (!step(one)) {
                at = &one->next;
                continue;
            }
            *at = one->next;
            check(TRITONBACKEND_ResponseFactoryDelete(one->factory));
            free(one->prompt);
            free(one);
        }
    }
    return unused;
}

static Running *read_request(Request *request) {
    Running *one = calloc(1, sizeof *one);
    const char *id = "";
    uint64_t bytes = 0, ignored = 0;
    check(TRITONBACKEND_RequestId(request, &id));
    strncpy(one->id, id, sizeof one->id - 1);
    const int32_t *prompt = input(request, "input_ids", &bytes);
    const int32_t *wanted = input(request, "request_output_len", &ignored);
    one->prompt_length = (int32_t)(bytes / 4);
    one->prompt = malloc(bytes);
    memcpy(one->prompt, prompt, bytes);
    one->wanted = wanted && *wanted > 0 ? *wanted : 1;
    one->streaming = flag(request, "streaming");
    return one;
}

Error *TRITONBACKEND_ModelInstanceExecute(Instance *instance, Request **requests, const uint32_t count) {
    (void)instance;
    for (uint32_t i = 0; i < count; i++) {
        Running *one = read_request(requests[i]);
        bool stop = flag(requests[i], "stop");
        check(TRITONBACKEND_ResponseFactoryNew(&one->factory, requests[i]));
        check(TRITONBACKEND_RequestRelease(requests[i], RELEASE_ALL));
        if (stop) {
            check(TRITONBACKEND_ResponseFactorySendFlags(one->factory, FINAL));
            check(TRITONBACKEND_ResponseFactoryDelete(one->factory));
            free(one->prompt);
        }
        pthread_mutex_lock(&lock);
        Running **list = stop ? &stops : &newcomers;
        one->next = *list;
        *list = one;
        pthread_cond_signal(&arrived);
        pthread_mutex_unlock(&lock);
    }
    return NULL;
}

Error *TRITONBACKEND_Initialize(void *backend) {
    (void)backend;
    pthread_t thread;
    const char *seconds = getenv("ENGINE_TOKEN_SECONDS");
    token_seconds = seconds ? atof(seconds) : 0;
    pthread_create(&thread, NULL, generate, NULL);
    pthread_detach(thread);
    return NULL;
}
