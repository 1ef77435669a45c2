/*
 * kv_fetch: a decode process fetches scattered blocks out of the KV cache of a prefill process.
 *
 *   prefill                                        decode
 *   registers its cache
 *   sends metadata and descriptor  ---- pipe --->  makes the peer and the descriptor known
 *                                                  prepares a read of scattered blocks
 *   (does nothing: its lane serves) <--- TCP --->  posts it with a notification, waits, verifies
 *   sees the notification                          prints one line
 *   deregisters, ends
 *
 * In real life the pipe is whatever the two nodes talk over already: HTTP, etcd, a scheduler. It
 * must be a channel that you trust, for who holds metadata and descriptor can read the memory.
 *
 * With --die-after-post the prefill process is killed while the read is under way.
 */

#define _POSIX_C_SOURCE 200809L

#include <corelane.h>

#include <errno.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum {
    BLOCK_BYTES = 64 * 1024,
    BLOCK_WORDS = BLOCK_BYTES / 8,
    PREFILL_BLOCKS = 1024, /* in the cache of the prefill process: 64 MiB */
    DECODE_BLOCKS = 512,   /* in the cache of the decode process: 32 MiB */
    FETCHED = 256,         /* blocks of the request that moves: 16 MiB */
    TIMEOUT_MS = 30000
};

static const char REQUEST_DONE[] = "request 17 was fetched";

/* Which of the two processes this is, for messages. */
static const char *role = "kv_fetch";
/* The prefill process, as long as the decode process has to end it. */
static pid_t prefill_pid = 0;
static int die_after_post = 0;

/* --- what can go wrong ------------------------------------------------------------------------- */

/* Ends this process; a prefill process that is left would wait for nobody. */
static void stop(void)
{
    fflush(stdout);
    if (prefill_pid > 0) {
        kill(prefill_pid, SIGKILL);
        waitpid(prefill_pid, NULL, 0);
    }
    _exit(1);
}

static void fail(const char *what)
{
    fprintf(stderr, "%s: %s\n", role, what);
    stop();
}

static void fail_errno(const char *what)
{
    fprintf(stderr, "%s: %s: %s\n", role, what, strerror(errno));
    stop();
}

/* Every function of corelane returns a status; the words are those of this thread's last failure. */
static void check(corelane_status status, const char *what)
{
    if (status != CORELANE_OK) {
        fprintf(stderr, "%s: %s: %s: %s\n", role, what, corelane_status_name(status),
                corelane_last_error());
        stop();
    }
}

/* --- the channel between the two processes: byte strings with their lengths in front ------------ */

typedef struct {
    unsigned char *bytes;
    size_t len;
} blob;

static void *allocate(size_t len)
{
    void *memory = calloc(1, len);
    if (memory == NULL) {
        fail("out of memory");
    }
    return memory;
}

static void send_all(int fd, const void *data, size_t len)
{
    const unsigned char *next = (const unsigned char *)data;
    while (len > 0) {
        ssize_t n = write(fd, next, len);
        if (n < 0 && errno == EINTR) {
            continue;
        }
        if (n < 0) {
            fail_errno("writing to the other process");
        }
        next += n;
        len -= (size_t)n;
    }
}

static void receive_all(int fd, void *data, size_t len)
{
    unsigned char *next = (unsigned char *)data;
    while (len > 0) {
        ssize_t n = read(fd, next, len);
        if (n < 0 && errno == EINTR) {
            continue;
        }
        if (n < 0) {
            fail_errno("reading from the other process");
        }
        if (n == 0) {
            fail("the other process has ended early");
        }
        next += n;
        len -= (size_t)n;
    }
}

static void send_blob(int fd, const blob *data)
{
    send_all(fd, &data->len, sizeof data->len);
    send_all(fd, data->bytes, data->len);
}

static blob receive_blob(int fd)
{
    blob data;
    receive_all(fd, &data.len, sizeof data.len);
    if (data.len == 0 || data.len > 1024 * 1024) {
        fail("the other process has sent an impossible length");
    }
    data.bytes = (unsigned char *)allocate(data.len);
    receive_all(fd, data.bytes, data.len);
    return data;
}

/* --- the caches: block `b` of prefill holds the words first_word(b), first_word(b) + 1, ... ------ */

static uint64_t first_word(uint32_t block)
{
    return ((uint64_t)block + 1) << 32;
}

static void fill_block(uint64_t *words, uint32_t block)
{
    for (uint32_t i = 0; i < BLOCK_WORDS; i++) {
        words[i] = first_word(block) + i;
    }
}

static int block_holds(const uint64_t *words, uint32_t block)
{
    for (uint32_t i = 0; i < BLOCK_WORDS; i++) {
        if (words[i] != first_word(block) + i) {
            return 0;
        }
    }
    return 1;
}

static int block_is_zero(const uint64_t *words)
{
    for (uint32_t i = 0; i < BLOCK_WORDS; i++) {
        if (words[i] != 0) {
            return 0;
        }
    }
    return 1;
}

/* --- an engine ---------------------------------------------------------------------------------- */

/* Options are strings, as in the environment; corelane_option_at lists them all. */
static corelane_engine_t create_engine(const char *agent_name)
{
    corelane_option options[2];
    corelane_engine_t engine = 0;
    options[0].name = "listen";
    options[0].value = "127.0.0.1"; /* both processes are on this machine */
    options[1].name = "transports";
    options[1].value = "tcp"; /* the default, local, may have copied everything before the peer is dead */
    check(corelane_engine_create(agent_name, strlen(agent_name), options, die_after_post ? 2 : 1, &engine),
          "creating an engine");
    return engine;
}

/* Asking with a capacity of 0 gives the length (and CORELANE_ERR_BUFFER_TOO_SMALL). */
static blob get_metadata(corelane_engine_t engine)
{
    blob data = {NULL, 0};
    (void)corelane_get_metadata(engine, NULL, 0, &data.len);
    data.bytes = (unsigned char *)allocate(data.len);
    check(corelane_get_metadata(engine, data.bytes, data.len, &data.len), "metadata");
    return data;
}

static blob get_descriptor(corelane_region_t region)
{
    blob data = {NULL, 0};
    (void)corelane_get_descriptor(region, NULL, 0, &data.len);
    data.bytes = (unsigned char *)allocate(data.len);
    check(corelane_get_descriptor(region, data.bytes, data.len, &data.len), "a descriptor");
    return data;
}

/* --- prefill ------------------------------------------------------------------------------------ */

/* Called for each notification; name and payload are not strings, and live during the call only. */
static void on_notification(void *context, const char *from, size_t from_len, const void *payload,
                            size_t payload_len)
{
    int *done = (int *)context;
    (void)from;
    (void)from_len;
    if (payload_len == strlen(REQUEST_DONE) && memcmp(payload, REQUEST_DONE, payload_len) == 0) {
        *done = 1;
    }
}

static int prefill(int to_decode)
{
    const size_t cache_bytes = (size_t)PREFILL_BLOCKS * BLOCK_BYTES;
    uint64_t *cache = (uint64_t *)allocate(cache_bytes);
    corelane_engine_t engine = create_engine("prefill-0");
    corelane_region_t region = 0;
    blob metadata, descriptor;
    int done = 0;

    for (uint32_t block = 0; block < PREFILL_BLOCKS; block++) {
        fill_block(cache + (size_t)block * BLOCK_WORDS, block);
    }
    check(corelane_reg(engine, cache, cache_bytes, CORELANE_MEMORY_DRAM, 0,
                       CORELANE_ACCESS_REMOTE_READ, &region),
          "registering the cache");

    metadata = get_metadata(engine);
    descriptor = get_descriptor(region);
    send_blob(to_decode, &metadata);
    send_blob(to_decode, &descriptor);
    close(to_decode);

    /* Nothing to do for the transfer itself: the lane of the engine serves it. */
    while (!done) {
        size_t count = 0;
        check(corelane_wait_notifs(engine, TIMEOUT_MS, on_notification, &done, &count),
              "waiting for the notification");
        if (count == 0) {
            fail("nobody has fetched the request");
        }
    }

    /* Once this has returned CORELANE_OK, nobody touches the cache any more. */
    check(corelane_mr_destroy(region), "deregistering the cache");
    check(corelane_engine_destroy(engine), "ending the engine");
    free(cache);
    free(metadata.bytes);
    free(descriptor.bytes);
    return 0;
}

/* --- decode ------------------------------------------------------------------------------------- */

static double now_seconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

/* The blocks of the request, scattered over both caches, as paged attention leaves them. */
static void choose_blocks(uint32_t *there, uint32_t *here)
{
    for (uint32_t i = 0; i < FETCHED; i++) {
        there[i] = (i * 389 + 7) % PREFILL_BLOCKS; /* 389 is odd: no block twice */
        here[i] = (i * 173 + 3) % DECODE_BLOCKS;
    }
}

static void verify(const uint64_t *cache, const uint32_t *there, const uint32_t *here)
{
    unsigned char taken[DECODE_BLOCKS] = {0};
    for (uint32_t i = 0; i < FETCHED; i++) {
        taken[here[i]] = 1;
        if (!block_holds(cache + (size_t)here[i] * BLOCK_WORDS, there[i])) {
            fail("a block has wrong bytes");
        }
    }
    for (uint32_t block = 0; block < DECODE_BLOCKS; block++) {
        if (!taken[block] && !block_is_zero(cache + (size_t)block * BLOCK_WORDS)) {
            fail("a block was overwritten that nobody asked for");
        }
    }
}

/* Stops the prefill process first, so that it cannot be faster than its end. */
static void freeze_prefill(void)
{
    int status = 0;
    if (kill(prefill_pid, SIGSTOP) != 0 || waitpid(prefill_pid, &status, WUNTRACED) < 0 ||
        !WIFSTOPPED(status)) {
        fail_errno("stopping the prefill process");
    }
}

/* The status of a transfer that has ended in an error; its words belong to the transfer. */
static void fail_transfer(corelane_xfer_t xfer, corelane_status status)
{
    char words[1024];
    size_t len = 0;
    if (status == CORELANE_IN_PROGRESS) {
        fail("the read has not ended in time");
    }
    if (corelane_xfer_error(xfer, words, sizeof words, &len) != CORELANE_OK) {
        len = 0;
    }
    fprintf(stderr, "%s: the read failed: %s: %.*s\n", role, corelane_status_name(status),
            (int)len, words);
    /* Also after an error: once this returns CORELANE_OK, the memory of the transfer is free. */
    check(corelane_release(xfer, TIMEOUT_MS), "releasing the transfer");
}

static int decode(int from_prefill)
{
    const size_t cache_bytes = (size_t)DECODE_BLOCKS * BLOCK_BYTES;
    const double mebibytes = (double)FETCHED * BLOCK_BYTES / (1024.0 * 1024.0);
    uint64_t *cache = (uint64_t *)allocate(cache_bytes);
    uint32_t there[FETCHED], here[FETCHED];
    corelane_engine_t engine = create_engine("decode-0");
    corelane_region_t region = 0;
    corelane_conn_t conn = 0;
    corelane_desc_t desc = 0;
    corelane_xfer_t xfer = 0;
    corelane_region_info remote_cache;
    corelane_local_blocks local;
    corelane_remote_blocks remote;
    corelane_status status;
    double start, seconds;

    /* Memory that only this engine's own transfers use. */
    check(corelane_reg(engine, cache, cache_bytes, CORELANE_MEMORY_DRAM, 0, CORELANE_ACCESS_LOCAL,
                       &region),
          "registering the cache");

    blob metadata = receive_blob(from_prefill);
    blob descriptor = receive_blob(from_prefill);
    close(from_prefill);
    check(corelane_load_peer(engine, metadata.bytes, metadata.len, &conn), "loading the peer");
    check(corelane_import_descriptor(engine, descriptor.bytes, descriptor.len, &desc),
          "importing the descriptor");
    check(corelane_descriptor_info(desc, &remote_cache), "looking at the descriptor");

    /* Prepared once; could be posted any number of times. */
    choose_blocks(there, here);
    local.base = (uint64_t)(uintptr_t)cache;
    local.stride = BLOCK_BYTES;
    local.block_bytes = BLOCK_BYTES;
    local.indices = here;
    local.count = FETCHED;
    remote.desc = desc;
    remote.base = remote_cache.addr;
    remote.stride = BLOCK_BYTES;
    remote.block_bytes = BLOCK_BYTES;
    remote.indices = there;
    remote.count = FETCHED;
    check(corelane_prepare_strided(conn, CORELANE_READ, &local, &remote, &xfer),
          "preparing the read");

    /* The first transfer would connect by itself; here it keeps that out of the measured time. */
    check(corelane_connect(conn, TIMEOUT_MS), "connecting");
    if (die_after_post) {
        freeze_prefill();
    }

    /* The notification is seen by the prefill process only when all bytes have arrived here. */
    start = now_seconds();
    check(corelane_post_notify(xfer, REQUEST_DONE, strlen(REQUEST_DONE)), "posting the read");
    if (die_after_post) {
        kill(prefill_pid, SIGKILL);
    }
    status = corelane_xfer_wait(xfer, TIMEOUT_MS);
    seconds = now_seconds() - start;

    if (status != CORELANE_OK) {
        fail_transfer(xfer, status);
    } else {
        check(corelane_release(xfer, TIMEOUT_MS), "releasing the transfer");
        verify(cache, there, here);
        printf("fetched %4d blocks of %3d KiB  %6.1f MiB in %8.3f ms  %6.2f GiB/s  verified\n",
               FETCHED, BLOCK_BYTES / 1024, mebibytes, seconds * 1e3,
               mebibytes / 1024.0 / seconds);
    }

    check(corelane_descriptor_destroy(desc), "freeing the descriptor");
    check(corelane_unload_peer(conn, -1), "unloading the peer"); /* flushes the notification */
    check(corelane_mr_destroy(region), "deregistering the cache");
    check(corelane_engine_destroy(engine), "ending the engine");
    free(cache);
    free(metadata.bytes);
    free(descriptor.bytes);
    return status == CORELANE_OK ? 0 : 1;
}

/* --- both --------------------------------------------------------------------------------------- */

int main(int argc, char **argv)
{
    int ends[2], status = 0, result;

    die_after_post = argc == 2 && strcmp(argv[1], "--die-after-post") == 0;
    if (argc != 1 && !die_after_post) {
        fprintf(stderr, "usage: %s [--die-after-post]\n", argv[0]);
        return 2;
    }
    if (pipe(ends) != 0) {
        fail_errno("making a pipe");
    }
    /* Before any engine exists: a forked child cannot use its parent's engines. */
    prefill_pid = fork();
    if (prefill_pid < 0) {
        fail_errno("starting the prefill process");
    }
    if (prefill_pid == 0) {
        role = "prefill";
        close(ends[0]);
        return prefill(ends[1]);
    }

    role = "decode";
    close(ends[1]);
    result = decode(ends[0]);
    if (waitpid(prefill_pid, &status, 0) < 0) {
        fail_errno("waiting for the prefill process");
    }
    if (result == 0 && (!WIFEXITED(status) || WEXITSTATUS(status) != 0)) {
        prefill_pid = 0; /* it is gone */
        fail("the prefill process has failed");
    }
    return result;
}
